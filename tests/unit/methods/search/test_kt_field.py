"""The KT-reception field: how many decoder layers it runs, and which states its later blocks see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support.brute_force_moei2 import best_of_block, pruned
from support.tiny_models import blocks, deepseek_v2, qwen2_moe, texts, unchanged

from recondense.calibration.tape import Tape
from recondense.methods.moei2 import InterExpertPruning
from recondense.methods.search.genetic import Genetic
from recondense.methods.search.kt_field import reception_field
from recondense.methods.step import SearchContext
from recondense.models import decoder, moe_blocks
from recondense.models.layer_store import InMemory

SETS = [(0, 1), (2, 4), (3, 5)]


@pytest.mark.parametrize(
    ("make", "groups", "runs"),
    [
        # K + K² + K³ for a block of three layers.
        (lambda: qwen2_moe(num_hidden_layers=3), [(0, 1, 2)], 39),
        # The last block is shorter. Before it, the chosen sets run once more.
        (lambda: qwen2_moe(num_hidden_layers=4), [(0, 1, 2), (3,)], 39 + 3 + 3),
        # Layer 0 is dense and below all MoE layers, so it never runs. Then MoE layers 1, 2 and 3.
        (lambda: deepseek_v2(num_hidden_layers=4), [(1, 2, 3)], 39),
        # Layer 1 is dense, within a block: it runs with each of layer 0's candidates.
        (lambda: qwen2_moe(num_hidden_layers=4, mlp_only_layers=[1]), [(0, 2, 3)], 2 * 3 + 9 + 27),
        # Layers 3 and 5 are dense: 3 runs once, between the blocks; 5 is above all MoE layers.
        (lambda: qwen2_moe(num_hidden_layers=6, mlp_only_layers=[3, 5]), [(0, 1, 2), (4,)], 39 + 3 + 1 + 3),
    ],
)
def test_prefixes_are_shared(make: Any, groups: Sequence[tuple[int, ...]], runs: int) -> None:
    model = make()
    tape = Tape.record(model, blocks(texts()))
    before = tape.layer_runs
    with unchanged(model):
        fields = reception_field(model, tape, dict.fromkeys(moe_blocks.sparse_blocks(model), SETS), 3)
    assert [field.layers for field in fields] == list(groups)
    assert [field.combinations for field in fields] == [3 ** len(group) for group in groups]
    assert tape.layer_runs - before == pytest.approx(runs)


def test_a_layer_is_read_once_for_all_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense layers within a block, too: for a model larger than memory, changing the layer means reading it again."""
    used: list[int] = []
    resident = InMemory.resident

    def spied(self: Any, layer: int) -> Any:
        if used[-1:] != [layer]:
            used.append(layer)
        return resident(self, layer)

    model = qwen2_moe(num_hidden_layers=6, mlp_only_layers=[1, 2, 4])
    tape = Tape.record(model, blocks(texts()))
    monkeypatch.setattr(InMemory, "resident", spied)
    before = tape.layer_runs
    [field] = reception_field(model, tape, dict.fromkeys(moe_blocks.sparse_blocks(model), SETS), 3)
    assert field.layers == (0, 3, 5) and used == [0, 1, 2, 3, 4, 5]
    assert tape.layer_runs - before == pytest.approx(3 * 3 + 2 * 9 + 27)


def test_a_dense_layer_between_blocks_sees_the_pruned_states() -> None:
    """The second block's choice is that of an enumeration with the first block pruned; its error is the model's."""
    for seed in range(4):
        model = qwen2_moe(seed, num_hidden_layers=5, mlp_only_layers=[2])
        ids = [torch.tensor(text) for text in texts(seed)]
        tape = Tape.record(model, blocks(texts(seed)))
        candidates = dict.fromkeys(moe_blocks.sparse_blocks(model), SETS)
        first, second = reception_field(model, tape, candidates, 2)
        dropped = {layer: SETS[place] for layer, place in zip(first.layers, first.choice, strict=True)}
        assert second.choice == best_of_block(model, ids, candidates, second.layers, dropped)
        dropped |= {layer: SETS[place] for layer, place in zip(second.layers, second.choice, strict=True)}
        original = leaving_last_layer(model, ids)
        with pruned(model, dropped):
            changed = leaving_last_layer(model, ids)
        assert second.error == pytest.approx(float((changed - original).norm() / original.norm()), rel=1e-4)


@torch.no_grad()
def leaving_last_layer(model: Any, ids: Sequence[torch.Tensor]) -> torch.Tensor:
    """Hidden states of all tokens, before the final norm, in fp64."""
    seen: list[torch.Tensor] = []
    handle = decoder.decoder_layers(model)[-1].register_forward_hook(lambda *args: seen.append(args[2][0].double()))
    for text in ids:
        decoder.decoder(model)(input_ids=text[None], use_cache=False)
    handle.remove()
    return torch.cat(seen)


def test_known_blocks_are_run_and_not_searched_again() -> None:
    model = qwen2_moe(num_hidden_layers=5, mlp_only_layers=[2])
    tape = Tape.record(model, blocks(texts()))
    candidates = dict.fromkeys(moe_blocks.sparse_blocks(model), SETS)
    counts: list[int] = []
    fields = reception_field(model, tape, candidates, 2, on_decision=lambda so_far: counts.append(len(so_far)))
    assert counts == [1, 2]
    before = tape.layer_runs
    assert reception_field(model, tape, candidates, 2, fields[:1]) == fields
    assert tape.layer_runs - before == pytest.approx(2 + 1 + 3 + 9)  # the chosen sets, the dense layer, K + K²


class Killed(Exception):
    """Ends a search."""


class Dying(dict[str, dict[str, Any]]):
    """A cache that ends the search once it holds one block of the field."""

    def __setitem__(self, key: str, value: dict[str, Any]) -> None:
        super().__setitem__(key, value)
        if key.startswith("blocks-") and len(value["blocks"]) == 1:
            raise Killed


def test_a_killed_search_resumes_at_its_block() -> None:
    model = qwen2_moe(num_hidden_layers=5)
    tape = Tape.record(model, blocks(texts()))
    step = InterExpertPruning(prune_ratio=0.25, block_size=2, genetic=Genetic(population=10, iterations=2, parents=4))
    cache = Dying()
    with pytest.raises(Killed):
        step.search(SearchContext(model, lambda: tape, cache, 1 << 28))
    before = tape.layer_runs
    resumed = step.search(SearchContext(model, lambda: tape, dict(cache), 1 << 28))
    layer_runs = tape.layer_runs - before
    before = tape.layer_runs
    undisturbed = step.search(SearchContext(model, lambda: tape, {}, 1 << 28))
    assert resumed[0] == undisturbed[0] and resumed[1]["blocks"] == undisturbed[1]["blocks"]
    assert layer_runs < tape.layer_runs - before
