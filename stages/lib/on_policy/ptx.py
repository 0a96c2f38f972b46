"""Chats mixed into on-policy training, so that the policy keeps what it was taught (PPO-ptx, Ouyang et al., 2022, eq. 2)."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerBase

from pipeline.stage import Context
from stages.lib.formulas.token_losses import TARGETS, Tensors, num_asked
from stages.lib.processes.collectives import all_reduce_sum
from stages.lib.text.batches import padding_of
from stages.lib.text.chats import Chats, collate_chats, tokenizing_chats
from stages.lib.text.tokenized_parts import require_enough, tokenize_file
from stages.lib.training.engine import Engine
from stages.lib.training.params import derive_batch
from stages.lib.training.scheduling import ScheduledData, seed_of


class ChatMixture:
    """The chats of each optimizer step: those at positions step x batch size to (step + 1) x batch size of their schedule."""

    def __init__(
        self,
        ctx: Context,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        max_length_tokens: int,
        total_steps: int,
    ) -> None:
        how = tokenizing_chats(tokenizer, max_length_tokens, limit="ptx_max_length_tokens")
        chats = Chats(tokenize_file(ctx, ctx.inputs["chats"] / "train.jsonl", how))
        ledger = chats.tokenized.ledger
        require_enough(ledger, 0.5, "inputs.chats", "chats", "Raise ptx_max_length_tokens, or clean the chats.")
        ctx.journal.note(f"{ledger.kept:,} chats of {ledger.read:,} are mixed in, {batch_size} in each step")
        self.ctx = ctx
        self.batch = derive_batch(batch_size, ctx.resources, processes=ctx.world.size)
        self.schedule = ScheduledData(chats, seed_of(ctx.seed, 2), total_steps * batch_size)
        self.collate = collate_chats(padding_of(tokenizer))

    def add_gradients(self, engine: Engine, step: int, coefficient: float, totals: Tensors) -> None:
        """Adds the gradients of coefficient x the mean cross-entropy per token; its value to `totals` as `ptx_loss`."""
        share, micro = self.batch.global_batch_size // self.ctx.world.size, self.batch.micro_batch_size
        first = step * self.batch.global_batch_size + self.ctx.world.rank * share
        batches = [
            self.collate([self.schedule[position] for position in range(start, start + micro)])
            for start in range(first, first + share, micro)
        ]
        (tokens,) = all_reduce_sum([float(sum(num_asked(batch) for batch in batches))])
        for batch in batches:
            inputs = {name: tensor.to(engine.device) for name, tensor in batch.items()}

            def loss(inputs: dict[str, torch.Tensor] = inputs) -> torch.Tensor:
                nats = engine.forward(inputs["input_ids"], inputs["attention_mask"], targets_BT=inputs[TARGETS])
                totals["ptx_loss"] = totals.get("ptx_loss", 0.0) + nats.detach().double() / tokens
                return coefficient * nats / tokens * self.ctx.world.size

            engine.backward(loss, last=False)
