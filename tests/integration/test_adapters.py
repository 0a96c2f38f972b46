"""Every method of an adapter in every stage that trains on fixed data: it learns, frozen weights stay, peft alone reads it."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaForCausalLM,
)

from pipeline.errors import ArtifactError, DataError
from pipeline.stage import Context, Result
from stages import STAGES
from stages.lib.models.adapters.four_bits import quantize_linears
from stages.lib.models.adapters.opening import attached
from stages.lib.models.adapters.saving import check_adapter
from stages.lib.text.tokenizers import load_tokenizer
from stages.lib.training import adapted, loop
from stages.lib.training.making import Made
from tests.distributed.training_world import make_tokenizer, write_chats, write_model
from tests.integration.tiny_encoder import request_encoder, request_rows, write_data
from tests.integration.tiny_language_model import make_world, run_stage

pytestmark = pytest.mark.slow

# Where an adapter outweighs its base, float32 itself is further off than 1e-5: hence the small alpha of one.
CAUSAL = {
    "lora": {"method": "lora", "rank": 4},
    "dora, by pattern": {
        "method": "lora",
        "rank": 4,
        "use_dora": True,
        "use_rslora": True,
        "target_modules": r".*\.[qv]_proj",
    },
    "lora, embeddings": {"method": "lora", "rank": 2, "modules_to_save": ["embed_tokens", "lm_head"]},
    "lora+": {"method": "lora", "rank": 4, "alpha": 4.0, "init": "gaussian", "learning_rate_ratio": 4.0},
    "orthogonal": {"method": "lora", "rank": 4, "init": "orthogonal"},
    "pissa": {"method": "lora", "rank": 4, "alpha": 4.0, "init": "pissa"},
    "pissa, patterns": {
        "method": "lora",
        "rank": 2,
        "use_rslora": True,
        "init": "pissa",
        "init_iterations": 4,
        "rank_pattern": {"v_proj": 4, r"layers\.0\..*\.q_proj": 1},
        "alpha_pattern": {"mlp.up_proj": 8.0},
        "modules_to_save": ["lm_head"],
    },
    "vera": {"method": "vera", "rank": 32, "initial_d": 1.0},
    "adalora": {"method": "adalora", "rank": 6, "target_rank": 3},
    "ia3": {"method": "ia3"},
    "bitfit": {"method": "bitfit"},
    "freeze": {"method": "freeze", "last_layers": 1},
    "freeze, mlp": {"method": "freeze", "modules": ["mlp"]},
    "bottleneck": {"method": "bottleneck", "size": 8},
    "bottleneck, parallel": {
        "method": "bottleneck",
        "size": 8,
        "placement": "parallel",
        "modules": ["mlp"],
        "scale": 4.0,
    },
    "prompt": {"method": "prompt_tuning", "num_virtual_tokens": 4},
    "prompt, random": {"method": "prompt_tuning", "num_virtual_tokens": 4, "init": "random"},
    "prefix": {"method": "prefix_tuning", "num_virtual_tokens": 4},
    "prefix, projected": {"method": "prefix_tuning", "num_virtual_tokens": 4, "projection": True},
    "p_tuning": {"method": "p_tuning", "num_virtual_tokens": 4},
    "p_tuning, lstm": {"method": "p_tuning", "num_virtual_tokens": 4, "encoder": "lstm", "encoder_size": 16},
}
ALONE = ("prompt", "prefix", "p_tuning", "bottleneck")
"""What is published alone: it is merged into nothing."""
WITH_WEIGHTS = {name: block for name, block in CAUSAL.items() if not name.startswith(ALONE)}
KINDS = ("lora", "ia3", "bitfit", "freeze", "bottleneck", "prompt", "prefix, projected", "p_tuning, lstm")
"""One of each kind."""
ENCODING = {name: CAUSAL[name] for name in ("lora", "vera", "bitfit", "freeze")} | {
    "ia3": {
        "method": "ia3",
        "target_modules": ["key", "value", "output.dense"],
        "feedforward_modules": ["output.dense"],
    }
}
COMMON = {"global_batch_size": 8, "max_steps": 20, "learning_rate": 5e-3, "warmup_steps": 2}
BLOCKS = {"isolate_documents": False}
ENCODER = {"global_batch_size": 32, "max_steps": 30, "warmup_steps": 2}
LEARNING_RATES = dict.fromkeys(("prompt_tuning", "prefix_tuning", "p_tuning"), 3e-2)
"""Of virtual tokens."""
PARAMS: dict[str, dict[str, Any]] = {
    "pretrain": {**COMMON, **BLOCKS},
    "sft": {**COMMON, "max_length_tokens": 128},
    "dpo": {**COMMON, "max_length_tokens": 128},
    "kto": {**COMMON, "max_length_tokens": 128},
    "reward": {**COMMON, "max_length_tokens": 128},
    "distill": {**COMMON, **BLOCKS},
    "classify": {**COMMON, **ENCODER, "max_length_tokens": 32},
    "extract": {**COMMON, **ENCODER, "max_length_tokens": 24, "stride_tokens": 8},
    "answer": {**COMMON, **ENCODER, "max_length_tokens": 48, "max_question_tokens": 12, "stride_tokens": 8},
}
MATRIX = [
    *(("sft", name, block) for name, block in CAUSAL.items()),
    *((stage, name, CAUSAL[name]) for stage in ("dpo", "kto", "pretrain", "distill") for name in KINDS),
    *((stage, "adalora", CAUSAL["adalora"]) for stage in ("dpo", "classify")),
    *(("reward", name, CAUSAL[name]) for name in KINDS if name in WITH_WEIGHTS),
    *((stage, name, block) for stage in ("classify", "extract", "answer") for name, block in ENCODING.items()),
]
HEADS = {
    "reward": AutoModelForSequenceClassification,
    "classify": AutoModelForSequenceClassification,
    "extract": AutoModelForTokenClassification,
    "answer": AutoModelForQuestionAnswering,
}


@dataclass(frozen=True)
class World:
    inputs: dict[str, dict[str, Path]]

    def base(self, stage: str) -> Path:
        return next(self.inputs[stage][role] for role in ("student", "model", "encoder") if role in self.inputs[stage])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    tiny = make_world(folder, steps=40)
    model = with_biases(tiny.model, folder / "biased")
    encoder = request_encoder(folder / "encoder", "bert", steps=40)
    rows = request_rows()
    labels = write_data(folder / "labels", rows[:200], rows[200:240])
    questions = [
        {"question": "What is it?", "context": row["text"], "answers": [{"start": 0, "text": row["text"].split()[0]}]}
        for row in rows[:120]
    ]
    return World(
        {
            "pretrain": {"model": model, "tokens": tiny.tokens},
            "sft": {"model": model, "chats": tiny.chats},
            "dpo": {"model": model, "preferences": tiny.preferences},
            "kto": {"model": model, "preferences": tiny.preferences},
            "reward": {"model": model, "preferences": tiny.preferences},
            "distill": {"student": model, "teacher": tiny.model, "tokens": tiny.tokens},
            "classify": {"encoder": encoder, "labels": labels},
            "extract": {"encoder": encoder, "spans": labels},
            "answer": {"encoder": encoder, "questions": write_data(folder / "qa", questions[:100], questions[100:])},
        }
    )


def with_biases(source: Path, folder: Path) -> Path:
    """The Llama in `source` with biases of zero around its attention, so that every method has something to train."""
    model = LlamaForCausalLM.from_pretrained(source)
    config = type(model.config)(**{**model.config.to_dict(), "attention_bias": True})
    biased = LlamaForCausalLM(config)
    missing, unexpected = biased.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected and all(name.endswith("bias") for name in missing)
    shutil.copytree(source, folder)
    biased.generation_config = model.generation_config
    biased.eval().save_pretrained(folder)
    return folder


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Made]:
    """What trained, engine and model, of the runs in a test. The models stay whole when they are published."""
    found: list[Made] = []
    make = loop.make_engine

    def watched(*arguments: Any) -> Made:
        found.append(make(*arguments))
        return found[-1]

    monkeypatch.setattr(loop, "make_engine", watched)
    monkeypatch.setattr(adapted, "drop_frozen", lambda model: None)
    return found


def teach(world: World, stage: str, block: dict[str, Any], folder: Path, **params: Any) -> tuple[Result, Context]:
    return run_stage(STAGES[stage], world.inputs[stage], {**PARAMS[stage], **params, "adapter": block}, folder)


def answer_of(model: Any, base: Path, virtual: int = 0) -> torch.Tensor:
    """What a model says of a text of two rows, without its virtual tokens."""
    ids = torch.tensor(
        [load_tokenizer(base).encode("All functions read and write files.", add_special_tokens=False)] * 2
    )
    with torch.no_grad():
        output = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids))
    logits = output.logits if "logits" in output else torch.stack([output.start_logits, output.end_logits])
    return logits[:, virtual:] if virtual and logits.shape[1] > ids.shape[1] else logits


def plain(name: str, *, virtual: bool) -> str:
    """The name that a parameter has without the adapter around it. peft puts one more module around it but for prompts."""
    for part in (".base_layer", ".original_module"):
        name = name.replace(part, "")
    return name.removeprefix("base_model.").removeprefix("" if virtual else "model.") if "base_model." in name else name


def loss_before_and_after(ctx: Context) -> tuple[float, float]:
    """On held-out rows; of the tasks of an encoder, which measure no loss there, over the first and the last ten steps."""
    heldout = [line.get("heldout_loss") for line in ctx.journal.events("heldout")]
    steps = [line["loss"] for line in ctx.journal.events("step")]
    return (steps[0], steps[-1]) if None in heldout else (heldout[0], heldout[-1])


def agree(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """To 1e-5 of the largest number."""
    apart = float((found - expected).abs().max())
    return apart <= 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize(("stage", "name", "block"), MATRIX, ids=[f"{stage}-{name}" for stage, name, _ in MATRIX])
def test_the_matrix(
    world: World, stage: str, name: str, block: dict[str, Any], tmp_path: Path, made: list[Made]
) -> None:
    """It learns; frozen weights are those on disk, bit for bit; merged and attached by peft it says what the trained one says."""
    _, ctx = teach(world, stage, block, tmp_path, learning_rate=LEARNING_RATES.get(block["method"], 5e-3))
    before, after = loss_before_and_after(ctx)
    assert after < before
    base = world.base(stage)
    start = load_file(base / "model.safetensors")
    virtual = block.get("num_virtual_tokens", 0)
    frozen = {plain(n, virtual=bool(virtual)): p for n, p in made[0].model.named_parameters() if not p.requires_grad}
    known = {key: value for key, value in frozen.items() if key in start}
    assert len(known) > len(frozen) / 2
    assert all(torch.equal(value, start[key]) for key, value in known.items())
    said = answer_of(made[0].model, base)
    alone = ctx.out if name.startswith(ALONE) else ctx.out / "adapter"
    auto_class = HEADS.get(stage, AutoModelForCausalLM)
    if not name.startswith(ALONE):
        assert agree(answer_of(auto_class.from_pretrained(ctx.out), base), said)
        merged = load_file(ctx.out / "model.safetensors")
        assert all(torch.equal(merged[key], start[key]) for key in known if key in merged and name.startswith("freeze"))
    if block["method"] in ("bitfit", "freeze", "bottleneck"):
        delta = load_file(alone / "adapter_model.safetensors")
        assert delta.keys() == {n for n, p in made[0].model.named_parameters() if p.requires_grad}
        if block["method"] == "bottleneck":
            assert agree(answer_of(attached(AutoModelForCausalLM.from_pretrained(base), alone), base), said)
        return
    with_head = {"config": auto_class.from_pretrained(ctx.out).config} if stage in HEADS else {}
    under = PeftModel.from_pretrained(auto_class.from_pretrained(base, **with_head), alone)
    assert agree(answer_of(under, base, virtual), said)


def test_frozen_weights_are_given_up_before_the_base_is_read_again(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base would lie in memory twice."""
    left: list[int] = []
    write = adapted.write_adapter

    def watched(adapter: Any, *arguments: Any) -> None:
        left.extend(parameter.numel() for parameter in found[0].model.parameters() if not parameter.requires_grad)
        write(adapter, *arguments)

    found: list[Made] = []
    make = loop.make_engine
    monkeypatch.setattr(loop, "make_engine", lambda *arguments: found.append(make(*arguments)) or found[-1])
    monkeypatch.setattr(adapted, "write_adapter", watched)
    teach(world, "sft", {"method": "lora", "rank": 4}, tmp_path)
    assert left and not any(left)


def test_an_encoder_goes_on_under_an_adapter(world: World, tmp_path: Path, made: list[Made]) -> None:
    """Pretraining by the masked objective: peft knows no such task, and reads the adapter all the same."""
    encoder = world.base("classify")
    tokens = packed_of(encoder, tmp_path / "tokens")
    params = {**COMMON, "objective": "masked", "adapter": CAUSAL["lora"], **BLOCKS}
    _, ctx = run_stage(STAGES["pretrain"], {"model": encoder, "tokens": tokens}, params, tmp_path / "run")
    said = answer_of(made[0].model, encoder)
    for model in (
        AutoModelForMaskedLM.from_pretrained(ctx.out),
        PeftModel.from_pretrained(AutoModelForMaskedLM.from_pretrained(encoder), ctx.out / "adapter"),
    ):
        assert agree(answer_of(model, encoder), said)


def packed_of(model: Path, folder: Path) -> Path:
    from tests.integration.tiny_language_model import write_tokens

    return write_tokens(folder, load_tokenizer(model), [row["text"] for row in request_rows()[:1500]])


@pytest.mark.parametrize("name", [*WITH_WEIGHTS])
def test_merge_makes_of_an_adapter_what_training_would_have_published(world: World, name: str, tmp_path: Path) -> None:
    """Byte for byte, also of the adapter beside a whole model; it holds fewer bytes than the model."""
    block = WITH_WEIGHTS[name]
    _, whole = teach(world, "sft", {**block, "publish": "merged"}, tmp_path / "whole")
    _, alone = teach(world, "sft", {**block, "publish": "adapter"}, tmp_path / "alone")
    assert not (alone.out / "model.safetensors").exists()
    files = [folder / "adapter_model.safetensors" for folder in (alone.out, whole.out / "adapter")]
    assert files[0].read_bytes() == files[1].read_bytes()
    expected = (whole.out / "model.safetensors").read_bytes()
    for number, adapter in enumerate((alone.out, whole.out)):
        _, ctx = run_stage(
            STAGES["merge"], {"model": world.base("sft"), "adapter": adapter}, {}, tmp_path / f"merged{number}"
        )
        assert (ctx.out / "model.safetensors").read_bytes() == expected
        assert (ctx.out / "chat_template.jinja").read_bytes() == (whole.out / "chat_template.jinja").read_bytes()


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
def test_an_output_layer_that_is_that_of_the_embeddings(tmp_path: Path, made: list[Made]) -> None:
    """What is learned in it is not put into the embeddings: the published model is the one that was trained."""
    base = write_model(tmp_path / "base", make_tokenizer(), tie_word_embeddings=True)
    block = {"method": "lora", "rank": 4, "target_modules": ["lm_head"]}
    params = {**COMMON, "max_length_tokens": 56, "adapter": block}
    _, ctx = run_stage(
        STAGES["sft"], {"model": base, "chats": write_chats(tmp_path / "chats")}, params, tmp_path / "run"
    )
    found = AutoModelForCausalLM.from_pretrained(ctx.out)
    assert agree(answer_of(found, base), answer_of(made[0].model, base))
    start = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(found.get_input_embeddings().weight, start)
    assert not torch.equal(found.get_output_embeddings().weight, start)


def test_beside_a_base_in_four_bits(world: World, tmp_path: Path, made: list[Made]) -> None:
    """What trains is the adapter on a base of NF4; what is published is that adapter, which peft puts on the base as it is on
    disk, and that merged. Read with a base in four bits, it says what the trained model said.
    """
    block = {"method": "lora", "rank": 4, "quantize_base": "nf4"}
    _, ctx = teach(world, "sft", block, tmp_path)
    before, after = loss_before_and_after(ctx)
    assert after < before
    base, alone = world.base("sft"), ctx.out / "adapter"
    under = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), alone)
    assert agree(answer_of(AutoModelForCausalLM.from_pretrained(ctx.out), base), answer_of(under, base))
    said = answer_of(made[0].model, base)
    assert not agree(answer_of(under, base), said), "four bits are others"
    small = AutoModelForCausalLM.from_pretrained(base)
    assert quantize_linears(small, []) == 7 * small.config.num_hidden_layers
    assert agree(answer_of(PeftModel.from_pretrained(small, alone), base), said)
    (note,) = [line["text"] for line in ctx.journal.events("note") if " trains " in line["text"]]
    whole = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(base).parameters())
    added = sum(p.numel() for p in load_file(alone / "adapter_model.safetensors").values())
    assert f"lora trains {added:,} of {whole + added:,} parameters" in note


EXPERTS = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("named", [EXPERTS, {}], ids=["named", "all"])
def test_experts(named: dict[str, Any], tmp_path: Path) -> None:
    """Of a mixture: plain peft reads what is published, merged it is what training publishes, byte for byte, and it goes on."""
    model = write_model(tmp_path / "model", make_tokenizer(), model_type="mixtral", num_local_experts=4)
    inputs, params = {"model": model, "chats": write_chats(tmp_path / "chats")}, {**COMMON, "max_length_tokens": 56}
    block = {"method": "lora", "rank": 2, **named}
    result, whole = run_stage(STAGES["sft"], inputs, {**params, "adapter": block}, tmp_path / "whole")
    assert result.metrics["heldout_loss"] < result.metrics["heldout_loss_base"]
    alone = {**block, "publish": "adapter"}
    _, adapter = run_stage(STAGES["sft"], inputs, {**params, "adapter": alone}, tmp_path / "alone")
    under = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter.out)
    assert agree(answer_of(AutoModelForCausalLM.from_pretrained(whole.out), model), answer_of(under, model))
    _, merged = run_stage(STAGES["merge"], {"model": model, "adapter": adapter.out}, {}, tmp_path / "merged")
    assert (merged.out / "model.safetensors").read_bytes() == (whole.out / "model.safetensors").read_bytes()
    inputs["adapter"] = adapter.out
    further, _ = run_stage(STAGES["sft"], inputs, {**params, "adapter": {"method": "continued"}}, tmp_path / "further")
    assert further.metrics["heldout_loss_base"] == pytest.approx(result.metrics["heldout_loss"], rel=1e-5)


def test_modules_are_not_merged(world: World, tmp_path: Path) -> None:
    _, ctx = teach(world, "sft", CAUSAL["bottleneck"], tmp_path / "run")
    inputs = {"model": world.base("sft"), "adapter": ctx.out}
    with pytest.raises(
        ArtifactError, match="is of the method bottleneck, whose modules between those of the model are no"
    ):
        run_stage(STAGES["merge"], inputs, {}, tmp_path / "merged")


@pytest.mark.parametrize("name", ["lora", "freeze"])
def test_an_adapter_is_refused_on_another_base(world: World, name: str, tmp_path: Path) -> None:
    """On a model of the same shapes whose weights differ in one number; a copy of the base elsewhere is the base."""
    _, ctx = teach(world, "sft", {**CAUSAL[name], "publish": "adapter"}, tmp_path / "run")
    base = world.base("sft")
    copy, other = shutil.copytree(base, tmp_path / "copy"), shutil.copytree(base, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    run_stage(STAGES["merge"], {"model": copy, "adapter": ctx.out}, {}, tmp_path / "fits")
    with pytest.raises(
        ArtifactError, match=r"inputs\.adapter: was trained on the weights of .*/biased, and .*/other has"
    ):
        run_stage(STAGES["merge"], {"model": other, "adapter": ctx.out}, {}, tmp_path / "refused")


def test_what_is_written_of_the_base(world: World, tmp_path: Path) -> None:
    _, ctx = teach(world, "sft", CAUSAL["prefix"], tmp_path)
    said = json.loads((ctx.out / "adapter_base.json").read_text())
    assert said["method"] == "prefix_tuning"
    assert said["folder"] == str(world.base("sft"))
    assert said["artifact_id"] is None, "no recipe of ours made it"
    assert len(said["weights_sha256"]) == 64
    assert json.loads((ctx.out / "adapter_config.json").read_text())["base_model_name_or_path"] == said["folder"]


def test_virtual_tokens_are_not_merged(world: World, tmp_path: Path) -> None:
    _, ctx = teach(world, "sft", CAUSAL["prompt"], tmp_path / "run")
    inputs = {"model": world.base("sft"), "adapter": ctx.out}
    with pytest.raises(ArtifactError, match="is of the method PROMPT_TUNING, whose virtual tokens are no weights"):
        run_stage(STAGES["merge"], inputs, {}, tmp_path / "merged")


def test_a_fresh_adapter_changes_nothing(world: World, tmp_path: Path) -> None:
    """Its zeros are no damage: a step of almost no size is published, and is the base to 1e-6."""
    _, ctx = teach(world, "sft", CAUSAL["lora"], tmp_path, max_steps=1, learning_rate=1e-12, warmup_steps=0)
    base = world.base("sft")
    before, after = (answer_of(AutoModelForCausalLM.from_pretrained(each), base) for each in (base, ctx.out))
    assert torch.allclose(before, after, rtol=0, atol=1e-6)
    check_adapter(ctx.out / "adapter")


@pytest.mark.parametrize(("value", "said"), [(float("nan"), "not finite"), (None, "is empty")])
def test_a_damaged_adapter_is_not_published(value: float | None, said: str, tmp_path: Path) -> None:
    tensor = torch.zeros(0, 4) if value is None else torch.full((2, 4), value)
    save_file({"lora_A.weight": tensor}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ArtifactError, match=said):
        check_adapter(tmp_path)


@pytest.mark.parametrize(
    ("block", "said"),
    [
        (
            {"method": "lora", "target_modules": ["q_porj"]},
            r"params\.adapter\.target_modules: the model has no linear layer 'q_porj'\. Did you mean",
        ),
        (
            {"method": "lora", "target_modules": "nothing.*"},
            r"params\.adapter: lora does not fit this model: .* Name layers that do in target_modules: some of",
        ),
        (
            {"method": "lora", "target_modules": ["v_proj"], "rank_pattern": {"v_prj": 2}},
            r"params\.adapter\.rank_pattern: 'v_prj' decides of no layer that gets an adapter\. Did you mean 'v_proj'",
        ),
        (
            {"method": "lora", "alpha_pattern": {".*_proj": 8.0, "v_proj": 2.0}},
            r"params\.adapter\.alpha_pattern: 'v_proj' decides of no layer",
        ),
        (
            {"method": "lora", "rank_pattern": {"(v_proj": 2}},
            r"params\.adapter: holds .*\(v_proj.*, which is no regular expression: missing \)",
        ),
        (
            {"method": "lora", "target_parameters": ["experts.down_proj"]},
            r"params\.adapter\.target_parameters: the model has no weight 'experts.down_proj' that is no linear layer's",
        ),
        (
            {"method": "lora", "init": "pissa", "rank": 10_000},
            r"params\.adapter\.rank: is 10000, and the weight of model\.layers\.0\.self_attn\.q_proj has \d+ singular values",
        ),
        (
            {"method": "lora", "init": "pissa", "target_modules": ".*embed_tokens"},
            r"params\.adapter\.init: is pissa, and model\.embed_tokens is no linear layer",
        ),
        (
            {"method": "lora", "modules_to_save": ["lm_haed"]},
            r"params\.adapter\.modules_to_save: the model has no module 'lm_haed' with weights of its own\. Did you mean",
        ),
        (
            {"method": "freeze", "modules": ["attention"]},
            r"params\.adapter\.modules: the model has no module 'attention' with weights of its own",
        ),
        (
            {"method": "bottleneck", "modules": ["self_atn"]},
            r"params\.adapter\.modules: a layer has no part 'self_atn'\. Did you mean 'self_attn'",
        ),
    ],
)
def test_names_that_are_no_layers(world: World, block: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        teach(world, "sft", block, tmp_path)


def test_the_rate_of_b_is_a_multiple_of_that_of_a(world: World, tmp_path: Path, made: list[Made]) -> None:
    """LoRA+: two groups, at 5e-3 the matrices A and at 2e-2 the matrices B."""
    teach(world, "sft", CAUSAL["lora+"], tmp_path, max_steps=3)
    assert made[0].rates == [5e-3, pytest.approx(2e-2)]
    names = {id(parameter): name for name, parameter in made[0].model.named_parameters()}
    groups = [{".lora_B." in names[id(p)] for p in group["params"]} for group in made[0].engine.optimizer.param_groups]
    assert groups == [{False}, {True}]
