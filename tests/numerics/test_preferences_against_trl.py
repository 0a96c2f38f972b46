"""TRL as the oracle: the same tokens, masks and losses as its DPO and reward trainers, on pairs of answers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from stages.alignment.dpo import DPOParams
from stages.alignment.reward import RewardObjective, RewardParams
from stages.lib.preferring.answers import answer_logprobs
from stages.lib.preferring.objective import PreferenceObjective
from stages.lib.preferring.pairs import collate_pairs
from stages.lib.preferring.reward_models import scores
from tests.integration.preference_world import tokenized
from tests.integration.tiny_language_model import as_pair, make_tokenizer
from tests.rows import preferences

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
"""Slow, because importing TRL takes seconds; warnings are those of TRL and of what it imports."""

TRAINING: dict[str, Any] = {"global_batch_size": 8, "max_steps": 1, "learning_rate": 1e-3, "max_length_tokens": 512}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return [as_pair(row) for row in preferences(8)]


@pytest.fixture(scope="module")
def tokenizer(rows: list[dict[str, Any]]) -> Any:
    return make_tokenizer([row["chosen"][0]["content"] for row in rows], 400)


def tiny_config(tokenizer: Any, **more: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        # Large enough for the policy and the reference to disagree by several nats.
        initializer_range=0.3,
        **more,
    )


def trl_dataset(rows: list[dict[str, Any]]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(rows)


@pytest.fixture(autouse=True)
def no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "HF_HUB_DISABLE_TELEMETRY", "1")


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo"])
def test_dpo(loss: str, rows: list[dict[str, Any]], tokenizer: Any, tmp_path: Path) -> None:
    """One batch of eight pairs: TRL's mean loss is ours, and its ids and completion masks are ours, row by row."""
    from trl import DPOConfig, DPOTrainer

    torch.manual_seed(0)
    policy, reference = LlamaForCausalLM(tiny_config(tokenizer)).eval(), LlamaForCausalLM(tiny_config(tokenizer)).eval()
    options = {"bf16": False, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_length": 512}
    trainer = DPOTrainer(
        model=policy,
        ref_model=reference,
        args=DPOConfig(str(tmp_path), beta=0.3, loss_type=[loss], per_device_train_batch_size=8, **options),
        train_dataset=trl_dataset(rows),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    theirs = float(trainer.compute_loss(policy, dict(batch)).detach())

    ours = collate_pairs(tokenizer.pad_token_id)(list(tokenized(rows, tokenizer, tmp_path / "pairs")))
    names = {"input_ids": "input_ids", "attention_mask": "attention_mask", "completion_mask": "answer_mask"}
    for their_name, our_name in names.items():
        assert sorted(batch[their_name].tolist()) == sorted(ours[our_name].tolist()), our_name

    with torch.no_grad():
        ours["reference_N2"] = answer_logprobs(reference, ours).double().view(2, -1).T
        objective = PreferenceObjective(DPOParams(**TRAINING, loss=loss, beta=0.3))
        mean = float(objective.loss_sum(policy, ours) / objective.count(ours))
    assert mean == pytest.approx(theirs, rel=1e-5)
    at_reference = {"sigmoid": 0.6931, "hinge": 1.0, "ipo": (1 / 0.6) ** 2}[loss]
    assert abs(mean - at_reference) > 0.01, "the comparison would see nothing where both models agree"


@pytest.mark.parametrize(("margin", "coefficient"), [(0.0, 0.0), (0.5, 0.1)])
def test_reward(margin: float, coefficient: float, rows: list[dict[str, Any]], tokenizer: Any, tmp_path: Path) -> None:
    """One batch of eight pairs: TRL's mean loss is ours."""
    from trl import RewardConfig, RewardTrainer

    torch.manual_seed(0)
    model = LlamaForSequenceClassification(tiny_config(tokenizer, num_labels=1)).eval()
    options = {"bf16": False, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_length": 512}
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(
            str(tmp_path), center_rewards_coefficient=coefficient or None, per_device_train_batch_size=8, **options
        ),
        train_dataset=trl_dataset([{**row, "margin": margin} for row in rows]),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    theirs = float(trainer.compute_loss(model, dict(batch)).detach())

    ours = collate_pairs(tokenizer.pad_token_id)(list(tokenized(rows, tokenizer, tmp_path / "pairs")))
    assert sorted(batch["input_ids"].tolist()) == sorted(ours["input_ids"].tolist())
    with torch.no_grad():
        objective = RewardObjective(RewardParams(**TRAINING, margin=margin, center_rewards_coefficient=coefficient))
        mean = float(objective.loss_sum(model, ours) / objective.count(ours))
        differences = scores(model, ours).chunk(2)
    assert mean == pytest.approx(theirs, rel=1e-5)
    assert float((differences[0] - differences[1]).abs().mean()) > 0.01
