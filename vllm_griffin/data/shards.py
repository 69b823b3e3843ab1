"""The target's hidden states at the tokens of documents: stored in shards, or computed at need.

A shard (safetensors) holds some documents, one after another:

    tokens  [T]     int32    token ids
    hidden  [T, h]  float16  the target's hidden states after its final norm, at these tokens
    starts  [n + 1] int64    document i is the range starts[i]:starts[i + 1]
    answer  [T]     uint8    1 where the token is the assistant's
    ids     [n]     int64    the documents' prompts
"""

import bisect
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vllm_griffin.data.documents import Document
from vllm_griffin.whole_file import whole_file


class States(Protocol):
    """Documents and the target's hidden states at their tokens."""

    documents: list[Document]

    def features(self, number: int) -> Tensor:
        """Hidden states [len, h], float32, of document `number`."""


def write_shard(path: Path, documents: Sequence[Document], hidden: Sequence[Tensor]) -> None:
    """Write documents and their hidden states ([len, h] each); the file is there as a whole or not at all."""
    lengths = torch.tensor([0, *(len(d.tokens) for d in documents)])
    marks = [torch.zeros(len(d.tokens), dtype=torch.uint8) for d in documents]
    for mark, document in zip(marks, documents, strict=True):
        for a, b in document.answer:
            mark[a:b] = 1
    tensors = {
        "tokens": torch.tensor([t for d in documents for t in d.tokens], dtype=torch.int32),
        "hidden": torch.cat([h.to(torch.float16) for h in hidden]),
        "starts": lengths.cumsum(0),
        "answer": torch.cat(marks),
        "ids": torch.tensor([d.id for d in documents]),
    }
    with whole_file(path) as scratch:
        save_file(tensors, scratch)


def holds(path: Path, documents: Sequence[Document]) -> bool:
    """Whether a finished shard has these documents."""
    if not path.exists():
        return False
    try:
        with safe_open(path, "pt") as shard:
            tokens = shard.get_tensor("tokens").tolist()
    except SafetensorError:  # cut short after it was written
        return False
    return tokens == [token for document in documents for token in document.tokens]


def _spans(marks: Tensor) -> list[tuple[int, int]]:
    """Ranges of ones in [len]."""
    edges = torch.diff(torch.nn.functional.pad(marks.int(), (1, 1)))
    first, last = (edges == 1).nonzero()[:, 0], (edges == -1).nonzero()[:, 0]
    return list(zip(first.tolist(), last.tolist(), strict=True))


@lru_cache(maxsize=64)  # a large data set has more shards than a process may have open files
def _open(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged ({error}): run its vllm-griffin data again, which makes it anew"
        ) from error


class StoredStates:
    """Documents of a folder of shards. Hidden states are read when they are asked for."""

    def __init__(self, folder: str | Path, max_shards: int | None = None) -> None:
        """Open all finished shards, at most `max_shards`.

        Raises:
            FileNotFoundError: The folder has no shard.
        """
        self.documents: list[Document] = []
        self._first: list[int] = []  # number of each shard's first document
        self._paths: list[Path] = []
        self._starts: list[list[int]] = []
        paths = sorted(Path(folder).glob("shard-*.safetensors"))[:max_shards]
        if not paths:
            raise FileNotFoundError(
                f"{folder} has no shard-*.safetensors: make them with vllm-griffin data"
            )
        for path in paths:
            shard = _open(path)
            starts = shard.get_tensor("starts").tolist()
            tokens, answer = shard.get_tensor("tokens"), shard.get_tensor("answer")
            self._first.append(len(self.documents))
            self._paths.append(path)
            self._starts.append(starts)
            for id_, a, b in zip(
                shard.get_tensor("ids").tolist(), starts, starts[1:], strict=False
            ):
                self.documents.append(Document(id_, tokens[a:b].tolist(), _spans(answer[a:b])))

    def features(self, number: int) -> Tensor:
        """Hidden states [len, h], float32, of document `number`."""
        shard = bisect.bisect_right(self._first, number) - 1
        place = number - self._first[shard]
        a, b = self._starts[shard][place : place + 2]
        return _open(self._paths[shard]).get_slice("hidden")[a:b].float()


class OnlineStates:
    """Documents whose hidden states the target computes when they are asked for; nothing is stored."""

    def __init__(self, documents: list[Document], target: Any) -> None:
        """`target` is a Hugging Face causal language model whose base model returns post-norm states."""
        self.documents = documents
        self._target = target

    @torch.no_grad()
    def features(self, number: int) -> Tensor:
        """Hidden states [len, h], float32, of document `number`."""
        tokens = torch.tensor([self.documents[number].tokens], device=self._target.device)
        states = self._target.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        return states[0].float().cpu()
