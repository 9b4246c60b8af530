"""Several documents in a row, each with attention, positions and an end prompt of its own."""

import dataclasses
import itertools
import types

import numpy as np
import pytest
import torch
from transformers import AttentionInterface

from endprompt import train
from endprompt.data import Documents, Rows, RowSpec
from endprompt.data.rows import best_fit
from endprompt.model import load_model
from endprompt.model.packed import apart_attention
from endprompt.prompts import Cues, Recall
from endprompt.train.objective import Objective
from tests.support.checkpoints import TARGET, VOCABULARY
from tests.support.runs import losses_of

LENGTHS = (9, 14, 5, 30, 3, 11)


def documents():
    rng = np.random.default_rng(0)
    offsets = np.cumsum([0, *LENGTHS])
    return Documents(rng.integers(1, VOCABULARY, offsets[-1]), offsets, offsets[1:].copy())


def spec(**changes):
    cue = Cues(((300, 301), (302,)))
    return RowSpec(**({"row_tokens": 32, "target": TARGET, "scheme": "endprompt", "prompt": cue} | changes))


def test_a_row_is_several_rows_side_by_side():
    """By hand: the largest first, each where it leaves the least; what is left over has no loss."""
    rows = Rows(documents(), spec(short="apart", prompt=Cues(((300, 301),))))
    assert len(rows) == 3 and rows._packs == [[1, 5], [0, 2, 4]]  # 16 + 13, 11 + 7 + 5; 30 makes a row alone
    assert rows.dropped == 0 and rows.padding == 3 + 9
    tokens, far = documents().tokens, [TARGET - 2, TARGET - 1]
    ids, positions, weights = rows.row_of(1, np.random.default_rng(0))
    assert ids.tolist() == [*tokens[9:23], 300, 301, *tokens[61:72], 300, 301, 0, 0, 0]
    assert positions.tolist() == [*range(14), *far, *range(11), *far, 0, 1, 2]
    expected = [0, *[1] * 13, 0.1, 0.1, 0, *[1] * 10, 0.1, 0.1, 0, 0, 0]
    np.testing.assert_array_equal(weights, np.array(expected, np.float32))


def test_best_fit_wastes_nothing_that_fits():
    rng = np.random.default_rng(1)
    sizes = rng.integers(1, 60, 500)
    packs = best_fit(sizes, 100)
    assert sorted(i for pack in packs for i in pack) == list(range(500))
    assert all(sizes[pack].sum() <= 100 for pack in packs)
    assert len(packs) <= int(np.ceil(sizes.sum() / 100)) + 2


def test_what_is_too_short_even_so_is_dropped_and_counted():
    rows = Rows(documents(), spec(short="apart", prompt=Recall((300,), 8, 2)))
    assert rows.dropped == 2 and rows.dropped_tokens == 5 + 3
    assert [len(Rows(documents(), spec(short=short))) for short in ("drop", "apart")] == [0, 3]


@pytest.mark.parametrize(
    ("attention", "scheme", "prompt"),
    [
        ("sdpa", "endprompt", "own"),
        ("sdpa", "pose", None),
        ("eager", "endprompt-random", Recall((300,), 8, 2)),
        ("flex", "contiguous", None),
    ],
)
def test_the_loss_of_a_packed_row_is_that_of_its_documents_alone(checkpoints, attention, scheme, prompt):
    """Each document by itself through causal-only attention, in float64."""
    made = spec(short="apart", scheme=scheme, prompt=spec().prompt if prompt == "own" else prompt)
    rows = Rows(documents(), made)
    batch = rows.batch(0, len(rows))
    ids, positions, weights = (torch.from_numpy(part) for part in vars(batch).values())
    assert (positions == 0).sum() >= 5
    for family in ("Llama", "Qwen3"):
        packed = Objective(load_model(checkpoints(family), attention=apart_attention(attention)), autocast=False)
        alone = Objective(load_model(checkpoints(family), attention="causal_only_eager"), autocast=False)
        with torch.no_grad():
            found = packed(ids, positions, weights.float())
            expected = torch.zeros(())
            for row in zip(ids, positions, weights.float()):
                starts = [*(row[1] == 0).nonzero()[:, 0].tolist(), len(row[0])]
                for start, end in itertools.pairwise(starts):
                    expected += alone(*(part[None, start:end] for part in row))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_flash_kernels_get_the_borders_of_all_rows(monkeypatch):
    """A stand-in with flash-attn's own signature: (N, H, D), int32 borders, fewer key heads than query heads."""
    seen = {}

    def flash_attn_varlen_func(q, k, v, ends, ends_k, longest, longest_k, softmax_scale=None, causal=False):
        seen.update(ends=ends.tolist(), kinds=(ends.dtype, ends_k.dtype), longest=(longest, longest_k), causal=causal)
        parts = []
        for start, end in itertools.pairwise(ends):
            one, key, value = (x[start:end].transpose(0, 1) for x in (q, k, v))
            key, value = (x.repeat_interleave(len(one) // len(x), 0) for x in (key, value))
            out = torch.nn.functional.scaled_dot_product_attention(one, key, value, is_causal=True, scale=softmax_scale)
            parts.append(out.transpose(0, 1))
        return torch.cat(parts), None

    package = types.SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setattr("endprompt.model.packed.importlib.import_module", lambda module: package)
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 8, 16), torch.randn(2, 2, 8, 16), torch.randn(2, 2, 8, 16)
    positions = torch.tensor([[0, 1, 9, 0, 1, 2, 3, 0], [0, 1, 2, 3, 0, 1, 2, 3]])
    given = {"scaling": 0.3, "dropout": 0.0, "position_ids": positions}
    names = ("eager", "flash_attention_2", "flash_attention_3")
    kernels = [AttentionInterface()[apart_attention(name)] for name in names]
    expected, *found = (kernel(torch.nn.Module(), q, k, v, **given)[0] for kernel in kernels)
    for out in found:
        torch.testing.assert_close(out, expected)
        assert seen["ends"] == [0, 3, 7, 8, 12, 16] and seen["longest"] == (4, 4) and seen["causal"]
        assert seen["kinds"] == (torch.int32, torch.int32)


def test_training_on_packed_rows(extend_config, documents, tmp_path, capsys):
    """Dropped without it, kept with it; evaluation in mid-run leaves the attention as it was."""
    config = extend_config(row_tokens=96, short_documents="apart", scaling="yarn", eval_data=[str(documents)],
                           eval_lengths=[96], eval_rows=2, eval_every=1, rows=2, steps=2, target=512)  # fmt: skip
    out = train.extend(config)
    assert "dropped 0 shorter documents" in capsys.readouterr().err and len(losses_of(out)) == 2
    again = train.extend(dataclasses.replace(config, output=str(tmp_path / "again"), eval_data=[], attention="eager"))
    assert losses_of(out) == pytest.approx(losses_of(again), abs=2e-5)


def test_layers_that_slide_are_refused(extend_config, checkpoints):
    with pytest.raises(ValueError, match=r"12.*, by position.*must be drop or pack"):
        train.extend(extend_config(model=str(checkpoints("Gemma3Text")), short_documents="apart"))


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"attention": "shifted"}, "attention=shifted cannot: attention must be one of sdpa, eager, flex, flash"),
        ({"scaling": "dynamic"}, "depend on a row's farthest position.*short_documents='apart'"),
        ({"compile": "graph", "device": "cuda"}, "needs short_documents to be drop or pack"),
    ],
)
def test_what_keeps_no_documents_apart_is_refused(extend_config, changes, rule):
    with pytest.raises(ValueError, match=rule):
        train.extend(extend_config(short_documents="apart", **changes))


def test_a_model_that_gives_no_positions_is_refused():
    name = apart_attention("sdpa")
    x = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match="gives its attention no positions"):
        AttentionInterface()[name](torch.nn.Module(), x, x, x)
