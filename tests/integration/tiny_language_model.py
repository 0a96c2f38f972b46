"""A tiny language model trained for a few seconds on the project's own rows, the artifacts around it, and a way to run a stage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.settings.resources import Resources
from pipeline.stage import Context, Result, Stage, World
from pipeline.store.checkpoints import Checkpoints
from pipeline.store.journal import Journal
from tests import rows

SEQUENCE_LENGTH = 64
HELDOUT_BLOCKS = 40


@dataclass(frozen=True)
class TinyWorld:
    """Folders of artifacts: a trained model, its packed tokens, chats and preferences."""

    model: Path
    tokens: Path
    chats: Path
    preferences: Path
    texts: list[str]


def make_world(folder: Path, *, steps: int = 80, hidden: int = 64, tied: bool = False) -> TinyWorld:
    """A Llama of two layers, trained on help pages of programs that do not exist."""
    texts = rows.texts(600)
    tokenizer = make_tokenizer(texts, vocabulary_size=1024)
    tokens = write_tokens(folder / "tokens", tokenizer, texts)
    model = train_model(folder / "model", tokenizer, tokens, steps=steps, hidden=hidden, tied=tied)
    return TinyWorld(model, tokens, write_chats(folder / "chats"), write_preferences(folder / "preferences"), texts)


def make_tokenizer(texts: Iterable[str], vocabulary_size: int) -> Any:
    """A byte-level BPE tokenizer with the chat template of the house."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from stages.lib.text.chat_presets import PRESETS

    preset = PRESETS["slipway"]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>", *preset.special_tokens]
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary_size,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = preset.template
    return tokenizer


def write_tokens(folder: Path, tokenizer: Any, texts: list[str]) -> Path:
    """The texts packed, each with bos and eos; the first ones are held out."""
    from stages.lib.text.packed import TokensInfo, TokensWriter, dtype_for
    from stages.lib.text.tokenizers import encode_texts, tokenizer_digest

    folder.mkdir(parents=True)
    documents = [[tokenizer.bos_token_id, *ids, tokenizer.eos_token_id] for ids in encode_texts(tokenizer, texts)]
    heldout = 0
    while sum(map(len, documents[:heldout])) < HELDOUT_BLOCKS * SEQUENCE_LENGTH:
        heldout += 1
    counts: dict[str, Any] = {}
    for split, part in (("train", documents[heldout:]), ("heldout", documents[:heldout])):
        with TokensWriter(folder, split, len(tokenizer)) as writer:  # type: ignore[arg-type]
            for ids in part:
                writer.add(ids)
        counts |= {f"{split}_tokens": writer.tokens, f"{split}_documents": writer.documents}
    info = TokensInfo(
        dtype=dtype_for(len(tokenizer)),
        sequence_length=SEQUENCE_LENGTH,
        vocabulary_size=len(tokenizer),
        tokenizer_digest=tokenizer_digest(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **counts,
    )
    (folder / "tokens.json").write_text(info.model_dump_json())
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


def train_model(folder: Path, tokenizer: Any, tokens: Path, *, steps: int, hidden: int, tied: bool) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from stages.lib.text.packed import PackedTokens

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 5 // 2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    packed = PackedTokens(tokens, "train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        chosen = torch.randint(len(packed), (16,), generator=generator).tolist()
        ids = torch.stack([torch.from_numpy(packed.block(index).input_ids) for index in chosen])
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")]
    model.generation_config.eos_token_id = stops
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_split(folder: Path, split: list[dict[str, Any]], heldout: int) -> Path:
    from stages.lib.rows.canonical import write_rows

    folder.mkdir(parents=True)
    write_rows(folder / "heldout.jsonl", split[:heldout])
    write_rows(folder / "train.jsonl", split[heldout:])
    return folder


def write_chats(folder: Path) -> Path:
    chats = [{"messages": [*asked(row), said(row["output"])]} for row in rows.exchanges(200)]
    return write_split(folder, chats, heldout=40)


def write_preferences(folder: Path) -> Path:
    return write_split(folder, [as_pair(row) for row in rows.preferences(80)], heldout=30)


def as_pair(row: Mapping[str, str]) -> dict[str, Any]:
    return {"prompt": asked(row), "chosen": [said(row["chosen"])], "rejected": [said(row["rejected"])]}


def asked(row: Mapping[str, str]) -> list[dict[str, str]]:
    content = f"{row['instruction']}\n{row['input']}" if row.get("input") else row["instruction"]
    return [{"role": "user", "content": content}]


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def run_stage(
    stage: Stage, inputs: Mapping[str, Path], params: Mapping[str, Any], folder: Path, *, seed: int = 0
) -> tuple[Result, Context]:
    """Runs the stage as the worker would, in this process; the artifact's files lie in the context's `out`."""
    context = Context(
        inputs=inputs,
        out=folder / "out",
        work=folder,
        resume=None,
        checkpoints=Checkpoints(folder / "checkpoints"),
        seed=seed,
        resources=Resources(device="cpu", threads=1),
        journal=Journal(folder / "journal.jsonl", writes=True),
        world=World(),
        stop_requested=lambda: False,
    )
    context.out.mkdir(parents=True)
    return stage.run(context, stage.params(**params)), context
