"""The default budget of a method on a model: what `${budget:setting,otherwise}` in conf/method is.

The budgets are data: `model.budgets` in conf/model. Its `methods` are for models of one shape, that of a published
checkpoint or of the embedded model; every other model and method has `default`. What the command line or an experiment
sets comes first: another size replaces that of the default budget, and a ratio replaces all of it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from recondense.config.method_steps import step_entries
from recondense.config.problems import Problem, suggestion
from recondense.config.schema import GENERAL, Config
from recondense.models.config_json import config_values, same_shape

PARTS = ("shape_of", "default", "methods")  # of the model's budgets
KEPT = ("used", "from", "of_shape", "open", "replaced", "asked", "by_path")  # what a run's config.yaml has instead
OPEN = "${budget:"  # how a setting begins that the default budget may set
RATIOS = ("removed_expert_ratio", "memory_ratio")
AMOUNTS = ("num_layers", "average_rank", "ratio", "width", *RATIOS)  # settings that say how small the model becomes


@dataclass(frozen=True)
class DefaultBudget:
    """The settings of a method that come from the model's budgets.

    Args:
        settings: the settings by name.
        source: where they are from, in words.
        of_shape: whether they are for models of this shape, so that the method can reach them.
        replaced: names of the settings that the user gave instead of some of them.
    """

    settings: Mapping[str, Any]
    source: str
    of_shape: bool
    replaced: tuple[str, ...] = ()


def default_budget(config: DictConfig) -> DefaultBudget | None:
    """Return the default budget that applies in a composed config; None if none of its settings does."""
    method = _section(config, "method")
    is_open, chosen = open_settings(config), _chosen(method)
    takes_settings = any(isinstance(entry, str) for entry in step_entries(method))
    if not is_open or not takes_settings or set(chosen) & set(RATIOS):
        return None
    budget = _budget_of(str(method.get("name")), config)
    settings = {name: value for name, value in budget.settings.items() if name in is_open}
    given = (*chosen, *(name for name in budget.settings if name in method and not _is_open(method[name])))
    replaced = tuple(dict.fromkeys(given)) if budget.of_shape else ()
    return replace(budget, settings=settings, replaced=replaced) if settings else None


def open_settings(config: DictConfig) -> list[str]:
    """Return the names of the method's settings that are defaults which depend on the model."""
    method = _section(config, "method")
    has_size = bool(_chosen(method))
    return [name for name, value in method.items() if _is_open(value) and not (has_size and name in AMOUNTS)]


def _is_open(value: Any) -> bool:
    return str(value).startswith(OPEN)


def _chosen(method: Mapping[str, Any]) -> list[str]:
    """Return the names of the settings with which the user says how small the model becomes."""
    names = [name for name in AMOUNTS if name in method and not _is_open(method[name])]
    return [name for name in names if _decides(name, method[name])]


def _decides(name: str, value: Any) -> bool:
    """Return whether a setting that the user gave says how small the model becomes; null says it for a rank only."""
    return value is not None or name == "average_rank"


def _budget_of(method: str, config: DictConfig) -> DefaultBudget:
    """Return the budget of a method on a model, whatever the user has set."""
    model = _section(config, "model")
    budgets = _mapping(model.get("budgets"))
    name, listed = model.get("name"), _mapping(budgets.get("methods"))
    entry = _mapping(listed.get(method) or listed.get("any"))
    source = f"no published row for {'this model' if name == GENERAL else name} and {method}"
    if entry:
        if _is_of_shape(config):
            settings = {key: value for key, value in entry.items() if key != "from"}
            return DefaultBudget(settings, entry.get("from") or f"the budgets of model={name}", of_shape=True)
        source = f"the budget of model={name} for {method} is for a model of another shape"
    return DefaultBudget(_mapping(budgets.get("default")), source, of_shape=False)


def _mapping(value: Any) -> Mapping[str, Any]:
    """Return a value if it is a mapping; anything else, which the schema refuses, counts as empty."""
    return value if isinstance(value, Mapping) else {}


def _section(config: DictConfig, name: str) -> Mapping[str, Any]:
    """Return the settings of a section of a composed config as they are written."""
    node = config.get(name)
    return cast(dict[str, Any], OmegaConf.to_container(node)) if isinstance(node, DictConfig) else {}


def _is_of_shape(config: DictConfig) -> bool:
    """Return whether a run's model has the shape for which its YAML has budgets."""
    path, revision = (OmegaConf.select(config, f"model.{name}") for name in ("path", "revision"))
    model = _section(config, "model")
    shape_of = _mapping(model.get("budgets")).get("shape_of")
    if path == shape_of or path is None or (shape_of is None and model.get("pretrain") is None):
        return True
    if not isinstance(path, str) or not isinstance(revision, str | None):
        return False
    values = config_values(path, revision, hub=config.get("plan_only") is False)
    return values is not None and has_shape(config, values)


def has_shape(config: DictConfig, values: Mapping[str, Any]) -> bool:
    """Return whether a config.json has the shape for which the composed choice of `model=` has budgets.

    Budgets of a file without `shape_of` are for the model of the file.
    """
    model = _section(config, "model")
    budgets = _mapping(model.get("budgets"))
    if (shape_of := budgets.get("shape_of")) is not None:
        reference = config_values(str(shape_of))
        return reference is not None and same_shape(values, reference)
    if model.get("pretrain") is None:
        return bool(_mapping(budgets.get("methods")))
    embedded = _mapping(_mapping(model["pretrain"]).get("config"))
    return bool(embedded) and same_shape(values, {"model_type": "qwen2_moe", **embedded})


def _resolve(setting: str, otherwise: Any = None, *, _root_: DictConfig) -> Any:
    """Return the value of `${budget:setting,otherwise}`."""
    try:
        budget = default_budget(_root_)
    except OmegaConfBaseException:  # an interpolation in the model's settings, which is reported where it stands
        return otherwise
    return otherwise if budget is None else budget.settings.get(setting, otherwise)


OmegaConf.register_new_resolver("budget", _resolve, replace=True)


def used_settings(config: DictConfig, method: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a method that are defaults and may be too much for a model.

    They are those of the default budget, and settings such as num_experts, which are no size of their own.

    Args:
        config: the composed config.
        method: the settings of the method, resolved.
    """
    budget = default_budget(config)
    others = [name for name in open_settings(config) if name not in AMOUNTS]
    return {**{name: method[name] for name in others}, **(budget.settings if budget else {})}


def keep_used(config: DictConfig, values: dict[str, Any], *, by_path: bool) -> None:
    """Replace `model.budgets` by what the run has from it: `used`, its settings, and `from`, their source.

    `open` are the names of all settings that the user leaves to the model; `replaced` of those given instead.

    Args:
        config: the composed config.
        values: its values, in which interpolations are resolved.
        by_path: whether the model's path decided the choice of `model=`, which is also kept.
    """
    if not isinstance(values.get("model"), dict) or not isinstance(values.get("method"), dict):
        return  # the schema refuses them
    budget, used = default_budget(config), used_settings(config, values["method"])
    of_shape = budget is not None and budget.of_shape
    source = budget.source if budget else ""
    kept: dict[str, Any] = {}
    if used:
        kept = {"used": used, "from": source, "of_shape": of_shape, "open": open_settings(config)}
    if budget and budget.replaced:
        kept["replaced"] = list(budget.replaced)
    values["model"]["budgets"] = {**kept, **({"by_path": True} if by_path else {})}


def check_budgets(config: DictConfig, choices: Collection[str]) -> list[Problem]:
    """Return a problem for each name in the model's budgets that stands for nothing, so that it would be ignored.

    Those are unknown parts and methods, and settings that the run's method does not have.

    Args:
        config: the composed config.
        choices: the choices of `method=`.
    """
    method, budgets = _section(config, "method"), _mapping(_section(config, "model").get("budgets"))
    methods, name = _mapping(budgets.get("methods")), str(method.get("name"))
    where, known = "model.budgets", {*choices, name, "any"}
    sizes = [name for name, value in method.items() if name in AMOUNTS or _is_open(value)]
    problems = [
        Problem(f"{where}.{part}", f"there is no such setting. {suggestion(str(part), PARTS)}", value)
        for part, value in budgets.items()
        if part not in (*PARTS, *KEPT)
    ]
    problems += [
        Problem(f"{where}.methods.{entry}", f"there is no such method. {suggestion(str(entry), known)}", value)
        for entry, value in methods.items()
        if entry not in known
    ]
    problems += [
        Problem(
            f"{where}.methods.{name}.{key}", f"method={name} has no such setting. {suggestion(str(key), sizes)}", value
        )
        for key, value in _mapping(methods.get(name)).items()
        if key != "from" and key not in method
    ]
    return problems


def is_settled(config: Config) -> bool:
    """Return whether the method's settings are final: no default of them may be out of the model's reach."""
    budgets = config.model.budgets
    return config.model.path is None or bool(budgets.get("of_shape")) or not budgets.get("used")
