"""Stored hidden states: equal to the target's, in shards that are kept."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import click
import pytest
import torch
from safetensors import SafetensorError
from transformers import LlamaForCausalLM

from vllm_griffin.data import hidden
from vllm_griffin.data.documents import Document
from vllm_griffin.data.extract import final_norm
from vllm_griffin.data.shards import StoredStates

DOCUMENTS = [
    Document(i, [(i * 7 + j) % 60 for j in range(n)], [(1, n)])
    for i, n in enumerate([3, 11, 5, 20, 8, 4])
]


@contextmanager
def counted(model: LlamaForCausalLM, seen: list[int], fail_at: int = 99) -> Iterator[hidden.Source]:
    states = hidden.model_states(model, batch_tokens=24)

    def source(documents: list[Document]) -> list[torch.Tensor]:
        if len(seen) == fail_at:
            raise KeyboardInterrupt
        seen.append(len(documents))
        return states(documents)

    yield source


@pytest.fixture
def model(small_target: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(small_target).eval()


def test_states_are_the_targets_after_its_norm(model: LlamaForCausalLM, tmp_path: Path) -> None:
    hidden.store(lambda: counted(model, []), DOCUMENTS, tmp_path, 25)
    stored = StoredStates(tmp_path)
    assert [d.tokens for d in stored.documents] == [d.tokens for d in DOCUMENTS]
    assert [d.answer for d in stored.documents] == [d.answer for d in DOCUMENTS]
    for i, document in enumerate(DOCUMENTS):
        with torch.inference_mode():
            wanted = model(torch.tensor([document.tokens]), output_hidden_states=True)
        torch.testing.assert_close(
            stored.features(i), wanted.hidden_states[-1][0], atol=2e-3, rtol=2e-3
        )


def test_shards_are_bounded_and_in_order() -> None:
    groups = hidden.plan_shards(DOCUMENTS, 19)
    assert [[d.id for d in group] for group in groups] == [[0, 1, 2], [3], [4, 5]]
    assert hidden.shard_tokens(576) == hidden.SHARD_TOKENS
    assert hidden.shard_tokens(8192) * 8192 * hidden.BYTES == hidden.SHARD_BYTES


def test_finished_shards_are_not_made_again(model: LlamaForCausalLM, tmp_path: Path) -> None:
    seen: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        hidden.store(lambda: counted(model, seen, fail_at=2), DOCUMENTS, tmp_path, 19)
    assert seen == [3, 1]
    first = (tmp_path / "shard-00000.safetensors").stat().st_mtime_ns
    hidden.store(lambda: counted(model, seen), DOCUMENTS, tmp_path, 19)
    assert seen == [3, 1, 2]
    assert (tmp_path / "shard-00000.safetensors").stat().st_mtime_ns == first
    hidden.store(lambda: pytest.fail("nothing is missing"), DOCUMENTS, tmp_path, 19)


def test_a_damaged_shard_is_named_and_made_again(model: LlamaForCausalLM, tmp_path: Path) -> None:
    hidden.store(lambda: counted(model, []), DOCUMENTS, tmp_path, 19)
    shard = tmp_path / "shard-00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors is damaged .* data again"):
        StoredStates(tmp_path)
    hidden.store(lambda: counted(model, []), DOCUMENTS, tmp_path, 19)
    assert shard.read_bytes() == whole


def test_shards_of_other_documents_go(model: LlamaForCausalLM, tmp_path: Path) -> None:
    """As when the tokenizer has changed under a run that was stopped."""
    seen: list[int] = []
    hidden.store(lambda: counted(model, seen), DOCUMENTS, tmp_path, 19)
    assert seen == [3, 1, 2]
    first = (tmp_path / "shard-00000.safetensors").stat().st_mtime_ns
    other = replace(DOCUMENTS[3], tokens=[t + 1 for t in DOCUMENTS[3].tokens])
    hidden.store(lambda: counted(model, seen), [*DOCUMENTS[:3], other], tmp_path, 19)
    assert seen == [3, 1, 2, 1]
    assert (tmp_path / "shard-00000.safetensors").stat().st_mtime_ns == first
    assert StoredStates(tmp_path).documents == [*DOCUMENTS[:3], other]


def test_batches_are_bounded_and_complete() -> None:
    batches = list(hidden.by_length(DOCUMENTS, 24))
    assert sorted(i for batch in batches for i in batch) == list(range(6))
    for batch in batches:
        longest = max(len(DOCUMENTS[i].tokens) for i in batch)
        assert len(batch) == 1 or len(batch) * longest <= 24


def test_values_out_of_range_are_refused(tmp_path: Path) -> None:
    @contextmanager
    def source() -> Iterator[hidden.Source]:
        yield lambda documents: [torch.full((len(d.tokens), 4), torch.inf) for d in documents]

    with pytest.raises(click.ClickException, match="--hidden-states online"):
        hidden.store(source, DOCUMENTS, tmp_path, 100)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
    ],
)
def test_a_full_disk_is_one_sentence(error: Exception, tmp_path: Path) -> None:
    with (
        pytest.raises(click.ClickException, match=r"is full: make room and run the same command"),
        hidden.full_disk_explained(tmp_path),
    ):
        raise error


def test_other_errors_of_the_system_stay(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), hidden.full_disk_explained(tmp_path):
        raise PermissionError(errno.EACCES, "no")


def test_final_norm_of_torch_files(model: LlamaForCausalLM, tmp_path: Path) -> None:
    model.config.save_pretrained(tmp_path)
    with pytest.raises(click.ClickException, match=r"no model\.norm\.weight in its weights"):
        final_norm(str(tmp_path))
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    norm, _ = final_norm(str(tmp_path))
    assert torch.equal(norm.weight, model.model.norm.weight)


def test_final_norm_makes_post_norm_states(model: LlamaForCausalLM, small_target: Path) -> None:
    norm, layers = final_norm(str(small_target))
    seen: list[torch.Tensor] = []
    model.model.layers[-1].register_forward_hook(lambda _m, _i, output: seen.append(output))
    with torch.inference_mode():
        wanted = model.model(torch.tensor([[3, 1, 4]])).last_hidden_state
        torch.testing.assert_close(norm(seen[0]), wanted)
    assert layers == 2
