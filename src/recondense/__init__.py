"""recondense: condense a Mixture-of-Experts language model, then recover what was lost.

    import recondense as rc

    model, tokenizer = rc.load("Qwen/Qwen1.5-MoE-A2.7B")                  # hub id or local folder
    tape = rc.calibrate(model, tokenizer, texts)                          # 100 texts of 256 tokens by default
    plan = rc.search(tape, rc.CDMoE(num_experts=4, num_layers=9))         # or a list, or the name of a method
    student = rc.apply(model, plan, tape)                                 # student.original() is the uncompressed model
    rc.recover(student, tokenizer, train_texts, objective="distill", steps=200)
    print(rc.evaluate(student, tokenizer, validation_texts))              # loss, perplexity, KL to the original
    rc.export(student, tokenizer, "condensed")                            # rc.load("condensed") reads it back

Each name is imported when it is first used, so `import recondense` is fast.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recondense.calibration.calibrate import calibrate
    from recondense.calibration.tape import Tape
    from recondense.errors import UserError
    from recondense.evaluation.perplexity import evaluate
    from recondense.export.export import export
    from recondense.methods.cdmoe import CDMoE
    from recondense.methods.combined import Combined
    from recondense.methods.decompose import Decompose
    from recondense.methods.dropping import Dropping
    from recondense.methods.half_merging import HalfMerging
    from recondense.methods.merging import Merging
    from recondense.methods.moei2 import InterExpertPruning
    from recondense.methods.mone import MoNE
    from recondense.methods.naee import NAEE
    from recondense.methods.narrowing import Narrowing
    from recondense.methods.saliency import SaliencyPruning
    from recondense.methods.search.budget import Budget
    from recondense.models.loading import load
    from recondense.plan import Plan
    from recondense.recovery.recover import recover
    from recondense.report.comparison import compare
    from recondense.run.plan_only import plan_only
    from recondense.run.search import search
    from recondense.surgery.apply import apply
    from recondense.surgery.student import Student

__version__ = "0.1.0"

# The module of each public name: first the verbs, in the order in which data passes through them.
_MODULES = {
    "load": "models.loading",
    "calibrate": "calibration.calibrate",
    "search": "run.search",
    "apply": "surgery.apply",
    "recover": "recovery.recover",
    "evaluate": "evaluation.perplexity",
    "export": "export.export",
    "plan_only": "run.plan_only",
    "compare": "report.comparison",
    "Plan": "plan",
    "CDMoE": "methods.cdmoe",
    "InterExpertPruning": "methods.moei2",
    "Decompose": "methods.decompose",
    "Combined": "methods.combined",
    "SaliencyPruning": "methods.saliency",
    "NAEE": "methods.naee",
    "Narrowing": "methods.narrowing",
    "Dropping": "methods.dropping",
    "Merging": "methods.merging",
    "HalfMerging": "methods.half_merging",
    "MoNE": "methods.mone",
    "Student": "surgery.student",
    "Tape": "calibration.tape",
    "Budget": "methods.search.budget",
    "UserError": "errors",
}
__all__ = [
    "NAEE",
    "Budget",
    "CDMoE",
    "Combined",
    "Decompose",
    "Dropping",
    "HalfMerging",
    "InterExpertPruning",
    "Merging",
    "MoNE",
    "Narrowing",
    "Plan",
    "SaliencyPruning",
    "Student",
    "Tape",
    "UserError",
    "apply",
    "calibrate",
    "compare",
    "evaluate",
    "export",
    "load",
    "plan_only",
    "recover",
    "search",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import_module(f"{__name__}.errors").require_checks()
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


class _Package(ModuleType):
    """Keep `recondense.export` the function: importing the subpackage of the same name would overwrite it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _MODULES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
