"""What a synthesis does: all that decides which questions are asked, and what each request says."""

import copy
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Literal

from cocoa_dist.data.synthesis.answers import json_schema
from cocoa_dist.data.synthesis.pictures import SentPicture
from cocoa_dist.data.synthesis.prompts import Prompt
from cocoa_dist.data.synthesis.talk import PICTURE, Request
from cocoa_dist.data.writing.source import Source

ANSWER_RULES = 1  # goes up when the same answers become other records
ResponseFormat = Literal["schema", "object", "none"]
_TEXT_BYTES_PER_TOKEN = 3.0  # of prompts, on the low side
_MESSAGE_TOKENS = 8  # of a chat template, around each message


@dataclass(frozen=True)
class Plan:
    """Everything that a changed journal would be wrong for."""

    prompt: Prompt
    model: str
    address: str  # of the endpoint
    max_pixels: int  # of a picture as it is sent
    max_decoded_pixels: int
    asks: int  # of one thing, until its answer can be used
    response_format: ResponseFormat = "schema"
    token_field: str = "max_tokens"
    body: dict[str, Any] = field(default_factory=dict)  # more fields of every request

    def facts(self, source: Source) -> dict[str, Any]:
        """Return the plan for a journal; JSON values."""
        stamp = json.dumps(source.stamp).encode()
        return {
            "prompt": self.prompt.name,
            "prompt version": self.prompt.version,
            "model": self.model,
            "endpoint": self.address,
            "source": hashlib.sha256(stamp).hexdigest()[:16],
            "rows": len(source),
            "max pixels": self.max_pixels,
            "max decoded pixels": self.max_decoded_pixels,
            "asks": self.asks,
            "response format": self.response_format,
            "token field": self.token_field,
            "body": self.body,
            "answer rules": ANSWER_RULES,
        }

    def request_body(self, request: Request, picture: str) -> dict[str, Any]:
        """Return what is posted; `picture` is the URL that stands for the picture."""
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [_with_picture(message, picture) for message in request.messages],
            "temperature": self.prompt.file.temperature,
            self.token_field: self.prompt.file.max_tokens,
        }
        if request.answer is not None and self.response_format == "schema":
            schema = json_schema(request.answer)
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif request.answer is not None and self.response_format == "object":
            body["response_format"] = {"type": "json_object"}
        return {**body, **self.body}

    def prompt_tokens(self, request: Request, picture: SentPicture) -> float:
        """Return about how many tokens a request has."""
        words = json.dumps(request.messages, ensure_ascii=False).encode()
        pictures = sum(
            PICTURE in message["content"] for message in request.messages if _has_parts(message)
        )
        return (
            len(words) / _TEXT_BYTES_PER_TOKEN
            + _MESSAGE_TOKENS * len(request.messages)
            + pictures * picture.tokens
        )


def plan_hash(facts: dict[str, Any]) -> str:
    """Return 12 hex digits that two plans share if and only if they are the same."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def _has_parts(message: dict[str, Any]) -> bool:
    return isinstance(message["content"], list)


def _with_picture(message: dict[str, Any], url: str) -> dict[str, Any]:
    if not _has_parts(message):
        return message
    parts = copy.deepcopy(message["content"])
    for part in parts:
        if part["type"] == "image_url":
            part["image_url"]["url"] = url
    return {**message, "content": parts}
