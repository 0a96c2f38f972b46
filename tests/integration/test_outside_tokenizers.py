"""Folders of other makers through the stages that carry a tokenizer on: it is one tokenizer, whatever lies beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from pipeline.errors import ArtifactError
from stages import STAGES
from stages.lib.models.embeddings import keep_tokenizer
from stages.lib.rows.canonical import write_rows
from stages.lib.text.packed import PackedTokens
from stages.lib.text.sentencepiece_models import from_sentencepiece
from stages.lib.text.tokenizers import copy_tokenizer, encode_texts, load_tokenizer, same_rules, tokenizer_digest
from tests import rows
from tests.families import FAMILIES, UNIGRAM, of_unigram, pieces, write_base_model, write_json, write_tokenizer
from tests.integration.tiny_language_model import run_stage, write_chats

pytestmark = pytest.mark.slow

TEXTS = (" A  cat,\n\tx == 10", "the cat", "", "   ", "\u4f60\u597d \U0001f600", " x")
TRAINING = {"global_batch_size": 4, "max_steps": 2, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    texts = [{"text": text} for text in rows.texts(60)]
    write_rows(folder / "heldout.jsonl", texts[:20])
    write_rows(folder / "train.jsonl", texts[20:])
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_tokenizer_in_every_stage(tmp_path: Path, text: Path, family: str) -> None:
    """pack, pretrain, distill, quantize and evaluate take the folder, and what they publish opens as it does."""
    model = write_base_model(tmp_path / "model", family)
    tokenizer = load_tokenizer(model)

    def made(kind: str, inputs: dict[str, Path], **params: Any) -> Path:
        _, context = run_stage(STAGES[kind], inputs, params, tmp_path / kind)
        return context.out

    tokens = made("pack", {"text": text, "tokenizer": model}, sequence_length=64)
    document = PackedTokens(tokens, "heldout").block(0).input_ids[:8].tolist()
    expected = [tokenizer.bos_token_id, *encode_texts(tokenizer, [rows.texts(60)[0]])[0]]
    assert document == expected[:8]
    # OPT has positions of its own, which no document border begins anew.
    training = {**TRAINING, "isolate_documents": family != "opt"}
    trained = made("pretrain", {"tokens": tokens, "model": model}, **training)
    student = made("distill", {"teacher": model, "student": model, "tokens": tokens}, **training)
    folders = [tokens / "tokenizer", trained, student]
    if FAMILIES[family][0] not in ("gpt2", "mixtral"):
        inputs = {"model": model, "calibration": tokens}
        folders.append(made("quantize", inputs, method="round_to_nearest", bits=8, group_size=None, heldout_rows=2))
    for folder in folders:
        assert tokenizer_digest(load_tokenizer(folder)) == tokenizer_digest(tokenizer)
        served = AutoTokenizer.from_pretrained(folder)
        for said in TEXTS:
            assert encode_texts(served, [said]) == encode_texts(tokenizer, [said])
    made("evaluate", {"models.m": trained, "models.base": model, "tokens": tokens}, heldout_blocks=2)


@pytest.mark.parametrize("beside", [None, "llama", "mistral"])
@pytest.mark.parametrize("family", UNIGRAM)
def test_unigram_behind_metaspace_is_one_tokenizer_too(
    tmp_path: Path, text: Path, family: str, beside: str | None
) -> None:
    model_type, names, last, said = UNIGRAM[family]
    source, copy = tmp_path / "source", tmp_path / "copy"
    for folder in (source, copy):
        folder.mkdir()
    written = of_unigram(names, last)
    written.save(str(source / "tokenizer.json"))
    write_json(source / "tokenizer_config.json", said)
    write_json(source / "config.json", {"model_type": model_type})
    if beside:
        write_json(copy / "config.json", {"model_type": beside})
    copy_tokenizer(source, copy)
    expected = [written.encode(each, add_special_tokens=False).ids for each in TEXTS]
    for opened in (load_tokenizer(source), load_tokenizer(copy), AutoTokenizer.from_pretrained(copy)):
        assert encode_texts(opened, list(TEXTS)) == expected
    params = {"sequence_length": 64, "add_bos": family == "xlm-r"}
    _, context = run_stage(STAGES["pack"], {"text": text, "tokenizer": source}, params, tmp_path / "pack")
    assert tokenizer_digest(load_tokenizer(context.out)) == tokenizer_digest(load_tokenizer(source))
    learned = load_tokenizer(source)
    learned.add_tokens(["<|end|>"], special_tokens=True)
    keep_tokenizer(learned, tmp_path / "kept")
    kept = load_tokenizer(tmp_path / "kept")
    assert same_rules(kept, learned) and not same_rules(kept, load_tokenizer(source))


@pytest.mark.parametrize("beside", [None, "llama", "mistral", "gpt2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_opens_alike_beside_any_config(tmp_path: Path, family: str, beside: str | None) -> None:
    """In our hands and in those of whoever uses transformers; special tokens within a text included."""
    write_tokenizer(tmp_path / "source", family)
    write_json(tmp_path / "source" / "config.json", {"model_type": FAMILIES[family][0]})
    (tmp_path / "copy").mkdir()
    if beside:
        write_json(tmp_path / "copy" / "config.json", {"model_type": beside})
    copy_tokenizer(tmp_path / "source", tmp_path / "copy")
    source, copy = load_tokenizer(tmp_path / "source"), AutoTokenizer.from_pretrained(tmp_path / "copy")
    for said in (*TEXTS, f" a{source.eos_token} b {source.eos_token}c"):
        assert copy(said)["input_ids"] == source(said)["input_ids"]
    assert copy.special_tokens_map == source.special_tokens_map
    assert load_tokenizer(tmp_path / "copy").decode(source("a b")["input_ids"]) == source.decode(
        source("a b")["input_ids"]
    )


@pytest.mark.parametrize("kind", ["llama-2", "gemma", "t5", "albert"])
def test_a_sentencepiece_model_alone_is_read_as_sentencepiece_does(tmp_path: Path, text: Path, kind: str) -> None:
    """Also texts that no check of the conversion saw. What is copied has a tokenizer.json, which others open."""
    from sentencepiece import SentencePieceProcessor

    (tmp_path / "tokenizer.model").write_bytes(pieces(kind))
    processor = SentencePieceProcessor(model_proto=pieces(kind))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")
    for said in (*TEXTS, *rows.texts(60)):
        assert encode_texts(tokenizer, [said]) == [processor.encode(said)]
    write_json(tmp_path / "tokenizer_config.json", {"eos_token": "<unk>", "chat_template": "{{ messages }}"})
    assert load_tokenizer(tmp_path).eos_token == "<unk>"
    copy_tokenizer(tmp_path, tmp_path / "copy")
    served = AutoTokenizer.from_pretrained(tmp_path / "copy")
    assert (served.eos_token, served.chat_template) == ("<unk>", "{{ messages }}")
    assert encode_texts(served, list(TEXTS)) == [processor.encode(said) for said in TEXTS]
    _, context = run_stage(
        STAGES["pack"], {"text": text, "tokenizer": tmp_path}, {"sequence_length": 64}, tmp_path / "pack"
    )
    assert len(PackedTokens(context.out))


def test_a_base_model_with_a_sentencepiece_model_alone_learns_chats(tmp_path: Path) -> None:
    model = write_base_model(tmp_path / "model", "llama-2")
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.model").write_bytes(pieces("llama-2"))
    params = {"max_length_tokens": 200, "chat_template": "chatml", "add_tokens": True, **TRAINING}
    inputs = {"model": model, "chats": write_chats(tmp_path / "chats")}
    result, context = run_stage(STAGES["sft"], inputs, params, tmp_path / "sft")
    assert result.facts.added_tokens == ["<|im_start|>", "<|im_end|>"]
    served = AutoTokenizer.from_pretrained(context.out)
    assert tokenizer_digest(served) == tokenizer_digest(load_tokenizer(context.out)) == result.facts.tokenizer_digest
    assert encode_texts(served, list(TEXTS)) == encode_texts(load_tokenizer(model), list(TEXTS))


def test_what_is_no_sentencepiece_model_is_refused(tmp_path: Path) -> None:
    """Llama-3's original folder calls its ranks of byte pairs so."""
    for content in (b"IQ== 0\nIg== 1\n", b"", b"\x0a\xff\xff"):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(ArtifactError, match=r"tokenizer\.model: is no model of sentencepiece"):
            from_sentencepiece(tmp_path / "tokenizer.model")
