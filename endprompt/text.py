"""Text to token ids, and messages to text: what one tokenizer does at the ends of a text and where two texts meet.

A `Reader` finds that out once, by trying; everything that turns text into ids for a model goes through it. Tokenizers
of Llama 2's kind put a space in front of whatever they read, so that encode(a) + encode(b) reads "a b": for them two
texts are read as one and the ids are cut where the second starts. For byte-level BPE, which puts nothing in front, the
two are read apart: the border is then exact, and the one that the model meets when it continues.
"""

from __future__ import annotations

import copy
import functools
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = "One of the words: 1234."
# Texts that stand next to each other; read apart, their tokens must say the same as read together.
NEIGHBOURS = (("a", "b"), ("a", " b"), ("a b", "c"), ("a\n", "b"), ("a", "\nb"), ("a =", " 4"))
# What stands in front of a text to read it as inner text: the first that keeps its tokens to itself.
ANCHORS = ("\n", ".", "a", "0", "a ")
# White space, capitals, characters that compatibility forms change, a letter of two marks, punctuation after a space.
UNUSUAL = "Ab  c\n\td ﬁ ½ e\u0301 é , don 't .\n"


class Reader:
    """How a tokenizer reads text. begin, end: ids that it puts around a text by default. Raises ValueError if it does
    anything else to a text than to put ids around it, or puts BOS in front twice.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        whole, (bare,) = tokenizer(PROBE)["input_ids"], self.ids([PROBE])
        starts = [i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare]
        if not bare or not starts:
            raise ValueError(f"{self.name}: the tokenizer reads no plain text: {PROBE!r} becomes {whole}")
        self.begin, self.end = list(whole[: starts[0]]), list(whole[starts[0] + len(bare) :])
        bos = tokenizer.bos_token_id
        if bos is not None and self.begin.count(bos) > 1:
            raise ValueError(
                f"{self.name}: the tokenizer puts BOS in front of a text {self.begin.count(bos)} times, where once is "
                f"right: {tokenizer.bos_token}"
            )

    @property
    def name(self) -> str:
        return str(getattr(self.tokenizer, "name_or_path", "") or type(self.tokenizer).__name__)

    @functools.cached_property
    def vocabulary(self) -> int:
        """The least vocabulary that has all of its ids: the largest one + 1. There may be fewer, with holes between."""
        return vocabulary(self.tokenizer)

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """What a model is given to continue. What a chat template wrote in front already is not put there again."""
        return [self.lead(ids) + ids for ids in self.ids(texts)]

    def lead(self, ids: Sequence[int]) -> list[int]:
        """What stands in front of these ids by default, less what they begin with already."""
        begin = self.begin
        for missing in range(len(begin)):
            if list(ids[: len(begin) - missing]) == begin[missing:]:
                return begin[:missing]
        return begin

    def inside(self, text: str) -> list[int]:
        """The text as it stands after other text. Raises ValueError if it shares tokens with whatever is before it."""
        if self.joins or not text:
            return self.ids([text])[0]
        for anchor in ANCHORS:
            ids, start, exact = self._together([(anchor, text)])[0]
            if exact:
                return ids[start:]
        raise ValueError(f"{self.name}: the tokenizer joins this text to whatever stands before it: {text!r}")

    def pairs(self, texts: Sequence[tuple[str, str]]) -> list[tuple[list[int], int]]:
        """(ids, how many of them are the completion's) of each (text, completion). A token that holds the end of the
        text and the start of the completion is the completion's, so that all of it is weighted as such, and never cut.
        """
        if self.joins:
            read = self.ids([part for pair in zip(*texts) for part in pair]) if texts else []
            return [(text + own, len(own)) for text, own in zip(read[: len(texts)], read[len(texts) :])]
        return [(ids, len(ids) - start) for ids, start, _ in self._together(texts)]

    @functools.cached_property
    def joins(self) -> bool:
        """Whether ids of two texts, put together, say what the two texts do."""
        apart = self.ids([part for pair in NEIGHBOURS for part in pair])
        together = self.ids([a + b for a, b in NEIGHBOURS])
        return all(self.decode(apart[2 * i] + apart[2 * i + 1]) == self.decode(ids) for i, ids in enumerate(together))

    @functools.cached_property
    def lossy(self) -> bool:
        """Whether it gives some text back changed (lower case, compatibility forms, white space)."""
        return self.decode(self.ids([UNUSUAL])[0]).removeprefix(" ") != UNUSUAL

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids as they are, special tokens included, spaces before punctuation too."""
        found = self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(found)

    def check_plain(self) -> None:
        """Raises ValueError for a tokenizer whose prompts plain lm-eval, which takes them by default, would end."""
        if self.end:
            raise ValueError(
                f"{self.name}: the tokenizer puts {self._end_tokens} behind every text, and so would lm-eval behind a "
                f"prompt; `endprompt score` leaves it out, or set add_eos_token to false in tokenizer_config.json"
            )

    @property
    def _end_tokens(self) -> str:
        return " ".join(map(str, self.tokenizer.convert_ids_to_tokens(self.end)))

    def notes(self, documents_end: bool = False) -> list[str]:
        """What a user should know of this tokenizer, a line each. documents_end: EOS is wanted behind documents."""
        found = []
        if documents_end and self.tokenizer.eos_token_id is None:
            found.append(f"{self.name}: the tokenizer has no EOS, so nothing stands between documents")
        if self.end:
            found.append(f"{self.name}: the tokenizer puts {self._end_tokens} behind every text; prompts go without it")
        unknown = self.tokenizer.unk_token_id
        if unknown is not None and unknown in self.ids([PROBE])[0]:
            found.append(
                f"{self.name}: the tokenizer reads parts of {PROBE!r} as {self.tokenizer.unk_token}: such text is "
                "lost, and an answer with it scores 0"
            )
        elif self.lossy:
            found.append(f"{self.name}: the tokenizer gives some texts back changed; answers are scored as it writes")
        return found

    def _together(self, texts: Sequence[tuple[str, str]]) -> list[tuple[list[int], int, bool]]:
        """(ids of both read as one text, where those of the second start, whether no token is of both) of each pair."""
        joined, fronts = [a + b for a, b in texts], [len(a) for a, _ in texts]
        if self._offsets is not None:
            made = []
            for encoding, front in zip(self._offsets.encode_batch(joined, add_special_tokens=False), fronts):
                spans = encoding.offsets
                start = next((i for i, (_, end) in enumerate(spans) if end > front), len(spans))
                made.append((encoding.ids, start, start == len(spans) or spans[start][0] >= front))
            return [(ids, 0 if not front else start, exact) for (ids, start, exact), front in zip(made, fronts)]
        # A tokenizer without offsets: the second text starts where the ids are no longer those of the first alone.
        found = []
        for ids, alone in zip(self.ids(joined), self.ids([a for a, _ in texts])):
            start = sum(1 for _ in itertools.takewhile(lambda both: both[0] == both[1], zip(ids, alone)))
            found.append((ids, start, start == len(alone)))
        return found

    @functools.cached_property
    def _offsets(self) -> Any:
        """The fast tokenizer by itself, whose offsets hold all characters of a token; None if there is none."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        from tokenizers.processors import TemplateProcessing

        backend = copy.deepcopy(backend)
        backend.no_truncation()
        backend.no_padding()
        backend.post_processor = TemplateProcessing(single="$A")  # those of byte-level BPE leave spaces out of offsets
        text = f"{PROBE}\n {UNUSUAL}"
        return backend if backend.encode(text, add_special_tokens=False).ids == self.ids([text])[0] else None


def vocabulary(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest id of a tokenizer + 1, added tokens included: what an embedding must have. Ids may have holes."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


Messages = Sequence[Mapping[str, str]]
#: Messages to text, called as transformers' apply_chat_template and lm-eval's are.
Template = Callable[..., str]
# No template may change this: quotes, brackets, ampersand, newline.
QUESTION = 'What does "<b>" mean & why?\nSay [1] or {2}.'


def checked(template: Template, reader: Reader) -> Template:
    """The template with its prompts checked; tried once on a question. Raises ValueError, now or for a prompt, if it
    fails (with its own words), leaves the user's text out, changes or repeats it, or if BOS would stand in front twice
    or EOS behind.
    """
    checks = functools.partial(render, template, reader.name)
    text, tokenizer = checks([{"role": "user", "content": QUESTION}], add_generation_prompt=True), reader.tokenizer
    if written := re.search(r"<\w.* at 0x[0-9a-f]+>", text):
        raise ValueError(
            f"{reader.name}: its chat template writes a function where its result is meant, and another name of it "
            f"in every process: {written[0]!r}"
        )
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token
    (ids,) = reader.ids([text])
    # a template may open every turn with BOS (SmolLM2's), but not behind the tokenizer's own, nor twice at once
    twice = (bos, bos) in itertools.pairwise(ids) or (bos in reader.lead(ids) and bos in ids)
    if bos is not None and tokenizer.bos_token != eos and twice:
        raise ValueError(
            f"{reader.name}: with its chat template a prompt has BOS more than once, where once is right: {text[:80]!r}"
        )
    if eos and text.rstrip().endswith(eos):
        raise ValueError(
            f"{reader.name}: with its chat template a prompt ends in EOS ({eos}), so that nothing follows; it must "
            f"open the assistant's turn where add_generation_prompt is true"
        )
    return checks


def render(template: Template, name: str, messages: Messages, **options: Any) -> str:
    """The messages as a template writes them. Raises ValueError if it fails, or the last text is not in it once."""
    try:
        text = str(template(messages, **options))
    except ValueError:
        raise
    except Exception as error:  # a template is code of the checkpoint and raises what it likes
        number = getattr(error, "lineno", None)
        line = f", line {number}" if number else ""
        said = " ".join(str(error).split())
        raise ValueError(f"{name}: its chat template fails: {said} ({type(error).__name__}{line})") from error
    content = messages[-1]["content"].strip()  # templates leave out white space around it
    found = text.count(content) if content else 1
    if found != 1:
        what = f"has the user's text {found} times" if found else "leaves the user's text out, or changes it"
        raise ValueError(f"{name}: its chat template {what}: {text[:80]!r}")
    return text
