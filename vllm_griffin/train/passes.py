"""Several forwards over one sequence, as decoding will see it (HASS's context alignment, in GRIFFIN).

Pass 0 sees the target's features. Pass n sees at slot t what drafting sees n steps after the last
verified token: the target's features up to slot t - n, then what pass 0 regressed for slot t - n + 1, ...,
what pass n - 1 regressed for slot t. Tokens are always those of the document.

Legend of shapes: T slots, h hidden size, nh heads, d head size, S feature sets so far.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vllm_griffin.train.network import Draft, causal_attention
from vllm_griffin.train.settings import AttentionForm


def feed_back(regress: Tensor, features: Tensor, positions: Tensor) -> Tensor:
    """The features of the next pass: `regress` one slot later, detached.

    A document's first slot has nothing before it and keeps the target's feature. Both inputs [T, h].
    """
    shifted = regress.detach().roll(1, dims=0)
    return torch.where((positions == 0)[:, None], features, shifted)


def multi_pass(
    draft: Draft,
    features: Tensor,
    tokens: Tensor,
    positions: Tensor,
    starts: Sequence[int],
    passes: int,
    attention: AttentionForm = "proper",
    checkpointing: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (predict, regress), each [T, h], of pass 0, 1, ... over packed documents.

    Fusion, keys and values of a feature set are computed once and
    serve all later passes, whose gradients reach them; only the fed features are detached.

    Args:
        draft, features, tokens, positions, starts: As for `Draft.forward`.
        passes: How many.
        attention: "proper" is the softmax that decoding uses. "published" is what the published code trains
            steps of several passes with (HASS's, too): hidden columns stay in the softmax with score 0, so
            that the weights of the others sum to less than 1.
        checkpointing: Keep only each pass's inputs, keys and values for the backward pass, which computes the
            rest again.

    Raises:
        ValueError: An unknown form of attention.
    """
    if attention not in get_args(AttentionForm):
        raise ValueError(
            f"attention {attention!r} is not one of {', '.join(get_args(AttentionForm))}"
        )
    # The published one-pass trainer is another network, with the ordinary mask.
    published = attention == "published" and passes > 1
    run = partial(checkpoint, use_reentrant=False) if checkpointing else _call
    keys: list[Tensor] = []
    values: list[Tensor] = []
    fed = features
    for n in range(passes):
        fused = run(draft.fuse, fed, tokens)
        q, k, v = run(draft.project, fused, positions)
        keys.append(k)
        values.append(v)
        attended = (
            causal_attention(q, k, v, starts)
            if n == 0 and not published
            else run(aligned_attention, q, list(keys), list(values), starts, published)
        )
        predict, regress = run(draft.finish, fused, attended)
        yield predict, regress
        fed = feed_back(regress, features, positions)


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def aligned_attention(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    starts: Sequence[int],
    published: bool = False,
) -> Tensor:
    """Attention of the last feature set over all S = n + 1 sets, one softmax over all of them.

    Slot t sees set 0 (the target's features) at slots up to t - n and set j >= 1 at slot t - (n - j)
    alone. A column before the document's start does not exist.

    Args:
        q: [nh, T, d] queries of set n.
        keys, values: S tensors [nh, T, d].
        starts: Offsets of the documents.
        published: Keep the hidden columns in the softmax, see `multi_pass`.

    Returns:
        [nh, T, d].
    """
    parts = []
    for a, b in itertools.pairwise(starts):
        ks, vs = [k[:, a:b] for k in keys], [v[:, a:b] for v in values]
        parts.append(_aligned_document(q[:, a:b], ks, vs, published))
    return torch.cat(parts, dim=1)


def _aligned_document(
    q: Tensor, keys: list[Tensor], values: list[Tensor], published: bool
) -> Tensor:
    n, length = len(keys) - 1, q.shape[1]
    slot = torch.arange(length, device=q.device)
    hidden = (slot[:, None] - slot[None, :]) < n
    base = (q @ keys[0].transpose(1, 2)).masked_fill(hidden, float("-inf"))
    columns, shifted_values = [base], []
    for j in range(1, n + 1):
        lag = n - j
        score = (q * keys[j].roll(lag, dims=1)).sum(-1, keepdim=True)
        columns.append(score.masked_fill((slot < lag)[:, None], float("-inf")))
        shifted_values.append(values[j].roll(lag, dims=1))
    scores = torch.cat(columns, dim=-1).float() * q.shape[-1] ** -0.5
    if published:
        # Slot t sees t + 1 of the document's length + 1 columns (its tokens); each of the others is exp(0).
        others = (length - slot).float().log()
        scores = torch.cat([scores, others[:, None].expand(len(q), -1, 1)], dim=-1)
    weights = scores.softmax(-1).to(q.dtype)
    out = weights[..., :length] @ values[0]
    for j, value in enumerate(shifted_values):
        out = out + weights[..., length + j : length + j + 1] * value
    return out
