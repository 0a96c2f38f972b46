"""Classes that lack what most have: DeBERTa no cache and no fused attention, Mamba no attention at all. BERT and GPT-2 beside."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

from pipeline.errors import DataError, RecipeError
from pipeline.settings.resources import Resources
from pipeline.stage import Estimate, Forecast
from stages import STAGES
from stages.lib.models.adapters.attaching import attach
from stages.lib.models.adapters.params import LoraMethod
from stages.lib.models.asking import innermost, require_attention, without_cache
from stages.lib.preferring.reward_models import scores
from stages.lib.training.making import prepare
from tests.distributed.training_world import make_tokenizer, write_chats, write_tokens
from tests.integration.tiny_language_model import run_stage, write_preferences

pytestmark = [
    pytest.mark.slow,
    # transformers' module of DeBERTa scripts a function when it is imported.
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]

ENCODER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
SIZES: dict[str, dict[str, Any]] = {
    "deberta-v2": {
        **ENCODER,
        "max_position_embeddings": 512,
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
    },
    "bert": {**ENCODER, "max_position_embeddings": 512},
    "mamba": {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4},
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 256},
}
TRAINING = {"global_batch_size": 4, "max_steps": 2, "learning_rate": 1e-3}
ROLLOUTS = {
    "rollouts": 1,
    "rollout_batch_size": 4,
    "global_batch_size": 4,
    "learning_rate": 1e-3,
    "max_prompt_tokens": 64,
    "max_new_tokens": 8,
    "heldout_prompts": 2,
}


class World:
    """Rows and tokens, a folder for what stages make of them, and models with random weights."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = make_tokenizer()
        self.tokens = write_tokens(folder / "tokens", self.tokenizer)
        self.chats, self.preferences = write_chats(folder / "chats"), write_preferences(folder / "preferences")
        self.runs = 0

    def made(self, kind: str, inputs: dict[str, Path], **params: Any) -> Path:
        self.runs += 1
        _, context = run_stage(STAGES[kind], inputs, params, self.folder / f"{kind}-{self.runs}")
        return context.out

    def model(self, model_type: str, auto_class: Any, **fields: Any) -> Path:
        folder = self.folder / f"{model_type}-{auto_class.__name__}"
        if not folder.exists():
            torch.manual_seed(0)
            ids = {"vocab_size": len(self.tokenizer), "pad_token_id": self.tokenizer.pad_token_id}
            config = AutoConfig.for_model(model_type, **SIZES[model_type], **ids, **fields)
            auto_class.from_config(config).save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("classes"))


@pytest.mark.parametrize(
    ("model_type", "named"), [("deberta-v2", False), ("bert", True), ("mamba", True), ("gpt2", True)]
)
def test_a_cache_is_declined_where_there_is_one(model_type: str, named: bool) -> None:
    config = AutoConfig.for_model(model_type, **SIZES[model_type], vocab_size=32)
    auto_class = AutoModelForCausalLM if model_type in ("mamba", "gpt2") else AutoModelForSequenceClassification
    model = auto_class.from_config(config)
    wrapped = torch.nn.DataParallel(model)
    assert innermost(wrapped) is model
    assert without_cache(wrapped) == without_cache(model) == ({"use_cache": False} if named else {})
    model(input_ids=torch.tensor([[1, 2]]), **without_cache(model))


@pytest.mark.parametrize("model_type", ["deberta-v2", "bert"])
def test_an_encoder_of_others_judges_answers(world: World, model_type: str) -> None:
    """OpenAssistant's reward models are DeBERTa's."""
    judge = world.model(model_type, AutoModelForSequenceClassification, num_labels=1)
    model = AutoModelForSequenceClassification.from_pretrained(judge).eval()
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(scores(model, batch), model(**batch).logits[:, 0])
    policy = world.model("gpt2", AutoModelForCausalLM)
    rewards = [{"kind": "reward_model"}]
    inputs = {"model": policy, "prompts": world.preferences, "reward": judge}
    world.made("grpo", inputs, rewards=rewards, completions_per_prompt=2, **ROLLOUTS)
    inputs = {"models.policy": policy, "reward_models.judge": judge, "preferences": world.preferences}
    world.made("evaluate", inputs, heldout_pairs=2, generation={"heldout_prompts": 1, "max_new_tokens": 4})


@pytest.mark.parametrize("model_type", ["deberta-v2", "bert"])
def test_documents_are_kept_apart_where_the_attention_can(world: World, model_type: str) -> None:
    architecture = {"model_type": model_type, **SIZES[model_type]}
    params = {"objective": "masked", "architecture": architecture, **TRAINING}
    if model_type == "bert":
        world.made("pretrain", {"tokens": world.tokens}, **params)
        return
    with pytest.raises(
        RecipeError, match="needs the attention sdpa, which the models of deberta-v2 do not have"
    ) as caught:
        world.made("pretrain", {"tokens": world.tokens}, **params)
    assert "Set isolate_documents: false." in str(caught.value)
    world.made("pretrain", {"tokens": world.tokens}, isolate_documents=False, **params)


def test_another_mistake_is_not_called_one_of_attention(world: World) -> None:
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        require_attention(AutoModelForMaskedLM, world.model("gpt2", AutoModelForCausalLM), "sdpa", "params", "")


def test_a_mamba_goes_through_the_stages_for_causal_models(world: World) -> None:
    base = world.made(
        "pretrain",
        {"tokens": world.tokens},
        architecture={"model_type": "mamba", **SIZES["mamba"]},
        isolate_documents=False,
        **TRAINING,
    )
    chat = world.made("sft", {"model": base, "chats": world.chats}, max_length_tokens=64, **TRAINING)
    aligned = world.made("dpo", {"model": chat, "preferences": world.preferences}, max_length_tokens=128, **TRAINING)
    rewards = [{"kind": "length_penalty", "target_tokens": 2, "per_token": 0.1}]
    for adapter in ({}, {"adapter": {"method": "lora", "rank": 2, "target_modules": ["in_proj"]}}):
        params = {"rewards": rewards, "completions_per_prompt": 2, **ROLLOUTS, **adapter}
        world.made("grpo", {"model": chat, "prompts": world.preferences}, **params)
    world.made(
        "distill", {"teacher": base, "student": base, "tokens": world.tokens}, isolate_documents=False, **TRAINING
    )
    inputs = {"models.a": aligned, "tokens": world.tokens, "chats": world.chats, "preferences": world.preferences}
    world.made("evaluate", inputs, heldout_blocks=2, heldout_chats=2, heldout_pairs=2)


def test_what_a_mamba_cannot_do_is_refused_and_the_way_out_works(world: World) -> None:
    folder = world.model("mamba", AutoModelForCausalLM)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(
        DataError, match=r"lora does not fit this model.*Name layers that do in target_modules: some of .*in_proj"
    ) as refused:
        attach(model, LoraMethod(method="lora", rank=2), 0)
    assert not re.search(r"some of .*\b(out_proj|base_layer)\b", str(refused.value))
    stage = STAGES["quantize"]
    params: dict[str, Any] = {"method": "round_to_nearest", "bits": 8, "group_size": None, "heldout_rows": 2}
    known = {"model": Estimate(architecture={"model_type": "mamba"})}
    (problem,) = stage.check(Forecast(stage.params(**params), Resources(), known))
    assert str(problem).endswith('Write `ignore: ["lm_head", "re:.*dt_proj", "re:.*out_proj"]`.')
    params["ignore"] = ["lm_head", "re:.*dt_proj", "re:.*out_proj"]
    assert stage.check(Forecast(stage.params(**params), Resources(), known)) == []
    world.made("quantize", {"model": folder, "calibration": world.chats}, **params)


def test_checkpointing_is_asked_of_the_class(tmp_path: Path) -> None:
    """ALBERT shares one layer, and its class knows no checkpointing."""
    config = AutoConfig.for_model("albert", **ENCODER, embedding_size=8, vocab_size=32)
    model = AutoModelForMaskedLM.from_config(config)

    class Asked:
        resources = Resources(gradient_checkpointing=True)

    with pytest.raises(RecipeError, match="gradient_checkpointing: is true, and AlbertForMaskedLM has no such thing"):
        prepare(model, Asked, None)  # type: ignore[arg-type]
