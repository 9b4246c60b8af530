"""Chat templates, rendered for a day that is written down: a prompt is the same whenever it is made.

A template may read the clock (`strftime_now`, as Llama 3.2, Granite, Mistral Small and gpt-oss do) or be given a day
(`date_string`). Sizes, prompts and hashes all go through `renderer` with the same day and the same arguments.
"""

import contextlib
import datetime
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal
from unittest import mock

from endprompt.text import Reader, checked

Messages = Sequence[Mapping[str, str]]
Render = Callable[..., str]

PROBE: Messages = ({"role": "user", "content": "a"},)
#: They share neither year, month, day nor weekday.
DAYS = (datetime.date(1999, 1, 2), datetime.date(2016, 11, 28))
DATE_STRING = "%d %b %Y"  # as Llama's templates write the day


def parse_day(text: str) -> datetime.date:
    """Raises ValueError for anything but YYYY-MM-DD."""
    try:
        if len(text) == 10:
            return datetime.date.fromisoformat(text)
    except ValueError:
        pass
    raise ValueError(f"date must be a day as YYYY-MM-DD: date={text!r}")


def parse_arguments(text: str) -> dict[str, Any]:
    """Arguments of a template, `enable_thinking=false,reasoning_effort=high`: true, false, none, numbers, else text."""
    found: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (word.strip() for word in part.partition("="))
        if not (equals and name.isidentifier()):
            raise ValueError(f"template_args must be NAME=VALUE,NAME=VALUE: {part!r} in template_args={text!r}")
        if name in found:
            raise ValueError(f"template_args must give each name once: {name!r} in template_args={text!r}")
        words: dict[str, Any] = {"true": True, "false": False, "none": None}
        found[name] = words[value.lower()] if value.lower() in words else number_of(value)
    return found


def number_of(text: str) -> int | float | str:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def renderer(tokenizer: Any, date: str | None = None, arguments: str = "", system: str | None = None) -> Render:
    """Messages to text by the tokenizer's chat template, as on the day `date` (None: the template reads the clock
    itself), with further arguments of the template. system: a message in front. Raises ValueError if the tokenizer has
    no template.
    """
    given, day = settled(tokenizer, date, arguments)

    def render(messages: Messages, **options: Any) -> str:
        return apply(tokenizer, [*system_turn(system), *messages], day, **given, **options)

    return checked(render, Reader(tokenizer))


def system_turn(system: str | None) -> Messages:
    return [{"role": "system", "content": system}] if system else []


END_OF_THOUGHT = "</think>"
#: Arguments by which templates turn thinking on and off (Qwen3's and SmolLM3's, DeepSeek-V3.1's and Granite's).
SWITCHES = ("enable_thinking", "thinking")


def with_thinking(tokenizer: Any, arguments: str, thinks: bool) -> str:
    """The template's arguments with thinking turned on or off; found by rendering it both ways. Raises ValueError for a
    template that cannot be told not to think, or never thinks, and for a tokenizer by which the end of a thought cannot
    be seen.
    """
    given = arguments_of(tokenizer, arguments)

    def rendered(**more: bool) -> str:
        return apply(tokenizer, PROBE, DAYS[0], add_generation_prompt=True, **{**given, **more})

    switch = next((name for name in SWITCHES if rendered(**{name: True}) != rendered(**{name: False})), None)
    if switch is None and not thinks:
        raise ValueError(
            f"thinking=off needs a chat template that reads one of {', '.join(SWITCHES)}; this one does not"
        )
    if thinks and switch is None and END_OF_THOUGHT not in str(tokenizer.get_chat_template()):
        raise ValueError(f"thinking needs a chat template that thinks, and this one has no {END_OF_THOUGHT}")
    if thinks and END_OF_THOUGHT in tokenizer.all_special_tokens:
        raise ValueError(f"thinking needs an end that stays in the text, and {END_OF_THOUGHT} is a special token here")
    if switch is None or given.get(switch) is thinks:
        return arguments
    if switch in given:
        raise ValueError(f"template_args must agree with thinking: {arguments!r}")
    return ",".join(filter(None, [arguments, f"{switch}={str(thinks).lower()}"]))


def cut_thought(text: str) -> tuple[str, str | None]:
    """(thought, answer behind it), both without white space around; no answer where the thought has not ended."""
    thought, end, answer = text.rpartition(END_OF_THOUGHT)
    return (thought.strip(), answer.strip()) if end else (text.strip(), None)


def settled(tokenizer: Any, date: str | None, arguments: str) -> tuple[dict[str, Any], datetime.date | None]:
    """(arguments for the tokenizer's template, day at which its clock must stand)."""
    given = arguments_of(tokenizer, arguments)
    day = parse_day(date) if date is not None else None
    if day is not None and date_source(tokenizer, arguments) in ("date_string", "own"):
        return {"date_string": day.strftime(DATE_STRING), **given}, None
    return given, day


def arguments_of(tokenizer: Any, arguments: str) -> dict[str, Any]:
    """`parse_arguments` for a tokenizer's template. Raises ValueError for one that is not the template's to read."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("chat needs a tokenizer with a chat template; this one has none")
    taken = {"messages", "day", "tokenizer", *inspect.signature(tokenizer.apply_chat_template).parameters}
    given = parse_arguments(arguments)
    for name in given:
        if name in taken:
            raise ValueError(f"template_args must be the template's own, and {name!r} is set here: {arguments!r}")
        if not re.search(rf"\b{name}\b", str(tokenizer.get_chat_template())):
            raise ValueError(f"template_args must be read by the chat template, which has no {name!r}: {arguments!r}")
    return given


def day_read(tokenizer: Any, date: str | None, arguments: str, otherwise: Callable[[], str]) -> str | None:
    """The day that prompts are made for: `date`, else `otherwise()`; None where the template reads none. A template
    with a day of its own, which `date_string` replaces (Llama 3.1's), keeps it unless `date` is given.
    """
    source = date_source(tokenizer, arguments)
    if source is None or (source == "own" and date is None):
        return None
    return date if date is not None else otherwise()


def date_source(tokenizer: Any, arguments: str = "") -> Literal["clock", "date_string", "own"] | None:
    """Where the template takes a day from: found by rendering it on different days. "date_string": there is none if it
    is not given. "own": the template then writes one of its own.
    """
    given = arguments_of(tokenizer, arguments)

    def rendered(day: datetime.date = DAYS[0], **more: str) -> str:
        return apply(tokenizer, PROBE, day, add_generation_prompt=True, **{**given, **more})

    if rendered(DAYS[0]) != rendered(DAYS[1]):
        return "clock"
    empty = rendered(date_string="")
    if "date_string" in given or empty == rendered(date_string=DAYS[0].strftime(DATE_STRING)):
        return None
    return "date_string" if rendered() == empty else "own"


def today(tokenizer: Any) -> str:
    """The day that a template of this tokenizer would write now, YYYY-MM-DD."""
    return apply(tokenizer, PROBE, None, chat_template="{{ strftime_now('%Y-%m-%d') }}")


def apply(tokenizer: Any, messages: Messages, day: datetime.date | None, **options: Any) -> str:
    with clock_at(day):
        try:
            return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **options))
        except Exception as error:  # whatever a template raises, or makes Jinja run into
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            turns = "one turn of a user" if len(messages) == 1 else f"turns of {', '.join(m['role'] for m in messages)}"
            raise ValueError(f"the tokenizer's chat template fails on {turns}: {first}") from error


@contextlib.contextmanager
def clock_at(day: datetime.date | None) -> Iterator[None]:
    """Templates rendered inside read the first moment of this day. transformers lets no caller give them a clock."""
    if day is None:
        yield
        return
    from transformers.utils import chat_template_utils

    moment = datetime.datetime(day.year, day.month, day.day)

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Any:
            return moment

    with mock.patch.object(chat_template_utils, "datetime", Clock):
        yield
