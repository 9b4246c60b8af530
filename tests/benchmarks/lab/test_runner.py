"""Lab: a run that is killed, resumed, refused, repeated; on a base of two tiny layers."""

import collections
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from benchmarks import ruler
from benchmarks.base import documents
from benchmarks.lab import cost, material, matrix, runner
from benchmarks.lab.arms import arms_of
from benchmarks.lab.config import LabConfig
from benchmarks.lab.matrix import Answer
from benchmarks.ruler.cell import samples_sha256
from endprompt.data import read_shard
from endprompt.files import sole_use
from endprompt.model import load_tokenizer
from endprompt.results import read_rows
from endprompt.runs import RunDirectory
from tests.support.processes import Forked, forked_workers
from tests.support.runs import lines_of

MATRIX = {
    "seeds": [0, 1],
    "train": {"steps": 2, "warmup": 1, "rows": 2, "lr": 1e-3},
    "score": {"tasks": ["niah_single_1", "vt"], "samples": 2, "loss_rows": 1, "hops": 3, "shots": 0},
    "arms": {
        "base": {"train": False},
        "recall": {"scheme": "endprompt", "prompt": "recall"},
        "broken": {"scheme": "contiguous", "lr": 1e30, "steps": 3},
    },
    "blocks": [
        {
            "target": 512,
            "lengths": [256, 512],
            "runs": [
                {"arms": ["base"], "scaling": "none", "questions": [7]},
                {"arms": ["recall"], "scaling": "yarn", "questions": [3], "verify": True},
                {"arms": ["broken"], "scaling": "linear", "seeds": [0]},
            ],
        }
    ],
}


def make_base(path):
    """The small base's tokenizer with a model of random weights."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    own = matrix.BASES / "256"
    about = json.loads((own / "config.json").read_text())
    about |= {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    about |= {"num_key_value_heads": 2, "head_dim": 16}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**about)).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(own / name, path / name)


def forked(config):
    with forked_workers():
        return runner.lab(LabConfig(**config))


def killed(config, needed):
    """A run that ends when its first cell was written and all that cells share was made."""

    def line(*_):
        while not all(path.exists() for path in needed):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGKILL)

    runner.Runner.line = line
    return forked(config)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one worker, killed when a cell was written, then started again to its end."""
    folder = tmp_path_factory.mktemp("lab")
    make_base(folder / "base")
    content = json.loads(json.dumps(MATRIX))
    content["blocks"][0]["base"] = str(folder / "base")
    (folder / "matrix.yaml").write_text(yaml.safe_dump(content))
    config = {"matrix": str(folder / "matrix.yaml"), "output": str(folder / "run"), "jobs": 1, "device": "cpu"}
    results = folder / "run" / "results.jsonl"
    asked = LabConfig(**config)
    needed = [item.path(asked.cache_directory) for item in material.needed(cells_of(asked))]
    code, *_ = Forked(killed, config, needed).ended()
    assert code == -signal.SIGKILL
    before = results.read_text()
    with open(results, "a") as file:  # as if it had been killed in the middle of the next cell's rows
        file.write(before.splitlines()[0].replace(json.loads(before.splitlines()[0])["cell"], "0" * 24)[:200])
    code, _, messages = Forked(forked, config).ended()
    return folder, config, before, code, messages


def lab_config(run, **changes):
    return LabConfig(**{**run[1], **changes})


def cells_of(config):
    return matrix.cells(matrix.read_matrix(Path(config.matrix)), config.matrix, config)


def test_a_killed_run_goes_on_and_a_failed_cell_leaves_the_others_alone(run):
    folder, _, before, code, messages = run
    rows = read_rows(folder / "run" / "results.jsonl")
    assert code == 1, messages  # a cell failed
    assert "5 cells done already" not in messages and "of 5 cells are done already" in messages
    cells = cells_of(lab_config(run))
    counts = collections.Counter(row["cell"] for row in rows if row["metric"] != "failed")
    whole = {cell.sha256: 2 * 2 + 2 + cell.verified for cell in cells if "broken" not in cell.arm}
    assert counts == whole
    kept = [line for line in before.splitlines() if '"failed"' not in line]  # a failed cell is tried again
    assert kept == [json.dumps(row, ensure_ascii=False) for row in rows][: len(kept)]
    (broken,) = [row for row in rows if row["metric"] == "failed"]
    assert broken["arm"] == "broken+linear" and "training diverged" in broken["error"]
    log = (folder / "run" / "log.jsonl").read_text()
    assert "Traceback" in log and not list((folder / "run" / "checkpoints").glob("*/model.safetensors"))


@pytest.mark.slow
def test_processes_of_their_own_give_the_same_rows(run, tmp_path):
    """Started as a user starts it, with workers that are not forked."""
    config = run[1] | {"output": str(tmp_path), "jobs": 2}
    subprocess.run([sys.executable, "-m", "benchmarks.lab.__main__", json.dumps(config)], timeout=250)
    ours, theirs = (
        {(row["cell"], row["task"], row["length"]): row["value"] for row in read_rows(path / "results.jsonl")}
        for path in (run[0] / "run", tmp_path)
    )
    assert ours == theirs


def test_rows_carry_what_the_answers_need(run):
    folder = run[0]
    rows = [row for row in read_rows(folder / "run" / "results.jsonl") if row["arm"] == "recall+yarn"]
    one = next(row for row in rows if row["suite"] == "ruler" and row["length"] == 512)
    assert (one["base"], one["window"], one["target"], one["fold"]) == (str(folder / "base"), 256, 512, 2)
    method = (one["method"], one["scheme"], one["prompt"], one["prompt_weight"])
    assert method == ("endprompt+recall+yarn", "endprompt", "recall", 1.0)
    assert one["train_tokens"] == 2 * 2 * 256 and one["gpu_seconds"] > 0 and one["text_whole"] is True
    # YaRN keeps the highest frequency, 1 radian a token, and scales queries and keys by 0.1 ln 2 + 1
    assert one["bernstein_constant"] == pytest.approx((0.1 * np.log(2) + 1) ** 2)
    assert 0 < one["gap_rms"] < 1
    (share,) = [row for row in rows if row["task"] == "verify"]
    assert share["metric"] == "share_within_bounds" and share["value"] == 100.0 and share["seed"] == 0
    losses = {row["length"]: row["value"] for row in rows if row["task"] == "loss" and row["seed"] == 0}
    assert losses.keys() == {256, 512} and all(abs(value - np.log(4096)) < 0.5 for value in losses.values())
    arms = arms_of(read_rows(folder / "run" / "results.jsonl"), lines_of(folder / "run" / "scores.jsonl"))
    recall = next(arm for arm in arms if arm.name == "recall+yarn")
    assert set(recall.scores) == {256, 512} and set(recall.samples) == {(n, s) for n in (256, 512) for s in (0, 1)}


def test_scores_by_depth_are_those_of_the_samples_at_that_depth(run):
    """Each needle of the samples, made anew, counted by hand into the tenth of the context where it stands."""
    folder = run[0]
    rows = lines_of(folder / "run" / "depth.jsonl")
    mine = [row for row in rows if row["arm"] == "recall+yarn" and row["length"] == 512]
    tokenizer = load_tokenizer(folder / "base")
    options = {"max_new_tokens": 30, "shots": 0, "hops": 3, "edition": "lab-2026"}
    depths = [
        sample["depth"][0]
        for seed in (1000, 1001)
        for sample in ruler.build_samples("niah_single_1", 512, tokenizer, 2, seed, **options)
    ]
    tenths = collections.Counter(float(depth // 10 * 10) for depth in depths)
    assert {(row["depth_from"], row["n"]) for row in mine} == set(tenths.items())
    lines = lines_of(folder / "run" / "scores.jsonl")
    scores = [line["scores"] for line in lines if (line["task"], line["length"]) == ("niah_single_1", 512)]
    assert len(scores) == 4 and all(row["seeds"] == 2 and row["seed"] is None for row in mine)
    found = sum(row["value"] * row["n"] for row in rows if row["length"] == 512)
    assert found == pytest.approx(sum(map(sum, scores)))


def test_samples_are_ruler_s_own_and_the_same_for_all_arms(run):
    folder = run[0]
    rows = [row for row in read_rows(folder / "run" / "results.jsonl") if row["suite"] == "ruler"]
    hashes = {(row["task"], row["length"], row["seed"], row["samples_sha256"]) for row in rows}
    assert len(hashes) == 2 * 2 * 2
    tokenizer = load_tokenizer(folder / "base")
    options = {"max_new_tokens": 30, "shots": 0, "hops": 3, "edition": "lab-2026"}
    expected = ruler.build_samples("vt", 512, tokenizer, 2, 1001, **options)
    assert ("vt", 512, 1, samples_sha256(expected)) in hashes


def test_documents_are_of_one_row_each(run):
    cell = next(cell for cell in cells_of(lab_config(run)) if cell.arm == "recall+yarn" and cell.seed == 1)
    (part,) = material.parts(cell)
    shard = read_shard(part.path(lab_config(run).cache_directory))
    assert set(shard.lengths) == {256} and len(shard) == cell.documents == 6
    tokenizer = load_tokenizer(run[0] / "base")
    about = (6, tokenizer, 1001, 256, material.MIXTURE)
    first = lines_of(documents.write_documents(run[0] / "again.jsonl", *about, longest=cell.longest))[0]
    ids = tokenizer(first["text"] + first["completion"], add_special_tokens=False)["input_ids"]
    assert shard.tokens[:256].tolist() == ids


def test_documents_and_samples_are_the_same_whoever_makes_them(run, tmp_path):
    """Those of the run's own processes, made again in this one."""
    config = lab_config(run)
    items = [item for item in material.needed(cells_of(config)) if item.seed in (1, 1001)]
    assert {type(item).__name__ for item in items} == {"Part", "Samples"}
    for item in items:
        item.make(tmp_path)
        ours, theirs = item.path(tmp_path), item.path(config.cache_directory)
        if ours.is_dir():
            names = ("tokens.bin", "offsets.npy", "completions.npy")  # the manifest names a folder of its own
            assert all((ours / name).read_bytes() == (theirs / name).read_bytes() for name in names)
        else:
            with np.load(ours) as made, np.load(theirs) as found:
                assert made.files == found.files and all(np.array_equal(made[key], found[key]) for key in made.files)
        stamp = ours.stat().st_mtime_ns
        item.make(tmp_path)
        assert ours.stat().st_mtime_ns == stamp  # what is there is left alone


def test_what_is_finished_is_not_done_again(run, capsys):
    folder = run[0]
    before = (folder / "run" / "results.jsonl").read_bytes()
    assert runner.lab(lab_config(run, only=["arm=base*,recall*"])) == 0
    assert "4 of 4 cells are done already" in capsys.readouterr().err
    after = (folder / "run" / "results.jsonl").read_bytes()
    assert after == before
    assert runner.lab(lab_config(run, dry_run=True)) == 0
    assert "5 cells, 4 done" in capsys.readouterr().out


def test_cells_of_another_determinism_are_counted(run, tmp_path):
    cells = cells_of(lab_config(run))
    path = tmp_path / "results.jsonl"
    rows = lines_of(run[0] / "run" / "results.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = runner.finished(path, cells)
    trained = {row["cell"] for row in rows if row.get("train_tokens")}
    assert runner.made_otherwise(path, done, True) == 0 < len(trained) < len(done)
    assert runner.made_otherwise(path, done, False) == len(trained)
    assert runner.made_otherwise(path, done - {min(trained)}, False) == len(trained) - 1
    for row in rows:  # as a run from before there was a choice
        row.pop("deterministic", None)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert runner.made_otherwise(path, done, True) == len(trained)


def test_a_cell_that_lacks_a_row_is_not_finished(run, tmp_path):
    cells = cells_of(lab_config(run))
    lines = (run[0] / "run" / "results.jsonl").read_text().splitlines(keepends=True)
    path = tmp_path / "results.jsonl"
    path.write_text("".join(lines))
    whole = runner.finished(path, cells)
    lost = next(i for i, line in enumerate(lines) if json.loads(line)["arm"] == "recall+yarn")
    path.write_text("".join(lines[:lost] + lines[lost + 1 :]))
    assert whole - runner.finished(path, cells) == {json.loads(lines[lost])["cell"]}
    runner.tidy(tmp_path, cells, overwrite=False)
    assert json.loads(lines[lost])["cell"] not in path.read_text()


def test_other_settings_in_the_same_directory_are_refused(run):
    with pytest.raises(ValueError, match="made with other settings"):
        runner.tidy(run[0] / "run", cells_of(lab_config(run, samples=3)), overwrite=False)


def test_overwrite_drops_the_rows_of_the_chosen_cells_only(run, tmp_path):
    for name in ("results.jsonl", "scores.jsonl"):
        shutil.copy(run[0] / "run" / name, tmp_path / name)
    config = lab_config(run)
    chosen = matrix.chosen(cells_of(config), ["arm=recall*", "seed=0"])
    assert runner.tidy(tmp_path, chosen, overwrite=True) == set()
    left = {(row["arm"], row["seed"]) for row in read_rows(tmp_path / "results.jsonl")}
    assert left == {("base+none", 0), ("base+none", 1), ("recall+yarn", 1), ("broken+linear", 0)}
    lines = lines_of(tmp_path / "scores.jsonl")
    assert {(line["arm"], line["seed"]) for line in lines} == left - {("broken+linear", 0)}


def test_a_second_run_on_one_output_is_refused(run):
    with sole_use(run[0] / "run"), pytest.raises(ValueError, match="another"):
        runner.lab(lab_config(run))


@pytest.fixture
def without_one(run, tmp_path):
    """(output, cell, its rows, its scores): a copy of the run that lacks one of its cells."""
    output = tmp_path / "again"
    output.mkdir()
    cell = next(cell for cell in cells_of(lab_config(run)) if cell.arm == "recall+yarn" and cell.seed == 1)
    taken = {}
    for name in ("results.jsonl", "scores.jsonl"):
        lines = (run[0] / "run" / name).read_text().splitlines(keepends=True)
        taken[name] = [json.loads(line) for line in lines if json.loads(line)["cell"] == cell.sha256]
        (output / name).write_text("".join(line for line in lines if json.loads(line)["cell"] != cell.sha256))
    return output, cell, taken["results.jsonl"], taken["scores.jsonl"]


def begun(run, output, cell):
    """A runner that has given the cell to a worker."""
    lab = runner.Runner(lab_config(run, output=str(output)), cells_of(lab_config(run)), "cpu", 1)
    lab.directory = RunDirectory(output)
    lab.output = output
    here, there = multiprocessing.get_context("spawn").Pipe()
    lab.workers = [runner.Worker(0, None, here, ready=True, cell=cell)]
    return lab, there


@pytest.mark.parametrize("room", [0, 300])
def test_a_full_disk_loses_no_cell_that_was_written(room, run, without_one):
    """No file can grow by more than `room` bytes when a cell's rows are to be written."""
    output, cell, rows, scores = without_one
    lab, _ = begun(run, output, cell)
    files = [output / name for name in ("results.jsonl", "scores.jsonl")]
    before = [path.read_bytes() for path in files]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max(map(len, before)) + room, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            lab.take(lab.workers[0], Answer(rows, scores, {}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    cells = cells_of(lab_config(run))
    done = runner.tidy(output, cells, overwrite=False)
    assert done == {other.sha256 for other in cells if "broken" not in other.arm} - {cell.sha256}
    for path, whole in zip(files, before):  # the row of the cell that failed is gone, since it is done again
        assert path.read_bytes() == b"".join(line for line in whole.splitlines(True) if b'"failed"' not in line)


def test_a_worker_that_is_killed_costs_its_cell_alone(run, without_one, monkeypatch, capsys):
    output, cell, *_ = without_one
    lab, there = begun(run, output, cell)
    process = multiprocessing.get_context("spawn").Process(target=there.recv)
    process.start()
    there.close()
    lab.workers[0].process = process
    monkeypatch.setattr(lab, "start", lambda number: runner.Worker(number, None, None))
    monkeypatch.setattr(runner, "TICK", 30)
    os.kill(process.pid, signal.SIGKILL)
    lab.listen()
    (row,) = [row for row in read_rows(output / "results.jsonl") if row["cell"] == cell.sha256]
    assert (row["metric"], row["error"]) == ("failed", "the worker ended: killed by signal 9 (out of memory?)")
    assert f"FAILED {cell.name}: the worker ended" in capsys.readouterr().err
    assert lab.failed == 1 and lab.workers[0].cell is None and lab.workers[0].process is None  # another one
    lab.workers[0] = runner.Worker(0, process, *multiprocessing.Pipe()[:1])
    with pytest.raises(ValueError, match=r"a worker did not start \(exit code -9\): see .*worker-0.log"):
        lab.lost(lab.workers[0])
    lab.deaths, lab.workers[0].ready = runner.DEATHS, True
    with pytest.raises(ValueError, match="workers end one after the other"):
        lab.lost(lab.workers[0])


@pytest.mark.parametrize("name", ["results.jsonl", "scores.jsonl"])
def test_a_damaged_line_is_named_and_nothing_is_overwritten(name, run, without_one):
    output = without_one[0]
    path = output / name
    path.write_bytes(path.read_bytes().replace(b'"cell": ', b'"cell": ]', 1))
    before = [(output / other).read_bytes() for other in ("results.jsonl", "scores.jsonl")]
    with pytest.raises(ValueError, match=f"{name}, line 1: not valid JSON"):
        runner.tidy(output, cells_of(lab_config(run)), overwrite=False)
    assert [(output / other).read_bytes() for other in ("results.jsonl", "scores.jsonl")] == before


def test_cells_of_one_shape_stay_with_their_worker_and_the_longest_come_first(tmp_path):
    config = LabConfig(preset="micro", output=str(tmp_path))
    able = matrix.chosen(cells_of_preset(config), ["seed=0", "fold=8", "arm=pose+yarn,pose+linear,full-2048+*"])
    able = [cell for cell in able if cell.base == "256"]
    lab = runner.Runner(config, able, "cuda", 2)
    lab.waiting = sorted(able, key=lambda cell: -cost.seconds(cell, "cuda"))
    lab.workers = [runner.Worker(0, None, None), runner.Worker(1, None, None)]
    shapes = {0: [], 1: []}
    for _ in range(2):
        for worker in lab.workers:
            cell = lab.next_for(worker)
            lab.waiting.remove(cell)
            worker.cell, worker.shape = cell, cell.shape
            shapes[worker.number].append(cell.row_tokens)
    assert sorted(shapes.values()) == [[256, 256], [2048, 2048]] and not lab.waiting
    third = matrix.chosen(cells_of_preset(config), ["seed=0", "arm=endprompt+linear*"])
    lab.waiting = sorted(third, key=lambda cell: -cost.seconds(cell, "cuda"))
    short = next(worker for worker in lab.workers if worker.cell.row_tokens == 256)
    assert lab.next_for(short).steps == 1000


def cells_of_preset(config):
    return matrix.cells(matrix.read_matrix(matrix.matrix_files(config)[0]), str(config.preset), config)


@pytest.mark.parametrize(
    ("argument", "code", "message"),
    [
        ("{", 2, "JSON"),
        ('{"colour": 3}', 2, "colour"),
        ('{"preset": "micor"}', 1, "preset must be one of"),
        ('{"preset": "smoke", "only": ["arm=x"]}', 1, "only leaves no cell"),
        ('{"preset": "smoke", "jobs": -1}', 1, "jobs must be at least 0"),
    ],
)
def test_the_light_entry_names_what_is_wrong(argument, code, message, capsys):
    from benchmarks.lab.__main__ import main

    assert main([argument]) == code
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
