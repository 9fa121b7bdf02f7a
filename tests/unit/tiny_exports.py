"""Tiny exported models for tests: real folders, loaded by sentence-transformers as any other."""

from collections.abc import Callable
from pathlib import Path

import torch

from cocoa_dist.config import load_recipe
from cocoa_dist.data.vocabulary import bridge_tokens
from cocoa_dist.export import CardInfo, ImageSettings, export_folder
from cocoa_dist.report.arms import export_tokenizer, self_test_vectors
from cocoa_dist.train.evaluate import load_embedder

MAX_TEXT_TOKENS = 48


def tiny_export(
    destination: Path,
    *,
    change: Callable[[torch.nn.Module], None] | None = None,
    bridge: tuple[str, ...] = (),
    vectors: int = 1,
) -> Path:
    """Export the debug recipe's model before training, with random weights; `change` alters it.

    With `bridge` those tokens end every input and alone are pooled; the self-test is then wrong.
    With `vectors` above 1 an embedding is so many, for late interaction.
    """
    several = (f"model.num_bridge_tokens={vectors}", "stages.contrastive.pooling=late_interaction")
    config = load_recipe("debug", several if vectors > 1 else ())
    if vectors > 1:
        bridge = bridge_tokens(config.model)
    embedder = load_embedder(config, run_dir=None, after_stage="model")
    embedder.model.write_compression_tokens()
    if change is not None:
        with torch.no_grad():
            change(embedder.model.backbone)
    geometry = embedder.geometry
    image = config.data.image
    export_folder(
        model=embedder.model.backbone,
        tokenizer=export_tokenizer(config.model),
        destination=destination,
        image_settings=ImageSettings(
            patch_size=geometry.patch_size,
            min_pixels=image.min_pixels,
            max_pixels=image.max_pixels,
        ),
        bidirectional=True,
        pooling="compression" if bridge and vectors == 1 else embedder.stage.pooling,
        bridge=bridge,
        prompts={},
        card=CardInfo(
            name="tiny",
            base="random weights",
            stages=[],
            data="none",
            licence="apache-2.0",
            compute="none",
            scores=[],
        ),
        self_test=self_test_vectors(embedder, []),
        max_text_tokens=MAX_TEXT_TOKENS,
        verify=False,  # the tests' subject does so itself
    )
    return destination


def collapse(model: torch.nn.Module) -> None:
    """Cut what lets a token see others: the last hidden state is that of EOS, whatever is asked."""
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.zero_()
