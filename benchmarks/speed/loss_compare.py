"""The training losses of two revisions, step by step: what a change that should not alter results has to show.

    python -m benchmarks.speed.loss_compare main --settings lean --steps 20    this working tree against main
    python -m benchmarks.speed.loss_compare v0.1 main                          two revisions

Each revision makes the same short runs of `extend` on the small base model by its own code. The log rounds losses and
says nothing of the last update, so the exported weights are compared too. Exit code 1 beyond the tolerance.
"""

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

USUAL = "--target 2048 --rows 4 --lr 1e-3 --warmup 2 --log-every 1 --seed 7 --compile none"

SETTINGS = {
    "plain": "--scheme endprompt --prompt EP_1 --scaling linear",
    "lean": "--scheme endprompt --prompt EP_2 --scaling ntk --dtype bfloat16 --optimizer lean --micro-rows 2",
    "recall": "--scheme endprompt-pose --prompt recall --scaling yarn --checkpointing selective",
    "lora": "--scheme pose --scaling linear --lora-rank 4 --micro-rows 1 --schedule cosine",
}

#: What a tree's own interpreter does: the runs one after the other. A command that fails ends it with its code.
CHILD = "import json, sys; from endprompt import cli; sys.exit(max(cli.main(run) for run in json.loads(sys.argv[1])))"


@dataclass(frozen=True)
class Run:
    """losses: of each step, nats. weights: the file of the exported weights."""

    losses: list[float]
    weights: Path


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="loss_compare", description=__doc__.partition("\n")[0])
    parser.add_argument("revision", help="what is compared with")
    parser.add_argument("other", nargs="?", help="another revision; default the working tree as it is")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--tolerance", type=float, default=0.0, help="largest difference of a loss (nats) or a weight")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as trees:
        found = []
        for side, revision in (("a", args.revision), ("b", args.other)):
            try:
                tree = trees.enter_context(checked_out(revision, Path(name, side))) if revision else ROOT
                found.append(measured(tree, Path(name, f"runs-{side}"), args.settings, args.steps, args.device))
            except subprocess.CalledProcessError as error:
                said = " ".join((error.stderr or "").split())[-500:]
                print(f"{revision or 'the working tree'}: {error.cmd[0]} failed: {said}", file=sys.stderr)
                return 2
        before, after = found
        worst = 0.0
        print(f"setting  step  {args.revision[:12]:>12}  {(args.other or 'now')[:12]:>12}  difference")
        for setting in args.settings:
            worst = max(worst, report(setting, before[setting], after[setting]))
    print(f"largest difference {worst:g}, tolerance {args.tolerance:g}")
    return int(not worst <= args.tolerance)


@contextlib.contextmanager
def checked_out(revision: str, tree: Path) -> Iterator[Path]:
    """A worktree of a revision, gone afterwards."""
    git("worktree", "add", "--quiet", "--detach", str(tree), revision)
    try:
        yield tree
    finally:
        git("worktree", "remove", "--force", str(tree))


def git(*arguments: str) -> None:
    subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True)


def measured(tree: Path, output: Path, settings: Sequence[str], steps: int, device: str) -> dict[str, Run]:
    """The runs of a tree's code; model and text are this tree's for both."""
    data, model = ROOT / "endprompt" / "data" / "sample.txt", ROOT / "benchmarks" / "base" / "256"
    usual = f"{USUAL} --steps {steps} --device {device}" + (" --deterministic" if device == "cuda" else "")
    files = ["--model", str(model), "--data", str(data)]
    runs = [
        ["extend", *files, "--output", str(output / setting), *usual.split(), *SETTINGS[setting].split()]
        for setting in settings
    ]
    environment = {**os.environ, "PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", "-c", CHILD, json.dumps(runs)]
    subprocess.run(command, cwd=tree, env=environment, check=True, capture_output=True, text=True)
    return {setting: read(output / setting) for setting in settings}


def read(output: Path) -> Run:
    lines = map(json.loads, (output / "log.jsonl").read_text(encoding="utf-8").splitlines())
    return Run([line["loss"] for line in lines if "loss" in line], output / "model.safetensors")


def report(setting: str, before: Run, after: Run) -> float:
    """Print a line a step and one for the weights; returns the largest difference."""
    steps = max(len(before.losses), len(after.losses))
    pairs = [tuple(dict(enumerate(run.losses)).get(step, math.nan) for run in (before, after)) for step in range(steps)]
    differences = [difference(*pair) for pair in pairs]
    for step, ((a, b), apart) in enumerate(zip(pairs, differences), start=1):
        print(f"{setting:7}  {step:4}  {a:12.6f}  {b:12.6f}  {apart:g}")
    weights = weights_apart(before.weights, after.weights)
    print(f"{setting:7}  weights after the last step{'':9}  {weights:g}")
    return max([*differences, weights])


def difference(a: float, b: float) -> float:
    """How far apart two losses are: infinitely where one is no number, or missing."""
    return abs(a - b) if math.isfinite(a) and math.isfinite(b) else math.inf


def weights_apart(before: Path, after: Path) -> float:
    """The largest difference of a weight; infinite where names, shapes or dtypes are others, or one is no number."""
    from safetensors.torch import load_file

    ours, theirs = load_file(before), load_file(after)
    described = [{name: (w.shape, w.dtype) for name, w in weights.items()} for weights in (ours, theirs)]
    if described[0] != described[1]:
        return math.inf
    apart = [(ours[name].double() - theirs[name].double()).abs().max().item() for name in ours]
    return max(math.inf if math.isnan(one) else one for one in apart)


if __name__ == "__main__":
    sys.exit(main())
