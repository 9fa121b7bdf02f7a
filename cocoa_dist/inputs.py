"""Checks that what a recipe names is there, before anything is started or written.

Imports no torch, so that the launcher's look at the inputs costs a fraction of a second.
"""

import json
from pathlib import Path

from cocoa_dist.config import ModelConfig, resolve_path

SUPPORTED_MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def check_model_folder(path: str, *, named: str = "model.path") -> Path:
    """Return the folder of a Hugging Face model after checking that its parts are there.

    `named`: the key of the recipe, for messages. Raises ValueError with one line that says what is
    missing.
    """
    folder = resolve_path(path)
    if not folder.is_dir():
        raise ValueError(
            f"{named} '{path}' is not a folder; download the model (for example with "
            f"`hf download {path} --local-dir DIR`) and set {named}=DIR"
        )
    missing = [name for name in ("config.json", "tokenizer.json") if not (folder / name).is_file()]
    if not list(folder.glob("*.safetensors")):
        missing.append("*.safetensors (the weights)")
    if missing:
        raise ValueError(f"model folder {folder} lacks {', '.join(missing)}")
    found = model_type(folder)
    if found not in SUPPORTED_MODEL_TYPES:
        raise ValueError(
            f"model folder {folder} is of type '{found}', which is not supported yet "
            f"(have: {', '.join(SUPPORTED_MODEL_TYPES)})"
        )
    return folder


def model_type(folder: Path) -> str:
    """Return the `model_type` that a model folder's config.json states.

    Raises ValueError if it is not one.
    """
    path = folder / "config.json"
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["model_type"])
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {error}; fetch the model again") from error
    except KeyError:
        raise ValueError(f"{path} has no model_type: not a model of transformers") from None


def tokenizer_folder(config: ModelConfig) -> Path:
    """Return the folder of a recipe's tokenizer. Raises ValueError if it is not there."""
    if config.tokenizer is None:
        return check_model_folder(str(config.path))
    folder = resolve_path(config.tokenizer)
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"model.tokenizer '{config.tokenizer}': {folder} has no tokenizer.json")
    return folder
