"""Figure 3: the end prompt beside PoSE. Average scores of the terminal anchor, of PoSE, and of both together."""

from __future__ import annotations

from matplotlib.figure import Figure

from paper_figures import bars
from paper_figures.inputs import Frames, Inputs
from paper_figures.names import SCALINGS, parse_method

TITLE = "Figure 3: average score of EndPrompt (ET), PoSE and both together, ET(PoSE)"
INPUTS = Inputs(
    files={"published/figure_3": ("panel", "x", "value", "source")},
    rows={"ruler": (), "longbench": ()},
    lab="first",
)
#: Schemes that are an arm of the published figure; `endprompt-random` is the other reading of ET(PoSE), and
#: `contiguous` (interpolation alone) the control that it lacks.
ARMS = {
    "contiguous": "no anchor",
    "endprompt": "ET",
    "endprompt-pose": "ET(PoSE)",
    "endprompt-random": "ET(PoSE),\nat random",
    "pose": "PoSE",
}


def draw(frames: Frames) -> Figure:
    return bars.suite_panels(frames, frames["published/figure_3"], arms)


def arms(methods: list[str]) -> dict[str, str]:
    """Methods of these schemes with a cue (not `recall`) -> the name under the bar, in the figure's order. Of several
    wordings only EP_1: Figure 2 compares them."""
    parsed = {method: parse_method(method) for method in sorted(methods)}
    if any(m.prompt == "EP_1" for m in parsed.values()):
        parsed = {name: m for name, m in parsed.items() if m.prompt in ("", "EP_1")}
    return {
        name: "\n".join(part for part in (label, m.prompt, SCALINGS.get(m.scaling, m.scaling)) if part)
        for scheme, label in ARMS.items()
        for name, m in parsed.items()
        if m.arm == scheme
    }
