"""The shipped recipes: each is found, says where its numbers come from, and trains."""

import gzip
import json
from pathlib import Path

import pytest
import yaml

import benchmarks
import endprompt
import paper_figures
from endprompt import cli, train
from endprompt.config import ExtendConfig, check_config, method_name
from endprompt.data import rows
from tests.support.checkpoints import make_checkpoint

FILES = sorted((Path(endprompt.__file__).parent / "recipes" / "extend").glob("*.yaml"))
NAMES = [path.stem for path in FILES]

STUDY = "recall-smollm2-135m-64k"


def recipe(name):
    return yaml.safe_load((FILES[0].parent / f"{name}.yaml").read_text(encoding="utf-8"))


def test_recipes_are_listed_with_their_first_line(capsys):
    assert cli.main(["extend", "--list-recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == NAMES
    assert any("the paper's main run" in line for line in lines)


def test_recipe_is_a_configuration_that_flags_override(capsys):
    with pytest.raises(SystemExit) as raised:
        cli.main(["extend", "--recipe", "pose-llama3-8b-64k", "--lr", "1e-5", "--print_config"])
    assert raised.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["scheme"], shown["lr"], shown["tokens"]) == ("pose", 1e-5, 1_000_000_000)


def test_every_method_of_the_paper_has_a_recipe():
    configs = [ExtendConfig(**recipe(name)) for name in NAMES]
    assert {c.scheme for c in configs} == {
        "contiguous", "endprompt", "endprompt-random", "pose", "endprompt-pose", "anchors",
        "sliding", "sentences", "endprompt-sentences",
    }  # fmt: skip
    assert {c.scaling for c in configs} == {"none", "linear", "ntk", "dynamic", "yarn", "llama3", "longrope"}
    assert {c.prompt for c in configs} == {None, "EP_1", "EP_2", "EP_3", "recall", "question"}
    assert {c.target for c in configs} == {32768, 65536, 98304, 131072}
    assert len({method_name(c) + str(c.row_tokens) + str(c.target) + str(c.lora_rank) for c in configs}) > 15


@pytest.mark.parametrize("name", NAMES)
def test_recipe_says_what_is_published_and_what_is_ours(name):
    text = (FILES[0].parent / f"{name}.yaml").read_text(encoding="utf-8")
    header = text.partition("\n\n")[0]
    for part in ("# Published: ", "# Read from the authors' code: ", "# Our choice: "):
        assert part in header
    config = ExtendConfig(model="m", data=["d"], output="o", **recipe(name))
    check_config(config)
    if name == STUDY:
        return
    assert (config.lr, config.warmup, config.schedule, config.weight_decay) == (2e-5, 20, "constant", 0.0)
    tokens = config.rows * config.row_tokens
    assert tokens == 64 * 8192  # a step has the paper's tokens, whatever the length of its rows


def test_recipe_of_the_study_is_the_arm_of_its_rows():
    """The settings that the rows of the study's best arm state, after 50 million tokens, and those of its preset."""
    lab = Path(benchmarks.__file__).parent / "lab"
    stated = yaml.safe_load((lab / "smollm2.yaml").read_text(encoding="utf-8"))["train"]
    rows_of = Path(paper_figures.__file__).parent / "data" / "measured" / "pages" / "smollm2_50m.jsonl.gz"
    lines = [json.loads(line) for line in gzip.decompress(rows_of.read_bytes()).splitlines()]
    row = next(line for line in lines if line["arm"] == "recall+yarn")
    config = ExtendConfig(**recipe(STUDY))
    shared = stated.keys() - {"steps"}
    assert {key: getattr(config, key) for key in shared} == {key: stated[key] for key in shared}
    for key in ("target", "scaling", "scheme", "prompt", "recall_span", "row_tokens", "rows", "steps", "lr"):
        assert getattr(config, key) == row[key], key


def test_main_run_is_the_published_one():
    config = ExtendConfig(**recipe("endprompt-llama3-8b-64k"))
    assert (config.target, config.row_tokens, config.rows, config.tokens) == (65536, 8192, 64, 10**9)
    assert (config.scheme, config.scaling, config.prompt) == ("endprompt", "linear", "EP_1")
    assert rows.total_steps(config, 8192) == 1907


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("small") / "m", max_position_embeddings=64)


def covering() -> list[str]:
    """Recipes in which every value of every setting occurs, but for targets, weights and the words of a cue."""
    settings = {name: {(k, str(v)) for k, v in recipe(name).items() if k not in ("target", "prompt_weight")
                       and not str(v).startswith("EP_")} for name in NAMES}  # fmt: skip
    left, chosen = set().union(*settings.values()), []
    while left:
        chosen.append(max(NAMES, key=lambda name: len(left & settings[name])))
        left -= settings[chosen[-1]]
    return chosen


@pytest.mark.parametrize("name", [*covering()[:3], *(pytest.param(n, marks=pytest.mark.slow) for n in covering()[3:])])
def test_recipe_trains_when_scaled_down(name, small, documents, tmp_path):
    """Every length divided by 128, two rows, one step."""
    values = recipe(name)
    values |= {"model": str(small), "data": [str(documents)], "output": str(tmp_path / "out"), "device": "cpu"}
    values |= {"target": values["target"] // 128, "row_tokens": max(64, values["row_tokens"] // 128)}
    values |= {"rows": 2, "tokens": None, "steps": 1, "short_documents": "pack"}
    if values.get("prompt") == "EP_2":  # a token of Llama 3's vocabulary
        values["prompt"] = "EP_3"
    if values.get("prompt") in ("recall", "question"):
        values |= {"recall_span": 12, "recall_given": 4}
    output = train.extend(ExtendConfig(**values))
    saved = json.loads((output / "config.json").read_text())
    assert saved["max_position_embeddings"] == (64 if values["scaling"] == "dynamic" else values["target"])
    assert saved["dtype"] == "bfloat16"
