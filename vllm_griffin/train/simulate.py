"""Acceptance length without an engine: stored greedy outputs replayed through a draft and its tree.

At temperature 0 the target's output does not depend on the draft, so what a tree would have accepted can
be read off the stored tokens and hidden states. The tree is EAGLE-2's, as GRIFFIN uses it (the `top_k`
best children of each of the `top_k` best nodes of a level; of all of them the best `nodes` are verified).

Legend of shapes: B documents, K frontier width, V vocabulary, h hidden size, nh heads, d head size.
"""

import itertools
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from vllm_griffin.train.data import HiddenStates
from vllm_griffin.train.network import Draft


@dataclass
class Replay:
    """Counts over all verify steps: `accepted_at[i]` steps accepted at least i + 1 drafted tokens."""

    steps: int = 0
    accepted: int = 0
    accepted_at: list[int] = field(default_factory=list)

    @property
    def acceptance_length(self) -> float:
        """Tokens per verify step, the bonus token included."""
        return 1 + self.accepted / max(1, self.steps)

    def add(self, accepted: int, depth: int) -> None:
        """Count one verify step of a tree of `depth` levels."""
        self.accepted_at += [0] * (depth - len(self.accepted_at))
        self.steps += 1
        self.accepted += accepted
        for level in range(accepted):
            self.accepted_at[level] += 1


@dataclass
class Level:
    """One level of B trees: candidates [B, n], and which of them were expanded [B, K]."""

    tokens: Tensor
    scores: Tensor
    frontier: Tensor


@dataclass
class Prefix:
    """The draft's state over whole documents: keys and values [B, nh, L, d], outputs [B, L, h]."""

    keys: Tensor
    values: Tensor
    predict: Tensor
    regress: Tensor


@torch.inference_mode()
def replay(
    draft: Draft,
    head: Tensor,
    data: HiddenStates,
    *,
    nodes: int = 59,
    depth: int = 6,
    top_k: int = 10,
    limit: int | None = None,
    batch: int = 16,
) -> Replay:
    """Replay the first `limit` documents of `data`, whose answers must be the target's greedy ones.

    Args:
        draft: The network, with the target's embedding.
        head: [V, h] the target's LM head.
        data: Prompts with greedy answers, and the target's features.
        nodes, depth, top_k: The tree; `top_k` 1 and `nodes` = `depth` is a chain.
        limit: Documents to replay, all by default.
        batch: Documents at one time.
    """
    result = Replay()
    documents = list(range(len(data.tokens)))[:limit]
    groups = [documents[i : i + batch] for i in range(0, len(documents), batch)]
    for group in tqdm(groups, desc=f"replay {nodes},{depth},{top_k}", unit="batch"):
        prefix = _prefix(draft, data, group)
        # The root is the last token that the target has chosen; the first is the answer's first token.
        roots = [data.prompt_len[i] for i in group]
        while True:
            live = [j for j, i in enumerate(group) if roots[j] < len(data.tokens[i]) - 1]
            if not live:
                break
            levels = _grow(draft, head, prefix, torch.tensor(live), roots, depth, top_k)
            pool = torch.cat([level.scores for level in levels], dim=1)
            cut = pool.topk(min(nodes, pool.shape[1]), dim=1).values[:, -1].tolist()
            for row, j in enumerate(live):
                rest = data.tokens[group[j]][roots[j] + 1 :].tolist()
                accepted = _walk(levels, row, cut[row], rest, top_k)
                result.add(accepted, depth)
                roots[j] += accepted + 1
    return result


def _prefix(draft: Draft, data: HiddenStates, group: list[int]) -> Prefix:
    """Run the draft once over all verified slots of some documents, padded at the right."""
    packed = data.batch(group, True)
    fused = draft.fuse(packed.features, packed.tokens)
    q, k, v = draft.project(fused, packed.positions)
    q_padded, k_padded, v_padded = (_pad(x, packed.starts) for x in (q, k, v))
    attended = F.scaled_dot_product_attention(q_padded, k_padded, v_padded, is_causal=True)
    rows = torch.cat(
        [attended[j, :, : b - a] for j, (a, b) in enumerate(_ranges(packed.starts))], dim=1
    )
    predict, regress = draft.finish(fused, rows)
    outputs = [_pad(x[None], packed.starts)[:, 0] for x in (predict, regress)]
    return Prefix(k_padded, v_padded, *outputs)


def _ranges(starts: list[int]) -> list[tuple[int, int]]:
    return list(itertools.pairwise(starts))


def _pad(x: Tensor, starts: list[int]) -> Tensor:
    """[n, T, d] packed -> [B, n, L, d] padded with zeros."""
    width = max(b - a for a, b in _ranges(starts))
    return torch.stack([F.pad(x[:, a:b], (0, 0, 0, width - b + a)) for a, b in _ranges(starts)])


def _grow(
    draft: Draft,
    head: Tensor,
    prefix: Prefix,
    live: Tensor,
    roots: list[int],
    depth: int,
    top_k: int,
) -> list[Level]:
    """Grow the trees of the live documents; the slot before root r is r - 1."""
    at = torch.tensor([roots[j] for j in live.tolist()])
    size = len(live)
    first = (prefix.predict[live, at - 1] @ head.T).log_softmax(-1).topk(top_k, dim=-1)
    everyone = torch.arange(top_k).repeat(size, 1)
    levels = [Level(first.indices, first.values, everyone)]
    features = prefix.regress[live, at - 1][:, None].expand(-1, top_k, -1)
    keys, values = prefix.keys[live], prefix.values[live]
    seen = (torch.arange(keys.shape[2]) < at[:, None])[:, None].expand(-1, top_k, -1)
    for number in range(1, depth):
        last = levels[-1]
        tokens = last.tokens.gather(1, last.frontier)
        scores = last.scores.gather(1, last.frontier)
        fused = draft.fuse(features.flatten(0, 1), tokens.flatten())
        positions = (at + number - 1).repeat_interleave(top_k)
        q, k, v = (
            x.unflatten(1, (size, top_k)).transpose(0, 1) for x in draft.project(fused, positions)
        )
        keys, values = torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)
        seen = torch.cat([seen, torch.eye(top_k, dtype=torch.bool).expand(size, -1, -1)], dim=2)
        attended = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen[:, None])
        predict, regress = draft.finish(fused, attended.transpose(0, 1).flatten(1, 2))
        best = (predict @ head.T).log_softmax(-1).topk(top_k, dim=-1)
        children = (scores.flatten()[:, None] + best.values).view(size, -1)
        frontier = children.topk(top_k, dim=1).indices
        levels.append(Level(best.indices.view(size, -1), children, frontier))
        # A child sees what its parent saw, the parent itself included.
        parents = (frontier // top_k)[..., None]
        seen = seen.gather(1, parents.expand(-1, -1, seen.shape[2]))
        features = regress.view(size, top_k, -1)
        features = features.gather(1, parents.expand(-1, -1, features.shape[2]))
    return levels


def _walk(levels: list[Level], row: int, cut: float, rest: list[int], top_k: int) -> int:
    """How many tokens of `rest` the tree of one document holds, from its root down."""
    parent = 0
    for number, level in enumerate(levels):
        if number == len(rest):
            return number
        first = parent * top_k
        children = level.tokens[row, first : first + top_k].tolist()
        if rest[number] not in children:
            return number
        child = first + children.index(rest[number])
        if level.scores[row, child].item() < cut:
            return number
        expanded = level.frontier[row].tolist()
        if child not in expanded:
            return number + 1
        parent = expanded.index(child)
    return len(levels)
