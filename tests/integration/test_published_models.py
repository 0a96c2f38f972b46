"""A published model in other programs' hands: transformers, its pipelines, lm-eval, and the vocabulary classes of gguf.

The model answers every chat with the same words and its stop token, so that each of them shows whether it asks, decodes and
stops as the model was trained.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, pipeline

from pipeline.cards.card import write_cards
from pipeline.settings.resources import Resources
from pipeline.stage import Result
from pipeline.store.artifact import Kind
from pipeline.store.job import Job
from stages import STAGES
from stages.lib.rows.canonical import write_rows
from stages.lib.text.frames import open_tokenizer
from stages.lib.text.opening import read_tokenizer_config
from stages.lib.text.tokenizers import ADDS, copy_left_out, load_tokenizer, tokenizer_digest
from tests import rows
from tests.integration.tiny_language_model import make_tokenizer, run_stage

pytestmark = pytest.mark.slow

ANSWER = "I am well."
TRAINING = {"global_batch_size": 8, "max_steps": 40, "learning_rate": 1e-2, "max_length_tokens": 64}


def write_sides(folder: Path, split: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True)
    write_rows(folder / "train.jsonl", split[8:])
    write_rows(folder / "heldout.jsonl", split[:8])
    return folder


def base_model(folder: Path, tokenizer: Any) -> Path:
    """A Llama of random weights in bfloat16, as a model of the hub lies on the disk."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def chat_rows() -> list[dict[str, Any]]:
    asked = [f"How are you, {text.split()[0]} {number}?" for number, text in enumerate(rows.texts(40))]
    return [
        {"messages": [{"role": "user", "content": each}, {"role": "assistant", "content": ANSWER}]} for each in asked
    ]


def taught(model: Path, folder: Path, **params: Any) -> tuple[Result, Path, list[dict[str, Any]]]:
    chats = write_sides(folder / "chats", chat_rows())
    result, context = run_stage(STAGES["sft"], {"model": model, "chats": chats}, {**TRAINING, **params}, folder)
    job = Job(
        recipe="r", step="s", kind="sft", stage_version=1, artifact_id="a" * 64, artifact_kind=Kind.CAUSAL_LM.value,
        params=STAGES["sft"].params(**{**TRAINING, **params}).model_dump(mode="json"), inputs={},
        input_ids={"model": "sha256:" + "1" * 64, "chats": "b" * 64}, source_digests={}, seed=0, resources=Resources(),
        store=str(folder), work=str(folder),
    )  # fmt: skip
    write_cards(job, context.inputs, context.out, result, {})
    return result, context.out, list(context.journal.events("note"))


@pytest.fixture(scope="module")
def own_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the stage `tokenizer`: born of sentencepiece."""
    folder = tmp_path_factory.mktemp("tokenizer")
    text = write_sides(folder / "text", [{"text": text} for text in rows.texts(200)])
    _, context = run_stage(STAGES["tokenizer"], {"text": text}, {"vocabulary_size": 480}, folder)
    return context.out


Taught = tuple[Result, Path, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def sentencepiece_born(own_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Taught:
    folder = tmp_path_factory.mktemp("sft")
    model = base_model(folder / "model", load_tokenizer(own_tokenizer))
    for path in own_tokenizer.iterdir():
        if path.is_file():
            (model / path.name).write_bytes(path.read_bytes())
    return taught(model, folder)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Taught:
    """With a template that the recipe gives in place of the model's own, as many base models need it."""
    folder = tmp_path_factory.mktemp("byte_level")
    tokenizer = make_tokenizer(rows.texts(200), vocabulary_size=480)
    template, tokenizer.chat_template = tokenizer.chat_template, None
    model = base_model(folder / "model", tokenizer)
    tokenizer.save_pretrained(model)
    return taught(model, folder, chat_template=template)


@pytest.fixture(params=["sentencepiece_born", "byte_level"])
def published(request: pytest.FixtureRequest) -> Taught:
    made: Taught = request.getfixturevalue(request.param)
    return made


@contextlib.contextmanager
def within(folder: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield


# transformers


def test_the_lines_of_the_card_run_and_the_model_stops(published: Taught) -> None:
    """Within a hundred tokens it would say more, if it were not stopped where its turn ends."""
    _, out, _ = published
    (code,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    with within(out), contextlib.redirect_stdout(io.StringIO()):
        exec(code, names)
    assert names["answer"] == ANSWER
    end = names["tokenizer"].convert_tokens_to_ids("<|end|>")
    assert names["output"][0, -1] == end


def test_the_pipeline_for_text_generation_answers(published: Taught) -> None:
    _, out, _ = published
    generate = pipeline("text-generation", model=str(out))
    (said,) = generate([{"role": "user", "content": "How are you, Ada?"}], max_new_tokens=100, do_sample=False)
    assert said["generated_text"][-1] == {"role": "assistant", "content": ANSWER}


def test_all_files_name_the_same_stop_ids(published: Taught) -> None:
    result, out, _ = published
    config, generation = (json.loads((out / f"{name}.json").read_text()) for name in ("config", "generation_config"))
    tokenizer = AutoTokenizer.from_pretrained(out)
    stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")]
    assert config["eos_token_id"] == generation["eos_token_id"] == result.facts.stop_token_ids == stops
    assert json.loads((out / "tokenizer_config.json").read_text())["eos_token"] == "</s>"
    said = (out / "README.md").read_text()
    assert f"Generation stops at `</s>` ({stops[0]}), `<|end|>` ({stops[1]})" in said
    # Whoever makes the generation config anew finds them too.
    (model := AutoModelForCausalLM.from_pretrained(out)).generation_config = None
    assert model.config.eos_token_id == stops


def test_weights_keep_the_format_that_the_base_has(published: Taught) -> None:
    """They are trained in float32, and it is said that they are not published so."""
    result, out, notes = published
    weights = load_file(out / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert result.facts.dtype == "bf16"
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert "trained in fp32 and published in bf16, as the model has them" in json.dumps(notes)
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.bfloat16
    assert "- Number format: bf16" in (out / "README.md").read_text()


def test_another_format_that_is_asked_for(byte_level: Taught, tmp_path: Path) -> None:
    """Trained on from the published model, whose weights are in bfloat16."""
    result, out, notes = taught(byte_level[1], tmp_path, published_dtype="fp32", max_steps=2)
    assert {weight.dtype for weight in load_file(out / "model.safetensors").values()} == {torch.float32}
    assert result.facts.dtype == "fp32"
    assert "published in" not in json.dumps(notes)


# gguf: what llama.cpp's converter reads


def test_gguf_finds_the_sentencepiece_model(sentencepiece_born: Taught) -> None:
    """Every id is the token that it is in transformers, special ones are no text, and texts have the same ids."""
    gguf = pytest.importorskip("gguf", reason="the extra `dev` brings gguf")
    _, out, _ = sentencepiece_born
    tokenizer = load_tokenizer(out)
    vocabulary = gguf.vocab.SentencePieceVocab(out)
    tokens = list(vocabulary.all_tokens())
    assert len(tokens) == vocabulary.vocab_size == len(tokenizer)
    assert [token.decode() for token, _, _ in tokens] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    control = {index for index, (_, _, kind) in enumerate(tokens) if kind == gguf.TokenType.CONTROL}
    assert control == set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    text = "def f(x):\n    return  x + 1  # caf\u00e9"
    assert vocabulary.sentencepiece_tokenizer.encode(text) == tokenizer(text)["input_ids"]
    assert gguf.vocab.LlamaHfVocab(out).vocab_size == len(tokenizer)


def test_gguf_finds_the_byte_level_vocabulary(byte_level: Taught) -> None:
    gguf = pytest.importorskip("gguf", reason="the extra `dev` brings gguf")
    _, out, _ = byte_level
    tokenizer = load_tokenizer(out)
    vocabulary = gguf.vocab.BpeVocab(out)
    tokens = [token if isinstance(token, str) else token.decode() for token, _, _ in vocabulary.all_tokens()]
    assert tokens == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))


def test_gguf_finds_special_tokens_and_the_chat_template(published: Taught) -> None:
    gguf = pytest.importorskip("gguf", reason="the extra `dev` brings gguf")
    _, out, _ = published
    tokenizer = load_tokenizer(out)
    special = gguf.SpecialVocab(out, load_merges=True)
    assert special.chat_template == tokenizer.chat_template
    assert special.special_token_ids["bos"] == tokenizer.bos_token_id
    assert special.special_token_ids["eos"] == tokenizer.eos_token_id
    assert special.special_token_ids["pad"] == tokenizer.pad_token_id
    merges = json.loads((out / "tokenizer.json").read_bytes())["model"]["merges"]
    assert len(special.merges) == len(merges) > 50


def test_gguf_adds_no_bos_that_training_did_not(sentencepiece_born: Taught) -> None:
    """Of a sentencepiece model that says nothing llama.cpp assumes a bos, and a space, before every text."""
    gguf = pytest.importorskip("gguf", reason="the extra `dev` brings gguf")
    _, out, _ = sentencepiece_born
    assert gguf.SpecialVocab(out).add_special_token == {"bos": False, "eos": False}
    assert json.loads((out / "tokenizer_config.json").read_text())["add_prefix_space"] is False
    assert AutoTokenizer.from_pretrained(out)("a")["input_ids"] == load_tokenizer(out).encode(
        "a", add_special_tokens=False
    )


def test_gguf_does_not_take_a_unigram_model_for_another(tmp_path: Path) -> None:
    """Its class joins pieces as bpe does: under the name that it looks for, it would take the model and give other ids."""
    gguf = pytest.importorskip("gguf", reason="the extra `dev` brings gguf")
    text = write_sides(tmp_path / "text", [{"text": text} for text in rows.texts(100)])
    params = {"vocabulary_size": 480, "algorithm": "unigram"}
    _, context = run_stage(STAGES["tokenizer"], {"text": text}, params, tmp_path)
    assert (context.out / "sentencepiece.model").exists()
    with pytest.raises(FileNotFoundError):
        gguf.vocab.SentencePieceVocab(context.out)


def test_a_tokenizer_saved_anew_keeps_what_converters_read(sentencepiece_born: Taught, tmp_path: Path) -> None:
    """The recipe gives another template, so transformers writes the tokenizer; tokens that were added are listed."""
    _, out, _ = sentencepiece_born
    tokenizer = load_tokenizer(out)
    model = base_model(tmp_path / "model", tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    grown = LlamaForCausalLM.from_pretrained(model)
    grown.resize_token_embeddings(len(tokenizer))
    grown.save_pretrained(model)
    tokenizer.save_pretrained(model)
    (model / "tokenizer.model").write_bytes((out / "tokenizer.model").read_bytes())
    template = tokenizer.chat_template.replace("unknown role", "no such role")
    _, again, _ = taught(model, tmp_path / "run", chat_template=template, max_steps=2)
    assert (again / "tokenizer.model").read_bytes() == (out / "tokenizer.model").read_bytes()
    assert json.loads((again / "added_tokens.json").read_text()) == {"<|tool|>": len(tokenizer) - 1}
    assert tokenizer_digest(load_tokenizer(again)) == tokenizer_digest(load_tokenizer(model))
    gguf = pytest.importorskip("gguf", reason="the extra `dev` brings gguf")
    assert gguf.vocab.SentencePieceVocab(again).added_tokens_list == ["<|tool|>"]


def test_what_an_encoders_task_puts_around_texts_stays(own_tokenizer: Path, tmp_path: Path) -> None:
    """It is given to a tokenizer that says that it adds nothing; published so, it would be lost where it is opened."""
    tokenizer = open_tokenizer(own_tokenizer, 64)
    framed = [tokenizer(*texts)["input_ids"] for texts in (("one",), ("one", "two"))]
    assert framed[0][0] == tokenizer.bos_token_id
    tokenizer.save_pretrained(tmp_path)
    copy_left_out(tokenizer, tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert [again(*texts)["input_ids"] for texts in (("one",), ("one", "two"))] == framed
    assert (tmp_path / "tokenizer.model").exists()
    assert not set(ADDS) & read_tokenizer_config(tmp_path).keys()
    # One that still adds nothing still says so.
    load_tokenizer(own_tokenizer).save_pretrained(tmp_path / "same")
    assert not set(ADDS) & read_tokenizer_config(tmp_path / "same").keys(), "transformers leaves it out"
    copy_left_out(load_tokenizer(own_tokenizer), tmp_path / "same")
    assert [read_tokenizer_config(tmp_path / "same")[name] for name in ADDS] == [False, False]


# lm-eval


QUESTIONS = [
    {"question": "How are you, Ada?", "choices": [ANSWER, "Count the files by size."], "answer": 0},
    {"question": "How are you, Bo?", "choices": ["Print the pages.", ANSWER], "answer": 1},
    {"question": "How are you, Cy?", "choices": ["In reverse order.", "Without asking.", ANSWER], "answer": 2},
]


def harness_task(folder: Path, **config: Any) -> Any:
    from lm_eval.api.task import ConfigurableTask

    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    return ConfigurableTask(config={**common, **config})


def harness(out: Path, task: Any) -> dict[str, Any]:
    from lm_eval import simple_evaluate

    arguments = {"pretrained": str(out), "dtype": "float32"}
    found = simple_evaluate(
        model="hf",
        model_args=arguments,
        tasks=[task],
        device="cpu",
        batch_size=1,
        apply_chat_template=True,
        log_samples=True,
        bootstrap_iters=0,
    )
    assert found is not None
    scores: dict[str, Any] = found
    return scores


def logprob(out: Path, question: str, answer: str) -> float:
    """The answer's log-probability after the question, as a server would ask it."""
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    asked = [{"role": "user", "content": question}]
    before = tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
    after = tokenizer(answer, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([[*before, *after]])).logits[0].log_softmax(-1)
    return sum(float(logits[len(before) + index - 1, token]) for index, token in enumerate(after))


@pytest.mark.filterwarnings("ignore")
def test_lm_eval_scores_choices_as_we_do(published: Taught, tmp_path: Path) -> None:
    """A task from a file. Each choice has the log-probability that the model gives it after the chat template's prompt."""
    pytest.importorskip("lm_eval", reason="the extra `dev` brings lm-eval")
    _, out, _ = published
    task = harness_task(
        tmp_path,
        task="choices",
        output_type="multiple_choice",
        doc_to_choice="{{choices}}",
        doc_to_target="answer",
        target_delimiter="",
        metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    )
    found = harness(out, task)
    assert found["results"]["choices"]["acc,none"] == 1.0
    for row, sample in zip(QUESTIONS, found["samples"]["choices"], strict=True):
        theirs = [float(score) for ((score, _),) in sample["resps"]]
        ours = [logprob(out, str(row["question"]), choice) for choice in row["choices"]]  # type: ignore[attr-defined]
        assert theirs == pytest.approx(ours, abs=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_lm_eval_generates_and_stops(published: Taught, tmp_path: Path) -> None:
    """The answer is exact: nothing comes after the end of the turn."""
    pytest.importorskip("lm_eval", reason="the extra `dev` brings lm-eval")
    _, out, _ = published
    task = harness_task(
        tmp_path,
        task="answers",
        output_type="generate_until",
        doc_to_target="{{choices[answer]}}",
        generation_kwargs={"until": ["</s>"], "max_gen_toks": 60, "do_sample": False},
        metric_list=[{"metric": "bypass"}],
    )
    found = harness(out, task)
    assert [sample["resps"][0][0].strip() for sample in found["samples"]["answers"]] == [ANSWER] * len(QUESTIONS)
