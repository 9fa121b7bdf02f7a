"""A page that shows a data set: numbers, histograms and pictures; one file, nothing fetched."""

import base64
import io
from collections.abc import Mapping
from html import escape

from PIL import Image

from cocoa_dist.data.images import decode_image
from cocoa_dist.data.writing.summary import Example, Histogram, Summary
from cocoa_dist.report.theme import STYLE

_THUMBNAIL = 240  # pixels, longer side
_MAX_PIXELS = 50_000_000
_ROWS = 8  # of a table of counts
_STYLE = """
.sheet { display: grid; gap: 18px 14px; margin-top: 24px;
  grid-template-columns: repeat(auto-fill, minmax(min(46%, 158px), 1fr)); }
.sheet figure { min-width: 0; }
.sheet img, .sheet .none { width: 100%; aspect-ratio: 1; object-fit: contain; display: block;
  border-radius: 8px; border: 1px solid var(--line); background: #fff; }
.sheet .none { background: var(--empty); color: var(--soft); font-size: 13px; padding: 10px;
  overflow: hidden; overflow-wrap: anywhere; }
.sheet figcaption { margin-top: 6px; font-size: 13px; line-height: 1.35; overflow-wrap: anywhere; }
.sheet figcaption b { display: block; font-weight: 500; max-height: 4.1em; overflow: hidden; }
.bars { list-style: none; margin: 10px 0 0; padding: 0; font-size: 13px;
  font-variant-numeric: tabular-nums; }
.bars li { display: grid; grid-template-columns: 9em minmax(0, 1fr) 4.5em; gap: 8px;
  align-items: center; }
.bars span { color: var(--soft); text-align: right; white-space: nowrap; }
.bars i { display: block; height: 10px; background: var(--accent); border-radius: 3px;
  min-width: 1px; }
"""


def render_sheet(summary: Summary) -> str:
    """Return the whole page."""
    name = escape(str(summary.info.info.get("name") or summary.path))
    tiles = "".join(_tile(example) for example in summary.examples)
    bars = "".join(_bars(histogram) for histogram in summary.histograms)
    tables = "".join(
        _table(title, counts)
        for title, counts in (
            ("Tasks", summary.tasks),
            ("Picture formats", summary.formats),
            ("Licences", summary.licences),
            ("Sources", summary.sources),
            ("Rows left out", summary.rejected),
        )
        if counts
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}: what is in it</title>
<style>{STYLE}{_STYLE}</style>
</head>
<body><main>
<header>
<p class="eyebrow">Data set</p>
<h1>{name}</h1>
<p class="lead">{_lead(summary)}</p>
</header>
<section><h2>Pictures</h2>
<p class="quiet">{len(summary.examples)} records, evenly spread over the data set.</p>
<div class="sheet">{tiles}</div></section>
<section><h2>Sizes</h2><div class="grid two">{bars}</div></section>
<section><h2>Where from</h2>
<p class="quiet">Counted over {summary.sampled} records, evenly spread.</p>
<div class="grid two">{tables}</div></section>
<footer><p>{_facts(summary)}</p></footer>
</main></body>
</html>
"""


def _lead(summary: Summary) -> str:
    info = summary.info
    broken = summary.unreadable_pictures
    text = (
        f"{info.count:,} records with {summary.pictures:,} pictures in {info.num_shards} shards, "
        f"{info.bytes / 1e6:,.1f} MB."
    )
    if broken:
        text += f" {broken:,} pictures cannot be read; training leaves their records out."
    if summary.rejected:
        text += f" {sum(summary.rejected.values()):,} rows of the source became no record."
    return text


def _facts(summary: Summary) -> str:
    info = summary.info
    facts = {
        **info.info,
        "fingerprint": info.fingerprint[:16],
        "tokenizer": info.tokenizer_sha256[:16] or "none: tokens were not counted",
        "records in a batch": info.records_per_batch,
    }
    return " &middot; ".join(f"{escape(str(k))}: {escape(str(v))}" for k, v in facts.items())


def _tile(example: Example) -> str:
    size = ", ".join(f"{width}x{height}" for height, width in example.sizes[:2])
    more = f" +{len(example.sizes) - 2}" if len(example.sizes) > 2 else ""
    text = escape(example.texts[0]) if example.texts else "(no text)"
    caption = f"<figcaption><b>{text}</b>{escape(example.key)}<br>{size}{more}</figcaption>"
    if example.broken or not example.pictures:
        shown = escape(example.broken or " / ".join(example.texts[1:]) or "text only")
        return f'<figure><div class="none">{shown}</div>{caption}</figure>'
    uri = thumbnail_uri(example.pictures[0])
    return f'<figure><img src="{uri}" alt="{text}" loading="lazy">{caption}</figure>'


def thumbnail_uri(data: bytes) -> str:
    """Return a picture as a small WebP in a data URI. Raises ValueError if it is broken."""
    picture = Image.fromarray(decode_image(data, max_pixels=_MAX_PIXELS))
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=78)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def _bars(histogram: Histogram) -> str:
    most = max(histogram.counts)
    rows = "".join(
        f"<li><span>{bin_name(histogram, place)}</span>"
        f'<i style="width:{100 * count / most:.1f}%"></i>{count:,}</li>'
        for place, count in enumerate(histogram.counts)
    )
    return (
        f"<figure><h3>{escape(histogram.title)}</h3>"
        f'<p class="quiet">{escape(histogram.unit)}; mean {histogram.mean:,.1f}, '
        f'largest {histogram.largest:,.0f}</p><ul class="bars">{rows}</ul></figure>'
    )


def bin_name(histogram: Histogram, place: int) -> str:
    """Return what a bin of a histogram holds, in words."""
    low, high = histogram.edges[place : place + 2]
    if histogram.whole:
        return f"{low:,.0f} to {high - 1:,.0f}" if high - low > 1 else f"{low:,.0f}"
    digits = 0 if high - low >= 10 else 1
    return f"{low:,.{digits}f} to {high:,.{digits}f}"


def _table(title: str, counts: Mapping[str, int]) -> str:
    shown = list(counts.items())[:_ROWS]
    rest = sum(counts.values()) - sum(count for _, count in shown)
    rows = [*shown, *([("all others", rest)] if rest else [])]
    body = "".join(
        f"<tr><td>{escape(name)}</td><td class='num'>{count:,}</td></tr>" for name, count in rows
    )
    return (
        f"<div class='scroll'><table class='facts'><caption>{escape(title)}</caption>"
        f"<tbody>{body}</tbody></table></div>"
    )
