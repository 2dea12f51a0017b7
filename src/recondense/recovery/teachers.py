"""Teachers: the original on the student's backbone, or another model. teacher_cache.py has predictions on disk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recondense.errors import UserError
from recondense.models import decoder
from recondense.models.forward import run
from recondense.models.hooks import eval_mode
from recondense.recovery.losses import Hidden, TopK
from recondense.recovery.shared_passes import PassInputs, first_unshared_layer, record_entering, record_states
from recondense.surgery.student import Student

# Texts that two tokenizers of one vocabulary may still cut differently.
PROBES = (
    "Hello world",
    "  two spaces\n\n\tand a tab",
    "1234567 + 3.14e-5",
    "naïve café, Ünïcödé, 東京",
    "don't I'LL x_y()",
)


class TeacherOutput(NamedTuple):
    """A teacher's answer to a batch.

    Args:
        target: its predictions; None: there is no teacher.
        states: its hidden states (B, S, D) after the layers that were asked for.
        layer: the first decoder layer that the student does not share with it.
        entering: the hidden states that enter this layer, where the student may begin; empty: it may not.
    """

    target: Hidden | TopK | None = None
    states: Sequence[Tensor] = ()
    layer: int = 0
    entering: Sequence[Tensor] = ()


class Teacher(Protocol):
    """Something whose predictions a student learns."""

    @property
    def answers_any_text(self) -> bool:
        """Whether it can be asked about texts other than the training windows, such as validation windows."""

    def teach(self, inputs: PassInputs, layers: Sequence[int] = ()) -> TeacherOutput:
        """Its answer to a batch, computed without dropout and without gradients.

        Args:
            layers: decoder layers after which hidden states are part of the answer.
        """


class OriginalTeacher:
    """The original, on the backbone that it shares with the student.

    Layers below the first difference run once for both.
    """

    def __init__(self, student: Student) -> None:
        self.student = student

    @property
    def answers_any_text(self) -> bool:
        return self.student.has_original

    @torch.no_grad()
    def teach(self, inputs: PassInputs, layers: Sequence[int] = ()) -> TeacherOutput:
        model = self.student.model
        first = first_unshared_layer(model, self.student.changed_layers())
        with (
            self.student.original(),
            eval_mode(model),
            record_states(model, layers) as states,
            record_entering(model, first) as entering,
        ):
            output = run(model, inputs.arguments)
        with decoder.lm_head(model) as head:
            return TeacherOutput(Hidden(inputs.tokens.select_rows(output.logits), head), states, first, entering)


class OtherTeacher:
    """Another model with the student's tokenizer, frozen. It is not part of the student's module or checkpoints.

    Args:
        model: the causal LM, on the student's device.
        student: the model that learns from it.
        name: what the user calls the teacher, for the message.

    Raises:
        UserError: its head gives logits of another width than the student's.
    """

    answers_any_text = True

    def __init__(self, model: PreTrainedModel, student: PreTrainedModel, name: str) -> None:
        widths = []
        for causal_lm in (model, student):
            with decoder.lm_head(causal_lm) as head:
                widths.append(len(head.weight_VD))
        if widths[0] != widths[1]:
            raise UserError(
                f"recovery.teacher_path={name}: its head gives {widths[0]} logits and the student's {widths[1]}; a "
                "teacher needs the student's vocabulary"
            )
        self.model = model.requires_grad_(False).eval()

    def __deepcopy__(self, memo: Any) -> OtherTeacher:
        return self  # copies of a student ask the same teacher

    @torch.no_grad()
    def teach(self, inputs: PassInputs, layers: Sequence[int] = ()) -> TeacherOutput:
        assert not layers, "hidden states of another model are not compared"
        with eval_mode(self.model):
            output = run(self.model, inputs.arguments)
        with decoder.lm_head(self.model) as head:
            return TeacherOutput(Hidden(inputs.tokens.select_rows(output.logits), head))


def require_same_vocabulary(theirs: PreTrainedTokenizerBase, ours: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse a teacher whose token ids mean something else.

    Args:
        theirs: the teacher's tokenizer.
        ours: the student's tokenizer.
        name: what the user calls the teacher.

    Raises:
        UserError: another vocabulary, or texts that get other ids.
    """
    our_ids, their_ids = ours.get_vocab(), theirs.get_vocab()
    differing = [token for token in {**our_ids, **their_ids} if our_ids.get(token) != their_ids.get(token)]
    reason = ""
    if differing:
        token = min(differing)
        reason = (
            f"{len(differing)} tokens have other ids or exist in one of the two only, as {token!r} (id "
            f"{their_ids.get(token)} there, {our_ids.get(token)} here)"
        )
    else:
        texts = [text for text in PROBES if theirs(text)["input_ids"] != ours(text)["input_ids"]]
        reason = f"it encodes {texts[0]!r} differently" if texts else ""
    if reason:
        raise UserError(
            f"recovery.teacher_path={name}: its tokenizer is not the student's: {reason}. A teacher must have the same "
            "tokenizer; use recovery.teacher=shared, or another checkpoint."
        )
