"""Loss curves and errors of sums: does a leaner step still learn?"""

from __future__ import annotations

from typing import Any

from endprompt.shapes import model_config

ARMS = {
    "exact": "float32 weights and AdamW of torch, products in bfloat16",
    "lean": "bfloat16 weights, stochastic rounding, one-byte moments, float32 gradient sums",
    "lean-float8-exact": "the same with float8 layers, backward products accumulated in float32",
    "lean-float8-fast": "the same with float8 layers, fast accumulation everywhere",
    "lean-float8-fast-head": "the same, logits and their gradient to the layers in float8 too",
    "nearest": "bfloat16 weights and AdamW of torch: what stochastic rounding is for",
}


def learning_rows(rows: int, tokens: int, vocabulary: int, seed: int) -> Any:
    """Rows that can be learnt, int64 [rows, tokens]: a walk with 4 ways on from a token, then its copy."""
    import numpy as np

    ways = np.random.default_rng(0).integers(0, vocabulary, (vocabulary, 4))
    rng = np.random.default_rng([1, seed])
    half = tokens // 2
    out = np.empty((rows, tokens), np.int64)
    out[:, 0] = rng.integers(0, vocabulary, rows)
    for t in range(1, half):
        out[:, t] = ways[out[:, t - 1], rng.integers(0, 4, rows)]
    out[:, half : 2 * half] = out[:, :half]
    return out


def loss_curve(
    arm: str, steps: int, rows: int, lr: float, shape: str = "small", compile: bool = False
) -> list[dict[str, Any]]:
    """Train a small model from scratch; one row a tenth step. The same weights and the same data for every arm."""
    import torch

    from endprompt.fast import linears
    from endprompt.fast.float8 import Float8Matrix
    from endprompt.model import new_model, training_attention
    from endprompt.results import result_row
    from endprompt.runs import environment
    from endprompt.train.loss import linear_cross_entropy
    from endprompt.train.optimizers import clip_gradients, make_optimizer

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = model_config(shape)
    config.use_cache = False
    model = new_model(config, seed=0, dtype="float32", attention=training_attention("sdpa"), device=str(device)).train()
    exact, lean = arm == "exact", arm.startswith("lean")
    if not exact:
        model.to(torch.bfloat16)
    optimizer = make_optimizer("lean" if lean else "adamw", model, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    float8 = arm.split("-")[2] if "float8" in arm else "none"
    if lean:
        linears.convert(model, float8)
    if compile:
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    tokens, warmup, curve = config.max_position_embeddings, 20, []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / warmup) * min(1.0, (steps - step) / (0.3 * steps))
        ids = torch.from_numpy(learning_rows(rows, tokens, config.vocab_size, step)).to(device)
        labels = ids[:, 1:].reshape(-1)
        weights = torch.full(labels.shape, 1 / labels.numel(), device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=exact):
            hidden = model.model(input_ids=ids, use_cache=False)[0][:, :-1].flatten(0, 1)
            head = model.lm_head.weight
            head8 = Float8Matrix(head.detach(), float8 == "fast") if arm.endswith("head") else None
            loss = linear_cross_entropy(hidden, head, labels, weights, head8=head8)
        loss.backward()
        clip_gradients(optimizer, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        linears.after_step(model)
        if step % 10 == 9 or step == 0:
            curve.append((step + 1, loss.detach()))
    about = environment()
    return [
        result_row(
            suite="training-loss",
            task="copy",
            length=tokens,
            metric="loss",
            value=float(value),
            model=shape,
            method=arm,
            seed=0,
            step=step,
            what=ARMS[arm],
            setting={"steps": steps, "rows": rows, "lr": lr, "compile": compile},
            environment=about,
        )
        for step, value in curve
    ]


def sum_errors(micro_batches: int, shape: str = "small") -> list[dict[str, Any]]:
    """Relative error of the gradient summed over micro-batches in float32 and in bfloat16, against float64 sums."""
    import torch

    from endprompt.model import new_model, training_attention
    from endprompt.results import result_row
    from endprompt.runs import environment
    from endprompt.train.loss import linear_cross_entropy

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = model_config(shape)
    config.use_cache = False
    model = new_model(
        config, seed=0, dtype="bfloat16", attention=training_attention("sdpa"), device=str(device)
    ).train()
    weights = [layer.mlp.down_proj.weight for layer in model.model.layers]
    dtypes = (torch.float64, torch.float32, torch.bfloat16)
    sums = {dtype: [torch.zeros_like(weight, dtype=dtype) for weight in weights] for dtype in dtypes}
    for index in range(micro_batches):
        ids = torch.from_numpy(learning_rows(8, config.max_position_embeddings, config.vocab_size, index)).to(device)
        labels = ids[:, 1:].reshape(-1)
        each = torch.full(labels.shape, 1 / labels.numel(), device=device)
        hidden = model.model(input_ids=ids, use_cache=False)[0]
        linear_cross_entropy(hidden[:, :-1].flatten(0, 1), model.lm_head.weight, labels, each).backward()
        for totals in sums.values():
            for total, weight in zip(totals, weights):
                total.add_(weight.grad)
        model.zero_grad(set_to_none=True)
    rows = []
    for dtype in dtypes[1:]:
        pairs = list(zip(sums[dtype], sums[torch.float64]))
        error = sum(float((a.double() - b).square().sum()) for a, b in pairs) ** 0.5
        norm = sum(float(b.square().sum()) for _, b in pairs) ** 0.5
        rows.append(
            result_row(
                suite="training-loss",
                task="gradient-sum",
                metric="relative_error_percent",
                value=100 * error / norm,
                n=micro_batches,
                model=shape,
                method=str(dtype).removeprefix("torch."),
                seed=0,
                environment=environment(),
            )
        )
    return rows
