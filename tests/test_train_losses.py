"""Losses and optimiser against slow, obvious references."""

import pytest
import torch

from vllm_griffin.train.losses import CHUNK, LossVocabulary, feature_loss, head_terms
from vllm_griffin.train.optim import Muon, orthogonalise, schedule


@pytest.mark.parametrize("count", [1, 3, CHUNK + 2])
@pytest.mark.parametrize(("token_weight", "top_weight"), [(1.0, 0.0), (0.1, 0.5), (0.0, 1.0)])
def test_head_loss_and_gradient(count: int, token_weight: float, top_weight: float) -> None:
    generator = torch.Generator().manual_seed(count)
    predict = torch.randn(count, 16, generator=generator).requires_grad_()
    wanted, head = torch.randn(count, 16), torch.randn(40, 16)
    labels = torch.randint(-1, 40, (count,), generator=generator)
    terms = head_terms(predict, wanted, head, labels, token_weight, top_weight)

    logits = predict @ head.T
    p, log_q = (wanted @ head.T).softmax(-1), logits.log_softmax(-1)
    best = torch.zeros_like(p).scatter(1, p.topk(10, dim=-1).indices, 1.0)
    loss = -(p * log_q * (token_weight + top_weight * best)).sum(-1)
    torch.testing.assert_close(terms.token_loss, loss, atol=1e-4, rtol=1e-4)
    weights = torch.rand(count)
    (got,) = torch.autograd.grad((terms.token_loss * weights).sum(), predict)
    (wanted_grad,) = torch.autograd.grad((loss * weights).sum(), predict)
    torch.testing.assert_close(got, wanted_grad, atol=1e-4, rtol=1e-4)

    for t in range(count):
        label = int(labels[t])
        rank = 40 if label < 0 else int((logits[t] > logits[t, label]).sum())
        assert int(terms.rank[t]) == rank
        assert bool(terms.agree[t]) == bool(logits[t].argmax() == p[t].argmax())


def test_feature_loss_is_the_mean_over_channels() -> None:
    got, wanted = torch.tensor([[0.5, 3.0]]), torch.zeros(1, 2)
    assert feature_loss(got, wanted).item() == pytest.approx((0.5 * 0.5**2 + 3.0 - 0.5) / 2)


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
