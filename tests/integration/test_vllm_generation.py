"""Generation by vLLM: what can be said without it, and on a GPU with it that its completions are the policy's own."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.errors import LaunchError
from stages.lib.generating.vllm import require_vllm, sampled_of

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
