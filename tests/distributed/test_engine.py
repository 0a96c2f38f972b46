"""The engine in this process, plain and under DeepSpeed: steps that are refused, files that are data and nothing else."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import DataError
from pipeline.stage import Context
from stages.lib.processes.joining import join_processes
from stages.lib.training.engine import Engine
from stages.lib.training.layouts import complete_layout
from stages.lib.training.loop import Trained
from stages.lib.training.optimizer import parameter_groups
from stages.lib.training.params import TrainingParams, derive_batch
from tests.distributed.test_training_library import TokenObjective, context, run

pytestmark = [
    pytest.mark.slow,
    # DeepSpeed's own use of torch.
    pytest.mark.filterwarnings("ignore:`?torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch.distributed.*"),
]

NO_ZERO = {"zero_optimization": {"stage": 0}}
LAYOUTS = [None, "own", "zero1", "zero2", "zero3"]
"""`own`: a file of one's own without ZeRO, in which DeepSpeed checks no gradient."""


@pytest.fixture(autouse=True, scope="module")
def environment_as_it_was() -> Iterator[None]:
    """A group of one writes its rank into the environment, which processes that other tests start would inherit.

    The group itself stays: DeepSpeed keeps hold of the first that it meets in a process.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    before = {name: os.environ.get(name) for name in names}
    yield
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def context_under(folder: Path, layout: str | None, **resources: Any) -> Context:
    if layout == "own":
        layout = str(folder / "own.json")
        folder.mkdir(parents=True, exist_ok=True)
        Path(layout).write_text(json.dumps(NO_ZERO), encoding="utf-8")
    return context(folder, deepspeed=layout, **resources)


class Steep(TokenObjective):
    """Finite in step 2, and infinitely steep there: the square root of 0."""

    calls = 0

    def loss_sum(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        self.calls += torch.is_grad_enabled()  # not where the model is looked at before training
        loss = super().loss_sum(model, batch)
        return loss + (loss * 0).sqrt() if self.calls == 2 else loss


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gradient_that_is_no_number_changes_nothing(
    tmp_path: Path, layout: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights after the refused second step are those after the first."""
    seen: list[list[torch.Tensor]] = []
    step = Engine.step

    def watched(self: Engine, rates: Any) -> Any:
        try:
            return step(self, rates)
        finally:
            seen.append(list(self.state_of(self.module).values()))

    monkeypatch.setattr(Engine, "step", watched)
    with pytest.raises(DataError, match=r"step 2: the gradient norm is (nan|inf)"):
        run(context_under(tmp_path, layout), Steep())
    after_first, after_second = seen
    assert all(map(torch.equal, after_first, after_second))
    assert all(bool(tensor.isfinite().all()) for tensor in after_second)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_clipped_in_every_layout(tmp_path: Path, layout: str | None) -> None:
    """Adam's first step is rate x m / (sqrt(v) + epsilon), with m = g and v = g^2 after bias correction.

    With epsilon 1e-2 far above |g|, which clipping keeps at 1e-5 in all, that is rate x g / 1e-2. At a rate of 1 the weights
    move by 1e-5 / 1e-2 = 1e-3 in all.
    """
    ctx = context_under(tmp_path, layout)
    options = {"learning_rate": 1.0, "adam_epsilon": 1e-2, "max_gradient_norm": 1e-5, "schedule": "constant"}
    run(ctx, max_steps=1, **options)
    from safetensors.torch import load_file

    before, after = load_file(tmp_path / "initial" / "model.safetensors"), load_file(ctx.out / "model.safetensors")
    moved = sum(float((after[name].double() - tensor.double()).square().sum()) for name, tensor in before.items())
    assert moved**0.5 == pytest.approx(1e-3, rel=0.05)
    assert next(iter(ctx.journal.events("step")))["gradient_norm"] > 1e-5, "or nothing was clipped"


# Files that are data and nothing else.


class Planted:
    """What leaves a file behind where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.mark),)


def plant(ctx: Context, step: int, mark: Path) -> Path:
    """Puts code into a file of the checkpoint, and declares it complete again."""
    folder = ctx.checkpoints.path(step)
    path = max(folder.rglob("*.pt"), key=lambda each: "optim" in each.name)
    torch.save({"planted": Planted(mark)}, path)
    (folder / "complete.json").unlink()
    ctx.checkpoints.complete(step)
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_code_in_a_checkpoint_is_not_run_and_the_one_before_is_taken(tmp_path: Path, layout: str | None) -> None:
    whole = context_under(tmp_path / "whole", layout, save_every_steps=2, keep_checkpoints=3)
    run(whole)
    ctx = context_under(tmp_path / "planted", layout, save_every_steps=2, keep_checkpoints=3)
    run(ctx)
    mark = tmp_path / "code-ran"
    path = plant(ctx, 6, mark)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    for each in ctx.out.iterdir():
        each.unlink()
    again: Trained = run(replace(ctx, resume=ctx.checkpoints.newest().path))
    assert not mark.exists()
    assert again.steps == 6
    assert [event["step"] for event in ctx.journal.events("resume")] == [4]
    notes = [event["text"] for event in ctx.journal.events("note")]
    assert any("checkpoint-6 is not resumed from" in note and path.name in note for note in notes)
    assert (ctx.out / "model.safetensors").read_bytes() == (whole.out / "model.safetensors").read_bytes()


def test_where_no_checkpoint_can_be_read_training_begins_anew(tmp_path: Path) -> None:
    whole = context(tmp_path / "whole", save_every_steps=3)
    run(whole)
    ctx = context(tmp_path / "planted", save_every_steps=3)
    run(ctx)
    for step in (3, 6):
        plant(ctx, step, tmp_path / "code-ran")
    for each in ctx.out.iterdir():
        each.unlink()
    run(replace(ctx, resume=ctx.checkpoints.newest().path))
    assert not (tmp_path / "code-ran").exists()
    assert list(ctx.journal.events("resume")) == []
    assert (ctx.out / "model.safetensors").read_bytes() == (whole.out / "model.safetensors").read_bytes()


def test_deepspeed_itself_reads_no_code(tmp_path: Path) -> None:
    """Not by the look beforehand alone: the engine's own loading refuses it."""
    ctx = context_under(tmp_path, "zero2")
    device = join_processes(ctx)
    params = TrainingParams(global_batch_size=4, max_steps=1, learning_rate=1e-2)
    batch = derive_batch(4, ctx.resources)
    module = torch.nn.Linear(4, 4)
    groups, _ = parameter_groups([(module, 1e-2)], 0.0)
    engine = Engine(ctx, module, groups, params, complete_layout(ctx.resources, params, batch), device)
    engine.save(tmp_path / "saved")
    engine.load(tmp_path / "saved")
    path = next(each for each in (tmp_path / "saved").rglob("*.pt") if "optim" in each.name)
    torch.save({"planted": Planted(tmp_path / "code-ran")}, path)
    with pytest.raises(pickle.UnpicklingError):
        engine.load(tmp_path / "saved")
    assert not (tmp_path / "code-ran").exists()
