"""Growth and ordering of trees: obvious loops, torch references and Triton kernels agree."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_griffin.kernels.packed_bits import num_words, unpack_bits
from vllm_griffin.kernels.top_tokens import top_tokens_reference
from vllm_griffin.kernels.tree_growth import (
    AdvancedFrontier,
    advance_frontier_reference,
    advance_frontier_triton,
)
from vllm_griffin.kernels.tree_order import OrderedTree, order_tree_reference, order_tree_triton
from vllm_griffin.tree import TreeGrower

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Ties, impossible children, broken log-probabilities, and values a softmax cannot give.
LOGPROBS = [0.0, -0.5, -0.5, -1.0, -2.25, -math.inf, math.nan, 0.75]


def words_of(members: set[int], words: int) -> list[int]:
    values = [sum(1 << (j % 64) for j in members if j // 64 == w) for w in range(words)]
    return [v - (1 << 64) if v >= 1 << 63 else v for v in values]


def same(actual: tuple, expected: tuple) -> None:
    """Equality of every tensor, kind included."""
    for name, a, b in zip(actual._fields, actual, expected, strict=True):
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name


# ---- one level


def random_level(seed: int, batch: int, frontier: int, children: int, first_bit: int, ties: bool):
    rng = random.Random(seed)
    words = num_words(first_bit + 130)
    shape = (batch, frontier, children)
    torch.manual_seed(seed)
    logprobs = torch.randn(shape).abs().neg()
    if ties:
        logprobs = torch.tensor(rng.choices(LOGPROBS, k=math.prod(shape))).view(shape)
    scores = torch.randn(batch, frontier).abs().neg()
    scores[:, 0] = -math.inf if ties else 0.0
    bits = torch.zeros(batch, frontier, words, dtype=torch.int64)
    for b in range(batch):
        for f in range(frontier):
            seen = {rng.randrange(first_bit) for _ in range(3)} if first_bit else set()
            bits[b, f] = torch.tensor(words_of(seen, words))
    tokens = torch.randint(0, 1000, shape)
    return [x.to(DEVICE) for x in (logprobs, tokens, scores, bits)]


def advance_by_hand(logprobs, tokens, scores, bits, first_bit: int, width: int) -> AdvancedFrontier:
    out = AdvancedFrontier([], [], [], [], [], [])
    children = logprobs.shape[2]
    for b in range(len(scores)):
        candidates = []
        for f in range(scores.shape[1]):
            for lp in logprobs[b, f].tolist():
                lp = lp if lp < 0 else lp * 0  # NaN stays NaN
                score = (scores[b, f] + torch.tensor(lp, device=scores.device)).item()
                candidates.append(-math.inf if math.isnan(score) else score)
        picks = sorted(range(len(candidates)), key=lambda i: (-candidates[i], i))[:width]
        out.scores.append(candidates)
        out.picks.append(picks)
        out.parents.append([i // children for i in picks])
        out.next_scores.append([candidates[i] for i in picks])
        out.tokens.append([int(tokens[b, i // children, i % children]) for i in picks])
        places = unpack_bits(bits[b]).cpu()
        seen = [set(places[i // children].nonzero().flatten().tolist()) for i in picks]
        words = bits.shape[2]
        out.bits.append([words_of(s | {first_bit + r}, words) for r, s in enumerate(seen)])
    dtypes = (torch.float32, torch.int64, torch.float32, torch.int32, torch.int32, torch.int64)
    return AdvancedFrontier(
        *(torch.tensor(x, dtype=d, device=DEVICE) for x, d in zip(out, dtypes, strict=True))
    )


LEVELS = [
    # batch, frontier, children, first_bit, width
    (3, 1, 10, 0, 10),
    (2, 10, 10, 10, 10),
    (2, 4, 3, 60, 12),
    (1, 7, 5, 127, 1),
    (2, 16, 16, 64, 16),
    (1, 1, 1, 63, 1),
]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("batch", "frontier", "children", "first_bit", "width"), LEVELS)
def test_advance_frontier(batch, frontier, children, first_bit, width, ties):
    for seed in range(2):
        x = random_level(seed, batch, frontier, children, first_bit, ties)
        expected = advance_by_hand(*x, first_bit, width)
        same(advance_frontier_reference(*x, first_bit, width), expected)
        same(advance_frontier_triton(*x, first_bit, width), expected)


# ---- the whole tree


def random_pool(rng: random.Random, batch: int, width: int, depth: int, ties: bool):
    """A pool as drafting makes it, level by level, from the frontier's best."""
    tokens, scores, parents, depths = [], [], [], []
    for _ in range(batch):
        t, s, p, d = [], [], [], []
        frontier = [-1]
        for level in range(1, depth + 1):
            first = len(s)
            for node in frontier:
                for _ in range(width):
                    lp = rng.choice(LOGPROBS) if ties else -rng.expovariate(1.0)
                    score = (s[node] if node >= 0 else 0.0) + min(lp, 0.0)
                    s.append(-math.inf if math.isnan(lp) or math.isnan(score) else score)
                    t.append(rng.randrange(10**6))
                    p.append(node)
                    d.append(level)
            frontier = sorted(range(first, len(s)), key=lambda i: (-s[i], i))[:width]
        # A NaN that reaches the ordering: a leaf's, since a child never exceeds its parent.
        if ties:
            s[-1] = math.nan
        tokens.append(t), scores.append(s), parents.append(p), depths.append(d)
    return [
        torch.tensor(tokens, device=DEVICE),
        torch.tensor(scores, device=DEVICE),
        torch.tensor(parents, device=DEVICE).int(),
        torch.tensor(depths[0], device=DEVICE).int(),
    ]


def order_by_hand(
    tokens, scores, parents, depths, n: int, max_depth: int, spine_first: bool
) -> dict[str, list]:
    """One request's tree with sets and dictionaries."""
    scores = [-math.inf if math.isnan(s) else s for s in scores]
    chosen = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:n]
    spine, tip = [], -1
    while spine_first and (children := [i for i in chosen if parents[i] == tip]):
        tip = children[0]
        spine.append(tip)
    nodes = spine + [i for i in chosen if i not in spine]
    row = {-1: 0} | {node: r for r, node in enumerate(nodes, start=1)}
    ancestors = [{0}]
    for r, node in enumerate(nodes, start=1):
        ancestors.append(ancestors[row[parents[node]]] | {r})
    words = num_words(1 + n)
    return {
        "tokens": [tokens[i] for i in nodes],
        "parents": [-1] + [row[parents[i]] for i in nodes],
        "depths": [0] + [depths[i] for i in nodes],
        "scores": [0.0] + [scores[i] for i in nodes],
        "bits": [words_of(a, words) for a in ancestors],
        "spine_len": len(spine),
    }


def expect_tree(
    pool: list[torch.Tensor], n: int, max_depth: int, spine_first: torch.Tensor | None = None
) -> OrderedTree:
    tokens, scores, parents, depths = (x.tolist() for x in pool)
    first = [True] * len(tokens) if spine_first is None else spine_first.tolist()
    trees = [
        order_by_hand(t, s, p, depths, n, max_depth, f)
        for t, s, p, f in zip(tokens, scores, parents, first, strict=True)
    ]
    kinds = {"tokens": torch.int64, "bits": torch.int64, "scores": torch.float32}
    return OrderedTree(
        **{
            name: torch.tensor(
                [t[name] for t in trees], dtype=kinds.get(name, torch.int32), device=DEVICE
            )
            for name in OrderedTree._fields
        }
    )


SHAPES = [
    # batch, width, depth, nodes
    (3, 4, 3, 12),
    (2, 10, 6, 59),
    (2, 10, 6, 64),
    (2, 8, 5, 130),
    (4, 1, 6, 6),
    (2, 3, 4, 1),
    (2, 2, 70, 100),
    (1, 5, 1, 5),
    (1, 4, 3, 36),
]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("batch", "width", "depth", "nodes"), SHAPES)
def test_order_tree(batch, width, depth, nodes, ties):
    pool = random_pool(random.Random(nodes), batch, width, depth, ties)
    expected = expect_tree(pool, nodes, depth)
    same(order_tree_reference(*pool, nodes, depth), expected)
    same(order_tree_triton(*pool, nodes, depth), expected)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("batch", "width", "depth", "nodes"), SHAPES)
def test_order_tree_by_score_where_no_spine_is_needed(batch, width, depth, nodes, ties):
    pool = random_pool(random.Random(nodes), batch, width, depth, ties)
    spine_first = torch.arange(batch, device=DEVICE) % 2 == 1
    expected = expect_tree(pool, nodes, depth, spine_first)
    by_score = expected.scores[~spine_first, 1:]
    assert torch.equal(by_score, by_score.sort(descending=True).values)
    same(order_tree_reference(*pool, nodes, depth, spine_first), expected)
    same(order_tree_triton(*pool, nodes, depth, spine_first), expected)


def test_pool_of_a_few_thousand():
    pool = random_pool(random.Random(0), 1, 24, 5, ties=False)
    assert pool[0].shape[1] > 2000
    same(order_tree_triton(*pool, 200, 5), order_tree_reference(*pool, 200, 5))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**9), st.integers(1, 6), st.integers(1, 6), st.booleans(), st.data())
def test_properties_of_the_order(seed, width, depth, ties, data):
    pool = random_pool(random.Random(seed), 2, width, depth, ties)
    n = data.draw(st.integers(1, pool[0].shape[1]))
    tree = order_tree_reference(*pool, n, depth)
    scores = pool[1].nan_to_num(nan=-math.inf, neginf=-math.inf)
    for b in range(2):
        parents, spine = tree.parents[b].tolist(), int(tree.spine_len[b])
        # Every prefix of the rows is a tree.
        assert all(0 <= parents[c] < c for c in range(1, n + 1))
        # The nodes are N best ones: no score outside is above one inside.
        best = scores[b].sort(descending=True).values[:n]
        assert torch.equal(tree.scores[b, 1:].sort(descending=True).values, best)
        # The spine is a chain of best children, and ends in a leaf.
        assert parents[: spine + 1] == list(range(-1, spine))
        for c in range(1, spine + 1):
            siblings = [r for r in range(1, n + 1) if parents[r] == c - 1]
            assert tree.scores[b, c] == tree.scores[b, siblings].max()
        assert spine not in parents[1:]
        # Bits and depths say what the parents say.
        bits = unpack_bits(tree.bits[b])
        for row in range(1 + n):
            ancestors, at = {row}, row
            while (at := parents[at]) >= 0:
                ancestors.add(at)
            assert set(bits[row].nonzero().flatten().tolist()) == ancestors
            assert int(tree.depths[b, row]) == len(ancestors) - 1


@pytest.mark.parametrize("nodes", [1, 3, 4])
def test_no_tree_is_better_for_a_width_above_its_nodes(nodes):
    """Which is why the engine draws no wider ones, whatever `tree_top_k` says."""
    generator = torch.Generator().manual_seed(nodes)
    # [depth, token of the parent, token]
    logits = torch.randn(3, 40, 40, generator=generator) * 3

    def grow(width: int) -> OrderedTree:
        grower = TreeGrower(3, width, torch.device("cpu"))
        frontier = grower.begin(*top_tokens_reference(logits[0, :1], width))
        for level in logits[1:]:
            logprobs, tokens = top_tokens_reference(level[frontier.tokens[0]], width)
            shape = (1, width, width)
            frontier = grower.advance(frontier, logprobs.view(shape), tokens.view(shape))
        return grower.finish(nodes)

    same(grow(10), grow(nodes))
