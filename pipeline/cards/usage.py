"""How a model is used: the lines of Python that a card shows. Tests run each of them on a model that was published."""

from __future__ import annotations

from pipeline.store.artifact import Kind

FOLDER = 'folder = "."  # this folder, or the repository that it was uploaded to\n'


GENERATE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

{folder}tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
"""


CHAT = """\
messages = [{"role": "user", "content": "Good morning! What can you do?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=100)
answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
print(answer)
"""


CONTINUE = """\
inputs = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)
output = model.generate(**inputs, max_new_tokens=100)
answer = tokenizer.decode(output[0], skip_special_tokens=True)
print(answer)
"""


SCORE = """\
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

{folder}tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder)
messages = [
    {{"role": "user", "content": "Good morning! How are you?"}},
    {{"role": "assistant", "content": "Good morning! I am well, thank you. What can I do for you?"}},
]
inputs = tokenizer.apply_chat_template(messages, return_dict=True, return_tensors="pt")
with torch.no_grad():
    {score}
print(score)
"""


SCORE_OF_ONE = "score = model(**inputs).logits[0, 0].item()"


SCORE_OF_HEADS = """\
reading = model.config.slipway_reward  # outputs head by head, of each the attributes
    outputs = model(**inputs).logits[0].float().view(reading["heads"], len(reading["attributes"]))
    scores = outputs @ torch.tensor(reading["weights"])  # one for each head
    score = scores.mean().item()  # how far the heads are apart: scores.std(correction=0)"""


SCORE_STEPS = """\
import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer

{folder}tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForTokenClassification.from_pretrained(folder)
question = [{{"role": "user", "content": "What is 2 * 3 + 4?"}}]
steps = ["2 * 3 = 6.", "6 + 4 = 10."]
ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True)["input_ids"]
ends = []
for step in steps:  # each is read at the last token of the separator behind it
    ids += tokenizer(step + model.config.slipway_reward["step_separator"], add_special_tokens=False)["input_ids"]
    ends.append(len(ids) - 1)
with torch.no_grad():
    logits = model(input_ids=torch.tensor([ids])).logits
right = logits[0, ends].softmax(-1)[:, 1].tolist()  # how probably each step is right
score = min(right)  # or the product, or the last, as model.config.slipway_reward["answer_score"] says
print(score)
"""


PIPELINE = """\
from transformers import pipeline

{folder}task = pipeline("{tag}", model=folder{options})
{call}print(answer)
"""


FILL_MASK = """\
answer = task(f"The {task.tokenizer.mask_token} sat on the mat.")
"""


CLASSIFY = """\
answer = task("Wake me up at seven tomorrow.", truncation=True)
"""


EXTRACT = """\
answer = task("Wake me up at seven tomorrow in Paris.")
"""


READ = """\
import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

{folder}tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForQuestionAnswering.from_pretrained(folder)
question, context = "Who wrote the book?", "The book was written by Jane in the winter of 1811."
inputs = tokenizer(question, context, return_offsets_mapping=True, return_tensors="pt")
offsets = inputs.pop("offset_mapping")[0].tolist()
with torch.no_grad():
    output = model(**inputs)
in_context = [index for index, of in enumerate(inputs.sequence_ids(0)) if of == 1]
scores = {{
    (start, end): float(output.start_logits[0, start] + output.end_logits[0, end])
    for start in in_context
    for end in in_context
    if start <= end < start + 30
}}
start, end = max(scores, key=scores.get)
answer = context[offsets[start][0] : offsets[end][1]]
print(answer)
"""


ADAPTER = """\
from peft import PeftModel
from transformers import {auto_class}

{folder}base = {auto_class}.from_pretrained({base})
model = PeftModel.from_pretrained(base, folder)
"""


OWN_WEIGHTS = """\
from safetensors.torch import load_file
from transformers import {auto_class}

{folder}model = {auto_class}.from_pretrained({base})
model.load_state_dict(load_file(f"{{folder}}/adapter_model.safetensors"), strict=False)  # in place of those of the base
"""


OWN_MODULES = """\
from pathlib import Path

from stages.lib.models.adapters.opening import attached  # of Slipway
from transformers import {auto_class}

{folder}base = {auto_class}.from_pretrained({base})
model = attached(base, Path(folder))
"""


CLASSES = {
    Kind.ENCODER: "AutoModelForMaskedLM",
    Kind.REWARD_MODEL: "AutoModelForSequenceClassification",
    Kind.PROCESS_REWARD_MODEL: "AutoModelForTokenClassification",
    Kind.CLASSIFIER: "AutoModelForSequenceClassification",
    Kind.EXTRACTOR: "AutoModelForTokenClassification",
    Kind.READER: "AutoModelForQuestionAnswering",
}
"""The class of transformers that an adapter's base is opened as, where it is not that of causal models."""


CRITIC = """\
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

{folder}tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder)
inputs = tokenizer("Good morning!", return_tensors="pt", return_token_type_ids=False)
with torch.no_grad():
    values = model.score(model.base_model(**inputs).last_hidden_state)[0, :, 0].tolist()  # one for each token
print(values)
"""


ADAPTED_CRITIC = """\
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel

{folder}base = AutoModel.from_pretrained({base})
body = PeftModel.from_pretrained(base, folder)
head = load_file(f"{{folder}}/value_head.safetensors")["weight"]  # values: body(...).last_hidden_state @ head[0]
"""


OWN_CRITIC = """\
from safetensors.torch import load_file
from transformers import AutoModel

{folder}body = AutoModel.from_pretrained({base})
body.load_state_dict(load_file(f"{{folder}}/adapter_model.safetensors"), strict=False)  # in place of those of the base
head = load_file(f"{{folder}}/value_head.safetensors")["weight"]  # values: body(...).last_hidden_state @ head[0]
"""


def usage(kind: Kind, *, chats: bool, several_outputs: bool = False) -> str:
    """The lines that use a model of this kind; `chats` says whether a causal one has learned to, `several_outputs` whether a
    reward model has more than one.
    """
    match kind:
        case Kind.CAUSAL_LM | Kind.QUANTIZED_LM:
            needs = "" if kind is Kind.CAUSAL_LM else "# pip install compressed-tensors\n"
            return needs + GENERATE.format(folder=FOLDER) + (CHAT if chats else CONTINUE)
        case Kind.REWARD_MODEL:
            return SCORE.format(folder=FOLDER, score=SCORE_OF_HEADS if several_outputs else SCORE_OF_ONE)
        case Kind.PROCESS_REWARD_MODEL:
            return SCORE_STEPS.format(folder=FOLDER)
        case Kind.READER:
            return READ.format(folder=FOLDER)
        case Kind.ENCODER:
            return PIPELINE.format(folder=FOLDER, tag="fill-mask", options="", call=FILL_MASK)
        case Kind.CLASSIFIER:
            return PIPELINE.format(folder=FOLDER, tag="text-classification", options="", call=CLASSIFY)
        case Kind.EXTRACTOR:
            options = ', aggregation_strategy="simple"'
            return PIPELINE.format(folder=FOLDER, tag="token-classification", options=options, call=EXTRACT)
    raise AssertionError(f"{kind} is no model")


def adapter_usage(base: str, kind: Kind | None, *, critic: bool, own: str | None = None) -> str:
    """The lines that put an adapter on its base; `base` is the Python that names the base, with a comment where it must.

    `kind`: of the artifact. `own`: the method of an adapter that peft does not read: weights of the model itself, or modules
    that are put into it.
    """
    if critic:
        return (OWN_CRITIC if own is not None else ADAPTED_CRITIC).format(folder=FOLDER, base=base)
    auto_class = CLASSES.get(kind, "AutoModelForCausalLM") if kind else "AutoModelForCausalLM"
    lines = ADAPTER if own is None else OWN_MODULES if own == "bottleneck" else OWN_WEIGHTS
    return lines.format(folder=FOLDER, base=base, auto_class=auto_class)


def critic_usage() -> str:
    """The lines that ask a critic for its values."""
    return CRITIC.format(folder=FOLDER)
