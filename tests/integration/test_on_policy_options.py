"""What the options of on-policy stages do: mixed chats, limits to a rollout's passes, raw prompts, a mismatch with the generator."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.errors import DataError
from stages import STAGES
from stages.lib.generating.sampling import Sampled
from stages.lib.generating.transformers import TransformersSampler
from stages.lib.on_policy.learning import Learner
from stages.lib.rows.canonical import read_rows
from stages.lib.text.chat_spans import EncodedChat, encode_chat
from stages.lib.training.params import learning_rate_factor
from stages.lib.training.scheduling import ScheduledData, seed_of
from tests.distributed.training_world import docstrings
from tests.integration.on_policy_world import (
    PARAMS,
    OnPolicyWorld,
    align,
    make_on_policy_world,
    write_policy,
    write_prompts,
)

pytestmark = pytest.mark.slow

NOTHING = {"kind": "length_penalty", "target_tokens": 100, "per_token": 1.0}
"""0 for every completion."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> OnPolicyWorld:
    return make_on_policy_world(tmp_path_factory.mktemp("world"))


# Chats mixed in


def cross_entropy(folder: Path, chats: Sequence[EncodedChat]) -> float:
    """The mean of -log p over all tokens that the assistant says in the chats, one chat at a time, in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    nats: list[float] = []
    for ids, said in chats:
        with torch.no_grad():
            logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        nats += [-float(logp[place - 1, ids[place]]) for place in range(1, len(ids)) if said[place]]
    return float(np.mean(nats))


def test_chats_are_learned_though_nothing_is_rewarded(world: OnPolicyWorld, tmp_path: Path) -> None:
    """With rewards of 0 and no penalty only the chats give a gradient. Their loss at the first step is that of the input.

    Step s mixes in the chats at positions 6 s to 6 s + 5 of a schedule of its own; 16 steps go nearly twice through the 50.
    """
    changes = {
        "rewards": [NOTHING],
        "kl_coefficient": 0,
        "completions_per_prompt": 2,
        "rollouts": 8,
        "ptx_coefficient": 1.0,
        "ptx_batch_size": 6,
        "ptx_max_length_tokens": 128,
    }
    seen = align("rloo", {**world.inputs, "chats": world.chats}, tmp_path, changes, resources={"micro_batch_size": 2})
    rows = list(read_rows(world.chats / "train.jsonl"))
    schedule = ScheduledData([{} for _ in rows], seed_of(0, 2), 96)
    first = [encode_chat(world.tokenizer, rows[schedule.index(position)]["messages"]) for position in range(6)]
    steps = seen.lines("step")
    losses = [line["ptx_loss"] for line in steps]
    assert losses[0] == pytest.approx(cross_entropy(world.model, first), rel=1e-5)
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.3
    assert seen.lines("rollout")[0]["ptx_loss"] == pytest.approx(np.mean(losses[:2]), rel=1e-9)
    assert all(line["policy_loss"] == 0 and line["gradient_norm"] > 0 for line in steps)


# Limits


def test_passes_end_early_and_the_schedule_goes_on(world: OnPolicyWorld, tmp_path: Path) -> None:
    """The first step of a rollout finds the policy where it wrote, KL 0; the second finds it moved, and is the last.

    Of the 8 steps planned for each rollout two are done; the next rollout's learning rate is that of step 9, as planned.
    """
    changes = {"rollouts": 3, "max_policy_kl": 1e-6, "learning_rate": 1e-3}
    seen = align("ppo", world.inputs, tmp_path, changes)
    steps = seen.lines("step")
    assert [line["step"] for line in steps] == [1, 2, 9, 10, 17, 18]
    params = STAGES["ppo"].params(**{**PARAMS, **changes})
    assert [line["learning_rate"] for line in steps] == pytest.approx(
        [1e-3 * learning_rate_factor(params, line["step"] - 1, 24) for line in steps], rel=1e-12
    )
    for number, line in enumerate(seen.lines("rollout")):
        assert (line["optimizer_steps"], line["passes_ended_early"], line["step"]) == (2, 1, 8 * (number + 1))
        first, second = steps[2 * number : 2 * number + 2]
        assert first["policy_kl"] <= 1e-6 < second["policy_kl"]
        assert line["learning_rate"] == second["learning_rate"], "that of the last step that was done"
    assert seen.context.checkpoints.newest().step == 24


def off_by(nats: float) -> Any:
    """The sampler, with log-probabilities that are wrong by so much."""
    sample = TransformersSampler.sample

    def wrong(*arguments: Any, **options: Any) -> list[Sampled]:
        return [
            Sampled(each.ids, each.logprobs + np.float32(nats), each.ended) for each in sample(*arguments, **options)
        ]

    return wrong


def test_a_generator_with_other_probabilities_stops_the_run(
    world: OnPolicyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    align("grpo", world.inputs, tmp_path / "same", {"rollouts": 1, "max_logprob_mismatch": 1e-4})
    monkeypatch.setattr(TransformersSampler, "sample", off_by(0.25))
    with pytest.raises(DataError, match=r"max_logprob_mismatch: .* differ by 0.25 nats per token"):
        align("grpo", world.inputs, tmp_path / "other", {"rollouts": 1, "max_logprob_mismatch": 0.2})
    seen = align("grpo", world.inputs, tmp_path / "allowed", {"rollouts": 1, "max_logprob_mismatch": 0.3})
    (line,) = seen.lines("rollout")
    assert line["generator_logprob_gap"] == pytest.approx(0.25, abs=1e-5)
    assert line["generator_logprob_gap_max"] == pytest.approx(0.25, abs=1e-5)


def test_the_mismatch_is_corrected_up_to_its_cap(
    world: OnPolicyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the generator says log p - log 2, each token weighs min(2, cap): the first step's loss is so many times as large."""
    first = {}
    for name, cap in (("without", None), ("whole", 3.0), ("capped", 1.5)):
        with monkeypatch.context() as patch:
            patch.setattr(TransformersSampler, "sample", off_by(-float(np.log(2))))
            changes = {"rollouts": 1, "mismatch_cap": cap}
            first[name] = align("grpo", world.inputs, tmp_path / name, changes).lines("step")[0]["policy_loss"]
    assert abs(first["without"]) > 1e-3
    assert first["whole"] == pytest.approx(2 * first["without"], rel=1e-5)
    assert first["capped"] == pytest.approx(1.5 * first["without"], rel=1e-5)


def test_rollouts_in_the_background_are_those_of_the_policy_one_rollout_ago(
    world: OnPolicyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first two rollouts are written by the policy that training began with, the third by that of one rollout later.

    So they are what trainings that learn nothing, and that learn from one rollout alone, write at these positions: token by
    token, and with the very log-probabilities, that training meanwhile has moved away from.
    """
    threads: list[str] = []
    sample = TransformersSampler.sample

    def noted(*arguments: Any, **options: Any) -> list[Sampled]:
        threads.append(threading.current_thread().name)
        return sample(*arguments, **options)

    monkeypatch.setattr(TransformersSampler, "sample", noted)
    common = {"rollouts": 3, "mismatch_cap": 2.0, "learning_rate": 3e-3, "schedule": "constant"}
    background = align("grpo", world.inputs, tmp_path / "background", {**common, "background_rollouts": True})
    assert threads.count("background rollout") == 2 * 16 // 4
    ahead = align("grpo", world.inputs, tmp_path / "ahead", common)
    still = align("grpo", world.inputs, tmp_path / "still", {**common, "learning_rate": 1e-12})
    one, two, three = (rollout.episodes for rollout in background.experiences)
    for found, expected in zip(
        [*one, *two], [*still.experiences[0].episodes, *still.experiences[1].episodes], strict=True
    ):
        assert found.ids.tolist() == expected.ids.tolist()
        assert found.generator_logprobs == pytest.approx(expected.generator_logprobs, abs=1e-5)
    assert [each.ids.tolist() for each in two] != [each.ids.tolist() for each in ahead.experiences[1].episodes]
    assert all(each.logprobs == pytest.approx(each.generator_logprobs, abs=1e-5) for each in one)
    assert any(each.logprobs != pytest.approx(each.generator_logprobs, abs=1e-3) for each in two)
    # The policy after the first rollout, which is the same in both, writes the third one here and the second one there.
    first = align("grpo", world.inputs, tmp_path / "first", {**common, "rollouts": 1})
    after = {"model": first.context.out, "prompts": world.chats}
    again = align("grpo", after, tmp_path / "after", {**common, "learning_rate": 1e-12})
    assert [each.ids.tolist() for each in three] == [each.ids.tolist() for each in again.experiences[2].episodes]
    lines = background.lines("rollout")
    assert ["background_seconds" in line for line in lines] == [True, True, False]
    assert ["rollout_tokens_per_second" in line for line in lines] == [True, False, False]


def test_an_error_while_completions_are_written_in_the_background_ends_the_run(
    world: OnPolicyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One in the thread is told; one in learning does not wait for what the thread writes, and leaves no thread."""
    changes = {"rollouts": 2, "background_rollouts": True, "mismatch_cap": 2.0}
    sample = TransformersSampler.sample

    def failing(*arguments: Any, **options: Any) -> list[Sampled]:
        if threading.current_thread().name == "background rollout":
            raise RuntimeError("no memory is left")
        return sample(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(TransformersSampler, "sample", failing)
        with pytest.raises(RuntimeError, match="no memory is left"):
            align("grpo", world.inputs, tmp_path / "thread", changes)

    def unlearned(*_: Any, **__: Any) -> None:
        raise DataError("the loss is no number")

    monkeypatch.setattr(Learner, "optimize", unlearned)
    with pytest.raises(DataError, match="the loss is no number"):
        align("grpo", world.inputs, tmp_path / "learning", {**changes, "max_new_tokens": 24})
    assert not [each for each in threading.enumerate() if each.name == "background rollout"]


# Prompts of other kinds


def test_texts_are_continued_as_they_are(world: OnPolicyWorld, tmp_path: Path) -> None:
    """Raw: the token that begins a text and those of the text, with no template, also for a tokenizer that has none."""
    rows = [{"text": text.split(".")[0][:30]} for _, text in docstrings()[:20]]
    prompts = write_prompts(tmp_path / "texts", rows, rows[:4])
    model = write_policy(tmp_path / "model", world.tokenizer)
    (model / "chat_template.jinja").unlink()
    inputs = {"model": model, "prompts": prompts}
    seen = align("rloo", inputs, tmp_path / "run", {"rollouts": 1, "rendering": "raw", "completions_per_prompt": 2})
    for each in seen.experiences[0].episodes:
        expected = [world.tokenizer.bos_token_id, *world.tokenizer.encode(rows[each.row_index]["text"])]
        assert each.prompt_ids.tolist() == expected
    assert seen.lines("rollout")[0]["samples"][0]["prompt"].startswith("<s>")


def test_texts_may_be_asked_as_questions(world: OnPolicyWorld, tmp_path: Path) -> None:
    rows = [{"text": name} for name, _ in docstrings()[:20]]
    inputs = {"model": world.model, "prompts": write_prompts(tmp_path / "texts", rows, rows[:4])}
    seen = align("grpo", inputs, tmp_path / "run", {"rollouts": 1, "completions_per_prompt": 2})
    sample = seen.lines("rollout")[0]["samples"][0]
    asked = rows[seen.experiences[0].episodes[0].row_index]["text"]
    assert sample["prompt"] == f"<s><|user|>{asked}<|end|><|assistant|>"


def test_chats_cannot_be_continued_raw(world: OnPolicyWorld, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is raw, and the prompts are chats"):
        align("grpo", world.inputs, tmp_path, {"rendering": "raw"})


def test_prompts_with_history_are_asked_their_last_question(world: OnPolicyWorld, tmp_path: Path) -> None:
    """As rows of prompts, and as chats that end with a question: what is carried answers that one, and no other."""
    turns = [
        [
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": f"and {name}"},
        ]
        for name, _ in docstrings()[:20]
    ]
    changes = {"rollouts": 1, "completions_per_prompt": 2}
    for field in ("prompt", "messages"):
        rows = [{field: asked, "columns": {"answer": asked[-1]["content"]}} for asked in turns]
        prompts = write_prompts(tmp_path / field / "rows", rows, rows[:4])
        seen = align("grpo", {"model": world.model, "prompts": prompts}, tmp_path / field / "run", changes)
        episode = seen.experiences[0].episodes[0]
        asked = turns[episode.row_index][-1]["content"]
        sample = seen.lines("rollout")[0]["samples"][0]
        assert sample["prompt"] == f"<s><|user|>hello<|end|><|assistant|>Yes.<|end|><|user|>{asked}<|end|><|assistant|>"
        assert rows[episode.row_index]["columns"]["answer"] == asked


def test_prompts_of_preferences_and_a_chat_without_a_question(world: OnPolicyWorld, tmp_path: Path) -> None:
    """Of a pair what stands before the answers; a chat that the assistant begins has no question and is dropped."""
    said = {"role": "assistant", "content": "Yes."}
    pairs = [
        {"prompt": [{"role": "user", "content": name}], "chosen": [said], "rejected": [{**said, "content": "No."}]}
        for name, _ in docstrings()[:20]
    ]
    inputs = {"model": world.model, "prompts": write_prompts(tmp_path / "pairs", pairs, pairs[:4])}
    changes = {"rollouts": 1, "completions_per_prompt": 2}
    seen = align("rloo", inputs, tmp_path / "run", changes)
    assert seen.lines("rollout")[0]["samples"][0]["prompt"].endswith("<|end|><|assistant|>")
    assert "Yes" not in json.dumps([line["samples"][0]["prompt"] for line in seen.lines("rollout")])

    chats = [{"messages": [*pair["prompt"], said]} for pair in pairs] + [{"messages": [said]}] * 3
    inputs = {"model": world.model, "prompts": write_prompts(tmp_path / "chats", chats, chats[:4])}
    seen = align("rloo", inputs, tmp_path / "asked", changes)
    assert seen.result.facts.dropped_rows == {"no_user_message": 3}
    assert seen.result.facts.train_rows == 20
