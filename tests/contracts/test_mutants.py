"""The list of mutations follows the code: each finds its text, and names tests that are there."""

from __future__ import annotations

import re

import pytest

from tests.mutants import CHECKOUT, MUTATIONS, Mutation, place_of


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_it_can_be_made_and_judged(mutation: Mutation) -> None:
    assert not isinstance(said := place_of(CHECKOUT, mutation), str), said
    for test in mutation.tests:
        path, _, name = test.partition("::")
        text = (CHECKOUT / path).read_text(encoding="utf-8")
        assert re.search(
            rf"^def {re.escape(name.partition('[')[0])}\(" if name else "^def test_", text, re.MULTILINE
        ), test
