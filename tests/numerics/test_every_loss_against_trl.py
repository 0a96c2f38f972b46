"""Every preference loss and everything that modifies it, in value and gradient, against TRL on logits made by hand.

TRL's loss function is called as it stands, with a model in its place whose logits are given; so is ours. Where TRL has no such
loss, or another one, the formula of the paper is computed in a slow loop, pair by pair in Python's floating point, and its
gradient by central differences.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from stages.alignment.dpo import DPOParams
from stages.lib.formulas.preference_table import PREFERENCE_LOSSES
from stages.lib.formulas.token_losses import Tensors
from stages.lib.preferring.answers import answer_logprobs
from stages.lib.preferring.objective import PreferenceObjective

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
"""Slow, because importing TRL takes seconds; warnings are those of TRL and of what it imports."""

TRAINING: dict[str, Any] = {"global_batch_size": 4, "max_steps": 1, "learning_rate": 1e-3, "max_length_tokens": 16}
PAIRS, TOKENS, VOCABULARY = 4, 10, 7


class Given(torch.nn.Module):
    """A model that says the same logits of whatever it is asked: 2N x T x V."""

    is_gradient_checkpointing = False

    def __init__(self, seed: int, sharpness: float = 1.0) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(seed)
        logits_BTV = sharpness * torch.randn(2 * PAIRS, TOKENS, VOCABULARY, generator=draws)
        self.logits = torch.nn.Parameter(logits_BTV)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **options: Any) -> Any:
        """`logits`, and what TRL's own head computes of them: one place less, each for the token that comes next.

        Its log-probabilities are 0 where no label asks for a token.
        """
        logp_BTV = self.logits.log_softmax(-1)[:, :-1]
        asked_BT = torch.ones_like(input_ids[:, 1:]) if labels is None else labels[:, 1:] != -100
        return SimpleNamespace(
            logits=self.logits,
            log_probs=logp_BTV.gather(-1, input_ids[:, 1:, None]).squeeze(-1) * asked_BT,
            log_sum_sq_probs=(2 * logp_BTV).logsumexp(-1),
            entropy=-(logp_BTV.exp() * logp_BTV).sum(-1),
            mean_logits=self.logits[:, :-1].mean(-1),
            is_top1=self.logits[:, :-1].argmax(-1) == input_ids[:, 1:],
        )


def pairs() -> Tensors:
    """Four pairs whose answers have 5, 3, 6, 2 and 4, 6, 6, 3 tokens: longer, shorter and equal ones, and padding behind."""
    draws = torch.Generator().manual_seed(1)
    ids_BT = torch.randint(0, VOCABULARY, (2 * PAIRS, TOKENS), generator=draws)
    prompt, lengths = 3, torch.tensor([5, 3, 6, 2, 4, 6, 6, 3])
    place_T = torch.arange(TOKENS)
    answer_BT = (place_T >= prompt) & (place_T < prompt + lengths[:, None])
    seen_BT = place_T < prompt + lengths[:, None]
    masks = {"attention_mask": seen_BT.long(), "answer_mask": answer_BT.long()}
    return {"input_ids": ids_BT, **masks, "category_N2": torch.full((PAIRS, 2), -1)}


def ours(policy: Given, reference: Given, **params: Any) -> torch.Tensor:
    """Our mean loss."""
    objective = PreferenceObjective(DPOParams(**{**TRAINING, **params}))
    batch = pairs()
    if objective.params.needs_reference:
        with torch.no_grad():
            logp_2N = answer_logprobs(reference, batch, objective.params.tail_weight)
        batch["reference_N2"] = logp_2N.view(2, -1).T
    return objective.loss_sum(policy, batch) / objective.count(batch)


def theirs(policy: Given, reference: Given, losses: dict[str, float], **options: Any) -> torch.Tensor:
    """The loss of TRL's `DPOTrainer`, of a trainer that holds nothing but what its function reads."""
    from trl import DPOTrainer

    values = {
        "beta": 0.3,
        "label_smoothing": 0.0,
        "ld_alpha": None,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "use_weighting": False,
        **options,
    }
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather_for_metrics=lambda x: x, gather=lambda x: x, unwrap_model=lambda x: x
    )
    trainer = SimpleNamespace(
        **values,
        model=policy,
        ref_model=reference,
        accelerator=accelerator,
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=0.05),
        loss_types=list(losses),
        loss_weights=list(losses.values()),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    batch = pairs()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    inputs["completion_mask"] = batch["answer_mask"]
    loss: torch.Tensor = DPOTrainer._compute_loss(trainer, policy, inputs, return_outputs=False)
    return loss


def with_gradient(loss: Callable[..., torch.Tensor], sharpness: float = 1.0, /, **options: Any) -> tuple[float, Any]:
    """(loss, its gradient with respect to the policy's logits)."""
    policy, reference = Given(2, sharpness), Given(3, sharpness)
    value = loss(policy, reference, **options)
    value.backward()  # type: ignore[no-untyped-call]
    return value.item(), policy.logits.grad


def require_equal(mine: tuple[float, Any], other: tuple[float, Any]) -> None:
    assert mine[0] == pytest.approx(other[0], rel=1e-6, abs=1e-6)
    torch.testing.assert_close(mine[1], other[1], rtol=1e-5, atol=1e-6)
    assert float(other[1].abs().max()) > 1e-4, "the comparison would see nothing where nothing is learned"


WITH_SMOOTHING = {"robust": 0.1, "exo_pair": 0.001}
OWN = {"bco_pair": {"loss_options": {"reward_shift": 0.0}}}
"""What a loss must be told to be the one that TRL has."""
OF_TRL = [name for name, loss in PREFERENCE_LOSSES.items() if loss.needs_reference]


@pytest.mark.parametrize("name", OF_TRL)
def test_a_loss_with_a_reference(name: str) -> None:
    smoothing = WITH_SMOOTHING.get(name, 0.0)
    mine = with_gradient(ours, loss=name, beta=0.3, label_smoothing=smoothing, **OWN.get(name, {}))
    require_equal(mine, with_gradient(theirs, losses={name: 1.0}, label_smoothing=smoothing))


@pytest.mark.parametrize("name", ["robust", "exo_pair", "aot", "aot_unpaired"])
def test_label_smoothing(name: str) -> None:
    mine = with_gradient(ours, loss=name, beta=0.3, label_smoothing=0.2)
    require_equal(mine, with_gradient(theirs, losses={name: 1.0}, label_smoothing=0.2))


def test_several_by_weight() -> None:
    """MPO. The term sft is compared below, because TRL averages it over all tokens."""
    losses = {"sigmoid": 0.8, "hinge": 0.5, "ipo": 0.1, "bco_pair": 0.2, "aot": 1.5}
    mine = with_gradient(ours, loss=losses, beta=0.3, **OWN["bco_pair"])
    require_equal(mine, with_gradient(theirs, losses=losses))


DIVERGENT = [name for name, loss in PREFERENCE_LOSSES.items() if loss.takes_divergence]


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js_divergence"])
@pytest.mark.parametrize("name", DIVERGENT)
def test_divergences(name: str, divergence: str) -> None:
    smoothing = WITH_SMOOTHING.get(name, 0.0)
    mine = with_gradient(ours, 0.5, loss=name, beta=0.3, label_smoothing=smoothing, f_divergence=divergence)
    trl = with_gradient(theirs, 0.5, losses={name: 1.0}, label_smoothing=smoothing, f_divergence_type=divergence)
    require_equal(mine, trl)


@pytest.mark.parametrize("alpha", [None, 0.25, 1.0, 2.0])
def test_alpha_divergence(alpha: float | None) -> None:
    how = {"f_divergence": "alpha_divergence", "f_divergence_alpha": alpha}
    mine = with_gradient(ours, 0.5, loss="sigmoid", beta=0.3, **how)
    coefficient = 0.5 if alpha is None else alpha
    trl = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": coefficient}
    require_equal(mine, with_gradient(theirs, 0.5, losses={"sigmoid": 1.0}, **trl))


WEIGHABLE = [name for name in OF_TRL if PREFERENCE_LOSSES[name].takes_policy_weight and name != "hinge"]
"""hinge stands in a slow loop below: TRL 1.16 multiplies in place what its gradient still needs, and fails."""


@pytest.mark.parametrize("name", WEIGHABLE)
def test_weighting_by_the_policy(name: str) -> None:
    """WPO."""
    smoothing = WITH_SMOOTHING.get(name, 0.0)
    more = {"label_smoothing": smoothing, **OWN.get(name, {})}
    mine = with_gradient(ours, loss=name, beta=0.3, policy_weighting=True, **more)
    require_equal(mine, with_gradient(theirs, losses={name: 1.0}, label_smoothing=smoothing, use_weighting=True))


@pytest.mark.parametrize("weight", [0.0, 0.4])
@pytest.mark.parametrize("name", [name for name in OF_TRL if PREFERENCE_LOSSES[name].takes_tail_weight])
def test_tail_weight(name: str, weight: float) -> None:
    """LD-DPO."""
    smoothing = WITH_SMOOTHING.get(name, 0.0)
    more = {"label_smoothing": smoothing, **OWN.get(name, {})}
    mine = with_gradient(ours, loss=name, beta=0.3, tail_weight=weight, **more)
    require_equal(mine, with_gradient(theirs, losses={name: 1.0}, label_smoothing=smoothing, ld_alpha=weight))


# Without a reference: TRL's other trainers, whose negative log-likelihood is taken of one pair at a time.


def nll_of_chosen(policy: Given) -> torch.Tensor:
    """What `nn.CrossEntropyLoss` says of the chosen answers of batches of one pair, in the mean."""
    batch = pairs()
    labels_BT = batch["input_ids"].masked_fill(batch["answer_mask"] == 0, -100)
    alone = [cross_entropy(policy.logits[n, :-1], labels_BT[n, 1:]) for n in range(PAIRS)]
    return torch.stack(alone).mean()


def logps(policy: Given, *, average: bool) -> tuple[torch.Tensor, ...]:
    from trl.experimental.cpo import CPOTrainer

    batch = pairs()
    labels_BT = batch["input_ids"].masked_fill(batch["answer_mask"] == 0, -100)
    logp_2N: torch.Tensor = CPOTrainer.get_batch_logps(policy.logits, labels_BT, average_log_prob=average)
    return logp_2N.chunk(2)


def trl_cpo(policy: Given, reference: Given, **options: Any) -> torch.Tensor:
    from trl.experimental.cpo import CPOTrainer

    values = {"alpha": 0.0, "beta": 0.3, "label_smoothing": 0.0, "loss_type": "sigmoid", "simpo_gamma": 0.5, **options}
    trainer = SimpleNamespace(accelerator=SimpleNamespace(device=torch.device("cpu")), **values)
    vectors = logps(policy, average=values["loss_type"] == "simpo")
    losses_N: torch.Tensor = CPOTrainer.cpo_loss(trainer, *vectors)[0]
    return losses_N.mean() + values.get("cpo_alpha", 0.0) * nll_of_chosen(policy)


def trl_orpo(policy: Given, reference: Given, **options: Any) -> torch.Tensor:
    from trl.experimental.orpo import ORPOTrainer

    trainer = SimpleNamespace(accelerator=SimpleNamespace(device=torch.device("cpu")), beta=0.3)
    losses_N: torch.Tensor = ORPOTrainer.odds_ratio_loss(trainer, *logps(policy, average=True))[0]
    return nll_of_chosen(policy) - losses_N.mean()


@pytest.mark.parametrize(("margin", "smoothing"), [(0.5, 0.0), (1.25, 0.1)])
def test_simpo(margin: float, smoothing: float) -> None:
    options = {"loss_options": {"target_margin": margin}, "label_smoothing": smoothing}
    mine = with_gradient(ours, loss="simpo", beta=2.0, **options)
    trl = {"loss_type": "simpo", "simpo_gamma": margin, "label_smoothing": smoothing, "beta": 2.0}
    require_equal(mine, with_gradient(trl_cpo, **trl))


@pytest.mark.parametrize(("weight", "smoothing"), [(1.0, 0.0), (0.25, 0.1)])
def test_cpo(weight: float, smoothing: float) -> None:
    mine = with_gradient(ours, loss="cpo", beta=0.3, label_smoothing=smoothing, loss_options={"nll_weight": weight})
    require_equal(mine, with_gradient(trl_cpo, cpo_alpha=weight, label_smoothing=smoothing))


def test_orpo() -> None:
    """TRL's odds ratio. Its likelihood term takes in the prompt too, which is in no equation of the paper: ours does not."""
    require_equal(with_gradient(ours, loss="orpo", beta=0.3), with_gradient(trl_orpo))


def test_a_term_for_the_chosen_answer() -> None:
    """RPO: DPO's loss and 0.7 x the negative log-likelihood of the chosen answer per token."""

    def both(policy: Given, reference: Given) -> torch.Tensor:
        return theirs(policy, reference, {"sigmoid": 1.0}) + 0.7 * nll_of_chosen(policy)

    require_equal(with_gradient(ours, loss={"sigmoid": 1.0, "sft": 0.7}, beta=0.3), with_gradient(both))


def test_trl_averages_the_chosen_answers_over_tokens_of_a_batch() -> None:
    """The one thing in which its loss sft is another: answers of 5, 3, 6 and 2 tokens weigh 5, 3, 6 and 2, not 1 each."""
    policy, reference = Given(2), Given(3)
    batch = pairs()
    logp_N = answer_logprobs(policy, batch).chunk(2)[0]
    lengths_N = batch["answer_mask"].sum(1)[:PAIRS]
    assert lengths_N.tolist() == [5, 3, 6, 2]
    assert float(theirs(policy, reference, {"sft": 1.0})) == pytest.approx(float(-logp_N.sum() / 16), rel=1e-6)
    assert float(ours(policy, reference, loss="sft")) == pytest.approx(float(-(logp_N / lengths_N).mean()), rel=1e-6)


# What TRL does not have, by the papers' formulas in slow loops.


def said(model: Given) -> list[list[float]]:
    """log p of each token of each of the 2N answers, one after the other in double precision."""
    batch, found = pairs(), []
    for ids, answer, logits in zip(
        batch["input_ids"], batch["answer_mask"], model.logits.detach().double(), strict=True
    ):
        places = [place for place in range(TOKENS) if answer[place]]
        found.append([float(logits[place - 1].log_softmax(-1)[ids[place]]) for place in places])
    return found


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def slow_r_dpo(policy: Given, reference: Given) -> float:
    """-log sigmoid(beta log-ratio(c) - beta log-ratio(r) + a |c| - a |r|), a 0.05: Park et al. (2024)."""
    total = 0.0
    mine, other = said(policy), said(reference)
    for n in range(PAIRS):
        chosen = 0.3 * (sum(mine[n]) - sum(other[n])) + 0.05 * len(mine[n])
        rejected = 0.3 * (sum(mine[PAIRS + n]) - sum(other[PAIRS + n])) + 0.05 * len(mine[PAIRS + n])
        total -= log_sigmoid(chosen - rejected)
    return total / PAIRS


def slow_orpo(policy: Given, reference: Given) -> float:
    """Hong et al. (2024), with lambda 0.3."""
    total = 0.0
    mine = said(policy)
    for n in range(PAIRS):
        p, q = (math.exp(sum(each) / len(each)) for each in (mine[n], mine[PAIRS + n]))
        total += -math.log(p) - 0.3 * log_sigmoid(math.log((p / (1 - p)) / (q / (1 - q))))
    return total / PAIRS


def weights_of_pairs(policy: Given) -> list[float]:
    """w(c) w(r), w = exp(mean over tokens of log p(token) - log sum_v p(v)^2): Zhou et al. (2024)."""
    mine, batch, weights = said(policy), pairs(), []
    for row, logits in enumerate(policy.logits.detach().double()):
        places = [place for place in range(TOKENS) if batch["answer_mask"][row, place]]
        expected = [math.log(float(logits[place - 1].softmax(-1).square().sum())) for place in places]
        weights.append(math.exp((sum(mine[row]) - sum(expected)) / len(places)))
    return [weights[n] * weights[PAIRS + n] for n in range(PAIRS)]


def slow_wpo(policy: Given, reference: Given, cost: Callable[[float], float]) -> float:
    """The mean of weight x cost(margin). The weights are those of the policy before it is moved: they have no gradient."""
    total = 0.0
    mine, other, weights = said(policy), said(reference), weights_of_pairs(Given(2))
    for n in range(PAIRS):
        margin = 0.3 * (sum(mine[n]) - sum(other[n]) - sum(mine[PAIRS + n]) + sum(other[PAIRS + n]))
        total += weights[n] * cost(margin)
    return total / PAIRS


@pytest.mark.parametrize(
    ("slow", "params"),
    [
        (slow_r_dpo, {"loss": "sigmoid", "length_penalty": 0.05}),
        (slow_orpo, {"loss": "orpo"}),
        (partial(slow_wpo, cost=lambda m: -log_sigmoid(m)), {"loss": "sigmoid", "policy_weighting": True}),
        (partial(slow_wpo, cost=lambda m: max(0.0, 1 - m)), {"loss": "hinge", "policy_weighting": True}),
    ],
    ids=["r-dpo", "orpo", "wpo", "wpo of hinge"],
)
def test_a_formula_in_a_slow_loop(slow: Callable[[Given, Given], float], params: dict[str, Any]) -> None:
    """The value, and at some of the logits the gradient by central differences."""
    value, gradient = with_gradient(ours, beta=0.3, **params)
    assert value == pytest.approx(slow(Given(2), Given(3)), rel=1e-6)
    for place in [(0, 3, 1), (1, 2, 4), (5, 6, 0), (7, 3, 6)]:
        values = []
        for step in (1e-4, -1e-4):
            moved = Given(2).double()
            with torch.no_grad():
                moved.logits[place] += step
            values.append(slow(moved, Given(3)))
        assert abs(values[0] - values[1]) > 1e-8, "nothing is learned at this place"
        assert float(gradient[place]) == pytest.approx((values[0] - values[1]) / 2e-4, abs=1e-6), place


def test_pairs_are_sorted_in_their_groups() -> None:
    """Groups of two of four pairs are what two batches of two are in the mean, and not what one batch of four is."""
    policy, reference = Given(2), Given(3)
    whole = float(ours(policy, reference, loss="aot", beta=0.3).detach())
    grouped = float(ours(policy, reference, loss="aot", beta=0.3, group_pairs=2).detach())
    batch = pairs()
    with torch.no_grad():
        mine, other = answer_logprobs(policy, batch), answer_logprobs(reference, batch)
    ratio_N, ref_ratio_N = (each[:PAIRS] - each[PAIRS:] for each in (mine, other))
    halves = []
    for half in (slice(0, 2), slice(2, 4)):
        delta = ratio_N[half].sort().values - ref_ratio_N[half].sort().values
        halves += [-log_sigmoid(0.3 * float(each)) for each in delta]
    assert grouped == pytest.approx(sum(halves) / 4, rel=1e-6)
    assert abs(whole - grouped) > 1e-3, "the groups would not be seen"
