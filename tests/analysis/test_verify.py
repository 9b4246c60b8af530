"""`verify` and `positions` on tiny checkpoints of several families, random weights."""

import json

import numpy as np
import pytest
import torch

import analysis
from analysis import attention, capture, figures, findings, predict, scene, verify
from analysis.commands import positions as positions_command
from analysis.commands import verify as verify_command
from analysis.config import PositionsConfig, PredictConfig, VerifyConfig
from analysis.scene import prepare
from analysis.sweep import Sweep
from endprompt import positions, results
from endprompt.model import load_config, load_model, rope_geometry

WINDOW, TARGET = 256, 2048
LINEAR = {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0, "original_max_position_embeddings": WINDOW}
YARN = {"rope_type": "yarn", "factor": 8.0, "rope_theta": 10000.0, "original_max_position_embeddings": WINDOW}
HALF = {"partial_rotary_factor": 0.5}
MOE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32}
#: Attention over compressed keys: RoPE turns the end of each head, of the keys one for all heads.
MLA = dict(num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
OF_OTHER_SHAPE = ["SmolLM3", "Ernie4_5_Moe", "Cohere2Moe", "NanoChat", "JetMoe", "DeepseekV3", "Ministral3"]


def config_of(family, **changes):
    import transformers

    settings = {
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": TARGET,
        "rope_parameters": LINEAR, "initializer_range": 0.3, "pad_token_id": 0,
    }  # fmt: skip
    own = {
        "Llama": {},
        "Mistral": {"rope_parameters": YARN, "sliding_window": None},
        "Qwen3": {"head_dim": 16},  # q and k norms, a head_dim of its own
        "Phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0} | HALF},  # fused, partial rotary
        "Gemma": {"head_dim": 16},
        "Gemma2": {"head_dim": 16},  # soft-capped logits
        "Glm": {"head_dim": 16, "rope_parameters": LINEAR | HALF},  # interleaved, partial rotary
        "Cohere": {},  # interleaved
        "StableLm": {"rope_parameters": LINEAR | HALF},  # slices the rotated part itself
        "GPTNeoX": {"rope_parameters": LINEAR | HALF},
        "SmolLM3": {"num_hidden_layers": 3, "no_rope_layers": [1, 0, 1]},
        "Ernie4_5_Moe": MOE | {"moe_num_experts": 4, "moe_k": 2},  # interleaved
        "Cohere2Moe": {"num_experts": 4, "num_experts_per_tok": 2, "layer_types": ["sliding_attention"] * 2},
        "NanoChat": {},  # norms without weights after RoPE, which turns backwards
        "JetMoe": {"num_key_value_heads": 2, "kv_channels": 16, "num_local_experts": 4},  # heads of keys in tiles
        "DeepseekV3": MLA | MOE | {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7}},
        "Ministral3": {"head_dim": 16, "rope_parameters": YARN | {"llama_4_scaling_beta": 0.1}},
        "HunYuanDenseV1": {"head_dim": 16},
        "Gemma3Text": {},
        "DiffLlama": {},  # attends twice with one rotation
    }[family]
    return getattr(transformers, f"{family}Config")(**(settings | own | changes))


FAMILIES = ["Llama", "Mistral", "Qwen3", "Phi3", "Gemma", "Gemma2", "Glm", "Cohere", "StableLm", "GPTNeoX"]


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer):
    """checkpoint(family, **changes of its config) -> directory of a random model."""
    made = {}

    def make(family="Llama", seed=0, **changes):
        from transformers import AutoModelForCausalLM

        key = json.dumps([family, seed, changes], sort_keys=True)
        if key not in made:
            torch.manual_seed(seed)
            path = tmp_path_factory.mktemp(family)
            AutoModelForCausalLM.from_config(config_of(family, **changes)).save_pretrained(path)
            tokenizer.save_pretrained(path)
            made[key] = path
        return made[key]

    return make


def settings(checkpoint, tmp_path, **changes):
    common = {"context": 236, "pairs": 12, "output": str(tmp_path / "run"), "formats": ()}
    return VerifyConfig(str(checkpoint), **(common | changes))


def spectra_of(path, length=0, pairs=24, dtype="float32", attention="sdpa"):
    model = load_model(path, dtype=dtype, attention=attention)
    ids = np.random.default_rng(0).integers(0, 256, size=100)
    found = []
    places = capture.choose_pairs(100, pairs, 0)
    capture.capture(model, ids, places, found.append, length)
    return model, ids, places, found


@pytest.mark.parametrize("family", FAMILIES + OF_OTHER_SHAPE)
def test_score_equals_the_models_own_logit(checkpoint, family):
    """Independent of the capture's own check: softmax of S over all keys gives the model's attention weights."""
    path = checkpoint(family)
    model = load_model(path, attention="eager")
    ids = np.random.default_rng(0).integers(0, 256, size=40)
    query = 39
    places = capture.Pairs(np.full(40, query), np.arange(40), np.zeros(40, dtype=int))
    found = []
    left_out = []
    geometry = capture.capture(model, ids, places, found.append, without_rope=left_out)
    omega, factor = geometry.frequencies(40)
    with torch.no_grad():
        weights = model(torch.as_tensor(ids)[None], output_attentions=True).attentions
    for layer in found:
        turned = [[analysis.eval_score(layer.z[h, k], omega, [query - k])[0] for k in range(40)] for h in range(4)]
        logit = (np.array(turned) + layer.constant) * factor**2 * layer.scaling
        cap = getattr(model.config, "attn_logit_softcapping", None)
        logit = cap * np.tanh(logit / cap) if cap else logit
        ours = np.exp(logit - logit.max(1, keepdims=True))
        ours /= ours.sum(1, keepdims=True)
        np.testing.assert_allclose(weights[layer.layer][0, :, query].numpy(), ours, atol=2e-5)
    assert [layer.layer for layer in found] == ([0, 2] if family == "SmolLM3" else [0, 1])
    assert left_out == ([1] if family == "SmolLM3" else [])


def test_a_norm_with_weights_after_rope_is_refused_by_its_name(checkpoint):
    """HunYuan's weights of 1 leave a score of the distance; others do not."""
    model = load_model(checkpoint("HunYuanDenseV1"))
    ids, places = np.arange(40), capture.choose_pairs(40, 12, 0)
    capture.capture(model, ids, places, lambda layer: None)
    with torch.no_grad():
        model.model.layers[1].self_attn.query_layernorm.weight[3] = 1.5
    with pytest.raises(ValueError, match=r"layer 1: between RoPE and attention .*a norm with weights"):
        capture.capture(model, ids, places, lambda layer: None)


def test_layers_that_attend_twice_are_not_left_out(checkpoint):
    found, left_out = [], []
    model = load_model(checkpoint("DiffLlama"))
    capture.capture(model, np.arange(40), capture.choose_pairs(40, 12, 0), found.append, without_rope=left_out)
    assert [layer.layer for layer in found] == [0, 1] and not left_out


def turning(first, second, out_first, out_second, size, angle=0.7):
    """A rotation of pairs (first, second), whose results land at (out_first, out_second); the rest stays."""

    def rotate(x):
        t = angle * torch.arange(x.shape[2], dtype=x.dtype)[:, None] / (1 + torch.arange(len(first)))
        a, b, out = x[..., first], x[..., second], x.clone()
        out[..., out_first] = 1.5 * (a * t.cos() - b * t.sin())
        out[..., out_second] = 1.5 * (b * t.cos() + a * t.sin())
        return out

    return rotate, torch.zeros(1, 2, 5, size, dtype=torch.float64)


@pytest.mark.parametrize(
    ("pairs", "size"),
    [
        (([0, 1, 2], [3, 4, 5], [0, 1, 2], [3, 4, 5]), 6),  # halves
        (([0, 2, 4], [1, 3, 5], [0, 2, 4], [1, 3, 5]), 6),  # neighbours
        (([0, 2, 4], [1, 3, 5], [0, 1, 2], [3, 4, 5]), 6),  # neighbours, written as halves
        (([3, 4], [0, 1], [3, 4], [0, 1]), 8),  # backwards, and half of the head stays
    ],
)
def test_pairs_are_measured(pairs, size):
    first, second, place = capture.measured_pairs(*turning(*pairs, size))
    assert (first.tolist(), second.tolist()) == pairs[:2]
    assert (place[first].tolist(), place[second].tolist()) == pairs[2:]
    still = [i for i in range(size) if i not in pairs[0] + pairs[1]]
    assert place[still].tolist() == still


def test_what_turns_no_pairs_is_refused():
    with pytest.raises(ValueError, match="does not turn pairs"):
        capture.measured_pairs(lambda x: x.cumsum(-1), torch.zeros(1, 2, 5, 6))
    with pytest.raises(ValueError, match="does not turn pairs"):
        capture.measured_pairs(lambda x: x, torch.zeros(1, 2, 5, 6))


@pytest.mark.parametrize("wrong", ["pairs", "frequencies"])
def test_wrong_pairs_or_frequency_is_caught(checkpoint, monkeypatch, wrong):
    import dataclasses

    def mistaken(config, length):
        geometry = rope_geometry(config)
        wrong = dataclasses.replace(geometry, parameters=geometry.parameters | {"factor": 8.5})
        return dict.fromkeys(range(config.num_hidden_layers), wrong.frequencies(length))

    def swapped(rotate, q):
        return np.array([0, 2, 4, 6]), np.array([1, 3, 5, 7]), np.arange(8)

    if wrong == "pairs":
        monkeypatch.setattr(capture, "measured_pairs", swapped)
    else:
        monkeypatch.setattr(capture, "frequencies_by_layer", mistaken)
    with pytest.raises(ValueError, match="differs from the model's own logit"):
        spectra_of(checkpoint("Llama"))


def test_capture_leaves_the_model_as_it_was(checkpoint):
    import transformers.models.llama.modeling_llama as source

    rotate, functions = source.apply_rotary_pos_emb, dict(source.ALL_ATTENTION_FUNCTIONS)
    spectra_of(checkpoint("Llama"))
    assert source.apply_rotary_pos_emb is rotate and dict(source.ALL_ATTENTION_FUNCTIONS) == functions


SCALINGS = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": LINEAR,
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    "yarn": YARN,
    "llama3": YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": WINDOW,
        "factor": 8.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.0, 2.0, 4.0, 8.0],
    },
}


@pytest.mark.parametrize("scaling", list(SCALINGS))
def test_every_scaling_of_transformers(checkpoint, tmp_path, scaling):
    path = checkpoint("Llama", rope_parameters=SCALINGS[scaling])
    report = verify.verify(settings(path, tmp_path, target=3000, pairs=3))
    assert report.holds and report.curves["length"] == 3000
    factor = {"yarn": 0.1 * np.log(8) + 1, "longrope": np.sqrt(1 + np.log(8) / np.log(WINDOW))}.get(scaling, 1.0)
    assert report.curves["attention_factor"] == pytest.approx(factor)
    sigma = {"linear": 1 / 8}.get(scaling, 1.0)
    assert report.curves["sigma"] == pytest.approx(sigma) and report.curves["radius"] == pytest.approx(2 / sigma)


def test_one_layer_at_a_time(checkpoint, monkeypatch):
    """When a layer's spectra are handed on, no q or k of the layers before it is alive."""
    import weakref

    alive, pick = [], capture._pick

    def watched(x_HTD, places):
        alive.append(weakref.ref(x_HTD.untyped_storage()))
        return pick(x_HTD, places)

    monkeypatch.setattr(capture, "_pick", watched)
    model = load_model(checkpoint("Llama", num_hidden_layers=4))
    earlier = []

    def consume(layer):
        assert sum(reference() is not None for reference in alive) <= 6, (
            "q and k before, after RoPE and as used, of one layer"
        )
        earlier.append(layer.layer)

    capture.capture(model, np.arange(100) % 256, capture.choose_pairs(100, 12, 0), consume)
    assert earlier == [0, 1, 2, 3] and len(alive) == 24


def test_bfloat16_weights_pass_the_check(checkpoint):
    _, _, _, found = spectra_of(checkpoint("Llama"), dtype="bfloat16")
    assert 1e-4 < max(layer.error for layer in found) < 2e-2


def test_not_a_number_in_the_weights_is_named(checkpoint, tmp_path, tokenizer):
    model = load_model(checkpoint("Llama"))
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[3, 4] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    tokenizer.save_pretrained(tmp_path / "broken")
    with pytest.raises(ValueError, match="finite"):
        verify.verify(settings(tmp_path / "broken", tmp_path))


def test_pairs_are_stratified_and_repeatable():
    pairs = capture.choose_pairs(256, 60, 1)
    again = capture.choose_pairs(256, 60, 1)
    assert (pairs.query == again.query).all() and (pairs.key == again.key).all()
    near, far, first = (pairs.distance[pairs.stratum == s] for s in range(3))
    assert near.max() < 32 and far.min() >= 128 and (pairs.key[pairs.stratum == 2] == 0).all()
    assert len(near) == len(far) == len(first) == 20
    assert pairs.key.min() >= 0 and pairs.query.max() < 256


def test_verify_writes_rows_curves_and_picture(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scene, "LINE_SECONDS", 0.0)
    config = settings(checkpoint("Llama"), tmp_path, against=str(checkpoint("Llama", seed=1)), target=1500)
    config.formats = ("png",)
    with pytest.raises(ValueError, match="must be above the window"):
        verify.verify(settings(checkpoint("Llama"), tmp_path, target=200, context=None))
    assert verify_command(config) == 0
    shown = capsys.readouterr()
    assert "1.000000" in shown.out and ": 2 of 2 layers\n" in shown.err
    found = results.read_rows(tmp_path / "run" / "results.jsonl")
    values = {row["metric"]: row["value"] for row in found}
    assert {row["suite"] for row in found} == {"analysis"} and {row["length"] for row in found} == {1500}
    assert all(values[f"share_within_{name}"] == 1.0 for name in findings.CHECKS)
    changes = {row["metric"]: row["value"] for row in found if row["task"] == "change"}
    assert changes["rms_gap"] > 0 and changes["rms_observed"] > 0
    curves = json.loads((tmp_path / "run" / "curves.json").read_text())
    points, worst = curves["prediction"]["points"], curves["prediction"]["worst"]
    highest = np.interp(np.log(points["observed"]), np.log(worst["eps"]), worst["value"])
    assert (np.array(points["gap"]) <= highest * 1.01).all(), "no pair lies above the worst case"
    assert curves["observed"] == [[0, 235], [1245, 1499]] and curves["gap"] == [[236, 1244]]
    assert {path.name for path in (tmp_path / "run").glob("*.png")} == {"score.png", "verify.png"}
    config.formats = ()
    verify_command(config)
    assert len(results.read_rows(tmp_path / "run" / "results.jsonl")) == len(found), "a second run replaces its rows"


def test_a_violated_bound_fails_the_command(checkpoint, tmp_path, monkeypatch):
    """A wrong bound (a fifth of the right one) is violated by most pairs, reported, and the exit code says so."""
    monkeypatch.setattr(findings, "coef_bound", lambda z, omega, order=0: 0.2 * analysis.coef_bound(z, omega, order))
    assert verify_command(settings(checkpoint("Llama"), tmp_path)) == 1


def test_the_checks_take_suprema_over_the_line():
    """sin(d/8) on [0, 4]: with the maximum over the window in place of the supremum, Bernstein would be violated."""
    z, omega, (_, end) = analysis.windowed_counterexample()
    largest = Sweep(omega, int(end) + 1, spacing=0.01).maxima(z[None])
    ratio = findings.bound_ratios(findings.checked_bounds(z[None], omega), largest)
    assert all(value[0] <= 1 for value in ratio.values())
    assert ratio["bernstein_order1"][0] == pytest.approx(1) and ratio["duffin_schaeffer"][0] == pytest.approx(1)
    over_the_window = largest.size[1] / (omega.max() * largest.size[0])
    assert over_the_window[0] == pytest.approx(2.085829643, abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": 3000}, "end prompt must be shorter"),
        ({"prompt": 300}, "longer than the context"),
        ({"noise": 0.0}, "noise"),
        ({"heads": "2.0"}, "layer.head of a model with 2 layers of 4 heads"),
        ({"heads": "one"}, "layer.head"),
        ({"context": 2040}, "must fit into the target"),
        ({"pairs": 2}, "pairs must be at least 3"),
        ({"text": "/nonexistent/text"}, "No such file"),
        ({"tokens": 4}, "at least 16 tokens"),
    ],
)
def test_verify_names_bad_input(checkpoint, tmp_path, changes, words):
    with pytest.raises((ValueError, OSError), match=words):
        verify.verify(settings(checkpoint("Llama"), tmp_path, **changes))
    assert not (tmp_path / "run" / "results.jsonl").exists()


def test_change_is_measured_against_the_base(checkpoint, tmp_path):
    """RMS of the difference, recomputed from the two models' own spectra by summing over every distance."""
    path, base = checkpoint("Llama"), checkpoint("Llama", seed=1)
    config = settings(path, tmp_path, against=str(base), pairs=24, tokens=100)
    scene, report = prepare(config), verify.verify(config)
    scores = []
    for directory in (path, base):
        found = []
        capture.capture(load_model(directory), scene.ids, scene.pairs, found.append)
        z = np.concatenate([layer.scaling * layer.z.reshape(-1, layer.z.shape[-1]) for layer in found])
        scores.append(analysis.eval_score(z, scene.omega, np.arange(scene.length)))
    delta = scores[0] - scores[1]
    for name, segments in (("observed", scene.observed), ("gap", scene.gap)):
        inside = np.concatenate([delta[:, lo : hi + 1] for lo, hi in segments], axis=1)
        assert report.curves["prediction"]["rms"][name] == pytest.approx(np.sqrt(np.mean(inside**2)), rel=1e-9)


def test_chosen_heads_are_drawn_as_the_model_computes_them(checkpoint, tmp_path):
    """A stored curve, at its pair's own distance, is the logit of that pair in the model."""
    config = settings(checkpoint("Llama"), tmp_path, heads="1.3, 0.2")
    report = verify.verify(config)
    assert [(c["layer"], c["head"]) for c in report.curves["curves"]] == [(0, 2), (1, 3)]
    scene, found = prepare(config), {}
    capture.capture(
        load_model(checkpoint("Llama")), scene.ids, scene.pairs, lambda layer: found.__setitem__(layer.layer, layer)
    )
    for curve in report.curves["curves"]:
        layer, d = found[curve["layer"]], curve["query"] - curve["key"]
        pair = np.flatnonzero((scene.pairs.query == curve["query"]) & (scene.pairs.key == curve["key"]))[0]
        logit = layer.scaling * analysis.eval_score(layer.z[curve["head"], pair], scene.omega, [d])[0]
        assert curve["orders"][0]["low"][d] == pytest.approx(logit, rel=1e-5)


def test_against_another_architecture_is_named(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="same architecture"):
        verify.verify(settings(checkpoint("Llama"), tmp_path, against=str(checkpoint("Mistral"))))


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("Llama", {"rope_parameters": LINEAR | {"mrope_section": [1, 1, 2]}}, "multimodal RoPE sections"),
        ("GPT2", {}, "no RoPE"),
        ("Bloom", {}, "ALiBi"),
    ],
)
def test_models_outside_the_theory_are_named(tmp_path, family, changes, words):
    import transformers

    config = config_of("Llama") if family == "Llama" else getattr(transformers, f"{family}Config")()
    config.save_pretrained(tmp_path / "model")
    written = tmp_path / "model" / "config.json"
    written.write_text(json.dumps(json.loads(written.read_text()) | changes))
    with pytest.raises(ValueError, match=words):
        verify.verify(settings(tmp_path / "model", tmp_path))


def recorded_as(checkpoint, **record):
    """A copy of a checkpoint with a record of how it was trained."""
    import shutil

    path = checkpoint.with_name(f"{checkpoint.name}-{record['config']['scheme']}")
    shutil.copytree(checkpoint, path, dirs_exist_ok=True)
    whole = {"window": WINDOW, "target": TARGET, "row_tokens": 200, "prompt_tokens": 0} | record
    (path / "endprompt.json").write_text(json.dumps(whole))
    return path


@pytest.mark.parametrize(
    ("record", "flags", "observed"),
    [
        ({"config": {"scheme": "contiguous"}}, {}, [(0, 199)]),
        ({"config": {"scheme": "contiguous"}}, {"context": 250}, [(0, 249)]),
        ({"config": {"scheme": "endprompt"}, "prompt_tokens": 8}, {}, [(0, 191), (1849, 2047)]),
        ({"config": {"scheme": "endprompt"}, "prompt_tokens": 8}, {"target": 1024}, [(0, 191), (825, 1023)]),
        ({"config": {"scheme": "anchors", "anchors": 2}, "prompt_tokens": 8}, {},
         [(0, 191), (825, 1023), (1849, 2047)]),
        ({"config": {"scheme": "pose"}}, {"scheme": "endprompt", "prompt": 8}, [(0, 191), (1849, 2047)]),
        ({"config": {"scheme": "pose"}}, {}, [(0, 2047)]),
        ({"config": {"scheme": "contiguous"}, "row_tokens": TARGET}, {}, [(0, 2047)]),
    ],
)  # fmt: skip
def test_verify_reads_the_rows_from_the_record(checkpoint, record, flags, observed):
    config = VerifyConfig(str(recorded_as(checkpoint("Llama"), **record)), pairs=6, **flags)
    scene = prepare(config)
    assert scene.observed == observed
    assert scene.window == WINDOW


@pytest.mark.parametrize("scheme", [*positions.SCHEMES, "full-length"])
def test_verify_of_every_scheme(checkpoint, tmp_path, scheme, monkeypatch):
    """The distances against those of drawn rows; without a gap the bounds are checked, and nothing is said of one."""
    prompt, row_tokens = (8 if scheme in positions.WITH_PROMPT else 0), TARGET if scheme == "full-length" else 200
    kind = "contiguous" if scheme == "full-length" else scheme
    record = {"config": {"scheme": kind, "anchors": 4}, "prompt_tokens": prompt, "row_tokens": row_tokens}
    path = str(recorded_as(checkpoint("Llama"), **record))
    formats = ("png",) if scheme == "full-length" else ()
    monkeypatch.setattr(figures, "draw_at_once", figures.draw)  # a process of its own draws in the test of the page
    config = VerifyConfig(path, pairs=6, tokens=100, output=str(tmp_path), formats=formats)
    report = verify.verify(config)
    seen = np.zeros(TARGET, dtype=bool)
    for draw in range(300 if kind != "contiguous" else 1):
        ids = positions.position_ids(kind, row_tokens - prompt, prompt, TARGET, positions.sample_rng(0, draw))
        seen[np.abs(np.subtract.outer(ids, ids)).ravel()] = True
    observed = np.zeros(TARGET, dtype=bool)
    for lo, hi in report.curves["observed"]:
        observed[lo : hi + 1] = True
    assert not (seen & ~observed).any() and np.mean(observed & ~seen) < 0.1
    assert observed.sum() + sum(hi - lo + 1 for lo, hi in report.curves["gap"]) == TARGET
    assert report.holds and (f"; no gap: {kind} shows every distance" in report.table()) is bool(observed.all())
    about_gap = [row["metric"] for row in report.rows if row["task"] != "observability" and "gap" in row["metric"]]
    assert bool(about_gap) is not observed.all()
    assert {path.name for path in tmp_path.glob("*.png")} == ({"score.png", "verify.png"} if formats else set())
    if scheme == "pose":
        assert observed.all()


def test_layers_without_rope_are_left_out_of_verify(checkpoint, tmp_path):
    report = verify.verify(settings(checkpoint("SmolLM3"), tmp_path, target=1500))
    assert report.holds and "layers without RoPE, left out: 1" in report.table()
    base = {row["metric"]: row["value"] for row in report.rows if row["task"] == "rope_base"}
    omega, _ = rope_geometry(load_config(checkpoint("SmolLM3"))).frequencies(1500)
    assert base["base"] == pytest.approx(1 / omega[-1]) and base["aliasing"] == pytest.approx(1500 / (2 * np.pi))
    assert np.cos(1500 / base["stability"]) ** 2 == pytest.approx(0.9), "of two layers with RoPE"
    with pytest.raises(ValueError, match=r"layer 1 has not: heads=1\.0"):
        verify.verify(settings(checkpoint("SmolLM3"), tmp_path, target=1500, heads="1.0"))


def test_positions_command(tmp_path, capsys):
    config = PositionsConfig(scheme="endprompt", target=2048, context=236, prompt=20, head_dim=64, base=10000.0)
    config.plot = str(tmp_path / "coverage.pdf")
    positions_command(config)
    assert "[0, 235] [1793, 2047]; [236, 1792]" in capsys.readouterr().out
    assert (tmp_path / "coverage.pdf").read_bytes().startswith(b"%PDF")


def test_without_an_end_prompt_only_schemes_without_one_are_compared(capsys):
    config = PositionsConfig(scheme="all", target=2048, context=256, prompt=0, head_dim=64, base=10000.0)
    positions_command(config)
    out = capsys.readouterr().out
    assert "contiguous" in out and "pose" in out and "endprompt" not in out and "anchors" not in out
    with pytest.raises(ValueError, match="places an end prompt"):
        positions_command(PositionsConfig(scheme="endprompt", target=2048, context=256, prompt=0))
    with pytest.raises(ValueError, match="must leave a gap"):
        positions_command(PositionsConfig(target=300, context=236, prompt=20))


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Glm", "StableLm", "JetMoe", "DeepseekV3"])
def test_a_row_as_long_as_its_text_is_the_models_own(checkpoint, family):
    """Grouped, normed, partial, interleaved, in tiles and from compressed keys, against eager attention's weights."""
    model = load_model(checkpoint(family), attention="eager")
    ids, found = np.random.default_rng(0).integers(0, 256, size=40), []
    geometry = capture.capture_tokens(model, ids, found.append)
    with torch.no_grad():
        weights = model(torch.as_tensor(ids)[None], output_attentions=True).attentions
    omega, factor = geometry.frequencies(40)
    frame = attention.Frame(omega, 40, 40)
    for layer in found:
        (rows,) = frame.rows(layer, factor)
        np.testing.assert_allclose(rows.p, weights[layer.layer][0][:, frame.query], atol=2e-5)


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("Mistral", {}, r"reads the checkpoint before extension: .* is extended already \(rope_type='yarn'\)"),
        ("Gemma2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "attn_logit_softcapping=50"),
    ],
)
def test_predict_names_what_it_cannot_compare(checkpoint, family, changes, words):
    with pytest.raises(ValueError, match=words):
        predict.read(PredictConfig(str(checkpoint(family, **changes)), 4096))
    extended = recorded_as(checkpoint("Llama", rope_parameters={"rope_type": "default", "rope_theta": 8e4}),
                           config={"scheme": "pose", "scaling": "ntk"})  # fmt: skip
    with pytest.raises(ValueError, match="extended already"):
        predict.read(PredictConfig(str(extended), 4096))


def test_predict_reads_the_layers_that_an_extension_scales(checkpoint):
    """Of layers with frequencies by kind those that see everything, each head of theirs once."""
    full, sliding = ({"rope_type": "default", "rope_theta": base} for base in (1e6, 1e4))
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 32, "head_dim": 16}
    kinds |= {"rope_parameters": {"full_attention": full, "sliding_attention": sliding}}
    reading = predict.read(PredictConfig(str(checkpoint("Gemma3Text", max_position_embeddings=256, **kinds)), 2048))
    assert reading.heads == 4 and [line.partition(";")[2] for line in reading.kinds] == [
        " an extension leaves their frequencies", " an extension scales their frequencies"
    ]  # fmt: skip
    np.testing.assert_allclose(reading.theta, 1e6 ** -(np.arange(8) / 8))
