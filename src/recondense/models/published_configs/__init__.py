"""The configs of published checkpoints as data files, so that their shapes are known without the hub.

Each `<owner>/<name>.json` has the values of config.json at that hub id, without auto_map and versions. If it lacks the
dtype of unquantized weights, the dtype is added.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from recondense.errors import UserError

if TYPE_CHECKING:  # checks of a command read the values before torch is imported
    from transformers import PretrainedConfig

FOLDER = Path(__file__).parent


def recorded_ids() -> tuple[str, ...]:
    """Return the hub ids of the checkpoints whose configs are recorded."""
    return tuple(path.relative_to(FOLDER).as_posix().removesuffix(".json") for path in sorted(FOLDER.glob("*/*.json")))


def recorded_values(hub_id: str) -> dict[str, Any]:
    """Return the values of a published config.json.

    Raises:
        UserError: no config is recorded for this id.
    """
    if hub_id not in recorded_ids():
        raise UserError(
            f"plan_only does not use the hub, and no config of {hub_id} is recorded. Set model.path to a folder with "
            f"its config.json, or to one of {', '.join(recorded_ids())}"
        )
    return cast(dict[str, Any], json.loads((FOLDER / f"{hub_id}.json").read_text(encoding="utf-8")))


def recorded_config(hub_id: str) -> PretrainedConfig:
    """Return the config of a published checkpoint.

    Raises:
        UserError: no config is recorded for this id, or its family is not supported.
    """
    from transformers import CONFIG_MAPPING

    from recondense.models import families, model_classes

    values = recorded_values(hub_id)
    model_type = values["model_type"]
    families.family_name(model_type)
    model_classes.register_model_type(model_type)
    return CONFIG_MAPPING[model_type].from_dict(values)
