"""Does the smoothness constant predict success? The score at the longest length against both predictors."""

from __future__ import annotations

from matplotlib.figure import Figure
from scipy.stats import spearmanr

from paper_figures import scatter, style
from paper_figures.data import Frames, Inputs

TITLE = "Score at the longest length against the smoothness constant and the predicted RMS error in the gap"
INPUTS = Inputs(rows={"ruler": ("bernstein_constant", "gap_rms")}, needs_rows=True)
AXES = {
    "bernstein_constant": "Bernstein constant of the score, per token",
    "gap_rms": "predicted RMS error in the gap (score: 1)",
}


def draw(frames: Frames) -> Figure:
    means, longest = scatter.points(frames, tuple(AXES))
    fig, axes = scatter.panels(means, longest, AXES)
    for ax, column in zip(axes, AXES):
        style.log_axis(ax, means[column], lambda value: f"{value:.3g}")
        if len(means) > 2 and means[column].nunique() > 1 and means["value"].nunique() > 1:
            correlation = spearmanr(means[column], means["value"]).statistic
            ax.set_title(f"rank correlation {correlation:+.2f}, {len(means)} methods", fontweight="normal", fontsize=7)
    return fig
