from __future__ import annotations

import itertools
import json
import math
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import DataError
from pipeline.settings.resources import Resources
from pipeline.stage import Estimate, Forecast, Result
from stages.evaluation.evaluate import STAGE, EvaluateParams
from stages.lib.measuring.perplexity import Score, ScoredRow, bits_per_byte, document_pieces, heldout_text, score_rows
from stages.lib.rows.canonical import read_rows
from stages.lib.text.chat_spans import encode_chat, encode_prompt
from stages.lib.text.packed import PackedTokens
from stages.lib.text.tokenizers import encode_texts, load_tokenizer
from tests.integration.tiny_language_model import (
    TinyWorld,
    make_tokenizer,
    make_world,
    run_stage,
    train_model,
    write_split,
    write_tokens,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def even(world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that finds every token equally likely: its head is zero."""
    return without_head(world.model, tmp_path_factory.mktemp("even"))


@pytest.fixture(scope="module")
def foreign(world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with another tokenizer, of 700 tokens."""
    folder = tmp_path_factory.mktemp("foreign")
    tokenizer = make_tokenizer(world.texts[:200], 700)
    tokens = write_tokens(folder / "tokens", tokenizer, world.texts[:200])
    train_model(folder / "trained", tokenizer, tokens, steps=1, hidden=64, tied=False)
    return without_head(folder / "trained", folder / "even")


def without_head(source: Path, folder: Path) -> Path:
    from transformers import AutoModelForCausalLM

    shutil.copytree(source, folder, dirs_exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(source)
    torch.nn.init.zeros_(model.lm_head.weight)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rewarding(world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model with the models' tokenizer."""
    return with_reward_head(world.model, tmp_path_factory.mktemp("rewarding"))


@pytest.fixture(scope="module")
def rewarding_otherwise(foreign: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with another tokenizer and another chat template."""
    folder = with_reward_head(foreign, tmp_path_factory.mktemp("rewarding_otherwise"))
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ '<|' ~ m.role ~ '|>\\n' ~ m.content ~ '<|end|>' }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def with_reward_head(source: Path, folder: Path) -> Path:
    from stages.lib.models.heads import add_reward_head, choose_padding

    tokenizer = load_tokenizer(source)
    torch.manual_seed(0)
    add_reward_head(source, choose_padding(tokenizer, set())).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def reading_less(source: Path, folder: Path, context_tokens: int) -> Path:
    """The model in `source`, whose config says that it reads so many tokens."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": context_tokens}))
    return folder


def answered(prompt: list[dict[str, str]], text: str) -> list[dict[str, str]]:
    return [*prompt, {"role": "assistant", "content": text}]


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def evaluate(
    models: dict[str, Path], folder: Path, params: dict[str, Any] | None = None, **inputs: Path
) -> tuple[Result, Path]:
    folder.mkdir(exist_ok=True)
    named = {f"models.{name}": path for name, path in models.items()}
    result, context = run_stage(STAGE, {**named, **inputs}, params or {}, folder)
    return result, context.out


def test_perplexity_is_that_of_the_documents_one_by_one(world: TinyWorld, tmp_path: Path) -> None:
    """The oracle is transformers' own loss, a mean over the row's tokens but the first, without batch or padding."""
    result, _ = evaluate({"base": world.model}, tmp_path, {"heldout_blocks": 20}, tokens=world.tokens)
    model = load(world.model)
    nats, tokens = 0.0, 0
    with torch.no_grad():
        for piece in document_pieces(PackedTokens(world.tokens, "heldout"), 20):
            ids = torch.tensor(piece.ids)[None]
            nats += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
            tokens += ids.shape[1] - 1
    assert result.metrics["heldout_perplexity.base"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)


def test_pieces_of_a_block_are_what_a_packed_block_is(world: TinyWorld) -> None:
    """In a packed block, positions that begin anew keep documents apart: the same tokens get the same probabilities."""
    model, packed = load(world.model), PackedTokens(world.tokens, "heldout")
    index = next(i for i in range(len(packed)) if (packed.block(i).position_ids[1:] == 0).any())
    block = packed.block(index)
    ids, positions = torch.from_numpy(block.input_ids)[None], torch.from_numpy(block.position_ids)[None]
    with torch.no_grad():
        logps = model(input_ids=ids, position_ids=positions, use_cache=False).logits.log_softmax(-1)[0, :-1]
    asked = positions[0, 1:] > 0
    expected = -float(logps.gather(1, ids[0, 1:, None])[asked].sum())
    starts = [*(positions[0] == 0).nonzero()[:, 0].tolist(), len(block.input_ids)]
    pieces = [block.input_ids[a:b] for a, b in itertools.pairwise(starts)]
    scores = score_rows(model, [ScoredRow(piece) for piece in pieces], batch_size=3)
    assert len(scores) > 1
    assert sum(each.tokens for each in scores) == int(asked.sum())
    assert sum(each.nats for each in scores) == pytest.approx(expected, rel=1e-5)


def test_batches_change_nothing_and_flags_choose_the_tokens(world: TinyWorld) -> None:
    model = load(world.model)
    rows = [
        ScoredRow([7, 300, 301, 302, 303]),
        ScoredRow([7, 300], [0, 1]),
        ScoredRow([7, 300, 301, 302], [1, 0, 0, 1]),
    ]
    alone = [score_rows(model, [row], 1)[0] for row in rows]
    for size in (2, 3):
        for found, expected in zip(score_rows(model, rows, size), alone, strict=True):
            assert found.tokens == expected.tokens
            assert found.nats == pytest.approx(expected.nats, rel=1e-5)
    assert [each.tokens for each in alone] == [4, 1, 1]


def test_bits_per_byte_by_hand() -> None:
    """ln 4 nats per token are 2 bits; 3 tokens for 6 bytes make 1 bit a byte."""
    score = Score(nats=2 * math.log(4), tokens=2)
    assert bits_per_byte(score, tokens=3, num_bytes=6) == pytest.approx(1.0)
    assert score.perplexity == pytest.approx(4.0)
    assert (score + score).tokens == 4
    assert Score(1000.0, 1).perplexity == math.inf


def test_heldout_text_is_the_text(world: TinyWorld) -> None:
    """The held-out documents are the first texts, whole but for the last, which is cut off at the block's end."""
    packed, tokenizer = PackedTokens(world.tokens, "heldout"), load_tokenizer(world.tokens)
    text = heldout_text(packed, tokenizer, 10)
    assert text.texts[:-1] == world.texts[: len(text.texts) - 1]
    assert world.texts[len(text.texts) - 1].startswith(text.texts[-1])
    # 10 blocks, less a bos for each document that begins in them.
    assert text.num_tokens == 10 * packed.sequence_length - len(text.texts)


def test_a_model_that_knows_nothing(world: TinyWorld, even: Path, foreign: Path, tmp_path: Path) -> None:
    """Every token has the probability 1/V, V = 1024 and 700. So perplexity is V; bits per byte are log2 V tokens / bytes;
    an assistant token costs ln V nats; of two answers the one with fewer tokens is likelier, and per token all tie."""
    models = {"even": even, "foreign": foreign}
    inputs = {"tokens": world.tokens, "chats": world.chats, "preferences": world.preferences}
    result, _ = evaluate(models, tmp_path, {"heldout_blocks": 8}, **inputs)
    text = heldout_text(PackedTokens(world.tokens, "heldout"), load_tokenizer(world.tokens), 8)
    for name, folder, size in (("even", even, 1024), ("foreign", foreign, 700)):
        tokenizer = load_tokenizer(folder)
        assert len(tokenizer) == size
        encoded = sum(len(ids) for ids in encode_texts(tokenizer, text.texts))
        # Each document ends with eos; the last one is cut off: only the other tokenizer, which sees texts, ends it too.
        ends = len(text.texts) - (1 if name == "even" else 0)
        bits = math.log2(size) * (encoded + ends) / text.num_bytes
        pairs = [
            [
                sum(encode_chat(tokenizer, [*row["prompt"], *row[side]]).assistant_mask)
                for side in ("chosen", "rejected")
            ]
            for row in read_rows(world.preferences / "heldout.jsonl")
        ]
        shorter = sum((chosen < rejected) + (chosen == rejected) / 2 for chosen, rejected in pairs) / len(pairs)
        expected = {
            "heldout_perplexity": size,
            "heldout_bits_per_byte": bits,
            "heldout_assistant_loss": math.log(size),
            "heldout_preference_accuracy": shorter,
            "heldout_preference_accuracy_per_token": 0.5,
            "heldout_preference_margin_per_token": 0.0,
        }
        found = {measure: result.metrics[f"{measure}.{name}"] for measure in expected}
        # The cut in the middle of a token's text may cost the re-encoded text a token.
        assert found == pytest.approx(expected, rel=2e-3 if name == "even" else 1e-5, abs=1e-6)


def test_training_helps_and_the_report_says_so_side_by_side(world: TinyWorld, even: Path, tmp_path: Path) -> None:
    from stages.compression import quantize

    (tmp_path / "int8").mkdir()
    inputs = {"model": world.model, "calibration": world.tokens}
    params = {"method": "round_to_nearest", "bits": 8, "group_size": 32, "heldout_rows": 8}
    quantized, context = run_stage(quantize.STAGE, inputs, params, tmp_path / "int8")
    models = {"even": even, "base": world.model, "int8": context.out}
    result, out = evaluate(models, tmp_path / "report", {"heldout_blocks": 8}, tokens=world.tokens)
    metrics = result.metrics
    assert list(metrics)[:3] == [f"heldout_perplexity.{name}" for name in models]
    assert metrics["heldout_perplexity.base"] < metrics["heldout_perplexity.even"] / 5
    assert metrics["heldout_bits_per_byte.base"] < metrics["heldout_bits_per_byte.even"]
    # The same blocks, measured by the other stage.
    assert metrics["heldout_perplexity.base"] == pytest.approx(quantized.metrics["heldout_perplexity_original"])
    assert metrics["heldout_perplexity.int8"] == pytest.approx(quantized.metrics["heldout_perplexity"])

    report = json.loads((out / "report.json").read_text())
    assert list(report["models"]) == list(models)
    for name in models:
        assert report["models"][name]["measures"]["heldout_perplexity"] == metrics[f"heldout_perplexity.{name}"]
    assert report["models"]["int8"]["bytes"] < report["models"]["base"]["bytes"]
    assert report["models"]["int8"]["parameters"] == report["models"]["base"]["parameters"]
    assert report["notes"] == []
    lines = (out / "report.md").read_text().splitlines()
    header = next(line for line in lines if line.startswith("|"))
    assert [cell.strip() for cell in header.strip("|").split("|")] == ["", *models]
    shown = next(line for line in lines if "perplexity of the text" in line)
    assert f" {metrics['heldout_perplexity.base']:.4g} |" in shown
    assert (out / "generations.jsonl").read_text() == ""


def test_models_with_different_tokenizers_are_said_not_to_compare(
    world: TinyWorld, even: Path, foreign: Path, tmp_path: Path
) -> None:
    models = {"base": world.model, "even": even, "foreign": foreign}
    _, out = evaluate(models, tmp_path, {"heldout_blocks": 2}, tokens=world.tokens)
    report = json.loads((out / "report.json").read_text())
    assert any("only within base, even; foreign" in note for note in report["notes"])
    assert any(note.startswith("Bits per byte compare between all") for note in report["notes"])
    for note in report["notes"]:
        assert note in (out / "report.md").read_text()


def test_every_model_replies_to_the_same_prompts(world: TinyWorld, even: Path, tmp_path: Path) -> None:
    """The first two held-out chats up to their last assistant turn, and one of our own; by the seed of the step and their number."""
    from stages.lib.generating.replies import write_reply

    options = {"max_new_tokens": 6, "temperature": 1.0, "top_p": 0.9}
    generation = {"heldout_prompts": 2, "prompts": ["List files."], **options}
    models = {"base": world.model, "even": even}
    result, out = evaluate(models, tmp_path, {"generation": generation, "heldout_chats": 5}, chats=world.chats)
    rows = list(read_rows(out / "generations.jsonl"))
    chats = list(read_rows(world.chats / "heldout.jsonl"))
    assert [row["prompt"] for row in rows[:2]] == [chat["messages"][:-1] for chat in chats[:2]]
    assert [row["reference"] for row in rows] == [chat["messages"][-1]["content"] for chat in chats[:2]] + [None]
    assert rows[2]["prompt"] == [{"role": "user", "content": "List files."}]
    for name, folder in models.items():
        model, tokenizer = load(folder), load_tokenizer(folder)
        replies = [
            write_reply(model, tokenizer, row["prompt"], position=index, **options)  # type: ignore[arg-type]
            for index, row in enumerate(rows)
        ]
        found = [row["replies"][name] for row in rows]
        assert found == [{"text": r.text, "tokens": r.num_tokens, "truncated": r.truncated} for r in replies]
        assert result.metrics[f"truncated_replies.{name}"] == sum(r.truncated for r in replies) / 3
        assert replies[0].text in (out / "report.md").read_text()


def test_a_row_that_one_model_cannot_read_is_left_out_for_all(world: TinyWorld, even: Path, tmp_path: Path) -> None:
    """The second model reads 40 tokens: only chats of at most that count, for both."""
    small = reading_less(even, tmp_path / "small", 40)
    tokenizer = load_tokenizer(even)
    chats = list(read_rows(world.chats / "heldout.jsonl"))
    fitting = [chat for chat in chats if len(encode_chat(tokenizer, chat["messages"]).input_ids) <= 40]
    assert 0 < len(fitting) < len(chats)
    _, out = evaluate({"base": world.model, "small": small}, tmp_path / "both", chats=world.chats)
    report = json.loads((out / "report.json").read_text())
    assert report["rows"]["chats"] == {"used": len(fitting), "left_out": len(chats) - len(fitting)}
    alone, _ = evaluate(
        {"base": world.model}, tmp_path / "alone", chats=write_split(tmp_path / "fitting", fitting, len(fitting))
    )
    both = report["models"]["base"]["measures"]["heldout_assistant_loss"]
    assert both == pytest.approx(alone.metrics["heldout_assistant_loss.base"])
    with pytest.raises(DataError, match=r"blocks of inputs\.tokens have 64 tokens, and the model takes 40"):
        evaluate({"small": small}, tmp_path / "blocks", tokens=world.tokens)


def test_reward_models_are_judged_on_the_same_pairs(world: TinyWorld, rewarding: Path, tmp_path: Path) -> None:
    from stages.lib.preferring.reward_models import load_reward_model, score_chats

    inputs = {"preferences": world.preferences, "reward_models.judge": rewarding}
    result, out = evaluate({"base": world.model}, tmp_path / "report", **inputs)
    rows = list(read_rows(world.preferences / "heldout.jsonl"))
    model, tokenizer = load_reward_model(rewarding)
    chosen, rejected = (
        score_chats(model, tokenizer, [[*row["prompt"], *row[side]] for row in rows]) for side in ("chosen", "rejected")
    )
    accuracy = sum(a > b for a, b in zip(chosen, rejected, strict=True)) / len(rows)
    margin = sum(a - b for a, b in zip(chosen, rejected, strict=True)) / len(rows)
    assert result.metrics["heldout_reward_accuracy.judge"] == accuracy
    assert result.metrics["heldout_reward_margin.judge"] == pytest.approx(margin, rel=1e-4, abs=1e-6)
    assert "heldout_reward_accuracy.base" not in result.metrics
    longer = sum(
        sum(len(m["content"]) for m in row["chosen"]) > sum(len(m["content"]) for m in row["rejected"]) for row in rows
    )
    assert result.metrics["heldout_preference_accuracy_longer"] == pytest.approx(longer / len(rows), abs=1 / len(rows))
    assert "## Reward models" in (out / "report.md").read_text()


def test_reward_models_score_the_replies_of_all_models(
    world: TinyWorld, even: Path, rewarding: Path, rewarding_otherwise: Path, tmp_path: Path
) -> None:
    """The oracle scores each chat by itself, in the template and tokens of the reward model. Win rates are counted by hand;
    base and its twin draw the same replies, which tie, also in the last bits."""
    from stages.lib.preferring.reward_models import load_reward_model, score_chats

    models = {"even": even, "base": world.model, "twin": world.model}
    judges = {"own": rewarding, "other": rewarding_otherwise}
    params = {"heldout_prompts": 9, "max_new_tokens": 12, "win_rate_against": "base"}
    inputs = {"chats": world.chats, **{f"reward_models.{name}": folder for name, folder in judges.items()}}
    result, out = evaluate(models, tmp_path, {"scored_replies": params, "heldout_chats": 2}, **inputs)
    rows = list(read_rows(out / "scored_replies.jsonl"))
    chats = [chat["messages"] for chat in read_rows(world.chats / "heldout.jsonl")][:9]
    assert [row["prompt"] for row in rows] == [messages[:-1] for messages in chats]
    assert [row["reference"]["text"] for row in rows] == [messages[-1]["content"] for messages in chats]
    written = {name: [row["replies"][name] for row in rows] for name in models}
    assert [each["text"] for each in written["base"]] == [each["text"] for each in written["twin"]]
    assert written["base"] != written["even"]

    expected = {}
    for judge, folder in judges.items():
        model, tokenizer = load_reward_model(folder)
        scores = {}
        for name, replies in {"reference": [row["reference"] for row in rows], **written}.items():
            said = [{"role": "assistant", "content": reply["text"]} for reply in replies]
            alone = score_chats(
                model, tokenizer, [[*row["prompt"], each] for row, each in zip(rows, said, strict=True)]
            )
            scores[name] = [reply["scores"][judge] for reply in replies]
            assert scores[name] == pytest.approx(alone, rel=1e-4, abs=1e-5)
        for name in models:
            expected[f"heldout_reward.{judge}.{name}"] = sum(scores[name]) / 9
            expected[f"heldout_reward_deviation.{judge}.{name}"] = statistics.pstdev(scores[name])
        won = [(a > b) + (a == b) / 2 for a, b in zip(scores["even"], scores["base"], strict=True)]
        expected[f"heldout_reward_win_rate.{judge}.even"] = sum(won) / 9
        expected[f"heldout_reward_win_rate.{judge}.twin"] = 0.5
        expected[f"heldout_reward_reference.{judge}"] = sum(scores["reference"]) / 9
    for name, replies in written.items():
        expected[f"heldout_reply_tokens.{name}"] = sum(reply["tokens"] for reply in replies) / 9
        expected[f"heldout_truncated_replies.{name}"] = sum(reply["truncated"] for reply in replies) / 9
    found = {name: value for name, value in result.metrics.items() if "reward" in name or "repl" in name}
    assert found == pytest.approx(expected)
    assert len(set(scores["base"])) == 9

    lines = (out / "report.md").read_text().splitlines()
    tables = [index for index, line in enumerate(lines) if line.startswith("### Reward model ")]
    assert [lines[index] for index in tables] == ["### Reward model own", "### Reward model other"]
    for judge, index in zip(judges, tables, strict=True):
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[index + 2 : index + 8]]
        assert [line[0] for line in cells] == ["", "-" * len("(held out)"), *models, "(held out)"]
        reward, share = (
            result.metrics[f"{name}.{judge}.even"] for name in ("heldout_reward", "heldout_reward_win_rate")
        )
        assert [cells[2][1], cells[2][3]] == [f"{reward:.4g}", f"{share:.4g}"]
        assert [cells[3][3], cells[5][4]] == ["-", "-"]
    shown = f"#### even: own {rows[0]['replies']['even']['scores']['own']:.4g}, other"
    assert any(line.startswith(shown) for line in lines)


def test_prompts_without_room_or_reader_are_left_out_for_all(
    world: TinyWorld, even: Path, rewarding: Path, tmp_path: Path
) -> None:
    """One model reads 45 tokens: prompts of at most 35 leave room for the 10 of a reply. The reward model reads 46: those
    count to which all replies are so short with the prompt, and the held-out one is. What is left gets the same replies."""
    inputs = {"chats": world.chats, "reward_models.judge": rewarding}
    params = {"scored_replies": {"heldout_prompts": 40, "max_new_tokens": 10}}
    _, out = evaluate({"base": world.model, "even": even}, tmp_path / "all", params, **inputs)
    rows = list(read_rows(out / "scored_replies.jsonl"))
    assert len(rows) == 40

    short = reading_less(even, tmp_path / "short", 45)
    inputs["reward_models.judge"] = reading_less(rewarding, tmp_path / "judge", 46)
    result, out = evaluate({"base": world.model, "even": short}, tmp_path / "some", params, **inputs)
    tokenizer = load_tokenizer(world.model)
    with_room = [row for row in rows if len(encode_prompt(tokenizer, row["prompt"])) <= 35]
    read = [
        row
        for row in with_room
        for said in [[reply["text"] for reply in (row["reference"], *row["replies"].values())]]
        if max(len(encode_chat(tokenizer, answered(row["prompt"], text)).input_ids) for text in said) <= 46
    ]
    assert 1 < len(read) < len(with_room) < 40
    left_out = {"no_room_for_reply": 40 - len(with_room), "unread_by_reward_model": len(with_room) - len(read)}
    report = json.loads((out / "report.json").read_text())
    assert report["rows"]["scored_replies"] == {"used": len(read), "left_out": left_out}
    kept = list(read_rows(out / "scored_replies.jsonl"))
    assert [(row["prompt"], row["replies"]["base"]["text"]) for row in kept] == [
        (row["prompt"], row["replies"]["base"]["text"]) for row in read
    ]
    mean = sum(row["replies"]["base"]["scores"]["judge"] for row in read) / len(read)
    assert result.metrics["heldout_reward.base"] == pytest.approx(mean, rel=1e-4, abs=1e-5)

    inputs["reward_models.judge"] = reading_less(rewarding, tmp_path / "blind", 10)
    with pytest.raises(DataError, match="none of its 40 held-out rows fits all models"):
        evaluate({"base": world.model}, tmp_path / "none", params, **inputs)


def test_a_reply_that_spells_special_tokens_is_scored_as_text(world: TinyWorld, rewarding: Path) -> None:
    """As text the end of a turn is several tokens. Equal replies get one score: of three in batches of two, one would be
    alone or with others, padded or not, which shows in the last bits."""
    from stages.lib.measuring.compared_models import Subject
    from stages.lib.measuring.scored_replies import HeldoutPrompt, ScoredReplies
    from stages.lib.preferring.reward_models import PLAIN, load_reward_model, score_chats

    prompt = [{"role": "user", "content": "Say it."}]
    texts = ["a<|end|><|user|>b", "a", "It was a longer reply."]
    scored = ScoredReplies(prompts=[HeldoutPrompt(index, prompt, text) for index, text in enumerate(texts)])
    scored.replies = {name: [{"text": text} for text in texts] for name in ("same", "twin")}
    model, tokenizer = load_reward_model(rewarding)
    judge = Subject.open("judge", rewarding)
    judge.reading = PLAIN
    scores: Any = scored.score(model, judge, 2)
    alone = score_chats(model, tokenizer, [answered(prompt, text) for text in texts])
    assert scores["reference"] == pytest.approx(alone, rel=1e-4, abs=1e-5)
    assert scores["models"]["same"] == scores["models"]["twin"] == scores["reference"]


def test_what_scores_come_to_by_hand() -> None:
    """Scores 1, 3, 5 and -1 have the mean 2 and the deviation sqrt(20 / 4). Against 0, 3, 6 and 0 they win, tie, lose and
    lose: 1.5 of 4. Only with several reward models does a metric say which one."""
    from stages.lib.measuring.scored_replies import measures_under, metrics_of

    found = {"reference": [0.0, 3.0, 6.0, 0.0], "models": {"chat": [1.0, 3.0, 5.0, -1.0]}}
    under = measures_under(found, None)
    metrics = metrics_of({"replies": {}, "reward_models": {"judge": under}})
    assert metrics == pytest.approx(
        {
            "heldout_reward.chat": 2.0,
            "heldout_reward_reference.judge": 2.25,
            "heldout_reward_deviation.chat": math.sqrt(5),
            "heldout_reward_win_rate.chat": 0.375,
        }
    )
    several = metrics_of({"replies": {}, "reward_models": {"judge": under, "other": under}})
    assert {name for name in several if name.startswith("heldout_reward.")} == {
        "heldout_reward.judge.chat",
        "heldout_reward.other.chat",
    }
    assert set(measures_under(found, "chat")["models"]["chat"]) == {"heldout_reward", "heldout_reward_deviation"}
    assert measures_under(found, "chat")["reference"]["heldout_reward_win_rate"] == 0.625


def test_a_restart_measures_no_model_twice(
    world: TinyWorld, even: Path, rewarding: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    models = {"base": world.model, "even": even}
    params = {
        "heldout_blocks": 2,
        "generation": {"heldout_prompts": 0, "prompts": ["a"], "max_new_tokens": 3},
        "scored_replies": {"heldout_prompts": 2, "max_new_tokens": 3},
    }
    inputs = {"tokens": world.tokens, "chats": world.chats, "reward_models.judge": rewarding}
    first, out = evaluate(models, tmp_path, params, **inputs)
    written = {path.name: path.read_bytes() for path in out.iterdir()}
    shutil.rmtree(out)
    (tmp_path / "measured-model-even.json").unlink()
    loaded = []
    from stages.lib.measuring import compared_models
    from stages.lib.preferring import reward_models

    original = compared_models.load_language_model

    def load_and_tell(folder: Path, device: str) -> Any:
        loaded.append(folder)
        return original(folder, device)

    monkeypatch.setattr(compared_models, "load_language_model", load_and_tell)
    monkeypatch.setattr(reward_models, "load_reward_model", lambda *args: pytest.fail("its scores are there"))
    second, out = evaluate(models, tmp_path, params, **inputs)
    assert loaded == [even]
    assert second == first
    assert {path.name: path.read_bytes() for path in out.iterdir()} == written


def problems(roles: list[str], **params: Any) -> list[str]:
    known = {role: Estimate() for role in ["models.base", *roles]}
    return [str(problem) for problem in STAGE.check(Forecast(EvaluateParams(**params), Resources(), known))]


def test_plan_refuses_options_that_nothing_would_use() -> None:
    assert problems(["tokens"]) == []
    assert problems(["chats"], generation={"max_new_tokens": 3}) == []
    assert problems([], generation={"heldout_prompts": 0, "prompts": ["a"]}) == []
    assert "there is nothing to measure on" in problems([])[0]
    assert "params.heldout_chats: has no effect without the input chats" in problems(["tokens"], heldout_chats=3)[0]
    assert "are judged by preferences" in problems(["tokens", "reward_models.a"])[0]
    assert "are taken from the input chats" in problems(["tokens"], generation={})[0]
    assert "has no prompts" in problems(["tokens"], generation={"heldout_prompts": 0})[0]
    scored = problems(["tokens"], scored_replies={"win_rate_against": "bse"})
    assert "params.scored_replies: answer prompts of the input chats" in scored[0]
    assert "params.scored_replies: are scored by the input reward_models" in scored[1]
    assert "win_rate_against: 'bse' is none of inputs.models and inputs.adapters. Did you mean 'base'?" in scored[2]
    assert problems(["chats", "reward_models.a"], scored_replies={"win_rate_against": "base"}) == []
