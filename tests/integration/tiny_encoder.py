"""A tiny encoder trained for a few seconds with the masked objective, and requests for the tasks on it."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import Preempted
from pipeline.settings.resources import Resources
from pipeline.stage import Context, Result, Stage, World
from pipeline.store.artifact import list_files
from pipeline.store.checkpoints import Checkpoints
from pipeline.store.journal import Journal
from tests import rows
from tests.integration.tiny_language_model import make_tokenizer

MASKED_SHARE = 0.15
BLOCK_TOKENS = 32
POSITIONS = 96
MODERN = {"classifier_pooling": "mean", "cls_token_id": 0, "sep_token_id": 1, "layer_types": ["full_attention"] * 2}
"""Tokens 0 and 1 are the tokenizer's `<s>` and `</s>`."""


def make_encoder(folder: Path, texts: list[str], *, architecture: str = "bert", steps: int = 100) -> Path:
    """A BERT or ModernBERT of two layers, and its tokenizer, which puts nothing around texts."""
    import torch
    from transformers import AutoConfig, AutoModelForMaskedLM

    tokenizer = make_tokenizer(texts, vocabulary_size=1200)
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    torch.manual_seed(0)
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id}
    config = AutoConfig.for_model(
        architecture,
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=POSITIONS,
        eos_token_id=tokenizer.eos_token_id,
        **ids,
        **(MODERN if architecture == "modernbert" else {}),
    )
    model = AutoModelForMaskedLM.from_config(config)
    stream = [token for text in texts for token in framed(tokenizer, text)]
    blocks = torch.tensor(stream[: len(stream) // BLOCK_TOKENS * BLOCK_TOKENS]).view(-1, BLOCK_TOKENS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        labels = blocks[torch.randint(len(blocks), (32,), generator=generator)]
        masked = torch.rand(labels.shape, generator=generator) < MASKED_SHARE
        inputs = labels.masked_fill(masked, tokenizer.mask_token_id)
        loss = model(input_ids=inputs, labels=labels.masked_fill(~masked, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def framed(tokenizer: Any, text: str) -> list[int]:
    return [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


@functools.cache
def request_rows() -> list[dict[str, Any]]:
    """Requests with their intent as `label`, and their slots as `spans`."""
    return rows.requests(7000)


def request_encoder(folder: Path, architecture: str, *, steps: int = 100) -> Path:
    """An encoder trained on requests."""
    return make_encoder(folder, [row["text"] for row in request_rows()[:4000]], architecture=architecture, steps=steps)


def write_data(folder: Path, train: Iterable[dict[str, Any]], heldout: Iterable[dict[str, Any]]) -> Path:
    """A mixed data set, as far as a training stage reads it."""
    from stages.lib.rows.canonical import write_rows

    folder.mkdir(parents=True)
    write_rows(folder / "train.jsonl", train)
    write_rows(folder / "heldout.jsonl", heldout)
    return folder


def run_task(
    stage: Stage, inputs: dict[str, Path], params: dict[str, Any], folder: Path, *, stop_after_step: int | None = None
) -> tuple[Result, Path]:
    """Runs the stage as the worker would, in this process, from the newest checkpoint in `folder` if there is one.

    Returns its result, and the folder of the artifact. Asked to stop after a step, it raises `Preempted` after the next.
    """
    checkpoints = Checkpoints(folder / "checkpoints")
    context = Context(
        inputs=inputs,
        out=folder / "out",
        work=folder,
        resume=checkpoints.newest().path,
        checkpoints=checkpoints,
        seed=5,
        resources=Resources(device="cpu", threads=1, log_every_steps=1),
        journal=Journal(folder / "journal.jsonl", writes=True),
        world=World(),
        stop_requested=lambda: stop_after_step is not None and len(losses(folder)) >= stop_after_step,
    )
    context.out.mkdir(parents=True, exist_ok=True)
    return stage.run(context, stage.params(**params)), context.out


def losses(folder: Path) -> list[float]:
    """The training losses, step by step, in the journal of a run in `folder`."""
    return [event["loss"] for event in Journal(folder / "journal.jsonl", writes=False).events("step")]


def require_exact_resume(stage: Stage, inputs: dict[str, Path], params: dict[str, Any], folder: Path) -> None:
    """Asserts that a run stopped in the middle and taken up again ends with the files and metrics of one never stopped.

    With a learning rate that changes at every step. The caller gives few enough rows to pass over them twice.
    """
    params = {**params, "global_batch_size": 8, "max_steps": 8, "warmup_steps": 2, "learning_rate": 1e-3}
    result, out = run_task(stage, inputs, params, folder / "whole")
    with pytest.raises(Preempted):
        run_task(stage, inputs, params, folder / "stopped", stop_after_step=4)
    assert Checkpoints(folder / "stopped" / "checkpoints").steps() == [4]
    resumed, resumed_out = run_task(stage, inputs, params, folder / "stopped")
    assert losses(folder / "stopped") == losses(folder / "whole")
    assert resumed == result
    assert list_files(resumed_out) == list_files(out)
