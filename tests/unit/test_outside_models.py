"""Folders of other makers: what lies in them is what is used, or a sentence says why not, with a way out that works."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

from pipeline.errors import ArtifactError, RecipeError
from pipeline.recipe.outside import kind_of_folder, tokenizer_problem, weights_problem
from pipeline.store.artifact import Kind
from stages.lib.models.publishing import agree_on_stops, complete_generation_config
from stages.lib.text.tokenizers import load_tokenizer
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


def tiny_llama(folder: Path) -> Any:
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
    )
    model = LlamaForCausalLM(config)
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
