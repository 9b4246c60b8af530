"""The largest haystack at which prompt and generation fit a budget."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.ruler.tokens import Assemble, Count, word_counter

if TYPE_CHECKING:
    from benchmarks.ruler.source import Draft, Source

# Every prompt of a cell of at most this many tokens is tokenized whole; a larger one relies on sums that were checked
# on this many whole prompts, on more prompts with the smallest haystack, and on documents of a library.
EXACT_TOKENS = 1_000_000

CHECKED_SAMPLES = 4

SEARCH_STEPS = 20


def fit(
    length: int, made: Source, drafts: Sequence[Draft], kept: int, count: Count, assemble: Assemble
) -> list[tuple[Any, int]]:
    """(state, prompt tokens) of the fullest haystack of each sample within length - kept tokens. Raises ValueError
    naming the shortest possible length if the smallest haystack does not fit.
    """

    def measure(drafts: Sequence[Draft], states: Sequence[Any]) -> list[int]:
        return count([assemble(*draft.render(state)) for draft, state in zip(drafts, states)])

    room, n = length - kept, len(drafts)
    exact = n * length <= EXACT_TOKENS
    if room > 0:
        made.prepare(drafts, room)
    first = drafts if exact else drafts[:CHECKED_SAMPLES]
    smallest = measure(first, [draft.empty for draft in first])
    if max(smallest) > room:
        raise too_short(made, n, kept, max(smallest) + kept, measure)
    cores = [draft.core() for draft in drafts]
    prompts = [assemble(*prompt) for prompt, _ in cores]
    by_words = word_counter(made.costs, count, prompts)
    bare = [tokens + left for tokens, (_, left) in zip(by_words(prompts), cores)]
    sums = functools.partial(summed, count=by_words, assemble=assemble)
    checked, errors = foretold(first, smallest, bare[: len(first)], room, measure, sums)
    if exact:
        return checked
    if len(errors) > 1:
        smallest = measure(drafts, [draft.empty for draft in drafts])
        if max(smallest) > room:
            raise too_short(made, n, kept, max(smallest) + kept, measure)
        return search(drafts, smallest, room, measure)
    # On every checked prompt the sums are right, or off by the same constant: trust them.
    fitted = arithmetic(drafts[CHECKED_SAMPLES:], bare[CHECKED_SAMPLES:], room, errors.pop(), sums)
    if (most := max((tokens for _, tokens in fitted), default=0)) > room:
        raise too_short(made, n, kept, most + kept, measure)
    return checked + fitted


def too_short(made: Source, n: int, kept: int, candidate: int, measure: Callable[..., list[int]]) -> ValueError:
    return ValueError(
        f"length is too short for task {made.task}: {made.length}; the shortest possible is "
        f"{shortest(made, n, kept, candidate, measure)} with this tokenizer and {kept} tokens kept for generation"
    )


def shortest(made: Source, n: int, kept: int, candidate: int, measure: Callable[..., list[int]]) -> int:
    """A length at which every sample fits, close above the smallest haystack (samples differ from length to length)."""
    while True:
        source = dataclasses.replace(made, length=candidate)
        drafts = [source.draw(i) for i in range(n)]
        needed = max(measure(drafts, [draft.empty for draft in drafts])) + kept
        if needed <= candidate:
            return candidate
        candidate = needed


Sums = Callable[[Sequence["Draft"], Sequence[int], Sequence[Any]], list[int]]


def summed(
    drafts: Sequence[Draft], bare: Sequence[int], states: Sequence[Any], count: Count, assemble: Assemble
) -> list[int]:
    """Prompt tokens: of each cut prompt, plus the inner parts that were cut. bare: tokens of the smallest prompts."""
    cut = [draft.cut(state) for draft, state in zip(drafts, states)]
    measured = iter(count([assemble(*prompt) for prompt, _ in cut if prompt is not None]))
    return [removed + (empty if prompt is None else next(measured)) for (prompt, removed), empty in zip(cut, bare)]


def foretold(
    drafts: Sequence[Draft],
    smallest: Sequence[int],
    bare: Sequence[int],
    room: int,
    measure: Callable[..., list[int]],
    sums: Sums,
) -> tuple[list[tuple[Any, int]], set[int]]:
    """What `search` finds, and by how much the sums are below the truth there. The search goes by sums, and only its
    results are tokenized. If all sums were off by the same number, it is repeated with that added; else with the
    tokenizer at every step. smallest: tokens of the smallest prompts; bare: their sums.
    """
    bare_of, shift = {id(draft): tokens for draft, tokens in zip(drafts, bare)}, 0

    def told(some: Sequence[Draft], states: Sequence[Any]) -> list[int]:
        return [tokens + shift for tokens in sums(some, [bare_of[id(draft)] for draft in some], states)]

    for _ in range(2):
        found = search(drafts, smallest, room, told)
        states = [state for state, _ in found]
        true = measure(drafts, states)
        errors = {tokens - guess for tokens, guess in zip(true, told(drafts, states))}
        if errors == {0}:
            return list(zip(states, true)), {shift}
        if len(errors) > 1:
            break
        shift += errors.pop()
    found = search(drafts, smallest, room, measure)
    total = sums(drafts, bare, [state for state, _ in found])
    return found, {tokens - guess for (_, tokens), guess in zip(found, total)}


def arithmetic(
    drafts: Sequence[Draft], bare: Sequence[int], room: int, shift: int, sums: Sums
) -> list[tuple[Any, int]]:
    """(state, tokens) of each draft with sums that were found to be `shift` below the truth."""
    targets = [room - tokens - shift for tokens in bare]
    fitted: list[Any] = [None] * len(drafts)
    open_ = list(range(len(drafts)))
    while open_:
        states = [drafts[i].fill(max(0, targets[i]))[0] for i in open_]
        late = []
        for i, state, tokens in zip(open_, states, sums([drafts[i] for i in open_], [bare[i] for i in open_], states)):
            if tokens + shift <= room or targets[i] <= 0:
                fitted[i] = (state, tokens + shift)
            else:
                targets[i] -= tokens + shift - room
                late.append(i)
        open_ = late
    return fitted


def search(
    drafts: Sequence[Draft], bare: Sequence[int], room: int, measure: Callable[..., list[int]]
) -> list[tuple[Any, int]]:
    """(state, tokens) of the fullest prompts, found by tokenizing whole prompts. The target given to the arithmetic is
    moved between the largest that fits and the smallest that does not, by interpolation, so even sums that are far off
    lead to a full prompt.
    """
    best: list[tuple[Any, int]] = [(draft.empty, tokens) for draft, tokens in zip(drafts, bare)]
    targets = [room - tokens for tokens in bare[: len(drafts)]]
    below = [(0, tokens) for tokens in bare]  # (target, prompt tokens)
    above: list[tuple[int, int] | None] = [None for _ in drafts]
    seen: list[dict[str, int]] = [{} for _ in drafts]
    open_ = list(range(len(drafts)))
    for step in range(SEARCH_STEPS):
        states = {i: drafts[i].fill(targets[i])[0] for i in open_}
        new = [i for i in open_ if repr(states[i]) not in seen[i]]
        for i, tokens in zip(new, measure([drafts[i] for i in new], [states[i] for i in new])):
            seen[i][repr(states[i])] = tokens
        still = []
        for i in open_:
            tokens = seen[i][repr(states[i])]
            if tokens <= room:
                below[i] = (targets[i], tokens)
                if tokens >= best[i][1]:
                    best[i] = (states[i], tokens)
            else:
                above[i] = (targets[i], tokens)
            last, target = targets[i], between(below[i], above[i], bare[i], room, halve=step % 4 == 3)
            targets[i] = target
            # Sums that were right have found the fullest prompt once a larger target changes nothing.
            closed = above[i] is not None and target >= above[i][0]  # type: ignore[index]
            if target != last and not closed and (i in new or tokens > room):
                still.append(i)
        open_ = still
        if not open_:
            break
    return best


def between(below: tuple[int, int], above: tuple[int, int] | None, bare: int, room: int, halve: bool) -> int:
    """The next target to try, from the (target, tokens) that fit and those that do not."""
    low, tokens = below
    if above is None:
        rate = max((tokens - bare) / low, 0.05) if low > 0 else 1.0
        return low + max(1, int((room - tokens) / rate))
    high, over = above
    share = 0.5 if halve else (room - tokens) / max(1, over - tokens)
    return min(max(low + 1, low + int((high - low) * share)), high - 1) if high - low > 1 else high
