"""Forced acceptance, for benchmarks: `rejection_sample_method="synthetic"`."""

import pytest
import torch
from vllm import SamplingParams

from tests.engine.harness import Request, engine, random_prompt, run
from vllm_griffin.runner.synthetic import SyntheticVerifier
from vllm_griffin.tree import DraftTrees


def test_a_path_has_as_many_nodes_as_the_rates_ask_for() -> None:
    """Request 0 has a full tree, 1 a trimmed one, 2 a stale one, 3 no drafts, 4 no rows at all."""
    torch.manual_seed(0)
    trees = DraftTrees(6, 8, torch.device("cpu"))
    trees.tokens[:] = torch.arange(48).view(6, 8) + 100
    slots = torch.tensor([3, 1, 0, 5, 2])
    trees.num_nodes[slots] = torch.tensor([8, 8, 0, 8, 8], dtype=torch.int32)
    rows = torch.tensor([9, 3, 9, 1, 0])
    starts = torch.tensor([0, *rows.cumsum(0)], dtype=torch.int32)
    drawn = torch.arange(int(rows.sum()))
    verifier = SyntheticVerifier([1.0, 1.0, 0.5, 0.0], trees, max_path=5)
    lengths = []
    for _ in range(200):
        walk = verifier.walk(drawn, starts, slots)
        length = int(walk.num_accepted[0])
        lengths.append(length)
        assert walk.num_accepted.tolist()[1:] == [3, 1, 1, 0]
        path = [0, *range(10 - length, 9)]
        assert walk.path[0].tolist() == path + [0] * (5 - length)
        assert walk.path[1].tolist() == [0, 1, 2, 0, 0]
        drafted = [int(trees.tokens[3, row - 1]) for row in path[1:]]
        assert walk.tokens[0].tolist() == [*drafted, path[-1]] + [0] * (5 - length)
        assert walk.tokens[1].tolist() == [108, 109, 9 + 2, 0, 0]
        assert walk.tokens[2:4, 0].tolist() == [12, 21]
    assert set(lengths) == {3, 4}
    assert 60 < lengths.count(4) < 140


@pytest.mark.parametrize("length", [1.0, 2.5, 5.0])
def test_the_engine_counts_the_length_that_was_asked_for(length: float) -> None:
    spec = {
        "num_speculative_tokens": 9,
        "tree_depth": 4,
        "tree_top_k": 3,
        "rejection_sample_method": "synthetic",
        "synthetic_acceptance_length": length,
    }
    generator = torch.Generator().manual_seed(1)
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, detokenize=False)
    requests = [Request(f"r{i}", random_prompt(generator, 7 + i, 512), params) for i in range(3)]
    with engine("golden-a", spec) as llm:
        outcome = run(llm, requests)
    assert all(len(tokens) == 60 for tokens in outcome.tokens.values())
    assert outcome.acceptance_length == pytest.approx(length, abs=0.25)
