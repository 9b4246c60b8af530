"""Kinds of layers: what is scaled, what stays, and that a jumped row is what it would be at full length.

The full-length row is transformers' own: eager attention, contiguous positions, and a mask over the places that the
jumped row leaves out. Nothing of ours is in it.
"""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from endprompt import model as models
from endprompt.model import geometry, kinds, load, parity
from endprompt.model.attention import registered_name
from endprompt.model.packed import apart_attention
from endprompt.train import Objective
from tests.support.checkpoints import make_tokenizer
from tests.support.families import tiny_config

WINDOW, TARGET, NARROW, LENGTH = 256, 1024, 8, 120

#: family: scaling of its extension, attentions that have what it needs, layers that are scaled
FAMILIES = {
    "gemma2": ("yarn", ["eager"], [0, 1, 2, 3]),  # one set of frequencies for all
    "gemma3_text": ("yarn", ["sdpa", "eager"], [1, 3]),
    "gemma4_text": ("linear", ["sdpa"], [1, 3]),
    "olmo3": ("yarn", ["sdpa", "eager"], [1, 3]),
    "gpt_oss": ("yarn", ["sdpa", "eager"], [0, 1, 2, 3]),
    "ministral": ("yarn", ["sdpa"], [0, 1, 2, 3]),
    "ministral3": ("yarn", ["sdpa"], [0, 1, 2, 3]),
    "smollm3": ("yarn", ["sdpa"], [0, 1, 2]),
    "llama4_text": ("none", ["sdpa", "eager"], []),
    "cohere2": ("none", ["sdpa"], []),
    "qwen3_moe": ("yarn", ["sdpa"], [0, 1, 2, 3]),
    "mixtral": ("yarn", ["sdpa"], [0, 1, 2, 3]),
    "qwen3_5_text": ("yarn", ["sdpa"], [1, 3]),
}


def checkpoint(directory, family):
    """Random weights whose layers that see a window see 8 tokens; Llama 4's queries grow every 16 positions."""
    config = tiny_config(family, *() if family in ("qwen3_moe", "mixtral", "ministral3") else (NARROW,))
    if family == "llama4_text":
        config.floor_scale, config.attn_scale = 16, 0.5
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.08)
    model.save_pretrained(directory)
    return directory


def jumped(rows):
    """Token ids and positions of rows with jumps, 44 tokens each: by less than a window, by more, and by chunks."""
    ids = torch.randint(1, 320, (rows, 44), generator=torch.Generator().manual_seed(1))
    places = [
        torch.cat([torch.arange(21), torch.arange(24, 34), torch.arange(100, 113)]),
        torch.cat([torch.arange(3), torch.arange(79, 120)]),
    ]
    return ids, torch.stack(places[:rows])


def at_full_length(model, ids, positions):
    """Logits of the same tokens at their places in a row of 120, whose other places are masked."""
    rows = torch.arange(len(ids))[:, None]
    whole = torch.full((len(ids), LENGTH), 7)
    seen = torch.zeros_like(whole)
    whole[rows, positions], seen[rows, positions] = ids, 1
    logits = model(
        input_ids=whole, attention_mask=seen, position_ids=torch.arange(LENGTH).expand(len(ids), -1), use_cache=False
    ).logits
    return logits[rows, positions]


#: What the others have too; they are tried in the slow tests.
FAST = [("gemma2", "eager"), ("gemma3_text", "sdpa"), ("gpt_oss", "sdpa"), ("llama4_text", "sdpa")]
PAIRS = [(family, name) for family, (_, names, _) in FAMILIES.items() for name in names]


@pytest.mark.parametrize(
    ("family", "attention"),
    [pytest.param(*pair, marks=[] if pair in FAST else [pytest.mark.slow]) for pair in PAIRS],
)
def test_a_jumped_row_is_what_it_is_at_full_length(tmp_path, family, attention):
    """Logits, loss and gradients of one row and of two; for linear layers, which have no places, a mask of ones."""
    scaling = FAMILIES[family][0]
    source = checkpoint(tmp_path / "m", family)
    config = models.extended_config(models.load_config(source), scaling, TARGET)
    load.check_builds(config, models.training_attention(attention))
    model = models.load_model(source, attention=models.training_attention(attention), config=config)
    objective = Objective(model, autocast=False)
    parity.check_forward(objective)
    stock = AutoModelForCausalLM.from_pretrained(source, config=config, attn_implementation="eager", dtype="float32")
    stock.eval()
    for rows in (1, 2):
        ids, positions = jumped(rows)
        weights = torch.rand(rows, 44, generator=torch.Generator().manual_seed(2))
        weights[:, 0] = 0
        if family == "qwen3_5_text":
            given = {"position_ids": positions, "attention_mask": torch.ones_like(ids), "use_cache": False}
            expected = stock(input_ids=ids, **given).logits
        else:
            expected = at_full_length(stock, ids, positions)
        found = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=3e-5)
        losses = F.cross_entropy(expected[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        wanted = (losses * weights[:, 1:].flatten()).sum()
        loss = objective(ids, positions, weights)
        torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)
        for one in (loss, wanted):
            one.backward()
        for (name, ours), theirs in zip(model.named_parameters(), stock.parameters()):
            assert float((ours.grad - theirs.grad).norm()) <= 1e-3 * float(theirs.grad.norm()), name
        model.zero_grad()
        stock.zero_grad()


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(f, marks=[] if f in ("gemma3_text", "gemma4_text", "smollm3") else [pytest.mark.slow])
        for f in FAMILIES
    ],
)
def test_the_layers_that_are_meant_are_scaled_and_exported(tmp_path, family):
    """By transformers' own buffers of the export, before and after; the export has the live model's logits."""
    scaling, (attention, *_), scaled = FAMILIES[family]
    source = checkpoint(tmp_path / "m", family)
    before = models.load_config(source)
    config = models.extended_config(before, scaling, TARGET)
    model = models.load_model(source, attention=models.training_attention(attention), config=config)
    models.export(model, make_tokenizer(), tmp_path / "out", "float32")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    assert again.config.max_position_embeddings == TARGET
    ids = torch.randint(1, 320, (1, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        model.set_attn_implementation("eager")
        torch.testing.assert_close(model(input_ids=ids).logits, again(input_ids=ids).logits, rtol=1e-5, atol=1e-6)
    old = AutoModelForCausalLM.from_pretrained(source)
    stored = [{n: b for n, b in one.named_buffers() if n.endswith("inv_freq")} for one in (old, again)]
    changed = {name.rpartition(".")[2] for name in stored[0] if not torch.equal(stored[0][name], stored[1][name])}
    names = {"inv_freq", "original_inv_freq"}
    if kinds.by_kind(before.rope_parameters):
        assert again.config.rope_parameters["sliding_attention"] == before.rope_parameters["sliding_attention"]
        names = {f"full_attention_{name}" for name in names}
    assert changed == (names if scaled else set())
    by_layer = [geometry.frequencies_by_layer(one) for one in (before, again.config)]
    assert sorted(n for n in by_layer[0] if (by_layer[0][n][0] != by_layer[1][n][0]).any()) == scaled


def test_what_is_said_of_each_kind():
    gemma = tiny_config("gemma3_text", NARROW)
    assert kinds.described(gemma, TARGET, "yarn") == [
        "layers 0, 2 (sliding_attention): attention to a sliding window of 8 tokens; "
        "an extension leaves their frequencies",
        "layers 1, 3 (full_attention): attention to everything; an extension scales their frequencies",
    ]
    assert kinds.described(tiny_config("gpt_oss", NARROW), TARGET, "yarn")[0] == (
        "layers 0, 2 (sliding_attention): attention to a sliding window of 8 tokens; "
        "an extension scales their frequencies too, since the config has one set for all layers"
    )
    assert kinds.described(tiny_config("smollm3"), TARGET, "yarn")[1] == (
        "layer 3 (full_attention): attention to everything, no RoPE; an extension changes nothing in them"
    )
    assert kinds.spelled([0, 1, 2, 4, 6, 7]) == "0-2, 4, 6-7"


@pytest.mark.parametrize(
    ("family", "changes", "scaling", "said"),
    [
        ("gemma2", {"sliding_window": None}, "yarn",
         "layer_types has sliding_attention and sliding_window is None: state sliding_window, or write full_attention"),
        ("gemma3_text", {"layer_types": ["sliding_attention"] * 4}, "yarn",
         "all layers that attend see only a window .* sliding_window=8 .* write full_attention for sliding_attention"),
        ("mistral", {}, "yarn", "all layers .* sliding_window=8 target=1024; set sliding_window to null"),
        ("cohere2", {}, "yarn", "have no RoPE, so scaling='yarn' would change none but those that slide"),
        ("llama4_text", {}, "linear", "have no RoPE, so scaling='linear'"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "yarn", "no_rope_layers must say it of each of 4 layers: 2 given"),
        ("deepseek_v4", {}, "yarn", "of a kind that is not known here: heavily_compressed_attention"),
        ("axk2", {}, "yarn", "layers 0-3 are of a kind that is not known here: indexed_attention"),
        ("gemma3_text", {"rope_parameters": {"full_attention": {"rope_type": "spiral", "rope_theta": 1e4},
                                             "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
         "yarn", "scaled by 'spiral' already; which is not known here"),
        ("olmo3", {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "twist": 2.0},
                                       "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
         "yarn", "not known what an extension does to it: twist=2.0"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused_before_loading(family, changes, scaling, said):
    config = tiny_config(family, NARROW)
    for key, value in changes.items():
        setattr(config, key, value)
    with pytest.raises(ValueError, match=said) as raised:
        models.extended_config(config, scaling, TARGET)
    assert "\n" not in str(raised.value)


def test_documents_that_stand_apart_have_no_windows():
    config = models.extended_config(tiny_config("olmo3", NARROW), "yarn", TARGET)
    with pytest.raises(ValueError, match=r"which short_documents='apart' .* cannot mask: .* must be drop or pack"):
        load.check_builds(config, apart_attention("sdpa"))


@pytest.mark.parametrize("attention", ["cudnn", "shifted", "flash_attention_2"])
def test_an_attention_without_windows_names_those_with(attention):
    """Before any weight is there; flash kernels know places alone, and positions that jump are other ones."""
    config = models.extended_config(tiny_config("olmo3", NARROW), "yarn", TARGET)
    with pytest.raises(
        ValueError,
        match=rf"a sliding window of 8 tokens, by position, which attention={attention} cannot mask: "
        "it must be one of sdpa, eager, flex",
    ):
        load.check_builds(config, registered_name(attention))


@pytest.mark.parametrize(
    "family", ["gpt_oss", *(pytest.param(f, marks=pytest.mark.slow) for f in ("gemma2", "llama4_text"))]
)
def test_flex_masks_and_caps_and_sinks_by_position(tmp_path, family):
    """Without gradients, which flex has on GPUs alone."""
    ids, positions = jumped(2)
    source = checkpoint(tmp_path / family, family)
    config = models.extended_config(models.load_config(source), FAMILIES[family][0], TARGET)
    logits = []
    for name in ("eager", "flex"):
        model = models.load_model(source, attention=models.training_attention(name), config=config)
        with torch.no_grad():
            model.requires_grad_(False)
            logits.append(model(input_ids=ids, position_ids=positions, use_cache=False).logits)
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-5)


def test_padding_that_repeats_a_position_is_not_seen(tmp_path):
    """Rows that a collator has padded on the right: the last token sees nothing behind it, in any kind of layer."""
    source = checkpoint(tmp_path / "m", "gemma3_text")
    config = models.extended_config(models.load_config(source), "yarn", TARGET)
    model = models.load_model(source, attention=models.training_attention("sdpa"), config=config)
    ids, positions = jumped(1)
    with torch.no_grad():
        alone = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        padded = model(input_ids=F.pad(ids, (0, 9), value=7), position_ids=F.pad(positions, (0, 9), value=112),
                       use_cache=False).logits[:, :44]  # fmt: skip
    torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-5)
