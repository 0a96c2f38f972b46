"""Adapters of peft, their base beside them, made into models that every stage takes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from launch import LAUNCHERS
from pipeline.errors import ArtifactError, DataError, RecipeError
from pipeline.recipe.outside import kind_of_folder
from pipeline.recipe.reader import load_recipe
from pipeline.running.plan import make_plan
from pipeline.settings.resources import Resources
from pipeline.stage import Estimate, Forecast
from pipeline.store.artifact import Kind
from pipeline.store.store import Store
from stages import STAGES
from stages.lib.text.tokenizers import load_tokenizer
from tests.families import write_base_model
from tests.integration.on_policy_world import make_on_policy_world
from tests.integration.tiny_language_model import run_stage

pytestmark = pytest.mark.slow

RECIPE = """\
name: recipe
seed: 1
outputs: [chat]
stages:
  rows: {{kind: clean, params: {{format: chats, source: {{kind: files, layout: messages, paths: [rows.jsonl]}}}}}}
  chats: {{kind: mix, inputs: {{sources: {{rows: rows}}}}}}
  {merged}
  chat:
    kind: sft
    inputs: {{model: {model}, chats: chats}}
    params: {{global_batch_size: 1, max_steps: 1, learning_rate: 1e-3, max_length_tokens: 64, chat_template: chatml, add_tokens: true}}
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base_model(tmp_path / "base", "llama-3")


def adapted(base: Path, folder: Path, **config: Any) -> Any:
    """An adapter with random weights, saved as peft does it, and the model under it."""
    torch.manual_seed(1)
    options = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **config}
    model = AutoModelForCausalLM.from_pretrained(base)
    under = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    under.peft_config["default"].base_model_name_or_path = str(base)
    under.save_pretrained(folder)
    return under.eval()


def merged(base: Path, adapter: Path, folder: Path, **params: Any) -> tuple[Any, Path]:
    result, context = run_stage(STAGES["merge"], {"model": base, "adapter": adapter}, params, folder)
    return result, context.out


@pytest.mark.parametrize(
    ("config", "changed"),
    [
        ({}, 2),
        ({"target_modules": "all-linear", "use_rslora": True}, 7),
        ({"use_dora": True}, 2),
        ({"modules_to_save": ["lm_head"]}, 2),
        ({"modules_to_save": ["lm_head", "embed_tokens"]}, 2),
        ({"target_modules": ["q_proj", "embed_tokens"]}, 2),
        ({"rank_pattern": {"q_proj": 4}, "target_modules": ["q_proj"]}, 1),
    ],
)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
def test_the_merged_model_computes_what_the_two_compute(
    tmp_path: Path, base: Path, config: dict[str, Any], changed: int
) -> None:
    model = adapted(base, tmp_path / "adapter", **config)
    if "modules_to_save" in config:
        with torch.no_grad():
            model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.5)
        model.save_pretrained(tmp_path / "adapter")
        changed += 1
    assert kind_of_folder(tmp_path / "adapter") is Kind.ADAPTER
    weights = (base / "model.safetensors").read_bytes()
    result, out = merged(base, tmp_path / "adapter", tmp_path / "merge")
    assert (base / "model.safetensors").read_bytes() == weights  # the model's memory is a map of that file
    assert result.metrics["changed_weights"] == changed and result.metrics["relative_change"] > 0
    ids = torch.tensor([[1, 5, 9]])
    found = AutoModelForCausalLM.from_pretrained(out)(ids).logits
    torch.testing.assert_close(found, model(ids).logits, rtol=1e-5, atol=1e-6)
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_tokenizer_and_template_are_the_adapters_where_it_has_some(tmp_path: Path, base: Path) -> None:
    """Chats are tuned with a template, and that is saved beside the adapter."""
    adapted(base, tmp_path / "adapter")
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(tmp_path / "adapter")
    _, out = merged(base, tmp_path / "adapter", tmp_path / "merge", published_dtype="bf16")
    assert load_tokenizer(out).chat_template == "{{ messages }}"
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16


def test_so_they_are_where_the_adapter_lies_beside_a_whole_model(tmp_path: Path, base: Path) -> None:
    """What sft taught a template keeps it in the artifact, and the adapter alone in a folder within."""
    adapted(base, tmp_path / "artifact" / "adapter")
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(tmp_path / "artifact")
    _, out = merged(base, tmp_path / "artifact", tmp_path / "merge")
    assert load_tokenizer(out).chat_template == "{{ messages }}"


def test_a_recipe_takes_an_adapter_with_its_base(tmp_path: Path, base: Path) -> None:
    """Named as a model it is refused with the stage to write, and that stage is planned; both folders make its id."""
    adapted(base, tmp_path / "adapter")
    (tmp_path / "rows.jsonl").write_text("")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(merged="", model="./adapter"))
    with pytest.raises(
        RecipeError, match=r"needs causal_lm, and the folder holds adapter\. It is an adapter for"
    ) as caught:
        load_recipe(recipe, STAGES, LAUNCHERS)
    (block,) = re.findall(r"`(merged: .*?)`", str(caught.value))
    recipe.write_text(RECIPE.format(merged=block, model="merged"))

    def planned_id() -> str:
        plan = make_plan(load_recipe(recipe, STAGES, LAUNCHERS), Store(tmp_path / "runs"))
        return plan.step("merged").artifact_id

    first = planned_id()
    assert planned_id() == first
    adapted(base, tmp_path / "adapter", target_modules=["k_proj"])
    second = planned_id()
    write_base_model(base, "llama-3", rows=512)
    assert len({first, second, planned_id()}) == 3


def test_the_adapter_of_an_on_policy_run_gives_what_that_run_published(tmp_path: Path) -> None:
    """It lies in a folder of its own within the artifact."""
    world = make_on_policy_world(tmp_path / "world")
    params = {
        "rewards": [{"kind": "length_penalty", "target_tokens": 2, "per_token": 0.1}],
        "adapter": {"method": "lora", "rank": 2},
        "completions_per_prompt": 2,
        "rollouts": 1,
        "rollout_batch_size": 4,
        "global_batch_size": 4,
        "learning_rate": 1e-2,
        "max_prompt_tokens": 64,
        "max_new_tokens": 8,
        "heldout_prompts": 2,
    }
    _, context = run_stage(STAGES["grpo"], world.inputs, params, tmp_path / "grpo")
    result, out = merged(world.model, context.out, tmp_path / "merge")
    assert result.metrics["relative_change"] > 0
    published, again = (load_file(folder / "model.safetensors") for folder in (context.out, out))
    assert published.keys() == again.keys()
    for name, tensor in published.items():
        torch.testing.assert_close(again[name], tensor)


def test_another_base_than_the_adapter_says_is_told(tmp_path: Path, base: Path) -> None:
    """Copies are the same model, so it is no error; of the base itself nothing is said."""
    adapted(base, tmp_path / "adapter")
    other = write_base_model(tmp_path / "other", "llama-3")
    for model in (base, other):
        merged(model, tmp_path / "adapter", tmp_path / model.name / "merge")
        notes = (tmp_path / model.name / "merge" / "journal.jsonl").read_text(encoding="utf-8")
        told = f"the adapter says that it was trained on {base}, and is put on {other}"
        assert (told in notes) == (model == other)


def mixed(base: Path, adapters: dict[str, Path], folder: Path, **params: Any) -> tuple[Any, Path]:
    inputs = {"model": base, **{f"adapters.{name}": path for name, path in adapters.items()}}
    result, context = run_stage(STAGES["merge"], inputs, params, folder)
    return result, context.out


@pytest.fixture
def three(tmp_path: Path, base: Path) -> dict[str, Path]:
    """Adapters of one base: two LoRAs that share a layer, and one that scales keys."""
    for name, targets, factor in (("one", ["q_proj", "v_proj"], 1.0), ("two", ["v_proj", "up_proj"], -2.0)):
        model = adapted(base, tmp_path / name, target_modules=targets)
        with torch.no_grad():
            for key, weight in model.named_parameters():
                if "lora_B" in key:
                    weight.mul_(factor)
        model.save_pretrained(tmp_path / name)
    torch.manual_seed(3)
    config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], init_ia3_weights=False)
    scaled = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    scaled.peft_config["default"].base_model_name_or_path = str(base)
    scaled.save_pretrained(tmp_path / "three")
    return {name: tmp_path / name for name in ("one", "two", "three")}


def test_a_mixture_adds_what_each_adapter_adds(tmp_path: Path, base: Path, three: dict[str, Path]) -> None:
    """W + 0.5 B_1 A_1 alpha / r - 2 B_2 A_2 alpha / r + 1 (l - 1) W, each by its own layers; the mean without weights."""
    start = load_file(base / "model.safetensors")
    files = {name: load_file(path / "adapter_model.safetensors") for name, path in three.items()}

    def expected(weights: dict[str, float]) -> dict[str, torch.Tensor]:
        found = {key: tensor.double() for key, tensor in start.items()}
        for key in found:
            path = key.removesuffix(".weight")
            for name in ("one", "two"):
                if (a := files[name].get(f"base_model.model.{path}.lora_A.weight")) is not None:
                    b = files[name][f"base_model.model.{path}.lora_B.weight"]
                    found[key] = found[key] + weights[name] * 8 / 2 * b.double() @ a.double()
            if (scale := files["three"].get(f"base_model.model.{path}.ia3_l")) is not None:
                found[key] = found[key] + weights["three"] * (scale.double() - 1) * start[key].double()
        return found

    for number, given in enumerate(({"one": 0.5, "two": -2.0, "three": 1.0}, None)):
        result, out = mixed(base, three, tmp_path / f"mixed_{number}", **({"weights": given} if given else {}))
        wanted = expected(given or dict.fromkeys(three, 1 / 3))
        found = load_file(out / "model.safetensors")
        assert result.metrics["changed_weights"] == sum(not torch.equal(found[key], start[key]) for key in start) == 4
        for key, tensor in found.items():
            torch.testing.assert_close(tensor, wanted[key].float(), rtol=1e-6, atol=1e-7)


def test_a_mixture_of_one_is_that_adapter_merged(tmp_path: Path, base: Path, three: dict[str, Path]) -> None:
    _, alone = merged(base, three["one"], tmp_path / "alone")
    _, out = mixed(base, {"one": three["one"]}, tmp_path / "mixture")
    found, expected = (load_file(each / "model.safetensors") for each in (out, alone))
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-6, atol=1e-8)


TIED = {
    "head": {"target_modules": ["lm_head"]},
    "embeddings": {"target_modules": ["embed_tokens"]},
    "both": {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
    "head, whole": {"modules_to_save": ["lm_head"]},
    "embeddings, whole": {"modules_to_save": ["embed_tokens"]},
}


@pytest.mark.parametrize("name", TIED)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
def test_layers_that_share_their_weight_get_their_own(tmp_path: Path, name: str) -> None:
    """The output layer is that of the embeddings, and the adapter is on one of them: so is what it adds, also in a mixture."""
    base = write_base_model(tmp_path / "base", "llama-3", tie_word_embeddings=True)
    model = adapted(base, tmp_path / "adapter", **TIED[name])
    if "modules_to_save" in TIED[name]:
        with torch.no_grad():
            for key, weight in model.named_parameters():
                if ".modules_to_save." in key:
                    weight.mul_(1.5)
        model.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[1, 5, 9]])
    _, alone = merged(base, tmp_path / "adapter", tmp_path / "alone")
    _, mixture = mixed(base, {"one": tmp_path / "adapter"}, tmp_path / "mixture")
    for out in (alone, mixture):
        found = AutoModelForCausalLM.from_pretrained(out)
        assert not found.config.tie_word_embeddings and "lm_head.weight" in load_file(out / "model.safetensors")
        torch.testing.assert_close(found(ids).logits, model(ids).logits, rtol=1e-5, atol=2e-5)


def test_shared_weights_that_no_adapter_is_on_stay_shared(tmp_path: Path) -> None:
    base = write_base_model(tmp_path / "base", "llama-3", tie_word_embeddings=True)
    adapted(base, tmp_path / "adapter")
    _, alone = merged(base, tmp_path / "adapter", tmp_path / "alone")
    _, mixture = mixed(base, {"one": tmp_path / "adapter"}, tmp_path / "mixture")
    for out in (alone, mixture):
        assert AutoModelForCausalLM.from_pretrained(out).config.tie_word_embeddings
        assert "lm_head.weight" not in load_file(out / "model.safetensors")


def test_mixtures_that_are_none_are_refused(tmp_path: Path, base: Path, three: dict[str, Path]) -> None:
    stage = STAGES["merge"]

    def problems(roles: tuple[str, ...], **params: Any) -> list[str]:
        inputs = {role: Estimate() for role in ("model", *roles)}
        return [str(each) for each in stage.check(Forecast(stage.params(**params), Resources(device="cpu"), inputs))]

    both = ("adapters.one", "adapters.two")
    assert problems(("adapter",)) == problems(both) == problems(both, weights={"one": 1, "two": -1}) == []
    assert problems(both, tokenizer_of="two") == []
    assert "is missing, and so is adapters" in problems(())[0]
    assert "both given" in problems(("adapter", *both))[0]
    assert "three, two stand on one side only" in problems(both, weights={"one": 1, "three": 1})[0]
    assert "is none of `adapters`" in problems(both, tokenizer_of="tow")[0]
    assert "weights" in problems(("adapter",), weights={"one": 1})[0]
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(three["two"])
    two = {name: three[name] for name in ("one", "two")}
    with pytest.raises(DataError, match=r"different tokenizers or chat templates: one and two.*tokenizer_of: one"):
        mixed(base, two, tmp_path / "refused")
    _, out = mixed(base, two, tmp_path / "kept", tokenizer_of="two")
    assert load_tokenizer(out).chat_template == "{{ messages }}"
    with pytest.raises(ArtifactError, match="changes no weight"):
        mixed(base, dict.fromkeys("ab", three["one"]), tmp_path / "none", weights={"a": 1, "b": -1})


def test_what_does_not_fit_is_refused(tmp_path: Path, base: Path) -> None:
    other = write_base_model(tmp_path / "other", "llama-3", hidden_size=32)
    deeper = write_base_model(tmp_path / "deeper", "llama-3", num_hidden_layers=2)
    adapted(other, tmp_path / "of_other")
    adapted(deeper, tmp_path / "of_deeper")
    model = adapted(base, tmp_path / "zero", init_lora_weights=True)
    adapted(base, tmp_path / "broken")
    broken = load_file(tmp_path / "broken" / "adapter_model.safetensors")
    next(iter(broken.values())).fill_(torch.nan)
    save_file(broken, tmp_path / "broken" / "adapter_model.safetensors", {"format": "pt"})
    for adapter, what in (
        ("of_other", "inputs.adapter: does not fit the model: .*size mismatch"),
        ("of_deeper", "inputs.adapter: and the model do not have the same layers: .*layers.1"),
        ("zero", "inputs.adapter: changes no weight of the model"),
        ("broken", "weights are not fit to publish: .* holds values that are not finite"),
        ("base", "base holds no adapter: there is no adapter_config.json"),
    ):
        with pytest.raises(ArtifactError, match=what):
            merged(base, tmp_path / adapter, tmp_path / "merge" / adapter)
    torch.save(peft.get_peft_model_state_dict(model), tmp_path / "zero" / "adapter_model.bin")
    (tmp_path / "zero" / "adapter_model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"adapter_model\.bin may run code when it is opened") as caught:
        merged(base, tmp_path / "zero", tmp_path / "merge" / "bin")
    (command,) = re.findall(r"`(from peft .*?)`", str(caught.value))
    exec(command.replace("FOLDER", repr(str(tmp_path / "anew"))), {})
    with pytest.raises(ArtifactError, match="changes no weight of the model"):
        merged(base, tmp_path / "anew", tmp_path / "merge" / "anew")
