"""A stage like `sft`, of a model whose linear layers have low-rank adapters with dropout: no stage trains such ones yet."""

from __future__ import annotations

from typing import Any

from pipeline.stage import Context, Result, Stage, accepts
from pipeline.store.artifact import Kind
from stages.language_model.sft import SftParams

RATE = 0.1


def run(ctx: Context, params: SftParams) -> Result:
    import torch
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import AutoModelForCausalLM

    from stages.lib.formulas.token_losses import TokenObjective, measure_tokens, token_metrics
    from stages.lib.models.loading import load_model
    from stages.lib.text.batches import padding_of
    from stages.lib.text.chats import Chats, collate_chats, tokenizing_chats
    from stages.lib.text.tokenized_parts import tokenize_input
    from stages.lib.text.tokenizers import load_tokenizer
    from stages.lib.training.loop import train

    source = ctx.inputs["model"]
    tokenizer = load_tokenizer(source)
    how = tokenizing_chats(tokenizer, params.max_length_tokens)
    rows, heldout, _ = tokenize_input(ctx, "chats", how, params.max_dropped_fraction)
    collate = collate_chats(padding_of(tokenizer))

    def make_model() -> Any:
        model = load_model(AutoModelForCausalLM, source)
        torch.manual_seed(0)  # the same adapters in every process
        config = LoraConfig(r=4, lora_alpha=8, lora_dropout=RATE, target_modules=["q_proj", "v_proj", "up_proj"])
        return inject_adapter_in_model(config, model)

    trained = train(
        ctx,
        params,
        make_model=make_model,
        tokenizer=source,
        data=Chats(rows),
        collate=collate,
        objective=TokenObjective(),
        evaluate=lambda evaluator: token_metrics(evaluator.sums(Chats(heldout), collate, measure_tokens)),
    )
    return Result({**trained.after, "train_loss": trained.train_loss})


STAGE = Stage(
    kind="lora",
    version=1,
    summary="",
    params=SftParams,
    inputs={"model": accepts(Kind.CAUSAL_LM), "chats": accepts(Kind.CHATS)},
    output=Kind.CAUSAL_LM,
    run=run,
    distributed=True,
)
