"""What a checkpoint of the on-policy loop must have in common with the run that resumes from it, and what is said then."""

from __future__ import annotations

from typing import Any

from pipeline.stage import Context
from stages.lib.on_policy.params import OnPolicyParams
from stages.lib.on_policy.parts import Progress
from stages.lib.text.prompts import Prompts
from stages.lib.training.scheduling import fingerprint
from stages.lib.training.state import Saved


def identity(ctx: Context, params: OnPolicyParams, prompts: Prompts) -> dict[str, Any]:
    """What a checkpoint must have in common with the run that resumes from it."""
    return {
        "total_steps": params.total_steps,
        "global_batch_size": params.global_batch_size,
        "seed": ctx.seed,
        "data": fingerprint(prompts),
    }


def say_what_was_restored(ctx: Context, params: OnPolicyParams, progress: Progress, saved: Saved) -> None:
    """Says what was restored."""
    within = progress.experience is not None
    ctx.journal.write(
        "resume",
        step=progress.step,
        total_steps=params.total_steps,
        checkpoint=str(saved.folder),
        restored=[
            "weights of policy and critic",
            "optimizer",
            "schedule",
            "prompt position",
            "KL coefficient",
            "reward statistics",
            *(["completions of the rollout"] if within else []),
            *(["completions of the next rollout"] if progress.written is not None else []),
        ],
        processes=saved.state["world_size"],
        kl_coefficient=progress.controller.coefficient,
    )
    where = "within a rollout, whose completions were restored" if within else "between two rollouts"
    ctx.journal.note(
        f"resumed at step {progress.step} of {params.total_steps}, {where}: weights, optimizer, schedule, prompt position,"
        f" KL coefficient {progress.controller.coefficient:.4g}, reward statistics"
    )
