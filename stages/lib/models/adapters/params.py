"""What a recipe says of an adapter, one model for each method. Imports no torch: `plan` reads it.

A new method is its params here, in `AdapterParams`, and a row of `METHODS` in methods.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from pipeline.errors import did_you_mean, shown
from pipeline.settings.strict import Strict
from stages.lib.formulas.bounds import Scale

ADAPTER_FOLDER = "adapter"
"""Where an artifact with a whole model keeps the adapter alone."""

ModuleNames = list[Annotated[str, Field(min_length=1)]]


class AdapterBlock(Strict):
    """What the blocks of all methods have."""

    publish: Literal["merged", "adapter"] | None = None
    """merged: a whole model with the adapter in its weights, which every later stage takes, and the adapter alone beside it in `adapter/`. adapter: the adapter alone, of a few megabytes, which `merge` or peft puts on its base. null: merged, and adapter of a method that has no weights to merge into."""


class LoraMethod(AdapterBlock):
    """W + (alpha / rank) B A beside frozen linear layers (Hu et al., 2022)."""

    method: Literal["lora"]
    """Low-rank matrices beside linear layers."""
    rank: int = Field(default=16, ge=1)
    """Rank of the matrices that are added."""
    alpha: Scale = 32.0
    """What they add is multiplied by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of a layer's inputs that the matrices do not see in training."""
    target_modules: ModuleNames | str | None = Field(default=None, min_length=1)
    """The linear layers that get one: a list of their names (q_proj, self_attn.q_proj), or a regular expression that a whole path must match. null: all of them but the output layer."""
    modules_to_save: ModuleNames | None = Field(default=None, min_length=1)
    """Names of modules that are trained whole beside the matrices, as embed_tokens and lm_head. New heads always are."""
    use_rslora: bool = False
    """Whether what is added is multiplied by alpha / sqrt(rank) instead, which keeps large ranks learning (Kalajdzievski, 2023)."""
    use_dora: bool = False
    """Whether the norm of each row of weights is learned apart from its direction (Liu et al., 2024). Slower, and better at small ranks."""
    init: Literal["default", "gaussian", "orthogonal"] = "default"
    """How the matrices begin; what they add is zero in any case. default: A as a linear layer does, B zero; gaussian: A normal with deviation 1 / rank, B zero; orthogonal: neither is zero, and the rows of A are orthogonal to what B reads, which needs an even rank."""
    learning_rate_ratio: Scale = 1.0
    """What the learning rate of B is a multiple of that of A (LoRA+, Hayou et al., 2024; 16 is usual)."""

    @model_validator(mode="after")
    def rank_is_even(self) -> LoraMethod:
        if self.init == "orthogonal" and self.rank % 2:
            raise ValueError(f"init: orthogonal needs an even rank, not {self.rank}")
        return self


class Ia3Method(AdapterBlock):
    """Keys, values and inner activations multiplied by learned vectors (Liu et al., 2022)."""

    method: Literal["ia3"]
    """Learned factors on keys, values and inner activations."""
    target_modules: ModuleNames | None = Field(default=None, min_length=1)
    """Names of the linear layers that are scaled. null: those that the method's authors name, where the architecture is known."""
    feedforward_modules: ModuleNames | None = Field(default=None, min_length=1)
    """Those among them whose inputs are scaled in place of their outputs: the last layer of each MLP. null: as for target_modules."""

    @model_validator(mode="after")
    def inputs_are_among_them(self) -> Ia3Method:
        if (self.target_modules is None) != (self.feedforward_modules is None):
            raise ValueError("give both target_modules and feedforward_modules, or neither")
        if others := sorted(set(self.feedforward_modules or ()) - set(self.target_modules or ())):
            raise ValueError(f"feedforward_modules names {', '.join(others)}, which target_modules does not")
        return self


class VirtualTokens(AdapterBlock):
    """Methods that put learned tokens before a text: there are no weights to merge them into."""

    num_virtual_tokens: int = Field(default=20, ge=1)
    """How many tokens stand before each text. They take their place in the model's context."""

    @model_validator(mode="after")
    def nothing_is_merged(self) -> VirtualTokens:
        if self.publish == "merged":
            raise ValueError(
                "publish: merged is not possible: virtual tokens are no weights of the model. Set publish: adapter, or "
                f"take a method whose weights can be merged ({mergeable_methods()})"
            )
        return self


class PromptTuningMethod(VirtualTokens):
    """Learned embeddings before the text (Lester et al., 2021)."""

    method: Literal["prompt_tuning"]
    """Learned embeddings before the text."""
    init: Literal["random", "vocabulary"] = "vocabulary"
    """How they begin. vocabulary: as embeddings of tokens drawn from the vocabulary; random: normal."""


class PrefixTuningMethod(VirtualTokens):
    """Learned keys and values before the text in every layer (Li and Liang, 2021; P-tuning v2, Liu et al., 2022)."""

    method: Literal["prefix_tuning"]
    """Learned keys and values before the text, in every layer."""
    projection: bool = False
    """Whether they come out of an MLP over embeddings while they are trained. It learns steadier and takes far more memory; what is published is the same size. Keys and values stand in every layer either way."""
    projection_size: int | None = Field(default=None, ge=1)
    """Width of that MLP. null: that of the keys of a layer."""

    @model_validator(mode="after")
    def size_is_used(self) -> PrefixTuningMethod:
        if self.projection_size is not None and not self.projection:
            raise ValueError("projection_size has no effect without projection: remove it, or set projection: true")
        return self


class PTuningMethod(VirtualTokens):
    """Embeddings before the text that come out of an MLP or an LSTM (Liu et al., 2021)."""

    method: Literal["p_tuning"]
    """Embeddings before the text that come out of an encoder."""
    encoder: Literal["mlp", "lstm"] = "mlp"
    """What they come out of: three linear layers, or a bidirectional LSTM under two."""
    encoder_size: int | None = Field(default=None, ge=1)
    """Width of the encoder. null: that of the model."""
    encoder_layers: int = Field(default=2, ge=1)
    """Layers of the LSTM."""

    @model_validator(mode="after")
    def layers_are_used(self) -> PTuningMethod:
        if self.encoder == "mlp" and self.encoder_layers != 2:
            raise ValueError("encoder_layers has no effect with encoder: mlp: remove it")
        return self


class BitFitMethod(AdapterBlock):
    """The model's own biases (Ben Zaken et al., 2022)."""

    method: Literal["bitfit"]
    """The model's own biases, and nothing else."""


class FreezeMethod(AdapterBlock):
    """A part of the model's own weights; the others are frozen."""

    method: Literal["freeze"]
    """A part of the model's own weights."""
    last_layers: int | None = Field(default=None, ge=1)
    """How many of the last layers are trained."""
    modules: ModuleNames | None = Field(default=None, min_length=1)
    """Names of the modules that are trained, as mlp or lm_head; with last_layers, those of these layers only. null: whole layers."""

    @model_validator(mode="after")
    def something_is_trained(self) -> FreezeMethod:
        if self.last_layers is None and self.modules is None:
            raise ValueError("says nothing of what is trained: give last_layers, modules or both")
        return self


class ContinuedMethod(AdapterBlock):
    """The adapter that the input `adapter` names, trained further; what is published is that adapter, of the same base."""

    method: Literal["continued"]
    """The adapter of the input `adapter`, with its own rank and layers. For lora, ia3, bitfit and freeze. publish: null is `adapter` here."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Of a lora: share of a layer's inputs that the matrices do not see in training, whatever it was before."""
    learning_rate_ratio: Scale = 1.0
    """Of a lora: what the learning rate of B is a multiple of that of A, whatever it was before."""


AnyMethod = (
    LoraMethod
    | Ia3Method
    | PromptTuningMethod
    | PrefixTuningMethod
    | PTuningMethod
    | BitFitMethod
    | FreezeMethod
    | ContinuedMethod
)


def method_name(params: type[AdapterBlock]) -> str:
    """What a recipe writes as the `method`."""
    return str(get_args(params.model_fields["method"].annotation)[0])


def mergeable_methods() -> str:
    """The names of the methods whose weights can become a part of the model's, as a sentence has them."""
    fresh = [params for params in get_args(AnyMethod) if not issubclass(params, VirtualTokens | ContinuedMethod)]
    names = [method_name(params) for params in fresh]
    return f"{', '.join(names[:-1])} or {names[-1]}"


def has_known_method(block: Any) -> Any:
    """The block itself; an unknown method is told in our words. Whatever else is wrong is left for pydantic to report."""
    if isinstance(block, Mapping):
        known = [method_name(params) for params in get_args(AnyMethod)]
        if "method" not in block:
            raise ValueError(f"method: is required ({did_you_mean('', known)})")
        if block["method"] not in known:
            given = block["method"]
            raise ValueError(f"method: there is no method {shown(given)} ({did_you_mean(str(given), known)})")
    return block


AdapterParams = Annotated[AnyMethod, Field(discriminator="method"), BeforeValidator(has_known_method)]
"""A block of `method` and the fields of that method."""


def require_no_dropout(adapter: AdapterBlock | None) -> None:
    """Raises `ValueError` for an adapter that drops inputs at random, where a policy is compared with its reference."""
    if getattr(adapter, "dropout", 0.0):
        raise ValueError(
            "adapter: dropout must be 0: policy and reference are compared token by token, and would differ by chance"
        )


def publishes_adapter(adapter: AdapterBlock | None) -> bool:
    """Whether what is published is the adapter alone."""
    if adapter is None:
        return False
    usual = "adapter" if isinstance(adapter, VirtualTokens | ContinuedMethod) else "merged"
    return (adapter.publish or usual) == "adapter"
