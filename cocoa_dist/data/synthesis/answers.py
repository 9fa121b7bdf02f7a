"""What the endpoint said, and whether it can be used: every way in which it cannot has a name."""

import json
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from cocoa_dist.data.synthesis.prompts import Prompt

_FENCE = re.compile(r"\A\s*```[a-zA-Z]*\s*\n(.*?)\n?\s*```\s*\Z", re.DOTALL)
_THOUGHT = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
_SHOWN = 80  # characters of an answer in a reason
_Words = Annotated[str, StringConstraints(strip_whitespace=True)]


class FaultError(ValueError):
    """An answer that cannot be used: `kind: details`. `again`: asking once more may help."""

    def __init__(self, kind: str, details: str, *, again: bool) -> None:
        super().__init__(f"{kind}: {details}")
        self.again = again


@dataclass(frozen=True)
class Reply:
    """What came back for one request, as the journal keeps it."""

    content: str = ""
    refusal: str = ""
    finish: str = ""  # stop, length, content_filter, ...
    fault: str = ""  # `kind: details` where there is no answer at all
    again: bool = False  # of a fault: asking once more may help
    prompt_tokens: int = 0
    completion_tokens: int = 0
    day: str = ""  # of the answer, 2026-11-21


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Turn(_Strict):
    """A question and its answer."""

    question: _Words
    answer: _Words


class Turns(_Strict):
    """What form `dialogue` asks for."""

    turns: tuple[Turn, ...]


class Questions(_Strict):
    """What form `dialogue_in_turn` asks for first."""

    questions: tuple[_Words, ...]


class Row(_Strict):
    """One record of form `records`."""

    kind: _Words
    query: _Words
    target: _Words


class Rows(_Strict):
    """What form `records` asks for."""

    records: tuple[Row, ...]


_Answer = TypeVar("_Answer", bound=BaseModel)


def check_dialogue(reply: Reply, prompt: Prompt) -> tuple[Turn, ...]:
    """Return the turns of an answer. Raises FaultError."""
    turns = _parsed(_words(reply, prompt), Turns).turns
    _check_count(len(turns), prompt, "turns")
    for number, turn in enumerate(turns, start=1):
        check_text(turn.question, prompt.file.max_question_characters, f"question {number}")
        check_text(turn.answer, prompt.file.max_answer_characters, f"answer {number}")
    check_no_repeats([turn.question for turn in turns], prompt, "question", least_words=1)
    check_no_repeats([turn.answer for turn in turns], prompt, "answer")
    return turns


def check_questions(reply: Reply, prompt: Prompt) -> tuple[str, ...]:
    """Return the questions of an answer. Raises FaultError."""
    questions = _parsed(_words(reply, prompt), Questions).questions
    _check_count(len(questions), prompt, "questions")
    for number, question in enumerate(questions, start=1):
        check_text(question, prompt.file.max_question_characters, f"question {number}")
    check_no_repeats(questions, prompt, "question", least_words=1)
    return questions


def check_answer(reply: Reply, prompt: Prompt, before: tuple[str, ...]) -> str:
    """Return an answer in plain text that is none of those before it. Raises FaultError."""
    answer = _THOUGHT.sub("", _words(reply, prompt)).strip()
    check_text(answer, prompt.file.max_answer_characters, "answer")
    check_no_repeats([*before, answer], prompt, "answer")
    return answer


def check_records(reply: Reply, prompt: Prompt, kinds: Mapping[str, str]) -> tuple[Row, ...]:
    """Return one record for each kind, in the order of the kinds. Raises FaultError."""
    rows = _parsed(_words(reply, prompt), Rows).records
    found = [row.kind for row in rows]
    if sorted(found) != sorted(kinds):
        raise FaultError(
            "wrong count",
            f"found records of kind {', '.join(found) or 'none'}, expected one of each of "
            f"{', '.join(kinds)}",
            again=True,
        )
    for row in rows:
        check_text(row.query, prompt.file.max_question_characters, f"query of {row.kind}")
        check_text(row.target, prompt.file.max_answer_characters, f"target of {row.kind}")
    check_no_repeats([row.target for row in rows], prompt, "target")
    return tuple(sorted(rows, key=lambda row: list(kinds).index(row.kind)))


def check_text(text: str, most: int, name: str) -> None:
    """Raise FaultError for a text that is empty, too long, or no text that UTF-8 can hold."""
    if not text.strip():
        raise FaultError("empty answer", f"{name} has no words", again=True)
    if len(text) > most:
        raise FaultError(
            "too long", f"{name} has {len(text)} characters, expected at most {most}", again=True
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FaultError("malformed text", f"{name}: {error.reason}", again=True) from error


def check_no_repeats(
    texts: list[str] | tuple[str, ...], prompt: Prompt, name: str, *, least_words: int | None = None
) -> None:
    """Raise FaultError if a text of enough words stands there twice."""
    least = prompt.file.repeat_words if least_words is None else least_words
    seen: set[str] = set()
    for text in texts:
        plain = normalised(text)
        if plain.count(" ") + 1 < least:
            continue
        if plain in seen:
            raise FaultError("repeated answer", f"{name} {text[:_SHOWN]!r} comes twice", again=True)
        seen.add(plain)


def normalised(text: str) -> str:
    """Return a text without case, punctuation and spacing: what equal answers share."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"\w+", folded))


def text_digest(text: str) -> bytes:
    """Return 16 bytes that texts share if and only if they are the same but for their form."""
    return blake2b(normalised(text).encode("utf-8", "replace"), digest_size=16).digest()


def json_schema(answer: type[BaseModel]) -> dict[str, Any]:
    """Return the JSON schema of an answer, as `response_format` takes it."""
    return {"name": answer.__name__.lower(), "schema": answer.model_json_schema(), "strict": True}


def _words(reply: Reply, prompt: Prompt) -> str:
    """Return what was said. Raises FaultError if that is a refusal, nothing, or cut off."""
    if reply.fault:
        kind, _, details = reply.fault.partition(": ")
        raise FaultError(kind, details, again=reply.again)
    if reply.refusal or reply.finish == "content_filter":
        raise FaultError("refusal", repr((reply.refusal or reply.finish)[:_SHOWN]), again=False)
    text = _THOUGHT.sub("", reply.content).strip()
    straight = text.replace("\u2019", "'")
    if any(re.match(pattern, straight, re.IGNORECASE) for pattern in prompt.file.refusals):
        raise FaultError("refusal", repr(text[:_SHOWN]), again=False)
    if reply.finish == "length":
        raise FaultError(
            "too long", f"the answer was cut off at {prompt.file.max_tokens} tokens", again=True
        )
    if not text:
        raise FaultError("empty answer", "the answer has no words", again=True)
    return text


def _parsed(text: str, answer: type[_Answer]) -> _Answer:
    fenced = _FENCE.match(text)
    try:
        tree = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError) as error:
        raise FaultError(
            "malformed JSON", f"{error}; begins {text[:_SHOWN]!r}", again=True
        ) from error
    try:
        return answer.model_validate(tree, strict=False)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc'])) or 'the whole'}: {fault['msg']}"
            for fault in error.errors(include_url=False, include_input=False)[:3]
        )
        raise FaultError("malformed JSON", faults, again=True) from error


def _check_count(found: int, prompt: Prompt, name: str) -> None:
    if not prompt.file.least <= found <= prompt.file.most:
        raise FaultError(
            "wrong count",
            f"found {found} {name}, expected {prompt.file.least} to {prompt.file.most}",
            again=True,
        )
