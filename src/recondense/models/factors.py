"""Low-rank factors of a weight that are optimal for every rank, for the weight itself or its outputs on activations.

Legend: O output features, I input features, R rank, n = min(O, I).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

RIDGE = 1e-4  # added to a singular second moment, relative to its mean diagonal
SINGULAR = 1e-9  # a second moment with a smaller pivot, relative to its mean diagonal, counts as singular


class Factors(NamedTuple):
    """W ≈ left_OR · right_RI: for every R up to n, the first R columns and rows are the best factors of rank R.

    Args:
        left_On: the columns u_i √σ_i.
        right_nI: the rows √σ_i v_i.
    """

    left_On: Tensor
    right_nI: Tensor


@torch.no_grad()
def factors(weight_OI: Tensor, moment_II: Tensor | None = None, ridge: float = RIDGE) -> Factors:
    """Compute factors for all ranks at once that minimize ‖W − W'‖_F, or ‖(W − W')X‖_F given a second moment.

    W' = U_R U_Rᵀ W, with U the eigenvectors of W M Wᵀ, largest first, M = XXᵀ (M = 1 is the plain SVD). For M = SSᵀ
    this is the truncated SVD of WS times S⁻¹. Both factors of a rank-one term get the same norm.

    Args:
        weight_OI: the weight, in any dtype; the computation is in fp64.
        moment_II: Σ x xᵀ over the weight's inputs; None for the plain SVD.
        ridge: added to a singular moment (from fewer inputs than features), relative to its mean diagonal.

    Returns:
        The factors in fp32, with n = min(O, I).

    Reference: MoE-I², arXiv 2411.01016, section 3.2 (plain); SVD-LLM, arXiv 2403.07378, section 3.1 (whitened).
    """
    weight = weight_OI.double()
    num_outputs, num_inputs = weight.shape
    size = min(num_outputs, num_inputs)
    if moment_II is None and num_outputs > num_inputs:
        _, vectors_II = torch.linalg.eigh(weight.T @ weight)
        right_nI = vectors_II.flip(1)[:, :size].T
        left_On = weight @ right_nI.T
        norms = left_On.norm(dim=0).clamp_min(torch.finfo(torch.float64).tiny)
        return Factors((left_On / norms.sqrt()).float(), (right_nI * norms.sqrt()[:, None]).float())
    if moment_II is not None and num_outputs > num_inputs:
        # The same result from a smaller eigenproblem: M = LLᵀ, V of (WL)ᵀ(WL), W' = W L V Vᵀ L⁻¹.
        lower_II = torch.linalg.cholesky(regularize(moment_II, ridge))
        product = weight @ lower_II
        _, vectors_II = torch.linalg.eigh(product.T @ product)
        basis_II = vectors_II.flip(1)
        left_On = product @ basis_II
        right_nI = torch.linalg.solve_triangular(lower_II.T, basis_II, upper=True).T
        balance = (right_nI.norm(dim=1) / left_On.norm(dim=0).clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
        return Factors((left_On * balance).float(), (right_nI / balance[:, None]).float())
    gram_OO = weight @ weight.T if moment_II is None else weight @ regularize(moment_II, ridge) @ weight.T
    _, vectors_OO = torch.linalg.eigh(gram_OO)
    left_On = vectors_OO.flip(1)[:, :size]
    right_nI = left_On.T @ weight
    norms = right_nI.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
    return Factors((left_On * norms.sqrt()).float(), (right_nI / norms.sqrt()[:, None]).float())


def regularize(moment_II: Tensor, ridge: float) -> Tensor:
    """Return a second moment in fp64, plus a ridge if it is singular; return the identity if it is zero."""
    moment = moment_II.double()
    mean = moment.diagonal().mean()
    identity = torch.eye(moment.shape[0], dtype=moment.dtype, device=moment.device)
    if not bool(mean > 0):
        return identity
    lower, failed = torch.linalg.cholesky_ex(moment / mean)
    singular = bool(failed) or bool(lower.diagonal().min() ** 2 < SINGULAR)
    return moment + ridge * mean * identity if singular else moment
