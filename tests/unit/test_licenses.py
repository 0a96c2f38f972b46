"""A licence as a recipe gives it: what the hub would refuse is refused when the recipe is read."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.settings.strict import validate
from stages import STAGES
from stages.lib.models.published import PublishedParams


def problems_with(value: Any) -> list[str]:
    _, problems = validate(PublishedParams, {"license": value}, "params")
    return [str(problem) for problem in problems]


@pytest.mark.parametrize(
    ("value", "metadata"),
    [
        ("apache-2.0", {"license": "apache-2.0"}),
        ("llama3.1", {"license": "llama3.1"}),
        (
            {"name": "my-license", "link": "https://example.org/license.txt"},
            {"license": "other", "license_name": "my-license", "license_link": "https://example.org/license.txt"},
        ),
    ],
)
def test_what_the_hub_takes(value: Any, metadata: dict[str, str]) -> None:
    params, problems = validate(PublishedParams, {"license": value}, "params")
    assert params is not None and params.license is not None and not problems
    assert params.license.metadata() == metadata
    # As a job writes it down, and reads it again.
    again, _ = validate(PublishedParams, params.model_dump(mode="json"), "params")
    assert again == params


def test_a_misspelled_one_is_shown_the_nearest_and_the_way_out_works() -> None:
    (problem,) = problems_with("apache-2")
    assert problem.startswith("params.license: the hub lists no licence 'apache-2'. Did you mean 'apache-2.0'?")
    assert "{name: apache-2, link: https://...}" in problem
    assert problems_with({"name": "apache-2", "link": "https://example.org"}) == []


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (
            {"name": "mit", "link": "https://example.org"},
            "params.license: the hub lists 'mit', and links to it by itself",
        ),
        ({"name": "mine", "link": "LICENSE"}, "params.license.link: "),
        ("My License", "params.license.name: "),
        (3, "params.license: must be a mapping of fields"),
    ],
)
def test_what_no_card_can_say(value: Any, said: str) -> None:
    (problem,) = problems_with(value)
    assert problem.startswith(said)


def test_every_stage_that_publishes_a_model_takes_one() -> None:
    from pipeline.cards.metadata import PIPELINE_TAGS

    publishing = {kind for kind, stage in STAGES.items() if callable(stage.output) or stage.output in PIPELINE_TAGS} - {
        "annotate",
        "clean",
        "mix",
        "sample_preferences",
    }
    taking = {kind for kind, stage in STAGES.items() if issubclass(stage.params, PublishedParams)}
    assert publishing == taking
    assert len(taking) == 17
