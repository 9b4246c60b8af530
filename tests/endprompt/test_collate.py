"""The position schemes in another trainer: rows typed by hand, losses and logits against transformers' own."""

import itertools
import json

import numpy as np
import pytest
import torch
import transformers

import endprompt
from endprompt.collate import PositionalCollator, WeightedSteps, prepare_model
from endprompt.config import ExtendConfig
from endprompt.data import Documents, Rows, row_spec
from endprompt.model import extended_config
from tests.support.checkpoints import TARGET, VOCABULARY, WINDOW, tiny_config
from tests.support.runs import losses_of

IDS = torch.randint(0, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))
JUMPED = torch.cat([torch.arange(16), torch.arange(120, 128)]).repeat(2, 1)


def model_of(config, **options):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, **options).eval()


def config_of(family):
    if family != "DeepseekV3":
        return tiny_config(family)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16}
    heads = dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "head_dim"), 8)
    few = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 4}
    few |= {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "kv_lora_rank": 16, "q_lora_rank": 16}
    return transformers.DeepseekV3Config(**sizes, **heads, **few, max_position_embeddings=WINDOW)


def collator(tokenizer, **changes):
    return PositionalCollator(tokenizer, **({"scheme": "endprompt", "target": TARGET, "prompt": "EP_3"} | changes))


@pytest.mark.parametrize(
    ("family", "scaling", "options"),
    [
        *(("Llama", scaling, {}) for scaling in ("none", "linear", "ntk", "dynamic", "yarn", "llama3", "longrope")),
        ("Qwen3", "yarn", {}),
        ("Phi3", "longrope", {}),
        ("DeepseekV3", "yarn", {"mscale": 1.0, "mscale_all_dim": 1.0}),  # whose layers read the scaling, too
    ],
)
def test_a_prepared_model_is_the_extended_one_causal_over_jumps(family, scaling, options):
    """Against transformers' eager attention under a mask of ones, in a model made from the extended config."""
    source = config_of(family)
    expected = model_of(extended_config(source, scaling, TARGET, **options), attn_implementation="eager")
    model = model_of(source)
    expected.load_state_dict(model.state_dict())
    assert prepare_model(model, scaling, TARGET, rope_options=options) is model
    with torch.no_grad():
        found = model(input_ids=IDS, position_ids=JUMPED).logits
        wanted = expected(input_ids=IDS, position_ids=JUMPED, attention_mask=torch.ones_like(IDS)).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_transformers_reads_a_jump_as_a_border_and_a_prepared_model_does_not():
    """Context token 0 must reach the last logits, as it does by the collator's mask in a model that is not prepared."""
    changed = IDS.clone()
    changed[:, 0] = (changed[:, 0] + 1) % VOCABULARY

    def reached(model, **mask):
        with torch.no_grad():
            one, other = (
                model(input_ids=ids, position_ids=JUMPED, use_cache=False, **mask).logits[:, -1]
                for ids in (IDS, changed)
            )
        return not torch.equal(one, other)

    stock = model_of(tiny_config("Llama"))
    assert not reached(stock)  # the trap: if transformers mends it, this line says so
    assert reached(stock, attention_mask=torch.ones_like(IDS))
    assert reached(prepare_model(stock, "linear", TARGET))


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"attention_mask": torch.ones_like(IDS).tril(20).flip(1)}, "padded on the left"),
        ({"position_ids": torch.arange(12).repeat(2, 2)}, "position_ids go back.*turn packing off"),
        ({"cu_seq_lens_q": torch.tensor([0, 12, 24])}, "does not know.*cu_seq_lens_q"),
    ],
)
def test_batches_that_the_attention_would_get_wrong_are_refused(changes, rule):
    model = prepare_model(model_of(tiny_config("Llama")), "linear", TARGET)
    with pytest.raises(ValueError, match=rule):
        model(**({"input_ids": IDS, "position_ids": JUMPED} | changes))


def test_loss_weights_are_read_or_refused():
    """By hand from the logits; a loss that leaves them out is noticed before the first update."""
    model = prepare_model(model_of(tiny_config("Llama")), "linear", TARGET)
    weights = torch.rand(IDS.shape, generator=torch.Generator().manual_seed(1))
    given = {"input_ids": IDS, "position_ids": JUMPED, "labels": IDS, "loss_weights": weights}
    out = model(**given)
    losses = -out.logits.log_softmax(-1)[:, :-1].gather(2, IDS[:, 1:, None])[..., 0]
    expected = (losses * weights[:, 1:]).sum() / weights[:, 1:].sum()
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(model(**given, weight_total=torch.tensor(7.0)).loss, expected * weights[:, 1:].sum() / 7)
    with pytest.raises(ValueError, match="WeightedSteps"):
        model(**given, num_items_in_batch=46)
    with pytest.raises(ValueError, match="does not read loss_weights"):
        model.base_model(input_ids=IDS, position_ids=JUMPED, loss_weights=weights)[0].sum().backward()
    labels = torch.cat([torch.full((2, 4), -100), IDS[:, 4:]], 1)  # and without weights transformers' own mean
    plain = model(input_ids=IDS, position_ids=JUMPED, labels=labels).loss
    torch.testing.assert_close(plain, losses[:, 3:].mean())


def test_a_step_is_divided_by_the_weights_of_all_its_micro_batches():
    class Trainer:
        def get_batch_samples(self, iterator, count, device):
            return list(itertools.islice(iterator, count)), 99

    class Weighted(WeightedSteps, Trainer):
        args = type("Args", (), {"average_tokens_across_devices": True, "world_size": 1})

    parts = [{"loss_weights": torch.tensor([[9.0, 1.0, 0.5]])}, {"loss_weights": torch.tensor([[9.0, 0.0, 2.0]])}]
    batches, count = Weighted().get_batch_samples(iter(parts), 2, torch.device("cpu"))
    assert [float(batch["weight_total"]) for batch in batches] == [3.5, 3.5] and count == 99


def test_what_a_prepared_model_saves_is_a_standard_checkpoint(tmp_path):
    model = prepare_model(model_of(tiny_config("Llama")), "yarn", TARGET)
    model.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert "causal_only" not in text and json.loads(text)["max_position_embeddings"] == TARGET
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(stock(IDS).logits, model(IDS, use_cache=False).logits, rtol=0, atol=1e-6)


def test_what_cannot_be_prepared_is_refused():
    model = model_of(tiny_config("Llama"))
    with pytest.raises(ValueError, match="target must be above"):
        prepare_model(model, "yarn", WINDOW)
    model.peft_config = {"default": None}
    with pytest.raises(ValueError, match="before get_peft_model"):
        prepare_model(model, "yarn", TARGET)


def test_a_batch_is_typed(tokenizer):
    """Two documents of other lengths, the second with a masked front; End. is two tokens here."""
    end = tokenizer("End.")["input_ids"]
    samples = [{"input_ids": [5, 6, 7, 8]}, {"input_ids": [9, 10], "labels": [-100, 10]}]
    batch = collator(tokenizer, prompt_weight=0.25, weights=True)(samples)
    b, pad = len(end), tokenizer.eos_token_id
    far = list(range(TARGET - b, TARGET))
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, *end], [9, 10, *end, pad, pad]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, *far], [0, 1, *far, TARGET - 1, TARGET - 1]]
    assert batch["attention_mask"].tolist() == [[1] * (4 + b), [1] * (2 + b) + [0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7, 8, *end], [-100, 10, *end, -100, -100]]
    assert batch["loss_weights"].tolist() == [[0, 1, 1, 1, *[0.25] * b], [0, 1, *[0.25] * b, 0, 0]]
    assert "loss_weights" not in collator(tokenizer)(samples)


@pytest.mark.parametrize(
    ("scheme", "prompt"),
    [
        ("endprompt", ["EP_1", "EP_3"]),
        ("endprompt-random", "recall"),
        ("pose", None),
        ("anchors", "EP_3"),
        ("endprompt-sentences", "EP_3"),
    ],
)
def test_rows_are_those_of_the_trainer(tokenizer, scheme, prompt):
    """The same documents, seed and row indices; documents have room for one row."""
    rng = np.random.default_rng(0)
    options = {"anchors": 2, "recall_span": 8, "recall_given": 2, "seed": 5}
    config = ExtendConfig(target=TARGET, scheme=scheme, prompt=prompt, row_tokens=64, **options)
    spec = row_spec(config, None, tokenizer)
    texts = [rng.integers(1, VOCABULARY, rng.integers(spec.needed, 2 * spec.needed)) for _ in range(6)]
    offsets = np.cumsum([0, *map(len, texts)])
    rows = Rows(Documents(np.concatenate(texts), offsets, offsets[1:]), spec)
    weights = {"prompt_weight": spec.prompt_weight, "weights": True}
    make = collator(tokenizer, scheme=scheme, prompt=prompt, row_tokens=64, **options, **weights)
    for index in range(12):
        batch = make([{"input_ids": texts[rows._document[rows.unit(index)]].tolist(), "index": index}])
        ids, positions, expected = rows.row(index)
        assert batch["input_ids"][0].tolist() == ids.tolist()
        assert batch["position_ids"][0].tolist() == positions.tolist()
        np.testing.assert_array_equal(batch["loss_weights"][0], expected)


@pytest.mark.parametrize(
    ("scheme", "prompt"), [("contiguous", None), ("endprompt", "EP_3"), ("endprompt-random", "recall"), ("pose", None)]
)
def test_packed_rows_and_their_loss_are_those_of_the_trainer(tokenizer, scheme, prompt):
    """Samples packed as by `short_documents=apart`, said by seq_lengths or by positions: the same rows. A
    prepared model's loss is transformers' own over each document's row by itself."""
    draw = np.random.default_rng(0)
    options = {"recall_span": 4, "recall_given": 1, "seed": 5}
    config = ExtendConfig(
        target=TARGET, scheme=scheme, prompt=prompt, row_tokens=120, short_documents="apart", **options
    )
    texts = [draw.integers(1, VOCABULARY, draw.integers(16, 34)) for _ in range(12)]
    offsets = np.cumsum([0, *map(len, texts)])
    marks = np.concatenate([np.arange(len(text)) < draw.integers(4, 16) for text in texts]).astype(np.uint8)
    rows = Rows(Documents(np.concatenate(texts), offsets, offsets[1:], marks), row_spec(config, None, tokenizer))
    weights = {"prompt_weight": rows.spec.prompt_weight, "weights": True}
    make = collator(tokenizer, scheme=scheme, prompt=prompt, row_tokens=120, **options, **weights)
    samples = []
    for index in range(2):
        pack = rows._packs[rows.unit(index)]
        ids, own = (np.concatenate([whole[offsets[i] : offsets[i + 1]] for i in pack]) for whole in
                    (rows.documents.tokens, marks))  # fmt: skip
        lengths = [len(texts[i]) for i in pack]
        said = {"seq_lengths": lengths} if index else {"position_ids": np.concatenate([np.arange(n) for n in lengths])}
        samples.append({"input_ids": ids, "labels": np.where(own, ids, -100), "index": index, **said})
    batch = make(samples)
    for index in range(2):
        length = int(batch["attention_mask"][index].sum())
        for found, expected in zip((batch["input_ids"], batch["position_ids"], batch["loss_weights"]), rows.row(index)):
            np.testing.assert_array_equal(found[index][:length], expected[:length])
            assert not expected[length:].any() or found is batch["position_ids"]
    model = prepare_model(model_of(tiny_config("Qwen3")), "linear", TARGET, packed=True)
    stock = model_of(extended_config(tiny_config("Qwen3"), "linear", TARGET), attn_implementation="eager")
    stock.load_state_dict(model.state_dict())
    total = 0.0
    with torch.no_grad():
        for ids, positions, real, scored in zip(
            *(batch[key] for key in ("input_ids", "position_ids", "attention_mask", "loss_weights"))
        ):
            ends = [*torch.nonzero(positions == 0)[:, 0].tolist(), int(real.sum())]
            for part in (slice(a, b) for a, b in itertools.pairwise(ends)):
                one = {"input_ids": ids[part][None], "position_ids": positions[part][None]}
                logits = stock(**one, attention_mask=torch.ones_like(one["input_ids"])).logits[0, :-1]
                losses = torch.nn.functional.cross_entropy(logits, ids[part][1:], reduction="none")
                total += float((losses * scored[part][1:]).sum())
        found = float(model(**batch).loss)
    assert found == pytest.approx(total / float(batch["loss_weights"][:, 1:].sum()), abs=1e-5)


def test_what_keeps_no_packed_documents_apart_is_refused():
    for family, scaling, rule in (
        ("Llama", "dynamic", "depend on a row's farthest position.*packed=True"),
        ("Gemma3Text", "linear", "cannot mask.*model_type='gemma3_text'"),
    ):
        with pytest.raises(ValueError, match=rule):
            prepare_model(model_of(tiny_config(family)), scaling, TARGET, packed=True)
    model = prepare_model(model_of(tiny_config("Llama")), "linear", TARGET, packed=True)
    with pytest.raises(ValueError, match=r"position_ids go back.*begins at position 0"):
        model(input_ids=IDS, position_ids=torch.arange(1, 13).repeat(2, 2))


def test_draws_follow_the_index_or_torchs_seed(tokenizer):
    make = collator(tokenizer, scheme="endprompt-random")
    sample = {"input_ids": list(range(1, 30))}

    def drawn(**more):
        return make([sample | more])["position_ids"].tolist()

    assert drawn(index=3) == drawn(index=3) != drawn(index=4)
    torch.manual_seed(0)
    one = [drawn(), drawn()]
    torch.manual_seed(0)
    assert one == [drawn(), drawn()] and one[0] != one[1]


def test_a_long_document_gives_windows_and_what_is_scored_last_is_kept(tokenizer):
    make = collator(tokenizer, row_tokens=16)
    document = list(range(1, 101))
    starts = {make([{"input_ids": document, "index": i}])["input_ids"][0, 0].item() for i in range(40)}
    assert len(starts) > 20 and max(starts) > 60
    labels = [-100] * 95 + document[95:]
    for index in range(5):
        batch = make([{"input_ids": document, "labels": labels, "index": index}])
        assert batch["input_ids"].shape == (1, 16) and set(range(96, 101)) <= set(batch["labels"][0].tolist())


@pytest.mark.parametrize(
    ("changes", "sample", "rule"),
    [
        ({"prompt_weight": 0.1}, None, "prompt_weight must be 0 or 1"),
        ({"scheme": "nope"}, None, "scheme must be one of"),
        ({"prompt": "none"}, None, "needs an end prompt"),
        ({"spam": 1}, None, "no setting 'spam'"),
        ({"seed": -1}, None, "seed must be at least 0"),
        ({}, {"text": "a"}, "must have input_ids, it has text"),
        ({}, {"input_ids": [1, 2, 3, 4], "seq_lengths": [2, 1]}, r"add up to the sample's 4.*seq_lengths=\[2, 1\]"),
        ({}, {"input_ids": [1, 2, 3, 4], "seq_lengths": [4, 0]}, "must be above 0"),
        ({}, {"input_ids": [1, 2, 3, 4], "position_ids": [0, 1, 5, 6]}, "'endprompt'.*brings none of its own"),
        ({}, {"input_ids": [1, 2, 3, 4], "cu_seq_lens_q": [0, 2, 4]}, "by seq_lengths, not by cu_seq_lens_q"),
        ({"row_tokens": 8}, {"input_ids": list(range(1, 9)), "seq_lengths": [4, 4]}, "end prompts take.*row_tokens=8"),
        (
            {"prompt": "recall", "recall_span": 8, "recall_given": 2},
            {"input_ids": [1, 2, 3, 4] * 20, "seq_lengths": [78, 2], "index": 3},
            "sample 3 of 80 tokens, 2 documents packed, makes no row of scheme 'endprompt'",
        ),
        ({}, {"input_ids": [1, 2], "labels": [1, 3]}, "labels must be the sample's input_ids"),
        ({}, {"input_ids": [1, 2, 0], "attention_mask": [1, 1, 0]}, "must not be padded.*has zeros"),
        ({}, {"input_ids": [[1, 2]]}, r"a list of ids: shape=\(1, 2\)"),
        ({}, {"input_ids": [], "index": 7}, "sample 7 of 0 tokens makes no row of scheme 'endprompt'"),
        ({}, {"input_ids": [1], "index": 7}, "sample 7 of 1 tokens makes no row.*does not fit"),
        ({"prompt": "recall", "recall_span": 20}, {"input_ids": [1] * 30}, "of 30 tokens makes no row.*at most half"),
        ({"scheme": "contiguous", "prompt": None}, {"input_ids": [1, 2], "labels": [-100, -100]}, "no token of this"),
    ],
)
def test_what_makes_no_row_is_refused(tokenizer, changes, sample, rule):
    with pytest.raises(ValueError, match=rule):
        collator(tokenizer, **changes)([sample])


def test_extend_is_a_call(llama, documents, tmp_path):
    out = endprompt.extend(
        llama, documents, tmp_path / "out", TARGET, prompt="EP_3", rows=4, steps=2, device="cpu", log_every=1
    )
    assert out == tmp_path / "out" and len(losses_of(out)) == 2


@pytest.mark.slow
def test_score_and_verify_are_calls(llama, tmp_path):
    report = endprompt.verify(
        llama, target=TARGET, prompt=4, output=tmp_path / "verify", tokens=24, pairs=4, formats=["png"]
    )
    assert report.holds and report.rows
    settings = {"tasks": "niah_single_1", "lengths": 400, "samples": 2, "max_new_tokens": 4, "beyond_window": True}
    settings |= {"shots": 0, "quiet": True, "name": "mine"}
    (row,) = endprompt.score(llama, **settings, device="cpu", output=tmp_path / "score", cache_dir=tmp_path / "cache")
    assert (row["model"], row["task"], row["length"], row["n"]) == ("mine", "niah_single_1", 400, 2)


@pytest.mark.parametrize(
    ("call", "settings", "rule"),
    [
        (
            "extend",
            {"traget": 3, "model": "m", "data": "d", "output": "o", "target": 64},
            "'traget'.*did you mean target",
        ),
        ("extend", {"model": "m", "data": "d", "output": "o", "target": "64k"}, "target must be a whole number.*64k"),
        ("score", {"checkpoint": "m", "suite": "rulr"}, "suite must be one of ruler"),
        ("verify", {"checkpoint": "m", "pairs": 1.5}, "pairs must be a whole number"),
    ],
)
def test_wrong_settings_of_a_call_are_said_as_on_the_command_line(call, settings, rule):
    with pytest.raises(ValueError, match=rule):
        getattr(endprompt, call)(**settings)
