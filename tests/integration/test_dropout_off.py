"""Where probabilities are compared nothing is dropped, however a class does it; a class that does not heed the mode is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
)

from pipeline.errors import ArtifactError
from stages import STAGES
from stages.lib.models.loading import load_language_model
from stages.lib.preferring.reward_models import load_reward_model
from tests.integration.on_policy_world import (
    OnPolicyWorld,
    align,
    make_on_policy_world,
    write_policy,
    write_reward_model,
)
from tests.integration.preference_world import PreferenceWorld, make_preference_world, run
from tests.integration.tiny_language_model import write_tokens

pytestmark = pytest.mark.slow

REFUSED = r"gives the same tokens other numbers each time it is called .*although it is in evaluation mode"


class ForgetfulConfig(LlamaConfig):
    model_type = "forgetful_llama"
    forgetting: float = 0.0


def forget(module: Any, output: Any) -> Any:
    """Dropout by a call that does not say in which mode the model is, as is easily written."""
    output.logits = functional.dropout(output.logits, module.config.forgetting)
    return output


class ForgetfulLlama(LlamaForCausalLM):
    config_class = ForgetfulConfig

    def forward(self, *arguments: Any, **options: Any) -> Any:
        return forget(self, super().forward(*arguments, **options))


class ForgetfulScores(LlamaForSequenceClassification):
    config_class = ForgetfulConfig

    def forward(self, *arguments: Any, **options: Any) -> Any:
        return forget(self, super().forward(*arguments, **options))


class ForgetfulBody(LlamaModel):
    config_class = ForgetfulConfig


AutoConfig.register("forgetful_llama", ForgetfulConfig, exist_ok=True)
for auto_class, made in (
    (AutoModel, ForgetfulBody),
    (AutoModelForCausalLM, ForgetfulLlama),
    (AutoModelForSequenceClassification, ForgetfulScores),
):
    auto_class.register(ForgetfulConfig, made, exist_ok=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> PreferenceWorld:
    return make_preference_world(tmp_path_factory.mktemp("preferences"), num_pairs=60, heldout=20)


@pytest.fixture(scope="module")
def own_completions(tmp_path_factory: pytest.TempPathFactory) -> OnPolicyWorld:
    return make_on_policy_world(tmp_path_factory.mktemp("on_policy"))


def write(folder: Path, tokenizer: Any, forgetting: float, model_class: Any = ForgetfulLlama) -> Path:
    torch.manual_seed(0)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = ForgetfulConfig(
        vocab_size=len(tokenizer), **sizes, max_position_embeddings=512, forgetting=forgetting, num_labels=1, **ids
    )
    model_class(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def mend(folder: Path) -> None:
    """Does what the message says."""
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps({**config, "forgetting": 0.0}))


DPO = {"max_length_tokens": 256, "global_batch_size": 8, "max_steps": 2, "learning_rate": 1e-3}


def test_a_reference_that_forgets_is_refused_and_taken_once_its_rate_is_0(
    world: PreferenceWorld, tmp_path: Path
) -> None:
    inputs = {"model": world.model, "preferences": world.preferences}
    inputs["reference"] = write(tmp_path / "reference", world.tokenizer, 0.2)
    with pytest.raises(ArtifactError, match=REFUSED):
        run(STAGES["dpo"], inputs, DPO, tmp_path / "refused")
    mend(inputs["reference"])
    run(STAGES["dpo"], inputs, DPO, tmp_path / "taken")


def test_a_model_that_forgets_is_refused_before_it_is_trained(world: PreferenceWorld, tmp_path: Path) -> None:
    """By `reward`, which trains with dropout, because what it measures on held-out pairs would be another number each time."""
    inputs = {"model": write(tmp_path / "model", world.tokenizer, 0.2), "preferences": world.preferences}
    with pytest.raises(ArtifactError, match=REFUSED):
        run(STAGES["reward"], inputs, DPO, tmp_path / "refused")
    mend(inputs["model"])
    run(STAGES["reward"], inputs, DPO, tmp_path / "taken")


def test_a_teacher_that_forgets_is_refused(world: PreferenceWorld, tmp_path: Path) -> None:
    texts = [f"The value of {number} is {number * 7}." for number in range(400)]
    inputs = {
        "teacher": write(tmp_path / "teacher", world.tokenizer, 0.2),
        "tokens": write_tokens(tmp_path / "tokens", world.tokenizer, texts),
    }
    params = {
        "architecture": {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
                         "num_attention_heads": 4, "max_position_embeddings": 64},
        "global_batch_size": 4, "max_steps": 2, "learning_rate": 1e-3,
    }  # fmt: skip
    with pytest.raises(ArtifactError, match=rf"inputs\.teacher: .*{REFUSED}"):
        run(STAGES["distill"], inputs, params, tmp_path / "refused")
    mend(inputs["teacher"])
    run(STAGES["distill"], inputs, params, tmp_path / "taken")


def test_what_is_measured_or_scores_may_not_forget(world: PreferenceWorld, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", world.tokenizer, 0.2)
    with pytest.raises(ArtifactError, match=REFUSED):
        load_language_model(folder)
    mend(folder)
    load_language_model(folder)
    scores = write(tmp_path / "scores", world.tokenizer, 0.2, ForgetfulScores)
    with pytest.raises(ArtifactError, match=REFUSED):
        load_reward_model(scores)
    mend(scores)
    load_reward_model(scores)


@pytest.mark.parametrize("role", ["model", "reference", "reward"])
def test_no_part_of_training_on_own_completions_may_forget(
    own_completions: OnPolicyWorld, tmp_path: Path, role: str
) -> None:
    inputs = {**own_completions.inputs}
    tokenizer = own_completions.tokenizer
    if role == "reward":
        inputs["reward"] = write(tmp_path / role, tokenizer, 0.2, ForgetfulScores)
    else:
        inputs[role] = write(tmp_path / role, tokenizer, 0.2)
    changes = {"kl_coefficient": 0.1, **({"rewards": [{"kind": "reward_model"}]} if role == "reward" else {})}
    with pytest.raises(ArtifactError, match=REFUSED):
        align("ppo", inputs, tmp_path / "refused", changes)
    mend(inputs[role])
    align("ppo", inputs, tmp_path / "taken", {**changes, "rollouts": 1})


# Classes that heed the mode, and drop by functions with rates of their own while they are trained.

DROPPING = {"residual_dropout": 0.3, "embedding_dropout": 0.3, "attention_dropout": 0.3}
"""Of Starcoder 2: no module of it is an `nn.Dropout`."""


@pytest.mark.parametrize("recomputed", [False, True])
def test_dpo_starts_at_log_2_whatever_the_class_calls(world: PreferenceWorld, tmp_path: Path, recomputed: bool) -> None:
    """-log sigmoid(0) = log 2, since policy and reference are one model; its gradients are those of the same passes."""
    from tests.distributed.training_world import write_model

    model = write_model(
        tmp_path / "model", world.tokenizer, model_type="starcoder2", max_position_embeddings=512, **DROPPING
    )
    inputs = {"model": model, "preferences": world.preferences}
    resources = {"gradient_checkpointing": recomputed}
    _, ctx = run(STAGES["dpo"], inputs, DPO, tmp_path / "run", resources=resources)
    assert next(iter(ctx.journal.events("step")))["loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_the_first_ratio_is_1_whatever_the_class_calls(
    own_completions: OnPolicyWorld, tmp_path: Path, kind: str
) -> None:
    model = write_policy(
        tmp_path / "model", own_completions.tokenizer, model_type="starcoder2", tie_word_embeddings=False, **DROPPING
    )
    seen = align(kind, {**own_completions.inputs, "model": model}, tmp_path / "run", {"rollouts": 1})
    first = seen.lines("step")[0]
    assert first["ratio"] == pytest.approx(1, abs=1e-6)
    assert first["ratio_deviation"] < 1e-5
    assert seen.lines("rollout")[0]["generator_logprob_gap"] < 1e-5


def test_what_is_random_otherwise_is_refused_where_probabilities_are_compared(
    world: PreferenceWorld, tmp_path: Path
) -> None:
    """Mixtral's routers jitter in training. Without it, as the message says, it is taken."""
    from tests.distributed.training_world import write_model

    options = {"model_type": "mixtral", "max_position_embeddings": 512, "num_local_experts": 4}
    for noise, taken in ((0.1, False), (0.0, True)):
        name = f"noise-{noise}"
        model = write_model(tmp_path / name, world.tokenizer, **options, router_jitter_noise=noise)
        inputs = {"model": model, "preferences": world.preferences}
        if taken:
            run(STAGES["dpo"], inputs, DPO, tmp_path / f"{name}-run")
        else:
            with pytest.raises(ArtifactError, match="even with its dropout switched off: its class draws at random"):
                run(STAGES["dpo"], inputs, DPO, tmp_path / f"{name}-run")


def test_the_reward_models_of_other_tests_are_taken(own_completions: OnPolicyWorld, tmp_path: Path) -> None:
    """A class that heeds the mode, with high rates."""
    folder = write_reward_model(tmp_path / "reward", own_completions.tokenizer, attention_dropout=0.5)
    load_reward_model(folder)
