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

ROOT = Path(__file__).resolve().parent.parent
POSITIONS, LOSS, ROPE = "endprompt/positions.py", "endprompt/loss.py", "endprompt/rope.py"
GEOMETRY = "endprompt/geometry.py"
PROMPTS, GUARD, ROWS = "endprompt/prompts.py", "endprompt/guard.py", "endprompt/rows.py"
BOUNDS, CERTIFICATES, OBSERVED = "analysis/bounds.py", "analysis/certificates.py", "analysis/observability.py"
SUMMARY, RULER, LONGBENCH = "benchmarks/summary.py", "benchmarks/ruler.py", "benchmarks/longbench_metrics.py"
BENCH, VLLM, FUSED = "endprompt/bench.py", "benchmarks/vllm_backend.py", "endprompt/fused.py"
PLAN, TEXT, LINEARS = "endprompt/plan.py", "endprompt/text.py", "endprompt/linears.py"
#: (file, text, what it becomes, tests)
MUTANTS = [
    # what is given to vLLM
    (VLLM, 'kind in ("default", "linear", "llama3")', 'kind in ("default", "linear", "llama3", "dynamic")', "vllm_backend"),
    (VLLM, 'int(parameters["original_max_position_embeddings"] * (parameters.get("factor") or 1))', "window", "vllm_backend"),
    (VLLM, "if shortest <= original < needed", "if shortest < original < needed", "vllm_backend"),
    (VLLM, '"short_mscale": scale, "long_mscale": scale', '"short_mscale": 1.0, "long_mscale": 1.0', "vllm_backend"),
    (VLLM, "if length + new > self.max_length", "if length > self.max_length", "vllm_backend"),
    # checkpoints of the hub and of GGUF files
    ("endprompt/origin.py", "if not (snapshot / name).is_file()", "if False", "origin"),
    ("endprompt/origin.py", 'LEFT = ("*/*", "consolidated*", "*.py")', 'LEFT = ("consolidated*",)', "origin"),
    ("endprompt/origin.py", 'if missing := sorted(report["missing_keys"])', "if missing := []", "origin"),
    # what a prediction depends on
    ("benchmarks/compare.py", 'if e.get("run") == run', "if True", "score_runs"),
    ("benchmarks/fingerprint.py", "max_new_tokens=config.max_new_tokens", "max_new_tokens=None", "score_runs"),
    ("benchmarks/fingerprint.py", "device=device_of(config.device).partition(\":\")[0]", 'device=""', "score_runs"),
    ("benchmarks/fingerprint.py", "if computes or not known else known[-1]", "if True else known[-1]", "score_runs"),
    ("benchmarks/fingerprint.py", 'seed={config.seed} samples', 'samples', "score_runs short_suite"),
    ("benchmarks/chat.py", "moment = datetime.datetime(day.year, day.month, day.day)", "moment = datetime.datetime.now()", "score_runs"),
    ("benchmarks/chat.py", 'if source is None or (source == "own" and date is None):', "if source is None:", "score_runs"),
    ("benchmarks/score.py", "kept = None if config.overwrite else fingerprint.read_day(config.directory)", "kept = None", "score_runs"),
    ("benchmarks/lab/cells.py", "cell.target, config.factor,", "cell.target, None,", "lab_matrix"),
    # generation
    ("benchmarks/generate.py", "read <= window < read + job.new_tokens - 1", "read < window < read + job.new_tokens - 1", "generate"),
    ("benchmarks/generate.py", "lengths_b[:, None] - 1)", "lengths_b[:, None] + 1)", "generate"),
    ("benchmarks/laid_out.py", "place_S > place_T[:, None] - window", "place_S >= place_T[:, None] - window", "generate"),
    ("benchmarks/laid_out.py", "place_S >= self.step_1)", "place_S >= 0)", "generate"),
    ("benchmarks/settled.py", "if prompt.startswith(text):", "if False:", "settled"),
    ("benchmarks/settled.py", '.rstrip("\\ufffd")', "", "settled"),
    # runs that repeat
    ("endprompt/determinism.py", "compiler.deterministic = True", "compiler.deterministic = False", "determinism"),
    ("endprompt/determinism.py", "compiler.deterministic = by_rule", "pass", "determinism"),
    ("endprompt/train.py", "order = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]", "pass", "determinism"),
    ("endprompt/config.py", 'REPEATABLE = ("sdpa",', 'REPEATABLE = ("flex", "sdpa",', "determinism"),
    ("benchmarks/lab/runner.py", "sum(value != deterministic for", "sum(value == deterministic for", "lab_run"),
    (BENCH, "if end is None or stop > end:", "if True:", "bench"),
    # what a model computes and holds
    ("endprompt/model.py", "if value is None or name in HARMLESS or", "if name or", "attention_backends"),
    ("endprompt/model.py", "if mask is not None:", "if False:", "attention_backends"),
    ("endprompt/parity.py", "torch.linspace(-1000, 1000, 2 * size)", "torch.zeros(2 * size)", "parity"),
    ("endprompt/parity.py", "if not (apart <= allowed and", "if False and not (apart <= allowed and", "parity"),
    ("endprompt/weights.py", "if unknown := sorted(known - predicting):", "if unknown := []:", "weights"),
    ("endprompt/weights.py", "config.tie_word_embeddings = False", "pass", "weights"),
    ("endprompt/weights.py", "setattr(part, key, 0)", "pass", "weights"),
    # fused layers
    (FUSED, "return grad_x, grad_x if ctx.adds else None", "return grad_x, None", "fused"),
    (FUSED, ".mean(-1, keepdim=True)) + grad_sum_MD.float()", ".mean(-1, keepdim=True))", "fused"),
    (FUSED, "exact * (grad * exact).mean(-1, keepdim=True)", "exact * grad.mean(-1, keepdim=True)", "fused"),
    (FUSED, "for one in grads_MD[1:]:\n        grad = ", "for one in grads_MD[2:]:\n        grad = ", "fused"),
    (FUSED, "logistic + silu * (1 - logistic)", "logistic + silu", "fused"),
    (FUSED, "return grad_MN, grad_weight, None, None, *grads", "return None, grad_weight, None, None, *grads", "fused"),
    (FUSED, "second * cos2 - first * sin1", "second * cos2 + first * sin1", "fused"),
    (FUSED, "return torch.cat(grads, dim=1), out", "return torch.cat(grads[::-1], dim=1), out", "fused"),
    # what a step is estimated to take
    (PLAN, "rates = ATTENTIONS[config.attention]", 'rates = ATTENTIONS["sdpa"]', "plan"),
    (PLAN, " * reach / (reach + rates.diagonal)", "", "plan"),
    (PLAN, "Attention(682e12, 587e12, 1400)", "Attention(587e12, 500e12, 1400)", "plan"),
    # the lean optimizer and its sums
    ("endprompt/optim.py", "(start + 2**31) % 2**32 - 2**31", "0", "optim"),
    ("endprompt/optim.py", "_mix(self.seed, int(state[\"step\"]), index)", "_mix(self.seed, int(state[\"step\"]))", "optim"),
    (LINEARS, "grad = grad.masked_fill((ids == ctx.padding)[..., None], 0)", "pass", "optim"),
    (LINEARS, "if any(part.bias is not None for part in parts):", "if False:", "fused"),
    (LOSS, "ids_BT.roll(-1, dims=1)", "ids_BT.roll(1, dims=1)", "loss"),
    (LOSS, "last = torch.zeros_like(weights_BT[:, :1])", "last = weights_BT[:, :1]", "loss"),
    (PLAN, "return tokens - tokens % 256 or tokens", "return tokens", "loss"),
    ("endprompt/train.py", "weights_BT[part] / total)", "weights_BT[part])", "train"),
    (FUSED, "h_MF = kept_MF if ctx.keep else again_MF", "h_MF = expanded[0]", "fused"),
    (FUSED, "if not module.training or past_key_values", "if past_key_values", "fused"),
    # positions
    (POSITIONS, "prompt, target - prompt))\n\n\ndef endprompt_random", "prompt, target - prompt - 1))\n\n\ndef endprompt_random", "positions"),
    (POSITIONS, "np.arange(start, start + prompt, dtype=np.int64)", "np.arange(start, start + prompt, dtype=np.int64)[::-1]", "positions"),
    (POSITIONS, "integers(context, target - prompt, endpoint=True)", "integers(context, target - prompt)", "positions"),
    (POSITIONS, "integers(context, target - prompt, endpoint=True)", "integers(context - 1, target - prompt, endpoint=True)", "positions"),
    (POSITIONS, "for k in range(1, count + 1)]", "for k in range(count)]", "positions"),
    (POSITIONS, "positions[first:] += skip", "positions[first + 1 :] += skip", "positions"),
    (POSITIONS, "integers(1, (n + 1) // 2, endpoint=True)", "integers(1, n // 2, endpoint=True)", "positions"),
    (POSITIONS, "integers(0, room, endpoint=True)", "integers(1, room, endpoint=True)", "positions"),
    (POSITIONS, "intervals.append((target - context - prompt + 1, target - 1))", "intervals.append((target - context - prompt, target - 1))", "positions"),
    (POSITIONS, "hi = target - context - prompt if prompt", "hi = target - context - prompt - 1 if prompt", "positions"),
    (POSITIONS, "if out and lo <= out[-1][1] + 1:", "if out and lo <= out[-1][1]:", "positions"),
    (POSITIONS, "SeedSequence([seed, index])", "SeedSequence([seed])", "positions data"),
    # rows of training and their loss
    (LOSS, "weights_N * (lse_N - logits.gather", "(lse_N - logits.gather", "loss"),
    (LOSS, "(grad * weights_N[:, None])", "grad", "loss"),
    (LOSS, "slice(int(rows[0]), int(rows[-1]) + 1)", "slice(int(rows[0]), int(rows[-1]))", "loss"),
    (LOSS, "grad_hidden * grad_total.to(grad_hidden.dtype)", "grad_hidden", "loss"),
    (LOSS, "torch.logsumexp(logits, dim=-1)", "torch.logsumexp(logits, dim=-1) + 1e-3", "loss"),
    (LOSS, "keep = weights_N > 0", "keep = weights_N >= 1", "loss"),
    ("endprompt/train.py", "labels, weights = ids_BT[:, 1:].reshape(-1), weights_BT[:, 1:]", "labels, weights = ids_BT[:, 1:].reshape(-1), weights_BT[:, :-1]", "train"),
    (PROMPTS, ">= len(self.cue) + self.given", ">= self.given", "prompts"),
    (PROMPTS, "context[start : start + self.span]", "context[: self.span]", "prompts data"),
    (GUARD, "self.smoothed > self.best + self.limit", "self.smoothed > self.best + 2 * self.limit", "guard"),
    # frequencies
    (ROPE, "return base_frequencies(base, head_dim) / factor, 1.0", "return base_frequencies(base, head_dim) * factor, 1.0", "rope"),
    (ROPE, "return base * factor ** (head_dim / (head_dim - 2))", "return base * factor", "rope"),
    (ROPE, "grown = factor * length / original_length - (factor - 1)", "grown = factor * length / original_length", "rope"),
    (ROPE, "theta / factor * ramp + theta * (1 - ramp)", "theta * ramp + theta / factor * (1 - ramp)", "rope"),
    (ROPE, "0.1 * over * math.log(factor)", "0.1 * over * math.log2(factor)", "rope"),
    (ROPE, "if mscale and mscale_all_dim else", "if mscale else", "rope"),
    # windows and keys of checkpoints that were extended before, and the pairs that RoPE turns
    (GEOMETRY, "max(stated, round((original or stated) * factor))", "stated", "geometry"),
    (GEOMETRY, "readings[stated] = round(stated / factor)", "pass", "geometry"),
    (GEOMETRY, "else target / now.original", "else target / now.window", "geometry"),
    (GEOMETRY, "for key in rope.CARRIED if key in parameters", 'for key in ("partial_rotary_factor",) if key in parameters', "geometry"),
    (GEOMETRY, "extended.head_dim = rope_geometry(config).head_dim", "pass", "geometry"),
    (ROPE, 'if stated != 1 and "attention_factor" not in options:', "if False:", "geometry"),
    (POSITIONS, "if scheme in WITH_PROMPT and not prompt:", "if False:", "positions"),
    ("analysis/capture.py", "first = np.flatnonzero((moved > 0).any(1))", "first = np.flatnonzero((moved < 0).any(1))", "analysis_verify"),
    ("analysis/capture.py", "factor[..., None] * (before", "(before", "analysis_verify"),
    ("analysis/verify.py", 'for value in (stated, rows[key], usual)', 'for value in (stated, usual)', "analysis_verify"),
    (ROPE, "(1 - smooth) * theta / factor + smooth * theta, 1.0", "smooth * theta / factor + (1 - smooth) * theta, 1.0", "rope"),
    # before the first step and after the last
    ("endprompt/outcome.py", "min(saved, config.keep + 1)", "min(saved, config.keep)", "outcome"),
    ("endprompt/train.py", "replaced = config.overwrite and", "replaced = False and", "outcome"),
    ("endprompt/train.py", "or not work.exists()  #", "or False  #", "outcome"),
    ("endprompt/length_rope.py", "positions_T.max() + 1", "position_ids.max() + 1", "length_rope"),
    ("endprompt/length_rope.py", "torch.where(length > window", "torch.where(length >= window", "length_rope"),
    # bounds
    (BOUNDS, "return np.abs(z) @ np.abs(omega) ** check_order(order)", "return np.abs(z) @ np.abs(omega) ** (check_order(order) + 1)", "analysis_bounds"),
    (BOUNDS, "return np.abs(omega).max() ** check_order(order) * supremum", "return np.abs(omega).mean() ** check_order(order) * supremum", "analysis_bounds"),
    (BOUNDS, "scale = attention_factor**2", "scale = attention_factor", "analysis_bounds analysis_verify"),
    (BOUNDS, "return 2 / sigma if", "return 1 / sigma if", "analysis_bounds"),
    (BOUNDS, "return 2 * eta, math.tanh(eta / 2)", "return eta, math.tanh(eta / 2)", "analysis_bounds"),
    (BOUNDS, "math.tanh(eta / 2)\n", "math.tanh(eta / 4)\n", "analysis_bounds"),
    (BOUNDS, "+ (np.abs(omega).max() * eval_score(z, omega, d, 0)) ** 2", "+ eval_score(z, omega, d, 0) ** 2", "analysis_bounds"),
    (CERTIFICATES, "curvature = 1.01 * (np.abs(z) @ omega**2) / 8", "curvature = 1.01 * (np.abs(z) @ omega**2) / 80", "analysis_bounds"),
    (CERTIFICATES, "lower, upper = largest - error, goal(largest) + error", "lower, upper = largest + error, goal(largest) + error", "analysis_bounds"),
    (OBSERVED, "number = hi - lo + 1", "number = hi - lo", "analysis_observability"),
    (OBSERVED, "cs = (sin_plus - sin_minus) / 2", "cs = (sin_plus + sin_minus) / 2", "analysis_observability"),
    (OBSERVED, "information = (n_obs / sigma**2)", "information = (n_obs / sigma)", "analysis_observability"),
    (OBSERVED, "starts, width = [context], target - prompt - context + 1", "starts, width = [context], target - prompt - context", "analysis_observability"),
    # metrics
    (SUMMARY, "if score >= threshold), default=0", "if score > threshold), default=0", "summary_rules"),
    (SUMMARY, "sorted(scores, reverse=direction == \"dec\")", "sorted(scores, reverse=direction == \"inc\")", "summary_rules"),
    (SUMMARY, "np.std(scores, ddof=1)", "np.std(scores)", "summary_rules score_ruler"),
    (SUMMARY, "center = (share + z * z / (2 * n))", "center = (share + z * z / n)", "summary_rules"),
    (SUMMARY, "np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)", "np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)", "summary_rules score_ruler"),
    (SUMMARY, "max(2 * tail, 1 / RESAMPLES)", "max(tail, 1 / RESAMPLES)", "summary_rules score_ruler"),
    (RULER, "float(any(found)) if SPECS[task].metric == \"any\"", "float(all(found)) if SPECS[task].metric == \"any\"", "ruler_upstream score_ruler"),
    ("benchmarks/replay.py", "if not looks_first and most is not None and size > most:", "if False:", "ruler_parity"),
    ("benchmarks/replay.py", 'gap = "" if self.old else " "', 'gap = " "', "ruler_parity"),
    ("benchmarks/haystack.py", 'prefix.rstrip() if rules.bare_end else prefix.rstrip() + " "', "prefix.rstrip()", "ruler_parity"),
    (RULER, "answer.lower() in clean(prediction).lower()", "answer in clean(prediction)", "ruler_upstream score_ruler"),
    (LONGBENCH, "re.sub(r\"\\b(a|an|the)\\b\", \" \", bare)", "re.sub(r\"\\b(a|the)\\b\", \" \", bare)", "longbench_metrics"),
    (LONGBENCH, "(Counter(prediction) & Counter(answer)).total()", "len(set(prediction) & set(answer))", "longbench_metrics"),
    (LONGBENCH, "return 1 / len(named) if answer in named else 0.0", "return 1.0 if answer in named else 0.0", "longbench_metrics"),
    (LONGBENCH, "numbers.count(str(answer)) / len(numbers)", "float(str(answer) in numbers)", "longbench_metrics"),
    (LONGBENCH, "round(100 * difflib", "int(100 * difflib", "longbench_metrics"),
    (SUMMARY, "first : first + fitting]", "first : first + fitting - 1]", "summary_rules"),
    ("benchmarks/lm_eval_results.py", "own[f\"{metric},{kind}\"] = row[\"value\"] / 100", "own[f\"{metric},{kind}\"] = row[\"value\"]", "lm_eval_results"),
    # measurements and tables
    (BENCH, "6.0 * hidden * layers * row_tokens", "12.0 * hidden * layers * row_tokens", "measurements"),
    (BENCH, "count * flops / (time.perf_counter() - started)", "(count + 2) * flops / (time.perf_counter() - started)", "measurements"),
    (BENCH, "3.5 * causal", "3.0 * causal", "measurements"),
    ("analysis/bench.py", "/ NAIVE_SPECTRA * count", "* count", "measurements"),
    ("paper_figures/tables/measured.py", "rows[rows[\"length\"].isin(published[\"length\"])]", "rows", "paper_tables"),
    ("paper_figures/table.py", "max(numbers) if section.best", "min(numbers) if section.best", "paper_tables"),
    ("benchmarks/base.py", "size <= left[kind]", "size <= left[kind] + 1", "base_build"),
    # where text becomes ids
    (TEXT, "self.lead(ids) + ids for", "self.begin + ids for", "text"),
    (TEXT, "if end > front), len(spans))", "if end >= front), len(spans))", "text"),
    (TEXT, "        if self.joins:\n            read", "        if True:\n            read", "text"),
    (TEXT, "max(tokenizer.get_vocab().values(), default=-1) + 1", "len(tokenizer)", "text"),
    (TEXT, "backend.post_processor = TemplateProcessing", "TemplateProcessing", "text"),
    ("endprompt/data.py", "starts[open_] += len(lead)", "break", "text"),
    ("endprompt/data.py", "if places[-1] + len(lead) < hi:", "if True:", "text"),
    (ROWS, "return data.decode().removeprefix(MARK)", "return data.decode()", "text_files"),
    # rows of results
    (ROWS, "if not lo - slack <= value <= hi + slack:", "if not lo - slack <= value:", "score_ruler figures_data rows"),
    (ROWS, "if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):", "if value is None:", "rows"),
]  # fmt: skip


def run(tree: Path, tests: str) -> bool:
    """Whether the tests of this tree pass."""
    files = [f"tests/test_{name}.py" for name in tests.split()]
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
