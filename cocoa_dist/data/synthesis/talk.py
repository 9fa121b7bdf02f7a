"""What is said about one picture: requests out, replies in, items at the end.

A talk is a generator that knows neither network nor files: the runner answers it from the endpoint,
the assembler from the journal, and both get the same items from the same replies.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from pydantic import BaseModel

from cocoa_dist.data.synthesis.answers import (
    FaultError,
    Questions,
    Reply,
    Rows,
    Turns,
    check_answer,
    check_dialogue,
    check_questions,
    check_records,
)
from cocoa_dist.data.synthesis.prompts import Prompt

PICTURE = {"type": "image_url", "image_url": {"url": ""}}  # the sender puts the picture here
Message = dict[str, Any]
_Checked = TypeVar("_Checked")


@dataclass(frozen=True)
class Request:
    """One thing to ask. (step, ask) names it within its talk."""

    step: int  # 0 first
    ask: int  # how often it was asked before
    messages: tuple[Message, ...]
    answer: type[BaseModel] | None  # of which the reply's JSON must be; None: plain text


@dataclass(frozen=True)
class Item:
    """One record in the making."""

    kind: str  # "" for a dialogue, which is the only item of its picture
    query: str  # "": the picture alone
    target: tuple[str, ...]
    roles: tuple[str, ...] = ()  # who says each text of the target

    @property
    def words(self) -> str:
        """All that was written, for comparing items with one another."""
        return "\n".join((self.query, *self.target))


Talk = Generator[Request, Reply, tuple[Item, ...]]


def talk(prompt: Prompt, *, key: str, caption: str, asks: int) -> Talk:
    """Talk about one picture, asking each thing at most `asks` times.

    Raises FaultError when an answer cannot be used for good.
    """
    return _FORMS[prompt.file.form](prompt, key, caption, asks)


def request_id(plan: str, row: int, request: Request) -> str:
    """Return the name of a request: the same in every run of one plan."""
    return f"{plan}-{row}-{request.step}-{request.ask}"


def calls_of(prompt: Prompt) -> int:
    """Return how many calls a picture takes if nothing goes wrong, at most."""
    return 1 + prompt.file.most if prompt.file.form == "dialogue_in_turn" else 1


def _dialogue(prompt: Prompt, key: str, caption: str, asks: int) -> Talk:
    messages = _opening(prompt, caption)
    turns = yield from _asked(
        prompt, 0, messages, Turns, lambda reply: check_dialogue(reply, prompt), asks
    )
    return (_dialogue_item([(turn.question, turn.answer) for turn in turns]),)


def _dialogue_in_turn(prompt: Prompt, key: str, caption: str, asks: int) -> Talk:
    """Ask for questions, then each of them with the answers before it in view."""
    questions = yield from _asked(
        prompt,
        0,
        _opening(prompt, caption),
        Questions,
        lambda reply: check_questions(reply, prompt),
        asks,
    )
    system = prompt.filled(prompt.file.answer_system)
    messages: tuple[Message, ...] = (_said("system", system),) if system else ()
    answers: tuple[str, ...] = ()
    for step, question in enumerate(questions, start=1):
        asked = [PICTURE, _text(question)] if step == 1 else question
        messages = (*messages, {"role": "user", "content": asked})
        answer = yield from _asked(
            prompt,
            step,
            messages,
            None,
            partial(check_answer, prompt=prompt, before=answers),
            asks,
        )
        answers = (*answers, answer)
        messages = (*messages, _said("assistant", answer))
    return (_dialogue_item(list(zip(questions, answers, strict=True))),)


def _records(prompt: Prompt, key: str, caption: str, asks: int) -> Talk:
    kinds = prompt.kinds_for(key)
    listed = "\n".join(f"- {name}: {meaning}" for name, meaning in kinds.items())
    rows = yield from _asked(
        prompt,
        0,
        _opening(prompt, caption, kinds=listed),
        Rows,
        lambda reply: check_records(reply, prompt, kinds),
        asks,
    )
    return tuple(Item(row.kind, row.query, (row.target,)) for row in rows)


_FORMS: dict[str, Callable[[Prompt, str, str, int], Talk]] = {
    "dialogue": _dialogue,
    "dialogue_in_turn": _dialogue_in_turn,
    "records": _records,
}


def _asked(
    prompt: Prompt,
    step: int,
    messages: tuple[Message, ...],
    answer: type[BaseModel] | None,
    check: Callable[[Reply], _Checked],
    asks: int,
) -> Generator[Request, Reply, _Checked]:
    """Ask until the reply passes, telling the model what was wrong with the one before."""
    for ask in range(asks):
        reply = yield Request(step, ask, messages, answer)
        try:
            return check(reply)
        except FaultError as error:
            if not error.again or ask == asks - 1:
                raise
            if reply.content.strip():
                told = prompt.filled(prompt.file.correction, error=str(error))
                messages = (*messages, _said("assistant", reply.content), _said("user", told))
    raise AssertionError("asks is at least 1")


def _opening(prompt: Prompt, caption: str, *, kinds: str = "") -> tuple[Message, ...]:
    words = prompt.filled(prompt.file.request, caption=prompt.caption_line(caption), kinds=kinds)
    first = {"role": "user", "content": [PICTURE, _text(words)]}
    system = prompt.filled(prompt.file.system)
    return (_said("system", system), first) if system else (first,)


def _said(role: str, words: str) -> Message:
    return {"role": role, "content": words}


def _text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def _dialogue_item(turns: list[tuple[str, str]]) -> Item:
    target = tuple(text for turn in turns for text in turn)
    return Item("", "", target, roles=("user", "assistant") * len(turns))
