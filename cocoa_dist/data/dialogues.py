"""Turns of a dialogue as token ids, and which of them are answers (CoMa, arXiv 2511.08480).

A turn is written as the chat template of Qwen's models writes it, without a system turn. Only what
the assistant says, and the end of it, is an answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from cocoa_dist.data.records import Record, side_texts
from cocoa_dist.data.vocabulary import Vocabulary, text_start

Speaker = Literal["user", "assistant"]
SPEAKERS: tuple[str, ...] = get_args(Speaker)
_WHAT, _MORE, _CAPTION = "What is it?", "What goes with it?", "What does the picture show?"
_MADE_UP = (_WHAT, _MORE)  # the longest dialogue that is made up


@dataclass(frozen=True)
class Turn:
    """What one of the two says."""

    speaker: Speaker
    text: str


@dataclass(frozen=True)
class EncodedTurns:
    """A dialogue in n tokens."""

    input_ids: NDArray[np.int64]  # (n,)
    answers: NDArray[np.bool_]  # (n,): what is asked for
    truncated: int  # turns that were cut or left out


def recorded_turns(record: Record) -> list[Turn]:
    """Return the turns in a record's target; `meta.roles` says who speaks (layout `dialogues`).

    Raises ValueError for a record without turns, without answers, or whose roles do not fit.
    """
    texts, roles = side_texts(record.target), record.meta.get("roles")
    if not isinstance(roles, list) or not texts:
        raise ValueError(
            "the record has no turns, expected texts in its target and who says them in meta.roles"
        )
    unknown = [role for role in roles if role not in SPEAKERS]
    if len(roles) != len(texts) or unknown:
        raise ValueError(
            f"meta.roles {roles!r} does not fit a target of {len(texts)} texts, expected one of "
            f"{', '.join(SPEAKERS)} for each"
        )
    turns = [Turn(role, text) for role, text in zip(roles, texts, strict=True)]
    _check_answers(turns)
    return turns


def made_up_turns(*, name: str, listed: str, caption: str, listed_first: bool) -> list[Turn]:
    """Return questions about a record's own texts, and these texts as their answers.

    `listed`: its keywords, "" for none; then a record without keywords is asked for `caption`.
    Raises ValueError for a record without any text.
    """
    if not listed:
        said = [(_CAPTION, caption)]
    else:
        said = [(_WHAT, name), (_MORE, listed)]
        said = said[::-1] if listed_first else said
    turns: list[Turn] = []
    for question, answer in said:
        if answer:
            turns += [Turn("user", question), Turn("assistant", answer)]
    _check_answers(turns)
    return turns


def encode_turns(
    turns: Sequence[Turn], *, vocabulary: Vocabulary, max_tokens: int, max_turns: int
) -> EncodedTurns:
    """Write turns one after the other, cut at `max_tokens` in all and at `max_turns`.

    A question at the end whose answer was cut away is left out. Raises ValueError if no token of
    an answer is left.
    """
    ids: list[int] = []
    answers: list[bool] = []
    truncated = max(0, len(turns) - max_turns)
    kept = 0  # tokens up to the end of the last answer
    for number, turn in enumerate(turns[:max_turns]):
        head = [vocabulary.bos, *vocabulary.encode(f"{turn.speaker}\n")]
        text = vocabulary.encode(text_start(turn.text, max_tokens))
        room = max_tokens - len(ids) - len(head)
        said = [*text, vocabulary.eos]
        cut = len(said) > room
        said = said[: max(room, 0)]
        is_answer = turn.speaker == "assistant"
        if said:
            ids += [*head, *said]
            answers += [False] * len(head) + [is_answer] * len(said)
            kept = len(ids) if is_answer else kept
        if cut:
            truncated += min(len(turns), max_turns) - number
            break
        newline = vocabulary.encode("\n")[: max_tokens - len(ids)]
        ids += newline
        answers += [False] * len(newline)
    if not kept:
        raise ValueError(
            f"the target is empty after truncation: no answer begins within {max_tokens} tokens "
            f"and {max_turns} turns; raise data.max_text_tokens or data.max_turns"
        )
    return EncodedTurns(
        input_ids=np.array(ids[:kept], dtype=np.int64),
        answers=np.array(answers[:kept], dtype=np.bool_),
        truncated=truncated,
    )


def most_added_tokens(view: str, *, vocabulary: Vocabulary, max_turns: int) -> int:
    """Return how many tokens a dialogue can have beside the texts of its record."""
    if view not in ("dialogue", "questions"):
        return 0
    head = max(len(vocabulary.encode(f"{speaker}\n")) for speaker in SPEAKERS)
    around = 2 + head + len(vocabulary.encode("\n"))
    if view == "dialogue":
        return around * max_turns
    asked = max(
        sum(len(vocabulary.encode(question)) for question in _MADE_UP),
        len(vocabulary.encode(_CAPTION)),
    )
    return 2 * len(_MADE_UP) * around + asked


def _check_answers(turns: Sequence[Turn]) -> None:
    if not any(turn.speaker == "assistant" for turn in turns):
        raise ValueError(
            f"dialogue without answers: none of its {len(turns)} turns is the assistant's"
        )
