"""One document in the draft's eyes: its keys and values, its trees' nodes after them, its best children.

Legend of shapes: K top_k, h hidden size, nh heads, d head size, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_griffin.evaluate.outputs import Output
from vllm_griffin.evaluate.steps import PromptSteps
from vllm_griffin.train.network import Draft, causal_attention

# Tokens of which the best is looked at first, when the best of a vocabulary are sought.
CHUNK = 64


class ReplayedDocument:
    """One output: the draft's keys, values and outputs over its verified slots, and how far it has come.

    Slot t pairs the feature of token t with token t + 1; the tree of root r grows from slot r - 1.
    """

    def __init__(self, draft: Draft, output: Output, features: Tensor) -> None:
        """Run the draft once over the output; `features` [tokens - 1, h] are the target's."""
        self.output = output
        self.record = PromptSteps(output.set, output.id, output.temperature, [])
        self.tokens = output.text + output.tail_token_ids
        # The first root is the answer's first token.
        self.root = self._first = len(output.prompt_token_ids)
        slots = output.end - 1
        fused = draft.fuse(features[:slots], torch.tensor(output.text[1:]))
        q, self.keys, self.values = draft.project(fused, torch.arange(slots))
        attended = causal_attention(q, self.keys, self.values, [0, slots])
        answer = slice(self._first - 1, slots)
        self._predict, self._regress = draft.finish(fused[answer], attended[:, answer])

    @property
    def is_live(self) -> bool:
        """Whether the engine would take another step."""
        return self.root < self.output.end - 1

    def outputs(self) -> tuple[Tensor, Tensor]:
        """(predict, regress) [h] of the slot before the root."""
        row = self.root - self._first
        return self._predict[row], self._regress[row]

    @property
    def answer(self) -> list[int]:
        """What the answer has after the root."""
        return self.output.text[self.root + 1 :]

    @property
    def known(self) -> list[int]:
        """What the target chose after the root, the tail included."""
        return self.tokens[self.root + 1 :]


class Nodes:
    """A document's keys and values before its root, and those of drafted nodes after them."""

    def __init__(self, document: ReplayedDocument, places: int = 0) -> None:
        """With room for nodes at so many `places`; without, nodes are appended."""
        keys, values = document.keys, document.values
        self._before_k, self._before_v = keys[:, : document.root], values[:, : document.root]
        heads, _, size = keys.shape
        self._k = keys.new_zeros(heads, places, size)
        self._v = values.new_zeros(heads, places, size)

    def append(self, k: Tensor, v: Tensor) -> None:
        """One more node [nh, 1, d]."""
        self._k, self._v = torch.cat([self._k, k], dim=1), torch.cat([self._v, v], dim=1)

    def put(self, places: Tensor, k: Tensor, v: Tensor) -> None:
        """Nodes [nh, n, d] at their places."""
        self._k[:, places], self._v[:, places] = k, v

    def attend(self, q: Tensor, seen: Tensor | None = None) -> Tensor:
        """Attention [nh, n, d] over everything before the root and the nodes `seen` [n, t]; None: all."""
        nodes = self._k.shape[1] if seen is None else seen.shape[1]
        there = q @ self._k[:, :nodes].transpose(1, 2)
        if seen is not None:
            there = there.masked_fill(~seen, -math.inf)
        scores = torch.cat([q @ self._before_k.transpose(1, 2), there], dim=-1)
        weights = (scores * q.shape[-1] ** -0.5).softmax(-1)
        split = self._before_k.shape[1]
        return weights[..., :split] @ self._before_v + weights[..., split:] @ self._v[:, :nodes]


@dataclass(frozen=True)
class DraftHead:
    """The LM head that ranks drafted tokens: the target's, or its rows of a reduced vocabulary."""

    # [V_d, h]
    weight: Tensor
    # [V_d] int64, the rows' tokens; None: row = token
    tokens: Tensor | None = None

    @classmethod
    def of(cls, head: Tensor, vocabulary: list[int] | None) -> "DraftHead":
        """The rows of the target's `head` [V, h] that a draft uses; None: all."""
        if vocabulary is None:
            return cls(head)
        tokens = torch.tensor(vocabulary)
        return cls(head[tokens], tokens)


def best_children(predict: Tensor, head: DraftHead, top_k: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities and tokens [rows, K] of the best next tokens of outputs [rows, h]."""
    logits = predict @ head.weight.T
    best, rows = top(logits, top_k)
    tokens = rows if head.tokens is None else head.tokens[rows]
    return best - logits.logsumexp(-1, keepdim=True), tokens


def top(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`logits.topk(k)` of [rows, V], faster: the k best are in the k chunks with the best maxima."""
    rows, size = logits.shape
    chunks = size // CHUNK
    if chunks <= 4 * k or size % CHUNK:
        best = logits.topk(k, dim=-1)
        return best.values, best.indices
    parts = logits.view(rows, chunks, CHUNK)
    picked = parts.amax(-1).topk(k, dim=-1).indices
    pool = parts.gather(1, picked[..., None].expand(-1, -1, CHUNK)).flatten(1)
    best = pool.topk(k, dim=-1)
    places = best.indices
    return best.values, picked.gather(1, places // CHUNK) * CHUNK + places % CHUNK
