"""All settings other than weights that a training could change and not restore."""

from __future__ import annotations

import copy
import logging
import os
import signal
import warnings
from typing import Any

import torch
import torch.utils.deterministic
from torch import nn

from recondense.recovery.module import RecoveryModule
from recondense.recovery.random_states import random_states

PLAIN = (bool, int, float, str, type(None), torch.dtype)


def settings_around(module: RecoveryModule) -> dict[str, Any]:
    """Settings of a module's model, of its original and of the process, by name."""
    settings = {f"process {name}": value for name, value in _of_process().items()}
    for name, value in _of_model(module.student.model).items():
        settings[f"student {name}"] = value
    with module.student.original() as original:
        for name, value in _of_model(original).items():
            settings[f"original {name}"] = value
    settings["module trainer"] = module._trainer
    return settings


def differences(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """The settings that changed: (before, after) by name."""
    missing = "not there"
    pairs = {name: (before.get(name, missing), after.get(name, missing)) for name in {**before, **after}}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _of_model(model: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        settings[name] = value.dtype, value.device, value.requires_grad, value.grad is None
    for name, value in model.named_buffers():
        settings[name] = value.dtype, value.device
    for name, part in model.named_modules():
        settings |= {f"{name}.{key}": value for key, value in _plain(part).items()}
        settings[f"{name} hooks"] = {
            key: len(value) for key, value in vars(part).items() if key.endswith("_hooks") and value
        }
    for name in ("config", "generation_config"):
        settings |= {f"{name}.{key}": value for key, value in _plain(getattr(model, name)).items()}
        settings[name] = copy.deepcopy(getattr(model, name).to_dict())
    return settings


def _plain(owner: Any) -> dict[str, Any]:
    """Attributes that are plain values and differ from those of the class."""
    return {
        name: value
        for name, value in vars(owner).items()
        if isinstance(value, PLAIN) and getattr(type(owner), name, ...) is not value
    }


def _of_process() -> dict[str, Any]:
    states = random_states()
    loggers = {
        name: logger
        for name, logger in logging.root.manager.loggerDict.items()
        if isinstance(logger, logging.Logger) and not name.startswith("torch.")  # torch's compiler adds handlers on use
    }
    memory: Any = torch.utils.deterministic
    dynamo: Any = torch._dynamo.config
    return {
        **{f"variable {name}": value for name, value in os.environ.items()},
        **{f"signal {int(number)}": signal.getsignal(number) for number in signal.valid_signals()},
        **{f"level of {name}": logger.level for name, logger in loggers.items() if logger.level},
        **{f"handlers of {name}": list(logger.handlers) for name, logger in loggers.items() if logger.handlers},
        "silent": sorted(name for name, logger in loggers.items() if logger.disabled or not logger.propagate),
        **{f"dynamo {name}": value for name, value in dynamo.get_config_copy().items() if isinstance(value, PLAIN)},
        "warnings": list(warnings.filters),
        "torch's generator": states["torch"].tolist(),
        "numpy's generator": states["numpy"],
        "python's generator": states["python"],
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "filled memory": memory.fill_uninitialized_memory,
        "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "anomalies": torch.is_anomaly_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "matmul": torch.get_float32_matmul_precision(),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "global hooks": [
            len(vars(nn.modules.module)[name])
            for name in vars(nn.modules.module)
            if "_global_" in name and "hooks" in name
        ],
    }
