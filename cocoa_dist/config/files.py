"""YAML files of people: read safely, or refused by name."""

from pathlib import Path
from typing import Any

import yaml

from cocoa_dist.config.errors import ConfigError


def read_mapping(path: Path, *, expected: str = "keys and values") -> dict[str, Any]:
    """Return what a YAML file holds. Raises ConfigError if it is none, or not `expected`."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds {type(tree).__name__}, expected {expected}")
    return tree
