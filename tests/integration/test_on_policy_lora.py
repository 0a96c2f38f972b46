"""On-policy training of low-rank adapters: what is published, that the frozen weights stay, and what shares them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from pipeline.cards.card import write_cards
from pipeline.errors import DataError
from pipeline.running.worker import hub_inputs
from pipeline.settings.resources import Resources
from pipeline.store.job import Job
from stages.lib.models.adapters.saving import save_adapter
from tests.integration.on_policy_world import OnPolicyWorld, Seen, align, make_on_policy_world, write_policy

pytestmark = pytest.mark.slow

LORA = {"lora": {"rank": 4, "alpha": 16}, "learning_rate": 1e-2, "epochs_per_rollout": 2}
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> OnPolicyWorld:
    return make_on_policy_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def trained(world: OnPolicyWorld, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return align("ppo", world.inputs, tmp_path_factory.mktemp("lora"), LORA)


def logits(model: torch.nn.Module, world: OnPolicyWorld) -> torch.Tensor:
    ids = torch.tensor([world.tokenizer.encode("The functions of this module read and write files.")])
    with torch.no_grad():
        found = model.eval()(ids).logits
    assert isinstance(found, torch.Tensor)
    return found


def test_peft_alone_loads_the_adapter(trained: Seen, world: OnPolicyWorld) -> None:
    """On the input model, named or found by itself, and merged: the logits of the merged model that is published, to 1e-5."""
    published = logits(AutoModelForCausalLM.from_pretrained(trained.context.out), world)
    adapter = trained.context.out / "adapter"
    on_base = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world.model), adapter)
    found = AutoPeftModelForCausalLM.from_pretrained(adapter)
    base = logits(AutoModelForCausalLM.from_pretrained(world.model), world)
    assert float((published - base).abs().max()) > 0.1, "the adapter does something"
    for model in (on_base, found, on_base.merge_and_unload()):
        assert torch.allclose(logits(model, world), published, rtol=0, atol=1e-5)


def test_the_trained_policy_is_what_is_published(trained: Seen, world: OnPolicyWorld) -> None:
    published = logits(AutoModelForCausalLM.from_pretrained(trained.context.out), world)
    assert torch.allclose(logits(trained.parts.module.policy, world), published, rtol=0, atol=1e-5)


def test_frozen_weights_stay_as_they_are(trained: Seen, world: OnPolicyWorld) -> None:
    """Bit for bit, in policy, critic and reference, whose weights are the same tensors; only adapters and the head learn."""
    start = load_file(world.model / "model.safetensors")
    module = trained.parts.module
    frozen = {
        name.replace("base_model.model.", "").replace(".base_layer", ""): parameter
        for name, parameter in module.policy.named_parameters()
        if not parameter.requires_grad
    }
    assert frozen.keys() == start.keys()
    assert all(torch.equal(frozen[name], tensor) for name, tensor in start.items())
    shared = {parameter.data_ptr() for parameter in frozen.values()}
    assert {parameter.data_ptr() for parameter in module.reference.parameters()} == shared
    backbone = [parameter for parameter in module.value.parameters() if not parameter.requires_grad]
    assert {parameter.data_ptr() for parameter in backbone} < shared, "all but the head over the vocabulary"
    learned = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    assert all(".lora_" in name or name == "value.score.weight" for name in learned)


def test_merging_changes_linear_layers_only(trained: Seen, world: OnPolicyWorld) -> None:
    """merged = base + (alpha / rank) B A with alpha 16 and rank 4, in every linear layer but the head; the rest is the base's."""
    start = load_file(world.model / "model.safetensors")
    merged = load_file(trained.context.out / "model.safetensors")
    adapter = load_file(trained.context.out / "adapter" / "adapter_model.safetensors")
    assert merged.keys() == start.keys()
    for name, tensor in merged.items():
        layer = name.removesuffix(".weight")
        if not layer.endswith(LINEAR):
            assert torch.equal(tensor, start[name])
            continue
        a, b = (adapter[f"base_model.model.{layer}.lora_{side}.weight"] for side in "AB")
        assert a.shape[0] == 4 == b.shape[1]
        assert torch.allclose(tensor, start[name] + 4.0 * b @ a, atol=1e-6)
        assert not torch.equal(tensor, start[name])
    assert len(adapter) == 2 * 2 * len(LINEAR), "A and B of two layers"


def test_the_manifest_counts_the_published_parameters(trained: Seen) -> None:
    weights = load_file(trained.context.out / "model.safetensors")
    assert trained.result.facts.parameters == sum(tensor.numel() for tensor in weights.values())


def test_the_critic_is_published_as_an_adapter_and_a_head(trained: Seen, world: OnPolicyWorld) -> None:
    """On the base of the input model they give the values of the critic in training."""
    folder = trained.context.out / "value"
    backbone = PeftModel.from_pretrained(AutoModel.from_pretrained(world.model), folder).eval()
    head = load_file(folder / "value_head.safetensors")["weight"]
    ids = torch.tensor([world.tokenizer.encode("What does this return?")])
    critic = trained.parts.module.value.eval()
    with torch.no_grad():
        found = backbone(ids).last_hidden_state @ head[0]
        expected = critic.score(critic.base_model(ids).last_hidden_state).squeeze(-1)
    assert torch.allclose(found, expected, atol=1e-5)
    assert float(expected.abs().max()) > 1e-3


def test_the_lines_of_the_cards_run(trained: Seen, world: OnPolicyWorld) -> None:
    """On the base that they ask for: the adapter gives the merged model's logits, the critic those of the critic."""
    out = trained.context.out
    assert list(out.glob("*/README.md")) == [], "peft's card, which says nothing"
    job = Job(
        recipe="r", step="s", kind="ppo", stage_version=1, artifact_id="a" * 64, artifact_kind="causal_lm", params={},
        inputs={}, input_ids={"model": "sha256:" + "1" * 64}, source_digests={}, seed=0, resources=Resources(),
        store="/", work="/",
    )  # fmt: skip
    try:
        write_cards(job, {"model": world.model}, out, trained.result, {})
        found = {name: lines_of_card(out / name, world.model) for name in ("adapter", "value")}
    finally:
        for card in out.rglob("README.md"):
            card.unlink()
    published = logits(AutoModelForCausalLM.from_pretrained(out), world)
    assert torch.allclose(logits(found["adapter"]["model"], world), published, rtol=0, atol=1e-5)
    ids = torch.tensor([world.tokenizer.encode("What does this return?")])
    critic = trained.parts.module.value.eval()
    with torch.no_grad():
        values = found["value"]["body"].eval()(ids).last_hidden_state @ found["value"]["head"][0]
        expected = critic.score(critic.base_model(ids).last_hidden_state).squeeze(-1)
    assert torch.allclose(values, expected, atol=1e-5)


def lines_of_card(folder: Path, base: Path) -> dict[str, Any]:
    """What the Python of a card has made, run in the folder that it stands in."""
    text = (folder / "README.md").read_text()
    assert str(base) not in text
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(code.replace("path/to/the/base", str(base)), names)
    return names


def test_an_adapter_on_a_model_of_the_hub_names_it_as_the_hub_does(trained: Seen, tmp_path: Path) -> None:
    """Not by where this machine keeps what it brought from there."""
    policy = trained.parts.module.policy
    place = f"hub:someone/some-model@{'0' * 40}"
    context = replace(trained.context, hub=hub_inputs({"model": place, "prompts": "/somewhere"}))
    save_adapter(policy, trained.parts.engine.state_of(policy), context.origin("model"), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("someone/some-model", "0" * 40)
    assert context.origin("prompts") == (str(trained.context.inputs["prompts"]), None)
    assert not (tmp_path / "README.md").exists()


def test_the_reference_stays_the_base(trained: Seen, world: OnPolicyWorld) -> None:
    """At first the adapter adds nothing: policy and reference agree. In the second rollout they do not."""
    first, second = trained.experiences
    for each in first.episodes:
        assert np.array_equal(each.logprobs, each.ref_logprobs)
    model = AutoModelForCausalLM.from_pretrained(world.model, dtype=torch.float64).eval()
    for each in second.episodes[:4]:
        ids = torch.tensor([[*each.prompt_ids.tolist(), *each.ids.tolist()]])
        with torch.no_grad():
            logp = model(ids).logits[0].log_softmax(-1)
        places = range(len(each.prompt_ids), ids.shape[1])
        assert each.ref_logprobs.tolist() == pytest.approx([float(logp[p - 1, ids[0, p]]) for p in places], abs=1e-5)
    assert trained.lines("rollout")[1]["kl"] != 0


def test_a_reference_of_its_own(world: OnPolicyWorld, tmp_path: Path) -> None:
    """Another model as reference is loaded beside the policy; the divergence from it is not 0 at the beginning."""
    other = write_policy(tmp_path / "other", world.tokenizer, initializer_range=0.05)
    changes = {**LORA, "rollouts": 1, "epochs_per_rollout": 1, "lora": {"rank": 2, "target_modules": ["q_proj"]}}
    seen = align("grpo", {**world.inputs, "reference": other}, tmp_path / "run", changes)
    assert abs(seen.lines("rollout")[0]["kl"]) > 0.01
    config = json.loads((seen.context.out / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj"] and config["r"] == 2
    assert config["base_model_name_or_path"] == str(world.model)


def test_layers_that_the_model_does_not_have_are_refused(world: OnPolicyWorld, tmp_path: Path) -> None:
    """peft would pass over those beside one that is found; the head is none of the backbone's."""
    changes = {"lora": {"target_modules": ["q_proj", "v_porj", "lm_head"]}}
    with pytest.raises(DataError) as caught:
        align("ppo", world.inputs, tmp_path, changes)
    assert [str(problem) for problem in caught.value.problems] == [
        "params.lora.target_modules: the model has no linear layer 'v_porj'. Did you mean 'v_proj'?",
        "params.lora.target_modules: the model has no linear layer 'lm_head'. Known: "
        + ", ".join(sorted(LINEAR))
        + ".",
    ]
