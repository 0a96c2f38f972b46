"""Rows that a stage wrote, and models: what their files say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import ArtifactError, DataError, Problem, SlipwayError, shown_path
from pipeline.settings.paths import is_file, read_json
from pipeline.store.artifact import MANIFEST, Manifest, read_manifest
from stages.lib.inspecting.data import Asked, RowLooks, example_of, first_rows, meaning_of
from stages.lib.inspecting.token_views import ModelView
from stages.lib.rows.canonical import FORMATS, Row, format_of_kind, read_rows
from stages.lib.text.tokenizers import tokenizer_folder

ROW_FILES = ("rows.jsonl", "train.jsonl", "heldout.jsonl")
ADAPTER = "adapter_config.json"
MODEL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", ADAPTER)


def is_described(folder: Path) -> bool:
    """Whether the folder is an artifact, a model or a tokenizer: something else than data from outside."""
    return any(is_file(folder / name) for name in (MANIFEST, *MODEL_FILES)) or is_file(
        folder / "tokenizer" / "tokenizer.json"
    )


def inspect_folder(folder: Path, asked: Asked) -> dict[str, Any]:
    """What the artifact, model or tokenizer in the folder holds, as plain values. Raises `ArtifactError` if it cannot be told."""
    manifest = read_manifest(folder) if is_file(folder / MANIFEST) else None
    if manifest is not None and any(is_file(folder / name) for name in ROW_FILES):
        refuse_options(folder, asked)
        return inspect_rows(folder, manifest, asked)
    if not any(is_file(tokenizer_folder(folder) / name) or is_file(folder / name) for name in MODEL_FILES):
        kind = manifest.artifact_kind if manifest else "unknown"
        hint = "Rows, models and tokenizers are inspected; `slipway show` prints the manifest of any artifact."
        raise ArtifactError(Problem(shown_path(folder), f"holds a {kind}, and neither rows nor a tokenizer", hint))
    refuse_options(folder, asked)
    return inspect_model(folder, manifest)


def refuse_options(folder: Path, asked: Asked) -> None:
    """Raises `DataError` for options that are for data from outside."""
    if asked.layout or asked.format or asked.given:
        what = "is no data from outside, so --layout, --format and --set say nothing of it"
        raise DataError(Problem(shown_path(folder), what, "Leave them out."))


def about_artifact(folder: Path, manifest: Manifest | None) -> dict[str, Any]:
    if manifest is None:
        return {"folder": str(folder)}
    return {
        "folder": str(folder),
        "artifact_id": manifest.artifact_id,
        "artifact_kind": str(manifest.artifact_kind),
        "step": manifest.step,
        "stage": manifest.stage,
        "facts": manifest.facts.model_dump(exclude_none=True),
        "metrics": manifest.metrics,
    }


def inspect_rows(folder: Path, manifest: Manifest, asked: Asked) -> dict[str, Any]:
    """The rows of `clean` or `mix`: what was dropped when they were made, and how they look and how long they are."""
    format = format_of_kind(manifest.artifact_kind)
    view = ModelView(asked.model) if asked.model else None
    files = []
    for name in (each for each in ROW_FILES if is_file(folder / each)):
        looks = RowLooks(format, view, asked)
        count = 0
        for where, row in first_rows(checked_rows(folder / name, format), asked.num_rows):
            try:
                looks.add(where, row)
            except (AttributeError, IndexError, KeyError, TypeError):
                raise ArtifactError(damaged(folder / name, count + 1, f"is no row of {format}")) from None
            count += 1
        complete = not asked.num_rows or count < asked.num_rows
        files.append({"file": name, "looked_at": count, "complete": complete, **looks.data()})
    return {
        "what": "rows",
        "format": format,
        **about_artifact(folder, manifest),
        **ledger_in(folder),
        "files": files,
    }


def checked_rows(path: Path, format: str) -> Iterator[tuple[str, Row]]:
    """(where, row) of each. Raises `ArtifactError` for a line that is no row of the format."""
    number = 0
    try:
        for number, row in enumerate(read_rows(path), start=1):
            if not isinstance(row, dict) or not row.keys() >= set(FORMATS[format].fields):
                raise ArtifactError(damaged(path, number, f"is no row of {format}"))
            yield f"{path.name}:{number}", row
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ArtifactError(damaged(path, number + 1, "is not JSON")) from None


def damaged(path: Path, number: int, what: str) -> Problem:
    return Problem(
        f"{shown_path(path)}:{number}", what, "`slipway verify` tells what else is damaged; run its recipe again."
    )


def ledger_in(folder: Path) -> dict[str, Any]:
    """What `ledger.json` says of how the rows were made; nothing where there is none."""
    if not is_file(folder / "ledger.json"):
        return {}
    ledger = read_json(folder / "ledger.json")
    try:
        return {"rows": counts_in(ledger)}
    except (AttributeError, KeyError, TypeError):
        hint = "`slipway verify` tells what else is damaged; run its recipe again."
        raise ArtifactError(Problem(shown_path(folder / "ledger.json"), "is no ledger", hint)) from None


def counts_in(ledger: dict[str, Any]) -> dict[str, Any]:
    """The ledger in the form of `counts_of`."""
    reasons = [
        {
            "reason": reason,
            "count": entry["count"],
            "meaning": meaning_of(reason),
            "example": "; ".join(entry["examples"][:1]),
        }
        for reason, entry in sorted(ledger["dropped"].items(), key=lambda item: -item[1]["count"])
    ]
    return {
        "read": ledger["read"],
        "kept": ledger["kept"],
        "dropped": sum(reason["count"] for reason in reasons),
        "reasons": reasons,
        "repaired": [{"what": what, "count": count, "meaning": ""} for what, count in ledger["repaired"].items()],
        "noticed": [
            {"what": what, "count": count, **example_of(ledger.get("noticed_examples", {}).get(what))}
            for what, count in ledger.get("noticed", {}).items()
        ],
        "complete": True,
    }


def inspect_model(folder: Path, manifest: Manifest | None) -> dict[str, Any]:
    """A model or tokenizer: its facts, its template and stop ids, and a chat as it renders it."""
    found: dict[str, Any] = {"what": "model", **about_artifact(folder, manifest)}
    if is_file(folder / "config.json"):
        config = read_json(folder / "config.json")
        found["architecture"] = {
            name: config[name]
            for name in ("architectures", "model_type", "vocab_size", "torch_dtype", "dtype")
            if name in config
        }
    if is_file(folder / ADAPTER):
        adapter = read_json(folder / ADAPTER)
        found["adapter"] = {
            name: adapter[name]
            for name in ("base_model_name_or_path", "peft_type", "slipway_method", "r")
            if name in adapter
        }
    if is_file(folder / "generation_config.json"):
        ends = read_json(folder / "generation_config.json").get("eos_token_id")
        found["generation_stop_ids"] = ends if isinstance(ends, list) else [] if ends is None else [ends]
    try:
        view = ModelView(folder)
    except SlipwayError as error:
        return {**found, "problem": str(error)}
    found["tokenizer"] = view.facts()
    if view.tokenizer.chat_template:
        found["chat_template"] = view.tokenizer.chat_template
        found["example"] = view.example()
    return found
