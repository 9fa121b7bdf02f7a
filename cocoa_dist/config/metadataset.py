"""A blend as energon's users have it, a metadataset of version 2, as the parts of a stage's data.

Read without energon, so that a login node can do it; the loader lets energon itself read the same
file and compares. What our plan cannot keep is refused by name, with what to do instead.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from cocoa_dist.config.errors import ConfigError, nearest
from cocoa_dist.config.files import read_mapping

SPLIT = "train"  # the only one that a stage reads
NAME_KEY = "source"  # among a reference's subflavors: what the data set is called
_BLENDS = {"blend": "weight", "blend_epochized": "repetitions"}
_REFERENCE_KEYS = ("path", "split_part", "subflavors", "subset")
_REFUSED = {
    "join": "rows of several data sets as one record: join them when the shards are built",
    "joiner": "rows of several data sets as one record: join them when the shards are built",
    "aux": "files beside the shards: put what a record needs into its shard",
    "dataset_config": "another reader: Arrow shards are read by their own",
    "split_config": "parts of a data set: build each part as a data set of its own",
}


@dataclass(frozen=True)
class _Parent:
    """What the references above a data set say of it."""

    share: float = 1.0  # of its first records
    weight: float = 1.0
    subflavors: Mapping[str, Any] | None = None
    kind: str | None = None  # the kind of blend it is in


def read_metadataset(path: Path) -> dict[str, dict[str, Any]]:
    """Return the data sets of a blend by name, as fields of BlendPartConfig, in the file's order.

    Weights of `blend` are shares of the whole; nested blends and relative paths are resolved.
    Raises ConfigError, naming file and key, for what a plan cannot keep.
    """
    parts: dict[str, dict[str, Any]] = {}
    for part in _of_file(path.expanduser().absolute(), above=_Parent(), seen=()):
        name = part_name(part.pop("subflavors"), part["path"])
        if name in parts:
            raise ConfigError(
                f"{path}: {parts[name]['path']} and {part['path']} are both called '{name}', and a "
                f"checkpoint could not tell where each stands: give `subflavors: {{{NAME_KEY}: "
                "NAME}` in the blend, or give one data set once with the sum of its weights"
            )
        parts[name] = part
    return parts


def part_name(subflavors: Mapping[str, Any] | None, path: str) -> str:
    """Return what a data set of a blend is called: its subflavor `source`, or its folder."""
    return str((subflavors or {}).get(NAME_KEY) or PurePosixPath(path).name)


def _of_file(path: Path, *, above: _Parent, seen: Sequence[Path]) -> list[dict[str, Any]]:
    if path in seen:
        raise ConfigError(f"{path} holds itself: {' -> '.join(p.name for p in (*seen, path))}")
    tree = read_mapping(path, expected="a metadataset")
    kind = tree.get("__class__")
    if kind != "MetadatasetV2" or tree.get("__module__") != "megatron.energon":
        raise ConfigError(
            f"{path}: __module__ and __class__ are {tree.get('__module__')!r} and {kind!r}, "
            "expected 'megatron.energon' and 'MetadatasetV2': write the blend in version 2"
        )
    splits = tree.get("splits")
    if not isinstance(splits, dict) or SPLIT not in splits:
        have = ", ".join(map(str, splits)) if isinstance(splits, dict) else "none"
        raise ConfigError(f"{path}: no split '{SPLIT}' (has: {have}), which is what a stage reads")
    where = _Where(path, f"splits.{SPLIT}", (*seen, path))
    return _of_node(splits[SPLIT], where, above=above)


@dataclass(frozen=True)
class _Where:
    """A place in a metadataset, for messages."""

    file: Path
    key: str
    seen: tuple[Path, ...]

    def __str__(self) -> str:
        return f"{self.file}: {self.key}"

    def at(self, key: str | int) -> "_Where":
        word = f"[{key}]" if isinstance(key, int) else f".{key}"
        return _Where(self.file, self.key + word, self.seen)


def _of_node(node: Any, where: _Where, *, above: _Parent) -> list[dict[str, Any]]:
    """Return the data sets of a split: a blend, or a single reference."""
    tree = _mapping(node, where)
    kinds = [kind for kind in _BLENDS if kind in tree]
    if not kinds:
        return _of_reference(tree, where, above=above, factor=None)
    kind = kinds[0]
    _check_keys(tree, where, known=(kind, "subset"))
    if above.kind not in (None, kind):
        raise ConfigError(f"{where}: {kind} inside of {above.kind}: one kind of blend for all")
    inner = _inside(above, _subset(tree, where, parent=above, leaf=False), kind=kind)
    items = tree[kind]
    if not isinstance(items, list) or not items:
        raise ConfigError(f"{where}.{kind}: expected a list of data sets, found {items!r}")
    references = [_mapping(item, where.at(kind).at(i)) for i, item in enumerate(items)]
    factors = [
        _number(item.get(_BLENDS[kind], 1.0), where.at(kind).at(i).at(_BLENDS[kind]))
        for i, item in enumerate(references)
    ]
    whole = sum(factors) if kind == "blend" else 1.0
    found = []
    for i, (item, factor) in enumerate(zip(references, factors, strict=True)):
        plain = {key: value for key, value in item.items() if key != _BLENDS[kind]}
        found += _of_reference(plain, where.at(kind).at(i), above=inner, factor=factor / whole)
    return found


def _of_reference(
    tree: Mapping[str, Any], where: _Where, *, above: _Parent, factor: float | None
) -> list[dict[str, Any]]:
    """Return the data set that a reference names, or those of the nested metadataset."""
    _check_keys(tree, where, known=(*_REFERENCE_KEYS, "shuffle_over_epochs_multiplier"))
    path = tree.get("path")
    if not isinstance(path, str) or not path:
        raise ConfigError(f"{where}.path: expected the path of a data set, found {path!r}")
    if tree.get("split_part") not in (None, SPLIT):
        raise ConfigError(
            f"{where}.split_part: found {tree['split_part']!r}; all records of a data set are of "
            f"'{SPLIT}': build the part as a data set of its own"
        )
    if tree.get("shuffle_over_epochs_multiplier", 1) != 1:
        raise ConfigError(
            f"{where}.shuffle_over_epochs_multiplier: found "
            f"{tree['shuffle_over_epochs_multiplier']!r}; every record comes once in a pass, the "
            "only value is 1"
        )
    own = _mapping(tree.get("subflavors") or {}, where.at("subflavors"))
    remote = "://" in path
    nested = path.endswith(".yaml")
    subset = _subset(tree, where, parent=above, leaf=not nested)
    subflavors = {**own, **(above.subflavors or {})}  # outer ones win, as in energon
    place = path if remote else os.path.normpath(where.file.parent / path)
    weight = above.weight * (1.0 if factor is None else factor)
    if nested:
        if remote:
            raise ConfigError(f"{where}.path: found '{path}'; a blend has to be a local file")
        inner = _Parent(subset.share, weight, subflavors, above.kind)
        return _of_file(Path(place), above=inner, seen=where.seen)
    if path.endswith(".jsonl"):
        raise ConfigError(
            f"{where}.path: found '{path}'; stages read Arrow shards: make some of it with "
            "tools/build_shards.py"
        )
    part = {"path": place, "subflavors": subflavors, "share": subset.share, "limit": subset.limit}
    if above.kind == "blend_epochized":
        return [{**part, "repetitions": weight}]
    return [{**part, "weight": weight}]


@dataclass(frozen=True)
class _Subset:
    share: float  # of the first records, or of `limit`
    limit: int | None = None


def _subset(tree: Mapping[str, Any], where: _Where, *, parent: _Parent, leaf: bool) -> _Subset:
    """Return which of the first records a `subset` leaves, those above included."""
    given = tree.get("subset")
    if given is None:
        return _Subset(parent.share)
    bounds = _mapping(given, where.at("subset")).get("range")
    place = f"{where}.subset.range"
    if not isinstance(bounds, list) or len(bounds) != 2:
        raise ConfigError(f"{place}: found {bounds!r}, expected two numbers or percentages")
    begin, end = bounds
    if begin not in (0, "0%"):
        raise ConfigError(
            f"{place}: found {bounds!r}; a part must begin at the first record: build what it "
            "leaves out as a data set of its own"
        )
    if begin == 0 and not leaf:
        raise ConfigError(f"{place}: found {bounds!r}; around other data sets give percentages")
    if begin == 0 and (end == "end" or (isinstance(end, int) and end > 0)):
        return _Subset(parent.share, None if end == "end" else end)
    share = _percentage(end) if begin == "0%" else None
    if share is None:
        raise ConfigError(f"{place}: found {bounds!r}, expected [0%, N%], [0, N] or [0, end]")
    return _Subset(parent.share * share)


def _percentage(text: Any) -> float | None:
    """Return `N%` as a share above 0, None for anything else."""
    try:
        share = float(str(text).removesuffix("%")) / 100.0
    except ValueError:
        return None
    return share if str(text).endswith("%") and 0.0 < share <= 1.0 else None


def _inside(above: _Parent, subset: _Subset, *, kind: str) -> _Parent:
    return _Parent(subset.share, above.weight, above.subflavors, kind)


def _number(value: Any, where: _Where) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if not 0.0 < number < float("inf"):
        raise ConfigError(f"{where}: found {value!r}, expected a number above 0")
    return number


def _mapping(node: Any, where: _Where) -> dict[str, Any]:
    if not isinstance(node, dict):
        raise ConfigError(f"{where}: found {node!r}, expected keys and values")
    return node


def _check_keys(tree: Mapping[str, Any], where: _Where, *, known: Sequence[str]) -> None:
    for key in tree:
        if key in known:
            continue
        if key in _REFUSED and tree[key] is not None:
            raise ConfigError(f"{where}.{key}: a plan cannot have {_REFUSED[key]}")
        if key not in _REFUSED:
            raise ConfigError(f"{where}.{key}: unknown key{nearest(str(key), known)}")
