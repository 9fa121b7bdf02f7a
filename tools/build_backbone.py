"""Rebuild the quickstart's backbone: train it, and put its folder where the recipes look.

    python tools/build_backbone.py --run-dir runs/quickstart_backbone

Trains recipe `quickstart_backbone` (goes on if it was interrupted) and writes a Hugging Face
folder: config, weights, tokenizer, and the manifest of the checkpoint they come from.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from cocoa_dist.config import ASSET_DIR, load_resolved
from cocoa_dist.inputs import tokenizer_folder
from cocoa_dist.manifest import MANIFEST_NAME, newest
from cocoa_dist.model.heads import HeadsConfig
from cocoa_dist.train.build import load_weights
from cocoa_dist.train.checkpoint import WEIGHTS_NAME

RECIPE, STAGE = "quickstart_backbone", "next_token"
README = """\
# The quickstart's backbone

A Qwen2-VL of 1.05 M parameters, trained from random weights as a causal captioner on the training
split of the emoji pictures (`cocoa_dist/assets/emoji`), by this project's own recipe
`{recipe}`: {steps} steps, {samples} samples, {cpu_minutes:.1f} CPU minutes, final loss {loss:.3f}
nats a token. It plays the part of released weights. `manifest.json` is the manifest of the
checkpoint the weights come from. Rebuild:

    python tools/build_backbone.py --run-dir runs/{recipe}

Licence: Apache-2.0 (weights); the pictures' licences are in `cocoa_dist/assets/emoji/LICENSES.md`.
"""


def main() -> int:
    """Train and write the folder; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run-dir", type=Path, default=Path("runs") / RECIPE)
    parser.add_argument("--nproc", type=int, default=1)
    parser.add_argument("--destination", type=Path, default=ASSET_DIR / RECIPE)
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "launcher", "run", RECIPE, "--run-dir"]
    code = subprocess.call([*command, str(arguments.run_dir), "--nproc", str(arguments.nproc)])
    if code:
        return code
    write_folder(arguments.run_dir, arguments.destination)
    print(f"wrote {arguments.destination}")
    return 0


def write_folder(run_dir: Path, destination: Path) -> None:
    """Write the Hugging Face folder from the run's last checkpoint."""
    from cocoa_dist.model.backbone import load_backbone
    from cocoa_dist.model.embedder import EmbeddingModel
    from cocoa_dist.train.build import load_vocabulary, special_token_ids

    config = load_resolved(run_dir / "resolved.yaml")
    found = newest(run_dir, stage=STAGE)
    if found is None or not found[1].complete:
        raise SystemExit(f"stage {STAGE} is not complete in {run_dir}")
    folder, manifest = found
    vocabulary = load_vocabulary(config.model)
    backbone = load_backbone(
        config.model,
        token_ids=special_token_ids(config.model),
        vocabulary_size=vocabulary.size,
    )
    load_weights(EmbeddingModel(backbone, HeadsConfig()), folder / WEIGHTS_NAME)
    shutil.rmtree(destination, ignore_errors=True)
    backbone.save_pretrained(destination)
    for path in tokenizer_folder(config.model).iterdir():
        if path.suffix in {".json", ".jinja"}:
            shutil.copyfile(path, destination / path.name)
    shutil.copyfile(folder / MANIFEST_NAME, destination / MANIFEST_NAME)
    facts = README.format(
        recipe=RECIPE,
        steps=manifest.step,
        samples=manifest.samples,
        cpu_minutes=manifest.train_cpu_seconds / 60,
        loss=manifest.loss["loss"],
    )
    (destination / "README.md").write_text(facts)


if __name__ == "__main__":
    sys.exit(main())
