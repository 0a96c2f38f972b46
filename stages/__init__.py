"""The stages, in the order of the pipeline. A new one is a file `stages/<group>/<kind>.py` and a line here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module

from pipeline.stage import Stage

GROUPS = {
    "clean": "data",
    "mix": "data",
    "tokenizer": "data",
    "pack": "data",
    "pretrain": "language_model",
    "sft": "language_model",
    "merge": "language_model",
    "deepen": "language_model",
    "reward": "alignment",
    "sample_preferences": "alignment",
    "reference_logprobs": "alignment",
    "dpo": "alignment",
    "kto": "alignment",
    "ppo": "alignment",
    "grpo": "alignment",
    "rloo": "alignment",
    "reinforce_plus_plus": "alignment",
    "online_dpo": "alignment",
    "distill": "compression",
    "quantize": "compression",
    "evaluate": "evaluation",
    "classify": "encoder",
    "extract": "encoder",
    "answer": "encoder",
    "annotate": "encoder",
}


class Stages(Mapping[str, Stage]):
    """Kind -> stage. A stage's file is loaded when it is asked for: a rank needs one of them, a recipe some."""

    def __getitem__(self, kind: str) -> Stage:
        stage: Stage = import_module(f"stages.{GROUPS[kind]}.{kind}").STAGE
        return stage

    def __contains__(self, kind: object) -> bool:
        return kind in GROUPS

    def __iter__(self) -> Iterator[str]:
        return iter(GROUPS)

    def __len__(self) -> int:
        return len(GROUPS)


STAGES = Stages()
