"""Adapters on disk: the files that peft reads, what they were trained on, and whether a model is that.

A folder holds adapter_config.json and adapter_model.safetensors. Those of a method that peft does not have hold the
weights that were trained under the names that they have in the model, in place of what the model has there.
adapter_base.json says which base they belong to, by a digest of its weights: on others they mean nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pipeline.errors import ArtifactError, Problem, shown_path
from pipeline.settings.paths import holds_file, read_json
from pipeline.stage import Context
from pipeline.store.artifact import MANIFEST, canonical_json, digest_bytes, digest_file, read_manifest
from pipeline.store.durable import write_json
from stages.lib.models.adapters.folders import BASE, CONFIG, OWN, WEIGHTS, method_in
from stages.lib.models.adapters.params import AdapterBlock, ContinuedMethod, method_name


def save_adapter(
    adapted_model: Any, state: dict[str, torch.Tensor] | None, base: tuple[str, str | None], folder: Path
) -> None:
    """Writes the adapter alone, with what its base is called: (folder, None), or repository and revision of the hub.

    The same bytes in every process. Without peft's model card, which says nothing.
    """
    config = adapted_model.peft_config["default"]
    config.base_model_name_or_path, config.revision = base
    for name, value in vars(config).items():
        if isinstance(value, set):  # whose order differs from run to run
            setattr(config, name, sorted(value))
    adapted_model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)


def write_adapter(adapted: Any, adapter: AdapterBlock, ctx: Context, trained: Mapping[str, Any], folder: Path) -> None:
    """Writes the adapter on `adapted`, a model in memory whose trained weights are `trained`, and what it was trained on.

    Raises `ArtifactError` where it would hold what is no weight.
    """
    role = next(role for role, path in ctx.inputs.items() if path == ctx.base)
    origin = ctx.origin(role)
    continued = isinstance(adapter, ContinuedMethod)
    method = method_in(ctx.inputs["adapter"]) if continued else method_name(type(adapter))
    if hasattr(adapted, "peft_config"):
        save_adapter(adapted, None, origin, folder)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.detach().contiguous().cpu() for name, tensor in trained.items()}, folder / WEIGHTS)
        name, revision = origin
        config = {OWN: method, "base_model_name_or_path": name, "revision": revision}
        write_json(folder / CONFIG, {**config, "params": adapter.model_dump(mode="json")})
    write_json(folder / BASE, {"method": method, **base_of(ctx.inputs[role], origin)})
    check_adapter(folder)


def base_of(folder: Path, origin: tuple[str, str | None]) -> dict[str, Any]:
    """What is written down of the base: where others find it, and what its weights are."""
    name, revision = origin
    artifact_id = read_manifest(folder).artifact_id if holds_file(folder, MANIFEST) else None
    found = {"weights_sha256": digest_of_weights(folder), "artifact_id": artifact_id}
    return {**found, "repository" if revision else "folder": name, "revision": revision}


def digest_of_weights(folder: Path) -> str:
    """A digest of a model's weight files. Where a manifest lists their digests, no file is read."""
    listed = read_manifest(folder).files if holds_file(folder, MANIFEST) else {}
    digests = {
        path.name: listed[path.name].sha256 if path.name in listed else digest_file(path)
        for path in sorted(folder.glob("*.safetensors"))
    }
    return digest_bytes(canonical_json(digests))


def check_adapter(folder: Path) -> None:
    """Raises `ArtifactError` unless all tensors of the adapter hold finite numbers. Zeros are sound: a fresh one has them."""
    problems = []
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        names = list(file.keys())
        for name in names:
            tensor = file.get_tensor(name)
            if tensor.numel() == 0:
                problems.append(f"{name} is empty")
            elif not bool(torch.isfinite(tensor).all()):
                problems.append(f"{name} holds values that are not finite")
    if problems or not names:
        what = f"the adapter is not fit to publish: {'; '.join(problems[:5]) or 'it holds nothing'}"
        raise ArtifactError(Problem(str(folder), what, "Nothing was published."))


def require_base(adapter: Path, model: Path, shown: str, where: str = "inputs.adapter") -> str:
    """What is to be said of the base of an adapter that does not say which weights it belongs to; "" if nothing is.

    Raises `ArtifactError`, whose place is `where`, if it says so and `model`, called `shown`, has others.
    """
    if not holds_file(adapter, BASE):
        return said_of_base(adapter, model, shown)
    base = read_json(adapter / BASE)
    if base.get("weights_sha256") == digest_of_weights(model):
        return ""
    name = base.get("folder") or f"{base.get('repository')} at {base.get('revision')}"
    made = f" (artifact {base['artifact_id'][:8]})" if base.get("artifact_id") else ""
    what = f"was trained on the weights of {shown_path(name)}{made}, and {shown_path(shown)} has others"
    hint = "Name the model that it was trained on: on other weights it means nothing."
    raise ArtifactError(Problem(where, what, hint))


def said_of_base(adapter: Path, model: Path, shown: str) -> str:
    """That an adapter of peft says that it was trained on another model, where it does.

    Folders move, and copies are the same model: so that is no error.
    """
    said = read_json(adapter / CONFIG).get("base_model_name_or_path")
    if said and said != shown and not (model.exists() and Path(str(said)).resolve() == model.resolve()):
        return f"the adapter says that it was trained on {shown_path(said)}, and is put on {shown_path(shown)}"
    return ""


def own_method(adapter: Path) -> str | None:
    """The method of an adapter that peft does not have; None of one that it has."""
    return read_json(adapter / CONFIG).get(OWN)


def put_weights_in(model: Any, adapter: Path, where: str = "inputs.adapter") -> Any:
    """The model with the weights of an adapter that peft does not have. Raises `ArtifactError` where it has no such ones."""
    own = dict(model.named_parameters())
    found = load_file(adapter / WEIGHTS)
    wrong = sorted(name for name, tensor in found.items() if name not in own or own[name].shape != tensor.shape)
    if wrong:
        what = f"and the model do not have the same weights: {', '.join(wrong[:3])} do not fit"
        raise ArtifactError(Problem(where, what, "Name the model that it was trained on."))
    with torch.no_grad():
        for name, tensor in found.items():
            own[name].copy_(tensor)
    return model
