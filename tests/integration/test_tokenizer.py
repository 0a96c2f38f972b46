"""The tokenizer stage: what it publishes is what sentencepiece learned, and opens as any other tokenizer."""

from __future__ import annotations

import gzip
import json
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, normalizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, LlamaTokenizer

from pipeline.errors import ArtifactError, DataError
from pipeline.settings.resources import Resources
from pipeline.settings.strict import CHECKOUT, Reading, validate
from pipeline.stage import Context, Result, World
from pipeline.store.artifact import list_files
from pipeline.store.checkpoints import Checkpoints
from pipeline.store.journal import Journal
from stages.data.tokenizer import (
    Corpus,
    Params,
    find_merges,
    run,
    sample_texts,
    split_lines,
    train_once,
    train_sentencepiece,
)
from stages.lib.rows.canonical import read_rows
from stages.lib.text.chat_presets import SLIPWAY
from stages.lib.text.chat_rendering import special_ids
from stages.lib.text.chat_spans import encode_chat
from stages.lib.text.sentencepiece_parity import BUILT_IN_TEXTS, Escape, compare
from stages.lib.text.tokenizers import (
    copy_tokenizer,
    decode_ids,
    encode_texts,
    load_tokenizer,
    require_same_tokenizer,
    tokenizer_digest,
    tokenizer_facts,
)
from tests import rows
from tests.families import of_gemma, of_llama_3

WORDS = (
    "the a of ship slip way data model token train block mask loss def return self import none true 10 42 x1".split()
)


def own_texts(count: int) -> list[str]:
    """Made-up English, Chinese and Python, the same in every run."""
    rng = random.Random(0)
    texts = []
    for _ in range(count):
        words = " ".join(rng.choices(WORDS, k=40))
        code = "\n".join(f"    {rng.choice(WORDS)} = {rng.choice(WORDS)}(\t{rng.randint(0, 99)})" for _ in range(6))
        chinese = "".join(chr(0x4E00 + rng.randint(0, 60)) for _ in range(30))
        texts.append(f"{words}.\n\ndef {rng.choice(WORDS)}(self):\n{code}\n\n{chinese}\u3002\n")
    return texts


def real_texts(folder: Path, count: int) -> list[str]:
    """English help pages, the beginnings of Python proposals and of Chinese chapters, and Chinese poems."""
    texts = []
    for name in ("tldr_pages", "peps", "d2l_zh", "tang_poems_zh"):
        with gzip.open(folder / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            texts += [json.loads(line)["text"][:1500] for line, _ in zip(file, range(count), strict=False)]
    return texts


def write_text(folder: Path, texts: list[str]) -> Path:
    """A TEXT artifact in which every tenth text is held out."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, kept in (("train", lambda i: i % 10), ("heldout", lambda i: not i % 10)):
        lines = [json.dumps({"text": text}, ensure_ascii=False) for i, text in enumerate(texts) if kept(i)]
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return folder


def make(text: Path, out: Path, **params: Any) -> Result:
    out.mkdir(parents=True)
    ctx = Context(
        inputs={"text": text},
        out=out,
        work=out.parent,
        resume=None,
        checkpoints=Checkpoints(out.parent / "checkpoints"),
        seed=7,
        resources=Resources(),
        journal=Journal(out.parent / "journal.jsonl", writes=True),
        world=World(),
        stop_requested=lambda: False,
    )
    return run(ctx, Params(**params))


@pytest.fixture(scope="module", params=["few words", "many words"])
def text(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a small vocabulary, and of one with so many names that a tokenizer of 1,000 tokens learns parts of them."""
    texts = own_texts(200) if request.param == "few words" else rows.texts(300)
    return write_text(tmp_path_factory.mktemp(request.param.partition(" ")[0]), texts)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("own"), own_texts(100))


Made = tuple[Path, Result]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def made(request: pytest.FixtureRequest, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A published tokenizer per algorithm and text."""
    out = tmp_path_factory.mktemp("made") / "out"
    size = 480 if text.name.startswith("few") else 1000
    return out, make(text, out, vocabulary_size=size, algorithm=request.param)


@pytest.fixture(scope="module")
def small(own: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small BPE tokenizer."""
    out = tmp_path_factory.mktemp("small") / "out"
    make(own, out, vocabulary_size=480)
    return out


def sentencepiece_model(folder: Path) -> str:
    """The sentencepiece model that the stage published beside the fast tokenizer."""
    (path,) = folder.glob("*.model")
    return str(path)


# What is published.


def test_metrics_count_the_heldout_text(made: Made, text: Path) -> None:
    """Characters and tokens counted here anew: the characters of the file, the ids of sentencepiece."""
    out, result = made
    processor = SentencePieceProcessor(model_file=sentencepiece_model(out))
    texts = [row["text"] for row in read_rows(text / "heldout.jsonl")]
    ids = [token for each in texts for token in processor.encode(each)]
    metrics = result.metrics
    # Lines one by one, and escaped signs, may have a token more or less than whole texts.
    assert metrics["heldout_characters_per_token"] == pytest.approx(sum(map(len, texts)) / len(ids), rel=1e-3)
    share = sum(processor.is_byte(token) for token in ids) / len(ids)
    assert metrics["heldout_byte_fallback_fraction"] == pytest.approx(share, abs=1e-3)
    assert metrics["parity_texts"] >= len(BUILT_IN_TEXTS) + len(texts)
    assert metrics["train_characters"] == sum(len(row["text"]) for row in read_rows(text / "train.jsonl"))


def test_real_text_in_two_languages(shared_data: Path, tmp_path: Path) -> None:
    """Both algorithms, the parity that the stage itself demands, and every text as it was after a round trip."""
    texts = real_texts(shared_data / "text", 50)
    text = write_text(tmp_path / "text", texts)
    for algorithm in ("bpe", "unigram"):
        out = tmp_path / algorithm / "out"
        test_metrics_count_the_heldout_text((out, make(text, out, vocabulary_size=3000, algorithm=algorithm)), text)
        tokenizer = load_tokenizer(out)
        for each, ids in zip(texts, encode_texts(tokenizer, texts), strict=True):
            assert decode_ids(tokenizer, ids) == each


def test_any_consumer_opens_the_same_tokenizer(made: Made) -> None:
    """AutoTokenizer, as every other program uses it, against sentencepiece, on texts that no check of the stage saw."""
    out, _ = made
    tokenizer = AutoTokenizer.from_pretrained(out)
    processor = SentencePieceProcessor(model_file=sentencepiece_model(out))
    rng = random.Random(1)
    for _ in range(200):
        each = "".join(rng.choices("  \n\tabz09.,:(){}'\"\u00e9\u4e2d\u6587\u3002\u0434\u05d0\U0001f680", k=60))
        ids = tokenizer(each)["input_ids"]
        expected = processor.encode(each)
        if ids != expected:  # only where two unigram splits have the same score
            scores = [sum(map(processor.get_score, found)) for found in (ids, expected)]
            assert "unigram" in str(json.loads((out / "tokenizer.json").read_bytes())["model"]["type"]).lower()
            assert scores[0] == pytest.approx(scores[1], rel=1e-6)
        assert tokenizer.decode(ids) == each


def test_lossless_whatever_the_text(made: Made) -> None:
    """Also for the signs that the vocabulary uses for itself, and random characters of all of Unicode."""
    tokenizer = load_tokenizer(made[0])
    rng = random.Random(2)
    codes = [c for c in range(0x11_0000) if not 0xD800 <= c < 0xE000]
    texts = ["".join(map(chr, rng.choices(codes, k=30))) for _ in range(100)]
    texts += ["".join(rng.choices("\u2581\ufdd0\ufdd1\ufdd2\ufdd3 a<s>0xA", k=40)) for _ in range(300)]
    for each, ids in zip(texts, encode_texts(tokenizer, texts), strict=True):
        assert decode_ids(tokenizer, ids) == each


def test_no_text_gives_special_or_byte_tokens_it_only_spells(made: Made) -> None:
    tokenizer = load_tokenizer(made[0])
    names = [token.content for token in tokenizer.added_tokens_decoder.values()]
    assert len(names) == 9
    special = special_ids(tokenizer)
    for each in [*names, "".join(names), f"x{names[0]}y", "<0x0A>", "<<0x41>>"]:
        (ids,) = encode_texts(tokenizer, [each])
        assert not special & set(ids)
        assert decode_ids(tokenizer, ids) == each
    # Where special tokens are meant, in a rendered chat, they are found.
    assert tokenizer("<s>")["input_ids"] == [tokenizer.bos_token_id]


def test_no_token_goes_on_after_a_line_break(made: Made) -> None:
    pieces = AutoTokenizer.from_pretrained(made[0]).get_vocab()
    assert any("\n" in piece for piece in pieces)
    assert not [piece for piece in pieces if re.search(r"\n[^\n]", piece)]


def test_facts_are_those_of_the_folder(made: Made) -> None:
    out, result = made
    tokenizer = AutoTokenizer.from_pretrained(out)
    facts = result.facts
    assert facts.model_dump(include=set(tokenizer_facts(out))) == tokenizer_facts(out)
    assert [facts.bos_token_id, facts.eos_token_id, facts.pad_token_id] == [1, 2, 3]
    assert tokenizer.convert_ids_to_tokens(facts.stop_token_ids) == ["</s>", "<|end|>"]
    assert tokenizer.mask_token_id == 4
    assert facts.vocabulary_size == len(tokenizer) == len(SentencePieceProcessor(model_file=sentencepiece_model(out)))
    assert set(tokenizer("a b")) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
def test_the_same_input_gives_the_same_bytes(own: Path, tmp_path: Path, algorithm: str) -> None:
    for name in ("one", "two"):
        make(own, tmp_path / name, vocabulary_size=400, algorithm=algorithm, sample_rows=60)
    assert list_files(tmp_path / "one") == list_files(tmp_path / "two")


def test_rows_are_drawn_by_the_seed_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = write_text(tmp_path, [str(i) for i in range(100)]) / "train.jsonl"
    everything = [str(i) for i in range(100) if i % 10]
    assert list(sample_texts(path, None, 0)) == list(sample_texts(path, 90, 0)) == everything
    drawn = list(sample_texts(path, 30, 0))
    assert len(drawn) == 30 and drawn == sorted(drawn, key=int) == list(sample_texts(path, 30, 0))
    assert drawn != list(sample_texts(path, 30, 1))


def test_lines_are_split_after_their_line_breaks() -> None:
    assert list(split_lines("\n\na\n\n b\r\nc")) == ["\n\n", "a\n\n", " b\r\n", "c"]
    assert [len(part) for part in split_lines("x" * 4500)] == [2000, 2000, 500]


# Templates and special tokens.


def test_a_template_of_ones_own_is_read_into_the_params(own: Path, tmp_path: Path) -> None:
    """By content, so that the artifact's identity follows the file's text and a worker elsewhere needs no file."""
    file = tmp_path / "mine.jinja"
    file.write_text(SLIPWAY.replace("<|end|>", "<|over|>"), encoding="utf-8")
    own_tokens = ["<|system|>", "<|user|>", "<|assistant|>", "<|over|>"]
    given = {"vocabulary_size": 450, "chat_template": "mine.jinja", "special_tokens": own_tokens}
    params, problems = validate(Params, given, "params", Reading([tmp_path]))
    assert params is not None and not problems
    assert "<|over|>" in params.chat_template
    again, problems = validate(Params, params.model_dump(), "params", Reading([Path("/")]))
    assert (again, problems) == (params, [])
    result = make(own, tmp_path / "out", **params.model_dump())
    assert result.facts.stop_token_ids == [2, 8]
    assert AutoTokenizer.from_pretrained(tmp_path / "out").convert_ids_to_tokens(8) == "<|over|>"


def test_chatml_has_its_own_tokens(own: Path, tmp_path: Path) -> None:
    make(own, tmp_path / "out", vocabulary_size=450, chat_template="chatml")
    tokenizer = load_tokenizer(tmp_path / "out")
    messages = [{"role": "user", "content": "def x1"}, {"role": "assistant", "content": "# none\n"}]
    ids, mask = encode_chat(tokenizer, messages)
    said = [token for token, bit in zip(ids, mask, strict=True) if bit]
    assert decode_ids(tokenizer, said) == "# none\n<|im_end|>"
    assert tokenizer.convert_ids_to_tokens(tokenizer_facts(tmp_path / "out")["stop_token_ids"]) == [
        "</s>",
        "<|im_end|>",
    ]


def test_a_template_whose_end_token_is_no_token_is_refused(own: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"params\.chat_template: does not end the assistant's turns with a special token"
    ):
        make(own, tmp_path / "out", vocabulary_size=450, chat_template=SLIPWAY.replace("<|end|>", "<|over|>"))


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"chat_template": "slipwy"}, "no preset and no file has the name 'slipwy'. Did you mean 'slipway'?"),
        ({"special_tokens": ["<a b>"]}, "'<a b>' must have two characters or more, and no spaces"),
        ({"special_tokens": ["a"]}, "'a' must have two characters or more"),
        ({"special_tokens": ["<s>", "<|end|>", "<x>", "<x>"]}, "<s>, <x>, <|end|> exists already"),
        ({"vocabulary_size": 265}, "must be above 265, which bytes and special tokens take"),
        ({"vocabulary_size": 100}, "greater than 256"),
        ({"algorithm": "wordpiece"}, "'bpe' or 'unigram'"),
    ],
)
def test_mistakes_in_params_are_found_before_anything_runs(given: dict[str, Any], problem: str) -> None:
    params, problems = validate(Params, given, "params")
    assert params is None
    assert problem in str(problems[0])


# Too little text, too few pieces.


def test_a_vocabulary_that_the_text_does_not_give(own: Path, tmp_path: Path) -> None:
    """The size that the message names is the largest that works: one more fails, and it itself does not."""
    with pytest.raises(
        DataError, match=r"params\.vocabulary_size: is 30,000, and 90 rows of text give at most"
    ) as caught:
        make(own, tmp_path / "out", vocabulary_size=30_000)
    most = int(re.search(r"Lower it to (\d+) at most", str(caught.value))[1])
    with pytest.raises(DataError, match=f"Lower it to {most} at most"):
        make(own, tmp_path / "more", vocabulary_size=most + 1)
    assert make(own, tmp_path / "most", vocabulary_size=most).facts.vocabulary_size == most


def test_a_vocabulary_too_small_for_the_characters(own: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is 270, and the text's characters alone take \d+\. Raise it above \d+"):
        make(own, tmp_path / "out", vocabulary_size=270, character_coverage=1.0)


@pytest.mark.parametrize("texts", [[], [""] * 10])
def test_no_text(tmp_path: Path, texts: list[str]) -> None:
    with pytest.raises(DataError, match=r"train\.jsonl: has no text to train on"):
        make(write_text(tmp_path / "text", texts), tmp_path / "out")


def test_no_heldout_text(own: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    (text / "train.jsonl").write_bytes((own / "train.jsonl").read_bytes())
    (text / "heldout.jsonl").touch()
    with pytest.raises(DataError, match=r"heldout\.jsonl: has no text"):
        make(text, tmp_path / "out", vocabulary_size=450)


def test_text_full_of_reserved_names(tmp_path: Path) -> None:
    """sentencepiece skips sentences with its reserved characters; a text made of them all still gives a tokenizer."""
    texts = [f"<s>one</s> <0x0A>{i} <|end|><unk>\u2585 \u2581 two\0three\n" for i in range(200)]
    result = make(write_text(tmp_path / "text", texts), tmp_path / "out", vocabulary_size=300)
    assert result.metrics["heldout_characters_per_token"] > 1


# The comparison finds what is different.


def compared(folder: Path, change: Callable[[Any], None]) -> None:
    tokenizer = load_tokenizer(folder)
    change(tokenizer)
    processor = SentencePieceProcessor(model_file=sentencepiece_model(folder))
    compare(processor, tokenizer, Escape("bpe", []), [("text 1", "the"), ("text 2", "a ship  of data")])


def lower(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("data", "DATA")


def lose_spaces(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.decoder = None


def add_word(tokenizer: Any) -> None:
    tokenizer.add_tokens([AddedToken("ship")])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lower, r"text 2 'a ship  of data': has the tokens .* from token \d+ on; sentencepiece gives"),
        (lose_spaces, r"text 2 'a ship  of data': is decoded to .* from character 2 on, not 'ship  of d'"),
        (add_word, r"text 2 'a ship  of data': has the tokens .* from token 1 on"),
    ],
)
def test_a_difference_is_named_with_its_text_and_place(
    small: Path, change: Callable[[Any], None], problem: str
) -> None:
    compared(small, lambda tokenizer: None)
    with pytest.raises(DataError, match=problem):
        compared(small, change)


# Copies and comparisons between stages.


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen3", "gpt2", "bert", "roberta", "modernbert"])
def test_a_copy_beside_a_model_is_the_same_tokenizer(small: Path, tmp_path: Path, model_type: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    (tmp_path / "vocab.txt").write_text("left over from another tokenizer")
    assert copy_tokenizer(small, tmp_path) == tokenizer_facts(small)
    assert not (tmp_path / "vocab.txt").exists()
    assert (tmp_path / "tokenizer.json").read_bytes() == (small / "tokenizer.json").read_bytes()
    messages = [{"role": "user", "content": " a  ship"}, {"role": "assistant", "content": "42"}]
    assert encode_chat(load_tokenizer(tmp_path), messages) == encode_chat(load_tokenizer(small), messages)


def test_an_architecture_that_replaces_the_tokenizer_is_refused(small: Path, tmp_path: Path) -> None:
    """transformers opens it as another class, without a word, and the ids are wrong."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(ArtifactError, match="opens it as Qwen2Tokenizer because of the model_type"):
        copy_tokenizer(small, tmp_path)


@pytest.mark.parametrize(
    ("named", "model_type"), [("GPT2Tokenizer", "gpt2"), ("GPT2TokenizerFast", "llama"), ("GemmaTokenizer", "gemma")]
)
def test_added_tokens_that_the_config_does_not_list_are_those_of_tokenizer_json(
    tmp_path: Path, named: str, model_type: str
) -> None:
    """A tokenizer_config.json that lists some of them alone: transformers then leaves out the others, and reads their letters."""
    written = of_gemma() if model_type == "gemma" else of_llama_3()
    written.add_special_tokens(["<|user|>", "<|assistant|>"])
    home = tmp_path / "home"
    home.mkdir()
    written.save(str(home / "tokenizer.json"))
    kept = {str(number): vars_of(token) for number, token in list(written.get_added_tokens_decoder().items())[:-2]}
    said = {"tokenizer_class": named, "added_tokens_decoder": kept}
    (home / "tokenizer_config.json").write_text(json.dumps(said))
    (home / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": written.get_vocab_size()}))
    assert not {"<|user|>", "<|assistant|>"} & set(AutoTokenizer.from_pretrained(home).get_vocab())
    text = "<|user|>hi<|assistant|>"
    opened = load_tokenizer(home)
    assert opened(text, add_special_tokens=False)["input_ids"] == written.encode(text, add_special_tokens=False).ids
    assert copy_tokenizer(home, tmp_path / "copy")["vocabulary_size"] == written.get_vocab_size()
    assert len(AutoTokenizer.from_pretrained(tmp_path / "copy")) == written.get_vocab_size()
    (home / "config.json").write_text(
        json.dumps({"model_type": model_type, "vocab_size": written.get_vocab_size() - 2})
    )
    with pytest.raises(ArtifactError, match=r"its tokenizer has \d+ tokens, and the model embeds"):
        load_tokenizer(home)


def vars_of(token: AddedToken) -> dict[str, Any]:
    names = ("content", "lstrip", "rstrip", "normalized", "single_word", "special")
    return {name: getattr(token, name) for name in names}


def test_folders_without_a_usable_tokenizer_are_refused(small: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="holds no tokenizer that can be opened"):
        load_tokenizer(tmp_path)
    # A known trap: the class takes the sentencepiece model without a word, and knows no text.
    LlamaTokenizer(vocab_file=sentencepiece_model(small)).save_pretrained(tmp_path / "llama")
    assert AutoTokenizer.from_pretrained(tmp_path / "llama")("a ship")["input_ids"] == []
    with pytest.raises(ArtifactError, match="holds a tokenizer with an empty vocabulary"):
        load_tokenizer(tmp_path / "llama")
    (tmp_path / "tokenizer.json").write_bytes((small / "tokenizer.json").read_bytes()[:1000])
    with pytest.raises(ArtifactError, match="holds no tokenizer that can be opened"):
        load_tokenizer(tmp_path)


def test_the_digest_is_of_what_makes_ids(small: Path, tmp_path: Path) -> None:
    """Padding, truncation, what is put around texts, and saving anew change no id; a token more does."""
    tokenizer = load_tokenizer(small)
    digest = tokenizer_digest(tokenizer)
    tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save_pretrained(tmp_path / "same")
    assert load_tokenizer(tmp_path / "same")("a")["input_ids"][0] == 1
    require_same_tokenizer(small, tmp_path / "same", "model")
    tokenizer.add_tokens(["slipways"])
    assert tokenizer_digest(tokenizer) != digest
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ArtifactError, match=r"inputs\.model: the tokenizer of .*small.* is not the one of .*other"):
        require_same_tokenizer(small, tmp_path / "other", "inputs.model")


def test_planning_imports_nothing_heavy() -> None:
    code = "import sys, stages.data.tokenizer, stages.data.pack; print(*sorted(sys.modules))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=CHECKOUT
    ).stdout
    heavy = {"torch", "transformers", "numpy", "tokenizers", "sentencepiece", "jinja2", "datasets"}
    assert not heavy & set(loaded.split())


class FewPieces:
    """A sentencepiece model of few pieces; the earlier one is joined first."""

    pieces = ("<unk>", "<s>", "<0x0A>", "ab", "abc", "bc", "s>", "0A>", "<0x", "<", "s", ">", "a", "b", "c")

    def is_unknown(self, index: int) -> bool:
        return index == 0

    def is_control(self, index: int) -> bool:
        return index == 1

    def is_byte(self, index: int) -> bool:
        return index == 2

    def get_score(self, index: int) -> float:
        return -float(index)


def test_pairs_that_spell_special_and_byte_tokens_are_not_joined() -> None:
    """`<` and `s>` are pieces, `<0x` and `0A>` too, and text with them must not become bos or a line break."""
    processor: Any = FewPieces()
    merges = find_merges(processor, list(FewPieces.pieces))
    assert merges == [("a", "b"), ("a", "bc"), ("ab", "c"), ("b", "c"), ("s", ">")]


@pytest.fixture(autouse=True)
def quiet(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """sentencepiece writes pages to the console unless told otherwise."""
    yield
    assert "trainer_interface" not in capfd.readouterr().err


# Text without spaces.


def han_texts(change: Callable[[int, str], str]) -> list[str]:
    """A hundred lines of 91 Chinese characters, as `change` leaves each; the same in every run."""
    rng = random.Random(3)
    characters = [chr(0x4E00 + place) for place in range(150)]
    return [change(index, "".join(rng.choices(characters, k=90)) + "\u3002") for index in range(100)]


def thai_texts() -> list[str]:
    rng = random.Random(4)
    return ["".join(chr(0x0E01 + rng.randint(0, 45)) for _ in range(120)) for _ in range(100)]


SPACELESS = {
    "none": han_texts(lambda index, text: text),
    "five": han_texts(lambda index, text: text[:20] + " " * (1 <= index <= 5) + text[20:]),
    "a run": han_texts(lambda index, text: text[:20] + "    " * (index == 1) + text[20:]),
    "held out only": han_texts(lambda index, text: text[:20] + "  " * (index % 10 == 0) + text[20:]),
    "ideographic": han_texts(lambda index, text: text[:20] + "\u3000" + text[20:]),
    "tabs and lines": han_texts(lambda index, text: text[:20] + "\t" + text[20:] + "\n\n\t"),
    "thai": thai_texts(),
}


@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
@pytest.mark.parametrize("kind", SPACELESS)
def test_the_space_has_a_token_whatever_the_text(kind: str, algorithm: str, tmp_path: Path) -> None:
    """`run` itself compares with sentencepiece and decodes its built-in texts, in which there are spaces of all kinds."""
    text = write_text(tmp_path / "text", SPACELESS[kind])
    result = make(text, tmp_path / "out", vocabulary_size=330 if kind == "thai" else 424, algorithm=algorithm)
    tokenizer = load_tokenizer(tmp_path / "out")
    (space,) = encode_texts(tokenizer, [" "])
    assert tokenizer.convert_ids_to_tokens(space) == ["\u2581"]
    for said in ("   leading", "\u4e00 \u4e01  ", "\u3000 \t \n"):
        (ids,) = encode_texts(tokenizer, [said])
        assert decode_ids(tokenizer, ids) == said
    assert result.metrics["train_characters"] == sum(map(len, (SPACELESS[kind][i] for i in range(100) if i % 10)))


def test_where_the_space_has_a_token_nothing_else_is_asked_for(own: Path, tmp_path: Path) -> None:
    """Of ordinary text the model is, byte for byte, the one that is trained without asking for the space."""
    spaceless = write_text(tmp_path / "text", SPACELESS["none"])
    for text, size, same in ((own, 480, True), (spaceless, 424, False)):
        params, corpus = Params(vocabulary_size=size), Corpus(text / "train.jsonl", None, 7)
        assert (train_sentencepiece(corpus, params) == train_once(corpus, params)) == same


@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
def test_the_largest_vocabulary_that_is_named_works_for_text_without_spaces(algorithm: str, tmp_path: Path) -> None:
    """Digits alone: with each a piece of its own nothing merges, so the vocabulary for it has one size only."""
    rng = random.Random(5)
    text = write_text(tmp_path / "text", ["".join(rng.choices("0123456789", k=100)) for _ in range(80)])
    with pytest.raises(DataError, match=r"Lower it to [0-9]+ at most") as refused:
        make(text, tmp_path / "refused", vocabulary_size=400, algorithm=algorithm)
    most = int(re.search("Lower it to ([0-9]+) at most", str(refused.value))[1])  # type: ignore[index]
    make(text, tmp_path / "made", vocabulary_size=most, algorithm=algorithm)
    tokenizer = load_tokenizer(tmp_path / "made")
    assert tokenizer.convert_tokens_to_ids("\u2581") != tokenizer.unk_token_id
