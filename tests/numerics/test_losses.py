"""The losses of language models: by hand, against transformers and TRL, and packed against unpacked."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.errors import RecipeError
from pipeline.stage import Context
from stages.lib.formulas.masking import Masking
from stages.lib.formulas.token_losses import (
    IGNORE,
    TARGETS,
    TokenObjective,
    cross_entropy_sum,
    measure_tokens,
    next_tokens,
    token_logps,
    token_metrics,
)
from stages.lib.models.isolation import require_isolation
from stages.lib.text.blocks import collate_causal, collate_masked, same_document
from stages.lib.training.evaluating import Evaluator

# Logits of two places over three tokens with softmax (1/2, 1/4, 1/4) and (1/8, 1/8, 3/4).
LOGITS_BTV = torch.tensor([[[2.0, 1.0, 1.0], [1.0, 1.0, 6.0]]]).log()


def test_log_probabilities_by_hand() -> None:
    """Asked for token 0 and token 2: log(1/2) and log(3/4). Asked for nothing: 0."""
    logps_BT = token_logps(LOGITS_BTV, torch.tensor([[0, 2]]))
    assert logps_BT[0].tolist() == pytest.approx([math.log(1 / 2), math.log(3 / 4)])
    assert token_logps(LOGITS_BTV, torch.tensor([[IGNORE, 2]]))[0, 0] == 0


@pytest.mark.parametrize(
    ("targets", "expected"),
    [([0, 2], -math.log(3 / 8)), ([IGNORE, 1], math.log(8)), ([2, IGNORE], math.log(4)), ([IGNORE, IGNORE], 0.0)],
)
def test_cross_entropy_by_hand(targets: list[int], expected: float) -> None:
    """-log(1/2) - log(3/4) = -log(3/8); -log(1/8); -log(1/4); nothing asked, nothing lost."""
    assert float(cross_entropy_sum(LOGITS_BTV, torch.tensor([targets]))) == pytest.approx(expected, abs=1e-6)


def test_next_tokens_by_hand() -> None:
    ids_BT = torch.tensor([[5, 6, 7, 8]])
    assert next_tokens(ids_BT).tolist() == [[6, 7, 8, IGNORE]]
    # Asked for the second and the last token only: by the places before them.
    assert next_tokens(ids_BT, torch.tensor([[1, 1, 0, 1]])).tolist() == [[6, IGNORE, 8, IGNORE]]


def test_metrics_by_hand() -> None:
    """log 8 nats over 3 tokens: perplexity 2."""
    metrics = token_metrics({"nats": math.log(8), "tokens": 3.0, "correct": 1.0})
    assert metrics == pytest.approx(
        {"heldout_loss": math.log(2), "heldout_perplexity": 2.0, "heldout_token_accuracy": 1 / 3}
    )


# Against other implementations.


def tiny(model_type: str, **fields: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
    config = AutoConfig.for_model(model_type, **{**sizes, "pad_token_id": 3, **fields})
    masked = model_type in ("bert", "roberta", "distilbert", "modernbert")
    model = (AutoModelForMaskedLM if masked else AutoModelForCausalLM).from_config(config, attn_implementation="sdpa")
    with torch.no_grad():
        # Larger weights than at the start of training, so that attention matters.
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    model.config.use_cache = False
    return model.eval()


LLAMA = {"intermediate_size": 24}


def test_the_causal_loss_is_that_of_transformers() -> None:
    """Their mean over labels, times the number of labels, with the same gradients."""
    model = tiny("llama", **LLAMA)
    ids_BT = torch.randint(4, 40, (3, 12), generator=torch.Generator().manual_seed(2))
    said_BT = torch.rand(ids_BT.shape, generator=torch.Generator().manual_seed(3)) < 0.5
    batch = {"input_ids": ids_BT, TARGETS: next_tokens(ids_BT, said_BT)}
    objective = TokenObjective()
    loss = objective.loss_sum(model, dict(batch)) / objective.count(batch)
    loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    theirs = model(input_ids=ids_BT, labels=ids_BT.masked_fill(~said_BT, IGNORE)).loss
    theirs.backward()
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-6)
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def test_the_masked_loss_is_that_of_transformers() -> None:
    model = tiny("bert", intermediate_size=24)
    ids_BT = torch.randint(4, 40, (2, 12), generator=torch.Generator().manual_seed(2))
    targets_BT = ids_BT.masked_fill(torch.arange(12) % 3 > 0, IGNORE)
    sums = measure_tokens(model, {"input_ids": ids_BT, TARGETS: targets_BT})
    assert int(sums["tokens"]) == 8
    theirs = model(input_ids=ids_BT, labels=targets_BT).loss
    assert (sums["nats"] / sums["tokens"]).item() == pytest.approx(theirs.item(), rel=1e-6)


def test_log_probabilities_are_those_of_trl() -> None:
    from trl.trainer.utils import selective_log_softmax

    logits_BTV = torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(4))
    targets_BT = torch.randint(0, 9, (2, 5), generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(token_logps(logits_BTV, targets_BT), selective_log_softmax(logits_BTV, targets_BT))


# Packed and unpacked.

DOCUMENTS = [[5, 6, 7, 8, 9, 10], [11, 12, 13], [14, 15, 16, 17, 18, 19, 20]]
FAMILIES = {
    "llama": LLAMA,
    "qwen3": {"intermediate_size": 24, "num_key_value_heads": 2, "head_dim": 8},
    "gpt2": {},
    "gpt_neox": {"intermediate_size": 24},
}
ENCODERS = {
    "bert": {"intermediate_size": 24},
    "roberta": {"intermediate_size": 24, "max_position_embeddings": 64},
    "distilbert": {},
}


def block(documents: list[list[int]]) -> dict[str, Any]:
    return {
        "input_ids": np.concatenate([np.array(each) for each in documents]),
        "position_ids": np.concatenate([np.arange(len(each)) for each in documents]),
        "position": 0,
    }


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_packed_block_loses_what_its_documents_lose_alone(model_type: str) -> None:
    model = tiny(model_type, **FAMILIES[model_type])
    collate = collate_causal(isolate=True)
    packed = measure_tokens(model, collate([block(DOCUMENTS)]))
    alone = [measure_tokens(model, collate([block([each])])) for each in DOCUMENTS]
    assert int(packed["tokens"]) == sum(int(each["tokens"]) for each in alone) == 5 + 2 + 6
    assert packed["nats"].item() == pytest.approx(sum(each["nats"].item() for each in alone), rel=1e-5)
    mixed = measure_tokens(model, collate_causal(isolate=False)([block(DOCUMENTS)]))
    assert int(mixed["tokens"]) == 15
    assert mixed["nats"].item() != pytest.approx(packed["nats"].item(), rel=1e-3)


@pytest.mark.parametrize("model_type", ENCODERS)
def test_a_packed_block_of_an_encoder(model_type: str) -> None:
    """The targets are given, so that both see the same: the tokens at even places."""
    model = tiny(model_type, **ENCODERS[model_type])
    first = 4 if model_type == "roberta" else 0

    def loss(documents: list[list[int]]) -> float:
        row = block(documents)
        ids_BT, positions_BT = torch.tensor(row["input_ids"])[None], torch.tensor(row["position_ids"])[None]
        batch = {
            "input_ids": ids_BT,
            "position_ids": positions_BT + first,
            "attention_mask": same_document(positions_BT)[:, None],
            TARGETS: ids_BT.masked_fill(positions_BT % 2 == 1, IGNORE),
        }
        return measure_tokens(model, batch)["nats"].item()

    assert loss(DOCUMENTS) == pytest.approx(sum(loss([each]) for each in DOCUMENTS), rel=1e-5)


@pytest.fixture
def evaluator_of(tmp_path: Path) -> Any:
    from pipeline.settings.resources import Resources
    from pipeline.stage import World
    from pipeline.store.checkpoints import Checkpoints
    from pipeline.store.journal import Journal

    def make(model: Any) -> Evaluator:
        ctx = Context(
            inputs={},
            out=tmp_path,
            work=tmp_path,
            resume=None,
            checkpoints=Checkpoints(tmp_path),
            seed=0,
            resources=Resources(),
            journal=Journal(tmp_path / "journal.jsonl", writes=False),
            world=World(),
            stop_requested=lambda: False,
        )
        return Evaluator(model, ctx, torch.device("cpu"), 2)

    return make


@pytest.mark.parametrize("model_type", FAMILIES)
def test_isolation_is_seen_where_it_is(model_type: str, evaluator_of: Any) -> None:
    evaluator = evaluator_of(tiny(model_type, **FAMILIES[model_type]))
    require_isolation(evaluator, collate_causal(isolate=True), [5, 6, 7], 32)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_isolation_is_missed_where_it_is_not(model_type: str, evaluator_of: Any) -> None:
    evaluator = evaluator_of(tiny(model_type, **FAMILIES[model_type]))
    with pytest.raises(RecipeError, match="a document changes what the model makes of the next one"):
        require_isolation(evaluator, collate_causal(isolate=False), [5, 6, 7], 32)


def test_isolation_of_encoders(evaluator_of: Any) -> None:
    masking = Masking(0.15, mask_token_id=4, vocabulary_size=40, special_ids=frozenset({0, 1, 2, 3, 4}))
    evaluator = evaluator_of(tiny("bert", intermediate_size=24))
    require_isolation(evaluator, collate_masked(masking, 0, first_position=0), [5, 6, 7], 32)
    with pytest.raises(RecipeError, match="a document changes"):
        require_isolation(evaluator, collate_masked(masking, 0, first_position=None), [5, 6, 7], 32)


def test_a_model_without_positions_cannot_isolate(evaluator_of: Any) -> None:
    class Plain(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor) -> None:
            raise AssertionError("is not reached")

    with pytest.raises(RecipeError, match=r"Set isolate_documents: false"):
        require_isolation(evaluator_of(Plain()), collate_causal(isolate=True), [5, 6, 7], 32)


# Held-out sums.


def test_sums_over_batches_are_sums_over_rows(evaluator_of: Any) -> None:
    """Seven rows in batches of 2 and of 3, the last one short."""
    rows = [{"value": float(value)} for value in (1, 2, 4, 8, 16, 32, 64)]
    evaluator = evaluator_of(torch.nn.Linear(1, 1))

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        assert all("position" in row for row in rows)
        return {"value": torch.tensor([row["value"] for row in rows])}

    def measure(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        assert not model.training and not torch.is_grad_enabled()
        return {"sum": batch["value"].sum(), "rows": torch.tensor(len(batch["value"]))}

    for size in (2, 3):
        assert evaluator.sums(rows, collate, measure, size) == {"sum": 127.0, "rows": 7.0}
    assert evaluator.model.training


# Masks.

MASKING = Masking(0.15, mask_token_id=4, vocabulary_size=100, special_ids=frozenset({0, 1, 2, 3, 4}))


def test_shares_of_masked_tokens() -> None:
    """15% of 200,000 tokens are asked for; 80% of those are hidden, 10% swapped, 10% left. Within four standard errors."""
    ids_T = np.random.default_rng(0).integers(0, 100, 200_000)
    seen_T, targets_T = MASKING(ids_T, seed=1, position=2)
    asked_T = targets_T != IGNORE
    assert (targets_T[asked_T] == ids_T[asked_T]).all()
    assert (seen_T[~asked_T] == ids_T[~asked_T]).all()
    special_T = ids_T < 5
    assert not asked_T[special_T].any()
    share = asked_T[~special_T].mean()
    assert abs(share - 0.15) < 4 * math.sqrt(0.15 * 0.85 / (~special_T).sum())
    hidden = (seen_T[asked_T] == 4).mean()
    # One swap in 95 gives the token itself back.
    swapped = ((seen_T != ids_T) & (seen_T != 4))[asked_T].mean() * 95 / 94
    assert abs(hidden - 0.8) < 4 * math.sqrt(0.8 * 0.2 / asked_T.sum())
    assert abs(swapped - 0.1) < 4 * math.sqrt(0.1 * 0.9 / asked_T.sum())
    assert set(np.unique(seen_T[asked_T & (seen_T != ids_T) & (seen_T != 4)])) <= set(range(5, 100))


def test_masks_are_a_function_of_seed_and_position() -> None:
    ids_T = np.arange(5, 95)
    first, again = MASKING(ids_T, 1, 2), MASKING(ids_T, 1, 2)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert not (MASKING(ids_T, 1, 3)[1] == first[1]).all()
    assert not (MASKING(ids_T, 2, 2)[1] == first[1]).all()


def test_a_short_row_asks_for_one_token_at_least() -> None:
    for position in range(50):
        _, targets_T = MASKING(np.array([1, 7, 2]), 0, position)
        assert targets_T.tolist() == [IGNORE, 7, IGNORE]
    assert (MASKING(np.array([0, 1]), 0, 0)[1] == IGNORE).all()
