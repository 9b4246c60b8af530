"""Settings of `endprompt lab`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class LabConfig:
    """Settings of `endprompt lab`.

    Args:
        preset: a matrix that the package ships: smoke, micro, search and others of --list-presets; several with commas
            between them are run as one.
        matrix: a matrix file of your own, instead of a preset.
        output: run directory; a second run of the same one does only what is missing.
        jobs: worker processes; 0 takes one a core on a CPU, and eight on a GPU, which they share.
        only: part of the matrix, as KEY=VALUE,VALUE with the keys arm (a pattern), base, fold, seed, question.
        seeds: training seeds, instead of the matrix's.
        steps: training steps of every arm, instead of the matrix's: for a trial.
        samples: samples of a task and length, instead of the matrix's: for a trial.
        dry_run: print the cells and the estimated time, and stop.
        overwrite: do the chosen cells again.
        keep_checkpoints: keep every trained checkpoint.
        cache: folder of the documents and samples; OUTPUT/cache if not given. Several runs may share it.
        device: cpu, cuda or auto.
        compile: the trainer's own setting of this name; auto is what is fastest for such small models.
        deterministic: the trainer's own setting of this name: cells repeat bit for bit on the same GPU and versions.
        mps: try NVIDIA's multi-process service, so that workers run on a GPU at the same time.
        model: of a matrix on a published base, the checkpoint in that base's place.
        documents: JSON lines with `text` to train on, where the matrix asks for them by `inputs`.
        held_out: JSON lines with `text` for the loss, likewise.
        data_dir: folder of the other inputs: RULER's essays and question sets.
        rates: a file `rates.json` of a run of the matrix's rates: the learning rate of each arm.
        prepare_only: make the documents and samples, and stop; a copy of the cache is then enough to run elsewhere.
        list_presets: print the presets and stop.
    """

    preset: str | None = None
    matrix: str | None = None
    output: str = "runs/lab"
    jobs: int = 0
    only: list[str] = field(default_factory=list)
    seeds: list[int] | None = None
    steps: int | None = None
    samples: int | None = None
    dry_run: bool = False
    overwrite: bool = False
    keep_checkpoints: bool = False
    cache: str | None = None
    device: str = "auto"
    compile: str = "auto"
    deterministic: bool = True
    mps: bool = True
    model: str | None = None
    documents: str | None = None
    held_out: str | None = None
    data_dir: str | None = None
    rates: str | None = None
    prepare_only: bool = False
    list_presets: bool = False

    def __post_init__(self) -> None:
        for key, least in (("jobs", 0), ("steps", 1), ("samples", 1)):
            value = getattr(self, key)
            if value is not None and value < least:
                raise ValueError(f"{key} must be at least {least}: {key}={value}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device must be auto, cpu or cuda: device={self.device!r}")
        if self.preset and self.matrix:
            raise ValueError(f"give either a preset or a matrix: preset={self.preset!r} matrix={self.matrix!r}")

    @property
    def cache_directory(self) -> Path:
        return Path(self.cache) if self.cache else Path(self.output) / "cache"
