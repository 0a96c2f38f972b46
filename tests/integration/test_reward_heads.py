"""The reward stage beyond pairs: answers that are good or bad, ratings, ensembles and steps; what is published, and who reads it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

from pipeline.cards.usage import SCORE_STEPS, usage
from pipeline.errors import ArtifactError, DataError
from pipeline.recipe.outside import kind_of_folder
from pipeline.settings.resources import Resources
from pipeline.stage import Context, Estimate, Forecast, Result
from pipeline.store.artifact import Kind
from stages.alignment.reward import STAGE, RewardParams, kind_of_reward
from stages.evaluation.evaluate import STAGE as EVALUATE
from stages.lib.models.heads import fresh_value, load_value
from stages.lib.on_policy.scoring import RewardModelScorer
from stages.lib.preferring.reward_models import fixed_prompt_scores, load_reward_model, score_chats
from stages.lib.rows.canonical import read_rows
from stages.lib.text.chat_spans import encode_chat, encode_prompt
from tests.integration.on_policy_world import align
from tests.integration.preference_world import (
    PreferenceWorld,
    as_rated,
    as_steps,
    make_preference_world,
    remade,
    run,
    run_in_processes,
    unpaired_of,
)

pytestmark = pytest.mark.slow

TRAINING: dict[str, Any] = {
    "global_batch_size": 8,
    "learning_rate": 3e-3,
    "max_length_tokens": 256,
    "max_steps": 40,
}
WEIGHTS = {"quality": 1.0, "brevity": 0.5}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "good or bad": ("unpaired_preferences", {"max_steps": 60}),
    "ratings": ("ratings", {"attributes": WEIGHTS, "heads": 3, "bootstrap": True, "max_steps": 100}),
    "pairs": ("preferences", {"heads": 3}),
    "steps": ("step_labels", {"answer_score": "product"}),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> PreferenceWorld:
    return make_preference_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def data(world: PreferenceWorld, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    return {
        "preferences": world.preferences,
        "unpaired_preferences": unpaired_of(world.preferences, folder / "unpaired"),
        "ratings": remade(world.preferences, folder / "ratings", as_rated),
        "step_labels": remade(world.preferences, folder / "steps", as_steps),
    }


Training = Callable[[str], tuple[Result, Context]]


@pytest.fixture(scope="module")
def trained(world: PreferenceWorld, data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Training:
    """Each case, trained when it is first asked for."""
    made: dict[str, tuple[Result, Context]] = {}

    def train(case: str) -> tuple[Result, Context]:
        if case not in made:
            role, params = CASES[case]
            folder = tmp_path_factory.mktemp("trained")
            made[case] = run(STAGE, {"model": world.model, role: data[role]}, {**TRAINING, **params}, folder)
        return made[case]

    return train


def test_good_and_bad_answers_are_told_apart(trained: Training) -> None:
    metrics = trained("good or bad")[0].metrics
    assert metrics["heldout_auc"] > 0.75 > metrics["heldout_auc_base"]
    assert metrics["heldout_loss"] < metrics["heldout_loss_base"]


def test_ratings_are_learned_and_missing_ones_counted(trained: Training, data: dict[str, Path]) -> None:
    """A quarter of the rows does not rate brevity; the mean of training is what no model needs to say."""
    result, context = trained("ratings")
    assert result.metrics["heldout_mse"] < result.metrics["heldout_mse_mean"] < result.metrics["heldout_mse_base"]
    assert result.metrics["heldout_correlation_of_brevity"] > 0.5
    rows = [row for side in ("train", "heldout") for row in read_rows(data["ratings"] / f"{side}.jsonl")]
    missing = sum(row["ratings"]["brevity"] is None for row in rows)
    notes = [json.loads(line).get("text", "") for line in (context.work / "journal.jsonl").read_text().splitlines()]
    assert f"ratings that are missing, and are left out of the loss: brevity {missing}" in notes
    assert any(f"and that are not learned: unread ({len(rows)} ratings)" in note for note in notes)


def test_metrics_of_ratings_are_those_of_plain_transformers(trained: Training, data: dict[str, Path]) -> None:
    """Outputs head by head, of each brevity and quality; means over heads against the ratings that there are."""
    result, context = trained("ratings")
    model = AutoModelForSequenceClassification.from_pretrained(context.out).eval()
    assert model.config.num_labels == 6
    assert list(model.config.id2label.values())[:3] == ["brevity_0", "quality_0", "brevity_1"]
    assert model.config.slipway_reward == {"heads": 3, "attributes": ["brevity", "quality"], "weights": [0.5, 1.0]}
    tokenizer = AutoTokenizer.from_pretrained(context.out)
    rows = list(read_rows(data["ratings"] / "heldout.jsonl"))
    chats = [[*row["prompt"], *row["completion"]] for row in rows]
    outputs = [logits_of(model, encode_chat(tokenizer, chat, mask_from=len(chat) - 1).input_ids)[0] for chat in chats]
    of_heads_N32 = np.stack(outputs).reshape(-1, 3, 2)
    rated_N2 = np.array([[row["ratings"][name] for name in ("brevity", "quality")] for row in rows], dtype=float)
    error_N2 = (of_heads_N32.mean(1) - rated_N2) ** 2
    for number, name in enumerate(("brevity", "quality")):
        assert result.metrics[f"heldout_mse_of_{name}"] == pytest.approx(np.nanmean(error_N2[:, number]), abs=1e-4)
    assert result.metrics["heldout_mse"] == pytest.approx(np.nanmean(error_N2), abs=1e-4)
    whole_N = ~np.isnan(rated_N2).any(axis=1)
    weights = np.array([0.5, 1.0])
    pair = (of_heads_N32.mean(1)[whole_N] @ weights, rated_N2[whole_N] @ weights)
    assert result.metrics["heldout_correlation"] == pytest.approx(np.corrcoef(*pair)[0, 1], abs=1e-4)
    score_N3 = of_heads_N32 @ weights
    assert result.metrics["heldout_head_deviation"] == pytest.approx(score_N3.std(axis=1).mean(), abs=1e-4)
    loaded = load_reward_model(context.out)
    assert score_chats(*loaded, chats[:5]) == pytest.approx(score_N3.mean(1)[:5].tolist(), abs=1e-5)


def logits_of(model: Any, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        found: np.ndarray = model(input_ids=torch.tensor([ids])).logits.double().numpy()
    return found


def test_an_ensemble_of_pairs(trained: Training) -> None:
    metrics = trained("pairs")[0].metrics
    assert metrics["heldout_accuracy"] > 0.9
    assert metrics["heldout_head_deviation"] > 0


def test_steps_are_judged(trained: Training, data: dict[str, Path]) -> None:
    """Every step and every answer again, by plain transformers, at the last token of each step with its separator."""
    result, context = trained("steps")
    assert result.metrics["heldout_accuracy"] > 0.85 > result.metrics["heldout_accuracy_base"]
    assert result.facts.head_type == "process_reward"
    model = AutoModelForTokenClassification.from_pretrained(context.out).eval()
    tokenizer = AutoTokenizer.from_pretrained(context.out)
    right, answers = [], []
    for row in read_rows(data["step_labels"] / "heldout.jsonl"):
        ids, ends = encode_prompt(tokenizer, row["prompt"]), []
        for step in row["steps"]:
            ids += tokenizer(step["content"] + "\n\n", add_special_tokens=False)["input_ids"]
            ends.append(len(ids) - 1)
        if len(ids) > 256:
            continue
        said = [1 / (1 + math.exp(bad - good)) for bad, good in logits_of(model, ids)[0][ends]]
        right += [(p > 0.5) == label for p, label in zip(said, row["labels"], strict=True) if label is not None]
        if None not in row["labels"]:
            answers.append((math.prod(said) > 0.5) == all(row["labels"]))
        chat = [*row["prompt"], {"role": "assistant", "content": "\n\n".join(s["content"] for s in row["steps"])}]
        if all("\n\n" not in step["content"] for step in row["steps"]) and len(right) < 8:
            assert score_chats(*load_reward_model(context.out), [chat]) == pytest.approx([math.prod(said)], abs=1e-5)
    said_by_card: dict[str, Any] = {}
    exec(SCORE_STEPS.format(folder=f"folder = {str(context.out)!r}\n"), said_by_card)
    assert len(said_by_card["right"]) == 2 and said_by_card["score"] == min(said_by_card["right"])
    assert result.metrics["heldout_accuracy"] == pytest.approx(np.mean(right), abs=1e-9)
    assert result.metrics["heldout_answer_accuracy"] == pytest.approx(np.mean(answers), abs=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_what_is_published_is_known_again(trained: Training, case: str) -> None:
    result, context = trained(case)
    role, params = CASES[case]
    kind = kind_of_reward(RewardParams(**{**TRAINING, **params}), {role: Kind.TEXT})
    assert kind_of_folder(context.out) is kind
    model, tokenizer = load_reward_model(context.out)
    assert fixed_prompt_scores(model, tokenizer) == pytest.approx(result.facts.fixed_prompt_scores)
    chat = [
        {"role": "user", "content": "Good morning! How are you?"},
        {"role": "assistant", "content": "Good morning! I am well, thank you. What can I do for you?"},
    ]
    said: dict[str, Any] = {}
    code = usage(
        kind, chats=True, several_outputs="slipway_reward" in json.loads((context.out / "config.json").read_text())
    )
    exec(code.replace('folder = "."', f'folder = "{context.out}"').replace("print(", "repr("), said)
    if case != "steps":
        assert said["score"] == pytest.approx(score_chats(model, tokenizer, [chat])[0], abs=1e-5)
    else:
        ask = [
            {"role": "user", "content": "What is 2 * 3 + 4?"},
            {"role": "assistant", "content": "2 * 3 = 6.\n\n6 + 4 = 10."},
        ]
        assert math.prod(said["right"]) == pytest.approx(score_chats(model, tokenizer, [ask])[0], abs=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_completions_are_scored_as_chats_are(trained: Training, case: str, world: PreferenceWorld) -> None:
    """In batches, padded, and with a penalty: the mean less twice the deviation over heads, which `score_chats` knows nothing of."""
    folder = trained(case)[1].out
    rows = list(read_rows(world.preferences / "heldout.jsonl"))[:5]
    chats = [[*row["prompt"], *row["chosen"]] for row in rows]
    scorer = RewardModelScorer(folder, None, "fp32", torch.device("cpu"), 2)
    alone = score_chats(*load_reward_model(folder), chats)
    assert scorer.score(chats) == pytest.approx(alone, abs=1e-5)
    options = (folder, None, "fp32", torch.device("cpu"), 2, 2.0)
    if case in ("good or bad", "steps"):
        with pytest.raises(
            ArtifactError, match=r"has one head, and uncertainty_penalty is 2.*Remove uncertainty_penalty"
        ):
            RewardModelScorer(*options)
        return
    careful = RewardModelScorer(*options)
    model, tokenizer = load_reward_model(folder)
    weights = np.array([0.5, 1.0] if case == "ratings" else [1.0])
    for chat, score in zip(chats, careful.score(chats), strict=True):
        ids = encode_chat(tokenizer, chat, mask_from=len(chat) - 1).input_ids
        of_heads_3 = logits_of(model, ids)[0].reshape(3, -1) @ weights
        assert score == pytest.approx(of_heads_3.mean() - 2 * of_heads_3.std(), abs=1e-5)


@pytest.mark.parametrize(("case", "source"), [("ratings", "reward model"), ("steps", "policy")])
def test_a_policy_learns_from_it(
    trained: Training, case: str, source: str, world: PreferenceWorld, tmp_path: Path
) -> None:
    """The reward of each completion is the score of its text; the critic begins with a backbone that judges whole answers."""
    judge = trained(case)[1].out
    inputs = {"model": world.model, "prompts": world.preferences, "reward": judge}
    rewards = [{"kind": "reward_model", "uncertainty_penalty": 1.0 if case == "ratings" else 0.0}]
    changes = {"rewards": rewards, "rollouts": 1, "max_prompt_tokens": 200}
    seen = align("ppo", inputs, tmp_path, changes)
    journal = (tmp_path / "journal.jsonl").read_text()
    assert f"the critic starts from the {source} with a head of zeros" in journal
    scorer = RewardModelScorer(judge, None, "fp32", torch.device("cpu"), 1, rewards[0]["uncertainty_penalty"])
    rows = list(read_rows(world.preferences / "train.jsonl"))
    for each in seen.experiences[0].episodes[:4]:
        ids = each.ids[:-1] if each.ended else each.ids
        text = world.tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        chat = [*rows[each.row_index]["prompt"], {"role": "assistant", "content": text}]
        assert each.rewards.tolist() == pytest.approx(scorer.score([chat]), abs=1e-5)


def test_evaluate_reads_all_of_them(trained: Training, world: PreferenceWorld, tmp_path: Path) -> None:
    """Accuracy on pairs that all can read, again from `score_chats`; of the ensemble with its uncertainty, which the other lacks."""
    judges = {f"reward_models.{case.split()[0]}": trained(case)[1].out for case in CASES}
    inputs = {"models.base": world.model, "preferences": world.preferences, **judges}
    result, _ = run(EVALUATE, inputs, {"heldout_pairs": 12}, tmp_path / "all")
    rows = list(read_rows(world.preferences / "heldout.jsonl"))[:12]
    for case in CASES:
        loaded = load_reward_model(trained(case)[1].out)
        chosen, rejected = (
            score_chats(*loaded, [[*row["prompt"], *row[side]] for row in rows]) for side in ("chosen", "rejected")
        )
        name = case.split()[0]
        accuracy = np.mean([a > b for a, b in zip(chosen, rejected, strict=True)])
        assert result.metrics[f"heldout_reward_accuracy.{name}"] == pytest.approx(accuracy)
    ensemble = {role: path for role, path in inputs.items() if not role.endswith((".good", ".steps"))}
    careful, _ = run(EVALUATE, ensemble, {"heldout_pairs": 12, "uncertainty_penalty": 2.0}, tmp_path / "careful")
    name = "heldout_reward_margin.ratings"
    assert careful.metrics[name] != result.metrics[name]
    with pytest.raises(ArtifactError, match=r"inputs\.reward_models\.good: has one head"):
        run(EVALUATE, inputs, {"heldout_pairs": 12, "uncertainty_penalty": 2.0}, tmp_path / "refused")


def test_an_adapter_for_steps(world: PreferenceWorld, data: dict[str, Path], tmp_path: Path) -> None:
    """The head is new and whole; what is published is the whole model, read like any other."""
    params = {**TRAINING, "max_steps": 20, "learning_rate": 1e-2, "adapter": {"method": "lora", "rank": 4}}
    result, context = run(STAGE, {"model": world.model, "step_labels": data["step_labels"]}, params, tmp_path)
    assert result.metrics["heldout_loss"] < result.metrics["heldout_loss_base"]
    assert kind_of_folder(context.out) is Kind.PROCESS_REWARD_MODEL
    assert fixed_prompt_scores(*load_reward_model(context.out)) == pytest.approx(result.facts.fixed_prompt_scores)


def test_a_critic_has_one_output(trained: Training) -> None:
    """It starts from an ensemble's backbone, under a head of zeros with one output, and is never an ensemble itself."""
    folder = trained("ratings")[1].out
    value = fresh_value(folder, 2, is_reward_model=True)
    assert (value.score.weight.shape, float(value.score.weight.detach().abs().max())) == ((1, 48), 0.0)
    assert "slipway_reward" not in value.config.to_dict()
    with pytest.raises(ArtifactError, match="gives 6 scores, and a critic gives one"):
        load_value(folder)


@pytest.mark.parametrize("case", ["ratings", "steps"])
def test_two_processes_train_the_same(
    trained: Training, case: str, world: PreferenceWorld, data: Any, tmp_path: Path
) -> None:
    """Losses of ten steps agree to 1e-5, and so do the metrics: who reads a row changes neither its samples nor the mean."""
    role, params = CASES[case]
    asked = {**TRAINING, **params, "max_steps": 10}
    _, alone = run(STAGE, {"model": world.model, role: data[role]}, asked, tmp_path / "one")
    lines = map(json.loads, (alone.work / "journal.jsonl").read_text().splitlines())
    losses = [line["loss"] for line in lines if line["event"] == "step"]
    both = run_in_processes("reward", {"model": world.model, role: data[role]}, asked, tmp_path / "two", 2, None)
    assert both["losses"] == pytest.approx(losses, abs=1e-5)


def told(roles: list[str], params: dict[str, Any]) -> list[str]:
    known = {role: Estimate(train_rows=80) for role in roles}
    forecast = Forecast(RewardParams(**{**TRAINING, **params}), Resources(device="cpu"), known)
    return [str(problem) for problem in STAGE.check(forecast)]


def test_what_the_input_does_not_use_is_refused() -> None:
    assert any("have nothing to learn from Add one of preferences," in each.replace(". ", " ") for each in told([], {}))
    assert any("have preferences and ratings" in each for each in told(["preferences", "ratings"], {}))
    assert any("params.attributes: is missing" in each for each in told(["ratings"], {}))
    (unused,) = told(["ratings"], {"attributes": WEIGHTS, "margin": 1.0})
    assert "params.margin: has no effect on the input ratings" in unused
    (unused,) = told(["step_labels"], {"heads": 2})
    assert "params.heads: has no effect on the input step_labels" in unused
    assert told(["step_labels"], {"answer_score": "last"}) == []


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"rating_loss": "ordinal"}, "needs rating_levels"),
        ({"rating_levels": [0, 1]}, "have no effect with rating_loss squared"),
        ({"rating_loss": "ordinal", "rating_levels": [1, 1]}, "must rise"),
        ({"bootstrap": True}, "raise heads"),
        ({"attributes": {"a": 0.0}}, "all weights are 0"),
        ({"attributes": {"a b": 1.0, "a_b": 1.0}}, "two of the names are the same"),
    ],
)
def test_params_that_do_not_go_together(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardParams(**{**TRAINING, **params})


def test_ratings_that_are_not_there_are_named_all_at_once(world: PreferenceWorld, data: Any, tmp_path: Path) -> None:
    params = {
        **TRAINING,
        "attributes": {"quality": 1.0, "wit": 1.0},
        "rating_loss": "ordinal",
        "rating_levels": [0, 1, 2, 3],
    }
    with pytest.raises(DataError) as error:
        run(STAGE, {"model": world.model, "ratings": data["ratings"]}, params, tmp_path)
    said = str(error.value)
    assert said.count("no row rates wit; rated are: brevity (") == 2
    assert "ratings are none of the levels: 4 (" in said


def test_identities_of_recipes_that_say_nothing_of_it_stay() -> None:
    """What has its default is no part of the identity."""
    plain = RewardParams(**TRAINING).model_dump()
    new = {"attributes", "rating_loss", "rating_levels", "heads", "bootstrap", "step_separator", "answer_score"}
    assert not new & plain.keys()
    assert new <= RewardParams.model_fields.keys()
