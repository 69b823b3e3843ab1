"""Packed batches: documents one after another, without padding."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_griffin.data.documents import Document
from vllm_griffin.data.shards import States


@dataclass
class Batch:
    """T slots of packed documents; a document of L tokens has L - 1 slots.

    Attributes:
        features: [T, h] f_t, the target's features.
        tokens: [T] x_{t+1}, the token that the slot consumes.
        wanted: [T, h] f_{t+1}.
        labels: [T] x_{t+2}, the token that the slot predicts; -1 at a document's last slot.
        positions: [T] t, from 0 in every document.
        drafted: [T] bool: decoding can stand at this slot, since x_{t+1} and x_{t+2} (where there is one) are
            the assistant's.
        answer: [T] bool: x_t is the assistant's.
        starts: n + 1 offsets; document j is the range starts[j]:starts[j + 1].
    """

    features: Tensor
    tokens: Tensor
    wanted: Tensor
    labels: Tensor
    positions: Tensor
    drafted: Tensor
    answer: Tensor
    starts: list[int]

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        tensors = {name: x.to(device) for name, x in vars(self).items() if name != "starts"}
        return Batch(**tensors, starts=self.starts)


def pack(states: States, documents: Iterable[int], prompt_loss: bool = False) -> Batch:
    """Pack documents by number; with `prompt_loss` all their tokens count as the assistant's."""
    parts = [_slots(states, i, prompt_loss) for i in documents]
    lengths = torch.tensor([len(part["tokens"]) for part in parts])
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return Batch(**joined, starts=[0, *lengths.cumsum(0).tolist()])


def _slots(states: States, number: int, prompt_loss: bool) -> dict[str, Tensor]:
    document, hidden = states.documents[number], states.features(number)
    tokens = torch.tensor(document.tokens)
    answer = torch.full((len(tokens),), prompt_loss)
    for a, b in document.answer:
        answer[a:b] = True
    # What the answer's last token is followed by, if anything, is not the assistant's to say; the end of
    # the document is merely where the text was cut.
    drafted = answer[1:] & torch.cat([answer[2:], torch.tensor([True])])
    return {
        "features": hidden[:-1],
        "tokens": tokens[1:],
        "wanted": hidden[1:],
        "labels": torch.cat([tokens[2:], torch.tensor([-1])]),
        "positions": torch.arange(len(tokens) - 1),
        "drafted": drafted,
        "answer": answer[:-1],
    }


def split(documents: Sequence[Document], held_out: bool) -> list[int]:
    """Numbers of the documents of the validation part, or of the training part.

    Documents of fewer than two tokens have no slot and are in neither.
    """
    return [i for i, d in enumerate(documents) if d.held_out == held_out and len(d.tokens) > 1]


def epoch(
    documents: Sequence[Document], numbers: Sequence[int], tokens: int, seed: int
) -> Iterator[list[int]]:
    """One epoch of `numbers` in groups of about `tokens` slots, shuffled by `seed`.

    A last group that is not full is left out, unless it is the only one.
    """
    order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(seed))
    group: list[int] = []
    size, yielded = 0, False
    for i in order.tolist():
        group.append(numbers[i])
        size += len(documents[numbers[i]].tokens) - 1
        if size >= tokens:
            yield group
            group, size, yielded = [], 0, True
    if group and not yielded:
        yield group


def token_counts(documents: Sequence[Document], numbers: Sequence[int], vocabulary: int) -> Tensor:
    """How often each token occurs in documents `numbers` [vocabulary]."""
    tokens = torch.tensor([t for i in numbers for t in documents[i].tokens])
    return torch.bincount(tokens, minlength=vocabulary)
