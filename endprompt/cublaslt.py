"""Matrix products by cuBLASLt with an algorithm of choice.

torch takes the first algorithm that cuBLAS proposes for a product. It proposes dozens: tiles, clusters and orders of
the same sums, whose speed and energy differ by percents, and on a GPU at its power limit energy is speed. `candidates`
lists them and `multiply` runs one. This is the C interface by ctypes, in the library that torch itself has loaded; a
product of tensors is a few microseconds of Python.

Row-major matrices are column-major ones transposed, so out = a b is asked for as out.T = b.T a.T.

Legend: M, N rows and columns of the result, K length of the sums.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from typing import Any

import torch

WORKSPACE = 32 << 20  # bytes, what NVIDIA advises for Hopper
_TYPES = {torch.float32: 0, torch.bfloat16: 14, torch.float16: 2}  # cudaDataType
_COMPUTE_32F, _TRANSA, _TRANSB, _MAX_WORKSPACE = 68, 3, 4, 1
LIBRARIES = ("libcublasLt.so.13", "libcublasLt.so.12")


class Algorithm(ctypes.Structure):
    """One of cuBLASLt's ways to make a product; opaque, and valid for the library's version that proposed it."""

    _fields_ = [("data", ctypes.c_uint64 * 8)]


class _Proposal(ctypes.Structure):
    _fields_ = [
        ("algorithm", Algorithm),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    ]


@functools.cache
def library() -> Any:
    """cuBLASLt, or None where it cannot be loaded."""
    for name in LIBRARIES:
        try:
            found = ctypes.CDLL(name)
        except OSError:
            continue
        found.cublasLtGetVersion.restype = ctypes.c_size_t
        return found
    return None


def version() -> int:
    """Of the loaded library, as 130100 for 13.1.0."""
    return int(library().cublasLtGetVersion())


def _call(name: str, *arguments: Any) -> None:
    status = getattr(library(), name)(*arguments)
    if status:
        raise RuntimeError(f"{name} failed with cublasStatus {status}")


@functools.cache
def _handle(device: int) -> ctypes.c_void_p:
    handle = ctypes.c_void_p()
    with torch.cuda.device(device):
        _call("cublasLtCreate", ctypes.byref(handle))
    return handle


def _stream(device: int) -> int:
    return torch.cuda.current_stream(device).cuda_stream


@functools.cache
def _workspace(device: int, stream: int) -> torch.Tensor:
    return torch.empty(WORKSPACE, dtype=torch.uint8, device=f"cuda:{device}")


def _layout(matrix: torch.Tensor) -> tuple[bool, int]:
    """(whether its columns are what lies side by side in memory, the distance of what does not)."""
    rows, columns = matrix.stride()
    if columns == 1 and rows >= matrix.shape[1]:
        return False, rows
    if rows == 1 and columns >= matrix.shape[0]:
        return True, columns
    raise ValueError(
        f"a matrix must have a dimension without gaps: shape={tuple(matrix.shape)} strides={rows, columns}"
    )


Key = tuple[Any, ...]


def key_of(a_MK: torch.Tensor, b_KN: torch.Tensor, out_MN: torch.Tensor, adds: bool) -> Key:
    """What an algorithm is chosen for: sizes, layouts, types, and whether the product is added to what is there.

    Raises ValueError for matrices that do not fit or that cuBLASLt cannot take.
    """
    (rows, inside), (also_inside, columns) = a_MK.shape, b_KN.shape
    if inside != also_inside or out_MN.shape != (rows, columns):
        raise ValueError(f"matrices do not fit: {tuple(a_MK.shape)} by {tuple(b_KN.shape)} to {tuple(out_MN.shape)}")
    if a_MK.dtype != b_KN.dtype or a_MK.dtype not in _TYPES or out_MN.dtype not in _TYPES:
        raise ValueError(f"matrices of these types cannot be multiplied: {a_MK.dtype} {b_KN.dtype} {out_MN.dtype}")
    (a_turned, a_lead), (b_turned, b_lead), (out_turned, out_lead) = map(_layout, (a_MK, b_KN, out_MN))
    if out_turned and out_MN.shape[1] > 1:
        raise ValueError(f"the result must be row-major: strides={out_MN.stride()}")
    types = _TYPES[a_MK.dtype], _TYPES[out_MN.dtype]
    return rows, columns, inside, a_turned, a_lead, b_turned, b_lead, out_lead, *types, adds, a_MK.device.index


class _Plan:
    """Descriptors of one kind of product."""

    def __init__(self, key: Key):
        rows, columns, inside, a_turned, a_lead, b_turned, b_lead, out_lead, type_in, type_out, adds, device = key
        self.handle = _handle(device)
        self.work = ctypes.c_void_p()
        _call("cublasLtMatmulDescCreate", ctypes.byref(self.work), _COMPUTE_32F, 0)
        for attribute, turned in ((_TRANSA, b_turned), (_TRANSB, a_turned)):
            value = ctypes.c_int32(int(turned))
            _call("cublasLtMatmulDescSetAttribute", self.work, attribute, ctypes.byref(value), ctypes.c_size_t(4))
        # seen by columns: b.T is [N, K], or [K, N] where b itself lies turned; a.T likewise; the result [N, M]
        self.first = self._matrix(type_in, *((inside, columns) if b_turned else (columns, inside)), b_lead)
        self.second = self._matrix(type_in, *((rows, inside) if a_turned else (inside, rows)), a_lead)
        self.out = self._matrix(type_out, columns, rows, out_lead)
        self.matrices = self.first, self.second, self.out, self.out
        self.alpha, self.beta = ctypes.c_float(1.0), ctypes.c_float(1.0 if adds else 0.0)
        self.pointers = ctypes.byref(self.alpha), ctypes.byref(self.beta)

    @staticmethod
    def _matrix(kind: int, rows: int, columns: int, lead: int) -> ctypes.c_void_p:
        matrix = ctypes.c_void_p()
        sizes = ctypes.c_uint64(rows), ctypes.c_uint64(columns), ctypes.c_int64(lead)
        _call("cublasLtMatrixLayoutCreate", ctypes.byref(matrix), kind, *sizes)
        return matrix


@functools.cache
def _plan(key: Key) -> _Plan:
    return _Plan(key)


def candidates(key: Key, count: int = 64) -> list[Algorithm]:
    """Algorithms for a product: what cuBLASLt proposes, its first choice first, then other makes of that choice.

    The others have tile, cluster, option or order of blocks of other proposals, where the library can run them so.
    """
    plan, preference = _plan(key), ctypes.c_void_p()
    _call("cublasLtMatmulPreferenceCreate", ctypes.byref(preference))
    most = ctypes.c_size_t(WORKSPACE)
    _call("cublasLtMatmulPreferenceSetAttribute", preference, _MAX_WORKSPACE, ctypes.byref(most), ctypes.c_size_t(8))
    found, number = (_Proposal * count)(), ctypes.c_int()
    request = plan.handle, plan.work, *plan.matrices, preference, count, found, ctypes.byref(number)
    _call("cublasLtMatmulAlgoGetHeuristic", *request)
    _call("cublasLtMatmulPreferenceDestroy", preference)
    proposed = [Algorithm.from_buffer_copy(one.algorithm) for one in found[: number.value] if one.state == 0]
    settings = [about(one) for one in proposed]
    told = [name for name in VARIED if settings and all(name in one for one in settings)]
    values = [[0, 1] if name == "swizzle" else sorted({one[name] for one in settings}) for name in told]
    made = {bytes(one): one for one in proposed}
    for chosen in itertools.product(*values) if told else ():
        one = Algorithm.from_buffer_copy(proposed[0])
        if all(_set(one, name, value) for name, value in zip(told, chosen)) and _runs(plan, one):
            made.setdefault(bytes(one), one)
    return list(made.values())


def _set(algorithm: Algorithm, name: str, value: int) -> bool:
    attribute, size = CONFIG[name]
    content = ctypes.c_uint64(value)  # little-endian: its first bytes are the value in fewer
    arguments = ctypes.byref(algorithm), attribute, ctypes.byref(content), ctypes.c_size_t(size)
    return not library().cublasLtMatmulAlgoConfigSetAttribute(*arguments)


def _runs(plan: _Plan, algorithm: Algorithm) -> bool:
    """Whether cuBLASLt can make the product so, in the workspace that there is."""
    result = _Proposal()
    arguments = plan.handle, plan.work, *plan.matrices, ctypes.byref(algorithm), ctypes.byref(result)
    return not library().cublasLtMatmulAlgoCheck(*arguments) and not result.state and result.workspace <= WORKSPACE


def multiply(
    key: Key,
    algorithm: Algorithm,
    a_MK: torch.Tensor,
    b_KN: torch.Tensor,
    out_MN: torch.Tensor,
    added_MN: torch.Tensor | None = None,
) -> None:
    """out = a b, or out = added + a b where the key says so, on the current stream.

    key: `key_of` of the same matrices. added: laid out as `out`, which it is if it is not given.
    """
    plan, device = _plan(key), key[-1]
    stream = _stream(device)
    workspace = _workspace(device, stream)
    pointer = ctypes.c_void_p
    out = pointer(out_MN.data_ptr())
    added = out if added_MN is None else pointer(added_MN.data_ptr())
    alpha, beta = plan.pointers
    _call(
        "cublasLtMatmul", plan.handle, plan.work, alpha, pointer(b_KN.data_ptr()), plan.first,
        pointer(a_MK.data_ptr()), plan.second, beta, added, plan.out, out, plan.out, ctypes.byref(algorithm),
        pointer(workspace.data_ptr()), ctypes.c_size_t(WORKSPACE), pointer(stream),
    )  # fmt: skip


#: What an algorithm is made of: cuBLASLt's number of the attribute and its bytes.
CONFIG = {
    "algorithm": (0, 4),
    "tile": (1, 4),
    "split": (2, 4),
    "reduction": (3, 4),
    "swizzle": (4, 4),
    "custom": (5, 4),
    "stages": (6, 4),
    "inner": (7, 2),
    "cluster": (8, 2),
}
VARIED = ("tile", "swizzle", "custom", "cluster")


def about(algorithm: Algorithm) -> dict[str, int]:
    """What of an algorithm cuBLASLt tells, in its own numbers."""
    told = {}
    for name, (attribute, size) in CONFIG.items():
        value, written = ctypes.c_uint64(), ctypes.c_size_t()
        content = attribute, ctypes.byref(value), ctypes.c_size_t(size), ctypes.byref(written)
        if not library().cublasLtMatmulAlgoConfigGetAttribute(ctypes.byref(algorithm), *content):
            told[name] = value.value
    return told
