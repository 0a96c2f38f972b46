"""Writes the card of a model, and of adapter and critic beside it, once its metrics and its lineage are known.

A card is a function of what was made and of what it was made from: it names no place on a machine and no time, so that the
same recipe makes the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.cards.lineage import Lineage, Link, lineage_of
from pipeline.cards.metadata import CARD, PIPELINE_TAGS, front_matter, metadata_of, origin_of
from pipeline.cards.params import shown_params
from pipeline.cards.usage import adapter_usage, critic_usage, usage
from pipeline.errors import PathError
from pipeline.figures import number
from pipeline.settings.paths import holds_file, read_json
from pipeline.stage import Result, Stage
from pipeline.store.artifact import REWARD_READING, Kind
from pipeline.store.durable import write_text
from pipeline.store.job import Job

WHAT = {
    Kind.CAUSAL_LM: "A language model",
    Kind.QUANTIZED_LM: "A quantized language model",
    Kind.ENCODER: "An encoder, which fills in what is masked",
    Kind.REWARD_MODEL: "A reward model, which gives a conversation one score: the higher, the better its last answer",
    Kind.PROCESS_REWARD_MODEL: "A process reward model, which says of each step of an answer how probably it is right",
    Kind.CLASSIFIER: "A classifier of texts",
    Kind.EXTRACTOR: "An extractor of spans",
    Kind.READER: "A reader, which finds the answer of a question in a text",
}


LEARNED_FROM_CHATS = frozenset(
    {Kind.CHATS, Kind.PREFERENCES, Kind.UNPAIRED_PREFERENCES, Kind.RATINGS, Kind.STEP_LABELS, Kind.PROMPTS}
)
"""Data of which a causal model learns to answer."""


CHATTING = (Kind.CAUSAL_LM, Kind.QUANTIZED_LM, Kind.REWARD_MODEL, Kind.PROCESS_REWARD_MODEL)
"""Kinds of models that read chats."""


MOST_LABELS = 50


def write_cards(job: Job, places: Mapping[str, Path], out: Path, result: Result, stages: Mapping[str, Stage]) -> None:
    """Writes README.md into `out`, where it holds a model, and into the folders in it that hold an adapter or a critic.

    `places` are the folders of the inputs, `stages` are all there are: what a param is by default need not be said.
    """
    if job.output_kind is not Kind.ADAPTER and job.output_kind not in PIPELINE_TAGS:
        return
    lineage = lineage_of(job, places, out, result)
    alone = job.output_kind is Kind.ADAPTER
    write_text(out / CARD, adapter_card(lineage, out, stages) if alone else model_card(lineage, stages))
    for folder in sorted(path for path in out.iterdir() if path.is_dir()):
        if holds_file(folder, "adapter_config.json"):
            write_text(folder / CARD, adapter_card(lineage, folder, stages))
        elif holds_file(folder, "config.json"):
            write_text(folder / CARD, critic_card(lineage, stages))


def model_card(lineage: Lineage, stages: Mapping[str, Stage]) -> str:
    own = lineage.own
    assert own.kind is not None and own.folder is not None
    base = lineage.base()
    origin = f"made from {base.name}" if base else "made from nothing but data"
    return join(
        front_matter(metadata_of(lineage)),
        f"# {title(own)}",
        f"{WHAT[own.kind]}, {origin} by the stage `{own.stage}` of Slipway.",
        facts_lines(own),
        "## How to use it",
        f"```python\n{usage(own.kind, chats=chats(lineage), several_outputs=has_several_outputs(own))}```",
        chat_lines(own.folder) if own.kind in CHATTING else "",
        *how_it_was_made(lineage, stages),
    )


def adapter_card(lineage: Lineage, folder: Path, stages: Mapping[str, Stage]) -> str:
    """Of an adapter alone, of the policy or (in an artifact's `value/`) of its critic."""
    own = lineage.own
    critic = holds_file(folder, "value_head.safetensors")
    base = lineage.base()
    name, code = "the model that it was trained on", '"path/to/the/base"'
    if base is not None:
        name = base.name
        repository = base.repository
        code = f'"{repository[0]}", revision="{repository[1]}"' if repository else f'"path/to/the/base"  # {name}'
    if labels := num_labels(own):
        called, _, comment = code.partition("  # ")
        code = f"{called}, num_labels={labels}" + (f"  # {comment}" if comment else "")
    method, own_weights = method_of(folder)
    what = "The critic: an adapter and a linear head, which give each token a value" if critic else "An adapter"
    metadata = {
        "library_name": "transformers" if own_weights else "peft",
        "pipeline_tag": None if critic else PIPELINE_TAGS.get(own.kind or Kind.ADAPTER, "text-generation"),
        **origin_of(lineage, "adapter"),
        "tags": ["slipway", str(own.stage), method, *(["value-model"] if critic else [])],
    }
    beside = (
        ""
        if critic or own.kind is Kind.ADAPTER
        else " The folder above this one holds the whole model, with the adapter merged into it."
    )
    return join(
        front_matter(metadata),
        f"# {'Critic' if critic else 'Adapter'} of {title(own)}",
        f"{what}, made on {name} by the stage `{own.stage}` of Slipway.{beside}",
        "## How to use it",
        f"```python\n{adapter_usage(on_own_line(code), own.kind, critic=critic, own=method if own_weights else None)}```",
        *how_it_was_made(lineage, stages),
    )


def method_of(folder: Path) -> tuple[str, bool]:
    """The method of the adapter in a folder, and whether it is weights of the model itself, which peft does not read."""
    config = read_json(folder / "adapter_config.json")
    own = config.get("slipway_method")
    return str(own or config.get("peft_type", "lora")).lower(), own is not None


def num_labels(own: Link) -> int | None:
    """How many outputs the new head of a model has that is no reader; None without one."""
    if (
        own.kind not in (Kind.REWARD_MODEL, Kind.PROCESS_REWARD_MODEL, Kind.CLASSIFIER, Kind.EXTRACTOR)
        or own.folder is None
    ):
        return None
    labels = read_json(own.folder / "config.json").get("id2label")
    return len(labels) if isinstance(labels, dict) else None


def has_several_outputs(own: Link) -> bool:
    """Whether a reward model has more than one output, which its config then says how to read."""
    if own.kind is not Kind.REWARD_MODEL or own.folder is None or not holds_file(own.folder, "config.json"):
        return False
    return REWARD_READING in read_json(own.folder / "config.json")


def on_own_line(code: str) -> str:
    """An argument as it stands in a call: with a comment behind it, on a line of its own."""
    return f"\n    {code}\n" if "#" in code else code


def critic_card(lineage: Lineage, stages: Mapping[str, Stage]) -> str:
    own = lineage.own
    origin = origin_of(lineage, "finetune")
    # What it began with may be a reward model or another critic: only the licence is the policy's own.
    metadata = {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        **{name: value for name, value in origin.items() if not name.startswith("base_model")},
        "tags": ["slipway", str(own.stage), "value-model"],
    }
    return join(
        front_matter(metadata),
        f"# Critic of {title(own)}",
        f"The critic of the model in the folder above this one, made with it by the stage `{own.stage}` of Slipway: it gives"
        " each token a value, which is the reward that it expects of the whole completion.",
        "## How to use it",
        f"```python\n{critic_usage()}```",
        data_lines(lineage),
        step_lines(lineage, stages),
    )


def join(*parts: str) -> str:
    """The parts with an empty line between them, without the empty ones."""
    return "\n\n".join(part.strip("\n") for part in parts if part.strip()) + "\n"


def title(own: Link) -> str:
    return f"{own.stage} {own.id[:12]}"


def facts_lines(own: Link) -> str:
    facts = own.facts
    said = [
        f"Parameters: {facts.parameters:,}" if facts.parameters else "",
        f"Number format: {facts.dtype}" if facts.dtype else "",
        f"Tokens in training: at most {facts.max_length_tokens:,}" if facts.max_length_tokens else "",
        f"Vocabulary: {facts.vocabulary_size:,} tokens" if facts.vocabulary_size else "",
        f"Labels: {labels_of(facts.labels)}" if facts.labels else "",
    ]
    return "\n".join(f"- {line}" for line in said if line)


def labels_of(labels: Sequence[str]) -> str:
    more = f" and {len(labels) - MOST_LABELS} more" if len(labels) > MOST_LABELS else ""
    return ", ".join(f"`{' '.join(label.split()).replace('`', chr(39))}`" for label in labels[:MOST_LABELS]) + more


def chats(lineage: Lineage) -> bool:
    """Whether a model answers chats: it has a template, and it, or a model that it goes back to, has learned from them.

    Of a model from outside nothing is known but its template.
    """
    *steps, last = lineage.base_chain()
    folder = lineage.own.folder
    has_template = folder is not None and template_file(folder) is not None
    of_data = {lineage.links[each].kind for step in (*steps, last) for each in step.inputs.values()}
    return has_template and (last.stage is None or bool(of_data & LEARNED_FROM_CHATS))


def template_file(folder: Path) -> str | None:
    """The file in which the chat template stands."""
    if holds_file(folder, "chat_template.jinja"):
        return "chat_template.jinja"
    return "tokenizer_config.json" if json_in(folder / "tokenizer_config.json").get("chat_template") else None


def json_in(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except PathError:
        return {}


def chat_lines(folder: Path) -> str:
    """How chats become tokens, and where generation stops."""
    stops = json_in(folder / "generation_config.json").get("eos_token_id")
    ids = stops if isinstance(stops, list) else [] if stops is None else [stops]
    added = json_in(folder / "tokenizer.json").get("added_tokens") or []
    names = {token.get("id"): token.get("content") for token in added if isinstance(token, dict)}
    said = ", ".join(f"`{names[each]}` ({each})" if each in names else str(each) for each in ids)
    template = template_file(folder)
    sentences = [
        f"Chats are written by the template in `{template}`, as they were in training." if template else "",
        f"Generation stops at {said}, which generation_config.json says." if ids else "",
    ]
    return join("## Chat template and stop ids", " ".join(filter(None, sentences))) if any(sentences) else ""


def how_it_was_made(lineage: Lineage, stages: Mapping[str, Stage]) -> list[str]:
    """The sections that cards of all kinds end with: metrics, data, steps."""
    return [metric_lines(lineage.own), data_lines(lineage), step_lines(lineage, stages)]


def metric_lines(own: Link) -> str:
    """Held-out metrics, with what they must be compared with beside them."""
    found = {name: value for name, value in own.metrics.items() if name.startswith("heldout_")}
    if not found:
        return ""
    rows = "\n".join(f"| {name.removeprefix('heldout_')} | {number(value)} |" for name, value in found.items())
    said = "Of rows that were held out. Names with `_base`, `_untrained`, `_random`, `_majority` and the like are baselines."
    return join("## Held-out metrics", said, f"| metric | value |\n|---|---|\n{rows}")


def data_lines(lineage: Lineage) -> str:
    """The data sets among what it was made from, with their rows."""
    rows = []
    for link in lineage.links.values():
        facts = link.facts
        if link is lineage.own or link.kind is None or link.kind in PIPELINE_TAGS:
            continue
        counts = [
            f"{number(link.metrics['rows_kept'])} of {number(link.metrics['rows_read'])} rows kept"
            if {"rows_kept", "rows_read"} <= link.metrics.keys()
            else "",
            f"{facts.train_rows:,} rows to train on" if facts.train_rows is not None else "",
            f"{facts.heldout_rows:,} held out" if facts.heldout_rows is not None else "",
            f"{facts.train_tokens:,} tokens to train on" if facts.train_tokens is not None else "",
        ]
        rows.append(f"| {link.name} | {link.kind} | {', '.join(filter(None, counts))} |")
    if not rows:
        return ""
    return join("## Data", "| artifact | holds | size |\n|---|---|---|\n" + "\n".join(rows))


def step_lines(lineage: Lineage, stages: Mapping[str, Stage]) -> str:
    """Every step on the way, in order: what it read, and its params that are not the stage's own."""
    lines = []
    for link in lineage.links.values():
        sources = [f"{role}: {lineage.links[each].name}" for role, each in sorted(link.inputs.items())]
        made_of = f" from {'; '.join(sources)}" if sources else ""
        lines.append(f"- **{link.name}**{made_of}")
        stage = stages.get(link.stage or "")
        shown = shown_params(link.params, stage.params if stage else None, link.source_digests)
        lines += [f"    - `{each}`" for each in shown]
    said = "Every artifact on the way, with the params that the recipe sets otherwise than the stage does."
    return join("## Steps", said, "\n".join(lines))
