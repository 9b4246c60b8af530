"""The loop: exact accumulation, exact resume, schedules, the guard, and outputs that are whole or absent."""

import contextlib
import dataclasses
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from endprompt import data, train
from endprompt.config import ExtendConfig
from endprompt.data import Batch, rows
from endprompt.model.load import decoder_layers, load_tokenizer
from endprompt.train import loop, objective, run, start
from endprompt.train import states as checkpoint
from endprompt.train.output import check_identity, identity
from tests.support.checkpoints import TARGET, make_checkpoint
from tests.support.runs import cut_off, log_of, same_weights, weights_of


def trainer_of(extend_config, tmp_path, **changes):
    """A trainer stopped before its first step."""
    caught = {}

    def stop(self, states):
        caught["trainer"] = self
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.Trainer, "fit", stop)
        train.extend(extend_config(output=str(tmp_path / "caught"), overwrite=True, **changes))
    return caught["trainer"]


def step_without_update(trainer, weightless, kind="grad"):
    """(loss, each parameter's gradient) of the first step on 4 rows, its first row's first tokens without weight."""
    batch, kept = trainer.rows.batch(0, 4), {}
    trainer.optimizer.step = lambda: kept.update(
        {name: getattr(parameter, kind).clone() for name, parameter in trainer.model.named_parameters()}
    )
    uneven = batch.weights.copy()
    uneven[0, :weightless] = 0
    loss, _ = trainer.train_step(Batch(batch.input_ids, batch.position_ids, uneven), 0.0)
    return float(loss), kept


def test_loss_of_a_step_is_the_weighted_mean_of_torchs(extend_config, tmp_path, llama):
    """Against logits of the whole model with an explicit mask and torch's own cross-entropy."""
    trainer = trainer_of(extend_config, tmp_path)
    batch = trainer.rows.batch(0, 4)
    ids, places, weights = (torch.from_numpy(x.copy()) for x in (batch.input_ids, batch.position_ids, batch.weights))
    n = ids.shape[1]
    mask = torch.full((n, n), torch.finfo(torch.float32).min).triu(1).expand(4, 1, n, n)
    trainer.model.set_attn_implementation("eager")
    with torch.no_grad():
        logits = trainer.model(input_ids=ids, position_ids=places, attention_mask=mask, use_cache=False).logits
    trainer.model.set_attn_implementation("causal_only_torch")
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    expected = (losses * weights[:, 1:].flatten()).sum() / weights.sum()
    loss, norm = trainer.train_step(batch, 0.0)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert float(norm) > 0


@pytest.mark.parametrize("micro", [1, 3])
def test_micro_batches_equal_one(extend_config, tmp_path, micro):
    """Rows have different weight totals, so a mean of means would differ."""
    gradients = []
    for size in (None, micro):
        trainer = trainer_of(extend_config, tmp_path, micro_rows=size, clip=0.0, prompt=["EP_3", "text:the sky is"])
        gradients.append(step_without_update(trainer, 20))
    (loss, whole), (split_loss, split) = gradients
    assert split_loss == pytest.approx(loss, rel=1e-6)
    for name in whole:
        torch.testing.assert_close(split[name], whole[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_the_lean_optimizer_s_sums_are_the_gradients(extend_config, tmp_path, tied):
    """Head, embedding and layers each have a way of their own into the sums; the loss is as it was."""
    model = make_checkpoint(tmp_path / "model", "Llama", tie_word_embeddings=tied)
    found = []
    for optimizer, kind, dtype in (("adamw", "grad", "float32"), ("lean", "main_grad", "bfloat16")):
        options = {"model": str(model), "optimizer": optimizer, "dtype": dtype, "micro_rows": 2, "clip": 0.0}
        trainer = trainer_of(extend_config, tmp_path, **options)
        found.append(step_without_update(trainer, 20, kind))
    (loss, expected), (lean_loss, sums) = found
    assert lean_loss == pytest.approx(loss, rel=1e-3)
    assert sums.keys() == expected.keys() and len(sums) > 10
    # to bfloat16's accuracy: what is left out or added twice is off by far more
    for name, gradient in expected.items():
        assert float((sums[name] - gradient).norm() / gradient.norm()) < 0.03, name


def test_where_nearly_all_tokens_count_the_loss_is_that_of_all(extend_config, tmp_path, monkeypatch):
    """Looking for the tokens that count gives the same sums, whatever their share."""
    found, dense = [], []
    for limit in (0.0, 1.0):
        monkeypatch.setattr(loop, "DENSE", limit)
        trainer = trainer_of(extend_config, tmp_path, optimizer="lean", dtype="bfloat16", micro_rows=2, clip=0.0)
        found.append(step_without_update(trainer, 9, "main_grad"))
        dense.append(trainer.loss.dense)
    assert dense == [True, False]
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for name, gradient in found[1][1].items():
        assert float((found[0][1][name] - gradient).norm() / gradient.norm()) < 0.01, name


def test_evaluation_leaves_the_sums_alone(extend_config, tmp_path):
    trainer = trainer_of(extend_config, tmp_path, optimizer="lean", dtype="bfloat16")
    batch = trainer.rows.batch(0, 4)
    parts = [torch.from_numpy(x.copy()) for x in (batch.input_ids, batch.position_ids, batch.weights)]
    with torch.no_grad():
        trainer.loss(*parts)
    trainer.model.eval()
    trainer.loss(*parts).backward()
    head = trainer.model.get_output_embeddings().weight
    before = head.main_grad.clone()  # the last pass was one of gradients, through the hook
    with torch.no_grad():
        trainer.loss(*parts)
    assert torch.equal(head.main_grad, before) and float(before.abs().max()) > 0


RESUMED = {
    "float32": {"steps": 7, "scheme": "endprompt-pose", "weight_decay": 0.1, "dtype": "float32"},
    "dropout": {"attention_dropout": 0.3},
    "lora": {"lora_rank": 4},
    "masters": {"dtype": "bfloat16", "export_dtype": "float32"},
    "lean": {"dtype": "bfloat16", "export_dtype": "float32", "optimizer": "lean"},
}


@pytest.mark.parametrize("kind", RESUMED)
def test_resumed_run_equals_the_uninterrupted_one_bitwise(extend_config, tmp_path, kind):
    options = {"steps": 5, "save_every": 2} | RESUMED[kind]
    if rate := options.pop("attention_dropout", 0):
        options["model"] = str(make_checkpoint(tmp_path / "m", attention_dropout=rate))
    whole = train.extend(extend_config(output=str(tmp_path / "whole"), **options))
    config = extend_config(output=str(tmp_path / "broken"), **options)
    cut_off(config, options["steps"] - 2)
    assert not (tmp_path / "broken").exists()
    states = [path.name for path in checkpoint.states(tmp_path / "broken.partial/states")]
    assert states == [f"step-{step:08}" for step in range(2, options["steps"] - 1, 2)]
    torch.rand(7)  # whatever else has drawn random numbers
    config.resume = True
    broken = train.extend(config)
    assert same_weights(whole, broken)
    assert not list(tmp_path.glob("*.partial")) and not (broken / "states").exists()
    assert [(row["step"], row["loss"]) for row in log_of(broken)] == [(r["step"], r["loss"]) for r in log_of(whole)]
    assert train.extend(config) == broken  # finished: there is nothing to do
    if kind == "dropout":
        del options["model"]
        assert not same_weights(whole, train.extend(extend_config(output=str(tmp_path / "without"), **options)))


def test_resume_goes_back_past_a_damaged_state_loudly(extend_config, tmp_path, capsys):
    options = {"steps": 5, "save_every": 1}
    whole = train.extend(extend_config(output=str(tmp_path / "whole"), **options))
    broken = extend_config(output=str(tmp_path / "broken"), **options)
    cut_off(broken)
    newest = checkpoint.states(tmp_path / "broken.partial/states")[-1]
    damaged = next(path for path in sorted(newest.iterdir()) if path.name != checkpoint.STATE)
    raw = bytearray(damaged.read_bytes())
    raw[len(raw) // 2] ^= 1
    damaged.write_bytes(raw)
    broken.resume = True
    assert same_weights(whole, train.extend(broken))
    assert "WARNING" in capsys.readouterr().err


def test_resume_with_another_configuration_is_refused(extend_config, documents, tmp_path):
    config = extend_config(steps=4, save_every=2)
    cut_off(config)
    with pytest.raises(ValueError, match="unfinished run has states"):
        train.extend(config)
    config.resume = True
    lines = documents.read_text().splitlines()
    (tmp_path / "changed.jsonl").write_text("\n".join([lines[0], lines[2], *lines[2:]]))
    with pytest.MonkeyPatch.context() as patch:
        load = data.load_documents
        patch.setattr(
            start, "load_documents", lambda _, *rest, **more: load([str(tmp_path / "changed.jsonl")], *rest, **more)
        )
        with pytest.raises(ValueError, match=r"documents that the run was started with: .* have changed"):
            train.extend(config)
    config.lr = 5e-4
    with pytest.raises(ValueError, match=r"lr=0\.0005, the state has 0\.001"):
        train.extend(config)


#: Settings with which a run may go on that was started with others: none changes what is trained but by rounding.
MAY_CHANGE = {
    *("output", "resume", "overwrite", "micro_rows", "log_every", "save_every", "keep", "device", "compile", "report"),
    *(
        "divergence",
        "checkpointing",
        "fused",
        "async_save",
        "resume_or_start",
        "context_parallel",
        "keep_gathered",
        "shard",
        "eval_data",
        "eval_every",
        "eval_lengths",
        "eval_rows",
    ),
    "eval_needles",
    "max_epochs",  # a limit that is only checked
}


@pytest.mark.parametrize("key", [field.name for field in dataclasses.fields(ExtendConfig)])
def test_resume_refuses_or_takes_every_setting_by_its_name(extend_config, key):
    config = extend_config()
    about = {"config": identity(config), "documents": "of these"}
    rows = SimpleNamespace(sha256="of these")
    value = getattr(config, key)
    others = {bool: lambda: not value, str: lambda: value + "2", list: lambda: [*value, "2"]}
    other = dataclasses.replace(config, **{key: others.get(type(value), lambda: (value or 0) + 1)()})
    check_identity(config, rows, {}, about)
    with contextlib.nullcontext() if key in MAY_CHANGE else pytest.raises(ValueError, match=rf"with: {key}="):
        check_identity(other, rows, {}, about)


def test_resume_on_another_checkpoint_in_the_same_place_is_refused(extend_config, llama, tmp_path):
    base = shutil.copytree(llama, tmp_path / "base")
    config = extend_config(model=str(base), steps=3, save_every=1, resume=True)
    cut_off(dataclasses.replace(config, resume=False), 1)
    about, weights = json.loads((base / "config.json").read_text()), load_file(base / "model.safetensors")
    others = {"rope_parameters": about["rope_parameters"] | {"rope_theta": 50_000.0}, "rms_norm_eps": 1e-2}
    for kind, value in (others | {"dtype": "bfloat16", "weights": None}).items():
        if kind == "weights":  # one matrix of another training
            other = weights["model.layers.1.self_attn.q_proj.weight"] + 1e-3
            changed = weights | {"model.layers.1.self_attn.q_proj.weight": other}
            save_file(changed, base / "model.safetensors", {"format": "pt"})
        else:
            (base / "config.json").write_text(json.dumps(about | {kind: value}))
        with pytest.raises(ValueError, match=rf"checkpoint that the run was started with.*base' has changed: {kind}="):
            train.extend(config)
        shutil.copytree(llama, base, dirs_exist_ok=True)
    assert same_weights(train.extend(config), train.extend(extend_config(steps=3, output=str(tmp_path / "whole"))))


def test_schedules_by_hand(extend_config):
    def rates(steps, **changes):
        config = extend_config(lr=1.0, **changes)
        return [round(loop.learning_rate(config, step, steps), 6) for step in range(steps)]

    assert rates(5, warmup=2) == [0.5, 1.0, 1.0, 1.0, 1.0]
    assert rates(6, warmup=2, schedule="linear") == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert rates(6, warmup=0, schedule="linear", decay=0.5) == [1, 1, 1, 1, 0.666667, 0.333333]
    assert rates(5, warmup=1, schedule="cosine") == [1, 1, 0.853553, 0.5, 0.146447]


@pytest.mark.parametrize(
    ("from_step", "change", "said"),
    [
        (3, lambda loss: loss * math.nan, r"diverged at step 4: loss=nan .*step-00000002"),
        (4, lambda loss: loss + 20, r"diverged at step 5: .* over divergence=1\.0 .*step-00000004"),
    ],
)
def test_guard_stops_a_run_that_diverges_and_keeps_the_state_before(extend_config, tmp_path, from_step, change, said):
    config = extend_config(steps=8, save_every=2, divergence=1.0, log_every=100 if from_step == 3 else 1)
    original = train.Trainer.train_step

    def wrong(self, batch, rate):
        loss, norm = original(self, batch, rate)
        return (change(loss) if self.step >= from_step else loss), norm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Trainer, "train_step", wrong)
        with pytest.raises(ValueError, match=said):
            train.extend(config)
    kept = [path.name for path in checkpoint.states(tmp_path / "out.partial/states")]
    assert kept[-1] in said and not (tmp_path / "out").exists()


def test_memory_that_is_too_small_says_what_to_change(extend_config):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has ...")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Trainer, "train_step", out_of_memory)
        with pytest.raises(ValueError, match=r"lower micro_rows=4 or raise checkpointing=none .*: CUDA out of memory$"):
            train.extend(extend_config())
        patch.setattr(run, "device_memory", lambda device: int(2.3 * 2**30))
        with pytest.raises(
            ValueError, match=r"by the estimate micro_rows=4 checkpointing=none fits \(2\.0 of 2\.3 GiB\)"
        ):
            train.extend(extend_config())
        patch.setattr(run, "device_memory", lambda device: 2**30)
        with pytest.raises(ValueError, match=r"nothing fits \(2\.0 GiB at least, of 1\.0\)"):
            train.extend(extend_config())


def test_training_learns_and_writes_what_it_did(extend_config, llama):
    output = train.extend(extend_config(steps=30, lr=3e-3, scaling="yarn"))
    losses = [row["loss"] for row in log_of(output)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    about = json.loads((output / "endprompt.json").read_text())
    assert about["method"] == "endprompt+EP_3+yarn" and about["target"] == TARGET and about["steps"] == 30
    assert about["tokens"] == 30 * 4 * 32
    assert {"config.yaml", "environment.json", "tokenizer.json"} <= {path.name for path in output.iterdir()}


def test_what_is_dropped_and_truncated_is_printed_and_recorded(extend_config, documents, tokenizer, capsys):
    texts = [json.loads(line)["text"] for line in documents.read_text().splitlines()]
    lengths = [len(tokenizer(text)["input_ids"]) + 1 for text in texts]  # with the end of the text
    needed = 96
    short = [length for length in lengths if length < needed]
    long = [length - needed for length in lengths if length >= needed]
    options = {"scheme": "contiguous", "prompt": None, "row_tokens": needed, "steps": 1, "rows": 2}
    output = train.extend(extend_config(long_documents="truncate", **options))
    assert short and sum(long)
    assert (
        f"{len(long)} rows of 96 tokens a pass, 2 to train on; dropped {len(short)} shorter documents ({sum(short):,} "
        f"tokens), truncated {sum(long):,} tokens"
    ) in capsys.readouterr().err
    about = json.loads((output / "endprompt.json").read_text())
    assert about["documents_dropped"] == len(short) and about["tokens_dropped"] == sum(short)
    assert about["tokens_truncated"] == sum(long)


def test_tokens_decide_the_steps(extend_config):
    assert rows.total_steps(extend_config(steps=None, tokens=1_000_000_000, rows=64), 8192) == 1907


def test_layers_are_compiled_one_by_one(extend_config, tmp_path):
    """Whole-model compilation would make an explicit mask again."""
    trainer = trainer_of(extend_config, tmp_path, compile="layers")
    assert all(layer._compiled_call_impl is not None for layer in decoder_layers(trainer.model))
    assert trainer.model._compiled_call_impl is None and trainer.model.base_model._compiled_call_impl is None


def test_compiled_layers_leave_selective_recomputation_to_the_compiler(extend_config, tmp_path, monkeypatch):
    """Wrapped in checkpoints as well, a layer would be planned twice."""
    import torch._functorch.config as functorch_config

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)
    seen, real = [], objective.optimizer_step

    def step(*arguments):
        seen.append(functorch_config.activation_memory_budget)
        return real(*arguments)

    monkeypatch.setattr(loop, "optimizer_step", step)
    with functorch_config.patch(activation_memory_budget=0.5):
        trainer = trainer_of(extend_config, tmp_path, compile="layers", checkpointing="selective")
        assert all("forward" not in vars(layer) for layer in decoder_layers(trainer.model))
        trainer.train_step(trainer.batch(0), 1e-3)
        assert seen == [0.99] and functorch_config.activation_memory_budget == 0.5  # it does not outlive the step
    plain = trainer_of(extend_config, tmp_path, compile="none", checkpointing="selective")
    assert all("forward" in vars(layer) for layer in decoder_layers(plain.model))


def test_scaled_checkpoint_extended_again_says_so(extend_config, tmp_path, capsys):
    once = train.extend(extend_config(output=str(tmp_path / "once"), target=64, steps=1))
    twice = train.extend(extend_config(model=str(once), output=str(tmp_path / "twice"), row_tokens=32, steps=1))
    assert "the factors multiply: 2 becomes 4" in capsys.readouterr().err
    assert json.loads((twice / "config.json").read_text())["rope_parameters"]["factor"] == 4.0


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"model": "nowhere"}, r"must exist \(or be .*\): model='nowhere'"),
        ({"model": ""}, "model must be given"),
        ({"data": ["nowhere.jsonl"]}, "must exist: data='nowhere.jsonl'"),
        ({"data": []}, "data must name at least one"),
        ({"data": ["hub:org/name"]}, "becomes a shard first, by endprompt prepare: data='hub:org/name'"),
        ({"target": 32}, "target=32 window=32"),
        ({"prompt": "text:" + "the sky is blue " * 20}, "end prompt does not fit: it has"),
        ({"rows": 100_000}, "fewer documents than one batch"),
        ({"scheme": "zigzag"}, "scheme must be one of"),
        ({"scaling": "zigzag"}, "scaling must be one of"),
        ({"attention": "zigzag"}, "attention must be one of"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"lr": 0.0}, r"lr must be a finite number above 0: lr=0\.0"),
        ({"lr": math.nan}, "lr must be"),
        ({"steps": 0}, "steps must be at least 1: steps=0"),
        ({"steps": None}, "give either steps or tokens"),
        ({"row_tokens": 0}, "row_tokens must be at least 2: row_tokens=0"),
        ({"rows": 0}, "rows must be at least 1: rows=0"),
        ({"micro_rows": 0}, "micro_rows must be"),
        ({"keep": 0}, "keep must be"),
        ({"factor": 0.5}, "factor must be at least 1"),
        ({"schedule": "stairs"}, "schedule must be one of"),
        ({"resume": True}, "no unfinished run to resume"),
        ({"adapter": "beside"}, "adapter needs LoRA: adapter='beside' lora_rank=0"),
        ({"lora_rank": 4, "lora_targets": "experts"}, "lora_targets must be one of attention, mlp, all"),
        ({"quantize": "4bit"}, "quantize needs LoRA: quantize='4bit' lora_rank=0"),
        ({"lora_rank": 4, "optimizer": "lean", "dtype": "bfloat16", "float8": "fast"}, "float8 is for .*LoRA freezes"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(extend_config, tmp_path, changes, rule):
    with pytest.raises(ValueError, match=rule) as raised:
        train.extend(extend_config(**changes))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_checkpoint_without_rope_and_tokenizer_of_another_vocabulary_are_refused(extend_config, tmp_path, tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=32, n_layer=1, n_head=2)).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="has no RoPE"):
        train.extend(extend_config(model=str(tmp_path / "gpt2")))
    small = make_checkpoint(tmp_path / "small", vocab_size=300)
    with pytest.raises(ValueError, match="it has 320 entries, the model's vocab_size is 300"):
        train.extend(extend_config(model=str(small)))


def test_a_token_without_an_embedding_is_refused_where_a_text_has_it(extend_config, llama, tmp_path, capsys):
    """As Gemma 3's text models: their tokenizer has a token for images, and they have no embedding for it."""
    from analysis.config import VerifyConfig
    from analysis.scene import prepare
    from benchmarks.scoring.hf import LongContextLM

    shutil.copytree(llama, tmp_path / "gemma")
    tokenizer = load_tokenizer(llama)
    tokenizer.add_tokens(["<image>"])
    tokenizer.save_pretrained(tmp_path / "gemma")
    config = extend_config(model=str(tmp_path / "gemma"), steps=1)
    train.extend(config)
    assert "no embedding for 1 of its tokenizer's added tokens, such as <image> (320, vocab_size=320)" in (
        capsys.readouterr().err
    )
    text, rule = tmp_path / "images.txt", "has no embedding for token 320, '<image>': its vocab_size is 320"
    text.write_text("<image> here we go there and back again " * 30)
    held = {"eval_data": [str(text)], "eval_lengths": [24], "output": str(tmp_path / "held")}
    for changes in ({"data": [str(text)]}, held, {"prompt": "text:an <image>"}):
        with pytest.raises(ValueError, match=rule):
            train.extend(dataclasses.replace(config, overwrite=True, **changes))
    verified = VerifyConfig(config.model, target=TARGET, text=str(text), prompt=4)
    with pytest.raises(ValueError, match=rf"images.txt: the model {rule}"):
        prepare(verified)
    scored = LongContextLM(pretrained=config.model, device="cpu", dtype="float32")
    assert scored.tok_encode("the grass is green") == tokenizer("the grass is green")["input_ids"]
    with pytest.raises(ValueError, match=rf"the prompt 'an <image>': the model {rule}"):
        scored.tok_encode("an <image>")


def test_finished_output_is_not_overwritten_unasked(extend_config, tmp_path):
    output = train.extend(extend_config(steps=1))
    before = weights_of(output)["model.norm.weight"]
    with pytest.raises(ValueError, match="output exists already"):
        train.extend(extend_config(steps=2))
    assert torch.equal(before, weights_of(output)["model.norm.weight"])
    train.extend(extend_config(steps=2, overwrite=True))
    assert not torch.equal(before, weights_of(output)["model.norm.weight"])
    (output / "endprompt.json").unlink()  # now it could be any directory of the user's
    with pytest.raises(ValueError, match="overwrite replaces an earlier run only"):
        train.extend(extend_config(steps=2, overwrite=True))
