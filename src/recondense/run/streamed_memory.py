"""Memory of a run with a streamed model: the expected bound, and the measured peak."""

from __future__ import annotations

import logging

from transformers import PreTrainedModel

from recondense.config.schema import Config
from recondense.evaluation import profiling
from recondense.full_disk import format_bytes
from recondense.models import decoder, parameters
from recondense.run.search_memory import scratch_bytes

SLACK = 300 * 2**20  # bytes for libraries that are imported later, the allocator, and a batch of texts

log = logging.getLogger(__name__)


class StreamedMemory:
    """The parts of the peak memory of a run with a streamed model, in bytes.

    Args:
        config: settings of the run.
        model: the streamed model.
        before_bytes: peak of the resident bytes before the model was loaded.
    """

    def __init__(self, config: Config, model: PreTrainedModel, before_bytes: int) -> None:
        self._parts = {
            "before_bytes": before_bytes,
            "outside_layers_bytes": parameters.bytes_outside_layers(model),
            "layer_bytes": parameters.largest_layer_bytes(model),
            "scratch_bytes": scratch_bytes(config, decoder.device(model), model),
        }
        self._peak: int | None = None

    def count_training(self, size: int) -> None:
        """Add the bytes that the training of a layer needs to the parts."""
        self._parts["training_bytes"] = size

    def take_peak(self) -> None:
        """Read the peak memory of this process and log it, with a warning if it exceeds the bound."""
        self._peak = profiling.peak_resident_bytes()
        parts = self._parts
        bound = parts["before_bytes"] + parts["outside_layers_bytes"] + 2 * parts["layer_bytes"]
        bound += parts["scratch_bytes"] + parts.get("training_bytes", 0) + SLACK
        shown = {name: format_bytes(size) for name, size in self.to_dict().items()}
        training = f"{shown['training_bytes']} to train a layer, " if "training_bytes" in shown else ""
        log.info(
            "peak memory %s: %s before loading, %s outside the layers, two layers of %s, scratch %s, %sand tokens",
            *(shown[f"{name}_bytes"] for name in ("peak_resident", "before", "outside_layers", "layer", "scratch")),
            training,
        )
        if self._peak > bound:
            log.warning("the peak memory exceeds the expected bound of %s; please report this", format_bytes(bound))

    def to_dict(self) -> dict[str, int]:
        """Return the peak, if it was read, and the parts, in bytes."""
        peak = {} if self._peak is None else {"peak_resident_bytes": self._peak}
        return {**peak, **self._parts}
