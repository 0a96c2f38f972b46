"""Small artifacts from the sources of Python's standard library, and runs of stages on them in one or two processes."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]
DRIVER = Path(__file__).with_name("training_driver.py")
FORKED_DRIVER = Path(__file__).with_name("forked_driver.py")
SEQUENCE_LENGTH = 32
VOCABULARY_SIZE = 384
MODULES = ("argparse", "ast", "calendar", "configparser", "heapq", "shutil", "textwrap", "zipfile")


def docstrings() -> list[tuple[str, str]]:
    """(name, docstring) of the documented functions and classes of some modules, in the order of their sources."""
    found = []
    for module in MODULES:
        tree = ast.parse(Path(os.__file__).with_name(f"{module}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and (text := ast.get_docstring(node)):
                found.append((f"{module}.{node.name}", text))
    return found


def make_tokenizer() -> Any:
    """A byte-level BPE tokenizer with the chat template of the house and a mask token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from stages.lib.text.chat_presets import PRESETS

    preset = PRESETS["slipway"]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        [text for _, text in docstrings()],
        trainers.BpeTrainer(
            vocab_size=VOCABULARY_SIZE,
            special_tokens=["<s>", "</s>", "<pad>", "<mask>", *preset.special_tokens],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", mask_token="<mask>"
    )
    tokenizer.chat_template = preset.template
    return tokenizer


def write_tokens(folder: Path, tokenizer: Any, num_documents: int = 60, num_heldout: int = 12) -> Path:
    """Packed tokens of short documents, so that most blocks hold several."""
    from stages.lib.text.packed import INFO, TokensInfo, TokensWriter, dtype_for
    from stages.lib.text.tokenizers import tokenizer_digest

    folder.mkdir(parents=True)
    tokenizer.save_pretrained(folder / "tokenizer")
    texts = [text[:60] for _, text in docstrings()]
    counts = {}
    for split, part in (("train", texts[num_heldout:][:num_documents]), ("heldout", texts[:num_heldout])):
        with TokensWriter(folder, split, len(tokenizer)) as writer:
            for text in part:
                writer.add([tokenizer.bos_token_id, *tokenizer.encode(text), tokenizer.eos_token_id])
        counts[split] = writer
    info = TokensInfo(
        dtype=dtype_for(len(tokenizer)),
        sequence_length=SEQUENCE_LENGTH,
        vocabulary_size=len(tokenizer),
        tokenizer_digest=tokenizer_digest(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        train_tokens=counts["train"].tokens,
        heldout_tokens=counts["heldout"].tokens,
        train_documents=counts["train"].documents,
        heldout_documents=counts["heldout"].documents,
    )
    (folder / INFO).write_text(info.model_dump_json())
    return folder


def write_chats(folder: Path, num_chats: int = 50, num_heldout: int = 8) -> Path:
    """Chats of one and two turns about what functions do."""
    folder.mkdir(parents=True)
    chats = []
    for index, (name, text) in enumerate(docstrings()[: num_chats + num_heldout]):
        words = text.split()
        messages = [
            {"role": "user", "content": f"{name}?"},
            {"role": "assistant", "content": " ".join(words[: 3 + index % 5])},
        ]
        if index % 3 == 0:
            messages += [{"role": "user", "content": "More."}, {"role": "assistant", "content": " ".join(words[3:7])}]
        chats.append(json.dumps({"messages": messages}))
    (folder / "heldout.jsonl").write_text("\n".join(chats[:num_heldout]) + "\n", encoding="utf-8")
    (folder / "train.jsonl").write_text("\n".join(chats[num_heldout:]) + "\n", encoding="utf-8")
    return folder


LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
GPT2_WITH_DROPOUT = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}


def write_model(folder: Path, tokenizer: Any, **fields: Any) -> Path:
    """A model with random weights, like one that another stage made."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(**{**LLAMA, **fields}, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@dataclass
class Job:
    """One run of a stage, in a folder of its own."""

    work: Path
    kind: str
    params: Mapping[str, Any]
    inputs: Mapping[str, Path]
    resources: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 7
    die: Mapping[str, Any] | None = None
    """{"step": n, "during": "step" or "checkpoint"}: the last process kills itself there. On-policy: interruptions.py."""
    may_fail: bool = False
    """Whether the next job is run also when this one ends with a mistake of the user's."""
    stop: Mapping[str, Any] | None = None
    """{"step": n} or {"heldout_at_step": n}: the last process is asked to stop there. On-policy: interruptions.py."""
    extends: str | None = None
    """The checkpoint of another job that it makes longer."""
    processes: int = 1
    """How many it has where it has processes of its own: `run_forked`."""

    def as_json(self) -> dict[str, Any]:
        inputs = {role: str(path) for role, path in self.inputs.items()}
        return {**vars(self), "work": str(self.work), "inputs": inputs, "params": dict(self.params)}

    def events(self, event: str) -> list[dict[str, Any]]:
        lines = (self.work / "journal.jsonl").read_text().splitlines()
        return [line for line in map(json.loads, lines) if line["event"] == event]

    def losses(self) -> list[float]:
        return [line["loss"] for line in self.events("step")]

    def weights(self) -> bytes:
        return (self.work / "out" / "model.safetensors").read_bytes()

    def result(self) -> dict[str, Any]:
        return dict(json.loads((self.work / "result.json").read_bytes()))


def run_jobs(folder: Path, jobs: Sequence[Job], processes: int, *, expected: int = 0) -> str:
    """Runs the jobs one after the other in the same processes; returns what they printed."""
    command = [sys.executable, str(DRIVER), write_jobs(folder, jobs)]
    if processes > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        command = [*torchrun, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", *command[1:]]
    return run_command(command, expected=expected)


def run_forked(folder: Path, jobs: Sequence[Job], *, timeout_seconds: float = 600) -> str:
    """Runs the jobs one after the other, each in as many fresh processes as it asks for; returns what they printed."""
    return run_command([sys.executable, str(FORKED_DRIVER), write_jobs(folder, jobs)], timeout_seconds=timeout_seconds)


def write_jobs(folder: Path, jobs: Sequence[Job]) -> str:
    """The path of a new file that lists the jobs."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = folder / f"jobs-{len(list(folder.glob('jobs-*')))}.json"
    listed.write_text(json.dumps([job.as_json() for job in jobs]))
    return str(listed)


def run_command(command: Sequence[str], *, expected: int = 0, timeout_seconds: float = 600) -> str:
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
        "PYTHONPATH": str(CHECKOUT),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=timeout_seconds, check=False
    )
    output = done.stdout + done.stderr
    assert (done.returncode == 0) == (expected == 0), f"exit code {done.returncode}\n{output[-6000:]}"
    return output
