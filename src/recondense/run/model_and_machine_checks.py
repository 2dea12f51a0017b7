"""Checks of a run that need torch and transformers: of the model's config and of this machine, without weights."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from transformers import PretrainedConfig

from recondense.config.checks import check_on_cpu
from recondense.config.problems import Problem
from recondense.config.rounds import rounds_of
from recondense.config.schema import Config
from recondense.errors import UserError
from recondense.methods.step import Step
from recondense.models import families, model_classes, moe_blocks, parameters
from recondense.models.model_files import read_history
from recondense.run.build_steps import check_steps
from recondense.run.model_checks import check_model, check_teachers
from recondense.run.resolved_run import Run
from recondense.run.rounds import check_rounds, make_rounds, steps_of_rounds
from recondense.run.task_checks import check_run_tasks


def preflight(run: Run, wrong: Collection[str] = ()) -> Iterator[Problem]:
    """Yield the problems of a run that can be found without its weights.

    Args:
        run: the run.
        wrong: names of settings with known problems. What depends on them is not checked, because the run has defaults
            in their place. If the method is among them, the run has no steps.
    """
    yield from (problem for problem in _check(run, wrong) if problem.setting not in wrong)


def _check(run: Run, wrong: Collection[str]) -> Iterator[Problem]:
    config = run.config
    groups = {setting.partition(".")[0] for setting in wrong}
    if foreign := check_steps(config.method, run.steps):
        yield from foreign
        groups.add("method")
    if "method" not in groups:
        yield from _check_refit(run)
    if not config.plan_only:
        yield from _check_machine(config)
        yield from check_run_tasks(config.evaluation) if "evaluation" not in groups else ()
        yield from _check_processes(run)
    if "model" in wrong or any(setting.startswith(("model.path", "model.pretrain")) for setting in wrong):
        return
    original = check_model(config)
    yield from original.problems
    if original.config is not None:
        yield from _check_on_config(run, original.config, groups)
    if "recovery" not in groups and not config.plan_only:
        yield from check_teachers(run, original)


def _check_on_config(run: Run, planned: PretrainedConfig, groups: Collection[str]) -> Iterator[Problem]:
    """Yield problems of the run's settings with the model's config.

    Args:
        run: the run.
        planned: the config.
        groups: the groups of settings with known problems.
    """
    config = run.config
    if not config.plan_only:
        if not model_classes.has_attention(planned, config.model.attention):
            text = f"model_type {planned.model_type} does not support it. Use eager."
            yield Problem("model.attention", text, config.model.attention)
        yield from _check_rounding(config, planned)
    steps_or_training = run.steps or config.recovery.objective != "none"  # an evaluation needs no MoE layer
    if "method" not in groups and steps_or_training:
        try:
            yield from _check_steps(run, planned)
        except UserError as error:
            yield Problem("", str(error))


def _check_refit(run: Run) -> Iterator[Problem]:
    method = run.config.method
    if method.get("refit") == "coefficients" and not any(step.condenses for step in run.steps):
        text = f"method={method.get('name')} condenses no layers. Use method.refit=true or false."
        yield Problem("method.refit", text, "coefficients")


def _check_steps(run: Run, planned: PretrainedConfig) -> Iterator[Problem]:
    """Yield problems of the method, or of the recovery, with this model."""
    if not run.steps:
        families.original_facts(planned)  # raises an error for an unknown family
        yield from _check_something_trains(run, planned)
        return
    facts = families.facts(planned)
    yield from _check_low_rank(run.steps, facts)
    problems = [Problem("", text) for step in run.steps for text in step.check(facts)]
    problems += _check_budgets(run.steps, planned)
    problems = problems or _check_order(run.steps, planned)
    if not problems and rounds_of(run.config.method) > 1:
        problems += check_rounds(run.config.method, run.steps, model_classes.on_meta(planned))
    yield from problems
    if not problems:
        yield from _check_stock(run, planned)
        yield from _check_routers_train(run, planned)


def _check_something_trains(run: Run, planned: PretrainedConfig) -> Iterator[Problem]:
    """Yield stages that have nothing to train, such as experts in a model without experts and condensed layers."""
    from recondense.recovery import trainable

    stages = [stage for stage in run.stages if stage.recovery.objective != "none"]
    changed = read_history(run.config.model).changed_layers(planned.num_hidden_layers)
    model = model_classes.on_meta(planned) if stages else None
    for stage in stages:
        if model is None or not trainable.trains_nothing(model, changed, stage.recovery):
            continue
        lacks, remedy = f"has no {trainable.words(stage.recovery)}", "trainable=all"
        if stage.recovery.parts == ("routers",) and stage.recovery.router_layers == "changed":
            lacks, remedy = "has no changed layer with a router", "router_layers=all"
        text = f"the model ({planned.model_type}) {lacks} to train. Use {stage.where}.{remedy}, or recovery=none."
        yield Problem(stage.where, text)


def _check_routers_train(run: Run, planned: PretrainedConfig) -> Iterator[Problem]:
    """Yield stages that train routers alone although the method, or one of its rounds, leaves none to train."""
    from recondense.run.sizes import outlined

    stages = [stage for stage in run.stages if stage.recovery.objective != "none"]
    alone = [stage for stage in stages if stage.recovery.parts == ("routers",)]
    alone = [stage for stage in alone if stage.recovery.router_layers == "changed"]
    if not alone or any(step.condenses and step.left_open for step in run.steps):  # not known before the search
        return
    model, steps = model_classes.on_meta(planned), list[Step]()
    for one in make_rounds(run.config.method, run.steps, model):
        steps += one.steps
        with outlined(model, steps) as operations:
            if any(moe_blocks.router_modules(model, operation.layer) for operation in operations):
                continue
        after = "" if one.is_last else f" in round {one.number}"
        lacks = f"method={run.config.method.get('name')} leaves no router in the layers that it changes{after}."
        for stage in alone:
            text = f"{lacks} Use {stage.where}.router_layers=all for those of other layers, or train other parts."
            yield Problem(f"{stage.where}.trainable", text, "routers")
        return


def _check_low_rank(steps: Sequence[Step], facts: families.Facts) -> Iterator[Problem]:
    """Yield a problem if the method needs full experts of one width but those of the model are not."""
    if facts.uneven and any(step.needs_whole_experts for step in steps):
        text = (
            "the experts of this model differ in width, but this method needs one width. Use method=layer_drop or "
            "block_drop, or narrow the original with method.allocation=uniform."
        )
        yield Problem("model.path", text)
    if facts.factorized and any(step.needs_whole_experts for step in steps):
        layers = ", ".join(map(str, facts.factorized[:6])) + (", ..." if len(facts.factorized) > 6 else "")
        text = (
            f"the experts of layers {layers} are already low-rank or constants, but this method needs full ones. Use "
            "method=layer_drop or block_drop, or compress a folder without constants that was exported with "
            "export.format=dense."
        )
        yield Problem("model.path", text)


def _check_order(steps: Sequence[Step], planned: PretrainedConfig) -> list[Problem]:
    """Return the problem of a step that does not fit the shapes that the earlier ones leave."""
    from recondense.run.sizes import outlined

    if len(steps) > 1:
        try:
            with outlined(model_classes.on_meta(planned), steps):
                pass
        except UserError as error:
            return [Problem("", f"{error}.")]
    return []


def _check_stock(run: Run, planned: PretrainedConfig) -> Iterator[Problem]:
    """Yield a problem if export.format=stock and the family's class cannot represent the compressed model."""
    export = run.config.export
    if export.format != "stock" or export.enabled is False or not run.steps:
        return
    from recondense.export.stock_or_bundled import choose_layout
    from recondense.models.layer_shapes import layer_shapes
    from recondense.run.sizes import outlined

    model = model_classes.on_meta(planned)
    try:
        with outlined(model, steps_of_rounds(run.config.method, run.steps, model)):
            choose_layout(model, layer_shapes(model), export)
    except UserError as error:  # NotStock, or a budget that the method cannot keep
        yield Problem("", f"{error}.")


def _check_budgets(steps: Sequence[Step], planned: PretrainedConfig) -> list[Problem]:
    """Return budgets that cannot be met by removing all routed experts and routers, unless a step removes layers."""
    ratios = [step.budget.memory_ratio for step in steps if step.budget.memory_ratio]
    if not ratios or any(step.removes_layers for step in steps):
        return []
    counts, facts = parameters.parameter_counts(planned), families.facts(planned)
    routers = len(facts.moe_layers) * (facts.hidden_size + counts.router_row * facts.num_experts)
    rest = (counts.total - counts.routed_experts - routers) / counts.total
    text = (
        f"without any routed experts, the model still has {rest:.4g} of its size; use a larger ratio, or "
        "method=layer_drop or block_drop"
    )
    return [Problem("method.memory_ratio", text, ratio) for ratio in dict.fromkeys(ratios) if ratio <= rest]


def _check_machine(config: Config) -> Iterator[Problem]:
    """Yield settings that this machine does not support."""
    device = config.model.device
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    kind, _, index = device.partition(":")
    if kind == "cuda" and not count:
        yield Problem("model.device", "this machine has no CUDA device. Use model.device=cpu or auto.", device)
    elif index and int(index) >= count:
        yield Problem("model.device", f"this machine has {count} CUDA devices, numbered from 0.", device)
    if device == "auto" and not count:
        yield from check_on_cpu(config)


def _check_processes(run: Run) -> Iterator[Problem]:
    """Yield problems of the run's processes, and of trainings that cannot run on several processes."""
    from recondense.run import launching

    trainer, device = run.config.trainer, run.config.model.device
    stages = [stage for stage in run.stages if stage.recovery.objective != "none"]
    gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    batch_sizes = {f"{stage.where}.batch_size": stage.recovery.batch_size for stage in stages}
    problems = launching.check_processes(trainer, gpu, batch_sizes)
    yield from problems
    if not problems and ":" in device and launching.plan_processes(trainer, gpu).world_size > 1:
        yield Problem("model.device", "each process uses its own GPU. Use auto.", device)
    for stage in stages:
        if trainer.shards and "lora" in stage.recovery.parts:
            text = (
                f"adapters can only be merged into unsharded weights, but trainer={trainer.strategy} shards them. Use "
                "trainer=ddp or deepspeed_zero2, or trainable=experts."
            )
            yield Problem(f"{stage.where}.trainable", text, stage.recovery.trainable)


def _check_rounding(config: Config, planned: PretrainedConfig) -> Iterator[Problem]:
    """Yield a problem if DeepSpeed would round frozen weights, or train in fp16."""
    trainer = config.trainer
    dtype = config.model.dtype if config.model.dtype != "auto" else str(planned.dtype).rpartition(".")[2]
    if not trainer.deepspeed or config.recovery.objective == "none":
        return
    if trainer.precision.startswith("bf16") and dtype != "bfloat16":
        text = (
            f"DeepSpeed would round all weights of a model in {dtype}, including the original's. Use "
            "trainer.precision=32-true, or model.dtype=bfloat16."
        )
        yield Problem("trainer.precision", text, trainer.precision)
    elif dtype == "float16":
        yield Problem("model.dtype", "DeepSpeed would train in fp16. Use model.dtype=bfloat16.", "float16")
