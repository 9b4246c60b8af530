"""OpenAI's MRCR in `endprompt score`: conversations with 2, 4 or 8 alike requests; one's answer is wanted again.

Data, grade and places as in the data set's own card (openai/mrcr): an answer counts if it begins with the sample's
random characters, by the ratio of difflib's SequenceMatcher. Conversations that do not fit the window are left out, as
there; the row counts them. Tokens are the checkpoint's own where the card counts o200k_base's.
"""

from __future__ import annotations

import difflib
from typing import Any

from benchmarks import originals
from benchmarks.scoring.evaluate import MeanSuite
from benchmarks.scoring.units import Asker, Unit
from endprompt.files import parse_json, read_json_lines, read_parquet, remembered_sha256

NEEDLES = (2, 4, 8)
NEW_TOKENS = 2048
READERS = {".parquet": read_parquet, ".jsonl": read_json_lines}


class Mrcr(MeanSuite):
    generator = "mrcr-1"

    def units(self, asker: Asker) -> list[Unit]:
        """Raises ValueError for data that are missing or no conversations, and a window that holds none of them."""
        config = self.config
        if not config.chat:
            raise ValueError("suite mrcr is made of conversations: it needs chat, and a tokenizer with a chat template")
        names = asker.names([f"mrcr_{needles}" for needles in NEEDLES])
        new, made = config.max_new_tokens or NEW_TOKENS, []
        found = {name: read(name, config.data_dir) for name in names}  # all files are read before the first prompt
        for name in names:
            sha256, rows = found[name]
            every = [asker.sample(row["prompt"], [row["answer"]], new, begin=row["begin"]) for row in rows]
            fitting = [sample for sample in every if sample["length"] + new <= asker.window]
            if not fitting:
                raise ValueError(
                    f"{name}: no conversation fits the window {asker.window} with {new} tokens for the answer"
                )
            columns: dict[str, Any] = {"n_over_window": len(every) - len(fitting), "data_sha256": sha256}
            samples = fitting[: config.limit]
            made.append(asker.unit(name, None, "sequence_matcher", samples, grade, self.generator, **columns))
        return made


def read(name: str, data_dir: str | None) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """(sha256 of the files, conversations) of a task. Raises ValueError with file and row, and as `data_file` does."""
    paths, rows = [originals.data_file("mrcr", f"{name}_{part}", data_dir) for part in (0, 1)], []
    every = ((f"{path}, row {number}", row) for path in paths for number, row in READERS[path.suffix](path))
    for where, row in every:
        text, answer, begin = (row.get(key) for key in ("prompt", "answer", "random_string_to_prepend"))
        if not (isinstance(text, str) and isinstance(answer, str) and isinstance(begin, str)):
            raise ValueError(f"{where}: must have prompt, answer and random_string_to_prepend as texts")
        prompt = parse_json(text, f"{where}, prompt")
        turns = prompt if isinstance(prompt, list) else [None]
        if not all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in turns):
            raise ValueError(f"{where}: prompt must be a JSON list of messages with role and content")
        if not answer.startswith(begin):
            raise ValueError(f"{where}: answer must begin with random_string_to_prepend: {begin!r}")
        rows.append({"prompt": prompt, "answer": answer, "begin": begin})
    return {path.name: remembered_sha256(path) for path in paths}, rows


def grade(sample: dict[str, Any], answer: str) -> float:
    begin = sample["begin"]
    if not answer.startswith(begin):
        return 0.0
    return difflib.SequenceMatcher(None, answer.removeprefix(begin), sample["outputs"][0].removeprefix(begin)).ratio()


SUITE = Mrcr
