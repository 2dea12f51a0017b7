"""CD-MoE's search as its authors run it: the whole model for every candidate. Slow and plain.

It shares no code with recondense: tests compare recondense's search with it, and benchmarks/search.py their times. It
supports Qwen2-MoE and DeepSeek-V2 of transformers 5, and needs torch and transformers alone.

Shapes: B texts of a batch, S positions, T real tokens of one text, D hidden size, F expert width, E routed experts.

Reference: Cao et al., "Condense, Don't Just Prune", arXiv 2412.00069.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Ids = Sequence[Sequence[int]]  # one list of token ids per text
States = list[Tensor]  # one (T, D) tensor per text, padding removed
BATCH_SIZE = 8  # the authors'


@dataclass(frozen=True)
class Statistics:
    """Statistics of one MoE layer over the calibration texts."""

    coefficients: list[float | None]  # per expert; None if it is never selected, which makes it no candidate
    selected: list[int]  # per expert, the number of tokens that selected it
    shared_gate_mean: float | None  # None if the family has no shared gate


@dataclass
class Count:
    """The cost of a search, counted in runs of decoder layers and of the model over the calibration set."""

    num_layers: int
    num_batches: int
    layer_calls: int = 0
    head_calls: int = 0

    @property
    def layer_runs(self) -> int:
        """Decoder layers run over the whole calibration set, whatever the batch size."""
        runs, rest = divmod(self.layer_calls, self.num_batches)
        assert rest == 0, f"{self.layer_calls} calls are not a multiple of {self.num_batches} batches"
        return runs

    @property
    def passes(self) -> int:
        """Whole-model passes over the calibration set."""
        passes, rest = divmod(self.layer_runs, self.num_layers)
        assert rest == 0, f"{self.layer_runs} layer runs are not a multiple of {self.num_layers} layers"
        return passes


@dataclass(frozen=True)
class Order:
    """A greedy order (of experts or of layers) and the scores that decided it."""

    order: list[int]
    js: list[float]  # after each step
    candidates: list[dict[int, float]] = field(repr=False)  # per step, the score of every candidate
    start: float  # before the first step
    count: Count


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a causal LM."""
    layers = model.get_submodule("model.layers")
    assert isinstance(layers, nn.ModuleList)
    return layers


def block_of(model: nn.Module, layer: int) -> Any:
    """The feed-forward block of a decoder layer."""
    return decoder_layers(model)[layer].mlp


def moe_layers(model: nn.Module) -> list[int]:
    """Indices of the decoder layers that have routed experts."""
    return [i for i in range(len(decoder_layers(model))) if hasattr(block_of(model, i), "experts")]


def batches(model: nn.Module, ids: Ids, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Texts in order, right-padded: ids and mask, both (B, S)."""
    device = next(model.parameters()).device
    for start in range(0, len(ids), batch_size):
        part = ids[start : start + batch_size]
        length = max(len(text) for text in part)
        rows = [[*text, *[0] * (length - len(text))] for text in part]
        mask = [[1] * len(text) + [0] * (length - len(text)) for text in part]
        yield torch.tensor(rows, device=device), torch.tensor(mask, device=device)


@torch.no_grad()
def run_whole_model(
    model: nn.Module,
    ids: Ids,
    watch: Mapping[nn.Module, Callable[[Any, Tensor], None]],
    *,
    batch_size: int = BATCH_SIZE,
    lm_head: bool = True,
    count: Count | None = None,
) -> None:
    """Run the calibration texts once, and hand the outputs of the watched modules to their callbacks.

    Args:
        ids: The texts.
        watch: Module -> callback(output, mask_BS).
        batch_size: Texts per forward.
        lm_head: Whether to compute logits too, as the authors do.
        count: The calls of decoder layers and of the head are added to it.
    """
    mask_BS = torch.empty(0)

    def forward_to(callback: Callable[[Any, Tensor], None]) -> Callable[..., None]:
        return lambda _module, _inputs, output: callback(output, mask_BS)

    def count_layer(*_: Any) -> None:
        if count is not None:
            count.layer_calls += 1

    def count_head(*_: Any) -> None:
        if count is not None:
            count.head_calls += 1

    assert not model.training, "statistics of a model in training mode would depend on dropout"
    with ExitStack() as stack:
        hooks = [module.register_forward_hook(forward_to(callback)) for module, callback in watch.items()]
        hooks += [layer.register_forward_hook(count_layer) for layer in decoder_layers(model)]
        hooks.append(model.get_submodule("lm_head").register_forward_hook(count_head))
        for hook in hooks:
            stack.callback(hook.remove)
        run = model if lm_head else model.get_submodule("model")
        for input_ids_BS, mask_BS in batches(model, ids, batch_size):  # the hooks read mask_BS
            run(input_ids=input_ids_BS, attention_mask=mask_BS, use_cache=False)


def statistics(model: nn.Module, ids: Ids, *, batch_size: int = BATCH_SIZE) -> dict[int, Statistics]:
    """Coefficients and mean shared gate of every MoE layer, from one pass.

    Coefficient of an expert = sum of its routing weights / number of tokens that selected it.
    """
    layers = {layer: block_of(model, layer) for layer in moe_layers(model)}
    sums = {layer: torch.zeros(len(block.experts.down_proj), dtype=torch.float64) for layer, block in layers.items()}
    selected = {layer: torch.zeros(len(block.experts.down_proj), dtype=torch.long) for layer, block in layers.items()}
    gates: dict[int, list[Tensor]] = {layer: [] for layer in layers}

    def of_router(layer: int) -> Callable[[Any, Tensor], None]:
        def add(output: Any, mask_BS: Tensor) -> None:
            _logits, weights_TK, index_TK = output
            real_T = mask_BS.flatten().bool()
            index = index_TK[real_T].flatten().cpu()
            sums[layer].index_add_(0, index, weights_TK[real_T].flatten().double().cpu())
            selected[layer] += torch.bincount(index, minlength=len(selected[layer]))

        return add

    def of_gate(layer: int) -> Callable[[Any, Tensor], None]:
        def add(output: Any, mask_BS: Tensor) -> None:
            gates[layer].append(output.flatten()[mask_BS.flatten().bool()].sigmoid().double().cpu())

        return add

    watch = {block.gate: of_router(layer) for layer, block in layers.items()}
    for layer, block in layers.items():
        if hasattr(block, "shared_expert_gate"):
            watch[block.shared_expert_gate] = of_gate(layer)
    run_whole_model(model, ids, watch, batch_size=batch_size)
    return {
        layer: Statistics(
            coefficients=[float(s / n) if n else None for s, n in zip(sums[layer], selected[layer], strict=True)],
            selected=selected[layer].tolist(),
            shared_gate_mean=float(torch.cat(gates[layer]).mean()) if gates[layer] else None,
        )
        for layer in layers
    }


@contextmanager
def condensed(
    model: nn.Module, layer: int, experts: Sequence[int], stats: Statistics, shared_gate: str = "mean"
) -> Iterator[None]:
    """Replace the layer's MoE block by `sum of w_i E_i(x) + gate * shared(x)` within the context; no weight changes.

    Args:
        layer: Decoder-layer index.
        experts: The retained experts; their coefficients are those of `stats`.
        shared_gate: "mean" (a constant) or "token" (the model's sigmoid); ignored if there is no shared gate.
    """
    block = block_of(model, layer)
    gate_up_EFD, down_EDF = block.experts.gate_up_proj, block.experts.down_proj
    scales = [scale for expert in experts if (scale := stats.coefficients[expert]) is not None]
    if len(scales) < len(experts):
        raise ValueError(f"layer {layer}: experts {list(experts)} include one that no token selected")

    def forward(x_BSD: Tensor) -> Tensor:
        if hasattr(block, "shared_expert_gate"):
            gate = stats.shared_gate_mean if shared_gate == "mean" else block.shared_expert_gate(x_BSD).sigmoid()
            y_BSD: Tensor = gate * block.shared_expert(x_BSD)
        else:
            y_BSD = block.shared_experts(x_BSD)
        for expert, scale in zip(experts, scales, strict=True):
            gate_proj, up_proj = F.linear(x_BSD, gate_up_EFD[expert]).chunk(2, dim=-1)
            y_BSD = y_BSD + scale * F.linear(block.experts.act_fn(gate_proj) * up_proj, down_EDF[expert])
        return y_BSD

    assert "forward" not in vars(block), f"the block of layer {layer} is condensed already"
    block.forward = forward
    try:
        yield
    finally:
        del block.forward


def jensen_shannon(a_TD: Tensor, b_TD: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """JS of the softmaxes over the hidden dimension, per token, in nats, with 1e-10 added inside each KL.

    Args:
        a_TD, b_TD: Hidden states.
        dtype: Precision; the authors use float32, where near-equal states cancel.

    Returns:
        (T,) divergences.
    """
    p_TD, q_TD = a_TD.to(dtype).softmax(-1), b_TD.to(dtype).softmax(-1)
    m_TD = (p_TD + q_TD) / 2

    def kl(x_TD: Tensor, y_TD: Tensor) -> Tensor:
        return ((x_TD + 1e-10) * ((x_TD + 1e-10) / (y_TD + 1e-10)).log()).sum(-1)

    return (kl(p_TD, m_TD) + kl(q_TD, m_TD)) / 2


def score(original: States, candidate: States, dtype: torch.dtype = torch.float64) -> float:
    """Mean JS over the tokens of each text, then over texts, so that every text has the same weight."""
    per_text = [float(jensen_shannon(a, b, dtype).mean()) for a, b in zip(original, candidate, strict=True)]
    return sum(per_text) / len(per_text)


def states_after(
    model: nn.Module,
    layers: Sequence[int],
    ids: Ids,
    *,
    batch_size: int = BATCH_SIZE,
    lm_head: bool = True,
    count: Count | None = None,
) -> dict[int, States]:
    """The residual stream after each of these decoder layers (after the final norm for the last), per text."""
    states: dict[int, States] = {layer: [] for layer in layers}

    def append_to(layer: int) -> Callable[[Any, Tensor], None]:
        def add(output: Any, mask_BS: Tensor) -> None:
            hidden_BSD = output[0] if isinstance(output, tuple) else output
            states[layer] += [row[: int(n)].clone() for row, n in zip(hidden_BSD, mask_BS.sum(-1), strict=True)]

        return add

    last = len(decoder_layers(model)) - 1
    modules = {i: model.get_submodule("model.norm") if i == last else decoder_layers(model)[i] for i in layers}
    watch = {modules[layer]: append_to(layer) for layer in layers}
    run_whole_model(model, ids, watch, batch_size=batch_size, lm_head=lm_head, count=count)
    return states


def _greedy(candidates: Sequence[int], steps: int, start: float, judge: Callable[[list[int]], float]) -> Order:
    """Add the candidate with the lowest score, `steps` times; of equal candidates the first is taken."""
    if steps > len(candidates):
        raise ValueError(f"{steps} steps requested, but there are {len(candidates)} candidates")
    order: list[int] = []
    js: list[float] = []
    candidate_scores: list[dict[int, float]] = []
    for _ in range(steps):
        scores = {c: judge([*order, c]) for c in candidates if c not in order}
        best, least = -1, float("inf")
        for candidate, value in scores.items():
            if value < least:
                best, least = candidate, value
        assert best >= 0, "every candidate's score is NaN"
        order.append(best)
        js.append(least)
        candidate_scores.append(scores)
    return Order(order, js, candidate_scores, start, Count(1, 1))


def expert_search(
    model: nn.Module,
    ids: Ids,
    layer: int,
    num_experts: int,
    stats: Statistics,
    *,
    shared_gate: str = "mean",
    batch_size: int = BATCH_SIZE,
    lm_head: bool = True,
    dtype: torch.dtype = torch.float64,
    original: States | None = None,
) -> Order:
    """Choose one layer's experts greedily by running the whole model for every candidate; other layers stay original.

    Passes: 1 (shared expert alone) + E + (E-1) + ... + (E-n+1).

    Args:
        layer: Decoder-layer index.
        num_experts: Experts to choose, n.
        stats: The layer's statistics.
        original: `states_after` of this layer in the original model; None computes it, in one more pass.
    """
    if original is None:
        original = states_after(model, [layer], ids, batch_size=batch_size, lm_head=lm_head)[layer]
    count = Count(len(decoder_layers(model)), -(-len(ids) // batch_size))

    def judge(experts: list[int]) -> float:
        with condensed(model, layer, experts, stats, shared_gate):
            states = states_after(model, [layer], ids, batch_size=batch_size, lm_head=lm_head, count=count)
        return score(original, states[layer], dtype)

    candidates = [expert for expert, coefficient in enumerate(stats.coefficients) if coefficient is not None]
    return replace(_greedy(candidates, num_experts, judge([]), judge), count=count)


def routing_weight_order(stats: Statistics, num_experts: int) -> list[int]:
    """Experts by coefficient, the largest first; equal ones by index."""
    known = [(-value, expert) for expert, value in enumerate(stats.coefficients) if value is not None]
    if num_experts > len(known):
        raise ValueError(f"{num_experts} experts requested, but tokens selected only {len(known)}")
    return [expert for _, expert in sorted(known)[:num_experts]]


def layer_search(
    model: nn.Module,
    ids: Ids,
    num_layers: int,
    experts: Mapping[int, Sequence[int]],
    stats: Mapping[int, Statistics],
    *,
    shared_gate: str = "mean",
    batch_size: int = BATCH_SIZE,
    lm_head: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Order:
    """Choose the layers to condense greedily by the final hidden state; the whole model runs for every candidate.

    Passes: L + (L-1) + ... + (L-n+1), and one for the original model, which is not counted.

    Args:
        num_layers: Layers to choose, n.
        experts: The retained experts of each candidate layer.
        stats: The statistics of each candidate layer.
    """
    last = len(decoder_layers(model)) - 1
    original = states_after(model, [last], ids, batch_size=batch_size, lm_head=lm_head)[last]
    count = Count(last + 1, -(-len(ids) // batch_size))

    def judge(layers: list[int]) -> float:
        with ExitStack() as stack:
            for layer in layers:
                stack.enter_context(condensed(model, layer, experts[layer], stats[layer], shared_gate))
            states = states_after(model, [last], ids, batch_size=batch_size, lm_head=lm_head, count=count)
        return score(original, states[last], dtype)

    return replace(_greedy(sorted(experts), num_layers, 0.0, judge), count=count)


def give_back(
    model: nn.Module,
    ids: Ids,
    rounds: Sequence[int],
    start: int,
    orders: Mapping[int, Sequence[int]],
    stats: Mapping[int, Statistics],
) -> tuple[dict[int, int], list[dict[int, float]]]:
    """Give further experts to condensed layers by the final hidden state; the whole model runs for every candidate.

    Args:
        rounds: The number of experts to give out in each round.
        start: The experts that each layer starts with.
        orders: The order of the experts of each condensed layer, complete.
        stats: The statistics of each condensed layer.

    Returns:
        The experts that each layer retains, and the scores of all candidates of each round.
    """
    last = len(decoder_layers(model)) - 1
    original = states_after(model, [last], ids, batch_size=BATCH_SIZE, lm_head=False)[last]

    def judge(numbers: Mapping[int, int]) -> float:
        with ExitStack() as stack:
            for layer, number in numbers.items():
                stack.enter_context(condensed(model, layer, orders[layer][:number], stats[layer], "mean"))
            states = states_after(model, [last], ids, batch_size=BATCH_SIZE, lm_head=False)
        return score(original, states[last])

    numbers, scores = dict.fromkeys(sorted(orders), start), []
    for step in rounds:
        able = [layer for layer in numbers if numbers[layer] + step <= len(orders[layer])]
        scores.append({layer: judge({**numbers, layer: numbers[layer] + step}) for layer in able})
        numbers[min(able, key=scores[-1].__getitem__)] += step
    return numbers, scores
