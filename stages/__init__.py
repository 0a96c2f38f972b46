"""The stages, in the order of the pipeline. A new one is a file `stages/<group>/<kind>.py` and a line here."""

from __future__ import annotations

from pipeline.stage import Stage
from stages.alignment import dpo, grpo, kto, ppo, reinforce_plus_plus, reward, rloo
from stages.compression import distill, quantize
from stages.data import clean, mix, pack, tokenizer
from stages.encoder import annotate, answer, classify, extract
from stages.evaluation import evaluate
from stages.language_model import merge, pretrain, sft

STAGES: dict[str, Stage] = {
    "clean": clean.STAGE,
    "mix": mix.STAGE,
    "tokenizer": tokenizer.STAGE,
    "pack": pack.STAGE,
    "pretrain": pretrain.STAGE,
    "sft": sft.STAGE,
    "merge": merge.STAGE,
    "reward": reward.STAGE,
    "dpo": dpo.STAGE,
    "kto": kto.STAGE,
    "ppo": ppo.STAGE,
    "grpo": grpo.STAGE,
    "rloo": rloo.STAGE,
    "reinforce_plus_plus": reinforce_plus_plus.STAGE,
    "distill": distill.STAGE,
    "quantize": quantize.STAGE,
    "evaluate": evaluate.STAGE,
    "classify": classify.STAGE,
    "extract": extract.STAGE,
    "answer": answer.STAGE,
    "annotate": annotate.STAGE,
}
