from __future__ import annotations

import math
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from launch import LAUNCHERS
from pipeline.errors import ArtifactError, DataError, GateError, RecipeError
from pipeline.recipe.reader import load_recipe
from pipeline.settings.resources import Resources
from pipeline.settings.strict import validate
from pipeline.stage import Estimate, Forecast
from pipeline.store.artifact import Kind, digest_file
from stages import STAGES
from stages.compression.quantize import STAGE, QuantizeParams, require_quality
from tests.integration.tiny_language_model import (
    TinyWorld,
    make_tokenizer,
    make_world,
    run_stage,
    train_model,
    write_tokens,
)

pytestmark = pytest.mark.slow

NEAREST = {"method": "round_to_nearest"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return make_world(tmp_path_factory.mktemp("world"))


def quantize(
    world: TinyWorld, folder: Path, calibration: Path | None = None, **params: Any
) -> tuple[dict[str, float], Path]:
    """The metrics, and the folder of the quantized model."""
    folder.mkdir(exist_ok=True)
    inputs = {"model": world.model, "calibration": calibration or world.tokens}
    result, context = run_stage(STAGE, inputs, params, folder)
    return dict(result.metrics), context.out


def load(folder: Path) -> Any:
    """As anyone would load it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def rounded_by_hand(weight: Any, bits: int, group_size: int | None) -> Any:
    """Round to nearest, symmetric: scale = max|w| / (2^bits - 1) x 2, q = round(w / scale) within [-2^(b-1), 2^(b-1) - 1].

    The scale spreads 2^bits - 1 steps over the range from -max|w| to max|w|; each group of columns has its own.
    """
    rows, columns = weight.shape
    groups = weight.reshape(rows, -1, group_size or columns)
    scale = groups.abs().amax(-1, keepdim=True) / ((2**bits - 1) / 2)
    steps = torch.clamp(torch.round(groups / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (steps * scale).reshape(rows, columns)


def quantized_layers(model: Any) -> dict[str, Any]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }


def some_ids(world: TinyWorld) -> Any:
    from stages.lib.text.packed import PackedTokens

    packed = PackedTokens(world.tokens, "heldout")
    return torch.stack([torch.from_numpy(packed.block(index).input_ids) for index in range(4)])


@pytest.mark.parametrize(("bits", "group_size"), [(8, None), (8, 32), (4, None), (4, 16)])
def test_the_published_model_computes_what_weights_rounded_by_hand_compute(
    world: TinyWorld, tmp_path: Path, bits: int, group_size: int | None
) -> None:
    _, out = quantize(world, tmp_path, bits=bits, group_size=group_size, **NEAREST)
    expected = load(world.model)
    with torch.no_grad():
        for layer in quantized_layers(expected).values():
            layer.weight.copy_(rounded_by_hand(layer.weight, bits, group_size))
        ids = some_ids(world)
        wanted, unrounded = expected(ids).logits, load(world.model)(ids).logits
        found = load(out)(ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert (found - unrounded).abs().max() > 1e-3


def test_eight_bits_cost_less_than_one_percent_and_four_less_than_fifteen(world: TinyWorld, tmp_path: Path) -> None:
    eight, _ = quantize(world, tmp_path / "eight", bits=8, group_size=None, **NEAREST)
    four, _ = quantize(world, tmp_path / "four", bits=4, group_size=32, calibration_rows=64)
    assert abs(eight["heldout_perplexity_increase"]) < 0.01
    assert abs(four["heldout_perplexity_increase"]) < 0.15
    for metrics in (eight, four):
        increase = metrics["heldout_perplexity"] / metrics["heldout_perplexity_original"] - 1
        assert metrics["heldout_perplexity_increase"] == pytest.approx(increase)
        assert metrics["compression_ratio"] == pytest.approx(metrics["bytes_original"] / metrics["bytes"])
    assert four["bytes"] < eight["bytes"] < eight["bytes_original"]
    assert eight["heldout_perplexity_original"] == four["heldout_perplexity_original"] < 1024 / 5


def test_the_file_is_as_large_as_its_bits_say(world: TinyWorld, tmp_path: Path) -> None:
    """4 bits a weight, packed 8 to a 32-bit word, a 32-bit scale per group of 32 and a shape of two 64-bit numbers per layer;
    embedding, head and norms as before in 32 bits. The rest of the file is names: less than 20 kB."""
    metrics, _ = quantize(world, tmp_path, bits=4, group_size=32, **NEAREST)
    model = load(world.model)
    layers = quantized_layers(model)
    weights = sum(layer.weight.numel() for layer in layers.values())
    others = sum(parameter.numel() for parameter in model.parameters()) - weights
    expected = weights // 2 + weights // 32 * 4 + len(layers) * 16 + others * 4
    assert 0 < metrics["bytes"] - expected < 20_000


def test_gptq_keeps_the_outputs_of_the_first_layers_closer_than_rounding(world: TinyWorld, tmp_path: Path) -> None:
    """Gptq minimizes |W x - Q x|^2 over the calibration inputs x, which rounding does not look at."""
    from stages.lib.text.packed import PackedTokens
    from stages.lib.text.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(world.model)
    few = write_tokens(tmp_path / "few", tokenizer, world.texts[:120])
    packed = PackedTokens(few, "train")
    rows = len(packed)
    options: dict[str, Any] = {"bits": 4, "group_size": 32, "calibration": few}
    _, nearest = quantize(world, tmp_path / "nearest", **NEAREST, **options)
    _, gptq = quantize(world, tmp_path / "gptq", calibration_rows=rows, **options)
    original = load(world.model)
    ids = torch.stack([torch.from_numpy(packed.block(index).input_ids) for index in range(rows)])
    with torch.no_grad():
        inputs = original.model.layers[0].input_layernorm(original.model.embed_tokens(ids))

        def error(folder: Path, name: str) -> float:
            model = load(folder)
            model(ids[:1])  # unpacks the weights
            layer, whole = quantized_layers(model)[name], quantized_layers(original)[name]
            return float((layer(inputs) - whole(inputs)).square().mean())

        for name in ("q_proj", "k_proj", "v_proj"):
            name = f"model.layers.0.self_attn.{name}"
            assert error(gptq, name) < error(nearest, name)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_calibration(
    world: TinyWorld, tmp_path: Path
) -> None:
    digests = []
    for index, seed in enumerate((1, 1, 2)):
        folder = tmp_path / str(index)
        folder.mkdir()
        inputs = {"model": world.model, "calibration": world.tokens}
        _, context = run_stage(STAGE, inputs, {"group_size": 16, "calibration_rows": 8}, folder, seed=seed)
        digests.append(digest_file(context.out / "model.safetensors"))
    assert digests[0] == digests[1] != digests[2]


def test_only_the_model_is_written_and_nothing_is_said(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    capfd.readouterr()
    _, out = quantize(world, tmp_path / "step", group_size=16, calibration_rows=8, heldout_rows=4)
    assert capfd.readouterr() == ("", "")
    assert not list(elsewhere.iterdir())
    names = {path.name for path in out.iterdir()}
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert names == {"config.json", "generation_config.json", "model.safetensors"} | tokenizer
    for name in ["generation_config.json", *tokenizer]:
        assert (out / name).read_bytes() == (world.model / name).read_bytes()


def test_tied_embeddings_stay_whole_and_tied(world: TinyWorld, tmp_path: Path) -> None:
    from safetensors import safe_open
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(world.model)
    folder = train_model(tmp_path / "tied", tokenizer, world.tokens, steps=20, hidden=64, tied=True)
    inputs = {"model": folder, "calibration": world.tokens}
    _, context = run_stage(STAGE, inputs, {"group_size": 16, "calibration_rows": 8, "heldout_rows": 4}, tmp_path)
    with safe_open(context.out / "model.safetensors", "pt") as file:
        names = list(file.keys())
        stored = file.get_tensor("model.embed_tokens.weight")
    assert not any("lm_head" in name for name in names)
    model = load(context.out)
    assert torch.equal(stored, load(folder).model.embed_tokens.weight)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_a_result_over_the_gate_publishes_nothing(world: TinyWorld, tmp_path: Path) -> None:
    """Rounding to 4 bits with one scale per channel costs this model something, and nothing is allowed."""
    metrics, _ = quantize(world, tmp_path / "free", bits=4, group_size=None, **NEAREST)
    assert metrics["heldout_perplexity_increase"] > 0
    with pytest.raises(GateError) as caught:
        quantize(world, tmp_path / "gated", bits=4, group_size=None, max_perplexity_increase=0.0, **NEAREST)
    assert f"{metrics['heldout_perplexity']:.4f}" in str(caught.value)
    assert f"{metrics['heldout_perplexity_original']:.4f}" in str(caught.value)
    loose = metrics["heldout_perplexity_increase"] + 1e-6
    quantize(world, tmp_path / "loose", bits=4, group_size=None, max_perplexity_increase=loose, **NEAREST)


def test_the_gate_in_numbers() -> None:
    """110 is 10% above 100: allowed by 0.11, not by 0.09. A perplexity that is no number never passes."""
    require_quality(100.0, 110.0, QuantizeParams(max_perplexity_increase=0.11))
    require_quality(100.0, 1000.0, QuantizeParams())
    with pytest.raises(GateError, match=r"100\.0000 to 110\.0000, by 10%, and 9% is allowed"):
        require_quality(100.0, 110.0, QuantizeParams(max_perplexity_increase=0.09))
    for bad in (math.inf, math.nan):
        with pytest.raises(GateError):
            require_quality(100.0, bad, QuantizeParams())
        with pytest.raises(DataError, match=r"inputs\.model: held-out perplexity is"):
            require_quality(bad, 100.0, QuantizeParams())


def test_chats_calibrate_and_measure_too(world: TinyWorld, tmp_path: Path) -> None:
    """Perplexity is then that of what the assistant says: 40 held-out chats, each with its tokens and turn end."""
    from transformers import AutoTokenizer

    from stages.lib.rows.canonical import read_rows
    from stages.lib.text.chat_spans import encode_chat

    tokenizer = AutoTokenizer.from_pretrained(world.model)
    chats = [encode_chat(tokenizer, row["messages"]) for row in read_rows(world.chats / "heldout.jsonl")]
    assert max(len(chat.input_ids) for chat in chats) <= 256
    inputs = {"model": world.model, "calibration": world.chats}
    params = {"group_size": 16, "calibration_rows": 16, "calibration_length_tokens": 32}
    result, _ = run_stage(STAGE, inputs, params, tmp_path)
    assert result.facts.heldout_tokens == sum(sum(chat.assistant_mask) for chat in chats)
    assert result.metrics["heldout_perplexity_increase"] < 0.15


def test_facts_say_what_consumers_need(world: TinyWorld, tmp_path: Path) -> None:
    inputs = {"model": world.model, "calibration": world.tokens}
    result, _ = run_stage(STAGE, inputs, {"bits": 8, "group_size": 32, "heldout_rows": 2, **NEAREST}, tmp_path)
    facts = result.facts
    parameters = sum(parameter.numel() for parameter in load(world.model).parameters())
    assert (facts.dtype, facts.head_type, facts.parameters) == ("int8", "causal_lm", parameters)
    assert facts.stop_token_ids is not None
    assert facts.stop_token_ids[0] == facts.eos_token_id


def forecast(**params: Any) -> Forecast:
    """hidden 96, 4 heads of 24 (96 columns into o_proj), intermediate 256."""
    architecture = {"hidden_size": 96, "num_attention_heads": 4, "intermediate_size": 256, "num_hidden_layers": 2}
    return Forecast(QuantizeParams(**params), Resources(), {"model": Estimate(architecture=architecture, parameters=7)})


def test_plan_refuses_a_group_size_that_does_not_divide() -> None:
    """gcd(96, 256) = 32, whose divisors from 8 on are 8, 16 and 32."""
    (problem,) = STAGE.check(forecast(group_size=64))
    assert problem.where == "params.group_size"
    assert problem.what == "64 does not divide the columns of hidden_size (96), num_attention_heads x head_dim (96)"
    assert problem.hint == "Take one of 8, 16, 32, or null."
    assert STAGE.check(forecast(group_size=32)) == STAGE.check(forecast(group_size=None)) == []


def test_plan_leaves_out_what_is_ignored() -> None:
    """Group size 96 fits all layers but those with 256 columns."""
    (problem,) = STAGE.check(forecast(group_size=96))
    assert "intermediate_size (256)" in problem.what
    assert STAGE.check(forecast(group_size=96, ignore=["lm_head", r"re:.*down_proj"])) == []
    assert STAGE.check(forecast(group_size=96, ignore=["model.layers.0.mlp.down_proj"])) == [problem]


def test_plan_refuses_layers_that_are_not_quantized() -> None:
    architecture = {"model_type": "gpt2", "n_embd": 96}
    known = Forecast(QuantizeParams(), Resources(), {"model": Estimate(architecture=architecture)})
    assert [problem.where for problem in STAGE.check(known)] == ["inputs.model"]


def test_plan_knows_the_size_beforehand() -> None:
    assert STAGE.estimate(forecast()).parameters == 7
    assert STAGE.check(Forecast(QuantizeParams(), Resources(), {})) == []
    assert STAGE.output_kind(QuantizeParams(), {}) is Kind.QUANTIZED_LM


def test_a_layer_that_does_not_fit_and_a_name_that_is_no_layer_are_refused_together(
    world: TinyWorld, tmp_path: Path
) -> None:
    """Of 64 columns, 64 and 160 the gcd is 32."""
    with pytest.raises(DataError) as caught:
        quantize(world, tmp_path, bits=4, group_size=64, ignore=["lm_heat"], **NEAREST)
    message = str(caught.value)
    assert "model.layers.0.mlp.down_proj (160)" in message
    assert "Take one of 8, 16, 32, or null" in message
    assert "'lm_heat' is no linear layer of this model. Did you mean 'lm_head'?" in message


def test_gptq_that_cannot_be_solved_is_an_error(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llm-compressor then rounds the weights to nearest. The same process can quantize again.

    Which statistics have no inverse depends on the machine, so linear algebra is made to say of all that they have none.
    """
    import torch

    factorize = torch.linalg.cholesky_ex

    def without_factors(matrix: Any, *, out: Any, **options: Any) -> None:
        factorize(matrix, out=out, **options)
        out[1].fill_(1)

    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "cholesky_ex", without_factors)
        for attempt in ("first", "second"):
            with pytest.raises(
                DataError, match=r"params.dampening: Hessian inversion failed: 14 of 14 layers .*q_proj"
            ):
                quantize(world, tmp_path / attempt, bits=4, group_size=32, calibration_rows=1)
    quantize(world, tmp_path / "again", bits=4, group_size=32, calibration_rows=1)


def test_a_layer_that_no_calibration_text_reaches_is_an_error_and_can_be_ignored(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llm-compressor rounds such a layer to nearest without a word. Here the gate of one block is never called."""
    from llmcompressor.modifiers.gptq import GPTQModifier

    calibrate = GPTQModifier.calibrate_module

    def but_one(self: Any, module: Any, *more: Any) -> None:
        if self._module_names[module] != "model.layers.1.mlp.gate_proj":
            calibrate(self, module, *more)

    monkeypatch.setattr(GPTQModifier, "calibrate_module", but_one)
    with pytest.raises(DataError, match=r"params\.calibration_rows: .* reached 13 of 14 layers"):
        quantize(world, tmp_path / "unreached", bits=4, group_size=32, calibration_rows=1)
    ignore = ["lm_head", "model.layers.1.mlp.gate_proj"]
    quantize(world, tmp_path / "ignored", bits=4, group_size=32, calibration_rows=1, ignore=ignore)


def test_an_inverse_without_factors_is_an_error_of_the_same_kind(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which matrices have one depends on the machine, so linear algebra is made to say so here."""
    import torch

    def cholesky(*arguments: Any, **options: Any) -> None:
        raise torch.linalg.LinAlgError("the leading minor of order 50 is not positive-definite.")

    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "cholesky", cholesky)
        with pytest.raises(DataError, match=r"Hessian inversion failed: .* order 50"):
            quantize(world, tmp_path / "broken", bits=4, group_size=32, calibration_rows=1)
    quantize(world, tmp_path / "again", bits=4, group_size=32, calibration_rows=1)


def test_more_calibration_rows_than_there_are(world: TinyWorld, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has 160 training rows"):
        quantize(world, tmp_path, calibration=world.chats, group_size=32, calibration_rows=161)


def test_a_quantized_model_is_not_quantized_again(world: TinyWorld, tmp_path: Path) -> None:
    _, out = quantize(world, tmp_path / "once", bits=8, group_size=32, heldout_rows=2, **NEAREST)
    (tmp_path / "twice").mkdir()
    with pytest.raises(ArtifactError, match="is quantized already"):
        run_stage(STAGE, {"model": out, "calibration": world.tokens}, {"group_size": 32}, tmp_path / "twice")


def test_a_quantized_model_is_not_trained_and_the_way_out_works(world: TinyWorld, tmp_path: Path) -> None:
    """What `plan` says to run gives a model that computes the same, and of which no stage finds anything left over."""
    from stages.lib.models.heads import add_reward_head
    from stages.lib.models.loading import load_model

    _, out = quantize(world, tmp_path, bits=8, group_size=32, **NEAREST)
    with pytest.raises(ArtifactError, match="holds quantized weights, which this stage does not read"):
        load_model(AutoModelForCausalLM, out)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: recipe\nseed: 1\noutputs: [chat]\nstages:\n  chat: {kind: sft, params: {global_batch_size: 1, max_steps: 1,"
        f" learning_rate: 1e-3, max_length_tokens: 64}}, inputs: {{model: {out}, chats: {world.chats}}}}}\n"
    )
    with pytest.raises(RecipeError, match="needs causal_lm, and the folder holds quantized_lm") as caught:
        load_recipe(recipe, STAGES, LAUNCHERS)
    (command,) = re.findall(r"`(from transformers .*?)`", str(caught.value))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")
        exec(command.replace("FOLDER", repr(str(tmp_path / "whole"))), {})
    ids = some_ids(world)
    assert torch.equal(load_model(AutoModelForCausalLM, tmp_path / "whole")(ids).logits, load(out)(ids).logits)
    add_reward_head(tmp_path / "whole", 0)


def test_tokens_of_another_tokenizer_are_refused(world: TinyWorld, tmp_path: Path) -> None:
    other = write_tokens(tmp_path / "other", make_tokenizer(world.texts[:100], 700), world.texts[:200])
    with pytest.raises(ArtifactError, match="their token ids mean different things"):
        quantize(world, tmp_path / "step", calibration=other, group_size=32)


def test_options_that_only_gptq_has_are_refused_without_it() -> None:
    params, problems = validate(QuantizeParams, {"method": "round_to_nearest", "dampening": 0.1}, "params")
    assert params is None
    assert "dampening has no effect with method round_to_nearest" in str(problems[0])


def test_params_written_out_in_full_are_accepted_again() -> None:
    written = QuantizeParams(method="round_to_nearest", bits=8, group_size=None).model_dump(mode="json")
    params, problems = validate(QuantizeParams, written, "params")
    assert not problems
    assert params == QuantizeParams(method="round_to_nearest", bits=8, group_size=None)
