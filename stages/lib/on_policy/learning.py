"""Learning from a rollout: one optimizer step on some of its episodes, all processes together."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pipeline.stage import Context
from pipeline.store.numbers import require_finite
from stages.lib.formulas import policy_gradient as pg
from stages.lib.formulas.policy_table import AGGREGATIONS
from stages.lib.formulas.token_losses import Tensors
from stages.lib.on_policy.actor_critic import Judged
from stages.lib.on_policy.experience import PER_TOKEN, Episode, Experience, collate_episodes
from stages.lib.on_policy.params import OnPolicyParams
from stages.lib.on_policy.parts import Algorithm, Parts
from stages.lib.processes.collectives import all_reduce_sum
from stages.lib.training.evaluating import Metrics
from stages.lib.training.params import Batch, learning_rate_factor
from stages.lib.training.scheduling import seed_of

HINT = "Lower the learning rate, lengthen the warmup, or look at the rewards."


@dataclass
class Learner:
    """Takes optimizer steps."""

    ctx: Context
    params: OnPolicyParams
    algorithm: Algorithm
    parts: Parts
    batch: Batch

    def optimize(self, experience: Experience, chosen: Sequence[int], step: int) -> Metrics:
        """Optimizer step `step` on the chosen episodes, all processes together; its sums divided by what they count.

        Raises `DataError` before anything is changed where a part of the loss or a gradient is not finite.
        """
        started = time.monotonic()
        params, ctx, engine = self.params, self.ctx, self.parts.engine
        episodes = [experience.episodes[index] for index in chosen]
        tokens = float(sum(self.learned_tokens(each) for each in episodes))
        # There are none where all completions were cut off, and those are left out.
        counted = max(self.counted(episodes), 1.0)
        share = len(chosen) // ctx.world.size
        mine = episodes[ctx.world.rank * share : (ctx.world.rank + 1) * share]
        micro = self.batch.micro_batch_size * params.completions_per_row
        batches = [self.parts.to_device(self.collate(mine[start : start + micro])) for start in range(0, share, micro)]
        torch.manual_seed(seed_of(ctx.seed, step))  # for what is drawn without being seen in what comes out
        totals: Tensors = {}
        if self.parts.mixture is not None:
            self.parts.mixture.add_gradients(engine, step, params.ptx_coefficient, totals)
        for number, batch in enumerate(batches):
            engine.backward(partial(self.loss, batch, counted, totals), last=number == len(batches) - 1)
        names = sorted(totals)
        sums = dict(zip(names, all_reduce_sum([float(totals[name]) for name in names]), strict=True))
        stats = self.means(sums, counted, tokens)
        require_finite(stats, f"step {step + 1}", HINT)
        factor = learning_rate_factor(params, step, params.total_steps)
        stats["gradient_norm"] = engine.step([rate * factor for rate in self.parts.rates]).gradient_norm
        require_finite(stats, f"step {step + 1}", HINT)
        stats |= {"tokens": tokens, "seconds": time.monotonic() - started}
        return stats

    def taught_by(self, experience: Experience) -> Experience:
        """Those episodes of a rollout that the passes go over: all."""
        return experience

    def counted(self, episodes: Sequence[Episode]) -> float:
        """What the loss of a step is divided by: its tokens."""
        return float(sum(self.learned_tokens(each) for each in episodes))

    def means(self, sums: Metrics, counted: float, tokens: float) -> Metrics:
        """What is logged of a step, from the sums that `loss` added up over all micro batches."""
        stats = {name: value if name == "ptx_loss" else value / counted for name, value in sums.items()}
        deviation = max(0.0, stats.pop("ratio_squares") - stats["ratio"] ** 2) ** 0.5
        stats["ratio_deviation"] = deviation
        return stats

    def learned_tokens(self, episode: Episode) -> int:
        """How many of its tokens are in the loss: all that the policy wrote, or none where it was cut off and such completions are left out."""
        return 0 if self.params.mask_truncated_completions and not episode.ended else episode.num_said

    def collate(self, episodes: Sequence[Episode]) -> Tensors:
        """A micro batch, whose mask covers the tokens that are in the loss; as behind an end, all is 0 outside of it."""
        batch = collate_episodes(episodes, self.parts.padding_id)
        for row, each in enumerate(episodes):
            if not self.learned_tokens(each):
                for name in {"mask", *PER_TOKEN} & set(batch):
                    batch[name][row] = 0
        return batch

    def loss(self, batch: Tensors, tokens: float, totals: Tensors) -> Tensor:
        """This micro batch's part of the loss, which is one over the `tokens` of all micro batches of all processes.

        L = L_policy (+ beta KL) + c_value L_value - c_entropy H: the first two as `loss_aggregation` adds up tokens, the
        others as their mean, each summed over tokens and divided by what is known of the whole step: so neither micro batch
        nor number of processes changes it. Adds the sums of what is logged to `totals`, in double precision.
        """
        params = self.params
        mask = batch["mask"]
        judged: Judged = self.parts.engine.forward(batch["input_ids"], batch["attention_mask"], mask.shape[1])
        # exp of what the policy says of padding may be infinite, and 0 times that is no number.
        logp, old = judged.logprobs.masked_fill(mask == 0, 0.0), batch["logprobs"]
        policy, clipped = params.loss_row.function(logp, old, batch["advantages"], mask, **params.policy_loss_options)
        weights = pg.mismatch_weights(old, batch["generator_logprobs"], cap=params.mismatch_cap)
        counts = AGGREGATIONS[params.aggregation](
            mask.sum(dim=1, keepdim=True),
            tokens=tokens,
            completions=params.global_batch_size,
            max_new_tokens=params.max_new_tokens,
        )
        terms = {"policy_loss": policy * weights * counts, "entropy": judged.entropy}
        loss = terms["policy_loss"] * mask
        if params.entropy_coefficient:
            loss = loss - params.entropy_coefficient * judged.entropy * mask
        if self.algorithm.kl_in_loss and params.kl_coefficient:
            terms["kl_loss"] = pg.KL_ESTIMATORS[params.kl_estimator](logp, batch["ref_logprobs"]) * counts
            loss = loss + params.kl_coefficient * terms["kl_loss"] * mask
        if judged.values is not None:
            terms["value_loss"], terms["value_clipped"] = self.algorithm.value_loss(judged.values, batch)
            loss = loss + self.algorithm.value_coefficient * terms["value_loss"] * mask
        with torch.no_grad():
            ratio = (logp - old).exp()
            terms |= {
                "clipped": clipped,
                "ratio": ratio,
                "ratio_squares": ratio.double().square(),  # whose mean is compared with the square of the mean
                # Of the policy that wrote the completions from the one now, estimated by k3.
                "policy_kl": pg.k3(old, logp),
                "loss": loss,
            }
            for name, value in terms.items():
                totals[name] = totals.get(name, 0.0) + (value.detach().double() * mask).sum()
        return loss.sum() / tokens * self.ctx.world.size
