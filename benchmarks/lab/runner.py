"""Runs a matrix: what is missing is prepared, given to workers, and written down cell by cell.

The run directory holds `results.jsonl` (all rows of a cell appended at once), `scores.jsonl` (of every sample),
`depth.jsonl` and `questions.jsonl` (what follows), `log.jsonl` (seconds, tracebacks), `config.yaml`, `environment.json`
and `workers/` (what they printed). A cell is finished if all of its rows are there with the hash of its settings;
anything less is done again. One process writes; a lock keeps others away.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks import longbench
from benchmarks.lab import cost, material, matrix
from benchmarks.lab.config import LabConfig
from benchmarks.lab.inputs import write_rates
from benchmarks.lab.matrix import Answer, Cell
from benchmarks.lab.worker import settle, work
from endprompt.cli import recipe_list
from endprompt.files import drop_cut_line, read_json_lines, sole_use
from endprompt.results import append_rows, read_rows, result_row, write_rows
from endprompt.runs import RunDirectory

GPU_JOBS = 8  # workers that share a GPU: one alone leaves it waiting for Python most of the time
SHARED_BATCH_TOKENS = 2**18  # prompt tokens at once when several workers share the memory of a GPU
DEATHS = 4  # workers that may be lost one after the other without a finished cell, before the run gives up
TICK = 0.5  # seconds between looks at the workers
PATIENCE = 5.0  # seconds that all workers together have to end


def lab(config: LabConfig) -> int:
    """Run what `endprompt lab` asks for; returns 1 if a cell failed. Raises ValueError naming key, value and rule
    before anything is trained."""
    if config.list_presets:
        print(recipe_list(matrix.presets()))
        return 0
    matrices = {str(path): matrix.read_matrix(path) for path in matrix.matrix_files(config)}
    cells = matrix.chosen(matrix.all_cells(matrices, config), config.only)
    large = config.dry_run and config.device != "cpu" and any(map(cost.fills_a_gpu, cells))
    device = "cuda" if large else device_of(config)  # a large study is planned where it is not run
    gpus = gpus_of(device)
    jobs = jobs_of(config, device, cells, len(gpus))
    if config.dry_run:
        results = Path(config.output, "results.jsonl")
        done = finished(results, cells) if results.is_file() else set()
        print(plan_text(cells, done, device, jobs, max(1, len(gpus))))
        return 0
    check_rows(cells, config.deterministic)
    with contextlib.ExitStack() as stack:
        stack.enter_context(sole_use(config.output))
        if device == "cuda" and jobs > len(gpus) == 1 and config.mps and not config.prepare_only:
            from benchmarks.lab import mps

            reason = stack.enter_context(mps.service())
            say(f"workers take turns on the GPU, no MPS: {reason}" if reason else "workers share the GPU by MPS")
        return Runner(config, cells, device, jobs, gpus).run()


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def device_of(config: LabConfig) -> str:
    """cpu or cuda. Raises ValueError if CUDA is asked for and not there."""
    if config.device == "cpu":
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if config.device == "cuda":
        raise ValueError("device must be one that this machine has: device='cuda', torch finds no CUDA")
    return "cpu"


def gpus_of(device: str) -> list[str]:
    """The GPUs that workers are spread over, as CUDA_VISIBLE_DEVICES names them."""
    if device != "cuda":
        return []
    import torch

    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named or [str(number) for number in range(torch.cuda.device_count())] or ["0"]


def jobs_of(config: LabConfig, device: str, cells: Sequence[Cell], gpus: int) -> int:
    """Workers: one a core, eight a GPU, which the small bases share, or one a GPU for a published base."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    on_gpus = gpus if any(map(cost.fills_a_gpu, cells)) else min(GPU_JOBS * gpus, cores)
    usual = cores if device == "cpu" else on_gpus
    return min(config.jobs or usual, len(cells))


def check_rows(cells: Sequence[Cell], deterministic: bool = True) -> None:
    """Raises ValueError for an arm whose settings, rows or scaling cannot be, before any is trained, and ImportError
    where what scores a set is not installed."""
    from benchmarks.lab.cells import extended
    from endprompt.config import check_config
    from endprompt.data import row_spec

    for name in {name for cell in cells for name in cell.scoring.longbench}:
        longbench.score(name, "-", ["Paragraph 1, 段落1"], ["-"])
    for cell in {(cell.base, cell.target, cell.arm): cell for cell in cells}.values():
        config = cell.config(["documents"], "output", deterministic=deterministic)
        try:
            if cell.trained:
                check_config(config)
            extended(cell)
            if cell.trained:
                row_spec(config, cell.window, material.tokenizer_of(cell.model))
        except ValueError as error:
            raise ValueError(f"arm {cell.arm!r} of base {cell.base}, target {cell.target}: {error}") from None


def finished(results: Path, cells: Sequence[Cell]) -> set[str]:
    wanted = {cell.sha256 for cell in cells}
    rows = [row for row in rows_of(results) if row.get("cell") in wanted and row["metric"] != "failed"]
    counts, whole = Counter(row["cell"] for row in rows), {row["cell"]: row.get("cell_rows") for row in rows}
    return {key for key, count in counts.items() if count == whole[key]}


def made_otherwise(results: Path, done: set[str], deterministic: bool) -> int:
    """How many of the finished cells, given by their hashes, were trained with another setting of `deterministic`. Rows
    from before there was one were made without."""
    trained = [row for row in rows_of(results) if row.get("cell") in done and row.get("train_tokens")]
    told = {row["cell"]: bool(row.get("deterministic")) for row in trained}
    return sum(value != deterministic for value in told.values())


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Rows of a file whose last line a crash may have cut off. Raises ValueError for any other broken line."""
    drop_cut_line(path)
    return read_rows(path)


def tidy(directory: Path, cells: Sequence[Cell], overwrite: bool) -> set[str]:
    """Drop rows of cells that are to be done again; returns the hashes of the finished ones. Raises ValueError if the
    directory has a cell of the same name with other settings."""
    results, scores = directory / "results.jsonl", directory / "scores.jsonl"
    if not results.is_file():
        scores.unlink(missing_ok=True)
        return set()
    names = {(cell.base, cell.target, cell.arm, cell.seed): cell.sha256 for cell in cells}
    done = set() if overwrite else finished(results, cells)
    kept = []
    for row in rows_of(results):
        key = (str(row.get("base")), row.get("target"), row.get("arm"), row["seed"])
        if key not in names or row.get("cell") in done:
            kept.append(row)
        elif not overwrite and row.get("cell") != names[key] and row["metric"] != "failed":
            raise ValueError(
                f"{results}: has {row.get('arm')!r} of base {row.get('base')}, seed {row['seed']}, made with other "
                "settings; choose another output, or set overwrite to do it again"
            )
    drop_cut_line(scores)
    alive, lines = {row.get("cell") for row in kept}, read_json_lines(scores) if scores.is_file() else ()
    whole = [line for _, line in lines if line.get("cell") in alive]
    write_rows(results, kept)
    write_rows(scores, whole)
    return done


def abandon(pool: ProcessPoolExecutor) -> None:
    """End a pool without waiting for what it makes: files are whole or absent, and a run that goes on makes them."""
    processes = list((pool._processes or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:  # Python waits at its exit for those that still run
        process.terminate()


@dataclass
class Worker:
    """A process, the pipe to it, and the cell that it has; shape is that of its last cell."""

    number: int
    process: Any
    pipe: Connection
    ready: bool = False
    cell: Cell | None = None
    since: float = 0.0
    shape: tuple[Any, ...] | None = None


@dataclass
class Runner:
    config: LabConfig
    cells: list[Cell]
    device: str
    jobs: int
    gpus: list[str] = field(default_factory=list)
    done: int = 0
    failed: int = 0
    known: int = 0  # finished by an earlier run
    spent: float = 0.0  # seconds of workers on finished cells
    expected: float = 0.0  # what those had been expected to take
    deaths: int = 0
    waiting: list[Cell] = field(default_factory=list)
    workers: list[Worker] = field(default_factory=list)
    making: dict[material.Material, Future[None]] = field(default_factory=dict)

    def run(self) -> int:
        self.directory = RunDirectory(self.config.output, self.config)
        self.output, self.cache = self.directory.path, self.config.cache_directory
        self.context = multiprocessing.get_context("spawn")
        self.started = time.perf_counter()
        done = tidy(self.output, self.cells, self.config.overwrite)
        self.known = sum(cell.sha256 in done for cell in self.cells)
        todo = [cell for cell in self.cells if cell.sha256 not in done]
        self.waiting = sorted(todo, key=lambda cell: -cost.seconds(cell, self.device))
        if self.known:
            say(f"{self.known} of {len(self.cells)} cells are done already")
            setting = self.config.deterministic  # on a CPU training repeats anyway
            if self.device == "cuda" and (other := made_otherwise(self.directory.results, done, setting)):
                say(f"{other} of them were not trained with deterministic={setting}, as the others will be")
        if self.config.prepare_only:
            self.prepare()
            return 0
        if self.waiting:
            self.work_off()
        if self.done + self.known:
            self.conclude()
        minutes = (time.perf_counter() - self.started) / 60
        self.directory.log(minutes=round(minutes, 2), cells=self.done, failed=self.failed, jobs=self.jobs)
        say(f"{self.done + self.known} of {len(self.cells)} cells done, {self.failed} failed, {minutes:.1f} minutes")
        print(self.directory.results)
        return 1 if self.failed else 0

    def begin(self, stack: contextlib.ExitStack) -> None:
        """Processes make the documents and samples that the waiting cells lack; they end with the stack."""
        log = self.output / "workers" / "material.log"
        how: dict[str, Any] = {"mp_context": self.context, "initializer": settle, "initargs": (log, 1)}
        pool = ProcessPoolExecutor(max(1, min(os.cpu_count() or 1, 16)), **how)
        stack.callback(abandon, pool)
        for item in material.needed(self.waiting):
            if not item.path(self.cache).exists():
                self.making[item] = pool.submit(item.make, self.cache, self.config)

    def prepare(self) -> None:
        with contextlib.ExitStack() as stack:
            self.begin(stack)
            for number, future in enumerate(self.making.values(), 1):
                future.result()
                say(f"{number} of {len(self.making)} files of documents and samples made")
        print(self.cache)

    def work_off(self) -> None:
        """Give out cells until none is left. On Ctrl-C the workers are stopped and what is done is kept."""
        with contextlib.ExitStack() as stack:
            self.begin(stack)
            stack.callback(self.stop)
            self.workers = [self.start(number) for number in range(min(self.jobs, len(self.waiting)))]
            while self.waiting or any(worker.cell for worker in self.workers):
                for worker in self.workers:
                    if worker.ready and worker.cell is None:
                        self.give(worker)
                self.listen()

    def start(self, number: int) -> Worker:
        import torch

        from benchmarks.lab.cells import Workplace

        config, cpu = self.config, self.device == "cpu"
        tokens = SHARED_BATCH_TOKENS if self.jobs > max(1, len(self.gpus)) else 2 * SHARED_BATCH_TOKENS
        how = "none" if cpu and config.compile == "auto" else config.compile
        shared = (how, config.deterministic, self.jobs, config.keep_checkpoints, tokens // 8 if cpu else tokens)
        place = Workplace(self.output, self.cache, self.device, *shared)
        here, there = self.context.Pipe()
        cores = torch.get_num_threads() if os.environ.get("OMP_NUM_THREADS") else os.cpu_count() or 1
        threads = max(1, cores // self.jobs) if cpu else 1
        log = str(self.output / "workers" / f"worker-{number}.log")
        process = self.context.Process(target=work, args=(there, log, place, threads), name=f"lab-{number}")
        one = {"CUDA_VISIBLE_DEVICES": self.gpus[number % len(self.gpus)]} if len(self.gpus) > 1 else {}
        with mock.patch.dict(os.environ, one):
            process.start()
        there.close()
        return Worker(number, process, here)

    def stop(self) -> None:
        """End the workers: the idle ones by themselves, the busy ones now."""
        for worker in self.workers:
            with contextlib.suppress(OSError, ValueError):
                worker.pipe.send(None)
                worker.pipe.close()
            if worker.cell is not None or not worker.ready:
                worker.process.terminate()
        patience = time.monotonic() + PATIENCE
        for worker in self.workers:
            worker.process.join(max(0.0, patience - time.monotonic()))
            if worker.process.is_alive():
                worker.process.kill()

    # -- giving out

    def give(self, worker: Worker) -> None:
        if (cell := self.next_for(worker)) is None:
            return
        self.waiting.remove(cell)
        worker.cell, worker.shape, worker.since = cell, cell.shape, time.perf_counter()
        try:
            worker.pipe.send(cell)
        except OSError:
            self.lost(worker)

    def next_for(self, worker: Worker) -> Cell | None:
        """Of the worker's own shape if any is left, else of the shape with most work left for each worker on it."""
        able = [cell for cell in self.waiting if self.prepared(cell)]
        if not able:
            return None
        left: dict[tuple[Any, ...], float] = {}
        for cell in able:
            left[cell.shape] = left.get(cell.shape, 0.0) + cost.seconds(cell, self.device)
        busy = Counter(other.shape for other in self.workers if other.cell)
        shape = worker.shape if worker.shape in left else max(left, key=lambda key: left[key] / (1 + busy[key]))
        return next(cell for cell in able if cell.shape == shape)

    def prepared(self, cell: Cell) -> bool:
        """Whether the cell's documents and samples are there. Raises what went wrong in making them."""
        for item in material.needed([cell]):
            if (future := self.making.get(item)) is not None:
                if not future.done():
                    return False
                future.result()
                del self.making[item]
        return True

    # -- taking in

    def listen(self) -> None:
        """Take in what the workers say until one has said something, or for a moment."""
        pipes = {worker.pipe: worker for worker in self.workers}
        for pipe in wait(list(pipes), timeout=TICK):
            worker = pipes[pipe]  # type: ignore[index]
            try:
                answer: Answer = worker.pipe.recv()
            except (EOFError, OSError):
                self.lost(worker)
                continue
            if answer.ready:
                worker.ready = True
            else:
                self.take(worker, answer)

    def take(self, worker: Worker, answer: Answer) -> None:
        cell, worker.cell, seconds = worker.cell, None, time.perf_counter() - worker.since
        assert cell is not None
        if answer.error is not None:
            self.fail(cell, answer.error, answer.trace, worker.number)
            if answer.last:
                self.replace(worker)
            return
        append_rows(self.output / "scores.jsonl", answer.scores)
        self.directory.add(answer.rows)  # last: with its rows a cell is done
        self.done, self.deaths = self.done + 1, 0
        self.spent += seconds
        self.expected += cost.seconds(cell, self.device)
        self.directory.log(cell=cell.name, worker=worker.number, seconds=round(seconds, 2), phases=answer.seconds)
        self.line(cell, answer.rows, seconds)

    def lost(self, worker: Worker) -> None:
        worker.process.join(10)
        code = worker.process.exitcode
        log = self.output / "workers" / f"worker-{worker.number}.log"
        if not worker.ready:
            raise ValueError(f"a worker did not start (exit code {code}): see {log}")
        if worker.cell is not None:
            reason = f"killed by signal {-code}" if code is not None and code < 0 else f"exit code {code}"
            hint = " (out of memory?)" if code == -9 else ""
            self.fail(worker.cell, f"the worker ended: {reason}{hint}", None, worker.number)
        self.deaths += 1
        if self.deaths > max(DEATHS, self.jobs):
            raise ValueError(f"workers end one after the other (exit code {code}): see {log}")
        self.replace(worker)

    def replace(self, worker: Worker) -> None:
        worker.pipe.close()
        worker.process.join(10)
        self.workers[self.workers.index(worker)] = self.start(worker.number)

    def fail(self, cell: Cell, error: str, trace: str | None, worker: int) -> None:
        self.failed += 1
        about: dict[str, Any] = {"error": error, "cell": cell.sha256, "questions": list(cell.questions)}
        about |= {key: getattr(cell, key) for key in ("base", "window", "target", "fold", "arm", "method", "seed")}
        model = f"base {cell.base}"
        self.directory.add([result_row(suite="lab", task="cell", metric="failed", value=1.0, model=model, **about)])
        self.directory.log(cell=cell.name, worker=worker, error=error, traceback=trace)
        say(f"FAILED {cell.name}: {error}")

    # -- telling

    def state(self) -> str:
        """Cells that are over, and the time left, from what finished ones took beside what they were expected to."""
        from endprompt.train.progress import clock

        said = f"{self.known + self.done + self.failed}/{len(self.cells)} cells"
        said += f", {self.failed} failed" if self.failed else ""
        if not self.done:
            return said
        ahead = sum(cost.seconds(cell, self.device) for cell in self.waiting)
        ahead += sum(cost.seconds(worker.cell, self.device) / 2 for worker in self.workers if worker.cell)
        return f"{said}, {clock(ahead * self.spent / self.expected / max(1, len(self.workers)))} left"

    def line(self, cell: Cell, rows: Sequence[dict[str, Any]], seconds: float) -> None:
        own = [(n, [r["value"] for r in rows if r["suite"] == "ruler" and r["length"] == n]) for n in cell.lengths]
        means = "  ".join(f"{n}: {sum(values) / len(values):.1f}" for n, values in own if values)
        say(f"[{self.state()}] {cell.name}  {means}  ({seconds:.1f} s)")

    def conclude(self) -> None:
        from benchmarks.lab import depth, verdicts

        depth.write(self.output)
        for arm, rate in write_rates(self.output / "rates.json", read_rows(self.directory.results)).items():
            say(f"lowest held-out loss of {arm}: lr {rate:g}")
        if not any(cell.questions for cell in self.cells):
            return
        found = verdicts.write(self.output)
        if sys.stdout.isatty():
            from rich.console import Console

            Console(force_terminal=False if os.environ.get("NO_COLOR") else None).print(verdicts.table(found))


def plan_text(cells: Sequence[Cell], done: set[str], device: str, jobs: int, gpus: int = 1) -> str:
    from endprompt.train.progress import clock

    arms: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        arms.setdefault((cell.base, cell.fold, cell.arm), []).append(cell)
    width = max(len(key[2]) for key in arms)
    heads = f"{'steps x rows x tokens':>21}  {'seeds':>5}  {'s each':>7}  questions"
    lines = [f"{'base':<8}{'fold':>5}  {'arm':<{width}}  {heads}"]
    for (base, fold, arm), members in arms.items():
        first, asked = members[0], ",".join(map(str, members[0].questions))
        size = f"{first.steps} x {first.rows} x {first.row_tokens}" if first.trained else "untrained"
        each = cost.seconds(first, device)
        lines.append(f"{base:<8}{fold:>5}  {arm:<{width}}  {size:>21}  {len(members):>5}  {each:>7.1f}  {asked}")
    left = [cell for cell in cells if cell.sha256 not in done]
    seconds = [cost.seconds(cell, device) for cell in left]
    total = sum(seconds)
    expected = cost.RATES[device].start + max(total / jobs, *seconds) if left else 0.0
    where = "a GPU" if device == "cuda" else "the CPU"
    counted = f"{len(cells)} cells, {len(cells) - len(left)} done"
    lines.append(f"{counted}; about {clock(expected)} with {jobs} workers on {where} (estimated)")
    if any(cost.fills_a_gpu(cell) for cell in left):
        lines.append(f"{total / 3600:.1f} GPU-hours on H200, {expected / 3600:.1f} hours on {gpus} (estimated)")
    return "\n".join(lines)
