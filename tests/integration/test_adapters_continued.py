"""Trainings that go on from an adapter: what they begin with is what it was, and what they publish is that adapter."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipeline.errors import ArtifactError, DataError
from pipeline.settings.resources import Resources
from pipeline.stage import Estimate, Forecast, Result
from stages import STAGES
from stages.lib.text.tokenizers import load_tokenizer
from tests.integration.test_adapters import with_biases
from tests.integration.tiny_language_model import TinyWorld, make_world, run_stage

pytestmark = pytest.mark.slow

PARAMS = {"global_batch_size": 8, "max_steps": 8, "learning_rate": 1e-2, "max_length_tokens": 128}
BLOCKS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "rank": 4, "dropout": 0.1, "publish": "adapter"},
    "saving": {"method": "lora", "rank": 2, "modules_to_save": ["lm_head"], "publish": "adapter"},
    "pissa": {"method": "lora", "rank": 2, "init": "pissa", "publish": "adapter"},
    "vera": {"method": "vera", "rank": 16, "publish": "adapter"},
    "ia3": {"method": "ia3", "publish": "adapter"},
    "bottleneck": {"method": "bottleneck", "size": 8},
    "bitfit": {"method": "bitfit", "publish": "adapter"},
    "freeze": {"method": "freeze", "last_layers": 1, "publish": "adapter"},
    "prompt": {"method": "prompt_tuning", "num_virtual_tokens": 2},
}
CONTINUED = {"method": "continued"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    folder = tmp_path_factory.mktemp("world")
    made = make_world(folder, steps=20)
    return TinyWorld(with_biases(made.model, folder / "biased"), made.tokens, made.chats, made.preferences, made.texts)


@pytest.fixture(scope="module")
def taught(world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Result, Path]]:
    """Adapters of each method, as sft makes them, and one beside a whole model."""
    home = tmp_path_factory.mktemp("taught")
    blocks = {**BLOCKS, "whole": {**BLOCKS["lora"], "publish": "merged"}}
    return {name: teach(world, "sft", block, home / name) for name, block in blocks.items()}


def teach(world: TinyWorld, stage: str, block: dict[str, Any], folder: Path, **inputs: Path) -> tuple[Result, Path]:
    data = {"chats": world.chats} if stage == "sft" else {"preferences": world.preferences}
    params = {**PARAMS, "adapter": block}
    result, ctx = run_stage(STAGES[stage], {"model": world.model, **data, **inputs}, params, folder)
    return result, ctx.out


@pytest.mark.parametrize("name", ["lora", "saving", "pissa", "vera", "ia3", "bottleneck", "bitfit", "freeze", "whole"])
def test_it_begins_where_the_adapter_ended(
    world: TinyWorld, taught: dict[str, tuple[Result, Path]], name: str, tmp_path: Path
) -> None:
    """The first measurement is the last one of before; what is published is that adapter, of the same base, further on."""
    before, folder = taught[name]
    after, out = teach(world, "sft", CONTINUED, tmp_path, adapter=folder)
    assert after.metrics["heldout_loss_base"] == pytest.approx(before.metrics["heldout_loss"], rel=1e-5)
    assert after.metrics["heldout_loss"] < before.metrics["heldout_loss"]
    first = folder / "adapter" if name == "whole" else folder
    old, new = (load_file(place / "adapter_model.safetensors") for place in (first, out))
    assert old.keys() == new.keys() and not (out / "model.safetensors").exists()
    assert any(not torch.equal(old[key], new[key]) for key in old)
    records = [json.loads((place / "adapter_base.json").read_text()) for place in (first, out)]
    assert records[0] == records[1]
    if name not in ("bottleneck", "bitfit", "freeze"):
        under = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world.model), out)
        assert under.peft_config["default"].peft_type == {"ia3": "IA3", "vera": "VERA"}.get(name, "LORA")


@pytest.mark.parametrize(("stage", "role"), [("pretrain", "model"), ("distill", "student")])
def test_so_it_does_on_packed_tokens(world: TinyWorld, stage: str, role: str, tmp_path: Path) -> None:
    inputs = {role: world.model, "tokens": world.tokens, **({"teacher": world.model} if stage == "distill" else {})}
    params = {"global_batch_size": 8, "max_steps": 4, "learning_rate": 1e-3, "isolate_documents": False}
    ended, ctx = run_stage(STAGES[stage], inputs, {**params, "adapter": BLOCKS["lora"]}, tmp_path / "first")
    further = {**inputs, "adapter": ctx.out}
    run_stage(STAGES[stage], further, {**params, "adapter": CONTINUED}, tmp_path / "further")
    lines = [json.loads(line) for line in (tmp_path / "further" / "journal.jsonl").read_text().splitlines()]
    begun = next(line for line in lines if line["event"] == "heldout")
    assert begun["heldout_loss"] == pytest.approx(ended.metrics["heldout_loss"], rel=1e-5)


def test_it_can_be_published_in_a_whole_model(
    world: TinyWorld, taught: dict[str, tuple[Result, Path]], tmp_path: Path
) -> None:
    _, out = teach(world, "sft", {**CONTINUED, "publish": "merged"}, tmp_path / "sft", adapter=taught["lora"][1])
    merged = run_stage(STAGES["merge"], {"model": world.model, "adapter": out}, {}, tmp_path / "merge")[1].out
    weights = [load_file(place / "model.safetensors") for place in (out, merged)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_the_reference_of_kto_is_the_adapter_as_it_was(
    world: TinyWorld, taught: dict[str, tuple[Result, Path]], tmp_path: Path
) -> None:
    """No answer has gained anything before the first step, and z is 0: the loss is 1 - sigmoid(0) = 1/2.

    Against the model itself the adapter is ahead or behind from the beginning.
    """
    adapter = taught["lora"][1]
    as_it_was, _ = teach(world, "kto", CONTINUED, tmp_path / "as_it_was", adapter=adapter)
    assert as_it_was.metrics["heldout_loss_base"] == pytest.approx(0.5, abs=1e-6)
    off, _ = teach(world, "kto", CONTINUED, tmp_path / "off", adapter=adapter, reference=world.model)
    assert abs(off.metrics["heldout_loss_base"] - 0.5) > 1e-4


@pytest.mark.parametrize("name", ["lora", "freeze"])
def test_the_reference_of_dpo_is_the_adapter_as_it_was(
    world: TinyWorld, taught: dict[str, tuple[Result, Path]], name: str, tmp_path: Path
) -> None:
    """Policy and reference are the same before the first step: the loss is -log sigmoid(0) = ln 2.

    With the model itself as the reference, the adapter is switched off there, and the policy is ahead or behind from the
    beginning: the log-probabilities of the reference are those of dpo without an adapter.
    """
    adapter = taught[name][1]
    result, out = teach(world, "dpo", CONTINUED, tmp_path / "as_it_was", adapter=adapter)
    assert result.metrics["heldout_loss_base"] == pytest.approx(math.log(2), abs=1e-5)
    assert (out / "adapter_model.safetensors").exists()
    off, folder = teach(world, "dpo", CONTINUED, tmp_path / "off", adapter=adapter, reference=world.model)
    assert abs(off.metrics["heldout_loss_base"] - math.log(2)) > 1e-3
    plain, other = teach(world, "dpo", BLOCKS["ia3"], tmp_path / "plain")
    assert off.metrics["heldout_accuracy_base"] == plain.metrics["heldout_accuracy_base"]
    assert (folder / "reference_logprobs.npz").read_bytes() == (other / "reference_logprobs.npz").read_bytes()
    assert (out / "reference_logprobs.npz").read_bytes() != (other / "reference_logprobs.npz").read_bytes()


def test_the_tokenizer_is_the_adapters(
    world: TinyWorld, taught: dict[str, tuple[Result, Path]], tmp_path: Path
) -> None:
    """A base that knows no chats, and an adapter that learned a template."""
    bare, mine = tmp_path / "bare", tmp_path / "mine"
    shutil.copytree(world.model, bare)
    shutil.copytree(taught["lora"][1], mine)
    tokenizer = load_tokenizer(bare)
    tokenizer.chat_template = None
    (bare / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(bare)
    for stage in ("sft", "dpo"):
        _, out = teach(world, stage, CONTINUED, tmp_path / stage, model=bare, adapter=mine)
        assert load_tokenizer(out).chat_template == load_tokenizer(mine).chat_template


def test_what_cannot_be_continued_is_refused(
    world: TinyWorld, taught: dict[str, tuple[Result, Path]], tmp_path: Path
) -> None:
    other = make_world(tmp_path / "other", steps=1).model
    with pytest.raises(ArtifactError, match=r"was trained on the weights of .*biased, and .*other.* has others"):
        teach(world, "sft", CONTINUED, tmp_path / "1", model=other, adapter=taught["lora"][1])
    with pytest.raises(ArtifactError, match=r"of the method prompt_tuning, whose virtual tokens are kept without"):
        teach(world, "sft", CONTINUED, tmp_path / "2", adapter=taught["prompt"][1])
    for field in ("dropout", "learning_rate_ratio"):
        with pytest.raises(DataError, match=f"params.adapter.{field}: is for a lora"):
            teach(world, "sft", {**CONTINUED, field: 0.5}, tmp_path / field, adapter=taught["ia3"][1])
    changing = tmp_path / "changing"
    shutil.copytree(taught["lora"][1], changing)
    config = json.loads((changing / "adapter_config.json").read_text())
    (changing / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": "pissa"}))
    with pytest.raises(ArtifactError, match=r"changes weights of its base as well \(init_lora_weights: pissa"):
        teach(world, "sft", CONTINUED, tmp_path / "3", adapter=changing)


def test_what_does_not_go_together_is_told_before(taught: dict[str, tuple[Result, Path]]) -> None:
    def problems(block: dict[str, Any] | None, *roles: str, **known: Estimate) -> list[str]:
        params = STAGES["sft"].params(**{**PARAMS, "adapter": block})
        inputs = {**{role: Estimate() for role in ("model", "chats", *roles)}, **known}
        return [str(problem) for problem in STAGES["sft"].check(Forecast(params, Resources(), inputs))]

    assert problems(CONTINUED, "adapter") == problems(None) == []
    assert "params.adapter.method: is continued, and there is no input adapter" in problems(CONTINUED)[0]
    for block in (None, BLOCKS["lora"]):
        (found,) = problems(block, "adapter")
        assert "Set `adapter: {method: continued}`; for a new adapter" in found
    (found,) = problems(CONTINUED, adapter=Estimate(folder=taught["prompt"][1]))
    assert found.startswith("inputs.adapter: is of the method prompt_tuning")
    with pytest.raises(ValueError, match="continued is for causal models alone"):
        STAGES["reward"].params(**{**PARAMS, "adapter": CONTINUED})
