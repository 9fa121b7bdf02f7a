"""Kinds of values that fields of a recipe have, and the base of every group of fields."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Strict(BaseModel):
    """A group of fields: frozen, and an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Ratio = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
StageName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]  # also names a folder
