r"""Look at what a step trains on: texts, pictures, roles, labels and the attention mask.

    python tools/show_batch.py debug --stage eos_bridged_reconstruction
    python tools/show_batch.py quickstart --stage joint_reconstruction --step 30 --png mask.png
    python tools/show_batch.py quickstart --stage contrastive \
        --manifest runs/quickstart/checkpoints/contrastive/step_00000100

With a checkpoint's folder it shows the exact batch that comes after it. The step is packed as for
one process; its records, and what is hidden of them, are the same on any number.
"""

import argparse
import itertools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # works in a checkout that is not installed

from cocoa_dist.config import RunConfig, load_recipe  # noqa: E402
from cocoa_dist.manifest import read_manifest  # noqa: E402

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

    from cocoa_dist.batch import PackedBatch, StepBatch
    from cocoa_dist.data.order import Slot
    from cocoa_dist.data.samples import ImageGeometry, Sample, Vocabulary
    from cocoa_dist.data.shards import ShardReader

ROLE_LETTERS = {"CONTEXT": "c", "BRIDGE": "b", "TARGET": "t"}
ROLE_COLOURS = {"CONTEXT": "#6b97bf", "BRIDGE": "#d98f2e", "TARGET": "#6fa878"}
UNSEEN_COLOUR = "#f1ede7"
MAX_MASK_TOKENS = 72  # wider masks do not fit a terminal; --png draws them
MAX_LABELLED_TOKENS = 60  # of a drawing


@dataclass(frozen=True)
class Row:
    """One sample of the pack, at [start, stop), and where it comes from."""

    sample: "Sample"
    start: int
    key: str
    image_sizes: tuple[tuple[int, int], ...]  # of the record's pictures, height and width

    @property
    def stop(self) -> int:
        """Behind its last token in the pack."""
        return self.start + len(self.sample.input_ids)

    def roles(self) -> list[str]:
        """Name of the role of each token."""
        return [s.role.name for s in self.sample.segments for _ in range(s.stop - s.start)]


@dataclass(frozen=True)
class Shown:
    """One step of one stage, and the samples of its first pack."""

    config: RunConfig
    stage: str
    batch: "StepBatch"
    rows: tuple[Row, ...]
    vocabulary: "Vocabulary"
    tokenizer: "Tokenizer"

    @property
    def pack(self) -> "PackedBatch":
        """The first pack of the step."""
        return self.batch.packs[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the batch; returns the exit code (2 for bad input)."""
    arguments = _parser().parse_args(argv)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed searches one, and says so
    try:
        config = load_recipe(arguments.recipe, arguments.overrides)
        state = _checkpoint_state(arguments.manifest, arguments.stage)
        step = int(state["next_step"]) if state else arguments.step
        shown = load_step(config, arguments.stage, step=step, state=state)
        print("\n".join(describe(shown, num_samples=arguments.samples)))
        if arguments.png is not None:
            draw_mask(shown, arguments.png, num_samples=arguments.samples)
            print(f"\nmask drawn in {arguments.png}")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def load_step(
    config: RunConfig, stage: str, *, step: int, state: dict[str, Any] | None = None
) -> Shown:
    """Build one step as the trainer's loader does, for one process.

    Raises ValueError for a stage or step that is not there, or if `state`, the data state of a
    checkpoint, is of another plan.
    """
    if stage not in config.stages:
        raise ValueError(
            f"stage '{stage}' is not in {config.name} (has: {', '.join(config.stages)})"
        )
    if step < 1:
        raise ValueError(f"step is {step}, the first one is 1")
    from tokenizers import Tokenizer

    from cocoa_dist.config import resolve_path
    from cocoa_dist.data.loader import StageLoader
    from cocoa_dist.data.shards import ShardReader
    from cocoa_dist.inputs import tokenizer_folder
    from cocoa_dist.model.backbone import load_backbone
    from cocoa_dist.train.build import (
        image_geometry,
        load_vocabulary,
        special_token_ids,
    )

    vocabulary = load_vocabulary(config.model)
    ids = special_token_ids(config.model)
    geometry = image_geometry(
        load_backbone(config.model, token_ids=ids, vocabulary_size=vocabulary.size)
    )
    with TemporaryDirectory() as folder:
        loader = StageLoader(
            config,
            stage,
            vocabulary=vocabulary,
            geometry=geometry,
            rank=0,
            world_size=1,
            start_step=step,
            folder=Path(folder),
        )
        if state is not None:
            loader.plan.check_state(state)
        assignment = loader.plan.step(step, 1)
        batch = loader.next_step()
        loader.close()
    reader = ShardReader(resolve_path(config.stages[stage].data.sources[batch.dataset].path))
    maker = _RowMaker(config, stage, batch.dataset, reader, vocabulary, geometry)
    rows = maker.rows(assignment.ranks[0][0])
    reader.close()
    _check_rows(rows, batch.packs[0], mask=vocabulary.mask)
    tokenizer = Tokenizer.from_file(str(tokenizer_folder(config.model) / "tokenizer.json"))
    return Shown(config, stage, batch, rows, vocabulary, tokenizer)


class _RowMaker:
    """Makes the samples of a pack once more, because a pack no longer knows their roles."""

    def __init__(
        self,
        config: RunConfig,
        stage: str,
        dataset: str,
        reader: "ShardReader",
        vocabulary: "Vocabulary",
        geometry: "ImageGeometry",
    ) -> None:
        from cocoa_dist.data.samples import view_settings

        self._view = config.stages[stage].data.view
        self._seed, self._stream = config.seed, f"{stage}/{dataset}"
        self._reader, self._vocabulary = reader, vocabulary
        self._settings = view_settings(
            config.data, geometry=geometry, stage=config.stages[stage].data, training=True
        )

    def rows(self, slots: Sequence["Slot"]) -> tuple[Row, ...]:
        """Return the samples in the order of the pack."""
        rows: list[Row] = []
        for slot in slots:
            key, sizes = self._reader.key(slot.record), self._reader.image_sizes(slot.record)
            for sample in self._samples(slot):
                rows.append(Row(sample, rows[-1].stop if rows else 0, key, sizes))
        return tuple(rows)

    def _samples(self, slot: "Slot") -> tuple["Sample", ...]:
        from cocoa_dist.data.samples import draw_for, fillers, view_samples

        draw = draw_for(self._seed, self._stream, slot.passes, slot.record)
        try:
            record = self._reader.record(slot.record)
        except ValueError:
            return fillers(self._view, self._vocabulary)
        return view_samples(
            self._view, record, draw=draw, vocabulary=self._vocabulary, settings=self._settings
        ).samples


def _check_rows(rows: Sequence[Row], pack: "PackedBatch", *, mask: int) -> None:
    """Hold the samples against the pack: equal wherever nothing was hidden."""
    ids = pack.input_ids.tolist()
    plain = [int(token) for row in rows for token in row.sample.input_ids]
    same = len(ids) == len(plain) and all(a in (b, mask) for a, b in zip(ids, plain, strict=True))
    assert same, "the loader makes other samples than this tool: bring _RowMaker up to date"


def describe(shown: Shown, *, num_samples: int) -> list[str]:
    """Return the lines: the step as a whole, then the first samples of its first pack."""
    batch, pack = shown.batch, shown.pack
    attention = shown.config.stages[shown.stage].attention
    lines = [
        f"{shown.config.name}, stage {shown.stage}, step {batch.step}",
        f"  records   {len(batch.record_ids)} of '{batch.dataset}', digest {batch.digest}",
        f"  packs     {len(batch.packs)}, {batch.num_samples} samples, {batch.num_tokens} tokens",
        f"  fill      {100 * batch.fill_ratio:.1f} % of {shown.config.data.tokens_per_pack} a pack",
        f"  texts cut {batch.num_truncated}",
        f"  attention {attention.rule} {attention.options() or ''}".rstrip(),
        f"  pack 1    {pack.num_tokens} tokens, {len(pack.pixel_values)} patches, "
        f"{pack.plan.visible_area} visible pairs",
        *(f"  left out  {fault}" for fault in batch.bad_records),
    ]
    visible_TT = pack.plan.visibility().numpy()
    for number, row in enumerate(shown.rows[:num_samples], start=1):
        lines += ["", *_sample_lines(shown, row, number)]
        lines += _mask_lines(visible_TT[row.start : row.stop, row.start : row.stop], row.roles())
    return lines


def _sample_lines(shown: Shown, row: Row, number: int) -> list[str]:
    pack = shown.pack
    ids = pack.input_ids[row.start : row.stop].tolist()
    labels = [
        (int(at) - row.start, _word(shown, int(label)))
        for at, label in zip(pack.label_rows, pack.labels, strict=True)
        if row.start <= at < row.stop
    ]
    patches = int(((pack.patch_rows >= row.start) & (pack.patch_rows < row.stop)).sum())
    names = f"record {row.key}" + (" (could not be used)" if row.sample.is_filler else "")
    lines = [f"sample {number}, {names}, tokens [{row.start}, {row.stop})"]
    lines.append(f"  text      {_text(shown, ids)}")
    if row.sample.images:
        fitted = ", ".join(f"{i.shape[1]}x{i.shape[0]}" for i in row.sample.images)
        stored = ", ".join(f"{wide}x{high}" for high, wide in row.image_sizes)
        lines.append(f"  pictures  {fitted} (width x height); the record holds {stored}")
        lines.append(f"  hidden    {patches} visual tokens")
    spans = [f"{s.role.name} [{s.start}, {s.stop})" for s in row.sample.segments]
    lines.append(f"  segments  {', '.join(spans)}")
    asked = ", ".join(f"{at}: {word!r}" for at, word in labels)
    lines.append(f"  labels    {asked or 'none'}")
    return lines


def _mask_lines(visible_TT: "NDArray[np.bool_]", roles: Sequence[str]) -> list[str]:
    """Draw who sees whom: the letter of the role that is seen, a dot for what is not."""
    if len(roles) > MAX_MASK_TOKENS:
        return [f"  mask      {len(roles)} tokens are too many to print; use --png"]
    letters = "".join(ROLE_LETTERS[role] for role in roles)
    lines = [f"  mask        {letters}   a row sees: c context, b bridge, t target"]
    for row, letter in zip(visible_TT, letters, strict=True):
        seen = "".join(of if sees else "." for sees, of in zip(row, letters, strict=True))
        lines.append(f"            {letter} {seen}")
    return lines


def draw_mask(shown: Shown, path: Path, *, num_samples: int) -> None:
    """Draw the mask of the first samples of the pack as a PNG, coloured by the role seen."""
    import matplotlib as mpl
    import numpy as np

    mpl.use("agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    rows = shown.rows[:num_samples]
    stop = rows[-1].stop
    roles = [role for row in rows for role in row.roles()]
    numbers = np.array([list(ROLE_COLOURS).index(role) + 1 for role in roles])
    visible_TT = shown.pack.plan.visibility().numpy()[:stop, :stop]
    side = min(4.0 + 0.16 * stop, 16.0)
    figure, axes = plt.subplots(figsize=(side, side), layout="constrained")
    colours = ListedColormap([UNSEEN_COLOUR, *ROLE_COLOURS.values()])
    axes.imshow(visible_TT * numbers[None, :], cmap=colours, vmin=0, vmax=3, interpolation="none")
    axes.set_title(f"{shown.config.name}, {shown.stage}, step {shown.batch.step}", loc="left")
    axes.set_xlabel("is seen")
    axes.set_ylabel("sees")
    if stop <= MAX_LABELLED_TOKENS:
        words = [_word(shown, int(token)) for token in shown.pack.input_ids[:stop]]
        axes.set_xticks(range(stop), words, rotation=90, fontsize=7, parse_math=False)
        axes.set_yticks(range(stop), words, fontsize=7, parse_math=False)
        lines = np.arange(stop + 1) - 0.5
        axes.set_xticks(lines, minor=True)
        axes.set_yticks(lines, minor=True)
        axes.grid(which="minor", color="white", linewidth=0.8)
        axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    used = [name for name in ROLE_COLOURS if name in roles]
    handles = [Patch(color=ROLE_COLOURS[name], label=name.lower()) for name in used]
    figure.legend(handles=handles, loc="outside lower left", ncols=3, frameon=False)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise ValueError(f"--png {path} cannot be written: {error.strerror}") from error
    finally:
        plt.close(figure)


def _text(shown: Shown, ids: Sequence[int]) -> str:
    """Decode tokens in one line; runs of visual tokens are counted."""
    parts: list[str] = []
    for token, group in itertools.groupby(ids):
        count = len(list(group))
        if token == shown.vocabulary.image_pad:
            parts.append(f"<{count} visual>")
        else:
            parts += [_word(shown, token, strip=False)] * count
    return "".join(parts)


def _word(shown: Shown, token: int, *, strip: bool = True) -> str:
    word = str(shown.tokenizer.decode([token], skip_special_tokens=False))
    if token == shown.vocabulary.mask:
        word = "[mask]"
    return (word.strip() or word) if strip else word


def _checkpoint_state(folder: Path | None, stage: str) -> dict[str, Any] | None:
    """Return the data state of a checkpoint. Raises ValueError if it is of another stage."""
    if folder is None:
        return None
    manifest = read_manifest(folder)
    if manifest.stage != stage:
        raise ValueError(f"{folder} is a checkpoint of stage '{manifest.stage}', not of '{stage}'")
    if manifest.complete:
        raise ValueError(f"{folder} is the end of stage '{stage}': no batch comes after it")
    return manifest.data_state


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="name of a recipe, or path of a .yaml file")
    parser.add_argument("overrides", nargs="*", metavar="a.b.c=value", help="change the recipe")
    parser.add_argument("--stage", required=True, help="which stage of the recipe")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, default=1, help="step of the stage (default 1)")
    which.add_argument("--manifest", type=Path, help="checkpoint folder: show what comes next")
    parser.add_argument("--samples", type=int, default=3, help="how many samples (default 3)")
    parser.add_argument("--png", type=Path, help="draw the mask of these samples there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
