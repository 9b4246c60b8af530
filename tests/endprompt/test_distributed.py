"""Two gloo processes on the CPU, as torchrun starts them, against one process."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from endprompt import data, distributed, train
from endprompt.config import ExtendConfig
from endprompt.model import load_tokenizer
from endprompt.train import states
from tests.endprompt.model.test_kinds import FAMILIES, checkpoint
from tests.support import two_processes
from tests.support.checkpoints import (
    checkpoint_of_experts,
    checkpoint_of_kinds,
    checkpoint_of_other_shapes,
    checkpoint_with_a_head_of_its_own,
    damaged_checkpoint,
    make_tokenizer,
    odd_checkpoint,
    renamed_checkpoint,
)
from tests.support.processes import several
from tests.support.runs import cut_off, lines_of, log_of


def results_of(directory):
    path = directory / "results.jsonl"
    return lines_of(path) if path.exists() else []


#: Methods, checkpoints and families that are trained only where slow tests are asked for.
SLOW = ("odd", "phi", "renamed", "kinds", "longlora", "compiled", *FAMILIES)


@pytest.fixture(scope="module")
def trained(llama, checkpoints, documents, tmp_path_factory):
    return by_two(llama, checkpoints, documents, tmp_path_factory.mktemp("two"), slow=False)


@pytest.fixture(scope="module")
def trained_slowly(llama, checkpoints, documents, tmp_path_factory):
    return by_two(llama, checkpoints, documents, tmp_path_factory.mktemp("slow"), slow=True)


def by_two(llama, checkpoints, documents, tmp, slow):
    """(directory with the outputs that two processes have made, their configurations by name, what they printed)."""
    config = ExtendConfig(
        model=str(llama), data=[str(documents)], output="", target=128, prompt="EP_3", rows=4, steps=4,
        warmup=2, lr=1e-3, device="cpu", log_every=1, weight_decay=0.1, clip=0.5, micro_rows=1,
        eval_data=[str(documents)], eval_lengths=[96], eval_rows=3, eval_needles=3,
    )  # fmt: skip
    unmeasured = {"eval_data": [], "steps": 2}
    in_bfloat16 = unmeasured | {"dtype": "bfloat16", "export_dtype": "float32"}
    recall = unmeasured | {"row_tokens": 64, "prompt": "recall", "recall_span": 8, "recall_given": 2}
    long = {"scheme": "contiguous", "prompt": None, "row_tokens": 128}
    pose = {"scheme": "pose", "prompt": None, "micro_rows": None}
    changes = {
        "whole": {},
        "rounded": {"eval_data": [], "autocast": True},
        "masters": in_bfloat16,
        # each method on another checkpoint
        "odd": long | unmeasured | {"model": str(odd_checkpoint(tmp / "odd-model")), "checkpointing": "full"},
        "phi": pose | {"model": str(checkpoints("Phi3")), "scaling": "longrope"},
        "renamed": pose | {"model": str(renamed_checkpoint(llama, tmp / "renamed-model")), "scaling": "dynamic"},
        "apart": recall
        | {"model": str(checkpoint_with_a_head_of_its_own(tmp / "apart-model")), "checkpointing": "selective"},
        "experts": {"model": str(checkpoint_of_experts(tmp / "experts-model"))}
        | unmeasured
        | {"scheme": "endprompt-pose", "scaling": "yarn", "router_loss": 0.1},
        "kinds": {"model": str(checkpoint_of_kinds(tmp / "kinds-model")), "checkpointing": "full", "scaling": "yarn"},
        "longlora": long | {"checkpointing": "full", "attention": "shifted", "lora_rank": 4},
        "compiled": unmeasured | {"compile": "layers"},
        "context": long | {"context_parallel": 2, "checkpointing": "full", "keep_gathered": 0},
        "begun": {"save_every": 2},
        "broken": {"save_every": 2},
        "again": {"eval_data": [], "save_every": 2},
        "uneven": {"rows": 3},
        "lean": in_bfloat16 | {"optimizer": "lean"},
        "float8": in_bfloat16
        | {"optimizer": "lean", "float8": "fast", "reduce_dtype": "bfloat16", "keep_gathered": 2, "row_tokens": 32}
        | {"steps": 4},
        "moments": in_bfloat16 | {"optimizer": "lean", "shard": "moments"},
        "moments of rows": in_bfloat16
        | long
        | {"optimizer": "lean", "shard": "moments", "context_parallel": 2, "checkpointing": "attention"},
        "moments begun": in_bfloat16 | {"optimizer": "lean", "shard": "moments", "save_every": 1},
        "masters whole": {"shard": "moments"},
        "short": {"context_parallel": 2},
        "shifted": long | {"context_parallel": 2, "attention": "shifted", "lora_rank": 4},
        "documents": long | {"context_parallel": 2, "short_documents": "apart"},
        "thirds": long | {"context_parallel": 3},
        "cut": long | {"context_parallel": 2, "eval_lengths": [96, 95]},
        "lengths": long | {"context_parallel": 2, "scaling": "dynamic"},
        "windows": long | {"context_parallel": 2, "model": str(tmp / "kinds-model"), "scaling": "yarn"},
        "graph": {"compile": "graph", "device": "auto"},
        "damaged": {"model": str(damaged_checkpoint(tmp / "damaged-model"))},
        "shapes": {"model": str(checkpoint_of_other_shapes(tmp / "shapes-model"))},
        "other": {"attention": "eager", "data": [str(tmp / "damaged.jsonl")]},
    }
    (tmp / "damaged.jsonl").write_text("{")  # is not read before the model is compared
    for family, (scaling, (attention, *_), _) in FAMILIES.items() if slow else ():
        about = {"model": str(checkpoint(tmp / f"{family}-model", family)), "scaling": scaling, "attention": attention}
        balanced = {"router_loss": 0.1} if family in ("gpt_oss", "mixtral", "qwen3_moe") else {}
        changes[family] = pose | unmeasured | about | balanced | {"target": 1024, "row_tokens": 40}
        make_tokenizer().save_pretrained(tmp / f"{family}-model")
    changes = {name: change for name, change in changes.items() if (name in SLOW) == slow}
    jobs = {name: dataclasses.replace(config, output=str(tmp / name), **change) for name, change in changes.items()}
    if "begun" in jobs:
        cut_off(jobs["begun"], step=3)  # a run of one process that leaves its state of step 2
    made = {name: dataclasses.asdict(job) for name, job in jobs.items()}
    codes, said = several(2, two_processes.main, made, seconds=500)
    assert codes == [0, 0], said[-3000:]
    return tmp, jobs, said


def by_one(tmp, jobs, name: str, **changes) -> Path:
    return train.extend(dataclasses.replace(jobs[name], output=str(tmp / f"one-{name}"), **changes))


@pytest.fixture(scope="module")
def one_process(trained):
    """`one_process(name)`: the output of the same configuration by one process, made once."""
    tmp, jobs, _ = trained
    whole = dataclasses.replace(jobs["whole"], micro_rows=None)
    return functools.cache(functools.partial(by_one, tmp, jobs | {"whole": whole}))


def assert_equal_runs(left: Path, right: Path) -> None:
    for a, b in zip(log_of(left), log_of(right), strict=True):
        assert a["step"] == b["step"]
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    for a, b in zip(results_of(left), results_of(right), strict=True):
        assert (a["task"], a["step"], a["n"]) == (b["task"], b["step"], b["n"])
        assert a["value"] == pytest.approx(b["value"], abs=1e-5)
    ours, theirs = load_file(left / "model.safetensors"), load_file(right / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


def test_two_processes_give_the_losses_and_weights_of_one(trained, one_process):
    assert_equal_runs(trained[0] / "whole", one_process("whole"))


def test_processes_that_share_rows_give_the_losses_and_weights_of_one(trained, one_process):
    """Attention by heads, loss by tokens; rows of evaluation and needles are shared, too."""
    assert_equal_runs(trained[0] / "context", one_process("context", context_parallel=1))


def assert_equal_outputs(directory: Path, one: Path) -> None:
    assert_equal_runs(directory, one)
    for file in ("config.json", "generation_config.json"):
        assert (directory / file).read_text() == (one / file).read_text()


@pytest.mark.parametrize("name", ["apart", "experts"])
def test_every_method_and_checkpoint_trains_as_by_one_process(trained, one_process, name):
    assert_equal_outputs(trained[0] / name, one_process(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_other_methods_and_checkpoints_train_as_by_one_process(trained_slowly, name):
    tmp, jobs, _ = trained_slowly
    changes = {"compile": "none", "micro_rows": None} if name == "compiled" else {}
    assert_equal_outputs(tmp / name, by_one(tmp, jobs, name, **changes))


def test_a_head_of_its_own_is_kept_and_said_once(trained):
    """By transformers' own reading of what was written: apart from the embeddings, and no longer called tied."""
    from transformers import AutoModelForCausalLM

    directory, _, printed = trained
    assert printed.count("apart-model: config.json says tie_word_embeddings, but the files hold a head") == 1
    model = AutoModelForCausalLM.from_pretrained(directory / "apart")
    assert not torch.equal(model.get_output_embeddings().weight, model.get_input_embeddings().weight)
    assert json.loads((directory / "apart" / "config.json").read_text())["tie_word_embeddings"] is False


def test_each_process_reads_its_share_of_the_checkpoint(trained, llama):
    """Half of every tensor's bytes each; and only what is put together anew is read whole, with a word."""
    _, _, printed = trained
    counts = {found["rank"]: found["read"] for found in map(json.loads, re.findall(r'^{"rank".*}$', printed, re.M))}
    stored = sum(weight.nbytes for weight in load_file(llama / "model.safetensors").values())
    assert counts == {0: stored // 2, 1: stored // 2}
    assert re.findall(r"(\S+): its files hold the weights in other parts than the model", printed) == [
        str(trained[0] / "experts-model")
    ]


def test_what_is_kept_gathered_is_gathered_once_a_step(trained):
    """Of the root and two layers; the others twice for each of the two micro-batches, of shared rows four."""
    found = map(json.loads, re.findall(r'^{"run".*}$', trained[2], re.M))
    counts = {one["run"]: set(one["gathers"]) for one in found}
    assert counts["masters"] == counts["lean"] == {1 + 1 + 2 * 2}  # --keep-gathered 1
    assert counts["float8"] == {1 + 2} and counts["context"] == {1 + 2 * 2 * 4}  # 2 and 0


def test_shares_are_float32_masters_of_what_is_multiplied_in_bfloat16(trained, one_process):
    tmp, _, _ = trained
    exact, rounded = ([row["loss"] for row in log_of(run)] for run in (one_process("whole"), tmp / "rounded"))
    assert rounded == pytest.approx(exact, rel=2e-2) and rounded != pytest.approx(exact, rel=1e-6)
    weights = load_file(tmp / "rounded" / "model.safetensors")
    assert all(w.dtype == torch.float32 for w in weights.values())
    assert any(not torch.equal(w, w.bfloat16().float()) for w in weights.values())


@pytest.mark.parametrize("name", ["masters", "lean", "float8", "moments", "moments of rows"])
def test_bfloat16_weights_train_sharded_as_in_one_process(trained, one_process, name):
    """One rounding of each gradient to bfloat16 is elsewhere than in one process, so equality is up to that; where
    every process has whole sums there is none."""
    ours, theirs = trained[0] / name, one_process(name, context_parallel=1)
    for a, b in zip(log_of(ours), log_of(theirs), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-3)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-2)
    left, right = load_file(ours / "model.safetensors"), load_file(theirs / "model.safetensors")
    start = load_file(Path(trained[1][name].model) / "model.safetensors")
    moved = sum((right[name] - start[name].bfloat16().float()).square().sum() for name in right) ** 0.5
    apart = sum((left[name] - right[name]).square().sum() for name in right) ** 0.5
    assert left.keys() == right.keys() and float(apart) < (0.01 if name.startswith("moments") else 0.1) * float(moved)


def test_state_of_two_processes_is_resumed_by_one(trained, one_process):
    tmp, jobs, _ = trained
    state = states.newest_state(tmp / "broken.partial" / "states")
    assert state.step == 2
    assert len(list(state.path.glob("__*.distcp"))) == 2  # each process wrote its own share
    resumed = train.extend(dataclasses.replace(jobs["broken"], resume=True))
    assert_equal_runs(resumed, one_process("whole"))


def test_state_of_processes_with_whole_weights_is_resumed_by_one(trained, one_process):
    _, jobs, _ = trained
    resumed = train.extend(dataclasses.replace(jobs["moments begun"], resume=True))
    assert_equal_runs(resumed, one_process("moments", context_parallel=1))


def test_state_of_one_process_is_resumed_by_two(trained, one_process):
    tmp, _, printed = trained
    assert printed.count("resumed from step 2 of 4") == 2  # this and the next one, each said once
    assert_equal_runs(tmp / "begun", one_process("whole"))


def test_two_processes_resume_bitwise(trained):
    tmp, _, _ = trained
    whole, again = ((tmp / name / "model.safetensors").read_bytes() for name in ("whole", "again"))
    assert whole == again


def test_processes_take_the_rows_of_one(trained, documents):
    """Whatever the number of processes, together they have the same rows in the same order."""
    config = trained[1]["whole"]
    trainers = []
    for size in (1, 2, 4):
        rows = make_rows(config, documents)
        shares = [row_share(rows, config, distributed.World(rank, size), step=3) for rank in range(size)]
        trainers.append(torch.cat(shares))
    assert all(torch.equal(trainers[0], other) for other in trainers[1:])


def make_rows(config, documents):
    tokenizer = load_tokenizer(config.model)
    return data.Rows(data.load_documents([str(documents)], tokenizer), data.row_spec(config, 32, tokenizer))


def row_share(rows, config, here, step):
    trainer = train.Trainer.__new__(train.Trainer)
    trainer.rows, trainer.config, trainer.here = rows, config, here
    return torch.from_numpy(trainer.batch(step).input_ids)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_one_to_eight_processes_train_alike(extend_config, tmp_path):
    """float32 for 50 steps; rows shared by four for two key heads, each attention; a lean state goes on with others."""
    lean = {"optimizer": "lean", "dtype": "bfloat16", "export_dtype": "float32", "save_every": 2, "row_tokens": 32}
    long = {"scheme": "contiguous", "prompt": None, "row_tokens": 128, "steps": 3}

    def configs(count):
        yield extend_config(output=str(tmp_path / f"plain-{count}"), steps=50, row_tokens=32, rows=8)
        for attention in ("sdpa", "eager"):
            output = tmp_path / f"{attention}-{count}"
            yield extend_config(output=str(output), context_parallel=count, attention=attention, **long)

    for count in (1, 2, 4, 8):  # and four heads for eight processes are refused
        codes, said = several(count, two_processes.runs, list(configs(count)), seconds=900)
        assert codes == [int(count == 8)] * count, said[-2000:]
        for name in ("plain", "sdpa", "eager") if count < 8 else ("plain",):
            assert_equal_runs(tmp_path / f"{name}-{count}", tmp_path / f"{name}-1")
    assert said.count("a multiple of the processes that share a row: context_parallel=8 num_attention_heads=4") == 8
    for shard, other in (("weights", "moments"), ("moments", "weights")):
        begun = {
            (count, going_on): extend_config(output=str(tmp_path / f"{shard}-{count}-{going_on}"), shard=shard, **lean)
            for count, going_on in ((2, shard), (1, shard), (4, shard), (2, other))
        }
        whole = extend_config(output=str(tmp_path / shard), shard=shard, **lean)
        codes, said = several(2, two_processes.runs, [whole], list(begun.values()))
        assert codes == [0, 0], said[-2000:]
        for (count, going_on), config in begun.items():
            resumed = dataclasses.replace(config, resume=True, shard=going_on)
            codes, said = several(count, two_processes.runs, [resumed])
            assert codes == [0] * count and "resumed from step 2 of 4" in said, said[-2000:]
            ours, theirs = (load_file(Path(one.output) / "model.safetensors") for one in (config, whole))
            apart = max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)
            assert apart == 0 if (count, going_on) == (2, shard) else apart < 2e-3


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("uneven", "rows must be a multiple of the number of processes: rows=3, 2"),
        ("short", "is for long rows under full attention, and this run needs none: scheme='endprompt'"),
        ("shifted", "and this run needs none: attention='shifted' context_parallel=2"),
        ("documents", "are kept apart by the whole row: short_documents='apart' context_parallel=2"),
        ("thirds", "context_parallel must divide the number of processes: 3, 2"),
        ("cut", "context_parallel must divide the tokens of every row: 2, 95 tokens"),
        ("lengths", "rotations or queries that depend on the row's length need it: context_parallel=2"),
        ("windows", "has layers that see a window alone, whose mask needs the row: context_parallel=2"),
        ("masters whole", "shard='moments' is the lean optimizer's: shard='moments' optimizer='auto'"),
        ("graph", "take compile=layers: compile='graph', 2 processes"),
        ("damaged", "damaged-model: the checkpoint does not load: model.safetensors: "),
        ("shapes", "does not load: model.norm.weight is (31,), the model's is (32,)"),
        ("other", "training (contiguous positions, attention=eager) does not compute what transformers does"),
    ],
)
def test_what_the_processes_cannot_share_is_refused_by_both(trained, name, rule):
    tmp, _, printed = trained
    assert printed.count(rule) == 2
    assert not (tmp / name).exists()
