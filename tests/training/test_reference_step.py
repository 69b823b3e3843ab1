"""A whole training step, the sum over passes of masked losses, against the loops put together."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.training import references as slow
from vllm_griffin.data.batch import Batch, pack
from vllm_griffin.data.documents import Document
from vllm_griffin.train.loop import Trainer
from vllm_griffin.train.losses import LossVocabulary
from vllm_griffin.train.network import Draft
from vllm_griffin.train.settings import Settings
from vllm_griffin.train.step import DraftLoss

HIDDEN, VOCAB = 16, 30
SHAPES = [(9, [(3, 9)]), (3, [(1, 3)]), (14, [(2, 7), (9, 14)]), (6, [])]
STEPS: dict[str, dict[str, Any]] = {
    "griffin": {"passes": 3, "top_k": 5},
    "all tokens": {"passes": 3, "top_k": 3, "vocabulary": 0, "prompt_loss": True},
    "published": {"passes": 3, "top_k": 5, "mask": "published", "attention": "published"},
    "hass": {"passes": 3, "top_k": 0, "fusion": False, "two_heads": False},
    "eagle2": {"passes": 1, "top_k": 0, "fusion": False, "two_heads": False},
    "one pass, published": {"passes": 1, "mask": "published", "attention": "published"},
    "tvd": {"passes": 2, "tvd": 0.7, "tvd_plus": 0.4, "tvd_plus_set": "vocabulary"},
}

# As the log has the terms of the loss through the LM head
NAMES = {"token": "cross_entropy", "top": "top_ten", "tvd": "tvd", "tvd_plus": "tvd_plus"}


class States:
    """Documents whose tokens come from few, so that some of them are hit."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(2)
        self.documents = [
            Document(i, torch.randint(8, (length,), generator=generator).tolist(), list(spans))
            for i, (length, spans) in enumerate(SHAPES)
        ]
        self.hidden = [
            torch.randn(len(d.tokens), HIDDEN, generator=generator) for d in self.documents
        ]

    def features(self, i: int) -> torch.Tensor:
        return self.hidden[i]


def _settings(case: dict[str, Any]) -> Settings:
    return Settings(
        align_top_k=case.get("top_k", 3),
        mask=case.get("mask", "paper"),
        attention=case.get("attention", "proper"),
        feature_weight=1.3,
        token_weight=0.2,
        top_weight=0.6,
        tvd_weight=case.get("tvd", 0.0),
        tvd_plus_weight=case.get("tvd_plus", 0.0),
        tvd_plus_set=case.get("tvd_plus_set", "draft"),
        vocabulary=case.get("vocabulary", 10),
        prompt_loss=case.get("prompt_loss", False),
    )


def _masks(
    documents: list[Document], hits: list[list[list[bool]]], n: int, mask: str
) -> list[bool]:
    """Pass n's mask of packed documents; `hits` by document and pass."""
    form = slow.paper_mask if mask == "paper" else slow.published_mask
    return [m for d, hit in zip(documents, hits, strict=True) for m in form(d, hit, n)]


def _outputs(draft: Draft, batch: Batch, case: dict[str, Any]) -> list[list[torch.Tensor]]:
    """predict and regress of every pass, by the loops."""
    published = case.get("attention") == "published" and case["passes"] > 1
    form = slow.published_passes if published else slow.proper_passes
    parts = [
        list(form(draft, batch.features[a:b], batch.tokens[a:b], case["passes"]))
        for a, b in itertools.pairwise(batch.starts)
    ]
    return [
        [torch.cat([part[n][i] for part in parts]) for i in (0, 1)] for n in range(case["passes"])
    ]


def _reference(
    draft: Draft, states: States, batch: Batch, vocabulary: LossVocabulary, case: dict[str, Any]
) -> tuple[torch.Tensor, dict[str, float]]:
    s = _settings(case)
    weights = {
        "token": s.token_weight,
        "top": s.top_weight if case["passes"] > 1 else 0.0,
        "tvd": s.tvd_weight,
        "tvd_plus": s.tvd_plus_weight,
    }
    documents = states.documents
    if s.prompt_loss:
        documents = [Document(d.id, d.tokens, [(0, len(d.tokens))]) for d in documents]
    kept = vocabulary.kept.tolist()
    labels = [kept.index(x) if x in kept else -1 for x in batch.labels.tolist()]
    hits: list[list[list[bool]]] = [[] for _ in documents]
    total, shown = torch.zeros((), dtype=torch.float64), {}
    slots = 0
    for n, (predict, regress) in enumerate(_outputs(draft, batch, case)):
        mask = _masks(documents, hits, n, s.mask)
        rows = [t for t, m in enumerate(mask) if m]
        slots = slots or len(rows)
        head = slow.head_losses(
            predict[rows], batch.wanted[rows], vocabulary.head, weights, s.tvd_plus_set
        )
        gaps = (regress[rows] - batch.wanted[rows]).abs()
        feature = torch.where(gaps < 1, gaps**2 / 2, gaps - 0.5).mean(-1)
        agree = slow.agreements(predict[rows], batch.wanted[rows], vocabulary.head)
        shown |= {
            f"token{n}": head.sum().item() / (len(rows) + 1e-5),
            f"feature{n}": feature.sum().item() / (len(rows) + 1e-5),
            f"agree{n}": sum(agree) / (len(rows) + 1e-5),
            f"mask{n}": len(rows) / slots,
        }
        several = {NAMES[key]: {key: weight} for key, weight in weights.items() if weight}
        for term, alone in several.items() if len(several) > 1 else ():
            part = slow.head_losses(
                predict[rows], batch.wanted[rows], vocabulary.head, alone, s.tvd_plus_set
            )
            shown[f"{term}{n}"] = part.sum().item() / (len(rows) + 1e-5)
        total = total + (head.sum() + s.feature_weight * feature.sum()) / (len(rows) + 1e-5)
        rank = slow.ranks(predict, vocabulary.head, labels)
        for hit, (a, b) in zip(hits, itertools.pairwise(batch.starts), strict=True):
            hit.append([s.align_top_k == 0 or r < s.align_top_k for r in rank[a:b]])
    return total, shown


@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_the_sum_of_its_passes(name: str) -> None:
    case, states = STEPS[name], States()
    settings = _settings(case)
    draft = slow.small_draft(
        21, fusion=case.get("fusion", True), two_heads=case.get("two_heads", True)
    )
    generator = torch.Generator().manual_seed(9)
    head = torch.randn(VOCAB, HIDDEN, generator=generator)
    counts = torch.arange(VOCAB, 0, -1)
    vocabulary = LossVocabulary(head, counts, settings.vocabulary or None)
    batch = pack(states, range(len(SHAPES)), settings.prompt_loss)
    parameters = [p for p in draft.parameters() if p.requires_grad]

    total, shown = DraftLoss(draft, vocabulary, settings)(batch, batch.features, case["passes"])
    expected, terms = _reference(draft, states, batch, vocabulary, case)
    assert {k: v.item() for k, v in shown.items()} == pytest.approx(terms, rel=1e-4, abs=1e-5)
    assert total.item() == pytest.approx(expected.item(), rel=1e-4)
    last = case["passes"] - 1
    assert terms[f"mask{last}"] > 0, "nothing left to train the last pass on"
    got = torch.autograd.grad(total, parameters)
    for x, y in zip(got, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(x, y, atol=1e-4 * y.abs().max().item() + 1e-7, rtol=1e-3)


def test_a_batch_without_a_slot_to_train_on_has_no_loss() -> None:
    states = States()
    draft = slow.small_draft(22)
    vocabulary = LossVocabulary(torch.randn(VOCAB, HIDDEN), torch.ones(VOCAB))
    batch = pack(states, [3])
    total, _ = DraftLoss(draft, vocabulary, Settings())(batch, batch.features, 3)
    assert total.item() == 0
    total.backward()
    assert all(p.grad is None or not p.grad.any() for p in draft.parameters())


def test_noise_depends_on_each_documents_own_length() -> None:
    """Uniform, of width noise * 512 / L for a document of L tokens, whatever it is packed with."""
    lengths = [400, 3, 64]
    documents = [Document(i, [1] * n, [(1, n)]) for i, n in enumerate(lengths)]
    zeros = SimpleNamespace(documents=documents, features=lambda i: torch.zeros(lengths[i], HIDDEN))
    batch = pack(zeros, range(3))
    at = SimpleNamespace(num_processes=1, process_index=0)
    steps = [
        Trainer._noisy(SimpleNamespace(step=k, settings=Settings(noise=0.3), accelerator=at), batch)
        for k in (0, 0, 1)
    ]
    assert torch.equal(steps[0], steps[1]) and not torch.equal(steps[0], steps[2])
    for length, (a, b) in zip(lengths, itertools.pairwise(batch.starts), strict=True):
        noise = steps[0][a:b] / (0.3 * 512 / length)
        assert noise.abs().max() <= 0.5
        # The extremes of that many uniform numbers, of both signs.
        assert noise.max() > 0.4 and noise.min() < -0.4
        assert noise.std().item() == pytest.approx(12**-0.5, rel=0.15)
