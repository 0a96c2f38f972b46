"""Adapters put on a model, taken off and changed for one another: what the model says is that of each, bit for bit."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline.errors import ArtifactError, DataError
from stages.lib.generating.replies import stop_ids_of, write_replies, write_reply
from stages.lib.models.adapters.attaching import attach, trained_state
from stages.lib.models.adapters.opening import Adapted, open_adapted
from stages.lib.models.adapters.params import BottleneckMethod
from stages.lib.models.adapters.saving import base_of
from stages.lib.models.loading import load_language_model
from stages.lib.text.chat_spans import encode_prompt
from stages.lib.text.tokenizers import load_tokenizer
from tests.families import write_base_model
from tests.integration.tiny_language_model import make_world

pytestmark = pytest.mark.slow

IDS = torch.tensor([[5, 9, 11, 7], [8, 6, 5, 3]])
CONFIGS: dict[str, Any] = {
    "lora": peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False, target_modules=["q_proj", "v_proj"]),
    "dora": peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, use_dora=True, init_lora_weights=False, target_modules="all-linear"
    ),
    "saving": peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, init_lora_weights=False, target_modules=["q_proj"], modules_to_save=["lm_head"]
    ),
    "pissa": peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights="pissa", target_modules=["q_proj"]),
    "biases": peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, init_lora_weights=False, target_modules=["q_proj"], bias="all"
    ),
    "ia3": peft.IA3Config(task_type="CAUSAL_LM", init_ia3_weights=False),
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
}
MERGED = ("lora", "dora", "saving", "ia3", "own")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with biases of its own, which some adapters change."""
    return write_base_model(tmp_path_factory.mktemp("base") / "base", "llama-3", attention_bias=True)


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of each kind, with random weights, saved as peft does it; and one of a method that peft does not have."""
    home = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(0)
    for name, config in CONFIGS.items():
        under = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), copy.deepcopy(config))
        with torch.no_grad():
            for key, weight in under.named_parameters():
                if weight.requires_grad and (
                    "modules_to_save" in key or key.endswith("bias") or "prompt" in key or name == "pissa"
                ):
                    weight.add_(torch.randn_like(weight))
        under.peft_config["default"].base_model_name_or_path = str(base)
        under.save_pretrained(home / name)
    own = {key: value + 1 for key, value in load_file(base / "model.safetensors").items() if key.endswith("bias")}
    small = attach(AutoModelForCausalLM.from_pretrained(base), BottleneckMethod(method="bottleneck", size=3), seed=1)
    weights = {key: torch.randn_like(weight) for key, weight in trained_state(small).items()}
    (home / "small").mkdir()
    save_file(weights, home / "small" / "adapter_model.safetensors")
    said_of_it = {"slipway_method": "bottleneck", "params": {"method": "bottleneck", "size": 3}}
    (home / "small" / "adapter_config.json").write_text(json.dumps(said_of_it))
    (home / "own").mkdir()
    save_file(own, home / "own" / "adapter_model.safetensors")
    (home / "own" / "adapter_config.json").write_text(json.dumps({"slipway_method": "bitfit"}))
    return {name: home / name for name in (*CONFIGS, "small", "own")}


def said(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=False).logits


def by_hand(model: Any, weights: dict[str, torch.Tensor]) -> Any:
    """y + U gelu(D y + d) + u after the attention and the MLP of each layer."""

    def change(weights: dict[str, torch.Tensor], output: Any) -> Any:
        made = output[0] if isinstance(output, tuple) else output
        inner = torch.nn.functional.gelu(made @ weights["down.weight"].T + weights["down.bias"])
        made = made + (inner @ weights["up.weight"].T + weights["up.bias"])
        return (made, *output[1:]) if isinstance(output, tuple) else made

    for number, layer in enumerate(model.model.layers):
        for name in ("self_attn", "mlp"):
            path = f"model.layers.{number}.{name}.bottleneck."
            own = {key.removeprefix(path): weight for key, weight in weights.items() if key.startswith(path)}
            getattr(layer, name).register_forward_hook(lambda part, given, output, own=own: change(own, output))
    return model


def alone(base: Path, adapter: Path) -> torch.Tensor:
    """What plain peft says of the two, in a process of the test's own."""
    model = AutoModelForCausalLM.from_pretrained(base)
    if adapter.name == "own":
        model.load_state_dict(load_file(adapter / "adapter_model.safetensors"), strict=False)
        return said(model.eval())
    if adapter.name == "small":
        return said(by_hand(model, load_file(adapter / "adapter_model.safetensors")).eval())
    return said(peft.PeftModel.from_pretrained(model, adapter).eval())[:, -IDS.shape[1] :]


@pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers:UserWarning")
def test_each_says_what_it_says_alone_and_none_is_the_base_bit_for_bit(base: Path, adapters: dict[str, Path]) -> None:
    """From each to each: attached, detached, attached again. All of them differ, or the test would show nothing."""
    adapted = open_adapted(base, adapters, load_language_model)
    plain = said(AutoModelForCausalLM.from_pretrained(base).eval())
    weights = {key: value.clone() for key, value in adapted.base.state_dict().items()}
    expected = {name: alone(base, folder) for name, folder in adapters.items()}
    for name in adapters:
        # Of what a test reckons itself, to rounding.
        assert torch.allclose(said(adapted.use(name)), expected[name], rtol=0, atol=1e-5 * (name == "small")), name
        assert not torch.allclose(expected[name], plain), name
        expected[name] = said(adapted.model)
        for other in adapters:
            adapted.use(other)
        assert torch.equal(said(adapted.use(None)), plain), name
        assert torch.equal(said(adapted.use(name)), expected[name]), name
    adapted.use(None)
    assert adapted.base.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[key]) for key, value in adapted.base.state_dict().items())


@pytest.mark.parametrize("name", MERGED)
def test_merged_says_what_attached_says(base: Path, adapters: dict[str, Path], name: str, tmp_path: Path) -> None:
    from stages import STAGES
    from tests.integration.tiny_language_model import run_stage

    _, context = run_stage(STAGES["merge"], {"model": base, "adapter": adapters[name]}, {}, tmp_path)
    merged = said(AutoModelForCausalLM.from_pretrained(context.out).eval())
    adapted = open_adapted(base, {name: adapters[name]}, load_language_model)
    torch.testing.assert_close(said(adapted.use(name)), merged, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["prompt", "prefix", "lora", "ia3"])
def test_what_it_writes_is_what_it_says_likeliest(kind: str, tmp_path: Path) -> None:
    """Greedy decoding with a cache, and the whole text read again for each token: of virtual tokens too."""
    world = make_world(tmp_path, steps=10)
    torch.manual_seed(1)
    under = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(world.model), copy.deepcopy(CONFIGS[kind]))
    with torch.no_grad():
        for weight in under.parameters():
            if weight.requires_grad:
                weight.add_(0.3 * torch.randn_like(weight))
    under.save_pretrained(tmp_path / kind)
    adapted = open_adapted(world.model, {kind: tmp_path / kind}, load_language_model)
    model, tokenizer = adapted.use(kind), load_tokenizer(world.model)
    messages = [{"role": "user", "content": "What does open do?"}]
    ids = list(encode_prompt(tokenizer, messages))
    start = len(ids)
    for _ in range(12):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)
        if token in stop_ids_of(model, tokenizer):
            break
    expected = tokenizer.decode(ids[start:], skip_special_tokens=True)
    assert write_reply(model, tokenizer, messages, max_new_tokens=12).text == expected
    longer = [{"role": "user", "content": "What does write do, and what does read do where a file is empty?"}]
    options = {"positions": [0, 0], "max_new_tokens": 12, "temperature": 0, "top_p": 1, "seed": 0, "batch_size": 2}
    assert write_replies(model, tokenizer, [messages, longer], **options)[0].text == expected


def test_what_does_not_belong_to_the_base_is_refused(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    """By its record of the base's weights; a copy of the base is the base. Without a record it is said, once."""
    other = write_base_model(tmp_path / "other", "llama-3", attention_bias=True, hidden_size=32)
    notes: list[str] = []
    with pytest.raises(ArtifactError, match=r"adapter lora: does not fit the model"):
        open_adapted(other, {"lora": adapters["lora"]}, load_language_model, say=notes.append)
    assert notes == [f"the adapter says that it was trained on {base}, and is put on {other}"]
    record = adapters["lora"] / "adapter_base.json"
    record.write_text(json.dumps(base_of(base, (str(base), None))))
    try:
        with pytest.raises(ArtifactError, match=r"adapter mine: was trained on the weights of .*, and THIS has others"):
            open_adapted(other, {"mine": adapters["lora"]}, load_language_model, shown="THIS")
        adapted = open_adapted(base, {"mine": adapters["lora"]}, load_language_model)
    finally:
        record.unlink()
    with pytest.raises(DataError, match=r"adapter: there is none called mime.*mine"):
        adapted.use("mime")
    with pytest.raises(ArtifactError, match=r"adapter x: .*base holds no adapter: there is no adapter_config\.json"):
        open_adapted(base, {"x": base}, load_language_model)


def test_an_adapter_that_fails_while_it_is_put_on_leaves_the_base(
    base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """Its layers are in the model when its weights turn out to be of other sizes."""
    other = write_base_model(tmp_path / "other", "llama-3", attention_bias=True, hidden_size=32)
    config = copy.deepcopy(CONFIGS["lora"])
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(other), config).save_pretrained(tmp_path / "of_other")
    adapted = Adapted(load_language_model(base), {"lora": adapters["lora"], "of_other": tmp_path / "of_other"})
    plain, names = said(adapted.base), list(adapted.base.state_dict())
    adapted.use("lora")
    with pytest.raises(ArtifactError, match=r"adapter of_other: does not fit the model: .*size mismatch"):
        adapted.use("of_other")
    assert adapted.active is None and list(adapted.base.state_dict()) == names
    assert torch.equal(said(adapted.model), plain)
    assert torch.equal(said(adapted.use("lora")), alone(base, adapters["lora"]))
