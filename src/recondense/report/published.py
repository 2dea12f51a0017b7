"""Published results of the two papers: their models, the tasks they average, and every row of their tables.

CD-MoE: Condense, Don't Just Prune (arXiv 2412.00069). It states memory ratios: the share of the model's bytes that
remains. MoE-I²: Inter-Expert Pruning and Intra-Expert Low-Rank Decomposition (arXiv 2411.01016). It states the share
of the routed experts' parameters that was removed. The two have separate fields.

Scores are percentages: means of lm-eval's zero-shot accuracies over the paper's tasks (`PAPER_TASKS`). Every row says
how it is known: PAGE was read in the authors' published tables, SECOND_HAND in notes on the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

CDMOE, MOEI2 = "cdmoe", "moei2"
PAGE, SECOND_HAND = "page", "second-hand"
PAPER_TITLES = {CDMOE: "CD-MoE, arXiv 2412.00069", MOEI2: "MoE-I², arXiv 2411.01016"}
PAPER_TASKS: dict[str, tuple[str, ...]] = {
    CDMOE: ("arc_challenge", "boolq", "hellaswag", "mmlu", "openbookqa", "piqa", "rte", "winogrande"),
    MOEI2: ("arc_challenge", "arc_easy", "boolq", "hellaswag", "openbookqa", "rte", "winogrande"),
}


@dataclass(frozen=True)
class Model:
    """A model that the papers compress: sizes from its Hugging Face config, and the number of its parameters.

    Args:
        name: key of the model in `Result.model`.
        title: name for readers.
        model_type: `model_type` of the config.
        hidden_size: width of the hidden states.
        num_layers: decoder layers.
        num_moe_layers: decoder layers with routed experts.
        num_experts: routed experts per layer.
        expert_width: intermediate width of a routed expert.
        total_parameters, routed_expert_parameters: number of parameters of all layers together.
    """

    name: str
    title: str
    model_type: str
    hidden_size: int
    num_layers: int
    num_moe_layers: int
    num_experts: int
    expert_width: int
    total_parameters: int
    routed_expert_parameters: int


DEEPSEEK, QWEN, V2_LITE, MIXTRAL = "deepseek_moe_16b", "qwen1.5_moe_a2.7b", "deepseek_v2_lite", "mixtral_8x7b"
# The average rank that removes the share of parameters stated in the paper (arXiv 2411.01016).
AVERAGE_RANKS = {V2_LITE: 512, MIXTRAL: 2048}
MODELS: tuple[Model, ...] = (
    Model(DEEPSEEK, "DeepSeekMoE-16B", "deepseek", 2048, 28, 27, 64, 1408, 16_375_728_128, 14_948_499_456),
    Model(QWEN, "Qwen1.5-MoE-A2.7B", "qwen2_moe", 2048, 24, 24, 60, 1408, 14_315_784_192, 12_457_082_880),
    Model(V2_LITE, "DeepSeek-V2-Lite", "deepseek_v2", 2048, 27, 26, 64, 1408, 15_706_484_224, 14_394_851_328),
    Model(MIXTRAL, "Mixtral-8x7B", "mixtral", 4096, 32, 32, 8, 14336, 46_702_792_704, 45_097_156_608),
)


@dataclass(frozen=True)
class Result:
    """One row of a published table. A field is None if the table does not state it or it does not apply.

    Args:
        paper: key of `PAPER_TASKS`.
        model: `Model.name`.
        method: original, cdmoe, moei2, or a baseline of the paper (layer_drop, block_drop, msmoe).
        mean: mean score over the paper's tasks, in percent.
        source: arXiv id and title of the table.
        num_layers: layers that were condensed, dropped or merged.
        num_experts: routed experts retained in each condensed layer, in addition to the shared ones; 0 for E(2+0).
        pruned_ratio: share of the routed experts that were pruned.
        removed_expert_ratio: share of the routed experts' parameters that were removed (MoE-I²).
        exact_cut: `removed_expert_ratio` from the shapes, where the paper rounds it.
        memory_ratio: compressed / original bytes of the model, as measured by the authors (CD-MoE).
        memory_gb: size of the model in GB, as stated in the paper (MoE-I²).
        speedup: speed, compressed / original.
        fine_tuned: whether the score is after the paper's recovery (CD-MoE: its two stages; MoE-I²: LoRA).
        tasks: score of each task in percent, if the table states them.
        variant: the change that an ablation made; empty for the method as published.
        note: a remark for readers of the row.
        known_from: PAGE or SECOND_HAND.
    """

    paper: str
    model: str
    method: str
    mean: float
    source: str
    num_layers: int | None = None
    num_experts: int | None = None
    pruned_ratio: float | None = None
    removed_expert_ratio: float | None = None
    exact_cut: float | None = None
    memory_ratio: float | None = None
    memory_gb: float | None = None
    speedup: float | None = None
    fine_tuned: bool = False
    tasks: tuple[tuple[str, float], ...] = ()
    variant: str = ""
    note: str = ""
    known_from: str = PAGE

    @property
    def settings(self) -> dict[str, float | None] | None:
        """Settings of recondense's method that reproduce this row's sizes; None if no settings do."""
        if self.method == "cdmoe" and self.memory_ratio is not None and not self.fine_tuned:
            return {"num_experts": self.num_experts, "num_layers": self.num_layers}
        if self.method == "moei2" and self.pruned_ratio is not None:
            factorized = self.removed_expert_ratio != self.pruned_ratio
            return {"prune_ratio": self.pruned_ratio, "average_rank": AVERAGE_RANKS[self.model] if factorized else None}
        return None

    @property
    def setting(self) -> str:
        """Short description of the compression, such as "cdmoe: shared+6, 9 layers"."""
        if self.method == "original":
            return "original"
        words = []
        if self.num_experts is not None:
            words.append(f"shared+{self.num_experts}")
        if self.num_layers is not None:
            words.append(f"{self.num_layers} layers")
        if self.removed_expert_ratio is not None:
            words.append(f"{100 * self.removed_expert_ratio:.4g}% of the experts' parameters cut")
        words += [word for word in (self.variant, "fine-tuned" if self.fine_tuned else "") if word]
        return f"{self.method}: {', '.join(words)}"


_MAIN = "arXiv 2412.00069, main results on DeepSeekMoE-16B"
_TUNED = "arXiv 2412.00069, results after fine-tuning"
_LAYERS = "arXiv 2412.00069, results by the number of condensed layers"
_EXPERT_CHOICE = "arXiv 2412.00069, ablation of the choice of experts"
_LAYER_CHOICE = "arXiv 2412.00069, ablation of the choice of layers"
_MOEI2 = "arXiv 2411.01016, main results"


def _per_task(*scores: float) -> tuple[tuple[str, float], ...]:
    return tuple(zip(PAPER_TASKS[CDMOE], scores, strict=True))


def _by_layers(model: str, experts: int, *rows: tuple[float, float, float]) -> tuple[Result, ...]:
    """Return results with 3, 6, 9, 12 and 15 condensed layers, from rows of (mean, memory ratio, speed-up)."""
    return tuple(
        Result(
            *(CDMOE, model, "cdmoe", mean, _LAYERS, layers, experts),
            memory_ratio=memory,
            speedup=speed,
            **_MORE.get((model, experts, layers), {}),
        )
        for layers, (mean, memory, speed) in zip((3, 6, 9, 12, 15), rows, strict=True)
    )


# What is published beside the mean of a row of `_by_layers`, by model, experts and layers.
_MORE: dict[tuple[str, int, int], dict[str, Any]] = {
    (QWEN, 0, 6): {"tasks": (("arc_challenge", 41.1),), "note": "the only score of a single task that is known"}
}


def _ablation(source: str, *rows: tuple[str, float, str]) -> tuple[Result, ...]:
    """Return results of DeepSeekMoE-16B with nine layers condensed to E(2+6), from rows of (variant, mean, note)."""
    return tuple(
        Result(CDMOE, DEEPSEEK, "cdmoe", mean, source, 9, 6, variant=variant, note=note) for variant, mean, note in rows
    )


RESULTS: tuple[Result, ...] = (
    Result(
        *(CDMOE, DEEPSEEK, "original", 61.6, _MAIN),
        memory_ratio=1.0,
        speedup=1.0,
        tasks=_per_task(48.3, 72.7, 77.4, 38.3, 44.2, 78.7, 63.2, 70.1),
    ),
    Result(CDMOE, DEEPSEEK, "layer_drop", 49.4, _MAIN, 8, memory_ratio=0.722, speedup=1.34),
    Result(CDMOE, DEEPSEEK, "block_drop", 52.2, _MAIN, 8, memory_ratio=0.713, speedup=1.42),
    Result(CDMOE, DEEPSEEK, "msmoe", 54.9, _MAIN, 9, memory_ratio=0.700, speedup=1.0),
    Result(CDMOE, DEEPSEEK, "cdmoe", 55.1, _MAIN, 8, 0, memory_ratio=0.731, speedup=1.34),
    Result(CDMOE, DEEPSEEK, "cdmoe", 55.5, _MAIN, 9, 6, memory_ratio=0.725, speedup=1.26),
    Result(CDMOE, DEEPSEEK, "cdmoe", 59.1, _TUNED, 8, 0, fine_tuned=True),
    Result(
        *(CDMOE, DEEPSEEK, "cdmoe", 60.4, _TUNED, 9, 6),
        fine_tuned=True,
        tasks=_per_task(42.4, 79.4, 66.7, 38.5, 38.6, 76.1, 67.0, 73.9),
        note="the mean of the eight scores as they are printed is 60.3",
    ),
    *_by_layers(
        *(DEEPSEEK, 6),
        *((59.5, 0.908, 1.11), (56.5, 0.817, 1.16), (55.5, 0.725, 1.24), (52.8, 0.634, 1.44), (49.0, 0.542, 1.58)),
    ),
    *_by_layers(
        *(DEEPSEEK, 0),
        *((59.2, 0.899, 1.14), (56.4, 0.798, 1.25), (54.5, 0.697, 1.38), (51.8, 0.596, 1.58), (48.1, 0.495, 1.84)),
    ),
    Result(CDMOE, QWEN, "original", 65.5, _LAYERS, memory_ratio=1.0, speedup=1.0),
    *_by_layers(
        *(QWEN, 4),
        *((63.9, 0.899, 1.06), (62.4, 0.798, 1.19), (60.2, 0.697, 1.30), (56.4, 0.595, 1.61), (54.1, 0.494, 1.82)),
    ),
    *_by_layers(
        *(QWEN, 0),
        *((63.2, 0.892, 1.09), (62.6, 0.783, 1.22), (60.1, 0.675, 1.36), (57.4, 0.567, 1.54), (52.2, 0.458, 1.91)),
    ),
    *_ablation(
        _EXPERT_CHOICE,
        (
            *("experts by frequency of selection", 55.7),
            "the paper calls it routing weight, but its order of experts is by how often each is selected; it has an "
            "order of layers of its own",
        ),
        ("experts greedily", 55.5, ""),
        ("experts by L1", 53.2, ""),
        ("experts at random", 52.6, ""),
    ),
    *_ablation(
        *(_LAYER_CHOICE, ("layers greedily", 55.5, ""), ("layers in one shot by final JS", 53.1, "")),
        ("layers at random", 52.7, ""),
    ),
    Result(MOEI2, MIXTRAL, "original", 67.53, _MOEI2, speedup=1.0, known_from=SECOND_HAND),
    Result(
        *(MOEI2, MIXTRAL, "moei2", 67.65, _MOEI2),
        pruned_ratio=0.25,
        removed_expert_ratio=0.25,
        fine_tuned=True,
        note="pruned only",
        known_from=SECOND_HAND,
    ),
    Result(
        *(MOEI2, MIXTRAL, "moei2", 64.55, _MOEI2),
        pruned_ratio=0.25,
        removed_expert_ratio=0.5,
        exact_cut=0.5179,
        speedup=1.28,
        fine_tuned=True,
        note="about 50%: 25% pruned and a mean rank of 2048 cut 51.79% and leave 43.49 GiB",
        known_from=SECOND_HAND,
    ),
    Result(MOEI2, V2_LITE, "original", 61.49, _MOEI2, memory_gb=29.26, known_from=SECOND_HAND),
    Result(
        *(MOEI2, V2_LITE, "moei2", 59.62, _MOEI2),
        pruned_ratio=0.25,
        removed_expert_ratio=0.5398,
        memory_gb=15.03,
        fine_tuned=True,
        note="25% pruned and a mean rank of 512",
        known_from=SECOND_HAND,
    ),
)


def published_model(model_type: str, hidden_size: int, num_layers: int, num_experts: int) -> Model | None:
    """Return the published model with exactly these sizes; None if there is none.

    Args:
        model_type: `model_type` of the Hugging Face config.
        hidden_size: width of the hidden states.
        num_layers: decoder layers.
        num_experts: routed experts per layer.
    """
    shape = (model_type, hidden_size, num_layers, num_experts)
    for model in MODELS:
        if shape == (model.model_type, model.hidden_size, model.num_layers, model.num_experts):
            return model
    return None


def find(
    model: str,
    *,
    paper: str | None = None,
    method: str | None = None,
    num_layers: int | None = None,
    num_experts: int | None = None,
    removed_expert_ratio: float | None = None,
    fine_tuned: bool | None = None,
    ablations: bool = False,
) -> tuple[Result, ...]:
    """Return the rows of a model in the order of the tables. Arguments that are None do not restrict the rows.

    Args:
        model: `Model.name`.
        paper, method, num_layers, num_experts, fine_tuned: required values of the fields of `Result`.
        removed_expert_ratio: required share of removed parameters, with a tolerance of 0.005.
        ablations: whether to include rows of ablations, which are not the method as published.
    """
    fields = {"paper": paper, "method": method, "num_layers": num_layers, "num_experts": num_experts}
    fields |= {"fine_tuned": fine_tuned}
    required = {name: value for name, value in fields.items() if value is not None}
    return tuple(
        row
        for row in RESULTS
        if row.model == model
        and (ablations or not row.variant)
        and all(getattr(row, name) == value for name, value in required.items())
        and (
            removed_expert_ratio is None
            or (row.removed_expert_ratio is not None and abs(row.removed_expert_ratio - removed_expert_ratio) <= 0.005)
        )
    )
