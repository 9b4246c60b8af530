"""Every causal family of transformers, made tiny and taken the whole way: a row a family, of which docs/models.md is.

The families are transformers' own list, so one that it adds later is swept by itself. A family whose default config has
RoPE is made with random weights, its sizes shrunk by the names of its config's keys (`SMALL`), and `OWN` where that is
not enough. What is compared is transformers' own: its eager attention under an explicit mask for the loss, its
`generate()` for answers, its count of parameters.

    python -m tests.support.families [FAMILY ...]      (all if none is named) sweeps, and writes their rows and the page
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from tests.support.checkpoints import make_tokenizer

ROOT = Path(__file__).parents[2]
ROWS = ROOT / "paper_figures" / "data" / "measured" / "pages" / "models.jsonl"
PAGE = ROOT / "docs" / "models.md"

WINDOW, TARGET = 256, 1024
TOKENS, NEW = 48, 6
NARROW = 16  # tokens that a sliding layer sees, fewer than the prompts have

#: Values of the keys that a config has, whatever the family.
SMALL: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": WINDOW,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "head_dim": 16,
    "sliding_window": TARGET,
    "tie_word_embeddings": True,
    # experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size", "ffn_hidden_size"), 32
    ),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_expert_group", "first_k_dense_replace"), 1),
    # attention over a smaller latent
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 16),
    # linear layers
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("mamba_d_state", "mamba_n_groups"), 8),
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_chunk_size": 16,
    "mamba_n_groups": 1,
}

LATENT = {"num_key_value_heads": 4}
HYBRID = {"layer_types": ["linear_attention", "full_attention"] * 2}

#: What single families need beside it, or instead; None takes a key of SMALL away.
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "deepseek_v2": LATENT | {"topk_method": "greedy"},
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT,
    "glm_moe_dsa": LATENT,
    "glm4_moe_lite": LATENT,
    "axk1": LATENT,
    "axk2": LATENT,
    "bailing_hybrid": LATENT | {"layer_group_size": 2},
    "minicpm3": LATENT,
    "youtu": LATENT,
    "persimmon": LATENT,
    "dbrx": {
        "tie_word_embeddings": None,
        **{"d_model": 32, "n_heads": 4, "n_layers": 4, "max_seq_len": WINDOW},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "ffn_act_fn": {"name": "silu"}},
    },
    "dots3_note_text": LATENT
    | {
        "layer_types": ["indexed_attention", "sliding_attention"] * 2,
        **{"num_attention_heads": 4, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_head_dim": 32},
        **dict.fromkeys(("swa_q_lora_rank", "swa_kv_lora_rank", "swa_qk_nope_head_dim", "swa_v_head_dim"), 16),
        **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 16),
        "mlp_layer_types": ["dense"] + ["sparse"] * 3,
        **{"index_topk": 32, "index_head_dim": 32, "index_n_heads": 4, "head_dim": 32},
    },
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * 4,
        "intermediate_size": [48] * 4,
        **{"num_kv_shared_layers": 0, "vocab_size_per_layer_input": 320, "hidden_size_per_layer_input": 8},
        **{"laurel_rank": 8, "altup_num_inputs": 2},
    },
    "gemma4_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        **{"per_layer_config": {}, "vocab_size_per_layer_input": 320, "hidden_size_per_layer_input": 8},
    },
    "phi4_multimodal": {
        "vision_config": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2},
        "audio_config": {
            **{"hidden_size": 32, "intermediate_size": 48, "num_blocks": 1, "num_attention_heads": 2},
            **{"ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32, "nemo_conv_channels": 32},
        },
    },
    "helium": {"head_dim": 8},
    "mimo_v2_flash": {"head_dim": 24},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": LATENT | {"num_layers": 2, "num_hidden_layers": None},
    "ministral": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "ministral3": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": WINDOW,
        }
    },
    "moshi": {"ffn_dim": 64},
    "zaya": {"num_experts_per_tok": 1},
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "use_mem_rope": True,
        **{"mamba_headdim": 16, "n_mamba_heads": 4, "chunk_size": 16},
    },
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False, "head_dim": None},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_expand": 1, "lm_head_multiplier": 0.05},
    "granitemoehybrid": {"position_embedding_type": "rope", "layer_types": ["mamba", "attention"] * 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "block_ff_dim": 96},
    "qwen3_next": HYBRID,
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"] * 2,
        **{"indexer_budget": 32, "indexer_compress_ratio": 16, "indexer_head_dim": 16, "hc_lowrank": 8},
        **{"indexer_n_heads": 4, "indexer_kv_heads": 1},
    },
    "qwen3_5_text": HYBRID,
    "qwen3_5_moe_text": HYBRID,
    "smollm3": {"no_rope_layers": [1, 1, 1, 0]},
    "llama4_text": {"intermediate_size_mlp": 96, "attention_chunk_size": TARGET},
}


def families() -> list[str]:
    """transformers' names of its causal families."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def default_config(family: str) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[family]()


def has(config: Any, key: str) -> bool:
    try:
        return hasattr(config, key)
    except Exception:  # transformers', of a key whose value is each layer's own
        return False


WINDOWS = ("sliding_window", "attention_chunk_size")
SLIDING = {"use_sliding_window": True, "max_window_layers": 2}  # with which layers use it


def tiny_config(family: str, window: int = TARGET) -> Any:
    """The family's config with small sizes; its layers that see a window or chunk see `window` tokens."""
    default = default_config(family)
    values = {key: value for key, value in SMALL.items() if has(default, key)}
    about = getattr(default, "rope_parameters", None) or {}
    if about.get("rope_type", "default") != "default":  # scaled already; what is tried is an unscaled one
        kept = {key: about[key] for key in ("rope_theta", "partial_rotary_factor") if key in about}
        values["rope_parameters"] = {"rope_type": "default"} | kept
    kinds = getattr(default, "layer_types", None) or ()
    if {"sliding_attention", "full_attention"} <= set(kinds):
        values["layer_types"] = ["sliding_attention", "full_attention"] * 2
    values |= OWN.get(family, {})
    if window != TARGET:
        values |= {key: window for key in WINDOWS if has(default, key)}
        values |= {key: value for key, value in SLIDING.items() if has(default, key)}
    return type(default)(**{key: value for key, value in values.items() if value is not None})


def make(config: Any, directory: Path) -> int:
    """Write a model of random weights with its tokenizer; returns its parameters."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > 3_000_000:
        raise ValueError(f"its sizes are not known here: {size:,} parameters after shrinking")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # biases and norms are made with constants, which would hide an error in them
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.08)
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return size


def stock(directory: Path, attention: str | None = None) -> Any:
    """The model as transformers loads it, with sdpa where the family takes it."""
    from transformers import AutoModelForCausalLM

    kinds = [attention] if attention else ["sdpa", "eager"]
    for kind in kinds:
        with contextlib.suppress(ValueError):
            return AutoModelForCausalLM.from_pretrained(directory, attn_implementation=kind, dtype="float32").eval()
    return AutoModelForCausalLM.from_pretrained(directory, dtype="float32").eval()


def ids(seed: int, tokens: int = TOKENS) -> torch.Tensor:
    return torch.randint(1, SMALL["vocab_size"], (1, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def expected_losses(
    model: Any, row: torch.Tensor, positions: torch.Tensor, narrow: bool = False
) -> tuple[torch.Tensor, str]:
    """(loss of each token by eager attention under a mask [1, 1, T, T] written out, or under one of ones, which mask).

    narrow: some layers see a window: the row is then at its places in one of the target's length, the others masked.
    """
    tokens = row.shape[1]
    if narrow:
        whole, seen = torch.full((1, TARGET), 7), torch.zeros(1, TARGET, dtype=torch.int64)
        whole[0, positions[0]], seen[0, positions[0]] = row[0], 1
        logits = model(input_ids=whole, attention_mask=seen, use_cache=False).logits[0, positions[0]]
        return F.cross_entropy(logits[:-1].double(), row[0, 1:], reduction="none"), "full length"
    written = torch.full((tokens, tokens), torch.finfo(torch.float32).min).triu(1)[None, None]
    for mask, name in ((written, "4-D"), (torch.ones_like(row), "ones")):
        try:
            logits = model(input_ids=row, position_ids=positions, attention_mask=mask, use_cache=False).logits[0]
        except Exception:  # linear layers know masks of two dimensions only
            if name == "ones":
                raise
            continue
        return F.cross_entropy(logits[:-1].double(), row[0, 1:], reduction="none"), name
    raise AssertionError


def trained(source: Path, export_to: Path, row: dict[str, Any]) -> str:
    """Extend by YaRN as `endprompt extend` does up to its first step; loss, gradient, export, reload."""
    from endprompt import model
    from endprompt.config import ExtendConfig
    from endprompt.model import rope_geometry
    from endprompt.model.attention import narrow_layers
    from endprompt.model.load import check_builds, export
    from endprompt.model.parity import check_forward
    from endprompt.train import loop
    from endprompt.train.objective import Objective

    config = model.load_config(source)
    scaling = "yarn"
    try:
        extended = model.extended_config(config, scaling, TARGET)
    except ValueError as error:
        others = {"longrope": "does not take this scaling", "linear": "by scaling=linear alone", "none": "must be none"}
        found = [other for other, words in others.items() if words in str(error)]
        if not found:
            raise
        scaling = found[0]
        extended = model.extended_config(config, scaling, TARGET)
    check_builds(extended)
    reasons = {}
    for attention in ("sdpa", "eager"):
        try:
            name = model.training_attention(attention)
            live = model.load_model(source, attention=name, config=extended)
            objective = Objective(live, False)
            check_forward(objective)
            break
        except ValueError as error:
            reasons[attention] = error
    else:
        raise reasons["eager"]
    row["attention"] = attention
    tokens, positions = ids(1), torch.arange(TOKENS)[None]
    positions = positions + (positions >= TOKENS // 2) * (TARGET - TOKENS)
    weights = torch.ones(1, TOKENS)
    weights[0, 0] = 0
    settings = ExtendConfig(model="m", data=[], output="o", checkpointing="full", compile="none")
    loop.make_fast(live, settings, torch.device("cpu"))
    total = objective(tokens, positions, weights)
    total.backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in live.parameters()), "the gradient is not finite"
    found = float(total.detach()) / (TOKENS - 1)
    export(live, make_tokenizer(), export_to, "float32")
    again = stock(export_to, "eager")
    narrow = bool(narrow_layers(again.config))
    losses, row["mask"] = expected_losses(again, tokens, positions, narrow)
    wanted = float(losses.mean())
    elsewhere, _ = expected_losses(again, tokens, torch.arange(TOKENS)[None], narrow)
    moved = float((elsewhere - losses).abs().max())
    close = 3e-6 * wanted  # float32; a wrong one is farther off, as the next line but one sees to
    assert abs(found - wanted) <= close, f"training loss {found:.6f}, transformers {wanted:.6f}"
    assert moved > 40 * close, f"the loss does not depend on positions: {moved:.1e} nats of a token"
    live.eval().set_attn_implementation("eager")
    with torch.no_grad():
        given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False}
        apart = float((live(**given).logits - again(**given).logits).abs().max())
    assert apart <= 1e-5, f"logits of the export differ by {apart:.1e}"
    about = rope_geometry(again.config).parameters
    kept = (about["rope_type"], about.get("factor"), again.config.max_position_embeddings)
    rope_type = {"none": "default"}.get(scaling, "proportional" if about["rope_type"] == "proportional" else scaling)
    wanted_rope = (rope_type, None if scaling == "none" else TARGET / WINDOW, TARGET)
    assert kept == wanted_rope, f"the export's RoPE is {kept}"
    return " ".join(
        [
            "works",
            *(["with attention=eager"] if attention == "eager" else []),
            *([scaling] if scaling != "yarn" else []),
        ]
    )


def generated(directory: Path, row: dict[str, Any]) -> str:
    """Answers of the own loop, alone and together, against `generate()` of each prompt."""
    from benchmarks.scoring import generate

    model = stock(directory)
    prompts = [ids(seed, size)[0].tolist() for seed, size in ((2, 40), (3, 37), (4, 23))]
    wanted = []
    for prompt in prompts:
        given = torch.tensor([prompt])
        made = model.generate(
            given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=NEW, pad_token_id=0
        )
        wanted.append(made[0, len(prompt) :].tolist())
    found = generate.way(model)
    row["loop"] = found.reason or "own"
    jobs = [generate.Job(prompt, NEW) for prompt in prompts]
    for rows in (1, 3):
        with contextlib.redirect_stderr(io.StringIO()):
            parts = generate.run(model, jobs, stops=frozenset([0]), batch_size=rows, found=found)
            answers = dict(answer for part in parts for answer in part)
        assert [answers[i] for i in range(3)] == wanted, f"answers in batches of {rows} are not those of generate()"
    return "works"


def narrowed(family: str, work: Path) -> str:
    """Answers with a window narrower than the prompts, and an extension, whose loss is that of rows of full length."""
    config, row = tiny_config(family, NARROW), {}
    make(config, work / "narrow")
    generated(work / "narrow", row)
    try:
        return f"{trained(work / 'narrow', work / 'narrow-export', row)}, extended too"
    except ValueError as error:
        return f"works, not extended: {line(error, work).removeprefix('narrow: ')}"


def planned(config: Any, parameters: int) -> str:
    from endprompt.plan import counted

    found = counted(config).parameters
    assert found == parameters, f"{found:,} parameters, the model has {parameters:,}"
    return "works"


@functools.cache
def samples() -> tempfile.TemporaryDirectory[str]:
    """The cache of RULER's samples, which are the same for all families; gone with the process."""
    return tempfile.TemporaryDirectory()


def scored(directory: Path, output: Path) -> str:
    from benchmarks.scoring.config import ScoreConfig
    from benchmarks.scoring.run import score

    settings = {"tasks": "niah_single_1", "lengths": "400", "samples": 1, "max_new_tokens": 4, "beyond_window": True}
    settings |= {"device": "cpu", "dtype": "float32", "quiet": True, "cache_dir": samples().name}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            rows = score(ScoreConfig(str(directory), output=str(output), **settings))
            how = "works"
        except ValueError as error:
            if "does not load" not in str(error):
                raise
            rows = score(ScoreConfig(str(directory), output=f"{output}-eager", attn="eager", **settings))
            how = "works with attn=eager"
    assert [row["n"] for row in rows] == [1] and math.isfinite(rows[0]["value"]), rows
    return how


def captured(directory: Path) -> str:
    """Layers as `endprompt verify` reads them: S(m - n) must be the model's own logit."""
    from analysis.capture import capture, choose_pairs
    from analysis.config import VerifyConfig
    from analysis.scene import load
    from endprompt.model.geometry import frequencies_by_layer

    left: list[int] = []
    layers: list[int] = []
    model = load(str(directory), VerifyConfig(str(directory), dtype="float32"))
    capture(model, ids(5)[0].tolist(), choose_pairs(TOKENS, 12, 0), lambda one: layers.append(one.layer), 0, left)
    turned = frequencies_by_layer(model.config)
    assert not set(left) & set(turned), f"layers {left} turn nothing, and by the config they have RoPE"
    return f"works, less {len(left)} of {len(left) + len(layers)} layers" if left else "works"


def line(error: BaseException, work: Path) -> str:
    text = " ".join(str(error).split()).replace(f"{work}/", "").removeprefix("source: ").removeprefix("export: ")
    return text


def outcome(work: Path, step: Callable[..., str], *given: Any) -> str:
    """What the step says, or "refused: ..." for an error of ours; anything else is "WRONG: ..." or "FAILS: ..."."""
    try:
        return step(*given)
    except ValueError as error:
        last = traceback.extract_tb(error.__traceback__)[-1].filename
        ours = Path(last).is_relative_to(ROOT) and "site-packages" not in last
        return f"refused: {line(error, work)}" if ours else f"FAILS: ValueError of {Path(last).name}: {error}"
    except AssertionError as error:
        return f"WRONG: {line(error, work)}"
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"FAILS: {type(error).__name__} in {Path(last.filename).name}:{last.lineno}: {line(error, work)}"


def swept(family: str) -> dict[str, Any]:
    """The family's row; steps that were not tried are not in it."""
    from endprompt.model import rope_geometry

    row: dict[str, Any] = {"family": family}
    versions = {name: version(name) for name in ("transformers", "torch")}
    try:
        config = default_config(family)
    except Exception as error:
        return row | {
            "built": f"no: {type(error).__name__}: {' '.join(str(error).split())}"[:300],
            "versions": versions,
        }
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        asked = outcome(work, lambda: str(bool(rope_geometry(config))))
        if asked != "True" and "no kind of layer" not in asked and "must be even" not in asked:
            return row | {"built": "no: not tried", "extend": asked, "versions": versions}
        for key in WINDOWS:
            if getattr(config, key, None):
                row[key] = getattr(config, key)
        try:
            tiny = tiny_config(family)
            parameters = make(tiny, work / "source")
        except Exception as error:
            reason = f"no: {type(error).__name__}: {' '.join(str(error).split())}"[:300]
            row |= {"built": reason} | ({} if asked == "True" else {"extend": asked})
            return row | {"versions": versions}
        row |= {"built": "yes", "parameters": parameters}
        row["extend"] = outcome(work, trained, work / "source", work / "export", row)
        best = work / ("export" if row["extend"].startswith("works") else "source")
        row["generate"] = outcome(work, generated, best, row)
        row["score"] = outcome(work, scored, best, work / "run")
        row["verify"] = outcome(work, captured, best)
        row["plan"] = outcome(work, planned, tiny, parameters)
        if any(has(config, key) for key in WINDOWS):
            row["narrow"] = outcome(work, narrowed, family, work)
    return row | {"versions": versions}


def sweep(names: list[str]) -> Iterator[dict[str, Any]]:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for family in names:
        yield swept(family)


def main() -> None:
    from tests.support import models_page

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows = {} if not sys.argv[1:] else {row["family"]: row for row in models_page.read_rows()}
    for row in sweep(sys.argv[1:] or families()):
        print(json.dumps(row), flush=True)
        rows[row["family"]] = row
    ROWS.write_text("".join(json.dumps(rows[family]) + "\n" for family in sorted(rows)), encoding="utf-8")
    PAGE.write_text(models_page.page(models_page.read_rows()), encoding="utf-8")


if __name__ == "__main__":
    main()
