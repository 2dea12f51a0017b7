"""Compute how much a sparse layer's output changes on the calibration tokens without a given set of its experts.

If a set S is dropped, its logits are −∞ before the softmax (for a sigmoid router, its scores before the selection). The
layer's output changes by Σ_e (w_e(S) − w_e)·E_e(x); the shared experts cancel. With d the difference of the weights and
G_t the Gram matrix of the token's expert outputs, the squared change is Σ_t dᵀ G_t d. Whatever is dropped, a token
selects among the first M = K + (most experts dropped) experts in its order of selection. So G_t is M × M and is
computed once, and no expert output is kept. If a softmax router corrects its scores for the selection, the order
depends on S, and M = E.

Legend: P sets (a population), T tokens, t tokens of one expert, S = T·M rows, E routed experts, K top-k, M experts that
a token may select, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recondense.calibration.tape import Tape
from recondense.errors import UserError
from recondense.models.moe_blocks import SparseBlock
from recondense.models.replacement_blocks import RemappedRouter, expert_outputs
from recondense.models.tensor_store import Storage

TEMPORARIES = 6  # tensors (T, M, P) that exist at once while a chunk is scored
# The largest temporary. It is fixed, because sums must not depend on the free memory, and on a CPU it fits the cache.
CHUNK_ELEMENTS = {"cpu": 2**18, "cuda": 2**26}
GRAM_TOKENS = {"cpu": 256, "cuda": 4096}  # tokens whose expert outputs are in memory together
STEEP = 60.0  # nats; if a token's logits differ by more, exponentials relative to the largest exceed fp32's range


class LeaveOutScorer:
    """Scores sets of dropped experts of one layer, a population at a time. Use `prepare` to make a scorer.

    If logits are equal, or sigmoids round to the same score, the scorer breaks ties in the order of torch.topk over M
    experts, while the router uses the order over K.

    Attributes:
        block: the layer.
        max_dropped: the largest number of experts in a set.
        max_scratch_bytes: bound on temporaries. The Gram matrices (4·T·M² bytes) are kept if they fit into half of it;
            otherwise they are computed again for each population. The other half is for scoring, or for the outputs of
            up to GRAM_TOKENS tokens.
        num_candidates: M.
        num_tokens: T of all texts.
        output_norm: ‖F(X)‖_F of the MoE block's output.
    """

    def __init__(self, block: SparseBlock, max_dropped: int, max_scratch_bytes: int, storage: Storage) -> None:
        self.block = block
        self.max_dropped = max_dropped
        self.max_scratch_bytes = max_scratch_bytes
        self._correction_E = block.correction_E
        self._one_order = self._correction_E is None or block.routing.score == "sigmoid"
        most = block.routing.top_k + max_dropped if self._one_order else block.num_experts
        self.num_candidates = min(block.num_experts, most)
        self.num_tokens = 0
        self.output_norm = 0.0
        # One entry per text batch:
        self._x = storage.tensor_list()
        self._logits = storage.tensor_list()
        self._index = storage.tensor_list()
        self._steep: list[bool] = []
        self._grams: list[Tensor] | None = None

    @classmethod
    @torch.no_grad()
    def prepare(
        cls,
        model: PreTrainedModel,
        tape: Tape,
        block: SparseBlock,
        max_dropped: int,
        max_scratch_bytes: int,
        least_retained: int | None = None,
    ) -> LeaveOutScorer:
        """Route the calibration tokens and compute the Gram matrices.

        Args:
            model: the recorded model; it stays bit-identical.
            tape: its hidden states.
            block: the layer. Its router must not select among groups.
            max_dropped: the largest number of experts in a set.
            max_scratch_bytes: bound on temporaries; see the attribute.
            least_retained: the fewest experts that must remain; None for top_k, the number that a router needs. If
                fewer than top_k remain, a token selects all of them.

        Raises:
            UserError: too few experts would remain, the router selects among groups, or experts are merged.
        """
        _check_block(block, max_dropped, block.routing.top_k if least_retained is None else least_retained)
        scorer = cls(block, max_dropped, max_scratch_bytes, tape.storage)
        traces = tape.trace(model, block.layer)
        for trace in traces:
            scorer._route(trace.x_TD)
        scorer.output_norm = float(sum(trace.output_TD.double().square().sum() for trace in traces)) ** 0.5
        if scorer.num_tokens * scorer.num_candidates**2 * 4 <= max_scratch_bytes // 2:
            scorer._grams = [scorer._gram(index) for index in range(len(scorer._x))]
        return scorer

    def _route(self, x_TD: Tensor) -> None:
        logits_TE = self.block.router(x_TD)[0].detach().float()
        self._x.append(x_TD)
        self._logits.append(logits_TE)
        self._index.append(self._candidates(logits_TE))
        self._steep.append(bool((logits_TE.amax(dim=1) - logits_TE.amin(dim=1)).max() > STEEP))
        self.num_tokens += len(x_TD)

    @torch.no_grad()
    def errors(self, dropped_PE: Tensor) -> Tensor:
        """Compute ‖F(X) − F^{−S}(X)‖_F of the MoE block over all calibration tokens, for each set S.

        Args:
            dropped_PE: bool; each row is a set of at most `max_dropped` experts.

        Returns:
            The errors (P,), fp64. They depend on the other sets and the scratch size only by rounding (1e-6 relative).

        Raises:
            UserError: an expert's output is not finite.
        """
        assert int(dropped_PE.sum(dim=1).max()) <= self.max_dropped
        retained_EP = (~dropped_PE).T.contiguous().to(self._x[0].device)
        total_P = torch.zeros(len(dropped_PE), dtype=torch.float64, device=retained_EP.device)
        elements = min(self.max_scratch_bytes // 2 // (4 * TEMPORARIES), CHUNK_ELEMENTS[retained_EP.device.type])
        for index in range(len(self._x)):
            width = self.block.num_experts if self._steep[index] else self.num_candidates
            rows = max(1, elements // (width * len(dropped_PE)))
            gram_TMM = self._grams[index] if self._grams is not None else self._gram(index)
            for first in range(0, len(gram_TMM), rows):
                part = slice(first, first + rows)
                change_TMP = self._change(index, part, retained_EP)
                squares_TP = (torch.bmm(gram_TMM[part], change_TMP) * change_TMP).sum(dim=1)
                total_P += squares_TP.double().sum(dim=0)
        if not bool(torch.isfinite(total_P).all()):
            raise UserError(
                f"layer {self.block.layer}: some experts' outputs on the calibration tokens are NaN or infinite; "
                "check the weights of that layer, or use model.dtype=float32 if the model overflows in half precision"
            )
        return total_P.clamp_min(0).sqrt().cpu()

    def _change(self, index: int, part: slice, retained_EP: Tensor) -> Tensor:
        """Compute the change of the routing weights of each token's candidates without each set (T, M, P)."""
        everything_E1 = torch.ones_like(retained_EP[:, :1])
        return self._weights(index, part, retained_EP) - self._weights(index, part, everything_E1)

    def _candidates(self, logits_TE: Tensor) -> Tensor:
        """Return the experts that a token may select (T, M), in the order of selection."""
        if not self._one_order:
            return torch.arange(logits_TE.shape[1], device=logits_TE.device).expand_as(logits_TE)
        if self._correction_E is not None:
            logits_TE = torch.sigmoid(logits_TE) + self._correction_E
        return logits_TE.topk(self.num_candidates, dim=1).indices

    def _weights(self, index: int, part: slice, retained_EP: Tensor) -> Tensor:
        """Compute the routing weights (T, M, P) of each token's candidates with each set retained.

        They are the top_k of the scores over the retained experts, with the family's normalization and scale.
        """
        routing = self.block.routing
        index_TM, logits_TE = self._index[index][part], self._logits[index][part]
        keep_TMP = retained_EP[index_TM]
        if routing.score == "sigmoid":
            scores_TMP = torch.sigmoid(logits_TE).gather(1, index_TM).unsqueeze(-1)
        elif self._steep[index]:  # relative to the largest retained logit, which depends on the set
            scores_TEP = logits_TE.unsqueeze(-1).masked_fill(~retained_EP, -torch.inf).softmax(dim=1)
            scores_TMP = scores_TEP.gather(1, index_TM.unsqueeze(-1).expand_as(keep_TMP))
        else:
            exp_TE = torch.exp(logits_TE - logits_TE.amax(dim=1, keepdim=True))
            scores_TMP = exp_TE.gather(1, index_TM).unsqueeze(-1)
            if not routing.normalize or not self._one_order:
                scores_TMP = scores_TMP / (exp_TE @ retained_EP.float()).unsqueeze(1)
        if self._one_order:
            selected_TMP = keep_TMP & (keep_TMP.cumsum(dim=1, dtype=torch.int16) <= routing.top_k)
        else:
            selected_TMP = self._selected(scores_TMP, keep_TMP, index_TM)
        weights_TMP = selected_TMP * scores_TMP
        if routing.normalize:
            total_T1P = weights_TMP.sum(dim=1, keepdim=True)
            sigmoid = routing.score == "sigmoid"
            weights_TMP /= total_T1P + routing.least_sum if sigmoid else total_T1P.clamp_min(routing.least_sum)
        return weights_TMP.mul_(routing.scale)

    def _selected(self, scores_TMP: Tensor, keep_TMP: Tensor, index_TM: Tensor) -> Tensor:
        """Return whether a candidate is among the top_k of the corrected scores (T, M, P), for each set separately."""
        assert self._correction_E is not None
        choice_TMP = (scores_TMP + self._correction_E[index_TM].unsqueeze(-1)).masked_fill(~keep_TMP, -torch.inf)
        best_TKP = choice_TMP.topk(min(self.block.routing.top_k, choice_TMP.shape[1]), dim=1).indices
        return torch.zeros_like(keep_TMP).scatter_(1, best_TKP, True) & keep_TMP

    @torch.no_grad()
    def _gram(self, index: int) -> Tensor:
        """Compute the Gram matrices (T, M, M), fp32, of the outputs of each token's candidates."""
        x_TD, index_TM = self._x[index], self._index[index]
        fitting = self.max_scratch_bytes // 2 // (4 * self.num_candidates * x_TD.shape[1])
        rows = max(1, min(GRAM_TOKENS[x_TD.device.type], fitting))
        parts = [slice(first, first + rows) for first in range(0, len(x_TD), rows)]
        return torch.cat([self._gram_of(x_TD[part], index_TM[part]) for part in parts])

    def _gram_of(self, x_TD: Tensor, index_TM: Tensor) -> Tensor:
        """Compute the Gram matrices of a few tokens, grouped by expert so that the device is synchronized only once."""
        order = index_TM.flatten().argsort(stable=True)
        counts = torch.bincount(index_TM.flatten(), minlength=self.block.num_experts).tolist()
        outputs_SD = x_TD.new_empty(index_TM.numel(), x_TD.shape[1], dtype=torch.float32)
        for expert, rows in enumerate(order.split(counts)):
            if len(rows):
                x_tD = x_TD[rows // index_TM.shape[1]]
                outputs_SD[rows] = expert_outputs(x_tD, self.block.weights, [expert])[0].float()
        outputs_TMD = outputs_SD.unflatten(0, index_TM.shape)
        return torch.bmm(outputs_TMD, outputs_TMD.transpose(1, 2))


def _check_block(block: SparseBlock, max_dropped: int, least_retained: int) -> None:
    routing = block.routing
    if block.num_experts - max_dropped < least_retained:
        raise UserError(
            f"layer {block.layer}: dropping {max_dropped} of {block.num_experts} experts leaves fewer than the "
            f"{routing.top_k} that each token selects"
        )
    if routing.num_groups > 1:
        raise UserError(f"layer {block.layer}: the router selects among {routing.num_groups} groups of experts")
    if isinstance(block.router, RemappedRouter):
        raise UserError(
            f"layer {block.layer}: its experts are merged, so the effect of dropping one cannot be computed; prune "
            "before merging, or set importance: uniform"
        )
