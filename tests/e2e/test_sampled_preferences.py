"""A round of iterated DPO through the command itself: a policy from elsewhere answers, is ranked, and learns from that."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stages.lib.preferring.reference import model_identity
from stages.lib.rows.canonical import read_rows
from tests.distributed.training_world import docstrings, make_tokenizer
from tests.e2e.driving import manifest_of, slipway
from tests.integration.on_policy_world import write_policy

pytestmark = pytest.mark.slow

RECIPE = """
name: sampled
seed: 7
outputs: [aligned]
resources: {device: cpu, threads: 1, micro_batch_size: 4, generation_batch_size: 16}
stages:
  rows:
    kind: clean
    params: {format: chats, source: {kind: files, paths: [chats.jsonl], layout: messages}}
  chats: {kind: mix, inputs: {sources: {docs: rows}}, params: {heldout_fraction: 0.3}}
  sampled:
    kind: sample_preferences
    inputs: {model: ./policy, prompts: chats}
    resources: {launcher: torchrun, processes: 2}
    params: &sampling
      rewards: [{kind: length_penalty, target_tokens: 1, per_token: 0.1}]
      completions_per_prompt: 4
      max_prompt_tokens: 40
      max_new_tokens: 8
  logprobs:
    kind: reference_logprobs
    inputs: {model: ./policy, preferences: sampled}
    params: {max_length_tokens: 64}
  aligned:
    kind: dpo
    inputs: {model: ./policy, preferences: sampled, reference_logprobs: logprobs}
    params: &training {global_batch_size: 4, max_steps: 2, learning_rate: 1e-3, max_length_tokens: 64}
"""


def test_a_round_from_prompts_to_policy(tmp_path: Path) -> None:
    """Every row says whose answers it holds; run again, nothing is done."""
    write_policy(tmp_path / "policy", make_tokenizer())
    questions = [name for name, _ in docstrings() if len(name) < 24][:40]
    chats = [[{"role": "user", "content": f"{name}?"}, {"role": "assistant", "content": "Yes."}] for name in questions]
    lines = [json.dumps({"messages": chat}) + "\n" for chat in chats]
    (tmp_path / "chats.jsonl").write_text("".join(lines))
    recipe = tmp_path / "sampled.yaml"
    recipe.write_text(RECIPE)
    store = tmp_path / "store"
    done = slipway("run", recipe, "--store", store, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr

    sampled, aligned = manifest_of(store, "sampled"), manifest_of(store, "aligned")
    folder = store / "artifacts" / sampled.artifact_id
    rows = [row for split in ("train", "heldout") for row in read_rows(folder / f"{split}.jsonl")]
    assert sampled.metrics["rows_read"] == len(rows) + sum((sampled.facts.dropped_rows or {}).values())
    assert all(row["margin"] > 0 for row in rows)
    assert {row["sampled"]["policy"] for row in rows} == {model_identity(tmp_path / "policy")}
    assert aligned.metrics["rows_kept"] == len(rows)
    assert aligned.input_ids["reference_logprobs"] == manifest_of(store, "logprobs").artifact_id

    again = slipway("run", recipe, "--store", store)
    assert again.returncode == 0 and "  run  " not in again.stdout, again.stdout
