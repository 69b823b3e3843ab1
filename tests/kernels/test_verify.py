"""The walk: one tree in plain Python, the torch reference and the Triton kernel agree."""

import random
from collections.abc import Sequence

import pytest
import torch

from vllm_griffin.kernels.verify import Walk, walk_tree_reference, walk_tree_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPS = [walk_tree_reference, walk_tree_triton]


def verify_tree(tokens: Sequence[int], parents: Sequence[int], sampled: Sequence[int]) -> list[int]:
    """Accepted rows of one tree, root first.

    ``tokens[c - 1]`` is the token of row ``c``, ``parents[c]`` its parent's row, ``sampled[c]`` the
    target's draw there.
    """
    path = [0]
    while True:
        here = path[-1]
        matching = (
            c
            for c in range(1, len(parents))
            if parents[c] == here and tokens[c - 1] == sampled[here]
        )
        child = next(matching, None)
        if child is None:
            return path
        path.append(child)


def test_verify_tree_follows_the_draws():
    #      0
    #    1   2        tokens 5, 6; children of 1: tokens 7, 8; child of 4: token 9
    #   3 4
    #     5
    tokens, parents = [5, 6, 7, 8, 9], [-1, 0, 0, 1, 1, 4]
    assert verify_tree(tokens, parents, [5, 8, 0, 0, 9, 1]) == [0, 1, 4, 5]
    assert verify_tree(tokens, parents, [6, 8, 7, 0, 9, 1]) == [0, 2]
    assert verify_tree(tokens, parents, [4, 8, 7, 0, 9, 1]) == [0]
    assert verify_tree([], [-1], [3]) == [0]


def random_trees(rng: random.Random, num_slots: int, n: int) -> dict[str, torch.Tensor]:
    """Trees of few distinct tokens, so that walks are long; rows past num_nodes are stale."""
    parents = [
        [-1, *(rng.randrange(max(0, c - 4), c) for c in range(1, n + 1))] for _ in range(num_slots)
    ]
    return {
        "tokens": torch.tensor([[rng.randrange(3) for _ in range(n)] for _ in range(num_slots)]),
        "parents": torch.tensor(parents, dtype=torch.int32),
        "num_nodes": torch.tensor([rng.choice([0, n // 2, n, n]) for _ in range(num_slots)]).int(),
        "spine_len": torch.tensor([rng.randrange(n + 1) for _ in range(num_slots)]).int(),
        "spine_only": torch.tensor([rng.random() < 0.3 for _ in range(num_slots)]),
    }


def draws(rng: random.Random, tokens: list[int], parents: list[int]) -> list[int]:
    """A draw at every row, mostly the token of one of its children: walks go deep."""
    sampled = []
    for row in range(len(parents)):
        children = [tokens[c - 1] for c in range(1, len(parents)) if parents[c] == row]
        sampled.append(rng.choice([*children * 3, rng.randrange(3)]))
    return sampled


def build(seed: int, n: int, batch: int, max_path: int, with_invalid: bool) -> dict:
    rng = random.Random(seed)
    slots = batch + 3
    x = random_trees(rng, slots, n)
    idx_mapping = rng.sample(range(slots), batch)
    # Full, trimmed, without a tree.
    rows = [rng.choice([1, 1 + rng.randrange(n + 1), 1 + n, 1 + n]) for _ in range(batch)]
    sampled = [
        token
        for slot, num_rows in zip(idx_mapping, rows, strict=True)
        for token in draws(rng, x["tokens"][slot].tolist(), x["parents"][slot].tolist())[:num_rows]
    ]
    x |= {
        "sampled": torch.tensor(sampled),
        "cu_num_logits": torch.tensor([0, *rows]).cumsum(0).int(),
        "idx_mapping": torch.tensor(idx_mapping),
        "invalid": torch.tensor([rng.random() < 0.2 for _ in sampled]),
    }
    x = {name: t.to(DEVICE) for name, t in x.items()}
    return x | {"max_path": max_path, "invalid": x["invalid"] if with_invalid else None}


def walk_one_by_one(x: dict) -> tuple[list[list[int]], list[list[int]]]:
    """`verify_tree` on each request's tree, with the rows it may not accept cut out."""
    paths, drawn = [], []
    cu = x["cu_num_logits"].tolist()
    for b, slot in enumerate(x["idx_mapping"].tolist()):
        sampled = x["sampled"][cu[b] : cu[b + 1]].tolist()
        limit = min(len(sampled) - 1, int(x["num_nodes"][slot]))
        if x["spine_only"][slot]:
            limit = min(limit, int(x["spine_len"][slot]))
        parents = x["parents"][slot, : limit + 1].tolist()
        if x["invalid"] is not None:
            banned = x["invalid"][cu[b] :].tolist()
            parents = [-1 if banned[c] else p for c, p in enumerate(parents)]
        path = verify_tree(x["tokens"][slot, :limit].tolist(), parents, sampled)
        paths.append(path[: x["max_path"]])
        drawn.append([sampled[row] for row in paths[-1]])
    return paths, drawn


def check(walk: Walk, x: dict) -> None:
    paths, drawn = walk_one_by_one(x)
    width = x["max_path"]
    assert walk.num_accepted.tolist() == [len(p) for p in paths]
    assert walk.path.tolist() == [p + [0] * (width - len(p)) for p in paths]
    assert walk.tokens.tolist() == [t + [0] * (width - len(t)) for t in drawn]
    assert (walk.path.dtype, walk.tokens.dtype) == (torch.int32, torch.int64)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("with_invalid", [False, True])
@pytest.mark.parametrize(
    ("n", "batch", "max_path"), [(1, 3, 2), (7, 8, 7), (12, 5, 3), (59, 6, 7), (129, 4, 20)]
)
def test_walk_is_verify_tree(op, with_invalid, n, batch, max_path):
    for seed in range(3):
        x = build(seed, n, batch, max_path, with_invalid)
        check(op(**x), x)


@pytest.mark.parametrize("op", OPS)
def test_empty_request_accepts_nothing(op):
    x = build(0, 7, 3, 4, with_invalid=False)
    cu = x["cu_num_logits"]
    x["cu_num_logits"] = torch.cat([cu[:1], cu[:1], cu[2:], cu[-1:]])
    x["idx_mapping"] = torch.cat([x["idx_mapping"], x["idx_mapping"][:1]])
    walk = op(**x)
    assert walk.num_accepted[[0, -1]].tolist() == [0, 0]
    assert walk.tokens[[0, -1]].sum() == 0


@pytest.mark.parametrize("op", OPS)
def test_spine_only_requests_stay_on_their_spine(op):
    # Two requests, one tree: rows 1 and 2 are the spine, row 3 is the root's other child.
    x = build(0, 3, 2, 4, with_invalid=False)
    x["parents"][:], x["tokens"][:] = torch.tensor([-1, 0, 1, 0]), torch.tensor([5, 6, 7])
    x["num_nodes"][:], x["spine_len"][:], x["spine_only"][:] = 3, 2, False
    x["spine_only"][x["idx_mapping"][1]] = True
    x["cu_num_logits"] = x["cu_num_logits"].new_tensor([0, 4, 8])
    for draws_at_rows, accepted in (([7, 0, 0, 1], [2, 1]), ([5, 6, 1, 0], [3, 3])):
        x["sampled"] = x["sampled"].new_tensor(draws_at_rows * 2)
        assert op(**x).num_accepted.tolist() == accepted


@pytest.mark.parametrize("op", OPS)
def test_lowest_of_equal_siblings_wins(op):
    x = build(0, 3, 1, 3, with_invalid=False)
    x["tokens"][:] = 1
    x["parents"][:] = torch.tensor([-1, 0, 0, 0])
    x["num_nodes"][:], x["spine_only"][:] = 3, False
    x["sampled"], x["cu_num_logits"] = (
        x["sampled"].new_ones(4),
        x["cu_num_logits"].new_tensor([0, 4]),
    )
    assert op(**x).path.tolist() == [[0, 1, 0]]


@pytest.mark.parametrize("seed", range(20))
def test_a_tree_accepts_at_least_its_spine(seed):
    x = build(seed, 12, 6, 13, with_invalid=False)
    tree = walk_tree_reference(**x | {"spine_only": torch.zeros_like(x["spine_only"])})
    spine = walk_tree_reference(**x | {"spine_only": torch.ones_like(x["spine_only"])})
    assert (tree.num_accepted >= spine.num_accepted).all()
