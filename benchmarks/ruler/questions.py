"""Questions to documents: the tasks qa_1 and qa_2."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.ruler import texts
from benchmarks.ruler.source import Draft, Source, frozen
from benchmarks.ruler.tokens import Costs

CHECKED_DOCUMENTS = 512


def question_of(library: texts.Library, index: int, task: str) -> texts.Question:
    """The question of sample `index`. Raises ValueError if there are not so many."""
    if index >= len(library.questions):
        raise ValueError(
            f"samples of {task} must be at most the questions of {library.name}: "
            f"{len(library.questions)}, got index {index}"
        )
    return library.questions[index]


def document_context(documents: Sequence[str]) -> str:
    """Numbered documents as they stand in the prompt."""
    return "\n\n".join(document_block(number, document) for number, document in enumerate(documents, 1))


def batch_size(room: int) -> int:
    """Documents that are tried together."""
    return max(16, room // 256)


def document_block(number: int, document: str) -> str:
    return texts.document_prompt().format(i=number, document=document)


class DocumentCosts:
    """Tokens of a library's documents as "Document 1", measured when first asked for, the same at every length. A
    document costs as much as its words, if that is so for all of CHECKED_DOCUMENTS; one with other white space than
    single spaces is tokenized whole.
    """

    def __init__(self, tokenizer: Any, documents: Sequence[str]):
        self.costs, self.documents = Costs(tokenizer), documents
        self._known = np.full(len(documents), -1, dtype=np.int64)

    def of(self, wanted: Sequence[int] | np.ndarray) -> np.ndarray:
        """int64 [documents]: tokens of each of the documents."""
        places = np.asarray(wanted, dtype=np.int64)
        new = np.unique(places[self._known[places] < 0]).tolist()
        if new:
            blocks = [self.block(self.documents[i]) for i in new]
            self._known[new] = (self.costs.texts if self.words_add_up else self.costs.count)(blocks)
            self._known[new] -= self.bare
        return self._known[places]

    @staticmethod
    def block(document: str) -> str:
        return f"a\n\n{document_block(1, document)}\n\nDocument 1"

    @functools.cached_property
    def bare(self) -> int:
        return self.costs.count(["a\n\nDocument 1"])[0]

    @functools.cached_property
    def shortest(self) -> int:
        """Tokens of a document of one letter."""
        return self.costs.count([self.block("a")])[0] - self.bare

    @functools.cached_property
    def words_add_up(self) -> bool:
        if len(self.documents) <= CHECKED_DOCUMENTS:
            return False
        places = np.linspace(0, len(self.documents) - 1, CHECKED_DOCUMENTS).astype(int)
        some = [self.block(self.documents[i]) for i in places]
        return self.costs.texts(some) == self.costs.count(some)


@functools.lru_cache(maxsize=4)
def kept_costs(tokenizer: Any, entries: int, library_sha256: str) -> list[DocumentCosts]:
    """Place of the costs of one library, for all lengths (the library itself would be slow to hash)."""
    return []


class DocumentDraft(Draft):
    """State: document indices in the order of the prompt's list before the final shuffle."""

    TRIES = 12  # further documents tried once one did not fit

    def __init__(self, made: DocumentSource, question: texts.Question, rng: random.Random):
        self.made, self.question = made, question
        self.outputs = list(question.answers)
        self.empty = list(question.context)
        self._key = rng.getrandbits(64)
        self._candidates = np.zeros(0, dtype=np.int64)

    def candidates(self, count: int) -> np.ndarray:
        """int64 [count]: documents of the same article, then others, then all again: in random order."""
        if len(self._candidates) < count:
            self._candidates = self.drawn(count)
        return self._candidates[:count]

    def drawn(self, count: int) -> np.ndarray:
        rng = random.Random(self._key)
        related = list(self.question.related)
        rng.shuffle(related)
        total = len(self.made.library.documents)
        first = np.array([*self.question.context, *related], dtype=np.int64)
        others = frozen(rng).permutation(total)[: count + len(first)]
        blocks = [first[len(self.question.context) :], others[~np.isin(others, first)]]
        while sum(map(len, blocks)) < count:
            blocks.append(frozen(rng).permutation(total))
        return np.concatenate(blocks)[:count]

    def fill(self, room: int) -> tuple[list[int], int]:
        chosen, total = list(self.empty), 0
        size, seen, misses = batch_size(room), 0, 0
        base = self.made.number_sums(len(chosen))[len(chosen)]
        most = self.made.length // 8 - 49  # a document takes 8 tokens at least
        while misses < self.TRIES and len(chosen) <= most:
            seen += size
            if seen > len(self._candidates):
                self.candidates(2 * seen)
            batch = self.candidates(seen)[-size:]
            numbers = self.made.number_sums(len(chosen) + size)
            costs = self.made.document_costs.of(batch)
            sums = total + np.cumsum(costs) + numbers[len(chosen) + 1 : len(chosen) + size + 1]
            fitting = int(np.searchsorted(sums, room + base, side="right"))
            chosen += batch[:fitting].tolist()
            total += int(costs[:fitting].sum())
            for i, cost in zip(batch[fitting:].tolist(), costs[fitting:].tolist()):
                if total + cost + numbers[len(chosen) + 1] - base <= room:
                    chosen.append(i)
                    total += cost
                else:
                    misses += 1
        return chosen, total + int(self.made.number_sums(len(chosen))[len(chosen)] - base)

    def core(self) -> tuple[tuple[str, str], int]:
        """With one document, which stands for all: their tokens are known."""
        numbers, costs = self.made.number_sums(len(self.empty)), self.made.document_costs
        left = int(costs.of(self.empty).sum() + numbers[len(self.empty)]) - costs.shortest
        return texts.question("qa", query=self.question.text, context=document_context(["a"])), left

    def cut(self, state: Sequence[int]) -> tuple[None, int]:
        numbers, least = self.made.number_sums(len(state)), len(self.empty)
        return None, int(self.made.document_costs.of(state[least:]).sum() + numbers[len(state)] - numbers[least])

    def shuffled(self, state: Sequence[int]) -> list[int]:
        """Order of the documents in the prompt: places in `state`."""
        order = list(range(len(state)))
        random.Random(self._key ^ 1).shuffle(order)
        return order

    def render(self, state: Sequence[int]) -> tuple[str, str]:
        documents = self.made.library.documents
        context = document_context([documents[state[i]] for i in self.shuffled(state)])
        return texts.question("qa", query=self.question.text, context=context)

    def depth(self, state: Sequence[int]) -> list[float]:
        order = self.shuffled(state)
        return [round(100 * order.index(0) / max(1, len(state) - 1), 2)] * len(self.outputs)


@dataclass
class DocumentSource(Source):
    library: texts.Library = None  # type: ignore[assignment]

    @property
    def questions(self) -> dict[str, Any]:
        return {"count": len(self.library.questions), "whole": self.library.whole}

    def draw(self, index: int) -> Draft:
        return DocumentDraft(self, question_of(self.library, index, self.task), self.rng(index))

    @functools.cached_property
    def document_costs(self) -> DocumentCosts:
        known = kept_costs(self.tokenizer, len(self.tokenizer), self.library.sha256)
        if not known:
            known.append(DocumentCosts(self.tokenizer, self.library.documents))
        return known[0]

    def number_costs(self, numbers: range) -> np.ndarray:
        """What the number takes more than 1 does, so that the costs of documents have the 1."""
        costs = self.costs.of([document_block(i, "a") + "\n\n" for i in (1, *numbers)], "a\n\n", "Document")
        return costs[1:] - costs[0]

    def prepare(self, drafts: Sequence[Draft], room: int) -> None:
        known, own = self.document_costs, [draft for draft in drafts if isinstance(draft, DocumentDraft)]
        needed = known.of(np.concatenate([draft.empty for draft in own]))
        left, size = max(0, room - int(needed.sum()) // len(own)), batch_size(room)
        # About as many as a sample tries, in whole batches.
        count = size * math.ceil((left / needed.mean() + DocumentDraft.TRIES) / size)
        known.of(np.concatenate([draft.candidates(count) for draft in own]))
