"""Where the rows of a captured first pass and of a tree's levels are: the same in every step.

Shapes: B requests of the batch, P rows of a path, K nodes of a level, L expanded levels.
"""

import functools
from dataclasses import dataclass

import torch

from vllm_griffin.kernels.packed_bits import num_words, one_hot_bits


@dataclass(frozen=True)
class LevelRows:
    """Rows and scratch places of all levels; a request's nodes are its next K rows of a pass."""

    # [B] int32: first row of a request, and its number of rows, K
    q_start: torch.Tensor
    num_rows: torch.Tensor
    # [B] int64: a request's first place in the scratch buffers
    tail_start: torch.Tensor
    # [L, B * K] int64: place of each row's keys and values
    write_rows: torch.Tensor

    def of(self, batch: int) -> "LevelRows":
        """The first requests'."""
        top_k = self.write_rows.shape[1] // len(self.q_start)
        return LevelRows(
            self.q_start[:batch],
            self.num_rows[:batch],
            self.tail_start[:batch],
            self.write_rows[:, : batch * top_k],
        )


@functools.cache
def level_rows(most: int, top_k: int, scratch_size: int, device: torch.device) -> LevelRows:
    """The layout of the largest batch, `most` requests, made once; smaller ones are its beginnings.

    Args:
        scratch_size: Places of a request, L * K.
    """
    request = torch.arange(most, device=device)
    tail_start = request * scratch_size
    places = tail_start.unsqueeze(1) + torch.arange(scratch_size, device=device)
    return LevelRows(
        q_start=(request * top_k).to(torch.int32),
        num_rows=torch.full((most,), top_k, dtype=torch.int32, device=device),
        tail_start=tail_start,
        write_rows=places.view(most, -1, top_k).transpose(0, 1).flatten(1),
    )


@dataclass(frozen=True)
class ChainRows:
    """Rows of the first pass, P of each request, each of which sees those before it."""

    # [B] int32: first row of a request, and its number of rows, P
    q_start: torch.Tensor
    num_rows: torch.Tensor
    # [B, P, W] int64: bit j of row i = j <= i; W words of 64 bits
    bits: torch.Tensor


@functools.cache
def chain_rows(batch: int, max_path: int, device: torch.device) -> ChainRows:
    """The layout of one captured batch size, made once."""
    own = one_hot_bits(torch.arange(max_path, device=device), num_words(max_path))
    return ChainRows(
        q_start=(torch.arange(batch, device=device) * max_path).to(torch.int32),
        num_rows=torch.full((batch,), max_path, dtype=torch.int32, device=device),
        bits=own.cumsum(0).repeat(batch, 1, 1),
    )


def level_positions(
    # [B] int32: draft keys before the tree
    prefix_lens: torch.Tensor,
    top_k: int,
    num_levels: int,
    max_model_len: int,
) -> torch.Tensor:
    """[L, B * K] int64: positions of the rows of levels 1 .. L.

    Slot p - 1 + depth of the draft pairs the parent's feature with the node's token.
    """
    depth = torch.arange(num_levels, device=prefix_lens.device).unsqueeze(1)
    positions = (prefix_lens.long() + depth).clamp(max=max_model_len - 1)
    return positions.repeat_interleave(top_k, dim=1, output_size=len(prefix_lens) * top_k)
