#!/usr/bin/env python3
"""Embed texts and pictures with an exported folder, in plain sentence-transformers.

pip install sentence-transformers pillow
python examples/embed_with_sentence_transformers.py FOLDER picture.png --text "an octopus" "a boat"
"""

import argparse

from PIL import Image
from sentence_transformers import SentenceTransformer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", help="exported model")
parser.add_argument("picture", nargs="+", help="picture files")
parser.add_argument("--text", nargs="+", required=True, help="what to look for")
parser.add_argument("--instruction", help="such as: Find the picture of this text:")
options = parser.parse_args()

model = SentenceTransformer(options.folder)
texts = model.encode([{"text": text} for text in options.text], prompt=options.instruction)
pictures = model.encode([{"image": Image.open(path)} for path in options.picture])
for text, cosines in zip(options.text, model.similarity(texts, pictures).tolist(), strict=True):
    for path, cosine in sorted(zip(options.picture, cosines, strict=True), key=lambda x: -x[1]):
        print(f"{cosine:.4f}  {text}  {path}")
