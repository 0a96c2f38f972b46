"""The pack stage and what reads its files. Expected ids and positions are worked out here document by document."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from pipeline.errors import ArtifactError, DataError, Preempted
from pipeline.settings.resources import Resources
from pipeline.stage import Context, Estimate, Forecast, Result, World
from pipeline.store.artifact import list_files
from pipeline.store.checkpoints import Checkpoints
from pipeline.store.journal import Journal
from stages.data import pack, tokenizer
from stages.lib.text.packed import Block, PackedTokens, TokensInfo, TokensWriter, read_info
from stages.lib.text.tokenizers import load_tokenizer, tokenizer_digest
from tests import rows

LENGTH = 16


def context(inputs: dict[str, Path], out: Path, *, stop: bool = False) -> Context:
    out.mkdir(parents=True)
    return Context(
        inputs=inputs,
        out=out,
        work=out.parent,
        resume=None,
        checkpoints=Checkpoints(out.parent / "checkpoints"),
        seed=7,
        resources=Resources(),
        journal=Journal(out.parent / "journal.jsonl", writes=True),
        world=World(),
        stop_requested=lambda: stop,
    )


def write_text(folder: Path, train: list[str], heldout: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, texts in (("train", train), ("heldout", heldout)):
        lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return folder


TRAIN = [
    "a ship leaves the slip",
    "",
    "</s>",
    "x" * 100,
    "\u8239\u6765\u4e86\u3002\n\n\tdef f():  pass",
    "b",
    "c <s> d",
] * 3
HELDOUT = ["the ship is back", "a slip of the pen, <s>twice</s>", "e"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"), TRAIN, HELDOUT)


@pytest.fixture(scope="module")
def made(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer artifact."""
    out = tmp_path_factory.mktemp("tokenizer") / "out"
    tokenizer.run(context({"text": text}, out), tokenizer.Params(vocabulary_size=320, character_coverage=1.0))
    return out


@pytest.fixture(scope="module")
def processor(made: Path) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(made / "tokenizer.model"))


def run(text: Path, made: Path, out: Path, **params: Any) -> Result:
    return pack.run(
        context({"text": text, "tokenizer": made}, out), pack.PackParams(**{"sequence_length": LENGTH, **params})
    )


@pytest.fixture(scope="module")
def packed(text: Path, made: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    out = tmp_path_factory.mktemp("packed") / "out"
    return out, run(text, made, out)


def documents(processor: SentencePieceProcessor, texts: list[str]) -> list[list[int]]:
    """Each text that is not empty as bos (1), the ids of sentencepiece, eos (2)."""
    return [[1, *processor.encode(text), 2] for text in texts if text]


def naive_blocks(docs: list[list[int]], length: int) -> list[tuple[list[int], list[int], list[int]]]:
    """Ids, positions and document numbers of each block, token by token."""
    blocks = []
    stream = [(token, number, place) for number, doc in enumerate(docs) for place, token in enumerate(doc)]
    for begin in range(0, len(stream) - length + 1, length):
        block = stream[begin : begin + length]
        positions: list[int] = []
        for i, (_, _, place) in enumerate(block):
            positions.append(0 if i == 0 or place == 0 else positions[-1] + 1)
        blocks.append(([token for token, _, _ in block], positions, [number for _, number, _ in block]))
    return blocks


# What the stage writes.


@pytest.mark.parametrize(("split", "texts"), [("train", TRAIN), ("heldout", HELDOUT)])
def test_blocks_are_the_documents_one_after_the_other(
    packed: tuple[Path, Result], processor: SentencePieceProcessor, split: Any, texts: list[str]
) -> None:
    docs = documents(processor, texts)
    expected = naive_blocks(docs, LENGTH)
    found = PackedTokens(packed[0], split)
    assert len(found) == len(expected) > 1
    for index in range(len(found)):
        block = found.block(index)
        assert all(part.dtype == np.int64 and part.shape == (LENGTH,) for part in block)
        assert tuple(part.tolist() for part in block) == expected[index]
    assert found.num_documents == len(docs)
    assert [found.document(i).tolist() for i in range(len(docs))] == docs
    tail = [token for doc in docs for token in doc][len(found) * LENGTH :]
    assert found.dropped_tail_tokens == len(tail)


def test_metrics_and_facts_count_what_was_written(
    packed: tuple[Path, Result], processor: SentencePieceProcessor, made: Path
) -> None:
    out, result = packed
    train, heldout = (documents(processor, texts) for texts in (TRAIN, HELDOUT))
    num_train, num_heldout = (sum(map(len, docs)) for docs in (train, heldout))
    text_tokens = num_train - 2 * len(train)
    assert result.metrics == {
        "train_tokens": num_train,
        "heldout_tokens": num_heldout,
        "train_blocks": num_train // LENGTH,
        "heldout_blocks": num_heldout // LENGTH,
        "documents": 18 + 3,
        "empty_documents": 3,
        "dropped_tail_tokens": num_train % LENGTH,
        "heldout_dropped_tail_tokens": num_heldout % LENGTH,
        "characters_per_token": sum(map(len, TRAIN)) / text_tokens,
    }
    facts = result.facts
    assert (facts.train_tokens, facts.heldout_tokens, facts.max_length_tokens) == (num_train, num_heldout, LENGTH)
    assert facts.tokenizer_digest == tokenizer_digest(load_tokenizer(made)) == read_info(out).tokenizer_digest
    assert facts.vocabulary_size == 320


def test_bos_and_eos_stand_once_whatever_a_text_spells(packed: tuple[Path, Result]) -> None:
    found = PackedTokens(packed[0])
    for index in range(found.num_documents):
        ids = found.document(index).tolist()
        assert (ids[0], ids[-1]) == (1, 2)
        assert not {0, 1, 2, 3, 4} & set(ids[1:-1])


@pytest.mark.parametrize(("bos", "eos"), [(True, False), (False, True), (False, False)])
def test_bos_and_eos_are_optional(
    text: Path, made: Path, processor: SentencePieceProcessor, tmp_path: Path, bos: bool, eos: bool
) -> None:
    run(text, made, tmp_path / "out", add_bos=bos, add_eos=eos)
    found = PackedTokens(tmp_path / "out")
    expected = [[1] * bos + processor.encode(each) + [2] * eos for each in TRAIN if each]
    assert [found.document(i).tolist() for i in range(found.num_documents)] == expected
    assert (found.info.bos_token_id, found.info.eos_token_id) == (1 if bos else None, 2 if eos else None)


def test_batches_change_nothing(
    packed: tuple[Path, Result], text: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack, "BATCH_CHARACTERS", 30)
    assert len(list(pack.batches(text / "train.jsonl"))) > 3
    run(text, made, tmp_path / "out")
    assert list_files(tmp_path / "out") == list_files(packed[0])


def test_the_tokenizer_travels_along(packed: tuple[Path, Result], made: Path) -> None:
    copied = list_files(packed[0] / "tokenizer")
    assert copied == list_files(made)
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "tokenizer.model"} == set(copied)
    assert load_tokenizer(packed[0])("a ship")["input_ids"] == load_tokenizer(made)("a ship")["input_ids"]


def test_a_model_lends_its_tokenizer_and_nothing_else(
    packed: tuple[Path, Result], text: Path, made: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in made.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    (model / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (model / "model.safetensors").write_bytes(b"weights")
    run(text, model, tmp_path / "out")
    assert list_files(tmp_path / "out") == list_files(packed[0])


def require_unpacked(texts: list[str], made: Path, folder: Path) -> None:
    """Asserts that every document decodes to the text that it was."""
    run(write_text(folder / "text", texts, texts[:9]), made, folder / "out", sequence_length=128)
    found, opened = PackedTokens(folder / "out"), load_tokenizer(made)
    assert found.num_documents == len(texts)
    for index, each in enumerate(texts):
        assert opened.decode(found.document(index)[1:-1], clean_up_tokenization_spaces=False) == each


def test_every_document_decodes_to_the_text_that_it_was(made: Path, tmp_path: Path) -> None:
    require_unpacked(rows.texts(200), made, tmp_path)


def test_real_text_in_two_languages(shared_data: Path, made: Path, tmp_path: Path) -> None:
    texts = []
    for name in ("tldr_pages", "d2l_zh"):
        with gzip.open(shared_data / "text" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            texts += [json.loads(line)["text"][:2000] for line, _ in zip(file, range(100), strict=False)]
    require_unpacked(texts, made, tmp_path)


# What is refused.


def test_text_smaller_than_a_block(text: Path, made: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        run(text, made, tmp_path / "out", sequence_length=100_000)
    train, heldout = map(str, caught.value.problems)
    assert train.startswith("params.sequence_length: is 100,000, and the train text has only ")
    assert heldout.endswith("give the mix a larger held-out share.")
    heldout_tokens = PackedTokens(tmp_path / "out", "heldout").num_tokens
    with pytest.raises(DataError, match=f"the heldout text has only {heldout_tokens} tokens"):
        run(text, made, tmp_path / "one_more", sequence_length=heldout_tokens + 1)
    run(text, made, tmp_path / "exact", sequence_length=heldout_tokens)
    assert len(PackedTokens(tmp_path / "exact", "heldout")) == 1


def test_no_heldout_rows_at_all(made: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the heldout text has only 0 tokens"):
        run(write_text(tmp_path / "text", TRAIN, []), made, tmp_path / "out")


def test_a_tokenizer_without_bos(text: Path, tmp_path: Path) -> None:
    vocabulary = {chr(code): code for code in range(128)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="\x00").save_pretrained(tmp_path / "made")
    with pytest.raises(
        DataError, match=r"params\.add_bos: is true, and the tokenizer has no bos token\. Set add_bos: false"
    ):
        run(text, tmp_path / "made", tmp_path / "out")
    run(text, tmp_path / "made", tmp_path / "without", add_bos=False)
    assert PackedTokens(tmp_path / "without").document(0)[-1] == 0


def test_asked_to_stop_it_stops(text: Path, made: Path, tmp_path: Path) -> None:
    with pytest.raises(Preempted):
        pack.run(
            context({"text": text, "tokenizer": made}, tmp_path / "out", stop=True),
            pack.PackParams(sequence_length=LENGTH),
        )


def test_blocks_longer_than_the_model_are_found_when_planning() -> None:
    def problems(length: int, architecture: dict[str, Any] | None) -> list[str]:
        inputs = {"text": Estimate(), "tokenizer": Estimate(vocabulary_size=7, architecture=architecture)}
        forecast = Forecast(pack.PackParams(sequence_length=length), Resources(), inputs)
        assert pack.estimate(forecast).vocabulary_size == 7
        assert pack.estimate(forecast).sequence_length == length
        return list(map(str, pack.check(forecast)))

    assert problems(513, {"max_position_embeddings": 512}) == [
        "params.sequence_length: is 513, and the model takes 512 tokens. Lower it to 512."
    ]
    assert problems(512, {"max_position_embeddings": 512}) == problems(513, None) == []


# Reading.


def write_tokens(folder: Path, docs: list[list[int]], vocabulary_size: int, length: int) -> Path:
    for split in ("train", "heldout"):
        with TokensWriter(folder, split, vocabulary_size) as writer:  # type: ignore[arg-type]
            for doc in docs:
                writer.add(doc)
    info = TokensInfo(
        dtype="uint16" if vocabulary_size <= 65535 else "uint32",
        sequence_length=length,
        vocabulary_size=vocabulary_size,
        tokenizer_digest="",
        bos_token_id=None,
        eos_token_id=None,
        train_tokens=writer.tokens,
        heldout_tokens=writer.tokens,
        train_documents=writer.documents,
        heldout_documents=writer.documents,
    )
    (folder / "tokens.json").write_text(info.model_dump_json())
    return folder


def test_a_block_by_hand(tmp_path: Path) -> None:
    """Documents of 2, 5 and 3 tokens in blocks of 4: | 0 1 0 1 | 2 3 4 0 | and a tail of two tokens.

    The second block begins within document 1: its positions count from the block's start.
    """
    found = PackedTokens(write_tokens(tmp_path, [[10, 11], [20, 21, 22, 23, 24], [30, 31, 32]], 100, 4))
    assert len(found) == 2 and found.dropped_tail_tokens == 2
    first, second = found.block(0), found.block(1)
    assert first.input_ids.tolist() == [10, 11, 20, 21]
    assert first.position_ids.tolist() == [0, 1, 0, 1]
    assert first.document_ids.tolist() == [0, 0, 1, 1]
    assert second.input_ids.tolist() == [22, 23, 24, 30]
    assert second.position_ids.tolist() == [0, 1, 2, 0]
    assert second.document_ids.tolist() == [1, 1, 1, 2]
    for index in (-1, 2):
        with pytest.raises(IndexError):
            found.block(index)
    with pytest.raises(IndexError):
        found.document(3)


@pytest.mark.parametrize(("vocabulary_size", "itemsize"), [(65_535, 2), (65_536, 4), (200_000, 4)])
def test_ids_of_any_size_survive(tmp_path: Path, vocabulary_size: int, itemsize: int) -> None:
    top = vocabulary_size - 1
    folder = write_tokens(tmp_path, [[0, top, 258, top]], vocabulary_size, 4)
    assert (folder / "train.tokens").stat().st_size == 4 * itemsize
    # Little-endian, whatever the machine: 258 is 02 01.
    assert (folder / "train.tokens").read_bytes()[2 * itemsize :][:2] == b"\x02\x01"
    assert PackedTokens(folder).block(0).input_ids.tolist() == [0, top, 258, top]
    with (
        pytest.raises(AssertionError, match="every id is in the vocabulary"),
        TokensWriter(tmp_path, "train", 10) as writer,
    ):
        writer.add([10])


def test_random_documents_match_the_token_by_token_derivation(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    docs = [rng.integers(0, 1000, size).tolist() for size in rng.integers(1, 12, 300)]
    found = PackedTokens(write_tokens(tmp_path, docs, 1000, 7))
    expected = naive_blocks(docs, 7)
    assert len(found) == len(expected)
    for index in rng.permutation(len(found)):
        assert tuple(part.tolist() for part in found.block(int(index))) == expected[index]
    longer = PackedTokens(tmp_path, "heldout", sequence_length=64)
    assert [longer.block(i).input_ids.tolist() for i in range(len(longer))] == [b[0] for b in naive_blocks(docs, 64)]


def test_it_may_be_pickled_and_used_in_other_processes(tmp_path: Path) -> None:
    found = PackedTokens(write_tokens(tmp_path, [[1, 2, 3], [4, 5], [6, 7, 8, 9]], 10, 4))
    expected = [[5, 6, 7, 8], [0, 0, 1, 2], [1, 2, 2, 2]]
    state = pickle.dumps(found)
    assert len(state) < 2000
    assert [part.tolist() for part in pickle.loads(state).block(1)] == expected
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        (block,) = pool.starmap(PackedTokens.block, [(found, 1)])
    assert [part.tolist() for part in block] == expected


def truncate(folder: Path) -> None:
    path = folder / "train.tokens"
    path.write_bytes(path.read_bytes()[:-1])


def shift(folder: Path) -> None:
    np.save(folder / "train.documents.npy", np.array([0, 3, 8], dtype=np.int64))


def empty_offsets(folder: Path) -> None:
    (folder / "train.documents.npy").write_bytes(b"")


def lose(folder: Path) -> None:
    (folder / "train.tokens").unlink()


def other_info(folder: Path) -> None:
    (folder / "tokens.json").write_text('{"dtype": "int8"}')


def no_info(folder: Path) -> None:
    (folder / "tokens.json").unlink()


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (truncate, r"train\.tokens: has 17 bytes instead of 18"),
        (shift, r"train\.documents\.npy: does not belong to train\.tokens"),
        (empty_offsets, "cannot be opened"),
        (lose, "cannot be opened"),
        (other_info, r"tokens\.json: cannot be read"),
        (no_info, r"holds no packed tokens: it has no tokens\.json"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, damage: Any, problem: str) -> None:
    write_tokens(tmp_path, [[1, 2, 3], [4, 5], [6, 7, 8, 9]], 10, 4)
    assert isinstance(PackedTokens(tmp_path).block(0), Block)
    damage(tmp_path)
    with pytest.raises(ArtifactError, match=problem):
        PackedTokens(tmp_path)
