"""Save and restore the states of all random number generators of a process."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from recondense import processes


def random_states() -> dict[str, Any]:
    """Return the states of all generators, as types that can be loaded without pickle."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    version, state, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, keys.tolist(), position, has_gauss, cached],  # type: ignore[union-attr,attr-defined]
        "python": [version, list(state), gauss],
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """Restore the states of all generators."""
    torch.set_rng_state(states["torch"].cpu())
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    version, state, gauss = states["python"]
    random.setstate((version, tuple(state), gauss))


def gather_random_states() -> dict[str, Any]:
    """Return the states of all processes as entries of a checkpoint. All processes must call this together."""
    first, *others = processes.gather(random_states())
    return {"random_states": first, **({"random_states_of_others": others} if others else {})}


def states_of_process(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return this process's states in a checkpoint; the last ones of a checkpoint of fewer processes."""
    states = [checkpoint["random_states"], *checkpoint.get("random_states_of_others", ())]
    return states[min(processes.rank(), len(states) - 1)]
