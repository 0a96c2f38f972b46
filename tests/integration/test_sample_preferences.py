"""The stage sample_preferences on a tiny policy: what it draws, what that scores, and what it makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.errors import DataError
from pipeline.stage import Context
from stages.alignment.sample_preferences import HELDOUT_SEED, STAGE
from stages.lib.generating.sampling import Sampled, uniforms_for
from stages.lib.on_policy.candidates import CandidateWriter, Worth
from stages.lib.on_policy.ranking import REPEATED
from stages.lib.preferring.reward_models import load_reward_model, score_chats
from stages.lib.rows.canonical import read_rows
from stages.lib.text.chat_spans import encode_prompt
from stages.lib.text.prompts import PromptRow, prompt_of
from stages.lib.text.tokenizers import stop_token_ids
from stages.lib.training.scheduling import seed_of
from tests.distributed.training_world import make_tokenizer
from tests.integration.on_policy_world import OnPolicyWorld, make_on_policy_world, write_reward_model
from tests.integration.preference_world import run

pytestmark = pytest.mark.slow

SEED = 5
PENALTY = {"kind": "length_penalty", "target_tokens": 2, "per_token": 0.1, "weight": 0.5}
PARAMS: dict[str, Any] = {
    "rewards": [{"kind": "reward_model"}, PENALTY],
    "completions_per_prompt": 4,
    "max_prompt_tokens": 40,
    "max_new_tokens": 8,
    "max_prompts": 12,
    "max_heldout_prompts": 4,
    "temperature": 0.8,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> OnPolicyWorld:
    return make_on_policy_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def reward(world: OnPolicyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reward_model(tmp_path_factory.mktemp("judge") / "reward", world.tokenizer)


@pytest.fixture(scope="module")
def sampled(world: OnPolicyWorld, reward: Path, tmp_path_factory: pytest.TempPathFactory) -> Context:
    return run(STAGE, {**world.inputs, "reward": reward}, PARAMS, tmp_path_factory.mktemp("sampled"), seed=SEED)[1]


def drawn(context: Context) -> list[dict[str, Any]]:
    return list(read_rows(context.out / "completions.jsonl"))


@torch.no_grad()
def drawn_by_hand(
    model: Any, prompt: list[int], numbers: np.ndarray, stops: list[int], temperature: float
) -> list[int]:
    """The ids of a completion, one forward pass without a cache for each, by the inverse of the cumulative distribution."""
    ids: list[int] = []
    for number in numbers:
        logits_V = model(torch.tensor([prompt + ids])).logits[0, -1].double()
        cumulative_V = (logits_V / temperature).softmax(-1).cumsum(-1)
        ids.append(int((cumulative_V <= number * cumulative_V[-1]).sum()))
        if ids[-1] in stops:
            break
    return ids


def test_completions_are_a_function_of_seed_prompt_and_number(world: OnPolicyWorld, sampled: Context) -> None:
    """Each is drawn again by hand, alone. A number may lie so near a border that rounding decides: of 64 one at most."""
    model = AutoModelForCausalLM.from_pretrained(world.model, dtype=torch.float64).eval()
    stops, differing = stop_token_ids(world.tokenizer), 0
    rows = {split: list(read_rows(world.chats / f"{split}.jsonl")) for split in ("train", "heldout")}
    seeds = {"train": SEED, "heldout": seed_of(SEED, HELDOUT_SEED)}
    entries = drawn(sampled)
    assert [entry["split"] for entry in entries] == ["train"] * 12 + ["heldout"] * 4
    for entry in entries:
        prompt = encode_prompt(world.tokenizer, prompt_of(rows[entry["split"]][entry["row"]], "chat"))
        for number, each in enumerate(entry["completions"]):
            uniforms = uniforms_for(seed_of(seeds[entry["split"]], entry["row"]), number, 8)
            ids = drawn_by_hand(model, prompt, uniforms, stops, 0.8)
            text = world.tokenizer.decode(ids[:-1] if ids[-1] in stops else ids, clean_up_tokenization_spaces=False)
            differing += (text, len(ids), ids[-1] in stops) != (each["text"], each["tokens"], each["ended"])
    assert differing <= 1


def test_scores_are_those_of_the_reward_model_and_the_rewards_in_code(
    world: OnPolicyWorld, reward: Path, sampled: Context
) -> None:
    """score = score of the reward model - 0.5 x 0.1 x (tokens beyond 2), at most 0.5; margins are differences of scores."""
    model, tokenizer = load_reward_model(reward)
    rows = list(read_rows(world.chats / "train.jsonl"))
    for entry in drawn(sampled)[:4]:
        prompt = list(prompt_of(rows[entry["row"]], "chat"))
        chats = [[*prompt, {"role": "assistant", "content": each["text"]}] for each in entry["completions"]]
        for each, alone in zip(entry["completions"], score_chats(model, tokenizer, chats), strict=True):
            assert each["rewards"]["reward_model"] == pytest.approx(alone, abs=1e-5)
            assert each["score"] == pytest.approx(alone - 0.05 * max(0, each["tokens"] - 2), abs=1e-5)
    pairs = iter(read_rows(sampled.out / "train.jsonl"))
    for entry in drawn(sampled)[:12]:
        usable = [each for each in entry["completions"] if "unusable" not in each]
        if "dropped" not in entry:
            pair = next(pairs)
            scores = [each["score"] for each in usable]
            assert pair["margin"] == pytest.approx(max(scores) - min(scores))
            assert pair["chosen"][0]["content"] == entry["completions"][entry["chosen"]]["text"]
            assert pair["rejected"][0]["content"] == entry["completions"][entry["rejected"]]["text"]
    assert next(pairs, None) is None


def test_fewer_completions_are_the_first_of_more(world: OnPolicyWorld, sampled: Context, tmp_path: Path) -> None:
    """And other prompts, other batches and other rewards change none of them."""
    params = {**PARAMS, "rewards": [PENALTY], "completions_per_prompt": 2, "skip_prompts": 4, "write": "best"}
    other = run(STAGE, world.inputs, params, tmp_path, seed=SEED, resources={"generation_batch_size": 6})[1]
    expected = {(each["split"], each["row"]): each["completions"] for each in drawn(sampled)}
    both = [each for each in drawn(other) if (each["split"], each["row"]) in expected]
    assert len(both) == 8 + 4
    for each in both:
        texts = [one["text"] for one in expected[each["split"], each["row"]]]
        assert [one["text"] for one in each["completions"]] == texts[:2]
    ledger = json.loads((other.out / "ledger.json").read_bytes())
    assert ledger["read"] == ledger["kept"] + sum(each["count"] for each in ledger["dropped"].values())
    assert all(row["messages"][-1]["role"] == "assistant" for row in read_rows(other.out / "train.jsonl"))


def test_an_adapter_writes_as_the_merged_model_does(world: OnPolicyWorld, tmp_path: Path) -> None:
    """Up to rounding, which may decide where a number lies near a border: of 64 completions at most two."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_pretrained(world.model)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(base, config)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    world.tokenizer.save_pretrained(tmp_path / "merged")
    params = {**PARAMS, "rewards": [PENALTY], "write": "best"}
    inputs = {
        "plain": world.inputs,
        "adapter": {**world.inputs, "adapter": tmp_path / "adapter"},
        "merged": {**world.inputs, "model": tmp_path / "merged"},
    }
    texts = {}
    for name, given in inputs.items():
        context = run(STAGE, given, params, tmp_path / name, seed=SEED)[1]
        texts[name] = [one["text"] for each in drawn(context) for one in each["completions"]]
    assert sum(one != other for one, other in zip(texts["adapter"], texts["merged"], strict=True)) <= 2
    assert sum(one != other for one, other in zip(texts["adapter"], texts["plain"], strict=True)) > 16


def test_nothing_to_write_is_told_with_the_reasons(world: OnPolicyWorld, tmp_path: Path) -> None:
    """No penalty is above 0, so that no answer reaches a score of 1."""
    params = {**PARAMS, "rewards": [PENALTY]}
    with pytest.raises(DataError) as caught:
        run(STAGE, world.inputs, {**params, "min_score": 1.0}, tmp_path / "1", seed=SEED)
    said = str(caught.value)
    assert "none of the 12 train prompts gives a row" in said and "'below_min_score': " in said
    assert "completions of no use: {" in said and "lower min_margin, min_score" in said
    with pytest.raises(DataError) as caught:
        run(STAGE, world.inputs, {**params, "skip_prompts": 1000}, tmp_path / "2", seed=SEED)
    assert "params.skip_prompts: 1,000 leaves none of the 42 prompts" in str(caught.value)


def test_answers_that_are_the_same_tokens_are_the_same() -> None:
    """Under a template that drops whitespace around an answer; under one that keeps it they are two."""
    tokenizer = make_tokenizer()
    prompt = [{"role": "user", "content": "What?"}]
    row = PromptRow(0, tokenizer.encode("What?"), prompt, {})
    texts, worth = ["files", " files\n", "trees"], Worth((1.0,), 1.0, {})
    ids = [np.asarray([*tokenizer.encode(text), tokenizer.eos_token_id]) for text in texts]
    sampled = [Sampled(each, np.zeros(len(each)), True) for each in ids]
    for ending, expected in ((" | trim", ["", REPEATED, ""]), ("", ["", "", ""])):
        tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content']ENDING + eos_token }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}".replace("m['content']ENDING", f"(m['content']{ending})")  # fmt: skip
        unused: Any = None
        writer = CandidateWriter(unused, unused, tokenizer, [], unused, 3, 8, 1, 1.0, 1.0)
        assert [each.unusable for each in writer.judged(row, sampled, texts, [worth] * 3)] == expected
