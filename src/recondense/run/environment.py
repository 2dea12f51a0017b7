"""What the environment says: which processes a launcher started together, and what other programs left behind.

Shells, pods and notebooks hand variables on. Those of a launcher count only if all of them are there and agree. This
module imports no library, because Lightning and Matplotlib read variables when they are imported.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from recondense.errors import UserError

# Of torchrun and of a run that starts further processes. A run on several machines without a launcher reads the last
# two, and NODE_RANK.
RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
ADDRESS = ("MASTER_ADDR", "MASTER_PORT")
SRUN = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_NUM_TASKS", "SLURM_JOB_ID")
SHELLS = ("bash", "interactive")  # names of SLURM jobs that are a shell: its commands were not started by srun
# Variables from which Lightning, torch or DeepSpeed infer ranks. Those of a launcher that did not start this process
# are removed.
OF_TORCHRUN = (*RANKS, "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME")
OF_SRUN = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
OF_OTHERS = ("TORCHELASTIC_", "OMPI_COMM_WORLD_", "PMI_", "PMIX_", "MV2_COMM_WORLD_", "JSM_NAMESPACE_", "LSB_DJOB_")
OF_LIBRARIES = ("HF_", "HUGGINGFACE_", "TORCH", "PYTORCH_", "TRANSFORMERS_", "TOKENIZERS_", "DATASETS_", "MPL", "CUDA_")

SHORTEST = 4  # characters of a value that an error names without quotes
ORDINARY = ("true", "false", "none", "auto", "default", "cuda", "error", "warning", "info", "debug")


@dataclass(frozen=True)
class Started:
    """This process as one of several that a launcher started.

    Args:
        rank, local_rank, node_rank: its numbers among all processes, among those of its machine, and of its machine.
        world_size: number of processes.
        address, port: where the first process listens.
        launcher: torchrun or srun.
    """

    rank: int
    local_rank: int
    node_rank: int
    world_size: int
    address: str
    port: int
    launcher: str


def started_together(variables: Mapping[str, str] | None = None) -> Started | None:
    """Return how a launcher started this process together with others; None if it is alone.

    Args:
        variables: the environment; None for this process's.
    """
    variables = os.environ if variables is None else variables
    started = _by_torchrun(variables) or _by_srun(variables)
    return started if started is not None and started.world_size > 1 else None


def _by_torchrun(variables: Mapping[str, str]) -> Started | None:
    numbers = _numbers(variables, (*RANKS, "MASTER_PORT"))
    if numbers is None or not variables.get("MASTER_ADDR"):
        return None
    rank, local_rank, size, local_size, port = numbers
    if not (rank < size and local_rank < local_size <= size and local_rank <= rank and 0 < port < 65536):
        return None
    node = rank // local_size
    return Started(rank, local_rank, node, size, variables["MASTER_ADDR"], port, "torchrun")


def _by_srun(variables: Mapping[str, str]) -> Started | None:
    numbers = _numbers(variables, SRUN)
    # srun --pty starts a shell, whose commands inherit its variables.
    if numbers is None or variables.get("SLURM_JOB_NAME") in SHELLS or "SLURM_PTY_PORT" in variables:
        return None
    rank, local_rank, node, size, job = numbers
    nodes = variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_NODELIST") or ""
    if not (local_rank <= rank < size and node <= rank):
        return None
    several = re.search(r"[,\[ ]", nodes) is not None
    address = (variables.get("MASTER_ADDR") or _first_host(nodes)) if several else "127.0.0.1"
    [step] = _numbers(variables, ("SLURM_STEP_ID",)) or [0]
    [port] = _numbers(variables, ("MASTER_PORT",)) or [15_000 + (job + 1009 * step) % 10_000]
    return Started(rank, local_rank, node, size, address, port, "srun")


def _first_host(nodes: str) -> str:
    """Return the first machine of SLURM's list, such as host[5-9,12] or host5,host6."""
    return re.sub(r"\[([^,\-\]]*).*", r"\1", nodes).split(" ")[0].split(",")[0]


def _numbers(variables: Mapping[str, str], names: tuple[str, ...]) -> list[int] | None:
    """Return variables that are whole numbers; None if one is missing or is none."""
    values = [variables.get(name, "") for name in names]
    return [int(value) for value in values] if all(re.fullmatch(r"\d{1,18}", value) for value in values) else None


def forget_other_programs() -> None:
    """Remove variables that would let libraries take this process for another one. Call before they are imported."""
    os.environ["MPLBACKEND"] = "Agg"  # a notebook's backend does not exist elsewhere, and pictures are drawn by Agg
    started = started_together()
    launcher = started.launcher if started else None
    for name in tuple(os.environ):
        if (
            (name in OF_TORCHRUN and launcher != "torchrun")
            or (name in OF_SRUN and launcher != "srun")
            or (name.startswith(OF_OTHERS) and launcher != "torchrun")
        ):
            del os.environ[name]


@contextmanager
def naming_variables() -> Iterator[None]:
    """Name the variable whose value a library refuses while it is imported inside.

    Raises:
        UserError: there is one whose value the error's text quotes or has as a word of at least four characters. Other
            errors stay as they are.
    """
    try:
        yield
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        for name, value in os.environ.items():
            secret = name.endswith("_TOKEN")
            if name.startswith(OF_LIBRARIES) and not secret and _names(str(error), value):
                text = str(error).strip().splitlines()[0].rstrip(".")
                raise UserError(f"{name}={value}: a library refuses this variable ({text}). Unset it.") from error
        raise


def _names(text: str, value: str) -> bool:
    """Return whether a text names a value: in quotes, or as a whole word, path or address that is hardly another's."""
    if len(value) > 1 and (f"'{value}'" in text or f'"{value}"' in text):
        return True
    ordinary = value.lower() in ORDINARY or not re.search(r"[^\W\d]", value)  # a switch or a number
    whole = rf"(?<![\w/.\-]){re.escape(value)}(?![\w/\-]|\.\w)"
    return len(value) >= SHORTEST and not ordinary and re.search(whole, text) is not None
