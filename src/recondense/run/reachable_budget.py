"""A default budget that its method can reach on its model, and the line that says what it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from recondense.config.schema import Config
from recondense.errors import UserError
from recondense.models import families, model_classes
from recondense.models.config_json import config_values, model_type
from recondense.models.families import Facts
from recondense.models.published_configs import recorded_config, recorded_ids
from recondense.run.build_steps import build_steps, check_steps
from recondense.run.default_budget import is_settled
from recondense.run.model_checks import planned_config
from recondense.run.sizes import compare, outlined

GRID = 10_000  # a memory ratio is lowered in steps of 1 / GRID


def reachable(config: Config) -> Config:
    """Return the config with a default budget that its method can reach on its model.

    A ratio becomes the smallest one that the method can reach, numbers of experts become what the model has. If nothing
    works, or the model cannot be read, the config stays as it is: the checks of the run say why.
    """
    if is_settled(config):
        return config
    budgets = dict(config.model.budgets)
    try:
        method = fitted(config.method, budgets["used"], planned_config(config.model, config.plan_only))
    except UserError:
        return config
    used = {name: method[name] for name in budgets["used"]}
    if used != budgets["used"]:
        budgets["asked"] = budgets["used"]
    return replace(config, method=method, model=replace(config.model, budgets={**budgets, "used": used}))


def fitted(method: Mapping[str, Any], used: Mapping[str, Any], planned: PretrainedConfig) -> Mapping[str, Any]:
    """Return the settings of a method, with those that are defaults within the reach of a model.

    Args:
        method: settings of the method.
        used: those of them that are defaults.
        planned: config of the model.

    Raises:
        UserError: the family is not supported, the model has no MoE layers, or the other settings are wrong.
    """
    facts = families.facts(planned)
    capped = {**method, **_capped(used, facts)}
    if check_steps(capped, build_steps(capped)):
        return method
    if "memory_ratio" in used and (model := _outline(planned)) is not None:
        capped["memory_ratio"] = _nearest(capped, model, facts)
    return capped


def _outline(planned: PretrainedConfig) -> PreTrainedModel | None:
    """Return a model without weights; None if none can be made from its config, which the checks of a run explain."""
    try:
        return model_classes.on_meta(planned)
    except Exception:  # model classes raise arbitrary errors for invalid values
        return None


def _capped(used: Mapping[str, Any], facts: Facts) -> dict[str, Any]:
    """Return the default numbers of experts, lowered to what the model has."""
    capped = dict(used)
    if "num_experts" in used:
        capped["num_experts"] = min(used["num_experts"], max(1, facts.num_experts // 2))
    if "prune_ratio" in used and facts.top_k < facts.num_experts:
        most = GRID * (facts.num_experts - facts.top_k) // facts.num_experts / GRID
        capped["prune_ratio"] = min(used["prune_ratio"], most)
    return capped


def _nearest(method: Mapping[str, Any], model: PreTrainedModel, facts: Facts) -> float:
    """Return the smallest memory ratio, from that of the method on, that the method can reach; that one if none is."""
    ratio = float(method["memory_ratio"])
    too_small, reached = round(GRID * ratio), GRID - 1
    if _works(method, ratio, model, facts) or not _works(method, reached / GRID, model, facts):
        return ratio
    while reached - too_small > 1:
        middle = (too_small + reached) // 2
        if _works(method, middle / GRID, model, facts):
            reached = middle
        else:
            too_small = middle
    return reached / GRID


def _works(method: Mapping[str, Any], ratio: float, model: PreTrainedModel, facts: Facts) -> bool:
    try:
        steps = build_steps({**method, "memory_ratio": ratio})
        if any(step.check(facts) for step in steps):
            return False
        with outlined(model, steps):
            return True
    except UserError:
        return False


def lines(config: Config) -> list[str]:
    """Return what a run prints first: the choice of `model=` if its path decided it, and its default budget."""
    texts = [_family_line(config)] if config.model.budgets.get("by_path") else []
    return [*texts, *([_budget_line(config)] if config.model.budgets.get("from") else [])]


def _family_line(config: Config) -> str:
    model, recovery = config.model, config.recovery
    values = config_values(str(model.path), model.revision, hub=not config.plan_only)
    kind = "" if values is None else model_type(values)
    reason = f" is {'an' if kind[0] in 'aeiou' else 'a'} {kind}, so" if kind else ":"
    trained: str = recovery.objective
    if trained != "none" and recovery.stages:
        trained = f"{len(recovery.stages)} stages"
    elif trained != "none":
        amount = f"{recovery.steps} steps" if recovery.epochs is None else f"{recovery.epochs:g} epochs"
        trained += f", {amount} of {recovery.batch_size}, learning rate {recovery.learning_rate}"
    chosen = f"model: {model.path}{reason} model={model.name} is used (model=... to choose another)"
    return f"{chosen}; data={config.data.name}; recovery: {trained}"


def _budget_line(config: Config) -> str:
    budgets = config.model.budgets
    used = dict(budgets["used"])
    parts = []
    if "num_layers" in used:
        parts.append(f"{used['num_layers']} layers")
    if "num_experts" in used:
        parts.append(f"{'with ' if parts else ''}{used['num_experts']} experts")
    parts = [" ".join(parts)] if parts else []
    parts += [f"{name}={value}" for name, value in used.items() if name not in ("num_layers", "num_experts")]
    asked = budgets.get("asked", used).get("memory_ratio")
    if asked != used.get("memory_ratio"):
        parts.append(f"the nearest to {asked} that {config.method['name']} reaches on this model")
    memory = [f"memory {ratio:.4f}" for ratio in _memory(config)]
    change = f"to change it: {', '.join(f'method.{name}' for name in used)}"
    if replaced := [f"{name}={config.method[name]}" for name in budgets.get("replaced", ())]:
        given = f"with your {', '.join(replaced)}{''.join(f': {text}' for text in memory)}"
        return f"budget: {', '.join(parts)} ({budgets['from']}); {given}; {change}"
    return f"budget: {', '.join([*parts, *memory])} ({budgets['from']}; {change})"


def _memory(config: Config) -> list[float]:
    """Return the parameters of the compressed model / those of the original; empty if they cannot be computed."""
    try:
        model = _outline(_planned(config))
        if model is None:
            return []
        sizes = compare(model, build_steps(config.method))
    except UserError:
        return []
    return [sizes.after.total / sizes.before.total]


def _planned(config: Config) -> PretrainedConfig:
    path = config.model.path
    return recorded_config(path) if path in recorded_ids() else planned_config(config.model, config.plan_only)
