"""A small server that speaks /v1/chat/completions as the real ones do, and fails when told to.

It counts what it answers and what it would bill, and checks that a request is one: a bearer key, a
model, messages, and a data URL that holds a picture.
"""

import base64
import hashlib
import io
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

KEY = "sk-a-key-that-must-stay-here"
PROMPT_TOKENS, COMPLETION_TOKENS = 700, 90  # of every answer
THINGS = ("wheel", "door", "roof", "tree", "lamp", "river", "hat", "boat", "stone", "window")
Fault = str | None


@dataclass
class Model:
    """What the server knows, counts, and does wrong: `faults(number, body)` names a fault."""

    faults: Callable[[int, dict[str, Any]], Fault] = lambda number, body: None
    honours_keys: bool = True  # answers the same Idempotency-Key with the same answer, unbilled
    slow_seconds: float = 3.0
    retry_after: str = "1"
    seconds: float = 0.0  # of every answer
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)  # idempotency keys, one a request
    times: list[float] = field(default_factory=list)
    billed: Counter[str] = field(default_factory=Counter)  # answers made, by idempotency key
    answered: int = 0  # 200s begun, replayed ones included
    done: Counter[str] = field(default_factory=Counter)  # what was done with requests
    most_at_once: int = 0
    errors: list[str] = field(default_factory=list)  # requests that are none
    _at_once: int = 0
    _kept: dict[str, bytes] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, body: dict[str, Any], key: str) -> Fault:
        with self._lock:
            fault = self.faults(len(self.requests), body)
            self.requests.append(body)
            self.keys.append(key)
            self.times.append(time.monotonic())
            self.done[fault or "fine"] += 1
            return fault

    @contextmanager
    def busy(self) -> Iterator[None]:
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            yield
        finally:
            with self._lock:
                self._at_once -= 1

    def answer(self, body: dict[str, Any], key: str, fault: Fault) -> bytes:
        """Make an answer and bill it, or find the one that was billed."""
        with self._lock:
            self.answered += 1
            if self.honours_keys and key in self._kept:
                return self._kept[key]
            self.billed[key] += 1
            self._kept[key] = _completion(body, fault)
            return self._kept[key]


def picture_of(body: dict[str, Any]) -> bytes:
    """Return the picture of a request; it must be one."""
    urls = [
        part["image_url"]["url"]
        for message in body["messages"]
        if isinstance(message["content"], list)
        for part in message["content"]
        if part["type"] == "image_url"
    ]
    assert len(urls) == 1, "one picture a request"
    head, _, data = urls[0].partition(";base64,")
    assert head in ("data:image/png", "data:image/jpeg")
    found = base64.b64decode(data, validate=True)
    with Image.open(io.BytesIO(found)) as image:
        image.load()
    return found


def _completion(body: dict[str, Any], fault: Fault) -> bytes:
    message: dict[str, Any] = {"role": "assistant", "content": _content(body, fault)}
    finish = "stop"
    if fault == "refusal":
        message = {"role": "assistant", "content": None, "refusal": "I will not look at that."}
    if fault == "cut off":
        finish = "length"
    tree = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": body["model"],
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        "usage": {
            "prompt_tokens": PROMPT_TOKENS,
            "completion_tokens": COMPLETION_TOKENS,
            "total_tokens": PROMPT_TOKENS + COMPLETION_TOKENS,
        },
    }
    if fault == "garbage":
        return b"<html>an error page that says 200</html>"
    if fault == "no usage":
        del tree["usage"]
    return json.dumps(tree).encode()


def _content(body: dict[str, Any], fault: Fault) -> str:
    """Write an answer that belongs to the picture, in the form that was asked for."""
    mark = hashlib.sha256(picture_of(body)).hexdigest()[:8]
    asked = _request_text(body)
    if fault == "said refusal":
        return "I\u2019m sorry, but I can\u2019t help with describing this picture."
    if fault == "empty":
        return "  "
    if fault == "malformed":
        return '{"turns": [{"question": "What is'
    if fault == "half of a pair":
        return json.dumps({"turns": [{"question": "What is \ud800?", "answer": "x \ud800"}] * 3})
    if '{"questions"' in asked:
        things = THINGS[:2] if fault == "wrong count" else THINGS[:3]
        return json.dumps({"questions": [f"What of the {thing} of {mark}?" for thing in things]})
    if '{"turns"' in asked:
        return json.dumps({"turns": _turns(mark, fault)})
    if '{"records"' in asked:
        kinds = [
            line.split(":")[0][2:] for line in _request_text(body).splitlines() if ": " in line
        ]
        kinds = [kind for kind in kinds if kind and " " not in kind]
        rows = [
            {"kind": kind, "query": f"the {kind} of it", "target": _sentence(kind, mark, fault)}
            for kind in kinds
        ]
        return "```json\n" + json.dumps({"records": rows}) + "\n```"
    question = next(m for m in reversed(body["messages"]) if m["role"] == "user")["content"]
    if isinstance(question, list):
        question = question[-1]["text"]
    return _sentence(question, mark, fault)


def _turns(mark: str, fault: Fault) -> list[dict[str, str]]:
    count = 7 if fault == "wrong count" else 3
    answers = [_sentence(thing, mark, fault) for thing in THINGS[:count]]
    if fault == "too long":
        answers[0] = "very " * 2000
    return [
        {"question": f"What of the {thing} of {mark}?", "answer": answer}
        for thing, answer in zip(THINGS, answers, strict=False)
    ]


def _sentence(about: str, mark: str, fault: Fault) -> str:
    if fault == "same everywhere":
        return "This is a picture of something that was photographed some time ago."
    return f"As to {about!r}, the picture {mark} shows it clearly in the middle, in full colour."


def _request_text(body: dict[str, Any]) -> str:
    first = next(m for m in body["messages"] if isinstance(m["content"], list))
    return str(first["content"][-1]["text"])


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "_Server"

    def do_POST(self) -> None:
        model = self.server.model
        size = int(self.headers["Content-Length"])
        data = self.rfile.read(size)
        if len(data) < size:
            self.close_connection = True  # the client was killed
            return
        with model.busy():
            self._reply(model, json.loads(data), self.headers["Idempotency-Key"])

    def _reply(self, model: Model, body: dict[str, Any], key: str) -> None:
        assert self.path == "/v1/chat/completions"
        assert key
        fault = model.take(body, key)
        if self.headers["Authorization"] != f"Bearer {KEY}":
            fault = "401"
        if fault == "429":
            self._error(429, "slow down", {"Retry-After": model.retry_after})
        elif fault == "no money":
            self._error(429, "you are broke", {}, code="insufficient_quota")
        elif fault == "reset":
            self.close_connection = True
        elif fault and fault.isdigit():
            sent = self.headers["Authorization"]
            self._error(int(fault), f"code {fault}, your header was {sent}", {})
        else:
            if fault == "slow":
                time.sleep(model.slow_seconds)
            time.sleep(model.seconds)
            self._answer(model.answer(body, key, fault), fault)

    def _answer(self, data: bytes, fault: Fault) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if fault == "cut":
            data, self.close_connection = data[: len(data) // 2], True
        self.wfile.write(data)

    def _error(self, status: int, message: str, headers: dict[str, str], code: str = "x") -> None:
        data = json.dumps({"error": {"message": message, "type": "t", "code": code}}).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        """Say nothing."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    model: Model

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Bear clients that were killed, and nothing else."""
        error = sys.exc_info()[1]
        if not isinstance(error, BrokenPipeError | ConnectionResetError):
            self.model.errors.append(repr(error))


@contextmanager
def serving(model: Model) -> Iterator[str]:
    """Serve on a free port; yields the endpoint's address."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.model = model
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert not model.errors, model.errors
