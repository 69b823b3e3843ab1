"""Training data: documents of token ids, and the target's hidden state at each of their tokens.

`extract` runs the target once over every document and stores what it says in shards (safetensors):

    tokens      [T]     int32    token ids of all documents of the shard, one after another
    hidden      [T, h]  float16  the target's hidden states after its final norm, at these tokens
    starts      [n + 1] int64    document i is the range starts[i]:starts[i + 1]
    prompt_len  [n]     int64    how many first tokens of a document are its prompt (at least 1)
    ids         [n]     int64    the document's number in the source, for splits by prompt

`Rows` packs documents into rows of one length for training.
"""

import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELD_OUT_EVERY = 20  # one document in 20 (5 %) is for validation


@dataclass
class Document:
    """One sequence: its number in the source, its tokens, and the length of its prompt."""

    id: int
    tokens: list[int]
    prompt_len: int

    @property
    def held_out(self) -> bool:
        """Whether the document is for validation; decided by its number alone."""
        return self.id % HELD_OUT_EVERY == HELD_OUT_EVERY - 1


def read_responses(path: str | Path, limit: int | None = None) -> list[Document]:
    """Read a JSONL file with `id`, `prompt_token_ids` and `response_token_ids` per line."""
    documents: list[Document] = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if limit is not None and len(documents) >= limit:
                break
            try:
                row = json.loads(line)
                prompt, response = row["prompt_token_ids"], row["response_token_ids"]
                document = Document(int(row.get("id", number)), prompt + response, len(prompt))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number}: {type(error).__name__}: {error}"
                ) from error
            if len(document.tokens) > 2 and prompt:
                documents.append(document)
    return documents


def read_texts(
    paths: Sequence[Path], tokenizer: "PreTrainedTokenizerBase", length: int
) -> list[Document]:
    """Cut text files into documents of `length` tokens; files that are not UTF-8 are passed over.

    A document's number is its place in the list, so give training and validation files separately.
    """
    documents: list[Document] = []
    for path in paths:
        try:
            tokens = tokenizer(path.read_text(encoding="utf-8"))["input_ids"]
        except UnicodeDecodeError:
            continue
        for start in range(0, len(tokens), length):
            piece = tokens[start : start + length]
            if len(piece) > 2:
                documents.append(Document(len(documents), piece, 1))
    return documents


def extract(
    target: Any,
    documents: Sequence[Document],
    folder: str | Path,
    *,
    shard_documents: int = 160,
    batch_tokens: int = 2048,
) -> None:
    """Store the target's hidden states for `documents`, shard by shard; finished shards are kept.

    Args:
        target: A Hugging Face causal language model (its `.model` returns post-norm states).
        folder: Where `shard-00000.safetensors`, ... go; memory use is that of one shard.
        shard_documents: Documents a shard.
        batch_tokens: Tokens (padding included) of one forward of the target.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for number, first in enumerate(
        tqdm(range(0, len(documents), shard_documents), desc="hidden states", unit="shard")
    ):
        path = folder / f"shard-{number:05d}.safetensors"
        if path.exists():
            continue
        part = documents[first : first + shard_documents]
        scratch = path.with_suffix(".partial")
        save_file(_run_target(target, part, batch_tokens), scratch)
        os.replace(scratch, path)


@torch.inference_mode()
def _run_target(
    target: Any, documents: Sequence[Document], batch_tokens: int
) -> dict[str, torch.Tensor]:
    hidden: list[torch.Tensor] = [torch.empty(0)] * len(documents)
    for batch in _by_length(documents, batch_tokens):
        width = max(len(documents[i].tokens) for i in batch)
        tokens = torch.zeros(len(batch), width, dtype=torch.long)
        for row, i in enumerate(batch):
            tokens[row, : len(documents[i].tokens)] = torch.tensor(documents[i].tokens)
        # Padding is at the right and attention is causal, so it needs no mask.
        states = target.model(input_ids=tokens, use_cache=False).last_hidden_state
        for row, i in enumerate(batch):
            hidden[i] = states[row, : len(documents[i].tokens)].to(torch.float16).clone()
    lengths = torch.tensor([0] + [len(d.tokens) for d in documents])
    return {
        "tokens": torch.tensor([t for d in documents for t in d.tokens], dtype=torch.int32),
        "hidden": torch.cat(hidden),
        "starts": lengths.cumsum(0),
        "prompt_len": torch.tensor([d.prompt_len for d in documents]),
        "ids": torch.tensor([d.id for d in documents]),
    }


def _by_length(documents: Sequence[Document], batch_tokens: int) -> Iterator[list[int]]:
    """Batches of document numbers of similar length, at most `batch_tokens` with padding."""
    batch: list[int] = []
    for i in sorted(range(len(documents)), key=lambda i: len(documents[i].tokens)):
        if batch and (len(batch) + 1) * len(documents[i].tokens) > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


@dataclass
class Batch:
    """Packed documents for one step: T slots, document after document.

    `features` [T, h] f_t; `tokens` [T] x_{t+1}; `wanted` [T, h] f_{t+1}; `labels` [T] x_{t+2}, -1 at a
    document's last slot; `positions` [T] t; `prompt_len` [T]; `starts` n + 1 offsets.
    """

    features: torch.Tensor
    tokens: torch.Tensor
    wanted: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    prompt_len: torch.Tensor
    starts: list[int]


class HiddenStates:
    """Documents of a folder of shards, kept in memory as they are stored (float16)."""

    def __init__(self, folder: str | Path, max_shards: int | None = None) -> None:
        """Read all finished shards, at most `max_shards`."""
        self.hidden: list[torch.Tensor] = []
        self.tokens: list[torch.Tensor] = []
        self.prompt_len: list[int] = []
        self.ids: list[int] = []
        paths = sorted(Path(folder).glob("shard-*.safetensors"))[:max_shards]
        if not paths:
            raise FileNotFoundError(
                f"{folder} has no shard-*.safetensors: extract hidden states first"
            )
        for path in paths:
            shard = load_file(path)
            starts = shard["starts"].tolist()
            self.prompt_len += shard["prompt_len"].tolist()
            self.ids += shard["ids"].tolist()
            for a, b in itertools.pairwise(starts):
                self.hidden.append(shard["hidden"][a:b])
                self.tokens.append(shard["tokens"][a:b].long())

    def split(self, held_out: bool) -> list[int]:
        """Document numbers of the validation part, or of the training part."""
        return [
            i for i, number in enumerate(self.ids) if Document(number, [], 1).held_out == held_out
        ]

    def token_counts(self, vocab_size: int) -> torch.Tensor:
        """How often each token occurs in the training part [vocab_size]."""
        return torch.bincount(
            torch.cat([self.tokens[i] for i in self.split(False)]), minlength=vocab_size
        )

    def batch(self, documents: Iterable[int], prompt_loss: bool) -> Batch:
        """Pack documents; with `prompt_loss` their prompts are trained on like answers."""
        chosen = list(documents)
        lengths = [len(self.tokens[i]) - 1 for i in chosen]
        hidden = [self.hidden[i] for i in chosen]
        tokens = [self.tokens[i] for i in chosen]
        none = torch.tensor([-1])
        prompts = torch.tensor([1 if prompt_loss else self.prompt_len[i] for i in chosen])
        return Batch(
            features=torch.cat([x[:-1] for x in hidden]).float(),
            tokens=torch.cat([x[1:] for x in tokens]),
            wanted=torch.cat([x[1:] for x in hidden]).float(),
            labels=torch.cat([torch.cat([x[2:], none]) for x in tokens]),
            positions=torch.cat([torch.arange(n) for n in lengths]),
            prompt_len=prompts.repeat_interleave(torch.tensor(lengths)),
            starts=[0, *torch.tensor(lengths).cumsum(0).tolist()],
        )

    def batches(self, documents: Sequence[int], tokens: int, seed: int) -> Iterator[list[int]]:
        """One epoch's document numbers in batches of about `tokens` slots, shuffled by `seed`."""
        order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed))
        group: list[int] = []
        size = 0
        for i in order.tolist():
            group.append(documents[i])
            size += len(self.tokens[documents[i]]) - 1
            if size >= tokens:
                yield group
                group, size = [], 0
