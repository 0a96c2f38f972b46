"""Base models that learn chats: the tokens that they gain, the embeddings of these, and what is said where they are lacking."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch import LAUNCHERS
from pipeline.errors import ArtifactError, DataError, RecipeError
from pipeline.recipe.reader import load_recipe
from pipeline.running.estimates import architecture_of
from pipeline.running.plan import make_plan
from pipeline.settings.resources import Resources
from pipeline.stage import Context, Estimate, Forecast, Result
from pipeline.store.store import Store
from stages import STAGES
from stages.language_model import sft
from stages.language_model.sft import STAGE, SftParams, give_template
from stages.lib.models.embeddings import grow_embeddings
from stages.lib.models.loading import load_model
from stages.lib.text.chat_presets import PRESETS, TemplateOfTokenizer
from stages.lib.text.tokenizer_files import read_tokenizer_files
from stages.lib.text.tokenizers import load_tokenizer, tokenizer_digest
from tests.families import FAMILIES, write_base_model, write_tokenizer
from tests.integration.tiny_language_model import run_stage, write_chats

pytestmark = pytest.mark.slow

PARAMS = {"global_batch_size": 4, "max_steps": 2, "learning_rate": 1e-3, "max_length_tokens": 250}


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("chats") / "chats")


def taught(model: Path, chats: Path, folder: Path, **params: Any) -> tuple[Result, Context]:
    return run_stage(STAGE, {"model": model, "chats": chats}, {**PARAMS, **params}, folder)


def planned(model: Path, **params: Any) -> list[str]:
    """What `plan` says of teaching the model in the folder."""
    known = Estimate(architecture=architecture_of(model), folder=model)
    forecast = Forecast(SftParams(**{**PARAMS, **params}), Resources(), {"model": known})
    return [str(problem) for problem in sft.check(forecast)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_model_becomes_a_chat_model(tmp_path: Path, chats: Path, family: str) -> None:
    """Its folder opens in plain transformers as the tokenizer that it was taught with, and it stops at the end of a turn."""
    model = write_base_model(tmp_path / "model", family)
    size = len(load_tokenizer(model))
    result, context = taught(model, chats, tmp_path / "sft", chat_template="chatml", add_tokens=True)
    assert result.metrics["added_tokens"] == 2
    assert result.facts.added_tokens == ["<|im_start|>", "<|im_end|>"]
    assert result.facts.vocabulary_size == size + 2
    served = AutoTokenizer.from_pretrained(context.out)
    opened = load_tokenizer(context.out)
    assert tokenizer_digest(served) == tokenizer_digest(opened)
    end = served.convert_tokens_to_ids("<|im_end|>")
    assert end == size + 1
    published = AutoModelForCausalLM.from_pretrained(context.out)
    stops = published.generation_config.eos_token_id
    assert end in (stops if isinstance(stops, list) else [stops])
    assert published.get_input_embeddings().weight.shape[0] >= size + 2
    chat = [{"role": "user", "content": " Hi"}, {"role": "assistant", "content": "Ho"}]
    ids = served.apply_chat_template(chat, return_dict=True)["input_ids"]
    assert ids.count(end) == 2
    # Where a normalizer puts a space before every text, it does so behind every special token too.
    decoded, rendered = served.decode(ids), served.apply_chat_template(chat, tokenize=False)
    assert decoded.replace(" ", "") == rendered.replace(" ", "")


@pytest.mark.parametrize(("family", "tied"), [("gpt-2", True), ("llama-3", False), ("pythia", False), ("opt", True)])
def test_new_rows_are_the_mean_of_the_old(tmp_path: Path, family: str, tied: bool) -> None:
    """Where they are read and where they are predicted; the old ones stay, and spare rows that nobody used become new."""
    folder = write_base_model(tmp_path / "model", family, rows=520, tie_word_embeddings=tied)
    model = load_model(AutoModelForCausalLM, folder)
    before = [model.get_input_embeddings().weight.clone(), model.get_output_embeddings().weight.clone()]
    grow_embeddings(model, list(range(500)), [500, 501], 576)
    for old, new in zip(before, (model.get_input_embeddings(), model.get_output_embeddings()), strict=True):
        mean = old[:500].double().mean(0).float()
        assert new.weight.shape[0] == 576
        assert torch.equal(new.weight[:500], old[:500]) and torch.equal(new.weight[502:520], old[502:])
        for row in (500, 501, 520, 575):
            assert torch.equal(new.weight[row], mean)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    assert model.config.vocab_size == 576
    assert model(torch.tensor([[1, 575]])).logits.shape == (1, 2, 576)


@pytest.mark.parametrize(("rows", "multiple", "expected"), [(500, None, 504), (512, None, 512), (500, 128, 512)])
def test_embeddings_keep_to_their_multiple(
    tmp_path: Path, chats: Path, rows: int, multiple: int | None, expected: int
) -> None:
    """500 is a multiple of 4, and 502 tokens need 504 rows; of 512 rows 12 are spare, of which 2 are taken."""
    model = write_base_model(tmp_path / "model", "llama-3", rows=rows)
    params = {"chat_template": "chatml", "add_tokens": True, "vocabulary_multiple": multiple}
    result, context = taught(model, chats, tmp_path / "sft", **params)
    assert result.metrics["added_embeddings"] == expected - rows
    assert json.loads((context.out / "config.json").read_bytes())["vocab_size"] == expected
    known = Estimate(architecture=architecture_of(model), folder=model)
    forecast = Forecast(SftParams(**PARAMS, **params), Resources(), {"model": known})
    estimate = sft.estimate(forecast)
    assert estimate.vocabulary_size == 502 and (estimate.architecture or {})["vocab_size"] == expected
    assert estimate.parameters == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(context.out).parameters())


def test_without_the_option_plan_and_stage_name_it(tmp_path: Path, chats: Path) -> None:
    model = write_base_model(tmp_path / "model", "gpt-2")
    for params, what in (
        ({}, "inputs.model: its tokenizer has no chat template. Write `chat_template: chatml` and `add_tokens: true`"),
        (
            {"chat_template": "chatml"},
            "'chatml' is written with <|im_start|>, <|im_end|>, which the model's vocabulary",
        ),
        ({"chat_template": "chatml", "add_tokens": ["<|im_end|>"]}, "'chatml' is written with <|im_start|>, which"),
    ):
        (problem,) = planned(model, **params)
        assert what in problem and "`add_tokens: true`" in problem
        with pytest.raises(DataError) as caught:
            taught(model, chats, tmp_path / f"sft-{len(params)}", **params)
        assert str(caught.value) == problem
    assert planned(model, chat_template="chatml", add_tokens=True) == []
    assert planned(model, chat_template="chatml", add_tokens=["<|im_start|>", "<|im_end|>"]) == []


@pytest.mark.parametrize("kind", ["reward", "dpo", "grpo"])
def test_plan_sees_it_in_every_stage_that_reads_chats(tmp_path: Path, kind: str) -> None:
    stage = STAGES[kind]
    common = {"global_batch_size": 4, "learning_rate": 1e-3}
    params: dict[str, Any] = {
        "grpo": {
            "rollouts": 1,
            "rollout_batch_size": 4,
            "completions_per_prompt": 2,
            "max_prompt_tokens": 64,
            "max_new_tokens": 8,
            "rewards": [{"kind": "regular_expression", "pattern": "a"}],
        }
    }.get(kind, {"max_steps": 1, "max_length_tokens": 100})
    for tokens, what in ((500, "has no chat template. Teach it chats first, in a stage sft"), (499, "embeds 499")):
        folder = write_base_model(tmp_path / str(tokens), "gpt-2", rows=tokens)
        known = Estimate(architecture=architecture_of(folder), folder=folder)
        forecast = Forecast(stage.params(**common, **params), Resources(), {"model": known})
        assert any(what in str(problem) and "`add_tokens: true`" in str(problem) for problem in stage.check(forecast))


def test_plan_sees_that_none_of_several_templates_is_the_default_one(tmp_path: Path, chats: Path) -> None:
    """`sft` can be told which; elsewhere one for tools is taken where a chat has some, so that such a chat may have one."""
    model = write_base_model(tmp_path / "model", "llama-3", rows=500)
    named = model / "additional_chat_templates"
    named.mkdir()
    for name in ("rag", "chat"):
        (named / f"{name}.jinja").write_text("{{ messages[0].content }}")
    (problem,) = planned(model)
    assert "several chat templates and none called default: chat, rag. Set it to one of these names" in problem
    with pytest.raises(DataError) as caught:
        taught(model, chats, tmp_path / "sft")
    assert sorted(str(caught.value).split()) == sorted(problem.split())
    assert planned(model, chat_template="rag") == []
    known = Estimate(architecture=architecture_of(model), folder=model)
    dpo = STAGES["dpo"]
    params = {"global_batch_size": 4, "learning_rate": 1e-3, "max_steps": 1, "max_length_tokens": 100}
    forecast = Forecast(dpo.params(**params), Resources(), {"model": known})
    said = [str(each) for each in dpo.check(forecast)]
    assert any(
        "inputs.model: its tokenizer has several chat templates, and none is called default" in each for each in said
    )
    (named / "tool_use.jinja").write_text("{{ messages[0].content }}")
    assert not any("chat templates" in str(each) for each in dpo.check(forecast))


def test_plan_sees_that_a_reward_model_reads_no_chats(tmp_path: Path) -> None:
    """Found out by a rollout, or by rows that all seem too long, it would cost the run."""
    folder = write_base_model(tmp_path / "judge", "gpt-2", rows=500)
    judge = Estimate(architecture=architecture_of(folder), folder=folder)
    rollouts = {
        "global_batch_size": 4,
        "learning_rate": 1e-3,
        "rollouts": 1,
        "rollout_batch_size": 4,
        "completions_per_prompt": 2,
        "max_prompt_tokens": 64,
        "max_new_tokens": 8,
        "rewards": [{"kind": "reward_model"}],
    }
    for kind, params, inputs in (
        ("grpo", rollouts, {"model": Estimate(), "prompts": Estimate(), "reward": judge}),
        ("evaluate", {}, {"models.one": Estimate(), "preferences": Estimate(), "reward_models.judge": judge}),
        ("evaluate", {}, {"models.one": judge, "chats": Estimate()}),
    ):
        found = STAGES[kind].check(Forecast(STAGES[kind].params(**params), Resources(), inputs))
        role = next(role for role, estimate in inputs.items() if estimate is judge)
        assert [each.where for each in found if each.what == "its tokenizer has no chat template"] == [f"inputs.{role}"]


def test_plan_sees_in_every_role_that_a_model_does_not_embed_its_tokens(tmp_path: Path) -> None:
    whole, lacking = (write_base_model(tmp_path / str(rows), "gpt-2", rows=rows) for rows in (500, 499))
    known, odd = (Estimate(architecture=architecture_of(folder), folder=folder) for folder in (whole, lacking))
    common = {"global_batch_size": 4, "max_steps": 1, "learning_rate": 1e-3}
    for kind, params, inputs in (
        ("pretrain", common, {"tokens": Estimate(), "model": odd}),
        ("distill", common, {"tokens": Estimate(), "teacher": odd, "student": known}),
        ("evaluate", {"heldout_blocks": 1}, {"tokens": Estimate(), "models.one": known, "models.two": odd}),
        ("classify", {**common, "max_length_tokens": 64}, {"labels": Estimate(), "encoder": odd}),
    ):
        stage = STAGES[kind]
        found = stage.check(Forecast(stage.params(**params), Resources(), inputs))
        role = next(role for role, estimate in inputs.items() if estimate is odd)
        assert [p.where for p in found if "has 500 tokens, and the model embeds 499" in p.what] == [f"inputs.{role}"]


@pytest.mark.parametrize(
    ("params", "what"),
    [
        ({"vocabulary_multiple": 64}, "vocabulary_multiple has no effect without add_tokens"),
        ({"add_tokens": ["<|a|>", "<|b|>", "<|a|>"]}, r"add_tokens names <\|a\|> more than once"),
        ({"add_tokens": ["x"]}, "at least 2 characters"),
    ],
)
def test_params_that_cannot_be_meant_are_refused(params: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        SftParams(**PARAMS, **params)


def test_a_tokenizer_larger_than_the_embeddings_grows_them(tmp_path: Path, chats: Path) -> None:
    """Tokens that others added without resizing: an index out of range otherwise."""
    model = write_base_model(tmp_path / "model", "gpt-2")
    tokenizer = load_tokenizer(model)
    give_template(tokenizer, "chatml", True)
    tokenizer.save_pretrained(model)
    (problem,) = planned(model)
    assert "its tokenizer has 502 tokens, and the model embeds 500. Write `add_tokens: true`" in problem
    with pytest.raises(ArtifactError, match="has 502 tokens, and the model embeds 500"):
        taught(model, chats, tmp_path / "refused")
    assert planned(model, add_tokens=True) == []
    result, context = taught(model, chats, tmp_path / "sft", add_tokens=True)
    assert (result.metrics["added_tokens"], result.metrics["added_embeddings"]) == (0, 4)
    assert len(load_tokenizer(context.out)) == 502
    notes = (tmp_path / "sft" / "journal.jsonl").read_text()
    assert "the vocabulary gains no tokens; the model embeds 504, instead of 500" in notes


def test_where_nothing_is_lacking_nothing_is_added(tmp_path: Path, chats: Path) -> None:
    first, context = taught(
        write_base_model(tmp_path / "model", "gpt-2"), chats, tmp_path / "one", chat_template="chatml", add_tokens=True
    )
    assert first.metrics["added_tokens"] == 2
    again, _ = taught(context.out, chats, tmp_path / "two", add_tokens=True)
    assert "added_tokens" not in again.metrics and again.facts.added_tokens is None
    assert "add_tokens adds none" in (tmp_path / "two" / "journal.jsonl").read_text()


def test_a_listed_token_that_is_there_stays_as_it_is(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "gpt-2")
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.add_tokens(["<think>"])
    assert give_template(tokenizer, "chatml", ["<think>", "<|im_start|>", "<|im_end|>", "<|new|>"]) == [
        "<|im_start|>",
        "<|im_end|>",
        "<|new|>",
    ]
    flags = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
    assert not flags["<think>"] and flags["<|new|>"]


def test_the_template_of_another_tokenizer_brings_its_tokens(tmp_path: Path, chats: Path) -> None:
    """Those that it is written with, as they are there, and no other of its tokens."""
    other = tmp_path / "other"
    write_tokenizer(other, "llama-2")
    donor = load_tokenizer(other)
    donor.add_tokens(["<|unused|>", "<|user|>", "<|assistant|>", "<|end|>"], special_tokens=True)
    donor.add_tokens(["<think>", "<unused_1>"])
    donor.chat_template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content | replace('<think>', '') + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    donor.save_pretrained(other)
    params = SftParams(**PARAMS, chat_template=str(other), add_tokens=True)
    assert isinstance(params.chat_template, TemplateOfTokenizer)
    assert SftParams(**json.loads(params.model_dump_json())) == params  # as a job is read again
    model = write_base_model(tmp_path / "model", "gpt-2")
    assert (
        "the other tokenizer's template is written with <|assistant|>, <|end|>, <think>"
        in planned(model, chat_template=str(other))[0]
    )
    result, context = taught(model, chats, tmp_path / "sft", chat_template=str(other), add_tokens=True)
    assert result.facts.added_tokens == ["<|user|>", "<|assistant|>", "<|end|>", "<think>"]
    added = {token.content: token.special for token in load_tokenizer(context.out).added_tokens_decoder.values()}
    assert added["<|end|>"] and not added["<think>"]


def test_a_folder_without_template_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "other", "gpt-2")
    for folder, what in ((tmp_path / "other", "holds no chat template"), (tmp_path, "holds no tokenizer.json")):
        with pytest.raises(ValueError, match=what):
            SftParams(**PARAMS, chat_template=str(folder))


def test_of_a_template_in_a_file_the_tokens_are_listed(tmp_path: Path, chats: Path) -> None:
    """Which they are cannot be read off for certain: the list that is proposed works."""
    file = tmp_path / "mine.jinja"
    file.write_text(PRESETS["chatml"].template)
    model = write_base_model(tmp_path / "model", "llama-3")
    with pytest.raises(DataError, match=r"List them: `add_tokens: \[.*\]`") as caught:
        taught(model, chats, tmp_path / "refused", chat_template=str(file), add_tokens=True)
    listed = json.loads(str(caught.value).split("`add_tokens: ")[1].split("`")[0])
    assert listed == ["<|im_start|>", "<|im_end|>"]
    result, _ = taught(model, chats, tmp_path / "sft", chat_template=str(file), add_tokens=listed)
    assert result.facts.added_tokens == listed


@pytest.mark.parametrize("family", FAMILIES)
def test_what_plan_reads_is_what_is_opened(tmp_path: Path, family: str) -> None:
    write_tokenizer(tmp_path, family)
    tokenizer = load_tokenizer(tmp_path)
    files = read_tokenizer_files(tmp_path)
    assert files is not None and files.num_tokens == len(tokenizer) and not files.templates
    give_template(tokenizer, "slipway", True)
    tokenizer.save_pretrained(tmp_path)
    files = read_tokenizer_files(tmp_path)
    assert files is not None and files.num_tokens == len(tokenizer)
    assert files.templates == {"default": tokenizer.chat_template}
    assert files.added.keys() == {token.content for token in tokenizer.added_tokens_decoder.values()}


def test_what_a_command_leaves_out_does_not_stop_it(tmp_path: Path) -> None:
    """A recipe whose later stages still name the base model: teaching it is planned, all of it is refused."""
    write_base_model(tmp_path / "base", "gpt-2")
    (tmp_path / "rows.jsonl").write_text("")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        """
name: recipe
seed: 1
outputs: [chat, judge]
stages:
  rows: {kind: clean, params: {format: chats, source: {kind: files, layout: messages, paths: [rows.jsonl]}}}
  chats: {kind: mix, inputs: {sources: {rows: rows}}}
  pairs_rows: {kind: clean, params: {format: preferences, source: {kind: files, layout: preference_chat, paths: [rows.jsonl]}}}
  pairs: {kind: mix, inputs: {sources: {rows: pairs_rows}}}
  chat:
    kind: sft
    inputs: {model: ./base, chats: chats}
    params: {global_batch_size: 1, max_steps: 1, learning_rate: 1e-3, max_length_tokens: 64, chat_template: chatml, add_tokens: true}
  judge:
    kind: reward
    inputs: {model: ./base, preferences: pairs}
    params: {global_batch_size: 1, max_steps: 1, learning_rate: 1e-3, max_length_tokens: 64}
"""
    )
    loaded, store = load_recipe(recipe, STAGES, LAUNCHERS), Store(tmp_path / "runs")
    plan = make_plan(loaded, store, until="chat")
    assert "judge" in plan.left_out and plan.step("chat").estimate.vocabulary_size == 502
    for chosen in ({}, {"until": "judge"}, {"only": "judge"}):
        with pytest.raises(RecipeError, match=r"stages\.judge\.inputs\.model: its tokenizer has no chat template"):
            make_plan(loaded, store, **chosen)
