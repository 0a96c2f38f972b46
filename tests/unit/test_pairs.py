"""Pairs of texts: both count wherever rows are compared, and a model sees them as the tokenizers library frames and cuts them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import BertProcessing, RobertaProcessing, TemplateProcessing
from transformers import PreTrainedTokenizerFast

from pipeline.errors import DataError
from stages.data.clean import STAGE as CLEAN
from stages.data.mix import STAGE as MIX
from stages.lib.curation.normalization import Normalization, normalize_row
from stages.lib.encoding.classification import are_pairs, encode_row_of_texts
from stages.lib.rows.canonical import FORMATS, content_digest, format_of_row, judged_text
from stages.lib.text.frames import frame_as_it_is, frame_of, kept_of_pair, require_frame
from tests.unit.running_stages import run_stage

LABELS = FORMATS["labels"]
WORDS = "a b c d e f g h i j k l m n o p".split()


def pair(text: str, text_pair: str, label: str | None = "x") -> dict[str, Any]:
    return {"text": text, "text_pair": text_pair, "label": label}


def test_both_texts_are_what_a_pair_says() -> None:
    row = pair("a", "b")
    assert format_of_row(row) == "labels"
    assert judged_text(row, "labels") == "a\n\nb"
    assert LABELS.parts(row) == ["a", "b"]
    digests = {
        content_digest(each, "labels") for each in (row, pair("a", "c"), pair("b", "a"), {"text": "a", "label": "x"})
    }
    assert len(digests) == 4


def test_a_pair_and_its_reverse_stay_on_one_side() -> None:
    """And what a single text shares is the text, as it was before there were pairs."""
    keys = [LABELS.split_key(each, "content") for each in (pair("a", "b"), pair("b", "a"), pair("a", "c"))]
    assert keys[0] == keys[1] != keys[2]
    assert LABELS.split_key({"text": "a", "label": "x"}, "content") == "a"
    assert LABELS.content({"text": "a", "label": "x"}) == '["a","x"]'


def test_both_texts_are_normalized() -> None:
    row = pair("a \r\n", "cafe\u0301 ")
    assert normalize_row(row, "labels", Normalization()) == pair("a", "caf\u00e9")


def clean(folder: Path, rows: list[dict[str, Any]], **params: Any) -> Any:
    folder.mkdir(parents=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = {
        "kind": "files",
        "paths": ["rows.jsonl"],
        "layout": "label",
        "columns": {"text": "s1", "text_pair": "s2"},
        "max_broken_fraction": 1.0,
    }
    return run_stage(CLEAN, {"format": "labels", "source": source, **params}, folder)


def test_cleaning_looks_at_both_texts(tmp_path: Path) -> None:
    """Near-duplicates are alike in each text: the same long premise with another hypothesis is another row."""
    premise = "the old man walks slowly down the long road to the market in the rain"
    rows = [
        {"s1": premise, "s2": "a man is outside in the rain today and walks", "label": "yes"},
        {"s1": premise, "s2": "nobody has ever been seen on any road here", "label": "no"},
        {"s1": premise, "s2": "a man is outside in the rain today and walks .", "label": "yes"},
        {"s1": "fine", "s2": "much too long " * 30, "label": "no"},
        {"s1": "fine", "label": "no"},
    ]
    ran = clean(tmp_path / "a", rows, minhash={"similarity": 0.6}, filters={"max_characters": 200})
    assert [row["text_pair"] for row in ran.rows()] == [rows[0]["s2"], rows[1]["s2"]]
    dropped = {name: entry["count"] for name, entry in ran.json("ledger.json")["dropped"].items()}
    assert dropped == {"missing_field": 1, "near_duplicate": 1, "too_long": 1}


def test_a_reversed_pair_is_not_trained_on_when_it_is_held_out(tmp_path: Path) -> None:
    rows = [pair(f"text {number}", f"other {number}") for number in range(200)]
    rows += [pair(row["text_pair"], row["text"]) for row in rows]
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    ran = run_stage(MIX, {"heldout_fraction": 0.2}, tmp_path / "mix", inputs={"sources.a": folder})
    sides = [
        {frozenset((row["text"], row["text_pair"])) for row in ran.rows(f"{side}.jsonl")}
        for side in ("train", "heldout")
    ]
    assert sides[0] and sides[1] and not sides[0] & sides[1]
    assert sum(map(len, sides)) == 200


def test_pairs_and_single_texts_do_not_mix() -> None:
    assert are_pairs([pair("a", "b")] * 2, "rows") is True
    assert are_pairs([{"text": "a", "label": "x"}], "rows") is False
    with pytest.raises(DataError, match="rows: 2 rows are pairs of texts, and 1 are single texts"):
        are_pairs([pair("a", "b"), {"text": "a", "label": "x"}, pair("c", "d")], "rows")


# What the model sees


def word_tokenizer(post_processor: Any, names: list[str] | None = None) -> PreTrainedTokenizerFast:
    core = Tokenizer(
        models.WordLevel(
            {name: n for n, name in enumerate(["<pad>", "<unk>", "<s>", "</s>", *WORDS])}, unk_token="<unk>"
        )
    )
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = post_processor
    inputs = names or ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        pad_token="<pad>",
        cls_token="<s>",
        sep_token="</s>",
        model_input_names=inputs,
    )


SPECIAL = [("<s>", 2), ("</s>", 3)]
FUNNEL = TemplateProcessing(single="<s>:2 $A:0 </s>:0", pair="<s>:2 $A:0 </s>:0 $B:1 </s>:1", special_tokens=SPECIAL)
FRAMES = {
    "bert": BertProcessing(("</s>", 3), ("<s>", 2)),
    "roberta": RobertaProcessing(("</s>", 3), ("<s>", 2)),
    "funnel": FUNNEL,
}


@pytest.mark.parametrize("kind", FRAMES)
def test_a_pair_is_framed_typed_and_cut_as_the_tokenizer_does_it(kind: str) -> None:
    """For every two lengths up to 9, in every room from 8 tokens on: ids and types of `truncation=True`."""
    tokenizer = word_tokenizer(FRAMES[kind])
    frame = require_frame(tokenizer, pair=True)
    assert len(frame.between) == (2 if kind == "roberta" else 1)
    cut = 0
    for first in range(1, 10):
        for second in range(1, 10):
            row = pair(" ".join(WORDS[:first]), " ".join(WORDS[-second:]))
            for length in range(8, 24):
                wanted = tokenizer(row["text"], row["text_pair"], truncation=True, max_length=length)
                encoded = encode_row_of_texts(row, tokenizer, frame, length)
                assert encoded.ids == wanted["input_ids"]
                assert encoded.type_ids == wanted["token_type_ids"]
                assert encoded.is_cut == (first + second + len(frame) > length)
                cut += encoded.is_cut
    assert cut > 200


@pytest.mark.parametrize("kind", FRAMES)
def test_a_single_text_is_framed_typed_and_cut_as_the_tokenizer_does_it(kind: str) -> None:
    tokenizer = word_tokenizer(FRAMES[kind])
    frame = require_frame(tokenizer, pair=False)
    for length in (8, 12, 20):
        wanted = tokenizer(" ".join(WORDS), truncation=True, max_length=length)
        encoded = encode_row_of_texts({"text": " ".join(WORDS)}, tokenizer, frame, length)
        assert (encoded.ids, encoded.type_ids) == (wanted["input_ids"], wanted["token_type_ids"])
        assert encoded.num_tokens == 16


def test_the_longer_text_loses_its_end_first() -> None:
    """10 and 3 in a room of 8: 5 and 3. Both longer than half of 9: 4 and 5, as the library has it."""
    assert kept_of_pair(10, 3, 8) == (5, 3)
    assert kept_of_pair(3, 10, 8) == (3, 5)
    assert kept_of_pair(10, 9, 9) == (5, 4)
    assert kept_of_pair(9, 10, 9) == (4, 5)
    assert kept_of_pair(2, 3, 9) == (2, 3)


def test_what_a_published_tokenizer_does_not_put_there_is_not_put_there() -> None:
    bare = word_tokenizer(TemplateProcessing(single="$A", pair="$A $B:1", special_tokens=[]))
    assert frame_of(bare, pair=True) is None
    frame = frame_as_it_is(bare, pair=True)
    assert (frame.before, frame.between, frame.after) == ([], [], [])
    assert frame.type_ids(2, 1) == [0, 0, 1]
