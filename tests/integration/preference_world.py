"""A tiny chat model, preference pairs, and a way to run a stage in this process or in several."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.settings.resources import Resources
from pipeline.stage import Context, Result, Stage, World
from pipeline.store.checkpoints import Checkpoints
from pipeline.store.journal import Journal
from stages.lib.rows.canonical import read_rows, write_rows
from tests import rows
from tests.distributed.training_world import Job, run_forked
from tests.integration.tiny_language_model import as_pair, make_tokenizer, said, write_split


@dataclass(frozen=True)
class PreferenceWorld:
    """Folders: a model that has learned nothing yet, and preferences of which two training pairs are of no use."""

    model: Path
    preferences: Path
    tokenizer: Any


def make_preference_world(folder: Path, *, num_pairs: int = 120, heldout: int = 40) -> PreferenceWorld:
    """A Llama of two layers with attention dropout, and polite and rude answers to the same questions."""
    answered = rows.preferences(num_pairs)
    tokenizer = make_tokenizer([row["output"] for row in answered], vocabulary_size=600)
    pairs = [{**as_pair(row), "source": "short" if len(row["chosen"]) < 80 else "long"} for row in answered]
    same = {**pairs[-1], "rejected": pairs[-1]["chosen"]}
    too_long = {**pairs[-2], "chosen": [said(pairs[-2]["chosen"][0]["content"] * 40)]}
    preferences = write_split(folder / "preferences", [*pairs, same, too_long], heldout=heldout)
    return PreferenceWorld(make_model(folder / "model", tokenizer), preferences, tokenizer)


def unpaired_of(preferences: Path, folder: Path, label: Callable[[int], bool] = lambda number: number % 3 > 0) -> Path:
    """Single answers made of pairs: of row k the chosen one if `label(k)`, else the rejected one."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "heldout"):
        rows = []
        for number, row in enumerate(read_rows(preferences / f"{split}.jsonl")):
            kept = {name: value for name, value in row.items() if name not in ("chosen", "rejected")}
            desirable = label(number)
            rows.append({**kept, "completion": row["chosen" if desirable else "rejected"], "label": desirable})
        write_rows(folder / f"{split}.jsonl", rows)
    return folder


def make_model(folder: Path, tokenizer: Any, *, hidden: int = 48, seed: int = 0, **config: Any) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    options = {
        "hidden_size": hidden,
        "intermediate_size": hidden * 2,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "attention_dropout": 0.1,
        "tie_word_embeddings": True,
    }
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **{**options, **ids, **config})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tokenized(rows: Iterable[dict[str, Any]], tokenizer: Any, folder: Path, max_length_tokens: int = 512) -> Any:
    """The rows as `Pairs`, kept in `folder`."""
    from stages.lib.preferring.pairs import Pairs, tokenizing_pairs
    from stages.lib.text.tokenized_parts import TokenizedPart, TokenizedRows

    how = tokenizing_pairs(tokenizer, max_length_tokens)
    part = TokenizedPart()
    for index, row in enumerate(rows):
        part.add(index, how.make(row))
    part.write(folder)
    return Pairs(TokenizedRows([folder]))


def run(
    stage: Stage,
    inputs: Mapping[str, Path],
    params: Mapping[str, Any],
    folder: Path,
    *,
    resources: Mapping[str, Any] | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
    seed: int = 0,
) -> tuple[Result, Context]:
    """Runs the stage in `folder`, from the newest checkpoint in it if there is one."""
    checkpoints = Checkpoints(folder / "checkpoints")
    context = Context(
        inputs=inputs,
        out=folder / "out",
        work=folder,
        resume=checkpoints.newest().path,
        checkpoints=checkpoints,
        seed=seed,
        resources=Resources(**{"device": "cpu", "threads": 1, "log_every_steps": 1, **(resources or {})}),
        journal=Journal(folder / "journal.jsonl", writes=True),
        world=World(),
        stop_requested=stop_requested,
    )
    context.out.mkdir(parents=True, exist_ok=True)
    return stage.run(context, stage.params(**params)), context


MODULES = {
    "distill": "stages.compression.distill",
    "dpo": "stages.alignment.dpo",
    "kto": "stages.alignment.kto",
    "reward": "stages.alignment.reward",
}


def run_in_processes(
    kind: str,
    inputs: Mapping[str, Path],
    params: Mapping[str, Any],
    folder: Path,
    processes: int,
    deepspeed: str | None,
    resources: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Runs the stage in as many processes, as `run` does in this one; returns its metrics, facts and losses of steps."""
    resources = {"deepspeed": deepspeed, "log_every_steps": 1, **(resources or {})}
    job = Job(folder, MODULES[kind], params, inputs, resources, seed=0, processes=processes)
    run_forked(folder, [job])
    return {**job.result(), "losses": job.losses()}


def as_rated(row: dict[str, Any], number: int) -> dict[str, Any]:
    """One answer of a pair, rated: of the chosen one quality 4, else 1; of every fourth, brevity is not rated."""
    side = "chosen" if number % 3 else "rejected"
    kept = {name: value for name, value in row.items() if name not in ("chosen", "rejected")}
    brevity = None if number % 4 == 0 else 3.0 - 2.0 * (len(row[side][0]["content"]) > 80)
    ratings = {"quality": 4 if side == "chosen" else 1, "brevity": brevity, "unread": 7}
    return {**kept, "completion": row[side], "ratings": ratings}


def as_steps(row: dict[str, Any], number: int) -> dict[str, Any]:
    """Both answers of a pair as steps of one, the chosen one right and the rejected one wrong, in either order; of every fifth
    the second is not labelled.
    """
    sides = ["chosen", "rejected"] if number % 2 else ["rejected", "chosen"]
    kept = {name: value for name, value in row.items() if name not in ("chosen", "rejected")}
    labels = [side == "chosen" for side in sides]
    known = [labels[0], None] if number % 5 == 0 else labels
    return {**kept, "steps": [row[side][0] for side in sides], "labels": known}


def remade(preferences: Path, folder: Path, make: Callable[[dict[str, Any], int], dict[str, Any]]) -> Path:
    """Rows of another format made of pairs."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "heldout"):
        rows = read_rows(preferences / f"{split}.jsonl")
        write_rows(folder / f"{split}.jsonl", [make(row, number) for number, row in enumerate(rows)])
    return folder
