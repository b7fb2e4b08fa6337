"""The settings of `autoquant equalize`."""

from typing import Annotated, ClassVar

from pydantic import Field, field_validator

from autoquant.equalize.sites import Part
from autoquant.run.config.parts import TextConfig
from autoquant.run.config.setting import Setting
from autoquant.run.config.types import Folder, Names


class EqualizeConfig(TextConfig):
    """Which channels of a model are brought nearer to each other, and how far."""

    command: ClassVar[str] = "equalize"

    strength: Annotated[
        float,
        Field(gt=0, le=1),
        Setting(
            "Search",
            "How much of a channel's distance from the others is taken away: 1 makes all of one "
            "size, to the nearest power of two.",
            "X",
        ),
    ] = 0.5
    parts: Annotated[
        Names | None,
        Setting(
            "Search",
            "Whose inputs: attention, feed-forward (its router reads them too), down.",
            "PART[,...]",
            unset="all of them",
        ),
    ] = None
    out: Annotated[Folder, Setting("Output", "New folder for the copy.", "DIR", is_saved=False)]

    @field_validator("parts")
    @classmethod
    def _require_known(cls, parts: tuple[str, ...] | None) -> tuple[str, ...] | None:
        unknown = [name for name in parts or () if name not in [*Part]]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is none of {', '.join(Part)}")
        return parts
