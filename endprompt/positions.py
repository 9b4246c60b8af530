"""Position schemes: which position ids the tokens of a training row get, and which distances that shows the model.

A row is a context of `context` tokens followed by an end prompt of `prompt` tokens (0 for none); `target` is the
extended window L. Everything here counts tokens and is a pure function of its arguments: randomness comes from a
generator made of (seed, sample index), so resume is exact and the number of workers does not matter.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Intervals = list[tuple[int, int]]


@dataclass(frozen=True)
class Layout:
    """position_ids: int64 (context + prompt,), strictly increasing, all below the target. split: index of the first
    token of the second chunk in the context (PoSE), or None if the context is one piece.
    """

    position_ids: np.ndarray
    split: int | None = None


def sample_rng(seed: int, index: int) -> np.random.Generator:
    """The generator of one sample: a pure function of (seed, sample index), both >= 0."""
    if seed < 0 or index < 0:
        raise ValueError(f"seed and sample index must not be negative: {seed=} {index=}")
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, index])))


def contiguous(context: int, prompt: int, target: int, rng: np.random.Generator | None = None) -> Layout:
    """0..n-1. Short: interpolation alone, the control. n = target: full-length training."""
    return Layout(np.arange(context + prompt, dtype=np.int64))


def endprompt(context: int, prompt: int, target: int, rng: np.random.Generator | None = None) -> Layout:
    """Context at 0..a-1, end prompt at L-b..L-1 (EndPrompt, section 3)."""
    return Layout(_with_terminal(np.arange(context, dtype=np.int64), prompt, target - prompt))


def endprompt_random(context: int, prompt: int, target: int, rng: np.random.Generator | None = None) -> Layout:
    """The end prompt starts at a place drawn uniformly from [a, L-b] (one reading of ET(PoSE))."""
    start = int(_need(rng, "endprompt-random").integers(context, target - prompt, endpoint=True))
    return Layout(_with_terminal(np.arange(context, dtype=np.int64), prompt, start))


def anchors(
    context: int, prompt: int, target: int, rng: np.random.Generator | None = None, *, count: int = 4
) -> Layout:
    """The end prompt ends at one of `count` equally spaced places k L / count, k = 1..count, drawn uniformly."""
    ends = anchor_ends(context, prompt, target, count)
    end = ends[int(_need(rng, "anchors").integers(count))]
    return Layout(_with_terminal(np.arange(context, dtype=np.int64), prompt, end - prompt))


def anchor_ends(context: int, prompt: int, target: int, count: int) -> list[int]:
    """Exclusive ends of the anchors. Raises ValueError if the first one would fall into the context."""
    if count < 1:
        raise ValueError(f"anchors needs at least one anchor: {count=}")
    ends = [k * target // count for k in range(1, count + 1)]
    if ends[0] < context + prompt:
        raise ValueError(
            f"the first of {count} anchors would end inside the context: it ends at {ends[0]}, which must be at least "
            f"context + prompt = {context + prompt} ({target=})"
        )
    return ends


def pose(context: int, prompt: int, target: int, rng: np.random.Generator | None = None) -> Layout:
    """PoSE (Zhu et al. 2023, arXiv:2309.10400): two chunks, the first of r ~ U{1..(n+1)//2} tokens, the second moved
    forward by u ~ U{0..L-n}; n counts the context and the prompt, which has no place of its own.
    """
    n = context + prompt
    positions, split = _two_chunks(n, target - n, _need(rng, "pose"))
    return Layout(positions, split)


def endprompt_pose(context: int, prompt: int, target: int, rng: np.random.Generator | None = None) -> Layout:
    """PoSE in the context, then the end prompt at L-b..L-1 (the other reading of ET(PoSE), the paper's best)."""
    positions, split = _two_chunks(context, target - prompt - context, _need(rng, "endprompt-pose"))
    return Layout(_with_terminal(positions, prompt, target - prompt), split)


def sliding(context: int, prompt: int, target: int, rng: np.random.Generator | None = None) -> Layout:
    """The first token at 0, the end prompt at L-b..L-1, the rest of the text in one piece from 1 + u, u ~ U{0..L-n}
    (ours). This imitates a window of a long document: attention falls on the first token wherever the query is (Xiao et
    al. 2023, arXiv:2309.17453), the question stands at the end, and what it asks for lies at a uniform depth.
    """
    shift = int(_need(rng, "sliding").integers(0, target - prompt - context, endpoint=True))
    positions = np.arange(context, dtype=np.int64)
    positions[1:] += shift
    return Layout(_with_terminal(positions, prompt, target - prompt))


PIECES = 3  # of a context cut at ends of sentences


Starts = Sequence[int] | None


def sentences(
    context: int, prompt: int, target: int, rng: np.random.Generator | None = None, *, starts: Starts = None
) -> Layout:
    """What is left of a long document of which only some sentences were kept, each at its place (ours). Pieces begin at
    `starts` (rising from 0; default three equal ones): PoSE with stratified places and no torn sentence.
    """
    n = context + prompt
    return _spread(sentence_starts(n) if starts is None else starts, n, target, _need(rng, "sentences"), "sentences")


def endprompt_sentences(
    context: int, prompt: int, target: int, rng: np.random.Generator | None = None, *, starts: Starts = None
) -> Layout:
    """`sentences` in the context, then the end prompt at L-b..L-1 (ours), as endprompt-pose is to pose."""
    begin = sentence_starts(context) if starts is None else starts
    name = "endprompt-sentences"
    placed = _spread(begin, context, target - prompt, _need(rng, name), name)
    return Layout(_with_terminal(placed.position_ids, prompt, target - prompt))


def sentence_starts(n: int) -> list[int]:
    """Where equal pieces of a row of n tokens begin, as many as the sentences scheme makes."""
    pieces = min(PIECES, n)
    return [piece * n // pieces for piece in range(pieces)]


SCHEMES: dict[str, Callable[..., Layout]] = {
    scheme.__name__.replace("_", "-"): scheme
    for scheme in (contiguous, endprompt, endprompt_random, pose, endprompt_pose, anchors, sliding, sentences,
                   endprompt_sentences)
}  # fmt: skip
#: Schemes whose end prompt has a place of its own; the others train without one.
WITH_PROMPT = frozenset(
    {"endprompt", "endprompt-random", "endprompt-pose", "anchors", "sliding", "endprompt-sentences"}
)
#: Schemes that move pieces of the context, cut at ends of sentences, apart.
BY_SENTENCE = frozenset({"sentences", "endprompt-sentences"})
#: Schemes whose text keeps its distances from the second token on: a jump only stands where a text ends.
TEXT_WHOLE = frozenset({"contiguous", "endprompt", "endprompt-random", "anchors", "sliding"})


def layout(
    scheme: str, context: int, prompt: int, target: int, rng: np.random.Generator | None = None, **options: Any
) -> Layout:
    """Positions of one row by the scheme's name. Raises ValueError naming key, value and rule."""
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}: {scheme=}")
    check_sizes(context, prompt, target, scheme)
    return SCHEMES[scheme](context, prompt, target, rng, **options)


def position_ids(
    scheme: str, context: int, prompt: int, target: int, rng: np.random.Generator | None = None, **options: Any
) -> np.ndarray:
    """Position ids of one row, int64 (context + prompt,). `options`: count (anchors), starts (by sentence)."""
    return layout(scheme, context, prompt, target, rng, **options).position_ids


def check_sizes(context: int, prompt: int, target: int, scheme: str | None = None) -> None:
    """Raises ValueError for sizes that fit no row, or not one of this scheme."""
    if context < 1:
        raise ValueError(f"the context needs at least one token: {context=}")
    if prompt < 0:
        raise ValueError(f"the end prompt's length must not be negative: {prompt=}")
    if scheme in WITH_PROMPT and not prompt:
        raise ValueError(f"scheme {scheme!r} places an end prompt, which must have at least one token: {prompt=}")
    if prompt >= target:
        raise ValueError(f"the end prompt must be shorter than the target window: {prompt=} {target=}")
    if context + prompt > target:
        raise ValueError(f"context and end prompt must fit into the target window: {context=} {prompt=} {target=}")


def observed_distances(context: int, prompt: int, target: int) -> Intervals:
    """Relative distances that one fixed end prompt shows, as disjoint inclusive intervals in rising order: [0, a-1] and
    [0, b-1] inside the two parts, [L-a-b+1, L-1] between them; merged where they touch.
    """
    check_sizes(context, prompt, target)
    intervals = [(0, max(context, prompt) - 1)]
    if prompt:
        intervals.append((target - context - prompt + 1, target - 1))
    return merge(intervals)


def gap(context: int, prompt: int, target: int) -> tuple[int, int] | None:
    """The inclusive interval below `target` that a fixed end prompt never shows, or None; with none from `context`."""
    check_sizes(context, prompt, target)
    lo = max(context, prompt)
    hi = target - context - prompt if prompt else target - 1
    return (lo, hi) if lo <= hi else None


def merge(intervals: Intervals) -> Intervals:
    """Union of inclusive integer intervals as disjoint ones in rising order, neighbours joined."""
    out: Intervals = []
    for lo, hi in sorted(intervals):
        if out and lo <= out[-1][1] + 1:
            out[-1] = (out[-1][0], max(out[-1][1], hi))
        else:
            out.append((lo, hi))
    return out


def _two_chunks(n: int, room: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    first = int(rng.integers(1, (n + 1) // 2, endpoint=True))
    skip = int(rng.integers(0, room, endpoint=True))
    positions = np.arange(n, dtype=np.int64)
    positions[first:] += skip
    return positions, first


def _spread(starts: Sequence[int], n: int, target: int, rng: np.random.Generator, scheme: str) -> Layout:
    """The first piece stays; piece i = 1..m is moved by a uniform draw from the i-th of m equal strata of 0..L-n."""
    moved = len(starts) - 1
    width = stratum(moved, target - n, scheme)
    offsets = [0, *(piece * width + int(rng.integers(0, width - 1, endpoint=True)) for piece in range(moved))]
    return Layout(np.arange(n, dtype=np.int64) + np.repeat(offsets, np.diff([*starts, n])))


def stratum(moved: int, room: int, scheme: str) -> int:
    """Places of one of `moved` strata of 0..room. Raises ValueError if there are fewer places than strata."""
    if room + 1 < moved:
        raise ValueError(
            f"scheme {scheme!r} moves {moved} pieces apart, so the target must exceed the row by at least "
            f"{moved - 1} tokens: it exceeds it by {room}"
        )
    return (room + 1) // max(1, moved)


def _with_terminal(context_positions: np.ndarray, prompt: int, start: int) -> np.ndarray:
    return np.concatenate([context_positions, np.arange(start, start + prompt, dtype=np.int64)])


def _need(rng: np.random.Generator | None, scheme: str) -> np.random.Generator:
    if rng is None:
        raise ValueError(f"scheme {scheme!r} draws positions: give it rng, for one sample sample_rng(seed, index)")
    return rng
