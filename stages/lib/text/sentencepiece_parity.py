"""Whether a fast tokenizer is the sentencepiece model that it was made from, and gives every text back as it was."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from pipeline.errors import DataError, Problem
from stages.lib.text.tokenizers import decode_ids, encode_texts

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
    from transformers import PreTrainedTokenizerBase


ESCAPE = "\ufdd0"
"""A noncharacter, so that hardly any text pays for it. What follows it says which character is meant."""


SPACE_SIGN = "\u2581"
"""How sentencepiece writes a space. A text's own such sign, it would decode to a space."""


class Escape:
    """How characters that the vocabulary uses for itself are written in text, so that decoding gives them back.

    The sign for spaces is escaped, and the escape itself. The fast unigram model finds byte and special tokens in text
    that spells them, which sentencepiece and BPE do not: there the first character of such a spelling is set apart.
    """

    def __init__(self, algorithm: str, names: Iterable[str]) -> None:
        self.algorithm = algorithm
        self.replacements = [
            (re.escape(ESCAPE), ESCAPE, f"{ESCAPE}\ufdd2"),
            (SPACE_SIGN, SPACE_SIGN, f"{ESCAPE}\ufdd1"),
        ]
        """Pattern, what it stands for, and what it becomes, in the order in which they are made."""
        if algorithm == "unigram":
            rests: dict[str, list[str]] = {"<": ["0x[0-9A-F]{2}>"]}
            for name in names:
                rests.setdefault(name[0], []).append(re.escape(name[1:]))
            for first, rest in rests.items():
                pattern = f"{re.escape(first)}(?={'|'.join(rest)})"
                self.replacements.append((pattern, first, f"{first}{ESCAPE}\ufdd3"))

    def text(self, text: str) -> str:
        """The text as sentencepiece is given it."""
        for pattern, _, escaped in self.replacements:
            text = re.sub(pattern, escaped, text)
        return text

    def normalizers(self) -> list[Any]:
        """The same for a fast tokenizer."""
        from tokenizers import Regex, normalizers

        return [normalizers.Replace(Regex(pattern), escaped) for pattern, _, escaped in self.replacements]

    def decoders(self) -> list[Any]:
        """What undoes it, for a fast tokenizer."""
        from tokenizers import decoders

        return [decoders.Replace(escaped, plain) for _, plain, escaped in reversed(self.replacements)]


BUILT_IN_TEXTS = {
    "Latin": (
        "Le c\u0153ur d\xe9\xe7u mais l'\xe2me plut\xf4t na\xefve, Lou\xffs r\xeava. Za\u017c\xf3\u0142\u0107"
        " g\u0119\u015bl\u0105 ja\u017a\u0144. Gr\xf6\xdfe, \u0130stanbul, e\u0301"
    ),
    "Chinese": (
        "\u654f\u6377\u7684\u68d5\u8272\u72d0\u72f8\u8df3\u8fc7\u4e86\u61d2\u72d7\u3002\u300c\u4f60\u597d"
        "\uff0c\u4e16\u754c\uff01\u300d\uff11\uff12\uff13\u3000\u5168\u89d2\u7a7a\u683c"
    ),
    "Arabic": (
        "\u0627\u0644\u062b\u0639\u0644\u0628 \u0627\u0644\u0628\u0646\u064a \u0627\u0644\u0633\u0631\u064a"
        "\u0639 \u064a\u0642\u0641\u0632 \u0641\u0648\u0642 \u0627\u0644\u0643\u0644\u0628. \u0645\u064e"
        "\u0631\u0652\u062d\u064e\u0628\u064b\u0627 \u0661\u0662\u0663"
    ),
    "Devanagari": (
        "\u0924\u0947\u091c\u093c \u092d\u0942\u0930\u0940 \u0932\u094b\u092e\u0921\u093c\u0940 \u0906\u0932"
        "\u0938\u0940 \u0915\u0941\u0924\u094d\u0924\u0947 \u0915\u0947 \u090a\u092a\u0930 \u0915\u0942\u0926"
        "\u0924\u0940 \u0939\u0948\u0964 \u0967\u0968\u0969"
    ),
    "Cyrillic": (
        "\u0421\u044a\u0435\u0448\u044c \u0436\u0435 \u0435\u0449\u0451 \u044d\u0442\u0438\u0445 \u043c\u044f"
        "\u0433\u043a\u0438\u0445 \u0444\u0440\u0430\u043d\u0446\u0443\u0437\u0441\u043a\u0438\u0445 \u0431"
        "\u0443\u043b\u043e\u043a. \u0407\u0436\u0430\u043a"
    ),
    "Japanese": (
        "\u3044\u308d\u306f\u306b\u307b\u3078\u3068 \u30ab\u30bf\u30ab\u30ca\u3001\u6f22\u5b57\u3001\uff8a"
        "\uff9d\uff76\uff78\u3002"
    ),
    "Korean": (
        "\ub2e4\ub78c\uc950 \ud5cc \uccc7\ubc14\ud034\uc5d0 \ud0c0\uace0\ud30c. \uc548\ub155\ud558\uc138\uc694!"
    ),
    "emoji": (
        "Fine \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f"
        "\U0001f44d\U0001f3fd ok"
    ),
    "code": (
        "def f(x):\n\tif x  ==  1:\n\t\treturn [i for i in range(10)]\n\n\n    # four,  two\n        return None\r\n"
    ),
    "spaces": "   leading, trailing   \n\n \n\t \xa0\u2003\u3000 ",
    "digits": "0 007 3.14159 1,234,567 2e-5 0x1F 1999-12-31",
    "control": "\x00\x01\x1b[0m\x7f\x85\u200b\u2028\u2029\ufeff\ufffd\uffff",
    "signs of its own": (
        "\u2581 \u2581\u2581a \u2585 \ufdd0\ufdd1\ufdd0 \ufdd0\ufdd2\ufdd3 <0x0A><0xE2> <<s></s><unk><pad> <m"
        "ask><|end|>"
    ),
    "empty": "",
}
"""Name -> text, in scripts and with characters that tokenizers have been seen to lose."""


@dataclass
class Comparison:
    """What was compared. Ties: unigram splits that differ at equal score, as sentencepiece adds up in single precision."""

    texts: int = 0
    characters: int = 0
    tokens: int = 0
    byte_tokens: int = 0
    ties: int = 0
    problems: list[Problem] = field(default_factory=list)


def compare(
    processor: SentencePieceProcessor,
    tokenizer: PreTrainedTokenizerBase,
    escape: Escape,
    texts: Iterable[tuple[str, str]],
) -> Comparison:
    """Counts over the texts. Raises `DataError` if one has not the ids of sentencepiece, or is not decoded exactly."""
    seen = Comparison()
    texts = iter(texts)
    while batch := list(islice(texts, 256)):
        for (name, text), ids in zip(batch, encode_texts(tokenizer, [text for _, text in batch]), strict=True):
            expected = processor.encode(escape.text(text))
            if ids != expected and not is_tie(processor, escape.algorithm, ids, expected):
                at = first_difference(ids, expected)
                ours, theirs = (processor.id_to_piece(each[at : at + 3]) for each in (ids, expected))
                seen.problems.append(
                    Problem(
                        f"{name} {text[:40]!r}",
                        f"has the tokens {ours} from token {at} on; sentencepiece gives {theirs}",
                    )
                )
            if (decoded := decode_ids(tokenizer, ids)) != text:
                at = first_difference(decoded, text)
                seen.problems.append(
                    Problem(
                        f"{name} {text[:40]!r}",
                        f"is decoded to {decoded[at : at + 10]!r} from character {at} on, not {text[at : at + 10]!r}",
                    )
                )
            seen.texts += 1
            seen.characters += len(text)
            seen.tokens += len(ids)
            seen.byte_tokens += sum(processor.is_byte(each) for each in ids)
            seen.ties += ids != expected
    if seen.problems:
        raise DataError(*seen.problems[:10])
    return seen


def first_difference(one: Any, other: Any) -> int:
    """The first index at which two sequences differ; the length of the shorter if one begins with it."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))


def is_tie(processor: SentencePieceProcessor, algorithm: str, ids: list[int], expected: list[int]) -> bool:
    """Whether two splits have the same score as far as single precision can tell. Only unigram scores add up."""
    if algorithm != "unigram":
        return False
    scores = [sum(map(processor.get_score, each)) for each in (ids, expected)]
    bytes_used = [sum(map(processor.is_byte, each)) for each in (ids, expected)]
    return bytes_used[0] == bytes_used[1] and abs(scores[0] - scores[1]) <= 1e-6 * abs(scores[1])
