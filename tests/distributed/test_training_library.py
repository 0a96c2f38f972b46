"""The parts of the training library, in this process: order of rows, saving, stopping, publishing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import ArtifactError, DataError, RecipeError, StoreError
from pipeline.settings.resources import Resources
from pipeline.stage import Context, World
from pipeline.store.checkpoints import Checkpoints
from pipeline.store.journal import Journal
from stages.lib.formulas.token_losses import TARGETS, TokenObjective, measure_tokens, next_tokens, token_metrics
from stages.lib.models.loading import initial_weights, load_model
from stages.lib.models.publishing import check_weights, zeros_of
from stages.lib.training import state
from stages.lib.training.evaluating import Evaluator
from stages.lib.training.loop import Trained, train
from stages.lib.training.params import TrainingParams
from stages.lib.training.scheduling import ScheduledData, fingerprint
from tests.distributed.training_world import LLAMA, make_tokenizer

pytestmark = pytest.mark.slow

# The order of rows.


def test_each_pass_is_a_permutation_of_the_rows() -> None:
    data = ScheduledData([{"number": number} for number in range(7)], seed=3, length=25)
    numbers = [data[position]["number"] for position in range(25)]
    passes = [numbers[start : start + 7] for start in (0, 7, 14)]
    assert all(sorted(each) == list(range(7)) for each in passes)
    assert len({tuple(each) for each in passes}) == 3
    assert [data[position]["position"] for position in (0, 24)] == [0, 24]
    with pytest.raises(IndexError):
        data[25]


def test_the_order_is_a_function_of_seed_and_position() -> None:
    rows = [{"number": number} for number in range(50)]
    order = [ScheduledData(rows, 3, 200).index(position) for position in range(200)]
    data = ScheduledData(rows, 3, 120)
    assert [data.index(position) for position in reversed(range(120))] == order[:120][::-1]
    assert [ScheduledData(rows, 4, 200).index(position) for position in range(200)] != order


def test_fingerprint_changes_with_number_and_content() -> None:
    rows = [{"input_ids": [number, 2], "text": "a"} for number in range(10)]
    first = fingerprint(rows)
    assert fingerprint([dict(row) for row in rows]) == first
    assert fingerprint(rows[:9]) != first
    assert fingerprint([*rows[:9], {"input_ids": [9, 3], "text": "a"}]) != first
    assert fingerprint([*rows[:9], {"input_ids": [9, 2], "text": "b"}]) != first


# Runs.


def context(folder: Path, **resources: Any) -> Context:
    for name in ("out", "checkpoints"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(folder / "checkpoints", keep=resources.get("keep_checkpoints", 2))
    return Context(
        inputs={},
        out=folder / "out",
        work=folder,
        resume=checkpoints.newest().path,
        checkpoints=checkpoints,
        seed=1,
        resources=Resources(**{"device": "cpu", "threads": 1, "log_every_steps": 1, **resources}),
        journal=Journal(folder / "journal.jsonl", writes=True),
        world=World(),
        stop_requested=lambda: False,
    )


class Rows(list[dict[str, Any]]):
    """Rows of eight tokens that count up, which is easy to learn."""

    def __init__(self, num_rows: int) -> None:
        super().__init__({"input_ids": [(row + place) % 40 + 8 for place in range(8)]} for row in range(num_rows))


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    ids_BT = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids_BT, TARGETS: next_tokens(ids_BT)}


def evaluate(evaluator: Evaluator) -> dict[str, float]:
    return token_metrics(evaluator.sums(Rows(3), collate, measure_tokens))


def run(ctx: Context, objective: Any = None, architecture: dict[str, Any] = LLAMA, **changes: Any) -> Trained:
    from transformers import AutoConfig, AutoModelForCausalLM

    params = TrainingParams(**{"global_batch_size": 4, "max_steps": 6, "learning_rate": 1e-2, **changes})
    config = AutoConfig.for_model(**architecture, vocab_size=384, bos_token_id=0, eos_token_id=1)
    source = initial_weights(ctx, lambda: AutoModelForCausalLM.from_config(config))
    return train(
        ctx,
        params,
        make_model=lambda: load_model(AutoModelForCausalLM, source),
        tokenizer=make_tokenizer(),
        data=Rows(10),
        collate=collate,
        objective=objective or TokenObjective(),
        evaluate=evaluate,
    )


def test_what_a_run_leaves_behind(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, GenerationConfig

    ctx = context(tmp_path, save_every_steps=2, keep_checkpoints=2)
    trained = run(ctx, warmup_steps=2, evaluate_every_steps=4, schedule="linear")
    assert trained.steps == 6
    assert trained.after["heldout_loss"] < trained.before["heldout_loss"]
    steps = list(ctx.journal.events("step"))
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    # Warmup to 1/3, 2/3 of 0.01; then from 1 down by quarters.
    assert [line["learning_rate"] for line in steps] == pytest.approx(
        [0.01 * part for part in (1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25)]
    )
    assert [line["step"] for line in ctx.journal.events("heldout")] == [0, 4, 6]
    assert steps[-1]["loss"] == trained.train_loss
    assert ctx.checkpoints.steps() == [4, 6]
    model = AutoModelForCausalLM.from_pretrained(ctx.out)
    assert sum(parameter.numel() for parameter in model.parameters()) == trained.parameters
    # End of text, and the end of a turn in the tokenizer's chat template.
    assert GenerationConfig.from_pretrained(ctx.out).eos_token_id == [1, 7]
    assert model.config.use_cache is True
    assert sorted(path.name for path in ctx.out.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_only_matrices_are_decayed(tmp_path: Path) -> None:
    """With a learning rate of which nothing is left but decay: after one step each weight is (1 - rate x decay) of itself.

    A loss of zero for every output has no gradient, so AdamW moves nothing but by its decay.
    """
    from safetensors.torch import load_file

    class Nothing(TokenObjective):
        def loss_sum(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            return super().loss_sum(model, batch) * 0.0

    ctx = context(tmp_path)
    run(ctx, Nothing(), max_steps=1, learning_rate=0.5, weight_decay=0.1, schedule="constant")
    before = load_file(tmp_path / "initial" / "model.safetensors")
    after = load_file(ctx.out / "model.safetensors")
    for name, tensor in before.items():
        factor = 1.0 if "norm" in name else 0.95
        torch.testing.assert_close(after[name], tensor * factor, rtol=1e-6, atol=0)
    assert any("norm" in name for name in before)


def test_what_is_drawn_by_no_dropout_differs_between_steps_is_repeated_by_a_seed_and_is_told(tmp_path: Path) -> None:
    seen: list[float] = []

    class Watched(TokenObjective):
        def loss_sum(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            if torch.is_grad_enabled():
                seen.append(torch.rand(1).item())
            else:
                torch.manual_seed(len(seen))  # wherever the generator stands before training
            return super().loss_sum(model, batch)

    for name in ("one", "two"):
        ctx = context(tmp_path / name, micro_batch_size=2)
        run(ctx, Watched(), max_steps=3)
    assert seen[:6] == seen[6:]
    assert len(set(seen)) == 6
    notes = [event["text"] for event in ctx.journal.events("note") if "draws at random" in event["text"]]
    assert len(notes) == 1
    assert "depends on micro_batch_size and the number of processes" in notes[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path, value: float) -> None:
    class Broken(TokenObjective):
        calls = 0

        def loss_sum(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            self.calls += torch.is_grad_enabled()  # not where the model is looked at before training
            return super().loss_sum(model, batch) * (value if self.calls == 3 else 1.0)

    ctx = context(tmp_path, save_every_steps=1)
    with pytest.raises(DataError, match=rf"step 3: the loss is {value}"):
        run(ctx, Broken())
    assert ctx.checkpoints.steps() == [1, 2]
    assert list(ctx.out.iterdir()) == []


def test_a_gradient_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    class Steep(TokenObjective):
        calls = 0

        def loss_sum(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            self.calls += torch.is_grad_enabled()  # not where the model is looked at before training
            loss = super().loss_sum(model, batch)
            # The square root of 0 is 0, and infinitely steep.
            return loss + (loss * 0).sqrt() if self.calls == 2 else loss

    with pytest.raises(DataError, match=r"step 2: the gradient norm is nan"):
        run(context(tmp_path), Steep())


def test_a_step_without_targets_is_refused(tmp_path: Path) -> None:
    class Deaf(TokenObjective):
        def count(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            return super().count(batch) * 0

    with pytest.raises(DataError, match=r"step 1: no row of the batch has anything to learn from"):
        run(context(tmp_path), Deaf())


def test_what_only_the_run_can_know_is_refused_together(tmp_path: Path) -> None:
    """Ten rows in batches of 4, once: 3 steps."""
    with pytest.raises(RecipeError) as caught:
        run(context(tmp_path), max_steps=None, epochs=1.0, warmup_steps=3, precision="fp16")
    assert [str(problem).split(":")[0] for problem in caught.value.problems] == [
        "params.warmup_steps",
        "params.precision",
    ]


def test_a_full_disk_is_seen_before_a_checkpoint_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "checkpoint_bytes", lambda num_parameters: 10**18)
    ctx = context(tmp_path, save_every_steps=2)
    with pytest.raises(StoreError, match="the next checkpoint needs"):
        run(ctx)
    assert ctx.checkpoints.steps() == []


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    """The engine's file cut in half, the run's own state cut in half."""
    whole = context(tmp_path / "whole", save_every_steps=2, keep_checkpoints=3)
    run(whole)
    cut = context(tmp_path / "cut", save_every_steps=2, keep_checkpoints=3)
    run(cut)
    for path in (cut.checkpoints.path(6) / "engine.pt", cut.checkpoints.path(4) / "slipway.json"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    newest = cut.checkpoints.newest()
    assert newest.step == 2
    assert "engine.pt has" in newest.passed_over[0] and "slipway.json has" in newest.passed_over[1]
    cut.checkpoints.discard_after(newest.step)
    for path in cut.out.iterdir():
        path.unlink()
    run(replace(cut, resume=newest.path))
    assert (cut.out / "model.safetensors").read_bytes() == (whole.out / "model.safetensors").read_bytes()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_published_weights_are_in_the_precision_of_the_recipe(tmp_path: Path, precision: str) -> None:
    from safetensors.torch import load_file

    ctx = context(tmp_path)
    run(ctx, precision=precision)
    wanted = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    assert {tensor.dtype for tensor in load_file(ctx.out / "model.safetensors").values()} == {wanted}
    assert json.loads((ctx.out / "config.json").read_bytes())["dtype"] == str(wanted).removeprefix("torch.")


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    ctx = context(tmp_path)
    trained = run(ctx, architecture={**LLAMA, "tie_word_embeddings": True})
    weights = load_file(ctx.out / "model.safetensors")
    assert "lm_head.weight" not in weights
    assert sum(tensor.numel() for tensor in weights.values()) == trained.parameters


# The check of what is published.


def spoil(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], None]:
    def apply(weights: dict[str, torch.Tensor]) -> None:
        weights["layer.weight"] = change(weights["layer.weight"])

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (spoil(lambda tensor: tensor * float("nan")), "layer.weight holds values that are not finite"),
        (spoil(lambda tensor: tensor * 0), "layer.weight is all zero"),
        (spoil(lambda tensor: tensor[:0]), "layer.weight is empty"),
        (spoil(lambda tensor: tensor[:1]), r"layer.weight has the shape \[1, 3\] instead of \[2, 3\]"),
        (lambda weights: weights.pop("layer.weight"), "layer.weight was not written"),
    ],
)
def test_unsound_weights_are_not_published(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    from safetensors.torch import save_file

    shapes = {"layer.weight": (2, 3), "layer.bias": (2,)}
    weights = {"layer.weight": torch.ones(2, 3), "layer.bias": torch.zeros(2)}
    save_file(weights, tmp_path / "model.safetensors")
    check_weights(tmp_path, shapes)
    change(weights)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match=message):
        check_weights(tmp_path, shapes)


def test_only_what_began_as_zeros_may_end_as_zeros(tmp_path: Path) -> None:
    """A critic's head where no reward came, or a matrix that was zero in the model that training began with."""
    from safetensors.torch import save_file

    shapes = {"layer.weight": (2, 3), "score.weight": (1, 3)}
    (tmp_path / "start").mkdir()
    save_file(
        {"layer.weight": torch.ones(2, 3), "score.weight": torch.zeros(1, 3)}, tmp_path / "start" / "model.safetensors"
    )
    save_file({"layer.weight": torch.ones(2, 3), "score.weight": torch.zeros(1, 3)}, tmp_path / "model.safetensors")
    check_weights(tmp_path, shapes, zeros_of(tmp_path / "start"))
    with pytest.raises(ArtifactError, match=r"score\.weight is all zero"):
        check_weights(tmp_path, shapes)
    save_file({"layer.weight": torch.zeros(2, 3), "score.weight": torch.zeros(1, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"publish: layer\.weight is all zero\."):
        check_weights(tmp_path, shapes, zeros_of(tmp_path / "start"))


def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    ctx = context(tmp_path)
    run(ctx, max_steps=1)
    with pytest.raises(ArtifactError, match=r"does not hold the weights score.weight"):
        load_model(AutoModelForSequenceClassification, ctx.out)
