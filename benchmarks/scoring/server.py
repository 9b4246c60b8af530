"""Models behind an OpenAI-compatible address: `endprompt score --backend server`.

Prompts go out as texts, `concurrency` at a time, and each answer is handed on the moment it arrives. lm-eval's own API
models are not used: they hand over answers only when all of a call have arrived, cut long prompts on the left, and ask
again a few times within seconds.

A server may be another model than the one asked for, cut prompts off, or end answers early, and say nothing. So these
are checked: the model's name against the server's list and against every reply, the server's window against the longest
prompt, the tokens of every prompt against the checkpoint's tokenizer, the tokens of every answer that ended for its
length against the limit.

The key comes from the environment and is written nowhere.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import itertools
import json
import os
import queue
import random
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from benchmarks import chat
from benchmarks.originals import retry_after
from endprompt.distributed import say
from endprompt.text import UNUSUAL, Reader

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from benchmarks.scoring.config import ScoreConfig

KEY = "ENDPROMPT_API_KEY"
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds before an answer is asked for again; doubled each time
#: What another try may change: busy, not up yet, restarted.
AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
#: Where servers say how many tokens they take (vLLM and SGLang, llama.cpp, hosted ones).
WINDOWS = ("max_model_len", "n_ctx", "context_length", "context_window", "max_context_length")
PROBE = "One of the words: 1234.\n" + UNUSUAL
CONTENT = "[the user's text]"


Put = Callable[[Any], None]
Work = Callable[[aiohttp.ClientSession, Put], Coroutine[Any, Any, None]]


class Again(Exception):
    """No answer yet, and asking again may help. after: seconds that the server asks to wait."""

    def __init__(self, reason: str, after: float = 0.0):
        super().__init__(reason)
        self.after = after


@dataclass(frozen=True)
class Served:
    """The model of a server. identity: all that the server says of it and an answer may depend on."""

    model: str
    identity: dict[str, Any]
    window: int | None


class Client:
    """Asks one address, again where that may help. Runs in a thread of its own, so that notebooks can use it, too."""

    def __init__(self, url: str, concurrency: int, timeout: float, retries: int, quiet: bool = False):
        self.url, self.concurrency, self.timeout, self.retries = url.rstrip("/"), concurrency, timeout, retries
        self.quiet, self.said = quiet, 0.0
        self.not_before = 0.0  # no request goes out before: the server asked for it

    def run(self, work: Work) -> Iterator[Any]:
        """What `work(session, put)` puts, as it comes; then its error is raised. Closing the iterator ends the work."""
        found: queue.SimpleQueue[Any] = queue.SimpleQueue()
        loop, end = asyncio.new_event_loop(), object()

        async def main() -> None:
            key = os.environ.get(KEY, "").strip()
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            connector = aiohttp.TCPConnector(limit=self.concurrency)
            async with aiohttp.ClientSession(connector=connector, headers=headers) as session:
                await work(session, found.put)

        task = loop.create_task(main())

        def run() -> None:
            with contextlib.closing(loop):
                try:
                    loop.run_until_complete(task)
                    found.put(end)
                except BaseException as error:
                    found.put(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            while (item := found.get()) is not end:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            with contextlib.suppress(RuntimeError):  # it has ended by itself
                loop.call_soon_threadsafe(task.cancel)
            thread.join()

    async def ask(self, session: aiohttp.ClientSession, path: str, body: Any = None, tries: int | None = None) -> Any:
        """The reply's object. Raises ValueError in one line for what the server refuses, or does not answer in time."""
        tries = self.retries + 1 if tries is None else tries
        for tried in itertools.count(1):
            await asyncio.sleep(max(0.0, self.not_before - time.monotonic()))
            try:
                return await self.once(session, path, body)
            except Again as problem:
                if tried == tries:
                    many = f"{tries} tries" if tries > 1 else "one try"
                    raise ValueError(f"{self.url}/{path}: no answer after {many}: {problem}") from None
                wait = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (tried - 1)) * random.uniform(0.75, 1.25)
                if problem.after:
                    self.not_before = max(self.not_before, time.monotonic() + problem.after)
                if not self.quiet and time.monotonic() > self.said + 30:
                    self.said = time.monotonic()
                    say(f"{self.url}: {problem}; asked again in {max(wait, problem.after):.0f} s")
                await asyncio.sleep(max(wait, problem.after))
        raise AssertionError

    async def once(self, session: aiohttp.ClientSession, path: str, body: Any) -> Any:
        try:
            async with (
                asyncio.timeout(self.timeout),
                session.request(
                    "GET" if body is None else "POST",
                    f"{self.url}/{path}",
                    json=body,
                    allow_redirects=False,  # the key is for this address alone
                    timeout=aiohttp.ClientTimeout(total=None),
                ) as reply,
            ):
                status, headers, data = reply.status, reply.headers, await reply.read()
        except TimeoutError:
            raise Again(f"it took longer than timeout={self.timeout:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise Again(hidden(str(error) or type(error).__name__)) from None
        try:
            found = json.loads(data)
        except ValueError:
            found = None
        problem = found.get("error") if isinstance(found, dict) else None
        if status == 200 and isinstance(found, dict) and not problem:
            return found
        if isinstance(problem, dict) and status == 200:  # an error of another server that this one stands before
            code = problem.get("code")
            status = code if isinstance(code, int) else 500
        said = f"HTTP {status}: {reason(found, data)}" if status != 200 else "its reply is no JSON object, or was cut"
        if status in AGAIN or status == 200:
            raise Again(said, retry_after(headers))
        raise ValueError(f"{self.url}/{path}: {said}" + (f" (the key is read from {KEY})" if status == 401 else ""))


def reason(found: Any, data: bytes) -> str:
    """What an error says, in one line."""
    for key in ("error", "message", "detail"):
        if isinstance(found, dict) and found.get(key):
            found = found[key]
    text = found if isinstance(found, str) else json.dumps(found) if found else data.decode(errors="replace")
    return hidden(" ".join(text.split())[:300])


def hidden(text: str) -> str:
    """The text without the key: some servers repeat it."""
    key = os.environ.get(KEY, "").strip()
    return text.replace(key, "[key]") if key else text


# ------------------------------------------------------------------------------------------------------ what is served


def connect(config: ScoreConfig) -> Served:
    """The model that the settings name. Raises ValueError if the server does not answer, or has no such model."""
    client = Client(str(config.url), 1, min(60.0, config.timeout), config.retries, config.quiet)

    async def work(session: aiohttp.ClientSession, put: Put) -> None:
        put(await client.ask(session, "models", tries=min(4, config.retries + 1)))

    (found,) = client.run(work)
    listed = found.get("data")
    models = {str(one["id"]): one for one in listed if isinstance(one, dict) and "id" in one} if listed else {}
    if not models:
        raise ValueError(f"{client.url}/models must list the server's models: {json.dumps(found)[:200]}")
    name = config.model or (next(iter(models)) if len(models) == 1 else "")
    if name not in models:
        raise ValueError(f"model must be one of the server's, {', '.join(models)}: model={config.model!r}")
    about = models[name]
    places = [about, *(value for value in about.values() if isinstance(value, dict))]
    stated = [int(place[key]) for place in places for key in WINDOWS if isinstance(place.get(key), int)]
    plain = {key: value for key, value in about.items() if key != "created" and not isinstance(value, list)}
    if about.get("owned_by") == "me":  # llama-cpp-python: it penalises tokens of the last 64 unless told otherwise
        plain["repeat_penalty"] = 1.0
    return Served(name, plain, min(stated, default=None))


def window_of(config: ScoreConfig, served: Served, stated: int | None) -> int:
    """Tokens that the server takes. stated: by the checkpoint's config, where neither server nor settings say it.
    Raises ValueError if nothing says it, and if the settings say more than the server."""
    if served.window is not None and (config.window or 0) > served.window:
        raise ValueError(f"window must be at most what the server states, {served.window}: {config.window}")
    window = config.window or served.window or stated
    if window is None:
        raise ValueError(f"neither the server nor a config.json says how many tokens {served.model} takes: give window")
    return window


def config_of(config: ScoreConfig) -> PretrainedConfig:
    """A config for the suites, which know the model by its window; `served` says what the server says of it."""
    from transformers import PretrainedConfig

    from endprompt import model
    from endprompt.model import geometry

    served, stated = connect(config), None
    if served.window is config.window is None and (Path(config.checkpoint) / "config.json").is_file():
        stated = geometry.window_of(model.load_config(config.checkpoint)).window
    made = PretrainedConfig()
    made.max_position_embeddings = window_of(config, served, stated)
    made.served = served
    return made


# ----------------------------------------------------------------------------------------------------------- the model


class ServerLM(LM):
    """Greedy answers of a server's model. Raises ValueError before the first sample if server and tokenizer count the
    tokens of a prompt differently, and for a prompt that with its answer is over `window`."""

    def __init__(self, config: ScoreConfig, served: Served, window: int, tokenizer: PreTrainedTokenizerBase):
        from lm_eval.utils import simple_parse_args_string

        super().__init__()
        self.served, self.max_length, self.tokenizer, self.chat = served, window, tokenizer, config.api == "chat"
        self.client = Client(str(config.url), config.concurrency, config.timeout, config.retries, config.quiet)
        self.reader = Reader(tokenizer)
        self.more = {key: served.identity[key] for key in ("repeat_penalty",) if key in served.identity}
        self.more |= simple_parse_args_string(config.backend_args) if config.backend_args else {}
        bos = tokenizer.bos_token_id
        self.bos = str(tokenizer.bos_token) if bos is not None and self.reader.begin[:1] == [bos] else ""
        self.head = self.tail = ""
        self.messages: list[Mapping[str, str]] = []
        if self.chat:
            if chat.date_source(tokenizer, config.template_args) == "clock":
                raise ValueError("api=chat has the server render a template that reads the clock: use api=completions")
            self.messages = list(chat.system_turn(config.system))
            render = chat.renderer(tokenizer, config.date, config.template_args)
            self.head, self.tail = render(self.asked(CONTENT), add_generation_prompt=True).split(CONTENT)
            if config.template_args:
                self.more["chat_template_kwargs"] = chat.parse_arguments(config.template_args)
        self.check_tokens()

    tokenizer_name = property(lambda self: self.reader.name)

    def asked(self, text: str) -> list[Mapping[str, str]]:
        return [*self.messages, {"role": "user", "content": text}]

    def body(self, prompt: str, new_tokens: int, until: Sequence[str] = ()) -> dict[str, Any]:
        """The request. With api=chat the user's text is what stands between the template's head and tail."""
        asked: dict[str, Any] = {"prompt": prompt.removeprefix(self.bos)}
        if self.chat:
            if not (prompt.startswith(self.head) and prompt.endswith(self.tail)):
                raise ValueError(
                    f"api=chat asks with one turn of the user's, and this prompt is another: {prompt[:60]!r}"
                )
            asked = {"messages": self.asked(prompt[len(self.head) : len(prompt) - len(self.tail)])}
        stop = {"stop": list(until)} if until else {}
        return {"model": self.served.model, **asked, "max_tokens": new_tokens, "temperature": 0, **stop, **self.more}

    async def complete(self, session: aiohttp.ClientSession, prompt: str, new: int, until: Sequence[str] = ()) -> str:
        """The answer. Raises ValueError if the server answered something else than what it was asked."""
        path, tokens = "chat/completions" if self.chat else "completions", len(self.reader.prompts([prompt])[0])
        if tokens + new > self.max_length:
            raise ValueError(f"prompt and generation must fit the window: {tokens} + {new} tokens, {self.max_length}")
        reply = await self.client.ask(session, path, self.body(prompt, new, until))
        try:
            choice, usage = reply["choices"][0], reply.get("usage") or {}
            text = choice["text"] if not self.chat else spoken(choice["message"])
        except (KeyError, IndexError, TypeError, AttributeError):
            raise ValueError(
                f"{self.client.url}/{path}: a reply must have choices[0]: {json.dumps(reply)[:200]}"
            ) from None
        if (name := reply.get("model", self.served.model)) != self.served.model:
            raise ValueError(f"{self.client.url}: model {self.served.model!r} was asked, and {name!r} answered")
        read = usage.get("prompt_tokens")
        if read != tokens:
            how = f"the server read {read} tokens" if read is not None else "the server does not say how many it read"
            raise ValueError(
                f"{self.client.url}: a prompt has {tokens} tokens by the tokenizer {self.reader.name}, {how}: "
                f"{prompt[:40]!r}"
            )
        made = usage.get("completion_tokens")
        if choice.get("finish_reason") == "length" and made is not None and made < new:
            raise ValueError(f"{self.client.url}: {new} tokens were asked for, and the server ended after {made}")
        return str(text or "")

    def check_tokens(self) -> None:
        async def work(session: aiohttp.ClientSession, put: Put) -> None:
            put(await self.complete(session, self.head + PROBE.strip() + self.tail, 1))

        list(self.client.run(work))

    def batches(self, requests: Sequence[Instance]) -> Iterator[list[tuple[int, str]]]:
        """(index of the request, answer) of each as it arrives. After a failure no more are sent, and what was sent
        is waited for."""
        for request in requests:
            prompt, settings = request.args
            if settings.get("do_sample"):
                raise ValueError(f"generation is greedy: {settings}")
            self.body(prompt, 1)  # raises for one that cannot be asked
        waiting = collections.deque(enumerate(requests))

        async def answer(session: aiohttp.ClientSession, put: Put) -> None:
            i, request = waiting.popleft()
            prompt, settings = request.args
            try:
                put([(i, await self.complete(session, prompt, settings["max_gen_toks"], settings.get("until") or ()))])
            except ValueError as error:
                waiting.clear()
                raise ValueError(f"{request.task_name}, sample {request.doc_id}: {error}") from None

        async def worker(session: aiohttp.ClientSession, put: Put) -> None:
            while waiting:
                await answer(session, put)

        async def work(session: aiohttp.ClientSession, put: Put) -> None:
            if waiting and self.served.window is None:  # the longest alone: if it does not fit, no other is asked
                await answer(session, put)
            workers = (worker(session, put) for _ in range(self.client.concurrency))
            for failed in await asyncio.gather(*workers, return_exceptions=True):
                if failed is not None:
                    raise failed

        yield from self.client.run(work)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        answers = dict(answer for batch in self.batches(requests) for answer in batch)
        return [answers[i] for i in range(len(requests))]

    def loglikelihood(self, requests: list[Instance], **kwargs: Any) -> Any:
        raise ValueError("a server is asked for texts alone, and this task asks for log-likelihoods: use --backend hf")

    loglikelihood_rolling = loglikelihood


def spoken(message: Mapping[str, Any]) -> str:
    """A reply's text; what the server took out of it as the thought is put in front again."""
    thought, text = message.get("reasoning_content") or message.get("reasoning"), message.get("content") or ""
    return f"<think>{thought}" + (f"</think>{text}" if text else "") if thought else text
