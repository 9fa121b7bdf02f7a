"""What tools/check_export.py runs in a fresh environment: load a folder, self-test, a mock task.

Imports nothing of this project, and refuses to run where it can be imported. Prints one line of
JSON. The folder's self-test is done as a user of that environment would embed.
"""

import importlib.util
import json
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "sentence-transformers", "mteb", "numpy", "pillow")


def of_sentence_transformers(folder: Path, entry: dict[str, Any], model: Any) -> Any:
    """Embed one input of the self-test with SentenceTransformer."""
    from PIL import Image

    parts = {} if entry["text"] is None else {"text": entry["text"]}
    if entry["image"] is not None:
        parts["image"] = Image.open(folder / entry["image"])
    return model.encode([parts], prompt=entry["instruction"], show_progress_bar=False)[0]


def of_transformers(folder: Path, entry: dict[str, Any], parts: Any) -> Any:
    """Embed one input of the self-test with AutoProcessor and AutoModel, as the card says."""
    import torch
    from PIL import Image

    processor, model = parts
    content: list[dict[str, Any]] = []
    if entry["image"] is not None:
        content.append({"type": "image", "image": Image.open(folder / entry["image"])})
    if entry["text"] is not None:
        content.append({"type": "text", "text": entry["text"]})
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if entry["instruction"] is not None:
        messages.insert(0, {"role": "system", "content": entry["instruction"]})
    batch = processor.apply_chat_template(
        [messages],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"truncation": True},  # sentence-transformers cuts by itself
    )
    with torch.no_grad():
        hidden_TD = model(**batch, use_cache=False).last_hidden_state[0].float()
    return torch.nn.functional.normalize(_pooled(folder, batch, hidden_TD), dim=-1).numpy()


def _pooled(folder: Path, batch: Any, hidden_TD: Any) -> Any:
    """Pool as modules.json and what it names say."""
    weights = folder / "1_Weights" / "config.json"
    if weights.is_file():  # a mean over the tokens that weigh anything
        config = json.loads(weights.read_text(encoding="utf-8"))
        counted = {config["vocab"].index(token) for token in config["word_weights"]}
        rows = [i for i, token in enumerate(batch["input_ids"][0].tolist()) if token in counted]
        return hidden_TD[rows].mean(0)
    pooling = json.loads((folder / "1_Pooling" / "config.json").read_text(encoding="utf-8"))
    return hidden_TD[-1] if pooling["pooling_mode"] == "lasttoken" else hidden_TD.mean(0)


def mock_task(folder: Path, model: Any) -> dict[str, float]:
    """Run mteb's mock retrieval of pictures by text and back; return the main scores."""
    import mteb
    from mteb.mocks import MockAny2AnyRetrievalI2TTask, MockAny2AnyRetrievalT2ITask
    from mteb.models import SentenceTransformerEncoderWrapper

    wrapped = SentenceTransformerEncoderWrapper(model)
    facts = {"modalities": ["image", "text"], "name": "local/export", "revision": "1"}
    wrapped.mteb_model_meta = wrapped.mteb_model_meta.model_copy(update=facts)
    tasks = [MockAny2AnyRetrievalT2ITask(), MockAny2AnyRetrievalI2TTask()]
    found = mteb.evaluate(wrapped, tasks, cache=None)
    return {result.task_name: float(result.get_score()) for result in found.task_results}


def main(kind: str, path: str) -> None:
    """Check the folder in the environment this runs in."""
    import numpy as np

    for module in ("cocoa_dist", "launcher", "torchvision"):
        assert importlib.util.find_spec(module) is None, f"{module} is visible here"
    absent = {"transformers": ["sentence_transformers", "mteb"], "sentence-transformers": ["mteb"]}
    for module in absent.get(kind, []):
        assert importlib.util.find_spec(module) is None, f"{module} is visible here"
    folder = Path(path)
    if kind == "transformers":
        from transformers import AutoModel, AutoProcessor

        model: Any = (
            AutoProcessor.from_pretrained(folder),
            AutoModel.from_pretrained(folder).eval(),
        )
        half = model[1].dtype.itemsize < 4
        embed = of_transformers
    else:
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(str(folder), device="cpu")
        half = next(model.parameters()).dtype.itemsize < 4
        embed = of_sentence_transformers
    entries = json.loads((folder / "selftest.json").read_text(encoding="utf-8"))
    pairs = [(np.asarray(embed(folder, e, model)), np.asarray(e["vector"])) for e in entries]
    cosines = [float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in pairs]
    result = {
        "entries": len(entries),
        "difference": float(max(np.abs(a - b).max() for a, b in pairs)),
        "cosine": min(cosines),
        "half_precision": half,
        "task": mock_task(folder, model) if kind == "mteb" else {},
        "versions": {name: _version(name) for name in PACKAGES},
    }
    print(json.dumps(result))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main(*sys.argv[1:])
