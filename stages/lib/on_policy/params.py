"""What the recipes of stages say that train a policy on its own completions. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, model_validator

from pipeline.errors import did_you_mean, shown
from pipeline.settings.strict import Strict
from pipeline.stage import Input, accepts
from pipeline.store.artifact import Kind
from stages.lib.formulas.bounds import Scale, Temperature, Weight
from stages.lib.models.adapters.budget_params import AdaLoraMethod
from stages.lib.models.adapters.params import (
    BottleneckMethod,
    LoraMethod,
    require_comparable,
)
from stages.lib.on_policy.episode_params import EpisodeParams
from stages.lib.on_policy.loss_params import PolicyLossParams
from stages.lib.on_policy.reward_params import Rewards, reward_names
from stages.lib.text.template_date import TemplateDateParams
from stages.lib.training.params import AdaptedParams

INPUTS: dict[str, Input] = {
    "model": accepts(Kind.CAUSAL_LM),
    "prompts": accepts(
        *(Kind.PROMPTS, Kind.CHATS, Kind.PREFERENCES, Kind.UNPAIRED_PREFERENCES, Kind.RATINGS, Kind.STEP_LABELS),
        Kind.TEXT,
    ),
    "reward": accepts(Kind.REWARD_MODEL, Kind.PROCESS_REWARD_MODEL, optional=True),
    "reference": accepts(Kind.CAUSAL_LM, optional=True),
    "chats": accepts(Kind.CHATS, optional=True),
    "adapter": accepts(Kind.ADAPTER, Kind.CAUSAL_LM, optional=True),
}
"""`model`: the policy. `reward`: for the reward of the kind reward_model. `reference`: what the policy is held to, by
default the artifact of the policy itself. `chats`: what ptx_coefficient mixes in. `adapter`: one of the model, which is
trained further."""


WITHOUT_BOTTLENECKS = "is bottleneck, which puts networks between the layers that policy, critic and reference share"


def told_of_adapter(given: Any) -> None:
    """Raises `ValueError`, with the block to write, for low-rank adapters by the name that they had."""
    if given is None:
        return
    known = LoraMethod.model_fields
    fields = {name: value for name, value in given.items() if name in known} if isinstance(given, Mapping) else {}
    block = yaml.safe_dump({"method": "lora", **fields}, default_flow_style=True, sort_keys=False, width=10_000)
    raise ValueError(f"is a method of adapter now: write `adapter: {block.strip()}` in its place")


class OnPolicyParams(TemplateDateParams, PolicyLossParams, AdaptedParams):
    """What the stages have in common that learn from completions."""

    rewards: Rewards
    """What a completion is worth: the weighted sum of these rewards."""
    rollouts: int = Field(ge=1)
    """How often completions are written and then learned from."""
    rollout_batch_size: int = Field(ge=1)
    """Completions per rollout, over all processes."""
    global_batch_size: int = Field(ge=1)
    """Completions per optimizer step, over all processes; a divisor of rollout_batch_size."""
    epochs_per_rollout: int = Field(default=1, ge=1)
    """Passes over each rollout's completions, in minibatches of global_batch_size, in a new order each time."""
    rendering: Literal["chat", "raw"] = "chat"
    """chat: prompts are conversations (a text is one user message), rendered by the policy's own chat template. raw: the policy continues the text itself."""
    max_prompt_tokens: int = Field(ge=1)
    """Longest prompt, in tokens. A longer one is dropped and counted, never cut."""
    max_new_tokens: int = Field(ge=1)
    """Longest completion, in tokens, the one that ends it included; with `episodes`, of all turns and the observations between them."""
    max_dropped_fraction: float = Field(default=0.5, ge=0, lt=1)
    """The stage stops if a larger share of the prompts than this cannot be used."""
    temperature: Temperature = 1.0
    """Completions are drawn from softmax(logits / temperature), from 0.001 to 100, which is also the policy whose probabilities are trained."""
    missing_end_penalty: Weight = 0.0
    """What a completion loses that was cut off at the limit instead of ended by the policy."""
    normalize_rewards: bool = False
    """Whether rewards are shifted and scaled by mean and deviation of all rewards so far."""
    reward_clip: Scale | None = None
    """Rewards are kept within +- this, after they were normalized. null: as they are."""
    generation: Literal["transformers", "vllm"] = "transformers"
    """What writes completions. vllm: on GPUs, in the same processes; it is an optional part, see the README of stages/alignment."""
    kl_coefficient: Weight = 0.05
    """Beta: how dear each nat of divergence from the reference is. 0: no reference is loaded."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """How the divergence of a token is estimated: k1 = log pi - log ref, k2 = k1^2 / 2, k3 = ref / pi - 1 + k1."""
    entropy_coefficient: Weight = 0.0
    """Weight of the entropy bonus, per nat and token."""
    max_policy_kl: Scale | None = None
    """Ends a rollout's passes early once a minibatch is further than this, in nats per token, from the policy that wrote it."""
    ptx_coefficient: Weight = 0.0
    """Weight of the cross-entropy on the input `chats`, per token, mixed into every step (InstructGPT's PPO-ptx)."""
    ptx_batch_size: int | None = Field(default=None, ge=1)
    """Chats per optimizer step, over all processes. null: as many as completions."""
    ptx_max_length_tokens: int | None = Field(default=None, ge=8)
    """Tokens per chat; its oldest turns are dropped to fit. null: those of prompt and completion."""
    max_logprob_mismatch: Scale | None = None
    """Stops the run if the log-probabilities of generation and training differ by more than this on average, in nats per token."""
    mismatch_cap: Scale | None = None
    """Corrects that difference by weighting each token with the ratio of both probabilities, at most this. null: no correction."""
    background_rollouts: bool = Field(default=False, exclude_if=lambda asked: not asked)
    """Whether the completions of a rollout are written while the policy learns from the one before, by a copy of it as it was when that began: one rollout off-policy, which `mismatch_cap` corrects and must be given for. For completions of one turn, by transformers. A copy of the policy more lies in memory."""
    evaluate_every_rollouts: int | None = Field(default=None, ge=1)
    """Rollouts between measurements on held-out prompts. null: only before the first and after the last."""
    heldout_prompts: int = Field(default=64, ge=1)
    """Held-out prompts that the policy completes at each measurement: the first so many."""
    episodes: EpisodeParams | None = Field(default=None, exclude_if=lambda block: block is None)
    """Episodes of several turns: what a function of your own gives where the policy ends a turn, the policy reads, and writes on; it is in no loss, no divergence and no length. Rewards see the last turn, and in your own file all of them. null: a completion is one turn."""
    journal_samples: int = Field(default=2, ge=0)
    """Completions per rollout that are written to the journal, for reading."""
    lora: Annotated[None, BeforeValidator(told_of_adapter)] = None
    """What `adapter: {method: lora}` was called: null, which keeps the identity of what was made without."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number format of the forward and backward pass. Ratios of probabilities are too fine for fp16."""

    @property
    def group_size(self) -> int:
        """Completions of the same prompt in a rollout."""
        return 1

    @property
    def has_critic(self) -> bool:
        return False

    @property
    def completions_per_row(self) -> int:
        """Completions in each of what `global_batch_size` and `micro_batch_size` count."""
        return 1

    @property
    def rollout_rows(self) -> int:
        """How many of these a rollout has."""
        return self.rollout_batch_size

    @property
    def passes_steps(self) -> int:
        """Optimizer steps of one pass over a rollout."""
        return self.rollout_rows // self.global_batch_size

    @property
    def rollout_steps(self) -> int:
        """Optimizer steps of one rollout, if none is left out."""
        return self.passes_steps * self.epochs_per_rollout

    @property
    def total_steps(self) -> int:
        return self.rollouts * self.rollout_steps

    @model_validator(mode="after")
    def adapter_shares_a_backbone(self) -> OnPolicyParams:
        require_comparable(self.adapter)
        if isinstance(self.adapter, BottleneckMethod):
            raise ValueError(f"adapter: {WITHOUT_BOTTLENECKS}: take lora")
        if isinstance(self.adapter, AdaLoraMethod):
            raise ValueError(
                "adapter: adalora finds its ranks in trainings on fixed data alone: train it there, with publish: adapter, and "
                "go on here with `method: continued`, or take lora"
            )
        if getattr(self.adapter, "init", None) == "pissa":
            raise ValueError(
                "adapter: init must not be pissa, which is known to stages on fixed data alone: train it there and go on here "
                "with `method: continued`, or take init: default"
            )
        return self

    @model_validator(mode="after")
    def episodes_can_be_written(self) -> OnPolicyParams:
        if self.episodes is not None:
            self.episodes.require_fit(self.rendering, self.generation, self.max_new_tokens)
        return self

    @model_validator(mode="after")
    def background_fits(self) -> OnPolicyParams:
        if not self.background_rollouts:
            return self
        wrong = {
            "mismatch_cap must be given, which weights tokens by how far the policy has moved since they were written: such"
            " as 2.0": self.mismatch_cap is None,
            "max_logprob_mismatch would count what the policy has learned since: remove it": self.max_logprob_mismatch,
            "generation vllm has a GPU for itself only while nothing is learned: write transformers": self.generation
            == "vllm",
            "episodes of several turns are not written in the background: remove one of the two": self.episodes,
            "dynamic_sampling draws by what completions are worth, which is not known while others are learned from: remove"
            " one of the two": getattr(self, "dynamic_sampling", None),
            "rollouts is 1, and there is no next one to write: remove background_rollouts": self.rollouts == 1,
        }
        if found := [what for what, is_so in wrong.items() if is_so]:
            raise ValueError(f"background_rollouts: {'; '.join(found)}")
        return self

    @model_validator(mode="after")
    def sizes_fit(self) -> OnPolicyParams:
        if self.rollout_rows % self.global_batch_size:
            pairs = f" gives {self.rollout_rows} pairs, which" if self.completions_per_row == 2 else ""
            sizes = f"rollout_batch_size {self.rollout_batch_size}{pairs}"
            raise ValueError(f"{sizes} is not a multiple of global_batch_size {self.global_batch_size}")
        if self.rollout_batch_size % self.group_size:
            raise ValueError(
                f"rollout_batch_size {self.rollout_batch_size} is not a multiple of completions_per_prompt {self.group_size}"
            )
        if self.warmup_steps >= self.total_steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be below the {self.total_steps} optimizer steps")
        if not self.ptx_coefficient and (self.ptx_batch_size or self.ptx_max_length_tokens):
            raise ValueError("ptx_batch_size and ptx_max_length_tokens have no effect while ptx_coefficient is 0")
        return self


class DynamicSamplingParams(Strict):
    """Which prompts a rollout learns from: those whose completions differ in what they score (DAPO)."""

    metric: str | None = None
    """What must differ: the name of a reward, as its metrics call it (its kind, and from the second of a kind on with a number, as exact_match_2). null: the whole score, in which a penalty of length alone makes a difference."""
    max_num_gen_batches: int = Field(default=10, ge=1, le=1000)
    """Batches that are drawn for a rollout at most. Where it is reached, groups that teach nothing make up the number, and the journal says so."""
    gen_batch_size: int | None = Field(default=None, ge=1)
    """Completions per batch, over all processes; a multiple of completions_per_prompt. The smaller, the fewer groups are left over once there are enough. null: rollout_batch_size."""


class GroupParams(OnPolicyParams):
    """What algorithms have in common that compare several completions of each prompt."""

    completions_per_prompt: int = Field(default=4, ge=2)
    """Completions of each prompt in a rollout; a divisor of rollout_batch_size."""
    dynamic_sampling: DynamicSamplingParams | None = Field(default=None, exclude_if=lambda block: block is None)
    """Leave out prompts whose completions all score alike, and draw others in their place. null: learn from all that are drawn."""

    @property
    def group_size(self) -> int:
        return self.completions_per_prompt

    @model_validator(mode="after")
    def dynamic_sampling_fits(self) -> GroupParams:
        sampling, group, size = self.dynamic_sampling, self.completions_per_prompt, self.rollout_batch_size
        if sampling is None:
            return self
        names, batch = reward_names(self.rewards), sampling.gen_batch_size or size
        if sampling.metric is not None and sampling.metric not in names:
            hint = did_you_mean(sampling.metric, names)
            raise ValueError(f"dynamic_sampling.metric: there is no reward {shown(sampling.metric)} here ({hint})")
        if batch % group:
            raise ValueError(
                f"dynamic_sampling.gen_batch_size {batch} is not a multiple of completions_per_prompt {group}: take"
                f" {batch + group - batch % group}"
            )
        if batch * sampling.max_num_gen_batches <= size:
            raise ValueError(
                f"dynamic_sampling draws {batch * sampling.max_num_gen_batches} completions at most, and a rollout learns from"
                f" {size}, so that none could be left out: take max_num_gen_batches {size // batch + 1} or more"
            )
        return self
