"""What a recipe says of an adapter, one model for each method. Imports no torch: `plan` reads it.

A new method is its params here, in `AdapterParams`, and a row of `METHODS` in methods.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from pipeline.errors import did_you_mean, shown
from stages.lib.formulas.bounds import Scale
from stages.lib.models.adapters.block import AdapterBlock as AdapterBlock
from stages.lib.models.adapters.block import ModuleNames
from stages.lib.models.adapters.budget_params import AdaLoraMethod

ADAPTER_FOLDER = "adapter"
"""Where an artifact with a whole model keeps the adapter alone."""


def is_none(value: Any) -> bool:
    """Whether a field that is left out of identities where it says nothing says nothing."""
    return value is None


ADDED_LAYERS = "added_layers"
"""The field of a model's config that lists the layers which the stage `deepen` added to it."""


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
    target_modules: ModuleNames | str | None = None
    """The linear layers that get one: a list of their names (q_proj, self_attn.q_proj), or a regular expression that a whole path must match. null: all of them but the output layer; []: none, where target_parameters names what does."""
    target_parameters: ModuleNames | None = Field(default=None, min_length=1, exclude_if=is_none)
    """Names of weights that are no linear layer's and get one as well, a pair of matrices for each expert where they hold several: [experts.gate_up_proj, experts.down_proj] of a mixture of experts."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] | None = Field(default=None, min_length=1, exclude_if=is_none)
    """Other ranks of some layers: the end of a path, or a regular expression of one, as {v_proj: 32, layers.0.mlp.up_proj: 4}. Of several that match, the first decides."""
    alpha_pattern: dict[str, Scale] | None = Field(default=None, min_length=1, exclude_if=is_none)
    """Other alphas of some layers, named in the same way."""
    modules_to_save: ModuleNames | None = Field(default=None, min_length=1)
    """Names of modules that are trained whole beside the matrices, as embed_tokens and lm_head. New heads always are."""
    use_rslora: bool = False
    """Whether what is added is multiplied by alpha / sqrt(rank) instead, which keeps large ranks learning (Kalajdzievski, 2023)."""
    use_dora: bool = False
    """Whether the norm of each row of weights is learned apart from its direction (Liu et al., 2024). Slower, and better at small ranks."""
    init: Literal["default", "gaussian", "orthogonal", "pissa"] = "default"
    """How the matrices begin; what they add is zero in any case. default: A as a linear layer does, B zero; gaussian: A normal with deviation 1 / rank, B zero; orthogonal: neither is zero, and the rows of A are orthogonal to what B reads, which needs an even rank; pissa: the largest singular values of the weight and their vectors, which are taken off the frozen weight (Meng et al., 2024). What is published of pissa is a LoRA of twice the rank on the weights as they were."""
    init_iterations: int | None = Field(default=None, ge=1, exclude_if=is_none)
    """With pissa: rounds of a randomized decomposition (Halko et al., 2011), which for large layers takes seconds in place of minutes; 16 is usual. null: an exact one."""
    learning_rate_ratio: Scale = 1.0
    """What the learning rate of B is a multiple of that of A (LoRA+, Hayou et al., 2024; 16 is usual)."""
    quantize_base: Literal["nf4"] | None = Field(default=None, exclude_if=is_none)
    """What the frozen linear layers are kept in while the matrices are trained (QLoRA, Dettmers et al., 2023): nf4, 4.5 bits a weight, in place of 32. What is published stands on the weights as they are on disk. null: as they are."""

    @model_validator(mode="after")
    def base_is_read_as_it_is(self) -> LoraMethod:
        if self.quantize_base is not None and (self.use_dora or self.init == "pissa"):
            other = "use_dora" if self.use_dora else "init: pissa"
            raise ValueError(f"{other} needs the weights of the base as they are: remove it, or quantize_base")
        return self

    @model_validator(mode="after")
    def rank_is_even(self) -> LoraMethod:
        for rank in (self.rank, *(self.rank_pattern or {}).values()):
            if self.init == "orthogonal" and rank % 2:
                raise ValueError(f"init: orthogonal needs an even rank, not {rank}")
        return self

    @model_validator(mode="after")
    def something_gets_one(self) -> LoraMethod:
        if self.target_modules is not None and not self.target_modules and self.target_parameters is None:
            raise ValueError("target_modules names nothing: leave it out for all linear layers, or name some")
        for field, wrong in (("use_dora", self.use_dora), ("dropout", self.dropout > 0)):
            if wrong and self.target_parameters is not None:
                raise ValueError(f"target_parameters have no {field}: remove one of the two")
        return self

    @model_validator(mode="after")
    def begins_with_principal_parts(self) -> LoraMethod:
        if self.init != "pissa":
            if self.init_iterations is not None:
                raise ValueError(f"init_iterations has no effect with init: {self.init}: remove it")
            return self
        if self.use_dora:
            raise ValueError("use_dora does not go with init: pissa, whose weights are a sum: remove one of the two")
        if self.target_parameters is not None:
            raise ValueError("target_parameters cannot begin with pissa: take init: default, or linear layers alone")
        return self


class VeraMethod(AdapterBlock):
    """W + diag(b) B diag(d) A beside frozen linear layers: A and B are drawn once for all of them (Kopiczko et al., 2024)."""

    method: Literal["vera"]
    """Learned vectors around random matrices that all layers share."""
    rank: int = Field(default=256, ge=1)
    """Rank of the random matrices, and length of the vector d. Far larger than that of a lora."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of a layer's inputs that the matrices do not see in training."""
    target_modules: ModuleNames | str | None = Field(default=None, min_length=1)
    """The linear layers that get one, as for lora. null: all of them but the output layer."""
    initial_d: Scale = 0.1
    """What the vector d begins with; b begins with zeros."""
    projection_seed: int = Field(default=0, ge=0, lt=2**63)
    """What the random matrices are drawn from. They are in the adapter's file as well."""


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


class Unmergeable(AdapterBlock):
    """Methods without weights that could become a part of the model's."""

    @model_validator(mode="after")
    def nothing_is_merged(self) -> Unmergeable:
        if self.publish == "merged":
            raise ValueError(
                f"publish: merged is not possible: {no_weights(method_name(type(self)))} of the model. Set publish: adapter, or "
                f"take a method whose weights can be merged ({mergeable_methods()})"
            )
        return self


class VirtualTokens(Unmergeable):
    """Methods that put learned tokens before a text: there are no weights to merge them into."""

    num_virtual_tokens: int = Field(default=20, ge=1)
    """How many tokens stand before each text. They take their place in the model's context."""


class BottleneckMethod(Unmergeable):
    """Small networks at the attention and the MLP of each layer (Houlsby et al., 2019; He et al., 2022)."""

    method: Literal["bottleneck"]
    """Small networks at the attention and the MLP of each layer."""
    size: int = Field(default=64, ge=1)
    """Width of each network between its two matrices."""
    placement: Literal["serial", "parallel"] = "serial"
    """What a network reads. serial: what the attention or MLP makes (Houlsby et al.); parallel: what that reads (He et al.). What it makes is added to what the attention or MLP makes in either case."""
    modules: ModuleNames | None = Field(default=None, min_length=1)
    """Names of the parts of a layer that get one, as [mlp]. null: its attention and its MLP."""
    activation: Literal["gelu", "relu"] = "gelu"
    """What stands between the two matrices."""
    scale: Scale = 1.0
    """What the network makes is multiplied by it."""


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

    only_new: bool = Field(default=False, exclude_if=lambda new: not new)
    """Whether only what is new in the model is trained: the layers that the stage `deepen` added to it (LLaMA Pro, Wu et al., 2024), and a new head."""

    @model_validator(mode="after")
    def something_is_trained(self) -> FreezeMethod:
        named = self.last_layers is not None or self.modules is not None
        if self.only_new and named:
            raise ValueError("only_new says already what is trained: remove it, or last_layers and modules")
        if not named and not self.only_new:
            raise ValueError("says nothing of what is trained: give last_layers, modules or both, or only_new")
        return self


class ContinuedMethod(AdapterBlock):
    """The adapter that the input `adapter` names, trained further; what is published is that adapter, of the same base."""

    method: Literal["continued"]
    """The adapter of the input `adapter`, with its own rank and layers. For lora, vera, ia3, bottleneck, bitfit and freeze. publish: null is `adapter` here."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Of a lora: share of a layer's inputs that the matrices do not see in training, whatever it was before."""
    learning_rate_ratio: Scale = 1.0
    """Of a lora: what the learning rate of B is a multiple of that of A, whatever it was before."""


AnyMethod = (
    LoraMethod
    | VeraMethod
    | AdaLoraMethod
    | Ia3Method
    | BottleneckMethod
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


def no_weights(method: str) -> str:
    """What of a method is in the place of weights, as a sentence has it."""
    modules = method == method_name(BottleneckMethod)
    return "modules between those of the model are no weights" if modules else "virtual tokens are no weights"


def mergeable_methods() -> str:
    """The names of the methods whose weights can become a part of the model's, as a sentence has them."""
    fresh = [params for params in get_args(AnyMethod) if not issubclass(params, Unmergeable | ContinuedMethod)]
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


def require_comparable(adapter: AdapterBlock | None) -> None:
    """Raises `ValueError` for an adapter under which a policy would differ from its reference before anything is learned."""
    if getattr(adapter, "dropout", 0.0):
        raise ValueError(
            "adapter: dropout must be 0: policy and reference are compared token by token, and would differ by chance"
        )
    if getattr(adapter, "quantize_base", None):
        raise ValueError(
            "adapter: quantize_base must be null: the reference is the model as it is on disk, and a policy on its weights "
            "in four bits would begin apart from it"
        )


def publishes_adapter(adapter: AdapterBlock | None) -> bool:
    """Whether what is published is the adapter alone."""
    if adapter is None:
        return False
    usual = "adapter" if isinstance(adapter, Unmergeable | ContinuedMethod) else "merged"
    return (adapter.publish or usual) == "adapter"
