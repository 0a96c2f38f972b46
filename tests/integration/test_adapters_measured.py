"""Adapters as what `evaluate` measures: beside their base, as what they are merged into would measure."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from launch import LAUNCHERS
from pipeline.errors import ArtifactError, RecipeError
from pipeline.recipe.reader import load_recipe
from pipeline.settings.resources import Resources
from pipeline.stage import Estimate, Forecast, Result
from stages import STAGES
from stages.evaluation.evaluate import STAGE, EvaluateParams
from stages.lib.text.tokenizers import load_tokenizer
from tests.families import write_base_model
from tests.integration.tiny_language_model import TinyWorld, make_world, run_stage

pytestmark = pytest.mark.slow

TRAINING = {"global_batch_size": 8, "max_steps": 10, "learning_rate": 2e-2, "max_length_tokens": 128}
BLOCKS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "rank": 4, "publish": "adapter"},
    "freeze": {"method": "freeze", "last_layers": 1, "publish": "adapter"},
    "prompt": {"method": "prompt_tuning", "num_virtual_tokens": 4},
    "prefix": {"method": "prefix_tuning", "num_virtual_tokens": 4},
}
PARAMS = {
    "heldout_blocks": 10,
    "heldout_chats": 10,
    "heldout_pairs": 6,
    "generation": {"heldout_prompts": 2, "max_new_tokens": 8},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return make_world(tmp_path_factory.mktemp("world"), steps=20)


@pytest.fixture(scope="module")
def trained(world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Artifacts of sft, each with an adapter; of `whole` a whole model that keeps the adapter beside it."""
    home = tmp_path_factory.mktemp("trained")
    inputs = {"model": world.model, "chats": world.chats}
    blocks = {**BLOCKS, "whole": {**BLOCKS["lora"], "publish": "merged"}}
    return {
        name: run_stage(STAGES["sft"], inputs, {**TRAINING, "adapter": block}, home / name)[1].out
        for name, block in blocks.items()
    }


def evaluate(world: TinyWorld, folder: Path, params: dict[str, Any], **inputs: Path) -> tuple[Result, dict[str, Any]]:
    named = {role.replace("__", "."): path for role, path in inputs.items()}
    data = {"tokens": world.tokens, "chats": world.chats, "preferences": world.preferences}
    result, context = run_stage(STAGE, {**named, **data}, params, folder)
    return result, json.loads((context.out / "report.json").read_text())


def measures_of(result: Result, name: str) -> dict[str, float]:
    return {key.removesuffix(f".{name}"): value for key, value in result.metrics.items() if key.endswith(f".{name}")}


def test_an_adapter_measures_what_the_merged_model_measures(
    world: TinyWorld, trained: dict[str, Path], tmp_path: Path
) -> None:
    """Also one that lies beside a whole model. The base is found among the models by its weights."""
    inputs = {"model": world.model, "adapter": trained["lora"]}
    merged = run_stage(STAGES["merge"], inputs, {}, tmp_path / "merge")[1].out
    models = {"models__merged": merged, "models__base": world.model}
    adapters = {f"adapters__{name}": trained[name] for name in ("lora", "whole", "freeze", "prompt", "prefix")}
    result, report = evaluate(world, tmp_path / "evaluate", PARAMS, **models, **adapters)
    base, expected = measures_of(result, "base"), measures_of(result, "merged")
    for name in ("lora", "whole"):
        assert measures_of(result, name) == pytest.approx(expected, rel=1e-5, abs=1e-6), name
    for name in BLOCKS:
        found = measures_of(result, name)
        assert found.keys() == base.keys()
        assert found["heldout_assistant_loss"] < base["heldout_assistant_loss"] - 0.05, name
    assert report["models"]["lora"]["adapter"] == "lora" and report["models"]["freeze"]["adapter"] == "freeze"
    assert "adapter" not in report["models"]["merged"]
    size = {name: report["models"][name]["bytes"] for name in ("base", "lora")}
    assert size["base"] < size["lora"] < 1.3 * size["base"]


def test_the_base_need_not_be_measured(world: TinyWorld, trained: dict[str, Path], tmp_path: Path) -> None:
    """A base that knows no chats measures nothing of them; its adapter has a template of its own."""
    bare = tmp_path / "bare"
    shutil.copytree(world.model, bare)
    tokenizer = load_tokenizer(bare)
    tokenizer.chat_template = None
    (bare / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(bare)
    result, _ = evaluate(world, tmp_path / "evaluate", PARAMS, base=bare, adapters__lora=trained["lora"])
    assert set(measures_of(result, "lora")) and not measures_of(result, "bare")
    other, _ = evaluate(world, tmp_path / "other", PARAMS, models__base=world.model, adapters__lora=trained["lora"])
    assert measures_of(other, "lora") == measures_of(result, "lora")


def test_a_base_that_cannot_be_told_is_refused(world: TinyWorld, trained: dict[str, Path], tmp_path: Path) -> None:
    """By the record of its weights, or of adapters without one by the name that they give."""
    others = [write_base_model(tmp_path / name, "llama-3") for name in ("a", "b")]
    lora = trained["lora"]
    with pytest.raises(
        ArtifactError, match=r"inputs\.adapters\.x: was trained on the weights of .*model, and .*/a has"
    ):
        evaluate(world, tmp_path / "one", PARAMS, models__a=others[0], adapters__x=lora)
    models = {"models__a": others[0], "models__b": others[1]}
    with pytest.raises(ArtifactError, match=r"and no model of inputs\.models is that\. Name .* as inputs\.base"):
        evaluate(world, tmp_path / "two", PARAMS, **models, adapters__x=lora)
    foreign = tmp_path / "foreign"
    shutil.copytree(lora, foreign)
    (foreign / "adapter_base.json").unlink()
    copy = tmp_path / "copy"
    shutil.copytree(world.model, copy)
    copies = {"models__a": copy, "models__b": world.model}
    for name, adapter in (("record", lora), ("name", foreign)):
        result, _ = evaluate(world, tmp_path / name, {"heldout_chats": 4}, **copies, adapters__x=adapter)
        assert result.metrics["heldout_assistant_loss.x"] < result.metrics["heldout_assistant_loss.a"]
    with pytest.raises(ArtifactError, match=r"inputs\.adapters\.x: .*model holds no adapter"):
        evaluate(world, tmp_path / "none", PARAMS, models__a=world.model, adapters__x=world.model)


def test_what_is_wrong_is_told_before_it_runs(trained: dict[str, Path]) -> None:
    def problems(*roles: str) -> list[str]:
        known = {role: Estimate() for role in (*roles, "tokens")}
        return [str(problem) for problem in STAGE.check(Forecast(EvaluateParams(), Resources(), known))]

    assert problems("models.a", "adapters.b") == problems("base", "adapters.b") == problems("models.a") == []
    (found,) = problems("adapters.b")
    assert found.startswith("inputs.adapters: are put on the model that they were trained on, and there is none")
    (found,) = problems("models.a", "adapters.a")
    assert found.startswith("inputs.adapters.a: is the name of a model too")
    assert "inputs.base: is what adapters are put on, and there are none" in problems("models.a", "base")[0]
    assert problems()[0].startswith("inputs: there is no model to measure")
    known = {"base": Estimate(), "tokens": Estimate(), "adapters.a": Estimate(folder=trained["lora"].parent)}
    (found,) = map(str, STAGE.check(Forecast(EvaluateParams(), Resources(), known)))
    assert "holds no adapter: there is no adapter_config.json" in found


def test_an_adapter_among_the_models_is_told_its_place(trained: dict[str, Path], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: recipe\nseed: 1\noutputs: [report]\nstages:\n  report:\n    kind: evaluate\n"
        f"    inputs: {{models: {{mine: {trained['lora']}}}}}\n    params: {{generation: {{prompts: [Hello]}}}}\n"
    )
    with pytest.raises(RecipeError, match=r"Or name the adapter as inputs\.adapters\.mine, and beside it"):
        load_recipe(recipe, STAGES, LAUNCHERS)
