"""Compiles the kernels for a GPU that need not be there; each must stay in float32 and load 16 bytes at a time."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from endprompt.fast import decode, kernels, lean


def main() -> None:
    BF16, F32, I32 = "*bf16", "*fp32", "i32"
    SMALL = 99 * 1024  # shared memory that small GPUs have
    codes = {"LEVELS_FIRST": lean.LEVELS_FIRST, "LEVELS_ROOT": lean.LEVELS_ROOT, "BLOCK": lean.BLOCK}
    codes |= {"OCTAVES_FIRST": lean.OCTAVES_FIRST, "OCTAVES_ROOT": lean.OCTAVES_ROOT, "STOCHASTIC": True}
    heads = {"H": 32, "G": 8, "HALF": 64, "HEADS": 32, "GROUPS": 8, "LANES": 64}
    norm = {"D": 4096, "WIDTH": 4096}
    loss, update = kernels.CROSS_ENTROPY, kernels.LEAN_UPDATE

    def compiled(kernel, kinds, launch, warps=0, **constants):
        free = iter(kinds)
        types = {name: "constexpr" if name in constants else next(free) for name in kernel.arg_names}
        assert next(free, None) is None
        places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types.values()) if kind[0] in "*i"}
        source = ASTSource(fn=kernel, signature=types, constexprs=places, attrs=aligned)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps or launch.warps})
        assert made.metadata.shared <= SMALL, (kernel, constants)
        return made.asm

    for kernel, kinds, launch, constants in (
        (kernels._swiglu, [BF16] * 3, kernels.SWIGLU, {"F": 14336, "BLOCK": kernels.SWIGLU.block}),
        (
            *(kernels._swiglu_backward, [BF16] * 6, kernels.SWIGLU),
            {"F": 14336, "BLOCK": kernels.SWIGLU.block, "AGAIN": True},
        ),
        (kernels._rms_norm, [BF16] * 5 + [F32, "fp32"], kernels.NORM, norm | {"ADD": True}),
        (
            *(kernels._rms_norm_backward, [BF16, F32] + [BF16] * 7 + [F32, I32], kernels.NORM_BACKWARD),
            norm | {"GRADS": 3},
        ),
        (kernels._rotate, [BF16] * 6 + [I32] * 2, kernels.ROTATE, heads),
        *(
            (
                *(decode._attend, [BF16] * 3 + ["*i64"] * 2 + [F32] * 3 + ["fp32", I32], launch),
                {"G": 8, "R": 4, "D": width, "BLOCK": launch.block, "STAGES": 2},
            )
            for width, launch in decode.ATTEND.items()
        ),
        (
            *(kernels._cross_entropy, [BF16, "*i64", F32, F32], loss),
            {"V": 128256, "BLOCK": loss.block, "SIDE_BY_SIDE": 8},
        ),
        (
            *(kernels._lean_update, [BF16, F32, "*i8", F32, "*u8", F32, F32, F32, "*i32", I32, I32], update),
            codes | {"BLOCKS": update.block},
        ),
    ):
        made = compiled(kernel, kinds, launch, **constants)
        assert made["cubin"] and ".f64" not in made["ptx"], kernel
        assert any(wide in made["ptx"] for wide in ("ld.global.v4", ".v4.b32", "cp.async.cg")), kernel
    for width in (4096, 8192, 16384):  # the launches that a width takes
        for kind in (BF16, F32):
            for grads in (1, 2):
                launch, constants = kernels.NORM_BACKWARD, {"D": width, "WIDTH": width, "GRADS": grads}
                kinds, warps = [kind, F32] + [kind] * 7 + [F32, I32], kernels.warps_for(width, launch)
                compiled(kernels._rms_norm_backward, kinds, launch, warps, **constants)
    print("compiled")


if __name__ == "__main__":
    main()
