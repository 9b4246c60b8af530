"""Faults put into the core functions on purpose: each must make a test fail.

    python tests/mutants.py [WORD ...]        all of them, or those whose file, text or tests hold a word (make mutants)

A mutant is a file, a piece of its text that stands there once, what it becomes, and the tests that must notice. The
faults are put into a copy of the tree, so that the working tree is never touched. Exit code 1 if one survives.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VLLM = "benchmarks/scoring/vllm.py"
ORIGINALS = "benchmarks/originals.py"
SERVER = "benchmarks/scoring/server.py"
ORIGIN = "endprompt/origin.py"
FINGERPRINT = "benchmarks/scoring/fingerprint.py"
ATTENTION = "endprompt/model/attention.py"
LOAD = "endprompt/model/load.py"
WEIGHTS = "endprompt/model/weights.py"
LAYERS = "endprompt/fast/layers.py"
PLAN = "endprompt/plan.py"
LOSS = "endprompt/train/loss.py"
POSITIONS = "endprompt/positions.py"
ROPE = "endprompt/rope.py"
GEOMETRY = "endprompt/model/geometry.py"
BOUNDS = "analysis/bounds.py"
OBSERVABILITY = "analysis/observability.py"
SUMMARY = "benchmarks/summary.py"
METRICS = "benchmarks/longbench/metrics.py"
TEXT = "endprompt/text.py"
COLLATE = "endprompt/collate.py"
#: (file, text, what it becomes, tests: folder/name below tests/, without test_)
MUTANTS = [
    # filters
    ("endprompt/data/duplicates.py", "self._exact[digest] = source", "pass", "endprompt/data/shards"),
    ("endprompt/data/duplicates.py", ">= self.threshold", "> 2", "endprompt/data/shards"),
    # the lean optimizer on shards, and on parts of whole weights
    ("endprompt/distributed.py", "_reduce_scatter(values_N[start:end], values_N)", "pass", "endprompt/distributed"),
    ("endprompt/distributed.py", "_all_gather(values_N, values_N[start:end])", "pass", "endprompt/distributed"),
    ("endprompt/fast/lean.py", "first = shard.first * BLOCK", "first = 0", "endprompt/fast/lean"),
    ("endprompt/fast/lean.py", "norm = distributed.total(norm.square()).sqrt()", "pass", "endprompt/distributed"),
    ("endprompt/distributed.py", "unit.set_reshard_after_backward(not more", "unit.set_reshard_after_backward(True", "endprompt/distributed"),
    # documents apart in a row
    ("endprompt/model/packed.py", "return (positions_BT == 0).cumsum(-1) - 1", "return positions_BT * 0", "endprompt/model/packed"),
    # conversations and mixtures
    ("endprompt/data/chat.py", "scored[len(ids) - completion :] = 1", "scored[:] = 1", "endprompt/data/chat"),
    ("endprompt/data/rows.py", "fronts_marked(self.documents)", "self.documents", "endprompt/data/chat"),
    ("endprompt/data/mixture.py", "for n in (index, index + 1)", "for n in (index, index)", "endprompt/data/mixture"),
    ("endprompt/data/mixture.py", "dataclasses.replace(spec, seed=seed)", "spec", "endprompt/data/mixture"),
    ("endprompt/train/evaluate.py", "else documents.weights[window]", "else np.ones(length)", "endprompt/data/chat"),
    (GEOMETRY, "return extended\n    extended.rope", "pass\n    extended.rope", "endprompt/data/chat"),
    # the schemes in other trainers
    (COLLATE, "apart_attention(attention) if packed else training", "training_attention(attention) if packed else training",
     "endprompt/collate"),
    (COLLATE, "model.set_attn_implementation(name)", "pass", "endprompt/collate"),
    (COLLATE, "model.set_submodule(path, made)", "pass", "endprompt/collate"),
    (COLLATE, "setattr(module, key, value)", "pass", "endprompt/collate"),
    (COLLATE, 'batch["weight_total"] = total', "pass", "endprompt/collate"),
    (COLLATE, "weights._read = False", "weights._read = True", "endprompt/collate"),
    (ATTENTION, "mask_function(row, head, known[row, query], known[row, key])", "mask_function(row, head, query, key)",
     "endprompt/model/kinds"),
    ("endprompt/train/objective.py", "total * share", "share", "endprompt/train/experts"),
    (ATTENTION, "return visible if later else (key <= query) & visible", "return visible", "endprompt/model/kinds"),
    ("endprompt/model/kinds.py", "key=lambda kind: kind.reach is not None", "key=lambda kind: kind.reach is None",
     "endprompt/model/kinds"),
    # what is given to vLLM
    (VLLM, 'kind in ("default", "linear", "llama3")', 'kind in ("default", "linear", "llama3", "dynamic")', "benchmarks/scoring/vllm"),
    (VLLM, 'int(parameters["original_max_position_embeddings"] * (parameters.get("factor") or 1))', "window", "benchmarks/scoring/vllm"),
    (VLLM, "if shortest <= original < needed", "if shortest < original < needed", "benchmarks/scoring/vllm"),
    (VLLM, '"short_mscale": scale, "long_mscale": scale', '"short_mscale": 1.0, "long_mscale": 1.0', "benchmarks/scoring/vllm"),
    (VLLM, "if length + new > self.max_length", "if length > self.max_length", "benchmarks/scoring/vllm"),
    # what a server is asked and believed
    (SERVER, "if read != tokens:", "if read is None:", "benchmarks/scoring/server"),
    (SERVER, 'plain["repeat_penalty"] = 1.0', "pass", "benchmarks/scoring/server"),
    (SERVER, "if tried == tries:", "if False:", "benchmarks/scoring/server"),
    (SERVER, 'if choice.get("finish_reason") == "length" and made is not None and made < new:', "if False:", "benchmarks/scoring/server"),
    (SERVER, "if waiting and self.served.window is None:", "if False:", "benchmarks/scoring/server"),
    (SERVER, "return text.replace(key, \"[key]\") if key else text", "return text", "benchmarks/scoring/server"),
    (FINGERPRINT, "model=served.model if served else config.model,", "model=None,", "benchmarks/scoring/runs"),
    # LongBench v2
    ("benchmarks/longbench/v2.py", "*tokens[-limit // 2 :]", "*tokens[-(limit // 2) :]", "benchmarks/longbench/v2"),
    ("benchmarks/longbench/v2.py", '.replace("*", "")', "", "benchmarks/longbench/v2"),
    # lm-eval's groups
    ("benchmarks/scoring/suites/lm_eval.py", "ids[len(ids) - keep // 2 :]", "ids[:0]", "benchmarks/scoring/lm_eval_groups"),
    ("benchmarks/scoring/suites/lm_eval.py", "    task._filters[0].apply([request])\n", "    request.filtered_resps = {task._filters[0].name: answer}\n", "benchmarks/scoring/lm_eval_groups"),
    # thoughts
    ("benchmarks/chat.py", "text.rpartition(END_OF_THOUGHT)", "text.partition('<think>')", "benchmarks/scoring/server"),
    ("benchmarks/scoring/recording.py", "if len(ids := reader.ids([found])[0]) > limit:", "if False:", "benchmarks/scoring/server"),
    ("benchmarks/scoring/recording.py", 'settings["max_gen_toks"] + more', 'settings["max_gen_toks"]', "benchmarks/scoring/server"),
    ("benchmarks/scoring/checkpoint.py", " - config.thought_tokens", "", "benchmarks/scoring/server"),
    # checkpoints of the hub and of GGUF files
    (ORIGIN, "if not (snapshot / name).is_file()", "if False", "endprompt/origin"),
    (ORIGIN, 'LEFT = ("*/*", "consolidated*", "*.py")', 'LEFT = ("consolidated*",)', "endprompt/origin"),
    (ORIGIN, 'if missing := sorted(report["missing_keys"])', "if missing := []", "endprompt/origin"),
    # originals from their hosts
    (ORIGINALS, 'problem = "" if sum(1 for _ in records) else "sends no record"', "pass", "benchmarks/originals"),
    ("endprompt/data/shards.py", "check_first_records(config, [", "list([", "endprompt/data/mixture"),
    (ORIGINALS, "if sha256 and found != sha256", "if False", "benchmarks/originals"),
    (ORIGINALS, 'if version or (sha256 and held.get("sha256") == sha256)', "if part.is_file()", "benchmarks/originals"),
    (ORIGINALS, "known and sha256 not in known", "False", "benchmarks/originals"),
    (ORIGINALS, "path.match(source.names[0]) and (other :=", "(other :=", "benchmarks/originals"),
    # a question about a long text
    ("benchmarks/talk.py", "return self.window - self.new_tokens", "return self.window", "benchmarks/talk"),
    ("benchmarks/talk.py", "self.kept = self.text[:first] + self.text[first + count :]", "self.kept = self.text[: len(self.text) - count]", "benchmarks/talk"),
    (TEXT, "(bos in reader.lead(ids) and bos in ids)", "(bos in ids)", "benchmarks/chat_checks"),
    # what a prediction depends on
    ("benchmarks/scoring/predictions.py", 'if e.get("run") == run', "if True", "benchmarks/scoring/runs"),
    ("benchmarks/report/board.py", "summary.RESAMPLES, seed) for seed, side", "summary.RESAMPLES) for seed, side", "benchmarks/report/board"),
    (FINGERPRINT, "{name: getattr(config, name) for", "{name: name != 'max_new_tokens' and getattr(config, name) for", "benchmarks/scoring/runs"),
    (FINGERPRINT, 'else device_of(config.device).partition(":")[0]', 'else ""', "benchmarks/scoring/runs"),
    ("benchmarks/scoring/hf.py", "1 if alone else self.batch_size_per_gpu", "self.batch_size_per_gpu", "benchmarks/scoring/short"),
    ("endprompt/train/output.py", "if known[key] != source[key]:", "if False:", "endprompt/train/loop"),
    (WEIGHTS, "parts.append(file.read(min(taken, end - start)))", "pass", "endprompt/train/loop"),
    (FINGERPRINT, "if computes or not known else known[-1]", "if True else known[-1]", "benchmarks/scoring/runs"),
    ("benchmarks/scoring/suites/short.py", 'seed={self.config.seed} samples', 'samples', "benchmarks/scoring/runs benchmarks/scoring/short"),
    ("benchmarks/chat.py", "moment = datetime.datetime(day.year, day.month, day.day)", "moment = datetime.datetime.now()", "benchmarks/scoring/runs"),
    ("benchmarks/chat.py", 'if source is None or (source == "own" and date is None):', "if source is None:", "benchmarks/scoring/runs"),
    ("benchmarks/scoring/run.py", "kept = None if config.overwrite else fingerprint.read_day(config.directory)", "kept = None", "benchmarks/scoring/runs"),
    ("benchmarks/scoring/run.py", "notes += check_model(config, model_config)", "pass", "benchmarks/scoring/run"),
    ("benchmarks/lab/cells.py", "cell.target, config.factor,", "cell.target, None,", "benchmarks/lab/matrix"),
    # generation
    ("benchmarks/scoring/generate.py", "if lost[place]:", "if False:", "benchmarks/scoring/generate"),
    ("benchmarks/scoring/generate.py", "model.generation_config = settings", "settings.eos_token_id", "benchmarks/scoring/generate"),
    ("benchmarks/scoring/generate.py", "read <= window < read + job.new_tokens - 1", "read < window < read + job.new_tokens - 1", "benchmarks/scoring/generate"),
    ("benchmarks/scoring/generate.py", "lengths_b[:, None] - 1)", "lengths_b[:, None] + 1)", "benchmarks/scoring/generate"),
    ("benchmarks/scoring/laid_out.py", "place_S > place_T[:, None] - window", "place_S >= place_T[:, None] - window", "benchmarks/scoring/generate"),
    ("benchmarks/scoring/laid_out.py", "place_S >= self.step_1)", "place_S >= 0)", "benchmarks/scoring/generate"),
    ("benchmarks/scoring/laid_out.py", "torch.maximum(self.step_1, (window - 1)", "torch.maximum(self.step_1, (window + 0)", "benchmarks/scoring/generate"),
    ("benchmarks/scoring/settled.py", "if prompt.startswith(text):", "if False:", "benchmarks/scoring/settled"),
    ("benchmarks/scoring/settled.py", '.rstrip("\\ufffd")', "", "benchmarks/scoring/settled"),
    # runs that repeat
    ("endprompt/train/determinism.py", "compiler.deterministic = True", "compiler.deterministic = False", "endprompt/train/determinism"),
    ("endprompt/train/determinism.py", "compiler.deterministic = by_rule", "pass", "endprompt/train/determinism"),
    (ATTENTION, "return kernels_first(device, (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH))", "pass", "endprompt/train/determinism"),
    ("endprompt/config.py", 'REPEATABLE = ("sdpa",', 'REPEATABLE = ("flex", "sdpa",', "endprompt/train/determinism"),
    ("benchmarks/lab/arms.py", 'row.get("suite", "ruler") == suite', "True", "benchmarks/lab/published"),
    ("benchmarks/lab/material.py", 'cell.trained or cell.settings.get("scaling") != "none"', "True", "benchmarks/lab/published"),
    ("benchmarks/lab/verdicts.py", "b[task] - a[task]", "a[task] - b[task]", "benchmarks/lab/published"),
    ("benchmarks/lab/runner.py", "sum(value != deterministic for", "sum(value == deterministic for", "benchmarks/lab/runner"),
    # what a model computes and holds
    (ATTENTION, "if value is None or name in HARMLESS or", "if name or", "endprompt/model/attention"),
    (ATTENTION, "if mask is not None:\n        raise", "if False:\n        raise", "endprompt/model/attention"),
    ("endprompt/model/parity.py", "torch.linspace(-1000, 1000, 2 * size)", "torch.zeros(2 * size)", "endprompt/model/parity"),
    ("endprompt/model/parity.py", 'if model.config._attn_implementation != "eager":', "if False:", "endprompt/model/parity"),
    (LOAD, "        check_loaded(model, loss)", "        pass", "endprompt/model/parity"),
    ("benchmarks/scoring/hf.py", "parity.check_loaded(model.eval())", "model.eval()", "endprompt/model/parity"),
    (LOAD, "if set(beyond) - set(added):", "if False:", "endprompt/text"),
    (LOAD, "check_files(directory, TOKENIZER)", "pass", "endprompt/model/config_errors"),
    ("endprompt/train/evaluate.py", "[*lead, *documents", "[*documents", "endprompt/train/evaluate"),
    ("endprompt/model/load.py", "quantized.unpacked(own[name])", "own[name]", "endprompt/model/lora"),
    ("endprompt/model/lora.py", "if stored.get(name) != wanted.get(name):", "if False:", "endprompt/model/lora"),
    ("endprompt/model/lora.py", "if ours != theirs:", "if False:", "endprompt/model/lora"),
    ("endprompt/train/evaluate.py", "reading(int(weights.argmax()))", "reading(len(ids))", "endprompt/model/length_rope"),
    (GEOMETRY, "times = now.factor * target / now.window", "pass", "endprompt/model/geometry"),
    ("endprompt/model/parity.py", "if not (apart <= allowed and", "if False and not (apart <= allowed and", "endprompt/model/parity"),
    (WEIGHTS, "if unknown := sorted(known - predicting):", "if unknown := []:", "endprompt/model/weights"),
    (WEIGHTS, "config.tie_word_embeddings = False", "pass", "endprompt/model/weights"),
    (WEIGHTS, "setattr(part, key, 0)", "pass", "endprompt/model/weights"),
    # fused layers
    (LAYERS, "return grad_x, grad_x if ctx.adds else None", "return grad_x, None", "endprompt/fast/layers"),
    (LAYERS, ".mean(-1, keepdim=True)) + grad_sum_MD.float()", ".mean(-1, keepdim=True))", "endprompt/fast/layers"),
    (LAYERS, "exact * (grad * exact).mean(-1, keepdim=True)", "exact * grad.mean(-1, keepdim=True)", "endprompt/fast/layers"),
    (LAYERS, "for one in grads_MD[1:]:\n        grad = ", "for one in grads_MD[2:]:\n        grad = ", "endprompt/fast/layers"),
    (LAYERS, "logistic + silu * (1 - logistic)", "logistic + silu", "endprompt/fast/layers"),
    (LAYERS, "return grad_BTN, grad_weight, None, None, *grads", "return None, grad_weight, None, None, *grads", "endprompt/fast/layers"),
    # what a step is estimated to take
    (PLAN, "rates = ATTENTIONS[config.attention]", 'rates = ATTENTIONS["sdpa"]', "endprompt/plan"),
    (PLAN, " * reach / (reach + rates.diagonal)", "", "endprompt/plan"),
    (PLAN, "Attention(682e12, 587e12, 1400)", "Attention(587e12, 500e12, 1400)", "endprompt/plan"),
    # the lean optimizer and its sums
    ("endprompt/fast/lean.py", '"first_index": wrapped(first + start)', '"first_index": 0', "endprompt/fast/lean"),
    ("endprompt/fast/lean.py", "_mix(self.seed, int(state[\"step\"]), index)", "_mix(self.seed, int(state[\"step\"]))", "endprompt/fast/lean"),
    (LOSS, "ids_BT.roll(-1, dims=1)", "ids_BT.roll(1, dims=1)", "endprompt/train/loss"),
    (LOSS, "last = torch.zeros_like(weights_BT[:, :1])", "last = weights_BT[:, :1]", "endprompt/train/loss"),
    ("endprompt/shapes.py", "return tokens - tokens % 256 or tokens", "return tokens", "endprompt/train/loss"),
    ("endprompt/train/objective.py", "weights_BT[part] / total)", "weights_BT[part])", "endprompt/train/loop"),
    (LAYERS, "h_MF = kept_MF if ctx.keep else again_MF", "h_MF = expanded[0]", "endprompt/fast/layers"),
    (LAYERS, "if not module.training or past_key_values", "if past_key_values", "endprompt/fast/layers"),
    # positions
    (POSITIONS, "prompt, target - prompt))\n\n\ndef endprompt_random", "prompt, target - prompt - 1))\n\n\ndef endprompt_random", "endprompt/positions"),
    (POSITIONS, "np.arange(start, start + prompt, dtype=np.int64)", "np.arange(start, start + prompt, dtype=np.int64)[::-1]", "endprompt/positions"),
    (POSITIONS, "integers(context, target - prompt, endpoint=True)", "integers(context, target - prompt)", "endprompt/positions"),
    (POSITIONS, "integers(context, target - prompt, endpoint=True)", "integers(context - 1, target - prompt, endpoint=True)", "endprompt/positions"),
    (POSITIONS, "for k in range(1, count + 1)]", "for k in range(count)]", "endprompt/positions"),
    (POSITIONS, "positions[first:] += skip", "positions[first + 1 :] += skip", "endprompt/positions"),
    (POSITIONS, "integers(1, (n + 1) // 2, endpoint=True)", "integers(1, n // 2, endpoint=True)", "endprompt/positions"),
    (POSITIONS, "integers(0, room, endpoint=True)", "integers(1, room, endpoint=True)", "endprompt/positions"),
    (POSITIONS, "intervals.append((target - context - prompt + 1, target - 1))", "intervals.append((target - context - prompt, target - 1))", "endprompt/positions"),
    (POSITIONS, "hi = target - context - prompt if prompt", "hi = target - context - prompt - 1 if prompt", "endprompt/positions"),
    (POSITIONS, "if out and lo <= out[-1][1] + 1:", "if out and lo <= out[-1][1]:", "endprompt/positions"),
    (POSITIONS, "SeedSequence([seed, index])", "SeedSequence([seed])", "endprompt/positions endprompt/data/rows"),
    # rows of training and their loss
    (LOSS, "weights_N * (lse_N - logits.gather", "(lse_N - logits.gather", "endprompt/train/loss"),
    (LOSS, "(grad * weights_N[:, None])", "grad", "endprompt/train/loss"),
    (LOSS, "slice(int(rows[0]), int(rows[-1]) + 1)", "slice(int(rows[0]), int(rows[-1]))", "endprompt/train/loss"),
    (LOSS, "grad_hidden * grad_total.to(grad_hidden.dtype)", "grad_hidden", "endprompt/train/loss"),
    (LOSS, "torch.logsumexp(logits, dim=-1)", "torch.logsumexp(logits, dim=-1) + 1e-3", "endprompt/train/loss"),
    (LOSS, "keep = weights_N > 0", "keep = weights_N >= 1", "endprompt/train/loss"),
    ("endprompt/train/objective.py", "labels, weights = ids_BT[:, 1:].reshape(-1), weights_BT[:, 1:]", "labels, weights = ids_BT[:, 1:].reshape(-1), weights_BT[:, :-1]", "endprompt/train/loop"),
    ("endprompt/prompts.py", ">= len(self.cue) + self.given", ">= self.given", "endprompt/prompts"),
    ("endprompt/prompts.py", "context[start : start + self.span]", "context[: self.span]", "endprompt/prompts endprompt/data/rows"),
    ("endprompt/train/loop.py", "self.smoothed > self.best + self.limit", "self.smoothed > self.best + 2 * self.limit", "endprompt/train/guard"),
    # frequencies
    (ROPE, "return base_frequencies(base, head_dim) / factor, 1.0", "return base_frequencies(base, head_dim) * factor, 1.0", "endprompt/rope"),
    (ROPE, "return base * factor ** (head_dim / (head_dim - 2))", "return base * factor", "endprompt/rope"),
    (ROPE, "grown = factor * length / original_length - (factor - 1)", "grown = factor * length / original_length", "endprompt/rope"),
    (ROPE, "theta / factor * ramp + theta * (1 - ramp)", "theta * ramp + theta / factor * (1 - ramp)", "endprompt/rope"),
    (ROPE, "0.1 * over * math.log(factor)", "0.1 * over * math.log2(factor)", "endprompt/rope"),
    (ROPE, "if mscale and mscale_all_dim else", "if mscale else", "endprompt/rope"),
    # windows and keys of checkpoints that were extended before, and the pairs that RoPE turns
    (GEOMETRY, "max(stated, round((original or stated) * factor))", "stated", "endprompt/model/geometry"),
    (GEOMETRY, "readings[stated] = round(stated / factor)", "pass", "endprompt/model/geometry"),
    (GEOMETRY, "else target / now.original", "else target / now.window", "endprompt/model/geometry"),
    (GEOMETRY, "for key in rope.CARRIED if key in parameters", 'for key in ("partial_rotary_factor",) if key in parameters', "endprompt/model/geometry"),
    (GEOMETRY, "extended.head_dim = rope_geometry(config).head_dim", "pass", "endprompt/model/geometry"),
    (ROPE, 'if stated != 1 and "attention_factor" not in options:', "if False:", "endprompt/model/geometry"),
    (POSITIONS, "if scheme in WITH_PROMPT and not prompt:", "if False:", "endprompt/positions"),
    ("analysis/capture.py", "first = np.flatnonzero((moved > 0).any(1))", "first = np.flatnonzero((moved < 0).any(1))", "analysis/verify"),
    ("analysis/capture.py", "factor[..., None] * (before", "(before", "analysis/verify"),
    ("analysis/predict.py", "if kind and layer.layer in kind.layers", "if kind", "analysis/verify"),
    ("benchmarks/lab/theory.py", "reached.max()", "reached.min()", "benchmarks/lab/theory"),
    ("benchmarks/lab/theory.py", "sign * total >= sign * value", "total >= value", "benchmarks/lab/theory"),
    ("benchmarks/lab/theory.py", "all(free[: len(SETS)])", "all(free[:2])", "benchmarks/lab/theory"),
    ("benchmarks/lab/theory.py", 'max(part["scores"]) >= estimates.FLOOR', "True", "benchmarks/lab/theory"),
    (PLAN, 'if line["scheme"] != "none"), key', 'if line), key', "endprompt/plan"),
    ("analysis/capture.py", "k=layer.k[:, ::-1]", "k=layer.k", "analysis/verify"),
    ("analysis/attention.py", "factor**2 * layer", "factor * layer", "analysis/measures"),
    ("analysis/attention.py", "integers(1, tokens, length", "integers(0, tokens, length", "analysis/measures"),
    ("analysis/measures.py", "np.mod(angle - omega * lo,", "np.mod(angle + omega * lo,", "analysis/measures"),
    ("analysis/measures.py", "np.sqrt(2 * share(energy, _turned(theta - omega", "np.sqrt(share(energy, _turned(theta - omega", "analysis/measures"),
    ("analysis/measures.py", "length * np.sin(half), out", "np.sin(half), out", "analysis/measures"),
    ("analysis/scene.py", 'for value in (stated, rows[key], usual)', 'for value in (stated, usual)', "analysis/verify"),
    (ROPE, "(1 - smooth) * theta / factor + smooth * theta, 1.0", "smooth * theta / factor + (1 - smooth) * theta, 1.0", "endprompt/rope"),
    # before the first step and after the last
    ("endprompt/train/outcome.py", "min(saved, config.keep + 1)", "min(saved, config.keep)", "endprompt/train/outcome"),
    ("endprompt/train/loop.py", "and not self.evaluated():", "and False:", "endprompt/train/outcome"),
    ("endprompt/train/loop.py", "if self.saved != self.step and", "if", "endprompt/train/outcome"),
    ("endprompt/train/output.py", "or (config.overwrite and self.work.exists())", "or False", "endprompt/train/outcome"),
    ("endprompt/train/output.py", "or not self.work.exists()  #", "or False  #", "endprompt/train/outcome"),
    ("endprompt/model/length_rope.py", "part_T.max() + 1", "position_ids.max() + 1", "endprompt/model/length_rope"),
    ("endprompt/model/length_rope.py", "torch.where(length > window", "torch.where(length >= window", "endprompt/model/length_rope"),
    # bounds
    (BOUNDS, "return np.abs(z) @ np.abs(omega) ** check_order(order)", "return np.abs(z) @ np.abs(omega) ** (check_order(order) + 1)", "analysis/bounds"),
    (BOUNDS, "return np.abs(omega).max() ** check_order(order) * supremum", "return np.abs(omega).mean() ** check_order(order) * supremum", "analysis/bounds"),
    (BOUNDS, "scale = attention_factor**2", "scale = attention_factor", "analysis/bounds analysis/verify"),
    (BOUNDS, "return 2 / sigma if", "return 1 / sigma if", "analysis/bounds"),
    (BOUNDS, "return 2 * eta, math.tanh(eta / 2)", "return eta, math.tanh(eta / 2)", "analysis/bounds"),
    (BOUNDS, "math.tanh(eta / 2)\n", "math.tanh(eta / 4)\n", "analysis/bounds"),
    ("analysis/certificates.py", "curvature = 1.01 * (np.abs(z) @ omega**2) / 8", "curvature = 1.01 * (np.abs(z) @ omega**2) / 80", "analysis/bounds"),
    ("analysis/certificates.py", "lower, upper = largest - error, goal(largest) + error", "lower, upper = largest + error, goal(largest) + error", "analysis/bounds"),
    ("analysis/sweep.py", "(reached - unseen)", "reached", "analysis/rank"),
    ("analysis/sweep.py", "torch.hypot(slope, score)", "slope", "analysis/rank"),
    ("analysis/sweep.py", "self.gap = float(", "self.gap = 0 * float(", "analysis/rank"),
    ("analysis/sweep.py", "there.amax(1) * scale", "reached * scale", "analysis/rank"),
    ("analysis/sweep.py", "share[self.kept[order] :] = 1.0", "share[self.kept[order] :] = 0.0", "analysis/rank"),
    (OBSERVABILITY, "number = hi - lo + 1", "number = hi - lo", "analysis/observability"),
    (OBSERVABILITY, "cs = (sin_plus - sin_minus) / 2", "cs = (sin_plus + sin_minus) / 2", "analysis/observability"),
    (OBSERVABILITY, "information = (n_obs / sigma**2)", "information = (n_obs / sigma)", "analysis/observability"),
    (OBSERVABILITY, "starts, width = [context], target - prompt - context + 1", "starts, width = [context], target - prompt - context", "analysis/observability"),
    # metrics
    (SUMMARY, "if score >= threshold), default=0", "if score > threshold), default=0", "benchmarks/summary"),
    (SUMMARY, "sorted(scores, reverse=direction == \"dec\")", "sorted(scores, reverse=direction == \"inc\")", "benchmarks/summary"),
    (SUMMARY, "np.std(scores, ddof=1)", "np.std(scores)", "benchmarks/summary benchmarks/scoring/run"),
    (SUMMARY, "center = (share + z * z / (2 * n))", "center = (share + z * z / n)", "benchmarks/summary"),
    ("benchmarks/report/board.py", "resampled([part.second - part.first for", "resampled([part.first - part.second for", "benchmarks/report/board"),
    (SUMMARY, "max(2 * tail, 1 / RESAMPLES)", "max(tail, 1 / RESAMPLES)", "benchmarks/summary benchmarks/scoring/run"),
    ("benchmarks/ruler/tasks.py", "float(any(found)) if SPECS[task].metric == \"any\"", "float(all(found)) if SPECS[task].metric == \"any\"", "benchmarks/ruler/upstream benchmarks/scoring/run"),
    ("benchmarks/ruler/replay.py", "if not looks_first and most is not None and size > most:", "if False:", "benchmarks/ruler/replay"),
    ("benchmarks/ruler/replay.py", 'gap = "" if self.old else " "', 'gap = " "', "benchmarks/ruler/replay"),
    ("benchmarks/ruler/texts.py", 'prefix.rstrip() if rules.bare_end else prefix.rstrip() + " "', "prefix.rstrip()", "benchmarks/ruler/replay"),
    ("benchmarks/ruler/tasks.py", "answer.lower() in clean(prediction).lower()", "answer in clean(prediction)", "benchmarks/ruler/upstream benchmarks/scoring/run"),
    (METRICS, "re.sub(r\"\\b(a|an|the)\\b\", \" \", bare)", "re.sub(r\"\\b(a|the)\\b\", \" \", bare)", "benchmarks/longbench/metrics"),
    (METRICS, "(Counter(prediction) & Counter(answer)).total()", "len(set(prediction) & set(answer))", "benchmarks/longbench/metrics"),
    (METRICS, "return 1 / len(named) if answer in named else 0.0", "return 1.0 if answer in named else 0.0", "benchmarks/longbench/metrics"),
    (METRICS, "numbers.count(str(answer)) / len(numbers)", "float(str(answer) in numbers)", "benchmarks/longbench/metrics"),
    (METRICS, "round(100 * difflib", "int(100 * difflib", "benchmarks/longbench/metrics"),
    (SUMMARY, "first : first + fitting]", "first : first + fitting - 1]", "benchmarks/summary"),
    ("benchmarks/scoring/lm_eval_results.py", "own[f\"{metric},{kind}\"] = row[\"value\"] / 100", "own[f\"{metric},{kind}\"] = row[\"value\"]", "benchmarks/scoring/lm_eval_results"),
    # measurements and tables
    ("paper_figures/tables/published.py", "rows[rows[\"length\"].isin(published[\"length\"])]", "rows", "paper_figures/tables"),
    ("paper_figures/table.py", "max(numbers) if section.best", "min(numbers) if section.best", "paper_figures/tables"),
    # where text becomes ids
    (TEXT, "self.lead(ids) + ids for", "self.begin + ids for", "endprompt/text"),
    (TEXT, "if end > front), len(spans))", "if end >= front), len(spans))", "endprompt/text"),
    (TEXT, "        if self.joins:\n            read", "        if True:\n            read", "endprompt/text"),
    (TEXT, "max(tokenizer.get_vocab().values(), default=-1) + 1", "len(tokenizer)", "endprompt/text"),
    (TEXT, "backend.post_processor = TemplateProcessing", "TemplateProcessing", "endprompt/text"),
    ("endprompt/data/rows.py", "starts[open_] += len(lead)", "break", "endprompt/text"),
    ("endprompt/data/rows.py", "if places[-1] + len(lead) < hi:", "if True:", "endprompt/text"),
    ("endprompt/files.py", "os.register_at_fork(after_in_child=_let_go)", "pass", "project/drills_outputs"),
    ("endprompt/files.py", "return data.decode().removeprefix(MARK)", "return data.decode()", "endprompt/files"),
    # rows of results
    ("endprompt/results.py", "if not lo - slack <= value <= hi + slack:", "if not lo - slack <= value:", "benchmarks/scoring/run paper_figures/inputs endprompt/results"),
    ("endprompt/results.py", "if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):", "if value is None:", "endprompt/results"),
]  # fmt: skip


def place(test: str) -> str:
    """The file of a test that is named by folder and name."""
    folder, _, name = test.rpartition("/")
    return f"tests/{folder}/test_{name}.py"


def run(tree: Path, tests: str) -> bool:
    """Whether the tests of this tree pass."""
    files = [place(name) for name in tests.split()]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode not in (0, 1):  # 1: a test failed; a mutant that does not even import shows nothing
        raise SystemExit(f"the tests did not run: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 0


def copy_of_the_tree(folder: Path) -> Path:
    tree = folder / "tree"
    for name in ("endprompt", "analysis", "benchmarks", "paper_figures", "tests", "docs"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*ROOT.glob("*.md"), *ROOT.glob("*.toml"), *ROOT.glob("*.cff"), *ROOT.glob("*.yml")]:
        shutil.copy(path, tree)
    return tree


def main(words: list[str]) -> int:
    chosen = [m for m in MUTANTS if not words or any(word in " ".join(m) for word in words)]
    survived = []
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_of_the_tree(Path(folder))
        for tests in sorted({mutant[3] for mutant in chosen}):
            if not run(tree, tests):
                raise SystemExit(f"the tests must pass before anything is broken: {tests}")
        for number, (name, text, fault, tests) in enumerate(chosen, 1):
            path, began = tree / name, time.monotonic()
            whole = path.read_text(encoding="utf-8")
            if whole.count(text) != 1:
                raise SystemExit(
                    f"{name}: a mutant's text must stand there once, stands {whole.count(text)} times: {text}"
                )
            path.write_text(whole.replace(text, fault), encoding="utf-8")
            lives = run(tree, tests)
            path.write_text(whole, encoding="utf-8")
            survived += [(name, text, fault)] if lives else []
            verdict = "SURVIVED" if lives else "killed"
            seconds = time.monotonic() - began
            print(f"{number:>3}/{len(chosen)} {verdict:<9}{seconds:5.1f} s  {name}: {fault.strip()[:70]}", flush=True)
    print(f"{len(chosen) - len(survived)} of {len(chosen)} mutants killed")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
