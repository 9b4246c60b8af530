"""Figure 2: the wording of the end prompt. Average scores for the three published end prompts."""

from __future__ import annotations

from matplotlib.figure import Figure

from paper_figures import bars
from paper_figures.inputs import Frames, Inputs
from paper_figures.names import SCALINGS, parse_method

TITLE = "Figure 2: average score by the wording of the end prompt"
INPUTS = Inputs(
    files={"published/figure_2": ("panel", "x", "value", "source")},
    rows={"ruler": (), "longbench": ()},
    lab="first",
)


def draw(frames: Frames) -> Figure:
    published = frames["published/figure_2"]
    return bars.suite_panels(frames, published, lambda methods: wordings(methods, set(published["x"])))


def wordings(methods: list[str], prompts: set[str]) -> dict[str, str]:
    """Methods that differ in their end prompt alone -> the name under the bar. Beside the published wordings: no end
    prompt (`contiguous`, the control) and `recall`, copied from the context."""
    published = {f"endprompt {prompt}": prompt for prompt in sorted(prompts)}
    names = {"contiguous": "none", **published, "recall": "recall"}
    parsed = {method: parse_method(method) for method in sorted(methods)}
    return {
        name: f"{names[key]}\n{SCALINGS.get(m.scaling, m.scaling)}"
        for key in names
        for name, m in parsed.items()
        if key == (f"{m.scheme} {m.prompt}" if m.arm == "endprompt" else m.arm)
    }
