"""Lab: the matrix file and the cells that it stands for."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from benchmarks.lab import cost, material, matrix
from benchmarks.lab.config import LabConfig
from tests.support.lab_rows import packed_rows

MATRIX = """
seeds: [0, 1]
train: {steps: 4, warmup: 1}
score: {tasks: [niah_single_1], samples: 2}
arms:
  base: {train: false}
  short: {scheme: contiguous}
  cue: {scheme: endprompt, prompt: EP_1}
  full: {scheme: contiguous, row_tokens: 2048, rows: 1, method: full}
blocks:
  - base: 256
    target: 2048
    lengths: [256, 2048]
    train: {lr: 1.0e-3, rows: 8}
    runs:
      - {questions: [7], arms: [base], scaling: [none, yarn]}
      - {questions: [1], arms: [short, cue], scaling: [linear, yarn]}
      - {questions: [2], arms: [cue], scaling: linear, steps: [2, 4]}
      - {questions: [6], arms: [full], scaling: linear}
"""


def made(text=MATRIX, **config):
    return matrix.cells(yaml.safe_load(text), "matrix", LabConfig(**config))


def test_crossed_runs_give_each_arm_once_and_collect_the_questions():
    cells = made()
    # 2 untrained + 2 x 2 short + one more number of steps + 1 full, two seeds each
    assert len(cells) == 2 * (2 + 4 + 1 + 1)
    asked = {cell.arm: cell.questions for cell in cells}
    assert asked == {
        "base+none": (7,),
        "base+yarn": (7,),
        "short+linear": (1,),
        "short+yarn": (1,),
        "cue+linear": (1, 2),
        "cue+yarn": (1,),
        "cue+linear@steps=2": (2,),
        "full+linear": (6,),
    }
    methods = {cell.arm: cell.method for cell in cells}
    assert methods["base+none"] == "base" and methods["base+yarn"] == "untrained+yarn"
    assert methods["cue+linear"] == "endprompt+EP_1+linear" == methods["cue+linear@steps=2"]
    assert methods["full+linear"] == "full+linear"


def test_a_scaling_with_another_factor_is_an_arm_of_its_own():
    cells = {c.arm: c for c in made(MATRIX.replace("scaling: [linear, yarn]", "scaling: [linear, linear@yarn]"))}
    plain, sharp = cells["short+linear"], cells["short+linear@yarn"]
    assert sharp.method == plain.method + "@yarn" and sharp.sha256 != plain.sha256
    config, fold = sharp.config([], ""), sharp.fold
    assert config.scaling == "longrope" and set(config.rope_options["long_factor"]) == {float(fold)}
    assert config.rope_options["attention_factor"] == pytest.approx(0.1 * np.log(fold) + 1)


def test_documents_are_shared_by_all_arms_of_a_row_length_and_seed():
    cells = made()
    files = {cell.arm: material.parts(cell) for cell in cells if cell.seed == 1}
    assert files["short+linear"] == files["cue+yarn"] == files["cue+linear@steps=2"] != []
    assert files["full+linear"] != files["short+linear"] and files["base+none"] == []
    assert {cell.documents for cell in cells if cell.arm == "short+linear"} == {4 * 8}
    other = next(cell for cell in cells if cell.arm == "short+linear" and cell.seed == 0)
    assert material.parts(other) != files["short+linear"]


def test_a_run_may_be_scored_at_lengths_of_its_own_and_its_loss_is_taken_from_the_same_texts():
    text = MATRIX.replace(
        "arms: [full], scaling: linear}", "arms: [full], scaling: linear, lengths: [256, 2048, 4096]}"
    )
    cells = {cell.arm: dataclasses.replace(cell, sources={"held_out": "a"}) for cell in made(text) if cell.seed == 0}
    lengths = {arm: sorted({item.length for item in material.samples(cell)}) for arm, cell in cells.items()}
    assert lengths.pop("full+linear") == [256, 2048, 4096] and {*map(tuple, lengths.values())} == {(256, 2048)}
    assert len({material.held_out(cell) for cell in cells.values()}) == 1


@pytest.mark.parametrize(("arm", "measured"), [("untrained+yarn", 77.0), ("recall+yarn", 126.7)])
def test_a_published_cell_takes_what_it_was_seen_to_take(tmp_path, arm, measured):
    """SmolLM2-135M's shape; seconds of cells of smollm2-small on an H200, means over the seeds."""
    about = {"model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9}
    about |= {"num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True}
    about |= {"max_position_embeddings": 8192, "rope_parameters": {"rope_theta": 1e5, "rope_type": "default"}}
    (tmp_path / "config.json").write_text(json.dumps(about))
    config = LabConfig(preset="smollm2-small", model=str(tmp_path), dry_run=True)
    cells = matrix.cells(matrix.read_matrix(matrix.presets()["smollm2-small"]), "m", config)
    cell = next(cell for cell in cells if cell.arm == arm)
    assert cost.seconds(cell, "cuda") == pytest.approx(measured, rel=0.2)


def test_samples_are_shared_by_all_arms_of_a_seed():
    cells = [cell for cell in made() if cell.seed == 1]
    assert len({tuple(material.samples(cell)) for cell in cells}) == 1
    assert {item.seed for item in material.samples(cells[0])} == {1001}


def test_the_hash_follows_every_setting_and_not_the_questions():
    cell = made()[4]
    assert cell.sha256 == dataclasses.replace(cell, questions=(5,)).sha256
    scoring = dataclasses.replace(cell.scoring, samples=3)
    for change in (
        {"seed": 9},
        {"settings": {**cell.settings, "lr": 2e-3}},
        {"scoring": scoring},
        {"documents": 5},
        {"lengths": (256, 1024, 2048)},
    ):
        assert dataclasses.replace(cell, **change).sha256 != cell.sha256


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_another_base_under_the_same_path_is_another_cell(tmp_path, name):
    base = shutil.copytree(made()[4].model, tmp_path / "base")
    cell = dataclasses.replace(made()[4], model=str(base))
    before, content = cell.sha256, bytearray((base / name).read_bytes())
    (base / "README.md").write_text("another card")
    assert cell.sha256 == before
    content[len(content) // 2] ^= 1
    (base / name).write_bytes(content)
    assert cell.sha256 != before


def test_the_factor_of_an_arm_is_that_of_the_model_that_is_scored(monkeypatch):
    """Linear scaling divides every frequency by its factor: by hand from the base's own."""
    from benchmarks.lab import cells as work

    text = MATRIX.replace(
        "  base: {train: false}", "  base: {train: false, factor: 8}\n  far: {train: false, factor: 16, method: far}"
    )
    text = text.replace("arms: [base], scaling: [none, yarn]}", "arms: [base, far], scaling: linear}")
    eight, sixteen = (cell for cell in made(text) if not cell.trained and cell.seed == 0)
    about = json.loads((Path(eight.model) / "config.json").read_text())
    omega = about["rope_parameters"]["rope_theta"] ** (-np.arange(0, 64, 2) / 64)
    assert work.frequencies(sixteen)[0] == pytest.approx(omega / 16) and work.bernstein_constant(sixteen) == 1 / 16
    assert work.frequencies(eight)[0] == pytest.approx(omega / 8) and eight.sha256 != sixteen.sha256
    monkeypatch.setattr(work, "load_model", lambda *_, config, loss, **__: loss and config.rope_parameters["factor"])
    assert work.load(sixteen, Path("nowhere"), "cpu") == 16


@pytest.mark.parametrize("damage", [lambda b: b[:100], lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"[1]"])
def test_damaged_samples_of_the_cache_are_named(tmp_path, damage):
    item = material.Samples(made()[0].model, "niah_single_1", 256, 1, 0, 30, 0, 3)
    item.make(tmp_path)
    path = item.path(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"{path.name}: this file of the cache was changed"):
        item.read(tmp_path)


@pytest.mark.parametrize(
    ("only", "count"),
    [(["arm=cue*"], 6), (["arm=cue*", "seed=1"], 3), (["question=6,7"], 6), (["base=256", "fold=8"], 16)],
)
def test_only_takes_the_cells_that_hold_all_conditions(only, count):
    assert len(matrix.chosen(made(), only)) == count


@pytest.mark.parametrize("only", [["arms=cue"], ["cue"], ["seed=7"]])
def test_only_refuses_what_it_does_not_know_or_what_leaves_nothing(only):
    with pytest.raises(ValueError, match="only"):
        matrix.chosen(made(), only)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("scheme: contiguous}\n  cue", "scheme: contiguous, colour: 3}\n  cue", "unknown key 'colour'"),
        ("arms: [short, cue]", "arms: [short, cut]", "no arm has this name: 'cut'"),
        ("lr: 1.0e-3", "lr: -1.0", "lr must be"),
        ("scheme: contiguous}\n  cue", "scheme: relay}\n  cue", "scheme must be one of .*scheme='relay'"),
        ("prompt: EP_1", "prompt: recall-2", "prompt must be .*prompt='recall-2'"),
        ("lengths: [256, 2048]", "lengths: [256, 1024]", "lengths must hold"),
        ("base: 256\n", "base: 257\n", "base must be one of 256, 512"),
        (", method: full}", "}", "same method in the rows"),
        ("scaling: linear, steps", "scaling: linear, step", "unknown key 'step'"),
        ("target: 2048\n", "target: 2000\n", "must be a multiple of the window 256"),
    ],
)
def test_a_wrong_matrix_is_refused_by_file_and_key(old, new, message):
    assert old in MATRIX
    with pytest.raises(ValueError, match=message) as error:
        made(MATRIX.replace(old, new, 1))
    assert "matrix" in str(error.value) or "base" in str(error.value)


def test_settings_of_the_command_replace_the_matrix_s():
    cells = made(seeds=[7], samples=5, steps=3)
    assert {cell.seed for cell in cells} == {7}
    assert {cell.scoring.samples for cell in cells} == {5}
    assert {cell.steps for cell in cells if cell.trained} == {3}


@pytest.mark.parametrize("name", matrix.presets())
def test_the_presets_stand_for_cells_that_can_be_trained(name, tmp_path):
    from benchmarks.lab.runner import check_rows

    published = tmp_path / "published"  # of the window that the presets of a published base have
    shutil.copytree(matrix.BASES / "256", published, ignore=shutil.ignore_patterns("*.safetensors"))
    about = json.loads((published / "config.json").read_text()) | {"max_position_embeddings": 8192}
    (published / "config.json").write_text(json.dumps(about))
    config = LabConfig(preset=name, model=str(published), dry_run=True, seeds=[0, 1])
    cells = matrix.cells(matrix.read_matrix(matrix.matrix_files(config)[0]), name, config)
    check_rows(cells)
    assert all(len({c.sha256 for c in cells if c.seed == seed}) for seed in {c.seed for c in cells})
    assert len({cell.sha256 for cell in cells}) == len(cells) == len({cell.name for cell in cells})


def test_the_cells_of_the_committed_rows_are_still_those_of_the_presets():
    """A changed arm would be another cell, and its published rows would belong to none, as those of arms that went."""
    path = Path(__file__).parents[3] / "paper_figures" / "data" / "measured" / "lab_results.jsonl.gz"
    rows = packed_rows(path)
    seeds = [0, 7, 19]  # of 0 to 19, of which some were run with the preset and some later
    kept = [row for row in rows if row["seed"] in seeds]
    published = {row["cell"]: (row["base"], row["fold"], row["arm"], row["seed"]) for row in kept}
    made = {}
    for name in ("micro", "micro-512-32", "search"):
        config = LabConfig(preset=name, seeds=seeds)
        for cell in matrix.cells(matrix.read_matrix(matrix.matrix_files(config)[0]), name, config):
            made[cell.sha256] = (cell.base, cell.fold, cell.arm, cell.seed)
    gone = {"relay+linear", "relay+yarn", "sentences-8+yarn", "randomised+yarn"}
    assert published.keys() & made.keys() == {cell for cell, (*_, arm, _) in published.items() if arm not in gone}
    assert published == published | {cell: made[cell] for cell in published.keys() & made.keys()}


def test_the_command_knows_the_settings_by_name(capsys):
    from importlib.metadata import EntryPoint

    from endprompt import cli

    entry = EntryPoint("lab", "benchmarks.commands:lab", cli.GROUP)
    assert cli.run(entry, ["--list-presets"]) == 0
    assert "smoke" in capsys.readouterr().out
    assert cli.run(entry, ["--preset", "smoke", "--dry-run", "--only", "arm=recall*", "seed=0", "--device", "cpu"]) == 0
    assert "1 cells" in capsys.readouterr().out
