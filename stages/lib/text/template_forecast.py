"""What `plan` sees of chat templates and vocabularies: models that know no chats, and tokens that no model embeds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pipeline.errors import Problem, did_you_mean
from pipeline.stage import Estimate, Forecast
from stages.lib.text.added_tokens import GIVE_ONE, GROW, missing_problem, needed_tokens
from stages.lib.text.chat_presets import PRESETS, TemplateOfTokenizer, is_template
from stages.lib.text.chat_template import CHOOSE_ONE
from stages.lib.text.tokenizer_files import DEFAULT, TokenizerFiles, known_tokenizer

GROW_FIRST = (
    "Use the tokenizer that it was trained with; give a causal model to sft first, with `add_tokens: true`; save any other"
    " anew after `model.resize_token_embeddings(len(tokenizer))`."
)


def embedded_rows(model: Estimate) -> int | None:
    """How many tokens the model embeds, where its config says so."""
    config = model.architecture or {}
    rows = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    return rows if isinstance(rows, int) else None


def embedding_problems(model: Estimate, files: TokenizerFiles | None, hint: str, role: str = "model") -> list[Problem]:
    """What is wrong if the tokenizer beside a model has more tokens than the model embeds."""
    rows = embedded_rows(model)
    if files is None or rows is None or files.num_tokens <= rows:
        return []
    what = f"its tokenizer has {files.num_tokens} tokens, and the model embeds {rows}"
    return [Problem(f"inputs.{role}", what, hint)]


def unembedded_problems(forecast: Forecast) -> list[Problem]:
    """What is wrong with inputs that are models: tokens of the tokenizer beside one that it does not embed."""
    problems = []
    for role, known in forecast.inputs.items():
        if embedded_rows(known) is not None:
            problems += embedding_problems(known, known_tokenizer(known.folder), GROW_FIRST, role)
    return problems


def untaught_problems(forecast: Forecast, *, reads_chats: bool = True) -> list[Problem]:
    """What is wrong if the input `model` of a stage that reads chats knows none, or has tokens that it does not embed."""
    # The template beside an adapter that is continued is read when it is there.
    read = ["model"] if reads_chats and "adapter" not in forecast.inputs else []
    return [*unembedded_problems(forecast), *untemplated_problems(forecast, read)]


def untemplated_problems(forecast: Forecast, roles: Sequence[str]) -> list[Problem]:
    """What is wrong if one of these inputs is to read chats, and its tokenizer has no chat template."""
    problems = []
    for role in roles:
        files = known_tokenizer(forecast.inputs.get(role, Estimate()).folder)
        if files is not None and not files.templates:
            hint = "Teach it chats first, in a stage sft with `chat_template: chatml` and `add_tokens: true`."
            if role.startswith("reward"):
                hint = "Save it anew with the template that it was trained with (`tokenizer.chat_template = ...`)."
            problems.append(Problem(f"inputs.{role}", "its tokenizer has no chat template", hint))
        # Where there is one for tools, only chats without any have none.
        elif files is not None and not {DEFAULT, "tool_use"} & files.templates.keys():
            what = f"its tokenizer has several chat templates, and none is called default: {', '.join(files.templates)}"
            problems.append(Problem(f"inputs.{role}", what, CHOOSE_ONE))
    return problems


def no_default_problem(templates: Iterable[str]) -> Problem:
    """What `sft` says where it is not told which of several templates to take."""
    what = f"the model's tokenizer has several chat templates and none called default: {', '.join(templates)}"
    return Problem("params.chat_template", what, "Set it to one of these names, to a preset or to a file.")


def no_template_problem(wanted: str, named: Iterable[str]) -> Problem:
    """What `sft` says of a name that no preset and none of these templates has."""
    what = f"no preset, no file and no template of the model's tokenizer has the name {wanted!r}"
    return Problem("params.chat_template", what, did_you_mean(wanted, [*PRESETS, *named]))


def template_problems_ahead(
    model: Estimate, wanted: str | TemplateOfTokenizer | None, asked: bool | Sequence[str]
) -> list[Problem]:
    """What is wrong with the params chat_template and add_tokens of `sft`, as far as the files beside its model show."""
    files = known_tokenizer(model.folder)
    if files is None:
        return []
    problems = [] if asked else embedding_problems(model, files, GROW)
    if wanted is None and not files.templates:
        problems.append(Problem("inputs.model", "its tokenizer has no chat template", GIVE_ONE))
    elif wanted is None and DEFAULT not in files.templates:
        problems.append(no_default_problem(files.templates))
    named = set(files.templates) - ({DEFAULT} if len(files.templates) == 1 else set())
    if isinstance(wanted, str) and wanted not in named and not is_template(wanted):
        problems.append(no_template_problem(wanted, sorted(named)))
    missing = [token.content for token in needed_tokens(wanted) if token.content not in files.added]
    left = [] if asked is True else [text for text in missing if text not in (asked or ())]
    if left and not (isinstance(wanted, str) and wanted in files.templates):
        problems.append(missing_problem(wanted, left))
    return problems


def tokens_ahead(model: Estimate, wanted: str | TemplateOfTokenizer | None, asked: bool | Sequence[str]) -> int | None:
    """How many tokens the model's tokenizer has once the missing ones are added; None where that is not known."""
    files = known_tokenizer(model.folder)
    if files is None:
        return None
    texts = asked if isinstance(asked, Sequence) else [token.content for token in needed_tokens(wanted) if asked]
    return files.num_tokens + len({text for text in texts if text not in files.added})
