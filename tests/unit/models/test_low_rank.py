"""Factors against closed forms, and low-rank experts against transformers' experts."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch
from support.tiny_models import FAMILIES, recorded
from torch import Tensor, nn
from transformers import Qwen2MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts

from recondense.models import low_rank as module_of_low_rank
from recondense.models import moe_blocks
from recondense.models.expert_products import is_groupable
from recondense.models.factors import factors
from recondense.models.low_rank import LowRankExperts, _Bucket
from recondense.models.replacement_blocks import GLU
from recondense.surgery.factorize import second_moments

D, F, E = 24, 16, 6
NAMES = ("gate_proj", "up_proj", "down_proj")


def random_moment(size: int, num: int, seed: int = 0) -> Tensor:
    x = torch.randn(num, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x = x * torch.linspace(0.1, 3, size, dtype=torch.float64)
    return x.T @ x


@pytest.mark.parametrize("shape", [(16, 24), (24, 16)])
def test_plain_factors_are_the_truncated_svd(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    left_On, right_nI = factors(weight)
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    for rank in (1, 5, 16):
        expected = (u[:, :rank] * s[:rank]) @ vh[:rank]
        torch.testing.assert_close((left_On[:, :rank] @ right_nI[:rank]).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(left_On.norm(dim=0), right_nI.norm(dim=1), rtol=1e-4, atol=1e-5)  # U√Σ and √ΣVᵀ


@pytest.mark.parametrize("shape", [(16, 24), (24, 16)])
@pytest.mark.parametrize("num", [200, 10])
def test_whitened_factors_have_the_least_activation_error(shape: tuple[int, int], num: int) -> None:
    """Closed form: the error is the tail of the singular values of W S, where M = S Sᵀ."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2)).double()
    moment = random_moment(shape[1], num)

    def error(approximation: Tensor, metric: Tensor) -> float:
        difference = weight - approximation
        return float((difference @ metric @ difference.T).trace())

    left_On, right_nI = factors(weight, moment, ridge=1e-6)
    used = moment if num > shape[1] else moment + 1e-6 * moment.diagonal().mean() * torch.eye(shape[1])
    tail = torch.linalg.svdvals(weight @ torch.linalg.cholesky(used)) ** 2
    generator = torch.Generator().manual_seed(3)
    plain = factors(weight)
    for rank in (1, 4, 9):
        best = (left_On[:, :rank] @ right_nI[:rank]).double()
        assert error(best, used) == pytest.approx(float(tail[rank:].sum()), rel=1e-3, abs=1e-4)
        assert error(best, moment) < error((plain.left_On[:, :rank] @ plain.right_nI[:rank]).double(), moment)
        for _ in range(20):
            other_left = left_On[:, :rank] + 0.02 * torch.randn(shape[0], rank, generator=generator)
            other_right = right_nI[:rank] + 0.02 * torch.randn(rank, shape[1], generator=generator)
            assert error(best, used) <= error((other_left @ other_right).double(), used)


def test_a_moment_of_no_tokens_gives_the_plain_svd() -> None:
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(1))
    for whitened, plain in zip(factors(weight, torch.zeros(24, 24)), factors(weight), strict=True):
        torch.testing.assert_close(whitened, plain)


def dense_experts() -> Any:
    torch.manual_seed(0)
    config = Qwen2MoeConfig(hidden_size=D, moe_intermediate_size=F, num_experts=E, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    experts = Qwen2MoeExperts(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    return experts


def low_rank(dense: Any, ranks: dict[str, tuple[int | None, ...]]) -> LowRankExperts:
    low = LowRankExperts(D, F, ranks, GLU(dense.act_fn))

    def weights(expert: int) -> dict[str, Tensor]:
        gate, up = dense.gate_up_proj[expert].chunk(2)
        return {"gate_proj": gate, "up_proj": up, "down_proj": dense.down_proj[expert]}

    return low.fill(weights, lambda expert, name: factors(weights(expert)[name]))


def tokens(num: int, top_k: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num, D, generator=generator)
    index = torch.randint(0, E - 1, (num, top_k), generator=generator)  # duplicates; the last expert gets nothing
    return x, index, torch.rand(num, top_k, generator=generator)


FULL: dict[str, tuple[int | None, ...]] = {name: (F, None, F, F, None, F) for name in NAMES}
MIXED: dict[str, tuple[int | None, ...]] = {
    "gate_proj": (3, None, 5, 3, 3, 7), "up_proj": (4, 2, 5, 4, None, 7), "down_proj": (3, 6, None, 3, 3, 7)
}  # fmt: skip
# Rows of 16 bytes in fp32 and bf16: the grouped product where a bucket has several experts.
ALIGNED: dict[str, tuple[int | None, ...]] = {name: (8, 8, None, 16, 8, 8) for name in NAMES}


# No expert is dense: a few tokens are one batched product; four experts of a bucket are one, too.
UNEVEN: dict[str, tuple[int | None, ...]] = {name: (3, 3, 5, 3, 7, 3) for name in NAMES}
EVEN: dict[str, tuple[int | None, ...]] = {
    "gate_proj": (3,) * E, "up_proj": (5,) * E, "down_proj": (7,) * E
}  # fmt: skip


@pytest.fixture(params=["small", "large"])
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Experts count as small, which they are here, or as large."""
    if request.param == "large":
        monkeypatch.setattr(module_of_low_rank, "SMALL", 0)
    return cast(str, request.param)


@pytest.mark.parametrize("ranks", [FULL, ALIGNED, MIXED, UNEVEN, EVEN])
@pytest.mark.parametrize("num", [1, 40])
def test_what_is_batched(ranks: Any, num: int, size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests below cover every way of computing."""
    low, called = low_rank(dense_experts(), ranks), set()
    for owner, name in ((LowRankExperts, "_row_by_row"), (_Bucket, "_padded")):
        monkeypatch.setattr(owner, name, spy(getattr(owner, name), called))
    low(*tokens(num))
    several = any(len(experts) >= 4 for experts in low.experts_of)
    if size == "large":
        assert not called
    elif num == 1 and ranks in (UNEVEN, EVEN):
        assert called == {"_row_by_row"}
    elif num == 40:
        assert called == ({"_padded"} if several else set()) and several == (ranks is not MIXED)


def spy(method: Any, called: set[str]) -> Any:
    def run(*args: Any) -> Any:
        called.add(method.__name__)
        return method(*args)

    return run


@pytest.mark.parametrize("ranks", [FULL, ALIGNED, MIXED])
def test_which_experts_are_grouped(ranks: Any) -> None:
    """This concerns large experts."""
    low = LowRankExperts(D, F, ranks, GLU(nn.functional.silu))
    grouped = []
    for bucket in low.buckets:
        weights = [p for p in bucket.parameters()]
        grouped.append(bucket.num_experts > 1 and is_groupable(torch.zeros(3, D), weights))
    assert any(grouped) == (ranks is not MIXED)


@pytest.mark.parametrize("num", [0, 1, 40])
def test_full_rank_equals_transformers_experts(num: int, size: str) -> None:
    dense = dense_experts()
    torch.testing.assert_close(low_rank(dense, FULL)(*tokens(num)), dense(*tokens(num)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ranks", [MIXED, ALIGNED, UNEVEN, EVEN])
@pytest.mark.parametrize("num", [1, 40])
def test_low_rank_equals_transformers_experts_with_the_products_as_weights(ranks: Any, num: int, size: str) -> None:
    """Forward, and gradients of the input, of the routing weights and, by the chain rule, of the factors."""
    dense, results = dense_experts(), []
    low = low_rank(dense, ranks).requires_grad_(True)
    products = copy.deepcopy(dense)
    with torch.no_grad():
        for expert in range(E):
            for name, rank in ((name, values[expert]) for name, values in ranks.items()):
                gate, up = products.gate_up_proj[expert].chunk(2)
                weight = {"gate_proj": gate, "up_proj": up, "down_proj": products.down_proj[expert]}[name]
                if rank is not None:
                    left_On, right_nI = factors(weight)
                    weight.copy_(left_On[:, :rank] @ right_nI[:rank])
    for module in (low, products):
        x, index, weights = tokens(num)
        x.requires_grad_(), weights.requires_grad_()
        y = module(x, index, weights)
        y.square().sum().backward()
        results.append((y.detach(), x.grad, weights.grad))
    for actual, reference in zip(*results, strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-4, atol=1e-4)
    for experts, bucket in zip(low.experts_of, low.buckets, strict=True):  # W = left · right: dleft = dW · rightᵀ
        for position, expert in enumerate(experts):
            if ranks["down_proj"][expert] is not None and expert in index:
                expected = products.down_proj.grad[expert] @ bucket.down_right[position].T
                torch.testing.assert_close(bucket.down_left.grad[position], expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("ranks", [ALIGNED, UNEVEN])
@pytest.mark.parametrize("num_tokens", [1, 300])
def test_the_same_call_gives_the_same_bits(ranks: Any, num_tokens: int, size: str) -> None:
    """Forward and backward; for ALIGNED with any number of threads, on which some products of torch depend."""
    low, gradients, threads = low_rank(dense_experts(), ranks).requires_grad_(True), [], torch.get_num_threads()
    try:
        for num in (1, 2, 2):
            torch.set_num_threads(num)
            x, index, weights = tokens(num_tokens)
            x.requires_grad_(), low.zero_grad()
            low(x, index, weights).square().sum().backward()
            assert x.grad is not None
            gradients.append([x.grad, *(p.grad for p in low.parameters() if p.grad is not None)])
    finally:
        torch.set_num_threads(threads)
    comparable = gradients if ranks is ALIGNED else gradients[1:]
    assert all(torch.equal(a, b) for run in comparable[1:] for a, b in zip(comparable[0], run, strict=True))


@pytest.mark.parametrize(("ranks", "num"), [(MIXED, 7), (UNEVEN, 7), (UNEVEN, 1), (EVEN, 1)])
def test_gradients_of_the_factors(ranks: Any, num: int) -> None:
    low = low_rank(dense_experts(), ranks).double().requires_grad_(True)
    x, index, weights = tokens(num)
    names = [name for name, _ in low.named_parameters()]

    def compute(*parameters: Tensor) -> Tensor:
        named = dict(zip(names, parameters, strict=True))
        output = torch.func.functional_call(low, named, (x.double(), index, weights))
        assert isinstance(output, Tensor)
        return output

    assert torch.autograd.gradcheck(compute, tuple(low.parameters()), fast_mode=True)


def test_nothing_is_padded() -> None:
    low = LowRankExperts(D, F, MIXED, GLU(nn.functional.silu))
    expected = sum(D * F if rank is None else rank * (D + F) for ranks in MIXED.values() for rank in ranks)
    assert sum(parameter.numel() for parameter in low.parameters()) == expected
    assert not list(low.buffers())


@pytest.mark.parametrize("ranks", [MIXED, ALIGNED, UNEVEN, EVEN])
@pytest.mark.parametrize("num", [1, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype: torch.dtype, num: int, ranks: Any, size: str) -> None:
    low = low_rank(dense_experts(), ranks)
    exact = low(*tokens(num))
    x, index, weights = tokens(num)
    with torch.autocast("cpu", torch.bfloat16):
        y = low.to(dtype)(x.to(dtype), index, weights.to(dtype))
    torch.testing.assert_close(y.float(), exact, rtol=0.1, atol=0.1 * float(exact.abs().max()))


def test_half_precision_weights_under_autocast() -> None:
    low = low_rank(dense_experts(), UNEVEN)
    x, index, weights = tokens(1)
    exact = low(x, index, weights)
    with torch.autocast("cpu", torch.bfloat16):
        y = low.half()(x.half(), index, weights)
    torch.testing.assert_close(y.float(), exact, rtol=0.1, atol=0.1 * float(exact.abs().max()))


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*should not be instantiated")  # dynamo does
@pytest.mark.parametrize("ranks", [ALIGNED, UNEVEN])
def test_compiled(ranks: Any, size: str) -> None:
    """As far as dynamo can trace; the rest runs eagerly."""
    low = low_rank(dense_experts(), ranks)
    compiled = torch.compile(low, backend="eager")
    try:
        with torch.no_grad():
            torch.testing.assert_close(compiled(*tokens(40)), low(*tokens(40)), rtol=1e-4, atol=1e-4)
    finally:
        torch.compiler.reset()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_second_moments_are_those_of_the_routed_tokens(family: str) -> None:
    model = FAMILIES[family]()
    tape, block = recorded(model), moe_blocks.sparse_blocks(model)[2]
    moments = second_moments(block, tape.trace(model, 2))
    for expert in range(6):
        inputs, inner = torch.zeros(32, 32), torch.zeros(16, 16)
        for trace in tape.trace(model, 2):
            for x, selected in zip(trace.x_TD, trace.top_k_index_TK, strict=True):
                if expert in selected:
                    inputs += x[:, None] * x
                    gate, up = (block.weights.gate_up_EHD[expert] @ x).chunk(2)
                    h = nn.functional.silu(gate) * up
                    inner += h[:, None] * h
        for moment, expected in zip(moments(expert), (inputs, inner), strict=True):
            torch.testing.assert_close(moment.float(), expected, rtol=1e-4, atol=1e-4)
