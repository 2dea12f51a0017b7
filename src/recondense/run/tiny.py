"""The embedded model: a small Qwen2-MoE with its own tokenizer, trained on the standard library's text on first use.

The Lightning code that recovers models also trains this one. The cache stores it under a fingerprint of everything
that determines it, so a change of any of that leads to a new training.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen2MoeConfig, Qwen2MoeForCausalLM

from recondense.calibration.tape import Tape
from recondense.config.schema import ModelConfig, RecoveryConfig, TrainerConfig
from recondense.data.corpus import Corpora
from recondense.data.loader import RecoveryData
from recondense.data.stdlib import stdlib_corpora
from recondense.data.windows import pack
from recondense.evaluation.perplexity import perplexity
from recondense.files import (
    Damaged,
    discard,
    fingerprint,
    hash_file,
    hold_lock,
    read_checked,
    replace_folder,
    write_checked,
)
from recondense.models import moe_blocks
from recondense.models.loading import choose_device
from recondense.plan import Plan
from recondense.progress import progress
from recondense.recovery.fit import fit
from recondense.recovery.module import RecoveryModule
from recondense.surgery.student import Student

VERSION = 1  # increment when a change of this file leads to a different model for the same settings
END_OF_TEXT = "<|endoftext|>"
EVALUATION_BATCH = 16

log = logging.getLogger(__name__)


def ensure(model: ModelConfig, cache: Path, trainer: TrainerConfig, callbacks: Sequence[Callback] = ()) -> Path:
    """Return the folder of the embedded model, after training it if the cache does not have it.

    Args:
        model: settings of the model; `pretrain` has the architecture and the training.
        cache: the cache folder.
        trainer: settings of the trainer.
        callbacks: Lightning callbacks of the training.

    Returns:
        A Hugging Face folder that also has training.json, a report of the training.
    """
    settings = dict(model.pretrain or {})
    corpora = stdlib_corpora()
    # The model must not depend on these settings of the run.
    trainer = replace(trainer, precision="32-true", deterministic=True, strategy="auto")
    decides = VERSION, settings, corpora.sha256(), choose_device(model).type
    folder = cache / "models" / f"tiny_moe-{fingerprint(*decides)}"
    with hold_lock(Path(f"{folder}.lock"), "trains the embedded model"):
        if not _is_intact(folder):
            _train(model, settings, corpora, folder, trainer, callbacks)
        shutil.rmtree(folder.with_name(f"{folder.name}.training"), ignore_errors=True)
    return folder


def _train(
    model: ModelConfig,
    settings: dict[str, Any],
    corpora: Corpora,
    folder: Path,
    trainer: TrainerConfig,
    callbacks: Sequence[Callback],
) -> None:
    started = time.perf_counter()
    assert corpora.train is not None and corpora.validation is not None
    tokenizer = train_tokenizer(corpora.train, settings["vocab_size"], settings["config"]["max_position_embeddings"])
    train_NS = pack(corpora.train, tokenizer, settings["sequence_length"], "the training text")
    validation_MS = pack(corpora.validation, tokenizer, settings["sequence_length"], "the validation text")
    torch.manual_seed(settings["seed"])
    config = Qwen2MoeConfig(
        vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, bos_token_id=None, **settings["config"]
    )
    network = Qwen2MoeForCausalLM(config)
    network.to(choose_device(model))  # type: ignore[arg-type]  # transformers wraps the method
    network.set_experts_implementation("grouped_mm")
    work = folder.with_name(f"{folder.name}.training")
    module = RecoveryModule(
        Student(network, Plan(model="tiny_moe")),
        _recovery(settings),
        stage="pretrain",
        router_auxiliary_loss=settings["router_auxiliary_loss"],
    )
    data = RecoveryData(train_NS, None, settings["batch_size"], settings["steps"], settings["seed"])
    print("training the embedded model on the standard library's text (once; kept in the cache)", flush=True)
    fit(module, data, work, trainer, settings["seed"], callbacks)
    report = _report(network, train_NS, validation_MS)
    report |= {"seconds": time.perf_counter() - started, "settings": settings}
    with replace_folder(folder) as aside:
        network.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        report["files"] = {path.name: hash_file(path) for path in sorted(aside.iterdir())}
        write_checked(aside / "training.json", report, indent=1)


def _is_intact(folder: Path) -> bool:
    """Return whether the cache has the model as it was written; a damaged one is removed, with a warning."""
    if not (folder.exists() or folder.is_symlink()):
        return False
    try:
        hashes = read_checked(folder / "training.json")["files"]
        problem = next((f"{name} is not as it was" for name in hashes if hash_file(folder / name) != hashes[name]), "")
    except (OSError, Damaged) as error:
        problem = str(error)
    if problem:
        log.warning("%s is damaged (%s) and is made again", folder, problem)
        discard(folder)
    return not problem


def train_tokenizer(texts: list[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with one special token, the end of text.

    Args:
        texts: documents for the training.
        vocab_size: number of tokens.
        max_length: maximum sequence length of the model.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with progress("training the tokenizer"):
        tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT, model_max_length=max_length
    )


def _recovery(settings: dict[str, Any]) -> RecoveryConfig:
    return RecoveryConfig(
        name="pretrain",
        objective="finetune",
        trainable="all",
        steps=settings["steps"],
        batch_size=settings["batch_size"],
        learning_rate=settings["learning_rate"],
        weight_decay=settings["weight_decay"],
        betas=(0.9, settings["beta2"]),
        warmup_steps=settings["warmup_steps"],
        schedule="cosine",
        checkpoint_every=200,
    )


def unigram_perplexity(train_NS: Tensor, validation_MS: Tensor, vocab_size: int) -> float:
    """Return the perplexity of token frequencies (with add-one smoothing) on the validation windows.

    Args:
        train_NS: training windows, from which tokens are counted.
        validation_MS: validation windows; their first tokens are not predicted.
        vocab_size: number of tokens.
    """
    counts_V = torch.bincount(train_NS.flatten(), minlength=vocab_size).double() + 1
    log_p_V = (counts_V / counts_V.sum()).log()
    return math.exp(-float(log_p_V[validation_MS[:, 1:]].mean()))


def expert_loads(model: PreTrainedModel, windows_NS: Tensor) -> dict[int, list[float]]:
    """Return for each layer the share of tokens that select each routed expert; 0 for an unused expert."""
    tape = Tape.record(model, [(windows_NS, torch.ones_like(windows_NS))])
    loads = {}
    for layer, block in moe_blocks.sparse_blocks(model).items():
        counts = Counter(int(i) for trace in tape.trace(model, layer) for i in trace.top_k_index_TK.flatten().tolist())
        loads[layer] = [counts[expert] / tape.num_tokens for expert in range(block.num_experts)]
    return loads


def _report(network: PreTrainedModel, train_NS: Tensor, validation_MS: Tensor) -> dict[str, Any]:
    quality = perplexity(network, validation_MS, EVALUATION_BATCH, description="evaluating the embedded model")
    loads = expert_loads(network, validation_MS[:64])
    return {
        **quality,
        "unigram_perplexity": unigram_perplexity(train_NS, validation_MS, network.config.vocab_size),
        "least_expert_load": min(min(load) for load in loads.values()),
        "expert_loads": {str(layer): load for layer, load in loads.items()},
    }
