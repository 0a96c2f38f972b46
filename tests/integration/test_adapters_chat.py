"""A conversation in which adapters of one model are changed for one another."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.command.naming import adapters_to_talk_to, model_to_talk_to
from pipeline.errors import ArtifactError
from pipeline.settings.strict import CHECKOUT
from stages.lib.generating import side_by_side
from stages.lib.generating.chat import chat
from stages.lib.generating.replies import stop_ids_of, write_reply
from stages.lib.generating.sampling import sample
from stages.lib.models.adapters.opening import open_adapted
from stages.lib.models.loading import load_language_model
from stages.lib.text.tokenizers import load_tokenizer
from tests.integration.tiny_language_model import make_world

pytestmark = pytest.mark.slow

CONFIGS: dict[str, Any] = {
    "one": peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False, target_modules="all-linear"),
    "two": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}
OTHER_TEMPLATE = (
    "{% for m in messages %}{{ '<|user|>' if m.role == 'user' else '<|assistant|>' }}{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, and `one` and `two`, which are adapters of it with random weights."""
    folder = tmp_path_factory.mktemp("home")
    make_world(folder, steps=20)
    torch.manual_seed(0)
    for name, config in CONFIGS.items():
        under = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "model"), config)
        with torch.no_grad():
            for key, weight in under.named_parameters():
                if "prompt" in key:
                    weight.add_(6 * torch.randn_like(weight))
        under.save_pretrained(folder / name)
    return folder


def talk(model: Path, adapters: dict[str, Path], *lines: str) -> list[str]:
    """What was written before the first line, and after each."""
    left, written = list(lines), [""]

    def read_line() -> str | None:
        written.append("")
        return left.pop(0) if left else None

    def write(text: str) -> None:
        written[-1] += text

    chat(model, read_line, write, adapters=adapters, device="cpu", max_new_tokens=8, temperature=0)
    return written[:-1]


def reply(home: Path, name: str | None, *said: str) -> str:
    """What plain peft has the model answer at the end of a conversation."""
    model = AutoModelForCausalLM.from_pretrained(home / "model")
    under = model if name is None else peft.PeftModel.from_pretrained(model, home / name)
    messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 9, said, strict=False)]
    return write_reply(under.eval(), load_tokenizer(home / "model"), messages, max_new_tokens=8).text


def test_each_answers_in_its_turn_and_the_conversation_goes_on(home: Path) -> None:
    adapters = {"one": home / "one", "two": home / "two"}
    lines = ("What is open?", "/adapter two", "And read?", "/reset", "/adapter none", "What is open?", "/adapter one")
    said = talk(home / "model", adapters, *lines, "/reset", "What is open?")
    first = reply(home, "one", "What is open?")
    second = reply(home, "two", "What is open?", first, "And read?")
    alone = reply(home, None, "What is open?")
    assert len({first, second, alone, reply(home, "one", "What is open?", first, "And read?")}) == 4
    assert said[0].startswith("Adapters: one (on), two; /adapter NAME changes that")
    assert said[1:] == [
        f"{first}\n",
        "Adapters: one, two (on).\n",
        f"{second}\n",
        "The conversation is forgotten.\n",
        "Adapters: one, two; none is on.\n",
        f"{alone}\n",
        "Adapters: one (on), two.\n",
        "The conversation is forgotten.\n",
        f"{first}\n",
    ]


def test_all_are_asked_in_one_batch_and_the_conversation_is_as_it_was(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LoRAs of other layers and ranks, and the model: one batch. Others are put on by themselves."""
    more = {
        "low": peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, target_modules=["down_proj"]),
        "whole": peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["v_proj"], modules_to_save=["lm_head"]),
        "dora": peft.LoraConfig(task_type="CAUSAL_LM", r=2, use_dora=True, target_modules="all-linear"),
    }
    adapters = {name: home / name for name in CONFIGS}
    for name, config in more.items():
        under = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(home / "model"), config)
        with torch.no_grad():
            for key, weight in under.named_parameters():
                if weight.requires_grad and "magnitude" not in key:
                    weight.add_(torch.randn_like(weight) / (1 if "lora" in key else 20))
        under.save_pretrained(home / name)
        adapters[name] = home / name
    batches: list[list[str]] = []

    def counted(*arguments: Any, adapter_names: list[str], **options: Any) -> Any:
        batches.append(adapter_names)
        return sample(*arguments, adapter_names=adapter_names, **options)

    monkeypatch.setattr(side_by_side, "sample", counted)
    said = talk(home / "model", adapters, "What is open?", "/all And read?", "And read?", "/all")
    first = reply(home, "one", "What is open?")
    names = [*adapters, None]
    expected = {name: reply(home, name, "What is open?", first, "And read?") for name in names}
    assert len(set(expected.values())) == 6
    assert said[2] == "".join(f"{name or 'none'}: {expected[name]}\n" for name in names)
    assert batches == [["adapter_0", "adapter_1", "__base__"]]
    assert said[3] == f"{expected['one']}\n"
    assert said[4].startswith("Write what they are to answer")


def test_one_whose_template_refuses_does_not_keep_the_others_from_answering(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "one", tmp_path / "strict")
    tokenizer = load_tokenizer(home / "model")
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    tokenizer.save_pretrained(tmp_path / "strict")
    said = talk(home / "model", {"one": home / "one", "strict": tmp_path / "strict"}, "/all What is open?")
    expected = {name: reply(home, name, "What is open?") for name in ("one", None)}
    assert said[1].startswith(f"one: {expected['one']}\nstrict: ") and said[1].endswith(f"\nnone: {expected[None]}\n")
    assert "never" in said[1]
    assert talk(home / "model", {}, "/all Hello")[1].startswith("There are no adapters: begin with")


def test_a_name_that_there_is_not_changes_nothing(home: Path) -> None:
    said = talk(home / "model", {"one": home / "one", "two": home / "two"}, "/adapter tow", "/adapter", "What is open?")
    assert "there is none called tow" in said[1] and "Did you mean 'two'?" in said[1]
    assert said[2] == "Adapters: one (on), two.\n"
    assert said[3] == f"{reply(home, 'one', 'What is open?')}\n"
    assert talk(home / "model", {}, "/adapter one")[1].startswith(
        "There are no adapters: begin with `slipway chat MODEL"
    )


def test_an_adapter_talks_in_its_own_template_and_stops_where_that_does(home: Path, tmp_path: Path) -> None:
    """The base has no template and stops at nothing of the template's; while the adapter is on, the two are those of the merged."""
    base, adapter = tmp_path / "base", tmp_path / "mine"
    shutil.copytree(home / "model", base)
    shutil.copytree(home / "one", adapter)
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = OTHER_TEMPLATE
    tokenizer.save_pretrained(adapter)
    tokenizer.chat_template = None
    (base / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.generation_config.eos_token_id = 7
    model.generation_config.save_pretrained(base)
    adapted = open_adapted(base, {"mine": adapter}, load_language_model)
    ends = adapted.tokenizers["mine"].eos_token_id
    assert stop_ids_of(adapted.use("mine"), adapted.tokenizers["mine"]) == {7, ends}
    assert stop_ids_of(adapted.use(None), adapted.tokenizers[None]) == {7}
    said = talk(base, {"mine": adapter}, "What is open?", "/adapter none")
    assert "The model has no chat template of its own: without an adapter it reads that of mine." in said[0]
    messages = [{"role": "user", "content": "What is open?"}]
    expected = write_reply(adapted.use("mine"), adapted.tokenizers["mine"], messages, max_new_tokens=8).text
    assert said[1] == f"{expected}\n"
    alone = write_reply(adapted.use(None), load_tokenizer(adapter), messages, max_new_tokens=8).text
    # They stop at other tokens, so that each is written by itself.
    assert talk(base, {"mine": adapter}, "/all What is open?")[1] == f"mine: {expected}\nnone: {alone}\n"
    with pytest.raises(ArtifactError, match=r"the tokenizer of adapter one has no chat template"):
        talk(base, {"one": home / "one"})


def slipway(home: Path, *words: str, said: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline", "chat", *words, "--max-new-tokens", "4", "--temperature", "0"]
    # The checkout is where the code is, and the folder of the models where the words are read.
    run = f"import os, runpy, sys; sys.path.insert(0, {str(CHECKOUT)!r}); sys.argv = {command[2:]!r}; runpy.run_module('pipeline')"
    return subprocess.run(
        [sys.executable, "-c", run.replace("runpy.run_module('pipeline')", "runpy.run_module('pipeline', run_name='__main__')")],
        cwd=home, input=said, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_the_command_takes_folders_and_names(home: Path) -> None:
    done = slipway(home, "model", "--adapter", "one", "--adapter", "b=two", said="/adapter b\nHello\n/exit\n")
    assert done.returncode == 0, done.stderr
    assert "Adapters: one (on), b;" in done.stdout and "Adapters: one, b (on)." in done.stdout


def test_a_model_that_plan_would_refuse_is_not_talked_to(home: Path, tmp_path: Path) -> None:
    """An adapter beside it would be put on it; weights that cannot be read are named."""
    shutil.copytree(home / "model", tmp_path / "beside")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(home / "one" / name, tmp_path / "beside" / name)
    shutil.copytree(home / "model", tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    shutil.copytree(home / "model", tmp_path / "bin")
    (tmp_path / "bin" / "model.safetensors").rename(tmp_path / "bin" / "pytorch_model.bin")
    for name, what in (("beside", "an adapter beside it"), ("cut", "is damaged"), ("bin", "may run code")):
        with pytest.raises(ArtifactError, match=what):
            model_to_talk_to(str(tmp_path / name), None)


@pytest.mark.parametrize(
    ("model", "adapters", "what"),
    [
        ("one", [], "one: is an adapter, and no model. Name the model that it was trained on: `slipway chat"),
        ("model", ["model"], "--adapter model: model holds no adapter: there is no adapter_config.json"),
        ("model", ["one", "./one"], "two adapters are called 'one'. Give it a name of its own: `--adapter NAME=./one`"),
        ("model", ["none=one"], "--adapter none=one: 'none' stands for no adapter"),
        ("model", ["three"], "three: no artifact or step of this name"),
    ],
)
def test_what_cannot_be_talked_to(
    home: Path, monkeypatch: pytest.MonkeyPatch, model: str, adapters: list[str], what: str
) -> None:
    monkeypatch.chdir(home)
    with pytest.raises(ArtifactError) as refused:
        model_to_talk_to(model, None), adapters_to_talk_to(adapters, None)
    assert what in str(refused.value)
    assert list(adapters_to_talk_to(["one", "b=one"], None)[0]) == ["one", "b"]
