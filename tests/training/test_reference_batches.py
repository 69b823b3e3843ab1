"""Packed batches and stored hidden states against loops over tokens."""

import errno
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.training import references as slow
from vllm_griffin.data.batch import epoch, pack, split, token_counts
from vllm_griffin.data.documents import Document, read_documents, write_documents
from vllm_griffin.data.shards import StoredStates, write_shard

HIDDEN = 3
SHAPES = [
    (7, [(3, 7)]),
    (3, [(1, 3)]),
    (11, [(2, 5), (6, 7), (9, 11)]),
    (2, [(1, 2)]),
    (5, []),
    (8, [(0, 4)]),
]


class States:
    """Documents with hidden states that float16 holds exactly."""

    def __init__(self, count: int = len(SHAPES)) -> None:
        generator = torch.Generator().manual_seed(1)
        self.documents = []
        self.hidden = []
        for i in range(count):
            length, spans = SHAPES[i % len(SHAPES)]
            tokens = torch.randint(50, (length,), generator=generator).tolist()
            self.documents.append(Document(id=10 + i // 2, tokens=tokens, answer=list(spans)))
            self.hidden.append(torch.randn(length, HIDDEN, generator=generator).half().float())

    def features(self, i: int) -> torch.Tensor:
        return self.hidden[i]


@pytest.mark.parametrize("prompt_loss", [False, True])
@pytest.mark.parametrize("chosen", [[0], [3], [1, 1], [5, 2, 0], [0, 1, 2, 3, 4, 5]])
def test_pack(chosen: list[int], prompt_loss: bool) -> None:
    states = States()
    batch = pack(states, chosen, prompt_loss=prompt_loss)
    slot = 0
    starts = [0]
    for i in chosen:
        document, hidden = states.documents[i], states.hidden[i]
        for t in range(len(document.tokens) - 1):
            assert torch.equal(batch.features[slot], hidden[t])
            assert torch.equal(batch.wanted[slot], hidden[t + 1])
            assert batch.tokens[slot] == document.tokens[t + 1]
            last = t + 2 == len(document.tokens)
            assert batch.labels[slot] == (-1 if last else document.tokens[t + 2])
            assert batch.positions[slot] == t
            assert batch.answer[slot] == slow.is_answer(document, t, prompt_loss)
            assert batch.drafted[slot] == slow.is_drafted(document, t, prompt_loss)
            slot += 1
        starts.append(slot)
    assert batch.starts == starts
    for name, value in vars(batch).items():
        assert name == "starts" or len(value) == slot, name
    assert batch.features.dtype == batch.wanted.dtype == torch.float32
    assert batch.tokens.dtype == batch.labels.dtype == batch.positions.dtype == torch.int64
    assert batch.drafted.dtype == batch.answer.dtype == torch.bool


def test_where_decoding_can_stand() -> None:
    """By hand: x_2 to x_4, x_6, and x_9 to the end are the assistant's."""
    batch = pack(States(), [2])
    assert [t for t, d in enumerate(batch.drafted.tolist()) if d] == [1, 2, 8, 9]
    assert [t for t, a in enumerate(batch.answer.tolist()) if a] == [2, 3, 4, 6, 9]
    whole = pack(States(), [2], prompt_loss=True)
    assert whole.drafted.all() and whole.answer.all()


def _store(states: States, folder: Path, sizes: list[int]) -> None:
    first = 0
    for number, size in enumerate(sizes):
        part = slice(first, first + size)
        path = folder / f"shard-{number:05d}.safetensors"
        write_shard(path, states.documents[part], states.hidden[part])
        first += size


@pytest.mark.parametrize("sizes", [[12], [5, 7], [1, 4, 1, 6]])
def test_shards_return_what_was_written(tmp_path: Path, sizes: list[int]) -> None:
    states = States(12)
    _store(states, tmp_path, sizes)
    # Nothing half-written is left behind.
    assert len(list(tmp_path.iterdir())) == len(sizes)
    stored = StoredStates(tmp_path)
    assert stored.documents == states.documents
    for i in [11, 0, *range(12)]:
        assert stored.features(i).dtype == torch.float32
        assert torch.equal(stored.features(i), states.hidden[i])
    ours, theirs = pack(stored, [7, 0, 11]), pack(states, [7, 0, 11])
    for name, value in vars(theirs).items():
        got = getattr(ours, name)
        assert got == value if name == "starts" else torch.equal(got, value), name


def test_only_the_first_shards(tmp_path: Path) -> None:
    states = States(12)
    _store(states, tmp_path, [3, 4, 5])
    assert StoredStates(tmp_path, max_shards=2).documents == states.documents[:7]
    assert StoredStates(tmp_path, 1).documents == states.documents[:3]


def test_hidden_states_are_stored_as_float16(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    states = States(2)
    states.hidden = [h + 1e-5 for h in states.hidden]
    _store(states, tmp_path, [2])
    shard = load_file(tmp_path / "shard-00000.safetensors")
    assert {k: v.dtype for k, v in shard.items()} == {
        "tokens": torch.int32,
        "hidden": torch.float16,
        "starts": torch.int64,
        "answer": torch.uint8,
        "ids": torch.int64,
    }
    assert shard["starts"].tolist() == [0, 7, 10]
    assert shard["answer"].tolist() == [0, 0, 0, 1, 1, 1, 1, 0, 1, 1]
    assert torch.equal(StoredStates(tmp_path).features(1), states.hidden[1].half().float())


def test_a_full_disk_leaves_the_old_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = States(2)
    _store(states, tmp_path, [2])
    path = tmp_path / "shard-00000.safetensors"
    before = path.read_bytes()

    def full_disk(tensors: dict, where: Path) -> None:
        Path(where).write_bytes(b"half a shard")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("vllm_griffin.data.shards.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_shard(path, states.documents, states.hidden)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_documents_round_trip(tmp_path: Path) -> None:
    documents = States(6).documents
    write_documents(tmp_path, iter(documents))
    assert read_documents(tmp_path) == documents
    lines = (tmp_path / "documents.jsonl").read_text().splitlines()
    (tmp_path / "documents.jsonl").write_text("\n".join([*lines[:3], lines[3][:9], *lines[4:]]))
    with pytest.raises(ValueError, match="line 4"):
        read_documents(tmp_path)


def test_one_prompt_in_twenty_is_held_out() -> None:
    documents = [Document(id=i // 3, tokens=[1, 2, 3], answer=[]) for i in range(3 * 400)]
    held_out = {d.id for d in documents if d.held_out}
    assert held_out == set(range(19, 400, 20))
    # All documents of a prompt fall on the same side.
    assert Counter(d.id for d in documents if d.held_out) == dict.fromkeys(held_out, 3)
    parts = split(documents, held_out=False), split(documents, held_out=True)
    assert sorted(parts[0] + parts[1]) == list(range(1200))
    assert {documents[i].id for i in parts[1]} == held_out


def test_documents_without_a_slot_are_in_no_part() -> None:
    documents = [Document(id=1, tokens=[7] * n, answer=[]) for n in range(4)]
    assert split(documents, held_out=False) == [2, 3]


@pytest.mark.parametrize("tokens", [1, 10, 25, 10_000])
def test_an_epoch_takes_each_document_at_most_once(tokens: int) -> None:
    documents = States(40).documents
    numbers = list(range(1, 40, 2))
    groups = list(epoch(documents, numbers, tokens, seed=3))
    taken = [i for group in groups for i in group]
    assert len(set(taken)) == len(taken) and set(taken) <= set(numbers)
    sizes = [[len(documents[i].tokens) - 1 for i in group] for group in groups]
    if tokens == 10_000:
        assert len(groups) == 1 and len(taken) == len(numbers)
    else:
        # Full, and not without its last document; what is left over would not fill another.
        assert all(sum(size) >= tokens > sum(size[:-1]) for size in sizes)
        left = set(numbers) - set(taken)
        assert sum(len(documents[i].tokens) - 1 for i in left) < tokens
    assert groups == list(epoch(documents, numbers, tokens, seed=3))
    assert groups != list(epoch(documents, numbers, tokens, seed=4))


def test_token_counts() -> None:
    documents = States(8).documents
    counts = token_counts(documents, [0, 5, 2], 60)
    expected = Counter(t for i in (0, 5, 2) for t in documents[i].tokens)
    assert counts.tolist() == [expected[v] for v in range(60)]
