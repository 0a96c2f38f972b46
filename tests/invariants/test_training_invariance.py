"""What must train identically: the same recipe on one process and two, in small and large micro batches, in any layout."""

from __future__ import annotations

import pytest

from tests.distributed.training_world import (
    LLAMA,
    Job,
    make_tokenizer,
    run_jobs,
    write_chats,
    write_model,
    write_tokens,
)

pytestmark = pytest.mark.slow

STEPS = 20
MAX_DRIFT = 1e-5
"""Relative, of any single step's loss. Sums in another order differ in the last bits of float32, about 1e-7."""
MEAN_DRIFT = 5e-7
"""Relative, of all steps' losses together: a term that is dropped or counted twice shows as drift to one side."""

# (processes, memory layout, micro batch): with 8 rows a step, from 1 x 8 accumulated to 8 x 1.
CLASS = [
    (1, None, 8),
    (1, None, 1),
    (1, "zero1", 2),
    (1, "zero2", 4),
    (1, "zero3", 8),
    (2, None, 4),
    (2, None, 1),
    (2, "zero1", 1),
    (2, "zero2", 2),
    (2, "zero3", 4),
]
KINDS = {
    "pretrain": ("stages.language_model.pretrain", {"architecture": LLAMA}),
    "sft": ("stages.language_model.sft", {"max_length_tokens": 56}),
}


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int, str | None, int], Job]:
    folder = tmp_path_factory.mktemp("invariance")
    tokenizer = make_tokenizer()
    tokens, chats = write_tokens(folder / "tokens", tokenizer), write_chats(folder / "chats")
    inputs = {
        "pretrain": {"tokens": tokens},
        "sft": {"model": write_model(folder / "model", tokenizer), "chats": chats},
    }
    jobs = {}
    for kind, (module, params) in KINDS.items():
        for processes, layout, micro in CLASS:
            common = {
                "global_batch_size": 8,
                "max_steps": STEPS,
                "learning_rate": 3e-3,
                "warmup_steps": 3,
                "weight_decay": 0.1,
            }
            resources = {"micro_batch_size": micro, "deepspeed": layout, "log_every_steps": 1}
            name = f"{kind}-{processes}-{layout}-{micro}"
            jobs[kind, processes, layout, micro] = Job(
                folder / name, module, {**common, **params}, inputs[kind], resources
            )
    for processes in (1, 2):
        run_jobs(folder, [job for key, job in jobs.items() if key[1] == processes], processes)
    return jobs


@pytest.mark.parametrize(("processes", "layout", "micro"), CLASS[1:])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_do_not_depend_on_how_a_step_is_spread(
    trajectories: dict[tuple[str, int, str | None, int], Job], kind: str, processes: int, layout: str | None, micro: int
) -> None:
    reference = trajectories[kind, *CLASS[0]]
    job = trajectories[kind, processes, layout, micro]
    expected, losses = reference.losses(), job.losses()
    assert len(expected) == len(losses) == STEPS
    drifts = [loss / right - 1 for loss, right in zip(losses, expected, strict=True)]
    assert max(map(abs, drifts)) <= MAX_DRIFT
    assert abs(sum(drifts) / STEPS) <= MEAN_DRIFT
    # AdamW hardly sees how large gradients are: a loss that is too small by the number of processes shows in their norm.
    norms = [[line["gradient_norm"] for line in each.events("step")] for each in (job, reference)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    for name, value in reference.result()["metrics"].items():
        assert job.result()["metrics"][name] == pytest.approx(value, rel=MAX_DRIFT), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_class_learns_something(trajectories: dict[tuple[str, int, str | None, int], Job], kind: str) -> None:
    """A trajectory that stood still would agree with any other."""
    losses = trajectories[kind, *CLASS[0]].losses()
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize("kind", KINDS)
def test_all_layouts_publish_the_same_tensors(
    trajectories: dict[tuple[str, int, str | None, int], Job], kind: str
) -> None:
    from safetensors.torch import load_file

    reference = load_file(trajectories[kind, *CLASS[0]].work / "out" / "model.safetensors")
    for key in CLASS[1:]:
        found = load_file(trajectories[kind, *key].work / "out" / "model.safetensors")
        assert {name: tensor.shape for name, tensor in found.items()} == {
            name: tensor.shape for name, tensor in reference.items()
        }
        for name, tensor in found.items():
            assert float((tensor - reference[name]).abs().max()) < 5e-3, (key, name)
