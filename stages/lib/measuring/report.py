"""The report of an evaluation in Markdown, from what its report.json, generations.jsonl and scored_replies.jsonl hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

DESCRIPTION = ("stage", "parameters", "bytes", "dtype", "vocabulary")


LABELS = {
    "heldout_perplexity": "perplexity of the text",
    "heldout_bits_per_byte": "bits per byte of the text",
    "heldout_assistant_loss": "nats per assistant token",
    "heldout_assistant_bits_per_byte": "bits per byte of what the assistant says",
    "heldout_preference_accuracy": "preference accuracy, by log-probability",
    "heldout_preference_accuracy_per_token": "preference accuracy, by its mean per token",
    "heldout_preference_margin_per_token": "chosen over rejected, nats per token",
    "truncated_replies": "share of replies cut off at the limit",
    "heldout_reward_accuracy": "preference accuracy, by score",
    "heldout_reward_margin": "chosen over rejected, score",
}
"""Name of a measure -> what it is called in a table, in the order of the lines."""


REWARD_LABELS = {
    "heldout_reward": "mean reward",
    "heldout_reward_deviation": "deviation",
    "heldout_reward_win_rate": "win rate",
    "heldout_reply_tokens": "tokens",
    "heldout_truncated_replies": "cut off",
}
"""Name of a measure of scored replies -> the column of the table that has a line per model."""


HELD_OUT = "(held out)"
"""Stands in that table for whoever wrote the replies that were held out."""


SHOWN_PROMPTS = 3
"""Of so many prompts the scored replies are shown; scored_replies.jsonl has all."""


ABSENT = "-"
"""Stands where a column has no such number."""


def report_markdown(
    report: Mapping[str, Any],
    generations: Sequence[Mapping[str, Any]],
    scored_replies: Sequence[Mapping[str, Any]] = (),
) -> str:
    """What the models are, what was measured, and what they reply."""
    parts = ["# Evaluation\n"]
    for title, group in (("Models", report["models"]), ("Reward models", report["reward_models"])):
        if group:
            parts.append(f"\n## {title}\n\n{models_table(group)}")
    text, chats, pairs = (report["rows"][name] for name in ("text", "chats", "pairs"))
    parts.append("\n## Held-out rows\n\n")
    if text["blocks"]:
        parts.append(f"- text: {text['blocks']:,} blocks, {text['bytes']:,} bytes\n")
    if chats["used"]:
        parts.append(f"- chats: {chats['used']:,}\n")
    if pairs["used"]:
        longer = report["baselines"]["heldout_preference_accuracy_longer"]
        parts.append(
            f"- pairs: {pairs['used']:,}; guessing is right in half of them, the longer answer in {longer:.1%}\n"
        )
    parts += [f"- {note}\n" for note in report["notes"]]
    if scored_replies:
        parts.append(scored_replies_part(report, scored_replies))
    for number, generation in enumerate(generations, start=1):
        parts.append(f"\n## Prompt {number}\n")
        parts.append(conversation(generation["prompt"]))
        if generation["reference"] is not None:
            parts.append(f"\n### held out\n\n{quoted(generation['reference'])}")
        for name, reply in generation["replies"].items():
            cut = " (cut off)" if reply["truncated"] else ""
            parts.append(f"\n### {name}{cut}\n\n{quoted(reply['text'])}")
    return "".join(parts)


def conversation(messages: Sequence[Mapping[str, str]]) -> str:
    return "".join(f"\n{message['role']}:\n\n{quoted(message['content'])}" for message in messages)


def scored_replies_part(report: Mapping[str, Any], replies: Sequence[Mapping[str, Any]]) -> str:
    """How the replies were written, a table for each reward model, and the replies to the first prompts."""
    scored, rows = report["scored_replies"], report["rows"]["scored_replies"]
    how = "the likeliest tokens"
    if scored["temperature"]:
        nucleus = f" and top_p {scored['top_p']:g}" if scored["top_p"] < 1 else ""
        how = f"tokens drawn at temperature {scored['temperature']:g}{nucleus}"
    against = scored["win_rate_against"]
    opponent = "held-out one" if against is None else f"one of {against}"
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in rows["left_out"].items()) or "none"
    prompts = f"{rows['used']:,} held-out chats up to the assistant's last turn, the same for all models"
    parts = [
        "\n## Rewards of replies\n\n",
        f"- prompts: {prompts}; left out: {left_out}\n",
        f"- replies: {how}, cut off at {scored['max_new_tokens']:,} tokens\n",
        "- deviation: the standard deviation of the rewards over the prompts\n",
        f"- win rate: the share of prompts whose reply has a higher reward than the {opponent}; ties count half\n",
    ]
    for judge, found in scored["reward_models"].items():
        lines = {name: {**measures, **scored["replies"][name]} for name, measures in found["models"].items()}
        table = {
            name: {label: measures.get(key) for key, label in REWARD_LABELS.items()}
            for name, measures in [*lines.items(), (HELD_OUT, found["reference"])]
        }
        parts.append(f"\n### Reward model {judge}\n\n{markdown_table('', list(REWARD_LABELS.values()), table)}")
    for number, row in enumerate(replies[:SHOWN_PROMPTS], start=1):
        parts.append(f"\n### Rewarded prompt {number} of {len(replies):,}\n{conversation(row['prompt'])}")
        for name, reply in [(HELD_OUT, row["reference"]), *row["replies"].items()]:
            said = [f"{judge} {format_number(score)}" for judge, score in reply["scores"].items()]
            said += ["cut off"] if reply.get("truncated") else []
            parts.append(f"\n#### {name}: {', '.join(said)}\n\n{quoted(reply['text'])}")
    return "".join(parts)


def models_table(models: Mapping[str, Mapping[str, Any]]) -> str:
    """One column per model: what it is, then its measures, as far as any model has them."""
    rows = {key: {name: model[key] for name, model in models.items()} for key in DESCRIPTION}
    if any("adapter" in model for model in models.values()):
        rows["adapter"] = {name: model.get("adapter") for name, model in models.items()}
    rows["tokenizer"] = {name: model["tokenizer_digest"][:8] for name, model in models.items()}
    for measure, label in LABELS.items():
        values = {name: model["measures"].get(measure) for name, model in models.items()}
        if any(value is not None for value in values.values()):
            rows[label] = values
    return markdown_table("", list(models), rows)


def markdown_table(corner: str, columns: Sequence[str], rows: Mapping[str, Mapping[str, object]]) -> str:
    """A table with one line per row: its name, then what it has for each column. Numbers stand to the right."""
    header = [corner, *columns]
    cells = [[name, *(cell(values.get(column)) for column in columns)] for name, values in rows.items()]
    widths = [max(3, *(len(line[index]) for line in [header, *cells])) for index in range(len(header))]
    rule = [("-" * width if index == 0 else "-" * (width - 1) + ":") for index, width in enumerate(widths)]
    lines = [header, rule, *cells]
    return "".join(
        "| "
        + " | ".join(
            text.ljust(width) if index == 0 else text.rjust(width)
            for index, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        + " |\n"
        for line in lines
    )


def cell(value: object) -> str:
    """A value as the reader of a table wants it: whole numbers in groups of three, others to four digits."""
    if value is None:
        return ABSENT
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value).replace("|", "\\|").replace("\n", " ")
    return f"{value:,}" if isinstance(value, int) else format_number(value)


def format_number(value: float) -> str:
    """Four significant digits, without exponent between 0.0001 and a million."""
    if value == 0 or 1e-4 <= abs(value) < 1e6:
        digits = f"{value:.4g}"
        return f"{float(digits):,.0f}" if "e" in digits or abs(float(digits)) >= 10_000 else digits
    return f"{value:.3e}"


def quoted(text: str) -> str:
    """The text as a Markdown quotation, shown as it is: nothing in it becomes markup."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}\n"
