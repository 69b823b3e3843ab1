"""Sets of small numbers in 64-bit words: member ``j`` is bit ``j % 64`` of word ``j // 64``.

Ancestor masks of draft trees travel in this form, one set a row.
"""

import torch


def num_words(num_bits: int) -> int:
    """64-bit words that hold ``num_bits`` bits."""
    return -(-num_bits // 64)


def unpack_bits(
    # [..., W] int64
    bits: torch.Tensor,
) -> torch.Tensor:
    """Membership as booleans, ``[..., 64 * W]``."""
    shifts = torch.arange(64, device=bits.device)
    return ((bits.unsqueeze(-1) >> shifts) & 1).bool().flatten(-2)


def one_hot_bits(
    # [n] int64
    places: torch.Tensor,
    words: int,
) -> torch.Tensor:
    """Sets of one member each, ``[n, words]`` int64: row ``i`` holds ``places[i]``."""
    bits = places.new_zeros(len(places), words)
    return bits.scatter_(1, (places // 64).unsqueeze(1), (1 << (places % 64)).unsqueeze(1))
