"""The stage `mix`: the held-out side, what may not be on both sides, weights and budgets, and what is written down."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import DataError, RecipeError
from pipeline.settings.resources import Resources
from pipeline.stage import Estimate, Forecast
from pipeline.store.artifact import Kind
from stages.data.mix import STAGE, MixParams, check
from stages.lib.curation.mixing import amounts_by_weight
from tests.unit.running_stages import Ran, params_of, problems_of, run_stage

Row = dict[str, Any]


def mix(
    folder: Path,
    sources: Mapping[str, list[Row]],
    seed: int = 0,
    inputs: Mapping[str, Path] | None = None,
    **params: Any,
) -> Ran:
    """The stage run on artifacts that hold these rows."""
    folders = dict(inputs or {})
    for name, rows in sources.items():
        folders[f"sources.{name}"] = folder / "inputs" / name
        folders[f"sources.{name}"].mkdir(parents=True)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folders[f"sources.{name}"] / "rows.jsonl").write_text(text, encoding="utf-8")
    return run_stage(STAGE, params, folder, folders, seed)


def texts(count: int, name: str = "text", width: int = 1) -> list[Row]:
    return [{"text": f"{name} {index:05d}".ljust(width, ".")} for index in range(count)]


def chat(question: str, answer: str, **more: str) -> Row:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def pair(question: str, chosen: str, rejected: str, **more: str) -> Row:
    message = {"role": "assistant"}
    return {
        "prompt": [{"role": "user", "content": question}],
        "chosen": [{**message, "content": chosen}],
        "rejected": [{**message, "content": rejected}],
        **more,
    }


def without_source(rows: list[Row]) -> list[Row]:
    return [{name: value for name, value in row.items() if name != "source"} for row in rows]


def is_held_out(key: str, salt: str = "slipway", fraction: float = 0.05) -> bool:
    """The rule, written once more: the first 8 bytes of SHA-256 over salt, zero byte and key, as a share of 2^64."""
    digest = hashlib.sha256(f"{salt}\0{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def sides(ran: Ran) -> tuple[list[Row], list[Row]]:
    return ran.rows("train.jsonl"), ran.rows("heldout.jsonl")


# The held-out side


def test_an_official_test_set_is_held_out_whole(tmp_path: Path) -> None:
    """None of it is trained on, nor what says the same or begins with its prompts; nothing else is held out."""
    train = [chat(f"q {index}", "a") for index in range(60)]
    test = [chat("new", "a"), chat("q 3", "b"), chat("q 7", "a"), chat("new", "a")]
    ran = mix(tmp_path / "whole", {"train": train, "test": test}, heldout_sources=["test"])
    trained, heldout = sides(ran)
    said = {json.dumps(row["messages"]) for row in heldout}
    assert said == {json.dumps(row["messages"]) for row in test} and len(heldout) == 3
    assert {row["source"] for row in trained} == {"train"}
    assert len(trained) == 58
    assert ran.json("ledger.json")["dropped"]["also_held_out"]["count"] == 2
    assert any(note == "plan: test: held out whole, 3 rows" for note in ran.notes)
    weighted = mix(
        tmp_path / "weighted", {"train": train, "test": test}, heldout_sources=["test"], weights={"train": 1.0}
    )
    assert sides(weighted)[1] == heldout
    beside = mix(tmp_path / "beside", {"train": train, "test": test}, heldout_sources=["test"], heldout_fraction=0.3)
    assert {row["source"] for row in sides(beside)[1]} == {"train", "test"}


def test_what_is_said_of_sources_that_are_held_out_must_fit(tmp_path: Path) -> None:
    def problems(*sources: str, **params: Any) -> list[str]:
        inputs = {f"sources.{name}": Estimate() for name in sources}
        return [str(each) for each in check(Forecast(params_of(MixParams, params, tmp_path), Resources(), inputs))]

    assert problems("train", "test", heldout_sources=["test"], weights={"train": 1.0}) == []
    assert problems("train", "test", heldout_sources=["tst"]) == [
        "params.heldout_sources: 'tst' is no source of this stage. Did you mean 'test'?"
    ]
    assert problems("test", heldout_sources=["test"]) == [
        "params.heldout_sources: leaves no source to train on. Add one to the inputs."
    ]
    assert problems("train", "test", heldout_sources=["test"], budgets={"train": 1, "test": 1}) == [
        "params.budgets.test: is held out whole. Remove it here."
    ]


def test_the_held_out_side_is_a_pure_function_of_salt_and_content(tmp_path: Path) -> None:
    rows = texts(1_000)
    train, heldout = sides(mix(tmp_path, {"a": rows}))
    expected = {row["text"] for row in rows if is_held_out(f"content:{row['text']}")}
    assert {row["text"] for row in heldout} == expected
    assert {row["text"] for row in train} == {row["text"] for row in rows} - expected
    assert 30 <= len(expected) <= 70
    assert {row["source"] for row in train + heldout} == {"a"}


def test_seed_weights_and_other_sources_change_nothing_in_it(tmp_path: Path) -> None:
    small, large = texts(300, "small"), texts(900, "large")
    first = mix(tmp_path / "1", {"a": small, "b": large})
    other = mix(tmp_path / "2", {"a": small, "b": large}, seed=9, weights={"a": 3.0, "b": 1.0})
    alone = mix(tmp_path / "3", {"a": small})
    assert (first.out / "heldout.jsonl").read_bytes() == (other.out / "heldout.jsonl").read_bytes()
    assert [row for row in first.rows("heldout.jsonl") if row["source"] == "a"] == alone.rows("heldout.jsonl")
    assert first.rows("train.jsonl") != other.rows("train.jsonl")


def test_another_salt_holds_out_other_rows(tmp_path: Path) -> None:
    first = sides(mix(tmp_path / "1", {"a": texts(1_000)}))[1]
    other = sides(mix(tmp_path / "2", {"a": texts(1_000)}, heldout_salt="other"))[1]
    assert {row["text"] for row in other} == {
        row["text"] for row in texts(1_000) if is_held_out(f"content:{row['text']}", salt="other")
    }
    assert {row["text"] for row in first} != {row["text"] for row in other}


def test_a_group_is_on_the_same_side_in_every_source_and_every_data_set(tmp_path: Path) -> None:
    groups = [f"module{index}" for index in range(60)]
    held = {group for group in groups if is_held_out(f"group:{group}", fraction=0.2)}
    assert 0 < len(held) < len(groups)
    rows = [{"text": f"{group} says {index}", "group": group} for group in groups for index in range(3)]
    more = [{"text": f"{group} says more", "group": group} for group in groups]
    chats = [chat(f"what is {group}?", "a module", group=group) for group in groups]
    pairs = [pair(f"which {group}?", "this", "that", group=group) for group in groups]
    mixed = [
        mix(tmp_path / "text", {"a": rows, "b": more}, heldout_fraction=0.2),
        mix(tmp_path / "chats", {"a": chats}, heldout_fraction=0.2),
        mix(tmp_path / "pairs", {"a": pairs}, heldout_fraction=0.2, weights={"a": 1.0}, seed=5),
    ]
    for ran in mixed:
        train, heldout = sides(ran)
        assert {row["group"] for row in heldout} == held
        assert {row["group"] for row in train} == set(groups) - held


def test_chats_and_preferences_hold_out_the_same_prompts(tmp_path: Path) -> None:
    prompts = [f"question {index}" for index in range(400)]
    chats = mix(tmp_path / "c", {"a": [chat(prompt, str(answer)) for prompt in prompts for answer in range(2)]})
    pairs = mix(tmp_path / "p", {"a": [pair(prompt, "yes", "no") for prompt in prompts]})
    held = {prompt for prompt in prompts if is_held_out(f"prompt:{prompt}")}
    assert {row["messages"][0]["content"] for row in chats.rows("heldout.jsonl")} == held
    assert {row["prompt"][0]["content"] for row in pairs.rows("heldout.jsonl")} == held
    assert not held & {row["messages"][0]["content"] for row in chats.rows("train.jsonl")}


def test_questions_on_one_context_stay_together(tmp_path: Path) -> None:
    rows = [
        {"id": f"{c}-{q}", "context": f"context {c}", "question": f"q{q}?", "answers": []} for c in range(300) for q in range(4)
    ]  # fmt: skip
    train, heldout = sides(mix(tmp_path, {"a": rows}))
    assert {row["context"] for row in heldout} == {
        f"context {c}" for c in range(300) if is_held_out(f"context:context {c}")
    }
    assert len(heldout) % 4 == 0
    assert not {row["context"] for row in heldout} & {row["context"] for row in train}


def test_a_label_does_not_move_a_text_to_the_other_side(tmp_path: Path) -> None:
    rows = [{"text": f"text {index}", "label": label} for index in range(300) for label in ("x", "y")]
    train, heldout = sides(mix(tmp_path, {"a": rows}))
    assert not {row["text"] for row in heldout} & {row["text"] for row in train}
    assert Counter(Counter(row["text"] for row in heldout).values()).keys() == {2}


def test_no_text_and_no_prompt_is_on_both_sides(tmp_path: Path) -> None:
    """Groups pull rows with the same text or prompt to both sides; the training row then goes, and is counted."""
    held = next(f"g{index}" for index in range(100) if is_held_out(f"group:g{index}", fraction=0.3))
    kept = next(f"g{index}" for index in range(100) if not is_held_out(f"group:g{index}", fraction=0.3))
    texts_run = mix(
        tmp_path / "t",
        {
            "a": [{"text": "same", "group": held}, {"text": "other", "group": kept}],
            "b": [{"text": "same", "group": kept}, {"text": "third", "group": kept}],
        },
        heldout_fraction=0.3,
    )
    assert [row["text"] for row in texts_run.rows("heldout.jsonl")] == ["same"]
    assert sorted(row["text"] for row in texts_run.rows("train.jsonl")) == ["other", "third"]
    assert texts_run.json("ledger.json") == {
        "read": 4,
        "kept": 3,
        "dropped": {"also_held_out": {"count": 1, "examples": ["b: same"]}},
        "repaired": {},
    }
    chats = [chat("same?", "1", group=held), chat("same?", "2", group=kept), chat("other?", "3", group=kept)]
    chats_run = mix(tmp_path / "c", {"a": chats}, heldout_fraction=0.3)
    assert without_source(chats_run.rows("train.jsonl")) == [chats[2]]
    assert chats_run.result.facts.dropped_rows == {"also_held_out": 1}


def test_what_is_held_out_twice_counts_once(tmp_path: Path) -> None:
    rows = texts(400)
    ran = mix(tmp_path, {"a": rows, "b": [{**row, "id": "x"} for row in rows]})
    heldout = [row["text"] for row in ran.rows("heldout.jsonl")]
    assert len(heldout) == len(set(heldout)) == ran.result.facts.dropped_rows["held_out_twice"]
    assert {row["source"] for row in ran.rows("heldout.jsonl")} == {"a"}


def test_max_heldout_rows_leaves_the_training_side_as_it_is(tmp_path: Path) -> None:
    all_rows = mix(tmp_path / "1", {"a": texts(1_000)})
    fewer = mix(tmp_path / "2", {"a": texts(1_000)}, max_heldout_rows=10)
    assert fewer.rows("heldout.jsonl") == all_rows.rows("heldout.jsonl")[:10]
    assert fewer.rows("train.jsonl") == all_rows.rows("train.jsonl")
    left_out = len(all_rows.rows("heldout.jsonl")) - 10
    assert fewer.result.facts.dropped_rows == {"over_max_heldout_rows": left_out}
    assert (fewer.result.facts.train_rows, fewer.result.facts.heldout_rows) == (1_000 - left_out - 10, 10)


def test_a_side_without_rows_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"params.heldout_fraction: 0.05 holds out none of 3 rows in 1 groups"):
        mix(tmp_path / "1", {"a": [{"text": str(i), "group": "never mind"} for i in range(3)]})
    with pytest.raises(DataError, match=r"0.999 leaves no row to train on in a"):
        mix(tmp_path / "2", {"a": texts(3)}, heldout_fraction=0.999)


def test_splitting_by_group_wants_one_in_every_row(tmp_path: Path) -> None:
    rows = [{"text": "a", "group": "g"}, {"text": "b"}]
    with pytest.raises(DataError, match=r'sources.a: a row has no group: {"text": "b"}'):
        mix(tmp_path, {"a": rows}, split_by="group")


def test_splitting_chats_by_content_lets_prompts_stand_on_both_sides(tmp_path: Path) -> None:
    rows = [chat("same?", str(index)) for index in range(400)]
    train, heldout = sides(mix(tmp_path, {"a": rows}, split_by="content"))
    assert len(train) + len(heldout) == 400
    assert 5 <= len(heldout) <= 40


# Shares


def training(count: int, name: str, width: int = 20) -> list[Row]:
    """Rows that are not held out at a fraction of 0.05, all of the same length."""
    rows = (row for row in texts(count * 2, name, width) if not is_held_out(f"content:{row['text']}"))
    return [row for row, _ in zip(rows, range(count), strict=False)]


HELD_OUT = [row for row in texts(1_000, "held", 20) if is_held_out(f"content:{row['text']}")][:5]


def shares(ran: Ran) -> dict[str, int]:
    return dict(Counter(row["source"] for row in ran.rows("train.jsonl")))


def test_without_weights_every_row_is_used_once(tmp_path: Path) -> None:
    ran = mix(tmp_path, {"a": training(70, "a") + HELD_OUT, "b": training(30, "b")})
    assert shares(ran) == {"a": 70, "b": 30}
    assert ran.result.metrics["share_a"] == 0.7
    assert ran.result.metrics["epochs_b"] == 1.0


def test_weights_stop_when_the_first_source_is_used_up(tmp_path: Path) -> None:
    """Shares 3 : 1 of 60 and 100 rows: a allows 60 / 0.75 = 80 rows in all, so b gives 20."""
    sources = {"a": training(60, "a") + HELD_OUT, "b": training(100, "b")}
    ran = mix(tmp_path, sources, weights={"a": 3.0, "b": 1.0})
    assert shares(ran) == {"a": 60, "b": 20}
    assert len({row["text"] for row in ran.rows("train.jsonl")}) == 80
    assert ran.result.facts.dropped_rows == {"not_drawn": 80}
    mixture = ran.json("mixture.json")
    assert mixture["sources"]["b"] == {
        "available": {"rows": 100, "characters": 2_000},
        "planned": 20,
        "train": {"rows": 20, "characters": 400},
        "epochs": 0.2,
        "most_uses_of_a_row": 1,
        "share": 0.25,
        "heldout": {"rows": 0, "characters": 0},
    }
    assert mixture["train"] == {"rows": 80, "characters": 1_600}
    assert mixture["heldout"] == {"rows": 5, "characters": 100}
    assert "plan: b: 20 of 100 rows, 0.20 times over, 25.0% of the training data; 0 rows held out" in ran.notes
    assert "drawn: b: 20 rows, 400 characters, 0.20 times over, 25.0% of the training data" in ran.notes


def test_weights_repeat_until_every_source_is_used_up(tmp_path: Path) -> None:
    """Shares 1 : 1 of 20 and 50 rows: 100 in all, each row of a twice and ten of them a third time."""
    sources = {"a": training(20, "a") + HELD_OUT, "b": training(50, "b")}
    ran = mix(tmp_path, sources, weights={"a": 0.5, "b": 0.5}, on_exhausted="repeat")
    assert shares(ran) == {"a": 50, "b": 50}
    uses = Counter(row["text"] for row in ran.rows("train.jsonl") if row["source"] == "a")
    assert Counter(uses.values()) == {2: 10, 3: 10}
    assert ran.json("mixture.json")["sources"]["a"]["most_uses_of_a_row"] == 3
    assert ran.result.metrics["epochs_a"] == 2.5


def test_max_repeats_ends_the_mix_earlier(tmp_path: Path) -> None:
    """Of a at most 2 x 20 = 40 rows, so 80 in all."""
    sources = {"a": training(20, "a") + HELD_OUT, "b": training(50, "b")}
    ran = mix(tmp_path, sources, weights={"a": 1.0, "b": 1.0}, on_exhausted="repeat", max_repeats=2)
    assert shares(ran) == {"a": 40, "b": 40}
    assert set(Counter(row["text"] for row in ran.rows("train.jsonl") if row["source"] == "a").values()) == {2}


def test_weights_in_characters_count_characters(tmp_path: Path) -> None:
    """Rows of 10 and of 40 characters, 100 of each: 1,000 characters of each, so 25 rows of b."""
    sources = {"a": training(100, "a", width=10) + HELD_OUT, "b": training(100, "b", width=40)}
    ran = mix(tmp_path, sources, weights={"a": 1.0, "b": 1.0}, unit="characters")
    assert shares(ran) == {"a": 100, "b": 25}
    assert ran.result.metrics["share_a"] == 0.5


def test_budgets_give_each_source_its_amount(tmp_path: Path) -> None:
    sources = {"a": training(20, "a") + HELD_OUT, "b": training(50, "b")}
    ran = mix(tmp_path / "1", sources, budgets={"a": 7, "b": 40})
    assert shares(ran) == {"a": 7, "b": 40}
    ran = mix(tmp_path / "2", sources, budgets={"a": 60, "b": 40}, on_exhausted="repeat")
    assert shares(ran) == {"a": 60, "b": 40}
    with pytest.raises(DataError) as caught:
        mix(tmp_path / "3", sources, budgets={"a": 21, "b": 51})
    assert str(caught.value).split("\n") == [
        "params.budgets.a: asks for 21 rows, and the source has 20. Lower the budget, or set `on_exhausted: repeat`.",
        "params.budgets.b: asks for 51 rows, and the source has 50. Lower the budget, or set `on_exhausted: repeat`.",
    ]
    with pytest.raises(DataError, match="asks for 81 rows, and the source has 20, which may be used 4 times"):
        mix(tmp_path / "4", sources, budgets={"a": 81, "b": 1}, on_exhausted="repeat")


@pytest.mark.slow
def test_token_budgets_count_the_tokenizers_tokens(tmp_path: Path) -> None:
    """The tokenizer splits at spaces: rows of a have 2 tokens, rows of b 4."""
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "tokenizer")
    ran = mix(
        tmp_path,
        {"a": training(50, "a", width=1) + HELD_OUT, "b": training(50, "b b b", width=1)},
        inputs={"tokenizer": tmp_path / "tokenizer"},
        budgets={"a": 40, "b": 40},
        unit="tokens",
    )
    assert shares(ran) == {"a": 20, "b": 10}
    assert ran.json("mixture.json")["sources"]["b"]["train"]["tokens"] == 40
    assert (ran.result.facts.train_tokens, ran.result.facts.heldout_tokens) == (80, 10)


@pytest.mark.parametrize(
    ("weights", "available", "on_exhausted", "repeats", "expected"),
    [
        ({"a": 1, "b": 1}, {"a": 10, "b": 30}, "stop", 1, {"a": 10, "b": 10}),
        ({"a": 1, "b": 1}, {"a": 10, "b": 30}, "repeat", 4, {"a": 30, "b": 30}),
        ({"a": 1, "b": 1}, {"a": 10, "b": 100}, "repeat", 4, {"a": 40, "b": 40}),
        # 0.1 + 0.2 + 0.7 is not 1 in binary; all three sources are used up all the same
        ({"a": 0.1, "b": 0.2, "c": 0.7}, {"a": 100, "b": 200, "c": 700}, "stop", 1, {"a": 100, "b": 200, "c": 700}),
        # 10 / (2/3) = 15 in all
        ({"a": 2, "b": 1}, {"a": 10, "b": 99}, "stop", 1, {"a": 10, "b": 5}),
    ],
)
def test_amounts_by_weight(weights: Any, available: Any, on_exhausted: str, repeats: int, expected: Any) -> None:
    assert amounts_by_weight(weights, available, on_exhausted, repeats) == expected


def test_a_weight_that_gives_no_row_is_an_error() -> None:
    with pytest.raises(DataError, match=r"params.weights.b: is so small that no row of the source is used"):
        amounts_by_weight({"a": 1.0, "b": 0.001}, {"a": 10, "b": 10}, "stop", 1)


# Order


def test_the_seed_shuffles_and_nothing_else_does(tmp_path: Path) -> None:
    sources = {"a": training(100, "a") + HELD_OUT, "b": training(100, "b")}
    first, again = (mix(tmp_path / name, sources, seed=1) for name in ("1", "2"))
    other = mix(tmp_path / "3", sources, seed=2)
    for name in ("train.jsonl", "heldout.jsonl", "mixture.json", "ledger.json"):
        assert (first.out / name).read_bytes() == (again.out / name).read_bytes()
    ours, theirs = first.rows("train.jsonl"), other.rows("train.jsonl")
    assert ours != theirs
    assert sorted(row["text"] for row in ours) == sorted(row["text"] for row in theirs)
    half = Counter(row["source"] for row in ours[:100])
    assert 30 < half["a"] < 70


def test_the_order_of_rows_in_a_source_does_not_matter(tmp_path: Path) -> None:
    rows = training(100, "a") + HELD_OUT
    first = mix(tmp_path / "1", {"a": rows}, budgets={"a": 40})
    other = mix(tmp_path / "2", {"a": rows[::-1]}, budgets={"a": 40})
    assert first.rows("train.jsonl") == other.rows("train.jsonl")
    assert first.rows("heldout.jsonl") == other.rows("heldout.jsonl")


# What is told before anything runs


def told(tmp_path: Path, roles: list[str], **params: Any) -> list[str]:
    forecast = Forecast(params_of(MixParams, params, tmp_path), Resources(), dict.fromkeys(roles, Estimate()))
    return [str(problem) for problem in STAGE.check(forecast)]


def test_weights_must_name_every_source_and_no_other(tmp_path: Path) -> None:
    assert told(tmp_path, ["sources.web", "sources.books"], weights={"web": 1.0, "boks": 1.0}) == [
        "params.weights.boks: is no source of this stage. Did you mean 'books'?",
        "params.weights: says nothing of the source 'books'. Add it.",
    ]
    assert told(tmp_path, ["sources.web"], budgets={"web": 5}) == []


def test_tokens_need_a_tokenizer(tmp_path: Path) -> None:
    problem = "params.unit: is tokens, and the stage has no tokenizer to count them with."
    assert told(tmp_path, ["sources.a"], budgets={"a": 5}, unit="tokens") == [
        f"{problem} Add `tokenizer` to the stage's inputs, or count characters."
    ]
    assert told(tmp_path, ["sources.a", "tokenizer"], budgets={"a": 5}, unit="tokens") == []


@pytest.mark.parametrize(
    ("params", "problem"),
    [
        ({"weights": {"a": 1.0}, "budgets": {"a": 1}}, "weights and budgets exclude each other"),
        ({"weights": {"a": 0.0}}, "weights.a: input should be greater than or equal to 0.000001, not 0.0"),
        ({"budgets": {}}, "budgets: every source needs a number above 0"),
        ({"unit": "characters"}, "unit and on_exhausted: are for weights or budgets, and there are none"),
        ({"weights": {"a": 1.0}, "max_repeats": 2}, "max_repeats: is for `on_exhausted: repeat`"),
        ({"heldout_fraction": 0.0}, "heldout_fraction: input should be greater than or equal to 0.000001, not 0.0"),
    ],
)
def test_params_that_contradict_each_other(params: Row, problem: str, tmp_path: Path) -> None:
    assert problem in problems_of(MixParams, params, tmp_path)


def test_the_kind_of_the_mix_follows_its_sources(tmp_path: Path) -> None:
    params = params_of(MixParams, {}, tmp_path)
    inputs = {"sources.a": Kind.CHAT_ROWS, "sources.b": Kind.CHAT_ROWS, "tokenizer": Kind.TOKENIZER}
    assert STAGE.output_kind(params, inputs) is Kind.CHATS
    with pytest.raises(RecipeError, match=r"must all be of one kind \(a is chat_rows, b is text_rows\)"):
        STAGE.output_kind(params, {**inputs, "sources.b": Kind.TEXT_ROWS})
    by_context = params_of(MixParams, {"split_by": "context"}, tmp_path)
    assert STAGE.output_kind(by_context, {"sources.a": Kind.QUESTION_ROWS}) is Kind.QUESTIONS
    with pytest.raises(RecipeError, match=r"params.split_by: chats have no context. Known: group, prompt, content"):
        STAGE.output_kind(by_context, inputs)
