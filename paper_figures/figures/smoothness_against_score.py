"""Does the smoothness constant predict success? The score at the longest length against both predictors."""

from __future__ import annotations

from matplotlib.figure import Figure
from scipy.stats import spearmanr

from paper_figures import scatter, style
from paper_figures.inputs import Frames, Inputs
from paper_figures.names import SCALINGS

TITLE = "Score at the longest length against the smoothness constant and the predicted RMS error in the gap"
INPUTS = Inputs(rows={"ruler": ("bernstein_constant", "gap_rms")}, needs_rows=True, lab="only")
AXES = {
    "bernstein_constant": "Bernstein constant of the score, per token",
    "gap_rms": "predicted RMS error in the gap (score: 1)",
}


def draw(frames: Frames) -> Figure:
    """Two panels for each base and fold of a lab: main arms of all scalings, whose names stand at their constant."""
    points = [
        (heading, means[means["main"] & ~means["kind"].str.startswith(("full", "longlora"))])  # rows with no gap
        for heading, means in scatter.points(frames, tuple(AXES))
    ]
    fig, groups = scatter.panels(points, AXES, SCALINGS)
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
    style.note(fig, f"{scatter.note(frames, points)}; ρ: rank correlation")
    return fig
