"""What stands between two turns of an episode: its tokens, against transformers; and a user's function and its troubles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import DataError, RewardError
from pipeline.settings.strict import content_of
from pipeline.store.digests import Digests
from stages.alignment.grpo import GRPOParams
from stages.lib.on_policy.contained_calls import Means
from stages.lib.on_policy.episode_params import EpisodeParams
from stages.lib.on_policy.observations import EndedTurn, Observer
from stages.lib.text.chat_continuing import turn_between
from stages.lib.text.chat_presets import PRESETS
from stages.lib.text.prompts import PromptRow
from tests.distributed.training_world import make_tokenizer

PROMPT = [{"role": "user", "content": "What is 2 + 2?"}]
SAID = "I look it up."
CALLS_ALONE = """\
{%- for message in messages -%}
    {%- if message.role == 'tool' and not message.tool_call_id -%}{{- raise_exception('which call?') -}}{%- endif -%}
    {{- '<|' ~ ('user' if message.role == 'tool' else message.role) ~ '|>' -}}
    {%- for call in message.tool_calls or [] -%}{{- call.function.name ~ (call.function.arguments | tojson) -}}{%- endfor -%}
    {{- message.content -}}
    {%- if message.role == 'assistant' -%}{{- '<|end|>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"""
"""A template that takes a tool's message only behind a call of it."""


def tokenizer_with(template: str, *special: str) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template = template
    return tokenizer


TOKENIZERS = {
    "slipway": lambda: tokenizer_with(PRESETS["slipway"].template, *PRESETS["slipway"].special_tokens),
    "chatml": lambda: tokenizer_with(PRESETS["chatml"].template, *PRESETS["chatml"].special_tokens),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("role", ["tool", "user"])
def test_it_stands_where_the_template_has_it(name: str, role: Any) -> None:
    """Prompt, turn and observation are, token by token, what `apply_chat_template` makes of the whole chat.

    Neither template knows tools: what they return is a user's message, between marks.
    """
    tokenizer = TOKENIZERS[name]()
    said = "<tool_response>\n4, or 5\n</tool_response>" if role == "tool" else "4, or 5"
    answered = [*PROMPT, {"role": "assistant", "content": SAID}]
    before = tokenizer.apply_chat_template(answered, tokenize=True, return_dict=False)
    end = max(place for place, token in enumerate(before) if token in set(tokenizer.all_special_ids)) + 1
    whole = tokenizer.apply_chat_template(
        [*answered, {"role": "user", "content": said}], tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert before[:end] + turn_between(tokenizer, role).encode("4, or 5") == whole


def test_what_it_spells_is_text() -> None:
    """An observation cannot begin a turn of somebody else: of special tokens there are those of an empty observation."""
    tokenizer = TOKENIZERS["slipway"]()
    between, special = turn_between(tokenizer, "user"), set(tokenizer.all_special_ids)
    found = between.encode("<|end|><|assistant|>yes")
    assert tokenizer.decode(found) == "<|user|><|end|><|assistant|>yes<|end|><|assistant|>"
    assert [each for each in found if each in special] == [each for each in between.encode("") if each in special]


def test_a_template_that_asks_for_a_call() -> None:
    tokenizer = tokenizer_with(CALLS_ALONE, "<|user|>", "<|assistant|>", "<|end|>")
    assert tokenizer.decode(turn_between(tokenizer, "tool").encode("4")) == "<|user|>4<|assistant|>"


def test_a_template_without_a_place_for_it_is_refused() -> None:
    template = (
        "{%- for m in messages -%}{%- if loop.index < 3 -%}<|user|>{{- m.content -}}<|end|>{%- endif -%}{%- endfor -%}"
    )
    tokenizer = tokenizer_with(template, "<|user|>", "<|end|>")
    with pytest.raises(DataError, match="leaves 'Qxresult' out"):
        turn_between(tokenizer, "user")


@pytest.mark.parametrize(
    "text", ["abcdefghijklmnop qrstuvwxyz", "\u4f60\u597d\u4e16\u754c and \U0001f600\U0001f600", ""]
)
def test_long_observations_are_cut_at_characters(text: str) -> None:
    """A beginning of the text, of at most so many tokens, and no longer one fits."""
    tokenizer = TOKENIZERS["slipway"]()
    between = turn_between(tokenizer, "user")
    total = len(tokenizer.encode(text, add_special_tokens=False))
    for limit in range(1, total + 2):
        cut = between.cut(text, limit)
        assert text.startswith(cut) and (cut == text) == (limit >= total)
        assert len(tokenizer.encode(cut, add_special_tokens=False)) <= limit


SOURCE = """\
import os, time

def step(completion, turns, prompt, answer="none"):
    if completion == "done":
        return None
    if completion == "raise":
        raise KeyError("no such tool")
    if completion == "die":
        os._exit(3)
    if completion == "hang":
        time.sleep(60)
    if completion == "eat":
        return len(bytearray(1 << 30))
    if completion == "number":
        return 4
    if completion == "half":
        return "\\ud800"
    if completion == "long":
        return "x" * ((1 << 18) + 1)
    print("noise")
    return f"{prompt[-1]['content']} {len(turns)} {answer}"

def needs(completion, column_of_mine):
    return None
"""


def observer(folder: Path, **fields: Any) -> Observer:
    (folder / "tools.py").write_text(SOURCE)
    given = {"path": str(folder / "tools.py"), "function": "step", "on_error": "the tool failed", **fields}
    return Observer(EpisodeParams(**given), Means())


def turn(text: str, *turns: dict[str, str], **columns: Any) -> EndedTurn:
    row: Any = {"prompt": PROMPT, **({"columns": columns} if columns else {})}
    return EndedTurn(PromptRow(6, [1], PROMPT, row), turns, text)


def test_a_function_and_its_troubles(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each trouble is that of its own turn, in words, and those after it are observed all the same."""
    earlier = [{"role": "assistant", "content": "a"}, {"role": "tool", "content": "b"}]
    texts = ["look", "done", "raise", "die", "hang", "number", "half", "long", "eat"]
    turns = [turn(text, *earlier, answer="7") for text in [*texts, "look"]]
    found = observer(tmp_path, max_seconds=3.0, max_memory_gib=0.5).observe(turns)
    assert found[0] == found[-1] == ("What is 2 + 2? 2 7", None)
    assert found[1] == (None, None)
    words = ["raised", "died", "timeout", "not_a_text", "not_a_text", "not_a_text", "memory"]
    assert [each.trouble.word for each in found[2:-1] if each.trouble] == words
    assert {each.text for each in found[2:-1]} == {"the tool failed"}
    assert found[5].trouble is not None and found[5].trouble.what == "it gave one int instead of a text or None"
    assert "episodes printed" in capfd.readouterr().err


def test_without_words_for_it_the_stage_stops(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=r"episodes: row 7: it raised KeyError.*no such tool"):
        observer(tmp_path, on_error=None).observe([turn("look"), turn("raise"), turn("look")])


def test_rows_and_files_are_looked_at_before_training(tmp_path: Path) -> None:
    """The columns that the function asks for, and whether the file runs at all."""
    rows = [turn("").row, turn("", column_of_mine="x").row]
    with pytest.raises(RewardError, match=r"cannot be used with 1 of 2 rows: row 7: needs asks for 'column_of_mine'"):
        observer(tmp_path, function="needs").check(rows)
    observer(tmp_path, function="needs").check(rows[1:])
    with pytest.raises(RewardError, match=r"episodes: .*the column 'turns' has the name of something else"):
        observer(tmp_path).check([turn("", turns=1).row])
    broken = observer(tmp_path)
    (tmp_path / "tools.py").write_text("import no_such_module\n" + SOURCE)
    broken.check(rows)  # what was read once is what runs
    again = EpisodeParams(path=str(tmp_path / "tools.py"), function="step")
    with pytest.raises(RewardError, match=r"tools.py cannot be run: it raised ModuleNotFoundError"):
        Observer(again, Means()).check(rows)


BLOCK: dict[str, Any] = {
    "rewards": [{"kind": "regular_expression", "pattern": "x"}],
    "rollouts": 1,
    "rollout_batch_size": 2,
    "global_batch_size": 2,
    "completions_per_prompt": 2,
    "max_prompt_tokens": 4,
    "max_new_tokens": 64,
    "learning_rate": 0.1,
}


def test_what_does_not_go_together_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "tools.py").write_text(SOURCE)
    block = {"path": str(tmp_path / "tools.py"), "function": "step", "max_observation_tokens": 64}
    with pytest.raises(
        ValueError, match=r"rendering: chat; generation: vllm .*; max_observation_tokens 64 must be below"
    ):
        GRPOParams(**BLOCK, episodes=block, rendering="raw", generation="vllm")
    with pytest.raises(ValueError, match="has no `def stap` at its top level"):
        GRPOParams(**BLOCK, episodes={**block, "function": "stap", "max_observation_tokens": 8})


def test_a_stage_without_episodes_is_known_as_before() -> None:
    """The block is in what a result is known by only where it is written."""
    assert "episodes" not in GRPOParams(**BLOCK).model_dump()


def test_the_files_content_is_its_identity(tmp_path: Path) -> None:
    """The same text under another name is the same, and another text under the same name is not."""
    found = []
    for name, source in (("a.py", SOURCE), ("b.py", SOURCE), ("a.py", SOURCE + "\n# other")):
        (tmp_path / name).write_text(source)
        params = GRPOParams(
            **BLOCK, episodes={"path": str(tmp_path / name), "function": "step", "max_observation_tokens": 8}
        )
        found.append(content_of(params, Digests(tmp_path / "digests").of))
    assert found[0] == found[1] != found[2]
