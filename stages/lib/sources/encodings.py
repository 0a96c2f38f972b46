"""Text in other encodings than UTF-8: turned into UTF-8 where the source names one, and a guess, for people, where it does not."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from stages.lib.sources.lines import Damaged, blocks_of

TEXT_TYPES = frozenset({"jsonl", "json", "csv", "tsv", "text", "conll"})
"""The file types that are text."""

HIGH_BYTES = re.compile(rb"[\x80-\xff]+")


def known_encoding(name: str) -> str:
    """The name. Raises `ValueError` if Python has no text encoding that is called so."""
    try:
        is_text = codecs.lookup(name)._is_text_encoding
    except (LookupError, ValueError):  # a ValueError for a name with a null character
        is_text = False
    if not is_text:
        raise ValueError(
            f"there is no text encoding {name!r:.40}. Known are utf-8, latin-1, cp1252, gb18030, big5, utf-16, ..."
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
    runs = [len(run) for run in HIGH_BYTES.findall(block)]
    if not runs:
        return None
    # Letters with accents stand alone; those of other alphabets stand together.
    if found := likely_script(block, alphabets=sum(runs) / len(runs) > 2.5):
        return found
    return "cp1252" if reads(block, "cp1252") else "latin-1"


def wide_encoding(block: bytes) -> str | None:
    """The encoding of text in 2 bytes a character: `utf-16` where the file says so, else with its order of bytes."""
    if block.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    sample = block[:8192]
    zeros = (sample[0::2].count(0) / max(len(sample) // 2, 1), sample[1::2].count(0) / max(len(sample) // 2, 1))
    if max(zeros) < 0.4 or min(zeros) > 0.05:
        return None
    return "utf-16-le" if zeros[1] > zeros[0] else "utf-16-be"


KANA = re.compile(r"[\u3041-\u30ff]")
JAPANESE = re.compile(r"[\u3000-\u30ff\u4e00-\u9fff\uff01-\uff5e]")
HANGUL = re.compile(r"[\uac00-\ud7a3]")
CYRILLIC = re.compile(r"[\u0430-\u044f\u0451]")
GREEK = re.compile(r"[\u03ac-\u03ce]")


def likely_script(block: bytes, *, alphabets: bool) -> str | None:
    """The encoding in which the block says what people of its script write most; None where it does in none. Those of
    `alphabets` of one byte a letter read everything, and so are tried only where its letters stand together.
    """
    korean = share_of(HANGUL, block, "euc_kr")
    if korean > 0.95:  # Chinese read as Korean is hanja in a fifth of its characters
        return "euc_kr"
    for encoding in ("euc_jp", "shift_jis"):
        if share_of(KANA, block, encoding) > 0.15 and share_of(JAPANESE, block, encoding) > 0.95:
            return encoding
    shares = {
        "gb18030": frequent_share(block, "gb18030", "gb2312", range(0xA1, 0xD8)),
        "big5": frequent_share(block, "big5", "big5", range(0xA1, 0xC7)),
        "euc_kr": korean,
    }
    if alphabets:
        letters = {"cp1251": CYRILLIC, "koi8_r": CYRILLIC, "cp1253": GREEK}
        shares |= {encoding: share_of(each, block, encoding) for encoding, each in letters.items()}
    best = max(shares, key=lambda encoding: shares[encoding])
    return best if shares[best] > 0.5 else None


def share_of(letters: re.Pattern[str], block: bytes, encoding: str) -> float:
    """The share of letters of one kind among the characters beyond ASCII, as the encoding reads them; 0 if it cannot."""
    if not reads(block, encoding):
        return 0.0
    found = [character for character in codecs.getincrementaldecoder(encoding)().decode(block) if character > "\x7f"]
    return sum(bool(letters.match(character)) for character in found) / max(len(found), 1)


def frequent_share(block: bytes, encoding: str, rows_of: str, rows: range) -> float:
    """The same of the characters in the rows of a table that hold its most frequent ones, by their first byte."""
    if not reads(block, encoding):
        return 0.0
    found = [character for character in codecs.getincrementaldecoder(encoding)().decode(block) if character > "\x7f"]
    frequent = sum(character.encode(rows_of, "replace")[0] in rows for character in found)
    return frequent / max(len(found), 1)


def reads(block: bytes, encoding: str) -> bool:
    """Whether the encoding reads the block, whose last character may be cut."""
    try:
        codecs.getincrementaldecoder(encoding)().decode(block)
    except UnicodeError:
        return False
    return True
