"""AdaLoRA: its schedule, scores and masks as in peft's own loop, and what is published of it."""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from torch.nn.functional import cross_entropy

from stages.lib.models.adapters.attaching import attach, trained_state
from stages.lib.models.adapters.budget import RankBudget, as_pruned_lora
from stages.lib.models.adapters.budget_params import AdaLoraMethod
from stages.lib.training.adapted import with_trained
from stages.lib.training.engine import Engine
from stages.lib.training.optimizer import parameter_groups
from stages.lib.training.params import OptimizerParams
from tests.numerics.test_adapter_counts import ARCHITECTURES
from tests.numerics.test_principal import model_of

IDS = torch.arange(24).reshape(2, 12) % 100
STEPS, RATE, CLIP = 12, 2e-2, 0.5
EPSILON = 1e-4
"""Of Adam: so large that a gradient of almost zero has no step of its own, whose direction would be that of rounding."""


def block(**more: Any) -> AdaLoraMethod:
    fields = {"rank": 4, "target_rank": 2, "warmup_fraction": 0.17, "final_fraction": 0.34, "alpha": 8.0}
    return AdaLoraMethod.model_validate({"method": "adalora", **fields, **more})


def engine_of(base: Any, params: AdaLoraMethod) -> tuple[Engine, Any]:
    adapted = attach(copy.deepcopy(base), params, seed=1)
    optimizer = OptimizerParams(learning_rate=RATE, max_gradient_norm=CLIP, adam_epsilon=EPSILON)
    groups, _ = parameter_groups([(adapted, RATE)], 0.0)
    alone: Any = SimpleNamespace(world=SimpleNamespace(size=1, is_main=True))
    engine = Engine(alone, adapted, groups, optimizer, None, torch.device("cpu"))
    engine.companion = RankBudget(adapted, params, STEPS)
    return engine, adapted


def take_step(engine: Engine) -> float:
    """The objective's part of the loss of a step over two micro batches."""
    losses: list[torch.Tensor] = []

    def loss(row: int) -> torch.Tensor:
        logits = engine.forward(IDS[row : row + 1]).logits[:, :-1]
        losses.append(cross_entropy(logits.flatten(0, 1), IDS[row, 1:]) / 2)
        return losses[-1]

    for row in range(2):
        engine.backward(lambda row=row: loss(row), last=row == 1)
    engine.step([RATE] * len(engine.optimizer.param_groups))
    return float(torch.stack(losses).sum().detach())


def kept_of(adapted: Any) -> dict[str, list[bool]]:
    return {name: each.tolist() for name, each in adapted.named_buffers() if name.endswith(".kept")}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("every", [1, 3])
def test_it_prunes_as_peft_prunes(name: str, every: int) -> None:
    """peft's own model, loss, clipped gradients and `update_and_allocate`: after each step the same weights and masks."""
    base = model_of(ARCHITECTURES[name])
    engine, ours = engine_of(base, block(allocate_every_steps=every))
    config = AdaLoraConfig(
        init_r=4,
        target_r=2,
        lora_alpha=8,
        tinit=2,
        tfinal=4,
        total_step=STEPS,
        deltaT=every,
        target_modules="all-linear",
        task_type="CAUSAL_LM",  # of other models peft leaves the penalty out
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
        theirs = get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        expected = trained_state(theirs)
        assert trained_state(ours).keys() == expected.keys()
        for key, parameter in trained_state(ours).items():
            expected[key].copy_(parameter)
    optimizer = torch.optim.AdamW(expected.values(), lr=RATE, eps=EPSILON, weight_decay=0.0)
    ranks = []
    for step in range(1, STEPS + 1):
        take_step(engine)
        theirs(input_ids=IDS, labels=IDS).loss.backward()
        torch.nn.utils.clip_grad_norm_(expected.values(), CLIP)
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        masks = theirs.peft_config["default"].rank_pattern or {}
        kept = kept_of(ours)
        ranks.append(sum(map(sum, kept.values())))
        for key, mask in masks.items():
            assert kept[f"base_model.model.{key.partition('.lora_E')[0]}.kept"] == mask, (step, key)
        for key, parameter in trained_state(ours).items():
            assert torch.allclose(parameter, expected[key], rtol=0, atol=2e-5), (step, key)
    layers = len(kept)
    # Steps 1 and 2 keep all; with x = 1 - (step - 2) / 6 steps 3 to 8 keep int(2 L x^3 + 2 L) of 4 L, where pruned.
    falling = {step: int(2 * layers * (1 - (step - 2) / 6) ** 3 + 2 * layers) for step in range(3, 9)}
    budget, wanted = 4 * layers, []
    for step in range(1, STEPS + 1):
        if step in falling and (step % every == 0 or step == 8):
            budget = falling[step]
        wanted.append(budget)
    assert ranks == wanted and ranks[-1] == 2 * layers


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_it_learns_and_leaves_the_base_alone(name: str) -> None:
    base = model_of(ARCHITECTURES[name])
    engine, ours = engine_of(base, block())
    assert torch.equal(ours(IDS).logits, base(IDS).logits)
    losses = [take_step(engine) for _ in range(STEPS)]
    assert losses[-1] < losses[0] - 0.1
    frozen = {n.replace(".base_layer", "").removeprefix("base_model.model."): p for n, p in ours.named_parameters()}
    assert all(torch.equal(frozen[key], weight) for key, weight in base.named_parameters())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("steps", [4, STEPS])
def test_what_is_published_is_a_lora_of_the_ranks_that_are_left(name: str, steps: int) -> None:
    """The same logits attached and merged, and as many rows of A as triplets are not zero."""
    base = model_of(ARCHITECTURES[name])
    engine, ours = engine_of(base, block())
    for _ in range(steps):
        take_step(engine)
    whole = {name: parameter.detach() for name, parameter in trained_state(ours).items()}
    plain, weights = as_pruned_lora(block(), ours, whole)
    again = with_trained(attach(copy.deepcopy(base), plain, seed=1), weights)
    logits = ours.eval()(IDS).logits
    assert not torch.allclose(base(IDS).logits, logits, rtol=0, atol=1e-3)
    assert torch.allclose(again(IDS).logits, logits, rtol=0, atol=1e-5)
    left = sum(int((tensor != 0).sum()) for key, tensor in whole.items() if ".lora_E." in key)
    empty = sum(not tensor.any() for key, tensor in whole.items() if ".lora_E." in key)
    assert sum(len(tensor) for key, tensor in weights.items() if ".lora_A." in key) == left + empty
    merged = again.merge_and_unload()
    assert torch.allclose(merged(IDS).logits, logits, rtol=0, atol=1e-5)


def test_a_layer_of_which_nothing_is_left() -> None:
    """One row of A that can learn on, beside a B of zeros: the layer says what the base says."""
    base = model_of(ARCHITECTURES["llama"])
    params = block(target_modules=["q_proj"])
    ours = attach(copy.deepcopy(base), params, seed=1)
    whole = {name: parameter.detach() for name, parameter in trained_state(ours).items()}
    plain, weights = as_pruned_lora(params, ours, whole)
    assert plain.rank_pattern == {f"model.layers.{layer}.self_attn.q_proj": 1 for layer in range(3)}
    a, b = (weights[f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.default.weight"] for part in "AB")
    assert a.shape == (1, 32) and bool(a.any()) and not bool(b.any())
    again = with_trained(attach(copy.deepcopy(base), plain, seed=1), weights)
    assert torch.equal(again(IDS).logits, base(IDS).logits)


@torch.no_grad()
def test_the_penalty_is_that_of_peft() -> None:
    """peft adds it to the loss of its own model, with its weight."""
    base = model_of(ARCHITECTURES["llama"])
    ours = attach(copy.deepcopy(base), block(), seed=1)
    plain = float(ours(input_ids=IDS, labels=IDS).loss)
    penalty = float(RankBudget(ours, block(orthogonal_weight=0.3), STEPS).penalty())
    ours.peft_config["default"].orth_reg_weight = 0.3
    assert float(ours(input_ids=IDS, labels=IDS).loss) == pytest.approx(plain + penalty, abs=1e-6)
    assert penalty > 0.1
