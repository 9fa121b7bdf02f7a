"""The ways to train that tools/bench_peers.py compares, each as its users would write it.

Same weights, rows, batches, learning rate and loss (InfoNCE over a batch's targets, temperature
0.05); each with its own loader, collator, padding and optimizer step. Libraries are imported when
an arm is used: they live in different environments.
"""

import contextlib
import importlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from peers_rows import (
    LEARNING_RATE,
    MAX_GRAD_NORM,
    RECIPE,
    STAGE,
    TEMPERATURE,
    WEIGHT_DECAY,
    overrides,
    rows_in_order,
)

MINI_BATCH = 32  # of Cached MNRL: its default
CHUNK_TOKENS = 1024  # of a pack where GradCache is compared

Gradients = Mapping[str, Any]


class Watch(Protocol):
    """What an arm tells while it trains."""

    def begin(self, step: int) -> None:
        """Say that `step` steps are done, and the next one begins."""

    def proof(self, loss: float, gradients: Callable[[], Gradients]) -> None:
        """Give loss and gradient of step 1, before clipping."""


def ours(job: Mapping[str, Any], watch: Watch) -> None:
    """Train with our loader and engine, ZeRO-3 over as many ranks as there are."""
    import torch

    from cocoa_dist import distributed
    from cocoa_dist.config import load_recipe
    from cocoa_dist.data.loader import StageLoader
    from cocoa_dist.runtime import seed_everything
    from cocoa_dist.train.build import build_parts
    from cocoa_dist.train.session import build_engine, quiet_known_warnings

    quiet_known_warnings()
    world = distributed.start(timeout_seconds=600)
    settings = overrides(Path(job["folder"]), kind=job["kind"], batch=job["batch"])
    config = load_recipe(RECIPE, [*settings, *job["settings"]])
    seed_everything(config.seed)
    parts = build_parts(config, STAGE, run_dir=None)
    engine = build_engine(config, STAGE, parts)
    with tempfile.TemporaryDirectory() as folder:
        loader = StageLoader(
            config,
            STAGE,
            vocabulary=parts.vocabulary,
            geometry=parts.geometry,
            rank=world.rank,
            world_size=world.size,
            start_step=1,
            folder=Path(folder),
        )
        for step in range(1, job["steps"] + 1):
            watch.begin(step - 1)
            batch = loader.next_step()
            if job["proof"] and step == 1:
                terms = engine.accumulate(batch.packs)
                total = torch.tensor([term.local_sum for term in terms.values()])
                loss = distributed.sum_over_ranks(total)[0] / next(iter(terms.values())).count
                watch.proof(float(loss), lambda: our_gradients(engine))
                break
            engine.train_step(batch.packs, step=step)
        watch.begin(job["steps"])
        loader.close()
    distributed.stop()


def our_gradients(engine: Any) -> Gradients:
    """Put the slices of all ranks together. Collective: call on all ranks."""
    import torch

    from cocoa_dist.distributed import gather_objects

    found = engine._gradients()
    parts = gather_objects([(s.name, s.start, s.stop, s.shape) for s in engine._slices()])
    values = gather_objects({name: value.clone() for name, value in found.items()})
    whole = {}
    for name, _, _, shape in parts[0]:
        pieces = [
            values[rank][name][: stop - start]
            for rank, slices in enumerate(parts)
            for other, start, stop, _ in slices
            if other == name
        ]
        whole[plain_name(name)] = torch.cat(pieces).view(shape)
    return whole


def plain_name(name: str) -> str:
    """Return a parameter's name from the language model or the vision tower on."""
    for part in ("language_model.", "visual."):
        if part in name:
            return name[name.index(part) :]
    return name


def sentence_transformers(job: Mapping[str, Any], watch: Watch) -> None:
    """Train with SentenceTransformerTrainer and one of its two ranking losses."""
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
    from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
    from sentence_transformers.sentence_transformer import losses

    model = SentenceTransformer(str(Path(job["folder"]) / "export"), device="cpu")
    options: dict[str, Any] = {"scale": 1.0 / TEMPERATURE}
    options["gather_across_devices"] = job["nproc"] > 1
    if job["cached"]:
        options["mini_batch_size"] = MINI_BATCH
        loss = losses.CachedMultipleNegativesRankingLoss(model, **options)
    else:
        loss = losses.MultipleNegativesRankingLoss(model, **options)
    with trainer_arguments(job) as arguments:
        trainer = in_order(SentenceTransformerTrainer)(
            model=model,
            args=Arguments(**arguments, batch_sampler=in_sequence),
            train_dataset=table(job, ("anchor", "positive")),
            loss=loss,
            callbacks=[],
        )
        train(trainer, job, watch)


def in_sequence(dataset: Any, batch_size: int, drop_last: bool, **_: Any) -> Any:
    """Return batches of neighbours, for sentence-transformers."""
    from sentence_transformers.base.sampler import DefaultBatchSampler
    from torch.utils.data import SequentialSampler

    rows = SequentialSampler(dataset)
    return DefaultBatchSampler(rows, batch_size=batch_size, drop_last=drop_last)


def colpali(job: Mapping[str, Any], watch: Watch) -> None:
    """Train colpali-engine's BiQwen2 with its trainer, collator and loss."""
    from transformers.models.qwen2_vl import Qwen2VLModel

    # Asked for by colpali-engine, gone from transformers: a checkpoint's names to the model's.
    Qwen2VLModel._checkpoint_conversion_mapping = {"^model": "language_model"}
    from colpali_engine.collators import VisualRetrieverCollator
    from colpali_engine.data.dataset import ColPaliEngineDataset
    from colpali_engine.loss import BiEncoderLoss
    from colpali_engine.models import BiQwen2, BiQwen2Processor
    from colpali_engine.trainer.contrastive_trainer import ContrastiveTrainer
    from transformers import (
        AutoTokenizer,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
        TrainingArguments,
    )

    folder = str(Path(job["folder"]) / "model")
    processor = BiQwen2Processor(
        Qwen2VLImageProcessor(min_pixels=784, max_pixels=12544),
        AutoTokenizer.from_pretrained(folder),
        Qwen2VLVideoProcessor(),
    )
    rows = table(job, ("query", "pos_target"))
    with trainer_arguments(job) as arguments:
        trainer = in_order(ContrastiveTrainer)(
            loss_func=BiEncoderLoss(temperature=TEMPERATURE),
            is_vision_model=True,
            model=BiQwen2.from_pretrained(folder),
            args=TrainingArguments(**arguments, remove_unused_columns=False),
            train_dataset=ColPaliEngineDataset(rows, pos_target_column_name="pos_target"),
            eval_dataset=None,
            data_collator=VisualRetrieverCollator(processor=processor),
        )
        train(trainer, job, watch)


def plain_loop(job: Mapping[str, Any], watch: Watch) -> None:
    """Train with transformers' model and processor and nothing else, padded batches."""
    import io

    import torch
    import torch.nn.functional as F
    from PIL import Image
    from transformers import AutoModel, AutoProcessor

    folder = str(Path(job["folder"]) / "export")
    model = AutoModel.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    options = {"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY}
    optimizer = torch.optim.AdamW(model.parameters(), **options)

    def embed(inputs: Any) -> Any:
        hidden = model(**inputs, use_cache=False).last_hidden_state
        last = inputs["attention_mask"].sum(dim=1) - 1
        return F.normalize(hidden[torch.arange(len(last)), last], dim=-1)

    rows = rows_in_order(Path(job["folder"]), job["kind"], job["batch"])
    holder = "<|vision_start|><|image_pad|><|vision_end|>"
    for step in range(1, job["steps"] + 1):
        watch.begin(step - 1)
        batch = [next(rows) for _ in range(job["batch"])]
        images = [Image.open(io.BytesIO(row.image)).convert("RGB") for row in batch]
        texts = processor.tokenizer([r.text for r in batch], padding=True, return_tensors="pt")
        shown = processor(
            text=[holder] * len(batch), images=images, padding=True, return_tensors="pt"
        )
        scores = embed(texts) @ embed(shown).T / TEMPERATURE
        loss = F.cross_entropy(scores, torch.arange(len(batch)))
        optimizer.zero_grad()
        loss.backward()
        if job["proof"]:
            watch.proof(float(loss.detach()), lambda: torch_gradients(model))
            break
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
    watch.begin(job["steps"])


def ms_swift(job: Mapping[str, Any], watch: Watch) -> None:
    """Train with `swift sft --task_type embedding`, its template and its loss."""
    import json

    from transformers import trainer as hf

    count = rows_of(job)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (folder / "rows.jsonl").open("w") as lines:
            rows = rows_in_order(Path(job["folder"]), job["kind"], job["batch"])
            for number, row in zip(range(count), rows, strict=False):
                path = folder / f"{number}.png"
                path.write_bytes(row.image)
                line = {
                    "messages": [{"role": "user", "content": row.text}],
                    "positive_messages": [[{"role": "user", "content": "<image>"}]],
                    "positive_images": [[str(path)]],
                }
                lines.write(json.dumps(line) + "\n")
        os.environ["INFONCE_TEMPERATURE"] = str(TEMPERATURE)
        watched(hf.Trainer, job, watch)
        given = {
            **{"model": str(Path(job["folder"]) / "model"), "model_type": "qwen2_vl"},
            **{"template": "qwen2_vl", "task_type": "embedding", "tuner_type": "full"},
            **{"loss_type": "infonce", "attn_impl": "sdpa", "torch_dtype": "float32"},
            **{"use_hf": "true", "check_model": "false", "dataset": str(folder / "rows.jsonl")},
            **{"output_dir": str(folder / "out"), "max_steps": job["steps"]},
            **{"per_device_train_batch_size": job["batch"] // job["nproc"]},
            **{"learning_rate": LEARNING_RATE, "weight_decay": WEIGHT_DECAY},
            **{"max_grad_norm": MAX_GRAD_NORM, "warmup_ratio": 0, "lr_scheduler_type": "constant"},
            **{"save_strategy": "no", "dataloader_num_workers": 0, "freeze_vit": "false"},
            **{"freeze_aligner": "false", "split_dataset_ratio": 0, "logging_steps": 1000},
            **{"dataset_shuffle": "false", "train_dataloader_shuffle": "false"},
            **{"gradient_checkpointing": "false", "dataset_num_proc": 1, "report_to": "none"},
            **{"gradient_accumulation_steps": 1, "max_length": 512, "disable_tqdm": "true"},
        }
        sft = importlib.import_module("swift.pipelines").sft_main
        sft([str(part) for key, value in given.items() for part in (f"--{key}", value)])


@contextlib.contextmanager
def trainer_arguments(job: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what all of transformers' trainers are told."""
    with tempfile.TemporaryDirectory() as folder:
        yield {
            "output_dir": folder,
            "per_device_train_batch_size": job["batch"] // job["nproc"],
            "max_steps": job["steps"],
            "learning_rate": LEARNING_RATE,
            "weight_decay": WEIGHT_DECAY,
            "max_grad_norm": MAX_GRAD_NORM,
            "lr_scheduler_type": "constant",
            "save_strategy": "no",
            "logging_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            "dataloader_drop_last": True,
            "dataloader_num_workers": 0,
        }


def in_order(trainer: type) -> type:
    """Return a trainer that takes its rows as they lie."""
    from torch.utils.data import SequentialSampler

    def sampler(self: Any, dataset: Any = None) -> Any:
        return SequentialSampler(dataset if dataset is not None else self.train_dataset)

    return type(trainer.__name__, (trainer,), {"_get_train_sampler": sampler})


def train(trainer: Any, job: Mapping[str, Any], watch: Watch) -> None:
    """Run one of transformers' trainers under the watch."""
    watched(type(trainer), job, watch)
    trainer.train()


def watched(trainer: type, job: Mapping[str, Any], watch: Watch) -> None:
    """Make trainers of a class tell when steps begin, and what step 1 came to."""
    from transformers import TrainerCallback
    from transformers import trainer as hf

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            watch.begin(0)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            watch.begin(state.global_step)

    inner = trainer.training_step  # type: ignore[attr-defined]

    def training_step(self: Any, model: Any, *rest: Any, **named: Any) -> Any:
        if not any(isinstance(one, Clock) for one in self.callback_handler.callbacks):
            self.add_callback(Clock())
            watch.begin(0)
        loss = inner(self, model, *rest, **named)
        if job["proof"] and self.state.global_step == 0:
            watch.proof(float(loss.detach()), lambda: torch_gradients(model))
        return loss

    trainer.training_step = training_step  # type: ignore[attr-defined]
    hf.DEFAULT_CALLBACKS = [*hf.DEFAULT_CALLBACKS, Clock]


def torch_gradients(model: Any) -> Gradients:
    """Return the gradients of a plain module."""
    return {
        plain_name(name): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def rows_of(job: Mapping[str, Any]) -> int:
    """Return how many rows a trainer is given.

    It fetches one batch ahead, so a run whose first step is not counted has one batch more: as many
    batches are fetched in the counted steps as steps are made.
    """
    return int(job["batch"]) * (int(job["steps"]) + (1 if job["warm"] else 0))


def table(job: Mapping[str, Any], columns: tuple[str, str]) -> Any:
    """Return the rows as a table of the datasets library."""
    from datasets import Dataset, Features, Image, Value

    rows = rows_in_order(Path(job["folder"]), job["kind"], job["batch"])
    taken = [row for _, row in zip(range(rows_of(job)), rows, strict=False)]
    text, picture = columns
    return Dataset.from_dict(
        {
            text: [row.text for row in taken],
            picture: [{"bytes": row.image, "path": None} for row in taken],
        },
        features=Features({text: Value("string"), picture: Image()}),
    )


def warm_up(module: str) -> None:
    """Import what an arm needs, before its processes are forked."""
    for name in PRELOADED[module]:
        importlib.import_module(name)
    if module == "ours":
        from cocoa_dist.train.engine import import_deepspeed

        import_deepspeed()


ARMS: dict[str, Callable[[Mapping[str, Any], Watch], None]] = {
    "ours": ours,
    "sentence_transformers": sentence_transformers,
    "colpali": colpali,
    "plain_loop": plain_loop,
    "ms_swift": ms_swift,
}
_MODELS = ("torch", "PIL.Image", "transformers.models.qwen2_vl.modeling_qwen2_vl")
PRELOADED = {
    "ours": (*_MODELS, "cocoa_dist.train.session"),
    "sentence_transformers": (*_MODELS, "datasets", "sentence_transformers", "accelerate"),
    "colpali": (*_MODELS, "datasets", "transformers.trainer", "accelerate"),
    "plain_loop": _MODELS,
    "ms_swift": (*_MODELS, "swift.pipelines"),
}

if __name__ == "__main__":
    sys.exit("this file is used by tools/bench_peers.py")
