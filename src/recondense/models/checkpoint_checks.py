"""Check a checkpoint before a weight is read: its config, the headers of its files and its tokenizer, all together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from recondense.config.checks import ADAPTER, HOLDS_ADAPTER, check_folder
from recondense.config.problems import Problem, render
from recondense.config.schema import ModelConfig
from recondense.errors import ConfigError, UserError
from recondense.models import headers, model_classes, quantized
from recondense.models.config_checks import CheckedConfig, Checkpoint, check_config, make_outline
from recondense.models.differences import shown
from recondense.models.model_files import cached_model_file, model_file
from recondense.models.tokenizers import (
    damaged_files,
    embedding_rows,
    hub_files,
    load_tokenizer,
    tokenizer_setting,
)


def require_checkpoint(path: str | Path, settings: ModelConfig, setting: str = "model.path") -> Checkpoint:
    """Check a checkpoint of any family.

    Args:
        path, settings, setting: as for `check_checkpoint`.

    Raises:
        ConfigError: it cannot be used; the error lists all problems.
    """
    problems = list(check_folder(str(path), setting)) if Path(path).is_dir() else []
    checkpoint = check_checkpoint(path, settings, setting, any_family=True)
    if problems := [*problems, *checkpoint.problems]:
        raise ConfigError(render(problems))
    return checkpoint


def check_checkpoint(
    path: str | Path, settings: ModelConfig, setting: str = "model.path", *, any_family: bool = False
) -> Checkpoint:
    """Check a model's config.json, the headers of its weights and its tokenizer. No weight is read.

    Of a hub id, the config and the tokenizer are downloaded; its weights are checked if the cache has them, and
    otherwise when they are loaded.

    Args:
        path: a folder, or a hub id.
        settings: settings of the model: revision, tokenizer and trust_remote_code are used.
        setting: the setting that names the model, for messages.
        any_family: whether the model may be of a family that is not supported, like a teacher.
    """
    if model_file(path, ADAPTER, settings.revision) is not None:
        return Checkpoint(None, None, (Problem(setting, f"{HOLDS_ADAPTER}.", str(path)),))
    checked, problems = _read_config(path, settings, setting, any_family)
    read = None if checked is None else checked.config
    if checked is not None:
        problems += (Problem(setting, f"{text}.", str(path)) for text in checked.problems)
        problems += quantized.check(checked.config.to_dict(), setting, str(path))
    usable = None if problems else read
    if (folder := _folder(path, settings)) is not None:
        outline = make_outline(usable) if usable is not None and model_classes.is_known(usable.model_type) else None
        complete = Path(path).is_dir()  # the hub's cache may lack files that are not downloaded yet
        texts = _check_weights(folder, outline, complete=complete)
        problems += (Problem(setting, f"{text}.", str(path)) for text in texts)
    tokenizer, more = _check_tokenizer(path, settings, setting, read)
    return Checkpoint(usable, tokenizer, (*problems, *more))


def _read_config(
    path: str | Path, settings: ModelConfig, setting: str, any_family: bool
) -> tuple[CheckedConfig | None, list[Problem]]:
    try:
        with hub_files(f"{setting}={path}", path, settings):
            return check_config(path, settings, any_family=any_family), []
    except UserError as error:
        text = str(error).removeprefix(f"{setting}={path}: ").removesuffix(".")
        return None, [Problem(setting, f"{text}.", str(path))]


def _folder(path: str | Path, settings: ModelConfig) -> Path | None:
    """Return the local folder of a model; of a hub id, the one in the cache, if it is there."""
    if Path(path).is_dir():
        return Path(path)
    file = cached_model_file(path, "config.json", settings.revision)
    return None if file is None else file.parent


def _check_weights(folder: Path, outline: PreTrainedModel | None, *, complete: bool) -> Iterator[str]:
    """Yield what is wrong with the safetensors files of a folder.

    Args:
        folder: the folder.
        outline: the model of the config, without weights; None compares nothing.
        complete: whether all files must be there.
    """
    try:
        files = headers.list_files(folder)
    except UserError as error:
        if complete:
            yield str(error)
        return
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    if complete and not files and others:
        yield (
            f"the folder has neither {quantized.SINGLE} nor {quantized.INDEX}, so nothing says how to read "
            f"{shown(others)}; download the missing file, or rename a single complete file to {quantized.SINGLE}"
        )
    unreadable = _unreadable(files)
    yield from unreadable
    if files and outline is not None and not unreadable:
        yield from headers.compare(outline, files, quantized.method_of(outline.config.to_dict())).problems


def _unreadable(files: Sequence[Path]) -> list[str]:
    """Return what is wrong with files of weights, one sentence for each reason."""
    by_reason: dict[str, list[str]] = {}
    for file in files:
        try:
            for _ in headers.read_headers([file]):
                pass
        except UserError as error:
            by_reason.setdefault(str(error).removeprefix(file.name), []).append(file.name)
    return [
        f"{names[0]}{reason}"
        + (f" (the same for {len(names) - 1} more of its {len(files)} files)" if names[1:] else "")
        for reason, names in by_reason.items()
    ]


def _check_tokenizer(
    path: str | Path, settings: ModelConfig, setting: str, config: PretrainedConfig | None
) -> tuple[PreTrainedTokenizerBase | None, list[Problem]]:
    """Return the tokenizer and its problems. Without a config, only its damaged files are problems."""
    name, value = tokenizer_setting(path, settings, setting)
    revision = settings.revision if settings.tokenizer is None else None
    try:
        tokenizer = load_tokenizer(path, settings, setting)
    except UserError as error:
        texts = list(damaged_files(value, revision))
        if not texts and config is not None:
            texts = [str(error).removeprefix(f"{name}={value}: ").removesuffix(".")]
        return None, [Problem(name, f"{text}.", value) for text in texts]
    if config is None:
        return None, []
    return tokenizer, [Problem(name, f"{text}.", value) for text in _check_ids(tokenizer, embedding_rows(config))]


def _check_ids(tokenizer: PreTrainedTokenizerBase, rows: int | None) -> Iterator[str]:
    """Yield the tokens that begin or end texts but have no row in the embedding; others may not be used."""
    for name in ("bos_token", "eos_token"):
        number = getattr(tokenizer, f"{name}_id")
        if number is not None and rows and number >= rows:
            yield (
                f"its {name} {getattr(tokenizer, name)!r} has the id {number}, but the model's embedding has {rows} "
                "rows; use the tokenizer of this model"
            )
