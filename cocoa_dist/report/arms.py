"""The arms of a report: what each model scores on the held-out sets, and its exported folder.

Held-out sets are read and decoded once and embedded by each model in turn.
"""

import importlib.util
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cocoa_dist.config import ModelConfig, RunConfig
from cocoa_dist.data.images import Pixels
from cocoa_dist.data.records import Record
from cocoa_dist.data.vocabulary import bridge_tokens, learnt_tokens
from cocoa_dist.export import (
    CardInfo,
    ImageSettings,
    SelfTestVector,
    StageInfo,
    check_self_test,
    export_folder,
)
from cocoa_dist.export.selftest import steady_picture
from cocoa_dist.inputs import tokenizer_folder
from cocoa_dist.manifest import Manifest
from cocoa_dist.report.facts import RunFacts
from cocoa_dist.train.build import load_vocabulary
from cocoa_dist.train.evaluate import (
    Embedder,
    Item,
    Vectors,
    read_records,
    record_sides,
    retrieval_scores,
)

log = logging.getLogger("cocoa_dist.report")

_SELF_TEST_INSTRUCTION = "Find the picture of this text:"
_TWO_WAY_RULES = ("bidirectional", "eos_bridged")  # for a sample without TARGET they are the same


@dataclass(frozen=True)
class HeldOut:
    """One held-out set, decoded: item i of `texts` belongs to item i of `images`."""

    name: str
    records: tuple[Record, ...]
    texts: tuple[Item, ...]
    images: tuple[Item, ...]


@dataclass(frozen=True)
class SetVectors:
    """The two sides of one held-out set as one model embeds them: unit vectors (N, D).

    (N, K, D) of a model whose embeddings are several vectors.
    """

    text_ND: Vectors
    image_ND: Vectors


@dataclass(frozen=True)
class Arm:
    """One model of the comparison."""

    name: str
    train_cpu_seconds: float  # of all its stages; the backbone's own training is not counted
    vectors: Mapping[str, SetVectors]  # by held-out set

    def scores(self) -> dict[str, object]:
        """Return the arm's part of retrieval.json; shares in per cent."""
        return {
            "train_cpu_seconds": self.train_cpu_seconds,
            "splits": {
                name: retrieval_scores(found.text_ND, found.image_ND)
                for name, found in self.vectors.items()
            },
        }


@dataclass(frozen=True)
class Exported:
    """An exported folder; `difference` is the self-test's largest, None if it was not run."""

    path: Path
    difference: float | None


def read_held_out(config: RunConfig, embedder: Embedder) -> list[HeldOut]:
    """Read and decode every held-out set of a recipe."""
    sets = []
    for name, source in config.evaluation.sets.items():
        records = read_records(source)
        sides = [record_sides(record, embedder) for record in records]
        sets.append(
            HeldOut(
                name=name,
                records=tuple(records),
                texts=tuple(text for text, _ in sides),
                images=tuple(image for _, image in sides),
            )
        )
    return sets


def embed_sets(sets: Sequence[HeldOut], embedder: Embedder) -> dict[str, SetVectors]:
    """Embed both sides of every set."""
    return {
        one.name: SetVectors(text_ND=embedder.embed(one.texts), image_ND=embedder.embed(one.images))
        for one in sets
    }


def export_arm(
    run: RunFacts,
    embedder: Embedder,
    *,
    destination: Path,
    sets: Sequence[HeldOut],
    scores: Sequence[Mapping[str, str | float]],
) -> Exported:
    """Export an arm's final model, replacing an earlier export, and check its self-test.

    Raises ValueError if the exported folder does not give the vectors of training.
    """
    checked = importlib.util.find_spec("sentence_transformers") is not None
    if not checked:
        log.warning("sentence-transformers is not installed: %s is not checked", destination)
    config = run.config
    embedder.model.write_compression_tokens()
    staging = destination.with_name(f".{destination.name}.new")
    shutil.rmtree(staging, ignore_errors=True)
    export_folder(
        model=embedder.model.backbone,
        tokenizer=export_tokenizer(config.model),
        destination=staging,
        image_settings=image_settings(config, embedder),
        bidirectional=is_two_way(embedder),
        pooling=embedder.stage.pooling,
        prompts=config.export.prompts,
        card=card_info(run, scores=scores),
        self_test=self_test_vectors(embedder, sets),
        max_text_tokens=config.data.max_text_tokens,
        bridge=bridge_tokens(config.model),
        verify=False,  # below, where it also gives the number to report
    )
    difference = None
    if checked:
        found = check_self_test(staging)
        if not found.passed:
            raise ValueError(f"the export of {run.run_dir} is not its model: {found.describe()}")
        difference = found.max_difference
    shutil.rmtree(destination, ignore_errors=True)
    staging.rename(destination)
    return Exported(path=destination, difference=difference)


def export_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the recipe's tokenizer with the tokens that training has added, EOS as in training.

    Raises ValueError if EOS does not get the id that it was trained with.
    """
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder(config))
    known = tokenizer.get_vocab()
    wanted = (config.mask_token, *config.new_tokens, *learnt_tokens(config))
    added = [token for token in wanted if token not in known]
    tokenizer.add_tokens(added, special_tokens=True)
    tokenizer.eos_token = config.bridge_token
    found, trained = tokenizer.eos_token_id, load_vocabulary(config).eos
    if found != trained:
        raise ValueError(
            f"{config.bridge_token} has the id {found} in {tokenizer.name_or_path}, training had "
            f"{trained}: its tokenizer_config.json and tokenizer.json list other tokens"
        )
    loaded: PreTrainedTokenizerBase = tokenizer
    return loaded


def self_test_vectors(embedder: Embedder, sets: Sequence[HeldOut]) -> list[SelfTestVector]:
    """Embed a few held-out items of every kind: text, picture, both, with instruction."""
    texts: list[str | None] = [item.text for one in sets for item in one.texts[:2]]
    images = [item.image for one in sets for item in one.images[:2]]
    if not texts:
        texts, images = ["a small test", "two words"], [None, None]
    images = [image if image is None else _steady(image, embedder) for image in images]
    first, last, picture = texts[0], texts[-1], images[0]
    items = [
        Item(text=first),
        Item(text=last),
        Item(text=last, instruction=_SELF_TEST_INSTRUCTION),
    ]
    if picture is not None:
        items += [
            Item(image=picture),
            Item(image=images[-1]),
            Item(text=first, image=picture),
            Item(text=first, image=picture, instruction=_SELF_TEST_INSTRUCTION),
        ]
    return [
        SelfTestVector(
            text=item.text,
            image=None if item.image is None else Image.fromarray(np.asarray(item.image)),
            instruction=item.instruction or None,
            vector=vector,
        )
        for item, vector in zip(items, embedder.embed(items), strict=True)
    ]


def _steady(image: Pixels, embedder: Embedder) -> Pixels:
    """Resize a picture to one that training and the exported folder take as it is."""
    limits = embedder.settings.image
    settings = ImageSettings(
        patch_size=embedder.geometry.patch_size,
        min_pixels=limits.min_pixels,
        max_pixels=limits.max_pixels,
        merge_size=embedder.geometry.merge,
    )
    return np.asarray(steady_picture(Image.fromarray(np.asarray(image)), settings))


def card_info(run: RunFacts, *, scores: Sequence[Mapping[str, str | float]]) -> CardInfo:
    """Return what the model card says of a run."""
    config = run.config
    sources = dict.fromkeys(
        source.path for stage in config.stages.values() for source in stage.data.blend.values()
    )
    return CardInfo(
        name=config.name,
        base=config.model.path or "random weights",
        stages=[
            StageInfo(
                name=stage.name,
                steps=stage.manifest.step,
                note=f"{config.stages[stage.name].attention.rule} attention, "
                f"{stage.manifest.samples} samples, {stage.manifest.tokens} tokens"
                f"{_best_note(stage.manifest)}{_how_far(stage.manifest)}",
            )
            for stage in run.stages
        ],
        data=", ".join(sources),
        licence=config.export.licence or "other",
        compute=f"{run.train_cpu_seconds:.0f} s of CPU time inside training steps",
        scores=scores,
        warnings=_unfinished(run),
    )


def _best_note(manifest: Manifest) -> str:
    """Say that a checkpoint was chosen, and by what; nothing of a stage's end."""
    best = manifest.best
    if manifest.complete or best is None:
        return ""
    return f"; of {manifest.target_step} steps the best by {best.measure}, {best.value:.4g}"


def _how_far(manifest: Manifest) -> str:
    if manifest.complete or manifest.best is not None:
        return ""
    return f", **unfinished**: {manifest.step} of {manifest.target_step} steps"


def _unfinished(run: RunFacts) -> list[str]:
    """Return what a card has to say first of a model whose training has not come to its end."""
    last, names = run.stages[-1], list(run.config.stages)
    missing = names[1 + names.index(last.name) :]
    found = []
    if _how_far(last.manifest):
        found.append(
            f"Stage `{last.name}` is not finished: this is a checkpoint at step "
            f"{last.manifest.step} of {last.manifest.target_step}."
        )
    if missing:
        found.append(f"Not trained in: {', '.join(f'`{name}`' for name in missing)}.")
    return found


def is_two_way(embedder: Embedder) -> bool:
    """Say whether the tokens of an input see what stands behind them."""
    return embedder.stage.attention.rule in _TWO_WAY_RULES


def image_settings(config: RunConfig, embedder: Embedder) -> ImageSettings:
    """Return how training makes patches of pictures, for an export."""
    return ImageSettings(
        patch_size=embedder.geometry.patch_size,
        min_pixels=config.data.image.min_pixels,
        max_pixels=config.data.image.max_pixels,
        merge_size=embedder.geometry.merge,
        temporal_patch_size=embedder.geometry.temporal,
        mean=embedder.geometry.mean,
        std=embedder.geometry.std,
    )
