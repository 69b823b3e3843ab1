"""The alignment masks of both readings against a closed form, document by document."""

from itertools import pairwise

import pytest
import torch

from tests.training import references as slow
from vllm_griffin.data.batch import Batch, pack
from vllm_griffin.data.documents import Document
from vllm_griffin.train.align import Alignment

PASSES = 5
# (tokens, answer spans): prompts from 1 token on, the shortest document, several turns with gaps of one
# token and more, spans of one and two tokens, an answer that does not reach the end, no answer at all.
DOCUMENTS = [
    (12, [(1, 12)]),
    (3, [(1, 3)]),
    (3, [(2, 3)]),
    (14, [(4, 14)]),
    (24, [(2, 9), (10, 13), (17, 24)]),
    (16, [(3, 4), (6, 8), (11, 15)]),
    (9, [(0, 9)]),
    (6, []),
    (2, [(1, 2)]),
]


class States:
    """Documents with features that nobody looks at."""

    def __init__(self, shapes: list[tuple[int, list[tuple[int, int]]]]) -> None:
        self.documents = [
            Document(id=i, tokens=list(range(5, 5 + length)), answer=list(spans))
            for i, (length, spans) in enumerate(shapes)
        ]

    def features(self, i: int) -> torch.Tensor:
        return torch.zeros(len(self.documents[i].tokens), 2)


def _ranks(slots: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 5, (slots,), generator=generator) for _ in range(PASSES)]


def _masks(batch: Batch, reading: str, top_k: int, ranks: list[torch.Tensor]) -> list[list[bool]]:
    """The masks of all passes; where no rank is asked for, a wrong one is given."""
    alignment = Alignment(batch, reading, top_k)
    masks = []
    for n, rank in enumerate(ranks):
        assert alignment.mask.dtype == torch.bool and alignment.ranked.dtype == torch.bool
        masks.append(alignment.mask.tolist())
        alignment.advance(torch.where(alignment.ranked, rank, (rank + 3) % 5 + n % 2))
    return masks


def _expected(
    states: States, reading: str, top_k: int, ranks: list[torch.Tensor]
) -> list[list[bool]]:
    starts = [0]
    for document in states.documents:
        starts.append(starts[-1] + len(document.tokens) - 1)
    masks: list[list[bool]] = []
    for n in range(PASSES):
        row: list[bool] = []
        for document, (a, b) in zip(states.documents, pairwise(starts), strict=True):
            hits = [[top_k == 0 or int(r) < top_k for r in rank[a:b]] for rank in ranks]
            form = slow.paper_mask if reading == "paper" else slow.published_mask
            row += form(document, hits, n)
        masks.append(row)
    return masks


@pytest.mark.parametrize("top_k", [3, 1, 4, 0])
@pytest.mark.parametrize("reading", ["paper", "published"])
@pytest.mark.parametrize("seed", range(4))
def test_masks_of_packed_documents(reading: str, top_k: int, seed: int) -> None:
    states = States(DOCUMENTS)
    batch = pack(states, range(len(DOCUMENTS)))
    ranks = _ranks(len(batch.tokens), seed)
    expected = _expected(states, reading, top_k, ranks)
    assert _masks(batch, reading, top_k, ranks) == expected
    if top_k in (0, 3, 4):
        assert any(expected[3]), "the example is too small to say anything about pass 3"


@pytest.mark.parametrize("reading", ["paper", "published"])
def test_packing_changes_no_mask(reading: str) -> None:
    states = States(DOCUMENTS)
    batch = pack(states, range(len(DOCUMENTS)))
    ranks = _ranks(len(batch.tokens), 7)
    together = _masks(batch, reading, 3, ranks)
    for i, (a, b) in enumerate(pairwise(batch.starts)):
        alone = _masks(pack(states, [i]), reading, 3, [rank[a:b] for rank in ranks])
        assert [mask[a:b] for mask in together] == alone, DOCUMENTS[i]


@pytest.mark.parametrize("prompt", range(1, 10))
def test_n_slots_are_lost_after_the_prompt(prompt: int) -> None:
    """Without misses pass n trains from slot p - 1 + n on, by the published reading from p on."""
    states = States([(10, [(prompt, 10)])])
    batch = pack(states, [0])
    for top_k in (0, 3):
        hits = [torch.zeros(9, dtype=torch.long)] * PASSES
        paper = _masks(batch, "paper", top_k, hits)
        assert paper == [[t >= prompt - 1 + n for t in range(9)] for n in range(PASSES)]
        published = _masks(batch, "published", top_k, hits)
        assert published == [[t >= prompt for t in range(9)]] * PASSES


def test_decoding_starts_anew_in_every_span() -> None:
    states = States([(14, [(2, 6), (8, 14)])])
    masks = _masks(pack(states, [0]), "paper", 0, [torch.zeros(13, dtype=torch.long)] * PASSES)
    kept = [[t for t, m in enumerate(mask) if m] for mask in masks]
    # Slot 5 holds the first span's last token and leads to the user's: decoding does not stand there.
    assert kept[0] == [1, 2, 3, 7, 8, 9, 10, 11, 12]
    assert kept[1] == [2, 3, 8, 9, 10, 11, 12]
    assert kept[2] == [3, 9, 10, 11, 12]
    assert kept[3] == [10, 11, 12]


def test_one_miss_takes_out_what_hangs_on_it() -> None:
    """By the paper a miss of pass j at slot t costs pass n slot t + n - j alone, for every n > j."""
    batch = pack(States([(11, [(1, 11)])]), [0])
    for j in range(3):
        ranks = [torch.zeros(10, dtype=torch.long) for _ in range(PASSES)]
        ranks[j][4] = 3
        masks = _masks(batch, "paper", 3, ranks)
        for n, mask in enumerate(masks):
            missing = [t for t in range(n, 10) if not mask[t]]
            assert missing == ([4 + n - j] if n > j else []), (j, n)


def test_the_published_mask_wraps_around_and_the_papers_does_not() -> None:
    batch = pack(States([(6, [(0, 6)]), (4, [(0, 4)])]), [0, 1])
    zero = torch.zeros(8, dtype=torch.long)
    miss = zero.clone()
    miss[4] = 9  # the last slot of the first document
    published = _masks(batch, "published", 3, [miss, zero, zero])
    assert [[t for t in range(8) if not mask[t]] for mask in published] == [[], [4], [0]]
    paper = _masks(batch, "paper", 3, [miss, zero, zero])
    assert [[t for t in range(8) if not mask[t]] for mask in paper] == [[], [0, 5], [0, 1, 5, 6]]


def test_which_ranks_are_asked_for() -> None:
    """The paper's reading needs ranks of its own slots only, the published one of all."""
    batch = pack(States([(9, [(4, 9)])]), [0])
    paper = Alignment(batch, "paper", 3)
    assert (paper.ranked | ~paper.mask).all()
    assert Alignment(batch, "published", 3).ranked.all()
