"""The configurations of published checkpoints, kept as data: their shapes are known without the hub.

Each `<owner>/<name>.json` has the values of config.json at that hub id, without auto_map and versions. The dtype of
unquantized weights is added if it is missing there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from transformers import CONFIG_MAPPING, PretrainedConfig

from recondense.errors import UserError
from recondense.models import classes, families

FOLDER = Path(__file__).parent


def recorded_ids() -> tuple[str, ...]:
    """The hub ids of the checkpoints whose configuration is here."""
    return tuple(path.relative_to(FOLDER).as_posix().removesuffix(".json") for path in sorted(FOLDER.glob("*/*.json")))


def recorded_values(hub_id: str) -> dict[str, Any]:
    """The values of a published config.json.

    Raises:
        UserError: there is none of this id here.
    """
    if hub_id not in recorded_ids():
        raise UserError(
            f"plan_only looks nothing up, and has no configuration of {hub_id}. Give model.path a folder with its "
            f"config.json, or one of {', '.join(recorded_ids())}"
        )
    return cast(dict[str, Any], json.loads((FOLDER / f"{hub_id}.json").read_text(encoding="utf-8")))


def recorded_config(hub_id: str) -> PretrainedConfig:
    """The config of a published checkpoint.

    Raises:
        UserError: there is none of this id here, or its family is not supported.
    """
    values = recorded_values(hub_id)
    model_type = values["model_type"]
    families.family_name(model_type)
    classes.register_model_type(model_type)
    return CONFIG_MAPPING[model_type].from_dict(values)
