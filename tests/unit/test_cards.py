"""The README.md of a model: what the hub checks of it, what it may know and where from, and that nothing else shows in it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id

from pipeline.cards.card import write_cards
from pipeline.cards.metadata import PIPELINE_TAGS
from pipeline.settings.licenses import LICENSES
from pipeline.settings.resources import Resources
from pipeline.stage import Result
from pipeline.store.artifact import Facts, Kind, Manifest, sealed
from pipeline.store.job import Job
from stages import STAGES

REVISION = "0123456789abcdef0123456789abcdef01234567"
HUB = f"hub:someone/some-model@{REVISION}"
OUTSIDE = "sha256:" + "9" * 64
CLEAN, MIX, SFT, DPO, REWARD = (each * 64 for each in "abcde")


def dumped(kind: str, **given: Any) -> dict[str, Any]:
    """Params as a manifest has them: all of them."""
    return STAGES[kind].params(**given).model_dump(mode="json")


TRAINING = {"global_batch_size": 8, "max_steps": 24, "learning_rate": 1e-3, "max_length_tokens": 256}


class Shop:
    """A store in which chats of the hub are made, and models of them; `made` writes the manifest of one artifact more."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "artifacts"
        self.time = "2026-11-28T23:00:00+00:00"
        source = {
            "kind": "hub",
            "dataset": "someone/some-chats",
            "revision": REVISION,
            "layout": "messages",
        }
        self.made(
            CLEAN, "clean", Kind.CHAT_ROWS, {}, dumped("clean", format="chats", source=source), rows_read=9, rows_kept=7
        )
        self.made(
            MIX, "mix", Kind.CHATS, {"sources.chats": CLEAN}, dumped("mix", heldout_fraction=0.25), train=5, heldout=2
        )

    def made(
        self, artifact_id: str, stage: str, kind: Kind, inputs: Mapping[str, str], params: Any, **numbers: float
    ) -> Path:
        folder = self.folder / artifact_id
        folder.mkdir(parents=True)
        facts = Facts(train_rows=numbers.pop("train", None), heldout_rows=numbers.pop("heldout", None))  # type: ignore[arg-type]
        manifest = Manifest(
            artifact_id=artifact_id, artifact_kind=kind, stage=stage, stage_version=1, step="x", recipe="x", seed=1,
            params=params, input_ids=dict(inputs), files={}, facts=facts, metrics=numbers, created_at=self.time,
            wall_seconds=1, device="cpu", world_size=1,
        )  # fmt: skip
        (folder / "manifest.json").write_text(sealed(manifest))
        return folder

    def card(
        self,
        kind: str = "sft",
        output: Kind = Kind.CAUSAL_LM,
        inputs: Mapping[str, str] | None = None,
        places: Mapping[str, Path] | None = None,
        out: Path | None = None,
        digests: Mapping[str, str] | None = None,
        **params: Any,
    ) -> Path:
        """The card of what a step has made; inputs lie in the store unless `places` says otherwise."""
        inputs = {"model": HUB, "chats": MIX} if inputs is None else inputs
        out = out or self.folder.parent / "work" / "out"
        model_files(out)
        given = {name: value for name, value in {**TRAINING, **params}.items() if value is not None}
        job = Job(
            recipe="my-recipe", step="my-step", kind=kind, stage_version=1, artifact_id=SFT, artifact_kind=output.value,
            params=dumped(kind, **given), inputs={}, input_ids=dict(inputs),
            source_digests=dict(digests or {}), seed=1, resources=Resources(), store=str(self.folder.parent), work=str(out.parent),
        )  # fmt: skip
        found = {role: self.folder / each for role, each in inputs.items()} | dict(places or {})
        facts = Facts(parameters=1234567, dtype="bf16", vocabulary_size=300, labels=["yes", "a`b"])
        metrics = {"heldout_loss": 1.23456789, "heldout_loss_base": 2.0, "train_loss": 3.0}
        write_cards(job, found, out, Result(metrics, facts), STAGES)
        return out / "README.md"


def model_files(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "chat_template.jinja").write_text("{{ messages }}")
    (out / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    (out / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"id": 7, "content": "<|end|>"}]}))


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


def checked(path: Path) -> dict[str, Any]:
    """The metadata of a card, once it is what the hub takes, as far as that can be told without it."""
    text = path.read_text(encoding="utf-8")
    card = ModelCard.load(path)
    assert str(card) == text  # the hub's own writer would write the same
    data = card.data.to_dict()
    ModelCardData(**data)
    assert data["library_name"] in ("transformers", "peft")
    assert data.get("pipeline_tag") in {*PIPELINE_TAGS.values(), None}
    assert data["tags"][0] == "slipway"
    assert data.get("license", "mit") in LICENSES | {"other"}
    if data.get("license") == "other":
        assert re.fullmatch(r"[a-z0-9.-]+", data["license_name"]) and data["license_link"].startswith("https://")
    for repository in (*filter(None, [data.get("base_model")]), *data.get("datasets", [])):
        validate_repo_id(repository)
    assert "[More Information Needed]" not in text and "Model Card for Model ID" not in text
    assert not re.search(r"(?<![\w.:/])/(?:tmp|home|root|work|data)/|20\d\d-\d\d-\d\d", text), "a place or a time shows"
    return data


def test_a_model_of_the_hub_says_where_it_comes_from(shop: Shop) -> None:
    path = shop.card(license="apache-2.0")
    assert checked(path) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "base_model": "someone/some-model",
        "base_model_relation": "finetune",
        "datasets": ["someone/some-chats"],
        "tags": ["slipway", "sft"],
    }
    text = path.read_text()
    assert "made from someone/some-model at revision 0123456789ab by the stage `sft`" in text
    assert "- Parameters: 1,234,567\n- Number format: bf16" in text
    assert "| loss | 1.235 |\n| loss_base | 2 |" in text and "train_loss" not in text
    assert f"| clean {CLEAN[:12]} | chat_rows | 7 of 9 rows kept |" in text
    assert f"| mix {MIX[:12]} | chats | 5 rows to train on, 2 held out |" in text
    assert "Generation stops at 2, `<|end|>` (7), which generation_config.json says." in text
    assert "apply_chat_template" in text


def test_params_that_are_the_stages_own_are_left_out(shop: Shop) -> None:
    """Of `source`, its defaults likewise; the licence stands at the top."""
    steps = shop.card(license="mit", weight_decay=0.1).read_text().partition("## Steps")[2]
    assert re.findall(r"^ +- `(.*)`$", steps, re.MULTILINE) == [
        "format: chats",
        f'source: {{"layout": "messages", "kind": "hub", "dataset": "someone/some-chats", "revision": "{REVISION}"}}',
        "heldout_fraction: 0.25",
        "learning_rate: 0.001",
        "weight_decay: 0.1",
        "global_batch_size: 8",
        "max_steps: 24",
        "max_length_tokens: 256",
    ]


def test_files_from_outside_are_named_without_their_place(shop: Shop, tmp_path: Path) -> None:
    data = tmp_path / "my rows.jsonl"
    data.write_text("{}\n")
    source = {"kind": "files", "layout": "messages", "paths": [str(data)]}
    params = dumped("clean", format="chats", source=source)
    folder = shop.made(DPO, "clean", Kind.CHAT_ROWS, {}, params)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["source_digests"] = {"source.paths.0": f"sha256:{'4' * 64} {data}"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    shop.made(REWARD, "mix", Kind.CHATS, {"sources.mine": DPO}, dumped("mix"))
    path = shop.card(inputs={"model": HUB, "chats": REWARD})
    assert '"paths": ["my rows.jsonl (sha256:444444444444)"]' in path.read_text()
    assert str(tmp_path) not in path.read_text()
    assert "datasets" not in checked(path)


def test_long_params_and_odd_characters_do_no_harm(shop: Shop) -> None:
    """A chat template is cut; what could end a piece of code in Markdown is not there."""
    path = shop.card(chat_template="{{ x }} ``` \n# no title\n" * 100)
    checked(path)
    (line,) = (line for line in path.read_text().splitlines() if "chat_template:" in line)
    assert line.startswith("    - `chat_template: {{ x }} ''' # no title {{ x }}") and len(line) < 280
    assert line.count("`") == 2
    assert "\n# no title" not in path.read_text()


# The base


def test_a_folder_on_disk_is_no_base_model(shop: Shop, tmp_path: Path) -> None:
    """The hub refuses a base_model that is no repository: a place on this machine least of all."""
    place = tmp_path / "models" / "llama3"
    place.mkdir(parents=True)
    path = shop.card(inputs={"model": OUTSIDE, "chats": MIX}, places={"model": place})
    assert not {"base_model", "license"} & checked(path).keys()
    assert "made from a folder from outside, sha256:999999999999 by" in path.read_text()
    assert str(tmp_path) not in path.read_text()


def test_a_model_from_scratch_has_no_base(shop: Shop) -> None:
    """Its tokenizer has a chat template, and it has never seen a chat: its card shows how it goes on with a text."""
    shop.made(DPO, "pack", Kind.TOKENS, {}, {})
    params = {"max_length_tokens": None, "architecture": {"model_type": "llama"}}
    path = shop.card("pretrain", Kind.CAUSAL_LM, {"tokens": DPO}, **params)
    assert "base_model" not in checked(path)
    assert "made from nothing but data" in path.read_text()
    assert "apply_chat_template" not in path.read_text() and "Once upon a time" in path.read_text()


@pytest.mark.parametrize(
    ("kind", "output", "model", "relation"),
    [
        ("sft", Kind.CAUSAL_LM, HUB, "finetune"),
        ("sft", Kind.CAUSAL_LM, DPO, "finetune"),
        ("reward", Kind.REWARD_MODEL, DPO, "finetune"),
        ("quantize", Kind.QUANTIZED_LM, HUB, "quantized"),
        ("quantize", Kind.QUANTIZED_LM, DPO, None),
    ],
)
def test_the_nearest_repository_on_the_way_back_is_the_base(
    shop: Shop, kind: str, output: Kind, model: str, relation: str | None
) -> None:
    """A quantization of a finetune is no quantization of the repository: the hub is left to see for itself."""
    shop.made(DPO, "sft", Kind.CAUSAL_LM, {"model": HUB, "chats": MIX}, dumped("sft", **TRAINING))
    params = dict.fromkeys(TRAINING) if kind == "quantize" else {}
    data = checked(shop.card(kind, output, {"model": model, "chats": MIX}, **params))
    assert (data["base_model"], data.get("base_model_relation")) == ("someone/some-model", relation)


def test_ancestors_that_are_gone_are_named_by_their_ids(shop: Shop) -> None:
    shop.made(DPO, "sft", Kind.CAUSAL_LM, {"model": "7" * 64, "chats": MIX}, dumped("sft", **TRAINING))
    path = shop.card(inputs={"model": DPO, "chats": MIX})
    assert "base_model" not in checked(path)
    assert "model: an artifact 777777777777" in path.read_text()


# The licence


def with_card(folder: Path, text: str) -> dict[str, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(text, encoding="utf-8")
    return {"model": folder}


LINK = f"https://huggingface.co/someone/some-model/blob/{REVISION}/LICENSE"


@pytest.mark.parametrize(
    ("card", "known"),
    [
        ("---\nlicense: llama3.1\nlanguage: no\n---\n# x\n", {"license": "llama3.1"}),
        ("\ufeff---\r\nlicense: mit\r\n---\r\n", {"license": "mit"}),
        (
            "---\nlicense: other\nlicense_name: Some-License\nlicense_link: LICENSE\n---\n",
            {"license": "other", "license_name": "some-license", "license_link": LINK},
        ),
        ("---\nlicense: other\n---\n", {}),
        ("---\nlicense: something of my own\n---\n", {}),
        ("---\nlicense: [mit, apache-2.0]\n---\n", {}),
        ("---\nlicense: mit\nno end", {}),
        ("---\n: : :\n  - [\n---\n", {}),
        ("---\n- mit\n---\n", {}),
        ("# A model\n\nlicense: mit\n", {}),
        ("", {}),
    ],
)
def test_the_licence_of_the_base_is_known_from_its_card(
    shop: Shop, tmp_path: Path, card: str, known: dict[str, str]
) -> None:
    """Whatever a card of others holds, ours is written, and is one that the hub takes."""
    data = checked(shop.card(places=with_card(tmp_path / "snapshot", card)))
    assert {name: value for name, value in data.items() if name.startswith("license")} == known


def test_what_the_recipe_says_counts(shop: Shop, tmp_path: Path) -> None:
    places = with_card(tmp_path / "snapshot", "---\nlicense: llama3.1\n---\n")
    assert checked(shop.card(places=places, license="mit"))["license"] == "mit"
    given = {"name": "mine", "link": "https://example.org/license"}
    data = checked(shop.card(places=places, license=given))
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "mine", given["link"])


def test_a_licence_goes_on_from_artifact_to_artifact(shop: Shop) -> None:
    folder = shop.made(DPO, "sft", Kind.CAUSAL_LM, {"model": HUB, "chats": MIX}, dumped("sft", **TRAINING))
    shop.card(license="gemma", out=folder)
    assert checked(shop.card(inputs={"model": DPO, "chats": MIX}))["license"] == "gemma"


# What has a card, and that it is always the same


def test_the_same_recipe_writes_the_same_bytes_anywhere_and_any_time(tmp_path: Path) -> None:
    cards = []
    for name, time in (("here", "2026-01-01T00:00:00+00:00"), ("somewhere/else", "2031-12-31T00:00:00+00:00")):
        shop = Shop(tmp_path / name)
        shop.time = time
        shop.made(DPO, "sft", Kind.CAUSAL_LM, {"model": HUB, "chats": MIX}, dumped("sft", **TRAINING))
        cards.append(shop.card(inputs={"model": DPO, "chats": MIX}).read_bytes())
    assert cards[0] == cards[1]


@pytest.mark.parametrize("kind", Kind)
def test_models_have_cards_and_nothing_else_has(shop: Shop, kind: Kind) -> None:
    out = shop.folder.parent / "one" / "out"
    if kind is Kind.ADAPTER:
        out.mkdir(parents=True)
        (out / "adapter_config.json").write_text('{"peft_type": "PREFIX_TUNING"}')
    path = shop.card(output=kind, out=out)
    assert path.exists() == (kind in PIPELINE_TAGS or kind is Kind.ADAPTER)
    if path.exists():
        code = re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
        compile(code[0], "card", "exec")
        assert checked(path)["pipeline_tag"] == PIPELINE_TAGS.get(kind, "text-generation")


def test_the_card_of_an_adapter_alone(shop: Shop) -> None:
    """It speaks of no model above it. Weights that peft does not read are put in place without peft."""
    out = shop.folder.parent / "one" / "out"
    out.mkdir(parents=True)
    for config, tag, library in (
        ('{"peft_type": "PREFIX_TUNING"}', "prefix_tuning", "peft"),
        ('{"slipway_method": "bitfit"}', "bitfit", "transformers"),
    ):
        (out / "adapter_config.json").write_text(config)
        path = shop.card(output=Kind.ADAPTER, out=out)
        said = checked(path)
        assert said["tags"] == ["slipway", "sft", tag] and said["library_name"] == library
        assert said["base_model_relation"] == "adapter"
        assert "The folder above" not in path.read_text()
        assert ("PeftModel" in path.read_text()) == (library == "peft")


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        (Kind.CLASSIFIER, "AutoModelForSequenceClassification.from_pretrained("),
        (Kind.EXTRACTOR, "AutoModelForTokenClassification.from_pretrained("),
        (Kind.READER, "AutoModelForQuestionAnswering.from_pretrained("),
        (Kind.ENCODER, "AutoModelForMaskedLM.from_pretrained("),
    ],
)
def test_the_base_of_an_adapter_is_opened_with_the_head_that_it_was_trained_under(
    shop: Shop, kind: Kind, line: str
) -> None:
    out = shop.folder.parent / "one" / "out"
    (out / "adapter").mkdir(parents=True)
    (out / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (out / "config.json").write_text('{"id2label": {"0": "a", "1": "b", "2": "c"}}')
    shop.card(output=kind, out=out)
    text = (out / "adapter" / "README.md").read_text()
    assert line in text
    assert (", num_labels=3" in text) == (kind in (Kind.CLASSIFIER, Kind.EXTRACTOR))


def test_adapter_and_critic_have_cards_of_their_own(shop: Shop) -> None:
    """Whatever peft wrote there is gone."""
    out = shop.folder.parent / "work" / "out"
    for name in ("adapter", "value"):
        (out / name).mkdir(parents=True)
        (out / name / "README.md").write_text("---\nbase_model: /tmp/llama3\n---\n# Model Card for Model ID\n")
        (out / name / "adapter_config.json").write_text("{}")
    (out / "value" / "value_head.safetensors").write_bytes(b"")
    shop.card(license="mit")
    adapter, critic = (checked(out / name / "README.md") for name in ("adapter", "value"))
    assert adapter == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "license": "mit",
        "base_model": "someone/some-model",
        "base_model_relation": "adapter",
        "datasets": ["someone/some-chats"],
        "tags": ["slipway", "sft", "lora"],
    }
    assert critic["library_name"] == "peft" and "value-model" in critic["tags"]
    assert (
        f'from_pretrained("someone/some-model", revision="{REVISION}")' in (out / "adapter" / "README.md").read_text()
    )


def test_a_whole_critic_claims_no_base(shop: Shop) -> None:
    """It may have begun as a reward model."""
    out = shop.folder.parent / "work" / "out"
    (out / "value").mkdir(parents=True)
    (out / "value" / "config.json").write_text("{}")
    shop.card()
    data = checked(out / "value" / "README.md")
    assert "base_model" not in data and data["tags"][-1] == "value-model"
