"""What the JSON files of a tokenizer say of it, read without opening it: for `plan`, which loads no such library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import PathError
from pipeline.settings.paths import is_file, read_file, read_json

DEFAULT = "default"
"""What a tokenizer's only chat template is called."""


MOST_TEMPLATE_BYTES = 1 << 20


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer as far as its JSON files tell."""

    num_tokens: int
    """Those of its vocabulary and those that were added to it."""
    added: Mapping[str, Mapping[str, Any]]
    """The added tokens: text -> the flags that it carries."""
    templates: Mapping[str, str]
    """Name -> chat template; the only one is called `default`."""


def read_tokenizer_files(folder: Path) -> TokenizerFiles | None:
    """The tokenizer in `folder`; None where there is no tokenizer.json. Raises `PathError` for one that cannot be read."""
    home = folder / "tokenizer" if is_file(folder / "tokenizer" / "tokenizer.json") else folder
    if not is_file(home / "tokenizer.json"):
        return None
    written, config = read_json(home / "tokenizer.json"), optional_json(home / "tokenizer_config.json")
    model = written.get("model")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    # A vocabulary of scores is a list of pairs, any other maps tokens to ids.
    pairs = [each for each in vocabulary if isinstance(each, list) and each] if isinstance(vocabulary, list) else []
    words = vocabulary if isinstance(vocabulary, Mapping) else {str(each[0]) for each in pairs}
    older = {} if "added_tokens_decoder" in config else optional_json(home / "added_tokens.json")
    added = added_tokens(written, config, older)
    return TokenizerFiles(len(words) + sum(text not in words for text in added), added, chat_templates(home, config))


def added_tokens(
    written: Mapping[str, Any], config: Mapping[str, Any], older: Mapping[str, Any]
) -> dict[str, Mapping[str, Any]]:
    """Text -> flags, from tokenizer.json, tokenizer_config.json and added_tokens.json, each adding to what stood before.

    A special token that only the config names (`pad_token: "[PAD]"`) is added by transformers when it opens the two.
    added_tokens.json (`older`) counts only where the config has no `added_tokens_decoder`.
    """
    decoder = config.get("added_tokens_decoder")
    named = [value for name, value in config.items() if name.endswith("_token")]
    more = [config.get(name) for name in ("additional_special_tokens", "extra_special_tokens")]
    several = [each for value in more for each in (value.values() if isinstance(value, Mapping) else value or ())]
    special = [{"content": each, "special": True} if isinstance(each, str) else each for each in (*named, *several)]
    listed = [written.get("added_tokens"), list(decoder.values()) if isinstance(decoder, Mapping) else None, special]
    found: dict[str, Mapping[str, Any]] = {}
    for each in (token for tokens in listed if isinstance(tokens, list) for token in tokens):
        if isinstance(each, Mapping) and isinstance(each.get("content"), str):
            found.setdefault(each["content"], each)
    return found | {text: {} for text in older if text not in found}


def chat_templates(home: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Name -> chat template. A file of its own takes the place of what tokenizer_config.json says."""
    said = config.get("chat_template")
    if isinstance(said, list):
        named = [each for each in said if isinstance(each, Mapping)]
        found = {str(each.get("name")): str(each.get("template")) for each in named}
    else:
        found = {DEFAULT: said} if isinstance(said, str) else {}
    if isinstance(older := optional_json(home / "chat_template.json").get("chat_template"), str):
        found = {DEFAULT: older}
    if is_file(home / "chat_template.jinja"):
        found = {DEFAULT: template_in(home / "chat_template.jinja")}
    others = home / "additional_chat_templates"
    return found | {path.stem: template_in(path) for path in sorted(others.glob("*.jinja")) if is_file(path)}


def optional_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is no such file."""
    return read_json(path) if is_file(path) else {}


def template_in(path: Path) -> str:
    return read_file(path, MOST_TEMPLATE_BYTES).decode("utf-8", errors="replace")


def known_tokenizer(folder: Path | None) -> TokenizerFiles | None:
    """As `read_tokenizer_files`, and None for what cannot be read: whoever opens the tokenizer says why."""
    try:
        return read_tokenizer_files(folder) if folder is not None else None
    except PathError:
        return None
