"""Tokenizers on disk and in use: opening, copying, comparing them, what consumers check, and text as ids."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ArtifactError, Problem
from pipeline.store.artifact import canonical_json, digest_bytes
from pipeline.store.numbers import json_text
from stages.lib.text.chat_check import end_of_turn_ids
from stages.lib.text.opening import PROBE, as_written, open_by_name, plain_probe, read_tokenizer_config
from stages.lib.text.sentencepiece_models import from_sentencepiece, sentencepiece_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
    "sentencepiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
    "spiece.model",
    "spm.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
"""What belongs to the tokenizer in a model's folder."""


SENTENCEPIECE_FILES = ("tokenizer.model", "sentencepiece.model", "sentencepiece.bpe.model", "spiece.model", "spm.model")
"""Under these names the sentencepiece model lies that a fast tokenizer was made from. Converters (llama.cpp's, say) read it."""


SET_BY_CALLERS = ("truncation", "padding", "post_processor")
"""Parts of a tokenizer.json that do not change which ids a text has: limits, padding, and special tokens put around."""


def tokenizer_folder(folder: Path) -> Path:
    """Where the tokenizer of an artifact lies: packed tokens keep it in a folder of its own."""
    return folder / "tokenizer" if (folder / "tokenizer" / "tokenizer.json").exists() else folder


def load_tokenizer(folder: Path, *, embedded: bool = True) -> PreTrainedTokenizerBase:
    """The fast tokenizer of the artifact or model in `folder`, without code from the folder and without network.

    It is that of its tokenizer.json, whatever lies beside it. Raises `ArtifactError` if there is none, if it would not be
    the one that its files describe (for some kinds of model transformers puts another class in its place, and an empty
    vocabulary is opened without a word), or, if it must be `embedded`, if a model beside it does not embed all its tokens.
    """
    home = tokenizer_folder(folder)
    written = (home / "tokenizer.json").exists()
    pieces = None if written or has_vocabulary(home) else sentencepiece_model(home)
    tokenizer = from_sentencepiece(pieces) if pieces else open_by_name(home)
    if not tokenizer.is_fast:
        raise ArtifactError(
            Problem(
                str(home), "holds no fast tokenizer, which alone gives the offsets of tokens", "Add a tokenizer.json."
            )
        )
    if not plain_probe(tokenizer, PROBE):
        raise ArtifactError(
            Problem(
                str(home), "holds a tokenizer with an empty vocabulary", "Add the tokenizer.json that belongs to it."
            )
        )
    if written:
        tokenizer = as_written(home, tokenizer)
    if embedded:
        require_embedded(home, len(tokenizer))
    return tokenizer


def has_vocabulary(home: Path) -> bool:
    """Whether its tokens stand in files of their own, as those of BERT and GPT-2 do."""
    return any((home / name).exists() for name in ("vocab.json", "vocab.txt"))


def require_embedded(folder: Path, num_tokens: int) -> None:
    """Raises `ArtifactError` if a model lies beside the tokenizer and has no embedding for each of its tokens."""
    path = folder / "config.json"
    config = json.loads(path.read_bytes()) if path.exists() else {}
    rows = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    if isinstance(rows, int) and num_tokens > rows:
        what = f"its tokenizer has {num_tokens} tokens, and the model embeds {rows}"
        hint = (
            "Use the tokenizer that the model was trained with, save the model after `resize_token_embeddings`, "
            "or give it to sft with `add_tokens: true`."
        )
        raise ArtifactError(Problem(str(folder), what, hint))


def copy_tokenizer(source: Path, target: Path) -> dict[str, Any]:
    """Puts the tokenizer of the artifact or model in `source` into `target`, file by file; returns `tokenizer_facts`.

    What `target` had of another tokenizer is removed. Where transformers would open the files as another one beside what
    else lies in `target` (another model's config.json, or none), they are written such that it does not: a tokenizer is
    one, wherever it lies. Raises `ArtifactError` if that cannot be.
    """
    home = tokenizer_folder(source)
    tokenizer = load_tokenizer(source)
    target.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        old, new = target / name, home / name
        if old.is_dir():
            shutil.rmtree(old)
        else:
            old.unlink(missing_ok=True)
        if new.is_dir():
            shutil.copytree(new, old)
        elif new.exists():
            shutil.copyfile(new, old)
    if not (target / "tokenizer.json").exists() or not opens_alike(tokenizer, target):
        tokenizer.save_pretrained(target)
    require_same_tokenizer(source, target, str(target))
    return tokenizer_facts(target)


def opens_alike(tokenizer: PreTrainedTokenizerBase, folder: Path) -> bool:
    """Whether transformers by itself opens the files in `folder` as this tokenizer."""
    opened = open_by_name(folder)
    return same_rules(opened, tokenizer) and opened.special_tokens_map == tokenizer.special_tokens_map


def same_rules(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers split texts alike: by the same rules and pieces, with scores to six digits, of which the last
    change when a unigram model is written and read again.
    """
    states = [json.loads(each.backend_tokenizer.to_str()) for each in (one, other)]
    for state in states:
        for name in SET_BY_CALLERS:
            state.pop(name, None)
        if isinstance(vocabulary := state["model"]["vocab"], list):
            state["model"]["vocab"] = [[piece, f"{score:.6g}"] for piece, score in vocabulary]
    return bool(states[0] == states[1])


def copy_left_out(tokenizer: PreTrainedTokenizerBase, target: Path) -> None:
    """Puts beside `tokenizer`, saved to `target`, what saving left out of the folder that it was loaded from: the
    sentencepiece model, and that no bos or eos is added (if that still holds), which converters would otherwise assume.

    Tokens that the sentencepiece model lacks are listed in added_tokens.json, where converters look for them.
    """
    home = tokenizer_folder(Path(tokenizer.name_or_path))
    before, around = read_tokenizer_config(home), [post_processor(folder) for folder in (home, target)]
    if around[0] == around[1]:
        say_in_config(target, {name: before[name] for name in ADDS if name in before})
    names = [name for name in SENTENCEPIECE_FILES if (home / name).is_file() and not (target / name).exists()]
    for name in names:
        shutil.copyfile(home / name, target / name)
    if names and not (target / "added_tokens.json").exists() and (target / "tokenizer.json").exists():
        from sentencepiece import SentencePieceProcessor

        known = SentencePieceProcessor(model_file=str(target / names[0])).vocab_size()
        added = json.loads((target / "tokenizer.json").read_bytes()).get("added_tokens") or []
        if beyond := {token["content"]: token["id"] for token in added if token["id"] >= known}:
            write_object(target / "added_tokens.json", beyond)


def post_processor(folder: Path) -> Any:
    """What tokenizer.json says is put around texts."""
    path = folder / "tokenizer.json"
    return json.loads(path.read_bytes()).get("post_processor") if path.exists() else None


ADDS = ("add_bos_token", "add_eos_token")


def say_in_config(folder: Path, said: Mapping[str, Any]) -> None:
    """Writes fields into tokenizer_config.json that do not stand there: transformers leaves out what it takes for granted."""
    config = read_tokenizer_config(folder)
    if config and said.keys() - config.keys():
        write_object(folder / "tokenizer_config.json", {**said, **config})


def write_object(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json_text(value, path.name, indent=2) + "\n", encoding="utf-8")


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what makes ids of text: tokenizer.json as the library holds it, without `SET_BY_CALLERS`."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    return digest_bytes(canonical_json({key: value for key, value in state.items() if key not in SET_BY_CALLERS}))


def chat_template_digest(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """SHA-256 of the template's text (of all of them, where there are several), or None."""
    template = tokenizer.chat_template
    if not template:
        return None
    return digest_bytes(template.encode() if isinstance(template, str) else canonical_json(template))


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids at which generation ends: end of text first, then the end of an assistant's turn."""
    ids = (tokenizer.eos_token_id, *end_of_turn_ids(tokenizer))
    return list(dict.fromkeys(each for each in ids if each is not None))


def facts_of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The fields of `pipeline.store.artifact.Facts` that a tokenizer decides; a stage adds its own."""
    return {
        "tokenizer_digest": tokenizer_digest(tokenizer),
        "chat_template_digest": chat_template_digest(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "stop_token_ids": stop_token_ids(tokenizer),
        "vocabulary_size": len(tokenizer),
    }


def tokenizer_facts(folder: Path) -> dict[str, Any]:
    """`facts_of_tokenizer` for the tokenizer of an artifact or model: `Facts(**tokenizer_facts(out), ...)`."""
    return facts_of_tokenizer(load_tokenizer(folder))


def require_same_tokenizer(one: Path, other: Path, where: str) -> None:
    """Raises `ArtifactError` unless both folders' tokenizers give the same ids for every text."""
    opened = [load_tokenizer(folder) for folder in (one, other)]
    digests = [tokenizer_digest(each) for each in opened]
    if digests[0] != digests[1] and not same_rules(*opened):
        raise ArtifactError(
            Problem(
                where,
                f"the tokenizer of {one} ({digests[0][:8]}) is not the one of {other} ({digests[1][:8]}), "
                "so their token ids mean different things",
                "Make both from the same tokenizer.",
            )
        )


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text, nothing added, and nothing special: a text that spells `</s>` does not end there."""
    if not texts:
        return []
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def decode_ids(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of the ids, special tokens included, with no space added or taken away."""
    text = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text
