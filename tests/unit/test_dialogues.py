"""Dialogues become a bridge and turns of which only the answers are asked for."""

import dataclasses

import numpy as np
import pytest
from test_samples import PICTURE, SPECIALS, emoji_record, encode, png

from cocoa_dist.config import DataConfig, ModelConfig, NextTokenConfig
from cocoa_dist.config import StageDataConfig as StageData
from cocoa_dist.data.corruption import corrupt
from cocoa_dist.data.packing import build_pack, length_bound
from cocoa_dist.data.record_source import fault_kind
from cocoa_dist.data.records import Record, image_part, text_part
from cocoa_dist.data.samples import (
    ImageGeometry,
    ViewResult,
    Vocabulary,
    draw_for,
    embedding_sample,
    view_samples,
    view_settings,
)
from cocoa_dist.data.vocabulary import learnt_tokens
from cocoa_dist.segments import Role, attention_rule
from cocoa_dist.train.build import load_vocabulary

GEOMETRY = ImageGeometry(patch_size=8)
K = 3
VOCABULARY = Vocabulary(
    **SPECIALS, size=1100, encoder=encode, learnt=range(1097, 1100), bridge=(1097, 1098, 1099)
)
BOS, EOS = SPECIALS["bos"], SPECIALS["eos"]


def dialogue_record(**changes: object) -> Record:
    fields: dict[str, object] = {
        "key": "a",
        "task": "dialogue",
        "query": (image_part(0),),
        "target": tuple(text_part(t) for t in ("what is it", "a cat", "which colour", "black")),
        "images": (png(40),),
        "meta": {"roles": ["user", "assistant", "user", "assistant"]},
    }
    return Record(**(fields | changes))  # type: ignore[arg-type]


def view(
    record: Record, *, name: str = "dialogue", max_text_tokens: int = 48, seed: int = 0, **stage
) -> ViewResult:
    data = DataConfig(max_text_tokens=max_text_tokens)
    parsed = StageData.model_validate({"sources": {"a": {"path": "x"}}, "view": name} | stage)
    return view_samples(
        name,
        record,
        draw=draw_for(seed, "s", 0, 0),
        vocabulary=VOCABULARY,
        settings=view_settings(data, geometry=GEOMETRY, stage=parsed),
    )


def turn(speaker: str, text: str) -> list[int]:
    return [BOS, *encode(f"{speaker}\n"), *encode(text), EOS]


def test_a_dialogue_is_picture_bridge_and_turns_and_asks_for_answers_alone() -> None:
    (sample,) = view(dialogue_record()).samples
    turns = [
        turn("user", "what is it"),
        turn("assistant", "a cat"),
        turn("user", "which colour"),
        turn("assistant", "black"),
    ]
    dialogue = [token for one in turns for token in one]
    assert sample.input_ids.tolist() == [*PICTURE, *VOCABULARY.bridge, *dialogue]
    assert [s.role for s in sample.segments] == [Role.CONTEXT, Role.BRIDGE, Role.TARGET]
    asked = corrupt(
        sample,
        NextTokenConfig(),
        draw=draw_for(0, "s", 0, 0),
        vocabulary=VOCABULARY,
        geometry=GEOMETRY,
    )
    assert asked.labels.tolist() == [*encode("a cat"), EOS, *encode("black"), EOS]
    assert np.array_equal(sample.input_ids[asked.label_rows + 1], asked.labels)


def test_a_dialogue_without_a_picture_begins_with_its_question() -> None:
    record = dialogue_record(
        query=(text_part("what is it"),),
        target=(text_part("a cat"),),
        images=(),
        meta={"roles": ["assistant"]},
    )
    (sample,) = view(record).samples
    words = encode("what is it")
    answer = turn("assistant", "a cat")
    assert sample.input_ids.tolist() == [*words, *VOCABULARY.bridge, *answer]
    assert sample.text_positions.tolist() == [
        *[True] * len(words),
        *[False] * (K + len(answer) - 3),
        *[True] * 3,
    ]


@pytest.mark.parametrize(
    ("changes", "reason", "kind"),
    [
        (
            {"target": (text_part("what is it"),), "meta": {"roles": ["user"]}},
            "dialogue without answers: none of its 1 turns",
            "dialogue without answers",
        ),
        ({"meta": {}}, "the record has no turns", "no part for this view"),
        ({"target": ()}, "the record has no turns", "no part for this view"),
        ({"meta": {"roles": ["user", "assistant"]}}, "does not fit a target of 4 texts", None),
        ({"meta": {"roles": ["user", "bot", "user", "bot"]}}, "does not fit a target", None),
    ],
)
def test_a_dialogue_that_cannot_be_used_is_masked_with_its_reason(changes, reason, kind) -> None:
    result = view(dialogue_record(**changes))
    assert result.reason is not None
    assert reason in result.reason
    assert result.samples[0].is_filler
    if kind:
        assert fault_kind(result.reason) == kind


@pytest.mark.parametrize("limit", [1, 5, 7])
def test_a_target_that_is_empty_after_truncation_is_masked_and_counted(limit: int) -> None:
    result = view(dialogue_record(), max_text_tokens=limit)
    assert result.reason is not None
    assert "empty after truncation" in result.reason
    assert "raise data.max_text_tokens or data.max_turns" in result.reason
    assert fault_kind(result.reason) == "target is cut away"
    assert result.samples[0].is_filler


def test_a_cut_dialogue_ends_with_an_answer_and_is_counted() -> None:
    """12 tokens hold the first question and answer; the second question alone is left out."""
    first = [*turn("user", "what is it"), *turn("assistant", "a cat")]
    for limit in range(len(first), len(first) + 5):
        (sample,) = view(dialogue_record(), max_text_tokens=limit).samples
        assert sample.input_ids.tolist() == [*PICTURE, *VOCABULARY.bridge, *first]
        assert sample.truncated == 2
    (sample,) = view(dialogue_record(), max_turns=2).samples
    assert sample.input_ids.tolist() == [*PICTURE, *VOCABULARY.bridge, *first]
    assert sample.truncated == 2
    (whole,) = view(dialogue_record()).samples
    assert whole.truncated == 0


def test_an_answer_that_is_cut_keeps_its_beginning() -> None:
    before = len(turn("user", "what is it")) + 2  # and the head of the answer
    (sample,) = view(dialogue_record(), max_text_tokens=before + 1).samples
    assert sample.input_ids[-1] == encode("a")[0]
    assert sample.text_positions.sum() == 1


def test_questions_are_about_the_records_own_name_and_keywords() -> None:
    seen = set()
    for seed in range(12):
        (sample,) = view(emoji_record(), name="questions", keywords="all", seed=seed).samples
        answers = sample.input_ids[sample.text_positions].tolist()
        seen.add(tuple(answers))
    name, words = encode("grinning face"), encode("happy, smile, teeth")
    assert seen == {(*name, EOS, *words, EOS), (*words, EOS, *name, EOS)}


def test_questions_about_a_caption_ask_what_the_picture_shows() -> None:
    record = emoji_record(meta={}, target=(text_part("a cat"),), query=(text_part("a cat"),))
    (sample,) = view(record, name="questions").samples
    assert sample.input_ids[sample.text_positions].tolist() == [*encode("a cat"), EOS]


@pytest.mark.parametrize("name", ["dialogue", "questions"])
@pytest.mark.parametrize("limit", [8, 14, 20, 48])
def test_bounds_hold_for_dialogues(name: str, limit: int) -> None:
    record = dialogue_record() if name == "dialogue" else emoji_record()
    texts = [text.text for side in (record.query, record.target) for text in side]
    counted = sum(len(encode(text)) for text in texts)
    data = DataConfig(max_text_tokens=limit)
    stage = StageData.model_validate({"sources": {"a": {"path": "x"}}, "view": name})
    for known in (record, None):
        tokens, patches = length_bound(
            name,
            num_text_tokens=counted,
            image_sizes=[(32, 32)] * len(record.images),
            record=known,
            vocabulary=VOCABULARY,
            settings=view_settings(data, geometry=GEOMETRY, stage=stage),
        )
        for seed in range(5):
            (sample,) = view(record, name=name, max_text_tokens=limit, seed=seed).samples
            assert len(sample.input_ids) <= tokens
            assert sum(np.prod(GEOMETRY.grid(image)) for image in sample.images) <= patches


def test_an_embedding_ends_on_the_bridge_and_is_pooled_from_it() -> None:
    settings = view_settings(DataConfig(), geometry=GEOMETRY)
    one, two = (
        embedding_sample(
            text=text, image=None, instruction="", vocabulary=VOCABULARY, settings=settings
        )
        for text in ("a cat", "dog")
    )
    assert one.input_ids.tolist() == [*encode("a cat"), *VOCABULARY.bridge]
    from cocoa_dist.data.corruption import uncorrupted
    from cocoa_dist.data.packing import EmbeddingInfo

    pack = build_pack(
        [uncorrupted(sample, geometry=GEOMETRY) for sample in (one, two)],
        rule=attention_rule("compression"),
        geometry=GEOMETRY,
        vocabulary=VOCABULARY,
        embeddings=[EmbeddingInfo(0, 0, 0), EmbeddingInfo(0, 1, 0)],
        pooling="compression",
    )
    assert pack.pool_rows.tolist() == [2, 3, 4, 6, 7, 8]
    assert pack.pool_index.tolist() == [0, 0, 0, 1, 1, 1]
    assert pack.bridge_rows.tolist() == [[2, 3, 4], [6, 7, 8]]


def test_learnt_tokens_come_behind_the_vocabulary_and_the_mask() -> None:
    def load(**changes: object) -> Vocabulary:
        fields = {"path": "asset:quickstart_backbone", "new_tokens": ("<a>",)} | changes
        return load_vocabulary(ModelConfig(**fields))

    plain, few, bridged = load(), load(compression_tokens=4), load(num_bridge_tokens=4)
    assert few.learnt == range(plain.size, plain.size + 4)
    assert few.new == plain.new
    assert few.bridge_ids == tuple(few.learnt)
    assert bridged.bridge_ids == (bridged.eos, *range(plain.size, plain.size + 3))
    assert plain.bridge_ids == (plain.eos,)
    config = ModelConfig(path="x", compression_tokens=2)
    assert learnt_tokens(config) == ("<|compress_0|>", "<|compress_1|>")
    same = dataclasses.replace(few, learnt=range(0), bridge=(), size=plain.size)
    assert same == plain
