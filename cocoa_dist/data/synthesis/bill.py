"""What was asked, answered and paid for, folded from the journal's lines.

Every sending ends in one of three ways: answered with 200 and counted in `calls`, answered with
anything else and counted in `failures`, or of unknown fate (killed, timed out, connection lost) and
counted in `unconfirmed`. So sendings = calls + failures + unconfirmed, always.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

_MILLION = 1_000_000


@dataclass(frozen=True)
class Prices:
    """Of a million tokens, in whatever currency the budget has; 0: not stated."""

    prompt: float = 0.0
    completion: float = 0.0

    def cost(self, *, prompt_tokens: float, completion_tokens: float) -> float:
        """Return the price of so many tokens."""
        spent = prompt_tokens * self.prompt + completion_tokens * self.completion
        return spent / _MILLION


@dataclass
class Bill:
    """Counted calls and tokens."""

    sendings: int = 0
    calls: int = 0  # answered with 200
    without_usage: int = 0  # of the calls: the endpoint did not say how many tokens
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0  # of calls, at the prices of their day
    unpriced_prompt_tokens: int = 0  # of calls that were made without prices
    unpriced_completion_tokens: int = 0
    failures: Counter[str] = field(default_factory=Counter)  # by kind, unconfirmed ones left out
    lost: Counter[str] = field(default_factory=Counter)  # unconfirmed that ended, by kind
    open: set[str] = field(default_factory=set)  # requests that are under way
    killed: int = 0  # unconfirmed: the process died before the answer was on the disk

    @property
    def unconfirmed(self) -> int:
        """Sendings of unknown fate; those under way count until their answer is there."""
        return self.killed + self.lost.total() + len(self.open)

    def add(self, line: dict[str, Any]) -> None:
        """Fold one line of the journal."""
        kind, request = line["e"], line.get("id", "")
        if kind == "sent":
            self.killed += request in self.open  # sent again: the process before this one died
            self.open.add(request)
            self.sendings += 1
        elif kind == "answer":
            self.open.discard(request)
            self._add_answer(line)
        elif kind == "failure":
            self.open.discard(request)
            (self.lost if line["lost"] else self.failures)[line["kind"]] += 1

    def count_killed(self) -> None:
        """Take the requests under way for those of a process that died."""
        self.killed += len(self.open)
        self.open.clear()

    def _add_answer(self, line: dict[str, Any]) -> None:
        self.calls += 1
        usage = line["usage"]
        self.without_usage += usage is None
        prompt, completion = tokens_of(usage)
        self.prompt_tokens += prompt
        self.completion_tokens += completion
        if line["cost"] is None:
            self.unpriced_prompt_tokens += prompt
            self.unpriced_completion_tokens += completion
        else:
            self.cost += line["cost"]

    def total(self, prices: Prices) -> float:
        """Return what the calls cost; those made without prices at today's."""
        return self.cost + prices.cost(
            prompt_tokens=self.unpriced_prompt_tokens,
            completion_tokens=self.unpriced_completion_tokens,
        )

    def at_most(self, prices: Prices) -> float:
        """Return what it costs if every unconfirmed sending was answered, each like the mean."""
        total = self.total(prices)
        return total + (self.unconfirmed - len(self.open)) * total / max(1, self.calls)

    def facts(self, prices: Prices) -> dict[str, Any]:
        """Return the bill for people and scripts; JSON values."""
        return {
            "sendings": self.sendings,
            "calls": self.calls,
            "unconfirmed": self.unconfirmed,
            "failures": dict(self.failures.most_common()),
            "unconfirmed_by_kind": {
                **dict(self.lost.most_common()),
                **({"killed before the answer": self.killed} if self.killed else {}),
            },
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "calls_without_usage": self.without_usage,
            "cost": round(self.total(prices), 6),
            "cost_at_most": round(self.at_most(prices), 6),
        }


def tokens_of(usage: dict[str, Any] | None) -> tuple[int, int]:
    """Return (prompt, completion) tokens, 0 where the endpoint did not say."""
    counts = ((usage or {}).get(name) for name in ("prompt_tokens", "completion_tokens"))
    prompt, completion = (count if isinstance(count, int) and count > 0 else 0 for count in counts)
    return prompt, completion
