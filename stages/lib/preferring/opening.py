"""What the stages that train on pairs begin and end with: the model's tokenizer and the pairs, and what is told of both."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline.stage import Context
from pipeline.store.artifact import Facts
from stages.lib.models.adapters.folders import tokenizer_to_train_with
from stages.lib.models.config import read_config
from stages.lib.models.lengths import require_length
from stages.lib.preferring.pairs import Pairs, open_pairs
from stages.lib.preferring.params import PreferenceParams
from stages.lib.rows.ledger import Ledger
from stages.lib.text.chat_check import check_chat_template
from stages.lib.text.tokenizers import facts_of_tokenizer, load_tokenizer
from stages.lib.training.loop import Trained


@dataclass(frozen=True)
class Preferences:
    """The input `preferences` in the tokens of the input `model`."""

    tokenizer: PreTrainedTokenizerBase
    train: Pairs
    heldout: Pairs
    ledger: Ledger
    home: Path
    """The folder of the tokenizer."""

    @classmethod
    def open(cls, ctx: Context, params: PreferenceParams, *, with_margins: bool = False) -> Preferences:
        """Raises `DataError` if pairs may be longer than the model takes, or its chat template is not fit for training."""
        model = ctx.inputs["model"]
        require_length(read_config(model), params.max_length_tokens)
        home = tokenizer_to_train_with(ctx.inputs)
        tokenizer = load_tokenizer(home)
        check_chat_template(tokenizer, str(home))
        pairs = open_pairs(
            ctx, tokenizer, params.max_length_tokens, params.max_dropped_fraction, with_margins=with_margins
        )
        return cls(tokenizer, *pairs, home)

    def facts(self, params: PreferenceParams, trained: Trained, **known: Any) -> Facts:
        """What the consumers of the trained model check."""
        return Facts(
            **facts_of_tokenizer(self.tokenizer),
            dtype=trained.dtype,
            max_length_tokens=params.max_length_tokens,
            parameters=trained.parameters,
            train_rows=len(self.train),
            heldout_rows=len(self.heldout),
            dropped_rows=dict(self.ledger.dropped),
            optimizer_steps=trained.steps,
            **known,
        )
