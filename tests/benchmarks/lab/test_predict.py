"""Scoring in memory against the same samples through lm-eval, and against sums made by hand."""

from __future__ import annotations

import pytest
import torch

from benchmarks import ruler
from benchmarks.lab import predict
from benchmarks.scoring import ScoreConfig, predictions, score
from endprompt import model as models
from endprompt.model import training_attention
from tests.support import ruler_helpers as helpers

TASKS = ("niah_single_1", "niah_multikey_1", "vt")
LENGTHS = (300, 500)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quick")
    helpers.essay_file(folder)
    for kind in ("llama", "mistral"):
        helpers.checkpoint(folder / kind, kind=kind)
    return folder


@pytest.fixture(scope="module")
def samples(place) -> list[dict]:
    options = dict(haystack_text=str(place / "story.txt"), max_new_tokens=12, shots=0, hops=3)
    return [
        {**sample, "name": f"{task}@{length}"}
        for length in LENGTHS
        for task in TASKS
        for sample in ruler.build_samples(task, length, helpers.tokenizer(), 4, 0, **options)
    ]


@pytest.fixture(scope="module")
def through_lm_eval(place):
    """{kind: {(task@length, index): prediction}}."""
    found = {}
    for kind in ("llama", "mistral"):
        config = ScoreConfig(
            str(place / kind),
            tasks=list(TASKS),
            lengths=list(LENGTHS),
            samples=4,
            max_new_tokens=12,
            shots=0,
            hops=3,
            haystack_text=str(place / "story.txt"),
            cache_dir=str(place / "cache"),
            dtype="float32",
            device="cpu",
            output=str(place / f"score-{kind}"),
            quiet=True,
        )
        score(config)
        made = predictions.read_predictions(place / f"score-{kind}")
        found[kind] = {key: entry["prediction"] for key, entry in made.items()}
    return found


class Decoder:
    """Decodes, and refuses to encode."""

    def __init__(self, tokenizer):
        self.decode, self.eos_token_id = tokenizer.decode, tokenizer.eos_token_id


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("tokens", [700, 4096])
def test_predictions_are_those_of_lm_eval_whatever_the_batch(place, samples, through_lm_eval, kind, tokens):
    model = models.load_model(place / kind)
    texts = predict.predict(model, helpers.tokenizer(), samples, max_batch_tokens=tokens)
    wanted = [through_lm_eval[kind][sample["name"], sample["index"]] for sample in samples]
    assert texts == wanted
    assert len(set(texts)) > len(texts) // 2  # the model says different things, so an exchanged row shows


def test_answers_end_at_the_stop_token(place, samples, through_lm_eval):
    """A token of the predictions made a stop token: the text ends before it, as through lm-eval."""
    model, tokenizer = models.load_model(place / "llama"), helpers.tokenizer()
    whole = list(through_lm_eval["llama"].values())
    tokens = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in whole]
    stop = max({token for row in tokens for token in row[2:8]}, key=lambda t: sum(t in row for row in tokens))
    model.generation_config.eos_token_id = [2, stop]
    for sample, text in zip(samples, predict.predict(model, tokenizer, samples)):
        ids = torch.tensor([list(tokenizer(sample["input"])["input_ids"])])
        made = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()
        assert text == tokenizer.decode([t for t in made if t not in (2, stop)], skip_special_tokens=True), sample


def test_encoded_samples_and_a_mixed_order_change_nothing(place, samples, through_lm_eval):
    model, samples = models.load_model(place / "llama"), samples[::-1]
    read = predict.prompt_ids(helpers.tokenizer(), samples)
    ready = [{**sample, "input_ids": ids} for sample, ids in zip(samples, read)]
    texts = predict.predict(model, Decoder(helpers.tokenizer()), ready)
    assert texts == [through_lm_eval["llama"][sample["name"], sample["index"]] for sample in samples]


def test_prompts_have_one_bos():
    tokenizer = helpers.tokenizer()
    with_bos, plain = predict.prompt_ids(tokenizer, [{"input": "<s>the sky"}, {"input": "the sky"}])
    assert list(with_bos) == list(plain) and list(plain).count(tokenizer.bos_token_id) == 1


def test_new_tokens_may_differ_within_a_batch(place, samples):
    model, tokenizer = models.load_model(place / "llama"), helpers.tokenizer()
    mixed = [{**sample, "max_new_tokens": 3 + 3 * i} for i, sample in enumerate(samples[:4])]
    alone = [predict.predict(model, tokenizer, [sample])[0] for sample in mixed]
    assert predict.predict(model, tokenizer, mixed) == alone
    assert len({len(tokenizer(text)["input_ids"]) for text in alone}) > 1


def test_a_trained_model_keeps_its_attention_and_mode(place, samples, through_lm_eval):
    model = models.load_model(place / "llama", attention=training_attention("sdpa")).train()
    texts = predict.predict(model, helpers.tokenizer(), samples[:4])
    assert texts == [through_lm_eval["llama"][sample["name"], sample["index"]] for sample in samples[:4]]
    assert model.training and model.config._attn_implementation == "causal_only_torch"


def test_losses_are_the_mean_over_whole_windows(place):
    model, tokenizer = models.load_model(place / "llama"), helpers.tokenizer()
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, len(tokenizer), (n,), generator=generator).tolist() for n in (70, 31, 100, 64)]
    windows = [texts[0][:32], texts[0][32:64], texts[2][:32], texts[2][32:64], texts[2][64:96], texts[3][:32]]
    windows.append(texts[3][32:64])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(windows)).logits.double()
    each = -logits.log_softmax(-1)[:, :-1].gather(2, torch.tensor(windows)[:, 1:, None])
    for tokens in (32, 100, 10_000):
        assert predict.losses(model, texts, 32, max_batch_tokens=tokens) == pytest.approx(float(each.mean()))
    assert predict.losses(model, texts, 32, rows=3) == pytest.approx(float(each[:3].mean()))
    with pytest.raises(ValueError, match="length=101"):
        predict.losses(model, texts, 101)


def test_rounded_frequencies_are_refused(place, samples):
    model = models.load_model(place / "llama")
    with pytest.raises(ValueError, match=r"inv_freq is torch\.bfloat16"):
        predict.predict(model.to(torch.bfloat16), helpers.tokenizer(), samples[:1])
    in_bfloat16 = models.load_model(place / "llama", dtype="bfloat16")
    assert len(predict.predict(in_bfloat16, helpers.tokenizer(), samples[:2])) == 2
