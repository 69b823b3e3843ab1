"""Trees whose size goes by batch size: `num_speculative_tokens_per_batch_size`."""

from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch
from vllm import SamplingParams

from tests.engine.harness import Request, engine, random_prompt, run
from tests.engine.oracle import oracle_trees
from tests.engine.ties import assert_lossless, recorded_gaps
from vllm_griffin.evaluate.engine import check_counters
from vllm_griffin.kernels.tree_order import OrderedTree
from vllm_griffin.trace import read_trace
from vllm_griffin.tree import TreeGrower
from vllm_griffin.tree_shape import TreeShape

VOCABULARY = 512
# Two words of bits for the whole tree, one for the smaller ones; no tree from four requests on.
SPEC = {
    "num_speculative_tokens": 70,
    "tree_depth": 6,
    "tree_top_k": 4,
    "num_speculative_tokens_per_batch_size": [[1, 1, 70], [2, 2, 9], [3, 3, 2], [4, 9, 0]],
}


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_sizes_follow_the_batch(tmp_path: Path, async_scheduling: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    requests = []
    for i in range(7):
        sampling = {"temperature": 0} if i % 2 else {"temperature": 1.0, "seed": i}
        params = SamplingParams(
            **sampling, max_tokens=40 + 12 * i, ignore_eos=True, detokenize=False
        )
        prompt = random_prompt(generator, 9 + 5 * i, VOCABULARY)
        requests.append(Request(f"r{i}", prompt, params, arrival=5 * i))
    options = {"async_scheduling": async_scheduling}
    with recorded_gaps() as gaps, engine("golden-a", **options) as llm:
        plain = run(llm, requests)
    texts = {r.name: r.prompt + plain.tokens[r.name] for r in requests}
    trace = tmp_path / "trace.jsonl"
    finish, grown = TreeGrower.finish, set()

    def recorded(self: TreeGrower, size: int, spine_first: torch.Tensor | None) -> OrderedTree:
        grown.add((size, self._level))
        return finish(self, size, spine_first)

    with (
        mock.patch.object(TreeGrower, "finish", recorded),
        engine("golden-a", SPEC, trace=trace, **options) as llm,
        oracle_trees(texts, VOCABULARY),
    ):
        griffin = run(llm, requests)
    assert_lossless(requests, plain, gaps, griffin)
    # What is drafted, not only what is verified of it: sizes and levels.
    assert grown == {(70, 6), (9, 6), (2, 2)}
    records = read_trace(trace)
    sizes = Counter(record.num_drafted for record in records)
    assert {70, 9, 2} <= sizes.keys(), sizes
    accepted = Counter(r.num_drafted for r in records if len(r.accepted) > 1)
    assert all(accepted[size] for size in (70, 9, 2)), accepted
    # Three are in the batch for a while, and then nobody drafts: one token a step.
    tokens = sum(len(r.accepted) for r in records)
    assert tokens < sum(map(len, griffin.tokens.values())) - len(requests)
    if async_scheduling:
        return  # vLLM does not count a step that was scheduled before its request's end was known.
    spec = "vllm:spec_decode_num"
    counters = {
        "steps": griffin.metrics[f"{spec}_drafts"],
        "drafted": griffin.metrics[f"{spec}_draft_tokens"],
        "accepted": griffin.metrics[f"{spec}_accepted_tokens"],
        "per_depth": griffin.metrics[f"{spec}_accepted_tokens_per_pos"],
        "preemptions": 0,
    }
    check_counters(counters, records)


def _children(tokens: torch.Tensor, level: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each node's k best children, [2, nodes, k] log-probabilities and tokens, by token and level alone."""
    found = []
    for token in tokens.flatten().tolist():
        generator = torch.Generator().manual_seed(1000 * level + token)
        scores = torch.randn(9, generator=generator).log_softmax(-1)
        found.append((scores, torch.randperm(99, generator=generator)[:9]))
    scores, names = (torch.stack(x).view(*tokens.shape, 9) for x in zip(*found, strict=True))
    best = scores.topk(k)
    return best.values, names.gather(-1, best.indices)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 12])
def test_a_smaller_tree_is_a_part_of_the_largest(size: int) -> None:
    """Its best nodes, though grown from fewer levels and a narrower frontier."""
    shape = TreeShape(size, 5, 4)
    whole = TreeGrower(5, 4, torch.device("cpu"))
    small = TreeGrower(shape.levels, shape.width, torch.device("cpu"))
    assert (small.levels, small.top_k) == (min(5, size), min(4, size))
    trees = []
    for grower in (whole, small):
        roots = _children(torch.tensor([[3], [4]]), 0, grower.top_k)
        frontier = grower.begin(*(x[:, 0] for x in roots))
        for level in range(1, grower.levels):
            children = _children(frontier.tokens, level, grower.top_k)
            frontier = grower.advance(frontier, *children)
        trees.append(grower.finish(size))
    for field in ("tokens", "parents", "depths", "scores", "spine_len"):
        assert torch.equal(getattr(trees[0], field), getattr(trees[1], field)), field
