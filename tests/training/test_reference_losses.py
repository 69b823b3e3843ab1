"""Losses, ranks and their gradients against loops over positions and vocabulary in float64."""

import pytest
import torch

from tests.training import references as slow
from vllm_griffin.train.losses import LossVocabulary, Objective, feature_loss, head_terms

HIDDEN = 8
OBJECTIVES = [
    {"token": 1.0, "top": 0.0},
    {"token": 0.0, "top": 1.0},
    {"token": 0.1, "top": 0.5},
    {"token": 0.0, "top": 0.0, "tvd": 1.0},
    {"token": 0.0, "top": 0.0, "tvd_plus": 1.0},
    {"token": 0.0, "top": 0.0, "tvd_plus": 1.0, "tvd_plus_set": "vocabulary"},
    {"token": 0.3, "top": 0.2, "tvd": 0.7, "tvd_plus": 1.5, "tvd_plus_set": "draft"},
    {"token": 0.3, "top": 0.2, "tvd": 0.7, "tvd_plus": 1.5, "tvd_plus_set": "vocabulary"},
]
TERMS = ("token", "top", "tvd", "tvd_plus")
# 512 slots are computed at one time: 513 has an edge. Below 10 tokens the top ten is everything.
SHAPES = [(0, 14), (1, 2), (1, 14), (4, 7), (9, 10), (9, 11), (6, 40)]


def _example(slots: int, vocab: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(100 * slots + vocab)
    predict, wanted = torch.randn(2, slots, HIDDEN, generator=generator)
    head = torch.randn(vocab, HIDDEN, generator=generator)
    labels = torch.randint(-1, vocab, (slots,), generator=generator)
    return predict, wanted, head, labels


def _compare(slots: int, vocab: int, fields: dict) -> None:
    predict, wanted, head, labels = _example(slots, vocab)
    averaged = fields.get("tvd_plus_set", "draft")
    per_slot = torch.linspace(0.5, 2.0, slots)

    ours = predict.clone().requires_grad_()
    terms = head_terms(ours, wanted, head, labels, Objective(**fields))
    theirs = predict.clone().double().requires_grad_()
    expected = slow.head_losses(theirs, wanted, head, fields, averaged)
    for field, part in zip(filter(fields.get, TERMS), terms.parts.T, strict=True):
        alone = slow.head_losses(predict, wanted, head, {field: fields[field]}, averaged)
        torch.testing.assert_close(part.double(), alone, atol=3e-5, rtol=3e-5)

    assert terms.loss.shape == terms.rank.shape == terms.agree.shape == (slots,)
    torch.testing.assert_close(terms.loss.double(), expected, atol=3e-5, rtol=3e-5)
    (got,) = torch.autograd.grad((terms.loss * per_slot).sum(), ours)
    (grad,) = torch.autograd.grad((expected * per_slot.double()).sum(), theirs)
    torch.testing.assert_close(got.double(), grad, atol=3e-5, rtol=3e-5)
    assert terms.rank.tolist() == slow.ranks(predict, head, labels.tolist())
    assert terms.agree.tolist() == slow.agreements(predict, wanted, head)


@pytest.mark.parametrize("fields", OBJECTIVES, ids=str)
@pytest.mark.parametrize(("slots", "vocab"), SHAPES)
def test_terms_and_gradients(slots: int, vocab: int, fields: dict) -> None:
    _compare(slots, vocab, fields)


@pytest.mark.parametrize("slots", [512, 513, 1025])
def test_terms_across_chunk_edges(slots: int) -> None:
    _compare(slots, 5, {"token": 0.3, "top": 0.2, "tvd": 0.7, "tvd_plus": 1.5})


def test_the_weights_default_to_the_published_codes() -> None:
    predict, wanted, head, labels = _example(6, 25)
    got = head_terms(predict, wanted, head, labels, Objective()).loss
    expected = slow.head_losses(predict, wanted, head, {"token": 0.1, "top": 0.5}, "draft")
    torch.testing.assert_close(got.double(), expected, atol=3e-5, rtol=3e-5)


def test_a_perfect_draft_has_no_distance_and_no_gradient() -> None:
    predict, _, head, labels = _example(6, 25)
    same = predict.clone().requires_grad_()
    tvd = {"token": 0.0, "top": 0.0, "tvd": 1.0}
    terms = head_terms(same, predict, head, labels, Objective(**tvd))
    torch.testing.assert_close(terms.loss, torch.zeros(6), atol=1e-6, rtol=0)
    assert terms.agree.all()
    cross = head_terms(same, predict, head, labels, Objective(token=1.0, top=0.0)).loss
    entropy = -((predict @ head.T).softmax(-1) * (predict @ head.T).log_softmax(-1)).sum(-1)
    torch.testing.assert_close(cross, entropy)
    (grad,) = torch.autograd.grad(cross.sum(), same)
    torch.testing.assert_close(grad, torch.zeros_like(grad), atol=1e-5, rtol=0)


def test_a_vocabulary_of_one_token_teaches_nothing() -> None:
    """Not with the vocabulary as TVD++'s set: one reward has no unbiased deviation."""
    predict, wanted, head, _ = _example(3, 1)
    predict.requires_grad_()
    objective = Objective(token=1.0, top=1.0, tvd=1.0, tvd_plus=1.0, tvd_plus_set="draft")
    terms = head_terms(predict, wanted, head, torch.tensor([0, -1, 0]), objective)
    torch.testing.assert_close(terms.loss, torch.zeros(3))
    (grad,) = torch.autograd.grad(terms.loss.sum(), predict)
    torch.testing.assert_close(grad, torch.zeros_like(grad))
    assert terms.rank.tolist() == [0, 1, 0]


def test_extreme_logits_stay_finite() -> None:
    """A draft that is sure and wrong: q underflows where p is 1."""
    head = torch.eye(4)
    predict = torch.tensor([[200.0, 0.0, 0.0, 0.0]]).requires_grad_()
    wanted = torch.tensor([[0.0, 200.0, 0.0, 0.0]])
    fields = {"token": 0.3, "top": 0.2, "tvd": 0.7, "tvd_plus": 1.5}
    terms = head_terms(predict, wanted, head, torch.tensor([1]), Objective(**fields))
    # Cross-entropy and top-10 are 200 each, TVD is 1; of TVD++ only the draft's own token counts.
    assert torch.isfinite(terms.loss).all()
    assert terms.loss.item() == pytest.approx(0.5 * 200 + 0.7, rel=1e-5)
    (grad,) = torch.autograd.grad(terms.loss.sum(), predict)
    assert torch.isfinite(grad).all()


def test_equal_logits_do_not_lie_above() -> None:
    head = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [2.0, 0.0]])
    predict = torch.tensor([[1.0, 0.0]]).repeat(4, 1)
    labels = torch.tensor([0, 1, 2, 3])
    terms = head_terms(predict, predict, head, labels, Objective())
    assert terms.rank.tolist() == [1, 1, 3, 0]


def _vocabulary() -> tuple[LossVocabulary, torch.Tensor, torch.Tensor]:
    head = torch.randn(12, HIDDEN, generator=torch.Generator().manual_seed(5))
    counts = torch.tensor([3, 90, 0, 7, 41, 2, 66, 1, 12, 5, 30, 8])
    return LossVocabulary(head, counts, 5), head, counts


def test_the_vocabulary_is_the_most_frequent_tokens() -> None:
    vocabulary, head, counts = _vocabulary()
    best = sorted(sorted(range(12), key=lambda v: -int(counts[v]))[:5])
    assert vocabulary.kept.tolist() == best
    assert torch.equal(vocabulary.head, torch.stack([head[v] for v in best]))
    tokens = [-1, *range(12)]
    rows = [best.index(v) if v in best else -1 for v in tokens]
    assert vocabulary.rows(torch.tensor(tokens)).tolist() == rows


@pytest.mark.parametrize("size", [None, 12, 400])
def test_the_whole_vocabulary_keeps_every_row(size: int | None) -> None:
    _, head, counts = _vocabulary()
    whole = LossVocabulary(head, counts, size)
    assert torch.equal(whole.head, head)
    tokens = torch.tensor([0, 11, -1, 3])
    assert whole.rows(tokens).tolist() == tokens.tolist()


@pytest.mark.parametrize("fields", OBJECTIVES, ids=str)
def test_a_reduced_vocabulary_renormalises_both(fields: dict) -> None:
    """Teacher and draft are softmaxes over the kept logits alone; a token outside is a miss."""
    vocabulary, head, _ = _vocabulary()
    generator = torch.Generator().manual_seed(6)
    predict, wanted = torch.randn(2, 12, HIDDEN, generator=generator)
    kept = [v for v in range(12) if v in vocabulary.kept.tolist()]
    labels = vocabulary.rows(torch.arange(12))
    terms = head_terms(predict, wanted, vocabulary.head, labels, Objective(**fields))
    rows = torch.stack([head[v] for v in kept])
    expected = slow.head_losses(predict, wanted, rows, fields, fields.get("tvd_plus_set", "draft"))
    torch.testing.assert_close(terms.loss.double(), expected, atol=3e-5, rtol=3e-5)
    outside = [v not in kept for v in range(12)]
    assert (terms.rank == len(kept)).tolist() == outside
    assert terms.rank.max() == len(kept) == 5


@pytest.mark.parametrize("slots", [0, 1, 5])
def test_feature_loss(slots: int) -> None:
    generator = torch.Generator().manual_seed(slots)
    # Differences on both sides of 1.
    regress, wanted = 1.2 * torch.randn(2, slots, HIDDEN, generator=generator)
    got = feature_loss(regress.requires_grad_(), wanted)
    assert got.shape == (slots,)
    assert got.tolist() == pytest.approx(slow.smooth_l1(regress, wanted), abs=1e-6)
    (grad,) = torch.autograd.grad(got.sum(), regress)
    torch.testing.assert_close(grad, (regress - wanted).clamp(-1, 1).detach() / HIDDEN)


def test_nothing_is_right_in_what_is_not_a_number() -> None:
    """A draft whose weights broke must not look like the best one."""
    head, labels = torch.randn(7, 4), torch.tensor([0, 3, -1])
    broken = torch.full((3, 4), float("nan"))
    terms = head_terms(broken, torch.randn(3, 4), head, labels, Objective(token=1.0))
    assert terms.rank.tolist() == [7, 7, 7]
