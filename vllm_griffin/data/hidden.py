"""The target's hidden states at the tokens of documents, stored shard by shard.

`store` takes them from anything that gives them for a few documents: a Hugging Face model
(`hugging_face_states`), or vLLM (`vllm_griffin.data.extract`).
"""

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import click
import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from vllm_griffin.data.documents import Document
from vllm_griffin.data.shards import holds, write_shard

# Documents -> hidden states after the final norm [len, h] of each, in their order.
Source: TypeAlias = Callable[[Sequence[Document]], list[Tensor]]

BYTES = 2  # of one stored value, float16
SHARD_TOKENS = 65_536
SHARD_BYTES = 512 * 2**20
BATCH_TOKENS = 2048  # of one forward of the target, padding included
_FLOAT16_MAX = 65_504.0


def shard_tokens(hidden_size: int) -> int:
    """Tokens of a shard: what is lost at a kill, and held in memory."""
    return max(1, min(SHARD_TOKENS, SHARD_BYTES // (BYTES * hidden_size)))


def plan_shards(documents: Sequence[Document], tokens: int) -> list[list[Document]]:
    """Documents in their order, in groups of at most `tokens` tokens, or of one document."""
    groups: list[list[Document]] = []
    size = tokens + 1
    for document in documents:
        size += len(document.tokens)
        if size > tokens:
            groups.append([])
            size = len(document.tokens)
        groups[-1].append(document)
    return groups


def store(
    open_source: Callable[[], AbstractContextManager[Source]],
    documents: Sequence[Document],
    folder: Path,
    tokens: int,
) -> None:
    """Store the hidden states of `documents` in ``shard-00000.safetensors``, ...

    Finished shards of these documents are kept, shards of others go.

    Args:
        open_source: Makes the source, if a shard is missing.
        documents: All documents, in the order that numbers the shards.
        folder: Where the shards go.
        tokens: Tokens of a shard, at most.

    Raises:
        click.ClickException: A value is too large for float16.
    """
    groups = {
        folder / f"shard-{number:05d}.safetensors": group
        for number, group in enumerate(plan_shards(documents, tokens))
    }
    for path in folder.glob("shard-*.safetensors"):
        if path not in groups:
            path.unlink()
    missing = {path: group for path, group in groups.items() if not holds(path, group)}
    if not missing:
        return
    total = count_tokens(documents)
    done = total - sum(map(count_tokens, missing.values()))
    with (
        open_source() as source,
        tqdm(total=total, initial=done, desc="hidden states", unit="token", unit_scale=True) as bar,
    ):
        for path, group in missing.items():
            hidden = source(group)
            _check_range(group, hidden)
            write_shard(path, group, hidden)
            bar.update(count_tokens(group))


def count_tokens(documents: Iterable[Document]) -> int:
    """Tokens of all documents."""
    return sum(len(document.tokens) for document in documents)


def _check_range(documents: Sequence[Document], hidden: Sequence[Tensor]) -> None:
    for document, states in zip(documents, hidden, strict=True):
        if not bool((states.abs() <= _FLOAT16_MAX).all()):
            raise click.ClickException(
                f"the target's hidden states of prompt {document.id} are not finite, or above the range of "
                "float16: use --hidden-states online"
            )


@contextmanager
def full_disk_explained(folder: Path) -> Iterator[None]:
    """Turn a full disk into one sentence.

    Raises:
        click.ClickException: The disk is full.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors only hands on what the system says.
        said = f"os error {errno.ENOSPC}" in str(error)
        if not said and getattr(error, "errno", None) != errno.ENOSPC:
            raise
        raise click.ClickException(
            f"the disk of {folder} is full: make room and run the same command again, it goes on from what "
            "is finished (--hidden-states online, in a new folder, stores no hidden states)"
        ) from error


def load_target(target: str | Path, dtype: torch.dtype | None = None) -> Any:
    """The target as a Hugging Face model, on this process's GPU if there is one.

    `dtype`: float32 on a CPU, as stored on a GPU, if None.
    """
    from transformers import AutoModelForCausalLM

    on_gpu = torch.cuda.is_available()
    wanted = dtype or ("auto" if on_gpu else torch.float32)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=wanted)
    # Each process that `accelerate launch` starts has a GPU of its own.
    rank = os.environ.get("LOCAL_RANK", "0")
    return model.eval().to(f"cuda:{rank}" if on_gpu else "cpu")


@contextmanager
def hugging_face_states(target: str) -> Iterator[Source]:
    """Hidden states by the target as a Hugging Face model, on a GPU if there is one."""
    yield model_states(load_target(target))


def model_states(model: Any, batch_tokens: int = BATCH_TOKENS) -> Source:
    """Hidden states by a Hugging Face causal language model, whose base model returns them after its norm."""

    @torch.inference_mode()
    def states(documents: Sequence[Document]) -> list[Tensor]:
        hidden: list[Tensor] = [torch.empty(0)] * len(documents)
        for batch in by_length(documents, batch_tokens):
            width = max(len(documents[i].tokens) for i in batch)
            tokens = torch.zeros(len(batch), width, dtype=torch.long)
            for row, i in enumerate(batch):
                tokens[row, : len(documents[i].tokens)] = torch.tensor(documents[i].tokens)
            # Padding is at the right and attention is causal, so it needs no mask.
            given = tokens.to(model.device)
            found = model.base_model(input_ids=given, use_cache=False).last_hidden_state
            for row, i in enumerate(batch):
                kept = found[row, : len(documents[i].tokens)]
                # The copy lets the batch go. A value out of range becomes inf, which `store` refuses.
                hidden[i] = kept.to(torch.float16).cpu().clone()
        return hidden

    return states


def by_length(documents: Sequence[Document], batch_tokens: int) -> Iterator[list[int]]:
    """Batches of document numbers of similar length, at most `batch_tokens` with padding."""
    batch: list[int] = []
    for i in sorted(range(len(documents)), key=lambda i: len(documents[i].tokens)):
        if batch and (len(batch) + 1) * len(documents[i].tokens) > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
