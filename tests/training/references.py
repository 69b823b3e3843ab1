"""What training should compute, as slow loops over positions, tokens of the vocabulary and slots.

Slot t of a document of L tokens (there are L - 1) pairs the target's feature f_t with the token x_{t+1};
its teacher is the target at f_{t+1} and its true token x_{t+2}, which the last slot does not have.
"""

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vllm_griffin.data.documents import Document
from vllm_griffin.train.network import Draft, NetworkConfig

# ---------------------------------------------------------------------------------------------- losses


def distribution(logits: Sequence[Tensor]) -> list[Tensor]:
    """Softmax of a list of scalars."""
    top = max(z.item() for z in logits)
    weights = [torch.exp(z - top) for z in logits]
    total = sum(weights)
    return [w / total for w in weights]


def cross_entropy(p: list[float], q: list[Tensor]) -> Tensor:
    """-sum_v p_v log q_v."""
    return -sum(a * torch.log(b) for a, b in zip(p, q, strict=True))


def top_ten_term(p: list[float], q: list[Tensor]) -> Tensor:
    """The cross-entropy of the teacher's ten best tokens alone, not renormalised."""
    best = sorted(range(len(p)), key=lambda v: -p[v])[:10]
    return -sum(p[v] * torch.log(q[v]) for v in best)


def total_variation(p: list[float], q: list[Tensor]) -> Tensor:
    """1 - sum_v min(p_v, q_v)."""
    return 1 - sum(b if b.item() < a else torch.full_like(b, a) for a, b in zip(p, q, strict=True))


def advantage_over_draft(p: list[float], q: list[Tensor]) -> Tensor:
    """TVD++ with mean and deviation of the reward 1[p >= q] under the draft's distribution."""
    frozen = [b.item() for b in q]
    reward = [1.0 if a >= b else 0.0 for a, b in zip(p, frozen, strict=True)]
    mean = sum(b * r for b, r in zip(frozen, reward, strict=True))
    variance = sum(b * (r - mean) ** 2 for b, r in zip(frozen, reward, strict=True))
    scale = math.sqrt(variance) + 1e-5
    return -sum(
        f * (r - mean) / scale * torch.log(b) for f, r, b in zip(frozen, reward, q, strict=True)
    )


def advantage_over_vocabulary(p: list[float], q: list[Tensor]) -> Tensor:
    """TVD++ with plain mean and unbiased deviation of the reward 1[p > q] over the vocabulary."""
    reward = [1.0 if a > b.item() else 0.0 for a, b in zip(p, q, strict=True)]
    mean = sum(reward) / len(reward)
    variance = sum((r - mean) ** 2 for r in reward) / (len(reward) - 1)
    scale = math.sqrt(variance) + 1e-5
    return sum(-(r - mean) / scale * torch.log(b) for r, b in zip(reward, q, strict=True)) / len(q)


def head_losses(
    predict: Tensor, wanted: Tensor, head: Tensor, weights: dict[str, float], averaged: str
) -> Tensor:
    """Weighted sum of the terms per slot [T] in float64, differentiable in `predict`.

    `weights` has the keys token, top, tvd, tvd_plus; `averaged` is the set of TVD++.
    """
    losses = []
    for t in range(len(predict)):
        z = [(row.double() * predict[t].double()).sum() for row in head]
        teacher = [(row.double() * wanted[t].double()).sum() for row in head]
        p, q = [float(x) for x in distribution(teacher)], distribution(z)
        loss = torch.zeros((), dtype=torch.float64)
        if weights.get("token"):
            loss = loss + weights["token"] * cross_entropy(p, q)
        if weights.get("top"):
            loss = loss + weights["top"] * top_ten_term(p, q)
        if weights.get("tvd"):
            loss = loss + weights["tvd"] * total_variation(p, q)
        if weights.get("tvd_plus"):
            plus = advantage_over_draft if averaged == "draft" else advantage_over_vocabulary
            loss = loss + weights["tvd_plus"] * plus(p, q)
        losses.append(loss)
    return torch.stack(losses) if losses else predict.double().sum(-1)


def ranks(predict: Tensor, head: Tensor, labels: Sequence[int]) -> list[int]:
    """How many tokens the draft likes better than the true one; all of them where there is none."""
    result = []
    for x, label in zip(predict, labels, strict=True):
        z = [(row.double() * x.double()).sum().item() for row in head]
        result.append(len(z) if label < 0 else sum(score > z[label] for score in z))
    return result


def agreements(predict: Tensor, wanted: Tensor, head: Tensor) -> list[bool]:
    """Whether draft and target like the same token best."""
    result = []
    for x, y in zip(predict, wanted, strict=True):
        z = [(row.double() * x.double()).sum().item() for row in head]
        teacher = [(row.double() * y.double()).sum().item() for row in head]
        result.append(z.index(max(z)) == teacher.index(max(teacher)))
    return result


def smooth_l1(regress: Tensor, wanted: Tensor) -> list[float]:
    """Mean over channels of d^2 / 2 below 1 and |d| - 1/2 above."""
    result = []
    for x, y in zip(regress.tolist(), wanted.tolist(), strict=True):
        gaps = [abs(a - b) for a, b in zip(x, y, strict=True)]
        result.append(sum(g * g / 2 if g < 1 else g - 0.5 for g in gaps) / len(gaps))
    return result


# ----------------------------------------------------------------------------------------------- masks


def is_answer(document: Document, index: int, everything: bool = False) -> bool:
    """Whether token x_index is the assistant's."""
    return everything or any(a <= index < b for a, b in document.answer)


def is_drafted(document: Document, slot: int, everything: bool = False) -> bool:
    """Whether decoding can stand at a slot: its token and the next, if there is one, are answers."""
    end = len(document.tokens)
    return is_answer(document, slot + 1, everything) and (
        slot + 2 == end or is_answer(document, slot + 2, everything)
    )


def paper_mask(document: Document, hits: list[list[bool]], n: int) -> list[bool]:
    """Slots of one document that pass n trains on by the paper: decoding stood at slot t - n, went on
    to t, and each token on the way, x_{t-n+2} to x_{t+1}, was a hit of its pass."""
    mask = []
    for t in range(len(document.tokens) - 1):
        whole = t >= n and all(is_drafted(document, s) for s in range(t - n, t + 1))
        mask.append(whole and all(hits[j][t - n + j] for j in range(n)))
    return mask


def published_mask(document: Document, hits: list[list[bool]], n: int) -> list[bool]:
    """The same by the published code: hit_{n-1}[t] hit_{n-2}[t-1] ... hit_0[t-n+1], wrapping around."""
    slots = len(document.tokens) - 1
    mask = []
    for t in range(slots):
        kept = all(hits[n - 1 - back][(t - back) % slots] for back in range(n))
        mask.append(kept and is_answer(document, t))
    return mask


# ---------------------------------------------------------------------------------------------- passes


def small_draft(seed: int = 0, **changes: object) -> Draft:
    """A draft of a few thousand weights whose attention is far from uniform and whose norms matter."""
    fields: dict = {
        "vocab_size": 30,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    draft = Draft(NetworkConfig(**(fields | changes)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in draft.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            gain = 2.0 if "q_proj" in name or "k_proj" in name else 0.8
            if "layernorm" in name:
                weight.copy_(1 + 0.2 * noise)
            else:
                weight.copy_(gain * noise * weight.shape[-1] ** -0.5)
    return draft


def softmax_over_keys(q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """One query [d] over the listed keys and values [d] -> [d]."""
    scores = [(q * k).sum() / math.sqrt(len(q)) for k in keys]
    return sum(w * v for w, v in zip(distribution(scores), values, strict=True))


def fed_features(features: Tensor, regress: list[list[Tensor]], t: int, n: int) -> Tensor:
    """What drafting has read at slots 0 to t when slot t is its step n after the verified text.

    Target features up to slot t - n; from there on what pass j - 1 regressed one slot earlier, j = 1 to
    n. A document's first slot has nothing before it and keeps the target's.
    """
    rows = []
    for s in range(t + 1):
        j = n - (t - s)
        rows.append(features[s] if j <= 0 or s == 0 else regress[j - 1][s - 1])
    return torch.stack(rows).detach()


def drafting_slot(
    draft: Draft, fed: Tensor, tokens: Tensor, frozen_context: bool = False
) -> tuple[Tensor, Tensor]:
    """The plain network's (predict, regress) [h] at the last slot of `fed` [t + 1, h].

    With `frozen_context` no gradient passes the keys and values of any slot but the last.
    """
    t = len(fed) - 1
    fused = draft.fuse(fed, tokens[: t + 1])
    q, k, v = draft.project(fused, torch.arange(t + 1))
    heads = []
    for head in range(len(q)):
        keys, values = list(k[head]), list(v[head])
        if frozen_context:
            keys = [x.detach() for x in keys[:-1]] + keys[-1:]
            values = [x.detach() for x in values[:-1]] + values[-1:]
        heads.append(softmax_over_keys(q[head, t], keys, values))
    predict, regress = draft.finish(fused[-1:], torch.stack(heads)[:, None])
    return predict[0], regress[0]


def proper_passes(
    draft: Draft, features: Tensor, tokens: Tensor, passes: int, frozen_context: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """(predict, regress) [T, h] of each pass over one document, one slot at a time."""
    regress: list[list[Tensor]] = []
    for n in range(passes):
        outputs = [
            drafting_slot(draft, fed_features(features, regress, t, n), tokens, frozen_context)
            for t in range(len(tokens))
        ]
        regress.append([r for _, r in outputs])
        yield torch.stack([p for p, _ in outputs]), torch.stack(regress[-1])


def published_passes(
    draft: Draft, features: Tensor, tokens: Tensor, passes: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The published attention over one document, dense: [T, T + 1] scores for every feature set.

    Scores are multiplied by 0/1 masks and summed over the sets; the softmax runs over all T + 1 columns,
    those that no mask shows included; its weights are multiplied by the masks again.
    """
    slots = len(tokens)
    fed, sets = features, []
    for n in range(passes):
        fused = draft.fuse(fed, tokens)
        q, k, v = draft.project(fused, torch.arange(slots))
        sets.append((k, v))
        masks = [_published_columns(slots, n, j) for j in range(n + 1)]
        total = torch.zeros(len(q), slots, slots + 1)
        for mask, (keys, _) in zip(masks, sets, strict=True):
            wide = torch.cat([keys, torch.zeros_like(keys[:, :1])], dim=1)
            total = total + mask * (q @ wide.transpose(1, 2)) / math.sqrt(q.shape[-1])
        weights = total.softmax(-1)
        attended = torch.zeros_like(q)
        for mask, (_, values) in zip(masks, sets, strict=True):
            attended = attended + (weights * mask)[..., :slots] @ values
        predict, regress = draft.finish(fused, attended)
        yield predict, regress
        fed = torch.cat([features[:1], regress[:-1].detach()])


def _published_columns(slots: int, n: int, j: int) -> Tensor:
    """Which of T + 1 columns the rows of pass n see in feature set j, [T, T + 1]."""
    mask = torch.zeros(slots, slots + 1)
    for t in range(slots):
        for s in range(slots):
            mask[t, s] = s <= t - n if j == 0 else s == t - (n - j)
    return mask


def split(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Ranges of packed documents with these numbers of slots."""
    return list(itertools.pairwise([0, *itertools.accumulate(lengths)]))
