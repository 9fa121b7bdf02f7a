"""Writes the exported folder: weights, configs, tokenizer, self-test and model card.

Everything is written and verified in a staging folder beside the destination, then renamed: a
folder under the final name is whole and gives the vectors of training.
"""

import copy
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cocoa_dist.distributed import raise_together, rank
from cocoa_dist.export import templates
from cocoa_dist.export.card import CardFacts, CardInfo, model_card
from cocoa_dist.export.layers import LayerWeights, ModelWeights
from cocoa_dist.export.selftest import (
    DEFAULT_TOLERANCE,
    SelfTestVector,
    compare,
    load_encoder,
    resize_difference,
    write_self_test,
)
from cocoa_dist.export.templates import ImageSettings, Pooling
from cocoa_dist.export.weights import DEFAULT_FILE_BYTES, write_weights

SUPPORTED_MODELS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def export_folder(
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    destination: Path,
    image_settings: ImageSettings,
    bidirectional: bool,
    pooling: Pooling,
    prompts: Mapping[str, str],
    card: CardInfo,
    self_test: Sequence[SelfTestVector],
    max_text_tokens: int | None = None,
    bridge: Sequence[str] = (),
    weights: LayerWeights | None = None,
    max_file_bytes: int = DEFAULT_FILE_BYTES,
    verify: bool = True,
) -> None:
    """Write a folder that SentenceTransformer(destination) and transformers load as they are.

    With pooling late_interaction it is a folder of MultiVectorEncoder(destination).

    model is the trained ...ForConditionalGeneration of a family of ours, adapters merged; it and
    the tokenizer are not changed. Its weights may be cut up by ZeRO-3, or be none at all and come
    from `weights`: one layer at a time is in memory whole. prompts are named instructions without
    a space at the end. max_text_tokens is training's limit for instruction + text (None: the
    model's own length). bridge names the tokens that end every input, rows of the model's
    embedding (none: EOS alone). No file of weights has more than max_file_bytes, or one layer.
    With verify the staged folder is loaded once more, one layer at a time, and must give the
    self-test's vectors before it gets its name.

    Collective where the weights are: call on all ranks; rank 0 writes. Raises ValueError (on all
    ranks) if destination exists, an argument does not fit the model, or the self-test fails; then
    nothing is left at destination.
    """
    destination = Path(destination)
    raise_together(lambda: _refuse_existing(destination))
    _check_model(model, image_settings)
    ending = _ending(tokenizer, bridge)
    _check_tokenizer(tokenizer, model, ending)
    _check_arguments(pooling, bridge, max_text_tokens, self_test)
    facts = CardFacts(
        model_type=model.config.model_type,
        width=model.config.get_text_config().hidden_size,
        bidirectional=bidirectional,
        pooling=pooling,
        image_settings=image_settings,
        prompts=prompts,
        max_text_tokens=max_text_tokens,
        bridge=tuple(bridge) or ("EOS",),
        resize_difference=None,
    )

    def finish(staging: Path) -> None:
        """Write all but the weights, and look whether it is the trained model."""
        _write_config(model, staging, bidirectional=bidirectional)
        length = _max_length(model, image_settings, max_text_tokens, ends=len(ending))
        _write_tokenizer(tokenizer, staging, max_length=length, ending=ending)
        _write_sentence_transformers(staging, facts)
        if pooling == "compression":
            counted = templates.token_weights_config(tokenizer.get_vocab(), ending)
            _write_module(staging / templates.WEIGHTS_FOLDER, counted)
        if pooling == "late_interaction":
            mask = templates.mask_config(tokenizer.get_vocab(), ending)
            _write_module(staging / templates.MASK_FOLDER, mask)
        _write_json(staging / "processor_config.json", templates.processor_config(image_settings))
        write_self_test(staging, self_test, image_settings)
        difference = _verify(staging, self_test, image_settings) if verify else None
        readme = model_card(card, replace(facts, resize_difference=difference))
        (staging / "README.md").write_text(readme, encoding="utf-8")

    with _staged(destination) as staging:
        write_weights(
            model,
            weights or ModelWeights(),
            staging,
            dtype=model_dtype(model),
            max_file_bytes=max_file_bytes,
        )
        raise_together(lambda: finish(staging) if rank() == 0 else None)


def model_dtype(model: PreTrainedModel) -> torch.dtype:
    """Return the dtype of a model's weights, which is that of the folder."""
    dtype: torch.dtype = next(model.parameters()).dtype
    return dtype


def _refuse_existing(destination: Path) -> None:
    if rank() == 0 and destination.exists():
        raise ValueError(f"{destination} already exists: remove it or choose another destination")


@contextmanager
def _staged(destination: Path) -> Iterator[Path]:
    """Give a folder beside `destination` that gets its name if all goes well, else is removed.

    Collective: call on all ranks. The folder is rank 0's.
    """
    staging = destination.parent / f".{destination.name}.{uuid.uuid4().hex[:8]}.staging"
    writes = rank() == 0
    try:
        raise_together(lambda: staging.mkdir(parents=True) if writes else None)
        yield staging
        raise_together(lambda: _give_name(staging, destination) if writes else None)
    except BaseException:
        if writes:
            shutil.rmtree(staging, ignore_errors=True)
        raise


def _check_model(model: PreTrainedModel, settings: ImageSettings) -> None:
    config = model.config
    if config.model_type not in SUPPORTED_MODELS:
        raise ValueError(f"model is a {config.model_type!r}, expected one of {SUPPORTED_MODELS}")
    if getattr(model, "peft_config", None):
        raise ValueError("model carries adapters: merge them (merge_and_unload) before the export")
    vision = config.vision_config
    found = (settings.patch_size, settings.merge_size, settings.temporal_patch_size)
    expected = (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
    if found != expected:
        raise ValueError(
            f"image_settings: patch, merge and temporal patch size are {found}, "
            f"the model's vision_config has {expected}"
        )


def _check_arguments(
    pooling: Pooling,
    bridge: Sequence[str],
    max_text_tokens: int | None,
    self_test: Sequence[SelfTestVector],
) -> None:
    if pooling not in templates.POOLINGS:
        raise ValueError(f"pooling is {pooling!r}, expected one of {list(templates.POOLINGS)}")
    if pooling in ("compression", "late_interaction") and not bridge:
        raise ValueError(f"pooling is {pooling} and bridge is empty: name the compression tokens")
    if max_text_tokens is not None and max_text_tokens < 1:
        raise ValueError(f"max_text_tokens is {max_text_tokens}, expected at least 1 or None")
    if not self_test:
        raise ValueError("self_test is empty: give at least one input with its vector")


def _check_tokenizer(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, ending: Mapping[str, int]
) -> None:
    """Refuse a tokenizer whose ids are not the ones the model acts on."""
    expected = {
        templates.IMAGE_TOKEN: model.config.image_token_id,
        templates.VISION_START_TOKEN: model.config.vision_start_token_id,
        templates.VISION_END_TOKEN: model.config.vision_end_token_id,
    }
    vocabulary = tokenizer.get_vocab()
    for token, token_id in expected.items():
        if vocabulary.get(token) != token_id:
            raise ValueError(
                f"tokenizer gives {token} the id {vocabulary.get(token)}, "
                f"the model's config has {token_id}: this is not the model's tokenizer"
            )
    if tokenizer.pad_token_id is None:
        raise ValueError("tokenizer has no pad_token: set one, batches are padded with it")
    plain = tokenizer("a", add_special_tokens=False).input_ids
    added = tokenizer("a").input_ids
    if added not in (plain, [*plain, tokenizer.eos_token_id], [*plain, *ending.values()]):
        raise ValueError(
            f"tokenizer turns 'a' into {added}, expected {plain}, with or without EOS behind: "
            "remove what its post-processor adds, training did not have it"
        )
    rows = int(model.config.get_text_config().vocab_size)
    if max(vocabulary.values()) >= rows:
        raise ValueError(
            f"tokenizer has ids up to {max(vocabulary.values())}, "
            f"the model embeds only {rows} tokens: this is not the model's tokenizer"
        )


def _ending(tokenizer: PreTrainedTokenizerBase, bridge: Sequence[str]) -> dict[str, int]:
    """Return the tokens that end every input, in order, with their ids."""
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in bridge if token not in vocabulary]
    if missing:
        raise ValueError(
            f"bridge: the tokenizer has no token {', '.join(missing)}; add them before the export"
        )
    if not bridge and tokenizer.eos_token_id is None:
        raise ValueError("tokenizer has no eos_token: set the one that ended each training text")
    if not bridge:
        return {str(tokenizer.eos_token): int(tokenizer.eos_token_id)}
    return {token: vocabulary[token] for token in bridge}


def _write_config(model: PreTrainedModel, staging: Path, *, bidirectional: bool) -> None:
    """Write config.json. Only text_config.is_causal counts: the top level is ignored."""
    config = copy.deepcopy(model.config)
    config.dtype = str(model_dtype(model)).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    config.save_pretrained(staging)
    path = staging / "config.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    saved.pop("is_causal", None)
    saved["text_config"]["is_causal"] = not bidirectional
    saved["text_config"]["use_cache"] = False
    _write_json(path, saved)


def _max_length(
    model: PreTrainedModel, settings: ImageSettings, max_text_tokens: int | None, *, ends: int
) -> int:
    """Tokens of the longest input: visual tokens and their two borders, text, what ends it."""
    longest = int(model.config.get_text_config().max_position_embeddings)
    if max_text_tokens is None:
        return longest
    return min(longest, settings.max_tokens + 2 + max_text_tokens + ends)


def _write_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
    staging: Path,
    *,
    max_length: int,
    ending: Mapping[str, int],
) -> None:
    tokenizer.save_pretrained(staging)
    path = staging / "tokenizer.json"
    if not path.is_file():
        raise ValueError(
            f"{type(tokenizer).__name__} saved no tokenizer.json: give a fast tokenizer "
            "(of the tokenizers library), the export needs its post-processor"
        )
    before = json.loads(path.read_text(encoding="utf-8"))
    after = templates.append_bridge(before, ending)
    path.write_text(json.dumps(after, ensure_ascii=False), encoding="utf-8")
    path = staging / "tokenizer_config.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    _write_json(path, templates.tokenizer_config(saved, max_length=max_length))
    (staging / "chat_template.jinja").write_text(templates.CHAT_TEMPLATE, encoding="utf-8")


def _write_sentence_transformers(staging: Path, facts: CardFacts) -> None:
    pooling = facts.pooling
    _write_json(staging / "modules.json", templates.modules_config(pooling))
    _write_json(staging / "sentence_bert_config.json", templates.transformer_config())
    _write_json(
        staging / "config_sentence_transformers.json",
        templates.sentence_transformers_config(facts.prompts, pooling=pooling),
    )
    if pooling in templates.POOLING_MODES:
        _write_module(staging / "1_Pooling", templates.pooling_config(pooling, width=facts.width))
    _write_module(staging / "2_Normalize", templates.normalize_config(pooling))


def _write_module(folder: Path, config: Mapping[str, Any]) -> None:
    folder.mkdir()
    _write_json(folder / "config.json", config)


def _verify(
    staging: Path, self_test: Sequence[SelfTestVector], settings: ImageSettings
) -> float | None:
    """Load what was written; ValueError unless it gives the vectors. Returns resize_difference."""
    encoder = load_encoder(staging, layer_by_layer=True)
    report = compare(encoder, staging, tolerance=DEFAULT_TOLERANCE)
    if not report.passed:
        raise ValueError(
            f"the exported model is not the trained one: {report.describe()}. Compare "
            "bidirectional, pooling, image_settings and the EOS token with training's; "
            "nothing was written"
        )
    return resize_difference(encoder, self_test, settings)


def _write_json(path: Path, value: Mapping[str, Any] | Sequence[Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _give_name(staging: Path, destination: Path) -> None:
    _make_durable(staging)
    staging.rename(destination)


def _make_durable(folder: Path) -> None:
    """Sync every file and folder below, so that the rename never shows a half-written model."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
