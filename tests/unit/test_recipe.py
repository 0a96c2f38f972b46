"""Recipes: what is read, and that every mistake is found at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import RecipeError
from pipeline.recipe.reader import load_recipe
from pipeline.recipe.recipe import Recipe, Upstream
from pipeline.store.artifact import Kind
from tests.unit.fake_stages import LAUNCHERS, STAGES

GOOD = """
name: demo
outputs: [joined]
stages:
  joined: {kind: join, inputs: {data: first, more: {second: second}}, params: {beta: 2e-1}}
  first: {kind: write, params: {count: 3}}
  second: {kind: write, seed: 7}
"""


def load(folder: Path, text: str, *overrides: str) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return load_recipe(path, STAGES, LAUNCHERS, overrides)


def problems(folder: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(folder, text, *overrides)
    prefix = f"{folder}/"
    return [str(problem).removeprefix(prefix).removeprefix("recipe.yaml: ") for problem in caught.value.problems]


def test_steps_stand_after_their_inputs_with_params_seed_and_kinds_resolved(tmp_path: Path) -> None:
    recipe = load(tmp_path, GOOD)
    assert [step.name for step in recipe.steps] == ["first", "second", "joined"]
    joined = recipe.step("joined")
    assert joined.inputs == {"data": Upstream("first"), "more.second": Upstream("second")}
    assert joined.params.model_dump() == {"beta": 0.2, "fail": ""}
    assert joined.output_kind is Kind.CHATS
    assert [step.seed for step in recipe.steps] == [42, 7, 42]


def test_ten_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        """
name: demo
outputs: [joined, loop_b, mismatched]
stages:
  first:
    kind: write
    params: {cuont: 1, count: 1.5, rate: "2e-5", file: nowhere.txt}
  joined:
    kind: join
    inputs: {}
  loop_a: {kind: join, inputs: {data: first, more: {x: loop_b}}}
  loop_b: {kind: join, inputs: {data: first, more: {x: loop_a}}}
  unused: {kind: write}
  other: {kind: wirte}
  mismatched: {kind: join, inputs: {data: loop_a}}
  mismatched: {kind: join}
""",
    )
    expected = [
        "recipe.yaml:16: the key 'mismatched' stands here a second time (first on line 15). Remove one.",
        "stages.first.params.cuont: unknown field. Did you mean 'count'?",
        "stages.first.params.count: must be a whole number, not the number 1.5. Write a whole number.",
        "stages.first.params.rate: must be a number, not the string '2e-5'. Remove the quotes.",
        f"stages.first.params.file: no such file or folder: nowhere.txt (looked below {tmp_path} and ",
        "stages.joined.inputs.data: is required: text. These stages would fit: first, unused.",
        "stages.loop_a.inputs: the stages wait for each other: loop_a <- loop_b <- loop_a. Remove one of these inputs.",
        "stages.unused: no output needs this stage. Add it to `outputs`, or remove it.",
        "stages.other.kind: there is no stage 'wirte'. Did you mean 'write'?",
        "stages.mismatched.inputs.data: needs text, and 'loop_a' makes chats.",
    ]
    for beginning in expected:
        assert any(line.startswith(beginning) for line in found), (beginning, found)
    assert list(tmp_path.iterdir()) == [tmp_path / "recipe.yaml"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("outputs: [joined]", ""), "outputs: is required"),
        (("outputs: [joined]", "outputs: [joind]"), "outputs.0: there is no stage 'joind'. Did you mean 'joined'?"),
        (("name: demo", "name: Demo!"), "name: string should match pattern"),
        (("name: demo", "name: demo\ncolour: red"), "colour: unknown field"),
        (("data: first", "dota: first"), "stages.joined.inputs.dota: the stage 'join' has no input of this name. Did you mean 'data'?"),
        (("data: first", "data: frist"), "stages.joined.inputs.data: there is no stage 'frist'. Did you mean 'first'?"),
        (("data: first", "data: ./nowhere"), "stages.joined.inputs.data: no such folder: ./nowhere"),
        (("data: first", "data: hub:owner/name@main"), "stages.joined.inputs.data: 'hub:owner/name@main' names no exact revision"),
        (("more: {second: second}", "more: second"), "stages.joined.inputs.more: takes several: name each"),
        (("seed: 7", "seed: -7"), "stages.second.seed: input should be greater than or equal to 0"),
        (("seed: 7", "seed: 7, extra: 1"), "stages.second.extra: unknown field"),
        (("seed: 7", "resources: {processes: 2}"), "stages.second.resources: the stage 'write' runs in one process"),
        (("params: {beta: 2e-1}", "resources: {launcher: torchrnu}"), "there is no launcher 'torchrnu'. Did you mean 'torchrun'?"),
        (("params: {beta: 2e-1}", "resources: {launcher: 5}"), "stages.joined.resources.launcher: must be a launcher's name, or a mapping with its `kind`, not 5"),
        (("params: {beta: 2e-1}", "resources: {launcher: {rendezvous: a}}"), "stages.joined.resources.launcher.kind: is required: the launcher's name. Write `kind: local or torchrun`."),
        (("params: {beta: 2e-1}", "resources: {launcher: {kind: torchrnu}}"), "there is no launcher 'torchrnu'. Did you mean 'torchrun'?"),
        (("params: {beta: 2e-1}", "resources: {launcher: {kind: torchrun, rendezvos: a}}"), "stages.joined.resources.launcher.rendezvos: unknown field. Did you mean 'rendezvous'?"),
        (("params: {beta: 2e-1}", "resources: {launcher: {kind: local, rendezvous: a}}"), "stages.joined.resources.launcher.rendezvous: unknown field"),
        (("params: {beta: 2e-1}", "resources: {launcher: {kind: torchrun, hosts: nowhere}}"), "stages.joined.resources.launcher.hosts: no such file or folder: nowhere"),
        (("params: {beta: 2e-1}", "resources: {launcher: torchrun, rendezvous: a:1}"), "stages.joined.resources.rendezvous: is an option of the launcher 'torchrun'. Write `launcher: {kind: torchrun, rendezvous: a:1}`."),
        (("name: demo", "name: demo\nresources: {hosts: x}"), "resources.hosts: is an option of the launcher 'torchrun'. Write `launcher: {kind: torchrun, hosts: x}`."),
        (("name: demo", "name: demo\nresources: {launcher: {kind: torchrun, rendezvos: a}}"), "resources.launcher.rendezvos: unknown field. Did you mean 'rendezvous'?"),
        (("params: {beta: 2e-1}", "resources: {processes: 2}"), "stages.joined.resources.launcher: 'local' starts one process"),
        (("params: {beta: 2e-1}", "resources: {deepspeed: zero9}"), "there is no memory layout 'zero9'"),
        (("name: demo", "name: demo\nresources: {procesess: 2}"), "resources.procesess: unknown field. Did you mean 'processes'?"),
        (("params: {count: 3}", "params: [1]"), "stages.first.params: must be a mapping, not the list [1]"),
        (("params: {count: 3}", "params: {block: nowhere.yaml}"), "stages.first.params.block: no such file or folder: nowhere.yaml"),
        (("params: {count: 3}", "params: {block: {wrods: []}}"), "stages.first.params.block.wrods: unknown field. Did you mean 'words'?"),
    ],
)  # fmt: skip
def test_each_mistake_says_where_and_what_to_do(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    assert change[0] in GOOD
    found = problems(tmp_path, GOOD.replace(*change))
    assert any(line.startswith(message) or message in line for line in found), found


def test_a_launcher_is_told_its_options_with_paths_that_start_at_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("node1 slots=8")
    step = "params: {beta: 2e-1}, resources: {processes: 2, launcher: {kind: torchrun, hosts: hosts}}"
    resources = load(tmp_path, GOOD.replace("params: {beta: 2e-1}", step)).step("joined").resources
    assert (resources.launcher_name, resources.launcher_options) == ("torchrun", {"hosts": str(tmp_path / "hosts")})
    plain = load(tmp_path, GOOD.replace("params: {beta: 2e-1}", "resources: {launcher: torchrun}")).step("joined")
    assert (plain.resources.launcher, plain.resources.launcher_options) == ("torchrun", {})


def test_a_stage_with_another_launcher_does_not_inherit_the_options(tmp_path: Path) -> None:
    common = "name: demo\nresources: {launcher: {kind: torchrun, rendezvous: a:1}}"
    text = GOOD.replace("name: demo", common)
    assert load(tmp_path, text).step("joined").resources.launcher_options == {"rendezvous": "a:1"}
    own = load(tmp_path, text.replace("params: {beta: 2e-1}", "resources: {launcher: local}")).step("joined")
    assert own.resources.launcher == "local"


def test_overrides_reach_params_by_the_stage_name_and_any_field_by_its_path(tmp_path: Path) -> None:
    recipe = load(tmp_path, GOOD, "joined.beta=3e-1", "stages.first.params.count=5", "second.seed=1", "seed=9")
    assert recipe.step("joined").params.model_dump()["beta"] == 0.3
    assert recipe.step("first").params.model_dump()["count"] == 5
    assert [step.seed for step in recipe.steps] == [9, 1, 9]
    assert problems(tmp_path, GOOD, "joined.bata=1") == [
        "stages.joined.params.bata: unknown field. Did you mean 'beta'?"
    ]
    assert problems(tmp_path, GOOD, "beta") == [
        "--set beta: is not of the form path=value. Write --set align.beta=0.2."
    ]
    assert problems(tmp_path, GOOD, "jioned.beta=1") == [
        "--set jioned.beta=1: the recipe has no stage 'jioned'. Did you mean 'joined'?"
    ]


def test_an_override_of_an_aliased_block_reaches_one_place_only(tmp_path: Path) -> None:
    text = GOOD.replace("params: {count: 3}", "params: &shared {count: 3}").replace("seed: 7", "params: *shared")
    recipe = load(tmp_path, text, "first.count=5")
    assert [recipe.step(name).params.model_dump()["count"] for name in ("first", "second")] == [5, 3]


def test_a_block_in_a_file_is_the_same_as_in_place_and_its_paths_start_at_that_file(tmp_path: Path) -> None:
    (tmp_path / "blocks").mkdir()
    (tmp_path / "blocks" / "b.yaml").write_text("words: [x, y]\n")
    inlined = load(tmp_path, GOOD.replace("count: 3", "count: 3, block: blocks/b.yaml"))
    in_place = load(tmp_path, GOOD.replace("count: 3", "count: 3, block: {words: [x, y]}"))
    assert inlined.step("first").params == in_place.step("first").params


def test_a_model_folder_from_outside_is_known_by_its_config(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    assert problems(tmp_path, GOOD.replace("data: first", "data: ./m")) == [
        "stages.first: no output needs this stage. Add it to `outputs`, or remove it.",
        "stages.joined.inputs.data: needs text, and the folder holds causal_lm. These stages would fit: first, second.",
    ]


def test_no_such_recipe_names_those_that_come_along() -> None:
    with pytest.raises(RecipeError, match="no such recipe"):
        load_recipe(Path("nowhere.yaml"), STAGES, LAUNCHERS)
