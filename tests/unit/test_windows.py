from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertTokenizerFast, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pipeline.errors import ArtifactError, DataError
from stages.lib.encoding.answering import (
    Answer,
    Question,
    ReadingObjective,
    answer_text,
    best_answers,
    mean_units,
    random_answer,
    read_question,
    span_of_units,
)
from stages.lib.formulas.metrics import answer_exact_match, answer_f1, units
from stages.lib.text.frames import Frame, encode, frame_of, open_tokenizer, require_frame
from stages.lib.text.windows import cut_places, owned, windows_of
from tests.rows import chinese_questions

WORDS = "who is the king of spain ? felipe rules since 2014 and lives in madrid .".split()


@pytest.fixture(scope="module")
def chinese() -> PreTrainedTokenizerBase:
    """Each character that the project's own questions use is a token, as in BERT's Chinese vocabulary."""
    characters = {character for row in chinese_questions(60) for character in row["context"] + row["question"]}
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "1963", "\u4e2d", "\u5e74", *sorted(characters)]
    return BertTokenizerFast(vocab={name: place for place, name in enumerate(names)}, do_lower_case=False)


def word_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """One token a word, and nothing put around texts."""
    names = ["<pad>", "<unk>", "<s>", "</s>", "[CLS]", "[SEP]", *WORDS]
    core = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", pad_token="<pad>", **special)


def test_a_sample_shaped_like_the_first_of_cmrc_is_cut_and_labelled_as_published(
    chinese: PreTrainedTokenizerBase,
) -> None:
    """The published sample has 15 tokens of question, 749 of context, and its answer, 1963 and a sign, at 30 and 31.

    [CLS] + 15 + [SEP] = 17 places stand before the context, so that the answer is at 17 + 30 = 47 and 48. A window of
    300 holds 300 - 18 = 282 tokens of context and the next begins 282 - 50 = 232 further on: 749 tokens need
    1 + ceil((749 - 282) / 232) = 4. The second begins at token 232, past the answer: (0, 0), as do the others.
    """
    question = "\u8c01\u5728\u5b66\u6821" + "\u4e2d" * 11
    context = "\u4e2d" * 30 + "1963\u5e74" + "\u4e2d" * (749 - 32)
    assert (len(chinese.tokenize(question)), len(chinese.tokenize(context))) == (15, 749)
    row = {"id": "0", "context": context, "question": question, "answers": [{"start": 30, "text": "1963\u5e74"}]}
    frame = require_frame(chinese, pair=True)
    cut_up = read_question(row, chinese, frame, max_length=300, stride=50, max_question=64)
    assert cut_up.labels == [(47, 48), (0, 0), (0, 0), (0, 0)]
    asked = chinese.convert_tokens_to_ids(["[CLS]", *question, "[SEP]"])
    assert cut_up.windows[0].ids[:17] == asked and chinese.unk_token_id not in asked
    assert [len(window.ids) for window in cut_up.windows] == [300, 300, 300, 749 - 3 * 232 + 18]
    assert chinese.decode(cut_up.windows[0].ids[47:49]) == "1963 \u5e74"


def test_windows_are_those_of_the_tokenizer(chinese: PreTrainedTokenizerBase) -> None:
    """Paragraphs of about 50 to 280 characters, beside questions of about 10, in windows of 100 that share 30."""
    frame = require_frame(chinese, pair=True)
    several = 0
    for row in chinese_questions(60):
        context, question = (encode(chinese, row[part])[0] for part in ("context", "question"))
        windows = windows_of(frame, context, 100, 30, question)
        assert_cut_like_the_tokenizer(chinese, row["question"], row["context"], windows, max_length=100, stride=30)
        several += len(windows) > 1
    assert 20 < several < 60


@pytest.mark.slow
def test_cmrc_dev_is_cut_into_as_many_windows_as_published(shared_data: Path) -> None:
    chinese = BertTokenizerFast(vocab=str(shared_data / "vocab" / "bert_base_chinese_vocab.txt"), do_lower_case=False)
    frame = require_frame(chinese, pair=True)
    questions = windows = 0
    for article in json.loads((shared_data / "encoder" / "cmrc2018_dev.json").read_text(encoding="utf-8"))["data"]:
        for paragraph in article["paragraphs"]:
            context, _ = encode(chinese, paragraph["context"])
            for asked in paragraph["qas"]:
                question, _ = encode(chinese, asked["question"])
                cut_up = windows_of(frame, context, 384, 128, question)
                questions += 1
                windows += len(cut_up)
                if questions % 50 == 1:
                    texts = (asked["question"], paragraph["context"])
                    assert_cut_like_the_tokenizer(chinese, *texts, cut_up, max_length=384, stride=128)
    assert (questions, windows) == (3219, 6254)


def assert_cut_like_the_tokenizer(
    tokenizer: PreTrainedTokenizerBase, question: str, context: str, windows: list, *, max_length: int, stride: int
) -> None:
    encoded = tokenizer(
        question,
        context,
        max_length=max_length,
        stride=stride,
        truncation="only_second",
        return_overflowing_tokens=True,
    )
    assert encoded["input_ids"] == [window.ids for window in windows]
    assert encoded["token_type_ids"] == [window.type_ids for window in windows]


def test_cut_shares_the_stride_and_stops_at_the_end() -> None:
    assert cut_places(10, 10, 3) == [(0, 10)]
    assert cut_places(11, 10, 3) == [(0, 10), (7, 11)]
    assert cut_places(24, 10, 3) == [(0, 10), (7, 17), (14, 24)]
    assert cut_places(0, 10, 3) == [(0, 0)]


def test_cut_refuses_a_stride_that_does_not_move_on() -> None:
    with pytest.raises(DataError, match=r"stride_tokens: 5 tokens are shared between windows that have room for 5"):
        cut_places(10, 5, 5)


def test_every_token_has_one_owner_that_sees_most_around_it() -> None:
    """Tokens 7, 8, 9 lie in both windows. Token 8 has 8 before it on the left and 8 after it on the right; 7 has more
    after it on the left (2) than before it on the right (0), and so on."""
    windows = windows_of(Frame([1], [], [2]), range(17), max_length=12, stride=3)
    assert [(window.start, window.size) for window in windows] == [(0, 10), (7, 10)]
    assert owned(windows) == [(0, 9), (9, 17)]


def test_a_tokenizer_for_language_models_gets_a_frame_that_survives_saving(tmp_path: Path) -> None:
    word_tokenizer(bos_token="<s>", eos_token="</s>", add_bos_token=False, add_eos_token=False).save_pretrained(
        tmp_path
    )
    tokenizer = open_tokenizer(tmp_path, 12)
    tokenizer.save_pretrained(tmp_path / "out")
    reloaded = open_tokenizer(tmp_path / "out", 12)
    for each in (tokenizer, reloaded):
        assert frame_of(each, pair=False) == Frame([2], [], [3])
        assert frame_of(each, pair=True) == Frame([2], [3], [3])
    words = reloaded.convert_ids_to_tokens(reloaded("who rules ?", "felipe rules")["input_ids"])
    assert words == ["<s>", "who", "rules", "?", "</s>", "felipe", "rules", "</s>"]
    assert reloaded.model_max_length == 12


def test_the_frame_that_a_tokenizer_has_is_kept(tmp_path: Path) -> None:
    vocabulary = {name: number for number, name in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"])}
    BertTokenizerFast(vocab=vocabulary).save_pretrained(tmp_path)
    assert require_frame(open_tokenizer(tmp_path, 8), pair=True) == Frame([2], [3], [3])


def test_a_tokenizer_without_start_token_is_refused(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(eos_token="</s>")
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ArtifactError, match="without a token to begin a text with"):
        open_tokenizer(tmp_path, 12)


CONTEXT = "felipe is the king of spain since 2014 and lives in madrid ."
"""Tokens 0 to 12; `king of spain` are 3 to 5, `2014` is 7, `madrid` is 11."""


def question_of(answer: str | None, *, max_length: int = 12, stride: int = 3, max_question: int = 8) -> Question:
    """Windows of `<s> who rules spain ? </s>` (6 ids), 12 - 6 - 1 = 5 tokens of context, `</s>`: from 0, 2, 4, 6, 8."""
    tokenizer = word_tokenizer()
    answers = [] if answer is None else [{"start": CONTEXT.index(answer), "text": answer}]
    row = {"context": CONTEXT, "question": "who rules spain ?", "answers": answers}
    frame = Frame([2], [3], [3])
    return read_question(row, tokenizer, frame, max_length=max_length, stride=stride, max_question=max_question)


def test_labels_are_where_a_window_holds_the_whole_answer() -> None:
    """Windows of 5 tokens from 0, 2, 4, 6, 8, their context at position 6. `king of spain`, tokens 3 to 5: only the
    window 2..6 holds it, at 6 + 3 - 2 = 7 to 9. `2014`, token 7: windows 4..8 at 9 and 6..10 at 7."""
    assert [window.start for window in question_of(None).windows] == [0, 2, 4, 6, 8]
    assert question_of("king of spain").labels == [(0, 0), (7, 9), (0, 0), (0, 0), (0, 0)]
    assert question_of("2014").labels == [(0, 0), (0, 0), (9, 9), (7, 7), (0, 0)]
    assert not any(question_of("king of spain since 2014 and").has_answer)
    assert question_of(None).labels == [(0, 0)] * 5


def test_a_long_question_loses_its_end_and_says_so() -> None:
    question = question_of("2014", max_question=2)
    assert question.shortened
    assert question.windows[0].ids[:4] == [2, 6, 14, 3]
    assert not question_of("2014", max_question=4).shortened


def scored(question: Question, scores: dict[int, tuple[float, float]], nothing: list[float]) -> tuple[list, list]:
    """Start and end logits: `scores` per token of the context, half of `nothing` at each window's first position."""
    starts, ends = [], []
    for window, score in zip(question.windows, nothing, strict=True):
        pair = torch.full((2, len(window.ids)), -10.0)
        pair[:, 0] = score / 2
        for token, values in scores.items():
            if window.start <= token < window.start + window.size:
                pair[:, window.first + token - window.start] = torch.tensor(values)
        starts.append(pair[0])
        ends.append(pair[1])
    return starts, ends


def test_the_best_answer_is_sought_over_all_windows() -> None:
    """Start: token 3 has 5, token 7 has 4. End: token 5 has 3, token 7 has 2, all others -10. Within one window are (3, 5)
    with 5 + 3 = 8, (7, 7) with 6, (5, 7) with -8; (3, 7) would have 7 and lies in the window 2..6 or 4..8 only in part."""
    question = question_of(None)
    starts, ends = scored(question, {3: (5.0, -10.0), 5: (-10.0, 3.0), 7: (4.0, 2.0)}, [2, 1, 0, 3, 4])
    answers, nothing = best_answers(question, starts, ends, n_best=2, max_tokens=5)
    king = CONTEXT.index("king")
    assert answers == [Answer(king, king + len("king of spain"), 8.0), Answer(CONTEXT.index("2014"), 38, 6.0)]
    assert nothing == 0
    assert answer_text(question, answers, nothing, None) == "king of spain"


def test_an_answer_has_at_most_so_many_tokens_and_does_not_end_before_it_starts() -> None:
    """(3, 5) takes three tokens. With two at most, 2014 alone (6) is best; 5 to 3 would be backwards."""
    question = question_of(None)
    starts, ends = scored(question, {3: (5.0, -10.0), 5: (9.0, 3.0), 7: (4.0, 2.0)}, [0] * 5)
    answers, _ = best_answers(question, starts, ends, n_best=20, max_tokens=2)
    texts = [CONTEXT[answer.start : answer.end] for answer in answers]
    assert texts[:2] == ["spain", "2014"]
    assert all(1 <= len(text.split()) <= 2 for text in texts)


def test_no_answer_must_beat_the_best_by_the_threshold_in_every_window() -> None:
    """The best answer has 6. Nothing has 8 where it is lowest, so it wins by 2."""
    question = question_of(None)
    starts, ends = scored(question, {7: (4.0, 2.0)}, [9, 8, 9, 9, 9])
    answers, nothing = best_answers(question, starts, ends, n_best=1, max_tokens=5)
    assert nothing - answers[0].score == 2
    assert answer_text(question, answers, nothing, 1.9) == ""
    assert answer_text(question, answers, nothing, 2.0) == "2014"
    assert answer_text(question, answers, nothing, None) == "2014"


def test_an_empty_context_has_no_answer() -> None:
    tokenizer = word_tokenizer()
    row = {"context": "", "question": "who", "answers": []}
    question = read_question(row, tokenizer, Frame([2], [3], [3]), max_length=12, stride=3, max_question=4)
    answers, nothing = best_answers(question, [torch.zeros(4)], [torch.ones(4)], n_best=3, max_tokens=5)
    assert (answers, nothing) == ([], 1.0)
    assert answer_text(question, answers, nothing, None) == ""


def test_scores_of_english_are_by_word() -> None:
    """`the King of Spain!` and `king` share one unit: 2 * 1 / (3 + 1)."""
    assert units("The King, of  Spain!") == ["king", "of", "spain"]
    assert answer_exact_match("the King of Spain!", ["king of spain"]) == 1
    assert answer_f1("the King of Spain!", ["king"]) == pytest.approx(0.5)
    assert answer_exact_match("king", ["the king of spain"]) == 0
    assert answer_f1("felipe", ["madrid"]) == 0


def test_scores_of_chinese_are_by_character() -> None:
    """1963 + year and 1963 + year + month share 2 units: 2 * 2 / (2 + 3)."""
    assert units("1963\u5e74\u3002") == ["1963", "\u5e74"]
    assert answer_f1("1963\u5e74", ["1963\u5e74\u6708"]) == pytest.approx(4 / 5)
    assert answer_exact_match("1963 \u5e74", ["1963\u5e74"]) == 1


def test_the_best_reference_counts_and_none_wants_an_empty_answer() -> None:
    assert answer_exact_match("madrid", ["spain", "madrid"]) == 1
    assert answer_f1("in madrid", ["spain", "madrid"]) == pytest.approx(2 / 3)
    assert (answer_exact_match("", []), answer_f1("", [])) == (1, 1)
    assert (answer_exact_match("madrid", []), answer_f1("madrid", [])) == (0, 0)
    assert (answer_exact_match("", ["madrid"]), answer_f1("", ["madrid"])) == (0, 0)


def test_an_answer_of_punctuation_alone_is_not_empty() -> None:
    assert units("()") == ["()"]
    assert (answer_exact_match("", ["()"]), answer_exact_match("()", ["()"])) == (0, 1)


def test_chance_takes_as_many_units_as_answers_usually_have() -> None:
    assert mean_units(["a b c", "a"]) == 2
    assert span_of_units("one  two three", 0, 2) == "one  two"
    drawn = {random_answer("one two three", 2, str(seed)) for seed in range(40)}
    assert drawn == {"one two", "two three"}
    assert random_answer("one", 2, "0") == "one"
    assert random_answer("", 2, "0") == ""


def test_the_loss_of_a_window_does_not_depend_on_how_long_its_neighbours_are() -> None:
    """Three positions with logits 0: p = 1/3 each for start and end, so the loss is log 3. With two more of padding it
    would be log 5 if padding were a position."""

    def model(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        zeros = torch.zeros(input_ids.shape)
        return SimpleNamespace(start_logits=zeros, end_logits=zeros)

    batch = {
        "input_ids": torch.zeros(1, 5, dtype=torch.long),
        "attention_mask": torch.tensor([[1, 1, 1, 0, 0]]),
        "start": torch.tensor([1]),
        "end": torch.tensor([2]),
    }
    assert ReadingObjective().loss_sum(model, batch).item() == pytest.approx(torch.log(torch.tensor(3.0)).item())
