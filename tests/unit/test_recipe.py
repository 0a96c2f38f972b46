"""Recipes: what is read, and that every mistake is found at once."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from pipeline.errors import RecipeError
from pipeline.recipe.reader import kind_hint, load_recipe
from pipeline.recipe.recipe import Recipe, Upstream
from pipeline.settings.strict import looks_like_a_number
from pipeline.stage import accepts
from pipeline.store.artifact import Kind
from pipeline.store.store import Store
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
        (("params: {beta: 2e-1}", "resources: {deepspeed: ''}"), "there is no memory layout ''. Known: "),
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


def test_stages_of_one_process_take_from_the_common_resources_what_holds_for_them_too(tmp_path: Path) -> None:
    """`first` runs in one process, `joined` may run in several."""
    common = "resources: {device: cpu, keep_failed_output: true, processes: 2, launcher: torchrun, threads: 1}"
    recipe = load(tmp_path, GOOD.replace("name: demo", f"name: demo\n{common}"))
    one, several = recipe.step("first").resources, recipe.step("joined").resources
    assert (one.device, one.keep_failed_output, one.processes, one.threads) == ("cpu", True, 1, None)
    assert (several.device, several.keep_failed_output, several.processes, several.threads) == ("cpu", True, 2, 1)
    own = load(tmp_path, GOOD.replace("name: demo", f"name: demo\n{common}"), "stages.first.resources.device=auto")
    assert own.step("first").resources.device == "auto"


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
    (tmp_path / "m" / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    assert problems(tmp_path, GOOD.replace("data: first", "data: ./m")) == [
        "stages.first: no output needs this stage. Add it to `outputs`, or remove it.",
        "stages.joined.inputs.data: needs text, and the folder holds causal_lm. These stages would fit: first, second.",
    ]


def test_a_step_is_not_offered_to_itself() -> None:
    kinds = {"first": Kind.TEXT, "joined": Kind.TEXT, "model": Kind.CAUSAL_LM}
    assert kind_hint(accepts(Kind.TEXT), kinds, "joined") == "These stages would fit: first."
    assert kind_hint(accepts(Kind.CAUSAL_LM), kinds, "model") == "Add a stage that makes one."


def test_only_finite_numbers_lose_their_quotes() -> None:
    assert [text for text in ("2e-5", "nan", "inf", "many") if looks_like_a_number(text)] == ["2e-5"]


def test_no_such_recipe_names_those_that_come_along() -> None:
    with pytest.raises(RecipeError, match="no such recipe"):
        load_recipe(Path("nowhere.yaml"), STAGES, LAUNCHERS)


@pytest.mark.parametrize(
    "name",
    ["../../../escaped", "/absolute", "a/b", "a" * 65, "a" * 300, "A", ".hidden", "-x", "a\\0", "a\\n", "", "a b", "ä"],
)
def test_a_stage_name_that_no_folder_of_the_store_can_have_is_refused(tmp_path: Path, name: str) -> None:
    found = problems(tmp_path, GOOD.replace("second", f'"{name}"'))
    assert any("is no name for a stage. Allowed: lower-case letters" in line for line in found), found
    assert list(tmp_path.iterdir()) == [tmp_path / "recipe.yaml"]


@pytest.mark.parametrize("name", ["../x", "a.b", "a" * 65, "A", ""])
def test_the_names_in_roles_that_take_several_follow_the_same_rule(tmp_path: Path, name: str) -> None:
    found = problems(tmp_path, GOOD.replace("{second: second}", f'{{"{name}": second}}'))
    assert any("stages.joined.inputs.more." in line and "is no name for an input" in line for line in found), found


def test_the_longest_names_make_folders(tmp_path: Path) -> None:
    name = "a" * 64
    recipe = load(tmp_path, GOOD.replace("second", name).replace("name: demo", f"name: {name}"))
    assert recipe.step(name).name == recipe.name == name
    Store(tmp_path / "runs").work_folder(name, "0" * 64).mkdir(parents=True)
    assert any("should match pattern" in line for line in problems(tmp_path, GOOD.replace("demo", "a" * 65)))


def test_more_stages_than_anyone_reads_are_refused_and_many_are_read_fast(tmp_path: Path) -> None:
    """Each stands on the next, which is the slowest order to find."""

    def chain(count: int) -> str:
        steps = [f"  s{i}: {{kind: join, inputs: {{data: t, more: {{x: s{i + 1}}}}}}}" for i in range(count - 2)]
        lines = [*steps, f"  s{count - 2}: {{kind: write}}", "  t: {kind: write}"]
        return "\n".join(["name: chain", "outputs: [s0]", "stages:", *lines])

    started = time.process_time()
    assert len(load(tmp_path, chain(1000)).steps) == 1000
    assert problems(tmp_path, chain(1001)) == [
        "stages: has 1,001 stages, and 1,000 are the most. Divide it into several recipes."
    ]
    assert time.process_time() - started < 30  # Not minutes: no part of it is quadratic.


def test_after_a_hundred_problems_no_more_are_looked_for(tmp_path: Path) -> None:
    outputs = ", ".join(f"gone{i}" for i in range(20_000))
    started = time.process_time()
    found = problems(tmp_path, GOOD.replace("[joined]", f"[{outputs}]"))
    assert len(found) == 101
    assert found[-1].endswith("More was not looked for.")
    fields = ", ".join(f"cuont{i}: 1" for i in range(10_000))
    assert 100 <= len(problems(tmp_path, GOOD.replace("count: 3", fields))) <= 110
    assert time.process_time() - started < 30  # Not minutes: no part of it is quadratic.


def test_what_was_given_is_not_repeated_at_length(tmp_path: Path) -> None:
    for change in (("seed: 7", f"seed: {'x' * 500_000}"), ("params: {count: 3}", f"params: [{'1, ' * 40_000}]")):
        assert all(len(line) < 400 for line in problems(tmp_path, GOOD.replace(*change)))


@pytest.mark.parametrize(
    ("place", "what"),
    [
        ("hub:@" + "0" * 40, "names no repository of the hub"),
        ("hub:../../x@" + "0" * 40, "names no repository of the hub"),
        ("hub:a/b/c@" + "0" * 40, "names no repository of the hub"),
        ("hub:a/b@" + "0" * 39, "names no exact revision"),
        ("./pipe", "./pipe: is a pipe, and a file or folder is needed"),
        ("./loop", "is a symbolic link that leads back to itself"),
        ("./" + "x" * 300, "is longer than a path can be"),
        ("~nobody-of-this-name/m", "nobody's home folder is known as ~nobody-of-this-name"),
        ("./a\\0b", "holds a NUL character"),
        ("./recipe.yaml", "is no artifact, model or tokenizer folder"),
        ("/dev/zero", "is a device"),
    ],
)
def test_an_input_from_outside_says_what_is_wrong_with_its_place(tmp_path: Path, place: str, what: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    found = problems(tmp_path, GOOD.replace("data: first", f'data: "{place}"'))
    assert any("stages.joined.inputs.data: " in line and what in line for line in found), found


@pytest.mark.parametrize("place", ["../recipe", "zero2/../zero2", "x" * 300, "a\\0b"])
def test_the_name_of_a_memory_layout_leads_nowhere_else(tmp_path: Path, place: str) -> None:
    change = ("params: {beta: 2e-1}", f'resources: {{deepspeed: "{place}"}}')
    assert any("there is no memory layout" in line for line in problems(tmp_path, GOOD.replace(*change)))


def test_a_memory_layout_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    change = ("params: {beta: 2e-1}", "resources: {deepspeed: pipe.json}")
    assert any(
        "resources.deepspeed: pipe.json: is a pipe" in line for line in problems(tmp_path, GOOD.replace(*change))
    )


# --set


def test_an_override_reaches_items_of_lists_and_whole_mappings(tmp_path: Path) -> None:
    text = GOOD.replace("{count: 3}", "{count: 3, block: {words: [x, y]}}")
    recipe = load(tmp_path, text, "first.block.words.1=z")
    assert recipe.step("first").params.model_dump()["block"] == {"words": ["x", "z"]}
    recipe = load(tmp_path, text, "first={count: 9}", "stages.second.params={rate: 2.0}")
    assert recipe.step("first").params.model_dump()["count"] == 9
    assert recipe.step("first").params.model_dump()["block"] == {"words": ["a"]}
    assert recipe.step("second").params.model_dump()["rate"] == 2.0
    assert load(tmp_path, text, "outputs.0=joined").outputs == ("joined",)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("first.block.words.2=z", "'stages.first.params.block.words' is a list of 2, and has no item '2'. Items count from 0."),
        ("first.block.words.-1=z", "'stages.first.params.block.words' is a list of 2, and has no item '-1'."),
        ("first.block.words.x.y=z", "'stages.first.params.block.words' is a list of 2, and has no item 'x'."),
        ("first.count.x=1", "'stages.first.params.count' is 3, and neither a mapping nor a list."),
        ("second.block.words=[]", "'stages.second.params.block' is 'b.yaml', and neither a mapping nor a list. If it is a file, change it there"),
        ("first.block=&a [*a]", "*a stands within what it means"),
        ("first.block=" + "[" * 300_000, "more than 64 lists and mappings within each other"),
        ("first" + ".b" * 62 + "=1", "has more than 64 lists and mappings within each other. Write it flatter."),
        ("first" + ".b" * 60 + "={b: [1]}", "has more than 64 lists and mappings within each other"),
        ("first" + ".b" * 60 + "={b: 1}", "stages.first.params.b: unknown field"),
        ("first" + ".b" * 60_000 + "=1", "has more than 64 lists and mappings within each other"),
        ("first.count=!!bool x", "'x' is no !!bool"),
        ("first.count=\udcff", "is not text in UTF-8"),
        ("first.count=1\n---\n2", "begins a second document"),
        ("x" * 300_000 + "=1", "the recipe has no stage 'xxx"),
        ("first..count=1", "is not of the form path=value"),
        ("stages=3", "stages: must be a mapping"),
    ],
    ids=lambda value: ascii(value)[:30],
)  # fmt: skip
def test_an_override_that_cannot_be_applied_says_why(tmp_path: Path, override: str, message: str) -> None:
    text = GOOD.replace("{count: 3}", "{count: 3, block: {words: [x, y]}}")
    text = text.replace("kind: write, seed: 7", "kind: write, seed: 7, params: {block: b.yaml}")
    (tmp_path / "b.yaml").write_text("words: [x]\n")
    started = time.process_time()
    found = problems(tmp_path, text, override)
    assert any(message in line for line in found), found
    assert all(len(line) < 500 for line in found)
    assert time.process_time() - started < 1


def test_every_override_that_cannot_be_applied_is_told(tmp_path: Path) -> None:
    found = problems(tmp_path, GOOD, "first.count.x=1", "gone.x=1", "first.rate=[", "first.count=x")
    assert [line.split(":")[0] for line in found] == [
        "--set first.count.x=1", "--set gone.x=1", "--set first.rate=[", "stages.first.params.count",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_recipes_and_overrides_at_random_are_read_or_refused_and_nothing_else(tmp_path: Path, seed: int) -> None:
    """Values that no field expects, put into every place of a recipe, by an override or in the file."""
    values = (
        "[]", "{}", "x", "null", "-1", "true", "1.5", "{a: {b: [1]}}", '"a\\0b"', "~nobody-of-this-name/x", "/dev/zero", "..",
        "[" * 20 + "]" * 20, "1" + "0" * 90, "1e308", "hub:x", "'" + "y" * 400 + "'", "&a [*a]", "!!set {a}", "<<", "second", "a/b",
    )  # fmt: skip
    paths = [
        "name", "seed", "outputs", "outputs.0", "resources", "resources.processes", "resources.deepspeed", "stages", "stages.joined",
        "stages.joined.kind", "joined.inputs", "joined.inputs.data", "joined.inputs.more", "joined.inputs.more.second",
        "joined.beta", "first.count", "first.file", "first.block", "first.block.words", "first.seed", "first.resources", "first.new",
    ]  # fmt: skip
    choose = random.Random(seed)
    ends = set()
    for _ in range(150):
        overrides = [f"{choose.choice(paths)}={choose.choice(values)}" for _ in range(choose.randint(1, 3))]
        text = GOOD.replace(choose.choice(GOOD.split()).strip("{}[],"), choose.choice(values), 1)
        for given in ((GOOD, *overrides), (text,)):
            started = time.process_time()
            try:
                load(tmp_path, *given)
                ends.add("read")
            except RecipeError:
                ends.add("refused")
            assert time.process_time() - started < 1, given
    assert ends == {"read", "refused"}
