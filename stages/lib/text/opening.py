"""Tokenizers as transformers opens them, held against the tokenizer.json that they should be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pipeline.errors import ArtifactError, Problem
from pipeline.store.numbers import json_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase


GENERIC_CLASSES = frozenset({"TokenizersBackend", "PreTrainedTokenizerFast"})
"""Tokenizer classes that do what tokenizer.json says and nothing else."""


PROBE = " A  caf\u00e9,\n\tif x == 10:\r\n    \u4f60\u597d \U0001f600<|end|>"
"""A text that tokenizers rarely agree on by chance."""


CLOSE_PROBE = (
    "7 42 123 1234 12345 1234567 3.14 DON'T they'LL we've cafe\u0301 A\u030a \ufb01ne \u2460 \uff21\uff11\uff12 "
    "a\u00a0b\u3000c x\n\n\n  \t\t y \r\n\r\n  z == 10  "
)
"""What tokenizers split or rewrite otherwise that are alike in all else: long numbers, capitals behind an apostrophe, accents
and letters that Unicode writes in two ways, white space of every kind.
"""


AS_IT_IS = 'Write "tokenizer_class": "PreTrainedTokenizerFast" there: then the file is opened as it is.'


def open_by_name(home: Path) -> PreTrainedTokenizerBase:
    """The tokenizer as whoever uses transformers opens it. Raises `ArtifactError` if there is none, or it encodes nothing."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(home, local_files_only=True, trust_remote_code=False)
        plain_probe(tokenizer, PROBE)  # a class that wants a token which the vocabulary lacks says so only now
        return tokenizer
    except Exception as error:  # the tokenizers library raises nothing more special
        what = f"holds no tokenizer that can be opened: {(str(error) or type(error).__name__).splitlines()[0]:.200}"
        named = named_in_vain(home)
        hint = f"Its tokenizer_config.json names {named}, its tokenizer.json is of another kind. {AS_IT_IS}"
        raise ArtifactError(Problem(str(home), what, hint) if named else Problem(str(home), what)) from error


def named_in_vain(home: Path) -> str | None:
    """The class that tokenizer_config.json names, if it is all that keeps tokenizer.json from being opened."""
    try:
        named = declared_class(home)
    except ValueError:  # no JSON: then that is what is wrong
        return None
    return named if named and named not in GENERIC_CLASSES and may_be_opened_as_it_is(home) else None


def may_be_opened_as_it_is(home: Path) -> bool:
    """Whether transformers would go by tokenizer.json if tokenizer_config.json said so: of some types of model it never does."""
    if not (home / "tokenizer.json").exists():
        return False
    with TemporaryDirectory() as name:
        trial = Path(name)
        for each in ("tokenizer.json", "config.json"):
            if (home / each).exists():
                shutil.copyfile(home / each, trial / each)
        said = {"tokenizer_class": "PreTrainedTokenizerFast"}
        (trial / "tokenizer_config.json").write_text(json_text(said, "tokenizer_config.json"), encoding="utf-8")
        try:
            return type(open_by_name(trial)).__name__ in GENERIC_CLASSES
        except ArtifactError:
            return False


def plain_probe(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return ids


def as_written(home: Path, opened: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer of tokenizer.json: `opened` itself, or what takes its place where its class reads a text's beginning
    otherwise, as that of Llama does with the files that Llama-2 and Mistral come with, splits numbers or writes accents
    otherwise, as that of GPT-2 does with a file that has Llama-3's rules, or leaves out added tokens, as that one does where
    tokenizer_config.json lists some of them alone.

    Raises `ArtifactError` if that class gives other ids for texts as a whole, or leaves out tokens whatever is done.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    if type(opened).__name__ in GENERIC_CLASSES:
        return opened
    written = Tokenizer.from_file(str(home / "tokenizer.json"))
    written.encode_special_tokens = True
    lost = lost_tokens(written, opened)

    def differs(text: str) -> bool:
        ids: list[int] = written.encode(text, add_special_tokens=False).ids
        return ids != plain_probe(opened, text)

    if differs(PROBE.lstrip()):
        raise opens_as_another(home, type(opened).__name__)
    if lost and not may_be_opened_as_it_is(home):
        raise opens_as_another(home, type(opened).__name__, lost)
    if not lost and not differs(PROBE) and not (differs(CLOSE_PROBE) and may_be_opened_as_it_is(home)):
        return opened
    # A class brings names of special tokens of its own, which would be added where the file has none such.
    given = opened.special_tokens_map.items()
    named = {name: each for name, each in given if isinstance(each, str) and written.token_to_id(each) is not None}
    return PreTrainedTokenizerFast.from_pretrained(home, local_files_only=True, **named)


def lost_tokens(written: Tokenizer, opened: PreTrainedTokenizerBase) -> list[str]:
    """The added tokens of tokenizer.json that the opened tokenizer reads as other text, or as other ids."""
    known = opened.added_tokens_encoder
    return [
        token.content
        for number, token in written.get_added_tokens_decoder().items()
        if known.get(token.content) != number
    ]


def opens_as_another(home: Path, opened: str, lost: Sequence[str] = ()) -> ArtifactError:
    """Of a tokenizer in whose place transformers puts one that gives other ids: without spaces, say, or line breaks, or
    without the added tokens that are `lost`.
    """
    declared = declared_class(home)
    if declared in GENERIC_CLASSES or not may_be_opened_as_it_is(home):
        what = f"transformers opens it as {opened} because of the model_type in config.json"
        hint = (
            "Choose another architecture for this tokenizer (llama, mistral and qwen3 work). If the model was trained with "
            f"what transformers makes of it, write that down: `from transformers import AutoTokenizer as T; "
            f"T.from_pretrained({str(home)!r}).save_pretrained({str(home)!r})`."
        )
    else:
        what = f"transformers opens it as {opened} because tokenizer_config.json names {declared or 'no class'}"
        hint = AS_IT_IS
    gives = "gives other ids than its tokenizer.json"
    if lost:
        gives = f"leaves out {len(lost)} of the added tokens of its tokenizer.json ({', '.join(lost[:3])})"
    return ArtifactError(Problem(str(home), f"{what}, which {gives}", hint))


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """What stands in tokenizer_config.json; {} if there is none."""
    path = folder / "tokenizer_config.json"
    config: dict[str, Any] = json.loads(path.read_bytes()) if path.exists() else {}
    return config


def declared_class(folder: Path) -> str | None:
    """The class that tokenizer_config.json names."""
    return read_tokenizer_config(folder).get("tokenizer_class")
