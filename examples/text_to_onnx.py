#!/usr/bin/env python3
"""Write the text side of an exported model as ONNX: queries without torch over indexed pictures.

    pip install sentence-transformers onnx onnxscript onnxruntime
    python examples/text_to_onnx.py MODEL text.onnx

Inputs are `input_ids` and `attention_mask` (N, T), int64, as AutoTokenizer.from_pretrained(MODEL)
gives them (it appends EOS, padding on the right); `sentence_embedding` (N, D), float32, comes out.
What was written is run by onnxruntime beside the model, and removed if it differs. Pictures stay
with torch: their encoder cuts the batch by the sizes in it, which torch.onnx.export cannot trace.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

TOLERANCE = 1e-4  # of a component of a vector of length 1, float32
TEXTS = ("an octopus", "two words more than that: a longer text, with commas", "x", "")
NAMES = ("input_ids", "attention_mask")


def text_model(model: Any) -> Any:
    """Return a torch module from tokens to vectors: the language model, then what pools it."""
    import torch

    class TextModel(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = model[0].model
            self.rest = torch.nn.ModuleList(list(model)[1:])

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            found = self.encoder(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False
            )
            features = {
                "input_ids": input_ids,
                "attention_mask": attention_mask,
                "token_embeddings": found.last_hidden_state,
            }
            for module in self.rest:
                features = module(features)
            return features["sentence_embedding"]

    return TextModel().eval()


def tokens(model: Any, texts: Sequence[str]) -> dict[str, Any]:
    """Return what the model's tokenizer makes of texts, padded to one length."""
    found = model.tokenizer(list(texts), return_tensors="pt", padding=True)
    return {name: found[name] for name in NAMES}


def write(model: Any, file: Path) -> None:
    """Trace and write the text side; numbers of texts and tokens stay open."""
    import torch

    example = tokens(model, TEXTS[:3])
    sizes = {0: torch.export.Dim("texts"), 1: torch.export.Dim("tokens")}
    program = torch.onnx.export(
        text_model(model),
        kwargs=example,
        dynamo=True,
        dynamic_shapes=dict.fromkeys(NAMES, sizes),
        input_names=list(NAMES),
        output_names=["sentence_embedding"],
        verbose=False,
    )
    program.save(str(file))


def largest_difference(model: Any, file: Path) -> float:
    """Return by how much onnxruntime differs from the model: alone, together, without padding."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    found = []
    for texts in (TEXTS, TEXTS[:1], TEXTS[1:2] * 5):
        inputs = {name: value.numpy() for name, value in tokens(model, texts).items()}
        (own,) = session.run(["sentence_embedding"], inputs)
        expected = model.encode([{"text": text} for text in texts])
        found.append(float(np.abs(own - expected).max()))
    return max(found)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write, compare, and say what came out; returns the exit code (2: it cannot be had)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="an exported folder")
    parser.add_argument("out", type=Path, metavar="FILE.onnx")
    options = parser.parse_args(arguments)
    if not (options.model / "modules.json").is_file():
        print(f"error: {options.model} is no exported model: no modules.json", file=sys.stderr)
        return 2
    settings = options.model / "config_sentence_transformers.json"
    if settings.is_file() and "MultiVectorEncoder" in settings.read_text(encoding="utf-8"):
        print(
            f"error: {options.model} gives several vectors for each text, for late interaction: "
            "only models of single vectors are written",
            file=sys.stderr,
        )
        return 2
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(options.model), device="cpu", local_files_only=True)
    write(model, options.out)
    try:
        difference = largest_difference(model, options.out)
    except BaseException:  # what nobody has compared does not stay
        options.out.unlink()
        raise
    if not difference <= TOLERANCE:
        options.out.unlink()
        print(
            f"error: onnxruntime differs by {difference:.1e}, allowed are {TOLERANCE:.0e}: "
            f"{options.out} was removed",
            file=sys.stderr,
        )
        return 2
    print(f"{options.out}: differs from the model by at most {difference:.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
