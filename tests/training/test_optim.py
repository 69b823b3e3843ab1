"""Optimiser, schedule and the losses' vocabulary."""

import pytest
import torch

from vllm_griffin.train.losses import LossVocabulary
from vllm_griffin.train.optim import Muon, orthogonalise, schedule


def test_loss_vocabulary_keeps_the_most_frequent() -> None:
    head = torch.randn(6, 4)
    vocabulary = LossVocabulary(head, torch.tensor([5, 0, 9, 1, 7, 0]), 3)
    assert vocabulary.kept.tolist() == [0, 2, 4]
    assert vocabulary.rows(torch.tensor([0, 1, 2, 3, 4, -1])).tolist() == [0, -1, 1, -1, 2, -1]
    torch.testing.assert_close(vocabulary.head, head[[0, 2, 4]])


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (8, 8)])
def test_orthogonalise_follows_newton_schulz(shape: tuple[int, int]) -> None:
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    x = matrix / matrix.norm()
    x = x if shape[0] <= shape[1] else x.T
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    x = x if shape[0] <= shape[1] else x.T
    torch.testing.assert_close(orthogonalise(matrix[None])[0], x, atol=1e-5, rtol=1e-4)


def test_muon_treats_joined_blocks_apart() -> None:
    joined = torch.nn.Parameter(torch.zeros(4, 8))
    joined.block_dim = 1
    parts = [torch.nn.Parameter(torch.zeros(4, 4)) for _ in range(2)]
    grad = torch.randn(4, 8)
    joined.grad = grad.clone()
    for part, g in zip(parts, grad.chunk(2, dim=1), strict=True):
        part.grad = g.clone()
    Muon([joined], lr=0.1).step()
    Muon(parts, lr=0.1).step()
    torch.testing.assert_close(joined.data, torch.cat([p.data for p in parts], dim=1))


def test_schedule() -> None:
    factors = [schedule(step, 100, 10, 0.5) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9:51] == [1.0] * 42
    assert factors[75] == pytest.approx(0.5)
    assert factors[99] == pytest.approx(0.02)
