"""At T > 0 the verified tokens have the target's distribution, whatever the tree."""

import pytest
import torch

from vllm_griffin.cpu.twins.gumbel import gumbel_sample
from vllm_griffin.kernels.verify import walk_tree

VOCABULARY, DRAWS = 6, 20_000
# Rows of the tree: the root, its children 2, 0 and 5, and under child 2 its children 1 and 2.
TOKENS, PARENTS = [2, 1, 0, 5, 2], [-1, 0, 1, 0, 0, 1]


def _next_token_logits() -> torch.Tensor:
    """[1 + V, V]: logits after the root, and after each token that may follow it."""
    return torch.randn(1 + VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(1)) * 1.5


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5])
def test_two_tokens_are_distributed_as_the_targets(temperature: float) -> None:
    """Draws with the engine's own noise at every row, walks, and compares joint frequencies.

    Where the walk ends after one token the second one comes from the next step, as in the engine:
    drawn at the same position with the same seed.
    """
    logits = _next_token_logits() / temperature
    rows = len(PARENTS)
    row_logits = torch.stack([logits[0]] + [logits[1 + TOKENS[r - 1]] for r in range(1, rows)])
    depths = torch.tensor([0, 1, 2, 1, 1, 2])
    seeds = torch.arange(DRAWS)
    slots = torch.arange(DRAWS).repeat_interleave(rows)
    drawn = gumbel_sample(
        row_logits.repeat(DRAWS, 1),
        slots,
        torch.ones(DRAWS),
        seeds,
        (100 + depths).repeat(DRAWS),
        apply_temperature=False,
        is_drafting=False,
    )
    walk = walk_tree(
        drawn,
        torch.arange(0, DRAWS * rows + 1, rows, dtype=torch.int32),
        torch.arange(DRAWS),
        torch.tensor(TOKENS).repeat(DRAWS, 1),
        torch.tensor(PARENTS, dtype=torch.int32).repeat(DRAWS, 1),
        torch.full((DRAWS,), rows - 1, dtype=torch.int32),
        torch.full((DRAWS,), 2, dtype=torch.int32),
        torch.zeros(DRAWS, dtype=torch.bool),
        None,
        3,
    )
    first = walk.tokens[:, 0]
    next_step = gumbel_sample(
        logits[1 + first],
        torch.arange(DRAWS),
        torch.ones(DRAWS),
        seeds,
        torch.full((DRAWS,), 101),
        apply_temperature=False,
        is_drafting=False,
    )
    second = torch.where(walk.num_accepted > 1, walk.tokens[:, 1], next_step)
    counts = torch.zeros(VOCABULARY, VOCABULARY)
    counts.index_put_((first, second), torch.ones(DRAWS), accumulate=True)
    expected = logits[0].softmax(-1).unsqueeze(1) * logits[1:].softmax(-1)
    total_variation = (counts / DRAWS - expected).abs().sum() / 2
    # 36 cells and 20,000 draws: the mean of an exact sampler is about 0.012.
    assert total_variation < 0.025
    assert (walk.num_accepted > 1).float().mean() > 0.2
