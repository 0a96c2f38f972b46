"""Public instruction and preference files, with padded histories, train sft, reward and dpo for a few steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.driving import manifest_of, slipway

pytestmark = pytest.mark.slow

RECIPE = """
name: real
outputs: [reward, aligned]
resources: {{device: cpu, threads: 1, log_every_steps: 1}}
stages:
  text_rows:
    kind: clean
    params: {{format: text, max_rows: 40, source: {{kind: files, layout: text, paths: ["{data}/text/d2l_zh.jsonl.gz"]}}}}
  text: {{kind: mix, inputs: {{sources: {{d2l: text_rows}}}}, params: {{heldout_fraction: 0.2}}}}
  tokenizer: {{kind: tokenizer, inputs: {{text: text}}, params: {{vocabulary_size: 2048}}}}
  tokens: {{kind: pack, inputs: {{text: text, tokenizer: tokenizer}}, params: {{sequence_length: 128}}}}
  base:
    kind: pretrain
    inputs: {{tokens: tokens}}
    params:
      objective: causal
      architecture:
        {{model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2,
         num_key_value_heads: 2, max_position_embeddings: 1024, tie_word_embeddings: true}}
      global_batch_size: 8
      max_steps: 4
      learning_rate: 1e-3
  chat_rows:
    kind: clean
    params: {{format: chats, source: {{kind: files, layout: alpaca, paths: [padded.json]}}}}
  chats: {{kind: mix, inputs: {{sources: {{oasst: chat_rows}}}}, params: {{max_heldout_rows: 20}}}}
  chat:
    kind: sft
    inputs: {{model: base, chats: chats}}
    params: &training {{global_batch_size: 8, max_steps: 4, learning_rate: 1e-3, max_length_tokens: 512}}
  ranked_rows:
    kind: clean
    params: {{format: preferences, source: {{kind: files, layout: preference_alpaca, paths: ["{data}/preferences/oasst_zh_history.json"]}}}}
  polite_rows:
    kind: clean
    params: {{format: preferences, source: {{kind: files, layout: preference_alpaca, paths: ["{data}/preferences/polite_rude_1100.json"]}}}}
  preferences:
    kind: mix
    inputs: {{sources: {{oasst: ranked_rows, polite: polite_rows}}}}
    params: {{max_heldout_rows: 20}}
  reward: {{kind: reward, inputs: {{model: chat, preferences: preferences}}, params: *training}}
  aligned: {{kind: dpo, inputs: {{model: chat, preferences: preferences}}, params: *training}}
"""


def test_history_and_preference_files_train_and_empty_history_pairs_are_counted(
    shared_data: Path, tmp_path: Path
) -> None:
    # As the format's authors pad it: every history two pairs long at least, empty pairs first.
    raw = json.loads((shared_data / "chat" / "oasst_zh_history.json").read_text(encoding="utf-8"))
    padding = [max(0, 2 - len(row["history"])) for row in raw]
    padded = [{**row, "history": [["", ""]] * n + row["history"]} for row, n in zip(raw, padding, strict=True)]
    (tmp_path / "padded.json").write_text(json.dumps(padded, ensure_ascii=False), encoding="utf-8")
    recipe = tmp_path / "real.yaml"
    recipe.write_text(RECIPE.format(data=shared_data))
    store = tmp_path / "store"
    ended = slipway("run", recipe, "--store", store, timeout=600)
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr

    chat_rows = store / "artifacts" / manifest_of(store, "chat_rows").artifact_id
    ledger = json.loads((chat_rows / "ledger.json").read_text(encoding="utf-8"))
    assert ledger["read"] == len(raw) == 689
    assert ledger["repaired"]["empty_history_pair"] == sum(padding) == 929
    dropped = {reason: entry["count"] for reason, entry in ledger["dropped"].items()}
    assert (ledger["kept"], dropped) == (684, {"exact_duplicate": 5})
    for line in (chat_rows / "rows.jsonl").read_text(encoding="utf-8").splitlines():
        assert all(message["content"] for message in json.loads(line)["messages"])
    for step in ("chat", "reward", "aligned"):
        manifest = manifest_of(store, step)
        assert manifest.facts.optimizer_steps == 4
        assert manifest.metrics["heldout_loss"] > 0
