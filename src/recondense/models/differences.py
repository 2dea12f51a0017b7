"""The differences between the files of a checkpoint and the model of its config, and what they say in words."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from recondense.models.stray_names import additional_part, unmerged_adapter

Shape = tuple[int, ...]
LAYER = re.compile(r"(?P<before>.*?\blayers\.)(?P<number>\d+)\.(?P<end>.+)")
WEIGHTS = ("weight", "bias", "gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")  # ends of names
SAME_MODEL = "use the config.json and the files of the same model"


@dataclass(frozen=True)
class Comparison:
    """The differences between the files of a checkpoint and the model that its config describes.

    Args:
        missing: names of weights that are in no file; of tied weights, only one must be stored.
        unexpected: names in the files that the model does not have, converted to the model's naming.
        misshapen: for each weight of another shape, its name, its shape in the files and its shape in the model.
        foreign: those of the unexpected names that only another model has: weights of layers and modules that both
            have, and complete further layers with the prefix of its layers or of a second whole model.
        not_floating: for each weight that is stored as integers, its name in the files and its dtype.
        untied: pairs of weights that are one by the config, but are stored with different numbers.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    misshapen: tuple[tuple[str, Shape, Shape], ...] = ()
    foreign: tuple[str, ...] = ()
    not_floating: tuple[tuple[str, str], ...] = ()
    untied: tuple[tuple[str, str], ...] = ()

    @property
    def problems(self) -> list[str]:
        """Why the model cannot be loaded, one sentence for each reason; empty if it can."""
        if adapter := unmerged_adapter(self.unexpected):
            return [adapter]
        problems = [missing_weights(self.missing, self.unexpected)] if self.missing else []
        if self.misshapen:
            name, stored, expected = self.misshapen[0]
            problems.append(
                f"{name} has the shape {stored} in the checkpoint and {expected} by its config"
                f"{_others(len(self.misshapen) - 1, 'differs', 'differ')}; {SAME_MODEL}"
            )
        if self.not_floating:
            key, dtype = self.not_floating[0]
            problems.append(
                f"{key} is stored as {dtype}{_others(len(self.not_floating) - 1, 'is', 'are')}, but config.json has no "
                "quantization_config that says how; use the model in bf16, fp16 or fp32"
            )
        problems += (
            f"config.json has tie_word_embeddings=true, but {one} and {other} are stored with different numbers; "
            "set tie_word_embeddings to false in config.json, or remove the one that is not used from the files"
            for one, other in self.untied
        )
        if self.foreign and not self.missing:
            problems.append(
                f"the checkpoint has {_weights(len(self.foreign))} that the model of its config lacks "
                f"({shown(self.foreign)}) and that would be ignored, so its config is another model's; {SAME_MODEL}"
            )
        return problems

    def __str__(self) -> str:
        """Return all differences in words, for the author of the files."""
        misshapen = [f"{name} is {stored}, not {expected}" for name, stored, expected in self.misshapen]
        parts = {"missing": self.missing, "unexpected": self.unexpected, "other shapes": misshapen}
        return "; ".join(f"{len(names)} {what}: {shown(names)}" for what, names in parts.items() if names)


def foreign_weights(unexpected: Collection[str], state: Collection[str]) -> tuple[str, ...]:
    """Return the unexpected weights that only another model has.

    Layers for multi-token prediction, parts for pictures, and buffers of older versions of transformers are ignored
    instead: they do not change the function that the other weights compute. So are layers with a prefix of their own,
    such as `mtp.layers.0`, unless a whole model with an embedding has this prefix.

    Args:
        unexpected: names that the files have but the model does not.
        state: names of the model's weights.
    """
    modules = {name.rpartition(".")[0] for name in state}
    layers: dict[tuple[str, str], set[str]] = {}
    further: dict[tuple[str, str], set[str]] = {}
    for names, ends in ((state, layers), (unexpected, further)):
        for name in names:
            if match := LAYER.match(name):
                ends.setdefault((match["before"], match["number"]), set()).add(match["end"])
    ordinary = list(layers.values())
    of_models = {before for before, _ in layers} | _further_models(unexpected, state)
    foreign = []
    for name in unexpected:
        match = LAYER.match(name)
        layer = (match["before"], match["number"]) if match else ("", "")
        module, _, end = name.rpartition(".")
        of_both = end in WEIGHTS and (layer in layers or module in modules)
        complete = layer[0] in of_models and layer not in layers and further.get(layer, set()) in ordinary
        if of_both or complete:
            foreign.append(name)
    return tuple(foreign)


def _further_models(unexpected: Collection[str], state: Collection[str]) -> set[str]:
    """Return the prefixes of layers under which the files have a second model, with all that is outside the layers."""
    stored, known = (
        {match["before"] for name in names if (match := LAYER.match(name))} for names in (unexpected, state)
    )
    second = set[str]()
    for before in known:
        base = before.removesuffix("layers.")
        ends = [name.removeprefix(base) for name in state if name.startswith(base) and not LAYER.match(name)]
        for other in stored - known:
            if {other.removesuffix("layers.") + end for end in ends}.issubset(unexpected):
                second.add(other)
    return second


def _others(number: int, one: str, several: str) -> str:
    return f", and {_weights(number)} more {several if number > 1 else one}" if number else ""


def shown(names: Sequence[str]) -> str:
    """Return the first three of some names."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def missing_weights(missing: Sequence[str], unexpected: Collection[str]) -> str:
    """Return a sentence with the number of weights that a checkpoint lacks, three of their names, and the remedy.

    If the names in the files differ from the model's only by a prefix or by an additional part, the remedy says so.

    Args:
        missing: names that the model has but the files do not.
        unexpected: names that the files have but the model does not.
    """
    remedy = "download or convert it again, or fix config.json; without them the model would be partly random"
    if (prefixes := _prefixes(missing, unexpected)) is not None:
        stored, expected = prefixes
        if not expected:
            remedy = f"its names have the additional prefix {stored!r}: rename them without it"
        elif not stored:
            remedy = f"its names lack the prefix {expected!r}: rename them with it"
        else:
            remedy = f"its names begin with {stored!r} instead of {expected!r}: rename them"
    elif (part := additional_part(missing, unexpected)) is not None:
        remedy = f"its names have the additional part {part!r}: rename them without it"
    return (
        f"the checkpoint lacks {_weights(len(missing))} of the model that its config describes ({shown(missing)}); "
        f"{remedy}"
    )


def _weights(number: int) -> str:
    return f"{number} weight{'s' * (number != 1)}"


def _prefixes(missing: Sequence[str], unexpected: Collection[str]) -> tuple[str, str] | None:
    """Return the prefixes of the unexpected and the missing names, if most differ only by a prefix; otherwise None."""
    by_end: dict[str, str] = {}  # from each ending of a missing name to the text before it
    for name in missing:
        parts = name.split(".")
        by_end |= {".".join(parts[first:]): ".".join(parts[:first]) for first in range(max(1, len(parts) - 1))}
    counts: Counter[tuple[str, str]] = Counter()
    for name in unexpected:
        parts = name.split(".")
        for first in range(max(1, len(parts) - 1)):
            if (end := ".".join(parts[first:])) in by_end:
                counts[".".join(parts[:first]), by_end[end]] += 1
                break
    (stored, expected), count = counts.most_common(1)[0] if counts else (("", ""), 0)
    # A prefix with a digit belongs to another layer.
    if 2 * count < len(missing) or not (stored or expected) or re.search(r"\d", stored + expected):
        return None
    return stored and f"{stored}.", expected and f"{expected}."
