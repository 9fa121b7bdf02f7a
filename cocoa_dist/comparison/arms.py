"""What is compared: the arms of a preset, each a recipe, and the variants asked for of each.

A preset is a YAML file: data, no code. Reads and resolves recipes; knows nothing of budgets.
"""

import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError, model_validator

from cocoa_dist.config import ConfigError, RunConfig, SourceConfig, load_recipe
from cocoa_dist.config.errors import nearest
from cocoa_dist.config.fields import Positive, Strict

PRESET_DIR = Path(__file__).resolve().parent / "presets"
CONTRASTIVE_KIND = "contrastive"
Value = float | int | str | bool | None


class ArmSpec(Strict):
    """One arm: what it is in words, and its recipe (`extends`, as in a file of its own)."""

    about: str
    recipe: dict[str, Any]


class AblationSpec(Strict):
    """Values of one key of the recipes of some arms; without a key, the arms as they are."""

    about: str
    arms: Annotated[tuple[str, ...], Field(min_length=1)]
    key: str | None = None
    values: tuple[Value, ...] = ()

    @model_validator(mode="after")
    def _values_belong_to_a_key(self) -> "AblationSpec":
        if bool(self.values) != (self.key is not None):
            raise ValueError("an ablation has a key and values for it, or neither")
        return self


class Preset(Strict):
    """A list of arms, what they are compared with, and what scores them."""

    control: str  # the arm that the others' differences are taken to
    reference: str  # the arm whose steps, as its recipe has them, are the budget
    held_out: Annotated[dict[str, SourceConfig], Field(min_length=1)]  # scored, never chosen by
    validation: dict[str, SourceConfig]  # settings may be chosen by these alone
    curve_every_steps: Positive  # validation retrieval while a stage trains
    pilot_steps: Annotated[int, Field(ge=6)]  # optimizer steps that measure what a stage's cost
    pilot_rounds: Positive = 2  # over all stages in turn: a machine is not equally busy all day
    arms: Annotated[dict[str, ArmSpec], Field(min_length=1)]
    ablations: dict[str, AblationSpec] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _names_are_arms(self) -> "Preset":
        named: dict[str, tuple[str, ...]] = {
            "control": (self.control,),
            "reference": (self.reference,),
        }
        named |= {f"ablations.{key}": found.arms for key, found in self.ablations.items()}
        for where, names in named.items():
            for name in names:
                if name not in self.arms:
                    raise ValueError(
                        f"{where}: '{name}' is not an arm{nearest(name, list(self.arms))} "
                        f"(have: {', '.join(self.arms)})"
                    )
        both = self.held_out.keys() & self.validation.keys()
        if both:
            raise ValueError(
                f"{sorted(both)} in held_out and in validation: a set that settings are chosen by "
                "gives no result"
            )
        for name in self.arms:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_]*", name):
                raise ValueError(f"arms: '{name}' names folders: letters, digits and _ alone")
        return self


@dataclass(frozen=True)
class Variant:
    """One row of the table: an arm at a factor of its reconstruction steps, maybe ablated.

    `config` has seed 0, the factor's reconstruction steps and the recipe's contrastive ones.
    """

    arm: str
    about: str
    factor: float
    ablation: str | None
    value: Value
    config: RunConfig

    @property
    def label(self) -> str:
        """Name within its group (all variants of one factor)."""
        return self.arm if self.ablation is None else f"{self.arm}-{self.ablation}-{self._value}"

    @property
    def name(self) -> str:
        """Name among all variants; names folders."""
        return self.label if self.factor == 1.0 else f"{self.label}-{self.factor:g}x"

    @property
    def _value(self) -> str:
        text = "all" if self.value is None else str(self.value)
        return re.sub(r"[^A-Za-z0-9_.]", "_", text)


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(path.stem for path in PRESET_DIR.glob("*.yaml"))


def preset_path(name_or_path: str) -> Path:
    """Return the file of a preset. Raises ConfigError with near names if there is none."""
    named, given = PRESET_DIR / f"{name_or_path}.yaml", Path(name_or_path)
    if named.is_file():
        return named
    if given.suffix in (".yaml", ".yml") and given.is_file():
        return given
    names = preset_names()
    raise ConfigError(
        f"unknown preset '{name_or_path}'{nearest(name_or_path, names)}; "
        f"have: {', '.join(names)}, or the path of a .yaml file"
    )


def read_preset(name_or_path: str) -> Preset:
    """Read a preset by name or path. Raises ConfigError naming every fault."""
    path = preset_path(name_or_path)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"preset {path} cannot be read: {error}") from error
    try:
        return Preset.model_validate(tree)
    except ValidationError as error:
        faults = [
            f"  {'.'.join(map(str, item['loc'])) or 'preset'}: {item['msg']}"
            for item in error.errors()
        ]
        raise ConfigError("\n".join([f"preset {path}:", *faults])) from None


def list_variants(
    preset: Preset,
    *,
    arms: Sequence[str] = (),
    factors: Sequence[float] = (1.0,),
    ablations: Sequence[str] = (),
) -> list[Variant]:
    """Return the rows asked for, the control first in every group.

    Without ablations: the arms (default: all). With them: their values for those of their arms
    that are among `arms`. Raises ConfigError for an unknown name or a recipe that is none.
    """
    for name in arms:
        _check_known(name, have=list(preset.arms), what="arm")
    chosen: list[tuple[str, str | None, Value]] = []
    if not ablations:
        chosen = [(name, None, None) for name in arms or preset.arms]
    for name in ablations:
        _check_known(name, have=list(preset.ablations), what="ablation")
        spec = preset.ablations[name]
        own = [arm for arm in spec.arms if not arms or arm in arms]
        if not own:
            raise ConfigError(
                f"ablation '{name}' is of {', '.join(spec.arms)}, none of which is among the arms "
                f"asked for ({', '.join(arms)})"
            )
        if spec.key is None:
            chosen += [(arm, None, None) for arm in own]
        chosen += [(arm, name, value) for arm in own for value in spec.values]
    rows = [(preset.control, None, None), *chosen]
    return [
        resolve(preset, arm, factor=factor, ablation=ablation, value=value)
        for factor in factors
        for arm, ablation, value in dict.fromkeys(rows)
    ]


def resolve(
    preset: Preset,
    arm: str,
    *,
    factor: float = 1.0,
    ablation: str | None = None,
    value: Value = None,
) -> Variant:
    """Resolve the recipe of one row. Raises ConfigError that names the arm."""
    spec = preset.arms[arm]
    overrides = []
    about = spec.about
    if ablation is not None:
        key = preset.ablations[ablation].key
        overrides.append(f"{key}={json.dumps(value)}")
        about = f"{about}; {key} = {'all' if value is None else value}"
    try:
        config = _load(spec.recipe, overrides)
        stage_of_pairs(config)
    except ConfigError as error:
        raise ConfigError(f"arm '{arm}': {error}") from None
    variant = Variant(arm, about, factor, ablation, value, config)
    tree = config.model_dump(mode="json")
    tree["name"], tree["seed"] = variant.name, 0
    for name in reconstruction_stages(config):
        tree["stages"][name]["steps"] = max(1, round(config.stages[name].steps * factor))
    tree["evaluation"] |= {
        "sets": {name: source.model_dump() for name, source in preset.validation.items()},
        "every_steps": preset.curve_every_steps if preset.validation else 0,
    }
    config = with_warm_up_inside(tree)
    return Variant(arm, about, factor, ablation, value, config)


def with_warm_up_inside(tree: dict[str, Any]) -> RunConfig:
    """Check a tree whose steps were changed; a warm-up longer than its stage is cut to it."""
    for stage in tree["stages"].values():
        optimizer = stage["optimizer"]
        optimizer["warmup_steps"] = min(optimizer["warmup_steps"], stage["steps"])
    return RunConfig.model_validate(tree)


def stage_of_pairs(config: RunConfig) -> str:
    """Return the contrastive stage, the last one. Raises ConfigError if the last is another."""
    name, stage = list(config.stages.items())[-1]
    if stage.objective.kind != CONTRASTIVE_KIND:
        raise ConfigError(
            f"its last stage '{name}' has objective {stage.objective.kind}; a comparison scores "
            "what a contrastive stage leaves: make that the last stage"
        )
    return name


def reconstruction_stages(config: RunConfig) -> list[str]:
    """Return the stages before the last one."""
    return list(config.stages)[:-1]


def _check_known(name: str, *, have: Sequence[str], what: str) -> None:
    if name not in have:
        raise ConfigError(
            f"unknown {what} '{name}'{nearest(name, have)} (have: {', '.join(have) or 'none'})"
        )


def _load(recipe: dict[str, Any], overrides: Sequence[str]) -> RunConfig:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "arm.yaml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        try:
            return load_recipe(str(path), overrides)
        except ConfigError as error:
            raise ConfigError(str(error).replace(f"recipe {path}", "its recipe")) from None
