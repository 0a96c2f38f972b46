"""On-policy training of adapters: what is published, that the frozen weights stay, and what shares them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from pipeline.cards.card import write_cards
from pipeline.errors import DataError
from pipeline.running.worker import hub_inputs
from pipeline.settings.resources import Resources
from pipeline.stage import Estimate, Forecast
from pipeline.store.job import Job
from stages import STAGES
from stages.lib.models.adapters.attaching import attach, hide_virtual_tokens, trained_state
from stages.lib.models.adapters.folders import CONFIG, OWN, WEIGHTS
from stages.lib.models.adapters.opening import open_adapted
from stages.lib.models.adapters.params import BottleneckMethod, ContinuedMethod, LoraMethod
from stages.lib.models.adapters.saving import save_adapter
from stages.lib.models.asking import innermost
from stages.lib.models.loading import load_language_model
from stages.lib.on_policy.actor_critic import read_in_place
from stages.lib.on_policy.adapting import critic_body
from tests.distributed.training_world import GPT2_WITH_DROPOUT, write_model
from tests.integration.on_policy_world import PARAMS, OnPolicyWorld, Seen, align, make_on_policy_world, write_policy

pytestmark = pytest.mark.slow

RATES = {"learning_rate": 1e-2, "epochs_per_rollout": 2}
LORA = {"adapter": {"method": "lora", "rank": 4, "alpha": 16}, **RATES}
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
    job = job_of("causal_lm")
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


def job_of(kind: str) -> Job:
    """What a card is told of the step that made an artifact of this kind."""
    return Job(
        recipe="r", step="s", kind="ppo", stage_version=1, artifact_id="a" * 64, artifact_kind=kind, params={},
        inputs={}, input_ids={"model": "sha256:" + "1" * 64}, source_digests={}, seed=0, resources=Resources(),
        store="/", work="/",
    )  # fmt: skip


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
    adapter = {"method": "lora", "rank": 2, "target_modules": ["q_proj"]}
    changes = {**LORA, "rollouts": 1, "epochs_per_rollout": 1, "adapter": adapter}
    seen = align("grpo", {**world.inputs, "reference": other}, tmp_path / "run", changes)
    assert abs(seen.lines("rollout")[0]["kl"]) > 0.01
    config = json.loads((seen.context.out / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj"] and config["r"] == 2
    assert config["base_model_name_or_path"] == str(world.model)


def test_layers_that_the_model_does_not_have_are_refused(world: OnPolicyWorld, tmp_path: Path) -> None:
    """peft would pass over those beside one that is found; the head is none of the backbone's."""
    changes = {"adapter": {"method": "lora", "target_modules": ["q_proj", "v_porj", "lm_head"]}}
    with pytest.raises(DataError) as caught:
        align("ppo", world.inputs, tmp_path, changes)
    assert [str(problem) for problem in caught.value.problems] == [
        "params.adapter.target_modules: the model has no linear layer 'v_porj'. Did you mean 'v_proj'?",
        "params.adapter.target_modules: the model has no linear layer 'lm_head'. Known: "
        + ", ".join(sorted(LINEAR))
        + ".",
    ]


# Every method


@dataclass(frozen=True)
class Case:
    """A stage with an adapter, of a Llama or of GPT-2, which has biases."""

    stage: str
    adapter: dict[str, Any]
    family: str = "llama"


CASES = {
    "ia3": Case("ppo", {"method": "ia3"}),
    "saving": Case(
        "ppo",
        {
            "method": "lora",
            "rank": 2,
            "use_dora": True,
            "target_modules": r".*\.1\..*q_proj",
            "modules_to_save": ["lm_head"],
            "learning_rate_ratio": 4.0,
        },
    ),
    "lora, alone": Case("reinforce_plus_plus", {"method": "lora", "rank": 2, "publish": "adapter"}),
    "pairs": Case("online_dpo", {"method": "lora", "rank": 2}),
    "freeze": Case("ppo", {"method": "freeze", "last_layers": 1, "publish": "adapter"}),
    "only_new": Case("ppo", {"method": "freeze", "only_new": True}, "deepened"),
    "bitfit": Case("grpo", {"method": "bitfit"}, "gpt2"),
    "prompt": Case("grpo", {"method": "prompt_tuning", "num_virtual_tokens": 3}),
    "p_tuning": Case("rloo", {"method": "p_tuning", "num_virtual_tokens": 3, "encoder_size": 8}),
    "prefix": Case("ppo", {"method": "prefix_tuning", "num_virtual_tokens": 3, "projection": True}),
}


@pytest.fixture(scope="module")
def models(world: OnPolicyWorld, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "llama": world.model,
        "gpt2": write_model(folder / "gpt2", world.tokenizer, **GPT2_WITH_DROPOUT),
        "deepened": write_policy(folder / "deepened", world.tokenizer, added_layers=[1]),
    }


def ranks_of(model: Any) -> dict[str, int]:
    """Layer -> rank of its adapter, by the layer's path in the body."""
    return {
        name.removeprefix("base_model.model.").removeprefix("model."): layer.r["default"]
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


@pytest.mark.parametrize(
    "pattern", ["model.layers.0.self_attn.q_proj", r"model\.layers\.0\..*q_proj", "0.self_attn.q_proj"]
)
def test_the_critics_adapter_has_the_form_of_the_policys(pattern: str, world: OnPolicyWorld, tmp_path: Path) -> None:
    """Rank 2 in the first layer's q_proj and 4 elsewhere, whether the names begin at the model or at its body.

    Of a foreign adapter that is continued, what it leaves out as well.
    """
    base = load_language_model(world.model)
    context: Any = SimpleNamespace(seed=0, inputs={"adapter": tmp_path})
    fields = {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {pattern: 2}, "alpha_pattern": {pattern: 8}}
    expected = {f"layers.{n}.self_attn.{kind}_proj": 4 for n in range(2) for kind in "qv"} | {
        "layers.0.self_attn.q_proj": 2
    }
    block = LoraMethod.model_validate({"method": "lora", "rank": 4, **fields})
    assert ranks_of(critic_body(base, context, block)) == expected
    config = LoraConfig(r=4, exclude_modules=["model.layers.1.self_attn.v_proj"], task_type="CAUSAL_LM", **fields)
    foreign = get_peft_model(load_language_model(world.model), config)
    foreign.save_pretrained(tmp_path)
    del expected["layers.1.self_attn.v_proj"]
    assert ranks_of(foreign) == expected
    continued = ContinuedMethod.model_validate({"method": "continued"})
    assert ranks_of(critic_body(base, context, continued)) == expected


@pytest.mark.parametrize("name", CASES)
def test_every_method(name: str, world: OnPolicyWorld, models: dict[str, Path], tmp_path: Path) -> None:
    """Frozen weights stay bit for bit, what is trained moves, checkpoints hold nothing else; what is published, put on the
    base by plain peft and by ourselves, is the policy, and in value/ the critic."""
    case, base = CASES[name], models[CASES[name].family]
    seen = align(case.stage, {**world.inputs, "model": base}, tmp_path, {"adapter": case.adapter, **RATES})
    out, module = seen.context.out, seen.parts.module
    start = load_file(base / "model.safetensors")
    weights = {
        key.replace(".base_layer", "").replace(".original_module", ""): parameter
        for key, parameter in innermost(module.policy).named_parameters()
        if not parameter.requires_grad
    }
    assert weights.keys() & start.keys() and all(
        torch.equal(weights[key], start[key]) for key in weights.keys() & start
    )
    if case.adapter["method"] not in ("bitfit", "freeze"):
        assert start.keys() <= weights.keys()
    held = {id(parameter) for parameter in weights.values()}
    reference = [parameter for _, parameter in module.reference.named_parameters()]
    assert sum(id(parameter) in held for parameter in reference) > len(reference) / 4, "it shares what is frozen"
    for key, tensor in module.reference.state_dict().items():
        assert key not in start or torch.equal(tensor, start[key])

    (checkpoint,) = seen.context.work.glob("checkpoints/*/engine.pt")
    kept = torch.load(checkpoint, weights_only=True)["module"]
    trained = {key for key, parameter in module.named_parameters() if parameter.requires_grad}
    assert trained <= kept.keys() and kept.keys() - trained <= {key for key, _ in module.named_buffers()}

    alone = (out / "adapter_config.json").exists()
    assert alone is (case.adapter.get("publish") == "adapter" or "num_virtual_tokens" in case.adapter)
    home = out if alone else out / "adapter"
    policy = logits(module.policy, world)
    assert float((policy - logits(AutoModelForCausalLM.from_pretrained(base), world)).abs().max()) > 1e-3
    torch.testing.assert_close(logits(on_base(AutoModelForCausalLM, base, home), world), policy, rtol=0, atol=1e-5)
    opened = open_adapted(base, {"mine": out}, load_language_model).use("mine")
    torch.testing.assert_close(logits(opened, world), policy, rtol=0, atol=1e-5)
    if not alone:
        # Merging rounds; logits that a training has made large differ by as much more.
        torch.testing.assert_close(logits(load_language_model(out), world), policy, rtol=2e-5, atol=1e-5)

    assert (out / "value").exists() is (case.stage == "ppo")
    if case.stage == "ppo":
        body = on_base(AutoModel, base, out / "value").eval()
        head = load_file(out / "value" / "value_head.safetensors")["weight"]
        ids = torch.tensor([world.tokenizer.encode("What does this return?")])
        with torch.no_grad():
            values = body(ids).last_hidden_state @ head[0]
            called, read = read_in_place(module.value.base_model.eval(), ids, torch.ones_like(ids))
            expected = module.value.score(called(**read).last_hidden_state).squeeze(-1)
        assert torch.allclose(values, expected, atol=1e-5) and float(expected.abs().max()) > 1e-3
    if name == "freeze":
        write_cards(job_of("adapter"), {"model": base}, out, seen.result, {})
        found = {place: lines_of_card(out / place, base) for place in ("", "value")}
        torch.testing.assert_close(logits(found[""]["model"], world), policy, rtol=0, atol=1e-5)
        with torch.no_grad():
            again = found["value"]["body"].eval()(ids).last_hidden_state @ found["value"]["head"][0]
        assert torch.equal(again, values)


def on_base(auto_class: Any, base: Path, home: Path) -> Any:
    """The model with the adapter on it as users put it there: by peft, or for weights of the model itself without."""
    model = auto_class.from_pretrained(base)
    if "slipway_method" not in json.loads((home / "adapter_config.json").read_text()):
        virtual = PeftModel.from_pretrained(model, home)
        if count := getattr(virtual.active_peft_config, "num_virtual_tokens", 0):
            hide_virtual_tokens(virtual, count)
        return virtual
    left = model.load_state_dict(load_file(home / "adapter_model.safetensors"), strict=False)
    assert not left.unexpected_keys
    return model


@pytest.mark.parametrize("name", ["lora", "freeze"])
def test_an_adapter_is_trained_further(name: str, world: OnPolicyWorld, tmp_path: Path) -> None:
    """From where it was: that is the reference, unless a recipe names the bare model; a critic has one of its own."""
    block = {"lora": {"method": "lora", "rank": 2}, "freeze": {"method": "freeze", "last_layers": 1}}[name]
    rates = {**RATES, "learning_rate": 1e-3}
    adapter = {**block, "publish": "adapter"}
    first = align("grpo", world.inputs, tmp_path / "first", {"adapter": adapter, **rates})
    inputs = {**world.inputs, "adapter": first.context.out}
    changes = {"adapter": {"method": "continued"}, **rates}
    seen = align("ppo", inputs, tmp_path / "second", changes)
    assert seen.lines("rollout")[0]["kl"] == 0 and seen.lines("rollout")[1]["kl"] != 0
    files = [load_file(each.context.out / "adapter_model.safetensors") for each in (first, seen)]
    assert files[0].keys() == files[1].keys() and not all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    found = logits(on_base(AutoModelForCausalLM, world.model, seen.context.out), world)
    torch.testing.assert_close(found, logits(seen.parts.module.policy, world), rtol=0, atol=1e-5)
    began = logits(on_base(AutoModelForCausalLM, world.model, first.context.out), world)
    torch.testing.assert_close(logits(seen.parts.module.reference, world), began, rtol=0, atol=1e-5)
    named = align("grpo", {**inputs, "reference": world.model}, tmp_path / "third", {**changes, "rollouts": 1})
    assert named.lines("rollout")[0]["kl"] != 0
    bare = logits(AutoModelForCausalLM.from_pretrained(world.model), world)
    assert torch.equal(logits(named.parts.module.reference, world), bare)


def test_bottlenecks_are_not_trained_further_here(world: OnPolicyWorld, tmp_path: Path) -> None:
    """As fresh ones are not; `plan` says it where the adapter is there already."""
    block = BottleneckMethod(method="bottleneck", size=4)
    folder = tmp_path / "adapter"
    folder.mkdir()
    trained = trained_state(attach(AutoModelForCausalLM.from_pretrained(world.model), block, 0))
    save_file({name: weight.detach().contiguous() for name, weight in trained.items()}, folder / WEIGHTS)
    said = {OWN: "bottleneck", "base_model_name_or_path": str(world.model), "params": block.model_dump(mode="json")}
    (folder / CONFIG).write_text(json.dumps(said))
    changes = {"adapter": {"method": "continued"}}
    with pytest.raises(DataError, match=r"inputs\.adapter: is bottleneck, which puts networks between"):
        align("ppo", {**world.inputs, "adapter": folder}, tmp_path / "run", changes)
    params = STAGES["ppo"].params(**{**PARAMS, **changes})
    known = {"model": Estimate(), "prompts": Estimate(), "adapter": Estimate(folder=folder)}
    problems = STAGES["ppo"].check(Forecast(params, Resources(device="cpu"), known))
    assert any("is bottleneck, which puts networks between" in str(problem) for problem in problems)
