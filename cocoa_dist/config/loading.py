"""The whole run as one frozen, typed tree: load a recipe, apply overrides, dump, fingerprint.

Order of precedence: defaults of the schema, then the recipe (and what it extends), then
`a.b.c=value` from the command line; nothing else, no environment variables. Imports neither torch
nor anything else that is slow, so that a login node can check a recipe in well under a second.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from cocoa_dist.config.errors import ConfigError, explain, nearest
from cocoa_dist.config.files import read_mapping
from cocoa_dist.config.metadataset import read_metadataset
from cocoa_dist.config.schema import RunConfig

PACKAGE_DIR = Path(__file__).resolve().parents[1]
RECIPE_DIR = PACKAGE_DIR / "recipes"
ASSET_DIR = PACKAGE_DIR / "assets"
REMOTE_SCHEME = "msc:/"  # of a data set in an object store

# Keys that change neither the numbers nor the order of a run: free to differ at a resume.
_FREE_KEYS = (
    "data.on_change",
    "data.num_workers",
    "data.log_sample_ids",
    "data.bad_record_limit",
    "data.image.cache_bytes",
    "engine.timeout_seconds",
    "engine.resident_parameters",
    "guards",
    "checkpoint",
    "metrics",
    "evaluation",
    "export",
    "runtime.profile_steps",
    "budget_gpu_hours",
)
# What a new segment of the plan takes up. Not data.shuffle: another order in the middle of a pass
# would repeat records and lose others.
_ORDER_KEY = re.compile(
    r"data\.left_out|"
    r"stages\.[^.]+\.(batch_size|data\.task_block|data\.(sources|metadataset)(\..*)?)"
)
_FREE_KEY = re.compile(r"stages\.[^.]+\.data\.metadataset\.path")  # what it says counts


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Load a recipe by name (cocoa_dist/recipes/NAME.yaml) or path and apply `a.b.c=value`.

    Raises ConfigError naming the key, what was found, and the nearest known key.
    """
    tree = _read_with_parents(recipe_path(name_or_path), seen=())
    for override in overrides:
        _apply_override(tree, override)
    _read_metadatasets(tree)
    return parse_config(tree, source=name_or_path)


def recipe_path(name_or_path: str) -> Path:
    """Return the file of a recipe. Raises ConfigError with near names if there is none."""
    named = RECIPE_DIR / f"{name_or_path}.yaml"
    if named.is_file():
        return named
    path = Path(name_or_path)
    if path.suffix in {".yaml", ".yml"} and path.is_file():
        return path
    if path.suffix in {".yaml", ".yml"}:
        raise ConfigError(f"recipe file {path} does not exist")
    names = recipe_names()
    raise ConfigError(
        f"unknown recipe '{name_or_path}'{nearest(name_or_path, names)}; "
        f"have: {', '.join(names)}, or the path of a .yaml file"
    )


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPE_DIR.glob("*.yaml"))


def parse_config(tree: Mapping[str, Any], *, source: str) -> RunConfig:
    """Check a resolved tree. Raises ConfigError with every fault on a line of its own."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        faults = "\n".join(f"  {explain(item, root=RunConfig)}" for item in error.errors())
        raise ConfigError(f"recipe {source}:\n{faults}") from None


def load_resolved(path: Path) -> RunConfig:
    """Read a `resolved.yaml` of a run folder."""
    return parse_config(_read_yaml(path), source=str(path))


def dump_yaml(config: RunConfig) -> str:
    """Return the resolved tree as YAML; `load_resolved` reads it back to an equal config."""
    tree = config.model_dump(mode="json")
    return str(yaml.safe_dump(tree, sort_keys=False, width=100, allow_unicode=True))


def fingerprint(config: RunConfig) -> str:
    """Return sha256 (hex) over everything that decides the numbers and the order of a run."""
    tree: dict[str, Any] = {k: v for k, v in flatten(config).items() if not _is_free(k)}
    tree["order of stages"] = list(config.stages)
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def differences(old: RunConfig, new: RunConfig, *, free: bool) -> list[str]:
    """List `key: old -> new`; those safe to change at a resume if `free`, else the others.

    Sources, batch sizes and what is left out are safe if `new` says `data.on_change=continue`.
    """
    left, right = flatten(old), flatten(new)
    goes_on = new.data.on_change == "continue"

    def is_free(key: str) -> bool:
        return _is_free(key) or (goes_on and _ORDER_KEY.fullmatch(key) is not None)

    keys = [k for k in {**left, **right} if left.get(k) != right.get(k) and is_free(k) == free]
    lines = [f"{key}: {left.get(key)!r} -> {right.get(key)!r}" for key in keys]
    before, after = list(old.stages), list(new.stages)
    if not free and before != after and set(before) == set(after):
        lines.append(f"order of stages: {before} -> {after}")
    return lines


def flatten(config: RunConfig) -> dict[str, Any]:
    """Return the tree as dotted keys and plain values."""
    flat: dict[str, Any] = {}

    def walk(value: Any, prefix: str) -> None:
        if isinstance(value, dict) and value:
            for key, item in value.items():
                walk(item, f"{prefix}.{key}" if prefix else str(key))
        else:
            flat[prefix] = value

    walk(config.model_dump(mode="json"), "")
    return flat


def is_remote(path: str | Path) -> bool:
    """Tell whether a data set lies in an object store: `msc://PROFILE/BUCKET/FOLDER`.

    Also as a Path, which keeps one of the two slashes.
    """
    return str(path).startswith(REMOTE_SCHEME)


def resolve_path(text: str) -> Path:
    """Return the path of a recipe's `path` value: `asset:NAME` lies inside the package."""
    if text.startswith("asset:"):
        return ASSET_DIR / text.removeprefix("asset:")
    return Path(text).expanduser()


def _read_metadatasets(tree: dict[str, Any]) -> None:
    """Put in place of every stage's metadataset, where it is a path, what the file says now.

    The resolved recipe has the parts: ranks, and later starts of a run, go by them.
    """
    for name, stage in tree.get("stages", {}).items():
        data = stage.get("data") if isinstance(stage, dict) else None
        if not isinstance(data, dict) or not isinstance(data.get("metadataset"), str):
            continue
        path = resolve_path(data["metadataset"]).absolute()
        try:
            parts = read_metadataset(path)
        except ConfigError as error:
            raise ConfigError(f"stages.{name}.data.metadataset: {error}") from None
        stage["data"] = {**data, "metadataset": {"path": str(path), "parts": parts}}


def _is_free(key: str) -> bool:
    named = any(key == free or key.startswith(free + ".") for free in _FREE_KEYS)
    return named or _FREE_KEY.fullmatch(key) is not None


def _read_yaml(path: Path) -> dict[str, Any]:
    return _unshared(read_mapping(path))


def _unshared(tree: dict[str, Any]) -> dict[str, Any]:
    """Copy a tree so that YAML aliases become values of their own: an override changes one."""
    return {k: _unshared(v) if isinstance(v, dict) else v for k, v in tree.items()}


def _read_with_parents(path: Path, *, seen: tuple[Path, ...]) -> dict[str, Any]:
    """Read a recipe and what it `extends`; a key set to null takes the parent's key away."""
    if path in seen:
        raise ConfigError(f"{path} extends itself: {' -> '.join(p.stem for p in (*seen, path))}")
    tree = _read_yaml(path)
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    base = _read_with_parents(recipe_path(str(parent)), seen=(*seen, path))
    return _merge(base, tree)


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override '{override}' is not of the form a.b.c=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override '{override}': the value is not YAML: {error}") from error
    *parents, last = key.split(".")
    node = tree
    for depth, part in enumerate(parents):
        if parents[:depth] == ["stages"] and part not in node:
            raise ConfigError(
                f"override '{override}': stage '{part}' is not in this recipe"
                f"{nearest(part, list(node))} (have: {', '.join(node)})"
            )
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise ConfigError(
                f"override '{override}': {'.'.join(parents[: depth + 1])} is a value, not a group"
            )
        node = child
    node[last] = value
