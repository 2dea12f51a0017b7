"""Where the teacher's predictions come from: the original on the student's backbone, or another model.

A third kind, predictions kept on disk, is in teacher_cache.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recondense.errors import UserError
from recondense.models import decoder, views
from recondense.recovery.lora import Adapters

# Texts that tokenizers of one vocabulary may still cut otherwise.
PROBES = (
    "Hello world",
    "  two spaces\n\n\tand a tab",
    "1234567 + 3.14e-5",
    "naïve café, Ünïcödé, 東京",
    "don't I'LL x_y()",
)


class SharedBackboneTeacher(nn.Module):
    """The original model, which shares with the student every weight that surgery left alone.

    Attention, norms, embeddings, head and untouched layers exist once; only the original blocks of changed layers are
    kept beside the student. Inside `active()` the student's module *is* the original.

    Args:
        model: the student.
        originals: the blocks that surgery took out, by decoder-layer index; frozen here.
    """

    def __init__(self, model: PreTrainedModel, originals: Mapping[int, nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({str(layer): block for layer, block in originals.items()}).requires_grad_(False)
        self._model = (model,)  # in a tuple, so that the student is not registered a second time
        self.adapters: Adapters | None = None  # the student's, off while the teacher is asked
        self._kept: list[tuple[nn.Module, str, nn.Parameter]] = []

    def keep(self, module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        """Go on using a weight of the shared backbone that the student has replaced by another."""
        self._kept.append((module, name, parameter))

    @contextmanager
    def set_aside(self, path: Path) -> Iterator[None]:
        """Inside, the weights that the original alone has lie in a file; nobody may ask it. After, they are back.

        Args:
            path: of the file; it is gone afterwards.
        """
        used = {id(parameter) for parameter in (*self._model[0].parameters(), *self.kept())}
        alone = {name: each for name, each in self.blocks.named_parameters() if id(each) not in used}
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: each.detach().cpu().contiguous() for name, each in alone.items()}, path)
        devices = {name: each.device for name, each in alone.items()}
        for each in alone.values():
            each.data = each.data.new_empty(0)
        try:
            yield
        finally:
            with safe_open(path, framework="pt") as file:
                for name, each in alone.items():
                    each.data = file.get_tensor(name).clone().to(devices[name])
            path.unlink()

    def changed(self) -> set[int]:
        """Decoder layers in which the original differs from the student, adapters that are still in it apart."""
        kept = {id(module) for module, *_ in self._kept}
        layers = enumerate(decoder.decoder_layers(self._model[0]))
        own = {layer for layer, module in layers if any(id(inner) in kept for inner in module.modules())}
        return own | {int(layer) for layer in self.blocks}

    def kept(self) -> list[nn.Parameter]:
        """The weights that `keep` was told of."""
        return [parameter for _, _, parameter in self._kept]

    @contextmanager
    def active(self) -> Iterator[PreTrainedModel]:
        """A context inside which the model computes what the original does."""
        model = self._model[0]
        off = self.adapters.disabled() if self.adapters is not None else nullcontext()
        own = [(module, name, module._parameters[name]) for module, name, _ in self._kept]
        with off, views.swapped(model, {int(layer): block for layer, block in self.blocks.items()}):
            for module, name, original in self._kept:
                module._parameters[name] = original
            try:
                yield model
            finally:
                for module, name, parameter in own:
                    module._parameters[name] = parameter


class OtherTeacher:
    """Another model with the student's tokenizer, frozen. It is no part of the student's module, nor of checkpoints.

    Args:
        model: the causal LM, on the student's device.

    Raises:
        UserError: its head gives logits of another width than the student's.
    """

    def __init__(self, model: PreTrainedModel, student: PreTrainedModel, name: str) -> None:
        widths = []
        for each in (model, student):
            with decoder.gathered(each) as head:
                widths.append(len(head.weight_VD))
        if widths[0] != widths[1]:
            raise UserError(
                f"recovery.teacher_path={name}: its head gives {widths[0]} logits and the student's {widths[1]}; a "
                "teacher needs the student's vocabulary"
            )
        self.model = model.requires_grad_(False).eval()


def same_vocabulary(theirs: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse a teacher whose token ids mean something else.

    Raises:
        UserError: another vocabulary, or texts that come out as other ids.
    """
    mine, others = own.get_vocab(), theirs.get_vocab()
    differing = [token for token in {**mine, **others} if mine.get(token) != others.get(token)]
    reason = ""
    if differing:
        token = min(differing)
        reason = (
            f"{len(differing)} tokens have other ids or exist in one of the two only, as {token!r} (id "
            f"{others.get(token)} there, {mine.get(token)} here)"
        )
    else:
        texts = [text for text in PROBES if theirs(text)["input_ids"] != own(text)["input_ids"]]
        reason = f"it encodes {texts[0]!r} otherwise" if texts else ""
    if reason:
        raise UserError(
            f"recovery.teacher_path={name}: its tokenizer is not the student's: {reason}. A teacher must have the same "
            "tokenizer; use recovery.teacher=shared, or another checkpoint."
        )
