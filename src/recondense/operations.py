"""The operations of a Plan: plain data, one frozen dataclass per kind, validated on construction.

Expert indices refer to the layer after all earlier operations of the plan. This module needs only the standard library.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

from recondense.errors import UserError

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")  # of an expert


@dataclass(frozen=True)
class Condense:
    """Replace a sparse MoE layer by its shared experts plus a few routed experts that are active for every token.

    y = g·Shared(x) + Σ_i coefficients_i · E_i(x)   (arXiv 2412.00069, section 3)

    Args:
        layer: decoder-layer index.
        experts: indices of the retained routed experts, in the order in which they were selected; may be empty.
        coefficients: the constant that replaces each retained expert's routing weight.
        shared_gate: the constant that replaces the shared experts' gate. None keeps the gate, if the model has one.
    """

    kind: ClassVar[str] = "condense"
    layer: int
    experts: tuple[int, ...]
    coefficients: tuple[float, ...]
    shared_gate: float | None = None

    def __post_init__(self) -> None:
        _check_layer(self.kind, self.layer)
        if len(self.experts) != len(self.coefficients):
            raise UserError(
                f"condense, layer {self.layer}: {len(self.experts)} experts but {len(self.coefficients)} coefficients"
            )
        _check_experts(self.kind, self.layer, self.experts)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Condense:
        shared_gate = data["shared_gate"]
        return cls(
            layer=int(data["layer"]),
            experts=tuple(int(expert) for expert in data["experts"]),
            coefficients=tuple(float(value) for value in data["coefficients"]),
            shared_gate=None if shared_gate is None else float(shared_gate),
        )


@dataclass(frozen=True)
class Prune:
    """Remove routed experts and their rows in the router.

    Args:
        layer: decoder-layer index.
        retained: indices of the retained experts, ascending.
    """

    kind: ClassVar[str] = "prune"
    layer: int
    retained: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_layer(self.kind, self.layer)
        _check_retained(self.kind, self.layer, self.retained)

    @classmethod
    def from_dropped(cls, layer: int, num_experts: int, dropped: Collection[int]) -> Prune:
        """Make the operation from the dropped experts of a layer with `num_experts` experts."""
        return cls(layer, tuple(expert for expert in range(num_experts) if expert not in dropped))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Prune:
        return cls(layer=int(data["layer"]), retained=_ints(data["retained"]))


@dataclass(frozen=True)
class Constant:
    """Replace routed experts by constants: the means of their outputs on the calibration set (arXiv 2507.00390).

    The router keeps its rows. A token that selects a replaced expert gets the constant times its routing weight.

    Args:
        layer: decoder-layer index.
        retained: indices of the experts that stay, ascending. The others become constants.
    """

    kind: ClassVar[str] = "constant"
    layer: int
    retained: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_layer(self.kind, self.layer)
        _check_retained(self.kind, self.layer, self.retained)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Constant:
        return cls(layer=int(data["layer"]), retained=_ints(data["retained"]))


@dataclass(frozen=True)
class Factorize:
    """Replace the projections of routed experts by products of two factors.

    Args:
        layer: decoder-layer index.
        ranks: for each projection, one rank per expert. None keeps that expert's projection dense.
        whitening: minimize the error on the calibration activations (arXiv 2403.07378). False uses the plain SVD.
    """

    kind: ClassVar[str] = "factorize"
    layer: int
    ranks: Mapping[str, tuple[int | None, ...]] = field(hash=False)
    whitening: bool = False

    def __post_init__(self) -> None:
        _check_layer(self.kind, self.layer)
        lengths = {name: len(self.ranks.get(name, ())) for name in PROJECTIONS}
        if set(self.ranks) != set(PROJECTIONS) or len(set(lengths.values())) != 1:
            raise UserError(
                f"factorize, layer {self.layer}: the numbers of ranks {lengths} must be equal for "
                f"{', '.join(PROJECTIONS)}"
            )
        too_low = [rank for ranks in self.ranks.values() for rank in ranks if rank is not None and rank < 1]
        if too_low:
            raise UserError(f"factorize, layer {self.layer}: ranks {too_low} must be at least 1 (null: dense)")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Factorize:
        ranks = {
            str(name): tuple(None if rank is None else int(rank) for rank in values)
            for name, values in data["ranks"].items()
        }
        return cls(layer=int(data["layer"]), ranks=ranks, whitening=bool(data["whitening"]))


@dataclass(frozen=True)
class Narrow:
    """Remove channels of routed experts: rows of gate_proj and up_proj, and the same columns of down_proj.

    If all experts of the layer keep equally many channels, the result is the family's own experts with a smaller width.
    The numbers may also differ.

    Args:
        layer: decoder-layer index.
        masks: for each expert, the retained channels as a hexadecimal number in lower case: bit c, counted from the
            lowest, is set if the expert keeps channel c. A list of channels would make a plan of a large model ten
            times as long.
        compensate: after the removal, solve for each expert's down_proj by least squares, so that its outputs on the
            calibration set change as little as possible.
    """

    kind: ClassVar[str] = "narrow"
    layer: int
    masks: tuple[str, ...]
    compensate: bool = False

    def __post_init__(self) -> None:
        _check_layer(self.kind, self.layer)
        wrong = [mask for mask in self.masks if not mask or set(mask) - set("0123456789abcdef") or not int(mask, 16)]
        if wrong or not self.masks:
            raise UserError(
                f"narrow, layer {self.layer}: masks {wrong} must be hexadecimal numbers above 0, one for each expert"
            )

    @classmethod
    def from_channels(cls, layer: int, channels: Sequence[Collection[int]], compensate: bool = False) -> Narrow:
        """Make the operation from the retained channels of each expert."""
        rows = list(channels)
        distinct = {id(row): row for row in rows}  # many experts may have the same list
        texts = {key: _mask(row) for key, row in distinct.items()}
        return cls(layer, tuple(texts[id(row)] for row in rows), compensate)

    @property
    def channels(self) -> tuple[tuple[int, ...], ...]:
        """The retained channels of each expert, ascending."""
        bits = (f"{int(mask, 16):b}"[::-1] for mask in self.masks)
        return tuple(tuple(channel for channel, bit in enumerate(text) if bit == "1") for text in bits)

    @property
    def widths(self) -> tuple[int, ...]:
        """The number of retained channels of each expert."""
        return tuple(int(mask, 16).bit_count() for mask in self.masks)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Narrow:
        if not all(isinstance(mask, str) for mask in data["masks"]):
            raise TypeError("a mask is not text")
        return cls(layer=int(data["layer"]), masks=tuple(data["masks"]), compensate=bool(data["compensate"]))


@dataclass(frozen=True)
class Merge:
    """Replace groups of routed experts by their weighted means. The router keeps its rows; each row selects a group.

    Args:
        layer: decoder-layer index.
        groups: a partition of the layer's experts. The first expert of a group is its reference for `align`.
        weights: the weight of each expert in its group; the weights of a group sum to 1.
        align: permute the neurons of the other experts to match those of the reference before taking the mean.
    """

    kind: ClassVar[str] = "merge"
    layer: int
    groups: tuple[tuple[int, ...], ...]
    weights: tuple[tuple[float, ...], ...]
    align: bool = False

    def __post_init__(self) -> None:
        _check_layer(self.kind, self.layer)
        experts = sorted(expert for group in self.groups for expert in group)
        if not experts or experts != list(range(len(experts))) or not all(self.groups):
            raise UserError(
                f"merge, layer {self.layer}: groups must partition the experts 0 to E-1; they name {experts}"
            )
        if [len(group) for group in self.groups] != [len(weights) for weights in self.weights]:
            raise UserError(f"merge, layer {self.layer}: every group needs one weight for each of its experts")
        sums = [sum(weights) for weights in self.weights]
        if any(abs(total - 1) > 1e-6 for total in sums):
            raise UserError(f"merge, layer {self.layer}: the weights of a group must sum to 1; they sum to {sums}")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Merge:
        return cls(
            layer=int(data["layer"]),
            groups=tuple(_ints(group) for group in data["groups"]),
            weights=tuple(tuple(float(value) for value in weights) for weights in data["weights"]),
            align=bool(data["align"]),
        )


@dataclass(frozen=True)
class Drop:
    """Remove the MoE block of a decoder layer, or the entire layer. The residual stream passes through unchanged.

    Args:
        layer: decoder-layer index.
        part: "moe" for the MoE block, or "layer" for the entire decoder layer, including its attention.
    """

    kind: ClassVar[str] = "drop"
    layer: int
    part: Literal["moe", "layer"]

    def __post_init__(self) -> None:
        _check_layer(self.kind, self.layer)
        if self.part not in ("moe", "layer"):
            raise UserError(f"drop, layer {self.layer}: part {self.part!r} must be moe or layer")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Drop:
        part = "layer" if data["part"] == "block" else data["part"]  # older plans say "block"
        return cls(layer=int(data["layer"]), part=cast(Any, part))


@dataclass(frozen=True)
class Refit:
    """Solve for weights of a changed layer by ridge least squares on the calibration set, after all other operations.

    Args:
        layer: decoder-layer index.
        what: "down_proj", or "coefficients" for those of a condensed layer.
        ridge: penalty on the distance from the current weights, relative to the mean diagonal of the normal matrix.
            "auto": the penalty with the smallest error on tokens that a first solution has not seen; down_proj only.
    """

    kind: ClassVar[str] = "refit"
    layer: int
    what: Literal["down_proj", "coefficients"]
    ridge: float | Literal["auto"]

    def __post_init__(self) -> None:
        _check_layer(self.kind, self.layer)
        if self.what not in ("down_proj", "coefficients"):
            raise UserError(f"refit, layer {self.layer}: {self.what!r} must be down_proj or coefficients")
        if self.ridge == "auto" and self.what == "coefficients":
            raise UserError(f"refit, layer {self.layer}: coefficients need a number as ridge")
        if self.ridge != "auto" and not self.ridge > 0:
            raise UserError(f"refit, layer {self.layer}: ridge {self.ridge} must be above 0, or auto")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Refit:
        ridge = data["ridge"] if data["ridge"] == "auto" else float(data["ridge"])
        return cls(layer=int(data["layer"]), what=cast(Any, data["what"]), ridge=ridge)


Operation = Condense | Prune | Constant | Narrow | Factorize | Merge | Drop | Refit
OPERATIONS: dict[str, type[Operation]] = {
    operation.kind: operation for operation in (Condense, Prune, Constant, Narrow, Factorize, Merge, Drop, Refit)
}


def _mask(channels: Collection[int]) -> str:
    """Return the hexadecimal number in which the bits of these channels are set."""
    bits = bytearray(b"0") * (max(channels, default=0) + 1)
    for channel in channels:
        bits[-1 - channel] = ord("1")
    return f"{int(bits, 2):x}"


def _check_layer(kind: str, layer: int) -> None:
    if layer < 0:
        raise UserError(f"{kind}: layer {layer} is negative; layers are decoder-layer indices from 0")


def _check_experts(kind: str, layer: int, experts: Sequence[int]) -> None:
    if len(set(experts)) != len(experts) or any(expert < 0 for expert in experts):
        raise UserError(f"{kind}, layer {layer}: experts {list(experts)} must be distinct and >= 0")


def _check_retained(kind: str, layer: int, retained: Sequence[int]) -> None:
    _check_experts(kind, layer, retained)
    if not retained or list(retained) != sorted(retained):
        raise UserError(f"{kind}, layer {layer}: retained {list(retained)} must be ascending, not empty")


def _ints(values: Sequence[Any]) -> tuple[int, ...]:
    return tuple(int(value) for value in values)
