"""`slipway inspect` on published files and on the cases beside them: it proposes the right source unaided, and counts every row.

What is right was written down by reading each file and what its folder's README or recipe says of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stages.data.clean import STAGE as CLEAN
from stages.lib.inspecting.data import Asked, inspect_data
from stages.lib.sources.layouts import LAYOUTS
from tests.unit.running_stages import run_stage

LARGE_BYTES = 150_000
"""Of larger files (as they lie there) only the first rows are counted."""
ROWS_OF_LARGE_FILES = 200
SMALL_BYTES = 10_000
"""Smaller files are given to `clean` as well, as it was proposed."""

CHAT = {"layout": "messages"}
TEXT = {"layout": "text"}
ALPACA = {"layout": "alpaca"}
LABEL = {"layout": "label"}
SQUAD = {"layout": "squad"}
PAIRS = {"layout": "preference_chat"}
BIO = {"layout": "bio"}
WEIBO = {"layout": "bio", "strip_segment_digit": True, "token_separator": ""}
SNIPS = {"layout": "pieces", "columns": {"pieces": "data"}}
TASKMASTER = {
    "layout": "rated_chat",
    "turns_in_text": "json",
    "columns": {"messages": "context", "answer": "generation", "label": "reward", "group": "conversation_id"},
}
GSM8K = {"layout": "alpaca", "columns": {"instruction": "question", "output": "answer"}}
PROMPTS = {"layout": "prompts", "carry": ["answer"]}

RIGHT: dict[str, dict[str, Any] | None] = {
    "data/text/litbank_20_novels.jsonl.gz": TEXT,
    "data/text/peps.jsonl.gz": TEXT,
    "data/text/tldr_pages.jsonl.gz": TEXT,
    "data/text/d2l_zh.jsonl.gz": TEXT,
    "data/text/tang_poems_zh.jsonl.gz": TEXT,
    "data/text/tinyshakespeare.txt": {"layout": "text", "split_text": "paragraph"},
    "data/chat/instruction_1100.json": ALPACA,
    "data/chat/oasst_zh_history.json": ALPACA,
    "data/chat/gsm8k_train.jsonl": GSM8K,
    "data/chat/gsm8k_test.jsonl": GSM8K,
    "data/preferences/polite_rude_1100.json": {"layout": "preference_alpaca"},
    "data/preferences/oasst_zh_history.json": {"layout": "preference_alpaca"},
    "data/preferences/hh_harmless_test.jsonl.gz": {"layout": "preference_chat", "turns_in_text": "transcript"},
    "data/preferences/taskmaster3_rewards.jsonl.gz": TASKMASTER,
    "data/preferences/taskmaster4_rewards.jsonl.gz": TASKMASTER,
    "data/encoder/banking77_train.csv": {"layout": "label", "columns": {"label": "category"}},
    "data/encoder/banking77_test.csv": {"layout": "label", "columns": {"label": "category"}},
    "data/encoder/clinc150.json": {"layout": "label", "records": "train", "columns": {"text": "0", "label": "1"}},
    "data/encoder/snips_train.jsonl.gz": SNIPS,
    "data/encoder/snips_test.jsonl.gz": SNIPS,
    **{f"data/encoder/wnut17_{part}.conll": BIO for part in ("train", "dev", "test")},
    **{f"data/encoder/weibo_ner_{part}.conll": WEIBO for part in ("train", "dev", "test")},
    "data/encoder/fewrel_val_wiki.json": {
        "layout": "relation",
        "records": "*",
        "columns": {"head": "h", "tail": "t", "label": "key"},
    },
    **{f"data/encoder/{name}.json": SQUAD for name in ("cmrc2018_trial", "cmrc2018_dev", "xquad_en", "xquad_zh")},
    "data/fixtures/alpaca_en_demo.json": ALPACA,
    "data/fixtures/alpaca_zh_demo.json": ALPACA,
    "data/fixtures/identity.json": ALPACA,
    "data/fixtures/c4_demo.jsonl": TEXT,
    "data/fixtures/dataset_info.json": None,
    "data/fixtures/dpo_en_demo.json": PAIRS,
    "data/fixtures/dpo_zh_demo.json": PAIRS,
    "data/fixtures/glaive_toolcall_en_demo.json": {"layout": "sharegpt"},
    "data/fixtures/glaive_toolcall_zh_demo.json": {"layout": "sharegpt"},
    "data/fixtures/kto_en_demo.json": {"layout": "rated_chat"},
    "data/fixtures/v1_sft_demo.jsonl": CHAT,
    "data/vocab/bert_base_chinese_vocab.txt": {"layout": "text", "split_text": "line"},
    "cases/data/01_minhash_drops_questions/squad.json": SQUAD,
    **{
        f"cases/data/02_repetition_and_quality_in_scripts_without_spaces/{name}.jsonl": TEXT
        for name in ("en_of_th", "en_of_zh", "th", "zh")
    },
    "cases/data/04_bmes_and_bmeo_tags/resume.bmes": {"layout": "bio", "file_type": "conll", "token_separator": ""},
    "cases/data/06_sentence_pairs/pairs.jsonl": (
        {"layout": "label", "columns": {"text": "sentence1", "text_pair": "sentence2"}}
        if "text_pair" in LAYOUTS["label"].columns
        else None
    ),
    "cases/data/07_official_test_split/train.jsonl": LABEL,
    "cases/data/07_official_test_split/test.jsonl": LABEL,
    "cases/data/08_unanswerable_without_its_baseline/questions.jsonl": SQUAD,
    "cases/data/09_other_encodings/gbk.csv": {"layout": "label", "encoding": "gb18030", "columns": {"text": "review"}},
    "cases/data/09_other_encodings/latin1.tsv": {
        "layout": "label",
        "encoding": "cp1252",
        "has_header": False,
        "columns": {"text": "1", "label": "0"},
    },
    "cases/data/12_no_rule_for_a_pattern_or_a_language/chats.jsonl": ALPACA,
    "cases/data/13_two_outputs_and_a_preference/judged.json": {"layout": "preference_between"},
    "cases/data/15_several_examples_in_one_row/seed.jsonl": ALPACA,
    "cases/data/16_no_way_to_use_a_classifier/unlabeled.jsonl": {"layout": "text", "columns": {"text": "sentence"}},
    "cases/meaning/02_prompts_last_turn/prompts.jsonl": PROMPTS,
    "cases/meaning/02b_prompts_single/prompts.jsonl": PROMPTS,
    "cases/meaning/08_span_text/spans.jsonl": {"layout": "spans"},
    "cases/meaning/08_span_text/inclusive.jsonl": {"layout": "spans"},
    "cases/meaning/10_json_answer/pairs.jsonl": PAIRS,
    "cases/meaning/11_pair_prompt_lost/pairs.jsonl": PAIRS,
    "cases/meaning/12_impossible_with_answers/questions.jsonl": SQUAD,
    "cases/meaning/17_float_labels/labels.jsonl": LABEL,
    "cases/meaning/21_ner_dataset_numbers/data": {"layout": "bio", "columns": {"tags": "ner_tags"}},
    "cases/meaning/21_ner_dataset_numbers/data.parquet": {"layout": "bio", "columns": {"tags": "ner_tags"}},
    **{
        f"cases/meaning/{name}/chats.jsonl": CHAT
        for name in (
            "01_role_tokens_forged",
            "03_reasoning_field",
            "04_turn_weights",
            "06_tool_arguments_text",
            "07_thinking_taken_out",
            "14_named_templates",
            "15_last_turn_differs",
            "15b_end_of_text",
            "15c_training_template",
            "16_empty_system",
            "19_functions_column",
            "20_zero_width",
            "23_tool_answer_orphaned",
        )
    },
    "cases/models/12_system_row_stops_the_stage/chats_sys.jsonl": CHAT,
    "cases/models/12_system_row_stops_the_stage/prefs_sys.jsonl": PAIRS,
    "cases/training/01_kl_coefficient_changes_sign/one.jsonl": CHAT,
    "cases/training/10_ppo_without_any_reward_fails_at_the_end/one.jsonl": CHAT,
    **{
        f"cases/training/05_tokenizer_of_text_without_spaces/tk_z_{name}.jsonl": TEXT
        for name in ("none", "many", "rare")
    },
}
"""File -> the source that reads it, without where it is; None: it holds no rows of any layout."""

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".conll", ".bmes", ".parquet", ".txt", ".gz", ".zst")
NO_DATA = ("tokenizer_config.json", "ds_plain.json", "output.txt", "trltmpl.txt")
"""What else lies in the cases' folders: settings and logs."""


def files_at(shared: Path) -> set[str]:
    """The data files that are there; a model's folder holds none."""
    found = {path for path in (shared / "data").rglob("*") if path.is_file()}
    found |= {path for path in (shared / "cases").glob("*/*/*") if path.is_file() and path.name not in NO_DATA}
    return {str(path.relative_to(shared)) for path in found if path.suffix in DATA_SUFFIXES}


def same(found: dict[str, Any] | None, right: dict[str, Any] | None) -> bool:
    """Whether the proposed source is the right one, where it is aside."""
    if found is None or right is None:
        return found is right
    return {name: value for name, value in found.items() if name not in ("kind", "paths", "path")} == right


def require_that_clean_agrees(proposal: dict[str, Any], folder: Path) -> None:
    """Runs `clean` as the printed block says, which must count what `inspect` counted."""
    ledger = run_stage(CLEAN, {"format": proposal["format"], "source": proposal["source"]}, folder).json("ledger.json")
    assert (ledger["read"], ledger["kept"]) == (proposal["rows"]["read"], proposal["rows"]["kept"])
    dropped = {reason["reason"]: reason["count"] for reason in proposal["rows"]["reasons"]}
    assert {reason: entry["count"] for reason, entry in ledger["dropped"].items()} == dropped


def test_nine_of_ten_files_are_read_right_unaided_and_every_row_is_counted(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At least 90 % of the proposals are the right ones, options and columns included; rows in = rows out + rows dropped for each."""
    shared = shared_data.parent
    there = sorted(name for name in RIGHT if (shared / name).exists())
    assert len(there) > 80
    right = 0
    for name in there:
        path = shared / name
        large = path.is_file() and path.stat().st_size > LARGE_BYTES
        report = inspect_data([str(path)], Asked(num_rows=ROWS_OF_LARGE_FILES if large else 0, num_shown=0))
        first = report["proposals"][0] if report["proposals"] else {"source": None, "rows": report["rows"]}
        rows = first["rows"]
        assert rows["read"] == rows["kept"] + sum(reason["count"] for reason in rows["reasons"]) > 0, name
        assert rows["complete"] or large, name
        if path.is_file() and path.stat().st_size < SMALL_BYTES and report["proposals"] and "stops" not in first:
            require_that_clean_agrees(first, tmp_path / name)
        is_right = same(first["source"], RIGHT[name])
        right += is_right
        counted = f"{rows['read']:,} = {rows['kept']:,} + {rows['dropped']:,}{'' if rows['complete'] else ' (sample)'}"
        with capsys.disabled():
            wanted = "" if is_right else f", and {RIGHT[name]} is right"
            print(f"\n{'right' if is_right else 'WRONG'}  {name}: {counted}{wanted}", end="")
    with capsys.disabled():
        print(f"\n{right} of {len(there)} right", end="")
        print(f"; not in the table: {sorted(files_at(shared) - RIGHT.keys()) or 'none'}")
    assert right >= 0.9 * len(there)
