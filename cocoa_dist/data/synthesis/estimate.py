"""What a synthesis would ask and cost, from a few pictures, before anything is asked."""

from dataclasses import dataclass
from typing import Any

from cocoa_dist.data.synthesis.bill import Prices
from cocoa_dist.data.synthesis.pictures import RejectedUnit, sent_picture, units
from cocoa_dist.data.synthesis.plan import Plan
from cocoa_dist.data.synthesis.talk import calls_of, talk
from cocoa_dist.data.writing.source import Source
from cocoa_dist.data.writing.summary import spread

_LOOKED_AT = 8  # pictures, evenly spread
_SHOWN_URL = 48  # characters of a picture's data URL


@dataclass(frozen=True)
class Estimate:
    """The first request, and a bill without a call."""

    request: dict[str, Any]  # as it would be posted, the picture cut short
    rows: int
    calls: int  # at most, if nothing has to be asked again
    prompt_tokens: float  # about; pictures by Qwen2-VL's rule
    completion_tokens: int  # at most

    def cost(self, prices: Prices) -> float:
        """Return the price of it all, answers as long as they may be."""
        return prices.cost(
            prompt_tokens=self.prompt_tokens, completion_tokens=self.completion_tokens
        )


def estimate(plan: Plan, source: Source, *, limit: int | None = None) -> Estimate:
    """Look at some pictures. Raises ValueError if none of them can be used."""
    rows = min(len(source), limit or len(source))
    tokens: list[float] = []
    shown: dict[str, Any] = {}
    reason = "the source has no rows"
    for row in spread(rows, _LOOKED_AT):
        (unit,) = units(source, row, row + 1)
        if isinstance(unit, RejectedUnit):
            reason = unit.reason
            continue
        try:
            picture = sent_picture(
                unit.picture,
                max_pixels=plan.max_pixels,
                max_decoded_pixels=plan.max_decoded_pixels,
            )
        except ValueError as error:
            reason = str(error)
            continue
        request = next(talk(plan.prompt, key=unit.key, caption=unit.caption, asks=1))
        size = f"{picture.height}x{picture.width} pixels, {len(picture.data):,} bytes"
        shown = shown or plan.request_body(request, f"{picture.url[:_SHOWN_URL]}... ({size})")
        tokens.append(plan.prompt_tokens(request, picture))
    if not tokens:
        raise ValueError(f"none of {_LOOKED_AT} pictures can be used, such as: {reason}")
    calls = rows * calls_of(plan.prompt)
    return Estimate(
        request=shown,
        rows=rows,
        calls=calls,
        prompt_tokens=calls * sum(tokens) / len(tokens),
        completion_tokens=calls * plan.prompt.file.max_tokens,
    )
