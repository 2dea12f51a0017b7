"""Find the sets of experts whose removal changes a layer's output least, for each layer independently."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from recondense.methods.search.genetic import Errors, ExpertSet, Genetic, best_sets, layer_seed
from recondense.methods.search.layerwise import LayerTask, LayerwiseSearch
from recondense.methods.search.leave_out import LeaveOutScorer
from recondense.methods.step import Record
from recondense.models.moe_blocks import SparseBlock


def search_expert_sets(
    search: LayerwiseSearch,
    blocks: Mapping[int, SparseBlock],
    numbers: Mapping[int, int],
    genetic: Genetic,
    seed: int,
    title: str,
    num_best: int = 1,
    relative: bool = False,
) -> dict[int, list[tuple[ExpertSet, float]]]:
    """Find the best sets of experts to drop in each layer, with as few protected experts in them as possible.

    Args:
        search: the layer-wise search, with the model, its tape and the cache.
        blocks: the layers.
        numbers: the number of experts that each layer loses. A layer that loses none needs no search.
        genetic: the settings of the search.
        seed: the common seed of all layers; see `layer_seed`.
        title: the description of the progress bar.
        num_best: the number of sets to return for each layer.
        relative: divide errors by ‖F(X)‖_F of the layer.

    Returns:
        For each layer, pairs (set, error ‖F(X) − F^{−S}(X)‖_F of the MoE block), best first.
    """

    def work(task: LayerTask) -> Record:
        block, number = blocks[task.layer], numbers[task.layer]

        def show(generation: int, best: float) -> None:
            task.bar.note(f"layer {task.layer}, generation {generation}, best error {best:.4g}")

        context = search.context
        scorer = LeaveOutScorer.prepare(context.model, task.tape, block, number, context.max_scratch_bytes)
        layers_seed = layer_seed(seed, task.layer)
        certain, undecided = _certain_and_undecided(block.num_experts, context.protected.get(task.layer, ()), number)
        errors = _errors_of(scorer.errors, block.num_experts, certain, undecided)
        sets = best_sets(errors, len(undecided), number - len(certain), genetic, layers_seed, num_best, show)
        unit = max(scorer.output_norm, 1e-300) if relative else 1.0
        whole = [(sorted([*certain, *(undecided[place] for place in dropped)]), error) for dropped, error in sets]
        return {"sets": [[experts, error / unit] for experts, error in whole]}

    names = {layer: f"candidates-{layer:03d}-{number:03d}" for layer, number in numbers.items() if number}
    search.reused += len(numbers) - len(names)
    records = search.per_layer(names, work, title)
    nothing: Record = {"sets": [[[], 0.0]]}
    return {
        layer: [(tuple(dropped), float(error)) for dropped, error in records.get(layer, nothing)["sets"]]
        for layer in numbers
    }


def _certain_and_undecided(num_experts: int, protected: Collection[int], number: int) -> tuple[list[int], list[int]]:
    """Return the experts that are dropped in any case, and those of which some are dropped.

    The latter are not protected. If these are too few, all of them are dropped, and some protected ones.
    """
    free = [expert for expert in range(num_experts) if expert not in protected]
    return ([], free) if len(free) >= number else (free, sorted(protected))


def _errors_of(errors: Errors, num_experts: int, certain: list[int], undecided: list[int]) -> Errors:
    """Return the errors of sets of the undecided experts together with the certain ones."""
    if len(undecided) == num_experts:
        return errors

    def of_undecided(dropped_PF: Tensor) -> Tensor:
        dropped_PE = dropped_PF.new_zeros(len(dropped_PF), num_experts)
        dropped_PE[:, certain] = True
        dropped_PE[:, undecided] = dropped_PF
        return errors(dropped_PE)

    return of_undecided
