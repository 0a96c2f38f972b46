"""Every stage on a tiny model of every family: it runs, or `plan` says why not. `stages/MODELS.md` shows what was found.

`python -m tests.integration.test_model_families` writes that file anew.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from pipeline.settings.strict import CHECKOUT
from tests.integration.model_families import CELLS, ENCODER_CELLS, ENCODERS, FAMILIES, Data, cells_of, make_data

pytestmark = pytest.mark.slow

DOCUMENT = CHECKOUT / "stages" / "MODELS.md"

HEAD = """\
# Models

Written by `python -m tests.integration.test_model_families`, and held by its tests: each stage was run on a tiny model of each family,
made from scratch, with a chat template of its kind. `yes`: it runs. A number: `plan` says before anything runs why it cannot, in
the words below the table.
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return make_data(tmp_path_factory.mktemp("data"))


# Of transformers' own module of DeBERTa, and of peft where it adapts experts and GPT-2's layers.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.parametrize("name", [*FAMILIES, *ENCODERS])
def test_every_stage_runs_or_says_at_plan_why_not(name: str, data: Data, tmp_path: Path) -> None:
    found = cells_of(name, data, tmp_path / "family")
    words = DOCUMENT.read_text("utf-8")
    (row,) = [line for line in words.splitlines() if line.startswith(f"| {name} |")]
    assert [cell.strip() == "yes" for cell in row.split("|")[3:-1]] == [not why for why in found.values()]
    assert all(why in words for why in found.values())


def test_the_document_names_every_family_and_stage() -> None:
    lines = DOCUMENT.read_text("utf-8").splitlines()
    names = [line.split("|")[1].strip() for line in lines if line.startswith("| ")]
    assert names == ["family", *FAMILIES, "family", *ENCODERS]
    heads = [line for line in lines if line.startswith("| family |")]
    for head, cells in zip(heads, (CELLS, ENCODER_CELLS), strict=True):
        assert [cell.strip() for cell in head.split("|")[3:-1]] == list(cells)


def document(found: dict[str, dict[str, str]]) -> str:
    reasons = list(dict.fromkeys(why for cells in found.values() for why in cells.values() if why))
    lines = [HEAD]
    for title, families, cells in (("Causal", FAMILIES, CELLS), ("Encoders", ENCODERS, ENCODER_CELLS)):
        lines += [
            f"## {title}",
            "",
            f"| family | `model_type` | {' | '.join(cells)} |",
            f"|{'---|' * (len(cells) + 2)}",
        ]
        for name in families:
            shown = [str(reasons.index(why) + 1) if why else "yes" for why in found[name].values()]
            lines.append(f"| {name} | {families[name].model_type} | {' | '.join(shown)} |")
        lines.append("")
    return "\n".join([*lines, *(f"{number}. {why}" for number, why in enumerate(reasons, start=1)), ""])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        rows = make_data(Path(place) / "data")
        DOCUMENT.write_text(
            document({name: cells_of(name, rows, Path(place) / "family") for name in (*FAMILIES, *ENCODERS)}), "utf-8"
        )
