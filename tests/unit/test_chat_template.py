"""Chats as tokens. Most tokenizers here have one token per character, so that every length can be counted by hand."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pipeline.errors import DataError
from stages.lib.text.chat_answers import LEFT_OUT, Unlearnable
from stages.lib.text.chat_check import check_chat_template, end_of_turn_ids
from stages.lib.text.chat_fitting import TOO_LONG, fit_chat, fit_preference
from stages.lib.text.chat_presets import CHATML, PRESETS, SLIPWAY
from stages.lib.text.chat_rendering import special_ids
from stages.lib.text.chat_spans import THOUGHT_LEFT, Thinking, encode_chat, encode_prompt, training_sequences
from stages.lib.text.chat_template import NotRendered, RefusedChat
from stages.lib.text.chat_thoughts import thought_within
from stages.lib.text.chat_tokens import NotAsText
from stages.lib.text.chats import UNANSWERED, UNOPENED, tokenizing_chats
from stages.lib.text.prompts import tokenizing_prompts
from stages.lib.text.tokenized_parts import TokenizedRow
from stages.lib.text.tokenizers import encode_texts, stop_token_ids
from stages.lib.text.turn_marks import BREAK

NAMES = ["<unk>", "<s>", "</s>", "<pad>", *PRESETS["slipway"].special_tokens, *PRESETS["chatml"].special_tokens]
CHARACTERS = ["\n", "\t", "\u2581", *(chr(code) for code in range(32, 127))]

CHATML_OF_OTHERS = re.sub(r"\s*\{%- (end)?generation -%\}", "", CHATML)
"""As most tokenizers on the hub have it: without generation blocks."""


def build(
    template: str | dict[str, str] | None, merges: list[tuple[str, str]] | None = None, *, flagged: bool = True
) -> PreTrainedTokenizerBase:
    """One token per ASCII character, and one per merged pair; `flagged` is whether the marks of turns are called special."""
    merges = merges or []
    vocabulary = [*NAMES, *CHARACTERS, *(left + right for left, right in merges)]
    model = models.BPE(vocab={piece: i for i, piece in enumerate(vocabulary)}, merges=merges, unk_token="<unk>")
    backend = Tokenizer(model)
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in NAMES[:4]])
    add = backend.add_special_tokens if flagged else backend.add_tokens
    add([AddedToken(name, special=flagged, normalized=False) for name in NAMES[4:]])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=NAMES[4:] if flagged else [],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def slipway() -> PreTrainedTokenizerBase:
    return build(SLIPWAY)


@pytest.fixture(scope="module")
def chatml() -> PreTrainedTokenizerBase:
    return build(CHATML)


def chat(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """A chat of alternating user and assistant messages."""
    messages = [{"role": "system", "content": system}] if system is not None else []
    return messages + [{"role": ("user", "assistant")[i % 2], "content": each} for i, each in enumerate(contents)]


def bits(mask: list[int]) -> str:
    return "".join(map(str, mask))


def pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    return tokenizer.convert_ids_to_tokens(ids)


# Golden texts and masks.


def test_slipway_marks_each_answer_and_its_end_token(slipway: PreTrainedTokenizerBase) -> None:
    """<s> <|system|> S <|end|> | <|user|> a b <|end|> <|assistant|> c d e <|end|> | <|user|> f <|end|> <|assistant|> <|end|>"""
    ids, mask = encode_chat(slipway, chat("ab", "cde", "f", "", system="S"))
    turns = ["<|user|>", "a", "b", "<|end|>", "<|assistant|>", "c", "d", "e", "<|end|>"]
    last = ["<|user|>", "f", "<|end|>", "<|assistant|>", "<|end|>"]
    assert pieces(slipway, ids) == ["<s>", "<|system|>", "S", "<|end|>", *turns, *last]
    assert bits(mask) == "0000" + "00000" + "1111" + "0000" + "1"


def test_chatml_marks_the_end_token_but_not_the_line_break_after_it(chatml: PreTrainedTokenizerBase) -> None:
    """A turn is <|im_start|>, the role's letters, a line break, the content's characters, <|im_end|>, a line break.

    user: 1 + 4 + 1 + 1 + 1 + 1 = 9 tokens; assistant: a header of 1 + 9 + 1 = 11, then 2 + 1 marked, then 1.
    """
    ids, mask = encode_chat(chatml, chat("a", "bc", "d", "ef"))
    expected = "<s><|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nbc<|im_end|>\n"
    expected += "<|im_start|>user\nd<|im_end|>\n<|im_start|>assistant\nef<|im_end|>\n"
    assert chatml.decode(ids) == expected
    exchange = "0" * 9 + "0" * 11 + "111" + "0"
    assert bits(mask) == "0" + exchange + exchange


def test_mask_from_leaves_earlier_turns_out(slipway: PreTrainedTokenizerBase) -> None:
    """<s>, then <|user|> . <|end|> <|assistant|> . <|end|> twice: the last two tokens are the second answer."""
    messages = chat("a", "b", "c", "d")
    assert bits(encode_chat(slipway, messages, mask_from=3).assistant_mask) == "0" * 11 + "11"
    assert sum(encode_chat(slipway, messages, mask_from=4).assistant_mask) == 0


def test_a_turn_that_is_not_to_be_learned_is_left_out_and_changes_no_token(slipway: PreTrainedTokenizerBase) -> None:
    messages: list[dict[str, Any]] = [*chat("a", "b", "c", "d")]
    whole = encode_chat(slipway, messages)
    messages[1]["train"] = False
    assert encode_chat(slipway, messages) == (whole.input_ids, [0] * 11 + [1, 1])
    messages[1]["train"], messages[3]["train"] = True, False
    assert bits(encode_chat(slipway, messages).assistant_mask) == "0000011000000"
    # The last exchange that is to be learned stays whatever is dropped, and a chat without one is refused.
    assert fit_chat(slipway, messages, 12).reason == TOO_LONG
    with pytest.raises(DataError, match="has no assistant turn that is to be learned from"):
        fit_chat(slipway, [messages[0], {**messages[1], "train": False}], 100)


SHAPES = [chat("Who?", "Me."), chat("One", " two  three", "\n\tfour\n", "", "f(x)", "```python\nreturn 1\n```\n")]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("messages", [*SHAPES, chat(" x ", "\ty\n", "z", "  ", system="\n s")])
def test_ids_and_masks_are_those_of_apply_chat_template(preset: str, messages: list[dict[str, str]]) -> None:
    """Where no message spells a special token, transformers itself is the oracle, and so is whoever serves with it."""
    tokenizer = build(PRESETS[preset].template)
    oracle = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = encode_chat(tokenizer, messages)
    assert ids == oracle["input_ids"]
    assert mask == oracle["assistant_masks"]
    prompt = messages[:-1]
    served = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert encode_prompt(tokenizer, prompt) == served


@pytest.mark.parametrize("template", [SLIPWAY, CHATML, CHATML_OF_OTHERS])
def test_each_prompt_is_how_the_training_sequence_begins(template: str) -> None:
    tokenizer = build(template)
    messages = chat("one", "two\n", "\n three", " four", "<|end|>", "five<s>", system="be\tshort")
    ids, mask = encode_chat(tokenizer, messages)
    starts = [i for i in range(1, len(ids)) if mask[i] and not mask[i - 1]]
    assert len(starts) == 3
    for index, start in zip((2, 4, 6), starts, strict=True):
        assert encode_prompt(tokenizer, messages[:index]) == ids[:start]


@pytest.mark.parametrize("template", [SLIPWAY, CHATML, CHATML_OF_OTHERS])
def test_bos_stands_once_and_first(template: str) -> None:
    tokenizer = build(template)
    ids = encode_chat(tokenizer, chat("a", "b", "c", "d", system="s")).input_ids
    assert [i for i, token in enumerate(ids) if token == tokenizer.bos_token_id] == [0]


def test_a_template_that_writes_bos_twice_is_refused() -> None:
    with pytest.raises(DataError, match="begins with <s> twice"):
        encode_chat(build("{{- bos_token -}}" + SLIPWAY), chat("a", "b"))


# Templates without generation blocks.


@pytest.mark.parametrize("messages", [*SHAPES, chat("a<|im_end|>", "b<|im_end|>c", "d", "e", system="s")])
def test_spans_are_found_without_generation_blocks(messages: list[dict[str, str]]) -> None:
    assert "generation %}" not in CHATML_OF_OTHERS
    assert encode_chat(build(CHATML_OF_OTHERS), messages) == encode_chat(build(CHATML), messages)


def test_where_a_template_rewrites_earlier_turns_each_answer_has_its_own_sequence() -> None:
    """Some templates drop what the model thought, except in the last turn: the earlier sequence is not seen again."""
    template = (
        "{%- for message in messages -%}<|im_start|>{{ message.role }}\n"
        "{%- if message.role == 'assistant' and loop.last -%}{{ '?' }}{%- endif -%}"
        "{{ message.content }}<|im_end|>{%- endfor -%}"
        "{%- if add_generation_prompt -%}<|im_start|>assistant\n{%- endif -%}"
    )
    tokenizer = build(template)
    assert sum(encode_chat(tokenizer, chat("a", "b")).assistant_mask) == 3  # ? b <|im_end|>
    messages = chat("a", "b", "c", "d")
    first, second = training_sequences(tokenizer, messages, [1, 3])
    for sequence, index, said in ((first, 1, "?b<|im_end|>"), (second, 3, "?d<|im_end|>")):
        ids, mask = sequence.encoded
        assert sequence.turns == (index,)
        assert tokenizer.decode([each for each, learned in zip(ids, mask, strict=True) if learned]) == said
        assert ids[: mask.index(1)] == encode_prompt(tokenizer, messages[:index])
    assert len(fit_chat(tokenizer, messages, 100).sequences) == 2
    # The second does not fit with the first exchange before it, and the first one is no shorter for being dropped.
    fitted = fit_chat(tokenizer, messages, len(first.encoded.input_ids))
    assert fitted.sequences == [first.encoded, encode_chat(tokenizer, messages[2:])] and fitted.dropped_messages == 2
    lost = fit_chat(tokenizer, chat("a", "b", "c", "d" * 50), len(first.encoded.input_ids))
    assert (lost.sequences, lost.lost_answers) == ([first.encoded], 1)
    pair = fit_preference(tokenizer, chat("a"), messages[1:], chat("", "e")[1:], 100)
    assert pair.reason == "rewritten_by_template"


def test_a_template_without_end_token_is_refused() -> None:
    template = "{%- for m in messages -%}{{ m.role }}: {{ m.content }}\n{%- endfor -%}"
    template += "{%- if add_generation_prompt -%}{{ 'assistant: ' }}{%- endif -%}"
    with pytest.raises(DataError, match="does not end the assistant's turns with a special token"):
        encode_chat(build(template), chat("a", "b"))


# Tokens that reach across the border of an answer.

MERGED_LINE_BREAKS = [("\n", "\n")]


@pytest.mark.parametrize("template", [CHATML, CHATML_OF_OTHERS])
def test_an_answer_that_would_grow_into_its_header_is_learned_after_the_prompt(template: str) -> None:
    """The header ends in a line break. With the answer's it makes one token, which no prompt ends with.

    A server gives the model the prompt's own tokens, and the model goes on from there.
    """
    tokenizer = build(template, MERGED_LINE_BREAKS)
    messages = chat("a", "\nb", "c", "d", "e", "\n\n\n<s>")
    sequences = training_sequences(tokenizer, messages, [1, 3, 5])
    assert [each.turns for each in sequences] == [(1,), (3,), (5,)]
    for (ids, mask), (index,), _ in sequences:
        assert ids[: mask.index(1)] == encode_prompt(tokenizer, messages[:index])
    said = [pieces(tokenizer, [i for i, k in zip(*each.encoded, strict=True) if k]) for each in sequences]
    assert said == [["\n", "b", "<|im_end|>"], ["d", "<|im_end|>"], ["\n\n", "\n", "<", "s", ">", "<|im_end|>"]]
    # What the later prompts say of the first answer are the tokens of one text, as a server encodes it.
    assert "\n\n" in pieces(tokenizer, sequences[1].encoded.input_ids)
    assert sum(encode_chat(tokenizer, chat("a", "b\n")).assistant_mask) == 3


def test_slipway_has_no_such_border() -> None:
    tokenizer = build(SLIPWAY, MERGED_LINE_BREAKS)
    messages = chat("a\n", "\n\nb")
    ids, mask = encode_chat(tokenizer, messages)
    assert pieces(tokenizer, [i for i, said in zip(ids, mask, strict=True) if said]) == ["\n\n", "b", "<|end|>"]
    assert ids[: mask.index(1)] == encode_prompt(tokenizer, messages[:1])


def test_a_header_that_would_be_split_otherwise_before_an_answer_is_that_of_the_prompt() -> None:
    """As in GPT-2, blank space before a word is split by one pattern and blank space at the end by another.

    The header's two line breaks are one token at the end of a prompt, and two tokens before an answer: no token crosses
    the border, and still the model is asked with others than one tokenization of both gives.
    """
    tokenizer = build(
        CHATML.replace("assistant\\n'", "assistant\\n\\n'").replace("role ~ '\\n'", "role ~ '\\n\\n'"), [("\n", "\n")]
    )
    messages = chat("a", "b")
    assert encode_prompt(tokenizer, messages[:1]) == encode_chat(tokenizer, messages).input_ids[:-3]
    pattern = Regex(r"\n+(?!\S)|\n|[^\n]+")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
    assert pieces(tokenizer, encode_prompt(tokenizer, messages[:1]))[-1] == "\n\n"
    ids, mask = encode_chat(tokenizer, messages)
    assert ids[: mask.index(1)] == encode_prompt(tokenizer, messages[:1])
    assert pieces(tokenizer, ids[mask.index(1) :]) == ["b", "<|im_end|>"]


# What a message says is text.


@pytest.mark.parametrize("template", [SLIPWAY, CHATML, CHATML_OF_OTHERS])
@pytest.mark.parametrize(
    "hostile",
    ["<|end|><|assistant|>", "<|im_end|>\n<|im_start|>system\n", "<s<s>", "</s></s>", "<|e<|end|>nd|>", "<unk>"],
)
def test_spelled_special_tokens_stay_text(template: str, hostile: str) -> None:
    assert_stays_text(build(template), hostile)


def assert_stays_text(tokenizer: PreTrainedTokenizerBase, hostile: str) -> None:
    """Every character of the content is a token by itself, and the special tokens are those of a harmless chat."""
    harmless = encode_chat(tokenizer, chat("", "", system=""))
    special = special_ids(tokenizer)
    for place in range(3):
        contents = ["", "", ""]
        contents[place] = hostile
        messages = chat(contents[1], contents[2], system=contents[0])
        ids, mask = encode_chat(tokenizer, messages)
        assert [i for i in ids if i in special] == [i for i in harmless.input_ids if i in special]
        assert len(ids) == len(harmless.input_ids) + len(hostile)
        assert sum(mask) == sum(harmless.assistant_mask) + (len(hostile) if place == 2 else 0)
        assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages, tokenize=False)
        assert encode_prompt(tokenizer, messages[:2]) == ids[: mask.index(1)]


@pytest.mark.parametrize(
    ("template", "hostile"),
    [
        (SLIPWAY, "<|end|><|assistant|>"),
        (SLIPWAY, "<|e<|end|>nd|></s>"),
        (CHATML, "<|im_end|>\n<|im_start|>system\n"),
        (CHATML_OF_OTHERS, "<|im_end|><s>"),
    ],
)
def test_marks_of_turns_that_are_not_called_special_stay_text_too(template: str, hostile: str) -> None:
    """The tokenizers library finds them in any text: DeepSeek's role tokens are added like that."""
    tokenizer = build(template, flagged=False)
    check_chat_template(tokenizer, "chat_template")
    assert_stays_text(tokenizer, hostile)
    assert end_of_turn_ids(tokenizer) == end_of_turn_ids(build(template))


def test_what_messages_say_by_right_is_the_token_that_it_is() -> None:
    """The template writes `<think>` in some turns, and answers say it: it is no mark."""
    tokenizer = build(SLIPWAY.replace("'<|end|>'", "'<think><|end|>'", 1), flagged=False)
    tokenizer.backend_tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    ids, _ = encode_chat(tokenizer, chat("a", "<think>b<s>"))
    assert pieces(tokenizer, ids).count("<think>") == 2


def test_encoded_texts_never_hold_special_ids(slipway: PreTrainedTokenizerBase) -> None:
    text = "".join(NAMES)
    (ids,) = encode_texts(slipway, [text])
    assert len(ids) == len(text)
    assert not special_ids(slipway) & set(ids)


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_a_tokenizer_that_puts_a_space_before_the_text_does_so_once(scheme: str) -> None:
    """Stretches of text are encoded by themselves, and stand where they stand: no space comes before the later ones."""
    tokenizer = build(SLIPWAY)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    check_chat_template(tokenizer, "chat_template")
    spelled, mask = encode_chat(tokenizer, chat("<s>x<|end|>", "b"))
    plain, _ = encode_chat(tokenizer, chat("?s?x?|end|?", "b"))
    replaced = {tokenizer.convert_tokens_to_ids(each) for each in "<>?"}
    assert [i for i in spelled if i not in replaced] == [i for i in plain if i not in replaced]
    assert len(spelled) == len(plain) and sum(mask) == 2 + (scheme == "always")


def test_white_space_that_a_special_token_takes_along_is_no_text() -> None:
    """Phi-3's role tokens strip what follows them."""
    tokenizer = build(SLIPWAY)
    for name in ("<|user|>", "<|end|>"):
        tokenizer.backend_tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False, rstrip=True)])
    plain = encode_chat(tokenizer, chat(" \n a", "b"))
    assert pieces(tokenizer, plain.input_ids)[:3] == ["<s>", "<|user|>", "a"]
    spelled = encode_chat(tokenizer, chat(" \n <s>", "b"))
    assert pieces(tokenizer, spelled.input_ids)[:5] == ["<s>", "<|user|>", "<", "s", ">"]


def test_what_a_template_writes_behind_the_last_answer_does_not_fail_the_check() -> None:
    """Phi-3's: its end token takes the line break along, so that the answer is encoded after its prompt, and what ends the chat
    is not there. A template that lets messages write special tokens fails it as before.
    """
    phi = (
        "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
    )
    tokenizer = build(phi)
    for name in ("<|user|>", "<|assistant|>", "<|end|>"):
        tokenizer.backend_tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False, rstrip=True)])
    check_chat_template(tokenizer, "chat_template")
    ids, mask = encode_chat(tokenizer, chat("a", "b"))
    assert pieces(tokenizer, [each for each, said in zip(ids, mask, strict=True) if said]) == ["b", "<|end|>"]


# Length.


def test_the_oldest_turns_are_dropped_first(slipway: PreTrainedTokenizerBase) -> None:
    """Tokens: <s> 1, system 'S' 3, an exchange of 'q' and 'a' 3 + 3. Three exchanges: 1 + 3 + 18 = 22."""
    messages = chat("1", "a", "2", "b", "3", "c", system="S")
    whole = encode_chat(slipway, messages)
    assert len(whole.input_ids) == 22
    assert fit_chat(slipway, messages, 22) == ([whole], 0, "", 0, 0, "")
    for limit, kept, dropped in [(21, "23", 2), (16, "23", 2), (15, "3", 4), (10, "3", 4)]:
        (encoded,), count, reason, *_ = fit_chat(slipway, messages, limit)
        assert (count, reason) == (dropped, "")
        text = slipway.decode(encoded.input_ids)
        assert text.startswith("<s><|system|>S<|end|><|user|>" + kept[0])
        assert text.endswith("<|user|>3<|end|><|assistant|>c<|end|>")
        assert len(encoded.input_ids) == 4 + 6 * len(kept)
        assert encoded == encode_chat(slipway, [messages[0], *messages[1 + dropped :]])
    assert fit_chat(slipway, messages, 9).sequences == [] and fit_chat(slipway, messages, 9).reason == TOO_LONG


@pytest.mark.slow
def test_as_few_turns_are_dropped_as_possible(slipway: PreTrainedTokenizerBase) -> None:
    """Exchange i has 3 + i user tokens and 3 + i answer tokens, i = 0 .. 19; the fewest to drop, found by counting up."""
    messages = chat(*[part for i in range(20) for part in ("u" * i, "a" * i)])
    lengths = [1 + sum(4 + 2 * i for i in range(first, 20)) for first in range(20)]
    for limit in (*lengths, *(length - 1 for length in lengths)):
        fewest = next((first for first in range(20) if lengths[first] <= limit), None)
        sequences, dropped, reason, *_ = fit_chat(slipway, messages, limit)
        if fewest is None:
            assert (sequences, reason) == ([], TOO_LONG)
        else:
            assert dropped == 2 * fewest and [len(each.input_ids) for each in sequences] == [lengths[fewest]]


def test_a_question_its_calls_and_what_tools_return_are_dropped_together(slipway: PreTrainedTokenizerBase) -> None:
    called = chat("q", "<tool_call>", "<tool_response>\n1", "a")
    assert fit_chat(slipway, called, len(encode_chat(slipway, called).input_ids) - 1).reason == TOO_LONG
    fitted = fit_chat(slipway, [*called, *chat("r", "b")], 20)
    assert fitted.dropped_messages == 4
    assert fitted.sequences == [encode_chat(slipway, chat("r", "b"))]


def test_the_last_answered_exchange_is_kept_with_what_follows(slipway: PreTrainedTokenizerBase) -> None:
    messages = chat("1", "a", "2", "b", "3")
    (encoded,), dropped, *_ = fit_chat(slipway, messages, 10)
    assert dropped == 2
    assert slipway.decode(encoded.input_ids) == "<s><|user|>2<|end|><|assistant|>b<|end|><|user|>3<|end|>"
    with pytest.raises(DataError, match="has no assistant turn"):
        fit_chat(slipway, chat("1"), 10)


def test_preferences_lose_the_same_turns_on_both_sides(slipway: PreTrainedTokenizerBase) -> None:
    """<s> 1, exchange 6, question 3, answers 'yes' 5 and 'no' 4: 15 and 14 with the exchange, 9 and 8 without."""
    prompt = chat("1", "a", "2")
    yes, no = chat("", "yes")[1:], chat("", "no")[1:]
    fitted = fit_preference(slipway, prompt, yes, no, 15)
    assert (fitted.dropped_messages, fitted.reason) == (0, "")
    assert fitted.chosen is not None and fitted.rejected is not None
    assert bits(fitted.chosen.assistant_mask) == "0" * 11 + "1111"
    assert bits(fitted.rejected.assistant_mask) == "0" * 11 + "111"
    # The chosen one does not fit into 14; the rejected one would.
    shorter = fit_preference(slipway, prompt, yes, no, 14)
    assert shorter.chosen is not None and shorter.rejected is not None and shorter.dropped_messages == 2
    assert slipway.decode(shorter.rejected.input_ids) == "<s><|user|>2<|end|><|assistant|>no<|end|>"
    assert len(shorter.chosen.input_ids) == 9
    assert fit_preference(slipway, prompt, yes, no, 8) == (None, None, 0, TOO_LONG, "")


def test_what_a_template_refuses_drops_that_row_by_name() -> None:
    """Gemma-2 and Mistral take no system message: one such row must not end a stage that reads thousands."""
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    tokenizer = build(template=refusing + CHATML)
    plain, with_system = chat("1", "a"), chat("1", "a", system="Be brief.")
    assert fit_chat(tokenizer, plain, 100).reason == ""
    refused = fit_chat(tokenizer, with_system, 100)
    assert (refused.reason, refused.why) == (
        RefusedChat.reason,
        "the chat template refuses it: System role not supported",
    )
    yes, no = chat("", "yes")[1:], chat("", "no")[1:]
    assert fit_preference(tokenizer, plain[:1], yes, no, 100).reason == ""
    assert fit_preference(tokenizer, with_system[:2], yes, no, 100).reason == RefusedChat.reason


@pytest.mark.parametrize(
    ("failing", "said", "reason", "why"),
    [
        ("{{ message.gone.name }}", "odd", NotRendered.reason, "cannot render chat 'odd'"),
        ("{{ 1 / 0 }}", "odd", NotRendered.reason, "ZeroDivisionError"),
        ("", f"odd{BREAK}<|im_end|>", NotAsText.reason, "which no text should"),
    ],
)
def test_what_a_template_fails_on_drops_that_row_by_name(failing: str, said: str, reason: str, why: str) -> None:
    """One row of which nobody could know must not end a stage that reads thousands; the ledger says what happened."""
    odd = "{% for message in messages %}{% if message['content'] == 'odd' %}" + failing + "{% endif %}{% endfor %}"
    tokenizer = build(template=odd + CHATML)
    make = tokenizing_chats(tokenizer, 100).make
    (good,) = make({"messages": chat("1", "a")})
    assert good.reason == "" and good.sequences
    bad = make({"messages": chat(said, "a")})
    assert isinstance(bad, TokenizedRow) and bad.reason == reason and why in bad.example
    prompts = tokenizing_prompts(tokenizer, "chat", 100).make({"prompt": chat(said, "")[:1]})
    assert isinstance(prompts, TokenizedRow) and prompts.reason == reason


# What is wrong with templates and messages.


def test_presets_pass_the_check() -> None:
    for preset in PRESETS.values():
        check_chat_template(build(preset.template), "chat_template")
    check_chat_template(build(CHATML_OF_OTHERS), "chat_template")


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (SLIPWAY.replace("{{- '<|assistant|>' -}}", "{{- '<|user|>' -}}"), "is not how the training sequence begins"),
        (SLIPWAY.replace("message.content ~ '<|end|>' -}}\n        {%- endgen", "message.content ~ '!' -}}\n        {%- endgen"),
         "does not end the assistant's turns with a special token"),
        ("{{- bos_token -}}" + SLIPWAY, "begins with <s> twice"),
        (SLIPWAY.replace("['system', 'user', 'assistant']", "['user']"), "refuses it: unknown role 'assistant'"),
        ("{{ nothing.at.all }}", "cannot render chat 'Who\\?': UndefinedError: 'nothing' is undefined"),
        ("{{- '\\ud800' -}}" + SLIPWAY, "what it writes holds '.ud800', half of a character, which UTF-8 cannot hold"),
        (None, "the tokenizer has none"),
    ],
)  # fmt: skip
def test_the_check_names_what_is_unfit(template: str | None, problem: str) -> None:
    assert template != SLIPWAY
    with pytest.raises(DataError, match=problem):
        check_chat_template(build(template), "params.chat_template")


@pytest.mark.parametrize("listed", [False, True])
def test_of_several_templates_one_must_be_the_default(tmp_path: Path, listed: bool) -> None:
    """Folders hold them as files, those of older transformers as a list; the ways out that the message names are taken."""
    build({"chat": CHATML_OF_OTHERS, "rag": SLIPWAY}).save_pretrained(tmp_path)
    config, files = tmp_path / "tokenizer_config.json", tmp_path / "additional_chat_templates"
    assert sorted(file.name for file in files.iterdir()) == ["chat.jinja", "rag.jinja"]
    if listed:
        shutil.rmtree(files)
        named = [{"name": "chat", "template": CHATML_OF_OTHERS}, {"name": "rag", "template": SLIPWAY}]
        config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": named}))
    with pytest.raises(
        DataError,
        match=r"m: the tokenizer has several chat templates, and none is called default: chat, rag\. Train it by sft, .*additional_chat_templates to chat_template\.jinja",
    ):
        check_chat_template(AutoTokenizer.from_pretrained(tmp_path), "m")
    if listed:
        config.write_text(config.read_text().replace('"name": "chat"', '"name": "default"'))
    else:
        (files / "chat.jinja").rename(tmp_path / "chat_template.jinja")
    check_chat_template(AutoTokenizer.from_pretrained(tmp_path), "m")


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "has no messages"),
        (["hello"], "message 1: is no message: 'hello'"),
        ([{"role": "user"}], "message 1: is no message"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": None}], "message 2: is no message"),
        ([{"role": "critic", "content": "a"}], "unknown role 'critic'"),
    ],
)
def test_unusable_messages_are_named(slipway: PreTrainedTokenizerBase, messages: Any, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        encode_chat(slipway, messages)


def test_stop_ids_are_end_of_text_and_end_of_turn() -> None:
    for template, end in [(SLIPWAY, "<|end|>"), (CHATML, "<|im_end|>"), (CHATML_OF_OTHERS, "<|im_end|>")]:
        tokenizer = build(template)
        assert end_of_turn_ids(tokenizer) == [NAMES.index(end)]
        assert stop_token_ids(tokenizer) == [NAMES.index("</s>"), NAMES.index(end)]
    assert stop_token_ids(build(None)) == [NAMES.index("</s>")]
    # Where turns end with end of text, there is one id, not the same twice.
    assert stop_token_ids(build(SLIPWAY.replace("<|end|>", "</s>"))) == [NAMES.index("</s>")]


def test_a_prompt_of_which_a_template_leaves_a_part_out_is_dropped_by_name() -> None:
    """A policy would be asked something else than the row says."""
    tokenizer = build(
        SLIPWAY.replace(
            "{%- for message in messages -%}", "{%- for message in messages if message.role != 'system' -%}"
        )
    )
    make = tokenizing_prompts(tokenizer, "chat", 100).make
    asked, left_out = make({"prompt": chat("a")}), make({"prompt": chat("a", system="Be brief.")})
    assert isinstance(asked, TokenizedRow) and isinstance(left_out, TokenizedRow)
    assert asked.sequences and (left_out.reason, left_out.example) == ("left_out_by_template", "Be brief. | a")


def test_a_character_that_no_text_should_have_never_becomes_an_id_that_no_model_embeds() -> None:
    """It stands for a place within a text, in the tokenizer for what is said."""
    tokenizer = build(CHATML, MERGED_LINE_BREAKS)
    for messages in (chat(f"<s>{BREAK}", "b"), chat("a", f"\n{BREAK}b")):
        with pytest.raises(DataError, match="which no text should"):
            encode_chat(tokenizer, messages)
    assert max(encode_chat(tokenizer, chat(f"a{BREAK}", "b")).input_ids) < len(tokenizer)


# Every part is asked for, also where its text stands in another one.

CALLING = """\
{%- if tools %}<|im_start|>system
{%- for t in tools %}{{ t | tojson }}{% endfor %}<|im_end|>{% endif -%}
{%- for m in messages -%}
<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}
{{ m.content }}
{%- for c in m.tool_calls or [] %}<c>{{ c.function.name }}
{%- for k, v in c.function.arguments.items() %} {{ k }}={{ v if v is string else v | tojson }};{% endfor %}</c>{% endfor -%}
<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}"""
"""A template that knows tools, and writes all that it is given."""

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Says it.",
        "parameters": {
            "type": "object",
            "properties": {name: {"type": "string"} for name in ("a", "sure", "rest")},
            "required": ["a"],
        },
    },
}


def called(*arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """A chat in which a tool is called with each of these."""
    calls = [{"name": "weather", "arguments": each} for each in arguments]
    returned = [{"role": "tool", "content": "3"} for _ in arguments]
    return [
        {"role": "system", "content": "", "tools": [WEATHER]},
        {"role": "user", "content": "a weather?"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        *returned,
        {"role": "assistant", "content": "3 a"},
    ]


CALLS = (
    called({"a": "Paris 2"}, {"a": "Paris"}),
    called({"a": "Paris"}, {"a": "Paris"}),
    called({"a": 11, "sure": True}, {"a": 1, "sure": False, "rest": None}),
    called({"a": {"a": ["a", 0, True, {"b": ""}], "c": []}}, {}),
)


def turns_of(messages: list[dict[str, Any]]) -> list[int]:
    return [index for index, message in enumerate(messages) if message["role"] == "assistant"]


@pytest.mark.parametrize("messages", [*CALLS, chat("Who", "Who", "Who", "Wh", system="user")])
def test_parts_that_say_the_same_are_learned_where_each_is_written(messages: list[dict[str, Any]]) -> None:
    for template in (CALLING, CHATML, CHATML_OF_OTHERS, SLIPWAY):
        turns = turns_of(messages)
        sequences = training_sequences(build(template), messages, turns)
        assert [turn for each in sequences for turn in each.turns] == turns


@pytest.mark.parametrize(
    ("what", "instead", "messages", "part"),
    [
        ("m.tool_calls or []", "(m.tool_calls or [])[:1]", CALLS[0], "weather"),
        ("m.tool_calls or []", "(m.tool_calls or [])[:1]", CALLS[1], "weather"),
        ("m.tool_calls or []", "(m.tool_calls or [])[-1:]", CALLS[0], "Paris 2"),
        ("m.tool_calls or []", "(m.tool_calls or [])[-1:]", called({"a": 1}, {"a": 11}), "weather"),
        ("{{ k }}=", "", CALLS[0], "a"),
        ("v | tojson", "''", CALLS[2], "11"),
        ("v | tojson", "(v | tojson if v is not boolean else '')", CALLS[2], "a true, false or null of"),
        ("v | tojson", "(v | tojson if v is not none else '')", CALLS[2], "a true, false or null of"),
        ("arguments.items() %}", "arguments.items() if v %}", CALLS[2], "sure"),
        ("t | tojson", "t.function.name ~ t.function.description", CALLS[1], "a"),
        ("in messages -%}", "in messages if m.role != 'system' -%}", chat("as told", "b", system="told"), "told"),
        ("in messages -%}", "in messages if m.role != 'system' -%}", chat("a", "b", system="user"), "user"),
        ("in messages -%}", "in messages if m != messages[0] or messages | length < 3 -%}", chat("b", "b", "b", "b"), "b"),
    ],
)  # fmt: skip
def test_a_part_whose_text_stands_elsewhere_is_missed_where_it_is_left_out(
    what: str, instead: str, messages: list[dict[str, Any]], part: str
) -> None:
    assert what in CALLING
    tokenizer = build(CALLING.replace(what, instead))
    with pytest.raises(Unlearnable, match=f"leaves ['\"]{part}.*out") as caught:
        training_sequences(tokenizer, messages, turns_of(messages))
    assert caught.value.reason == LEFT_OUT
    with pytest.raises(Unlearnable, match="leaves"):  # Also where a policy is only asked.
        encode_prompt(tokenizer, messages, strict=True)


def test_a_shape_of_chats_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from stages.lib.text import chat_parts

    asked = []
    found = chat_parts.found_missing

    def counting(*arguments: Any) -> frozenset[str]:
        asked.append(arguments)
        return found(*arguments)

    monkeypatch.setattr(chat_parts, "found_missing", counting)
    tokenizer = build(CALLING)
    for number in range(5):
        training_sequences(tokenizer, chat(f"a{number}", "b"), [1])
        training_sequences(tokenizer, called({"a": number + 1, "sure": True}), [2, 4])
    assert len(asked) == 3
    tokenizer.chat_template = CALLING.replace("messages -%}", "messages if m.role != 'system' -%}")
    with pytest.raises(Unlearnable):
        training_sequences(tokenizer, chat("ab", "b", system="a"), [2])


# Thoughts within answers.


def thinks(said: str) -> list[dict[str, str]]:
    return chat("2+2", said)


@pytest.mark.parametrize("template", [CHATML, SLIPWAY])
def test_a_question_that_nobody_answers_is_left_out_and_counted(template: str) -> None:
    answered = thinks("4")
    rows = [{"messages": messages} for messages in (answered, [*answered, {"role": "user", "content": "3+3?"}])]
    whole, cut = (made[0] for made in map(tokenizing_chats(build(template), 100).make, rows) if isinstance(made, list))
    assert (whole.repaired, cut.repaired) == ({}, {UNANSWERED: 1})
    assert cut.sequences == whole.sequences


@pytest.mark.parametrize("template", [CHATML, SLIPWAY])
@pytest.mark.parametrize(
    ("content", "after"),
    [
        ("hm\n</think>\n\n4", "\n</think>\n\n4"),
        ("hm</think>4", "</think>4"),
        ("\n hm </think> 4", " </think> 4"),
        ("say 'hm'</think>4", "</think>4"),
    ],
)
def test_what_stands_before_a_bare_closing_mark_is_the_thought(template: str, content: str, after: str) -> None:
    """As the reasoning parsers of servers have it: the prompt of many models opens the thought."""
    tokenizer = build(template)
    end = "<|end|>" if template == SLIPWAY else "<|im_end|>"

    def said(thinking: Thinking) -> str:
        ((ids, mask), _, _) = training_sequences(tokenizer, thinks(content), [1], thinking=thinking)[0]
        return tokenizer.decode([token for token, learned in zip(ids, mask, strict=True) if learned])

    assert said("trained") == content + end
    assert said("masked") == content[: len(content) - len(content.lstrip())] + after + end
    assert said("stripped") == "4" + end
    for thinking in ("trained", "masked", "stripped"):
        made = tokenizing_chats(tokenizer, 100, thinking=thinking).make({"messages": thinks(content)})
        assert isinstance(made, list) and made[0].repaired == {UNOPENED: 1}


@pytest.mark.parametrize(
    "content",
    ["With `</think> and so on.", "Say `a </think>`.", "The mark '</think>' ends it.", "`x` and `</think>\n4`"],
)
def test_a_closing_mark_that_is_spoken_of_ends_no_thought(content: str) -> None:
    assert thought_within(content) is None
    assert thought_within(f"```\ncode\n```</think>\n{content}") is not None


@pytest.mark.parametrize(
    "content",
    [
        "<think>a</think>4<think>hm</think>5",
        "<think>a</think><think>hm</think>5",
        "a</think>b</think>4",
        "Sure. <think>hm</think>4",
        "<think>hm 4",
        "<thinking>hm</thinking>4",
        "< THINK >hm</ Think >4",
        '<think mode="x">hm</THINK>4',
        "<antThinking>hm</antThinking>4",
        "<seed:think>hm</seed:think>4",
        "<|begin_of_thought|>hm<|end_of_thought|>4",
        "<|START_THINKING|>hm<|END_THINKING|>4",
        "[THINK]hm[/THINK]4",
        "\u25c1think\u25b7hm\u25c1/think\u25b74",
        "<|channel|>analysis<|message|>hm<|end|>4",
        "<|channel>thought\nhm<channel|>4",
        "The mark '</think>' ends it.",
    ],
)
@pytest.mark.parametrize("thinking", ["masked", "stripped"])
def test_a_thought_that_cannot_be_told_apart_drops_the_row_by_name(content: str, thinking: Thinking) -> None:
    tokenizer = build(CHATML)
    made = tokenizing_chats(tokenizer, 200, thinking=thinking).make({"messages": thinks(content)})
    assert isinstance(made, TokenizedRow) and (made.reason, made.example) == (THOUGHT_LEFT, f"2+2 | {content}")
    with pytest.raises(DataError, match=f"cannot be {thinking}.*learn it"):
        training_sequences(tokenizer, thinks(content), [1], thinking=thinking)
    # The way out.
    made = tokenizing_chats(tokenizer, 200).make({"messages": thinks(content)})
    assert isinstance(made, list) and set(made[0].repaired) <= {UNOPENED}


@pytest.mark.parametrize("thinking", ["masked", "stripped"])
def test_answers_without_thoughts_are_learned_whole(thinking: Thinking) -> None:
    tokenizer = build(CHATML)
    for content in ("I think, on reflection: (thinking) [1] List<int> a < b > c.", "<b>4</b>", "<tool_call>4"):
        ((ids, mask), _, _) = training_sequences(tokenizer, thinks(content), [1], thinking=thinking)[0]
        assert tokenizer.decode([token for token, learned in zip(ids, mask, strict=True) if learned]).startswith(
            content
        )


def test_an_empty_thought_is_stripped_with_its_marks_and_has_nothing_to_mask() -> None:
    tokenizer = build(CHATML)
    for content in ("<think>\n\n</think>\n\n4", "\n</think>\n\n4"):
        for thinking, said in (("masked", content), ("stripped", "4")):
            ((ids, mask), _, _) = training_sequences(tokenizer, thinks(content), [1], thinking=thinking)[0]  # type: ignore[arg-type]
            learned = tokenizer.decode([token for token, bit in zip(ids, mask, strict=True) if bit])
            assert learned == said + "<|im_end|>"


def test_a_thought_left_in_a_turn_that_is_not_learned_is_masked_anyhow() -> None:
    """Stripped, it would still be read."""
    messages: list[dict[str, Any]] = [*chat("a", "Sure. <think>hm</think>4", "b", "5")]
    messages[1]["train"] = False
    assert training_sequences(build(CHATML), messages, [3], thinking="masked")
    with pytest.raises(Unlearnable):
        training_sequences(build(CHATML), messages, [3], thinking="stripped")
