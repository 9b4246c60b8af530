"""Try a checkpoint: one question about long texts (`endprompt generate`), or a conversation (`endprompt chat`).

Answers are those of `benchmarks.scoring.generate`, the loop that scores are made by, written as they come. What a user
should know stands on stderr: window and scaling, where in it each text lies, what was left out, how fast it went.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from benchmarks import chat
from benchmarks.config import AskConfig, ChatConfig, GenerateConfig
from endprompt import files, origin
from endprompt.distributed import say
from endprompt.results import recorded
from endprompt.text import Reader

if TYPE_CHECKING:
    from transformers import PretrainedConfig

BETWEEN = "\n\n"  # texts, and the last text and the question
NEW_TOKENS = 512  # of an answer at most; in small windows a quarter of them


Messages = Sequence[Mapping[str, str]]


class Answer(NamedTuple):
    """text: without the stop token. tokens: how many it has."""

    text: str
    tokens: int


class Checkpoint:
    """A checkpoint that answers; its weights are loaded with the first answer, when all else has been checked."""

    def __init__(self, config: AskConfig):
        from benchmarks.scoring.fingerprint import device_of
        from endprompt.fast.available import bfloat16_matmuls
        from endprompt.model import geometry, load

        self.config = config
        self.directory = origin.directory_of(config.checkpoint)
        self.model_config: PretrainedConfig = load.load_config(self.directory)
        self.tokenizer = load.load_tokenizer(self.directory)
        self.reader = Reader(self.tokenizer)
        for note in (*load.check_vocabulary(self.model_config, self.tokenizer), *self.reader.notes()):
            say(note)
        self.window = geometry.window_of(self.model_config, config.window).window
        asked = config.max_new_tokens
        self.new_tokens = min(NEW_TOKENS, self.window // 4) if asked is None else asked
        if not 0 < self.new_tokens < self.window:
            raise ValueError(
                f"max_new_tokens must be at least 1 and below the window of {self.window} tokens: "
                f"max_new_tokens={self.new_tokens}"
            )
        self.device = device_of(config.device)
        text_config = self.model_config.get_text_config()
        stated = getattr(text_config, "dtype", None) or self.model_config.dtype or "float32"
        self.dtype = str(stated).removeprefix("torch.") if config.dtype == "auto" else config.dtype
        if config.dtype == "auto" and self.dtype == "bfloat16" and self.device == "cpu" and not bfloat16_matmuls():
            self.dtype = "float32"
            say("in float32: this CPU has no instructions for bfloat16, the checkpoint's own dtype")
        self.loaded: tuple[Any, Any, frozenset[int]] | None = None
        say(f"{origin.name_of(config.checkpoint)}: {self.described()}")

    @property
    def room(self) -> int:
        """Tokens that a prompt may have."""
        return self.window - self.new_tokens

    def described(self) -> str:
        """Window, scaling and method in words."""
        parameters = getattr(self.model_config.get_text_config(), "rope_parameters", None) or {}
        several = [one for one in parameters.values() if isinstance(one, Mapping)] or [parameters]
        kinds = []
        for one in several:
            factor, original = one.get("factor"), one.get("original_max_position_embeddings")
            words = [one.get("rope_type", "default"), f"factor {factor:g}" if factor else ""]
            kinds.append(", ".join(filter(None, [*words, f"from {original:,} tokens" if original else ""])))
        method = recorded(self.directory).get("method", "base")
        made = f"; extended by {method}" if method != "base" else ""
        return f"window {self.window:,} tokens; RoPE scaling {' and '.join(dict.fromkeys(kinds))}{made}"

    def renderer(self) -> Callable[[Messages], str]:
        """Messages to the prompt of the next answer. Raises ValueError if the template leaves out what a user said."""
        config = self.config
        date = chat.day_read(self.tokenizer, config.date, config.template_args, lambda: chat.today(self.tokenizer))
        chat.renderer(self.tokenizer, date, config.template_args)  # which tries it
        given, day = chat.settled(self.tokenizer, date, config.template_args)

        def render(messages: Messages) -> str:
            text = chat.apply(self.tokenizer, messages, day, add_generation_prompt=True, **given)
            if any(one["content"].strip() not in text for one in messages if one["role"] == "user"):
                raise ValueError(f"{self.reader.name}: its chat template leaves a user's text out, or changes it")
            return text

        return render

    def ids(self, prompt: str) -> list[int]:
        from endprompt.model.load import check_tokens

        ids = self.reader.prompts([prompt])[0]
        check_tokens(ids, self.model_config, self.tokenizer, "the prompt")
        return ids

    def place(self, prompt: str, ids: Sequence[int], start: int, end: int) -> tuple[int, int]:
        """Tokens of the prompt, first and last + 1, that hold these characters of it."""
        after = [count for _, count in self.reader.pairs([(prompt[:at], prompt[at:]) for at in (start, end)])]
        return len(ids) - after[0], len(ids) - after[1]

    def answer(self, ids: Sequence[int], out: TextIO) -> Answer:
        """Greedy, written to `out` as it comes. Ctrl-C ends it and keeps what there is."""
        from benchmarks.scoring import generate
        from endprompt.model.load import load_model

        if self.loaded is None:
            model: Any = load_model(
                self.directory, dtype=self.dtype, attention=self.config.attn, device=self.device,
                config=self.model_config,
            )  # fmt: skip
            generate.check_settings(model.generation_config)
            found = generate.way(model, self.tokenizer)
            self.loaded = model, found, generate.stop_tokens(model, self.tokenizer)
        model, found, stops = self.loaded
        stream = Stream(self.decode, out)
        job = generate.Job(ids, self.new_tokens, stream)
        say(f"reading {len(ids):,} tokens of the prompt")
        began = time.perf_counter()
        try:
            ((_, tokens),) = next(generate.run(model, [job], stops=stops, found=found))
            whole = bool(tokens) and tokens[-1] in stops
            tokens = tokens[:-1] if whole else tokens
            how = "ended by itself" if whole else f"stopped at max_new_tokens={self.new_tokens}"
        except KeyboardInterrupt:
            tokens, how = stream.tokens, "stopped by Ctrl-C"
        ended, first = time.perf_counter(), stream.first or time.perf_counter()
        text = stream.finish(tokens)
        speed = f", {(len(tokens) - 1) / (ended - first):,.1f} tokens/s" if len(tokens) > 1 else ""
        say(
            f"{len(tokens):,} tokens, {how}{speed}; the prompt took {first - began:.1f} s, "
            f"{len(ids) / (first - began):,.0f} tokens/s"
        )
        return Answer(text, len(tokens))

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))


class Stream:
    """Writes an answer while it is made; called with all of its tokens so far, as `Job.ended`, and never ends it."""

    def __init__(self, decode: Callable[[Sequence[int]], str], out: TextIO):
        self.decode, self.out = decode, out
        self.tokens: list[int] = []
        self.first: float | None = None  # when the first token was there
        self.shown = ""

    def __call__(self, tokens: list[int]) -> bool:
        self.first = self.first or time.perf_counter()
        if len(tokens) > len(self.tokens):  # a batch that did not fit into memory is made again
            self.tokens = list(tokens)
            text = self.decode(tokens)
            if not text.endswith("\ufffd"):  # else the next token completes the character
                self.write(text)
        return False

    def write(self, text: str) -> None:
        if text.startswith(self.shown):
            self.out.write(text[len(self.shown) :])
        else:  # the decoder has thought better of what stands there
            self.out.write(f"\n{text}")
        self.out.flush()
        self.shown = text

    def finish(self, tokens: Sequence[int]) -> str:
        """Write what is left of the answer, and the end of its line; its text."""
        self.write(text := self.decode(tokens))
        self.out.write("\n")
        self.out.flush()
        return text


@dataclass
class Texts:
    """Files as one text. names and starts: of each file, in characters; cut: characters that are left out."""

    text: str
    names: list[str]
    starts: list[int]
    cut: tuple[int, int] = (0, 0)
    kept: str = field(init=False, default="")

    def __post_init__(self) -> None:
        self.leave_out("end", 0)

    def leave_out(self, part: str, count: int) -> None:
        """Leave so many characters out of the start, the middle or the end."""
        first = {"start": 0, "middle": (len(self.text) - count) // 2, "end": len(self.text) - count}[part]
        self.cut = first, first + count
        self.kept = self.text[:first] + self.text[first + count :]

    def spans(self) -> list[tuple[str, int, int]]:
        """(name, first, last + 1) of each file in what is kept."""
        a, b = self.cut
        ends = [*(start - len(BETWEEN) for start in self.starts[1:]), len(self.text)]
        moved = [[max(min(at, a), at - (b - a)) for at in pair] for pair in zip(self.starts, ends)]
        return [(name, *pair) for name, pair in zip(self.names, moved)]  # type: ignore[misc]


def read_texts(names: Sequence[str]) -> Texts:
    """The files, `-` standard input, with an empty line between. Raises ValueError for one without text."""
    if list(names).count("-") > 1:
        raise ValueError(f"standard input can be read once: file={list(names)}")
    texts = []
    for name in names:
        text = files.decode(sys.stdin.buffer.read(), "standard input") if name == "-" else files.read_text(name)
        if not text.strip():
            raise ValueError(f"a text must not be empty: file={name!r}")
        texts.append(text.strip())
    starts = [0, *itertools.accumulate(len(text) + len(BETWEEN) for text in texts[:-1])]
    return Texts(BETWEEN.join(texts), ["standard input" if name == "-" else name for name in names], starts)


def fit(
    checkpoint: Checkpoint, texts: Texts, prompt_of: Callable[[str], str], part: str | None, spare: int = 0
) -> list[int]:
    """Ids of the prompt of the texts, which lose some of their start, middle or end where it is too long; says where
    they lie. spare: tokens that stay free beside the answer's. Raises ValueError if the prompt is too long and no part
    is named, or if nothing of the texts would be left.
    """
    window, room = checkpoint.window, checkpoint.room - spare

    def without(count: int) -> tuple[str, list[int]]:
        texts.leave_out(part or "end", count)
        return (prompt := prompt_of(texts.kept)), checkpoint.ids(prompt)

    prompt, ids = without(0)
    if (whole := len(ids)) > room:
        counts = range(len(texts.text) if part else 0)  # the least that has to go
        count = bisect.bisect_left(counts, True, key=lambda count: len(without(count)[1]) <= room)
        if count == len(counts):
            what = "leaves no room for any text" if part or not texts.text else "needs --cut start, middle or end"
            turn = f" and {spare} for a turn" if spare else ""
            raise ValueError(
                f"a prompt of {whole:,} tokens with max_new_tokens={checkpoint.new_tokens}{turn} {what}, or lower "
                f"max_new_tokens; the window is {window:,} tokens"
            )
        prompt, ids = without(count)
    begin = prompt.index(texts.kept.strip()) - (len(texts.kept) - len(texts.kept.lstrip()))
    for name, first, last in texts.spans():
        at = checkpoint.place(prompt, ids, max(0, begin + first), begin + last)
        shares = f"{100 * at[0] / window:.0f}% to {100 * at[1] / window:.0f}%"
        lies = f"tokens {at[0]:,} to {at[1]:,} of the window's {window:,} ({shares})" if first < last else "left out"
        say(f"{name}: {lies}")
    if part and (count := texts.cut[1] - texts.cut[0]):
        first, last = texts.cut
        say(
            f"cut: {count:,} of {len(texts.text):,} characters ({100 * count / len(texts.text):.1f}%) left out of the "
            f"{part}, characters {first:,} to {last:,}: the prompt had {whole:,} tokens, and has {len(ids):,}"
        )
    return ids


def generate(config: GenerateConfig) -> str:
    """Answer one question about the texts, or continue them; the answer, which is written as it comes."""
    if not (config.file or config.ask):
        raise ValueError("there must be a text or a question: give file or ask")
    texts = read_texts(config.file) if config.file else None
    checkpoint = Checkpoint(config)
    plain = config.plain or not config.ask or not checkpoint.tokenizer.chat_template
    if plain and (config.system or config.template_args or config.date):
        raise ValueError("system, date and template_args are for a chat template with a question: give ask, not plain")
    say(f"prompt: {'the text as it stands' if plain else 'by the chat template'}; greedy")
    render = None if plain else checkpoint.renderer()

    def prompt_of(text: str) -> str:
        content = BETWEEN.join(filter(None, (text, config.ask)))
        return render(messages([], content, config.system)) if render else content

    ids = fit(checkpoint, texts or Texts("", [], []), prompt_of, config.cut)
    return checkpoint.answer(ids, sys.stdout).text


def messages(turns: Sequence[tuple[str, str]], content: str, system: str | None, text: str = "") -> Messages:
    """The turns so far, user and assistant, and the next one; the first one has the text in front."""
    said = [*(("user", "assistant")[i % 2] for i in range(2 * len(turns))), "user"]
    contents = [*itertools.chain.from_iterable(turns), content]
    contents[0] = BETWEEN.join(filter(None, (text, contents[0])))
    head = [{"role": "system", "content": system}] if system else []
    return [*head, *({"role": role, "content": one} for role, one in zip(said, contents))]


def converse(config: ChatConfig, ask: Callable[[str], str] = input) -> None:
    """Turns until the end of the input or /quit; /clear forgets them. The whole conversation is read at each turn."""
    if "-" in config.file:
        raise ValueError("chat reads its turns from standard input: file must name files")
    texts = read_texts(config.file) if config.file else None
    checkpoint = Checkpoint(config)
    render = checkpoint.renderer()
    if texts:
        spare = checkpoint.new_tokens  # for what the user says
        fit(checkpoint, texts, lambda text: render(messages([], text, config.system)), config.cut, spare)
    text = texts.kept if texts else ""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (lines can be edited)
    say("/clear forgets the conversation, /quit or Ctrl-D ends; Ctrl-C stops an answer")
    turns: list[tuple[str, str]] = []
    while True:
        try:
            line = ask("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line in ("/quit", "/exit"):
            return
        if line == "/clear":
            turns = []
            say("the conversation is forgotten")
        if not line or line == "/clear":
            continue
        ids = checkpoint.ids(render(messages(turns, line, config.system, text)))
        forgotten = 0
        while len(ids) > checkpoint.room and config.forget and turns:
            turns, forgotten = turns[1:], forgotten + 1
            ids = checkpoint.ids(render(messages(turns, line, config.system, text)))
        if forgotten:
            say(f"the window is full: the oldest {forgotten} of the turns are forgotten")
        if len(ids) > checkpoint.room:
            say(
                f"the window is full: {len(ids):,} tokens with max_new_tokens={checkpoint.new_tokens} are over "
                f"{checkpoint.window:,}; this turn is not taken: /clear forgets the conversation, --forget true the "
                f"oldest turns by themselves"
            )
            continue
        answer = checkpoint.answer(ids, sys.stdout)
        turns.append((line, answer.text))
        say(f"{len(ids) + answer.tokens:,} of the window's {checkpoint.window:,} tokens are taken")
