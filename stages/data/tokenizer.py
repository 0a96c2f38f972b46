"""`tokenizer`: a sentencepiece model trained on the text, as a fast tokenizer with special tokens and chat template.

The tokenizer is lossless: what it decodes is what it encoded, character for character, in any script, also when it was
trained on text without spaces. That, and that the fast tokenizer gives the ids of sentencepiece, is checked on held-out
rows and a built-in set of texts before it is published. It adds nothing by itself: `pack` puts bos and eos around documents, the chat template around chats.
"""

from __future__ import annotations

import io
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, Field, ValidationInfo, model_validator

from pipeline.errors import DataError, Problem, did_you_mean
from pipeline.settings.strict import Strict
from pipeline.stage import Context, Estimate, Forecast, Result, Stage, accepts
from pipeline.store.artifact import Facts, Kind
from stages.lib.rows.canonical import read_rows
from stages.lib.text.chat_check import check_chat_template
from stages.lib.text.chat_presets import PRESETS, is_template, text_if_file
from stages.lib.text.sentencepiece_models import find_merges
from stages.lib.text.sentencepiece_parity import BUILT_IN_TEXTS, SPACE_SIGN, Escape, compare
from stages.lib.text.tokenizers import ADDS, facts_of_tokenizer, load_tokenizer, say_in_config

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
    from transformers import PreTrainedTokenizerBase

UNK, BOS, EOS, PAD, MASK = "<unk>", "<s>", "</s>", "<pad>", "<mask>"
BASE_TOKENS = (UNK, BOS, EOS, PAD, MASK)
"""The first ids of every tokenizer, in this order."""

BYTES = 256

MODEL_FILES = {"bpe": "tokenizer.model", "unigram": "sentencepiece.model"}
"""What the sentencepiece model is called. Converters to GGUF look for `tokenizer.model`, and join its pieces as bpe does: of a
unigram model that would be other ids, so they must not find it."""


def read_template(value: str, info: ValidationInfo) -> str:
    """The name of a preset, or the text of a template, read from its file if that is what `value` names."""
    found = text_if_file(value, info)
    if not is_template(found):
        raise ValueError(f"no preset and no file has the name {value!r}. {did_you_mean(value, PRESETS)}")
    return found


class Params(Strict):
    vocabulary_size: int = Field(default=8192, gt=BYTES)
    """Number of tokens in all: the special ones and 256 for single bytes count."""
    algorithm: Literal["bpe", "unigram"] = "bpe"
    """How pieces are found: bpe merges frequent pairs; unigram keeps the pieces that make the text most probable, and
    takes some 20 times as long to train."""
    character_coverage: float = Field(default=0.9995, ge=0.9, le=1.0)
    """Share of the text's characters that get a token of their own; the rarer ones are spelled in bytes."""
    split_digits: bool = True
    """Whether each digit is a token by itself, so that numbers have one spelling."""
    max_piece_length_characters: int = Field(default=16, ge=1, le=512)
    """Longest token, in characters."""
    sample_rows: int | None = Field(default=1_000_000, ge=1)
    """Training rows drawn at random to train on, since all are held in memory. None: all of them."""
    heldout_rows: int = Field(default=1000, ge=1)
    """Held-out rows drawn at random for the metrics and for the comparison with sentencepiece."""
    chat_template: Annotated[str, AfterValidator(read_template)] = "slipway"
    """How a chat becomes text: slipway (one special token per role), chatml, or the path of a Jinja file, of 200,000 characters at most."""
    special_tokens: list[str] = []
    """Further special tokens, for instance those of a chat template of your own. Text never produces them."""

    @model_validator(mode="after")
    def special_tokens_are_sound(self) -> Params:
        names = special_token_names(self)
        for name in names:
            if len(name) < 2 or re.search(r"[\s\u2581]", name):
                raise ValueError(f"special_tokens: {name!r} must have two characters or more, and no spaces")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"special_tokens: {', '.join(twice)} exists already")
        if self.vocabulary_size <= (least := BYTES + len(names)):
            raise ValueError(f"vocabulary_size: must be above {least}, which bytes and special tokens take")
        return self


def special_token_names(params: Params) -> list[str]:
    """In the order of their ids, which begin at 0."""
    preset = PRESETS.get(params.chat_template)
    return [*BASE_TOKENS, *(preset.special_tokens if preset else ()), *params.special_tokens]


def estimate(forecast: Forecast) -> Estimate:
    return Estimate(vocabulary_size=forecast.params.vocabulary_size)


def run(ctx: Context, params: Params) -> Result:
    from sentencepiece import SentencePieceProcessor

    text = ctx.inputs["text"]
    corpus = Corpus(text / "train.jsonl", params.sample_rows, ctx.seed)
    model = train_sentencepiece(corpus, params)
    ctx.journal.note(
        f"{params.vocabulary_size:,} {params.algorithm} pieces "
        f"from {corpus.rows:,} rows, {corpus.characters:,} characters"
    )

    processor = SentencePieceProcessor(model_proto=model)
    preset = PRESETS.get(params.chat_template)
    tokenizer = fast_tokenizer(processor, params, preset.template if preset else params.chat_template)
    tokenizer.save_pretrained(ctx.out)
    # Converters assume both of a sentencepiece model that says nothing.
    say_in_config(ctx.out, dict.fromkeys(ADDS, False))
    (ctx.out / MODEL_FILES[params.algorithm]).write_bytes(model)

    # Everything below looks at what a consumer will open, not at what was saved.
    tokenizer = load_tokenizer(ctx.out)
    check_chat_template(tokenizer, "params.chat_template")
    escape = Escape(params.algorithm, special_token_names(params))
    built_in = compare(processor, tokenizer, escape, BUILT_IN_TEXTS.items())
    heldout = compare(processor, tokenizer, escape, heldout_texts(text / "heldout.jsonl", params, ctx.seed))
    if not heldout.tokens:
        raise DataError(Problem("heldout.jsonl", "has no text", "Give the mix a larger held-out share."))
    ctx.journal.note(f"the same ids as sentencepiece and exact round trips on {built_in.texts + heldout.texts:,} texts")
    return Result(
        metrics={
            "heldout_characters_per_token": heldout.characters / heldout.tokens,
            "heldout_byte_fallback_fraction": heldout.byte_tokens / heldout.tokens,
            "parity_texts": built_in.texts + heldout.texts,
            "parity_ties": built_in.ties + heldout.ties,
            "train_characters": corpus.characters,
        },
        facts=Facts(**facts_of_tokenizer(tokenizer), train_rows=corpus.rows),
    )


STAGE = Stage(
    kind="tokenizer",
    version=2,
    summary="Trains a sentencepiece vocabulary and publishes it as a fast tokenizer with a chat template.",
    params=Params,
    inputs={"text": accepts(Kind.TEXT)},
    output=Kind.TOKENIZER,
    run=run,
    estimate=estimate,
)


# Training.

LINE = re.compile(r"[^\n]+\n*|\n+")
MAX_SENTENCE_CHARACTERS = 2000

BORDER = "\ufdd4"
"""Ends a sentence. Without it sentencepiece strips the line breaks at the end, and none becomes a token."""

UNUSABLE = str.maketrans("", "", f"\u2585\0{BORDER}")
"""sentencepiece skips every sentence with one of the first two. They still get ids: those of their bytes."""


@dataclass
class Corpus:
    """The sentences to train on, drawn from a file of rows, and counts of what was drawn."""

    path: Path
    sample_rows: int | None
    seed: int
    rows: int = 0
    characters: int = 0

    def sentences(self, escape: Escape) -> Iterator[str]:
        self.rows = self.characters = 0
        for text in sample_texts(self.path, self.sample_rows, self.seed):
            self.rows += 1
            self.characters += len(text)
            yield from (line.translate(UNUSABLE) + BORDER for line in split_lines(escape.text(text)))


def sample_texts(path: Path, count: int | None, seed: int) -> Iterator[str]:
    """The texts of `count` rows drawn at random, in the order of the file; all of them if there are no more."""
    with path.open("rb") as file:
        rows = sum(1 for _ in file)
    drawn = None if count is None or count >= rows else set(random.Random(seed).sample(range(rows), count))
    yield from (row["text"] for index, row in enumerate(read_rows(path)) if drawn is None or index in drawn)


def split_lines(text: str) -> Iterator[str]:
    """Each line with the line breaks after it, long ones in parts. Joined, they are the text.

    Trained on these, no piece goes on after a line break: a line has the same tokens whatever line stands before it.
    """
    for line in LINE.findall(text):
        yield from (
            line[start : start + MAX_SENTENCE_CHARACTERS] for start in range(0, len(line), MAX_SENTENCE_CHARACTERS)
        )


def train_sentencepiece(corpus: Corpus, params: Params) -> bytes:
    """The serialized sentencepiece model, in which the space has a piece.

    Raises `DataError` if the text does not give that many pieces.
    """
    from sentencepiece import SentencePieceProcessor

    try:
        model = train_once(corpus, params)
    except DataError:
        # One piece too many for the text as it is may be just enough with the space, and the most is then said with it.
        return train_once(corpus, params, required_chars=SPACE_SIGN)
    processor = SentencePieceProcessor(model_proto=model)
    if processor.piece_to_id(SPACE_SIGN) != processor.unk_id():
        return model
    # Text with no or hardly any spaces, as Chinese is. In bytes, the space would be decoded to the sign that stands for it.
    return train_once(corpus, params, required_chars=SPACE_SIGN)


def train_once(corpus: Corpus, params: Params, **options: str) -> bytes:
    from sentencepiece import SentencePieceTrainer

    names = special_token_names(params)
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=corpus.sentences(Escape(params.algorithm, names)),
            model_writer=model,
            model_type=params.algorithm,
            vocab_size=params.vocabulary_size,
            character_coverage=params.character_coverage,
            split_digits=params.split_digits,
            max_sentencepiece_length=params.max_piece_length_characters,
            byte_fallback=True,
            # Text stays as it is: nothing normalized, no space added or taken away, indentation in tokens of its own.
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=8 * MAX_SENTENCE_CHARACTERS,
            shuffle_input_sentence=False,
            pretokenization_delimiter=BORDER,
            # The sums of several threads differ from run to run, and so would the pieces.
            num_threads=1,
            unk_id=names.index(UNK),
            bos_id=names.index(BOS),
            eos_id=names.index(EOS),
            pad_id=names.index(PAD),
            unk_piece=UNK,
            bos_piece=BOS,
            eos_piece=EOS,
            pad_piece=PAD,
            control_symbols=names[names.index(MASK) :],
            minloglevel=2,
            **options,
        )
    except RuntimeError as error:
        raise training_error(str(error), corpus, params) from None
    return model.getvalue()


def training_error(message: str, corpus: Corpus, params: Params) -> Exception:
    """What sentencepiece means, in the words of the recipe."""
    if match := re.search(r"Vocabulary size too high.*<= (\d+)", message):
        return DataError(
            Problem(
                "params.vocabulary_size",
                f"is {params.vocabulary_size:,}, and {corpus.rows:,} rows of text give at most {int(match[1]):,}",
                f"Lower it to {int(match[1])} at most, or take more text.",
            )
        )
    if match := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return DataError(
            Problem(
                "params.vocabulary_size",
                f"is {params.vocabulary_size:,}, and the text's characters alone take {int(match[1]):,}",
                f"Raise it above {int(match[1])}, or lower character_coverage.",
            )
        )
    if not corpus.characters:
        return DataError(Problem(str(corpus.path), "has no text to train on", "Give the mix more text."))
    return RuntimeError(f"sentencepiece failed: {message}")


# From sentencepiece to a fast tokenizer.


def fast_tokenizer(processor: SentencePieceProcessor, params: Params, template: str) -> PreTrainedTokenizerBase:
    """The fast tokenizer with the ids of `processor`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    names = special_token_names(params)
    pieces = [processor.id_to_piece(index) for index in range(len(processor))]
    model = (
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=find_merges(processor, pieces),
            unk_token=UNK,
            fuse_unk=True,
            byte_fallback=True,
        )
        if params.algorithm == "bpe"
        else models.Unigram(
            [(piece, processor.get_score(index)) for index, piece in enumerate(pieces)],
            unk_id=pieces.index(UNK),
            byte_fallback=True,
        )
    )
    escape = Escape(params.algorithm, names)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([*escape.normalizers(), normalizers.Replace(" ", SPACE_SIGN)])
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE_SIGN, " "), decoders.ByteFallback(), decoders.Fuse(), *escape.decoders()]
    )
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=UNK,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        mask_token=MASK,
        extra_special_tokens=names[len(BASE_TOKENS) :],
        clean_up_tokenization_spaces=False,
        add_prefix_space=False,  # converters assume one
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.chat_template = template
    return tokenizer


def heldout_texts(path: Path, params: Params, seed: int) -> Iterator[tuple[str, str]]:
    """Name and text. For unigram line by line: over a long text the rounding of its sums would decide."""
    for number, text in enumerate(sample_texts(path, params.heldout_rows, seed), start=1):
        parts = [text] if params.algorithm == "bpe" else split_lines(text)
        yield from ((f"held-out text {number}", part) for part in parts)
