"""Of a lab with held-out text: next-token loss along the longest rows, the arms of each scaling beside the base."""

from __future__ import annotations

from matplotlib.figure import Figure

from paper_figures import lab, style
from paper_figures.inputs import Frames, Inputs
from paper_figures.names import short_length

TITLE = "The lab: held-out loss by position, for matrices with held-out text of their own"
INPUTS = Inputs(rows={"lab": (*lab.COLUMNS[:5], "first")}, needs_rows=True, lab="only")
ROOM = 1.0  # nats above the best arm at which a panel ends: a base far beyond its window would hide the rest


def draw(frames: Frames) -> Figure:
    rows = lab.tidy(frames["lab"][frames["lab"]["task"] == "loss_by_position"])
    rows = rows[rows["main"]]
    looks, used = lab.looks(rows), {}
    trained = rows[rows["kind"] != "base"]
    scalings = list(dict.fromkeys(trained["scaling"]))
    fig = style.figure(2.9)
    for ax, scaling in zip(fig.subplots(1, len(scalings), sharey=True, squeeze=False)[0], scalings):
        here = rows[(rows["scaling"] == scaling) | (rows["scaling"] == "none")]
        for label, part in here.groupby("label", sort=False):
            mean = part.groupby("length")["value"].mean()  # `length` is the end of a range of positions
            used[label] = looks[label]
            ax.plot(mean.index, mean, markersize=3.5, **looks[label])
        ax.axvspan(0, rows["window"].iloc[0], color="#eeeeee", zorder=0)
        low = trained["value"].min()
        ax.set_ylim(low - 0.1, low + ROOM)
        ticks = [rows["target"].iloc[0] * part // 4 for part in (1, 2, 3, 4)]
        ax.set_xticks(ticks, [short_length(int(tick)) for tick in ticks])
        ax.set_title(lab.scaling_name(scaling), fontsize=7)
        ax.set_xlabel("position, tokens")
    fig.axes[0].set_ylabel("loss, nats a token")
    seeds, texts = rows["seed"].nunique(), int(rows["n"].iloc[0])
    first = f"{texts} held-out texts, {seeds} seed{'s' * (seeds > 1)}"
    style.note(fig, f"{first}; shaded: the base's window; higher losses are cut off")
    fig.legend(handles=lab.handles(used), loc="outside lower center", ncols=min(5, len(used)))
    return fig
