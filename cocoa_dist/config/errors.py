"""Says what is wrong with a recipe in words: the key, what was found, the nearest known one."""

import difflib
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

_OBJECTIVE_KINDS = {"reconstruction", "next_token", "contrastive"}  # pydantic puts them in paths


class ConfigError(ValueError):
    """A recipe or an override that cannot be used; the message says what to change."""


def nearest(word: str, known: Sequence[str]) -> str:
    """Return `, did you mean '...'?` if a known word is close, else nothing."""
    close = difflib.get_close_matches(word, known, n=1)
    return f", did you mean '{close[0]}'?" if close else ""


def explain(error: Any, *, root: type[BaseModel]) -> str:
    """Turn one pydantic error into `key: what was found, what was expected`."""
    where = _path(error["loc"])
    key = ".".join(where) or "recipe"
    kind, found = error["type"], error.get("input")
    if kind == "extra_forbidden":
        return f"{key}: unknown key{nearest(where[-1], _known_keys(root, where[:-1]))}"
    if kind == "missing":
        return f"{key}: missing"
    message = str(error["msg"]).removeprefix("Value error, ")
    if kind == "value_error":
        return f"{key}: {message}" if where else message
    return f"{key}: found {found!r}; {message[0].lower()}{message[1:]}"


def _path(location: Sequence[str | int]) -> list[str]:
    """Return the dotted path as a recipe has it, without the kind that pydantic puts in."""
    parts = [str(part) for part in location]
    if "objective" in parts[:-1]:
        tag = parts.index("objective") + 1
        if parts[tag] in _OBJECTIVE_KINDS:
            del parts[tag]
    return parts


def _known_keys(root: type[BaseModel], parents: Sequence[str]) -> list[str]:
    """Return field names of the group that a dotted path leads to."""
    models: list[Any] = [root]
    skip = False
    for part in parents:
        if skip:  # the name of a stage, a source or an evaluation set
            skip = False
            continue
        found: list[Any] = []
        for model in models:
            field = model.model_fields.get(part)
            if field is not None:
                found += _models_in(field.annotation)
                skip = "dict[" in str(field.annotation)
        models = found
    return sorted({name for model in models for name in model.model_fields})


def _models_in(annotation: Any) -> list[Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models_in(part)]
