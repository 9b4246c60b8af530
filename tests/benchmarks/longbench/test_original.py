"""LongBench held against its own code: prompts, cuts, metrics, results. docs/parity.md has the commands and numbers.

ENDPROMPT_LONGBENCH: the folder of THUDM/LongBench's clone with pred.py, eval.py, metrics.py, config. Beside it
ENDPROMPT_LONGBENCH_DATA: its data (TASK.jsonl); ENDPROMPT_LONGBENCH_PREDICTIONS: a folder with pred/MODEL/SET.jsonl,
pred_e/MODEL/SET.jsonl and their result.json; ENDPROMPT_TOKENIZERS: folders, separated as in PATH.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import random
import sys
import types
from pathlib import Path

import pytest

from benchmarks import longbench
from benchmarks.longbench import metrics
from benchmarks.longbench.sets import bucket
from endprompt.model import load_tokenizer
from tests.support import ruler_helpers
from tests.support.longbench_fixtures import documents

CLONE = Path(os.environ.get("ENDPROMPT_LONGBENCH", "none"))
PREDICTIONS = Path(os.environ.get("ENDPROMPT_LONGBENCH_PREDICTIONS", "none"))
TOKENIZERS = [Path(folder) for folder in os.environ.get("ENDPROMPT_TOKENIZERS", "").split(os.pathsep) if folder]
LLAMA2_CHAT = "{% for m in messages %}[INST]{{ m.content }}[/INST]{% endfor %}"  # as pred.py words it

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CLONE / "pred.py").is_file(), reason="needs ENDPROMPT_LONGBENCH"),
]


@pytest.fixture(scope="module")
def original():
    """pred.py and eval.py as modules; what they load of datasets and flash attention is not used."""
    pytest.importorskip("fuzzywuzzy")
    names = ("datasets", "llama_flash_attn_monkey_patch")
    before = {name: sys.modules.get(name) for name in names}
    for name, functions in zip(names, ("load_dataset", "replace_llama_attn_with_flash_attn")):
        sys.modules[name] = types.ModuleType(name)
        setattr(sys.modules[name], functions, None)
    sys.path.insert(0, str(CLONE))
    try:
        yield types.SimpleNamespace(pred=importlib.import_module("pred"), eval=importlib.import_module("eval"))
    finally:
        sys.path.remove(str(CLONE))
        for name, module in before.items():
            sys.modules.pop(name)
            if module:
                sys.modules[name] = module


def prompts_of(pred, tokenizer, task, items, limit, model, out, monkeypatch):
    """(text, ids) of what pred.py's own loop gives to a model, which answers nothing."""
    given = []

    class Reader:
        eos_token_id, decode, encode = tokenizer.eos_token_id, tokenizer.decode, tokenizer.encode

        def __call__(self, text, **options):
            self.last = text
            return tokenizer(text, **options)

    reader = Reader()

    def generate(input_ids, **options):
        given.append((reader.last, input_ids[0].tolist()))
        return input_ids

    fake = types.SimpleNamespace(generate=generate)
    monkeypatch.setattr(pred, "load_model_and_tokenizer", lambda *args: (fake, reader))
    monkeypatch.setattr(pred, "torch", types.SimpleNamespace(device=lambda name: "cpu"))
    monkeypatch.setattr(pred, "dist", types.SimpleNamespace(destroy_process_group=lambda: None))
    config = {
        name: json.loads((CLONE / "config" / f"{name}.json").read_text())
        for name in ("dataset2prompt", "dataset2maxlen")
    }
    form, new = (config[name][task.removesuffix("_e")] for name in config)
    assert new == longbench.dataset_of(task).max_new_tokens
    pred.get_pred(0, 1, items, limit, new, form, task.removesuffix("_e"), "cpu", model, {model: ""}, str(out))
    return given


def compare(original, tokenizer, task, items, limit, tmp_path, monkeypatch, chat):
    items = [{"all_classes": None, **item} for item in items]
    theirs = prompts_of(
        original.pred, tokenizer, task, items, limit, "llama2" if chat else "plain", tmp_path / "out", monkeypatch
    )
    options = {"documents": longbench.Documents(task, items, {}), "prompt_length": limit, "window": limit + 2048}
    if chat:
        tokenizer.chat_template = LLAMA2_CHAT
        options["chat_template"] = lambda messages, **given: tokenizer.apply_chat_template(messages, tokenize=False)
    ours = longbench.build_samples(task, tokenizer, **options)
    assert [sample["input"] for sample in ours] == [text for text, _ in theirs]
    assert [sample["length"] for sample in ours] == [len(ids) for _, ids in theirs]
    return sum(sample["truncated"] for sample in ours)


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
@pytest.mark.parametrize("task", longbench.TASKS)
def test_prompts_of_made_documents_are_the_originals(task, chat, original, tmp_path, monkeypatch):
    for kind in ("bytes", "metaspace"):
        for limit in (200, 301, 20_000):
            tokenizer = ruler_helpers.tokenizer(kind)
            compare(original, tokenizer, task, documents(task), limit, tmp_path, monkeypatch, chat)


@pytest.mark.parametrize("limit", [3500, 7500])
@pytest.mark.parametrize("folder", TOKENIZERS, ids=lambda folder: folder.name)
@pytest.mark.parametrize("task", longbench.TASKS + longbench.TASKS_E)
def test_prompts_of_real_documents_are_the_originals(task, folder, limit, original, tmp_path, monkeypatch):
    try:
        items = longbench.load_documents(task, os.environ.get("ENDPROMPT_LONGBENCH_DATA")).items
    except FileNotFoundError as error:
        pytest.skip(str(error))
    cut = compare(
        original,
        load_tokenizer(folder),
        task,
        items,
        limit,
        tmp_path,
        monkeypatch,
        task in ("qasper", "multifieldqa_zh"),
    )
    print(f"{task} {folder.name} {limit}: {len(items)} prompts equal, {cut} of them cut")


def ours(name, record, classes, indel=False):
    """Score of one prediction by ours, in [0, 1]; code by the reading that the installed fuzzywuzzy has."""
    if indel and longbench.dataset_of(name).metric == "code_similarity":
        return max(metrics.code_similarity_levenshtein(record["pred"], answer) for answer in record["answers"])
    return longbench.score(name, record["pred"], record["answers"], classes) / 100


def indel():
    import difflib

    from fuzzywuzzy import fuzz

    return fuzz.SequenceMatcher is not difflib.SequenceMatcher


def files(kind):
    return sorted(PREDICTIONS.glob(f"{kind}/*/*.jsonl"))


@pytest.mark.parametrize("file", files("pred") + files("pred_e"), ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_published_predictions_have_the_originals_result(file, original):
    name, extended = file.stem, file.parents[1].name == "pred_e"
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    classes = records[-1]["all_classes"]  # as eval.py takes them
    scores = [ours(name, record, classes, indel()) for record in records]
    given = [[record[key] for record in records] for key in ("pred", "answers")]
    if extended:
        theirs = original.eval.scorer_e(name, *given, [record["length"] for record in records], classes)
        found = {
            key: [score for score, record in zip(scores, records) if bucket(record["length"]) == key] for key in theirs
        }
        mine = {key: round(100 * sum(part) / len(part), 2) if part else math.nan for key, part in found.items()}
        assert mine == pytest.approx(theirs, abs=1e-9, nan_ok=True)
    else:
        assert round(100 * sum(scores) / len(scores), 2) == original.eval.scorer(name, *given, classes)


@pytest.mark.parametrize("name", longbench.TASKS)
def test_made_predictions_have_the_originals_scores(name, original):
    """Answers, whole, cut, doubled, mixed with other text, empty: item by item."""
    rng, values = random.Random(name), set()
    items = documents(name)
    for _ in range(300):
        item = rng.choice(items)
        pieces = [
            *item["answers"],
            item["context"][: rng.randint(0, 60)],
            "\n",
            " ",
            "#",
            "`",
            "7",
            "12 7",
            "段落7",
            "Person",
            ".",
            "",
        ]
        prediction = rng.choice(["", "\n", " "]) + rng.choice(["", " ", "\n"]).join(
            rng.choices(pieces, k=rng.randint(0, 4))
        )
        prediction = prediction[: rng.choice([5, 20, 400])]
        classes = item["all_classes"]
        theirs = original.eval.scorer(name, [prediction], [item["answers"]], classes)
        mine = round(100 * ours(name, {"pred": prediction, "answers": item["answers"]}, classes, indel()), 2)
        assert mine == theirs, (prediction, item["answers"])
        values.add(mine)
    assert len(values) > 2
