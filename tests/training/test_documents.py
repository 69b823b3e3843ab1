"""Documents on disk, and what validation counts of them."""

from pathlib import Path

import pytest
import torch

from vllm_griffin.data.batch import pack
from vllm_griffin.data.documents import Document, read_documents, with_held_out, write_documents
from vllm_griffin.train.losses import LossVocabulary
from vllm_griffin.train.network import Draft, NetworkConfig
from vllm_griffin.train.step import held_out_counts


def test_documents_round_trip(tmp_path: Path) -> None:
    documents = [Document(3, [1, 2, 3], [(1, 3)]), Document(19, [5], [])]
    write_documents(tmp_path, documents)
    assert read_documents(tmp_path) == documents
    assert [d.held_out for d in documents] == [False, True]


def test_some_are_held_out_however_they_are_numbered() -> None:
    def numbered(*ids: int) -> list[Document]:
        return [Document(i, [1, 2, 3], [(0, 3)]) for i in ids]

    # One text in pieces, prompts numbered in tens with two documents each; and two that stay.
    assert [d.id for d in with_held_out(numbered(*[7] * 40))] == list(range(40))
    tens = with_held_out(numbered(*(10 * i for i in range(30)), *(10 * i for i in range(30))))
    assert [d.id for d in tens] == [*range(30), *range(30)]
    for ids in ([5] * 19, [*range(100, 130)]):
        assert [d.id for d in with_held_out(numbered(*ids))] == ids


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{}",
        '{"id": 1, "tokens": "abc", "answer": []}',
        '{"id": 1, "tokens": [1, 2], "answer": [[1, 3]]}',
        '{"id": 1, "tokens": [1, 2, 3], "answer": [[2, 3], [0, 1]]}',
        '{"id": 1, "tokens": [1, 2.5], "answer": []}',
    ],
)
def test_malformed_line_is_named(tmp_path: Path, line: str) -> None:
    write_documents(tmp_path, [Document(1, [1, 2], [])])
    with open(tmp_path / "documents.jsonl", "a") as lines:
        lines.write(line + "\n")
    with pytest.raises(ValueError, match=r"documents\.jsonl, line 2"):
        read_documents(tmp_path)


class Perfect(Draft):
    """A draft that always knows the next token: its outputs are one-hot rows of an identity head."""

    def __init__(self, labels: torch.Tensor) -> None:
        super().__init__(NetworkConfig(30, 32, 8, 2, 1))
        self.labels = labels

    def finish(
        self, fused: torch.Tensor, attended: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out = 50 * torch.nn.functional.one_hot(self.labels.clamp_min(0), 32).float()
        return out, out


class States:
    """Documents with features of nothing."""

    def __init__(self, documents: list[Document]) -> None:
        self.documents = documents

    def features(self, number: int) -> torch.Tensor:
        return torch.zeros(len(self.documents[number].tokens), 32)


def test_a_perfect_draft_is_accepted_whole() -> None:
    """Also in documents of several answers: a root counts if all its drafted tokens are of its answer."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(30, (46,), generator=generator).tolist()
    documents = [Document(0, tokens[:20], [(2, 9), (12, 20)]), Document(1, tokens[20:], [(3, 26)])]
    batch = pack(States(documents), [0, 1])
    vocabulary = LossVocabulary(torch.eye(32)[:30], torch.ones(30), None)
    counts = held_out_counts(Perfect(batch.labels), vocabulary, batch)
    # An answer of n tokens with a token before it has n - 6 roots: its first is the root of six more.
    assert counts["roots"] == (7 - 6) + (8 - 6) + (23 - 6)
    assert counts["chain"] == counts["top3"] == 6 * counts["roots"]
