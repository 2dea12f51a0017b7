"""Steps from a method's settings: which step takes which setting, and the messages about wrong values."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

from recondense.errors import ConfigError
from recondense.run.build_steps import build_steps


@dataclasses.dataclass(frozen=True)
class Part:
    """Settings that several steps have."""

    search: str = "auto"
    depth: int = 1
    internal: int = dataclasses.field(default=0, metadata={"setting": False})


PART = Part(internal=7)


@dataclasses.dataclass(frozen=True)
class Step:
    """Every kind of annotation that a step may have."""

    whole: int = 1
    number: float | None = 0.5
    several: Sequence[float] = (0.5,)
    word: int | str | Sequence[int] = "all"
    kind: Literal["one", "other"] = "one"
    switch: bool = True
    part: Part = PART
    foreign: Path | None = None
    nested: Any = None
    words: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Other:
    whole: int = 1
    rank: int = 8


class Plain:
    def __init__(self, whole: int, scale: float = 1.0) -> None:
        self.whole, self.scale = whole, scale


STEP, OTHER, PLAIN = (f"{__name__}.{kind.__name__}" for kind in (Step, Other, Plain))


def problems(method: dict[str, Any]) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        build_steps({"name": "example", "refit": False, **method})
    return caught.value.messages


def test_one_step_has_the_settings_beside_its_target() -> None:
    method = {"name": "example", "refit": True, "steps": None, "_target_": STEP, "whole": 2, "search": "exact"}
    assert build_steps(method) == [Step(whole=2, part=Part("exact", internal=7))]


def test_several_steps_take_the_settings_that_they_have() -> None:
    method = {"name": "example", "whole": 3, "rank": 4, "search": "exact", "steps": [STEP, OTHER]}
    assert build_steps(method) == [Step(whole=3, part=Part("exact", internal=7)), Other(3, 4)]


def test_a_step_may_have_settings_of_its_own() -> None:
    """Such a step takes none of the method's settings, whatever they are."""
    steps = [{"_target_": OTHER, "rank": 2}, {"_target_": STEP, "search": "exact"}]
    assert build_steps({"_target_": STEP, "whole": 3, "steps": steps}) == [
        Other(rank=2),
        Step(part=Part("exact", internal=7)),
    ]
    assert build_steps({"_target_": STEP, "whole": 3, "steps": [*steps, OTHER]})[2] == Other(whole=3)
    assert build_steps({"_target_": STEP, "whole": 3, "steps": []}) == []


def test_any_class_can_be_a_step() -> None:
    [step] = build_steps({"_target_": PLAIN, "whole": 3})
    assert (step.whole, step.scale) == (3, 1.0)
    assert problems({"_target_": PLAIN})[0].startswith(f"method._target_={PLAIN}: ")


def test_settings_of_a_part_stand_beside_those_of_the_step() -> None:
    """A setting that is not given comes from the step's default for the part, not from the part's class."""
    [step] = build_steps({"_target_": STEP, "depth": 3})
    assert step == Step(part=Part("auto", 3, 7))
    for name in ("part", "internal"):
        assert problems({"_target_": STEP, name: 1})[0].startswith(f"method.{name}: there is no such setting.")
        [problem] = problems({"steps": [{"_target_": STEP, name: 1}]})
        assert problem.startswith(f"method.steps[0].{name}: there is no such setting.")


@pytest.mark.parametrize("method", [{"_target_": OTHER}, {"steps": [OTHER, PLAIN]}])
def test_a_setting_that_no_step_has_is_reported(method: dict[str, Any]) -> None:
    [problem] = problems({**method, "whole": 3, "rnk": 3})
    assert problem.startswith("method.rnk: there is no such setting. Did you mean method.rank? Choices: ")


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"whole": 2, "number": 3, "several": [1, 0.5], "word": [1, 2], "kind": "other", "switch": False},
        {"number": None, "several": [], "word": 3, "words": ["a", "b"]},
        {"word": "any", "foreign": Path("x"), "nested": {"_target_": "builtins.dict"}},
        {"foreign": {"_target_": "pathlib.Path"}},
    ],
)
def test_valid_settings_of_a_step(values: dict[str, Any]) -> None:
    assert len(build_steps({"_target_": STEP, **values})) == 1
    assert len(build_steps({"steps": [{"_target_": STEP, "_convert_": "all", **values}]})) == 1


WRONG = {
    "whole": True, "number": "abc", "several": 0.5, "word": 2.5, "kind": "othr", "switch": "maybe", "hole": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ({"_target_": STEP, **WRONG, "search": 3}, "method"),
        ({"steps": [STEP, OTHER], **WRONG, "search": 3}, "method"),
        ({"steps": [{"_target_": STEP, **WRONG, "search": 3}]}, "method.steps[0]"),
    ],
)
def test_all_wrong_types_of_a_step_are_reported(method: dict[str, Any], name: str) -> None:
    expected = (
        f"{name}.hole: there is no such setting. Did you mean {name}.whole?",
        f"{name}.whole=true: expected a whole number.",
        f"{name}.number=abc: expected a finite number.",
        f"{name}.several=0.5: expected a list (each a finite number). Write {name}.several=[0.5].",
        f"{name}.word=2.5: expected a whole number, a string or a list (each a whole number).",
        f"{name}.kind=othr: there is no such choice. Did you mean other? Choices: one, other.",
        f"{name}.switch=maybe: expected true or false.",
        f"{name}.search=3: expected a string.",
    )
    assert problems(method) == expected


@pytest.mark.parametrize("target", ["nowhere.Step", "Step", "recondense.config.method_steps.Absent"])
def test_a_step_that_does_not_exist_is_the_only_problem(target: str) -> None:
    for method, where in (
        ({"_target_": target}, "method._target_="),
        ({"steps": [OTHER, target]}, "method.steps[1]="),
        ({"steps": [{"_target_": target}]}, "method.steps[0]="),
    ):
        [problem] = problems({**method, "whole": 2, "hole": 3})
        assert problem.startswith(f"{where}{target}: ")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (f"{__name__}.Othr", f"{__name__} has no such class. Did you mean {__name__}.Other? Choices: Empty, "),
        (f"{__name__}.pytest", "is not a class. Name the class of a step"),
        ("os.getcwd", "is not a class. Name the class of a step, such as recondense.methods.cdmoe.CDMoE."),
    ],
)
def test_a_name_that_is_not_that_of_a_class(target: str, message: str) -> None:
    [problem] = problems({"_target_": target, "whole": 2})
    assert problem.startswith(f"method._target_={target}: {message}")


def test_no_choices_are_none() -> None:
    target = f"{__name__}.Empty"
    assert problems({"_target_": target, "whole": 2}) == ("method.whole: there is no such setting.",)


class Empty:
    """A class without settings."""
