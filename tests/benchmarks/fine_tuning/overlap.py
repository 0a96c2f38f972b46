"""BLEU-4 and ROUGE-1, -2 and -L of replies, by the definitions that Chinese fine-tuning tables are made with.

BLEU-4 counts characters, smoothed by method 3 of Chen and Cherry (2014); ROUGE is the F measure over words, of which jieba
makes Chinese ones. Each is the mean over the replies, from 0 to 100; an empty one counts 0.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence

NAMES = ("bleu_4", "rouge_1", "rouge_2", "rouge_l")


def overlap(replies: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """The four means over the pairs of a reply and its reference."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jieba is older than this Python
        import jieba
        from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
        from rouge_chinese import Rouge

    jieba.setLogLevel(logging.WARNING)
    rouge, smoothing = Rouge(), SmoothingFunction().method3
    sums = dict.fromkeys(NAMES, 0.0)
    for reply, reference in zip(replies, references, strict=True):
        words = [" ".join(word for word in jieba.cut(text) if word.strip()) for text in (reply, reference)]
        if not all(words):
            continue
        sums["bleu_4"] += sentence_bleu([list(reference)], list(reply), smoothing_function=smoothing)
        (found,) = rouge.get_scores(*words)
        for name in ("rouge-1", "rouge-2", "rouge-l"):
            sums[name.replace("-", "_")] += found[name]["f"]
    return {name: 100 * value / len(replies) for name, value in sums.items()}
