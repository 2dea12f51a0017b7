"""Settings that train.py refuses, with a message and exit code 2, before it loads any weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.refusals import assert_refused, without_recovery

Command = Callable[..., tuple[int, str]]

WHOLE, FINITE = "expected a whole number", "expected a finite number"

# By name: arguments, and parts of the message. recovery=none is added if they name no recovery.
BAD_SETTINGS: dict[str, tuple[list[str], list[str]]] = {
    "unknown method": (
        ["method=cdmoee"],
        ["method=cdmoee", "no such method", "Did you mean cdmoe?"],
    ),
    "sizes of what is not recorded": (
        ["plan_only=true", "model.path=Qwen/Qwen9"],
        ["model.path=Qwen/Qwen9", "does not use the hub", "openai/gpt-oss-20b", "config.json"],
    ),
    "sizes, perhaps": (["plan_only=maybe"], ["plan_only=maybe", "true or false"]),
    "sizes beyond a budget": (
        ["plan_only=true", "method=reap", "method.memory_ratio=0.05"],
        ["method.memory_ratio=0.05", "still has 0.3449 of its size"],
    ),
    "unknown refit": (["method.refit=weights"], ["method.refit=weights", "coefficients"]),
    "smaller than the model without its experts": (
        ["method=reap", "method.memory_ratio=0.05"],
        ["method.memory_ratio=0.05", "still has 0.3449 of its size", "layer_drop"],
    ),
    "two budgets": (
        ["method=moei2", "method.memory_ratio=0.6", "method.removed_expert_ratio=0.5"],
        ["removed_expert_ratio and method.memory_ratio are both set"],
    ),
    "a rank that saves nothing": (
        ["method=moei2", "method.average_rank=50"],
        ["method.average_rank=50", "below 42.67", "use null to factorize nothing"],
    ),
    "nothing asked of the factors": (
        ["method=svd_llm", "method.removed_expert_ratio=null"],
        ["both null: set one of them"],
    ),
    "no children": (["method=moei2", "method.parents=100"], ["must be below method.population=100"]),
    "coefficients where nothing is condensed": (
        ["method=moei2", "method.refit=coefficients"],
        ["method.refit=coefficients", "method=moei2 condenses no layer", "method.refit=true"],
    ),
    "part of an iteration": (["method=moei2", "method.iterations=2.5"], ["method.iterations=2.5", WHOLE]),
    "part of a candidate": (["method=moei2", "method.num_candidates=1.5"], ["method.num_candidates=1.5", WHOLE]),
    "part of a layer": (["method=moei2", "method.block_size=2.5"], ["method.block_size=2.5", WHOLE]),
    "parents in words": (["method=moei2", "method.parents=abc"], ["method.parents=abc", WHOLE]),
    "seed of a method": (["method=moei2", "method.seed=abc"], ["method.seed=abc", WHOLE]),
    "alpha that is no number": (["method=moei2", "method.alpha=nan"], ["method.alpha=nan", FINITE]),
    "alpha in words": (["method=moei2", "method.alpha=abc"], ["method.alpha=abc", FINITE]),
    "no alpha": (["method=moei2", "method.alpha=null"], ["method.alpha=null", FINITE]),
    "no prune ratio": (["method=moei2", "method.prune_ratio=null"], ["method.prune_ratio=null", FINITE]),
    "whitening in words": (["method=moei2", "method.whitening=maybe"], ["method.whitening=maybe", "true or false"]),
    "normalize in words": (["method=moei2", "method.normalize=maybe"], ["method.normalize=maybe", "true or false"]),
    "search that is no word": (["method=naee", "method.search=3"], ["method.search=3", "expected a string"]),
    "one option for a list": (
        ["method=cdmoe_moei2", "method.num_experts=4"],
        ["method.num_experts=4", "expected a list (each a whole number)", "Write method.num_experts=[4]"],
    ),
    "wrong option in a list": (
        ["method=cdmoe_moei2", "method.prune_ratios=[0.5,half]"],
        ["method.prune_ratios[1]=half", FINITE],
    ),
    "half a measurement": (["method=cdmoe_moei2", "method.measurements=1.5"], ["method.measurements=1.5", WHOLE]),
    "half a round": (["method=reap", "method.rounds=1.5"], ["method.rounds=1.5", "whole number of at least 1"]),
    "rounds of nothing": (["method=none", "method.rounds=2"], ["method.rounds=2", "no step to repeat"]),
    "rounds of a step that runs once": (
        ["method=svd_llm", "method.rounds=2"],
        ["method.rounds=2", "method=svd_llm cannot compress again what it has compressed", "method.rounds=1"],
    ),
    "rounds of different widths": (
        ["method=narrow", "method.allocation=global", "method.rounds=2"],
        ["method.rounds=2", "cannot compress again"],
    ),
    "rounds without anything to remove": (
        ["method=layer_drop", "method.memory_ratio=0.7", "method.rounds=6", "recovery.steps=100"],
        ["method.rounds=6", "would have nothing to remove", "Use fewer rounds"],
    ),
    "rounds that only narrow or factorize": (
        ["method=cdmoe_moei2", "method.num_experts=[]", "method.prune_ratios=[]", "method.rounds=2"],
        ["method.rounds=2", "cannot compress again"],
    ),
    "an early round that cannot reach its share": (
        [
            *("method=cdmoe_moei2", "method.num_experts=[]", "method.prune_ratios=[0.1]"),
            *("method.memory_ratio=0.5", "method.rounds=2"),
        ],
        ["method.rounds=2", "not every round can reach its share", "the strongest options", "Use fewer rounds"],
    ),
    "rounds of a streamed model": (
        ["method=reap", "method.rounds=2", "model.streaming=true", "recovery=none"],
        ["method.rounds=2", "model.streaming=false"],
    ),
    "rounds of sharded weights": (
        ["method=reap", "method.rounds=2", "trainer=fsdp2", "recovery=distill"],
        ["method.rounds=2", "trainer=fsdp2 leaves no whole model", "trainer=ddp"],
    ),
    "more rounds than steps": (
        ["method=reap", "method.rounds=4", "recovery=distill", "recovery.steps=3", "recovery.warmup_steps=0"],
        ["method.rounds=4", "at most recovery.steps=3"],
    ),
    "a warm-up longer than a round": (
        ["method=reap", "method.rounds=3", "recovery=distill", "recovery.steps=100", "recovery.warmup_steps=33"],
        ["recovery.warmup_steps=33", "below 33", "one of 3 rounds"],
    ),
    "value of a step alone": (
        ["method=none", "method.steps=[{_target_:recondense.methods.cdmoe.CDMoE,num_experts:x}]"],
        ["method.steps[0].num_experts=x", WHOLE],
    ),
    "setting that no step has": (
        ["method=moei2", "+method.populatoin=9"],
        ["method.populatoin", "no such setting", "Did you mean method.population?"],
    ),
    "steps that are no list": (["method.steps=3"], ["method.steps=3", "expected a list of steps"]),
    "step that is no step": (["method.steps=[3]"], ["method.steps[0]=3", "a class's name", "_target_"]),
    "rank of adapters": (["recovery=lora", "recovery.lora.rank=0"], ["recovery.lora.rank=0", "at least 1"]),
    "scale of adapters": (["recovery=lora", "recovery.lora.alpha=0"], ["recovery.lora.alpha=0", "above 0"]),
    "dropout of one": (["recovery=lora", "recovery.lora.dropout=1"], ["recovery.lora.dropout=1:", "[0, 1)"]),
    "dropout of experts' adapters": (
        ["recovery=lora", "recovery.lora.dropout=0.1"],
        ["recovery.lora.dropout=0.1", "recovery.lora.target=both", "target=attention or recovery.lora.dropout=0"],
    ),
    "adapters elsewhere": (
        ["recovery=lora", "recovery.lora.target=router"],
        ["recovery.lora.target=router", "no such choice", "attention, both, experts"],
    ),
    "adapters that do not train": (
        ["recovery=lora", "recovery.trainable=experts"],
        ["recovery.trainable=experts", "recovery=lora trains adapters", "recovery=finetune"],
    ),
    "unknown trainable": (
        ["recovery=finetune", "recovery.trainable=router"],
        ["recovery.trainable=router", "no such choice", "all, attention, experts, lora, norms, routers"],
    ),
    "unknown part": (
        ["recovery=finetune", "recovery.trainable=[experts,router]"],
        ["recovery.trainable[1]=router", "no such choice", "Did you mean routers?"],
    ),
    "routers that no layer has": (
        ["recovery=routers", "method=cdmoe"],
        ["recovery.trainable=routers", "method=cdmoe leaves no router", "recovery.router_layers=all"],
    ),
    "routers that no layer has after the first round": (
        [
            *("recovery=routers", "method=none", "method.rounds=2"),
            "method.steps=[{_target_:recondense.methods.cdmoe.CDMoE,num_experts:2,num_layers:[1]},"
            "{_target_:recondense.methods.decompose.Decompose,ratio:0.5}]",
        ],
        ["recovery.trainable=routers", "leaves no router in the layers that it changes in round 1"],
    ),
    "unknown model": (["model=qwen_mo"], ["model=qwen_mo", "Did you mean qwen_moe?"]),
    "unknown experiment": (["experiment=demmo"], ["experiment=demmo", "Did you mean demo?"]),
    "recipe without its folder": (
        ["experiment=cdmoe_qwen_e4"],
        ["experiment=cdmoe_qwen_e4", "Did you mean paper/cdmoe_qwen_e4?"],
    ),
    "part of recipes": (
        ["experiment=paper/_moei2x", "evaluation=none"],
        ["no such experiment", "Did you mean paper/moei2_"],
    ),
    "group that is there already": (
        ["+experiment=demo"],
        ["recondense: +experiment=demo: + adds a group, and experiment is there already. Write experiment=demo."],
    ),
    "setting that is there already": (
        ["+seed=3"],
        ["recondense: +seed=3: + adds a setting, and seed is there already. Write seed=3."],
    ),
    "class that is none of steps": (
        ["method=none", "method.steps=[{_target_:collections.OrderedDict}]"],
        ["method.steps[0]=collections.OrderedDict: is not a step of a method: it has no budget, ", "methods.step.Step"],
    ),
    "folder that cannot be made": (
        ["run_dir=/proc/foo", "plan_only=true"],
        ["run_dir=/proc/foo-plan_only: cannot be written to (", "Choose another output_dir or run_dir."],
    ),
    "experts of the built-in model": (
        ["model.pretrain.config.num_experts_per_tok=99"],
        ["model.pretrain.config: the config says that each token selects 99 of the 16 experts"],
    ),
    "no choice": (["logger=null"], ["logger=null", "Choices: default"]),
    "unknown setting": (["recovery.stepz=3"], ["recovery.stepz", "no such setting", "Did you mean recovery.steps?"]),
    "setting of another group": (["num_experts=3"], ["num_experts", "no such setting", "method.num_experts"]),
    "unknown group": (["metod=cdmoe"], ["metod", "no such setting", "Did you mean method?"]),
    "added setting": (["+recovery.momentum=1"], ["recovery.momentum", "no such setting", "learning_rate"]),
    "no setting at all": (["a"], ["a: is not a setting. Write key=value"]),
    "no name of a setting": ([" a=1"], [" a=1: is not a setting. Write key=value"]),
    "a list that is not closed": (["a=["], ["a=[: the brackets or commas cannot be read. Write 'key=[a, b]'"]),
    "a number as text": (["recovery.steps='3'"], ["recovery.steps='3': expected a whole number, not a string"]),
    "a list as text": (
        ["method.num_layers='[1,2]'"],
        ["method.num_layers='[1,2]' must be a number, a list of layers, or all"],
    ),
    "a seed beyond 32 bits": (["method=moei2", "seed=4294967296"], ["seed=4294967296: must be in [0, 4294967295]"]),
    "more steps than can be counted": (["recovery.steps=1000000000000000000000"], ["is too large"]),
    "a batch beyond any memory": (["recovery.batch_size=99999999999999999999"], ["is too large"]),
    "wrong type": (["recovery.steps=many"], ["recovery.steps=many", "expected a whole number"]),
    "unknown dtype": (["model.dtype=bf16"], ["model.dtype=bf16", "Did you mean bfloat16?", "float32"]),
    "more experts than there are": (["method.num_experts=99"], ["method.num_experts=99", "16 routed experts"]),
    "negative experts": (["method.num_experts=-1"], ["method.num_experts=-1", "at least 0"]),
    "layer that is not there": (["method.num_layers=[2,7]"], ["layer 7", "0 to 5", "did you mean 5?"]),
    "layer twice": (["method.num_layers=[1,1]"], ["method.num_layers=[1, 1]", "twice"]),
    "more layers than there are": (["method.num_layers=9"], ["method.num_layers=9", "6 MoE layers"]),
    "unknown search of experts": (
        ["method.expert_search=frequent"],
        ["method.expert_search=frequent", "must be one of greedy, frequency, routing_weight"],
    ),
    "no text for coefficients": (
        ["method.coefficient_max_length=0"],
        ["method.coefficient_max_length=0", "at least 1, or null for whole texts"],
    ),
    "length in words": (
        ["method=cdmoe_moei2", "method.coefficient_max_length=whole"],
        ["method.coefficient_max_length=whole", WHOLE],
    ),
    "BOS in words": (["data.bos=maybe"], ["data.bos=maybe", "true or false"]),
    "answers in words": (["data.answer_only=some"], ["data.answer_only=some", "true or false"]),
    "unknown value of a step": (["method.shared_gate=men"], ["method.shared_gate=men", "mean or token"]),
    "step that is not there": (
        ["method._target_=recondense.methods.cdmoe.Absent"],
        ["method._target_=recondense.methods.cdmoe.Absent: "],
    ),
    "one of several that is not there": (
        ["method.steps=[recondense.methods.cdmoe.CDMoE,recondense.methods.cdmoe.Absent]"],
        ["method.steps[1]=recondense.methods.cdmoe.Absent: "],
    ),
    "wrong built-in architecture": (
        ["model.pretrain.config.hidden_size=wide"],
        ["model.pretrain.config", "hidden_size"],
    ),
    "no such model folder": (["model.path=./nowhere"], ["model.path=./nowhere", "no such folder"]),
    "hub out of reach": (["model.path=nobody/nothing"], ["nobody/nothing", "hub cannot be reached"]),
    "no such calibration file": (
        ["data=texts", "data.calibration.path=/nowhere.jsonl"],
        ["data.calibration.path=/nowhere.jsonl", "no such file"],
    ),
    "no calibration text": (["data=texts"], ["data.calibration.path=null", "the method needs it for its search"]),
    "no training text": (
        ["data=texts", "method=none", "recovery=finetune"],
        ["data.train.path=null", "recovery=finetune trains on it"],
    ),
    "share beside a budget": (
        ["method=svd_llm", "method.ratio=0.5", "method.removed_expert_ratio=0.25"],
        ["method.ratio=0.5", "method.removed_expert_ratio=0.25", "set one of them to null"],
    ),
    "rank beside a budget": (
        ["method=moei2", "method.memory_ratio=0.7", "method.average_rank=20"],
        ["method.average_rank=20", "a budget", "default"],
    ),
    "importance that is none": (
        ["method=svd_llm", "method.alpha=1"],
        ["method.alpha=1", "no effect", "method.importance=uniform"],
    ),
    "layers beside a budget": (
        ["method=cdmoe", "method.num_layers=1", "method.memory_ratio=0.8"],
        ["method.num_layers=1", "a budget decides"],
    ),
    "length below one": (["data.calibration.max_length=0"], ["data.calibration.max_length=0", "at least 1"]),
    "samples below one": (["data.calibration.num_samples=0"], ["data.calibration.num_samples=0", "at least 1"]),
    "no learning": (["recovery=finetune", "recovery.learning_rate=0"], ["recovery.learning_rate=0:", "above 0"]),
    "warm-up without end": (
        ["recovery=distill", "recovery.steps=5", "recovery.warmup_steps=5"],
        ["recovery.warmup_steps=5", "below recovery.steps=5"],
    ),
    "no epochs": (["recovery=finetune", "recovery.epochs=0"], ["recovery.epochs=0:", "above 0"]),
    "stage that is misspelt": (
        ["recovery=finetune", "recovery.stages=[{name:lm,step:3}]"],
        ["recovery.stages[0].step", "Did you mean recovery.stages[0].steps?"],
    ),
    "stage of the published two": (
        ["recovery=two_stage", "recovery.stages.1.data.form=alpacca"],
        ["recovery.stages[1].data.form=alpacca", "no such choice", "Did you mean alpaca?"],
    ),
    "stage without its file": (
        ["recovery=finetune", "recovery.stages=[{name:a,data:{source:texts,train:{path:/nowhere}}}]"],
        ["recovery.stages[0].data.train.path=/nowhere", "no such file"],
    ),
    "stages of no recovery": (
        ["recovery=none", "recovery.stages=[{name:lm}]"],
        ["recovery.objective=none: recovery.stages needs an objective"],
    ),
    "no such form": (["data=instruct", "data.form=alpacca"], ["data.form=alpacca", "Did you mean alpaca?"]),
    "records of the standard library": (["data.form=auto"], ["data.form=auto", "has no records"]),
    "hub data without a split to train on": (
        ["data=instruct", "data.splits.train=null", "recovery=finetune"],
        ["data.splits.train=null", "recovery=finetune trains on it", "Name a split of tatsu-lab/alpaca"],
    ),
    "source that is not there": (
        ["data.calibration.sources=[{path:/nowhere}]"],
        ["data.calibration.sources[0].path=/nowhere", "no such file"],
    ),
    "source without weight": (
        ["data=c4_alpaca", "data.calibration.sources.1.weight=0"],
        ["data.calibration.sources[1].weight=0:", "above 0"],
    ),
    "temperature": (["recovery=distill", "recovery.temperature=0"], ["recovery.temperature=0:", "above 0"]),
    "hidden states of predictions on disk": (
        ["recovery=distill", "recovery.teacher=cached", "recovery.hidden_share=0.25"],
        ["recovery.hidden_share=0.25", "but no hidden states", "recovery.teacher=shared"],
    ),
    "nothing kept": (["recovery=distill", "recovery.teacher_top_k=0"], ["recovery.teacher_top_k=0", "at least 1"]),
    "another model, which?": (["recovery=distill", "recovery.teacher=model"], ["recovery.teacher_path=null"]),
    "a teacher that is not there": (
        ["recovery=distill", "recovery.teacher=model", "recovery.teacher_path=./nowhere"],
        ["recovery.teacher_path=./nowhere", "there is no such folder"],
    ),
    "a teacher that nobody asks": (
        ["recovery=distill", "recovery.teacher_path=some/model"],
        ["recovery.teacher_path=some/model", "recovery.teacher=shared does not use it"],
    ),
    "a divergence": (["recovery=distill", "recovery.divergence=kl"], ["recovery.divergence=kl", "forward_kl"]),
    "share": (["recovery=distill", "recovery.hidden_share=-0.5"], ["recovery.hidden_share=-0.5", "[0, 1]"]),
    "shares together": (
        ["recovery=distill", "recovery.hidden_share=0.6", "recovery.cross_entropy_share=0.6"],
        ["recovery.hidden_share=0.6", "the sum is 1.2", "at most 1"],
    ),
    "unknown task": (["evaluation.tasks=[piqqa]"], ["evaluation.tasks", "piqqa", "did you mean piqa"]),
    "no such task folder": (
        ["evaluation.include_path=/nowhere"],
        ["evaluation.include_path=/nowhere", "no such folder"],
    ),
    "local tasks of no folder": (
        ["evaluation=local"],
        ["evaluation.include_path: must be set (evaluation=local)", "`include_path: ???`"],
    ),
    "export that is no choice": (["export.enabled=maybe"], ["export.enabled=maybe", "true, false or auto"]),
    "format that is no choice": (["export.format=stok"], ["export.format=stok", "Did you mean stock?"]),
    "check that is no choice": (["export.verify=logit"], ["export.verify=logit", "Did you mean logits?"]),
    "padding beyond all": (["export.max_padding=1.5"], ["export.max_padding=1.5", "[0, 1]"]),
    "stock where it cannot be": (
        ["method=moei2", "export.format=stock"],
        ["export.format=stock", "low-rank experts", "a config of qwen2_moe cannot express", "export.format=auto"],
    ),
    "repository that is none": (["export.push_to_hub=mine"], ["export.push_to_hub=mine", "owner/name"]),
    "push by nobody": (["export.push_to_hub=me/mine"], ["no token", "hf auth login"]),
    "project that W&B refuses": (
        ["logger.wandb.project=a/b"],
        ["logger.wandb.project=a/b", "1 to 128 characters and none of"],
    ),
    "team with a space": (["logger.wandb.entity='my team'"], ["logger.wandb.entity=my team", "no spaces"]),
    "tag that is too long": ([f"logger.wandb.tags=[a,{'t' * 65}]"], ["logger.wandb.tags[1]", "1 to 64 characters"]),
    "group that is too long": ([f"logger.wandb.group={'g' * 129}"], ["logger.wandb.group", "1 to 128 characters"]),
    "no such device": (["model.device=gpu"], ["model.device=gpu", "cuda:N"]),
    "slow experts": (["model.device=cpu", "model.experts=batched_mm"], ["batched_mm", "60 times slower", "grouped_mm"]),
    "scratch that is no size": (["max_scratch_bytes=lots"], ["max_scratch_bytes", "'lots'", "512MiB"]),
    "scratch too small": (["max_scratch_bytes=1MiB"], ["max_scratch_bytes=1MiB", "at least 16MiB"]),
    "sweep without -m": (["method.num_layers=2,4"], ["method.num_layers=2,4", "Add -m", "method.num_layers=[2,4]"]),
    "one bad run of a sweep": (["-m", "method.num_layers=2,9"], ["method.num_layers=9", "6 MoE layers"]),
    "every bad file of a sweep": (
        ["-m", "data=texts", "data.calibration.path=/nope1,/nope2"],
        ["2 problems", "data.calibration.path=/nope1:", "data.calibration.path=/nope2:"],
    ),
    "every bad limit of a sweep": (
        ["-m", "recovery=finetune", "recovery.steps=5", "recovery.warmup_steps=6,7"],
        ["2 problems", "recovery.warmup_steps=6:", "recovery.warmup_steps=7:"],
    ),
    "every bad model of a sweep": (
        ["-m", "model.path=./nowhere1,./nowhere2"],
        ["2 problems", "model.path=./nowhere1:", "model.path=./nowhere2:"],
    ),
    "variable that is not set": (
        ["seed=${oc.env:RECONDENSE_ABSENT}", "recovery.steps=${foo}"],
        ["2 problems", "Environment variable 'RECONDENSE_ABSENT' not found", "Interpolation key 'foo' not found"],
    ),
    "sweep into one folder": (
        ["-m", "method.num_layers=2,4", "run_dir=/nowhere/run"],
        ["run_dir=/nowhere/run", "several runs", "run_dir=null"],
    ),
    "run of a sweep inside another": (
        ["-m", "run_dir=/nowhere/run,/nowhere/run/stages/a"],
        ["run_dir=/nowhere/run/stages/a", "among the results of another run of the sweep, /nowhere/run."],
    ),
}


def test_variables_of_wandb_are_checked_like_the_config(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "a/b")
    monkeypatch.setenv("WANDB_TAGS", f"short,{'t' * 65}")
    assert_refused(*command("recovery.steps=0"), ["3 problems", "WANDB_PROJECT=a/b", "WANDB_TAGS", "recovery.steps=0"])
    code, error = command("recovery.steps=0", "logger.wandb.mode=disabled")
    assert code == 2 and "WANDB" not in error


# They read lm-eval's list of tasks, which takes half a minute on a busy machine.
SLOW = ("unknown task", "recipe without its folder")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow if kind in SLOW else ()) for kind in BAD_SETTINGS]
)
def test_bad_command(command: Command, kind: str) -> None:
    arguments, parts = BAD_SETTINGS[kind]
    assert_refused(*command(*without_recovery(arguments)), parts)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda(command: Command) -> None:
    assert_refused(*command("model.device=cuda:1", "recovery=none"), ["model.device=cuda:1", "no CUDA device", "cpu"])
