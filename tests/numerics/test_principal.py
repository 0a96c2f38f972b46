"""LoRAs that begin with singular values: as in the paper and in peft, on a base that stays what it was."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from stages.lib.models.adapters.attaching import attach, trained_state
from stages.lib.models.adapters.principal import as_plain_lora
from stages.lib.training.adapted import with_trained
from tests.numerics.test_adapter_counts import ARCHITECTURES, MIXTRAL, block_of

IDS = torch.arange(24).reshape(2, 12) % 100


def model_of(architecture: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(**{**architecture, "bos_token_id": 0, "eos_token_id": 1})
    return AutoModelForCausalLM.from_config(config).eval()


def descend(model: Any, steps: int = 3) -> list[float]:
    """The losses of a few plain steps on what is trained."""
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        losses.append(float(loss.detach()))
        with torch.no_grad():
            for parameter in trained_state(model).values():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
    return losses


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("more", [{}, {"use_rslora": True}, {"rank_pattern": {"c_attn": 2, "v_proj": 2}}], ids=str)
def test_it_trains_as_peft_trains_it(name: str, more: dict[str, Any]) -> None:
    """peft takes s B_0 A_0 off the frozen weights, and this beside them: the same matrices, losses and steps."""
    if "rank_pattern" in more:
        more = {"rank_pattern": {"c_attn" if name == "gpt2" else "v_proj": 2}}
    base = model_of(ARCHITECTURES[name])
    ours = attach(copy.deepcopy(base), block_of({"method": "lora", "rank": 4, "init": "pissa", **more}), seed=1)
    config = LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", init_lora_weights="pissa", **more)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
        theirs = get_peft_model(copy.deepcopy(base), config)
    assert torch.allclose(ours(IDS).logits, base(IDS).logits, rtol=0, atol=1e-6)
    assert descend(ours) == pytest.approx(descend(theirs), abs=1e-5)
    expected = trained_state(theirs)
    assert trained_state(ours).keys() == expected.keys()
    for key, parameter in trained_state(ours).items():
        assert torch.allclose(parameter, expected[key], rtol=0, atol=1e-5), key
    frozen = {n.replace(".base_layer", "").removeprefix("base_model.model."): p for n, p in ours.named_parameters()}
    assert all(torch.equal(frozen[key], weight) for key, weight in base.named_parameters() if key in frozen)


def test_the_first_matrices_are_the_largest_singular_values() -> None:
    """s B_0 A_0 is the best approximation of rank 3: what is left of the weight has the other singular values.

    Decomposed at random it comes within a hundredth of that, in the norm of what is left.
    """
    base = model_of(ARCHITECTURES["llama"])
    weight = base.model.layers[1].mlp.up_proj.weight
    values = torch.linalg.svdvals(weight)
    for iterations in (None, 20):
        fields = {"method": "lora", "rank": 3, "alpha": 6.0, "init": "pissa", "init_iterations": iterations}
        layer = attach(copy.deepcopy(base), block_of(fields), seed=1).base_model.model.model.layers[1].mlp.up_proj
        rest = torch.linalg.svdvals(weight - 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
        if iterations is None:
            assert torch.allclose(rest[: len(values) - 3], values[3:], rtol=0, atol=1e-5)
        else:
            assert values[3:].norm() - 1e-5 <= rest.norm() <= 1.01 * values[3:].norm()


@pytest.mark.parametrize(
    "more", [{}, {"use_rslora": True, "alpha_pattern": {"o_proj": 3.0}, "rank_pattern": {"q_proj": 1}}]
)
def test_what_is_published_is_a_lora_of_twice_the_rank_on_the_base(more: dict[str, Any]) -> None:
    """s (B A - B_0 A_0) = s' [B, -B_0] [A; A_0]: attached and merged the logits of the trained model."""
    base = model_of(ARCHITECTURES["llama"])
    block = block_of({"method": "lora", "rank": 4, "init": "pissa", **more})
    ours = attach(copy.deepcopy(base), block, seed=1)
    descend(ours)
    plain, weights = as_plain_lora(block, ours, {name: p.detach() for name, p in trained_state(ours).items()})
    published = with_trained(attach(copy.deepcopy(base), plain, seed=9), weights)
    said = ours(IDS).logits
    assert float((said - base(IDS).logits).detach().abs().max()) > 0.01, "it has learned something"
    assert torch.allclose(published(IDS).logits, said, rtol=0, atol=1e-5)
    assert torch.allclose(published.merge_and_unload()(IDS).logits, said, rtol=0, atol=1e-5)


def test_experts_learn_and_are_merged() -> None:
    base = model_of(MIXTRAL)
    experts = ["experts.gate_up_proj", "experts.down_proj"]
    fields = {"method": "lora", "rank": 2, "target_modules": ["q_proj"], "target_parameters": experts}
    ours = attach(copy.deepcopy(base), block_of(fields), seed=1)
    assert torch.allclose(ours(IDS).logits, base(IDS).logits, rtol=0, atol=1e-6)
    losses = descend(ours, 6)
    assert losses[-1] < losses[0]
    said = ours(IDS).logits
    merged = ours.merge_and_unload()
    assert torch.allclose(merged(IDS).logits, said, rtol=0, atol=1e-5)
    start, changed = dict(base.named_parameters()), dict(merged.named_parameters())
    moved = {key for key in start if not torch.equal(start[key], changed[key])}
    assert all("experts" in key or "q_proj" in key for key in moved)
    assert sum("experts" in key for key in moved) == 4
