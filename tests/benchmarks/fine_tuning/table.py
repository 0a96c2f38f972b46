"""Fine-tunes one base in eight ways on real data, and prints what each costs and what comes of it.

    python -m tests.benchmarks.fine_tuning.table --data DATA [--steps 120] [--seeds 3] [--tasks extraction ...] [--processes 2]

wants `pip install -c constraints.txt -e '.[benchmarks]'`. DATA is a folder with the files that `TASKS` names. A base is
trained once, by `slipway run`, on Chinese and English text; then every method trains on every task with every seed, in a
process of its own. Columns: parameters that are trained and their share, peak memory of the training (all that is resident,
less what was loaded before), examples per second, and on held-out rows BLEU-4 and ROUGE (overlap.py) and, of the extraction,
F1 over mentions and over places of entities that the model names in its own dialogue (dialogues.py). Of seeds the mean and
the deviation. A line per training is kept in `--results`, so that a table can be continued.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from pipeline.store.artifact import read_manifest
from stages.lib.rows.canonical import Row, read_rows, write_rows
from tests.benchmarks.adapter_memory import CHECKOUT, Peak, environment, resident_bytes
from tests.benchmarks.fine_tuning.dialogues import Entity, ask, dialogues, entities_of, f1, mentions_of
from tests.benchmarks.fine_tuning.overlap import NAMES, overlap

METHODS: dict[str, tuple[float, dict[str, Any] | None]] = {
    "full": (5e-4, None),
    "lora": (3e-3, {"method": "lora", "rank": 8, "alpha": 32, "dropout": 0.1}),
    "prefix, projected": (3e-3, {"method": "prefix_tuning", "num_virtual_tokens": 32, "projection": True}),
    "prefix": (3e-2, {"method": "prefix_tuning", "num_virtual_tokens": 32}),
    "freeze, last layer": (1e-3, {"method": "freeze", "last_layers": 1}),
    "freeze, last mlps": (1e-3, {"method": "freeze", "last_layers": 3, "modules": ["mlp"]}),
    "prompt tuning": (3e-2, {"method": "prompt_tuning", "num_virtual_tokens": 32}),
    "bitfit": (1e-2, {"method": "bitfit"}),
}
"""Name -> learning rate, and block `adapter`."""
TASKS = {
    "english": "chat/instruction_1100.json",
    "chinese": "chat/oasst_zh_history.json",
    "extraction": "encoder/weibo_ner_train.conll",
}
TEXTS = ("text/d2l_zh.jsonl.gz", "text/tldr_pages.jsonl.gz")
HELDOUT_REPLIES = 40
MAX_LENGTH_TOKENS = 320
MOST_NEW_TOKENS = 48
CONTEXT_TOKENS = 512


def recipe(data: Path, steps: int) -> dict[str, Any]:
    """The recipe of the base, and of the rows of each task as Slipway reads them."""

    def source(name: str, layout: str, **options: Any) -> dict[str, Any]:
        return {"kind": "files", "paths": [str(data / name)], "layout": layout, **options}

    bio = {"token_separator": "", "strip_segment_digit": True}
    stages: dict[str, Any] = {}
    for name, path in (("zh", TEXTS[0]), ("en", TEXTS[1])):
        stages[f"{name}_rows"] = {"kind": "clean", "params": {"format": "text", "source": source(path, "text")}}
    stages["text"] = {"kind": "mix", "inputs": {"sources": {"zh": "zh_rows", "en": "en_rows"}}}
    stages["tokenizer"] = {"kind": "tokenizer", "inputs": {"text": "text"}, "params": {"vocabulary_size": 6000}}
    stages["tokens"] = {
        "kind": "pack",
        "inputs": {"text": "text", "tokenizer": "tokenizer"},
        "params": {"sequence_length": 256},
    }
    stages["base"] = {
        "kind": "pretrain",
        "inputs": {"tokens": "tokens"},
        "params": {
            "objective": "causal",
            # With biases, which bitfit trains.
            "architecture": {
                "model_type": "llama",
                "attention_bias": True,
                "hidden_size": 160,
                "intermediate_size": 448,
                "num_hidden_layers": 4,
                "num_attention_heads": 5,
                "num_key_value_heads": 5,
                "max_position_embeddings": CONTEXT_TOKENS,
                "tie_word_embeddings": True,
            },
            "global_batch_size": 16,
            "max_steps": steps,
            "learning_rate": 2e-3,
            "warmup_steps": 20,
        },
    }
    for name, layout in (("english", "alpaca"), ("chinese", "alpaca")):
        stages[f"{name}_rows"] = {"kind": "clean", "params": {"format": "chats", "source": source(TASKS[name], layout)}}
        stages[name] = {"kind": "mix", "inputs": {"sources": {name: f"{name}_rows"}}}
    for split in ("train", "test"):
        stages[f"spans_{split}"] = {
            "kind": "clean",
            "params": {
                "format": "spans",
                "source": source(TASKS["extraction"].replace("train", split), "bio", **bio),
            },
        }
    resources = {"device": "cpu", "processes": 2, "launcher": "torchrun", "log_every_steps": 50}
    outputs = ["base", "english", "chinese", "spans_train", "spans_test"]
    return {"name": "fine_tuning", "seed": 1, "outputs": outputs, "resources": resources, "stages": stages}


def prepare(folder: Path, data: Path, steps: int) -> dict[str, Path]:
    """Step -> folder of its artifact. What was made before is not made again."""
    path, store = folder / "recipe.yaml", folder / "store"
    path.write_text(yaml.safe_dump(recipe(data, steps), sort_keys=False))
    command = [sys.executable, "-m", "pipeline", "run", str(path), "--store", str(store)]
    if subprocess.run(command, cwd=CHECKOUT, env={**os.environ, "DS_ACCELERATOR": "cpu"}).returncode:
        sys.exit("the base could not be made")
    made = {read_manifest(each).step: each for each in (store / "artifacts").iterdir()}
    made["extraction"] = folder / "extraction"
    if not made["extraction"].exists():
        write_dialogues(made, made["extraction"])
    return made


def write_dialogues(made: Mapping[str, Path], folder: Path) -> None:
    """The extraction as chats, train and held out."""
    folder.mkdir()
    for split, name in (("train", "train"), ("test", "heldout")):
        rows = [{"messages": chat} for row in span_rows(made[f"spans_{split}"]) for chat in dialogues(row)]
        write_rows(folder / f"{name}.jsonl", rows)


def span_rows(folder: Path) -> list[Row]:
    return [row for path in sorted(folder.glob("*.jsonl")) if path.name != "dropped.jsonl" for row in read_rows(path)]


# One training, in a process of its own


def train_one(made: Mapping[str, str], task: str, name: str, seed: int, steps: int, folder: Path) -> dict[str, Any]:
    """What the training costs, and what its model says on held-out rows."""
    import stages.lib.training.loop  # noqa: F401 - loaded here, so that it belongs to what was there before
    from stages import STAGES
    from tests.integration.preference_world import run

    rate, adapter = METHODS[name]
    params: dict[str, Any] = {
        "global_batch_size": 16,
        "max_steps": steps,
        "learning_rate": rate,
        "warmup_steps": steps // 10,
        "max_length_tokens": MAX_LENGTH_TOKENS,
        "max_dropped_fraction": 0.9,
    }
    if adapter:
        params["adapter"] = {**adapter, "publish": "adapter"}
    inputs = {"model": Path(made["base"]), "chats": Path(made[task])}
    sft = STAGES["sft"]
    before = resident_bytes()
    peak = Peak()
    peak.start()
    result, context = run(
        sft, inputs, params, folder, resources={"micro_batch_size": 4, "save_every_steps": 10**9}, seed=seed
    )
    peak.ended = True
    peak.join()
    events = list(context.journal.events("step"))
    seconds = events[-1]["time"] - events[0]["time"]
    found = {
        "task": task,
        "method": name,
        "seed": seed,
        "peak_bytes": peak.bytes - before,
        "examples_per_second": 16 * (len(events) - 1) / seconds,
        "heldout_loss": result.metrics["heldout_loss"],
        "heldout_loss_base": result.metrics["heldout_loss_base"],
        "dropped_rows": sum((result.facts.dropped_rows or {}).values()),
        **trained_parameters(context.journal.events("note"), result.facts.parameters),
    }
    return {**found, **said_by(Path(made["base"]), context.out, adapter is not None, made, task)}


def trained_parameters(notes: Iterable[Mapping[str, Any]], parameters: int) -> dict[str, float]:
    """What the journal says of an adapter; all parameters where it says nothing."""
    for note in notes:
        words = str(note.get("text", "")).split()
        if "trains" in words and "parameters" in words:
            trained, whole = (int(words[words.index(after) + 1].replace(",", "")) for after in ("trains", "of"))
            return {"trained": trained, "share": trained / whole}
    return {"trained": parameters, "share": 1.0}


def said_by(base: Path, out: Path, adapted: bool, made: Mapping[str, str], task: str) -> dict[str, float]:
    """BLEU and ROUGE of replies to held-out chats, whose earlier turns are given; F1 of the model's own dialogues."""
    from stages.lib.generating.replies import write_replies
    from stages.lib.models.adapters.opening import open_adapted
    from stages.lib.models.loading import load_language_model
    from stages.lib.text.chat_fitting import split_last_answer
    from stages.lib.text.chat_spans import encode_prompt
    from stages.lib.text.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(out)
    if adapted:
        model = open_adapted(base, {"own": out}, lambda folder: load_language_model(folder, "cpu")).use("own")
    else:
        model = load_language_model(out, "cpu")

    def answer(chats: Sequence[Any]) -> list[str]:
        # A prompt that leaves no room is answered with nothing, which counts as such.
        fits = [n for n, chat in enumerate(chats) if len(encode_prompt(tokenizer, chat)) <= MAX_LENGTH_TOKENS]
        replies = write_replies(
            model, tokenizer, [chats[n] for n in fits], positions=fits, max_new_tokens=MOST_NEW_TOKENS,
            temperature=0.0, top_p=1.0, seed=0, batch_size=20,
        )  # fmt: skip
        texts = dict(zip(fits, (reply.text for reply in replies), strict=True))
        return [texts.get(n, "") for n in range(len(chats))]

    rows = [split_last_answer(row["messages"]) for row in read_rows(Path(made[task]) / "heldout.jsonl")]
    rows = rows[:: max(1, len(rows) // HELDOUT_REPLIES)][:HELDOUT_REPLIES]
    found = overlap(answer([prompt for prompt, _ in rows]), [reference for _, reference in rows])
    if task == "extraction":
        spans = span_rows(Path(made["spans_test"]))[:HELDOUT_REPLIES]
        texts = [row["text"] for row in spans]
        expected: list[set[Entity]] = [entities_of(row) for row in spans]
        said = ask(texts, answer)
        mentions = [mentions_of(text, right) for text, right in zip(texts, expected, strict=True)]
        found["mention_f1"] = 100 * f1([each.mentions for each in said], mentions)
        found["entity_f1"] = 100 * f1([each.entities for each in said], expected)
    return found


# The table

COLUMNS = {
    "trained": ("trained", "{:,.0f}", 1),
    "share": ("share", "{:.2%}", 1),
    "peak_bytes": ("peak MiB", "{:,.0f}", 2**20),
    "examples_per_second": ("examples/s", "{:.0f}", 1),
    "heldout_loss": ("loss", "{:.3f}", 1),
    **{name: (name.replace("_", "-").upper(), "{:.2f}", 1) for name in NAMES},
    "mention_f1": ("mention F1", "{:.2f}", 1),
    "entity_f1": ("entity F1", "{:.2f}", 1),
}
WITH_DEVIATION = ("heldout_loss", *NAMES, "mention_f1", "entity_f1")


def table(results: Sequence[Mapping[str, Any]], task: str) -> Iterable[str]:
    """The lines of a Markdown table: a row per method, with the mean over its seeds."""
    of_task = [each for each in results if each["task"] == task]
    names = [name for name in COLUMNS if all(name in each for each in of_task)]
    yield f"| {task} | seeds | " + " | ".join(COLUMNS[name][0] for name in names) + " |"
    yield "|" + "---|" * (len(names) + 2)
    for method in METHODS:
        own = [each for each in of_task if each["method"] == method]
        if own:
            cells = [cell(name, [float(each[name]) for each in own]) for name in names]
            yield f"| {method} | {len(own)} | " + " | ".join(cells) + " |"


def cell(name: str, values: Sequence[float]) -> str:
    _, form, divisor = COLUMNS[name]
    text = form.format(statistics.mean(values) / divisor)
    if name in WITH_DEVIATION and len(values) > 1:
        text += " ± " + form.format(statistics.stdev(values) / divisor)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path, help="where the base is kept; a temporary folder where it is not named")
    parser.add_argument("--results", type=Path, help="a file of one line per training, which is continued")
    parser.add_argument("--base-steps", type=int, default=300)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        asked = json.loads(options.one)
        print(json.dumps(train_one(**{**asked, "folder": Path(asked["folder"])}), allow_nan=False))
        return
    if not options.data:
        parser.error("--data is needed: the folder with " + ", ".join(TASKS.values()))

    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        work = options.work or Path(name)
        work.mkdir(parents=True, exist_ok=True)
        made = {step: str(path) for step, path in prepare(work, options.data.absolute(), options.base_steps).items()}
        kept = options.results or work / "results.jsonl"
        results = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
        known = {(each["task"], each["method"], each["seed"]) for each in results}
        wanted = [
            {"made": made, "task": task, "name": method, "seed": seed, "steps": options.steps}
            for task in options.tasks
            for method in METHODS
            for seed in range(options.seeds)
            if (task, method, seed) not in known
        ]

        def one(asked: dict[str, Any]) -> dict[str, Any]:
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, "-m", "tests.benchmarks.fine_tuning.table", "--one"]
                text = json.dumps({**asked, "folder": folder})
                done = subprocess.run(
                    [*command, text], cwd=CHECKOUT, env=environment(), capture_output=True, text=True, check=False
                )
            if done.returncode:
                sys.exit(f"{asked['task']}, {asked['name']}: {done.stdout[-1000:]}{done.stderr[-4000:]}")
            found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
            return found

        with ThreadPoolExecutor(options.processes) as pool:
            for found in pool.map(one, wanted):
                results.append(found)
                with kept.open("a") as file:
                    file.write(json.dumps(found, allow_nan=False) + "\n")
                print(f"{found['task']}, {found['method']}, seed {found['seed']}", file=sys.stderr, flush=True)
    for task in options.tasks:
        print("\n" + "\n".join(table(results, task)))
    print(f"\n{len(results)} trainings of {options.steps} steps, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
