"""What a recipe may say of the policy's loss: nothing that would be ignored, and each refusal names a way out that works."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import yaml

from pipeline.settings.strict import CHECKOUT, Strict, validate
from stages import STAGES
from stages.lib.formulas.policy_table import AGGREGATIONS, POLICY_LOSSES

PARAMS: dict[str, Any] = {
    "rewards": [{"kind": "length_penalty", "target_tokens": 4, "per_token": 0.1}],
    "rollouts": 3,
    "rollout_batch_size": 16,
    "global_batch_size": 8,
    "max_prompt_tokens": 24,
    "max_new_tokens": 8,
    "learning_rate": 1e-3,
}
NEEDED: dict[str, dict[str, float]] = {
    "ppo_clip": {},
    "gspo": {"clip_ratio": 3e-4},
    "gspo_token": {"clip_ratio": 3e-4},
    "cispo": {"clip_ratio_high": 4.0},
    "sapo": {},
}


def read(kind: str = "grpo", **more: Any) -> tuple[Any, list[str]]:
    model: type[Strict] = STAGES[kind].params
    params, problems = validate(model, {**PARAMS, **more}, "params")
    return params, [str(problem) for problem in problems]


def accepted(kind: str = "grpo", **more: Any) -> Any:
    params, problems = read(kind, **more)
    assert params is not None, problems
    return params


@pytest.mark.parametrize(
    ("given", "problem", "way_out"),
    [
        (
            {"policy_loss": "gspo"},
            (
                "params: the loss gspo needs clip_ratio: ratios of whole completions lie near 1, and 0.2 clips none of them:"
                " its authors take 0.0003, and 0.0004 above."
            ),
            {"policy_loss": "gspo", "clip_ratio": 0.0003, "clip_ratio_high": 0.0004},
        ),
        (
            {"policy_loss": "cispo"},
            (
                "params: the loss cispo needs clip_ratio_high: no importance weight is above 1 + it: 4.0 is that of ScaleRL."
            ),
            {"policy_loss": "cispo", "clip_ratio_high": 4.0},
        ),
        (
            {"policy_loss": "cispo", "clip_ratio": 0.1, "clip_ratio_high": 4.0},
            "params: clip_ratio has no effect with the loss cispo: remove it, or take ppo_clip, gspo or gspo_token.",
            {"policy_loss": "gspo_token", "clip_ratio": 0.1, "clip_ratio_high": 4.0},
        ),
        (
            {"policy_loss": "sapo", "clip_ratio_high": 0.28},
            (
                "params: clip_ratio_high has no effect with the loss sapo: remove it, or take ppo_clip, gspo, gspo_token or"
                " cispo."
            ),
            {"policy_loss": "sapo"},
        ),
        (
            {"policy_loss": "sapo", "dual_clip": 3.0},
            "params: dual_clip has no effect with the loss sapo: remove it, or take ppo_clip, gspo or gspo_token.",
            {"policy_loss": "ppo_clip", "dual_clip": 3.0},
        ),
        (
            {"loss_options": {"sapo_temperature_pos": 2.0}},
            (
                "params: loss_options.sapo_temperature_pos has no effect with the loss ppo_clip, which has no options:"
                " remove it, or take sapo."
            ),
            {"policy_loss": "sapo", "loss_options": {"sapo_temperature_pos": 2.0}},
        ),
        (
            {"policy_loss": "sapo", "loss_options": {"sapo_temperature_pos": 0.0}},
            (
                "params: loss_options.sapo_temperature_pos must be from 0.001 to 1000, not 0.0: how fast the gate closes for"
                " tokens of positive advantage."
            ),
            {"policy_loss": "sapo", "loss_options": {"sapo_temperature_pos": 0.5}},
        ),
        (
            {"dual_clip": 1.2},
            "params: dual_clip 1.2 must be above 1 + clip_ratio_high, which is 1.2: take 3, or remove it.",
            {"dual_clip": 3.0},
        ),
        (
            {"dual_clip": 3.0, "clip_ratio_high": 2.5},
            "params: dual_clip 3 must be above 1 + clip_ratio_high, which is 3.5: take more than that, or remove it.",
            {"dual_clip": 4.0, "clip_ratio_high": 2.5},
        ),
        (
            {"scale_by_deviation": False, "deviation_of": "batch"},
            ("params: deviation_of: batch has no effect with scale_by_deviation: false: remove one of them."),
            {"deviation_of": "batch"},
        ),
    ],
)
def test_what_has_no_effect_is_refused(given: Mapping[str, Any], problem: str, way_out: Mapping[str, Any]) -> None:
    params, problems = read(**given)
    assert params is None
    assert problems == [problem]
    accepted(**way_out)


@pytest.mark.parametrize("kind", ["ppo", "grpo", "rloo", "reinforce_plus_plus"])
@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_every_stage_takes_every_loss_and_every_aggregation(name: str, kind: str) -> None:
    """Without a word of how tokens are added up, it is as the row says."""
    assert accepted(kind, policy_loss=name, **NEEDED[name]).aggregation == POLICY_LOSSES[name].aggregation
    for aggregation in AGGREGATIONS:
        assert accepted(kind, policy_loss=name, loss_aggregation=aggregation, **NEEDED[name]).aggregation == aggregation


def test_what_the_functions_are_given() -> None:
    assert accepted().policy_loss_options == {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None}
    assert accepted(policy_loss="gspo", clip_ratio=3e-4, clip_ratio_high=4e-4).policy_loss_options == {
        "clip_low": 3e-4,
        "clip_high": 4e-4,
        "dual_clip": None,
    }
    assert accepted(policy_loss="cispo", clip_ratio_high=4.0).policy_loss_options == {"clip_high": 4.0}
    sapo = accepted(policy_loss="sapo", loss_options={"sapo_temperature_neg": 1.2})
    assert sapo.policy_loss_options == {"sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.2}


def test_a_wrong_name_is_told() -> None:
    for field, near in (("policy_loss", "gspo"), ("loss_aggregation", "token_mean")):
        params, problems = read(**{field: near[:-1]})
        assert params is None
        assert near in problems[0]


@pytest.mark.parametrize("kind", ["ppo", "grpo", "rloo", "reinforce_plus_plus"])
def test_what_is_not_said_has_no_part_in_the_identity(kind: str) -> None:
    """A recipe that was written before there were these fields makes what it made; once said, they count."""
    new = {"policy_loss", "loss_aggregation", "dual_clip", "loss_options", "mask_truncated_completions", "deviation_of"}
    assert not new & set(accepted(kind).model_dump(mode="json"))
    said = accepted("grpo", policy_loss="gspo", clip_ratio=3e-4, dual_clip=3.0, deviation_of="batch")
    assert {"policy_loss", "dual_clip", "deviation_of"} <= set(said.model_dump(mode="json"))


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_params_are_read_again_from_what_they_are_written_as(name: str) -> None:
    """A worker is given them with all defaults filled in."""
    params = accepted(policy_loss=name, **NEEDED[name])
    again, problems = validate(type(params), params.model_dump(mode="json"), "params")
    assert again == params, problems


def test_the_documented_blocks_are_what_they_are_called() -> None:
    """DAPO, Dr. GRPO and GSPO in stages/README.md: each is accepted, beside the usual params, and says what its authors do."""
    text = (CHECKOUT / "stages" / "README.md").read_text(encoding="utf-8")
    section = text.partition("## Losses of a policy on its own completions")[2]
    blocks = yaml.safe_load(section.partition("```yaml\n")[2].partition("```")[0])
    made = {name: accepted(**block) for name, block in blocks.items()}
    dapo, dr_grpo, gspo = made["dapo"], made["dr_grpo"], made["gspo"]
    assert (dapo.clip_ratio, dapo.clip_ratio_high, dapo.aggregation) == (0.2, 0.28, "token_mean")
    assert dapo.dynamic_sampling.metric == "exact_match"
    punishment = dapo.rewards[1]
    assert (dapo.max_new_tokens - punishment.target_tokens) * punishment.per_token == 1
    assert (dr_grpo.aggregation, dr_grpo.scale_by_deviation) == ("seq_mean_token_sum_norm", False)
    assert (gspo.policy_loss, gspo.aggregation) == ("gspo", "seq_mean_token_mean")
    assert gspo.policy_loss_options == {"clip_low": 3e-4, "clip_high": 4e-4, "dual_clip": None}
