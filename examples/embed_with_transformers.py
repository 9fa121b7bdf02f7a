#!/usr/bin/env python3
"""Embed texts and pictures with an exported folder, in transformers alone.

pip install torch transformers pillow
python examples/embed_with_transformers.py FOLDER picture.png --text "an octopus" "a boat"

For folders that pool the last token; the README.md of a folder has the lines for any other.
"""

import argparse

import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", help="exported model")
parser.add_argument("picture", nargs="+", help="picture files")
parser.add_argument("--text", nargs="+", required=True, help="what to look for")
options = parser.parse_args()
processor = AutoProcessor.from_pretrained(options.folder)
model = AutoModel.from_pretrained(options.folder).eval()


def embed(parts: list[dict]) -> torch.Tensor:
    """Return unit vectors (N, D) of parts such as {"type": "text", "text": ...}."""
    batch = processor.apply_chat_template(
        [[{"role": "user", "content": [part]}] for part in parts],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "truncation": True},
    )
    with torch.no_grad():
        hidden = model(**batch, use_cache=False).last_hidden_state
    last = hidden[torch.arange(len(parts)), batch["attention_mask"].sum(1) - 1]
    return torch.nn.functional.normalize(last, dim=-1)


texts = embed([{"type": "text", "text": text} for text in options.text])
pictures = embed([{"type": "image", "image": Image.open(path)} for path in options.picture])
for text, cosines in zip(options.text, (texts @ pictures.T).tolist(), strict=True):
    for path, cosine in sorted(zip(options.picture, cosines, strict=True), key=lambda x: -x[1]):
        print(f"{cosine:.4f}  {text}  {path}")
