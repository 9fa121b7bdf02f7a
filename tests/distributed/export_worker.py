"""A child process of test_export_ranks.py: weights cut up over ranks, written to a folder."""

import sys
from pathlib import Path

from engines_worker import of_kind, prepare
from rank_jobs import do_jobs
from worker import Job

from cocoa_dist import distributed
from cocoa_dist.config import load_recipe
from cocoa_dist.export import CardInfo, SelfTestVector, check_self_test, export_folder
from cocoa_dist.export.layers import ModelWeights, layers_of, share_out, stored_names
from cocoa_dist.export.layers import weights_on_demand as on_demand
from cocoa_dist.export.stored import FileWeights, stored_tensors
from cocoa_dist.report import arms
from cocoa_dist.train.evaluate import Item, load_embedder
from cocoa_dist.train.session import build_engine
from cocoa_dist.train.zero_weights import whole_shape

CARD = CardInfo("x", base="x", stages=[], data="x", licence="other", compute="x")
TEXTS = ("a small test", "two words and a few more")


def main(jobs_file: str, out: str) -> None:
    folder = Path(out).parent
    do_jobs(jobs_file, out, lambda fields, world: run(fields, world, folder))


def run(fields: dict, world: distributed.World, folder: Path) -> dict[str, object]:
    job = Job(**fields)
    config = load_recipe(job.recipe, [f"stages.{job.stage}.init_from=model", *job.overrides])
    parts, batches = prepare(config, job, world)
    engine = build_engine(of_kind(config, job.engine), job.stage, parts)
    for step, batch in enumerate(batches, start=1):
        engine.train_step(batch.packs, step=step)
    backbone = engine.module.backbone
    arguments = {
        "tokenizer": arms.export_tokenizer(config.model),
        "bidirectional": True,
        "pooling": "last",
        "prompts": {},
        "card": CARD,
        "max_file_bytes": 500_000,
        "max_text_tokens": config.data.max_text_tokens,
    }
    embedder = load_embedder(config, run_dir=None, after_stage="model", weights=False)
    arguments["image_settings"] = arms.image_settings(config, embedder)
    if job.name.startswith("full disk"):
        return {"error": no_space(backbone, arguments, folder / job.name, world)}
    destination = folder / job.name
    items = [Item(text=text) for text in TEXTS]
    with engine.embedding() as embed:
        vectors = embed(embedder.pack([embedder.sample(item) for item in items])).numpy()
    vectors_of = lambda found: [  # noqa: E731
        SelfTestVector(text, None, None, vector) for text, vector in zip(TEXTS, found, strict=True)
    ]
    export_folder(
        model=backbone, destination=destination, self_test=vectors_of(vectors), **arguments
    )
    shapes = {name: list(whole_shape(p)) for name, p in backbone.named_parameters()}
    result = {"weights": engine.gathered_weights(), "shapes": shapes}
    if job.engine == "deepspeed":
        result["again"] = read_back(embedder, destination, folder, arguments, items, vectors_of)
    return result


def read_back(embedder, source: Path, folder: Path, arguments: dict, items, vectors_of) -> float:
    """Share a folder out over the ranks without an engine, embed, and export it once more."""
    model = embedder.model.backbone
    dtype = next(model.parameters()).dtype
    files = stored_tensors(sorted(source.glob("*.safetensors")))
    weights = FileWeights(files, names=stored_names(model), dtype=dtype)
    weights.check(layers_of(model))
    share_out(model, weights, dtype=dtype)
    assert all(p.ds_tensor.numel() < p.ds_numel for p in model.parameters() if p.ds_numel > 2)
    with on_demand(model, ModelWeights()):
        vectors = embedder.embed(items)
    again = folder / f"{source.name} again"
    export_folder(model=model, destination=again, self_test=vectors_of(vectors), **arguments)
    return check_self_test(source).max_difference if distributed.rank() == 0 else 0.0


def no_space(backbone, arguments: dict, destination: Path, world: distributed.World) -> str:
    """Export with a disk that is full on rank 0 at some point; every rank must hear of it."""
    from cocoa_dist.export import folder, weights

    module, name, calls_before = {
        "full disk": (weights, "tensor_chunks", 9),
        "full disk at the index": (weights, "_write_index", 0),
        "full disk at the end": (folder, "_make_durable", 0),
    }[destination.name]
    calls, real = [], getattr(module, name)

    def full(*args, **kwargs):
        calls.append(args)
        if world.rank == 0 and len(calls) > calls_before:
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    setattr(module, name, full)
    one = [SelfTestVector("a", None, None, vector=[1.0] * 64)]
    try:
        export_folder(
            model=backbone, destination=destination, self_test=one, verify=False, **arguments
        )
        found = "nothing"
    except (ValueError, OSError) as error:
        found = str(error)
    finally:
        setattr(module, name, real)
    return " / ".join(distributed.gather_objects(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
