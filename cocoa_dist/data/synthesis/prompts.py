"""Prompts: YAML files that say what is asked about a picture, and what an answer must be like.

A prompt's version is the hash of all that is in it, so a changed word is another prompt.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cocoa_dist.config import ASSET_DIR

PROMPT_DIR = ASSET_DIR / "prompts"
Form = Literal["dialogue", "dialogue_in_turn", "records"]
_SLOT = re.compile(r"\{(caption|kinds|least|most|error)\}")
_REFUSALS = (
    r"^(i'm |i am )?(very |so |really )?sorry\b.{0,60}\b(can't|cannot|can not|unable|won't)",
    r"^(i|we) (can't|cannot|can not|won't|will not|am unable to|am not able to) "
    r"(assist|help|comply|describe|identify|provide|answer|discuss|fulfil|do that)",
    r"^as an ai\b",
)
_Positive = Annotated[int, Field(gt=0)]
_Text = Annotated[str, Field(min_length=1)]


class PromptFile(BaseModel):
    """What a prompt file holds. Texts may name {caption}, {kinds}, {least}, {most}, {error}."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    form: Form
    task: _Text  # of the records; those of form `records` add /KIND
    system: str = ""
    request: _Text  # said beside the picture
    answer_system: str = ""  # dialogue_in_turn: of the conversation that has the answers
    correction: _Text  # said after an answer that cannot be used
    caption: str = ""  # how a caption is passed on; "": it is not
    kinds: dict[str, str] = Field(default_factory=dict)  # form records: name, and what it is
    least: _Positive  # turns of a dialogue, or records of a picture
    most: _Positive
    max_question_characters: _Positive
    max_answer_characters: _Positive
    repeat_words: _Positive = 6  # shorter texts may recur: labels, names, a colour
    refusals: tuple[str, ...] = _REFUSALS  # patterns at the beginning of an answer, case ignored
    temperature: Annotated[float, Field(ge=0.0)]
    max_tokens: _Positive  # of one answer

    @model_validator(mode="after")
    def _fits(self) -> "PromptFile":
        if self.least > self.most:
            raise ValueError(f"least {self.least} is more than most {self.most}")
        if self.form == "records" and not self.least == self.most <= len(self.kinds):
            raise ValueError(
                f"form 'records' needs least == most <= the number of kinds: found {self.least}, "
                f"{self.most} and {len(self.kinds)}"
            )
        if self.form != "records" and self.kinds:
            raise ValueError(f"form '{self.form}' has no kinds")
        for pattern in self.refusals:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"refusals: {pattern!r} is no pattern: {error}") from error
        return self


@dataclass(frozen=True)
class Prompt:
    """A prompt with its name."""

    name: str
    file: PromptFile

    @property
    def version(self) -> str:
        """The first 12 hex digits of the sha256 over all that the file says."""
        text = json.dumps(self.file.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def filled(self, text: str, **slots: str) -> str:
        """Put words into {slots}, once: what is put in is left as it is. Drops empty lines."""
        known = {"least": str(self.file.least), "most": str(self.file.most), **slots}
        filled = _SLOT.sub(lambda slot: known.get(slot[1], ""), text)
        return "\n".join(line for line in filled.splitlines() if line.strip())

    def caption_line(self, caption: str) -> str:
        """Return how the prompt passes a caption on, "" if it does not or there is none."""
        shown = self.file.caption if caption else ""
        return self.filled(shown, caption=" ".join(caption.split()))

    def kinds_for(self, key: str) -> Mapping[str, str]:
        """Return the kinds that are asked for about the picture of a key: always the same ones."""
        digest = hashlib.blake2b(f"{self.version}/{key}".encode(), digest_size=16).digest()
        draw = np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype="<u8")))
        names = sorted(self.file.kinds)
        chosen = sorted(draw.permutation(len(names))[: self.file.most].tolist())
        return {names[place]: self.file.kinds[names[place]] for place in chosen}


def prompt_names() -> list[str]:
    """Names of the prompts that come with the package."""
    return sorted(path.stem for path in PROMPT_DIR.glob("*.yaml"))


def load_prompt(name_or_path: str) -> Prompt:
    """Load a prompt by name, or from a file. Raises ValueError saying what is wrong with it."""
    path = PROMPT_DIR / f"{name_or_path}.yaml"
    if not path.is_file():
        path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        raise ValueError(
            f"prompt '{name_or_path}' is unknown (have: {', '.join(prompt_names())}, or the path "
            "of a .yaml file)"
        )
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Prompt(path.stem, PromptFile.model_validate(tree))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"prompt {path} is not YAML: {error}") from error
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc'])) or 'file'}: {fault['msg']}"
            for fault in error.errors()
        )
        raise ValueError(f"prompt {path}: {faults}") from error
