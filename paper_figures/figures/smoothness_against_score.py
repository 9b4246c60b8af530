"""Does the smoothness constant predict success? The score at the longest length against both predictors."""

from __future__ import annotations

from matplotlib.figure import Figure
from scipy.stats import spearmanr

from paper_figures import scatter, style
from paper_figures.inputs import Frames, Inputs, is_lab
from paper_figures.names import SCALINGS

TITLE = "Score at the longest length against the smoothness constant and the predicted RMS error in the gap"
INPUTS = Inputs(rows={"ruler": ("bernstein_constant", "gap_rms")}, needs_rows=True, lab="all")
AXES = {
    "bernstein_constant": "Bernstein constant of the score, per token",
    "gap_rms": "predicted RMS error in the gap (score: 1)",
}


def draw(frames: Frames) -> Figure:
    if is_lab(frames["ruler"]):
        return lab_predictors(frames)
    means, longest = scatter.points(frames, tuple(AXES))
    fig, axes = scatter.panels(means, longest, AXES)
    for ax, column in zip(axes, AXES):
        style.log_axis(ax, means[column], lambda value: f"{value:.3g}")
        if len(means) > 2 and means[column].nunique() > 1 and means["value"].nunique() > 1:
            correlation = spearmanr(means[column], means["value"]).statistic
            ax.set_title(f"rank correlation {correlation:+.2f}, {len(means)} methods", fontweight="normal", fontsize=7)
    return fig


def lab_predictors(frames: Frames) -> Figure:
    """The same for each base and fold of a lab: main arms of all scalings, whose names stand at their constant."""
    points = [
        (heading, means[means["main"] & ~means["kind"].str.startswith(("full", "longlora"))])  # rows with no gap
        for heading, means in scatter.lab_points(frames, tuple(AXES))
    ]
    fig, groups = scatter.lab_panels(points, AXES, SCALINGS)
    for group in groups:
        means = group.means.dropna(subset=list(AXES))
        for ax, column in zip(group.axes, AXES):
            style.log_axis(ax, means[column], lambda value: f"{value:.3g}")
            if len(means) > 2 and means[column].nunique() > 1 and means["value"].nunique() > 1:
                correlation = spearmanr(means[column], means["value"]).statistic
                ax.set_title(f"ρ {correlation:+.2f}, {len(means)} arms", loc="right", fontweight="normal", fontsize=7)
        # The constant depends on the scaling alone: name the scalings at theirs.
        constants = means.groupby("bernstein_constant")["scaling"].unique()
        names = ["\n".join([f"{c:.3g}", *(SCALINGS.get(s, s) for s in scalings)]) for c, scalings in constants.items()]
        group.axes[0].set_xticks(constants.index, names)
    note = f"{scatter.lab_note(frames, points)}; ρ: rank correlation"
    fig.suptitle(note, fontsize=6.5, color="#555555", x=0.01, ha="left")
    return fig
