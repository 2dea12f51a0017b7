"""Budgets that cannot be met are refused."""

from __future__ import annotations

import pytest
from support.tiny_models import qwen2_moe

from recondense.methods.dropping import Dropping
from recondense.methods.merging import Merging
from recondense.methods.naee import NAEE
from recondense.methods.saliency import SaliencyPruning
from recondense.methods.search.budget import Budget
from recondense.models import families


def test_budgets_that_cannot_be_met_are_refused() -> None:
    facts = families.facts(qwen2_moe().config)
    assert "at most 0.6667" in SaliencyPruning("reap", budget=Budget(removed_expert_ratio=0.8)).check(facts)[0]
    assert "at most 0.6667" in NAEE(budget=Budget(removed_expert_ratio=0.8)).check(facts)[0]
    assert "at most 0.8333" in Merging("router_logits", budget=Budget(removed_expert_ratio=0.9)).check(facts)[0]
    for make in (lambda: SaliencyPruning("size", "odd"), lambda: Merging("size"), lambda: Dropping("head")):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="both null"):
            make()
