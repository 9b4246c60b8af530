"""Products by an algorithm of choice: the interface of cuBLASLt against a stand-in that reads memory by its rules, the
choice against times that are set."""

import ctypes
import itertools
import json

import numpy as np
import pytest
import torch

from endprompt import cublaslt, products

NUMPY = {0: np.float32}
#: Where the stand-in's algorithms have tile, order of blocks and cluster: first bit and bits.
PLACES = {1: (0, 16), 4: (16, 16), 8: (32, 16)}


class StandIn:
    """What cuBLASLt's manual says of the functions that are called, for float32, in numpy.

    Matrices are column-major: entry (i, j) lies at i + j * lead. out = alpha op(A) op(B) + beta C.
    """

    def __init__(self):
        self.made, self.checked, self.waves = [], [], itertools.count()

    def keep(self, reference, value):
        self.made.append(value)
        reference._obj.value = len(self.made)
        return 0

    def cublasLtMatmulDescCreate(self, reference, compute, scale):
        assert (compute, scale) == (68, 0)  # CUBLAS_COMPUTE_32F, CUDA_R_32F
        return self.keep(reference, {3: 0, 4: 0})

    def cublasLtMatmulDescSetAttribute(self, work, attribute, value, size):
        assert size.value == 4 and attribute in (3, 4)  # TRANSA, TRANSB
        self.made[work.value - 1][attribute] = value._obj.value
        return 0

    def cublasLtMatrixLayoutCreate(self, reference, kind, rows, columns, lead):
        assert lead.value >= rows.value
        return self.keep(reference, (kind, rows.value, columns.value, lead.value))

    def cublasLtMatmulPreferenceCreate(self, reference):
        return self.keep(reference, {})

    def cublasLtMatmulPreferenceSetAttribute(self, preference, attribute, value, size):
        assert attribute == 1 and size.value == 8
        self.made[preference.value - 1]["workspace"] = value._obj.value
        return 0

    def cublasLtMatmulPreferenceDestroy(self, preference):
        return 0

    #: tile, order of blocks, cluster of what is proposed, which tells no more; the third cannot run
    PROPOSED = ((20, 0, 5), (23, 1, 3), (24, 0, 5))

    def cublasLtMatmulAlgoGetHeuristic(self, handle, work, a, b, c, d, preference, count, found, number):
        assert self.made[preference.value - 1]["workspace"] == cublaslt.WORKSPACE
        for place, (tile, swizzle, cluster) in enumerate(self.PROPOSED):
            found[place].algorithm.data[0] = tile + (swizzle << 16) + (cluster << 32)
            found[place].state = 15 if place == 2 else 0
        number._obj.value = len(self.PROPOSED)
        return 0

    def cublasLtMatmulAlgoConfigGetAttribute(self, algorithm, attribute, value, size, written):
        if attribute not in PLACES:
            return 7
        start, bits = PLACES[attribute]
        value._obj.value = algorithm._obj.data[0] >> start & (1 << bits) - 1
        return 0

    def cublasLtMatmulAlgoConfigSetAttribute(self, algorithm, attribute, value, size):
        start, bits = PLACES[attribute]
        word = algorithm._obj.data[0] & ~((1 << bits) - 1 << start)
        algorithm._obj.data[0] = word | int(ctypes.cast(value, ctypes.POINTER(ctypes.c_uint16))[0]) << start
        return 0

    def cublasLtMatmulAlgoCheck(self, handle, work, a, b, c, d, algorithm, result):
        word = algorithm._obj.data[0]
        self.checked.append((word & 0xFFFF, word >> 16 & 0xFFFF, word >> 32))
        result._obj.workspace = cublaslt.WORKSPACE + 1 if self.checked[-1] == (23, 0, 5) else 0
        return 15 if self.checked[-1] == (23, 0, 3) else 0

    def matrix(self, pointer, layout):
        kind, rows, columns, lead = layout
        flat = (ctypes.c_float * (lead * columns)).from_address(pointer.value)
        return np.lib.stride_tricks.as_strided(np.frombuffer(flat, NUMPY[kind]), (rows, columns), (4, 4 * lead))

    def cublasLtMatmul(self, handle, work, alpha, a, la, b, lb, beta, c, lc, d, ld, algorithm, space, size, stream):
        turns, layouts = self.made[work.value - 1], [self.made[one.value - 1] for one in (la, lb, lc, ld)]
        # the last column of a matrix need not reach its lead
        first, second, out = (self.matrix(p, layout) for p, layout in zip((a, b, d), (*layouts[:2], layouts[3])))
        first, second = (first.T if turns[3] else first), (second.T if turns[4] else second)
        assert lc.value == ld.value
        product = alpha._obj.value * first.astype(np.float64) @ second
        out[...] = product + (beta._obj.value * self.matrix(c, layouts[2]) if beta._obj.value else 0)
        return 0


@pytest.fixture
def stand_in(monkeypatch):
    library = StandIn()
    for cached in (cublaslt._plan, cublaslt._workspace):
        cached.cache_clear()
    monkeypatch.setattr(cublaslt, "library", lambda: library)
    monkeypatch.setattr(cublaslt, "_handle", lambda device: ctypes.c_void_p(1))
    monkeypatch.setattr(cublaslt, "_stream", lambda device: 0)
    monkeypatch.setattr(cublaslt, "_workspace", lambda device, stream: torch.empty(1))
    yield library
    cublaslt._plan.cache_clear()


def matrix(rows, columns, turned, wider=0):
    """Random, row-major or its transpose, with `wider` numbers between rows that are not the matrix's."""
    shape = (columns, rows + wider) if turned else (rows, columns + wider)
    whole = torch.randn(shape)
    part = whole[:, : shape[1] - wider]
    return part.t() if turned else part


@pytest.mark.parametrize("turned", list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("wider", [0, 5])
def test_products_are_asked_for_as_the_library_reads_memory(stand_in, turned, adds, wider):
    torch.manual_seed(0)
    a, b = matrix(7, 4, turned[0], wider), matrix(4, 9, turned[1], wider)
    out = matrix(7, 9, False, wider)
    expected = a.double() @ b.double() + (out.double() if adds else 0)
    key = cublaslt.key_of(a, b, out, adds)
    cublaslt.multiply(key, cublaslt.candidates(key)[0], a, b, out)
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)


def test_what_is_added_can_lie_elsewhere_and_stays(stand_in):
    torch.manual_seed(0)
    (a, b, added), out = (torch.randn(*shape) for shape in ((7, 4), (4, 9), (7, 9))), torch.full((7, 9), torch.nan)
    before, key = added.clone(), cublaslt.key_of(a, b, out, True)
    cublaslt.multiply(key, cublaslt.candidates(key)[0], a, b, out, added)
    torch.testing.assert_close(out, added + a @ b)
    assert torch.equal(added, before)


def test_kinds_of_products_have_keys_of_their_own():
    a, b, out = torch.randn(4, 6), torch.randn(6, 5), torch.empty(4, 5)
    wide = torch.randn(6, 8)[:, :5]
    keys = [
        cublaslt.key_of(a, b, out, False),
        cublaslt.key_of(a, b, out, True),
        cublaslt.key_of(a, torch.randn(5, 6).t(), out, False),
        cublaslt.key_of(a, wide, out, False),
        cublaslt.key_of(a.bfloat16(), b.bfloat16(), out, True),
    ]
    assert len(set(keys)) == 5


@pytest.mark.parametrize(
    ("a", "b", "out", "said"),
    [
        (torch.zeros(4, 6), torch.zeros(5, 5), torch.zeros(4, 5), r"do not fit: \(4, 6\) by \(5, 5\)"),
        (torch.zeros(4, 6), torch.zeros(6, 5), torch.zeros(5, 4), r"do not fit.* to \(5, 4\)"),
        (torch.zeros(4, 6), torch.zeros(6, 5).bfloat16(), torch.zeros(4, 5), "types cannot be multiplied"),
        (torch.zeros(4, 6, dtype=torch.float64), torch.zeros(6, 5, dtype=torch.float64), torch.zeros(4, 5), "types"),
        (torch.zeros(4, 12)[:, ::2], torch.zeros(6, 5), torch.zeros(4, 5), "without gaps"),
        (torch.zeros(4, 6), torch.zeros(6, 5), torch.zeros(5, 4).t(), "must be row-major"),
    ],
)
def test_what_it_cannot_multiply_is_an_error(a, b, out, said):
    with pytest.raises(ValueError, match=said):
        cublaslt.key_of(a, b, out, False)


def test_candidates_are_what_is_proposed_and_other_makes_that_run(stand_in):
    key = cublaslt.key_of(torch.zeros(4, 6), torch.zeros(6, 5), torch.zeros(4, 5), False)
    found = [cublaslt.about(one) for one in cublaslt.candidates(key)]
    assert found[:2] == [{"tile": 20, "swizzle": 0, "cluster": 5}, {"tile": 23, "swizzle": 1, "cluster": 3}]
    made = {(one["tile"], one["swizzle"], one["cluster"]) for one in found}
    assert len(made) == len(found)
    # of all pairings of two tiles, two orders and two clusters, but what does not run or takes too much memory
    assert made == set(itertools.product((20, 23), (0, 1), (3, 5))) - {(23, 0, 3), (23, 0, 5)}


# ---------------------------------------------------------------------------------------------------------------------
# The choice


@pytest.fixture
def measured(monkeypatch):
    """Products on a CPU as if it were a GPU; the times by what is timed come from `times`."""
    times = {"torch": 3.0, 0: 2.0, 1: 1.0, 2: 4.0}
    calls = []

    def multiply(key, algorithm, a, b, out, added=None):
        calls.append(algorithm.data[0])
        result = a.float() @ b.float()
        if algorithm.data[0] == 9:
            result = result * 1.05  # an algorithm that is wrong
        out.copy_(((out if added is None else added).float() if key[-2] else 0) + result)

    def algorithm(number):
        made = cublaslt.Algorithm()
        made.data[0] = number
        return made

    def fake_time(work, seconds=0.0):
        before = len(calls)
        work()
        value = times[calls[-1] if len(calls) > before else "torch"]
        if isinstance(value, Exception):
            raise value
        return value

    monkeypatch.setattr(products, "_chosen", {})
    monkeypatch.setattr(products, "measured", {})
    monkeypatch.setattr(products, "_on_gpu", lambda x: True)
    monkeypatch.setattr(products, "ALIGNED", 1)
    monkeypatch.setattr(products, "seconds_of", fake_time)
    monkeypatch.setattr(products, "_here", lambda: {"device": "this"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cublaslt, "library", lambda: "there")
    monkeypatch.setattr(cublaslt, "multiply", multiply)
    monkeypatch.setattr(cublaslt, "candidates", lambda key: [algorithm(n) for n in times if n != "torch"])
    # torch on a CPU does not add bfloat16 products to float32
    plain = products._torch_product
    monkeypatch.setattr(
        products,
        "_torch_product",
        lambda out, a, b, adds: plain(out, a.to(out.dtype), b.to(out.dtype), adds),
    )
    return times, calls


def some(rows=4, dtype=torch.bfloat16):
    torch.manual_seed(rows)
    return torch.randn(rows, 6).bfloat16(), torch.randn(6, 5).bfloat16(), torch.randn(rows, 5).to(dtype)


@pytest.mark.parametrize("adds", [False, True])
def test_the_fastest_is_taken_and_measured_once(measured, adds):
    _, calls = measured
    a, b, out = some(dtype=torch.float32)
    expected = a.float() @ b.float() + (out if adds else 0)
    with products.choose_products():
        products.product_into(out, a, b, adds)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)  # measuring has changed nothing
        (key,) = products._chosen
        assert products._chosen[key].data[0] == 1
        assert products.measured[key] == {"torch": 3000.0, "0": 2000.0, "1": 1000.0, "2": 4000.0}
        before = len(calls)
        products.product_into(out, a, b, adds)
        assert calls[before:] == [1]


def test_a_sum_with_a_product_is_a_product_that_adds(measured):
    times, _ = measured
    a, b, added = some()
    before = added.clone()
    with products.choose_products():
        for torch_s in (3.0, 0.5):
            times["torch"] = torch_s
            products._chosen.clear()
            result = products.plus_times(added, a, b)
            torch.testing.assert_close(result.float(), added.float() + a.float() @ b.float(), rtol=2**-8, atol=2**-8)
            assert torch.equal(added, before) and [key[-2] for key in products._chosen] == [True]
    assert torch.equal(products.plus_times(added, a, b), added + a @ b)


def test_torch_s_way_is_taken_where_it_is_the_fastest(measured):
    times, calls = measured
    times["torch"] = 0.5
    a, b, _ = some()
    with products.choose_products():
        products.product(a, b)
        before = len(calls)
        result = products.product(a, b)
    assert calls[before:] == [] and list(products._chosen.values()) == [None]
    assert torch.equal(result, a @ b)


def test_what_does_not_run_or_is_wrong_is_not_taken(measured):
    times, _ = measured
    times |= {9: 0.1, 1: RuntimeError("not supported")}
    a, b, _ = some()
    with products.choose_products():
        products.product(a, b)
    (key,) = products._chosen
    assert products._chosen[key].data[0] == 0 and "1" not in products.measured[key]


def test_only_the_best_of_a_brief_look_are_measured_for_longer(measured):
    times, _ = measured
    times |= {n: 10.0 + n for n in range(10, 40)}
    with products.choose_products():
        products.product(*some()[:2])
    (found,) = products.measured.values()
    assert len(found) == products.FINALISTS + 2 and {"torch", "0", "1"} <= found.keys()


def test_choices_are_kept_for_the_next_process_and_not_for_another_gpu(measured, tmp_path, monkeypatch):
    times, calls = measured
    file, (a, b, _) = tmp_path / "new folder" / "products.json", some()
    with products.choose_products(file=file):
        products.product(a, b)
        times["torch"] = 0.1
        products.product(*some(7)[:2])
    assert len(json.loads(file.read_text())["choices"]) == 2 and list(file.parent.iterdir()) == [file]
    for here, again in (({"device": "this"}, 1), ({"device": "other"}, None)):
        monkeypatch.setattr(products, "_here", lambda here=here: here)
        products._chosen.clear(), products.measured.clear()
        with products.choose_products(file=file):
            assert len(products._chosen) == (2 if again else 0)
            times["torch"], times[1] = 3.0, 5.0  # measured now, it would be another one
            before = len(calls)
            products.product(a, b)
            if again:
                assert calls[before:] == [1]
                assert sorted(value is None for value in products._chosen.values()) == [False, True]


def test_nothing_is_measured_where_it_is_not_asked_for(measured):
    a, b, _ = some()
    assert torch.equal(products.times(a, b), a @ b)
    with products.choose_products(False):
        assert torch.equal(products.product(a, b), a @ b)
    with products.choose_products():
        products.product(a[:, ::2], b[::2])  # gaps in memory
        products.product(a.float(), b.float())
        assert products._choosing
    assert not products._chosen and not products._choosing


def test_the_operators_keep_torchs_rules_and_count_their_flops():
    from torch.utils.flop_counter import FlopCounterMode

    a, b = torch.randn(3, 4), torch.randn(4, 5)
    rules = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.endprompt.product.default, (a, b), test_utils=rules)
    torch.library.opcheck(torch.ops.endprompt.plus_product.default, (torch.randn(3, 5), a, b), test_utils=rules)
    for work in (lambda: products.product(a, b), lambda: products.plus_product(torch.randn(3, 5), a, b)):
        with FlopCounterMode(display=False) as counter:
            work()
        assert counter.get_total_flops() == 2 * 3 * 4 * 5


@pytest.mark.gpu
@pytest.mark.parametrize("adds", [False, True])
def test_on_the_gpu_every_candidate_makes_the_product(adds):
    torch.manual_seed(0)
    for turned in itertools.product([False, True], repeat=2):
        a, b = (matrix(*shape, turn).cuda().bfloat16() for shape, turn in zip(((256, 512), (512, 384)), turned))
        out = torch.randn(256, 384, device="cuda")
        expected = a.double() @ b.double() + (out.double() if adds else 0)
        key = cublaslt.key_of(a, b, out, adds)
        found = cublaslt.candidates(key)
        assert len(found) > 5
        for one in found:
            result = out.clone()
            cublaslt.multiply(key, one, a, b, result)
            assert float((result - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.gpu
def test_on_the_gpu_a_choice_is_made_and_used(tmp_path):
    a, b = (torch.randn(1024, 1024, device="cuda").bfloat16() for _ in range(2))
    with products.choose_products(file=tmp_path / "products.json"):
        result = products.product(a, b)
    assert (tmp_path / "products.json").is_file()
    torch.testing.assert_close(result.float(), (a @ b).float(), rtol=2**-6, atol=0.5)
