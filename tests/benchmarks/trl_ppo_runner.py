"""One run of TRL's experimental PPO, by the interpreter of an environment that has it: see ppo_against_trl.py.

    python trl_ppo_runner.py SPEC.json

Writes what `ppo_against_trl.Run` says. Rewards are Slipway's own functions, so that both sides are paid by the same ones.
"""

from __future__ import annotations

import json
import os
import sys
import time
import types
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from pydantic import TypeAdapter
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainerCallback,
    set_seed,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer

from stages.lib.on_policy.reward_params import Rewards
from stages.lib.on_policy.rewards import combine, score_programmatic
from stages.lib.on_policy.samples import Completion, Sample

PADDING = -1.0


class Ids(nn.Module):
    """A backbone whose last hidden state is the token ids, B x T x 1, and `PADDING` where nothing stands."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **ignored: Any) -> Any:
        ids_BT = torch.where(attention_mask.bool(), input_ids.float(), PADDING)
        return types.SimpleNamespace(hidden_states=[ids_BT.unsqueeze(-1)])


class TextRewards(nn.Module):
    """What TRL takes for a reward model: it finds the completions in the ids and has Slipway's functions score them."""

    base_model_prefix = "ids"

    def __init__(self, rewards: list[dict[str, Any]], tokenizer: Any, prompt_length: int) -> None:
        super().__init__()
        self.ids = Ids()
        self.rewards = TypeAdapter(Rewards).validate_python(rewards)
        self.tokenizer = tokenizer
        self.prompt_length = prompt_length

    def score(self, hidden_BT1: Tensor) -> Tensor:
        """B x T x 1, the same at every place of a row: TRL reads it off where the completion ends."""
        samples = []
        for index, row in enumerate(hidden_BT1[:, self.prompt_length :, 0].tolist()):
            ids = [int(each) for each in row if each != PADDING]
            ended = bool(ids) and ids[-1] == self.tokenizer.eos_token_id
            text = self.tokenizer.decode(
                ids[:-1] if ended else ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
            samples.append(Sample(index, "", Completion(text, len(ids), ended), {}))
        weights = [reward.weight for reward in self.rewards]
        totals_B = torch.tensor(combine(weights, score_programmatic(self.rewards, samples)))
        return totals_B[:, None, None].expand(hidden_BT1.shape)


class Recorder(TrainerCallback):
    """The curves, and when each of their points was reached."""

    def __init__(self) -> None:
        self.run: dict[str, list[float]] = {"reward": [], "kl": [], "wall_seconds": [], "cpu_seconds": []}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.run["reward"].append(logs["objective/scores"])
        self.run["kl"].append(logs["objective/kl"])
        self.run["wall_seconds"].append(time.perf_counter())
        self.run["cpu_seconds"].append(time.process_time())


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    settings = spec["settings"]
    torch.set_num_threads(spec["threads"])
    set_seed(spec["seed"])
    tokenizer = AutoTokenizer.from_pretrained(spec["model"], padding_side="left")
    value = AutoModelForSequenceClassification.from_pretrained(spec["model"], num_labels=1, dtype=torch.float32)
    nn.init.zeros_(value.score.weight)
    length = max(map(len, spec["prompts"]))
    recorder = Recorder()
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=spec["folder"],
            total_episodes=settings["rollouts"] * settings["rollout_batch_size"],
            per_device_train_batch_size=settings["rollout_batch_size"],
            gradient_accumulation_steps=1,
            num_mini_batches=settings["rollout_batch_size"] // settings["global_batch_size"],
            local_rollout_forward_batch_size=settings["rollout_batch_size"],
            num_ppo_epochs=settings["epochs_per_rollout"],
            response_length=settings["max_new_tokens"],
            stop_token="eos",
            temperature=settings["temperature"],
            missing_eos_penalty=settings["missing_end_penalty"],
            kl_coef=settings["kl_coefficient"],
            kl_estimator=settings["kl_estimator"],
            cliprange=settings["clip_ratio"],
            cliprange_value=settings["value_clip"],
            vf_coef=settings["value_coefficient"],
            gamma=settings["gamma"],
            lam=settings["gae_lambda"],
            whiten_rewards=settings["whiten_rewards"],
            learning_rate=settings["learning_rate"],
            lr_scheduler_type=settings["schedule"],
            optim="adamw_torch",
            adam_beta1=settings["adam_beta1"],
            adam_beta2=settings["adam_beta2"],
            adam_epsilon=settings["adam_epsilon"],
            weight_decay=settings["weight_decay"],
            seed=spec["seed"],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            num_sample_generations=0,
            logging_steps=1,
            save_strategy="no",
            eval_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32),
        ref_model=AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32),
        reward_model=TextRewards(settings["rewards"], tokenizer, length),
        value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": spec["prompts"]}),
        data_collator=DataCollatorWithPadding(tokenizer, padding="max_length", max_length=length),
        callbacks=[recorder],
    )
    trainer.train()
    Path(spec["result"]).write_text(json.dumps(recorder.run))


if __name__ == "__main__":
    main()
