"""Frequencies that depend on the length: each row's against a fresh module of transformers, and what follows of it."""

import contextlib
import copy
import importlib

import pytest
import torch

from endprompt import distributed, train
from endprompt.model import load_model
from endprompt.model.length_rope import reading, rows_alone
from endprompt.train import evaluate, graph, states
from tests.support.checkpoints import TARGET, WINDOW, make_checkpoint
from tests.support.runs import cut_off, lines_of, losses_of, weights_of

#: family, its RoPE class, changes of its config
FAMILIES = {
    "llama": ("LlamaConfig", "LlamaRotaryEmbedding", {}),
    "phi3": ("Phi3Config", "Phi3RotaryEmbedding", {"pad_token_id": 0, "partial_rotary_factor": 0.5}),
    "qwen2": ("Qwen2Config", "Qwen2RotaryEmbedding", {}),
    "phimoe": ("PhimoeConfig", "PhimoeRotaryEmbedding", {}),  # a forward that looks at the length by itself
    "llama4": ("Llama4TextConfig", "Llama4TextRotaryEmbedding", {"head_dim": 16}),  # complex numbers
    "gemma3": ("Gemma3TextConfig", "Gemma3RotaryEmbedding", {"head_dim": 16}),  # by kind of layer
}


def scaled(kind, part=1.0):
    parameters = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, "partial_rotary_factor": part}
    if kind == "longrope":
        half = int(16 * part) // 2
        parameters |= {"short_factor": [1 + j / 10 for j in range(half)], "long_factor": [2.0 + j for j in range(half)]}
        parameters |= {"original_max_position_embeddings": WINDOW, "short_mscale": 1.1, "long_mscale": 1.3}
    return parameters


def rotary(family, kind):
    named, of_class, changes = FAMILIES[family]
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    parameters = scaled(kind, changes.get("partial_rotary_factor", 1.0))
    if family == "gemma3":
        parameters = {"full_attention": parameters, "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}}
    shape = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": WINDOW}
    config = getattr(importlib.import_module("transformers"), named)(**shape | changes, rope_parameters=parameters)
    return getattr(module, of_class)(config)


def as_tuple(found):
    return found if isinstance(found, tuple) else (found,)


EACH = [(family, "longrope") for family in FAMILIES]
EACH += [(family, "dynamic") for family in FAMILIES if not family.startswith("phi")]  # theirs are for longrope alone


@pytest.mark.parametrize(("family", "kind"), EACH)
def test_each_row_s_angles_are_a_fresh_module_s_for_that_row_alone(family, kind):
    fresh, x = rotary(family, kind), torch.zeros(1, 1)
    ours = copy.deepcopy(fresh)
    assert rows_alone(ours) == rows_alone(ours) == 1
    ours = copy.deepcopy(ours)  # a copy has frequencies of its own
    # lengths: far above the window, below it, at it, one above it, and one step of generation above it
    steps = torch.arange(8)
    rows = [steps * 11, steps, steps + WINDOW - 8, steps + WINDOW - 7, steps * 0 + 50]
    for kinds in [("full_attention",), ("sliding_attention",)] if family == "gemma3" else [()]:
        expected = [as_tuple(copy.deepcopy(fresh)(x, row[None], *kinds)) for row in rows]
        for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [1, 0, 2]):
            found = as_tuple(ours(x, torch.stack([rows[i] for i in order]), *kinds))
            for place, row in enumerate(order):
                for ours_TD, theirs_1TD in zip(found, expected[row]):
                    assert torch.equal(ours_TD[place : place + 1], theirs_1TD)


def test_other_scalings_stay_as_they_are_and_positions_of_images_are_refused(llama):
    model = load_model(llama)
    assert rows_alone(model) == 0
    ours = rotary("llama", "dynamic")
    rows_alone(ours)
    with pytest.raises(ValueError, match=r"dynamic frequencies need one position a token: .* \(3, 1, 4\)"):
        ours(torch.zeros(1, 1), torch.zeros(3, 1, 4, dtype=torch.long))


@pytest.mark.parametrize(("family", "kind"), [("Llama", "dynamic"), ("Phi3", "longrope"), ("Llama", "longrope")])
def test_generate_gives_what_transformers_gives_for_one_prompt_alone(tmp_path, family, kind):
    from transformers import AutoModelForCausalLM

    parameters = scaled(kind)
    if kind == "longrope":
        parameters = {k: v[:4] if isinstance(v, list) else v for k, v in parameters.items()}
    changes = {"max_position_embeddings": 4 * WINDOW} if kind == "longrope" else {}
    own = {"original_max_position_embeddings": WINDOW} if family == "Phi3" else {}
    path = make_checkpoint(tmp_path / "m", family, rope_parameters=parameters, **changes | own)
    ours = load_model(path)
    options = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    options |= {"eos_token_id": None, "pad_token_id": 0}
    draw = torch.Generator().manual_seed(5)
    prompts = [torch.randint(1, 300, (1, n), generator=draw) for n in (80, 10, WINDOW - 4, 40)]
    together = torch.cat([torch.nn.functional.pad(prompt, (80 - prompt.shape[1], 0)) for prompt in prompts])
    mask = torch.cat([(torch.arange(80) >= 80 - prompt.shape[1]).long()[None] for prompt in prompts])
    batch = ours.generate(together, attention_mask=mask, **options)
    for place, prompt in enumerate(prompts):
        fresh = AutoModelForCausalLM.from_pretrained(path).eval()
        theirs = torch.stack(fresh.generate(prompt, **options).logits)
        made = ours.generate(prompt, **options)
        assert torch.equal(torch.stack(made.logits), theirs)
        if family != "Phi3" or prompt.shape[1] != WINDOW - 4:  # which reads the sequence again where it crosses
            with reading(prompt.shape[1]):  # prompt and answer at once, as the needles of an evaluation are read
                whole = ours(input_ids=made.sequences[:, :-1], use_cache=False).logits[0, prompt.shape[1] - 1 :]
            torch.testing.assert_close(whole, theirs[:, 0], rtol=1e-4, atol=1e-5)
        if kind == "dynamic":  # the cache of a row that crosses longrope's window is read again for all or for none
            torch.testing.assert_close(torch.stack(batch.logits)[:, place : place + 1], theirs, rtol=1e-4, atol=1e-5)


def far(left, right):
    return max(float((left[name] - right[name]).abs().max()) for name in left)


@pytest.mark.parametrize("scaling", ["dynamic", "longrope"])
def test_training_does_not_depend_on_micro_rows_nor_on_a_resume(extend_config, documents, tmp_path, scaling):
    def config(name, **changes):
        options = {"scheme": "pose", "prompt": None, "scaling": scaling, "steps": 4, "save_every": 2}
        evaluated = {"eval_data": [str(documents)], "eval_lengths": [24, TARGET], "eval_rows": 2, "eval_every": 2}
        return extend_config(output=str(tmp_path / name), **options | evaluated | changes)

    whole = train.extend(config("whole"))
    assert far(weights_of(whole), weights_of(train.extend(config("single", micro_rows=1)))) < 2e-6
    cut_off(config("broken"))
    # goes on from step 2, with other rows first seen by the process
    newest = states.states(tmp_path / "broken.partial/states")[-1]
    assert newest.name == "step-00000002"
    broken = train.extend(config("broken", resume=True))
    assert far(weights_of(whole), weights_of(broken)) == 0.0 and losses_of(whole) == losses_of(broken)
    values = [[row["value"] for row in lines_of(path / "results.jsonl")] for path in (whole, broken)]
    assert values[0] == values[1] and len(values[0]) == 4


def test_the_loss_of_a_row_is_that_of_a_fresh_model_of_transformers(extend_config, tmp_path):
    """Rows of PoSE end at different positions: each against transformers' own model, made anew for it."""
    from transformers import AutoModelForCausalLM

    path = make_checkpoint(tmp_path / "m", rope_parameters=scaled("dynamic"))
    ours = load_model(path, attention="causal_only_torch")
    draw = torch.Generator().manual_seed(1)
    ids, ends = torch.randint(1, 300, (3, 24), generator=draw), (23, 90, 47)
    positions = torch.stack([torch.cat([torch.arange(12), torch.arange(end - 11, end + 1)]) for end in ends])
    found = ours(input_ids=ids, position_ids=positions, use_cache=False).logits
    causal = torch.ones(24, 24, dtype=torch.bool).tril()[None, None]
    for row in range(3):
        fresh = AutoModelForCausalLM.from_pretrained(path, attn_implementation="sdpa").eval()
        theirs = fresh(ids[row : row + 1], position_ids=positions[row : row + 1], attention_mask=causal).logits
        torch.testing.assert_close(found[row : row + 1], theirs, rtol=1e-5, atol=1e-6)


def test_needles_are_read_with_the_frequencies_of_their_prompt(tmp_path):
    """The answer that transformers' own model generates is a hit of the evaluation, and would not be without."""
    from transformers import AutoModelForCausalLM

    path = make_checkpoint(tmp_path / "m", rope_parameters=scaled("dynamic") | {"factor": 64.0}, initializer_range=0.5)
    objective = train.Objective(load_model(path, attention="causal_only_torch"), autocast=False)
    draw = torch.Generator().manual_seed(3)
    rows = []
    for _ in range(6):
        prompt = torch.randint(1, 300, (1, WINDOW), generator=draw)
        fresh = AutoModelForCausalLM.from_pretrained(path).eval()
        made = fresh.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)[0]
        rows.append((made.numpy(), (torch.arange(len(made)) >= WINDOW).float().numpy()))
    here = distributed.World(device="cpu")
    assert evaluate._sum(objective, rows, here, hits=True) == [6]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "reading", lambda prompt: contextlib.nullcontext())
        assert evaluate._sum(objective, rows, here, hits=True) < [6]


def test_no_graph_is_recorded_of_a_model_whose_frequencies_depend_on_the_length(tmp_path, extend_config):
    model = load_model(make_checkpoint(tmp_path / "m", rope_parameters=scaled("dynamic")))
    with pytest.raises(ValueError, match=r"frequencies that do not depend on the length: .*'dynamic'"):
        graph.check_device(extend_config(compile="graph"), model, distributed.World(device="cuda"))
