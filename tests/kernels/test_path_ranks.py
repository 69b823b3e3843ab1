"""Depths and sibling ranks: plain Python, the torch reference and the Triton kernel agree."""

import random

import pytest
import torch

from vllm_griffin.kernels.path_ranks import path_ranks_reference, path_ranks_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPS = [path_ranks_reference, path_ranks_triton]


def build(seed: int, n: int, batch: int, max_path: int) -> tuple[dict[str, torch.Tensor], list]:
    """Random trees with a random path in each, and what is expected of them."""
    rng = random.Random(seed)
    slots = batch + 2
    parents = [[-1, *(rng.randrange(c) for c in range(1, n + 1))] for _ in range(slots)]
    depths = [[0] * (n + 1) for _ in range(slots)]
    for tree, depth in zip(parents, depths, strict=True):
        for row in range(1, n + 1):
            depth[row] = depth[tree[row]] + 1
    num_nodes = [rng.choice([0, n, n]) for _ in range(slots)]
    idx_mapping = rng.sample(range(slots), batch)
    num_rows = [rng.choice([1, 1 + rng.randrange(n + 1), 1 + n]) for _ in range(batch)]
    paths, expected = [], []
    for slot, rows in zip(idx_mapping, num_rows, strict=True):
        verified = range(1, rows if num_nodes[slot] else 1)
        path, ranks = [0], []
        while len(path) < max_path:
            siblings = [row for row in verified if parents[slot][row] == path[-1]]
            if not siblings or rng.random() < 0.1:
                break
            path.append(rng.choice(siblings))
            ranks.append(1 + siblings.index(path[-1]))
        deepest = max((depths[slot][row] for row in verified), default=0)
        paths.append(path + [0] * (max_path - len(path)))
        expected.append([rows - 1, deepest, *ranks, *[0] * (max_path - len(path))])
    inputs = {
        "path": torch.tensor(paths).int(),
        "cu_num_logits": torch.tensor([0, *num_rows]).cumsum(0).int(),
        "idx_mapping": torch.tensor(idx_mapping),
        "parents": torch.tensor(parents).int(),
        "depths": torch.tensor(depths).int(),
        "num_nodes": torch.tensor(num_nodes).int(),
    }
    return {name: x.to(DEVICE) for name, x in inputs.items()}, expected


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("n", "batch", "max_path"), [(1, 3, 2), (7, 8, 7), (12, 5, 3), (59, 6, 7), (130, 4, 20)]
)
def test_ranks_are_those_among_the_verified_siblings(op, n, batch, max_path):
    for seed in range(4):
        inputs, expected = build(seed, n, batch, max_path)
        found = op(**inputs)
        assert found.dtype == torch.int64
        assert found.tolist() == expected


@pytest.mark.parametrize("op", OPS)
def test_an_example(op):
    #      0
    #    1   2        row 1 is the spine; 3 is trimmed away, with it depth 2 below row 2
    #        3
    inputs, _ = build(0, 3, 1, 4)
    inputs["parents"][:], inputs["depths"][:] = torch.tensor([[-1, 0, 0, 2], [0, 1, 1, 2]])
    inputs["num_nodes"][:] = 3
    inputs["path"] = inputs["path"].new_tensor([[0, 2, 0, 0]])
    inputs["cu_num_logits"] = inputs["cu_num_logits"].new_tensor([0, 3])
    assert op(**inputs).tolist() == [[2, 1, 2, 0, 0]]
    inputs["num_nodes"][:] = 0
    inputs["path"][:] = 0
    assert op(**inputs).tolist() == [[2, 0, 0, 0, 0]]
