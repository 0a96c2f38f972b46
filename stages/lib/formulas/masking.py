"""Masked language modelling: which tokens are hidden, as a function of (seed, position) alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from stages.lib.formulas.token_losses import IGNORE

Ids = NDArray[np.int64]


SHARE_MASKED, SHARE_RANDOM = 0.8, 0.1
"""Of the chosen tokens: 80% become the mask token, 10% a random one, 10% stay (Devlin et al., 2019, section 3.1)."""


@dataclass(frozen=True)
class Masking:
    """Hides a share of the tokens of a row."""

    probability: float
    """How likely a token is chosen."""
    mask_token_id: int
    vocabulary_size: int
    special_ids: frozenset[int]
    """Never chosen, and never put in as a random token."""

    @cached_property
    def replacements(self) -> Ids:
        """The ids that a random token is drawn from."""
        return np.setdiff1d(np.arange(self.vocabulary_size), np.fromiter(self.special_ids, np.int64))

    def __call__(self, ids_T: Ids, seed: int, position: int) -> tuple[Ids, Ids]:
        """What the model sees, and its targets: `IGNORE` where no token was chosen.

        Drawn from a generator of (seed, position), so that a row has the same mask in every process and after a restart,
        and another one in the next pass. At least one token is chosen where there is any to choose.
        """
        generator = np.random.Generator(np.random.PCG64([seed, position]))
        fate_T, which_T = generator.random(len(ids_T)), generator.random(len(ids_T))
        random_T = generator.choice(self.replacements, len(ids_T))
        open_T = ~np.isin(ids_T, list(self.special_ids))
        chosen_T = open_T & (which_T < self.probability)
        if not chosen_T.any() and open_T.any():
            chosen_T[np.flatnonzero(open_T)[which_T[open_T].argmin()]] = True
        seen_T = ids_T.copy()
        masked_T = chosen_T & (fate_T < SHARE_MASKED)
        swapped_T = chosen_T & (fate_T >= SHARE_MASKED) & (fate_T < SHARE_MASKED + SHARE_RANDOM)
        seen_T[masked_T] = self.mask_token_id
        seen_T[swapped_T] = random_T[swapped_T]
        return seen_T, np.where(chosen_T, ids_T, IGNORE)
