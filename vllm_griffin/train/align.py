"""Which slots a pass trains on: GRIFFIN's token-alignment mask (arXiv 2502.11018, equation 3).

Pass n (counted from 0) stands for the draft's step n + 1 after the target's last token. It trains on a slot
only if every drafted token that leads to it was among the draft's top k. With hit_j[t] = 1 where the true
token x_{t+2} is in the top k of pass j at slot t, and m_0 the slots at which decoding can stand:

    m_n[t] = m_0[t] * hit_{n-1}[t-1] * hit_{n-2}[t-2] * ... * hit_0[t-n]       (paper)

within one document; n slots are lost at the start of every answer. The published code differs: it asks
whether the slot's own token was hit by the pass before, takes hits from prompts, and rolls around the end:

    m_n[t] = answer[t] * hit_{n-1}[t] * hit_{n-2}[t-1] * ... * hit_0[t-n+1]    (published)
"""

from typing import get_args

import torch
from torch import Tensor

from vllm_griffin.data.batch import Batch
from vllm_griffin.train.settings import Reading


class Alignment:
    """The masks of successive passes over one batch.

    Attributes:
        mask: [T] bool, the slots that the current pass trains on.
        ranked: [T] bool, the slots whose rank `advance` looks at.
    """

    def __init__(self, batch: Batch, reading: Reading = "paper", top_k: int = 3) -> None:
        """`top_k` is the k of "top k"; 0 takes every token as hit, which is training without mask (HASS).

        Raises:
            ValueError: An unknown reading.
        """
        if reading not in get_args(Reading):
            raise ValueError(f"mask {reading!r} is not one of {', '.join(get_args(Reading))}")
        self._published = reading == "published"
        self._top_k = top_k
        self._base = batch.answer if self._published else batch.drafted
        self._starts = batch.starts
        self._first = batch.positions == 0
        self._hits: Tensor | None = None  # published: the product so far, without the base
        self.mask = self._base

    @property
    def ranked(self) -> Tensor:
        """[T] bool: the published mask counts hits on all slots, the paper's only where it trains."""
        return torch.ones_like(self.mask) if self._published and self._top_k else self.mask

    def advance(self, rank: Tensor) -> None:
        """Go to the next pass.

        Args:
            rank: [T] how many of this pass's logits lie above the true token's; looked at where `ranked`.
        """
        hits = rank < self._top_k if self._top_k else torch.ones_like(self.mask)
        if not self._published:
            # The roll wraps around and crosses documents; a document's first slot has no slot before it.
            self.mask = torch.roll(self.mask & hits, 1, dims=0) & ~self._first & self._base
        elif self._top_k:
            self._hits = hits if self._hits is None else hits & self._roll(self._hits)
            self.mask = self._hits & self._base

    def _roll(self, x: Tensor) -> Tensor:
        """[T] one slot later; a document's last slot comes to its first."""
        rolled = torch.roll(x, 1, dims=0)
        starts = torch.tensor(self._starts, device=x.device)
        rolled[starts[:-1]] = x[starts[1:] - 1]
        return rolled
