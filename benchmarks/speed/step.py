"""One measurement: a step of a named shape, its tokens/s, MFU and memory."""

import contextlib
import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

from benchmarks.speed.config import METHODS, BenchConfig
from benchmarks.speed.measure import speed_rows, timed
from endprompt.shapes import SHAPES, model_config

GIB = 2**30


def measure(config: BenchConfig) -> list[dict[str, Any]]:
    """Result rows of one measurement, in this process. Raises torch.OutOfMemoryError if it does not fit."""
    import torch

    from endprompt.train.progress import device_peak

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = Run(config, device)
    for _ in range(min(2, config.timed)):
        run.micro_batch()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    values: dict[str, float] = {}
    held = torch.cuda.memory_allocated() / GIB if device.type == "cuda" else 0.0
    if config.whole_step:
        if run.optimizer is not None:  # its first step allocates and compiles
            run.optimizer_step()
        seconds = run.timed(run.whole_step)
    else:
        micro = statistics.median(run.timed(run.micro_batch) for _ in range(config.timed))
        seconds = config.rows / config.micro_rows * micro
        values["micro_batch_seconds"] = micro
        if run.optimizer is not None:
            run.optimizer_step()
            values["optimizer_seconds"] = run.timed(run.optimizer_step)
            seconds += values["optimizer_seconds"]
    speed = config.rows * config.row_tokens / seconds
    values["tokens_per_s"] = speed
    values["hours_per_1b_tokens"] = 1e9 / speed / 3600
    if device.type == "cuda":
        values["held_gib"] = held
        values["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
        values["reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
        if (peak := device_peak(device)) is not None:
            values["mfu_percent"] = 100 * speed * run.flops / peak
    setting = {key: value for key, value in dataclasses.asdict(config).items() if key not in ("output", "name")}
    return speed_rows(
        values, task=config.name or config.method, length=config.target, model=config.shape, method=config.method,
        what=METHODS[config.method], setting=setting, loss=run.last_loss,
    )  # fmt: skip


class Run:
    """Model, optimizer and rows of one measurement: those of the trainer, or for `reference` transformers as it is."""

    def __init__(self, config: BenchConfig, device: Any):
        import torch

        from endprompt.config import ExtendConfig
        from endprompt.fast import LeanAdamW
        from endprompt.model import extended_config, new_model, quantized, training_attention
        from endprompt.model.lora import add_lora
        from endprompt.train.faster import make_fast
        from endprompt.train.objective import Objective, optimizer_of
        from endprompt.train.progress import flops_per_token

        self.config, self.device = config, device
        self.last_loss: float | None = None
        self.reference, lora = config.method == "reference", config.method in ("longlora", "lora", "qlora")
        base = model_config(config.shape)
        base.use_cache = False
        if config.target > base.max_position_embeddings:
            base = extended_config(base, "linear", config.target)
        attention = training_attention("shifted" if config.method == "longlora" else config.attention)
        attention = "sdpa" if self.reference else attention
        self.model: Any = new_model(base, seed=0, dtype="bfloat16", attention=attention, device=str(device))
        self.model.train()
        if config.method == "qlora":
            quantized.quantize(self.model, self.model.model.layers, str(device))
        if lora:
            add_lora(self.model, 8, 16, ["embed", "norm"], seed=0)
        self.flops = flops_per_token(self.model, config.row_tokens)
        settings = ExtendConfig(
            optimizer="adamw" if config.optimizer == "none" else config.optimizer, lora_rank=8 if lora else 0,
            fused=config.fused, float8=config.float8, checkpointing=config.recompute,
            compile="layers" if config.compile and config.method != "qlora" else "none",
        )  # fmt: skip
        self.optimizer: Any = None if config.optimizer == "none" else optimizer_of(settings, self.model)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if isinstance(self.optimizer, LeanAdamW):
            for parameter in trained:  # so that the peak counts them from the start
                self.optimizer.moments(parameter)
        elif self.optimizer is not None:
            for parameter in trained:  # so that gradients and moments are there from the start, as after any step
                parameter.grad = torch.zeros_like(parameter)
            self.optimizer.step()
        self.decoder: Any = self.model.model
        self.budget: dict[str, float] = {}
        if self.reference:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            self.budget = make_fast(self.model, settings, device)
        self.objective = Objective(self.model, False)
        self.objective.dense = True
        generator = torch.Generator(device).manual_seed(0)
        shape = (config.micro_rows, config.row_tokens)
        self.ids_BT = torch.randint(SHAPES[config.shape][0], shape, device=device, generator=generator)
        self.positions_BT = torch.from_numpy(self.positions()).to(device).expand(shape).contiguous()
        self.weights_BT = torch.full(shape, 1.0 / (config.rows * (config.row_tokens - 1)), device=device)

    def positions(self) -> Any:
        from endprompt.positions import position_ids

        config = self.config
        if config.method not in ("endprompt", "lora", "qlora"):
            return position_ids("contiguous", config.row_tokens, 0, config.target)
        prompt = min(20, config.row_tokens // 2)
        return position_ids("endprompt", config.row_tokens - prompt, prompt, config.target)

    def micro_batch(self) -> None:
        """Forward and backward of `micro_rows` rows."""
        import torch._functorch.config

        from endprompt.model.attention import attention_backends

        share = self.config.micro_rows / self.config.rows
        if self.reference and self.config.whole_logits:
            loss = share * self.model(input_ids=self.ids_BT, labels=self.ids_BT, use_cache=False).loss
            loss.backward()
        else:
            kernels = contextlib.nullcontext() if self.reference else attention_backends(self.device)
            with kernels, torch._functorch.config.patch(self.budget):
                loss = self.objective(self.ids_BT, self.positions_BT, self.weights_BT)
                loss.backward()
        self.loss = loss.detach() / share

    def optimizer_step(self) -> None:
        from endprompt.fast.linears import after_step
        from endprompt.train.optimizers import clip_gradients

        clip_gradients(self.optimizer, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)  # an update without gradients would cost nothing
        after_step(self.model)

    def whole_step(self) -> None:
        for _ in range(self.config.rows // self.config.micro_rows):
            self.micro_batch()
        if self.optimizer is not None:
            self.optimizer_step()

    def timed(self, work: Callable[[], None]) -> float:
        seconds, _ = timed(self.device.type, work)
        self.last_loss = float(self.loss)
        return seconds
