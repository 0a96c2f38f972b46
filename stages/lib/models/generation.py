"""A model's `generation_config.json`, as outside makers write it, made one that can be written again.

transformers reads files that it refuses to save: a model of such a file would be trained, and lost when it is published. What
is mended is said, by `plan` and in the journal. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import PathError, shown
from pipeline.settings.paths import holds_file, read_json
from pipeline.stage import Context
from stages.lib.models.config import text_config

GENERATION = "generation_config.json"

SAMPLING: dict[str, Any] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
"""Fields that say how to draw -> the value that says nothing."""
BEAMS: dict[str, Any] = {"early_stopping": False, "length_penalty": 1.0}
"""Fields that say how beams are searched -> the value that says nothing."""
ENDS = ("eos_token_id", "bos_token_id", "pad_token_id")


def sound_generation(said: Mapping[str, Any], embedded: int | None) -> tuple[dict[str, Any], list[str]]:
    """The fields as they can be saved, and a sentence on each thing that was mended.

    `embedded`: how many tokens the model has embeddings for; None where that is not known.
    """
    sound, mended = dict(said), []
    sampling, beams = (
        [name for name, plain in fields.items() if sound.get(name) not in (None, plain)] for fields in (SAMPLING, BEAMS)
    )
    if sampling and sound.get("do_sample") is None:
        sound["do_sample"] = True
        mended.append(f"gives {', '.join(sampling)} and does not say do_sample: it is published with do_sample: true")
    elif sampling and not sound["do_sample"]:
        mended.append(f"says do_sample: false beside {', '.join(sampling)}, which are left out")
        sound = {name: value for name, value in sound.items() if name not in sampling}
    if beams and (sound.get("num_beams") or 1) == 1:
        mended.append(f"gives {', '.join(beams)} without beams (num_beams), which are left out")
        sound = {name: value for name, value in sound.items() if name not in beams}
    for name in ENDS:
        ids = sound.get(name) if isinstance(sound.get(name), list) else [sound.get(name)]
        known = [each for each in ids if each is None or not is_beyond(each, embedded)]
        if len(known) < len(ids):
            unknown = ", ".join(shown(each) for each in ids if each not in known)
            mended.append(f"gives {unknown} as {name}, for which the model has no token: left out")
            sound[name] = (known if len(known) > 1 else known[0]) if known else None
    return sound, mended


def is_beyond(token: Any, embedded: int | None) -> bool:
    """Whether this is no id of a token."""
    return type(token) is not int or token < 0 or (embedded is not None and token >= embedded)


def generation_notes(folder: Path | None) -> list[str]:
    """What is mended of the generation config in a model's folder, a sentence each."""
    if folder is None or not holds_file(folder, GENERATION):
        return []
    try:
        said = read_json(folder / GENERATION)
    except PathError:
        return [f"{GENERATION} of the model cannot be read: it is published with the stops of the tokenizer"]
    try:
        embedded = text_config(read_json(folder / "config.json")).get("vocab_size")
    except PathError:
        embedded = None
    _, mended = sound_generation(said, embedded if type(embedded) is int else None)
    return [f"{GENERATION} of the model {sentence}" for sentence in mended]


def note_generation(ctx: Context) -> None:
    """Tells the journal what is mended of the generation config of the model that training starts from."""
    for sentence in generation_notes(ctx.base):
        ctx.journal.note(sentence)
