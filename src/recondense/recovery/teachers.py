"""Teachers: the original on the student's backbone, or another model; predictions on disk are in teacher_cache.py."""

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

# Texts that two tokenizers with the same vocabulary may still split differently.
PROBES = (
    "Hello world",
    "  two spaces\n\n\tand a tab",
    "1234567 + 3.14e-5",
    "naïve café, Ünïcödé, 東京",
    "don't I'LL x_y()",
)


class TeacherOutput(NamedTuple):
    """A teacher's output for a batch.

    Args:
        target: the teacher's predictions; None without a teacher.
        states: the teacher's hidden states (B, S, D) after the requested layers.
        layer: the first decoder layer that student and teacher do not share.
        entering: the hidden states that enter this layer, at which the student can start; empty if it cannot.
    """

    target: Hidden | TopK | None = None
    states: Sequence[Tensor] = ()
    layer: int = 0
    entering: Sequence[Tensor] = ()


class Teacher(Protocol):
    """Something whose predictions a student learns."""

    @property
    def answers_any_text(self) -> bool:
        """Whether the teacher has predictions for other texts than the training windows, such as validation windows."""

    def teach(self, inputs: PassInputs, layers: Sequence[int] = ()) -> TeacherOutput:
        """Compute the teacher's output for a batch, without dropout and without gradients.

        Args:
            inputs: the batch.
            layers: the decoder layers after which hidden states are returned.
        """


class OriginalTeacher:
    """The original, on the backbone that it shares with the student.

    The layers below the first different one run only once for both.
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
            with decoder.lm_head(model) as head:  # the original's, if the student has its own
                target = Hidden(inputs.tokens.select_rows(output.logits), head)
        return TeacherOutput(target, states, first, entering)


class OtherTeacher:
    """Another, frozen model with the student's tokenizer. It is not part of the student's module or checkpoints.

    Args:
        model: the causal LM, on the student's device.
        student: the model that learns from it.
        name: the teacher's name in the settings, for messages.

    Raises:
        UserError: the vocabulary size of the head differs from the student's.
    """

    answers_any_text = True

    def __init__(self, model: PreTrainedModel, student: PreTrainedModel, name: str) -> None:
        widths = []
        for causal_lm in (model, student):
            with decoder.lm_head(causal_lm) as head:
                widths.append(len(head.weight_VD))
        if widths[0] != widths[1]:
            raise UserError(
                f"recovery.teacher_path={name}: its head has {widths[0]} logits, but the student's has {widths[1]}; a "
                "teacher must have the student's vocabulary"
            )
        self.model = model.requires_grad_(False).eval()

    def __deepcopy__(self, memo: Any) -> OtherTeacher:
        return self  # copies of a student use the same teacher

    @torch.no_grad()
    def teach(self, inputs: PassInputs, layers: Sequence[int] = ()) -> TeacherOutput:
        assert not layers, "hidden states of another model are not compared"
        with eval_mode(self.model):
            output = run(self.model, inputs.arguments)
        with decoder.lm_head(self.model) as head:
            return TeacherOutput(Hidden(inputs.tokens.select_rows(output.logits), head))


def require_same_vocabulary(theirs: PreTrainedTokenizerBase, ours: PreTrainedTokenizerBase, name: str) -> None:
    """Check that a teacher's token ids mean the same as the student's.

    Args:
        theirs: the teacher's tokenizer.
        ours: the student's tokenizer.
        name: the teacher's name in the settings.

    Raises:
        UserError: the vocabularies differ, or some texts get different ids.
    """
    our_ids, their_ids = ours.get_vocab(), theirs.get_vocab()
    differing = [token for token in {**our_ids, **their_ids} if our_ids.get(token) != their_ids.get(token)]
    reason = ""
    if differing:
        token = min(differing)
        reason = (
            f"{len(differing)} tokens have different ids or exist in only one of the two, such as {token!r} (teacher's "
            f"id {their_ids.get(token)}, student's id {our_ids.get(token)})"
        )
    else:
        texts = [text for text in PROBES if theirs(text)["input_ids"] != ours(text)["input_ids"]]
        reason = f"it encodes {texts[0]!r} differently" if texts else ""
    if reason:
        raise UserError(
            f"recovery.teacher_path={name}: its tokenizer is not the student's: {reason}. A teacher must have the same "
            "tokenizer; use recovery.teacher=shared, or another checkpoint."
        )
