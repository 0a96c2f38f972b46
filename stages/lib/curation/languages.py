"""What share of a text's letters belongs to a script, or stands in text of a language."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

SCRIPTS = (
    *"Adlam Arabic Armenian Balinese Bamum Batak Bengali Bopomofo Braille Buginese Canadian_Aboriginal Chakma Cham".split(),
    *"Cherokee Coptic Cyrillic Devanagari Ethiopic Georgian Gothic Greek Gujarati Gurmukhi Han Hangul".split(),
    *"Hanifi_Rohingya Hebrew Hiragana Javanese Kannada Katakana Kayah_Li Khmer Lao Latin Lepcha Limbu Lisu".split(),
    *"Malayalam Mandaic Meetei_Mayek Mongolian Myanmar New_Tai_Lue Nko Nyiakeng_Puachue_Hmong Ol_Chiki Oriya".split(),
    *"Osage Rejang Runic Samaritan Saurashtra Sinhala Sundanese Syloti_Nagri Syriac Tagalog Tai_Le Tai_Tham".split(),
    *"Tai_Viet Tamil Telugu Thaana Thai Tibetan Tifinagh Vai Wancho Yi".split(),
)
"""Unicode's names of the scripts that languages of today are written in, and some older ones."""

LANGUAGES = tuple(
    """
    ace af am an ar ary arz as az ba bcl be bg bn br bs ca crh cs cy da de dz el en eo es et eu ext fa fi fo fr fuv fy
    ga gcf gcr gd gl gom grc gu gug guw ha hbo he hi hr ht hu hy id ig is it ja jv ka kab kik kk km kn ko ku ky la lb
    lg lij ln lo lt ltg lv mg mk ml mn mr ms mt my ne nl nn no nso oc om or pa pcm pl ps pt qu ro ru rw sa sdh se si
    sk sl sn so sq sr st sv sw ta te tg th tk tl tr tt ug uk ur uz uzs vec vi vo wa wuu xh yo yue zh zu zxx
    """.split()
)
"""The languages that py3langid tells apart, by their ISO 639 codes; zxx is what is no language."""


def share_of_scripts(scripts: Collection[str]) -> Callable[[str], float | None]:
    """A function of a text: the share, from 0 to 1, of its letters that belong to the scripts; None where it has none.

    Letters that many scripts use, such as those of formulas, belong to none and are not counted.
    """
    import regex

    letters = regex.compile(r"[\p{L}--\p{Common}--\p{Inherited}]", regex.V1)
    wanted = regex.compile("[" + "".join(rf"[\p{{L}}&&\p{{{script}}}]" for script in scripts) + "]", regex.V1)

    def share(text: str) -> float | None:
        total = len(letters.findall(text))
        return len(wanted.findall(text)) / total if total else None

    return share


def share_of_languages(languages: Collection[str], min_letters: int) -> Callable[[str], float | None]:
    """A function of a text: the share, from 0 to 1, of its letters in pieces of these languages; None where it is too short.

    The model of py3langid (Lui and Baldwin 2011) lies in the package: the same text is told alike everywhere.
    """
    from py3langid import classify

    def share(text: str) -> float | None:
        pieces = [(sum(map(str.isalpha, piece)), piece) for piece in pieces_of(text, min_letters)]
        total = sum(letters for letters, _ in pieces)
        if total < min_letters:
            return None
        return sum(letters for letters, piece in pieces if classify(piece)[0] in languages) / total

    return share


def pieces_of(text: str, min_letters: int) -> Iterator[str]:
    """The lines of a text, each put together with those after it until it has so many letters; the last with those before."""
    pieces: list[str] = []
    waiting: list[str] = []
    letters = 0
    for line in text.splitlines():
        waiting.append(line)
        letters += sum(map(str.isalpha, line))
        if letters >= min_letters:
            pieces.append("\n".join(waiting))
            waiting, letters = [], 0
    if letters:
        rest = "\n".join(waiting)
        pieces = [*pieces[:-1], "\n".join([*pieces[-1:], rest])]
    return iter(pieces)
