"""Of every family, pooling and dtype, the folder gives the trainer's vectors for every input."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image

from cocoa_dist.config import AdapterConfig, load_recipe
from cocoa_dist.data import samples
from cocoa_dist.data.vocabulary import bridge_tokens
from cocoa_dist.export import CardInfo, export_folder
from cocoa_dist.export.selftest import LEAST_COSINE, load_encoder
from cocoa_dist.model.adapter import add_adapter, merge_adapter
from cocoa_dist.model.backbone import load_backbone
from cocoa_dist.model.embedder import EmbeddingModel
from cocoa_dist.model.families import FAMILIES
from cocoa_dist.model.heads import HeadsConfig
from cocoa_dist.report.arms import export_tokenizer, image_settings, self_test_vectors
from cocoa_dist.train.build import special_token_ids
from cocoa_dist.train.evaluate import load_embedder

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4  # float32, the promise; half precision: LEAST_COSINE
INSTRUCTION = "Find the picture of this text:"
SHORT, LONG = "a cat", "word after word, and " * 40
SIDES = {"square": (32, 32), "wide": (32, 64), "high": (64, 32), "largest": (64, 64)}
MORE = ["data.image.min_pixels=1024", "data.image.max_pixels=4096", "data.max_text_tokens=40"]
CARD = CardInfo(name="x", base="x", stages=[], data="x", licence="other", compute="x")
each_family = pytest.mark.parametrize("family", FAMILIES)


@dataclass(frozen=True)
class Input:
    """What is embedded: pictures by name, a text, an instruction."""

    pictures: tuple[str, ...] = ()
    text: str = ""
    instruction: str | None = None

    @property
    def message(self) -> list[dict]:
        content = [{"type": "image", "image": Image.fromarray(pixels(p))} for p in self.pictures]
        if self.text:
            content.append({"type": "text", "text": self.text})
        return [{"role": "user", "content": content}]

    @property
    def parts(self) -> dict:
        parts = {"text": self.text} if self.text else {}
        if self.pictures:
            parts["image"] = Image.fromarray(pixels(self.pictures[0]))
        return parts


PLAIN = (
    Input(text=SHORT),
    Input(text=LONG),
    Input(("square",)),
    Input(("wide",), SHORT),
    Input(("largest",), LONG),
    Input(("high", "wide")),
    Input(("square", "largest", "wide"), SHORT),
)
INPUTS = (*PLAIN, *(replace(one, instruction=INSTRUCTION) for one in PLAIN))


def pixels(name: str) -> np.ndarray:
    seed = list(SIDES).index(name)
    return np.random.default_rng(seed).integers(0, 256, (*SIDES[name], 3), dtype=np.uint8)


def trainer_vectors(embedder) -> np.ndarray:
    """Vectors of INPUTS as training embeds them: all in one pack."""
    packed = [
        samples._embedding(
            [pixels(name) for name in one.pictures],
            one.text,
            one.instruction or "",
            vocabulary=embedder.vocabulary,
            settings=embedder.settings,
        )
        for one in INPUTS
    ]
    return embedder._batch(packed)


def widen(model: torch.nn.Module) -> None:
    """Spread random weights, so that attention is far from uniform and a wrong mask shows."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                noise = torch.randn(parameter.shape, generator=draw)
                parameter.copy_(noise * 2.0 / parameter[0].numel() ** 0.5)


def export(embedder, config, destination, *, bidirectional=True):
    export_folder(
        model=embedder.model.backbone,
        tokenizer=export_tokenizer(config.model),
        destination=destination,
        image_settings=image_settings(config, embedder),
        bidirectional=bidirectional,
        pooling=embedder.stage.pooling,
        bridge=bridge_tokens(config.model),
        prompts={},
        card=CARD,
        self_test=self_test_vectors(embedder, []),
        max_text_tokens=config.data.max_text_tokens,
    )
    return load_encoder(destination)


def folder_vectors(encoder, *, longest: int) -> dict[str, np.ndarray]:
    """Vectors of INPUTS alone and in padded batches; texts alone are cut as training cuts them."""
    cut = {"text": {"max_length": longest}}

    def embed(group: list[Input], inputs: list) -> np.ndarray:
        more = {} if group[0].pictures else {"processing_kwargs": cut}
        return encoder.encode(inputs, prompt=group[0].instruction, **more)

    alone = [embed([one], [one.message])[0] for one in INPUTS]
    batched: dict[Input, np.ndarray] = {}
    for instruction in (None, INSTRUCTION):
        for has_pictures in (False, True):
            same = [one for one in INPUTS if one.instruction == instruction]
            group = [one for one in same if bool(one.pictures) == has_pictures]
            found = embed(group, [one.message for one in group])
            batched.update(zip(group, found, strict=True))
    # As people write it, where there is at most one picture.
    plain = {
        i: embed([one], [one.parts])[0] for i, one in enumerate(INPUTS) if len(one.pictures) < 2
    }
    assert len(plain) == 10
    return {
        "alone": np.stack(alone),
        "batch": np.stack([batched[one] for one in INPUTS]),
        "parts": np.stack([plain.get(i, alone[i]) for i in range(len(INPUTS))]),
    }


def check(embedder, encoder, *, ends: int = 1, half: bool = False) -> None:
    expected = trainer_vectors(embedder)
    longest = embedder.settings.max_text_tokens + ends
    for way, found in folder_vectors(encoder, longest=longest).items():
        if half:
            lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
            cosines = (found * expected).sum(axis=1) / lengths
            assert cosines.min() >= LEAST_COSINE, (way, cosines)
        else:
            worst = np.abs(found - expected).max(axis=1)
            assert worst.max() <= TOLERANCE, (way, worst)
    # The inputs are told apart by much more than the tolerance.
    products = expected @ expected.T - np.eye(len(expected))
    assert products.max() < 0.999


def make(recipe: str, family: str, *more: str):
    config = load_recipe(recipe, [f"model.random.family={family}", *MORE, *more])
    embedder = load_embedder(config, run_dir=None, after_stage="model")
    widen(embedder.model)
    return config, embedder


@each_family
@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_input_gets_the_trainers_vector(family, pooling, dtype, tmp_path) -> None:
    more = (f"stages.contrastive.pooling={pooling}", f"model.dtype={dtype}")
    config, embedder = make("debug", family, *more)
    encoder = export(embedder, config, tmp_path / "out")
    check(embedder, encoder, half=dtype == "bfloat16")
    assert not list((tmp_path / "out").rglob("*.py"))


@each_family
def test_causal_models_stay_causal(family, tmp_path) -> None:
    config, embedder = make("debug", family, "stages.contrastive.attention.rule=causal")
    check(embedder, export(embedder, config, tmp_path / "out", bidirectional=False))


@each_family
def test_compression_tokens_are_pooled_alone(family, tmp_path) -> None:
    config, embedder = make("debug_coma", family)
    embedder.model.write_compression_tokens()
    encoder = export(embedder, config, tmp_path / "out", bidirectional=False)
    check(embedder, encoder, ends=len(bridge_tokens(config.model)))


@each_family
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_merged_adapter_gives_what_it_gave_beside_the_weights(family, kind, tmp_path) -> None:
    config, embedder = make("debug", family)
    before = trainer_vectors(embedder)
    adapter = AdapterConfig(kind=kind, rank=4, alpha=8, targets=("q_proj", "down_proj", "qkv"))
    wrapped = EmbeddingModel(embedder.model.backbone, HeadsConfig(embeddings=True))
    wrapped.backbone = add_adapter(embedder.model.backbone, adapter)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if ".lora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)
    trained = replace(embedder, model=wrapped.eval())
    merged = merge_adapter({n: p.detach() for n, p in wrapped.named_parameters()}, adapter)
    torch.manual_seed(config.seed)
    backbone = load_backbone(
        config.model,
        token_ids=special_token_ids(config.model),
        vocabulary_size=embedder.vocabulary.size,
    )
    bare = EmbeddingModel(backbone, HeadsConfig(embeddings=True)).eval()
    bare.load_state_dict(merged, strict=False)
    encoder = export(replace(embedder, model=bare), config, tmp_path / "out")
    check(trained, encoder)
    assert np.abs(trainer_vectors(trained) - before).max() > 0.05
