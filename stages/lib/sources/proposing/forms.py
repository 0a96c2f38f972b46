"""In which columns each layout may find what it reads: what they must hold, and what others call them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from stages.lib.sources.layouts import LAYOUTS
from stages.lib.sources.proposing.columns import TEXTS, TURNS

LABELS = frozenset({"text", "number", "truth", "binary", "truth_text"})
ANYTHING = frozenset({"text", "texts", "mapping", "mappings", "list", "mixed", "chat"})


@dataclass(frozen=True)
class Slot:
    """One column of a layout."""

    ours: str
    holds: frozenset[str]
    names: tuple[str, ...] = ()
    """What others call it, the likeliest first."""
    also: tuple[str, ...] = ()
    """Other names that the layout reads by itself where there is no column of ours, in its order."""
    likeliest: tuple[str, ...] = ()
    """Of `ours` and `also` the order in which they are likely what is meant, where it is another."""
    optional: bool = False
    fixed: bool = False
    """Whether `columns` cannot rename it."""
    few_values: bool = False
    """Whether it names classes: few different values, short ones."""
    by_position: bool = False
    """Whether it is looked for by what it holds where columns have no names."""
    in_order: bool = False
    """Whether it is then the first text, and not the longest."""


@dataclass(frozen=True)
class Form:
    """One of the forms that a layout reads."""

    layout: str
    slots: tuple[Slot, ...]

    @property
    def needed(self) -> list[Slot]:
        return [slot for slot in self.slots if not slot.optional]


TEXT_NAMES = tuple(
    "text content sentence document body article review passage tweet comment utterance description headline news markdown code "
    "page content_text raw_text clean_text sms message post story abstract summary title".split()
)
LABEL_NAMES = tuple(
    "label labels category intent class sentiment topic target tag emotion label_text label_name class_index coarse_label "
    "fine_label rating stars stance y gold gold_label annotation".split()
)
QUESTION_NAMES = tuple("question prompt query problem user human task ask q goal user_input instructions".split())
ANSWER_NAMES = tuple(
    "response answer completion solution reply target assistant gpt a responses answer_text model_output assistant_response "
    "best_answer output_text generation".split()
)
SYSTEM = Slot("system", TEXTS, ("system_prompt", "system_message", "system_text"), optional=True)
TOOLS = (Slot("tools", ANYTHING, optional=True), Slot("functions", ANYTHING, optional=True))
HISTORY = Slot("history", frozenset({"pairs", "nothing"}), optional=True)
INPUT = Slot("input", TEXTS, ("context",), optional=True)
INSTRUCTION = Slot("instruction", TEXTS, QUESTION_NAMES, by_position=True)
ALPACA_PROMPT = (INSTRUCTION, INPUT, HISTORY, SYSTEM)
MARGIN = Slot("margin", frozenset({"number", "binary"}), ("score_difference", "score_diff"), optional=True)
CHAT_NAMES = ("conversation", "dialog", "dialogue", "chat", "turns", "prompt", "data", "trajectory")
RATING = Slot(
    "label",
    frozenset({"truth", "binary", "truth_text"}),
    (
        "rating",
        "reward",
        "thumbs_up",
        "good",
        "is_good",
        "desirable",
        "score",
        "feedback",
        "completion_label",
        "accepted",
        "kto_tag",
    ),
)
LABEL = Slot("label", LABELS, LABEL_NAMES, few_values=True, by_position=True)
FIRST_NAMES = tuple("sentence1 premise question1 text1 sentence_1 text_1 text_a sentence_a sentence query s1 a".split())
SECOND_NAMES = tuple("sentence2 hypothesis question2 text2 sentence_2 text_2 text_b sentence_b passage s2 b".split())
CHOICE = Slot(
    "preference",
    LABELS,
    ("winner", "better", "preferred", "choice", "overall_preference", "verdict", "better_response_id", "label"),
)
FIRST_JUDGED = tuple("response_1 answer_1 completion_1 response_a answer_a output_a response1".split())
SECOND_JUDGED = tuple("response_2 answer_2 completion_2 response_b answer_b output_b response2".split())
JUDGED = (Slot("output_1", TEXTS | TURNS, FIRST_JUDGED), Slot("output_2", TEXTS | TURNS, SECOND_JUDGED), CHOICE)
COUNTED_FROM_0 = (
    Slot("output_1", TEXTS, ("response_0", "answer_0")),
    Slot("output_2", TEXTS, ("response_1", "answer_1")),
)
CONVERSATIONS = (
    Slot("output_1", TURNS, ("conversation_a", "conversation_1", "messages_a", "messages_1")),
    Slot("output_2", TURNS, ("conversation_b", "conversation_2", "messages_b", "messages_2")),
)
PAIRS = (
    Slot("chosen", TEXTS | TURNS, ("preferred", "better", "response_chosen", "accepted", "win", "chosen_response")),
    Slot(
        "rejected",
        TEXTS | TURNS,
        ("dispreferred", "worse", "response_rejected", "refused", "lose", "rejected_response"),
    ),
    MARGIN,
)

FORMS: tuple[Form, ...] = (
    Form("text", (Slot("text", TEXTS, TEXT_NAMES, by_position=True),)),
    Form("alpaca", (*ALPACA_PROMPT, Slot("output", TEXTS, ANSWER_NAMES, by_position=True))),
    Form("alpaca", (INSTRUCTION, Slot("instances", frozenset({"instances"})), SYSTEM)),
    Form("messages", (Slot("messages", frozenset({"chat"}), CHAT_NAMES), SYSTEM, *TOOLS)),
    Form("sharegpt", (Slot("conversations", frozenset({"chat"}), fixed=True), SYSTEM, *TOOLS)),
    Form("rated_chat", (Slot("messages", frozenset({"chat"}), ("conversations", *CHAT_NAMES)), RATING, SYSTEM, *TOOLS)),
    Form(
        "rated_chat",
        (
            Slot(
                "messages",
                TEXTS | TURNS,
                ("conversations", "prompt", "context", "question", "instruction", *CHAT_NAMES),
            ),
            Slot("answer", TEXTS | TURNS, ("completion", "generation", "response", "output", "reply")),
            RATING,
            SYSTEM,
            *TOOLS,
        ),
    ),
    Form(
        "prompts",
        (
            Slot("prompt", frozenset({"asked", "turn"}) | TEXTS, ("messages", "conversations", *QUESTION_NAMES)),
            HISTORY,
            SYSTEM,
            *TOOLS,
        ),
    ),
    Form("prompts", (Slot("instruction", TEXTS), INPUT, HISTORY, SYSTEM, *TOOLS)),
    Form("preference_alpaca", (*ALPACA_PROMPT, *PAIRS)),
    Form(
        "preference_alpaca",
        (*ALPACA_PROMPT, Slot("output", frozenset({"texts"}), ("responses", "answers", "completions"))),
    ),
    Form("preference_between", (*ALPACA_PROMPT, *JUDGED)),
    Form(
        "preference_between",
        (Slot("messages", TEXTS | TURNS, ("context", *QUESTION_NAMES, *CHAT_NAMES)), *JUDGED, SYSTEM),
    ),
    Form("preference_between", (*ALPACA_PROMPT, *COUNTED_FROM_0, CHOICE)),
    Form("preference_between", (*CONVERSATIONS, CHOICE, SYSTEM)),
    Form("preference_chat", (*PAIRS, SYSTEM, *TOOLS)),
    Form(
        "preference_chat",
        (
            Slot(
                "messages",
                TEXTS | TURNS,
                (*QUESTION_NAMES, *CHAT_NAMES),
                also=("conversations", "prompt"),
                likeliest=("prompt", "conversations", "messages"),
            ),
            *PAIRS,
            SYSTEM,
            *TOOLS,
        ),
    ),
    Form(
        "unpaired_preference",
        (
            Slot("prompt", TEXTS | TURNS, ("messages", "conversations", "context", *QUESTION_NAMES, *CHAT_NAMES)),
            Slot("completion", TEXTS | TURNS, ("answer", "generation", "response", "output", "reply")),
            RATING,
            SYSTEM,
            *TOOLS,
        ),
    ),
    Form(
        "unpaired_preference",
        (
            INSTRUCTION,
            Slot("input", TEXTS),
            HISTORY,
            Slot("completion", TEXTS, ("output", *ANSWER_NAMES)),
            RATING,
            SYSTEM,
        ),
    ),
    Form(
        "unpaired_preference",
        (Slot("messages", frozenset({"chat"}), ("conversations", *CHAT_NAMES)), RATING, SYSTEM, *TOOLS),
    ),
    Form(
        "rated_answer",
        (
            Slot("prompt", TEXTS | TURNS, ("messages", "conversations", "context", *QUESTION_NAMES, *CHAT_NAMES)),
            Slot("completion", TEXTS | TURNS, ("answer", "generation", "response", "output", "reply")),
            Slot("ratings", frozenset({"mapping"}), ("scores", "attributes")),
            SYSTEM,
            *TOOLS,
        ),
    ),
    Form(
        "stepwise",
        (
            Slot("prompt", TEXTS | TURNS, QUESTION_NAMES),
            Slot("completions", frozenset({"texts"}), ("steps",)),
            Slot("labels", frozenset({"list", "numbers"}), ("step_labels",)),
            SYSTEM,
        ),
    ),
    Form("math_shepherd", (Slot("input", TEXTS, fixed=True), Slot("label", TEXTS, fixed=True))),
    Form(
        "prm800k",
        (Slot("question", frozenset({"mapping"}), fixed=True), Slot("label", frozenset({"mapping"}), fixed=True)),
    ),
    Form(
        "label", (Slot("text", TEXTS | {"pieces"}, (*TEXT_NAMES, "question", "query", "data"), by_position=True), LABEL)
    ),
    Form(
        "label",
        (
            Slot("text", TEXTS, FIRST_NAMES, by_position=True, in_order=True),
            Slot("text_pair", TEXTS, SECOND_NAMES, by_position=True, in_order=True),
            LABEL,
        ),
    ),
    Form(
        "relation",
        (
            Slot("tokens", frozenset({"texts"}), ("token", "words")),
            Slot("head", frozenset({"entity"}), ("h", "subject")),
            Slot("tail", frozenset({"entity"}), ("t", "object")),
            Slot("label", LABELS, ("relation", "key", *LABEL_NAMES)),
        ),
    ),
    Form(
        "spans",
        (
            Slot("text", TEXTS, TEXT_NAMES),
            Slot("spans", frozenset({"spans"}), ("entities", "label", "labels", "annotations", "ner", "ents")),
        ),
    ),
    Form(
        "bio",
        (
            Slot("tokens", frozenset({"texts", "tags"}), ("words", "token", "text", "sentence")),
            Slot(
                "tags",
                frozenset({"tags"}),
                ("ner_tags", "labels", "ner", "bio", "bio_tags", "tag", "label", "ner_labels"),
            ),
        ),
    ),
    Form("pieces", (Slot("pieces", frozenset({"pieces"}), ("data", "text", "utterance", "segments")),)),
    Form("squad", (Slot("data", frozenset({"documents"})),)),
    Form("squad", (Slot("paragraphs", frozenset({"documents"})),)),
    Form("squad", (Slot("context", TEXTS), Slot("qas", frozenset({"documents"})))),
    Form(
        "squad",
        (
            Slot("context", TEXTS, ("passage", "document", "paragraph", "review", "article", "text")),
            Slot("question", TEXTS, ("query",)),
            Slot("answers", frozenset({"answers", "nothing"}), ("answer",)),
            Slot("is_impossible", frozenset({"truth", "binary", "truth_text"}), optional=True, fixed=True),
        ),
    ),
)
"""A layout whose own names of columns are not here is proposed only where the data has these names."""

IDENTITIES = frozenset({"id", "idx", "index", "_id", "uid", "uuid", "guid", "qid", "row_id", "example_id", ""})
"""Names of columns that tell rows apart and say nothing."""
GROUPS = ("conversation_id", "dialogue_id", "dialog_id", "group", "thread_id", "session_id", "doc_id", "document_id")
"""Names of columns whose rows belong on one side of the held-out split."""
CARRIED = (
    "answer",
    "ground_truth",
    "solution",
    "reward_model.ground_truth",
    "target",
    "label",
    "reference",
    "expected_answer",
)
"""Names of columns that a completion is compared with."""


def forms_of(layout: str) -> list[Form]:
    """The forms of a layout, as far as it has their columns; of an unknown one a form of its own names."""
    known = LAYOUTS[layout]
    columns = {*known.columns, *known.also}
    found = [form for form in FORMS if form.layout == layout and all(slot.ours in columns for slot in form.needed)]
    return found or [Form(layout, tuple(Slot(name, TEXTS | ANYTHING | LABELS) for name in known.columns))]


def plain_name(name: str) -> str:
    """The name in lower case with underscores, as names are compared: `Class Index` is class_index."""
    return re.sub(r"[^a-z0-9]+", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()).strip("_")


@dataclass(frozen=True)
class Matched:
    """Which column stands for which of a layout's, and how sure that is."""

    form: Form
    columns: dict[str, str] = field(default_factory=dict)
    """Ours -> the name in the data."""
    strength: float = 0.0
    """How well the names of needed columns are known: 1 for our own."""
    missing: tuple[Slot, ...] = ()
