"""Attention whose probabilities are dropped by a given mask; torch's own draws one inside its kernel.

B: sequences, H: heads, Q: queries, K: keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def dropped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    drop: Callable[[Tensor], Tensor],
) -> Tensor:
    """drop(softmax(scale q k^T + mask)) v, B x H x Q x dim, as `scaled_dot_product_attention` has it for the same arguments.

    Vaswani et al. (2017), equation 1. The matrix of probabilities lies in memory whole. A query that may see nothing gets the
    mean of all values, where torch's gives 0: nobody reads it.
    """
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scores_BHQK = (query * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)) @ key.transpose(-2, -1)
    if is_causal:
        seen_QK = torch.ones(scores_BHQK.shape[-2:], dtype=torch.bool, device=query.device).tril()
        attn_mask = seen_QK if attn_mask is None else attn_mask
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores_BHQK = scores_BHQK.masked_fill(~attn_mask, torch.finfo(scores_BHQK.dtype).min)
    elif attn_mask is not None:
        scores_BHQK = scores_BHQK + attn_mask
    probabilities_BHQK = scores_BHQK.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
    return drop(probabilities_BHQK) @ value
