"""What encoder tasks measure, keep as figures and say of rows is the same for one process and for two."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from stages.lib.encoding.figures import FIGURES
from tests.distributed.training_world import Job, run_jobs
from tests.integration.tiny_encoder import request_encoder, request_rows, write_data
from tests.rows import slot_questions

pytestmark = pytest.mark.slow

TRAINING = {"global_batch_size": 8, "max_steps": 30, "learning_rate": 3e-3, "warmup_steps": 3}
WINDOW = {"max_length_tokens": 32, "stride_tokens": 6}
STAGES = {
    "classify": ("labels", {"max_length_tokens": 48}),
    "extract": ("spans", WINDOW),
    "answer": ("questions", {**WINDOW, "max_question_tokens": 12}),
}


def rows_of(kind: str) -> list[dict[str, Any]]:
    """Pairs of requests from two sources, requests with slots, questions on requests."""
    rows = request_rows()[:420]
    if kind == "answer":
        return slot_questions(rows)[:420]
    if kind == "extract":
        return rows
    return [
        {"text": one["text"], "text_pair": other["text"], "label": other["label"], "source": one["label"]}
        for one, other in itertools.pairwise(rows)
    ]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, int], Job]:
    folder = tmp_path_factory.mktemp("encoder-processes")
    encoder = request_encoder(folder / "encoder", "modernbert", steps=40)
    found: dict[tuple[str, str, int], Job] = {}
    for kind, (role, params) in STAGES.items():
        rows = rows_of(kind)
        data = write_data(folder / f"{kind}-data", rows[:-37], rows[-37:])
        for processes in (1, 2):
            work = folder / f"{kind}-{processes}"
            inputs = {"encoder": encoder, role: data}
            found["train", kind, processes] = Job(work, f"stages.encoder.{kind}", {**TRAINING, **params}, inputs)
    for kind, (_, params) in STAGES.items():
        trained = found["train", kind, 1].work / "out"
        for processes in (1, 2):
            inputs = {"model": trained, "rows": folder / f"{kind}-data"}
            work = folder / f"annotate-{kind}-{processes}"
            found["annotate", kind, processes] = Job(work, "stages.encoder.annotate", params, inputs)
    for processes in (1, 2):
        chosen = sorted((key for key in found if key[2] == processes), key=lambda key: key[0] == "annotate")
        run_jobs(folder, [found[key] for key in chosen], processes)
    return found


@pytest.mark.parametrize("kind", STAGES)
def test_training_measures_the_same(jobs: dict[tuple[str, str, int], Job], kind: str) -> None:
    one, two = jobs["train", kind, 1], jobs["train", kind, 2]
    metrics = one.result()["metrics"]
    assert two.result()["metrics"] == pytest.approx(metrics, rel=1e-5)
    figures = [(job.work / "out" / FIGURES).read_bytes() for job in (one, two)]
    assert figures[0] == figures[1]
    assert json.loads(figures[0])["rows"] == 37
    assert one.result()["facts"]["takes_pairs"] is (True if kind == "classify" else None)


@pytest.mark.parametrize("kind", STAGES)
def test_the_same_is_said_of_rows(jobs: dict[tuple[str, str, int], Job], kind: str) -> None:
    """To the byte, and what it is measured with is what training measured."""
    one, two = jobs["annotate", kind, 1], jobs["annotate", kind, 2]
    for name in ("rows.jsonl", FIGURES, "ledger.json"):
        assert (one.work / "out" / name).read_bytes() == (two.work / "out" / name).read_bytes()
    assert one.result() == two.result()
    assert (one.work / "out" / FIGURES).read_bytes() == (jobs["train", kind, 1].work / "out" / FIGURES).read_bytes()
