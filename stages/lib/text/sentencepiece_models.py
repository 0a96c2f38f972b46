"""sentencepiece models without a tokenizer.json: as a fast tokenizer that gives their ids, or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ArtifactError, Problem
from stages.lib.text.tokenizer_files import chat_templates, optional_json

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
    from transformers import PreTrainedTokenizerBase

NAMES = ("tokenizer.model", "sentencepiece.bpe.model", "spiece.model", "sentencepiece.model", "spm.model")
"""What such a model is called beside a language model."""


SPACE = "\u2581"
"""How sentencepiece writes a space."""


SAMPLES = (
    "The cat sat on the mat.",
    " A  caf\u00e9,\n\tif x == 10:\r\n    \u4f60\u597d \U0001f600 1,234.5",
    "  two spaces, and two behind  ",
    "\u2581 is a sign; \ufb01ne \uff11\uff12 e\u0301 \u00a0\u3000|",
)
"""Texts on which the two are compared: spaces everywhere, letters that normalization changes, what stands for a space."""


SPELLED = "<s> is said, and <0x41> too"
"""Of BPE only: every fast unigram model finds its special tokens in a text that spells them."""


@dataclass(frozen=True)
class Specification:
    """What a sentencepiece model says of how it reads text."""

    is_unigram: bool
    adds_space: bool
    """Whether a space is put before each text."""
    drops_spaces: bool
    """Whether spaces at both ends are dropped, and of several only one is kept."""
    characters: bytes
    """The table of characters that are replaced; empty for none."""


def sentencepiece_model(home: Path) -> Path | None:
    """The sentencepiece model in `home`, if there is one."""
    return next((home / name for name in NAMES if (home / name).is_file()), None)


def from_sentencepiece(model: Path) -> PreTrainedTokenizerBase:
    """The sentencepiece model as a fast tokenizer, with the special tokens that it, or tokenizer_config.json, names.

    Raises `ArtifactError` if it is no such model, or has ids that no fast tokenizer was found to give.
    """
    from sentencepiece import SentencePieceProcessor
    from transformers import AddedToken, PreTrainedTokenizerFast

    content, config = model.read_bytes(), optional_json(model.with_name("tokenizer_config.json"))
    try:
        specification = read_specification(content)
        processor = SentencePieceProcessor(model_proto=content)
    except (RuntimeError, IndexError) as error:
        what = "is no model of sentencepiece, and there is no tokenizer.json beside it"
        raise ArtifactError(Problem(str(model), what, "Add the tokenizer.json that belongs to it.")) from error
    decoder = config.get("added_tokens_decoder") or {}
    added = {int(index): AddedToken(**given) for index, given in decoder.items()}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend_of(processor, specification),
        added_tokens_decoder=added,
        clean_up_tokenization_spaces=False,
        name_or_path=str(model.parent),
        **names_of(processor, config),
    )
    if templates := chat_templates(model.parent, config):
        tokenizer.chat_template = templates if len(templates) > 1 else next(iter(templates.values()))
    require_same_ids(model, processor, tokenizer, SAMPLES if specification.is_unigram else (*SAMPLES, SPELLED))
    return tokenizer


def names_of(processor: SentencePieceProcessor, config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and its like: those of tokenizer_config.json, else those that the sentencepiece model has."""
    own = {"unk": processor.unk_id(), "bos": processor.bos_id(), "eos": processor.eos_id(), "pad": processor.pad_id()}
    found = {f"{name}_token": processor.id_to_piece(index) for name, index in own.items() if index >= 0}
    for name in (*found, "bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"):
        given = config.get(name)
        given = given.get("content") if isinstance(given, Mapping) else given
        if isinstance(given, str):
            found[name] = given
    return found


def backend_of(processor: SentencePieceProcessor, specification: Specification) -> Any:
    """The `tokenizers` library's tokenizer of the same pieces, which normalizes and decodes as the model says."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

    pieces = [processor.id_to_piece(index) for index in range(len(processor))]
    has_bytes = any(map(processor.is_byte, range(len(processor))))
    unknown = processor.unk_id()
    if specification.is_unigram:
        scored = [(piece, processor.get_score(index)) for index, piece in enumerate(pieces)]
        backend = Tokenizer(models.Unigram(scored, unk_id=unknown, byte_fallback=has_bytes))
    else:
        vocabulary = {piece: index for index, piece in enumerate(pieces)}
        merges = find_merges(processor, pieces)
        backend = Tokenizer(
            models.BPE(vocabulary, merges, unk_token=pieces[unknown], fuse_unk=True, byte_fallback=has_bytes)
        )
    steps: list[Any] = [normalizers.Precompiled(specification.characters)] if specification.characters else []
    if specification.drops_spaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if specification.adds_space:
        steps.append(normalizers.Prepend(SPACE))
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    ends = [decoders.Strip(" ", 1, 0)] if specification.adds_space else []
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *ends])
    special = [
        piece for index, piece in enumerate(pieces) if processor.is_control(index) or processor.is_unknown(index)
    ]
    backend.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    return backend


def is_ordinary(processor: SentencePieceProcessor, index: int) -> bool:
    """Whether texts are split into this piece: it is no special one, and no byte."""
    return not (processor.is_control(index) or processor.is_unknown(index) or processor.is_byte(index))


def find_merges(processor: SentencePieceProcessor, pieces: list[str]) -> list[tuple[str, str]]:
    """All pairs of pieces that make a piece, in the order in which sentencepiece would join them.

    Special and byte tokens are left out: no pair may make them, however their names are spelled.
    """
    ordinary = {piece: index for index, piece in enumerate(pieces) if is_ordinary(processor, index)}
    merges = []
    for piece, index in ordinary.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ordinary and right in ordinary:
                merges.append((-processor.get_score(index), index, cut, left, right))
    return [(left, right) for *_, left, right in sorted(merges)]


def require_same_ids(
    model: Path, processor: SentencePieceProcessor, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> None:
    """Raises `ArtifactError` unless the tokenizer gives the ids of sentencepiece for each of the texts."""
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if ids != processor.encode(text):
            what = f"cannot be read as it is without a tokenizer.json: {text!r} would have other tokens than in sentencepiece"
            raise ArtifactError(Problem(str(model), what, "Add the tokenizer.json that belongs to it."))


# The model's file, of which only a few fields count (sentencepiece_model.proto).


PIECE, TRAINER, NORMALIZER = 1, 2, 3
KIND, UNIGRAM = 3, 1
CHARACTERS, DUMMY_PREFIX, EXTRA_SPACES = 2, 3, 4


def read_specification(content: bytes) -> Specification:
    """What the bytes of a sentencepiece model say. Raises `IndexError` for bytes that are none."""
    parts = dict(fields_of(content))
    if not isinstance(parts.get(PIECE), bytes):
        raise IndexError("holds no piece")
    trainer, normalizer = (dict(fields_of(parts.get(number, b""))) for number in (TRAINER, NORMALIZER))
    return Specification(
        is_unigram=trainer.get(KIND, UNIGRAM) == UNIGRAM,
        adds_space=bool(normalizer.get(DUMMY_PREFIX, 1)),
        drops_spaces=bool(normalizer.get(EXTRA_SPACES, 1)),
        characters=bytes(normalizer.get(CHARACTERS, b"")),
    )


def fields_of(content: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a protocol buffer message: a whole number, or bytes."""
    at = 0
    while at < len(content):
        key, at = varint(content, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = varint(content, at)
            yield number, value
        elif kind == 2:
            size, at = varint(content, at)
            yield number, content[at : at + size]
            at += size
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
            yield number, content[at : at + size]
            at += size
        else:
            raise IndexError(at)


def varint(content: bytes, at: int) -> tuple[int, int]:
    """A number of 7 bits per byte, the lowest first, and where it ends."""
    value = shift = 0
    while True:
        byte = content[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
