"""Settings of `endprompt score`."""

from __future__ import annotations

import math
import re
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks import chat, ruler
from benchmarks.ruler.tasks import VT_HOPS
from endprompt import origin

SUITES = ("ruler", "ruler-v2", "longbench", "longbench-v2", "mrcr", "nolima", "babilong", "infinitebench", "short")
SAMPLES = 500  # RULER's own number
THINKING = re.compile(r"off|cut|budget \d+")

#: Settings that not every suite reads, by those that do.
READ_BY = {
    "ruler or ruler-v2 or nolima or babilong or lm-eval": "lengths",
    "ruler": "cache_dir haystack_text shots hops edition chat_layout beyond_window whole_answers",
    "longbench or longbench-v2": "prompt_length",
    "ruler or longbench or longbench-v2": "prepare_only",
    "ruler or ruler-v2 or longbench or longbench-v2 or mrcr or nolima or babilong or infinitebench or lm-eval": (
        "data_dir max_new_tokens thinking system"
    ),
}
#: The same of backends.
READ_BY_BACKEND = {
    "hf or vllm": "attn dtype device batch_size beyond_window",
    "server": "url model tokenizer api concurrency timeout retries",
}


@dataclass
class ScoreConfig:
    """Settings of `endprompt score`.

    Checkpoint:
        checkpoint: checkpoint directory, GGUF file, or a hub's ORG/NAME (@REVISION).
        window: of the checkpoint, in tokens, where its config leaves open whether it is stated before or after scaling.
        beyond_window: allow lengths over the checkpoint's window; nothing is cut off, the model sees the whole prompt.
        name: the model's name in the rows; the checkpoint's name if not given.
        method: the method's name in the rows; read from the checkpoint's endprompt.json, else base.
        trust_remote_code: let a checkpoint bring its own code.

    Tasks:
        suite: ruler, ruler-v2, longbench, longbench-v2, mrcr, nolima (needle sets of your own in its layout), babilong,
            infinitebench, short (lm-eval's own mmlu, gsm8k, hellaswag, humaneval), or lm-eval:GROUP (any group or task
            of lm-eval that generates).
        tasks: names separated by commas, or all.
        lengths: token budgets separated by commas, prompt and generation together (RULER), the prompt (ruler-v2), the
            haystack (nolima); sizes of BABILong.
        samples: samples a task and length (short: all documents unless a number is set).
        seed: of RULER's samples and of intervals; short: of the examples in front. LongBench's samples have none.
        data_dir: folder with a suite's data, as `endprompt fetch` brings them; with copies of the hub's data sets
            (babilong, infinitebench); with further task files (lm-eval:GROUP).
        haystack_text: text file for the essay haystack, instead of RULER's essays.
        max_new_tokens: tokens kept for generation, instead of RULER's number (for very small windows).
        shots: worked examples in front of vt and cwe, 0 or 1; RULER has 1.
        hops: assignments after the first in a chain of vt; RULER has 4.
        edition: state of RULER's tasks: 2025 (its repository's), 2024 (the paper's tables, its samples to the byte),
            2025-ruler (the repository's samples to the byte), lab-2026 (what the project's own bases were trained on).
        cache_dir: folder of the sample cache; ~/.cache/endprompt/ruler if not given.
        prepare_only: build the samples and stop, without a model.

    Prompts:
        prompt_length: LongBench: cut prompts over so many tokens; published tables have 3500 for a window of 4k.
        chat: wrap prompts in the tokenizer's chat template.
        chat_layout: with chat: one-turn, ruler (cwe's example in a turn of its own, the answer prefix after a space),
            or no-prefix (one turn, the answer starts by itself); if not given, no-prefix with api=chat or a thinking
            model, else ruler for the editions that repeat RULER's samples and one-turn for the others.
        system: with chat: a system message.
        thinking: with chat: off (the template is told so), cut (what stands behind </think> is scored; thought and
            answer share the answer's tokens), or "budget N" (N further tokens for the thought).
        date: day that a chat template which reads one is given, YYYY-MM-DD; that of the output's first start if not
            given.
        template_args: further arguments of the chat template, such as enable_thinking=false, as NAME=VALUE,NAME=VALUE.

    Backend:
        backend: hf, vllm, or server: a model behind an OpenAI-compatible address.
        backend_args: further arguments of the backend's model, or fields of a server's requests, as
            key=value,key=value.
        batch_size: prompts that run together at most (hf; vLLM schedules by itself, see its max_num_seqs); memory may
            ask for fewer.
        whole_answers: let answers go on when their RULER score is settled (hf; vLLM's always do).
        attn: attention implementation of transformers.
        dtype: float32, bfloat16, float16, or auto (the checkpoint's own).
        device: cpu, cuda, cuda:1, or auto.

    Server (the key, if it asks for one, is read from the environment, ENDPROMPT_API_KEY):
        url: address up to /v1, http://HOST:PORT/v1.
        model: the model's name there; needed where the server has more than one.
        tokenizer: folder or hub name of the model's tokenizer, if it is not the checkpoint's; the checkpoint is then a
            name alone.
        api: completions (prompts as texts, templates applied here) or chat (one turn of the user's).
        concurrency: requests at a time.
        timeout: seconds for one answer.
        retries: further tries, with growing waits, where the server is busy, restarts, or breaks off.

    Output:
        output: run directory; runs/score/<checkpoint's name> if not given.
        overwrite: start again, instead of going on where an earlier run of the same output was.
        show: print the predictions of one task of a finished run (its directory, or the checkpoint it scored) and stop.
        wrong: with show, only those that score under 100.
        compare: compare this run with the one given in place of the checkpoint, as `endprompt compare`, and stop.
        json: with compare or show, print one JSON object a line instead of a table.
        quiet: no progress line.
    """

    checkpoint: str
    window: int | None = None
    beyond_window: bool = False
    name: str | None = None
    method: str | None = None
    trust_remote_code: bool = False

    suite: str = "ruler"
    tasks: str | list[str] = "all"
    lengths: str | int | list[int] = "4096"
    samples: int = SAMPLES
    seed: int = 0
    data_dir: str | None = None
    haystack_text: str | None = None
    max_new_tokens: int | None = None
    shots: int = 1
    hops: int = VT_HOPS
    edition: Literal["2025", "2024", "2025-ruler", "lab-2026"] = "2025"
    cache_dir: str | None = None
    prepare_only: bool = False

    prompt_length: int | None = None
    chat: bool = False
    chat_layout: Literal["one-turn", "ruler", "no-prefix"] | None = None
    system: str | None = None
    thinking: str | None = None
    date: str | None = None
    template_args: str = ""

    backend: Literal["hf", "vllm", "server"] = "hf"
    backend_args: str = ""
    batch_size: int = 32
    whole_answers: bool = False
    attn: str = "sdpa"
    dtype: str = "auto"
    device: str = "auto"

    url: str | None = None
    model: str | None = None
    tokenizer: str | None = None
    api: Literal["completions", "chat"] = "completions"
    concurrency: int = 16
    timeout: float = 600.0
    retries: int = 8

    output: str | None = None
    overwrite: bool = False
    show: str | None = None
    wrong: bool = False
    compare: str | None = None
    json: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        for key, least in (("batch_size", 1), ("samples", 1), ("concurrency", 1), ("retries", 0)):
            if getattr(self, key) < least:
                raise ValueError(f"{key} must be at least {least}: {getattr(self, key)}")
        if self.suite not in SUITES and not re.fullmatch(r"lm-eval:\S+", self.suite):
            raise ValueError(f"suite must be one of {', '.join(SUITES)}, or lm-eval:GROUP: {self.suite!r}")
        for kind, readers in (("suite", READ_BY), ("backend", READ_BY_BACKEND)):
            own = getattr(self, kind).partition(":")[0]
            for names, keys in readers.items():
                for key in keys.split() if own not in names.split() else ():
                    if (value := getattr(self, key)) != getattr(type(self), key):
                        raise ValueError(f"{key} is for {kind} {names}, not {own}: {key}={value!r}")
        if self.backend == "server":
            self.check_server()
        if self.json and self.compare is None and self.show is None:
            raise ValueError("json is for compare and show; the rows of a run are in its results.jsonl: json=True")
        if self.wrong and self.show is None:
            raise ValueError("wrong is for show, the rows of a run have all answers: wrong=True")
        if self.date is not None:
            chat.parse_day(self.date)
            if not self.chat:
                raise ValueError(f"date is for a chat template, it needs chat: {self.date!r}")
        for key in ("chat_layout", "system"):
            if getattr(self, key) is not None and not self.chat:
                raise ValueError(f"{key} is for a chat template, it needs chat: {getattr(self, key)!r}")
        self.check_thinking()
        if self.template_args and not self.chat:
            raise ValueError(f"template_args are for a chat template, they need chat: {self.template_args!r}")
        unread = {"enable_thinking", "chat_template_args"} | ({"think_end_token"} if self.backend == "hf" else set())
        for part in self.backend_args.split(","):
            if (name := part.partition("=")[0].strip()) in unread:
                raise ValueError(f"backend_args {name!r} is read by no prompt made here; template_args are: {part!r}")

    def check_thinking(self) -> None:
        if self.thinking is None:
            return
        if not THINKING.fullmatch(self.thinking) or self.thinking == "budget 0":
            raise ValueError(f"thinking must be off, cut, or 'budget N' in tokens: {self.thinking!r}")
        if not self.chat:
            raise ValueError(f"thinking is for a chat template, it needs chat: {self.thinking!r}")
        if self.thinks and self.chat_layout not in (None, "no-prefix"):
            raise ValueError(f"thinking comes before the answer, which has no prefix: chat_layout={self.chat_layout!r}")

    @property
    def thinks(self) -> bool:
        """Whether answers begin with a thought that is cut off."""
        return self.thinking not in (None, "off")

    @property
    def thought_tokens(self) -> int:
        """Tokens for the thought beside the answer's."""
        return int(self.thinking.split()[1]) if self.thinking and self.thinks and self.thinking != "cut" else 0

    @property
    def templated(self) -> tuple[str | None, str, str | None]:
        """Arguments of `chat.renderer` beside the tokenizer."""
        return self.date, self.template_args, self.system

    @property
    def asked_in_chat(self) -> dict[str, Any]:
        """Columns of rows, where they say something."""
        told = {"thinking": self.thinking, "system": self.system, "api": self.api if self.api == "chat" else None}
        return {name: value for name, value in told.items() if value}

    def check_server(self) -> None:
        found = urllib.parse.urlsplit(self.url or "")
        if found.scheme not in ("http", "https") or not found.hostname:
            raise ValueError(f"url must be the server's address, as http://HOST:PORT/v1: url={self.url!r}")
        if found.username or found.password or found.query or found.fragment:
            raise ValueError(f"url must hold no name, password or query, since it is written down: {found.hostname}")
        if not 0 < self.timeout < math.inf:
            raise ValueError(f"timeout must be over 0 seconds: {self.timeout}")
        named = {part.partition("=")[0].strip() for part in self.backend_args.split(",")}
        if adapters := {"peft", "lora_local_path"} & named:
            raise ValueError(f"an adapter is the server's to load, and its name there is the model: {sorted(adapters)}")
        if self.suite == "short":
            raise ValueError("suite short asks for log-likelihoods, and a server gives texts alone: backend='server'")
        if self.api == "chat" and not self.chat:
            raise ValueError("api=chat has the server apply its chat template: it needs chat")
        if self.api == "chat" and self.chat_layout not in (None, "no-prefix"):
            raise ValueError(f"api=chat asks with one turn and no answer prefix: chat_layout={self.chat_layout!r}")

    @property
    def limit(self) -> int | None:
        """Samples of a task where a number was set: suites with a number of their own take that, or all."""
        return None if self.samples == SAMPLES else self.samples

    @property
    def model_name(self) -> str:
        return self.name or origin.name_of(self.checkpoint)

    @property
    def directory(self) -> Path:
        return Path(self.output) if self.output else Path("runs", "score", self.model_name)

    @property
    def answers(self) -> str | None:
        """Where RULER's answers end beside stop tokens, as the rows name it."""
        if self.suite != "ruler":
            return None
        return "whole" if self.whole_answers or self.thinks or self.backend != "hf" else "until settled"

    @property
    def task_names(self) -> list[str]:
        names = self.tasks.split(",") if isinstance(self.tasks, str) else list(self.tasks)
        return [name.strip() for name in names if name.strip()]

    @property
    def length_list(self) -> list[int]:
        raw = self.lengths
        parts = raw.split(",") if isinstance(raw, str) else [raw] if isinstance(raw, int) else raw
        try:
            lengths = [int(part) for part in parts]
        except ValueError:
            raise ValueError(f"lengths must be whole numbers separated by commas: {raw!r}") from None
        if not lengths or min(lengths) < 1:
            raise ValueError(f"lengths must be positive: {raw!r}")
        return sorted(set(lengths))

    @property
    def options(self) -> ruler.Options:
        names = ("max_new_tokens", "haystack_text", "chat", "shots", "hops", "date", "template_args", "system")
        layout = self.chat_layout or ("no-prefix" if self.api == "chat" or self.thinks else None)
        return ruler.Options(chat_layout=layout, **{name: getattr(self, name) for name in (*names, "edition")})
