"""Folders of other makers: what lies in them is what is used, or a sentence says why not, with a way out that works."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from pipeline.errors import ArtifactError, RecipeError
from pipeline.recipe.outside import is_an_adapter, kind_of_folder, tokenizer_problem, weights_problem
from pipeline.store.artifact import Kind
from stages.lib.models.generation import generation_notes
from stages.lib.models.loading import load_model, read_weights
from stages.lib.models.publishing import agree_on_stops, complete_generation_config, publish
from stages.lib.text.tokenizer_files import read_tokenizer_files
from stages.lib.text.tokenizers import copy_tokenizer, load_tokenizer
from tests.families import write_tokenizer

TEXT = " A  cat,\n\tx == 10"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A byte-level tokenizer.json of 260 tokens, as Llama-3, Qwen and DeepSeek have them, and nothing else."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=260,
        special_tokens=["<s>", "</s>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat"], trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write(folder: Path, name: str, **content: Any) -> None:
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize("model_type", [None, "llama", "gpt2"])
@pytest.mark.parametrize("declared", ["LlamaTokenizerFast", "LlamaTokenizer"])
def test_a_class_that_opens_another_tokenizer_is_refused_and_the_way_out_works(
    folder: Path, declared: str, model_type: str | None
) -> None:
    """DeepSeek-R1-Distill-Llama has such a folder: opened as its class, every space and line break is lost."""
    if model_type:
        write(folder, "config.json", model_type=model_type, vocab_size=260)
    write(folder, "tokenizer_config.json", tokenizer_class=declared)
    with pytest.raises(
        ArtifactError, match=rf"names {declared}, which gives other ids than its tokenizer.json"
    ) as caught:
        load_tokenizer(folder)
    assert '"tokenizer_class": "PreTrainedTokenizerFast"' in str(caught.value)
    seen = tokenizer_problem(folder)  # by `plan`, of all that such a folder is published as
    assert model_type == "gpt2" or (seen is not None and '"tokenizer_class": "PreTrainedTokenizerFast"' in seen)
    write(folder, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    tokenizer = load_tokenizer(folder)
    written = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT, add_special_tokens=False).ids
    assert tokenizer(TEXT, add_special_tokens=False)["input_ids"] == written
    assert tokenizer.decode(written) == TEXT
    assert tokenizer_problem(folder) is None


@pytest.mark.parametrize("declared", ["Qwen2TokenizerFast", "GPT2TokenizerFast"])
def test_a_class_that_opens_what_the_file_says_is_taken(folder: Path, declared: str) -> None:
    write(folder, "config.json", model_type="llama", vocab_size=320)
    write(folder, "tokenizer_config.json", tokenizer_class=declared)
    assert tokenizer_problem(folder) is None
    assert load_tokenizer(folder).decode(load_tokenizer(folder)(TEXT)["input_ids"]) == TEXT


LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
NUMBERS = " ".join(map(str, range(1000, 20000, 123)))


def with_the_rules_of_llama_3(folder: Path) -> Tokenizer:
    """Numbers are split into threes from the left, and nothing is normalized: `12345` begins with `123`."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(LLAMA_3), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the cat sat", NUMBERS], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def test_the_base_of_an_adapter_is_named_by_its_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters often say `models/base`, which a recipe in another folder would not find."""
    base, adapter = tmp_path / "models" / "base", tmp_path / "adapter"
    base.mkdir(parents=True)
    adapter.mkdir()
    write(base, "config.json", model_type="llama")
    write(adapter, "adapter_config.json", base_model_name_or_path="models/base")
    monkeypatch.chdir(tmp_path)
    assert f"inputs: {{model: {base.resolve()}, adapter: {adapter}}}" in is_an_adapter(adapter)
    monkeypatch.chdir(base)
    assert "inputs: {model: FOLDER," in is_an_adapter(adapter)
    config = json.loads((adapter / "adapter_config.json").read_bytes())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "num_virtual_tokens": 8}))
    assert "of virtual tokens" in is_an_adapter(adapter) and "merge" not in is_an_adapter(adapter)


@pytest.mark.parametrize(
    ("declared", "text"),
    [
        ("GPT2Tokenizer", NUMBERS),
        ("GPT2TokenizerFast", NUMBERS),
        ("BartTokenizer", NUMBERS),
        ("GPTNeoXTokenizerFast", "cafe\u0301"),
    ],
)
def test_a_class_that_splits_or_writes_a_little_otherwise_does_not_count(
    tmp_path: Path, declared: str, text: str
) -> None:
    """Such a class agrees on most texts, and not on numbers of four digits, or on accents that stand apart; so must a copy."""
    expected = with_the_rules_of_llama_3(tmp_path).encode(text, add_special_tokens=False).ids
    write(tmp_path, "config.json", model_type="llama", vocab_size=500)
    write(tmp_path, "tokenizer_config.json", tokenizer_class=declared)
    by_name = AutoTokenizer.from_pretrained(tmp_path)(text, add_special_tokens=False)["input_ids"]
    assert by_name != expected, "else the case is none"
    assert load_tokenizer(tmp_path)(text, add_special_tokens=False)["input_ids"] == expected
    copy_tokenizer(tmp_path, tmp_path / "copy")
    for opened in (load_tokenizer(tmp_path / "copy"), AutoTokenizer.from_pretrained(tmp_path / "copy")):
        assert opened(text, add_special_tokens=False)["input_ids"] == expected


def test_a_class_that_cannot_open_the_file_is_named_and_the_way_out_works(folder: Path) -> None:
    write(folder, "config.json", model_type="llama", vocab_size=260)
    write(folder, "tokenizer_config.json", tokenizer_class="T5TokenizerFast")
    with pytest.raises(ArtifactError, match=r"can be opened.*names T5TokenizerFast") as caught:
        load_tokenizer(folder)
    assert '"tokenizer_class": "PreTrainedTokenizerFast"' in str(caught.value)
    write(folder, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    assert load_tokenizer(folder).decode(load_tokenizer(folder)(TEXT)["input_ids"]) == TEXT
    (folder / "tokenizer.json").write_text("{", encoding="utf-8")
    write(folder, "tokenizer_config.json", tokenizer_class="T5TokenizerFast")
    with pytest.raises(ArtifactError, match=r"can be opened") as caught:
        load_tokenizer(folder)
    assert "PreTrainedTokenizerFast" not in str(caught.value), "that would not help"


@pytest.mark.parametrize("declared", ["CodeLlamaTokenizerFast", "GemmaTokenizerFast"])
def test_a_class_that_wants_a_token_which_is_not_there_is_named(folder: Path, declared: str) -> None:
    write(folder, "tokenizer_config.json", tokenizer_class=declared)
    with pytest.raises(ArtifactError, match=f"names {declared}, its tokenizer.json is of another kind"):
        load_tokenizer(folder)
    write(folder, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    assert load_tokenizer(folder).decode(load_tokenizer(folder)(TEXT)["input_ids"]) == TEXT


@pytest.mark.parametrize(("decoder", "expected"), [({}, 262), (None, 263)])
def test_tokens_that_only_the_config_names_are_counted_as_transformers_adds_them(
    folder: Path, decoder: dict[str, Any] | None, expected: int
) -> None:
    """260 in the file, [PAD] and <x>; and what added_tokens.json has, unless the config lists added tokens itself."""
    said: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "pad_token": "[PAD]"}
    said |= {} if decoder is None else {"added_tokens_decoder": decoder}
    write(folder, "tokenizer_config.json", **said, additional_special_tokens=["<x>"])
    write(folder, "added_tokens.json", **{"<old>": 262})
    files = read_tokenizer_files(folder)
    assert files is not None and files.num_tokens == len(load_tokenizer(folder)) == expected


def test_a_type_of_model_that_never_goes_by_the_file_is_what_is_named(tmp_path: Path) -> None:
    """Beside a qwen2 model transformers opens its own class, which takes digits one by one, whatever is named."""
    expected = with_the_rules_of_llama_3(tmp_path).encode(NUMBERS, add_special_tokens=False).ids
    write(tmp_path, "config.json", model_type="qwen2", vocab_size=500)
    write(tmp_path, "tokenizer_config.json", tokenizer_class="LlamaTokenizerFast")
    with pytest.raises(ArtifactError, match=r"as Qwen2Tokenizer because of the model_type") as caught:
        load_tokenizer(tmp_path)
    assert "Choose another architecture for this tokenizer (llama, mistral and qwen3 work)." in str(caught.value)
    file = (tmp_path / "tokenizer.json").read_bytes()
    made = AutoTokenizer.from_pretrained(tmp_path)(NUMBERS)["input_ids"]
    follow(str(caught.value), tmp_path)
    assert load_tokenizer(tmp_path)(NUMBERS)["input_ids"] == made != expected
    (tmp_path / "tokenizer.json").write_bytes(file)
    write(tmp_path, "config.json", model_type="qwen3", vocab_size=500)
    write(tmp_path, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    assert load_tokenizer(tmp_path)(NUMBERS, add_special_tokens=False)["input_ids"] == expected


@pytest.mark.parametrize("config", [{"vocab_size": 259}, {"text_config": {"vocab_size": 259}}])
def test_a_tokenizer_larger_than_the_embeddings_is_refused(folder: Path, config: dict[str, Any]) -> None:
    """Added tokens without resized embeddings: an index out of range, or on a GPU a failed assertion, hours later."""
    write(folder, "config.json", model_type="llama", **config)
    with pytest.raises(ArtifactError, match="its tokenizer has 260 tokens, and the model embeds 259") as caught:
        load_tokenizer(folder)
    assert "`resize_token_embeddings`" in str(caught.value)
    write(folder, "config.json", model_type="llama", vocab_size=320)
    assert len(load_tokenizer(folder)) == 260


@pytest.mark.parametrize(
    ("before", "after"),
    [(None, [1, 2]), (2, [1, 2]), ([5, 6], [1, 2, 5, 6]), ([2, 1], [1, 2]), (7, [1, 2, 7])],
)
def test_where_a_model_stopped_it_stops_still(folder: Path, before: Any, after: Any) -> None:
    """Llama-3 stops at three ids, of which a tokenizer knows one."""

    class Model:
        generation_config = GenerationConfig(eos_token_id=before, temperature=0.6)

    write(folder, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    complete_generation_config(Model, load_tokenizer(folder), [1, 2])  # type: ignore[arg-type]
    assert Model.generation_config.eos_token_id == after
    assert Model.generation_config.temperature == 0.6


@pytest.mark.parametrize(("model_type", "said"), [("llama", [2, 7]), ("gpt2", [2, 7]), ("nomic_bert", 2)])
def test_config_json_names_the_stop_ids_too(model_type: str, said: Any) -> None:
    """The config of some architectures takes one id only: then the first, which is the end of text."""

    class Model:
        config = AutoConfig.for_model(model_type)
        generation_config = GenerationConfig(eos_token_id=[2, 7])

    agree_on_stops(Model)  # type: ignore[arg-type]
    assert Model.config.eos_token_id == said


LLAMA = {
    "vocab_size": 260,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
}


def tiny_llama(folder: Path, **fields: Any) -> Any:
    model = LlamaForCausalLM(LlamaConfig(**{**LLAMA, **fields}))
    model.save_pretrained(folder)
    return model


def follow(message: str, folder: Path) -> None:
    """Does what a message says between backticks, into `folder`."""
    (command,) = re.findall(r"`(from .*?)`", message)
    exec(command.replace("FOLDER", repr(str(folder))), {})


def test_weights_that_may_run_code_are_refused_and_the_way_out_works(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    model = tiny_llama(old)
    (old / "model.safetensors").unlink()
    problem = weights_problem(old)
    assert (
        problem is not None and "holds a config.json and no weights in *.safetensors. Get the whole folder" in problem
    )
    torch.save(model.state_dict(), old / "pytorch_model.bin")
    problem = weights_problem(old)
    assert problem is not None and "holds its weights as pytorch_model.bin" in problem
    follow(problem, new)
    assert weights_problem(new) is None
    again = LlamaForCausalLM.from_pretrained(new)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_weights_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    whole = tmp_path / "model.safetensors"
    model = tiny_llama(tmp_path)
    content = whole.read_bytes()
    for broken, said in (
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a pointer of Git LFS"),
        (content[: len(content) // 2], f"by its header it has {len(content)} bytes"),
        (content[:4], "does not begin as a safetensors file does"),
        ((9).to_bytes(8, "little") + b"{not JSON" + content, "its header cannot be read"),
    ):
        whole.write_bytes(broken)
        problem = weights_problem(tmp_path)
        assert problem is not None and said in problem
    whole.unlink()
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    assert weights_problem(tmp_path) is None
    shard = sorted(tmp_path.glob("*.safetensors"))[-1]
    shard.rename(tmp_path / "consolidated.safetensors")
    problem = weights_problem(tmp_path)
    assert problem is not None and f"names: {shard.name}. Get the whole folder" in problem
    (tmp_path / "model.safetensors.index.json").unlink()
    problem = weights_problem(tmp_path)
    assert problem is not None and "neither model.safetensors nor model.safetensors.index.json" in problem


def test_a_config_of_another_number_of_tokens_is_refused_and_the_way_out_works(tmp_path: Path) -> None:
    """By `plan`, and where only other weights show it, by loading."""
    tiny_llama(tmp_path)
    config = json.loads((tmp_path / "config.json").read_bytes())
    said = config["vocab_size"]
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": said + 1}))
    problem = weights_problem(tmp_path)
    assert problem is not None and f"embeds {said} tokens (model.embed_tokens.weight)" in problem
    assert f"says `vocab_size` {said + 1}. Write {said} there" in problem
    with pytest.raises(ArtifactError, match=r"holds \d weights of other sizes .*: .*embed_tokens.* should be"):
        read_weights(AutoModelForCausalLM, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert weights_problem(tmp_path) is None
    read_weights(AutoModelForCausalLM, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": config["intermediate_size"] + 1}))
    with pytest.raises(ArtifactError, match=r"mlp.down_proj.weight is \(.*\), and should be"):
        read_weights(AutoModelForCausalLM, tmp_path)


def test_weights_of_eight_bits_without_their_scales_are_refused_and_the_way_out_works(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    model = tiny_llama(old)
    eight = {name: value.to(torch.float8_e4m3fn) for name, value in model.state_dict().items()}
    save_file(eight, old / "model.safetensors", metadata={"format": "pt"})
    problem = weights_problem(old)
    assert (
        problem is not None and "holds weights as F8_E4M3, and its config.json has no `quantization_config`" in problem
    )
    (command,) = re.findall(r"`(import torch; .*?)`", problem)
    exec(command.replace("FOLDER", repr(str(new))), {})
    assert weights_problem(new) is None
    written = load_file(new / "model.safetensors")
    assert all(torch.equal(value, eight[name].to(torch.bfloat16)) for name, value in written.items())
    config = json.loads((old / "config.json").read_bytes())
    (old / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    assert weights_problem(old) is None, "what becomes of quantized models is said elsewhere"


def test_a_config_without_an_architecture_is_refused(tmp_path: Path) -> None:
    tiny_llama(tmp_path)
    config = json.loads((tmp_path / "config.json").read_bytes())
    write(tmp_path, "config.json", **{**config, "architectures": None})
    with pytest.raises(RecipeError, match="does not say in `architectures` which model it is of"):
        kind_of_folder(tmp_path)


@pytest.mark.parametrize(
    ("smaller", "whole", "named"),
    [
        ({"num_hidden_layers": 1}, {"num_hidden_layers": 2}, "9 weights .* model.layers.1.input_layernorm.weight"),
        ({"attention_bias": False}, {"attention_bias": True}, "8 weights .* model.layers.0.self_attn.k_proj.bias"),
    ],
)
def test_weights_for_which_the_config_leaves_no_room_are_refused_and_both_ways_out_work(
    tmp_path: Path, smaller: dict[str, Any], whole: dict[str, Any], named: str
) -> None:
    """Until then the model was trained, measured and published without them."""
    model = tiny_llama(tmp_path, **{"num_hidden_layers": 2, **whole})
    config = json.loads((tmp_path / "config.json").read_bytes())
    write(tmp_path, "config.json", **{**config, **smaller})
    with pytest.raises(ArtifactError, match=named) as caught:
        load_model(AutoModelForCausalLM, tmp_path)
    follow(str(caught.value), tmp_path / "new")
    assert load_model(AutoModelForCausalLM, tmp_path / "new").num_parameters() < model.num_parameters()
    write(tmp_path, "config.json", **config)
    assert load_model(AutoModelForCausalLM, tmp_path).num_parameters() == model.num_parameters()


@pytest.mark.parametrize(
    ("model", "left_over"),
    [
        (
            GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=20)),
            ["transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias", "h.0.attn.masked_bias"],
        ),
        (
            LlamaForCausalLM(LlamaConfig(**LLAMA, num_nextn_predict_layers=1)),
            [
                "model.layers.0.self_attn.rotary_emb.inv_freq",
                "model.layers.1.self_attn.q_proj.weight",
                "model.layers.1.eh_proj.weight",
            ],
        ),
    ],
)
def test_buffers_of_older_versions_and_predicting_layers_are_passed_over(
    tmp_path: Path, model: Any, left_over: list[str]
) -> None:
    """GPT-2 and Pythia have such buffers on the hub; DeepSeek and GLM a layer that predicts the token after the next."""
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors") | {name: torch.ones(4, 4) for name in left_over}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert load_model(AutoModelForCausalLM, tmp_path).num_parameters() == model.num_parameters()


def test_weights_of_parts_that_the_class_does_not_have_are_passed_over(tmp_path: Path) -> None:
    """A causal model under the head of a classifier."""
    tiny_llama(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, num_labels=1)
    model, report = read_weights(AutoModelForSequenceClassification, tmp_path, config=config)
    assert report["unexpected_keys"] and report["missing_keys"] == {"score.weight"} and model.num_labels == 1


def test_an_adapter_beside_the_weights_is_refused_and_the_way_out_works(tmp_path: Path) -> None:
    """transformers would put it on the model without a word."""
    model = tiny_llama(tmp_path)
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    problem = weights_problem(tmp_path)
    assert problem is not None and "an adapter beside it (adapter_config.json) that would be put on it" in problem
    (alone := tmp_path / "adapter").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).rename(alone / name)
    assert weights_problem(tmp_path) is None and kind_of_folder(alone) is Kind.ADAPTER


@pytest.mark.parametrize(
    ("said", "sound", "named"),
    [
        (
            {"temperature": 0.9, "top_p": 0.6},
            {"do_sample": True, "temperature": 0.9, "top_p": 0.6},
            "temperature, top_p",
        ),
        ({"temperature": 1.0, "top_k": 50}, {"top_k": 50}, ""),
        ({"do_sample": False, "temperature": 0.9, "top_k": 5}, {}, "do_sample: false beside temperature, top_k"),
        ({"do_sample": True, "temperature": 0.9}, {"do_sample": True, "temperature": 0.9}, ""),
        ({"early_stopping": True, "length_penalty": 2.0}, {}, "early_stopping, length_penalty without beams"),
        ({"early_stopping": True, "num_beams": 4}, {"early_stopping": True, "num_beams": 4}, ""),
        ({"eos_token_id": [2, 99999]}, {"eos_token_id": 2}, "gives 99999 as eos_token_id"),
        ({"eos_token_id": -1}, {}, "gives -1 as eos_token_id"),
    ],
)
def test_a_generation_config_that_could_not_be_saved_is_mended_and_said(
    folder: Path, said: dict[str, Any], sound: dict[str, Any], named: str
) -> None:
    """What is published says what was said, and a run is not lost when it is saved."""
    tiny_llama(folder)
    write(folder, "generation_config.json", **said)
    notes = generation_notes(folder)
    assert len(notes) == bool(named) and named in "".join(notes)
    model = load_model(AutoModelForCausalLM, folder)
    publish(model, model.state_dict(), folder, folder / "out")
    published = GenerationConfig.from_pretrained(folder / "out")
    assert sound.items() <= published.to_dict().items()
    for name in said.keys() - sound.keys() - {"eos_token_id"}:
        assert getattr(published, name) in (None, GenerationConfig().to_dict().get(name), 1.0, False), name
    assert not generation_notes(folder / "out")


@pytest.mark.parametrize(
    ("said", "why"),
    [({"num_return_sequences": 3}, "do not support"), ({"max_new_tokens": 0}, "must be greater than 0")],
)
def test_a_generation_config_of_no_use_is_refused_and_the_way_out_works(
    folder: Path, said: dict[str, Any], why: str
) -> None:
    tiny_llama(folder)
    write(folder, "generation_config.json", **said)
    with pytest.raises(ArtifactError, match=rf"generation_config\.json: is of no use: .*{why}.* remove the file"):
        load_model(AutoModelForCausalLM, folder)
    (folder / "generation_config.json").unlink()
    assert load_model(AutoModelForCausalLM, folder) is not None


def test_a_generation_config_that_is_none_is_said(folder: Path) -> None:
    """transformers makes one of the model's config then, and says nothing."""
    tiny_llama(folder)
    (folder / "generation_config.json").write_text("{oops")
    assert generation_notes(folder) == [
        "generation_config.json of the model cannot be read: it is published with the stops of the tokenizer"
    ]
    (folder / "generation_config.json").unlink()
    assert not generation_notes(folder) and not generation_notes(None)


def test_a_head_of_its_own_is_published_as_one(folder: Path) -> None:
    """The config says that it is tied, and the file holds another: who goes by the config alone would read another model."""
    tiny_llama(folder, tie_word_embeddings=False)
    config = json.loads((folder / "config.json").read_bytes())
    write(folder, "config.json", **{**config, "tie_word_embeddings": True})
    model = load_model(AutoModelForCausalLM, folder)
    publish(model, model.state_dict(), folder, folder / "out")
    assert json.loads((folder / "out" / "config.json").read_bytes())["tie_word_embeddings"] is False
    ids = torch.arange(8)[None]
    again = LlamaForCausalLM.from_pretrained(folder / "out")
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8", "mxfp4", None])
def test_weights_that_no_stage_unpacks_are_refused(folder: Path, method: str | None) -> None:
    write(folder, "config.json", architectures=["LlamaForCausalLM"], quantization_config={"quant_method": method})
    with pytest.raises(
        RecipeError, match=rf"quantized \({method if method is None else repr(method)}\).*made from"
    ) as caught:
        kind_of_folder(folder)
    assert "config.json says that the weights are quantized" in str(caught.value)
    write(folder, "config.json", architectures=["LlamaForCausalLM"], quantization_config=None)
    assert kind_of_folder(folder) is Kind.CAUSAL_LM


def test_a_sentencepiece_model_alone_is_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is no artifact, model or tokenizer folder"):
        kind_of_folder(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    assert kind_of_folder(tmp_path) is Kind.TOKENIZER


def test_llamas_class_over_a_sentencepiece_born_file_is_taken(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "llama-2")
    assert tokenizer_problem(tmp_path) is None and load_tokenizer(tmp_path)
