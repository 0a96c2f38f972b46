"""Scripts that put no spaces between words, and what belongs to the letter before it: for patterns of the library `regex`."""

from __future__ import annotations

UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\u30fc\uff70\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
"""Scripts without spaces between words, of which ICU has dictionaries; U+30FC and U+FF70 lengthen Japanese vowels."""

JOINED = r"\p{M}\u200c\u200d"
"""What belongs to the letter before it: combining marks, and what says whether letters join (in Persian, Malayalam, ...)."""
