"""Names in a checkpoint that wrappers and adapters have left behind: what they say about how it was saved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

# Parts of the names that peft gives to the weights that it adds and to those that it wraps.
ADAPTER_PARTS = {"base_layer", "modules_to_save", "original_module", "lora_magnitude_vector"}
ADAPTER_PREFIXES = ("lora_", "hada_", "lokr_", "ia3_", "vera_", "adaption_prompt")


def adapter_names(names: Collection[str]) -> list[str]:
    """Return the names that belong to a PEFT adapter or to a weight that one wraps."""

    def is_of_adapter(name: str) -> bool:
        return any(part in ADAPTER_PARTS or part.startswith(ADAPTER_PREFIXES) for part in name.split("."))

    return [name for name in names if is_of_adapter(name)]


def unmerged_adapter(unexpected: Collection[str]) -> str:
    """Return a sentence if a checkpoint has an adapter that is not merged; otherwise an empty string.

    Args:
        unexpected: names that the files have but the model does not.
    """
    names = adapter_names(unexpected)
    if not names:
        return ""
    return (
        f"the checkpoint holds a PEFT adapter that is not merged ({', '.join(names[:3])}{', ...' * (len(names) > 3)}), "
        "which would be ignored; merge it first with the peft model's `merge_and_unload()`, and save the result"
    )


def additional_part(missing: Sequence[str], unexpected: Collection[str]) -> str | None:
    """Return the part that most names in the files have in addition to those of the model, such as `_orig_mod`.

    Args:
        missing: names that the model has but the files do not.
        unexpected: names that the files have but the model does not.

    Returns:
        The part without dots; None if there is no such part.
    """
    absent, counts = set(missing), Counter[str]()
    for name in unexpected:
        parts = name.split(".")
        without = {part: ".".join(parts[:at] + parts[at + 1 :]) for at, part in enumerate(parts)}
        counts.update(part for part, rest in without.items() if rest in absent and not part.isdigit())
    part, count = counts.most_common(1)[0] if counts else ("", 0)
    return part if 2 * count >= len(absent) and part else None
