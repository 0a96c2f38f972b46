"""What is random in a training on fixed data: looked at before the first step, and decided for every micro batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.stage import Context
from stages.lib.formulas.token_losses import Tensors
from stages.lib.models.drawing import evaluating, generator_states, named_draws, require_repeatable, same_states
from stages.lib.training.dropout import RowDropout
from stages.lib.training.engine import Engine
from stages.lib.training.scheduling import seed_of

Loss = Callable[[Tensors], Tensor]

MAX_DRIFT = 1e-5
"""Relative: how far a loss may be apart where rows are spread in another way. Sums in another order differ by 1e-7."""
MAX_SHARE = 0.25
"""The same in 16 bits, where rounding alone does more: as a share of what other masks make of the loss."""
OF_STEP = -1
"""Keeps the keys of steps apart from those of positions."""


@dataclass
class Randomness:
    """What is dropped of a row is decided by (seed, position); all else that a model draws is seeded per micro batch, and told."""

    ctx: Context
    device: torch.device
    without_dropout: bool = False
    """Whether the model must not be random at all: it is compared with another one, token by token."""
    dropout: RowDropout = field(default_factory=RowDropout)
    told: bool = False
    """Whether it was said that results depend on how rows are spread."""

    # Before training

    def look(self, engine: Engine, loss: Loss, batches: Sequence[Tensors], *, exact: bool) -> None:
        """Finds out what the model draws by calling it. `loss` is that of a micro batch, summed over its units.

        `batches` are a row, the same row twice, and if there are more of them: another row, and both rows. `exact`: all is in
        float32. All processes call it together. Raises `ArtifactError` where the model is random in evaluation mode or,
        where it must not be random at all, in training.
        """
        model, row = engine.module, batches[0]
        with evaluating(engine.wrapped):
            require_repeatable(self.device, lambda: loss(row))
        self.dropout.learn(model, self.device, lambda times: loss(batches[times - 1]))
        if self.without_dropout:
            require_repeatable(self.device, lambda: loss(row), in_training=True)
        elif self.dropout.strange:
            self.tell(named_draws(self.dropout.strange))
        elif self.dropout.sites and len(batches) > 2:
            other, both = batches[2:]
            self.require_promise(loss, [row, other], both, exact=exact)

    def require_promise(self, loss: Loss, rows: Sequence[Tensors], both: Tensors, *, exact: bool) -> None:
        """Says so where two rows lose something else together than one by one."""

        def measured(batch: Tensors, step: int) -> float:
            with torch.no_grad(), self.of(batch, step):
                return float(loss(batch).double())

        together = measured(both, 0)
        apart = abs(together - sum(measured(row, 0) for row in rows))
        allowed = MAX_DRIFT * abs(together)
        if not exact:
            others = [measured({**both, "positions": both["positions"] + 1 + number}, 0) for number in range(3)]
            allowed = max(allowed, MAX_SHARE * max(abs(together - other) for other in others))
        if apart > allowed:
            self.tell("dropout that is not the same for a row alone and beside another one")

    def tell(self, what: str) -> None:
        """Says, once, that results depend on how rows are spread."""
        if not self.told:
            self.ctx.journal.note(
                f"what this model draws at random depends on micro_batch_size and the number of processes ({what}): with other"
                " values of these the same recipe gives another result"
            )
        self.told = True

    # In training

    @contextlib.contextmanager
    def of(self, batch: Tensors, step: int) -> Iterator[None]:
        """Within it, forward and backward pass, all that is random is that of this micro batch."""
        positions = batch["positions"].tolist()
        torch.manual_seed(seed_of(self.ctx.seed, positions[0]))
        states = generator_states(self.device)
        with contextlib.ExitStack() as stack:
            if self.dropout.sites and not self.without_dropout:
                keys = self.keys(positions, len(batch["input_ids"]), step)
                stack.enter_context(self.dropout.rows(*keys, self.device))
            yield
        if not self.told and not same_states(states, generator_states(self.device)):
            self.tell("numbers that it draws by no dropout")

    def keys(self, positions: Sequence[int], num_sequences: int, step: int) -> tuple[list[int], int]:
        """One key per sequence, and the step's. A row may be several sequences: first all rows' first, then their second."""
        seed, count = self.ctx.seed, len(positions)
        sequences = [seed_of(seed, positions[index % count], index // count) for index in range(num_sequences)]
        return sequences, seed_of(seed, OF_STEP, step)
