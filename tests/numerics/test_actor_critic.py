"""What policy and critic say of padded completions, against each sequence alone; and models that share their weights."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from stages.lib.formulas.token_losses import IGNORE
from stages.lib.generating.sampling import sample, uniforms_for
from stages.lib.models.adapters.attaching import sharing_weights
from stages.lib.models.adapters.params import AdapterParams
from stages.lib.models.heads import fresh_value, load_value
from stages.lib.on_policy.actor_critic import ActorCritic, Judged
from stages.lib.on_policy.adapting import adapted
from stages.lib.on_policy.experience import Episode, collate_episodes
from stages.lib.training.optimizer import parameter_groups
from tests.numerics.tiny_models import FAMILIES, PADDING, logprobs_alone, tiny_policy, tiny_value, values_alone

SEQUENCES = [
    ([5, 6, 7], [8, 9, 10, 11, 12]),
    ([13, 14, 15, 16, 17, 18, 19], [20]),
    ([21], [PADDING, 23, 24]),
    ([25, PADDING, 26, 27], [28, 29]),
]
"""Prompts and completions: long before short, short before long, and the padding id as a token like another."""
LORA: dict[str, Any] = {"method": "lora", "rank": 4}
METHODS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "saving": {"method": "lora", "rank": 2, "target_modules": r".*\.1\..*_proj", "modules_to_save": ["lm_head"]},
    "ia3": {"method": "ia3"},
    "bitfit": {"method": "bitfit"},
    "freeze": {"method": "freeze", "last_layers": 1},
    "prompt": {"method": "prompt_tuning", "num_virtual_tokens": 3},
    "p_tuning": {"method": "p_tuning", "num_virtual_tokens": 3, "encoder_size": 8},
    "prefix": {"method": "prefix_tuning", "num_virtual_tokens": 3},
    "projected": {"method": "prefix_tuning", "num_virtual_tokens": 3, "projection": True},
}
FITTING = [
    (family, name)
    for name in METHODS
    for family in FAMILIES
    if (family, name) not in (("llama", "bitfit"), ("gpt2", "saving"))
]
"""Llama has no biases, and the head of GPT-2 is its embedding."""
VIRTUAL = ("prompt", "p_tuning", "prefix", "projected")


def under(
    family: str, block: dict[str, Any], seed: int = 3, *, critic: bool = True, temperature: float = 1.0
) -> ActorCritic:
    """Policy, critic and reference of the tiny model of the family."""
    adapter = TypeAdapter(AdapterParams).validate_python(block)
    ctx: Any = SimpleNamespace(seed=seed, inputs={}, journal=SimpleNamespace(note=lambda text: None))
    return adapted(tiny_policy(family), ctx, adapter, critic=critic, temperature=temperature)


def batch_of(sequences: list[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
    nothing = np.zeros(0, dtype=np.float32)
    episodes = [
        Episode(
            position=position,
            row_index=0,
            prompt_ids=np.array(prompt),
            ids=np.array(ids),
            ended=True,
            rewards=np.zeros(1),
            generator_logprobs=nothing,
            logprobs=nothing,
            ref_logprobs=nothing,
            values=nothing,
        )
        for position, (prompt, ids) in enumerate(sequences)
    ]
    return collate_episodes(episodes, PADDING)


def judge(module: ActorCritic, *, by_reference: bool = False) -> Judged:
    batch = batch_of(SEQUENCES)
    judged = module(batch["input_ids"], batch["attention_mask"], batch["mask"].shape[1], by_reference=by_reference)
    assert isinstance(judged, Judged)
    return judged


def values_of(module: ActorCritic) -> Tensor:
    values = judge(module).values
    assert values is not None
    return values


@torch.no_grad()
def said(module: ActorCritic) -> dict[str, Tensor]:
    """Log-probabilities of policy and reference, and values, of the tokens of all completions one after the other."""
    mask_BK = batch_of(SEQUENCES)["mask"].bool()
    policy = judge(module)
    tensors = {"policy": policy.logprobs[mask_BK]}
    if policy.values is not None:
        tensors["value"] = policy.values[mask_BK]
    if module.reference is not None:
        tensors["reference"] = judge(module, by_reference=True).logprobs[mask_BK]
    return tensors


def one_after_the_other(of_sequence: Callable[[list[int], list[int]], Tensor]) -> Tensor:
    return torch.cat([of_sequence(prompt, ids) for prompt, ids in SEQUENCES])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_padded_sequence_is_judged_like_one_alone(family: str, temperature: float) -> None:
    """Padded on both sides, in one batch, next to others; each alone without padding, by the models themselves."""
    policy, value = tiny_policy(family), tiny_value(family)
    tensors = said(ActorCritic(policy, value, temperature=temperature))
    expected = one_after_the_other(lambda prompt, ids: logprobs_alone(policy, prompt, ids, temperature))
    torch.testing.assert_close(tensors["policy"].double(), expected, rtol=0, atol=1e-5)
    expected = one_after_the_other(lambda prompt, ids: values_alone(value, prompt, ids))
    torch.testing.assert_close(tensors["value"], expected, rtol=0, atol=1e-5)
    assert tensors["value"].std() > 0.1, "the comparison would see nothing if the critic said the same everywhere"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_entropy_of_a_padded_sequence(family: str) -> None:
    """That of the distribution each token was drawn from, - sum p log p, from a forward pass of the sequence alone."""
    policy = tiny_policy(family)
    mask_BK = batch_of(SEQUENCES)["mask"].bool()
    with torch.no_grad():
        entropy = judge(ActorCritic(policy)).entropy[mask_BK]

        def alone(prompt: list[int], ids: list[int]) -> Tensor:
            logits_KV = policy(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
            return torch.distributions.Categorical(logits=logits_KV).entropy()

        torch.testing.assert_close(entropy, one_after_the_other(alone), rtol=0, atol=1e-5)


def test_padding_has_no_gradient() -> None:
    """The gradient of a sum over the completions' tokens is the sum of the gradients of each sequence alone."""
    policy, value = tiny_policy("gpt2"), tiny_value("gpt2")
    module = ActorCritic(policy, value)
    mask_BK = batch_of(SEQUENCES)["mask"]
    judged = judge(module)
    assert judged.values is not None
    ((judged.logprobs + judged.values.square()) * mask_BK).sum().backward()
    together = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    for sequence in SEQUENCES:
        batch = batch_of([sequence])
        alone = module(batch["input_ids"], batch["attention_mask"], len(sequence[1]))
        (alone.logprobs + alone.values.square()).sum().backward()
    apart = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert set(together) == set(apart)
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, apart[name], rtol=1e-4, atol=1e-4 * float(apart[name].abs().max()) + 1e-6)


def test_the_cross_entropy_of_chats() -> None:
    """With targets: the negative log-probabilities of the tokens asked for, at temperature 1, whatever that of sampling is."""
    policy = tiny_policy("llama")
    ids_BT = torch.tensor([[5, 6, 7, 8], [9, 10, 11, PADDING]])
    mask_BT = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    targets_BT = torch.tensor([[IGNORE, 7, 8, IGNORE], [10, 11, IGNORE, IGNORE]])
    nats = ActorCritic(policy, temperature=0.5)(ids_BT, mask_BT, targets_BT=targets_BT)
    expected = -logprobs_alone(policy, [5, 6], [7, 8]).sum() - logprobs_alone(policy, [9], [10, 11]).sum()
    assert float(nats.detach()) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_shared_weights_is_another_model_of_the_same_tensors(family: str) -> None:
    """Not one module is the same; every parameter and every buffer is. GPT-2's head is its embedding in both."""
    model = tiny_policy(family)
    shared = sharing_weights(model)
    assert not set(map(id, model.modules())) & set(map(id, shared.modules()))
    for kind in ("named_parameters", "named_buffers"):
        theirs = dict(getattr(shared, kind)())
        assert {name: id(tensor) for name, tensor in getattr(model, kind)()} == {n: id(t) for n, t in theirs.items()}
    tied = shared.get_output_embeddings().weight is shared.get_input_embeddings().weight
    assert tied is (family == "gpt2")
    with torch.no_grad():
        model.get_input_embeddings().weight[7] += 1
    assert torch.equal(shared.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_parts_of_their_own_are_copies() -> None:
    """What is named is as equal as ever, and no longer the same; all else is."""
    model = tiny_policy("llama")
    apart = [name for name, _ in model.named_parameters() if ".layers.1." in name]
    copied = sharing_weights(model, apart)
    for name, weight in copied.named_parameters():
        own = model.get_parameter(name)
        assert torch.equal(weight, own) and (weight is own) is (name not in apart)


@pytest.mark.parametrize(("family", "name"), FITTING)
def test_adapters_begin_as_nothing(family: str, name: str) -> None:
    """The reference is the base to the last bit, and the policy too, but for virtual tokens. The critic's head is 0."""
    expected = said(ActorCritic(tiny_policy(family), temperature=0.7))["policy"]
    tensors = said(under(family, METHODS[name], temperature=0.7))
    assert torch.equal(tensors["reference"], expected)
    assert torch.equal(tensors["policy"], expected) is (name not in VIRTUAL)
    assert not tensors["value"].any()


@pytest.mark.parametrize("name", VIRTUAL)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_sequence_behind_virtual_tokens_is_judged_like_one_alone(family: str, name: str) -> None:
    """Padded on both sides, next to others; alone by peft's own forward pass, which puts them before a text that fills its row."""
    module = under(family, METHODS[name])
    assert module.value is not None
    with torch.no_grad():
        module.value.score.weight.copy_(torch.linspace(-1, 1, module.value.score.in_features))
    tensors = said(module)
    expected = one_after_the_other(lambda prompt, ids: logprobs_alone(module.policy, prompt, ids))
    torch.testing.assert_close(tensors["policy"].double(), expected, rtol=0, atol=1e-5)
    values = []
    for prompt, ids in SEQUENCES:
        with torch.no_grad():
            hidden_1TH = module.value.base_model(torch.tensor([[*prompt, *ids]])).last_hidden_state
        values.append(module.value.score(hidden_1TH)[0, -len(ids) - 1 : -1, 0].detach())
    torch.testing.assert_close(tensors["value"], torch.cat(values), rtol=0, atol=1e-5)
    assert tensors["value"].std() > 0.1


@pytest.mark.parametrize("name", VIRTUAL)
def test_completions_behind_virtual_tokens_are_written_by_what_judges_them(name: str) -> None:
    """The generator's log-probabilities of a batch are those of the policy in training."""
    module = under("llama", METHODS[name])
    prompts = [prompt for prompt, _ in SEQUENCES]
    uniforms = np.stack([uniforms_for(0, position, 5) for position in range(len(prompts))])
    written = sample(module.policy.eval(), prompts, uniforms, stop_ids=[1], temperature=1.0)
    batch = batch_of([(prompt, each.ids.tolist()) for prompt, each in zip(prompts, written, strict=True)])
    with torch.no_grad():
        judged = module(batch["input_ids"], batch["attention_mask"], batch["mask"].shape[1])
    for each, logp_K in zip(written, judged.logprobs, strict=True):
        assert each.logprobs.tolist() == pytest.approx(logp_K[: len(each.ids)].tolist(), abs=1e-5)


def test_a_fresh_adapter_is_a_function_of_the_seed() -> None:
    """The same in every process; the critic's is another one than the policy's."""

    def weights(seed: int) -> dict[str, Tensor]:
        module = under("llama", LORA, seed)
        return {name: p.detach() for name, p in module.named_parameters() if "lora_A" in name}

    first, again, other = weights(3), weights(3), weights(4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    policy = [tensor for name, tensor in first.items() if name.startswith("policy.")]
    critic = [tensor for name, tensor in first.items() if name.startswith("value.")]
    # Two layers of four projections of attention and three of the feed-forward part, and not the head.
    assert len(policy) == len(critic) == 2 * 7
    assert not any(torch.equal(a, b) for a, b in zip(policy, critic, strict=True))


def train(part: Any, loss_of: Callable[[], Tensor]) -> None:
    """Some steps on what can be trained in this part, with every other gradient thrown away."""
    optimizer = torch.optim.SGD([p for p in part.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        loss_of().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(("family", "name"), FITTING)
def test_training_one_adapter_leaves_the_others_and_the_base(family: str, name: str) -> None:
    """Policy, then critic: what is trained changes, and nothing else does by a single bit."""
    module = under(family, METHODS[name])
    assert module.value is not None
    with torch.no_grad():
        module.value.score.weight.fill_(0.5)  # else its adapter would have no gradient in the first step
    mask_BK = batch_of(SEQUENCES)["mask"]
    frozen = {name: p.detach().clone() for name, p in module.named_parameters() if not p.requires_grad}
    assert not set(map(id, frozen.values())) & {id(p) for p in module.parameters() if p.requires_grad}
    start = said(module)

    train(module.policy, lambda: -(judge(module).logprobs * mask_BK).mean())
    after_policy = said(module)
    assert (after_policy["policy"] - start["policy"]).abs().min() > 1e-4
    assert torch.equal(after_policy["value"], start["value"])
    assert torch.equal(after_policy["reference"], start["reference"])

    module.zero_grad()
    train(module.value, lambda: ((values_of(module) - 1).square() * mask_BK).mean())
    after_value = said(module)
    assert (after_value["value"] - start["value"]).abs().min() > 1e-4
    assert torch.equal(after_value["policy"], after_policy["policy"])
    assert torch.equal(after_value["reference"], start["reference"])
    now = dict(module.named_parameters())
    assert all(torch.equal(tensor, now[name]) for name, tensor in frozen.items())


def test_policy_and_critic_have_gradients_of_their_own() -> None:
    """The policy's loss reaches its adapter only, the critic's its adapter and its head only; the base none."""
    module = under("llama", LORA)
    assert module.value is not None

    def reached(loss: Tensor) -> set[str]:
        module.zero_grad()
        loss.backward()
        return {name.split(".")[0] for name, p in module.named_parameters() if p.grad is not None and p.grad.any()}

    assert reached(judge(module).logprobs.sum()) == {"policy"}
    assert reached((values_of(module) - 1).square().sum()) == {"value"}
    assert all(
        "lora" in name or name == "value.score.weight" for name, p in module.named_parameters() if p.requires_grad
    )


def test_without_a_critic_there_are_no_values() -> None:
    module = under("llama", LORA, critic=False)
    assert module.value is None
    assert judge(module).values is None
    assert judge(module, by_reference=True).values is None


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_critic_says_nothing(family: str, tmp_path: Any) -> None:
    """A head of zeros, on the backbone of the policy, or on that of a reward model, which keeps its layers."""
    tiny_policy(family).save_pretrained(tmp_path / "policy")
    reward = tiny_value(family)
    reward.save_pretrained(tmp_path / "reward")
    for folder, is_reward_model in ((tmp_path / "policy", False), (tmp_path / "reward", True)):
        value = fresh_value(folder, PADDING, is_reward_model=is_reward_model)
        assert not said(ActorCritic(tiny_policy(family), value))["value"].any()
    torch.testing.assert_close(value.get_input_embeddings().weight, reward.get_input_embeddings().weight)
    # A critic that another run published comes with its head.
    loaded = said(ActorCritic(tiny_policy(family), load_value(tmp_path / "reward")))["value"]
    torch.testing.assert_close(loaded, said(ActorCritic(tiny_policy(family), reward))["value"])


def test_groups_of_the_optimizer() -> None:
    """Per module its matrices, which decay, then its norms and biases, which do not, with the module's learning rate."""
    policy, value = torch.nn.Linear(3, 2), torch.nn.Linear(2, 1, bias=False)
    norm = torch.nn.LayerNorm(4)
    groups, rates = parameter_groups([(policy, 1e-3), (value, 1e-2), (norm, 1e-1)], weight_decay=0.1)
    assert [[tuple(p.shape) for p in group["params"]] for group in groups] == [[(2, 3)], [(2,)], [(1, 2)], [(4,), (4,)]]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.1, 0.0]
    assert rates == [1e-3, 1e-3, 1e-2, 1e-1]
