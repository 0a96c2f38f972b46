"""The engine in this process, plain and under DeepSpeed: steps that are refused, files that are data and nothing else."""

from __future__ import annotations

import functools
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import ArtifactError, DataError
from pipeline.stage import Context
from stages.lib.processes.joining import join_processes
from stages.lib.training.deepspeed_files import load_data
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
    path = optimizer_file(ctx.checkpoints.path(step))
    torch.save({"planted": Planted(mark)}, path)
    declare_complete(ctx, step)
    return path


def optimizer_file(folder: Path) -> Path:
    return max(folder.rglob("*.pt"), key=lambda each: "optim" in each.name)


def declare_complete(ctx: Context, step: int) -> None:
    (ctx.checkpoints.path(step) / "complete.json").unlink()
    ctx.checkpoints.complete(step)


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


# Files that can be read, and do not hold what training writes.

Damage = Callable[[Path], None]


def model_holds(value: Any) -> Damage:
    """Writes something else into the file of the weights."""
    return lambda folder: torch.save(value, max(folder.rglob("*.pt"), key=lambda each: "model" in each.name))


def optimizer_holds(value: Any) -> Damage:
    return lambda folder: torch.save(value, optimizer_file(folder))


def changed(*keys: str | int, to: Any = None, file: Callable[[Path], Path] = optimizer_file) -> Damage:
    """Puts `to` in place of what stands there in the file; by default takes it out."""

    def damage(folder: Path) -> None:
        content = load_data(file(folder))
        inner = content
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = to
        if to is None:
            del inner[keys[-1]]
        torch.save(content, file(folder))

    return damage


def said(**changes: Any) -> Damage:
    """Has our part say something else; None: nothing."""

    def damage(folder: Path) -> None:
        path = folder / "slipway.json"
        state = {**json.loads(path.read_bytes()), **changes}
        path.write_text(json.dumps({name: value for name, value in state.items() if value is not None}))

    return damage


NORM = "model.norm.weight"
OTHER_SHAPE = torch.zeros(3)
DAMAGES: list[tuple[str | None, str, Damage, str]] = [
    (None, "nothing", optimizer_holds({}), "engine.pt is not what training writes: module is missing"),
    (None, "a list", optimizer_holds([1, 2]), "engine.pt is not what training writes: what it holds is no mapping"),
    (None, "shape", changed("module", NORM, to=OTHER_SHAPE), f"module.{NORM} has the shape [3] instead of [32]"),
    (None, "no tensor", changed("module", NORM, to=3), f"module.{NORM} is no tensor"),
    (None, "no weight", changed("module", NORM), f"module.{NORM} is missing"),
    (None, "more weights", changed("module", "other", to=OTHER_SHAPE), "module.other is none of this model's"),
    (None, "no optimizer", changed("optimizer", to={}), "optimizer.state is missing"),
    (None, "no moments", changed("optimizer", "state", to={}), "optimizer.state is empty"),
    (None, "a moment", changed("optimizer", "state", 0, "exp_avg"), "optimizer.state.0.exp_avg is missing"),
    (None, "moment", changed("optimizer", "state", 1, "exp_avg_sq", to=OTHER_SHAPE), "exp_avg_sq has the shape [3]"),
    (None, "groups", changed("optimizer", "param_groups", 1), "optimizer.param_groups is no list of 2"),
    (None, "betas", changed("optimizer", "param_groups", 1, "betas"), "optimizer.param_groups[1].betas is missing"),
    (None, "window", said(window={"nope": 1}), "slipway.json is not what training writes (ValueError)"),
    (None, "numbers", said(before={"heldout_loss": "low"}), "slipway.json is not what training writes"),
    (None, "before", said(before=None), "slipway.json is not what training writes (KeyError)"),
    (None, "step", said(step=5), "slipway.json is not what training writes (ValueError)"),
    ("own", "no optimizer", changed("optimizer", to={}), "optimizer.state is missing"),
    ("zero2", "model", model_holds({}), "mp_rank_00_model_states.pt is not what training writes: module is missing"),
    ("zero2", "optimizer", optimizer_holds([1, 2]), "optim_states.pt is not what training writes: what it holds is no"),
    ("zero2", "base", changed("optimizer_state_dict", "base_optimizer_state", to={}), "state is missing"),
    (
        "zero2",
        "fp32",
        changed("optimizer_state_dict", "single_partition_of_fp32_groups", 0, to=OTHER_SHAPE),
        "single_partition_of_fp32_groups[0] has the shape [3]",
    ),
    ("zero3", "model", model_holds({}), "mp_rank_00_model_states.pt is not what training writes: module is missing"),
    ("zero3", "fp32", changed("optimizer_state_dict", "fp32_flat_groups"), "fp32_flat_groups is missing"),
    (
        "zero3",
        "moment",
        changed("optimizer_state_dict", "optimizer_state_dict", "state", 0, "exp_avg", to=OTHER_SHAPE),
        "state.0.exp_avg has the shape [3]",
    ),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str | None], Path]:
    """A memory layout -> the folder of a run that ended under it, made once."""

    @functools.cache
    def folder_of(layout: str | None) -> Path:
        folder = tmp_path_factory.mktemp("finished") / str(layout)
        run(context_under(folder, layout, save_every_steps=2, keep_checkpoints=3))
        return folder

    return folder_of


@pytest.mark.parametrize(
    ("layout", "damage", "reason"),
    [pytest.param(*each[:1], *each[2:], id=f"{each[0] or 'plain'}-{each[1]}") for each in DAMAGES],
)
def test_a_checkpoint_that_is_not_what_training_writes_is_passed_over(
    tmp_path: Path, finished: Callable[[str | None], Path], layout: str | None, damage: Damage, reason: str
) -> None:
    whole, folder = finished(layout), tmp_path / "damaged"
    shutil.copytree(whole, folder)
    ctx = context_under(folder, layout, save_every_steps=2, keep_checkpoints=3)
    damage(ctx.checkpoints.path(6))
    declare_complete(ctx, 6)
    shutil.rmtree(ctx.out)
    ctx.out.mkdir()
    again = run(replace(ctx, resume=ctx.checkpoints.newest().path))
    assert again.steps == 6
    assert [event["step"] for event in ctx.journal.events("resume")] == [4]
    (note,) = (event["text"] for event in ctx.journal.events("note") if "not resumed from" in event["text"])
    assert note.startswith("checkpoint-6 is not resumed from: ") and reason in note
    assert (ctx.out / "model.safetensors").read_bytes() == (whole / "out" / "model.safetensors").read_bytes()
    assert [event["step"] for event in ctx.journal.events("step")] == [1, 2, 3, 4, 5, 6]
    assert ctx.checkpoints.newest().step == 6


@pytest.mark.parametrize("layout", [None, "zero2"])
def test_where_none_is_what_training_writes_it_begins_anew(
    tmp_path: Path, finished: Callable[[str | None], Path], layout: str | None
) -> None:
    whole, folder = finished(layout), tmp_path / "damaged"
    shutil.copytree(whole, folder)
    ctx = context_under(folder, layout, save_every_steps=2, keep_checkpoints=3)
    for step, damage in ((2, said(window=3)), (4, optimizer_holds({})), (6, model_holds({}))):
        damage(ctx.checkpoints.path(step))
        declare_complete(ctx, step)
    run(replace(ctx, resume=ctx.checkpoints.newest().path))
    assert list(ctx.journal.events("resume")) == []
    assert [event["step"] for event in ctx.journal.events("step")] == [1, 2, 3, 4, 5, 6]
    assert (ctx.out / "model.safetensors").read_bytes() == (whole / "out" / "model.safetensors").read_bytes()


def test_of_another_run_it_is_refused_and_left_there(tmp_path: Path, finished: Callable[[str | None], Path]) -> None:
    shutil.copytree(finished(None), tmp_path / "other")
    ctx = context_under(tmp_path / "other", None, save_every_steps=2, keep_checkpoints=3)
    said(seed=5, window={})(ctx.checkpoints.path(6))
    declare_complete(ctx, 6)
    with pytest.raises(ArtifactError, match="belongs to another run: its seed is 5, the recipe's is 1"):
        run(replace(ctx, resume=ctx.checkpoints.newest().path))
    assert ctx.checkpoints.steps() == [2, 4, 6]


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
