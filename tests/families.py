"""Folders as other makers publish them: tokenizers of five kinds, trained here, and tiny models with random weights.

What a kind is known by is kept: Llama-2 and Mistral put a space before every text by a normalizer and name LlamaTokenizer;
Llama-3 is byte level; Gemma spells spaces and adds none; GPT-2 names nothing at all. T5 and ALBERT are unigram.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from stages.lib.text.sentencepiece_models import backend_of, read_specification
from tests import rows

VOCABULARY = 500

SIZES: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
    },
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 256},
    "gpt_neox": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 256,
    },
    "opt": {
        "hidden_size": 16,
        "ffn_dim": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 256,
        "word_embed_proj_dim": 16,
    },
}
SIZES |= dict.fromkeys(("mistral", "gemma"), SIZES["llama"])
SIZES["gemma"] = {**SIZES["gemma"], "head_dim": 8}
SIZES["mixtral"] = {**SIZES["llama"], "num_local_experts": 2, "num_experts_per_tok": 1}
"""Model type -> sizes of a tiny model of it."""


@cache
def pieces(kind: str) -> bytes:
    """A sentencepiece model as that kind of model has it."""
    options: dict[str, dict[str, Any]] = {
        "llama-2": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
        "gemma": {
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "add_dummy_prefix": False,
            "control_symbols": "<pad>,<mask>",
        },
        "t5": {"model_type": "unigram", "byte_fallback": False},
        "albert": {"model_type": "unigram", "normalization_rule_name": "nmt_nfkc_cf"},
    }
    model = io.BytesIO()
    common = {"model_type": "bpe", "byte_fallback": True, "vocab_size": VOCABULARY, "hard_vocab_limit": False}
    SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in rows.texts(150) for line in text.splitlines()]),
        model_writer=model,
        num_threads=1,
        minloglevel=2,
        **{**common, **options[kind]},
    )
    return model.getvalue()


def of_sentencepiece(kind: str) -> Tokenizer:
    """The tokenizer.json that makers write of such a model: with Prepend and Replace as normalizers."""
    backend: Tokenizer = backend_of(SentencePieceProcessor(model_proto=pieces(kind)), read_specification(pieces(kind)))
    return backend


def of_llama_3() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(rows.texts(150), trainer)
    return tokenizer


def of_gemma() -> Tokenizer:
    tokenizer = of_sentencepiece("gemma")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    return tokenizer


def of_unigram(names: list[str], last: list[str]) -> Tokenizer:
    """Unigram behind Metaspace, with special tokens where their makers put them: T5's and XLM-R's are no model of sentencepiece."""
    processor = SentencePieceProcessor(model_proto=pieces("t5"))
    ordinary = [
        (processor.id_to_piece(index), processor.get_score(index))
        for index in range(len(processor))
        if not (processor.is_control(index) or processor.is_unknown(index))
    ]
    scored = [*((name, 0.0) for name in names), *ordinary, *((name, 0.0) for name in last)]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=names.index("<unk>")))
    tokenizer.normalizer = normalizers.Precompiled(read_specification(pieces("t5")).characters)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in (*names, *last)])
    return tokenizer


SENTENCEPIECE_NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
END_OF_TEXT = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}

FAMILIES: dict[str, tuple[str, Callable[[], Tokenizer], dict[str, Any]]] = {
    # The folder on the hub has LlamaTokenizer in its tokenizer_config.json, and normalizers that this class does not have.
    "llama-2": ("llama", lambda: of_sentencepiece("llama-2"), {"tokenizer_class": "LlamaTokenizer", "legacy": False}),
    "mistral": ("mistral", lambda: of_sentencepiece("llama-2"), {"tokenizer_class": "LlamaTokenizer", "legacy": True}),
    "mixtral": ("mixtral", lambda: of_sentencepiece("llama-2"), {"tokenizer_class": "LlamaTokenizer", "legacy": False}),
    "llama-3": ("llama", of_llama_3, {"tokenizer_class": "PreTrainedTokenizerFast", **END_OF_TEXT}),
    "gemma": ("gemma", of_gemma, {"tokenizer_class": "GemmaTokenizer"}),
    "gpt-2": ("gpt2", of_llama_3, {"model_max_length": 256}),
    "pythia": ("gpt_neox", of_llama_3, {"tokenizer_class": "GPTNeoXTokenizerFast", **END_OF_TEXT}),
    "opt": ("opt", of_llama_3, {"tokenizer_class": "GPT2Tokenizer", **END_OF_TEXT}),
}
"""Name -> model type, tokenizer.json, and what tokenizer_config.json says."""


UNIGRAM: dict[str, tuple[str, list[str], list[str], dict[str, Any]]] = {
    "xlm-r": (
        "xlm-roberta",
        ["<s>", "<pad>", "</s>", "<unk>"],
        ["<mask>"],
        {"tokenizer_class": "XLMRobertaTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "mask_token": "<mask>"},
    ),
    "t5": (
        "t5",
        ["<pad>", "</s>", "<unk>"],
        [f"<extra_id_{index}>" for index in reversed(range(100))],
        {"tokenizer_class": "T5TokenizerFast", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
    ),
}
"""Name -> model type, special tokens before and behind the others, and what tokenizer_config.json says."""


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, allow_nan=False), encoding="utf-8")


def write_tokenizer(folder: Path, family: str, **config: Any) -> int:
    """The tokenizer of the family's folders; returns the number of its tokens."""
    _, make, said = FAMILIES[family]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make()
    tokenizer.save(str(folder / "tokenizer.json"))
    byte_level = make is of_llama_3
    write_json(folder / "tokenizer_config.json", {**({} if byte_level else SENTENCEPIECE_NAMES), **said, **config})
    return int(tokenizer.get_vocab_size())


def write_base_model(folder: Path, family: str, *, rows: int | None = None, **fields: Any) -> Path:
    """A base model of the family with its tokenizer, and embeddings for `rows` tokens (None: as many as there are)."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type = FAMILIES[family][0]
    size = write_tokenizer(folder, family)
    ids = {"bos_token_id": 0, "eos_token_id": 0} if FAMILIES[family][1] is of_llama_3 else {}
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type, **{**SIZES[model_type], **ids, "pad_token_id": None, **fields}, vocab_size=rows or size
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder
