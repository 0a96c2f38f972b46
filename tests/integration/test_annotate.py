from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from pipeline.errors import ArtifactError, DataError, Preempted, RecipeError
from pipeline.running.estimates import architecture_of
from pipeline.settings.resources import Resources
from pipeline.settings.strict import validate
from pipeline.stage import Context, Estimate, Forecast, Result, World
from pipeline.store.artifact import Facts, Kind, Manifest, list_files
from pipeline.store.checkpoints import Checkpoints
from pipeline.store.journal import Journal
from stages.encoder import annotate, answer, classify, extract
from stages.encoder.annotate import STAGE, AnnotateParams, check
from stages.lib.encoding import annotating
from stages.lib.encoding.figures import FIGURES
from stages.lib.encoding.published import Published
from stages.lib.rows.canonical import read_rows, write_rows
from tests.integration.test_classify import pairs
from tests.integration.tiny_encoder import request_encoder, request_rows, run_task, write_data
from tests.rows import slot_questions

pytestmark = pytest.mark.slow

COMMON = {"global_batch_size": 32, "learning_rate": 3e-3, "warmup_steps": 10}
SLOTS = ("add_to_playlist", "book_table")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return request_encoder(tmp_path_factory.mktemp("encoder") / "bert", "bert")


def trained(stage: Any, encoder: Path, role: str, sides: tuple[list, list], folder: Path, **params: Any) -> Path:
    """The artifact of a stage, with a manifest, as the worker would commit it; and its data, in `folder`."""
    data = write_data(folder / "data", *sides)
    params = {**COMMON, **params}
    result, out = run_task(stage, {"encoder": encoder, role: data}, params, folder / "run")
    manifest = Manifest(
        artifact_id="a" * 64,
        artifact_kind=stage.output,
        stage=stage.kind,
        stage_version=stage.version,
        step="step",
        recipe="recipe",
        seed=5,
        params=stage.params(**params).model_dump(mode="json"),
        input_ids={},
        files=list_files(out),
        facts=result.facts,
        metrics=dict(result.metrics),
        created_at="",
        wall_seconds=1.0,
        device="cpu",
        world_size=1,
    )
    (out / "manifest.json").write_text(manifest.model_dump_json(), encoding="utf-8")
    return out


@pytest.fixture(scope="module")
def classifier(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    sides = request_rows()[:2000], request_rows()[-100:]
    folder = tmp_path_factory.mktemp("classifier")
    return trained(classify.STAGE, encoder, "labels", sides, folder, max_steps=60, max_length_tokens=24)


@pytest.fixture(scope="module")
def pair_classifier(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    sides = pairs(request_rows()[:1500]), pairs(request_rows()[-60:])
    folder = tmp_path_factory.mktemp("pairs")
    return trained(classify.STAGE, encoder, "labels", sides, folder, max_steps=40, max_length_tokens=48)


@pytest.fixture(scope="module")
def extractor(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [row for row in request_rows() if row["label"] in SLOTS]
    window = {"max_length_tokens": 24, "stride_tokens": 8}
    folder = tmp_path_factory.mktemp("extractor")
    return trained(extract.STAGE, encoder, "spans", (rows[:1200], rows[-80:]), folder, max_steps=60, **window)


@pytest.fixture(scope="module")
def reader(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = slot_questions(row for row in request_rows() if row["label"] in SLOTS)
    nothing = [{**row, "question": "which planet ?", "answers": []} for row in rows[:300]]
    window = {"max_length_tokens": 32, "stride_tokens": 8, "max_question_tokens": 12, "max_answer_tokens": 10}
    folder = tmp_path_factory.mktemp("reader")
    sides = [*rows[:1500], *nothing[:250]], [*rows[-80:], *nothing[250:]]
    return trained(answer.STAGE, encoder, "questions", sides, folder, max_steps=60, **window)


def cleaned(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True)
    write_rows(folder / "rows.jsonl", rows)
    return folder


def run(model: Path, rows: Path, folder: Path, *, stop: Any = None, **params: Any) -> tuple[Result, Path]:
    context = Context(
        inputs={"model": model, "rows": rows},
        out=folder / "out",
        work=folder,
        resume=None,
        checkpoints=Checkpoints(folder / "checkpoints"),
        seed=5,
        resources=Resources(device="cpu", threads=1),
        journal=Journal(folder / "journal.jsonl", writes=True),
        world=World(),
        stop_requested=stop or (lambda: False),
    )
    context.out.mkdir(parents=True, exist_ok=True)
    return STAGE.run(context, AnnotateParams(**params)), context.out


def written(out: Path) -> list[dict[str, Any]]:
    return list(read_rows(out / "rows.jsonl"))


def of_training(model: Path) -> dict[str, float]:
    return Manifest.model_validate_json((model / "manifest.json").read_bytes()).metrics


# Labels


def test_labels_texts_as_plain_transformers_does(classifier: Path, tmp_path: Path) -> None:
    """The texts that are cut as well; what travels along stays."""
    rows = [{"id": str(n), "text": row["text"], "columns": {"n": n}} for n, row in enumerate(request_rows()[-60:])]
    rows.append({"id": "long", "text": " please ".join(row["text"] for row in rows[:20])})
    result, out = run(classifier, cleaned(tmp_path / "rows", rows), tmp_path / "run")
    found = written(out)
    assert [row["id"] for row in found] == [row["id"] for row in rows]
    assert found[3]["columns"] == {"n": 3}
    classified = pipeline("text-classification", model=str(classifier), tokenizer=str(classifier))
    answers = classified([row["text"] for row in rows], truncation=True)
    assert [row["label"] for row in found] == [each["label"] for each in answers]
    for row, each in zip(found, answers, strict=True):
        assert row["annotation"]["score"] == pytest.approx(each["score"], abs=1e-5)
        assert max(row["annotation"]["scores"].values()) == row["annotation"]["score"]
    assert not [name for name in result.metrics if "accuracy" in name] and not (out / FIGURES).exists()
    lengths = [len(ids) for ids in classified.tokenizer([row["text"] for row in rows])["input_ids"]]
    assert result.metrics["rows_truncated"] == sum(length > 24 for length in lengths) > 0
    assert result.metrics["rows_without_label"] == result.metrics["rows_kept"] == 61
    assert sum(value for name, value in result.metrics.items() if name.startswith("rows_labelled_")) == 61


def test_labels_pairs_as_plain_transformers_does(pair_classifier: Path, tmp_path: Path) -> None:
    rows = [{**row, "label": None} for row in pairs(request_rows()[-70:])]
    rows[0] = {**rows[0], "text": rows[0]["text"] * 12}
    _, out = run(pair_classifier, cleaned(tmp_path / "rows", rows), tmp_path / "run")
    found = written(out)
    classified = pipeline("text-classification", model=str(pair_classifier), tokenizer=str(pair_classifier))
    answers = classified([{"text": row["text"], "text_pair": row["text_pair"]} for row in rows], truncation=True)
    assert [row["label"] for row in found] == [each["label"] for each in answers]
    scores = [row["annotation"]["score"] for row in found]
    assert scores == pytest.approx([each["score"] for each in answers], abs=1e-5)
    assert all("given" not in row["annotation"] for row in found)


def test_refuses_the_other_sort_of_rows(classifier: Path, pair_classifier: Path, tmp_path: Path) -> None:
    single = cleaned(tmp_path / "single", request_rows()[:4])
    double = cleaned(tmp_path / "double", pairs(request_rows()[:4]))
    with pytest.raises(DataError, match="was trained on pairs of texts, and the rows are single texts"):
        run(pair_classifier, single, tmp_path / "a")
    with pytest.raises(DataError, match="was trained on single texts, and the rows are pairs of texts"):
        run(classifier, double, tmp_path / "b")


def test_measures_what_training_measured(classifier: Path, tmp_path: Path) -> None:
    """On the same held-out rows the same figures, baselines included; on others, others."""
    data = classifier.parents[1] / "data"
    result, out = run(classifier, data, tmp_path / "run")
    told = of_training(classifier)
    for name in ("accuracy", "macro_f1", "accuracy_majority", "accuracy_bag_of_words", "macro_f1_bag_of_words"):
        assert result.metrics[f"heldout_{name}"] == told[f"heldout_{name}"], name
    assert result.metrics["heldout_loss"] == pytest.approx(told["heldout_loss"], abs=1e-5)
    assert json.loads((out / FIGURES).read_bytes()) == json.loads((classifier / FIGURES).read_bytes())
    found = written(out)
    assert [row["annotation"]["given"] for row in found] == [row["label"] for row in read_rows(data / "heldout.jsonl")]
    right = sum(row["annotation"]["given"] == row["label"] for row in found)
    assert right / len(found) == told["heldout_accuracy"]

    other, _ = run(classifier, data, tmp_path / "train", split="train")
    assert other.metrics["train_accuracy"] > 0.5
    assert not [name for name in other.metrics if name.startswith("heldout_") or "bag_of_words" in name]


def test_labels_that_the_model_does_not_know_are_named_or_counted(classifier: Path, tmp_path: Path) -> None:
    """And mapped where the recipe says so: two of the model's labels may be one of the rows'."""
    rows = request_rows()[-60:]
    new = {"play_music": "music", "add_to_playlist": "music"}
    others = [{**row, "label": new.get(row["label"], row["label"])} for row in rows] + [{"text": "hi", "label": "chat"}]
    folder = cleaned(tmp_path / "rows", others)
    music = sum(row["label"] == "music" for row in others)
    with pytest.raises(
        DataError, match=rf"the model does not know: 'music' \({music}\), 'chat' \(1\); it knows 'add_to"
    ):
        run(classifier, folder, tmp_path / "a")
    with pytest.raises(DataError, match=r"the model does not know: 'chat' \(1\)"):
        run(classifier, folder, tmp_path / "b", labels=new)
    counted, _ = run(classifier, folder, tmp_path / "c", unknown_labels="count")
    assert counted.metrics["heldout_rows_with_unseen_label"] == music + 1
    mapped, out = run(classifier, folder, tmp_path / "d", labels=new, unknown_labels="count")
    assert mapped.metrics["heldout_rows_with_unseen_label"] == 1
    found = written(out)
    right = sum(row["label"] == row["annotation"]["given"] for row in found)
    assert mapped.metrics["heldout_accuracy"] == right / 61
    assert any(row["label"] == row["annotation"]["given"] == "music" for row in found)
    # What rows call alike is one label, as probable as both together.
    model = AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    row = next(row for row in found if row["label"] == "music")
    encoded = AutoTokenizer.from_pretrained(classifier)(row["text"], return_tensors="pt", truncation=True)
    with torch.no_grad():
        probs = model(**encoded).logits[0].softmax(-1).tolist()
    of_label = dict(zip(model.config.id2label.values(), probs, strict=True))
    together = of_label["play_music"] + of_label["add_to_playlist"]
    assert row["annotation"]["score"] == pytest.approx(together, abs=1e-5)
    with pytest.raises(
        DataError, match=r"params\.labels\.play_musik: is no label of the model\. Did you mean 'play_music'"
    ):
        run(classifier, folder, tmp_path / "e", labels={"play_musik": "x"})


def test_rows_that_the_model_is_not_sure_of_are_dropped_and_counted(classifier: Path, tmp_path: Path) -> None:
    folder = cleaned(tmp_path / "rows", [{"text": row["text"]} for row in request_rows()[-80:]])
    whole, out = run(classifier, folder, tmp_path / "a")
    scores = [row["annotation"]["score"] for row in written(out)]
    least = sorted(scores)[20]
    some, kept = run(classifier, folder, tmp_path / "b", min_score=least)
    assert [row["annotation"]["score"] for row in written(kept)] == [score for score in scores if score >= least]
    assert some.metrics["dropped_below_min_score"] == sum(score < least for score in scores)
    assert some.facts == Facts(dropped_rows={"below_min_score": int(some.metrics["dropped_below_min_score"])})
    assert some.metrics["mean_score"] == whole.metrics["mean_score"]
    with pytest.raises(DataError, match=r"params\.min_score: 1\.0 is reached by no row; the best has 0\."):
        run(classifier, folder, tmp_path / "c", min_score=1.0)


def test_goes_on_after_the_rows_that_were_done(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the third part of four, it reads the rows of two parts only after the restart, and says the same."""
    monkeypatch.setattr(annotating, "ROWS_AT_ONCE", 40)
    folder = cleaned(tmp_path / "rows", [{"text": row["text"]} for row in request_rows()[-150:]])
    result, out = run(classifier, folder, tmp_path / "whole")
    work = tmp_path / "stopped"
    with pytest.raises(Preempted, match="after 80 of 150 rows"):
        run(classifier, folder, work, stop=lambda: (work / "annotated-from-40.json").exists())
    assert sorted(path.name for path in work.glob("annotated-*")) == ["annotated-from-0.json", "annotated-from-40.json"]
    read: list[int] = []
    part = annotating.annotate_part
    monkeypatch.setattr(
        annotating,
        "annotate_part",
        lambda evaluator, annotator, rows: read.append(len(rows)) or part(evaluator, annotator, rows),
    )
    resumed, resumed_out = run(classifier, folder, work)
    assert read == [40, 30]
    assert resumed == result and list_files(resumed_out) == list_files(out)


def test_later_stages_read_what_was_labelled(classifier: Path, encoder: Path, tmp_path: Path) -> None:
    """Unlabelled rows, labelled, mixed and trained on."""
    from stages.data.mix import STAGE as MIX

    folder = cleaned(tmp_path / "rows", [{"text": row["text"]} for row in request_rows()[-400:]])
    _, out = run(classifier, folder, tmp_path / "labelled", min_score=0.3)
    _, mixed = run_task(MIX, {"sources.own": out}, {"heldout_fraction": 0.2}, tmp_path / "mix")
    assert all(row["source"] == "own" and row["label"] for row in read_rows(mixed / "train.jsonl"))
    params = {**COMMON, "max_steps": 15, "max_length_tokens": 24}
    result, _ = run_task(classify.STAGE, {"encoder": encoder, "labels": mixed}, params, tmp_path / "again")
    assert result.metrics["heldout_accuracy"] > 0


# Spans


def test_extracts_and_measures_as_training_did(extractor: Path, tmp_path: Path) -> None:
    data = extractor.parents[1] / "data"
    result, out = run(extractor, data, tmp_path / "run")
    told = of_training(extractor)
    names = [name for name in told if name.startswith("heldout_f1_of_")]
    for name in ("heldout_f1", "heldout_precision", "heldout_recall", "heldout_f1_dictionary", "heldout_spans", *names):
        assert result.metrics[name] == told[name], name
    assert json.loads((out / FIGURES).read_bytes()) == json.loads((extractor / FIGURES).read_bytes())
    found = written(out)
    for row in found:
        assert len(row["spans"]) == len(row["annotation"]["scores"])
        assert all(row["annotation"]["score"] <= score <= 1 for score in row["annotation"]["scores"])
        assert all(row["text"][span["start"] : span["end"]].strip() for span in row["spans"])

    texts = [{"text": row["text"]} for row in read_rows(data / "heldout.jsonl")]
    plain, plain_out = run(extractor, cleaned(tmp_path / "texts", texts), tmp_path / "plain")
    assert [row["spans"] for row in written(plain_out)] == [row["spans"] for row in found]
    assert "heldout_f1" not in plain.metrics
    assert plain.metrics["spans_labelled_artist"] == sum(
        span["label"] == "artist" for row in found for span in row["spans"]
    )


def test_an_extractor_of_another_maker_may_number_its_tags_as_it_likes(extractor: Path, tmp_path: Path) -> None:
    """The tags turned around, with the head's rows: the same spans. Another scheme of tags is refused with its name."""
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(extractor, other)
    (other / "manifest.json").unlink()
    config = json.loads((other / "config.json").read_bytes())
    tags = [config["id2label"][str(number)] for number in range(len(config["id2label"]))][::-1]
    config |= {"id2label": dict(enumerate(tags)), "label2id": {tag: number for number, tag in enumerate(tags)}}
    (other / "config.json").write_text(json.dumps(config), encoding="utf-8")
    weights = load_file(other / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        weights[name] = weights[name].flip(0).contiguous()
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    folder = cleaned(tmp_path / "rows", [{"text": row["text"]} for row in request_rows()[-30:]])
    shape = {"max_length_tokens": 24, "stride_tokens": 8}
    outs = [run(model, folder, tmp_path / name, **shape)[1] for name, model in (("a", extractor), ("b", other))]
    assert written(outs[0]) == written(outs[1])

    config["id2label"]["0"] = "E-artist"
    (other / "config.json").write_text(json.dumps({**config, "label2id": {}}), encoding="utf-8")
    with pytest.raises(ArtifactError, match="does not tag with O, B-x and I-x: E-artist"):
        run(other, folder, tmp_path / "c")


def test_spans_that_the_model_does_not_know_are_named(extractor: Path, tmp_path: Path) -> None:
    rows = [{"text": "on mars", "spans": [{"start": 3, "end": 7, "label": "planet"}]}]
    with pytest.raises(DataError, match=r"the model does not know: 'planet' \(1\)"):
        run(extractor, cleaned(tmp_path / "rows", rows), tmp_path / "a")
    result, _ = run(extractor, tmp_path / "rows", tmp_path / "b", unknown_labels="count")
    assert result.metrics["heldout_spans_unknown_label"] == 1 and result.metrics["heldout_f1_of_planet"] == 0


# Answers


def test_answers_and_measures_as_training_did(reader: Path, tmp_path: Path) -> None:
    data = reader.parents[1] / "data"
    result, out = run(reader, data, tmp_path / "run")
    told = of_training(reader)
    for name in ("exact_match", "f1", "f1_has_answer", "exact_match_no_answer", "f1_silent", "f1_random", "f1_first"):
        assert result.metrics[f"heldout_{name}"] == pytest.approx(told[f"heldout_{name}"]), name
    found = written(out)
    silent = sum(not row["answers"] for row in found)
    assert result.metrics["questions_left_unanswered"] == silent > 0
    for row in found:
        assert 0 <= row["annotation"]["score"] <= 1
        for each in row["answers"]:
            assert row["context"][each["start"] : each["start"] + len(each["text"])] == each["text"]

    unknown = [{**row, "answers": None} for row in read_rows(data / "heldout.jsonl")]
    plain, plain_out = run(reader, cleaned(tmp_path / "rows", unknown), tmp_path / "plain")
    assert [row["answers"] for row in written(plain_out)] == [row["answers"] for row in found]
    assert "heldout_f1" not in plain.metrics and plain.metrics["rows_without_label"] == len(unknown)


# What is refused before anything runs


def test_the_kind_of_rows_follows_from_the_model() -> None:
    def kind(model: Kind, rows: Kind, **params: Any) -> Kind:
        return annotate.output_kind(AnnotateParams(**params), {"model": model, "rows": rows})

    assert kind(Kind.CLASSIFIER, Kind.TEXT_ROWS) == Kind.LABEL_ROWS
    assert kind(Kind.CLASSIFIER, Kind.LABELS, split="train") == Kind.LABEL_ROWS
    assert kind(Kind.EXTRACTOR, Kind.TEXT) == Kind.SPAN_ROWS
    assert kind(Kind.READER, Kind.QUESTION_ROWS) == Kind.QUESTION_ROWS
    with pytest.raises(RecipeError, match="a classifier reads text and labels, and these are spans"):
        kind(Kind.CLASSIFIER, Kind.SPANS)
    with pytest.raises(RecipeError, match="a reader reads questions, and these are text_rows"):
        kind(Kind.READER, Kind.TEXT_ROWS)
    with pytest.raises(RecipeError, match=r"params\.split: label_rows have no sides"):
        kind(Kind.CLASSIFIER, Kind.LABEL_ROWS, split="heldout")
    params, problems = validate(AnnotateParams, {"min_score": 2.0}, "stages.a.params")
    assert params is None and "min_score" in str(problems[0])


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ({"1": "a", "2": "b", "3": "c"}, "numbers its outputs 1, 2, 3. Give each of its 3 outputs, from 0, a name"),
        ({"0": "a", "1": "b", "2": "a"}, "calls two outputs 'a'. Give each of its 3 outputs, from 0, a name"),
    ],
)
def test_names_that_fit_no_outputs_are_refused(
    classifier: Path, tmp_path: Path, names: dict[str, str], said: str
) -> None:
    other = tmp_path / "other"
    shutil.copytree(classifier, other)
    config = json.loads((other / "config.json").read_bytes())
    (other / "config.json").write_text(json.dumps({**config, "id2label": names}), encoding="utf-8")
    assert_planned(other, f"inputs.model: {said}")
    with pytest.raises(ArtifactError, match=re.escape(said)):
        run(other, cleaned(tmp_path / "rows", request_rows()[:2]), tmp_path / "run")


def assert_planned(model: Path, said: str) -> None:
    """What `plan` says of the model in the folder; of one that is yet to be made it says nothing."""
    config = architecture_of(model)
    for folder, expected in ((model, said), (None, "")):
        forecast = Forecast(AnnotateParams(), Resources(), {"model": Estimate(architecture=config, folder=folder)})
        assert expected in (found := "".join(map(str, check(forecast)))) and bool(expected) == bool(found)


def test_a_classifier_of_several_labels_at_once_is_refused(classifier: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(classifier, other)
    config = json.loads((other / "config.json").read_bytes())
    (other / "config.json").write_text(
        json.dumps({**config, "problem_type": "multi_label_classification"}), encoding="utf-8"
    )
    with pytest.raises(ArtifactError, match="is for multi_label_classification, and rows have one label each"):
        run(other, cleaned(tmp_path / "rows", request_rows()[:2]), tmp_path / "run")
    assert_planned(other, "inputs.model: is for multi_label_classification")
    assert Published(classifier).length(None) == 24
    (classifier_without := tmp_path / "bare").mkdir()
    for path in classifier.iterdir():
        if path.name != "manifest.json":
            shutil.copy(path, classifier_without)
    assert Published(classifier_without).length(None) == 96, "as many tokens as the model takes"
