"""How one budget of nodes is shared out: by hand, and step by step as vLLM's runner asks."""

import inspect
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.worker.gpu.spec_decode.adaptive_verification import AdaptiveVerificationManager

from vllm_griffin.kernels.tree_order import order_tree_reference
from vllm_griffin.runner.budget import NodeBudget
from vllm_griffin.tree import DraftTrees, share_nodes

WORTH = st.sampled_from([0.0, -0.5, -0.5, -1.0, -2.25, -1e30, -math.inf])


def by_hand(worth: list[list[float]], most: list[int], total: int) -> list[int]:
    """Node by node: always the best that is left, equals to the earlier request and row."""
    nodes = [(-w, b, i) for b, ws in enumerate(worth) for i, w in enumerate(ws[: most[b]])]
    taken = sorted(nodes)[:total]
    return [sum(b == request for _, b, _ in taken) for request in range(len(worth))]


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(1, 5), st.integers(1, 7))
def test_shares_are_of_the_best_nodes(data: st.DataObject, batch: int, nodes: int) -> None:
    worth = data.draw(
        st.lists(st.lists(WORTH, min_size=nodes, max_size=nodes), min_size=batch, max_size=batch)
    )
    most = data.draw(st.lists(st.integers(0, nodes), min_size=batch, max_size=batch))
    total = data.draw(st.integers(0, sum(most)))
    shares = share_nodes(torch.tensor(worth), torch.tensor(most), total).tolist()
    assert sum(shares) == total
    assert all(0 <= share <= limit for share, limit in zip(shares, most, strict=True))
    assert shares == by_hand(worth, most, total)


def test_a_share_is_the_best_subtree() -> None:
    """Of the trees as they are ordered for it, ties and all: no node outside is above one inside."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(-6, 0, (3, 4), generator=generator).float()
    below = scores.repeat_interleave(3, 1) + torch.randint(-3, 1, (3, 12), generator=generator)
    pool = torch.cat([scores, below], 1)
    parents = torch.tensor([-1] * 4 + [i for i in range(4) for _ in range(3)])
    tree = order_tree_reference(
        torch.arange(16).expand(3, -1),
        pool,
        parents.expand(3, -1).int(),
        torch.tensor([1] * 4 + [2] * 12).int(),
        12,
        2,
        torch.zeros(3, dtype=torch.bool),
    )
    trees = DraftTrees(5, 12, torch.device("cpu"))
    slots = torch.tensor([4, 0, 2])
    trees.store(slots, tree, torch.ones(3, dtype=torch.bool))
    shares = share_nodes(trees.worth(slots), torch.full((3,), 12), 18).tolist()
    chosen = torch.cat([tree.scores[b, 1 : 1 + n] for b, n in enumerate(shares)])
    assert len(chosen) == 18
    assert torch.equal(
        chosen.sort(descending=True).values, pool.flatten().sort().values.flip(0)[:18]
    )
    for b, n in enumerate(shares):
        assert all(0 <= int(tree.parents[b, row]) < row for row in range(1, 1 + n))


def test_only_what_can_be_accepted_is_worth_something() -> None:
    trees = DraftTrees(3, 4, torch.device("cpu"))
    trees.scores[:, 1:] = torch.tensor([-1.0, -2.0, -3.0, -4.0])
    trees.num_nodes[:] = torch.tensor([4, 0, 4])
    trees.spine_len[:] = 2
    trees.spine_only[2] = True
    low = -math.inf
    assert trees.worth(torch.tensor([2, 0, 1])).tolist() == [
        [-1.0, -2.0, low, low],
        [-1.0, -2.0, -3.0, -4.0],
        [low] * 4,
    ]


def budget(max_rows: int = 1000) -> NodeBudget:
    """Three nodes a request, trees of 8: slot 0 is sure of its nodes, slot 1 is not, slot 2 has none."""
    trees = DraftTrees(4, 8, torch.device("cpu"))
    trees.scores[0, 1:] = -0.1 * torch.arange(1, 9)
    trees.scores[1, 1:] = -0.35 - torch.arange(8)
    trees.num_nodes[:2] = 8
    return NodeBudget(3, trees, torch.zeros(9, dtype=torch.int32), max_rows)


# scheduled rows, drafts, slots -> rows of drafts; most rows with logits that a chunk takes
STEPS = {
    "by worth": ([9, 9], [8, 8], [1, 0], 1000, [1, 5]),
    "who has no tree gets nothing": ([9, 9, 9], [8, 8, 8], [2, 0, 1], 1000, [0, 8, 1]),
    "no more than was scheduled": ([3, 9], [2, 8], [0, 1], 1000, [2, 3]),
    "a prompt behind": ([9, 9, 40], [8, 8, 0], [0, 1, 3], 1000, [5, 1, 0]),
    "a prompt before drafts": ([9, 12], [8, 8], [0, 1], 1000, [3, 3]),
    "too many rows to spread": ([9, 9], [8, 8], [0, 1], 7, [3, 3]),
    "nothing to choose": ([4, 3], [3, 2], [0, 1], 1000, [3, 2]),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_as_the_runner_asks(name: str) -> None:
    scheduled, drafts, slots, max_rows, nodes = STEPS[name]
    manager = budget(max_rows)
    names = [f"r{i}" for i in range(len(slots))]
    total = manager.get_num_tokens(
        dict(zip(names, scheduled, strict=True)),
        {n: [0] * d for n, d in zip(names, drafts, strict=True) if d},
    )
    expected = [s - d + n for s, d, n in zip(scheduled, drafts, nodes, strict=True)]
    assert total == sum(expected)
    counts = np.cumsum([0, *(1 + d for d in drafts)]).astype(np.int32)
    host, cu_np = manager.compact_batch(
        np.array(drafts, np.int32), np.array(scheduled, np.int32), counts
    )
    # As the runner does.
    np.cumsum(host, out=manager.query_start_loc.numpy()[1 : 1 + len(host)])
    cu, starts, rows = manager.reallocate_drafts(names, torch.tensor(slots))
    assert rows == sum(nodes) == cu_np[-1] - len(nodes)
    assert sum(host) == total
    assert (cu.diff() - 1).tolist() == nodes and cu.dtype == torch.int32
    assert starts[: 1 + len(slots)].diff().tolist() == expected
    if nodes[0] == nodes[-1] == 3:
        assert cu.tolist() == cu_np.tolist()


def test_it_is_called_as_vllms_own_manager() -> None:
    """A method that vLLM calls otherwise would be found by a step that shares nodes only."""
    names = [name for name in vars(NodeBudget) if not name.startswith("_")]
    assert names
    for name in names:
        own, theirs = (
            inspect.signature(getattr(owner, name))
            for owner in (NodeBudget, AdaptiveVerificationManager)
        )
        assert list(own.parameters) == list(theirs.parameters), name
