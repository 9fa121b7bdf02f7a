"""One call of an OpenAI-compatible endpoint: POST /chat/completions, and a name for what came back.

The key to the endpoint goes into one header and nowhere else: not into the journal, not into a
message, and it is cut out of what the endpoint says. Redirects, which it would go along, are not
followed.
"""

import asyncio
import email.utils
import json
import re
import time
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlsplit

import httpx2

from cocoa_dist.data.synthesis.bill import tokens_of

_MAX_BODY = 8 * 2**20  # bytes of an answer
_SAID = 300  # characters of what an endpoint says about a fault
_CONNECT_SECONDS = 20.0
# Codes of a 429 that no waiting cures.
_NO_MONEY = re.compile(
    r"insufficient_quota|insufficient_balance|credit_balance_exhausted|billing_hard_limit_reached"
    r"|(organization|project)_(spend|usage)_limit_exceeded"
)


class EndpointStopError(ValueError):
    """The endpoint will refuse every call: a wrong key, address or model, or no money left."""


@dataclass(frozen=True)
class Answered:
    """A 200. `fault`: `kind: details` if its body is no chat completion."""

    content: str = ""
    refusal: str = ""
    finish: str = ""
    usage: dict[str, Any] | None = None  # prompt_tokens and completion_tokens
    fault: str = ""


@dataclass(frozen=True)
class Failed:
    """Anything else. `lost`: the endpoint may have answered, and written it on the bill."""

    kind: str
    reason: str
    status: int | None = None
    lost: bool = False
    final: bool = False  # this request will never be answered
    retry_after: float | None = None  # seconds, as the endpoint asks


def endpoint_address(url: str) -> str:
    """Return the address of an endpoint, `http://host:8000/v1`, without a slash at its end.

    Raises ValueError for what is none, and for one that carries a key or password.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"endpoint {url!r} is no address, expected http://HOST:PORT/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError(
            f"endpoint {parts.scheme}://{parts.hostname}...: it holds a user, a query or a "
            "fragment; a key belongs into the environment variable that --api-key-env names"
        )
    return url.rstrip("/").removesuffix("/chat/completions")


class Endpoint:
    """An endpoint with a pool of connections; use it as an async context manager."""

    def __init__(
        self, address: str, *, key: str, key_name: str, timeout: float, calls: int
    ) -> None:
        """`timeout`: seconds of a whole call. `key`: "" sends none. `calls`: at one time.

        Raises ValueError for a key that no header can carry.
        """
        if key and not re.fullmatch(r"[\x21-\x7e]+", key):
            raise ValueError(
                f"environment variable {key_name}: the key has spaces, line ends or letters beyond "
                "ASCII; set it again"
            )
        self.address = address
        self._key, self._key_name, self._timeout = key, key_name, timeout
        self._client = httpx2.AsyncClient(
            timeout=httpx2.Timeout(timeout, connect=min(timeout, _CONNECT_SECONDS)),
            limits=httpx2.Limits(max_connections=calls, max_keepalive_connections=calls),
            headers={"Authorization": f"Bearer {key}"} if key else {},
            follow_redirects=False,
            verify=address.startswith("https"),  # loading certificates takes 50 ms
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._client.aclose()

    async def send(self, body: dict[str, Any], *, idempotency_key: str) -> Answered | Failed:
        """Call once. Raises EndpointStopError for what every other call would meet as well."""
        content = json.dumps(body, ensure_ascii=True).encode()
        headers = {"Content-Type": "application/json", "Idempotency-Key": idempotency_key}
        try:
            async with (
                asyncio.timeout(self._timeout),
                self._client.stream(
                    "POST", f"{self.address}/chat/completions", content=content, headers=headers
                ) as response,
            ):
                data = b""
                async for piece in response.aiter_bytes():
                    data += piece
                    if len(data) > _MAX_BODY:
                        break
        except (TimeoutError, httpx2.TimeoutException) as error:
            unsent = isinstance(error, httpx2.ConnectTimeout | httpx2.PoolTimeout)
            reason = f"no answer in {self._timeout:g} s"
            return Failed("time-out", reason, lost=not unsent)
        except httpx2.ConnectError as error:
            return Failed("no connection", self._clean(str(error)))
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            reason = f"{type(error).__name__}: {self._clean(str(error))}"
            return Failed("connection lost", reason, lost=True)
        if response.status_code == 200:
            return _completion(data)
        return self._failure(response.status_code, response.headers, data)

    def _failure(self, status: int, headers: httpx2.Headers, data: bytes) -> Failed:
        said = self._clean(_message(data))
        if status in (401, 403):
            remedy = f"set {self._key_name} to a key that may use it"
            raise EndpointStopError(
                f"{self.address} answers {status}: it does not take the key in {self._key_name}"
                f"{'' if self._key else ', which is not set'} ({said}); {remedy}"
            )
        if status == 402 or (status == 429 and _NO_MONEY.search(data.decode("utf-8", "replace"))):
            raise EndpointStopError(
                f"{self.address} answers {status}: there is no money left ({said}); the same "
                "command goes on when there is"
            )
        if status in (404, 405) or 300 <= status < 400:
            target = headers.get("location", "")
            said = f"it leads to {self._clean(target)}" if target else said
            raise EndpointStopError(
                f"{self.address}/chat/completions answers {status} ({said}); correct --endpoint or "
                "--model"
            )
        if status == 429 or (status == 503 and "retry-after" in headers):
            wait = retry_after(headers.get("retry-after", ""), now=time.time())
            kind = "rate limited" if status == 429 else "server error"
            return Failed(kind, f"{status}: {said}", status, retry_after=wait)
        if status == 408 or status == 409 or status >= 500:
            return Failed("server error", f"{status}: {said}", status)
        return Failed("refused by the endpoint", f"{status}: {said}", status, final=True)

    def _clean(self, text: str) -> str:
        """Return what an endpoint says, short, on one line and without our key."""
        text = text.replace(self._key, "***") if self._key else text
        return " ".join(text.split())[:_SAID] or "it says nothing"


def retry_after(value: str, *, now: float) -> float | None:
    """Return the seconds that a Retry-After header asks for; None if it asks for nothing."""
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - now)
    except (ValueError, TypeError):
        return None


def _message(data: bytes) -> str:
    """Return what an error says: OpenAI's error.message, or the body as it is."""
    try:
        tree = json.loads(data)
        error = tree.get("error", tree)
        found = error.get("message") if isinstance(error, dict) else error
        return str(found or tree)
    except (ValueError, AttributeError, RecursionError):
        return data[: 4 * _SAID].decode("utf-8", "replace")


def _completion(data: bytes) -> Answered:
    """Return what a 200 says, or in which way it is no chat completion; it is paid for anyway."""
    if len(data) > _MAX_BODY:
        return Answered(fault=f"malformed body: more than {_MAX_BODY} bytes")
    try:
        tree = json.loads(data)
        usage = tree.get("usage")
        choice = tree["choices"][0]
        message = choice["message"]
        content, refusal = message.get("content"), message.get("refusal")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        shown = data[:60].decode("utf-8", "replace")
        return Answered(fault=f"malformed body: {type(error).__name__} in {shown!r}")
    if isinstance(content, list):  # pieces, as some endpoints write
        pieces = [piece.get("text") for piece in content if isinstance(piece, dict)]
        content = "".join(piece for piece in pieces if isinstance(piece, str))
    counted = isinstance(usage, dict) and any(tokens_of(usage))
    prompt, completion = tokens_of(usage if counted else None)
    return Answered(
        content=content if isinstance(content, str) else "",
        refusal=refusal if isinstance(refusal, str) else "",
        finish=str(choice.get("finish_reason") or ""),
        usage={"prompt_tokens": prompt, "completion_tokens": completion} if counted else None,
    )
