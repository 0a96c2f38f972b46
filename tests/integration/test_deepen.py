"""Models with more layers: they say what they said, learn in what is new alone, and are read by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipeline.errors import DataError
from pipeline.settings.resources import Resources
from pipeline.stage import Estimate, Forecast
from stages import STAGES
from stages.lib.models.config import read_config
from stages.lib.models.deepening import order_of_layers
from tests.distributed.training_world import make_tokenizer, write_model
from tests.integration.tiny_language_model import TinyWorld, make_world, run_stage

pytestmark = pytest.mark.slow

IDS = torch.tensor([[5, 9, 11, 7], [8, 6, 5, 3]])
PARAMS = {"global_batch_size": 8, "max_steps": 12, "learning_rate": 5e-3, "max_length_tokens": 128}
ONLY_NEW = {"method": "freeze", "only_new": True}


def said(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder).eval()(input_ids=IDS).logits


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return make_world(tmp_path_factory.mktemp("world"), steps=20)


@pytest.fixture(scope="module")
def deeper(world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two layers one more after both, which is the third."""
    _, ctx = run_stage(STAGES["deepen"], {"model": world.model}, {"num_new_layers": 1}, tmp_path_factory.mktemp("deep"))
    return ctx.out


def test_it_says_what_the_model_said(world: TinyWorld, deeper: Path) -> None:
    """Bit for bit; the new layer is a copy of the one before it, but for two projections of zeros."""
    assert torch.equal(said(deeper), said(world.model))
    assert (read_config(deeper)["num_hidden_layers"], read_config(deeper)["added_layers"]) == (3, [2])
    old, new = load_file(world.model / "model.safetensors"), load_file(deeper / "model.safetensors")
    assert all(torch.equal(new[key], weight) for key, weight in old.items())
    zero = {key for key in new.keys() - old.keys() if not new[key].any()}
    assert zero == {"model.layers.2.self_attn.o_proj.weight", "model.layers.2.mlp.down_proj.weight"}
    for key in new.keys() - old.keys() - zero:
        assert torch.equal(new[key], old[key.replace("layers.2.", "layers.1.")])


def test_only_what_is_new_learns(deeper: Path, world: TinyWorld, tmp_path: Path) -> None:
    """All other weights stay, bit for bit; the adapter alone is the new layer, and merged it is the whole model's bytes."""
    inputs = {"model": deeper, "chats": world.chats}
    result, whole = run_stage(STAGES["sft"], inputs, {**PARAMS, "adapter": ONLY_NEW}, tmp_path / "whole")
    assert result.metrics["heldout_loss"] < result.metrics["heldout_loss_base"]
    before, after = load_file(deeper / "model.safetensors"), load_file(whole.out / "model.safetensors")
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {key for key in before if key.startswith("model.layers.2.")}
    alone = {**ONLY_NEW, "publish": "adapter"}
    _, adapter = run_stage(STAGES["sft"], inputs, {**PARAMS, "adapter": alone}, tmp_path / "alone")
    assert load_file(adapter.out / "adapter_model.safetensors").keys() == changed
    _, merged = run_stage(STAGES["merge"], {"model": deeper, "adapter": adapter.out}, {}, tmp_path / "merged")
    assert (merged.out / "model.safetensors").read_bytes() == (whole.out / "model.safetensors").read_bytes()
    assert read_config(whole.out)["added_layers"] == [2]


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "gpt2", "n_layer": 4, "n_embd": 32, "n_head": 4, "n_positions": 128},
        {"model_type": "qwen3", "head_dim": 8},
        {"model_type": "gpt_neox"},
        {"model_type": "mixtral", "num_local_experts": 4},
        {"model_type": "gemma2", "head_dim": 8},
    ],
    ids=lambda fields: fields["model_type"],
)
def test_families(fields: dict[str, Any], tmp_path: Path) -> None:
    """Two new layers among four, which are the third and the sixth; `plan` reckons the same parameters where it reckons any."""
    model = write_model(tmp_path / "model", make_tokenizer(), num_hidden_layers=4, **fields)
    result, ctx = run_stage(STAGES["deepen"], {"model": model}, {"num_new_layers": 2}, tmp_path / "run")
    config = read_config(ctx.out)
    assert config["added_layers"] == [2, 5]
    assert torch.equal(said(ctx.out), said(model))
    known = Estimate(architecture=read_config(model))
    stage = STAGES["deepen"]
    ahead = stage.estimate(Forecast(stage.params(num_new_layers=2), Resources(device="cpu"), {"model": known}))
    assert ahead.parameters in (None, result.facts.parameters)
    assert ahead.architecture is not None and ahead.architecture["added_layers"] == [2, 5]


def test_layers_whose_kind_depends_on_their_place_are_refused(tmp_path: Path) -> None:
    """Every other layer has experts: with layers put between them other ones would."""
    fields = {"model_type": "qwen2_moe", "decoder_sparse_step": 2, "num_experts": 4, "moe_intermediate_size": 32}
    model = write_model(tmp_path / "model", make_tokenizer(), num_hidden_layers=4, **fields)
    with pytest.raises(DataError, match="makes layers of other kinds of some of the model's"):
        run_stage(STAGES["deepen"], {"model": model}, {"num_new_layers": 2}, tmp_path / "run")


def test_the_order_of_layers() -> None:
    assert order_of_layers(4, 2) == [0, 1, 1, 2, 3, 3]
    assert order_of_layers(3, 3) == [0, 0, 1, 1, 2, 2]


def test_groups_that_are_not_even(world: TinyWorld, tmp_path: Path) -> None:
    said_of_it = (
        r"params\.num_new_layers: is 3, and the model's 2 layers do not fall into so many groups.*Take one of 1, 2"
    )
    with pytest.raises(DataError, match=said_of_it):
        run_stage(STAGES["deepen"], {"model": world.model}, {"num_new_layers": 3}, tmp_path)
    stage, known = STAGES["deepen"], Estimate(architecture=read_config(world.model))
    (problem,) = stage.check(Forecast(stage.params(num_new_layers=3), Resources(device="cpu"), {"model": known}))
    assert "Take one of 1, 2" in str(problem)
