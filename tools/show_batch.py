r"""Look at what a step trains on: texts, pictures, roles, labels and the attention mask.

    python tools/show_batch.py debug --stage eos_bridged_reconstruction
    python tools/show_batch.py quickstart --stage joint_reconstruction --step 30 --png mask.png
    python tools/show_batch.py quickstart --stage contrastive \
        --manifest runs/quickstart/checkpoints/contrastive/step_00000100

With a checkpoint's folder it shows the exact batch that comes after it. The step is packed as for
one process; its records, and what is hidden of them, are the same on any number.

Without a recipe it draws a rule over a pack of segments, C (context), B (bridge) and T (target),
with `|` between samples; `--rule all` draws every rule and option side by side:

    python tools/show_batch.py --rule eos_bridged --option target_causal=true \
        --pack "C6 B1 T4 | C3 B1 T5" --png mask.png
    python tools/show_batch.py --rule all --pack "C6 B2 T4 | C3 B2 T4" --png rules.png

Masks are drawn from the plan that the kernels run. Where a pack has more tokens than fit, a cell
stands for several and shows the share of visible pairs; the picture then says so.
"""

import argparse
import itertools
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]  # works in a checkout that is not installed

from mask_pictures import Picture, draw, parse_pack, text_lines  # noqa: E402

from cocoa_dist.config import RunConfig, load_recipe  # noqa: E402
from cocoa_dist.manifest import read_manifest  # noqa: E402
from cocoa_dist.segments import Segment, attention_rule  # noqa: E402

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from cocoa_dist.attention import AttentionPlan
    from cocoa_dist.batch import PackedBatch, StepBatch
    from cocoa_dist.data.geometry import ImageGeometry
    from cocoa_dist.data.order import Slot
    from cocoa_dist.data.samples import Sample, Vocabulary
    from cocoa_dist.data.shards import ShardReader

ALL_RULES: tuple[tuple[str, dict[str, bool]], ...] = (
    ("bidirectional", {}),
    ("causal", {}),
    ("compression", {}),
    *(
        ("eos_bridged", {"bridge_sees_target": seen, "target_causal": causal})
        for seen, causal in itertools.product((True, False), (False, True))
    ),
)


@dataclass(frozen=True)
class Row:
    """One sample of the pack, at [start, stop), and where it comes from."""

    sample: "Sample"
    start: int
    key: str
    dataset: str
    image_sizes: tuple[tuple[int, int], ...]  # of the record's pictures, height and width

    @property
    def stop(self) -> int:
        """Behind its last token in the pack."""
        return self.start + len(self.sample.input_ids)

    def segments(self, offset: int) -> list[Segment]:
        """Return its segments, moved so that the sample begins at `offset`."""
        return [Segment(s.start + offset, s.stop + offset, s.role) for s in self.sample.segments]


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
    """Print the batch, or a rule; returns the exit code (2 for bad input)."""
    parser = _parser()
    arguments = parser.parse_intermixed_args(argv)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed searches one, and says so
    try:
        _check_arguments(arguments)
        if arguments.rule is not None:
            show_rules(arguments)
        else:
            show_step(arguments)
        if arguments.png is not None:
            print(f"\nmask drawn in {arguments.png}")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def show_step(arguments: argparse.Namespace) -> None:
    """Print one step of a recipe, and draw its mask with --png."""
    config = load_recipe(arguments.recipe, arguments.overrides)
    state = _checkpoint_state(arguments.manifest, arguments.stage)
    step = int(state["next_step"]) if state else arguments.step
    shown = load_step(config, arguments.stage, step=step, state=state)
    print("\n".join(describe(shown, num_samples=arguments.samples)))
    if arguments.png is not None:
        draw_mask(shown, arguments.png, num_samples=arguments.samples)


def show_rules(arguments: argparse.Namespace) -> None:
    """Print --rule over --pack, and draw it with --png."""
    from cocoa_dist.attention import compile_plan

    samples = parse_pack(arguments.pack)
    options = _options(arguments.option)
    asked = ALL_RULES if arguments.rule == "all" else ((arguments.rule, options),)
    pictures = []
    for name, chosen in asked:
        plan = compile_plan(samples, attention_rule(name, **chosen))
        share = 100 * plan.visible_area / plan.num_tokens**2
        words = ", ".join(f"{key}={str(value).lower()}" for key, value in chosen.items())
        about = f"{words}{', ' if words else ''}{share:.0f} % of all pairs"
        pictures.append(Picture(name, about, plan, samples))
        print(f"{name} {words}".rstrip())
        print(f"  pack        {arguments.pack}: {plan.num_tokens} tokens, {len(samples)} samples")
        print(f"  visible     {plan.visible_area} of {plan.num_tokens**2} pairs, {share:.1f} %")
        print("\n".join(text_lines(plan, samples)), end="\n\n")
    if arguments.png is not None:
        draw(pictures, arguments.png, columns=min(4, len(pictures)))


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
            state=state,
        )
        assignment = loader.plan.step(step, 1)
        batch = loader.next_step()
        loader.close()
    blend = config.stages[stage].data.blend
    readers = {name: ShardReader(resolve_path(blend[name].path)) for name in set(batch.datasets)}
    maker = _RowMaker(config, stage, readers, vocabulary, geometry)
    rows = maker.rows(assignment.ranks[0][0], assignment.datasets)
    for reader in readers.values():
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
        readers: Mapping[str, "ShardReader"],
        vocabulary: "Vocabulary",
        geometry: "ImageGeometry",
    ) -> None:
        from cocoa_dist.data.samples import view_settings

        self._view = config.stages[stage].data.view
        self._seed, self._stage = config.seed, stage
        self._readers, self._vocabulary = readers, vocabulary
        self._data = config.stages[stage].data
        self._settings = replace(
            view_settings(config.data, geometry=geometry, stage=self._data, training=True),
            scored=config.stages[stage].reads_scores,
        )

    def rows(self, slots: Sequence["Slot"], datasets: Sequence[str]) -> tuple[Row, ...]:
        """Return the samples in the order of the pack; `datasets` are of the step's positions."""
        rows: list[Row] = []
        for slot in slots:
            name = datasets[slot.position]
            reader = self._readers[name]
            key, sizes = reader.key(slot.record), reader.image_sizes(slot.record)
            for sample in self._samples(slot, name):
                rows.append(Row(sample, rows[-1].stop if rows else 0, key, name, sizes))
        return tuple(rows)

    def _samples(self, slot: "Slot", dataset: str) -> tuple["Sample", ...]:
        from cocoa_dist.data.samples import draw_for, fillers, view_samples

        stream = f"{self._stage}/{dataset}"
        draw = draw_for(self._seed, stream, slot.passes, slot.record)
        settings = replace(self._settings, instruction=self._data.instruction_of(dataset))
        try:
            record = self._readers[dataset].record(slot.record)
        except ValueError:
            return fillers(self._view, self._vocabulary, settings)
        return view_samples(
            self._view, record, draw=draw, vocabulary=self._vocabulary, settings=settings
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
        f"  records   {_origin(batch)}, digest {batch.digest}",
        f"  packs     {len(batch.packs)}, {batch.num_samples} samples, {batch.num_tokens} tokens",
        f"  fill      {100 * batch.fill_ratio:.1f} % of {shown.config.data.tokens_per_pack} a pack",
        f"  texts cut {batch.num_truncated}",
        f"  attention {attention.rule} {attention.options() or ''}".rstrip(),
        f"  pack 1    {pack.num_tokens} tokens, {len(pack.pixel_values)} patches, "
        f"{pack.plan.visible_area} visible pairs",
        *(f"  left out  {fault}" for fault in batch.bad_records),
    ]
    for number, row in enumerate(shown.rows[:num_samples], start=1):
        lines += ["", *_sample_lines(shown, row, number)]
        lines += text_lines(*_part(shown, [row]))
    return lines


def _origin(batch: "StepBatch") -> str:
    """Say which data sets the records come from; by block where there are several."""
    if len(set(batch.datasets)) == 1:
        return f"{len(batch.record_ids)} of '{batch.dataset}'"
    blocks = ", ".join(f"{count} of '{name}'" for name, count in batch.blocks)
    return f"{len(batch.record_ids)} ({blocks})"


def _sample_lines(shown: Shown, row: Row, number: int) -> list[str]:
    pack = shown.pack
    ids = pack.input_ids[row.start : row.stop].tolist()
    labels = [
        (int(at) - row.start, _word(shown, int(label)))
        for at, label in zip(pack.label_rows, pack.labels, strict=True)
        if row.start <= at < row.stop
    ]
    patches = int(((pack.patch_rows >= row.start) & (pack.patch_rows < row.stop)).sum())
    of = f" of '{row.dataset}'" if len(set(shown.batch.datasets)) > 1 else ""
    names = f"record {row.key}{of}" + (" (could not be used)" if row.sample.is_filler else "")
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


def draw_mask(shown: Shown, path: Path, *, num_samples: int) -> None:
    """Draw the mask of the first samples of the pack as a PNG, coloured by the role seen."""
    rows = shown.rows[:num_samples]
    plan, samples = _part(shown, rows)
    ids = shown.pack.input_ids[: rows[-1].stop].tolist()
    words = tuple(_word(shown, int(token)) for token in ids)
    title = f"{shown.config.name}, {shown.stage}, step {shown.batch.step}"
    rule = shown.config.stages[shown.stage].attention
    about = f"{rule.rule}, samples 1 to {len(rows)} of {len(shown.rows)} in pack 1"
    draw([Picture(title, about, plan, samples, words)], path)


def _part(shown: Shown, rows: Sequence[Row]) -> tuple["AttentionPlan", list[list[Segment]]]:
    """Return the plan of the pack cut down to samples that follow each other, and their segments.

    Taken from the pack's own plan, not compiled anew: what is drawn is what the kernels run.
    """
    first, last = rows[0].start, rows[-1].stop
    plan = shown.pack.plan
    lo, hi = (bound[:, first:last] - first for bound in (plan.lo, plan.hi))
    empty = plan.lo[:, first:last] >= plan.hi[:, first:last]
    part = replace(
        plan,
        num_tokens=last - first,
        lo=lo.masked_fill(empty, 0),
        hi=hi.masked_fill(empty, 0),
    )
    return part, [row.segments(row.start - first) for row in rows]


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


def _options(words: Sequence[str]) -> dict[str, bool]:
    """Read `name=true`. Raises ValueError for anything else."""
    found = {}
    for word in words:
        name, _, value = word.partition("=")
        if value.lower() not in ("true", "false"):
            raise ValueError(f"--option {word}: expected NAME=true or NAME=false")
        found[name] = value.lower() == "true"
    return found


def _check_arguments(arguments: argparse.Namespace) -> None:
    """Raise ValueError for a mixture of the two ways to use the tool."""
    if arguments.samples < 1:
        raise ValueError(f"--samples is {arguments.samples}, expected at least 1")
    if arguments.rule is None:
        if arguments.recipe is None or arguments.stage is None:
            raise ValueError("needed: a recipe with --stage, or --rule with --pack (see --help)")
        if arguments.pack or arguments.option:
            raise ValueError("--pack and --option belong to --rule; a recipe has its own")
        return
    if arguments.recipe is not None or arguments.stage is not None:
        raise ValueError("--rule draws without data: leave out the recipe and --stage")
    if not arguments.pack:
        raise ValueError('--rule needs a --pack to draw it over, such as "C6 B1 T4 | C3 B1 T5"')
    if arguments.rule == "all" and arguments.option:
        raise ValueError("--rule all draws every option; leave out --option")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="?", help="name of a recipe, or path of a .yaml file")
    parser.add_argument("overrides", nargs="*", metavar="a.b.c=value", help="change the recipe")
    parser.add_argument("--stage", help="which stage of the recipe")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, default=1, help="step of the stage (default 1)")
    which.add_argument("--manifest", type=Path, help="checkpoint folder: show what comes next")
    parser.add_argument("--samples", type=int, default=3, help="how many samples (default 3)")
    parser.add_argument("--rule", help="draw this rule, or all, over --pack instead of a batch")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=true|false")
    parser.add_argument("--pack", metavar="'C6 B1 T4 | ...'", help="segments for --rule")
    parser.add_argument("--png", type=Path, help="draw the mask there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
