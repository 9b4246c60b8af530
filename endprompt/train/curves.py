"""The losses of a finished run for its user's eyes: in the terminal, and as a picture beside the checkpoint.

log.jsonl, results.jsonl -> training loss by step, held-out loss by step, and by position at the last evaluation
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from endprompt.distributed import say
from endprompt.files import sound_lines

PICTURE = "loss.png"
LINES = 10  # of a chart; and points of a series that plain text has
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # braille's, by row and column

Points = tuple[list[float], list[float]]


@dataclass
class Losses:
    """x and y of each curve, nats a token. held_out: by steps, of each length. by_position: by the last token of a
    part of the row, of the longest length."""

    training: Points = field(default_factory=lambda: ([], []))
    held_out: dict[int, Points] = field(default_factory=dict)
    by_position: Points = field(default_factory=lambda: ([], []))
    length: int = 0


def read(run: Path) -> Losses:
    """What a run has written of its losses; damaged lines are passed over."""
    found = Losses()
    last: tuple[int, int] = (-1, 0)
    for *_, line in sound_lines(run / "log.jsonl") if (run / "log.jsonl").is_file() else ():
        if line and {"step", "loss"} <= line.keys():
            add(found.training, line["step"], line["loss"])
        elif line and "by_position" in line and (line["step"], line["held_out_length"]) >= last:
            last = line["step"], line["held_out_length"]
            parts = np.array_split(np.arange(1, last[1]), len(line["by_position"]))
            found.by_position = [float(part[-1]) for part in parts], list(line["by_position"])
            found.length = last[1]
    for *_, row in sound_lines(run / "results.jsonl") if (run / "results.jsonl").is_file() else ():
        if row and row.get("task") == "held_out":
            add(found.held_out.setdefault(row["length"], ([], [])), row["step"], row["value"])
    return found


def add(points: Points, x: float, y: float) -> None:
    points[0].append(x)
    points[1].append(y)


def show(run: Path) -> None:
    """Curves on stderr, as charts on a terminal and in plain lines elsewhere, and the picture `loss.png`."""
    from rich.console import Console

    found, console = read(run), Console(stderr=True)
    charts = console.is_terminal and (console.encoding or "").lower().startswith("utf")
    titled = {"training loss by step": found.training}
    titled |= {f"held-out loss at {length:,} tokens by step": points for length, points in found.held_out.items()}
    titled[f"held-out loss by position, up to {found.length:,} tokens"] = found.by_position
    for title, (xs, ys) in titled.items():
        if charts and len(xs) > 1 and not title.endswith("tokens by step"):
            say("\n".join(["", title, *chart(xs, ys, max(16, min(72, console.width - 12)))]))
        elif xs:
            kept = np.unique(np.linspace(0, len(xs) - 1, LINES).round().astype(int))
            say(f"{title}: {', '.join(f'{xs[i]:,.0f} {ys[i]:.4f}' for i in kept)}")
    if found.training[0]:
        try:
            draw(found, run / PICTURE)
            say(f"picture of the losses: {run / PICTURE}")
        except Exception as error:  # the checkpoint is whole, and a picture must not make its run a failure
            say(f"no picture of the losses: {' '.join(str(error).split())[:200]}")


def chart(xs: Sequence[float], ys: Sequence[float], width: int = 60, height: int = LINES) -> list[str]:
    """A line through the points (xs rise) in braille, `height` lines of `width` characters, and the ends of both axes.
    A dot is half a character wide; where several points share its column, all between their lowest and their highest is
    set, so that no peak is lost.
    """
    low, high, columns, rows = min(ys), max(ys), 2 * width, 4 * height
    x = np.union1d(xs, np.linspace(xs[0], xs[-1], columns))
    level = np.rint((np.interp(x, xs, ys) - low) / ((high - low) or 1.0) * (rows - 1)).astype(int)
    column = np.minimum((x - xs[0]) / (xs[-1] - xs[0]) * columns, columns - 1).astype(int)
    cells = np.zeros((height, width), dtype=int)
    before = level[0]
    for at in range(columns):
        held = level[column == at]
        for dot in range(min(*held, before), max(*held, before) + 1):
            row, part = divmod(rows - 1 - dot, 4)
            cells[row, at // 2] |= DOTS[part][at % 2]
        before = held[-1]
    labels = {0: f"{high:.4g}", height - 1: f"{low:.4g}"}
    lines = [f"{labels.get(i, ''):>8} ┤{''.join(chr(0x2800 + cell) for cell in row)}" for i, row in enumerate(cells)]
    first, last = f"{xs[0]:,.0f}", f"{xs[-1]:,.0f}"
    return [*lines, f"{'':8} └{'─' * width}", f"{'':10}{first}{last:>{max(1, width - len(first))}}"]


def draw(found: Losses, path: Path) -> None:
    """PNG: losses by step, and beside it the held-out loss by position where there is one."""
    from matplotlib.figure import Figure

    panels = 1 + bool(found.by_position[0])
    figure = Figure(figsize=(4.5 * panels, 3.2), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    axes[0].plot(*found.training, linewidth=1.2, label="training")
    for length, points in sorted(found.held_out.items()):
        axes[0].plot(*points, marker="o", markersize=4, linewidth=1, label=f"held out, {length:,} tokens")
    axes[0].set(xlabel="step", ylabel="loss, nats a token")
    axes[0].legend(frameon=False, fontsize=8)
    if panels == 2:
        axes[1].stairs(found.by_position[1], [0, *found.by_position[0]], baseline=None, linewidth=1.4)
        axes[1].set(xlabel=f"position in rows of {found.length:,} tokens", ylabel="held-out loss, nats a token")
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(alpha=0.25)
    figure.savefig(path, dpi=130)
