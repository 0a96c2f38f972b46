"""A tiny policy that ends some of its completions, prompts, reward models, and runs of on-policy stages that can be looked into."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pipeline.stage import Context, Result
from pipeline.store.artifact import MANIFEST, Facts, Kind, Manifest
from stages import STAGES
from tests.distributed.training_world import docstrings, make_tokenizer, write_chats, write_model
from tests.integration.preference_world import run

END = "<|end|>"
REWARDS: list[dict[str, Any]] = [
    {"kind": "format", "parts": ["e"], "must_end": True, "partial_credit": True},
    {"kind": "length_penalty", "target_tokens": 2, "per_token": 0.1},
]
"""Between -0.6 and 1 for completions of at most 8 tokens, and seldom the same for two of them."""
PARAMS: dict[str, Any] = {
    "rewards": REWARDS,
    "rollouts": 2,
    "rollout_batch_size": 16,
    "global_batch_size": 8,
    "max_prompt_tokens": 40,
    "max_new_tokens": 8,
    "learning_rate": 3e-3,
    "warmup_steps": 1,
    "heldout_prompts": 8,
}


def write_policy(folder: Path, tokenizer: Any, **fields: Any) -> Path:
    """A Llama of two layers with random weights, which ends most of its completions, but not all, within eight tokens.

    Its row of the head for `END` is long, so that the logit of that token is large in some contexts and small in others.
    """
    from safetensors.torch import load_file, save_file

    write_model(folder, tokenizer, **fields)
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"][tokenizer.convert_tokens_to_ids(END)] *= 60
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@dataclass(frozen=True)
class OnPolicyWorld:
    """Folders of artifacts, and the tokenizer of them all."""

    model: Path
    chats: Path
    tokenizer: Any

    @property
    def inputs(self) -> dict[str, Path]:
        return {"model": self.model, "prompts": self.chats}


def make_on_policy_world(folder: Path) -> OnPolicyWorld:
    tokenizer = make_tokenizer()
    return OnPolicyWorld(write_policy(folder / "model", tokenizer), write_chats(folder / "chats"), tokenizer)


def write_manifest(folder: Path, kind: Kind, **facts: Any) -> Path:
    """Makes the folder an artifact with these facts; its files are not listed."""
    manifest = Manifest(
        artifact_id="0" * 64,
        artifact_kind=kind,
        stage="test",
        stage_version=1,
        step="test",
        recipe="test",
        seed=0,
        params={},
        input_ids={},
        files={},
        facts=Facts(**facts),
        created_at="2026-01-01T00:00:00Z",
        wall_seconds=1.0,
        device="cpu",
        world_size=1,
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json())
    return folder


def write_reward_model(folder: Path, tokenizer: Any, **fields: Any) -> Path:
    """A reward model with random weights, like one that its stage made, whose scores lie some tenths apart."""
    import torch

    from stages.lib.models.heads import add_reward_head
    from stages.lib.preferring.reward_models import HEAD_TYPE, fixed_prompt_scores, load_reward_model

    causal = write_model(folder.with_name(f"{folder.name}_causal"), tokenizer, **fields)
    torch.manual_seed(1)
    model = add_reward_head(causal, tokenizer.pad_token_id)
    with torch.no_grad():
        model.score.weight *= 10
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return write_manifest(
        folder,
        Kind.REWARD_MODEL,
        head_type=HEAD_TYPE,
        fixed_prompt_scores=fixed_prompt_scores(*load_reward_model(folder)),
    )


def make_other_tokenizer() -> Any:
    """Another vocabulary and another chat template than the policy's."""
    from stages.lib.text.chat_presets import PRESETS
    from tests.integration.tiny_language_model import make_tokenizer as make

    preset = PRESETS["chatml"]
    tokenizer = make([text[::-1] for _, text in docstrings()[:100]], vocabulary_size=320)
    tokenizer.add_special_tokens({"additional_special_tokens": list(preset.special_tokens)})
    tokenizer.chat_template = preset.template
    return tokenizer


@dataclass
class Seen:
    """What a run made on its way, seen from outside."""

    result: Result
    context: Context
    experiences: list[Any] = field(default_factory=list)
    """The experience of each rollout, as it is learned from."""
    parts: Any = None

    def lines(self, event: str) -> list[dict[str, Any]]:
        return list(self.context.journal.events(event))


@contextmanager
def watching(experiences: list[Any], parts: list[Any]) -> Iterator[None]:
    """Within it, rollouts and the parts that they are made with are noted."""
    from stages.lib.on_policy import loop as on_policy
    from stages.lib.on_policy import setup as on_policy_stage

    collect, publish = on_policy.Aligner.collect, on_policy_stage.publish_policy

    def watched_collect(self: Any, rollout: int) -> None:
        collect(self, rollout)
        experiences.append(self.progress.experience)

    def watched_publish(ctx: Any, params: Any, made: Any, formats: Any) -> Any:
        parts.append(made)
        return publish(ctx, params, made, formats)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(on_policy.Aligner, "collect", watched_collect)
        patch.setattr(on_policy_stage, "publish_policy", watched_publish)
        yield


def align(
    kind: str, inputs: Mapping[str, Path], folder: Path, changes: Mapping[str, Any] | None = None, **options: Any
) -> Seen:
    """A run of the stage `kind` in this process, with `PARAMS` changed by `changes`; `options` as `run` takes them."""
    experiences: list[Any] = []
    parts: list[Any] = []
    resources = {"micro_batch_size": 4, **options.pop("resources", {})}
    with watching(experiences, parts):
        result, context = run(
            STAGES[kind], inputs, {**PARAMS, **(changes or {})}, folder, resources=resources, **options
        )
    return Seen(result, context, experiences, parts[0])


def write_prompts(folder: Path, rows: Sequence[Mapping[str, Any]], heldout: Sequence[Mapping[str, Any]]) -> Path:
    folder.mkdir(parents=True)
    for split, these in (("train", rows), ("heldout", heldout)):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in these), encoding="utf-8")
    return folder
