"""The one generation loop against transformers' own generate(), one prompt at a time on a fresh model."""

from __future__ import annotations

import json
import random

import pytest
import torch
import torch.nn.functional as F
import transformers

from benchmarks.scoring import generate, laid_out
from endprompt.model.attention import kernels_first

SHAPE = dict(
    vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    initializer_range=0.4,
)  # fmt: skip
MIXED = ["sliding_attention", "full_attention"]
WINDOW = 64
LONGROPE = dict(
    rope_type="longrope", rope_theta=1e4, original_max_position_embeddings=WINDOW, factor=4.0, attention_factor=1.0,
    short_factor=[1.0] * 4, long_factor=[4.0] * 4,
)  # fmt: skip
DYNAMIC = dict(rope_type="dynamic", rope_theta=1e4, factor=4.0)
#: name: (config class, its changes, whether our own loop runs it)
FAMILIES = {
    "grouped": ("Llama", {}, True),
    "sliding": ("Mistral", dict(sliding_window=16), True),
    "sliding and full, two ropes": ("Gemma3Text", dict(head_dim=16, sliding_window=12, layer_types=MIXED), True),
    "scaled logits": ("Granite", dict(logits_scaling=3.0, attention_multiplier=0.3), True),
    "values of another width": (
        "DeepseekV3",
        dict(
            q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=12, n_group=1,
            n_routed_experts=4, topk_group=1, num_experts_per_tok=2, moe_intermediate_size=16, num_key_value_heads=4,
        ),
        True,
    ),
    "short convolutions": ("Lfm2", dict(layer_types=["conv", "full_attention"]), False),
    "sinks": ("GptOss", dict(head_dim=8, sliding_window=16, num_local_experts=4, num_experts_per_tok=2), False),
    "hybrid": (
        "Qwen3Next",
        dict(
            head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, linear_num_value_heads=4,
            shared_expert_intermediate_size=16, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
            layer_types=["linear_attention", "full_attention"],
        ),
        False,
    ),
    "an attention of its own": ("Falcon", dict(num_kv_heads=2, new_decoder_architecture=True), False),
    "dynamic": ("Llama", dict(max_position_embeddings=WINDOW, rope_parameters=DYNAMIC), True),
    "longrope, read again at the crossing": (
        "Phi3",
        dict(original_max_position_embeddings=WINDOW, rope_parameters=LONGROPE, num_key_value_heads=4),
        True,
    ),
    "longrope, not read again": ("Llama", dict(rope_parameters=LONGROPE), True),
}  # fmt: skip
NEW = 10
# below the window, across it by what is generated, at it and beyond it
PROMPTS = [
    [random.Random(i).randrange(3, 300) for _ in range(length)] for i, length in enumerate((30, 90, 64, 58, 60, 24, 91))
]


def tiny(family: str, **changes):
    name, own, _ = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**(SHAPE | own | changes))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # norms and biases are made with constants, which would hide an error in them
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def by_transformers(model, prompts=PROMPTS, **settings) -> list[list[int]]:
    """Each prompt alone, by a model that has read nothing before where that matters."""
    found = []
    for prompt in prompts:
        fresh = model
        if any(kind in str(model.config.rope_parameters) for kind in ("longrope", "dynamic")):
            fresh = transformers.AutoModelForCausalLM.from_config(model.config).eval()
            fresh.load_state_dict(model.state_dict())
        ids = torch.tensor([prompt])
        given = dict(do_sample=False, max_new_tokens=NEW, pad_token_id=0, attention_mask=torch.ones_like(ids))
        found.append(fresh.generate(ids, **(given | settings))[0, len(prompt) :].tolist())
    return found


def ours(model, prompts=PROMPTS, found=None, **settings) -> list[list[int]]:
    jobs = [generate.Job(prompt, NEW) for prompt in prompts]
    made = dict(pair for batch in generate.run(model, jobs, found=found, **settings) for pair in batch)
    return [made[i] for i in range(len(jobs))]


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_transformers_whatever_the_batch_and_order(family):
    model = tiny(family)
    wanted = by_transformers(model)
    assert len({tuple(tokens) for tokens in wanted}) == len(PROMPTS)  # an exchanged row would show
    found = generate.way(model)
    assert (not found.reason) == FAMILIES[family][2], found.reason
    stops = frozenset([2])
    assert ours(model, found=found, stops=stops) == wanted
    if family == "grouped" or "longrope" in family or family == "dynamic":
        assert ours(model, found=found, stops=stops, batch_size=1) == wanted  # on a model that has read all before
        assert ours(model, PROMPTS[::-1], found, stops=stops, batch_size=3) == wanted[::-1]
    assert model.config._attn_implementation == ("sdpa" if FAMILIES[family][2] else model.config._attn_implementation)


def test_the_cases_are_what_they_say(monkeypatch):
    """Of the answers that cross the window, a family that reads again answers otherwise than one that does not."""
    crossing = [prompt for prompt in PROMPTS if len(prompt) <= WINDOW < len(prompt) + NEW - 1]
    assert len(crossing) == 3
    model = tiny("longrope, read again at the crossing")
    read_again = by_transformers(model, crossing)
    plain = transformers.LlamaForCausalLM.prepare_inputs_for_generation
    monkeypatch.setattr(type(model), "prepare_inputs_for_generation", plain)
    assert by_transformers(model, crossing) != read_again


@pytest.mark.parametrize("family", ["grouped", "sliding", "sliding and full, two ropes"])
def test_prompts_read_in_parts_give_the_same_tokens(family, monkeypatch):
    monkeypatch.setattr(generate, "LEAST_PART", 7)
    monkeypatch.setattr(generate.Memory, "part", lambda self, job: 7)
    model = tiny(family)
    assert ours(model, stops=frozenset([2])) == by_transformers(model)


def test_a_penalty_for_repetition_is_the_checkpoints_own():
    model = tiny("grouped")
    prompts = PROMPTS[:3]
    wanted, plain = by_transformers(model, prompts, repetition_penalty=1.7), by_transformers(model, prompts)
    model.generation_config.repetition_penalty = 1.7
    assert ours(model, prompts, stops=frozenset([2])) == wanted != plain
    model.generation_config.update(repetition_penalty=None, suppress_tokens=[wanted[0][0]])
    assert "suppress_tokens" in generate.way(model).reason
    first = prompts[:1]
    kept = by_transformers(model, first, suppress_tokens=[wanted[0][0]])[0][0]
    assert ours(model, first)[0][0] == kept != wanted[0][0]


@pytest.mark.parametrize(
    "asked",
    [
        dict(max_time=1e-9),
        dict(num_return_sequences=2, num_beams=2, do_sample=True),
        dict(return_dict_in_generate=True, output_scores=True),
        dict(penalty_alpha=0.6, top_k=4),
        dict(cache_implementation="quantized"),
        dict(prompt_lookup_num_tokens=2),
    ],
)
def test_of_a_generation_config_nothing_but_the_greedy_choice_counts(asked):
    """Also where transformers generates, which reads the clock, draws and keeps its cache as it is asked to."""
    model = tiny("grouped")
    model.generation_config.min_new_tokens = 2
    wanted = ours(model, PROMPTS[:2])
    model.generation_config.update(**asked)
    assert ours(model, PROMPTS[:2]) == wanted and all(len(tokens) == NEW for tokens in wanted)
    assert all(getattr(model.generation_config, name) == value for name, value in asked.items())


def test_stop_strings_of_a_generation_config_end_an_answer():
    from tests.support.odd_tokenizers import byte_level

    model, tokenizer = tiny("grouped"), byte_level()
    wanted = by_transformers(model)
    row, place, text = next(
        (row, place, text)
        for row, tokens in enumerate(wanted)
        for place, text in enumerate(map(tokenizer.decode, tokens))
        if text.isascii() and text.isprintable() and place and len(text) == 1
    )
    model.generation_config.stop_strings = [text]
    found = generate.way(model, tokenizer)
    assert "stop_strings" in found.reason
    assert ours(model, PROMPTS[row : row + 1], found) == [wanted[row][: place + 1]]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (dict(repetition_penalty=0), "repetition_penalty .* must be a number above 0: repetition_penalty=0"),
        (dict(repetition_penalty=-1.0), "repetition_penalty=-1.0"),
        (dict(repetition_penalty="1.2"), "repetition_penalty='1.2'"),
        (dict(eos_token_id="0"), "eos_token_id .* must be ids, whole numbers: eos_token_id='0'"),
        (dict(eos_token_id=[2, 1.5]), "eos_token_id=1.5"),
        (dict(token_healing=True), "token_healing .* must be off"),
    ],
)
def test_a_generation_config_that_no_answer_can_follow_is_refused(tmp_path, asked, said):
    from benchmarks.scoring import ScoreConfig, score
    from tests.support.ruler_helpers import checkpoint

    path = checkpoint(tmp_path / "m")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 2} | asked))
    with pytest.raises(ValueError, match=rf"m: .*{said}"):
        score(ScoreConfig(str(path), device="cpu", lengths="400"))


@pytest.mark.parametrize("by", ["the own loop", "transformers"])
def test_logits_that_are_no_numbers_are_no_answer(by):
    """A dtype that is too narrow shows in long prompts alone: that row is an error, and those before it stand."""
    model = tiny("grouped")
    if by == "transformers":
        model.generation_config.min_new_tokens = 2
    found = generate.way(model)
    assert bool(found.reason) == (by == "transformers")
    wide = model.model.rotary_emb.forward

    def overflows(x, position_ids):
        cos, sin = wide(x, position_ids)
        return torch.where(position_ids[..., None] > 80, float("inf"), cos), sin

    model.model.rotary_emb.forward = overflows
    short, long = PROMPTS[:1], PROMPTS[1:2]
    assert ours(model, short, found) == by_transformers(model, short)
    with pytest.raises(ValueError, match=r"not finite numbers after a prompt of 90 tokens.*dtype=torch\.float32"):
        ours(model, long, found)


def test_the_trial_finds_a_model_that_its_config_does_not_describe():
    """A model that scales its keys where it keeps them: nothing in its config says so."""
    model = tiny("grouped")
    attention = model.model.layers[1].self_attn
    plain = attention.forward

    def odd(hidden_states, *args, past_key_values=None, **kwargs):
        scale = 1.0 if past_key_values is None else 1.5
        return plain(hidden_states * scale, *args, past_key_values=past_key_values, **kwargs)

    attention.forward = odd
    assert "logits" in generate.way(model).reason
    attention.forward = plain
    assert generate.way(model).reason == ""


def test_stop_tokens_and_ends_cut_where_they_first_hold():
    model = tiny("grouped")
    plain = ours(model)
    assert all(len(tokens) == NEW for tokens in plain)
    stop = plain[1][4]
    cut = [tokens[: tokens.index(stop) + 1] if stop in tokens else tokens for tokens in plain]
    assert ours(model, stops=frozenset([stop])) == cut
    jobs = [generate.Job(prompt, NEW - i, lambda tokens: len(tokens) >= 4) for i, prompt in enumerate(PROMPTS)]
    order = sorted(range(len(jobs)), key=lambda i: -len(PROMPTS[i]))
    wanted = [plain[i][: min(4, NEW - i)] for i in order]
    for look in (1, 3, 7):  # however rarely it is looked
        batch = generate.Batch(model, [jobs[i] for i in order], generate.way(model))
        batch.look = look
        with torch.inference_mode():
            assert batch.answers() == wanted


def test_rows_that_are_over_leave_the_batch(monkeypatch):
    model, sizes = tiny("sliding and full, two ropes"), []
    plain = ours(model)
    step = generate.Batch._step
    monkeypatch.setattr(generate.Batch, "_step", lambda self: (sizes.append(len(self.next_B)), step(self)))
    jobs = [generate.Job(prompt, NEW if i == 1 else 2) for i, prompt in enumerate(PROMPTS)]
    order = sorted(range(len(jobs)), key=lambda i: -len(PROMPTS[i]))
    made = generate.attempt(model, [jobs[i] for i in order], generate.way(model), frozenset(), None)
    assert made == [plain[i][: jobs[i].new_tokens] for i in order]
    assert sizes[-NEW + 1 :] == [len(jobs)] + [1] * (NEW - 2)


class TooMuch:
    """A memory that holds so many places of a batch and so many tokens of a pass."""

    def __init__(self, monkeypatch, places: int, tokens: int = 10**9):
        self.refused = 0
        make, read = laid_out.Layer.lazy_initialization, generate.Batch._read_rows

        def allocate(layer, keys, values):
            if len(layer.scene.lengths_B) * layer.scene.places > places:
                self.refused += 1
                raise torch.OutOfMemoryError("CUDA out of memory")
            make(layer, keys, values)

        def reads(batch, rows):
            if min(len(batch.jobs[rows][0].prompt), batch.part or 10**9) > tokens:
                self.refused += 1
                raise torch.OutOfMemoryError("CUDA out of memory")
            return read(batch, rows)

        monkeypatch.setattr(laid_out.Layer, "lazy_initialization", allocate)
        monkeypatch.setattr(generate.Batch, "_read_rows", reads)
        monkeypatch.setattr(generate.Memory, "free", lambda self: None)
        monkeypatch.setattr(generate, "_told", set())


def test_a_batch_that_does_not_fit_is_halved_once_said_and_nothing_is_lost(monkeypatch, capsys):
    model = tiny("grouped")
    prompts = [PROMPTS[1][:90] for _ in range(3)] + [PROMPTS[6][:88] for _ in range(5)]
    wanted, found = ours(model, prompts), generate.way(model)
    memory = TooMuch(monkeypatch, places=2 * 128)
    jobs = [generate.Job(prompt, NEW) for prompt in prompts]
    batches = list(generate.run(model, jobs, found=found))
    assert memory.refused == 2 and [len(batch) for batch in batches] == [2, 2, 2, 2]  # 8, then 4, then 2
    assert [dict(pair for batch in batches for pair in batch)[i] for i in range(8)] == wanted
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all("halved" in line for line in said)


def test_one_row_that_does_not_fit_is_read_in_parts_then_refused_with_what_fits(monkeypatch, capsys):
    model = tiny("grouped")
    wanted, found = ours(model), generate.way(model)
    monkeypatch.setattr(generate, "LEAST_PART", 16)
    with monkeypatch.context() as patch:
        TooMuch(patch, places=10**9, tokens=40)
        assert ours(model, found=found) == wanted
        assert "read 22 at a time" in capsys.readouterr().err  # 91, then 45, then 22
    with monkeypatch.context() as patch:
        TooMuch(patch, places=100)
        answered = []
        with pytest.raises(ValueError, match="one prompt of 91 tokens with 10 new ones: length 101"):
            for batch in generate.run(model, [generate.Job(prompt, NEW) for prompt in PROMPTS], found=found):
                answered += batch
    memory = generate.Memory(model, found)
    room = memory.takes(1, 64, 16) / generate.SHARE + 1
    monkeypatch.setattr(generate.Memory, "free", lambda self: room)
    assert memory.fitting(200) == "; about 64 fit"


def test_batches_are_filled_by_memory(monkeypatch):
    model = tiny("grouped")
    found = generate.way(model)
    assert found.layer_bytes == (2 * 2 * 8 * 4,) * 2  # keys and values, 2 heads of 8, float32
    jobs = [generate.Job([5] * length, 10) for length in (100, 99, 90, 81, 79, 50)]
    memory = generate.Memory(model, found)
    reading = sum((100, 99, 90, 81)) * memory.token_bytes  # more tokens than this are not read before the batch is full
    for rows in (1, 2, 3):
        room = rows * 128 * sum(found.layer_bytes) + rows * 100 * memory.token_bytes
        monkeypatch.setattr(generate.Memory, "free", lambda self, room=room: room / generate.SHARE + 1)
        assert memory.rows(jobs, None, None) == rows, reading
    monkeypatch.setattr(generate.Memory, "free", lambda self: None)
    assert memory.rows(jobs, None, None) == 4  # 79 is too short beside 100
    assert (memory.rows(jobs, 2, None), memory.rows(jobs, None, 3 * 128)) == (2, 3)


def test_of_prompt_sees_what_a_window_reaches():
    """Blocks of a sliding layer and of a part of a prompt, against one explicit mask."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 50, 8, generator=generator) for heads in (4, 2, 2))
    laid_out.BLOCK, kept = 8, laid_out.BLOCK
    try:
        for window, first in ((None, 0), (None, 33), (13, 0), (13, 33), (7, 11)):
            got = laid_out.of_prompt(query[:, :, first:], key, value, 0.3, window)
            distance = torch.arange(50)[first:, None] - torch.arange(50)
            mask = (distance >= 0) & (distance < (window or 50))
            keys, values = (x.repeat_interleave(2, 1) for x in (key, value))
            logits = (query[:, :, first:] @ keys.mT * 0.3).masked_fill(~mask, -torch.inf)
            assert torch.allclose(got, logits.softmax(-1) @ values, atol=1e-5)
    finally:
        laid_out.BLOCK = kept


def test_places_that_a_kernel_reads_are_those_of_the_mask():
    """Of rows shorter and longer than a window, as steps go on; a row that is over has none."""
    scene = laid_out.Scene(torch.tensor([40, 5, 17]), 128, 30, [None, 16])
    for step in range(30):
        for window, mask_B11S in scene.masks.items():
            place, (begin, end) = torch.arange(mask_B11S.shape[-1]), scene.spans[window]
            seen = (place >= begin[:, None]) & (place < end[:, None])
            assert torch.equal(seen[: 2 if step > 9 else 3], mask_B11S[: 2 if step > 9 else 3, 0, 0])
            assert step <= 9 or end[2] == 0
        if step == 9:
            scene.live_B[[2]] = 0
        scene.advance()


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128, 256])
def test_on_a_gpu_steps_are_recorded_and_give_the_tokens_of_a_cpu(width):
    model = tiny("grouped", head_dim=width).to("cuda")
    prompts = [PROMPTS[i] for i in (0, 1, 3, 6)]
    jobs = [generate.Job(prompt, 40) for prompt in prompts]
    found = generate.way(model)
    assert found.reason == ""
    order = sorted(range(4), key=lambda i: -len(prompts[i]))
    with torch.inference_mode():
        batch = generate.Batch(model, [jobs[i] for i in order], found)
        made = batch.answers()
    assert not generate._unrecorded and batch.scene.skips == (width in laid_out.STEP_WIDTHS)
    model = model.cpu()
    wanted = [by_transformers(model, [prompts[i]], max_new_tokens=40, eos_token_id=None)[0] for i in order]
    assert made == wanted


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "groups", "width"), [(32, 8, 128), (9, 3, 64), (8, 4, 256)])
def test_on_a_gpu_attention_of_prompts_and_steps_is_that_of_float64(heads, groups, width):
    generator = torch.Generator("cuda").manual_seed(0)
    query, key, value = (
        torch.randn(2, n, 333, width, generator=generator, device="cuda", dtype=torch.bfloat16)
        for n in (heads, groups, groups)
    )
    scale = width**-0.5
    keys, values = (x.double().repeat_interleave(heads // groups, 1) for x in (key, value))
    causal = torch.ones(333, 333, dtype=torch.bool, device="cuda").tril()
    for window in (None, 100):
        mask = causal & ~causal.tril(-(window or 333))
        wanted = (query.double() @ keys.mT * scale).masked_fill(~mask, -torch.inf).softmax(-1) @ values
        with kernels_first(torch.device("cuda")):
            got = laid_out.of_prompt(query, key, value, scale, window)
        assert (got.double() - wanted).abs().max() < 0.03
    seen = torch.arange(333, device="cuda") < torch.tensor([[333], [200]], device="cuda")
    last = query[:, :, -1:].contiguous()
    padded_key, padded_value = (F.pad(x, (0, 0, 0, 51)) for x in (key, value))  # places are a multiple of 64
    mask = F.pad(seen, (0, 51))[:, None, None]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        got = laid_out.of_step(last, padded_key, padded_value, scale, mask)
    assert any("cudnn" in event.key for event in profile.key_averages())  # the plain kernel is fifty times as slow
    logits = (last.double() @ keys.mT * scale).masked_fill(~seen[:, None, None], -torch.inf)
    assert (got.double() - logits.softmax(-1) @ values).abs().max() < 0.03
