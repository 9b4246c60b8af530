"""Scoring through lm-eval: fake models that know everything or nothing, resume, cache, batches, bad input."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest

import benchmarks
from benchmarks import ruler
from benchmarks.ruler import cache, fit
from benchmarks.ruler.cell import samples_sha256
from benchmarks.scoring import ScoreConfig, evaluate, run, score
from benchmarks.scoring.predictions import read_predictions
from endprompt.results import read_rows
from tests.support import ruler_helpers as helpers
from tests.support.answering import answering


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folder with checkpoints `llama` and `mistral`, haystack text, question data."""
    folder = tmp_path_factory.mktemp("score")
    helpers.essay_file(folder)
    helpers.qa_files(folder)
    helpers.checkpoint(folder / "llama")
    helpers.checkpoint(folder / "mistral", kind="mistral", seed=1)
    return folder


def config(place: Path, output: Path, **changes) -> ScoreConfig:
    settings = dict(
        checkpoint=str(place / "llama"),
        tasks="niah_single_1,niah_single_2,vt",
        lengths="400,512",
        samples=5,
        shots=0,
        max_new_tokens=12,
        haystack_text=str(place / "story.txt"),
        data_dir=str(place),
        cache_dir=str(place / "cache"),
        dtype="float32",
        device="cpu",
        output=str(output),
        quiet=True,
    )
    return ScoreConfig(**{**settings, **changes})


@pytest.fixture
def fake(monkeypatch):
    """Replaces the model by a function of the request."""
    return lambda answer: monkeypatch.setattr(run, "load", lambda *_, **__: answering(answer))


EVERYTHING = dict(tasks="all", lengths="7000", samples=3, shots=1, max_new_tokens=None, beyond_window=True)


def test_an_oracle_scores_100_on_every_task(place, tmp_path, fake):
    fake(lambda request: "they are: " + ", ".join(request.doc["outputs"]).upper())
    made = score(config(place, tmp_path, **EVERYTHING))
    assert {row["task"]: row["value"] for row in made} == dict.fromkeys(ruler.TASKS, 100.0)
    assert all(row["ci95"][0] < 100 == row["ci95"][1] and row["n_truncated"] == 0 for row in made)
    summed = {(r["length"], r["metric"]): r["value"] for r in read_rows(tmp_path / "summary.jsonl")}
    assert summed[7000, "mean_over_tasks"] == 100 and summed[None, "effective_length"] == 7000


def test_an_echo_of_the_prompt_scores_0(place, tmp_path, fake):
    fake(lambda request: request.args[0])
    made = score(config(place, tmp_path / "echo", **EVERYTHING))
    assert {row["value"] for row in made} == {0.0}


def test_scores_of_parts_are_means_over_answers(place, tmp_path, fake):
    fake(lambda request: request.doc["outputs"][0])
    made = {row["task"]: row["value"] for row in score(config(place, tmp_path, **EVERYTHING))}
    assert made["niah_multivalue"] == 25 and made["vt"] == 20 and made["cwe"] == 10 and made["qa_1"] == 100
    assert made["fwe"] == pytest.approx(100 / 3)


def predictions(output: Path) -> dict:
    return {key: entry["prediction"] for key, entry in read_predictions(output).items()}


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_predictions_equal_those_of_transformers_generate_whatever_the_batch(place, tmp_path, kind):
    import torch
    from transformers import AutoModelForCausalLM

    checkpoint = str(place / kind)
    for size in (1, 4):
        score(config(place, tmp_path / str(size), checkpoint=checkpoint, batch_size=size, tasks="vt", lengths="400"))
    found = predictions(tmp_path / "4")
    assert found == predictions(tmp_path / "1")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32), helpers.tokenizer()
    samples = ruler.build_samples("vt", 400, tokenizer, 5, 0, shots=0, max_new_tokens=12)
    assert len({sample["length"] for sample in samples}) > 1  # prompts of several lengths share a batch
    for sample in samples:
        ids = tokenizer(sample["input"], return_tensors="pt")["input_ids"]
        out = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        assert tokenizer.decode(out, skip_special_tokens=True) == found["vt@400", sample["index"]]


def test_rows_carry_what_a_number_needs(place, tmp_path):
    made = score(config(place, tmp_path))
    assert [(row["task"], row["length"]) for row in made] == [
        (task, length) for length in (400, 512) for task in ("niah_single_1", "niah_single_2", "vt")
    ]
    assert read_rows(tmp_path / "results.jsonl") == json.loads(json.dumps(made))
    for row in made:
        assert row["n"] == 5 and row["seed"] == 0 and row["n_truncated"] == 0 and row["max_new_tokens"] == 12
        assert row["method"] == "base" and row["model"] == "llama" and 0.9 < row["fill"] <= 1
        assert (row["edition"], row["chat_layout"]) == ("2025", None) and "questions" not in row
    essay = made[1]
    assert essay["haystack"] == "story.txt" and len(essay["haystack_sha256"]) == 64
    samples = ruler.build_samples(
        "niah_single_2", 400, helpers.tokenizer(), 5, 0, haystack_text=str(place / "story.txt"), max_new_tokens=12
    )
    assert essay["samples_sha256"] == samples_sha256(samples)


def test_rows_of_questions_say_whether_the_set_is_whole(place, tmp_path, fake):
    fake(lambda request: "x")
    (row,) = score(config(place, tmp_path, tasks="qa_2", lengths="512", edition="lab-2026"))
    assert (row["edition"], row["questions"], row["questions_whole"]) == ("lab-2026", 12, False)


def test_a_prompt_of_2024_that_leaves_no_room_is_an_error(place, tmp_path):
    """fwe of the paper's time fills the window without regard to the answer."""
    changes = {"tasks": "fwe", "lengths": "512", "edition": "2024", "shots": 1, "max_new_tokens": 100}
    with pytest.raises(
        ValueError, match=r"fwe@512: prompt and generation must be at most .* window 512, and edition 2024"
    ):
        score(config(place, tmp_path, samples=8, **changes))


def test_an_interrupted_run_goes_on_and_ends_in_the_same_rows(place, tmp_path, fake):
    asked = []

    def answer(request):
        asked.append(request.doc["index"])
        if len(asked) == 12:
            raise KeyboardInterrupt
        return request.doc["outputs"][0] if request.doc["index"] % 2 else ""

    fake(answer)
    with pytest.raises(KeyboardInterrupt):
        score(config(place, tmp_path / "cut", batch_size=2))
    with open(tmp_path / "cut" / "predictions.jsonl", "a") as file:
        file.write('{"task": "vt@400", "index"')  # a line that the crash cut off
    before = len(asked)
    resumed = score(config(place, tmp_path / "cut", batch_size=2))
    assert len(asked) - before == 30 - 10  # five batches of two were there already
    assert resumed == score(config(place, tmp_path / "whole", batch_size=2))
    count = len(asked)
    assert score(config(place, tmp_path / "cut", batch_size=2)) == resumed
    assert len(asked) == count  # finished cells are not run again
    assert len(read_rows(tmp_path / "cut" / "results.jsonl")) == 6
    score(config(place, tmp_path / "cut", batch_size=2, overwrite=True))
    assert len(asked) == count + 30


def test_progress_counts_the_whole_run_whatever_the_calls_of_lm_eval(place, tmp_path, fake, monkeypatch, capsys):
    fake(lambda request: "")
    monkeypatch.setattr(evaluate, "CALL_CHARACTERS", 1)  # a call a cell
    score(config(place, tmp_path, quiet=False))
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.fullmatch(r"vt@512: 30/30 samples, [\d,]+ tokens/s, 0:00:00 left", last)
    calls = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [len(call["cells"]) for call in calls] == [1] * 6
    assert all(5 * 300 < call["prompt_tokens"] <= 5 * 512 for call in calls)


def test_plain_lm_eval_gives_the_same_scores(place, tmp_path):
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    made = {(r["task"], r["length"]): r for r in score(config(place, tmp_path, tasks="niah_single_1,vt"))}
    folder = Path(benchmarks.__file__).parent / "tasks"
    metadata = {
        "pretrained": str(place / "llama"),
        "max_seq_lengths": [400, 512],
        "samples": 5,
        "shots": 0,
        "max_new_tokens": 12,
        "cache_dir": str(tmp_path / "other cache"),
    }
    manager = TaskManager(include_path=str(folder), include_defaults=False, metadata=metadata)
    arguments = {"pretrained": str(place / "llama"), "dtype": "float32", "device": "cpu", "max_length": 512}
    results = simple_evaluate(
        "hf",
        model_args=arguments,
        batch_size=3,
        tasks=["endprompt_niah_single_1", "endprompt_vt"],
        task_manager=manager,
    )
    for (task, length), row in made.items():
        assert 100 * results["results"][f"endprompt_{task}"][f"{length},none"] == pytest.approx(row["value"])
    own = predictions(tmp_path)
    for task in ("niah_single_1", "vt"):
        for logged in results["samples"][f"endprompt_{task}"]:
            doc = logged["doc"]
            assert logged["resps"][0][0] == own[f"{task}@{doc['budget']}", doc["index"]]


def test_the_command_compares_and_shows_finished_runs(place, tmp_path, fake, capsys):
    from endprompt.cli import main

    runs = {"weak": "", "strong": "right"}
    for name, kind in runs.items():
        fake(lambda request, kind=kind: " ".join(request.doc["outputs"]) if kind or request.doc["index"] < 2 else "no")
        score(config(place, tmp_path / name, tasks="vt", lengths="400"))
    weak, strong = (str(tmp_path / name) for name in runs)
    capsys.readouterr()
    assert main(["score", strong, "--compare", weak, "--json"]) == 0
    (found,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert (found["first"], found["second"], found["difference"]) == (40, 100, 60)
    assert main(["score", weak, "--show", "vt", "--wrong", "--json"]) == 0
    assert [json.loads(line)["index"] for line in capsys.readouterr().out.splitlines()] == [2, 3, 4]
    assert main(["score", weak, "--show", "vt"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("predicted") == 5 and printed.count("'no'") == 3
    assert main(["score", weak, "--show", "cwe"]) == 1
    assert "task 'cwe' was not run" in capsys.readouterr().err
    with pytest.raises(ValueError, match="json is for compare and show"):
        ScoreConfig("x", json=True)


def cell(directory, **changes):
    wanted = [("vt", changes.pop("length", 512))]
    settings = dict(tokenizer=helpers.tokenizer(), n=3, seed=0, options=ruler.Options(shots=0, max_new_tokens=12))
    return cache.cells(wanted, **{**settings, **changes}, directory=directory)[0]


def test_a_cached_cell_renders_the_same_bytes_and_is_not_built_again(tmp_path, monkeypatch):
    built = list(cell(tmp_path))
    monkeypatch.setattr(fit, "fit", lambda *args: pytest.fail("built again"))
    assert list(cell(tmp_path)) == built
    assert samples_sha256(built) == samples_sha256([{"input": s["input"], "outputs": s["outputs"]} for s in built])


@pytest.mark.parametrize(
    "change",
    [
        {"length": 600},
        {"seed": 1},
        {"n": 4},
        {"tokenizer": helpers.tokenizer("metaspace")},
        {"options": ruler.Options(shots=0, max_new_tokens=13)},
        {"options": ruler.Options(shots=0, max_new_tokens=12, hops=3)},
    ],
)
def test_the_cache_serves_no_other_length_tokenizer_or_setting(tmp_path, change):
    cell(tmp_path)
    changed = {"task": "vt", "length": 512, "tokenizer": helpers.tokenizer(), "n": 3, "seed": 0, **change}
    options = changed.pop("options", ruler.Options(shots=0, max_new_tokens=12))
    fresh = ruler.Cell.build(*(changed[k] for k in ("task", "length", "tokenizer", "n", "seed")), None, options)
    assert list(cell(tmp_path, **change)) == list(fresh)
    assert len(list(tmp_path.glob("*.json"))) == 2


def test_processes_wait_for_the_one_that_builds(tmp_path, monkeypatch):
    builds, original = [], fit.fit

    def slow(*args):
        builds.append(1)
        threading.Event().wait(0.3)
        return original(*args)

    monkeypatch.setattr(fit, "fit", slow)
    threads = [threading.Thread(target=cell, args=(tmp_path,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1


def test_several_processes_build_the_bytes_that_one_does(place, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "PARALLEL_TOKENS", 0)
    monkeypatch.setattr(cache, "processes", lambda: 2)
    wanted = [("vt", 512), ("qa_1", 900), ("niah_single_1", 512)]
    common = (helpers.tokenizer(), 3, 0, place, ruler.Options(shots=0, max_new_tokens=12))
    made = cache.cells(wanted, *common, tmp_path)
    monkeypatch.setattr(fit, "fit", lambda *args: pytest.fail("built again"))
    again = cache.cells(wanted, *common, tmp_path)
    monkeypatch.undo()
    for (task, length), cell, same in zip(wanted, made, again, strict=True):
        alone = ruler.Cell.build(task, length, *common)
        assert list(cell) == list(same) == list(alone)
        assert cell.recipe["samples_sha256"] == samples_sha256(list(alone))
        assert cell.recipe["characters"] == sum(len(sample["input"]) for sample in alone)
    assert len(list(tmp_path.glob("*.json"))) == 3
    monkeypatch.setattr(cache, "PARALLEL_TOKENS", 0)
    monkeypatch.setattr(cache, "processes", lambda: 2)
    with pytest.raises(ValueError, match="too short"):
        cache.cells([("vt", 40), ("cwe", 41)], *common, tmp_path)


def test_prepare_only_makes_the_cache_without_a_model(place, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "load", lambda *args: pytest.fail("a model was loaded"))
    settings = dict(cache_dir=str(tmp_path / "cache"), prepare_only=True, lengths="400,4000")
    assert score(config(place, tmp_path, **settings)) == []
    assert len(list((tmp_path / "cache").glob("*.json"))) == 6
    assert not (tmp_path / "results.jsonl").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": "niah_singel_1"}, "did you mean .*niah_single_1"),
        ({"lengths": "400,1024"}, r"window 512: \[1024\]"),
        ({"lengths": "four"}, "whole numbers"),
        ({"lengths": "100"}, r"too short .* shortest possible is \d+"),
        ({"tasks": "qa_1", "data_dir": None}, r"squad\.json .*fetch ruler"),
        ({"haystack_text": "/nowhere.txt"}, "haystack-text"),
        ({"checkpoint": "/nowhere/at/all"}, "nowhere"),
        ({"chat": True}, "chat template"),
        ({"shots": 3}, "shots"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_errors_come_before_the_model_is_loaded(place, tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(run, "load", lambda *args: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=message):
        score(config(place, tmp_path, **change))
    assert not (tmp_path / "results.jsonl").exists()


def test_a_tampered_cache_is_an_error_before_the_model_is_loaded(place, tmp_path, monkeypatch):
    score(config(place, tmp_path, cache_dir=str(tmp_path / "cache"), prepare_only=True))
    path = next((tmp_path / "cache").glob("vt-512-*.json"))
    path.write_bytes(path.read_bytes()[:-1])
    monkeypatch.setattr(run, "load", lambda *args: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=rf"{re.escape(path.name)}.*changed after it was written"):
        score(config(place, tmp_path, cache_dir=str(tmp_path / "cache")))


def test_corrupt_data_files_are_named_with_the_place(place, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "load", lambda *args: pytest.fail("a model was loaded"))
    (tmp_path / "squad.json").write_text('{"data": [\n {"title": }]}')
    with pytest.raises(ValueError, match=r"squad\.json, line 2, column"):
        score(config(place, tmp_path, tasks="qa_1", data_dir=str(tmp_path)))
    (tmp_path / "hotpotqa.json").write_text('[{"question": "?"}]')
    with pytest.raises(ValueError, match=r"hotpotqa\.json: not in the layout of HotpotQA.*context"):
        score(config(place, tmp_path, tasks="qa_2", data_dir=str(tmp_path)))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("no tensor file", "the checkpoint does not load: model.safetensors"),
        ("cut short", "the checkpoint does not load: model.safetensors"),
        ("gone", "the checkpoint does not load: it has no weights"),
        ("a part is gone", "the checkpoint does not load: part-2.safetensors"),
        ("elsewhere", "must be a file of the same folder"),
        ({"intermediate_size": 40}, r"down_proj.weight is \(32, 48\), the model's is \(32, 40\)"),
        ({"num_hidden_layers": 1}, "holds 9 weights that the model does not have, such as model.layers.1.input"),
        ({"num_hidden_layers": 3}, "lacks 9 of the model's weights, such as model.layers.2.input"),
        ({"hidden_act": "swosh"}, "it knows no 'swosh'"),
        ({"rope_parameters": {"rope_type": "su", "rope_theta": 1e4}}, "it knows no 'su'"),
        ("attn", r"gptj takes no attention of torch's, attn must be eager: attn='sdpa'"),
    ],
)
def test_what_does_not_load_is_an_error_before_samples_are_built(place, tmp_path, monkeypatch, damage, said):
    broken = helpers.checkpoint(tmp_path / "broken")
    weights, about = broken / "model.safetensors", broken / "config.json"
    if damage == "no tensor file":
        weights.write_bytes(b"not a tensor file")
    elif damage == "cut short":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "gone":
        weights.unlink()
    elif damage in ("a part is gone", "elsewhere"):
        part = "part-2.safetensors" if damage == "a part is gone" else "../other/model.safetensors"
        weights.unlink()
        (broken / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": part}}))
    elif damage == "attn":
        from transformers import AutoModelForCausalLM, GPTJConfig

        small = GPTJConfig(vocab_size=2048, n_embd=32, n_layer=1, n_head=2, rotary_dim=8)
        AutoModelForCausalLM.from_config(small).save_pretrained(broken)
    else:
        about.write_text(json.dumps(json.loads(about.read_text()) | damage))
    monkeypatch.setattr(run, "suite_of", lambda given: types.SimpleNamespace(units=lambda *args: pytest.fail("built")))
    monkeypatch.setattr(run, "load", lambda *args: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=rf"broken.*: .*{said}") as raised:
        score(config(place, tmp_path / "out", checkpoint=str(broken)))
    assert "\n" not in str(raised.value)


def test_an_output_that_is_a_file_is_refused_before_samples_are_built(place, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "read_checkpoint", lambda *args: pytest.fail("the checkpoint is read"))
    (tmp_path / "out").touch()
    with pytest.raises(ValueError, match=r"output must be a folder, or nothing yet: output='.*out'"):
        score(config(place, tmp_path / "out"))


def test_samples_are_prepared_without_weights(place, tmp_path):
    tokenizer_only = helpers.checkpoint(tmp_path / "m")
    (tokenizer_only / "model.safetensors").unlink()
    settings = {"checkpoint": str(tokenizer_only), "cache_dir": str(tmp_path / "cache"), "prepare_only": True}
    assert score(config(place, tmp_path / "out", tasks="vt", **settings)) == []
    assert len(list((tmp_path / "cache").glob("vt-*.json"))) == 2


ACCELERATE = (sys.executable, "-m", "accelerate.commands.accelerate_cli")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_give_the_scores_of_one(place, tmp_path):
    """Of the smallest base with `dynamic`, beyond its window, with a number of samples that two do not divide."""
    base = shutil.copytree(Path(__file__).resolve().parents[3] / "benchmarks" / "base" / "256", tmp_path / "base")
    settings = json.loads((base / "config.json").read_text())
    settings["rope_parameters"] = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    (base / "config.json").write_text(json.dumps(settings))
    flags = (
        "--tasks niah_single_1,vt --lengths 320 --samples 7 --shots 0 --max-new-tokens 16 --quiet "
        "--dtype float32 --device cpu --batch-size 4"
    )
    arguments = ["score", str(base), *flags.split(), f"--cache-dir={tmp_path / 'cache'}", "--output"]
    launchers = {
        "one": [sys.executable, "-m"],
        "two": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"],
        # With --cpu instead, Accelerate starts one process whatever the number asked for.
        "two by Accelerate": [*ACCELERATE, "launch", "--multi_gpu", "--num_processes", "2", "-m"],
    }
    made = {}
    for name, launcher in launchers.items():
        out = tmp_path / name.replace(" ", "-")
        subprocess.run([*launcher, "endprompt.cli", *arguments, str(out)], check=True, capture_output=True, text=True)
        predicted = {key: entry["prediction"] for key, entry in read_predictions(out).items()}
        made[name] = (read_rows(out / "results.jsonl"), read_rows(out / "summary.jsonl"), predicted)
        assert len(list(out.glob("predictions*.jsonl"))) == (1 if name == "one" else 2)
    assert made["one"] == made["two"] == made["two by Accelerate"]
    assert len(made["one"][2]) == 14 and made["one"][0][0]["value"] > 50


def test_what_is_unusual_about_a_tokenizer_is_said(place, tmp_path, capsys):
    from endprompt.model import load_tokenizer

    path = helpers.checkpoint(tmp_path / "images")
    tokenizer = load_tokenizer(path)
    size = len(tokenizer)
    tokenizer.add_tokens(["<image>"])
    tokenizer.save_pretrained(path)
    asked = dict(checkpoint=str(path), tasks="niah_single_1", lengths="400", samples=1)
    score(config(place, tmp_path / "out", prepare_only=True, **asked))
    said = capsys.readouterr().err
    assert f"images: the model has no embedding for 1 of its tokenizer's added tokens, such as <image> ({size}" in said
    (tmp_path / "story.txt").write_text("An <image> of a tale. " * 300)
    asked |= dict(tasks="niah_single_2", haystack_text=str(tmp_path / "story.txt"))
    with pytest.raises(ValueError, match=f"the model has no embedding for token {size}, '<image>'"):
        score(config(place, tmp_path / "out", **asked))


def test_a_key_of_metadata_and_of_dataset_kwargs_is_no_collision(place, tmp_path):
    """lm-eval calls a task's `custom_dataset` with both: the metadata's value is ours, and dataset_kwargs are not."""
    from lm_eval.api.task import ConfigurableTask

    from benchmarks.tasks.ruler_task import RulerTask

    common = {"task": "endprompt_vt", "dataset_kwargs": {"samples": 7}}
    metadata = {"samples": 2, "tokenizer": str(place / "llama"), "max_seq_lengths": [512], "max_new_tokens": 12}
    metadata |= {"shots": 0, "cache_dir": str(tmp_path)}
    with pytest.raises(TypeError, match="samples"):
        ConfigurableTask(config={**common, "metadata": metadata, "custom_dataset": lambda **given: {}})
    assert len(RulerTask({**common, "metadata": metadata}).samples) == 2
