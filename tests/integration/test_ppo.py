"""The ppo stage on a tiny policy: what it writes and learns from, what it logs and publishes, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from stages import STAGES
from stages.lib.on_policy.experience import Episode
from stages.lib.preferring.reward_models import load_reward_model, score_chats
from stages.lib.rows.canonical import read_rows
from stages.lib.text.chat_spans import encode_prompt
from stages.lib.text.tokenizers import tokenizer_digest
from stages.lib.training.params import learning_rate_factor
from stages.lib.training.scheduling import ScheduledData
from tests.integration.on_policy_world import (
    END,
    PARAMS,
    REWARDS,
    OnPolicyWorld,
    Seen,
    align,
    make_on_policy_world,
    make_other_tokenizer,
    write_reward_model,
)

pytestmark = pytest.mark.slow

LEARNED = {"kind": "reward_model"}
TEMPERATURE = 0.8


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> OnPolicyWorld:
    return make_on_policy_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With another tokenizer and another template than the policy's, and room for longer texts."""
    folder = tmp_path_factory.mktemp("reward") / "reward"
    return write_reward_model(folder, make_other_tokenizer(), max_position_embeddings=512)


@pytest.fixture(scope="module")
def trained(world: OnPolicyWorld, reward_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """Two rollouts of 16 completions in 4 passes of 2 steps, rewarded by a form, by their length and by the reward model."""
    changes = {
        "rewards": [*REWARDS, {**LEARNED, "weight": 0.5}],
        "temperature": TEMPERATURE,
        "missing_end_penalty": 0.25,
    }
    return align("ppo", {**world.inputs, "reward": reward_model}, tmp_path_factory.mktemp("ppo"), changes)


def episodes(seen: Seen, rollout: int = 0) -> list[Episode]:
    return list(seen.experiences[rollout].episodes)


def told(folder: Path, ids: list[int], prompt_length: int, temperature: float = 1.0) -> list[float]:
    """log softmax(logits / temperature)[token] of each token behind the prompt, for one sequence alone, in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():
        logp = (model(torch.tensor([ids])).logits[0] / temperature).log_softmax(-1)
    return [float(logp[place - 1, ids[place]]) for place in range(prompt_length, len(ids))]


# What it learns from


def test_prompts_are_those_of_the_schedule(trained: Seen, world: OnPolicyWorld) -> None:
    """Each prompt is its row up to the assistant's last turn; those of more than 40 tokens are left out, and none is cut."""
    rows = list(read_rows(world.chats / "train.jsonl"))
    asked = [row["messages"][:-1] for row in rows]
    ids = [encode_prompt(world.tokenizer, messages) for messages in asked]
    usable = [index for index, each in enumerate(ids) if len(each) <= 40]
    assert 0 < len(ids) - len(usable) < 10
    schedule = ScheduledData([{} for _ in usable], 0, 32)
    for position, episode in enumerate([*episodes(trained), *episodes(trained, 1)]):
        assert episode.position == position
        assert episode.row_index == usable[schedule.index(position)]
        assert episode.prompt_ids.tolist() == ids[episode.row_index]


def test_dropped_prompts_are_counted(trained: Seen, world: OnPolicyWorld) -> None:
    dropped, read = 0, 0
    for split in ("train", "heldout"):
        for row in read_rows(world.chats / f"{split}.jsonl"):
            read += 1
            dropped += len(encode_prompt(world.tokenizer, row["messages"][:-1])) > 40
    ledger = json.loads((trained.context.out / "ledger.json").read_text())
    assert ledger["read"] == read and ledger["kept"] == read - dropped
    assert ledger["dropped"]["prompt_too_long"]["count"] == dropped > 0
    assert trained.result.facts.dropped_rows == {"prompt_too_long": dropped}
    assert trained.result.metrics["dropped_prompt_too_long"] == dropped
    assert f"{dropped} prompt_too_long" in trained.lines("note")[0]["text"]


def test_completions_end_with_a_stop_token_or_at_the_limit(trained: Seen, world: OnPolicyWorld) -> None:
    stops = {world.tokenizer.eos_token_id, world.tokenizer.convert_tokens_to_ids(END)}
    found = episodes(trained)
    assert {each.ended for each in found} == {True, False}
    for each in found:
        assert len(each.ids) == 8 if not each.ended else 1 <= len(each.ids) <= 8
        assert (each.ids[-1] in stops) == each.ended
        assert not stops & set(each.ids[:-1].tolist())


def test_log_probabilities_are_those_of_policy_and_reference(trained: Seen, world: OnPolicyWorld) -> None:
    """One sequence at a time, without padding: the first rollout was written by the input, which the reference is always."""
    for each in episodes(trained)[:4]:
        ids = [*each.prompt_ids.tolist(), *each.ids.tolist()]
        expected = pytest.approx(told(world.model, ids, len(each.prompt_ids), TEMPERATURE), abs=1e-5)
        assert each.logprobs.tolist() == expected
        assert each.generator_logprobs.tolist() == expected
        assert each.ref_logprobs.tolist() == expected
    for each in episodes(trained, 1)[:4]:
        ids = [*each.prompt_ids.tolist(), *each.ids.tolist()]
        assert each.ref_logprobs.tolist() == pytest.approx(
            told(world.model, ids, len(each.prompt_ids), TEMPERATURE), abs=1e-5
        )
        assert np.abs(each.ref_logprobs - each.logprobs).max() > 1e-3, "the policy has moved"


def test_the_critic_begins_with_zero_and_learns(trained: Seen) -> None:
    assert all(not each.values.any() for each in episodes(trained))
    assert all(np.abs(each.values).min() > 0 for each in episodes(trained, 1))


def text_of(episode: Episode, world: OnPolicyWorld) -> str:
    ids = episode.ids[:-1] if episode.ended else episode.ids
    return str(world.tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def test_rewards_are_those_of_the_text(trained: Seen, world: OnPolicyWorld, reward_model: Path) -> None:
    """Form: the letter e, and the end, half of 1 for each. Length: -0.1 for each token from the third on.

    The reward model, whose tokenizer cannot read the policy's tokens, is given the conversation, as `score_chats` is.
    """
    model, tokenizer = load_reward_model(reward_model)
    assert tokenizer_digest(tokenizer) != tokenizer_digest(world.tokenizer)
    rows = list(read_rows(world.chats / "train.jsonl"))
    spread = []
    for each in episodes(trained):
        text = text_of(each, world)
        chat = [*rows[each.row_index]["messages"][:-1], {"role": "assistant", "content": text}]
        (score,) = score_chats(model, tokenizer, [chat])
        expected = [("e" in text) / 2 + each.ended / 2, -0.1 * max(0, len(each.ids) - 2), score]
        assert each.rewards.tolist() == pytest.approx(expected, abs=1e-5)
        spread.append(score)
    assert np.std(spread) > 0.01


# What it logs


def test_the_line_of_a_rollout_by_hand(trained: Seen) -> None:
    """reward = sum of weight x value - 0.25 for a completion that was cut off; advantages were whitened: mean 0, deviation 1."""
    line = trained.lines("rollout")[1]
    found = episodes(trained, 1)
    rewards = np.stack([each.rewards for each in found])
    scores = rewards @ [1.0, 1.0, 0.5] - 0.25 * np.array([not each.ended for each in found])
    tokens = sum(len(each.ids) for each in found)
    differences = [each.logprobs.astype(np.float64) - each.ref_logprobs for each in found]
    returns = np.concatenate([each.returns for each in found]).astype(np.float64)
    values = np.concatenate([each.values for each in found]).astype(np.float64)
    advantages = np.concatenate([each.advantages for each in found]).astype(np.float64)
    expected = {
        "rollout": 2,
        "total_rollouts": 2,
        "step": 16,
        "total_steps": 16,
        "reward": scores.mean(),
        "reward_trained_on": scores.mean(),
        "reward_deviation": scores.std(),
        "reward_format": rewards[:, 0].mean(),
        "reward_length_penalty": rewards[:, 1].mean(),
        "reward_reward_model": rewards[:, 2].mean(),
        "kl": np.mean([each.sum() for each in differences]),
        "kl_per_token": sum(each.sum() for each in differences) / tokens,
        "kl_coefficient": 0.05,
        "length_tokens": tokens / 16,
        "ended": np.mean([each.ended for each in found]),
        "advantage_mean": 0.0,
        "advantage_deviation": 1.0,
        "explained_variance": 1 - (returns - values).var() / returns.var(),
        "value_mean": values.mean(),
        "return_mean": returns.mean(),
        "return_deviation": returns.std(),
        "optimizer_steps": 8,
        "passes_ended_early": 0,
    }
    assert {name: line[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert advantages.std() == pytest.approx(1.0, rel=1e-4)


def test_a_rollouts_line_holds_the_means_of_its_steps(trained: Seen) -> None:
    steps = trained.lines("step")
    assert [line["step"] for line in steps] == list(range(1, 17))
    for rollout, line in enumerate(trained.lines("rollout")):
        mine = steps[8 * rollout : 8 * rollout + 8]
        for name in "loss policy_loss value_loss value_clipped entropy clipped policy_kl ratio ratio_deviation gradient_norm".split():
            assert line[name] == pytest.approx(np.mean([step[name] for step in mine]), rel=1e-9), name
        assert mine[0]["ratio"] == pytest.approx(1, abs=1e-5) and mine[0]["policy_kl"] < 1e-9
        assert all(abs(step["ratio"] - 1) > 1e-5 and step["policy_kl"] > 1e-6 for step in mine[1:])
        assert 0 < line["entropy"] < math.log(len(trained.parts.tokenizer))


def test_learning_rates_and_speeds_are_logged(trained: Seen) -> None:
    """Generation and updates are timed apart: 4 passes over the tokens of a rollout against one."""
    rates = [line["learning_rate"] for line in trained.lines("step")]
    params = STAGES["ppo"].params(**PARAMS)
    assert rates == pytest.approx([3e-3 * learning_rate_factor(params, step, 16) for step in range(16)], rel=1e-12)
    for rollout, line in enumerate(trained.lines("rollout")):
        assert line["learning_rate"] == rates[8 * rollout + 7]
        tokens = sum(len(each.ids) for each in episodes(trained, rollout))
        for phase, passes in (("rollout", 1), ("update", 4)):
            seconds = line[f"{phase}_seconds"]
            assert line[f"{phase}_tokens_per_second"] == pytest.approx(passes * tokens / seconds, rel=0.05)


def test_samples_can_be_read(trained: Seen, world: OnPolicyWorld) -> None:
    samples = trained.lines("rollout")[0]["samples"]
    assert len(samples) == 2
    for sample, each in zip(samples, episodes(trained)[:2], strict=True):
        assert sample["prompt"] == world.tokenizer.decode(each.prompt_ids.tolist())
        assert sample["completion"] == text_of(each, world)
        assert sample["ended"] == each.ended
        assert sample["reward"] == round(float(each.rewards @ [1.0, 1.0, 0.5]), 4)


def test_metrics_are_those_of_the_last_measurement(trained: Seen) -> None:
    """At the beginning the policy is its own reference."""
    before, after = trained.lines("heldout")
    assert (before["step"], after["step"]) == (0, 16)
    metrics = trained.result.metrics
    assert metrics["heldout_kl_base"] == 0 != metrics["heldout_kl"]
    for name, value in after.items():
        if name.startswith("heldout_"):
            assert metrics[name] == value
            assert metrics[f"{name}_base"] == before[name]
    assert metrics["train_reward"] == trained.lines("rollout")[1]["reward"]


# What it publishes


def test_the_published_policy_is_the_trained_one(trained: Seen, world: OnPolicyWorld) -> None:
    model, report = AutoModelForCausalLM.from_pretrained(trained.context.out, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    state = trained.parts.module.policy.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    start = load_file(world.model / "model.safetensors")
    assert all(not torch.equal(tensor, state[name]) for name, tensor in start.items()), "all of it was trained"
    stops = [world.tokenizer.eos_token_id, world.tokenizer.convert_tokens_to_ids(END)]
    assert model.generation_config.eos_token_id == stops == trained.result.facts.stop_token_ids
    assert model.generation_config.pad_token_id == world.tokenizer.pad_token_id
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (trained.context.out / name).read_bytes() == (world.model / name).read_bytes()
    facts = trained.result.facts
    assert facts.tokenizer_digest == tokenizer_digest(world.tokenizer)
    assert (facts.head_type, facts.max_length_tokens, facts.optimizer_steps) == ("causal_lm", 48, 16)


def test_the_manifest_counts_the_parameters_of_the_policy_alone(trained: Seen) -> None:
    """As `plan` does for what is made of it: those of its model.safetensors, not those of the critic too."""
    weights = load_file(trained.context.out / "model.safetensors")
    assert trained.result.facts.parameters == sum(tensor.numel() for tensor in weights.values())


def values_by_hand(folder: Path, episode: Episode) -> list[float]:
    """w . h of the token before each token of the completion, for the sequence alone, in float64."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64).eval()
    ids = torch.tensor([[*episode.prompt_ids.tolist(), *episode.ids.tolist()]])
    with torch.no_grad():
        hidden_TH = model.model(ids).last_hidden_state[0]
        found = hidden_TH @ model.score.weight[0]
    return [float(each) for each in found[len(episode.prompt_ids) - 1 : -1]]


def test_another_run_goes_on_from_the_published_critic(trained: Seen, world: OnPolicyWorld, tmp_path: Path) -> None:
    value = trained.context.out / "value"
    state = trained.parts.module.value.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in load_file(value / "model.safetensors").items())
    again = align("ppo", {**world.inputs, "value": value}, tmp_path, {"rollouts": 1, "epochs_per_rollout": 1})
    for each in episodes(again)[:4]:
        assert each.values.tolist() == pytest.approx(values_by_hand(value, each), abs=1e-5)
        assert np.abs(each.values).max() > 0.01


def test_the_critic_starts_from_a_reward_model_that_reads_the_same_tokens(world: OnPolicyWorld, tmp_path: Path) -> None:
    """Its body, and a head of zeros; from one with other tokens it does not, but from the policy."""
    reward = write_reward_model(tmp_path / "reward", world.tokenizer, hidden_size=16)
    seen = align("ppo", {**world.inputs, "reward": reward}, tmp_path / "run", {"rollouts": 1, "publish_critic": False})
    assert not (seen.context.out / "value").exists()
    body = load_file(reward / "model.safetensors")
    start = load_file(seen.context.work / "initial" / "model.safetensors")
    assert not start.pop("score.weight").any() and body.pop("score.weight").any()
    assert start.keys() == body.keys() and all(torch.equal(tensor, body[name]) for name, tensor in start.items())
    assert "the critic starts from the reward model" in json.dumps(seen.lines("note"))
    assert all(not each.values.any() for each in episodes(seen))


def test_the_critic_starts_from_the_policy_otherwise(trained: Seen, world: OnPolicyWorld) -> None:
    start = load_file(trained.context.work / "initial" / "model.safetensors")
    policy = load_file(world.model / "model.safetensors")
    assert not start.pop("score.weight").any()
    assert all(torch.equal(tensor, policy[name]) for name, tensor in start.items())
    assert "the critic starts from the policy" in json.dumps(trained.lines("note"))


# Where there is nothing to learn


@pytest.mark.slow
@pytest.mark.parametrize(("pattern", "reward"), [("zzzzqqqq", 0.0), (".*", 1.0)])
def test_equal_rewards_leave_the_policy_where_it_is(
    world: OnPolicyWorld, tmp_path: Path, pattern: str, reward: float
) -> None:
    """No completion is better than another, and the policy is its reference: no gradient. What it began with is published.

    The critic learns the reward if there is one, and its head stays as it began, all zero, if there is none.
    """
    changes = {
        "rewards": [{"kind": "regular_expression", "pattern": pattern}],
        "rollouts": 2,
        "epochs_per_rollout": 1,
        "learning_rate": 1e-2,
        "missing_end_penalty": 0.0,
    }
    seen = align("ppo", world.inputs, tmp_path, changes)
    assert [line["reward"] for line in seen.lines("rollout")] == [reward, reward]
    assert [line["kl"] for line in seen.lines("rollout")] == [0.0, 0.0]
    before, after = (load_file(folder / "model.safetensors") for folder in (world.model, seen.context.out))
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    head = load_file(seen.context.out / "value" / "model.safetensors")["score.weight"]
    assert bool(head.any()) == bool(reward)
