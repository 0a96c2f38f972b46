from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pipeline.errors import ArtifactError, DataError
from stages.lib.generating.chat import chat, load_chat_model
from stages.lib.generating.replies import (
    IncrementalDecoder,
    stop_ids_of,
    write_replies,
    write_reply,
)
from stages.lib.generating.sampling import sample, uniforms_for
from stages.lib.text.chat_spans import encode_prompt

BOS, EOS, TURN_END = 1, 2, 3
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}:{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
WORDS = ["▁", "a", "b", "c", "e", "h", "i", "l", "n", "o", "r", "s", "t", "u", ":", "▁the", "▁a"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A sentencepiece-like tokenizer: a few letters, everything else as bytes."""
    special = ["<unk>", "<s>", "</s>", "<|end|>"]
    vocabulary = {piece: i for i, piece in enumerate(special + [f"<0x{byte:02X}>" for byte in range(256)] + WORDS)}
    merges = [("▁", "a")]
    core = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.pre_tokenizer = pre_tokenizers.Split("|", "isolated")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    fast = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    fast.chat_template = TEMPLATE
    return fast


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A random Llama with wide weights, so that its next token depends on what came before."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=160,
        bos_token_id=BOS,
        eos_token_id=EOS,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: Any, tokenizer: Any) -> Path:
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def pieces_of(tokenizer: Any, ids: list[int]) -> list[str]:
    decoder = IncrementalDecoder(tokenizer)
    return [piece for piece in [*(decoder.add(token) for token in ids), decoder.rest()] if piece]


@pytest.mark.parametrize(
    "text",
    ["the cat", "h\u00e9llo", "\u4f60\u597d", "a \U0001f642 b", "\u0440\u0443\u0441\u0441\u043a\u0438\u0439\ufffdx"],
)
def test_pieces_are_whole_characters_and_join_to_the_text(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == text
    assert all(piece.count("\ufffd") <= text.count("\ufffd") for piece in pieces)


def test_a_character_appears_with_its_last_byte(tokenizer: Any) -> None:
    """The emoji has 4 bytes: nothing for three tokens, then all of it."""
    decoder = IncrementalDecoder(tokenizer)
    ids = tokenizer("\U0001f642", add_special_tokens=False)["input_ids"]
    assert len(ids) == 4
    assert [decoder.add(token) for token in ids] == ["", "", "", "\U0001f642"]


def test_bytes_that_never_become_a_character_are_shown_at_the_end(tokenizer: Any) -> None:
    """0xF0 0x9F begins a 4-byte character that does not come."""
    first_byte = tokenizer.convert_tokens_to_ids("<0x00>")
    assert "".join(pieces_of(tokenizer, [first_byte + 0xF0, first_byte + 0x9F])) == "\ufffd\ufffd"


def test_a_stray_byte_spoils_neither_what_came_before_nor_what_comes_after(tokenizer: Any) -> None:
    """Bytes in a row decode together or not at all: the whole character is out by then, and text goes on after it."""
    first_byte = tokenizer.convert_tokens_to_ids("<0x00>")
    character = tokenizer("\u4f60", add_special_tokens=False)["input_ids"]
    word = tokenizer("the", add_special_tokens=False)["input_ids"]
    pieces = pieces_of(tokenizer, [*character, first_byte + 0xE4, *word])
    assert pieces[0] == "\u4f60"
    assert "".join(pieces).replace("\ufffd", "") == "\u4f60the"
    assert "".join(pieces[2:]) == "he"


def test_greedy_tokens_are_what_generate_gives(model: Any, tokenizer: Any) -> None:
    prompt = encode_prompt(tokenizer, user("the cat"))
    generated = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=24, pad_token_id=EOS)
    (written,) = sample(model, [prompt], np.zeros((1, 24)), stop_ids=[EOS], temperature=0)
    assert written.ids.tolist() == generated[0, len(prompt) :].tolist()
    assert len(set(generated[0, len(prompt) :].tolist())) > 3


def test_the_pieces_join_to_the_whole_reply(model: Any, tokenizer: Any) -> None:
    options: dict[str, Any] = {"max_new_tokens": 20, "temperature": 1.0, "seed": 3}
    pieces: list[str] = []
    reply = write_reply(model, tokenizer, user("hello"), show=pieces.append, **options)
    assert len(pieces) > 1
    assert "".join(pieces) == reply.text


def test_any_stop_id_of_the_generation_config_ends_the_turn(model: Any, tokenizer: Any) -> None:
    """The third token of the greedy reply, declared a second stop id, leaves two tokens; without it, the limit cuts."""
    prompt = torch.tensor([encode_prompt(tokenizer, user("hello"))])
    ids = model.generate(prompt, do_sample=False, max_new_tokens=6, pad_token_id=EOS)[0, prompt.shape[1] :].tolist()
    assert len(ids) == 6 and ids[2] not in ids[:2]
    cut = write_reply(model, tokenizer, user("hello"), max_new_tokens=6)
    assert (cut.num_tokens, cut.truncated) == (6, True)
    before = model.generation_config.eos_token_id
    try:
        model.generation_config.eos_token_id = [EOS, ids[2]]
        assert stop_ids_of(model, tokenizer) == {EOS, ids[2]}
        stopped = write_reply(model, tokenizer, user("hello"), max_new_tokens=6)
    finally:
        model.generation_config.eos_token_id = before
    assert (stopped.num_tokens, stopped.truncated) == (2, False)
    assert stopped.text == tokenizer.decode(ids[:2])


def test_sampling_is_a_function_of_the_seed_and_leaves_the_global_generator_alone(model: Any, tokenizer: Any) -> None:
    torch.manual_seed(5)
    untouched = torch.rand(1)
    torch.manual_seed(5)
    texts = [
        write_reply(model, tokenizer, user("a"), max_new_tokens=16, temperature=1.0, seed=seed).text
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.rand(1), untouched)


def test_the_narrowest_nucleus_is_greedy(model: Any, tokenizer: Any) -> None:
    """With top_p near 0 only the likeliest token is left, at any temperature."""
    greedy = write_reply(model, tokenizer, user("a"), max_new_tokens=12)
    nucleus = write_reply(model, tokenizer, user("a"), max_new_tokens=12, temperature=2.0, top_p=1e-6)
    assert nucleus == greedy


def test_the_context_limits_the_reply_and_refuses_a_conversation_that_fills_it(model: Any, tokenizer: Any) -> None:
    """The model reads 160 tokens. A prompt of 160 - 4 leaves room for 4."""
    empty = len(encode_prompt(tokenizer, user("")))
    letters = "s" * (160 - 4 - empty)
    assert write_reply(model, tokenizer, user(letters), max_new_tokens=50).num_tokens == 4
    with pytest.raises(DataError, match="160 tokens long, and the model reads 160"):
        write_reply(model, tokenizer, user(letters + "ssss"), max_new_tokens=50)


CONVERSATIONS = [user(text) for text in ("a", "the cat sat on the hat", "hello", "\u4f60\u597d", "rain", "is it late?")]
"""Of 6 lengths, so that batches are padded."""


def replies_in_batches(model: Any, tokenizer: Any, batch_size: int, **options: Any) -> list[Any]:
    """24 tokens at most, drawn at temperature 1 unless `options` say otherwise."""
    chosen = {"positions": range(len(CONVERSATIONS)), "max_new_tokens": 24, "temperature": 1.0, "top_p": 1.0, "seed": 3}
    conversations = [CONVERSATIONS[position] for position in {**chosen, **options}["positions"]]
    return write_replies(model, tokenizer, conversations, batch_size=batch_size, **{**chosen, **options})


@pytest.mark.parametrize("batch_size", [1, 4])
def test_likeliest_replies_are_those_that_are_written_alone(model: Any, tokenizer: Any, batch_size: int) -> None:
    """The tenth token of the first reply is declared a stop id: that reply ends there or before, others go on or end
    elsewhere, so that a batch holds replies of different lengths."""
    prompt = encode_prompt(tokenizer, CONVERSATIONS[0])
    (first,) = sample(model, [prompt], np.zeros((1, 10)), stop_ids=[EOS], temperature=0)
    ids = first.ids.tolist()
    before = model.generation_config.eos_token_id
    try:
        model.generation_config.eos_token_id = [EOS, ids[9]]
        alone = [write_reply(model, tokenizer, each, max_new_tokens=24) for each in CONVERSATIONS]
        written = replies_in_batches(model, tokenizer, batch_size, temperature=0)
    finally:
        model.generation_config.eos_token_id = before
    assert written == alone
    assert not written[0].truncated
    assert len({reply.num_tokens for reply in written}) > 2


def test_a_drawn_reply_depends_on_its_position_and_on_no_other_reply(model: Any, tokenizer: Any) -> None:
    together = replies_in_batches(model, tokenizer, 4, top_p=0.9)
    assert replies_in_batches(model, tokenizer, 1, top_p=0.9) == together
    assert replies_in_batches(model, tokenizer, 4, top_p=0.9, positions=[4, 1]) == [together[4], together[1]]
    assert replies_in_batches(model, tokenizer, 4, top_p=0.9, seed=4) != together


def test_a_reply_that_is_shown_as_it_comes_is_the_one_that_is_written_in_a_batch(model: Any, tokenizer: Any) -> None:
    """The same seed and position: `slipway chat` says what `write_replies` says, at any temperature."""
    together = replies_in_batches(model, tokenizer, 4, temperature=0.8, top_p=0.9)
    alone = [
        write_reply(model, tokenizer, each, position=position, max_new_tokens=24, temperature=0.8, top_p=0.9, seed=3)
        for position, each in enumerate(CONVERSATIONS)
    ]
    assert alone == together
    assert len({reply.text for reply in alone}) > 3


def test_drawn_tokens_are_those_at_the_place_of_their_random_number(model: Any, tokenizer: Any) -> None:
    """One token at temperature 2 from the likeliest ones that hold 0.7: of these, scaled to 1 and added up in the order
    of their ids, the first whose sum is above the random number."""
    written = replies_in_batches(model, tokenizer, 3, temperature=2.0, top_p=0.7, max_new_tokens=1)
    expected = []
    for position, messages in enumerate(CONVERSATIONS):
        with torch.no_grad():
            logits_V = model(torch.tensor([encode_prompt(tokenizer, messages)])).logits[0, -1]
        p_V = (logits_V / 2).softmax(-1)
        likeliest = p_V.argsort(descending=True).tolist()
        needed = next(k for k in range(1, len(likeliest)) if p_V[likeliest[:k]].sum() >= 0.7)
        nucleus = sorted(likeliest[:needed])
        sums = (p_V[nucleus] / p_V[nucleus].sum()).cumsum(0).tolist()
        place = uniforms_for(3, position, 1)[0]
        expected.append(nucleus[next(index for index, total in enumerate(sums) if total > place)])
    texts = ["" if token == EOS else "".join(pieces_of(tokenizer, [token])) for token in expected]
    assert [reply.text for reply in written] == texts
    assert len(set(expected)) > 3


def test_many_replies_need_room_for_all_their_tokens(model: Any, tokenizer: Any) -> None:
    """The model reads 160 tokens: the longest prompt has 160 - 24 of them, or one more."""
    room = 160 - 24 - len(encode_prompt(tokenizer, user("")))
    options: dict[str, Any] = {"max_new_tokens": 24, "temperature": 0, "top_p": 1.0, "seed": 0, "batch_size": 2}
    fitting = [user("s" * room), user("a")]
    written = write_replies(model, tokenizer, fitting, positions=[0, 1], **options)
    assert all(reply.num_tokens == 24 or not reply.truncated for reply in written)
    with pytest.raises(DataError, match="reads 160 with the 24 of the reply"):
        write_replies(model, tokenizer, [user("s" * (room + 1)), user("a")], positions=[0, 1], **options)


class Console:
    """Lines that a user types, and what was written before each of them was read."""

    def __init__(self, *lines: str | None) -> None:
        self.lines = list(lines)
        self.written = [""]

    def read_line(self) -> str | None:
        self.written.append("")
        return self.lines.pop(0) if self.lines else None

    def write(self, text: str) -> None:
        self.written[-1] += text


def test_chat_keeps_the_conversation_until_reset(folder: Path) -> None:
    """Turn n draws at position n, from the whole conversation so far; after /reset from the last message alone."""
    model, tokenizer = load_chat_model(folder)
    options: dict[str, Any] = {"max_new_tokens": 8, "temperature": 0.8, "top_p": 0.9}
    console = Console("hello", "the cat", "", "/reset", "the cat", None)
    chat(folder, console.read_line, console.write, seed=7, device="cpu", **options)

    first = write_reply(model, tokenizer, user("hello"), seed=7, position=0, **options).text
    history = [*user("hello"), {"role": "assistant", "content": first}, *user("the cat")]
    second = write_reply(model, tokenizer, history, seed=7, position=1, **options).text
    third = write_reply(model, tokenizer, user("the cat"), seed=7, position=2, **options).text
    expected = [f"{first}\n", f"{second}\n", "", "The conversation is forgotten.\n", f"{third}\n"]
    assert console.written[1:-1] == expected


def test_chat_ends_at_exit(folder: Path) -> None:
    console = Console("/exit", "never read")
    chat(folder, console.read_line, console.write, device="cpu")
    assert console.lines == ["never read"]


def test_chat_goes_on_after_a_message_that_is_too_long(folder: Path) -> None:
    console = Console("s" * 200, "hello", None)
    chat(folder, console.read_line, console.write, max_new_tokens=4, temperature=0, device="cpu")
    model, tokenizer = load_chat_model(folder)
    expected = write_reply(model, tokenizer, user("hello"), max_new_tokens=4).text
    assert "was not sent" in console.written[1]
    assert console.written[2] == f"{expected}\n"


def test_a_model_without_chat_template_is_refused(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        if path.name != "chat_template.jinja":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="no chat template"):
        load_chat_model(tmp_path)
