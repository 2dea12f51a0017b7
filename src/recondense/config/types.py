"""The types of settings. Strings are not accepted as numbers, nor numbers as booleans, and every number is finite.

The `description` of a type is appended to the limit in messages.
"""

from __future__ import annotations

import os
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, AllowInfNan, BeforeValidator, ByteSize, Field, Strict, TypeAdapter

from recondense.errors import UserError

SMALLEST_SCRATCH = 16 * 2**20
BYTES = TypeAdapter(ByteSize)


def parse_bytes(text: int | str) -> int:
    """Parse a number of bytes such as 1048576, "512MiB" or "2 GB".

    Raises:
        UserError: the text is neither a number nor a number with a unit.
    """
    try:
        if isinstance(text, bool):
            raise ValueError
        return int(BYTES.validate_python(text))
    except (ValueError, OverflowError):
        raise UserError(f"{text!r} is not a number of bytes: write 536870912, 512MiB or 2GB") from None


def ends_of(share: float | tuple[float, float]) -> tuple[float, float]:
    """Return a loss's share in the first and in the last step."""
    return share if isinstance(share, tuple) else (share, share)


def _enough_scratch(size: int) -> int:
    if size < SMALLEST_SCRATCH:
        raise ValueError(f"must be at least 16MiB ({SMALLEST_SCRATCH} bytes), or auto")
    return size


def _storable(number: int) -> int:
    if abs(number) >= 2**63:
        raise ValueError("is too large, beyond 64 bits")
    return number


Part = Literal["experts", "routers", "norms", "attention", "all", "lora"]  # of a model, which a recovery trains
PARTS: tuple[str, ...] = get_args(Part)


def _canonical(parts: str | tuple[str, ...]) -> str | tuple[str, ...]:
    """Return the parts in the order of PARTS; a single one as a word, so that a list of one is the same setting."""
    if isinstance(parts, str):
        return parts
    if not parts:
        raise ValueError(f"name at least one part: {', '.join(PARTS)}")
    if repeated := [part for part in PARTS if parts.count(part) > 1]:
        raise ValueError(f"{repeated[0]} is named twice. Name each part once")
    if "all" in parts and len(parts) > 1:
        raise ValueError("all already includes every other part. Use all alone, or leave it out")
    ordered = tuple(part for part in PARTS if part in parts)
    return ordered[0] if len(ordered) == 1 else ordered


Whole = Annotated[int, Strict(), AfterValidator(_storable)]
Number = Annotated[float, Strict(), AllowInfNan(False)]
Switch = Annotated[bool, Strict()]

Count = Annotated[Whole, Field(ge=1)]
FromZero = Annotated[Whole, Field(ge=0)]
Seed = Annotated[Whole, Field(ge=0, le=2**32 - 1)]  # what every random generator takes
Positive = Annotated[Number, Field(gt=0)]
NotNegative = Annotated[Number, Field(ge=0)]
BelowOne = Annotated[Number, Field(ge=0, lt=1)]
Share = Annotated[Number, Field(ge=0, le=1, description="it is a share of the loss")]
Shares = Share | tuple[Share, Share]  # constant, or from the first to the last step of a training
LocalPath = Annotated[str, AfterValidator(os.path.expanduser)]  # or a hub id, which is not changed
Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(gt=0)]
ScratchBytes = Annotated[int, BeforeValidator(parse_bytes), AfterValidator(_enough_scratch)]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="write auto, cpu, cuda or cuda:N")]
Devices = Annotated[
    Count | Literal["auto"], Field(description="it is the number of processes on each machine; auto: one per GPU")
]
Trainable = Annotated[Part | tuple[Part, ...], AfterValidator(_canonical)]
Repository = Annotated[
    str,
    Field(pattern=r"^[\w.-]+/[\w.-]+$", description="is not a repository of the hub; write owner/name, or null"),
]
