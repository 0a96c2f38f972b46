"""Embeddings that are added are the same, and learn the same, in one process and in two, split or whole, killed or not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.training_world import Job, run_jobs, write_chats
from tests.families import write_base_model

pytestmark = pytest.mark.slow

WAYS = [(1, None), (1, "zero3"), (2, None), (2, "zero3")]
PARAMS = {
    "global_batch_size": 4,
    "max_steps": 4,
    "learning_rate": 1e-3,
    "max_length_tokens": 120,
    "chat_template": "chatml",
    "add_tokens": True,
}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str | None], Job]:
    folder = tmp_path_factory.mktemp("added")
    inputs = {
        "model": write_base_model(folder / "model", "llama-3", tie_word_embeddings=False),
        "chats": write_chats(folder / "chats"),
    }
    made = {
        (processes, layout): Job(
            folder / f"{processes}-{layout}",
            "stages.language_model.sft",
            PARAMS,
            inputs,
            {"deepspeed": layout, "micro_batch_size": 2, "log_every_steps": 1, "save_every_steps": 2},
        )
        for processes, layout in WAYS
    }
    for count in (1, 2):
        run_jobs(folder, [job for (processes, _), job in made.items() if processes == count], count)
    return made


def test_all_begin_with_the_same_rows(jobs: dict[tuple[int, str | None], Job]) -> None:
    whole = [load_file(job.work / "initial" / "model.safetensors") for job in jobs.values()]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        first = whole[0][name]
        assert first.shape[0] == 504 and not torch.equal(first[499], first[500])
        assert torch.equal(first[500], first[501]) and torch.allclose(first[500], first[:500].mean(0), atol=1e-7)
        assert all(torch.equal(each[name], first) for each in whole)


@pytest.mark.parametrize("way", WAYS[1:])
def test_all_learn_the_same(jobs: dict[tuple[int, str | None], Job], way: tuple[int, str | None]) -> None:
    one, other = jobs[WAYS[0]], jobs[way]
    assert other.losses() == pytest.approx(one.losses(), rel=1e-5)
    assert other.result()["metrics"]["added_tokens"] == 2
    tensors = [load_file(job.work / "out" / "model.safetensors") for job in (one, other)]
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[0].items():
        assert torch.allclose(tensors[1][name], tensor, atol=2e-4), name
    # Both tokens were read and predicted, so both are no longer the mean.
    rows = tensors[1]["lm_head.weight"]
    assert not torch.equal(rows[500], rows[501])


def test_a_run_that_was_killed_ends_with_the_same_weights(
    jobs: dict[tuple[int, str | None], Job], tmp_path: Path
) -> None:
    whole = jobs[1, None]
    killed = Job(
        tmp_path / "killed", whole.kind, whole.params, whole.inputs, whole.resources, die={"step": 4, "during": "step"}
    )
    run_jobs(tmp_path, [killed], 1, expected=1)
    again = Job(killed.work, whole.kind, whole.params, whole.inputs, whole.resources)
    run_jobs(tmp_path, [again], 1)
    assert again.weights() == whole.weights()
