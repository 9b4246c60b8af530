"""The kernels against torch, in a process of their own: `python -m tests.support.check_kernels cpu`, with
TRITON_INTERPRET=1, or `cuda`.
"""

import sys

import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from endprompt import fast
from endprompt.fast import available, decode, kernels, layers, lean
from endprompt.train import optimizers
from endprompt.train.loss import _chunk, _chunk_eager


def main(device: str) -> None:
    torch.manual_seed(0)
    assert available.triton_kernels(torch.empty(0, device=device)) is kernels

    def same(found, expected, dtype, what):
        for one, other in zip(found, expected):
            if other.numel() and one.numel():
                error = float((one.double() - other.double()).norm() / other.double().norm())
                # triton's interpreter cuts bfloat16 off where a GPU rounds; a GPU's powers of two are near, not
                # exact, 7e-6 of a gradient where the label has nearly all weight
                exact = dtype == torch.float32
                limit = (5e-6 if exact else 0.02) if device == "cpu" else 2e-5 if exact else 0.004
                assert error < limit, (what, dtype, error)

    for dtype in (torch.float32, torch.bfloat16):
        for rows, size in ((1, 16), (5, 48), (37, 128), (9, 257)):

            def random(*shape, dtype=dtype):
                return torch.randn(*shape, device=device).to(dtype)

            x, y, z, g, h, weight = *(random(rows, size) for _ in range(5)), random(size)
            same([kernels.swiglu(x, y)], [layers.torch_swiglu(x, y)], dtype, "swiglu")
            for again in (True, False):
                got = kernels.swiglu_backward(z, x, y, again)
                same(got, layers.torch_swiglu_backward(z, x, y, again), dtype, "swiglu backward")
                assert again or not got[2].numel()
            assert torch.equal(layers.swiglu(*torch.cat([x, y], dim=1).chunk(2, dim=1)), kernels.swiglu(x, y))
            for added in (None, y):
                got, want = kernels.rms_norm(x, added, weight, 1e-3), layers.torch_norm(x, added, weight, 1e-3)
                same(got, want, dtype, "norm")
                assert got[2].dtype == torch.float32
            for grads in ([g], [g, h], [g, h, z]):
                for launch in (kernels.NORM_BACKWARD, kernels.Launch(warps=4, programs=1)):
                    got = kernels.rms_norm_backward(x, want[2], weight, y, grads, launch)
                    same(got, layers.torch_norm_backward(x, want[2], weight, y, grads), dtype, "norm backward")

    # triton's interpreter multiplies no matrices of bfloat16
    for dtype in (torch.float32, torch.float16 if device == "cpu" else torch.bfloat16):
        for rows, heads, groups, width, places, several in ((3, 4, 2, 16, 333, 1), (2, 9, 3, 64, 200, 2)):
            query, key = (torch.randn(rows, 2, n, width, device=device).to(dtype) for n in (heads, groups))
            cos, sin = (torch.randn(several if rows == several else 1, 2, width, device=device).to(dtype) for _ in "cs")
            want = apply_rotary_pos_emb(query.double(), key.double(), cos.double(), sin.double(), unsqueeze_dim=2)
            same(kernels.rotate(query, key, cos, sin), want, dtype, "rotate")
            keys, values = (torch.randn(rows, groups, places, width, device=device).to(dtype) for _ in "kv")
            slot = torch.tensor([places - 4, 0, 5], device=device)[:rows]
            wanted = keys.clone(), values.clone()
            for kept, token in zip(wanted, (0, 1)):
                kept[torch.arange(rows), :, slot] = key[:, token]
            decode.keep(key[:, 0].contiguous(), key[:, 1].contiguous(), keys, values, slot)
            assert torch.equal(keys, wanted[0]) and torch.equal(values, wanted[1])
            keys[:, :, places - 3 :], values[:, :, places - 3 :] = (
                torch.nan,
                torch.nan,
            )  # no place but a row's own counts
            begin, end = (
                torch.tensor([0, 5, 7], device=device)[:rows],
                torch.tensor([places - 3, 70, 0], device=device)[:rows],
            )
            place = torch.arange(places, device=device)
            seen = (place >= begin[:, None]) & (place < end[:, None])
            wide, wide_values = (x.double().nan_to_num().repeat_interleave(heads // groups, 1) for x in (keys, values))
            logits = torch.einsum("bhd,bhsd->bhs", query[:, 0].double(), wide) * 0.3
            shares = logits.masked_fill(~seen[:, None], -torch.inf).softmax(-1).nan_to_num()
            for programs in (1, 40):
                launch = kernels.Launch(block=16, warps=4, programs=programs, stages=3)
                got = decode.attend(query[:, 0].contiguous(), keys, values, begin, end, 0.3, launch)
                same([got[:2]], [torch.einsum("bhs,bhsd->bhd", shares, wide_values)[:2]], dtype, "attend")
                assert not got[2:].any()  # a row without places

    for dtype in (torch.float32, torch.bfloat16):
        for count, vocabulary, block in ((3, 40, 64), (5, 700, 256), (2, 512, 128), (2, 3000, 0), (2, 700, 0)):
            logits = (4 * torch.randn(count, vocabulary, device=device)).to(dtype)
            logits[0, :-9] = float("-inf")  # a whole block without a number
            labels = torch.randint(vocabulary - 9, vocabulary, (count,), device=device)
            weights = torch.rand(count, device=device)
            weights[-1] = 0
            loss, grad = _chunk_eager(logits, labels, weights)
            turned = logits.t().contiguous().t()  # columns in one piece
            same(_chunk(turned, labels, weights), [loss, grad], dtype, "cross-entropy, turned")
            launches = [kernels.Launch(block=block, warps=4)] if block else []  # else its own
            losses = kernels.cross_entropy(logits, labels, weights, *launches)
            assert losses.dtype == torch.float32 and losses[-1] == 0 and not logits[-1].any()
            same([losses.sum(), logits], [loss, grad], dtype, "cross-entropy")

    def trained(dtype, own):
        lean.triton_kernels = lambda x: kernels if own else None
        torch.manual_seed(0)
        sizes = (100, 256, 3001, 2 * 2048)
        weights = [torch.nn.Parameter(torch.randn(size).to(device, dtype)) for size in sizes]
        optimizer = fast.LeanAdamW(weights, lr=0.01, weight_decay=0.1, seed=3)
        for step in range(4):
            for weight in weights:
                weight.main_grad.copy_(torch.randn(weight.shape) * 10.0 ** (step - 2))
            optimizers.clip_gradients(optimizer, 20.0)
            optimizer.step()
        values = [part.detach().float().flatten().cpu() for part in weights]
        for name in lean.MOMENTS:
            values.append(torch.cat([optimizer.state[weight][name].float().flatten().cpu() for weight in weights]))
        return torch.cat(values[: len(sizes)]), *values[len(sizes) :]

    for dtype in (torch.float32, torch.bfloat16):
        (weight, *codes), (plain, *plain_codes) = trained(dtype, True), trained(dtype, False)
        # the same random bits: only what lies on the edge between two roundings may fall to the other side
        torch.testing.assert_close(weight, plain, rtol=2**-6 if dtype == torch.bfloat16 else 1e-3, atol=1e-4)
        if dtype == torch.bfloat16:
            assert float((weight != plain).double().mean()) < 0.01
        for one, other in zip(codes, plain_codes):
            assert float(((one - other).abs() > 1e-5 * other.abs()).double().mean()) < 0.01
            assert float((one - other).abs().max()) <= 2
    print("checked")


if __name__ == "__main__":
    main(sys.argv[1])
