"""Results on a GPU are those of the CPU, and bf16 works from search to export. Skipped without a GPU."""

from __future__ import annotations

import copy
import gc
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from support.searched import whole_texts
from support.tiny_models import FAMILIES, condense_plan, logits, recorded, unchanged, windows

from recondense.config.schema import ExportConfig, ModelConfig, RecoveryConfig, TrainerConfig
from recondense.data.loader import RecoveryData
from recondense.export.write_folder import write_folder
from recondense.methods.cdmoe import CDMoE
from recondense.methods.decompose import Decompose
from recondense.methods.moei2 import InterExpertPruning
from recondense.methods.search.genetic import Genetic
from recondense.methods.step import SearchContext
from recondense.models import families, loading, moe_blocks
from recondense.models.free_memory import free_bytes
from recondense.models.low_rank import LowRankExperts
from recondense.models.replacement_blocks import GLU
from recondense.operations import Refit
from recondense.plan import Plan
from recondense.recovery.fit import fit
from recondense.recovery.module import RecoveryModule
from recondense.surgery import execute
from recondense.surgery.apply import apply

pytestmark = pytest.mark.gpu
QUIET = TrainerConfig(progress_bar=False)


def search(model: Any, step: CDMoE, scratch: int = 1 << 30) -> tuple[list[Any], dict[str, Any]]:
    return step.search(SearchContext(model, lambda: recorded(model), {}, scratch, whole_texts()))


@pytest.fixture(autouse=True)
def no_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrix products in full fp32: TF32 has only ten bits of mantissa."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.mark.parametrize("shared_gate", ["mean", "token"])
@pytest.mark.parametrize("family", FAMILIES)
def test_search_on_cuda_is_the_cpus(family: str, shared_gate: str) -> None:
    model = FAMILIES[family]()
    layers = len(families.facts(model.config).moe_layers)
    step = CDMoE(num_experts=3, num_layers=layers, shared_gate=shared_gate)
    expected, record = search(model, step)
    model.cuda()
    with unchanged(model):
        operations, cuda_record = search(model, step)
    assert [(one.layer, one.experts) for one in operations] == [(one.layer, one.experts) for one in expected]
    for on_cuda, on_cpu in zip(operations, expected, strict=True):
        assert on_cuda.coefficients == pytest.approx(on_cpu.coefficients, rel=1e-5)
        assert on_cuda.shared_gate == (
            None if on_cpu.shared_gate is None else pytest.approx(on_cpu.shared_gate, rel=1e-5)
        )
    assert cuda_record["layer_search"]["js"] == pytest.approx(record["layer_search"]["js"], rel=1e-3)
    for layer, entry in record["expert_search"].items():
        assert cuda_record["expert_search"][layer]["js"] == pytest.approx(entry["js"], rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_scratch_does_not_change_the_plan_on_cuda(family: str) -> None:
    model = FAMILIES[family]().cuda()
    step = CDMoE(num_experts=3, num_layers=1)
    expected, record = search(model, step)
    for scratch in (1, 100_000):
        operations, other_record = search(model, step, scratch)
        assert operations == expected
        assert other_record["layer_search"]["js"] == pytest.approx(record["layer_search"]["js"], rel=1e-5)


def test_fit_on_cuda_is_near_the_cpus(tmp_path: Path) -> None:
    """Eight steps of AdamW in fp32 on the same batches."""
    losses = []
    ids = windows(4, 8, seed=9)
    for device in ("cpu", "cuda"):
        model = FAMILIES["qwen2_moe"]().to(device)
        module = RecoveryModule(apply(model, condense_plan(model, [1, 2])), _recovery())
        fit(module, _data(module), tmp_path / device, QUIET, seed=0)
        with torch.no_grad():
            losses.append(module.losses(ids.to(device))["loss"].item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_from_search_to_export(family: str, tmp_path: Path) -> None:
    """The search's divergence is near fp32's, distillation lowers the loss, and the export gives the same logits."""
    model = FAMILIES[family]().bfloat16().cuda()
    exact = copy.deepcopy(model).float()
    step = CDMoE(num_experts=2, num_layers=2)
    operations, record = search(model, step)
    _, expected = search(exact, step)
    for layer, entry in record["expert_search"].items():
        assert entry["js_shared_only"] == pytest.approx(expected["expert_search"][layer]["js_shared_only"], rel=0.1)
    student = apply(model, Plan("tiny", tuple(operations)))
    module = RecoveryModule(student, _recovery(steps=40))
    module.prepare()
    ids = windows(7, 8).cuda()
    with torch.no_grad():
        before = module.losses(ids)["loss"].item()
    fit(module, _data(module), tmp_path / "checkpoints", QUIET, seed=0)
    with torch.no_grad():
        assert module.losses(ids)["loss"].item() < 0.8 * before
    for name, value in model.state_dict().items():
        assert value.is_cuda and value.dtype == (torch.float32 if name.endswith("scale") else torch.bfloat16), name
    kind = write_folder(model, None, student.plan, tmp_path / "out", "")
    if kind == "stock":
        from transformers import AutoModelForCausalLM

        loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
        loaded.cuda().eval()
        expected_BSV, actual_BSV = logits(model, ids).float(), logits(loaded, ids).float()
        torch.testing.assert_close(actual_BSV, expected_BSV, rtol=0, atol=0.05 * float(expected_BSV.abs().max()))


def moei2(model: Any) -> tuple[Plan, dict[str, Any], dict[int, dict[str, float]]]:
    """Prune, factorize (with whitening) and refit a model.

    Returns:
        the plan, the importances of experts, and the errors of the refit.
    """

    def tape() -> Any:
        return recorded(model)

    step = InterExpertPruning(prune_ratio=0.34, genetic=Genetic(population=10, iterations=4, parents=4))
    pruned, record = step.search(SearchContext(model, tape, {}, 1 << 30))
    originals = execute.execute(model, Plan("tiny", tuple(pruned)))
    ranks, _ = Decompose(average_rank=4, whitening=True).search(SearchContext(model, tape, {}, 1 << 30))
    for layer, block in originals.items():
        moe_blocks.set_block(model, layer, block)
    plan = Plan("tiny", (*pruned, *ranks, *(Refit(factorized.layer, "down_proj", 1e-2) for factorized in ranks)))
    originals = execute.execute(model, plan, tape)
    return plan, record["expert_importance"], execute.refit(model, plan, originals, tape)


@pytest.mark.parametrize("family", FAMILIES)
def test_moei2_on_cuda_is_the_cpus(family: str) -> None:
    """Dropped experts, ranks, whitened factors and the refit, in fp32."""
    ids, model, cuda_model = windows(3, 8), FAMILIES[family](), FAMILIES[family]().cuda()
    (plan, importance, errors), (cuda_plan, cuda_importance, cuda_errors) = moei2(model), moei2(cuda_model)
    assert cuda_plan.operations == plan.operations
    for layer, values in importance.items():
        assert cuda_importance[layer] == pytest.approx(values, rel=1e-3)
    for layer_index, layer_errors in errors.items():
        assert cuda_errors[layer_index] == pytest.approx(layer_errors, rel=1e-2)
    expected = logits(model, ids)
    torch.testing.assert_close(
        logits(cuda_model, ids.cuda()).cpu(), expected, rtol=0, atol=1e-2 * float(expected.abs().max())
    )


@pytest.mark.parametrize("ranks", [(8, 8, None, 16, 8, 8), (3, 5, 5, None, 7, 3)])
def test_low_rank_experts_in_bf16_on_cuda(ranks: tuple[int | None, ...]) -> None:
    """With grouped products and expert by expert, forward and backward, against fp32 on the CPU."""
    results = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        torch.manual_seed(0)
        low = LowRankExperts(
            64, 32, dict.fromkeys(("gate_proj", "up_proj", "down_proj"), ranks), GLU(torch.nn.functional.silu)
        )
        for parameter in low.parameters():
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        low = low.to(device, dtype).requires_grad_(True)
        x = torch.randn(40, 64).to(device, dtype).requires_grad_(True)
        y = low(x, torch.randint(0, 5, (40, 2)).to(device), torch.rand(40, 2).to(device, dtype))
        y.sum().backward()
        assert x.grad is not None
        gradients = [parameter.grad for parameter in low.parameters() if parameter.grad is not None]
        results.append([tensor.float().cpu() for tensor in (y.detach(), x.grad, *gradients)])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0.03 * float(expected.abs().max()))


def test_device_names() -> None:
    assert loading.choose_device(ModelConfig(device="auto")) == torch.device("cuda:0")
    assert loading.choose_device(ModelConfig(device="cpu")) == torch.device("cpu")


def _recovery(steps: int = 8) -> RecoveryConfig:
    return RecoveryConfig(
        name="distill", objective="distill", steps=steps, batch_size=2, learning_rate=3e-3, checkpoint_every=100
    )


def _data(module: RecoveryModule) -> RecoveryData:
    return RecoveryData(windows(7, 8), None, module.settings.batch_size, module.settings.steps, seed=3)


def test_an_export_is_loaded_again_on_the_gpu(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In bf16, with the kernels of the student; other allocations of torch count as free memory."""
    caplog.set_level(logging.INFO)
    model = FAMILIES["qwen2_moe"]().to("cuda", torch.bfloat16)
    plan = condense_plan(model, (1,))
    execute.execute(model, plan)
    before = torch.cuda.memory_allocated()
    for form in ("stock", "bundled"):
        write_folder(model, None, plan, tmp_path / form, "", ExportConfig(format=form))
    assert sum("loaded again and computes the same" in record.getMessage() for record in caplog.records) == 2
    gc.collect()
    assert torch.cuda.memory_allocated() <= before + 2**20
    assert 0 < free_bytes(torch.device("cuda")) <= torch.cuda.mem_get_info()[1]
