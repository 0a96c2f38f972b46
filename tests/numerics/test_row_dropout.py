"""What is dropped of a row does not depend on the rows beside it, in real classes of transformers, and what cannot is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from pipeline.stage import Context
from stages.lib.models.drawing import draws_of
from stages.lib.training.dropout import RowDropout
from stages.lib.training.randomness import Randomness
from tests.distributed.test_training_library import context

# DeBERTa's module scripts a function when it is imported.
pytestmark = pytest.mark.filterwarnings("ignore:`?torch.jit.script:DeprecationWarning")

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
DISENTANGLED = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {"attention_dropout": 0.1, "num_key_value_heads": 2},
    # These call functions with rates of their own.
    "bloom": {"hidden_dropout": 0.1, "attention_dropout": 0.1},
    "starcoder2": {
        "residual_dropout": 0.1,
        "attention_dropout": 0.1,
        "embedding_dropout": 0.1,
        "num_key_value_heads": 2,
    },
    "gpt_neox": {"hidden_dropout": 0.1, "attention_dropout": 0.1},
    # Leaves whole layers out.
    "opt": {"layerdrop": 0.4, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "bert": {},
    # One layer, called twice.
    "albert": {"embedding_size": 16, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
    "modernbert": {"attention_dropout": 0.1, "embedding_dropout": 0.1, "mlp_dropout": 0.1, "pad_token_id": 0},
    # Drops from a table of relative positions, which all rows share.
    "deberta-v2": {**DISENTANGLED, "position_buckets": 8},
}
XLNET = {"d_model": 32, "n_head": 4, "n_layer": 2, "d_inner": 64}
MASKED = {"bert", "albert", "modernbert", "deberta-v2"}
WITHOUT_CHECKPOINTING = {"albert"}
ROWS = [torch.randint(4, 60, (length,), generator=torch.Generator().manual_seed(length)) for length in (9, 16, 12, 7)]
CPU = torch.device("cpu")


@dataclass
class Trained:
    """A model in training mode, its dropout, and its loss on some of `ROWS`, padded to the longest."""

    model: nn.Module
    dropout: RowDropout = field(default_factory=RowDropout)

    def loss(self, places: Sequence[int]) -> torch.Tensor:
        ids_BT = nn.utils.rnn.pad_sequence([ROWS[place] for place in places], batch_first=True, padding_value=1)
        mask_BT = nn.utils.rnn.pad_sequence([torch.ones_like(ROWS[place]) for place in places], batch_first=True)
        logits = self.model(input_ids=ids_BT, attention_mask=mask_BT).logits
        return functional.cross_entropy(logits[mask_BT.bool()], ids_BT[mask_BT.bool()], reduction="sum")

    def learn(self) -> None:
        self.dropout.learn(self.model, CPU, lambda times: self.loss([0] * times))

    def gradients(self, *batches: Sequence[int], step: int = 0) -> tuple[float, torch.Tensor]:
        """The loss and the gradients of rows that are spread over batches."""
        self.model.zero_grad()
        total = 0.0
        for places in batches:
            with self.dropout.rows([100 + place for place in places], step, CPU):
                loss = self.loss(places)
                loss.backward()
                total += float(loss.detach())
        grads = [torch.zeros_like(each) if each.grad is None else each.grad for each in self.model.parameters()]
        return total, torch.cat([grad.flatten() for grad in grads])


def make(family: str, **fields: Any) -> Trained:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    torch.manual_seed(0)
    sizes = {name: size for name, size in SIZES.items() if family != "xlnet" or name != "max_position_embeddings"}
    config = AutoConfig.for_model(family, **{**sizes, **FAMILIES.get(family, {}), **fields})
    config.use_cache = False
    model = (AutoModelForMaskedLM if family in MASKED else AutoModelForCausalLM).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() > 1 else 1)  # so that each part counts, as it does once it has learned
    return Trained(model.train())


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / one.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_loses_the_same_whatever_stands_beside_it(family: str) -> None:
    """In one batch, alone, and in other pairs, which are padded otherwise; other steps or rows lose something else."""
    trained = make(family)
    trained.learn()
    assert trained.dropout.sites and not trained.dropout.strange
    loss, gradients = trained.gradients([0, 1, 2, 3])
    for batches in ([[0], [1], [2], [3]], [[2, 0], [1, 3]]):
        found, others = trained.gradients(*batches)
        assert found == pytest.approx(loss, rel=1e-6)
        assert apart(gradients, others) < 3e-5
    trained.model.eval()
    assert apart(gradients, trained.gradients([0, 1, 2, 3])[1]) > 1e-2, "or nothing was dropped"


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - WITHOUT_CHECKPOINTING))
def test_what_is_computed_again_draws_what_it_drew(family: str) -> None:
    trained = make(family)
    trained.learn()
    loss, gradients = trained.gradients([0, 1], [2, 3])
    trained.model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": trained.dropout.recomputing})
    found, again = trained.gradients([0, 1], [2, 3])
    assert found == loss
    assert apart(gradients, again) < 1e-6


class Repeating(nn.Module):
    """A layer that is called twice, each time computed again for its gradients."""

    def __init__(self, dropout: RowDropout) -> None:
        super().__init__()
        self.embedding, self.layer, self.drop = nn.Embedding(64, 8), nn.Linear(8, 8), nn.Dropout(0.5)
        self.dropout, self.recompute = dropout, False

    def block(self, values: torch.Tensor) -> torch.Tensor:
        return self.drop(self.layer(values).tanh())

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        from torch.utils.checkpoint import checkpoint

        values = self.embedding(input_ids)
        for _ in range(2):
            if self.recompute:
                values = checkpoint(self.block, values, use_reentrant=False, context_fn=self.dropout.recomputing)
            else:
                values = self.block(values)
        return SimpleNamespace(logits=values @ self.embedding.weight.T)


def test_a_layer_that_is_called_twice_drops_twice_and_the_same_when_computed_again() -> None:
    """The two masks differ: rate 1/2 on 9 x 8 numbers."""
    dropout = RowDropout()
    torch.manual_seed(0)
    model = Repeating(dropout)
    trained = Trained(model, dropout)
    trained.learn()
    assert list(dropout.sites) == [("drop", 0), ("drop", 1)]
    with dropout.rows([5], 0, CPU):
        one, other = (dropout_of(dropout, (1, 9, 8)) for _ in range(2))
    assert not torch.equal(one, other)
    loss, gradients = trained.gradients([0, 1])
    model.recompute = True
    found, again = trained.gradients([0, 1])
    assert found == loss
    assert apart(gradients, again) < 1e-6


def dropout_of(dropout: RowDropout, shape: tuple[int, ...]) -> torch.Tensor:
    dropout.running.append("drop")
    mask = dropout.mask(shape, 0.5)
    dropout.running.pop()
    assert mask is not None
    return mask


def test_the_rows_themselves_decide_and_so_does_the_step_where_none_does() -> None:
    trained = make("bert")
    trained.learn()
    loss, _ = trained.gradients([0, 1])
    with trained.dropout.rows([100, 202], 0, CPU), torch.no_grad():
        assert float(trained.loss([0, 1])) != loss
    assert trained.gradients([0, 1], step=1)[0] == loss, "BERT drops nothing that rows share"
    shared = make("deberta-v2")
    shared.learn()
    assert None in shared.dropout.sites.values()
    one, other = (shared.gradients([0, 1], step=step)[1] for step in (0, 1))
    assert apart(one, other) > 1e-4


def test_folded_heads_are_those_of_their_rows() -> None:
    """B x heads in one dimension, as classes have it that multiply batches of matrices."""

    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.drop = nn.Embedding(64, 8), nn.Dropout(0.5)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            values = self.embedding(input_ids)
            heads = self.drop(values.unflatten(-1, (2, 4)).transpose(1, 2).flatten(0, 1))
            values = heads.unflatten(0, (-1, 2)).transpose(1, 2).flatten(2)
            return SimpleNamespace(logits=values @ self.embedding.weight.T)

    torch.manual_seed(0)
    trained = Trained(Folded())
    trained.learn()
    assert trained.dropout.sites == {("drop", 0): 0}
    loss, gradients = trained.gradients([0, 1, 2, 3])
    found, others = trained.gradients([3], [0, 2], [1])
    assert found == pytest.approx(loss, rel=1e-6)
    assert apart(gradients, others) < 1e-6


def randomness_of(trained: Trained, folder: Path) -> tuple[Randomness, Context]:
    """What the loop would find out about the model, on rows 0 and 1."""
    ctx = context(folder)
    randomness = Randomness(ctx, CPU)
    trained.dropout = randomness.dropout

    def loss(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return trained.loss(batch["positions"].tolist())

    def batch(*places: int) -> dict[str, torch.Tensor]:
        return {"positions": torch.tensor(places), "input_ids": torch.zeros(len(places), 1)}

    engine: Any = SimpleNamespace(module=trained.model, wrapped=trained.model)
    randomness.look(engine, loss, [batch(0), batch(0, 0), batch(1), batch(0, 1)], exact=True)
    return randomness, ctx


def notes(ctx: Context) -> list[str]:
    return [event["text"] for event in ctx.journal.events("note")]


def test_rows_behind_the_time_and_a_table_that_padding_shifts(tmp_path: Path) -> None:
    """XLNet's rows are its second dimension. Its table of relative positions begins at the padded length, so that the rows of
    a batch lose the same as alone only where no padding comes in: which is found out by calling, and said.
    """
    trained = make("xlnet", **XLNET)
    trained.learn()
    assert 1 in trained.dropout.sites.values()
    found, expected = trained.gradients([1, 1]), trained.gradients([1], [1])
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    _, ctx = randomness_of(make("xlnet", **XLNET), tmp_path / "xlnet")
    assert ["alone and beside another one" in text for text in notes(ctx)] == [True]
    _, ctx = randomness_of(make("bert"), tmp_path / "bert")
    assert notes(ctx) == []


def test_what_is_drawn_by_no_dropout_is_found_and_named(tmp_path: Path) -> None:
    """Mixtral's routers jitter: numbers of `uniform_`, which no row can be given."""
    sizes = {"num_key_value_heads": 2, "num_local_experts": 4, "attention_dropout": 0.1}
    trained = make("mixtral", **sizes, router_jitter_noise=0.1)
    trained.learn()
    assert {(draw.module, draw.function) for draw in trained.dropout.strange} == {
        (f"model.layers.{layer}.mlp", "uniform_") for layer in (0, 1)
    }
    _, ctx = randomness_of(make("mixtral", **sizes, router_jitter_noise=0.1), tmp_path)
    assert ["uniform_ in model.layers.0.mlp" in text for text in notes(ctx)] == [True]
    quiet = make("mixtral", **sizes)
    quiet.learn()
    assert quiet.dropout.sites and not quiet.dropout.strange


class LeftOutByRow(nn.Module):
    """Stochastic depth as vision models have it: a number for each row says whether a layer is left out for it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x_BTC: torch.Tensor) -> torch.Tensor:
        keeps_B11 = torch.rand((len(x_BTC), 1, 1)) > 0.5
        return x_BTC + keeps_B11 * self.layer(x_BTC)


def test_a_number_for_each_row_is_not_taken_for_one_that_no_row_decides() -> None:
    """For a single row both look alike."""
    model, dropout = LeftOutByRow().train(), RowDropout()
    dropout.learn(model, CPU, lambda times: model(torch.ones(times, 3, 4)))
    assert not dropout.sites
    assert [draw.function for draw in dropout.strange] == ["rand"]


def test_a_model_without_dropout_is_left_as_it_is() -> None:
    trained = make("llama", attention_dropout=0.0)
    trained.learn()
    assert not trained.dropout.sites
    assert not any(module._forward_pre_hooks for module in trained.model.modules())


def test_outside_of_training_passes_nothing_is_drawn() -> None:
    trained = make("starcoder2")
    assert draws_of(trained.model, CPU, lambda: trained.loss([0]))
    trained.learn()
    assert not draws_of(trained.model, CPU, lambda: trained.loss([0]))
    with torch.no_grad():
        assert torch.equal(trained.loss([0, 1]), trained.loss([0, 1]))
