"""Text in other encodings than UTF-8: turned into UTF-8 where the source names one, and a guess, for people, where it does not."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from pathlib import Path

from stages.lib.sources.lines import Damaged, blocks_of

TEXT_TYPES = frozenset({"jsonl", "json", "csv", "tsv", "text", "conll"})
"""The file types that are text."""

MOST_LOOKED_AT = 1 << 14
"""Bytes that are looked at for their encoding, of the lines that are not ASCII."""
OTHERS = {
    "cp949": ("euc_kr", "cp949"),
    "euc_kr": ("euc_kr", "cp949"),
    "cp932": ("shift_jis", "cp932"),
    "shift_jis": ("shift_jis", "cp932"),
    "gb2312": ("gb18030",),
    "gbk": ("gb18030",),
    "cp1125": ("cp866", "cp1125"),
}
"""Encodings that hold each other, the narrower one first, which is what people call it: the first that reads the text counts."""
ALIKE = {
    "cp1250": "iso8859-2",
    "cp1251": "iso8859-5",
    "cp1253": "iso8859-7",
    "cp1254": "iso8859-9",
    "cp1256": "iso8859-6",
    "cp1257": "iso8859-13",
}
"""Encodings that differ in a few characters: the one in which more of the text is letters counts."""


def known_encoding(name: str) -> str:
    """The name. Raises `ValueError` if Python has no text encoding that is called so."""
    try:
        is_text = codecs.lookup(name)._is_text_encoding
    except (LookupError, ValueError):  # a ValueError for a name with a null character
        is_text = False
    if not is_text:
        raise ValueError(
            f"there is no text encoding {name!r:.40}: utf-8, latin-1, cp1252, gb18030, big5 and utf-16 are among those that there are"
        )
    return name


def in_utf8(blocks: Iterable[bytes], encoding: str | None) -> Iterator[bytes]:
    """The blocks as UTF-8. What the encoding cannot read becomes bytes that UTF-8 cannot read either, or is `Damaged`."""
    if encoding is None:
        yield from blocks
        return
    decoder = codecs.getincrementaldecoder(encoding)(errors="surrogateescape")
    try:
        for block in blocks:
            yield decoder.decode(block).encode("utf-8", "surrogateescape")
        yield decoder.decode(b"", final=True).encode("utf-8", "surrogateescape")
    except UnicodeError as error:
        raise Damaged(f"it is no {encoding} from here on: {error}") from None


def text_blocks(path: Path, encoding: str | None) -> Iterator[bytes]:
    """The content of a text file as UTF-8, decompressed as its suffix says."""
    return in_utf8(blocks_of(path), encoding)


def likely_encoding(path: Path) -> str | None:
    """The encoding that a file which is no UTF-8 looks like; None where nothing can be told."""
    try:
        block = next(blocks_of(path), b"")
    except (Damaged, OSError):
        return None
    if wide := wide_encoding(block):
        return wide
    if block.isascii():
        return None
    from chardet import detect

    lines = b"\n".join(line for line in block.splitlines() if not line.isascii())[:MOST_LOOKED_AT]
    found = detect(lines)["encoding"]
    name = codecs.lookup(found).name if found else ""
    if name.startswith("utf-16"):
        # Told by its order of bytes, of which the right one has ends of lines where they belong.
        return max(("utf-16-le", "utf-16-be"), key=lambda each: block.decode(each, "ignore").count("\n"))
    other = second_opinion(lines) if name in ("", "gb18030") else None
    if other and (not name or other in BIG5):
        name = other
    for each in OTHERS.get(name, (name,) if name else ()):
        if reads(block, each):
            return likelier(block, each, ALIKE.get(each))
    if told := next((each for each, letters in TELLING.items() if is_told_by(block, each, letters)), None):
        return told
    return "cp1252" if reads(block, "cp1252") else "latin-1"


BIG5 = ("big5", "cp950", "big5hkscs")
COHERENT = 0.2
"""Above which charset-normalizer has seen a language in a text."""
LATIN_ENDS = "\u0370"
"""The first character behind those of Latin letters."""


def second_opinion(lines: bytes) -> str | None:
    """What another library, which knows older encodings, takes the text for, if it sees a language in it whose letters are
    not Latin. It is no better than the other at these."""
    from charset_normalizer import from_bytes

    best = from_bytes(lines).best()
    if best is None or best.coherence <= COHERENT:
        return None
    letters = [each for each in str(best) if each.isalpha() and not each.isascii()]
    is_latin = sum(each < LATIN_ENDS for each in letters) * 2 > len(letters)
    return None if is_latin else codecs.lookup(best.encoding).name


TELLING = {"cp932": ("\u3041", "\u30ff"), "cp949": ("\uac00", "\ud7a3")}
"""Encodings that are known by their letters where nothing else tells: kana, and syllables of Hangul."""


def is_told_by(block: bytes, encoding: str, letters: tuple[str, str]) -> bool:
    """Whether the encoding reads the block, and at least a fifth of what is not ASCII are its letters."""
    first, last = letters
    text = [each for each in block.decode(encoding, "ignore") if not each.isascii()] if reads(block, encoding) else []
    return sum(first <= each <= last for each in text) * 5 >= len(text) > 0


def likelier(block: bytes, encoding: str, other: str | None) -> str:
    """The one of two encodings in which more of what is not ASCII is letters; the first where both are as good."""
    if other is None or not reads(block, other):
        return encoding
    letters = {each: sum(map(str.isalpha, block.decode(each, "ignore"))) for each in (encoding, other)}
    return other if letters[other] > letters[encoding] else encoding


def wide_encoding(block: bytes) -> str | None:
    """The encoding of text in 2 or 4 bytes a character: `utf-16` where the file says so, else with its order of bytes."""
    if block.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if block.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    sample = block[:8192]
    zeros = (sample[0::2].count(0) / max(len(sample) // 2, 1), sample[1::2].count(0) / max(len(sample) // 2, 1))
    if max(zeros) < 0.4 or min(zeros) > 0.05:
        return None
    return "utf-16-le" if zeros[1] > zeros[0] else "utf-16-be"


def reads(block: bytes, encoding: str) -> bool:
    """Whether the encoding reads the block, whose last character may be cut."""
    try:
        codecs.getincrementaldecoder(encoding)().decode(block)
    except UnicodeError:
        return False
    return True
