"""Generation by vLLM: what can be said without it, and on a GPU with it that its completions are the policy's own."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.errors import LaunchError
from stages.lib.generating.vllm import VllmGenerator, require_vllm, sampled_of

needs_vllm = pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("vllm") is None, reason="needs a GPU and vLLM"
)


def output(ids: list[int], logprobs: list[float]) -> SimpleNamespace:
    """A completion as vLLM gives it: per token a mapping of the candidates that it tells of."""
    chosen = [
        {token: SimpleNamespace(logprob=value), 999: SimpleNamespace(logprob=-9.0)}
        for token, value in zip(ids, logprobs, strict=True)
    ]
    return SimpleNamespace(token_ids=ids, logprobs=chosen)


def test_a_completion_keeps_its_stop_token_and_the_log_probabilities_of_its_own_tokens() -> None:
    sampled = sampled_of(output([5, 6, 2], [-1.0, -0.5, -0.25]), stop_ids=[1, 2])
    assert sampled.ids.tolist() == [5, 6, 2]
    assert np.allclose(sampled.logprobs, [-1.0, -0.5, -0.25])
    assert sampled.ended
    assert not sampled_of(output([5, 6], [-1.0, -0.5]), stop_ids=[1, 2]).ended


MERGED: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "rank": 2},
    "dora": {"method": "lora", "rank": 2, "use_dora": True},
    "saving": {"method": "lora", "rank": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "ia3": {"method": "ia3"},
    "freeze": {"method": "freeze", "last_layers": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MERGED)
def test_it_is_given_merged_weights_and_the_shared_ones_stay_as_they_are(name: str, tmp_path: Path) -> None:
    """The base is that of the reference and the critic, which must not gather rounding, rollout by rollout."""
    from pydantic import TypeAdapter
    from transformers import AutoModelForCausalLM

    from stages.lib.models.adapters.attaching import attach
    from stages.lib.models.adapters.params import AdapterParams
    from tests.distributed.training_world import make_tokenizer, write_model

    base = AutoModelForCausalLM.from_pretrained(write_model(tmp_path / "model", make_tokenizer())).to(torch.bfloat16)
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    policy = attach(base, TypeAdapter(AdapterParams).validate_python(MERGED[name]), 3)
    torch.manual_seed(0)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) / 8)
    adapted = {name: parameter.clone() for name, parameter in policy.named_parameters()}
    engine = SimpleNamespace(whole=lambda parameters: contextlib.nullcontext())
    given = {name: weight.clone() for name, weight in VllmGenerator(engine, policy, None).weights()}
    assert all(torch.equal(parameter, adapted[name]) for name, parameter in policy.named_parameters())
    assert given.keys() == before.keys()
    merged = dict((policy.merge_and_unload() if hasattr(policy, "peft_config") else policy).named_parameters())
    assert all(torch.equal(weight, merged[name]) for name, weight in given.items())
    changed = {name for name in given if not torch.equal(given[name], before[name])}
    endings = {"saving": ("q_proj.weight", "lm_head.weight"), "freeze": ("layers.1.mlp.gate_proj.weight",)}
    assert all(any(name.endswith(ending) for name in changed) for ending in endings.get(name, ("v_proj.weight",)))


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_where_it_is_missing_the_stage_says_so_before_anything_is_loaded() -> None:
    with pytest.raises(LaunchError, match="vllm, which is not installed"):
        require_vllm("cuda")


@pytest.mark.gpu
@pytest.mark.slow
@needs_vllm
def test_its_log_probabilities_are_the_trainers(tmp_path: Path) -> None:
    """In bf16 the two engines' arithmetic differs by about a hundredth of a nat; other weights would by whole nats."""
    from stages.alignment.grpo import STAGE
    from tests.distributed.training_world import make_tokenizer, write_chats, write_model
    from tests.integration.preference_world import run

    # vLLM's kernels want heads of at least 32.
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
    inputs = {
        "model": write_model(tmp_path / "model", make_tokenizer(), **sizes),
        "prompts": write_chats(tmp_path / "chats"),
    }
    params = {
        "rewards": [{"kind": "format", "parts": ["e"], "partial_credit": True}],
        "rollouts": 3,
        "rollout_batch_size": 16,
        "global_batch_size": 8,
        "max_prompt_tokens": 64,
        "max_new_tokens": 16,
        "learning_rate": 1e-3,
        "generation": "vllm",
        "mismatch_cap": 2.0,
        "precision": "bf16",
    }
    _, context = run(STAGE, inputs, params, tmp_path / "run", resources={"device": "cuda"})
    lines = [json.loads(line) for line in (context.work / "journal.jsonl").read_text().splitlines()]
    gaps = [line["generator_logprob_gap"] for line in lines if line["event"] == "rollout"]
    assert len(gaps) == 3
    assert max(gaps) < 0.05
