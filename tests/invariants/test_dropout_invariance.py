"""Dropout is the same on one process and two, in small and large micro batches, in any layout, and with recomputation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import rows
from tests.distributed.training_world import (
    GPT2_WITH_DROPOUT,
    Job,
    make_tokenizer,
    run_jobs,
    write_chats,
    write_model,
    write_tokens,
)
from tests.integration.tiny_language_model import as_pair

pytestmark = pytest.mark.slow

STEPS = 8
MAX_DRIFT = 1e-5
"""Relative, of any single step's loss, as without dropout."""
NORM_DRIFT = 1e-4
"""The same of the gradients' norm, which other masks move by 1e-2 already where weights are new and losses hardly feel them."""

Key = tuple[int, str | None, int, bool]
CLASS: list[Key] = [  # processes, memory layout, micro batch, gradient checkpointing; 8 rows a step
    (1, None, 8, False),
    (1, None, 1, False),
    (2, None, 4, False),
    (2, None, 1, True),
    (2, "zero2", 2, False),
    (2, "zero3", 4, False),
]
OFF_KEY: Key = (1, "off", 8, False)
BERT = {
    "model_type": "bert",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
"""Its rates are 0.1 everywhere, as GPT-2's are: of embeddings, attention and residuals."""
COMMON = {"global_batch_size": 8, "max_steps": STEPS, "learning_rate": 3e-3, "warmup_steps": 2, "weight_decay": 0.1}
LORA = {
    "method": "lora",
    "rank": 4,
    "alpha": 8,
    "dropout": 0.1,
    "target_modules": ["q_proj", "v_proj", "up_proj"],
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("stages.language_model.pretrain", {**COMMON, "architecture": GPT2_WITH_DROPOUT}),
    "bert": ("stages.language_model.pretrain", {**COMMON, "architecture": BERT, "objective": "masked"}),
    "lora": ("stages.language_model.sft", {**COMMON, "max_length_tokens": 56, "adapter": LORA}),
    # The level of all scores has no gradient but rounding, which Adam would make steps of full length of.
    "reward": ("stages.alignment.reward", {**COMMON, "max_length_tokens": 56, "adam_epsilon": 1e-5}),
}
"""Blocks of several documents; masks of pairs of tokens; chats padded to the longest; rows of two sequences."""
OFF = {
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, Key], Job]:
    folder = tmp_path_factory.mktemp("dropout")
    tokenizer = make_tokenizer()
    tokens = write_tokens(folder / "tokens", tokenizer)
    chats = {
        "model": write_model(folder / "llama", tokenizer, attention_dropout=0.1),
        "chats": write_chats(folder / "chats"),
    }
    gpt2 = folder / "gpt2"
    write_gpt2(gpt2, tokenizer)
    pairs = {"model": gpt2, "preferences": write_pairs(folder / "pairs")}
    inputs = {"gpt2": {"tokens": tokens}, "bert": {"tokens": tokens}, "lora": chats, "reward": pairs}
    made = {}
    for kind, (module, params) in KINDS.items():
        for key in CLASS:
            processes, layout, micro, recomputed = key
            resources = {
                "micro_batch_size": micro,
                "deepspeed": layout,
                "gradient_checkpointing": recomputed,
                "log_every_steps": 1,
            }
            work = folder / f"{kind}-{processes}-{layout}-{micro}"
            made[kind, key] = Job(work, module, params, inputs[kind], resources)
    for kind, rates in OFF.items():
        module, params = KINDS[kind]
        without = {**params, "architecture": {**params["architecture"], **rates}}
        made[kind, OFF_KEY] = Job(folder / f"{kind}-off", module, without, inputs[kind], {"log_every_steps": 1})
    for processes in (1, 2):
        run_jobs(folder, [job for (_, key), job in made.items() if key[0] == processes], processes)
    return made


def write_gpt2(folder: Path, tokenizer: Any) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(**GPT2_WITH_DROPOUT, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_pairs(folder: Path) -> Path:
    folder.mkdir(parents=True)
    pairs = [
        {**as_pair(row), "prompt": [{"role": "user", "content": row["instruction"][:12]}]}
        | {
            side: [{"role": "assistant", "content": row[side][:width]}]
            for side, width in (("chosen", 14), ("rejected", 20))
        }
        for row in rows.preferences(60)
    ]
    for split, part in (("heldout", pairs[:12]), ("train", pairs[12:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in part), encoding="utf-8")
    return folder


@pytest.mark.parametrize("key", CLASS[1:], ids=lambda key: "-".join(map(str, key)))
@pytest.mark.parametrize("kind", KINDS)
def test_losses_with_dropout_do_not_depend_on_how_a_step_is_spread(
    jobs: dict[tuple[str, Key], Job], kind: str, key: Key
) -> None:
    job, reference = jobs[kind, key], jobs[kind, CLASS[0]]
    assert len(reference.losses()) == STEPS
    assert job.losses() == pytest.approx(reference.losses(), rel=MAX_DRIFT)
    norms, expected = ([line["gradient_norm"] for line in each.events("step")] for each in (job, reference))
    assert norms == pytest.approx(expected, rel=NORM_DRIFT)
    for name, value in reference.result()["metrics"].items():
        assert job.result()["metrics"][name] == pytest.approx(value, rel=MAX_DRIFT, abs=1e-7), name
    assert not [line["text"] for line in job.events("note") if "draws at random" in line["text"]]


@pytest.mark.parametrize("kind", OFF)
def test_dropout_does_something(jobs: dict[tuple[str, Key], Job], kind: str) -> None:
    """Masks that dropped nothing would agree as well. The weights of the first step are the same with and without."""
    dropped, whole = ([line["gradient_norm"] for line in jobs[kind, key].events("step")] for key in (CLASS[0], OFF_KEY))
    assert abs(dropped[0] / whole[0] - 1) > 10 * NORM_DRIFT
    losses, expected = jobs[kind, CLASS[0]].losses(), jobs[kind, OFF_KEY].losses()
    assert abs(losses[-1] / expected[-1] - 1) > 10 * MAX_DRIFT
