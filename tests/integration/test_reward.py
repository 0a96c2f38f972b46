"""The reward stage on a tiny model and pairs of answers, and what a reward model's loader refuses."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

from pipeline.errors import ArtifactError, DataError, Problem
from pipeline.stage import Context, Estimate, Forecast, Result
from pipeline.store.artifact import MANIFEST, Facts, Kind, Manifest
from stages.alignment.reward import STAGE, RewardObjective, RewardParams, heldout_metrics
from stages.lib.models.heads import add_reward_head, choose_padding
from stages.lib.preferring.pairs import Pairs, collate_pairs, tokenizing_pairs
from stages.lib.preferring.reward_models import (
    FIXED_PROMPTS,
    fixed_prompt_scores,
    load_reward_model,
    score_chats,
    scores,
)
from stages.lib.rows.canonical import read_rows, write_rows
from stages.lib.text.chat_spans import encode_chat
from stages.lib.text.tokenized_parts import TokenizedPart, TokenizedRows
from tests.integration.preference_world import (
    PreferenceWorld,
    make_model,
    make_preference_world,
    run,
    run_in_processes,
    tokenized,
)
from tests.integration.tiny_language_model import make_tokenizer

pytestmark = pytest.mark.slow

TRAINING: dict[str, Any] = {"global_batch_size": 8, "learning_rate": 3e-3, "max_length_tokens": 256}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> PreferenceWorld:
    return make_preference_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def trained(world: PreferenceWorld, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Context]:
    # Measured on what it was trained on: that a tiny model learns the pairs shows that the objective is the right one.
    same = tmp_path_factory.mktemp("same")
    shutil.copy(world.preferences / "train.jsonl", same / "train.jsonl")
    shutil.copy(world.preferences / "train.jsonl", same / "heldout.jsonl")
    folder = tmp_path_factory.mktemp("reward")
    return run(STAGE, {"model": world.model, "preferences": same}, {**TRAINING, "max_steps": 60}, folder)


def test_it_learns_the_pairs(trained: tuple[Result, Context]) -> None:
    metrics = trained[0].metrics
    assert metrics["heldout_accuracy"] > 0.95 > metrics["heldout_accuracy_base"]
    assert metrics["heldout_loss"] < 0.5 * metrics["heldout_loss_base"]
    assert metrics["heldout_margin"] > 1
    assert metrics["heldout_accuracy_random"] == 0.5


def test_accuracies_of_the_categories_make_up_the_whole(
    trained: tuple[Result, Context], world: PreferenceWorld
) -> None:
    """80 pairs are kept on the held-out side: the accuracy is the mean of the categories', weighted by their pairs."""
    rows = list(read_rows(world.preferences / "train.jsonl"))[:-2]
    short = sum(row["source"] == "short" for row in rows)
    metrics = trained[0].metrics
    mean = (metrics["heldout_accuracy_of_short"] * short + metrics["heldout_accuracy_of_long"] * (80 - short)) / 80
    assert len(rows) == 80
    assert metrics["heldout_accuracy"] == pytest.approx(mean, rel=1e-12)


def rescored(folder: Path, rows: list[dict[str, Any]]) -> np.ndarray:
    """N x 2: the scores that the published model gives the two chats of each row, one by one."""
    model, tokenizer = load_reward_model(folder)
    sides = [
        score_chats(model, tokenizer, [[*row["prompt"], *row[side]] for row in rows]) for side in ("chosen", "rejected")
    ]
    return np.asarray(sides).T


def test_the_metrics_describe_the_scores_of_the_published_model(
    trained: tuple[Result, Context], world: PreferenceWorld
) -> None:
    """Scored again, chat by chat: means, deviation and median, and the calibration error bin by bin."""
    result, context = trained
    scores_N2 = rescored(context.out, list(read_rows(world.preferences / "train.jsonl"))[:80])
    metrics = result.metrics
    assert metrics["heldout_score"] == pytest.approx(scores_N2.mean(), abs=1e-4)
    assert metrics["heldout_score_mean_chosen"] == pytest.approx(scores_N2[:, 0].mean(), abs=1e-4)
    assert metrics["heldout_score_mean_rejected"] == pytest.approx(scores_N2[:, 1].mean(), abs=1e-4)
    assert metrics["heldout_score_deviation"] == pytest.approx(scores_N2.std(), abs=1e-4)
    assert metrics["heldout_score_percentile_50"] == pytest.approx(np.median(scores_N2), abs=1e-4)
    percentiles = [metrics[f"heldout_score_percentile_{p}"] for p in (5, 25, 50, 75, 95)]
    assert percentiles == sorted(percentiles)

    differences = scores_N2[:, 0] - scores_N2[:, 1]
    bins: dict[int, list[float]] = {}
    for difference in differences:
        confidence = 1 / (1 + math.exp(-abs(difference)))
        bins.setdefault(math.ceil((confidence - 0.5) * 30), []).append(float(difference > 0) - confidence)
    expected = sum(abs(sum(gaps)) for gaps in bins.values()) / len(differences)
    assert metrics["heldout_calibration_error"] == pytest.approx(expected, abs=1e-3)
    assert 0 < metrics["heldout_calibration_error_base"] < 1


def metrics_of(rows: list[dict[str, Any]], scores_N2: list[list[float]], world: PreferenceWorld, folder: Path) -> Any:
    pairs = tokenized(rows, world.tokenizer, folder)
    objective = RewardObjective(RewardParams(**TRAINING, max_steps=1))
    return heldout_metrics(*torch.tensor(scores_N2, dtype=torch.float64).unbind(1), pairs, objective)


def test_accuracies_of_sources_and_corruptions(world: PreferenceWorld, tmp_path: Path) -> None:
    """Of documents two are shuffled, of which one wins, and one is truncated and wins; of the two of people one ties.

    documents: 2/3; shuffled 1/2; truncated 1; people (1 + 1/2) / 2; all: 3.5/5. From one source alone, that it is from
    there says nothing.
    """
    pair = next(read_rows(world.preferences / "heldout.jsonl"))
    made = [("documents", "shuffled"), ("documents", "shuffled"), ("documents", "truncated"), ("people", None)]
    rows = [{**pair, "source": source, "corruption": corruption} for source, corruption in [*made, made[-1]]]
    scores_N2 = [[1.0, 0.0], [0.0, 1.0], [2.0, 1.0], [1.0, -1.0], [0.5, 0.5]]
    metrics = metrics_of(rows, scores_N2, world, tmp_path / "both")
    assert metrics["heldout_accuracy"] == pytest.approx(0.7, rel=1e-12)
    of = {name: value for name, value in metrics.items() if name.startswith("heldout_accuracy_of_")}
    assert of == pytest.approx(
        {
            "heldout_accuracy_of_documents": 2 / 3,
            "heldout_accuracy_of_people": 0.75,
            "heldout_accuracy_of_shuffled": 0.5,
            "heldout_accuracy_of_truncated": 1.0,
        },
        rel=1e-12,
    )
    metrics = metrics_of(rows[:3], scores_N2[:3], world, tmp_path / "one")
    of = {name: value for name, value in metrics.items() if name.startswith("heldout_accuracy_of_")}
    assert of == {"heldout_accuracy_of_shuffled": 0.5, "heldout_accuracy_of_truncated": 1.0}


def test_pairs_of_several_parts_keep_their_categories_and_margins(world: PreferenceWorld, tmp_path: Path) -> None:
    """Two processes meet the categories in different orders, and each has every second row."""
    pair = next(read_rows(world.preferences / "heldout.jsonl"))
    said = [("b", "x"), ("a", None), (None, "x"), ("b", "y"), ("a", "z")]
    how = tokenizing_pairs(world.tokenizer, 512, with_margins=True)
    parts = [TokenizedPart(), TokenizedPart()]
    for index, (source, corruption) in enumerate(said):
        row = {**pair, "source": source, "corruption": corruption, "margin": index / 2}
        parts[index % 2].add(index, how.make(row))
    for rank, part in enumerate(parts):
        part.write(tmp_path / str(rank))
    pairs = Pairs(TokenizedRows([tmp_path / "0", tmp_path / "1"]))
    names = [*pairs.categories, None]
    assert [tuple(names[number] for number in row["categories"]) for row in pairs] == said
    assert [row["margin"] for row in pairs] == [0.0, 0.5, 1.0, 1.5, 2.0]
    batch = collate_pairs(0)(list(pairs))
    assert batch["margin_N"].tolist() == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert batch["category_N2"].tolist() == pairs.category_N2.tolist()


def test_dropped_pairs_are_counted(trained: tuple[Result, Context]) -> None:
    """82 pairs on either side; on each one is the same twice, and one has an answer 40 times as long."""
    result, context = trained
    ledger = json.loads((context.out / "ledger.json").read_text())
    assert (ledger["read"], ledger["kept"]) == (164, 160)
    assert {reason: entry["count"] for reason, entry in ledger["dropped"].items()} == {
        "chosen_equals_rejected": 2,
        "too_long": 2,
    }
    assert all(len(entry["examples"]) == entry["count"] for entry in ledger["dropped"].values())
    assert result.facts.dropped_rows == {"chosen_equals_rejected": 2, "too_long": 2}


def test_the_published_model_is_complete(trained: tuple[Result, Context], world: PreferenceWorld) -> None:
    result, context = trained
    model, report = AutoModelForSequenceClassification.from_pretrained(context.out, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.config.num_labels == 1
    assert model.config.pad_token_id == world.tokenizer.pad_token_id == result.facts.pad_token_id
    assert result.facts.head_type == "reward"
    assert result.facts.parameters == sum(parameter.numel() for parameter in model.parameters())
    loaded, tokenizer = load_reward_model(context.out)
    assert fixed_prompt_scores(loaded, tokenizer) == result.facts.fixed_prompt_scores
    assert set(result.facts.fixed_prompt_scores or {}) == set(FIXED_PROMPTS)


def test_the_body_is_the_causal_models(world: PreferenceWorld) -> None:
    head = add_reward_head(world.model, padding_id=2)
    causal = AutoModelForCausalLM.from_pretrained(world.model)
    for name, weights in causal.model.state_dict().items():
        assert torch.equal(weights, head.model.state_dict()[name]), name
    assert list(head.score.weight.shape) == [1, 48]


def test_a_model_with_a_hole_in_its_body_is_refused(world: PreferenceWorld, tmp_path: Path) -> None:
    broken = shutil.copytree(world.model, tmp_path / "broken")
    state = load_file(broken / "model.safetensors")
    del state["model.layers.1.mlp.down_proj.weight"]
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"model\.layers\.1\.mlp\.down_proj\.weight"):
        add_reward_head(broken, padding_id=2)


def with_manifest(folder: Path, context: Context, facts: Facts) -> Path:
    copy = shutil.copytree(context.out, folder)
    manifest = Manifest(
        artifact_id="0" * 64,
        artifact_kind=Kind.REWARD_MODEL,
        stage="reward",
        stage_version=1,
        step="reward",
        recipe="test",
        seed=0,
        params={},
        input_ids={},
        files={},
        facts=facts,
        created_at="2026-01-01T00:00:00Z",
        wall_seconds=1.0,
        device="cpu",
        world_size=1,
    )
    (copy / MANIFEST).write_text(manifest.model_dump_json())
    return copy


def without_head(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    del state["score.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def with_another_head(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["score.weight"] = -state["score.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def with_a_new_head(folder: Path) -> None:
    """As transformers would make one for a folder that has none."""
    state = load_file(folder / "model.safetensors")
    state["score.weight"] = torch.empty_like(state["score.weight"]).normal_(
        0, 0.02, generator=torch.Generator().manual_seed(0)
    )
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def with_another_tokenizer(folder: Path) -> None:
    """One of the same size and special tokens, which has learned other texts."""
    words = [word[::-1] for row in FIXED_PROMPTS.values() for message in row for word in message["content"].split()]
    make_tokenizer(words * 40, vocabulary_size=600).save_pretrained(folder)


def with_another_template(folder: Path) -> None:
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|end|>", ""))


def with_another_padding(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": 0}))


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (without_head, r"score\.weight"),
        (with_another_head, "scores the fixed prompt"),
        (with_a_new_head, "scores the fixed prompt"),
        (with_another_tokenizer, "scores the fixed prompt"),
        (with_another_template, "scores the fixed prompt"),
        (with_another_padding, "padding token"),
    ],
)
def test_the_loader_refuses(
    damage: Callable[[Path], None], complaint: str, trained: tuple[Result, Context], tmp_path: Path
) -> None:
    """In one sentence and a hint. The same folder opens before the damage, so that it is the damage that is refused."""
    result, context = trained
    copy = with_manifest(tmp_path / "copy", context, result.facts)
    load_reward_model(copy)
    damage(copy)
    with pytest.raises(ArtifactError, match=complaint) as caught:
        load_reward_model(copy)
    (problem,) = caught.value.problems
    assert isinstance(problem, Problem)
    assert problem.where == str(copy) and problem.hint
    assert "\n" not in str(problem)


def test_the_loader_refuses_a_classifier(trained: tuple[Result, Context], tmp_path: Path) -> None:
    facts = trained[0].facts.model_copy(update={"head_type": "sequence_classification"})
    with pytest.raises(ArtifactError, match="sequence_classification"):
        load_reward_model(with_manifest(tmp_path / "copy", trained[1], facts))


@pytest.mark.parametrize("padding", ["<pad>", "</s>", "<|end|>"])
def test_scores_are_read_at_the_last_token(padding: str, world: PreferenceWorld, tmp_path: Path) -> None:
    """score = w . h at the last position of the mask, for sequences of different lengths, with the padding id in the text.

    With <|end|>, which ends every chat, as padding token another one is chosen; else the last position would be missed.
    """
    tokenizer = world.tokenizer.__class__.from_pretrained(world.model)
    tokenizer.pad_token = padding
    chats = list(read_rows(world.preferences / "heldout.jsonl"))[:6]
    rows = list(tokenized(chats, tokenizer, tmp_path / "pairs"))
    for row in rows:
        row["chosen_ids"] = np.array(row["chosen_ids"])
        row["chosen_ids"][3] = tokenizer.pad_token_id
    last = tokenized(chats, tokenizer, tmp_path / "pairs").last_ids()
    assert last == {tokenizer.convert_tokens_to_ids("<|end|>")}
    padding_id = choose_padding(tokenizer, last)
    assert padding_id == tokenizer.pad_token_id
    assert (tokenizer.pad_token == padding) == (padding != "<|end|>")

    torch.manual_seed(0)
    model = add_reward_head(world.model, padding_id).eval()
    batch = collate_pairs(padding_id)(rows)
    assert len(set(batch["attention_mask"].sum(1).tolist())) > 1, "some sequences are padded"
    with torch.no_grad():
        found = scores(model, batch)
        hidden = model.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        last_positions = batch["attention_mask"].sum(1) - 1
        expected = hidden[torch.arange(len(hidden)), last_positions] @ model.score.weight[0]
    assert torch.allclose(found, expected, atol=1e-6)


def test_a_chat_scores_alike_alone_and_in_a_batch(
    trained: tuple[Result, Context], world: PreferenceWorld, tmp_path: Path
) -> None:
    model, tokenizer = load_reward_model(trained[1].out)
    row = next(read_rows(world.preferences / "heldout.jsonl"))
    longer = {**row, "rejected": [{"role": "assistant", "content": row["rejected"][0]["content"] * 3}]}
    pairs = list(tokenized([longer], tokenizer, tmp_path))
    ids = encode_chat(tokenizer, [*row["prompt"], *row["chosen"]]).input_ids
    with torch.no_grad():
        together = scores(model, collate_pairs(tokenizer.pad_token_id)(pairs))[0]
        alone = scores(model, {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids))})[0]
    assert float(together) == pytest.approx(float(alone), abs=1e-5)


def test_a_tokenizer_without_a_free_special_token_is_refused(world: PreferenceWorld) -> None:
    special = {index for index, token in world.tokenizer.added_tokens_decoder.items() if token.special}
    with pytest.raises(ArtifactError, match="pad"):
        choose_padding(world.tokenizer, special)


def test_no_usable_pair_is_an_error(world: PreferenceWorld, tmp_path: Path) -> None:
    row = next(read_rows(world.preferences / "train.jsonl"))
    preferences = tmp_path / "preferences"
    preferences.mkdir()
    for split in ("train", "heldout"):
        write_rows(preferences / f"{split}.jsonl", [{**row, "rejected": row["chosen"]}])
    with pytest.raises(DataError, match="chosen_equals_rejected"):
        run(STAGE, {"model": world.model, "preferences": preferences}, {**TRAINING, "max_steps": 1}, tmp_path / "run")


def test_the_plan_knows_parameters_and_positions(trained: tuple[Result, Context], world: PreferenceWorld) -> None:
    """A tied Llama of 600 x 48 embeddings gains a head of 48; an untied one also loses 600 x 48."""
    architecture = json.loads((world.model / "config.json").read_text())
    causal = AutoModelForCausalLM.from_pretrained(world.model)
    known = Estimate(parameters=causal.num_parameters(), architecture=architecture)
    inputs = {"model": known, "preferences": Estimate()}
    context = trained[1]
    forecast = Forecast(RewardParams(**TRAINING, max_steps=1), context.resources, inputs)
    estimate = STAGE.estimate(forecast)
    assert estimate.parameters == trained[0].facts.parameters
    assert STAGE.check(forecast) == []
    long = Forecast(RewardParams(**{**TRAINING, "max_length_tokens": 513}, max_steps=1), context.resources, inputs)
    assert [problem.where for problem in STAGE.check(long)] == ["params.max_length_tokens"]


def test_a_margin_that_nothing_uses_is_refused() -> None:
    with pytest.raises(ValueError, match="margin has no effect with margin_from: column"):
        RewardParams(**TRAINING, max_steps=1, margin=1.0, margin_from="column")


SMOOTHED: dict[str, Any] = {
    **TRAINING,
    "max_steps": 4,
    "learning_rate": 1e-3,
    "margin_from": "column",
    "label_smoothing": 0.2,
    "center_rewards_coefficient": 0.05,
}


@pytest.fixture(scope="module")
def graded(world: PreferenceWorld, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Inputs: the pairs with margins from 0 to 3, and a model without dropout, which is drawn anew for each micro batch."""
    folder = tmp_path_factory.mktemp("graded")
    (folder / "preferences").mkdir()
    for split in ("train", "heldout"):
        rows = list(read_rows(world.preferences / f"{split}.jsonl"))
        graded = [{**row, "margin": index % 7 / 2} for index, row in enumerate(rows)]
        write_rows(folder / "preferences" / f"{split}.jsonl", graded)
    return {
        "model": make_model(folder / "model", world.tokenizer, attention_dropout=0.0),
        "preferences": folder / "preferences",
    }


@pytest.fixture(scope="module")
def trained_alone(graded: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Context]:
    return run(STAGE, graded, SMOOTHED, tmp_path_factory.mktemp("alone"))


def test_each_pair_has_its_own_margin(graded: dict[str, Path], trained_alone: tuple[Result, Context]) -> None:
    """The held-out loss is the mean of 0.8 log(1 + exp(-d)) + 0.2 log(1 + exp(d)) + 0.05 (r_c + r_r)^2, d = r_c - r_r - m."""
    rows = list(read_rows(graded["preferences"] / "heldout.jsonl"))
    scores_N2 = rescored(trained_alone[1].out, rows)
    margin_N = np.asarray([row["margin"] for row in rows])
    assert set(margin_N) == {0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0}

    def loss(margin_N: np.ndarray) -> float:
        d = scores_N2[:, 0] - scores_N2[:, 1] - margin_N
        centering = 0.05 * scores_N2.sum(axis=1) ** 2
        return float(np.mean(0.8 * np.log1p(np.exp(-d)) + 0.2 * np.log1p(np.exp(d)) + centering))

    assert trained_alone[0].metrics["heldout_loss"] == pytest.approx(loss(margin_N), rel=1e-4)
    assert abs(loss(np.zeros(len(rows))) - loss(margin_N)) > 0.1, "without the margins it is another one"


def test_training_uses_the_margins_of_its_pairs() -> None:
    """A model that scores everything 0 is short of each margin: log(1 + exp(log 3)) + log(1 + exp(0)) = log 4 + log 2."""

    def nothing(input_ids: torch.Tensor, **_: Any) -> SequenceClassifierOutput:
        return SequenceClassifierOutput(logits=torch.zeros(len(input_ids), 1))

    ids = torch.ones(4, 3, dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": ids, "margin_N": torch.tensor([math.log(3), 0.0])}
    objective = RewardObjective(RewardParams(**TRAINING, max_steps=1, margin_from="column"))
    assert float(objective.loss_sum(nothing, batch)) == pytest.approx(math.log(8), rel=1e-6)  # type: ignore[arg-type]


def test_a_pair_without_margin_is_named(graded: dict[str, Path], tmp_path: Path) -> None:
    """Two of 82: the first in line 4. Before anything is tokenized."""
    rows = list(read_rows(graded["preferences"] / "train.jsonl"))
    del rows[3]["margin"]
    rows[50]["margin"] = -1
    preferences = shutil.copytree(graded["preferences"], tmp_path / "preferences")
    write_rows(preferences / "train.jsonl", rows)
    with pytest.raises(DataError, match=r"2 of 82 pairs have no margin.*the first in line 4; sources: ") as caught:
        run(STAGE, {**graded, "preferences": preferences}, SMOOTHED, tmp_path / "run")
    assert {rows[3]["source"], rows[50]["source"]} == set(
        str(caught.value).partition("sources: ")[2].partition(".")[0].split(", ")
    )
    assert not (tmp_path / "run" / "pairs").exists()


def test_two_processes_under_zero3_train_what_one_trains(
    graded: dict[str, Path], trained_alone: tuple[Result, Context], tmp_path: Path
) -> None:
    """The same pairs in the same steps, so the same held-out numbers, up to the rounding of sums in another order."""
    alone, context = trained_alone
    together = run_in_processes("reward", graded, SMOOTHED, tmp_path / "together", 2, "zero3")
    steps = [event["loss"] for event in context.journal.events("step")]
    assert together["losses"] == pytest.approx(steps, rel=1e-5)
    assert set(together["metrics"]) == set(alone.metrics)
    for name, value in alone.metrics.items():
        assert together["metrics"][name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    for name, value in (alone.facts.fixed_prompt_scores or {}).items():
        assert together["facts"]["fixed_prompt_scores"][name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
