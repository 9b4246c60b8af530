"""What the device gives for the products of one layer, and for attention, by backend."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.speed.config import say
from endprompt.shapes import SHAPES, model_config


def rate(flops: float, work: Callable[[], Any], seconds: float = 0.15) -> float:
    """Sustained TFLOP/s of `work`, which takes `flops`."""
    import torch

    wait = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    for _ in range(2):
        work()
    wait()
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        for _ in range(4):
            work()
        wait()
        count += 4
    return count * flops / (time.perf_counter() - started) / 1e12


def backend_errors(shape: str, layers: int, tokens: int) -> list[dict[str, Any]]:
    """Relative error, in percent, of logits and gradients at jumped positions against the eager attention's.

    1 and 2 rows of `tokens`, the last 20 of them at the end of a window 8 times as long; the shape with fewer layers.
    """
    import torch

    from endprompt.model import new_model, training_attention
    from endprompt.results import result_row
    from endprompt.runs import environment
    from endprompt.train.loss import linear_cross_entropy

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = model_config(shape)
    config.use_cache, config.num_hidden_layers = False, layers
    names = backends(device)
    positions = torch.cat([torch.arange(tokens - 20), torch.arange(8 * tokens - 20, 8 * tokens)]).to(device)
    generator = torch.Generator(device).manual_seed(0)
    errors: list[dict[str, Any]] = []
    model = new_model(config, seed=0, dtype="bfloat16", attention=training_attention("eager"), device=str(device))
    for batch in (1, 2):
        ids = torch.randint(config.vocab_size, (batch, tokens), device=device, generator=generator)
        labels = ids[:, 1:].reshape(-1)
        each = torch.full(labels.shape, 1 / labels.numel(), device=device)
        found: dict[str, dict[str, torch.Tensor]] = {}
        for name in ("eager", *names):
            try:
                model.set_attn_implementation(training_attention(name))
                hidden = model.model(input_ids=ids, position_ids=positions.expand(batch, -1), use_cache=False)[0]
                linear_cross_entropy(hidden[:, :-1].flatten(0, 1), model.lm_head.weight, labels, each).backward()
                gradient = model.model.layers[0].self_attn.q_proj.weight.grad
                assert gradient is not None
                with torch.no_grad():
                    found[name] = {"logits": model.lm_head(hidden).float(), "gradient": gradient.float().clone()}
            except Exception as error:  # a package's kernel may not run here: the others still count
                say(f"attention {name}, {batch} rows: {error!r}")
            model.zero_grad(set_to_none=True)
        for name in found.keys() - {"eager"}:
            for what, value in found[name].items():
                expected = found["eager"][what]
                errors.append(
                    result_row(
                        suite="attention-backends",
                        task=what,
                        length=tokens,
                        metric="relative_error_percent",
                        value=100 * float((value - expected).norm() / expected.norm()),
                        n=batch,
                        model=shape,
                        method=name,
                        seed=0,
                        setting={"layers": layers, "rows": batch, "end_prompt": 20, "window": 8 * tokens},
                        environment=environment(),
                    )
                )
                say(f"{what}, {name}, {batch} rows: {errors[-1]['value']:.3f} % from eager")
    return errors


def backends(device: Any) -> list[str]:
    """The causal-only attentions that can be tried here, beside eager."""
    from endprompt.model.attention import FLASH_PACKAGES

    if device.type == "cpu":
        return ["sdpa"]
    return ["sdpa", "cudnn", "flex", *(name for name in FLASH_PACKAGES if installed(name))]


def ceilings(shape: str, tokens: int) -> list[dict[str, Any]]:
    """Sustained TFLOP/s of each matrix product of a layer, on random data."""
    import torch

    from endprompt.fast.products import add_product

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    hidden, _, heads, groups, intermediate, *_ = SHAPES[shape][1:]
    head_dim = hidden // heads
    wide = hidden + 2 * groups * head_dim
    sizes = {
        "q, o": (hidden, hidden),
        "k, v": (groups * head_dim, hidden),
        "q+k+v in one": (wide, hidden),
        "gate, up": (intermediate, hidden),
        "gate+up in one": (2 * intermediate, hidden),
        "down": (hidden, intermediate),
    }
    new: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    rates: dict[str, float] = {}

    for name, (out, inside) in sizes.items():
        x, w, g = (torch.randn(size, **new) for size in ((tokens, inside), (out, inside), (tokens, out)))
        total = torch.zeros(out, inside, device=device)
        flops = 2.0 * tokens * out * inside
        rates[f"{name}: output"] = rate(flops, partial(torch.matmul, x, w.t()))
        rates[f"{name}: input gradient"] = rate(flops, partial(torch.matmul, g, w))
        rates[f"{name}: weight gradient"] = rate(flops, partial(torch.matmul, g.t(), x))
        rates[f"{name}: weight gradient, added in float32"] = rate(flops, partial(add_product, total, g, x))
        if device.type == "cuda":
            rates |= float8_rates(name, x, w, g, flops)
    return rate_rows(rates, shape, tokens)


def attention_rates(shape: str, tokens: int, rows: int = 2) -> list[dict[str, Any]]:
    """TFLOP/s of the attention kernels that are there, on causal rows; the backward pass counts 2.5 times."""
    import torch

    from endprompt.model import ATTENTIONS

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    hidden, _, heads, groups, *_ = SHAPES[shape][1:]

    def random(count: int) -> torch.Tensor:
        """[rows, count, tokens, head dim] in memory as projections give it: the heads of a token side by side."""
        whole = torch.randn(rows, tokens, count, hidden // heads, device=device, dtype=torch.bfloat16)
        return whole.transpose(1, 2).requires_grad_()

    query, key, value, grad = (random(count) for count in (heads, groups, groups, heads))
    parts = (query, key, value)
    causal = 2.0 * rows * tokens * tokens * hidden
    rates: dict[str, float] = {}
    for name in backends(device):
        if name == "flex" and device.type == "cuda":
            continue  # without torch.compile it makes all logits at once

        def forward(name: str = name) -> Any:
            return ATTENTIONS[name](torch.nn.Module(), query, key, value)[0]

        try:
            rates[f"attention {name}: forward"] = rate(causal, forward)
            rates[f"attention {name}: forward and backward"] = rate(
                3.5 * causal, lambda: torch.autograd.grad(forward(), parts, grad.detach().transpose(1, 2))
            )
        except Exception as error:  # a package's kernel may not run here: the others still count
            say(f"attention {name}: {error!r}")
    return rate_rows(rates, shape, tokens)


def installed(attention: str) -> bool:
    """Whether the package of a flash attention is there; it is not imported."""
    import importlib.util

    from endprompt.model.attention import FLASH_PACKAGES

    try:
        spec = importlib.util.find_spec(FLASH_PACKAGES[attention][0])
    except ModuleNotFoundError:
        return False
    return spec is not None and spec.origin is not None  # flash-attn-4 alone leaves `flash_attn` an empty namespace


def rate_rows(rates: dict[str, float], shape: str, tokens: int) -> list[dict[str, Any]]:
    from endprompt.results import result_row
    from endprompt.runs import environment

    about = environment()
    return [
        result_row(
            suite="training-speed",
            task=name,
            length=tokens,
            metric="tflop_per_s",
            value=value,
            model=shape,
            method="ceiling",
            seed=0,
            environment=about,
        )
        for name, value in rates.items()
    ]


def float8_rates(name: str, x: Any, w: Any, g: Any, flops: float) -> dict[str, float]:
    from endprompt.fast.float8 import ACTIVATION, GRADIENT, scaled_product, to_float8

    (x8, sx), (w8, sw), (g8, sg) = to_float8(x, ACTIVATION), to_float8(w, ACTIVATION), to_float8(g, GRADIENT)
    w8t, g8t, x8t = w8.t().contiguous(), g8.t().contiguous(), x8.t().contiguous()
    rates = {f"{name}: output, float8": rate(flops, lambda: scaled_product(x8, w8.t(), sx, sw, x.dtype, True))}
    for fast in (False, True):
        how = "fast" if fast else "exact"
        rates[f"{name}: input gradient, float8 {how}"] = rate(
            flops, partial(scaled_product, g8, w8t.t(), sg, sw, x.dtype, fast)
        )
        rates[f"{name}: weight gradient, float8 {how}"] = rate(
            flops, partial(scaled_product, g8t, x8t.t(), sg, sx, x.dtype, fast)
        )
    return rates
