"""Which slots a pass trains on: GRIFFIN's token-alignment mask (arXiv 2502.11018, equation 3).

Pass n (counted from 0) trains on a slot only if every drafted token that leads to it was among the
draft's top k: with hit_j[t] = 1 where the true token x_{t+2} is in the top k of pass j at slot t,

    m_n[t] = hit_{n-1}[t-1] * hit_{n-2}[t-2] * ... * hit_0[t-n]        within one document,

and n slots are lost at a document's first trained slot: decoding starts at slot p - 1 (p the prompt's
length), so pass n counts only t >= p - 1 + n.
"""

import torch
from torch import Tensor


def first_mask(positions: Tensor, prompt_len: Tensor) -> Tensor:
    """Slots that pass 0 trains on [T], bool: t >= p - 1.

    Args:
        positions: [T] slot numbers within their documents.
        prompt_len: [T] prompt length p >= 1 of each slot's document.
    """
    return positions >= prompt_len - 1


def next_mask(mask: Tensor, hits: Tensor | None, positions: Tensor) -> Tensor:
    """The mask of the next pass [T], bool, from this pass's mask and hits: m_{n+1}[t] = m_n[t-1] hit_n[t-1].

    With `hits` None every slot is taken as hit: training without alignment mask (HASS).
    """
    kept = mask if hits is None else mask & hits
    # The roll wraps around and crosses documents; a document's first slot has no slot before it.
    return torch.roll(kept, 1, dims=0) & (positions > 0)
