"""Benchmarks run to their end with sizes that take seconds, and write the figures that they print."""

from __future__ import annotations

import importlib
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.forks import Forks
from support.runs import ROOT
from transformers import LlamaConfig, LlamaForCausalLM

GENETIC = ["--experts", "8", "--top-k", "2", "--hidden-size", "32", "--width", "16", "--texts", "1", "--dropped", "3"]
RUNS = {
    "search": [
        *("benchmarks/search.py", "--method", "moei2", *GENETIC, "--population", "6", "--iterations", "3"),
        *("--threads", "1"),
    ],
    "low_rank": [
        *("benchmarks/low_rank.py", "--shapes", "4x64x48", "--tokens", "8", "--seconds", "0.01", "--threads", "1"),
    ],
    "real_size": [
        *("benchmarks/real_size.py", "--method", "moei2", "--device", "cpu", "--scale", "tiny", "--dtype", "float32"),
        *("--texts", "2", "--tokens", "16", "--batch-sizes", "1", "--new-tokens", "2", "--repetitions", "1"),
    ],
    "losses": [
        *("benchmarks/losses.py", "--tokens", "256", "--vocabulary", "65536", "--hidden-size", "16", "--threads", "1"),
        *("--kinds", "forward_kl"),
    ],
    "training": [
        *("benchmarks/training.py", "--rounds", "1", "--steps", "1", "--batch-size", "2", "--length", "16"),
        *("--vocabulary", "300", "--hidden-size", "32", "--layers", "2", "--num-experts", "4", "--width", "16"),
        *("--threads", "1", "--show-only"),
    ],
    "faults": ["benchmarks/faults.py", "--kills", "1", "--disks", "1", "--seed", "8", "--variants", "cdmoe"],
}
SLOW = ("training", "losses", "faults")  # eight processes; a vocabulary that is large enough to tell memory


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in RUNS])
def test_benchmark(forks: Forks, name: str, tmp_path: Path) -> None:
    script, *options = RUNS[name]
    done = forks.run(ROOT / script, *options, "--json", str(tmp_path / "figures.json"), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    CHECKS[name](json.loads((tmp_path / "figures.json").read_text()))
    if name == "low_rank":
        assert "nothing to judge" in done.stdout


def test_slow_low_rank_experts_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    bench = importlib.import_module("low_rank")

    def cell(ratio: float, shape: str = "16x512x352", arithmetic: float = 0.5) -> dict[str, Any]:
        timings = {f"{way} 64": {"times_faster": ratio} for way in ("forward", "backward")}
        return {"shape": shape, "ranks": "0.5", "arithmetic": arithmetic, **timings}

    shown = [cell(0.5, shape="16x128x64"), cell(0.5, arithmetic=0.9)]  # too small; more than half
    assert bench.judge(shown) == {"slower": 0, "of": 0, "slowest": None, "failed": False}
    noise = bench.judge([*shown, cell(0.95), cell(1.2)])
    assert noise == {"slower": 2, "of": 4, "slowest": 0.95, "failed": False}
    assert bench.verdict(noise).startswith("2 of 4 timings") and "too slow" not in bench.verdict(noise)
    slow = bench.judge([cell(0.89), cell(1.2, shape="60x2048x1408")])
    assert slow == {"slower": 2, "of": 4, "slowest": 0.89, "failed": True}
    assert "too slow, below 0.9" in bench.verdict(slow)
    monkeypatch.setattr(bench, "measure", lambda shape, args: [cell(0.89)])
    monkeypatch.setattr(bench, "table", lambda cells, args: "")
    monkeypatch.setattr(bench.torch, "set_num_threads", lambda num_threads: None)
    monkeypatch.setattr("sys.argv", ["low_rank.py", "--shapes", "16x512x352", "--tokens", "8"])
    assert bench.main() == 1


def test_a_carved_model_is_its_source_in_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """All experts together are the dense layer; neurons that are active together share an expert."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    carving = importlib.import_module("carving")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 97}
    torch.manual_seed(0)
    source = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    ids = torch.randint(0, 97, (4, 16))
    moe = carving.carve(source, ids, carving.Carving(num_experts=4, top_k=2, shared_width=16))
    assert carving.check_carving(source, moe, ids) < 1e-5
    routers = [layer.mlp.gate for layer in moe.model.layers]
    assert all(router.top_k == 2 and router.weight.abs().sum() > 0 for router in routers), "left as they were"
    assert not torch.allclose(moe(ids).logits, source(ids).logits, rtol=0, atol=1e-3), "two of four experts"

    together = np.repeat(np.eye(4), 3, axis=0)[np.random.default_rng(1).permutation(12)]
    clusters = carving.balanced_clusters(together + 0.01 * np.random.default_rng(2).random((12, 4)), 4, seed=0)
    assert sorted(map(len, clusters)) == [3] * 4
    assert all(len({int(together[point].argmax()) for point in cluster}) == 1 for cluster in clusters)


def genetic(figures: dict[str, Any]) -> None:
    for case in figures["cases"].values():
        assert case["same_survivors"] and case["same_generations"] == case["generations"] == 3
        assert case["largest_relative_difference"] < 1e-5
    scored = [case["scored"]["block"] for case in figures["cases"].values()]
    assert scored[0] == 18 > scored[1]  # each set is scored once


def low_rank(figures: dict[str, Any]) -> None:
    for cell in figures["cells"]:
        # Ranks are integers: one of 27 is 0.04.
        assert cell["arithmetic"] == pytest.approx(float(cell["ranks"].partition(" ")[0]), abs=0.05)
        assert all(cell[f"{way} 8"]["times_faster"] > 0 for way in ("forward", "backward"))
    assert figures["slower_at_half"] == {"slower": 0, "of": 0, "slowest": None, "failed": False}
    assert any("uneven" in cell["ranks"] and cell["different"] > 1 for cell in figures["cells"])


def real_size(figures: dict[str, Any]) -> None:
    seconds = figures["search"]["seconds"]
    assert {"expert importance", "genetic search", "KT-reception field"} < set(seconds)
    assert all(value > 0 for value in seconds.values()) and figures["surgery_seconds"] > 0
    assert 0.5 < figures["profiles"]["1"]["memory_ratio"] < 0.8


def losses(figures: dict[str, Any]) -> None:
    forward_kl = figures["losses"]["forward_kl"]
    assert forward_kl["memory_ratio"] < 0.9 and max(forward_kl["relative_differences"].values()) < 1e-4


def training(figures: dict[str, Any]) -> None:
    contestants, ratios = figures["contestants"], figures["ratios"]
    assert all(one["tokens_per_second"]["median"] > 0 < one["peak_bytes"] for one in contestants.values())
    first = {name: contestants[name]["losses"][0] for name in ("shared", "model", "two_models", "full_logits")}
    assert len({round(loss, 6) for loss in first.values()}) == 1 and first["shared"] == first["model"]
    assert contestants["cached"]["losses"][0] < first["shared"]
    # The divergence of so small a model is near 2e-5 nats, where fp32 rounds it to three digits.
    assert contestants["shared"]["losses"] == pytest.approx(contestants["two_models"]["losses"], rel=0, abs=1e-7)
    assert ratios["shared largest difference of losses"] < 0.01


def faults(figures: dict[str, Any]) -> None:
    assert figures["equal"] == figures["of"] == len(figures["outcomes"]) == 2
    assert [outcome["name"] for outcome in figures["outcomes"]] == ["kill-0", "disk-0"]


def test_another_end_of_a_disturbed_run_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    bench = importlib.import_module("faults")

    def run(name: str, plan: str = "{}", loss: float = 1.0, weights: bytes = b"abc") -> Path:
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "plan.json").write_text(plan)
        (tmp_path / name / "summary.json").write_text(json.dumps({"stages": {"original": {"loss": loss}}}))
        (tmp_path / name / "model" / "README.md").write_text(name)
        (tmp_path / name / "model" / "model.safetensors").write_bytes(weights)
        return tmp_path / name

    one = run("one")
    assert bench.difference(one, run("same")) == ""
    assert bench.difference(one, run("plan", plan="[]")) == "plan.json differs"
    assert "figures differ" in bench.difference(one, run("loss", loss=1.0000001))
    assert bench.difference(one, run("weights", weights=b"abd")) == "the exports differ in model.safetensors"
    (one / "model" / "more").touch()
    assert "other files: ['more']" in bench.difference(one, tmp_path / "same")
    ended = bench.Ended(2, [(0.1, "recondense: x cannot be written: the disk is full")])
    assert bench.says_it(ended)
    ended.lines.insert(0, (0.0, "Traceback (most recent call last):"))
    assert not bench.says_it(ended)


def test_moments_are_drawn_from_the_undisturbed_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    bench = importlib.import_module("faults")
    lines = [(1.0, "expert search: started (3)"), (1.5, "recovery: started (12)"), (2.0, "exporting: started")]
    undisturbed = bench.Ended(0, lines, 3.0)
    draws = [bench.draw_kill(random.Random(seed), undisturbed) for seed in range(200)]
    assert {kill.phase for kill in draws} == {None, "search", "recovery", "export"}, "there is no evaluation"
    assert all(0 <= kill.delay <= (3.0 if kill.phase is None else 1.0) and kill.number == 0 for kill in draws)
    assert draws[:5] == [bench.draw_kill(random.Random(seed), undisturbed) for seed in range(5)]


CHECKS = {
    "search": genetic, "low_rank": low_rank, "real_size": real_size, "losses": losses, "training": training,
    "faults": faults,
}  # fmt: skip


def test_families(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One family with two methods; a folder with other logits is reported."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    bench = importlib.import_module("families")
    check = next(line for line in bench.ELSEWHERE.splitlines() if line.startswith("assert all(importlib"))
    monkeypatch.setattr(bench, "ELSEWHERE", bench.ELSEWHERE.replace(check, 'sys.modules["recondense"] = None'))
    cells = bench.check_family("mixtral", ["cdmoe_s", "reap", "svd_llm"], tmp_path, sys.executable)
    assert "no shared experts" in cells["cdmoe_s"]["refused"] and bench.letters(cells["cdmoe_s"]) == "x"
    assert not any(list(bench.failures(cell)) for cell in cells.values())
    assert [bench.letters(cells[method]) for method in ("reap", "svd_llm")] == ["S B", "B D"]
    for entry in cells["reap"]["formats"].values():
        assert 0 <= entry["difference"] < 1e-4 and entry["tokens"]
    assert (
        bench.letters({"refused": "", "formats": {"auto": {"kind": "stock", "difference": 1e-3, "tokens": True}}})
        == "!"
    )
    assert (
        bench.letters({"refused": "", "formats": {"auto": {"kind": "stock", "difference": 0.0, "tokens": False}}})
        == "!"
    )
    assert bench.letters({"refused": "", "formats": {"auto": {"kind": "stock", "error": "it does not load"}}}) == "!"
