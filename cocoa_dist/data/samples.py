"""From a record to samples: token ids, roles and pictures at the model's size; no torch.

A view decides what a record becomes in a stage: a caption under its picture, a context bridged to a
target, plain language, or the two sides of a pair. Views are pure functions of (record, draw). A
record that cannot be used becomes a filler with a reason; it never raises into the loader.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cocoa_dist.config import ImageConfig
from cocoa_dist.data.dialogues import Turn, encode_turns, made_up_turns, recorded_turns
from cocoa_dist.data.geometry import ImageGeometry as ImageGeometry
from cocoa_dist.data.images import Pixels
from cocoa_dist.data.negatives import Label, chosen_negatives, target_label
from cocoa_dist.data.picture_cache import PictureCache as PictureCache
from cocoa_dist.data.records import Record, Side, side_texts
from cocoa_dist.data.view_settings import ViewSettings as ViewSettings
from cocoa_dist.data.view_settings import view_settings as view_settings
from cocoa_dist.data.vocabulary import Vocabulary as Vocabulary
from cocoa_dist.data.vocabulary import load_tokenizer as load_tokenizer
from cocoa_dist.data.vocabulary import text_start as text_start
from cocoa_dist.segments import Role, Segment

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

_WHITE = 255
_NAME_ALONE_SHARE = 0.3  # of captions when keywords are sampled
_WITH_NAME_SHARE = 0.75  # of the captions that have keywords


@dataclass(frozen=True)
class Sample:
    """One sequence of n tokens, before corruption, in its own coordinates."""

    input_ids: Ints  # (n,)
    segments: tuple[Segment, ...]  # tile [0, n) in order
    images: tuple[Pixels, ...]  # at the model's size, in the order of their tokens
    text_positions: Bools  # (n,): may be masked or supervised; never special or visual tokens
    truncated: int = 0  # texts that were cut
    is_filler: bool = False  # stands for a record that could not be used, or what it lacks
    label: Label | None = None  # of a pair's target where its record alone does not say, negatives


@dataclass(frozen=True)
class ViewResult:
    """What a record became: its samples, or fillers and the reason."""

    samples: tuple[Sample, ...]
    reason: str | None = None  # why the record could not be used


# (record, *, draw, vocabulary, settings); raises ValueError for a record that it cannot use
View = Callable[..., tuple[Sample, ...]]


def draw_for(seed: int, stage: str, passes: int, record_id: int) -> np.random.Generator:
    """Return the generator of one record in one pass: the same on any rank, worker and world size.

    Counter-based (Philox), so there is no generator state to save.
    """
    text = f"{seed}/{stage}/{passes}/{record_id}"
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype="<u8")))


def view_samples(
    view: str,
    record: Record,
    *,
    draw: np.random.Generator,
    vocabulary: Vocabulary,
    settings: ViewSettings,
) -> ViewResult:
    """Apply a view by name; a record that it cannot use becomes fillers with the reason."""
    try:
        made = VIEWS[view](record, draw=draw, vocabulary=vocabulary, settings=settings)
    except ValueError as error:
        return ViewResult(fillers(view, vocabulary, settings), reason=str(error))
    return ViewResult(made)


def fillers(view: str, vocabulary: Vocabulary, settings: ViewSettings) -> tuple[Sample, ...]:
    """Return the fillers that keep the place of a record of this view."""
    return (filler_sample(vocabulary),) * (2 + settings.negatives if view == "pair" else 1)


def filler_sample(vocabulary: Vocabulary) -> Sample:
    """Return a sample that is EOS alone, with nothing to mask or supervise."""
    return Sample(
        input_ids=np.array([vocabulary.eos], dtype=np.int64),
        segments=(Segment(0, 1, Role.BRIDGE),),
        images=(),
        text_positions=np.zeros(1, dtype=np.bool_),
        is_filler=True,
    )


def embedding_sample(
    *,
    text: str | None,
    image: Pixels | None,
    instruction: str,
    vocabulary: Vocabulary,
    settings: ViewSettings,
) -> Sample:
    """Serialise one thing to embed: picture, then instruction and text, then EOS.

    `image` is decoded RGB of any size. The exported model reproduces these ids exactly.
    """
    images = () if image is None else (settings.pictures.fit(image),)
    return _embedding(images, text or "", instruction, vocabulary=vocabulary, settings=settings)


class _Writer:
    """A sample while it is being written, part by part."""

    def __init__(self, vocabulary: Vocabulary, settings: ViewSettings) -> None:
        self._vocabulary = vocabulary
        self._settings = settings
        self._ids: list[int] = []
        self._text: list[bool] = []
        self._segments: list[Segment] = []
        self._images: list[Pixels] = []
        self._truncated = 0

    def pictures(self, images: Sequence[Pixels]) -> None:
        """Write pictures, CONTEXT: one token for each merged patch, between start and end."""
        words = self._vocabulary
        for image in images:
            count = self._settings.geometry.num_tokens(*image.shape[:2])
            ids = [words.vision_start, *[words.image_pad] * count, words.vision_end]
            self._write(ids, Role.CONTEXT, is_text=False)
            self._images.append(image)

    def text(self, text: str, role: Role = Role.CONTEXT, *, limit: int | None = None) -> int:
        """Write a text, cut to `limit` tokens (default: max_text_tokens); return its tokens.

        Raises ValueError if it has no token.
        """
        limit = self._settings.max_text_tokens if limit is None else limit
        start = text_start(text, limit)
        ids = self._vocabulary.encode(start)
        if not ids:
            raise ValueError(f"text {text[:40]!r} has no tokens, expected some text")
        self._truncated += len(ids) > limit or len(start) < len(text)
        if limit:
            self._write(ids[:limit], role, is_text=True)
        return min(len(ids), limit)

    def token(self, token: int, role: Role = Role.CONTEXT, *, is_text: bool = False) -> None:
        """Write one special token."""
        self._write([token], role, is_text=is_text)

    def bridge(self) -> None:
        """Write the tokens that an embedding is read from, BRIDGE."""
        self._write(list(self._vocabulary.bridge_ids), Role.BRIDGE, is_text=False)

    def turns(self, turns: Sequence[Turn]) -> None:
        """Write a dialogue, TARGET, cut to max_text_tokens in all; its answers are text.

        Raises ValueError if no answer is left.
        """
        settings = self._settings
        encoded = encode_turns(
            turns,
            vocabulary=self._vocabulary,
            max_tokens=settings.max_text_tokens,
            max_turns=settings.max_turns,
        )
        self._truncated += encoded.truncated
        self._write(encoded.input_ids.tolist(), Role.TARGET, is_text=False)
        self._text[-len(encoded.answers) :] = encoded.answers.tolist()

    def sample(self) -> Sample:
        """Return what was written; neighbours of one role are one segment."""
        return Sample(
            input_ids=np.array(self._ids, dtype=np.int64),
            segments=tuple(self._segments),
            images=tuple(self._images),
            text_positions=np.array(self._text, dtype=np.bool_),
            truncated=self._truncated,
        )

    def _write(self, ids: list[int], role: Role, *, is_text: bool) -> None:
        start = len(self._ids)
        if self._segments and self._segments[-1].role is role:
            start = self._segments.pop().start
        self._ids += ids
        self._text += [is_text] * len(ids)
        self._segments.append(Segment(start, len(self._ids), role))


def _caption_view(
    record: Record, *, draw: np.random.Generator, vocabulary: Vocabulary, settings: ViewSettings
) -> tuple[Sample, ...]:
    """Picture, then its text; all CONTEXT."""
    writer = _Writer(vocabulary, settings)
    writer.pictures(_need_pictures(record, draw=draw, settings=settings))
    writer.text(_caption(record, draw=draw, settings=settings))
    return (writer.sample(),)


def _bridged_view(
    record: Record, *, draw: np.random.Generator, vocabulary: Vocabulary, settings: ViewSettings
) -> tuple[Sample, ...]:
    """Context, EOS, target: CONTEXT, BRIDGE, and the TARGET that is rebuilt through it."""
    writer = _Writer(vocabulary, settings)
    use_picture = draw.random() < settings.image_share
    name, keywords = _name_and_keywords(record)
    if settings.separate_views:
        context, target = _two_texts(record, draw=draw)
        if use_picture:
            writer.pictures(_need_pictures(record, draw=draw, settings=settings))
        writer.text(context)
    elif record.target and _side_images(record.query):
        writer.pictures(_load_side(record, record.query, draw=draw, settings=settings))
        if name:
            writer.text(name)
        target = " ".join(side_texts(record.target))
    elif use_picture or not keywords:
        writer.pictures(_need_pictures(record, draw=draw, settings=settings))
        target = _caption(record, draw=draw, settings=settings)
    else:
        listed = ", ".join(keywords)
        context, target = (name, listed) if draw.random() < 0.5 else (listed, name)
        writer.text(context)
    writer.bridge()
    writer.text(target, Role.TARGET)
    return (writer.sample(),)


def _language_view(
    record: Record, *, draw: np.random.Generator, vocabulary: Vocabulary, settings: ViewSettings
) -> tuple[Sample, ...]:
    """Picture or BOS, then text and EOS, both to be predicted; all CONTEXT."""
    writer = _Writer(vocabulary, settings)
    if draw.random() < settings.image_share:
        writer.pictures(_need_pictures(record, draw=draw, settings=settings))
    else:
        writer.token(vocabulary.bos)
    writer.text(_caption(record, draw=draw, settings=settings))
    writer.token(vocabulary.eos, is_text=True)
    return (writer.sample(),)


def _pair_view(
    record: Record, *, draw: np.random.Generator, vocabulary: Vocabulary, settings: ViewSettings
) -> tuple[Sample, ...]:
    """Query, one positive and its hard negatives; each ends on EOS, whose embedding is read.

    Negatives that the record lacks are fillers.
    """
    sides = record.positives or tuple(side for side in (record.target,) if side)
    if not sides:
        raise ValueError("the record has no positive, expected at least one for a pair")
    number = int(draw.integers(len(sides)))
    target = sides[number]
    query_text, keywords = _name_and_keywords(record)
    if keywords and not _side_images(record.query):
        query_text = _caption(record, draw=draw, settings=settings)
    made = []
    for side, text, instruction in (
        (record.query, query_text, settings.instruction),
        (target, " ".join(side_texts(target)), ""),
    ):
        images = _load_side(record, side, draw=draw, settings=settings)
        made.append(_embedding(images, text, instruction, vocabulary=vocabulary, settings=settings))
    if settings.negatives or number:
        label = target_label(record, number, scored=settings.scored)
        made[1] = replace(made[1], label=label)
    if settings.negatives:
        made += _negatives(record, draw=draw, vocabulary=vocabulary, settings=settings)
    return tuple(made)


def _negatives(
    record: Record, *, draw: np.random.Generator, vocabulary: Vocabulary, settings: ViewSettings
) -> list[Sample]:
    """Return as many samples as a pair has hard negatives, written like targets."""
    chosen = chosen_negatives(
        record,
        count=settings.negatives,
        choice=settings.negatives_choice,
        draw=draw,
        scored=settings.scored,
    )
    made = []
    for negative in chosen:
        images = _load_side(record, negative.side, draw=draw, settings=settings)
        text = " ".join(side_texts(negative.side))
        sample = _embedding(images, text, "", vocabulary=vocabulary, settings=settings)
        made.append(replace(sample, label=negative.label))
    return made + [filler_sample(vocabulary)] * (settings.negatives - len(made))


def _interleaved_view(
    record: Record, *, draw: np.random.Generator, vocabulary: Vocabulary, settings: ViewSettings
) -> tuple[Sample, ...]:
    """Texts and pictures in the order of the document, all CONTEXT; its texts share one limit.

    A record whose pictures are its positives is a picture with a caption, or a caption alone.
    """
    writer = _Writer(vocabulary, settings)
    in_positives = any(_side_images(side) for side in record.positives)
    if in_positives and not _side_images(record.query):
        if draw.random() < settings.image_share:
            writer.pictures(_need_pictures(record, draw=draw, settings=settings))
        writer.text(_caption(record, draw=draw, settings=settings))
        return (writer.sample(),)
    pictures = iter(_load_side(record, record.query, draw=draw, settings=settings))
    left = settings.max_text_tokens
    for part in (*record.query, *(part for part in record.target if part.kind == "text")):
        if part.kind == "image":
            writer.pictures([next(pictures)])
        else:
            left -= writer.text(part.text, limit=left)
    return (writer.sample(),)


def _dialogue_view(
    record: Record, *, draw: np.random.Generator, vocabulary: Vocabulary, settings: ViewSettings
) -> tuple[Sample, ...]:
    """Pictures and text of the query, then the bridge, then its turns: only answers are asked."""
    writer = _Writer(vocabulary, settings)
    turns = recorded_turns(record)
    writer.pictures(_load_side(record, record.query, draw=draw, settings=settings))
    texts = side_texts(record.query)
    if texts:
        writer.text(" ".join(texts))
    writer.bridge()
    writer.turns(turns)
    return (writer.sample(),)


def _questions_view(
    record: Record, *, draw: np.random.Generator, vocabulary: Vocabulary, settings: ViewSettings
) -> tuple[Sample, ...]:
    """Picture, bridge, then questions about the record's own name, keywords or caption."""
    writer = _Writer(vocabulary, settings)
    name, keywords = _name_and_keywords(record)
    if settings.keywords == "none":
        keywords = []
    elif settings.keywords == "sample" and keywords:
        count = int(draw.integers(1, len(keywords) + 1))
        keywords = [keywords[i] for i in draw.permutation(len(keywords))[:count]]
    writer.pictures(_need_pictures(record, draw=draw, settings=settings))
    writer.bridge()
    writer.turns(
        made_up_turns(
            name=name,
            listed=", ".join(keywords),
            caption=_caption(record, draw=draw, settings=settings),
            listed_first=bool(draw.random() < 0.5),
        )
    )
    return (writer.sample(),)


VIEWS: Mapping[str, View] = {
    "caption": _caption_view,
    "bridged": _bridged_view,
    "language": _language_view,
    "pair": _pair_view,
    "interleaved": _interleaved_view,
    "dialogue": _dialogue_view,
    "questions": _questions_view,
}


def _embedding(
    images: Sequence[Pixels],
    text: str,
    instruction: str,
    *,
    vocabulary: Vocabulary,
    settings: ViewSettings,
) -> Sample:
    joined = f"{instruction} {text}" if instruction and text else instruction or text
    writer = _Writer(vocabulary, settings)
    writer.pictures(images)
    if joined or not images:
        writer.text(joined)
    writer.bridge()
    return writer.sample()


def _name_and_keywords(record: Record) -> tuple[str, list[str]]:
    """Return the text of the query, and the keywords in the record's meta that are not it."""
    name = " ".join(side_texts(record.query))
    keywords = record.meta.get("keywords") or []
    if not isinstance(keywords, list) or not all(isinstance(word, str) for word in keywords):
        raise ValueError(f"meta.keywords is {keywords!r}, expected a list of texts")
    return name, [word for word in keywords if word and word != name]


def _caption(record: Record, *, draw: np.random.Generator, settings: ViewSettings) -> str:
    """Return one way to describe the record: name, name and keywords, or keywords."""
    name, keywords = _name_and_keywords(record)
    if not keywords:
        target = " ".join(side_texts(record.target))
        return target if name in target else f"{name} {target}".strip()
    if settings.keywords == "none":
        return name
    if settings.keywords == "all":
        return f"{name}: {', '.join(keywords)}" if name else ", ".join(keywords)
    if name and draw.random() < _NAME_ALONE_SHARE:
        return name
    count = int(draw.integers(1, len(keywords) + 1))
    listed = ", ".join(keywords[i] for i in draw.permutation(len(keywords))[:count])
    return f"{name}: {listed}" if name and draw.random() < _WITH_NAME_SHARE else listed


def record_texts(record: Record) -> list[str]:
    """Return what different texts a record has: its captions, or its name and what is beside it.

    Raises ValueError for captions or keywords in its meta that are no texts.
    """
    captions = record.meta.get("captions") or []
    if not isinstance(captions, list) or not all(isinstance(text, str) for text in captions):
        raise ValueError(f"meta.captions is {captions!r}, expected a list of texts")
    if len(captions) > 1:
        return captions
    name, keywords = _name_and_keywords(record)
    beside = ", ".join(keywords) or " ".join(side_texts(record.target))
    return list(dict.fromkeys(text for text in (name, beside) if text))


def _two_texts(record: Record, *, draw: np.random.Generator) -> tuple[str, str]:
    texts = record_texts(record)
    if len(texts) < 2:
        raise ValueError("the record has no second text, expected two for data.separate_views")
    first, second = draw.permutation(len(texts))[:2].tolist()
    return texts[first], texts[second]


def _side_images(side: Side) -> list[int]:
    return [part.image for part in side if part.kind == "image"]


def _need_pictures(
    record: Record, *, draw: np.random.Generator, settings: ViewSettings
) -> list[Pixels]:
    """Return the query's pictures, or those of one positive that has any, drawn at random."""
    sides = [side for side in (record.query, *record.positives) if _side_images(side)]
    if not sides:
        raise ValueError("the record has no picture, expected one in its query or a positive")
    in_query = sides[0] is record.query
    side = sides[0 if in_query else int(draw.integers(len(sides)))]
    return _load_side(record, side, draw=draw, settings=settings)


def _load_side(
    record: Record, side: Side, *, draw: np.random.Generator, settings: ViewSettings
) -> list[Pixels]:
    loaded = [settings.pictures.load(record.images[index]) for index in _side_images(side)]
    if settings.augment:
        return [augment(image, draw=draw, config=settings.image) for image in loaded]
    return loaded


def augment(image: Pixels, *, draw: np.random.Generator, config: ImageConfig) -> Pixels:
    """Shift by up to a share of each side, filled with white, and darken every second picture."""
    height, width = image.shape[:2]
    most_y, most_x = int(config.augment_shift * height), int(config.augment_shift * width)
    if most_y or most_x:
        dy = int(draw.integers(-most_y, most_y + 1))
        dx = int(draw.integers(-most_x, most_x + 1))
        moved = np.full_like(image, _WHITE)
        moved[max(dy, 0) : height + min(dy, 0), max(dx, 0) : width + min(dx, 0)] = image[
            max(-dy, 0) : height + min(-dy, 0), max(-dx, 0) : width + min(-dx, 0)
        ]
        image = moved
    if config.augment_brightness and draw.random() < 0.5:
        factor = np.float32(draw.uniform(1.0 - config.augment_brightness, 1.0))
        image = (image * factor).astype(np.uint8)
    return image
