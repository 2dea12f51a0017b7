"""A command takes CD-MoE's coefficients from whole calibration texts, and knows when their ends change."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import arguments, model_folder, text_files
from transformers import AutoModelForCausalLM, AutoTokenizer

from recondense.plan import Plan

Command = Callable[..., tuple[int, str]]
QUICK = (
    "recovery=none", "evaluation=none", "export.enabled=false", "callbacks.profile.enabled=false",
    "method.num_experts=2", "method.num_layers=2",
)  # fmt: skip


pytestmark = pytest.mark.usefixtures("as_one_command")


def coefficients(plan: Plan) -> dict[str, list[float | None]]:
    return {layer: entry["coefficients"] for layer, entry in plan.search["expert_search"].items()}


@torch.no_grad()
def by_hand(folder: Path, documents: list[str]) -> dict[str, list[float | None]]:
    """Coefficients from what transformers' routers return for each whole text, up to the model's 256 positions."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    seen: dict[str, list[list[float]]] = {str(layer): [[] for _ in range(6)] for layer in range(3)}
    for layer in range(3):

        def watch(module: Any, args: Any, output: Any, layer: int = layer) -> None:
            for weights, experts in zip(output[1].tolist(), output[2].tolist(), strict=True):
                for weight, expert in zip(weights, experts, strict=True):
                    seen[str(layer)][expert].append(weight)

        model.model.layers[layer].mlp.gate.register_forward_hook(watch)
    for document in documents:
        ids = tokenizer(document, return_tensors="pt")["input_ids"][:, :256]
        model(input_ids=ids, use_cache=False)
    return {layer: [sum(one) / len(one) if one else None for one in lists] for layer, lists in seen.items()}


def test_a_command_takes_whole_texts(command: Command, tmp_path: Path) -> None:
    folder, texts, out = model_folder(tmp_path / "model"), text_files(tmp_path / "texts"), tmp_path / "out"
    path = Path(texts["calibration"])
    documents = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    documents = [text[: 40 + 30 * index] for index, text in enumerate(documents)]  # the last ones are cut at 256 tokens

    def write() -> None:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))

    def run(name: str, *more: str) -> Plan:
        code, err = command(*arguments(folder, texts, out, name, *QUICK, *more))
        assert code == 0, err
        return Plan.load(out / name / "plan.json")

    write()
    whole, short = run("whole"), run("short", "method.coefficient_max_length=24")
    for layer, values in by_hand(folder, documents[:10]).items():
        assert coefficients(whole)[layer] == pytest.approx(values, rel=1e-5)
    lengths = [min(256, len(text.encode())) for text in documents[:10]]
    assert whole.search["coefficient_texts"] == {"max_length": None, "tokens": sum(lengths)}
    assert "coefficient_texts" not in short.search and coefficients(short) != coefficients(whole)

    documents[3] = documents[3][:-30] + "another end of this text, as long"[:30]  # beyond the 24 tokens of the searches
    write()
    code, err = command(*arguments(folder, texts, out, "whole", *QUICK))
    assert code == 2 and "calibration" in err and "changed since this run began" in err, err
    changed, same = run("changed"), run("same", "method.coefficient_max_length=24")
    for layer, values in by_hand(folder, documents[:10]).items():
        assert coefficients(changed)[layer] == pytest.approx(values, rel=1e-5)
    assert coefficients(changed) != coefficients(whole)
    assert (same.operations, same.search) == (short.operations, short.search)
