"""vLLM's seeded random numbers, bit by bit as its kernels make them in the interpreter.

In NumPy, because the interpreter computes in it too: the same ``log`` gives the same noise. All
integer arithmetic is modulo 2**32. Source: ``vllm/v1/worker/gpu/sample/gumbel.py`` and Triton's
``language/random.py``.
"""

from functools import lru_cache

import numpy as np

_MASK = 0xFFFFFFFF
_DRAFT_SALT = 1 << 30
_SECOND_STREAM = 0x9E3779B9


def gumbel_noise(
    seed: int, position: int, vocab_size: int, *, drafting: bool = False, fp64: bool = False
) -> np.ndarray:
    """Standard Gumbel noise of one logits row, ``-log(-log(u))``.

    Args:
        seed: the request's seed, any int64.
        position: position of the token in its request.
        vocab_size: V, the number of draws.
        drafting: draw from the stream that drafts use, disjoint from the target's.
        fp64: draw and transform in double precision.

    Returns:
        ``[V]`` float32, or float64 with ``fp64``.

    """
    if drafting:
        position += _DRAFT_SALT
    low = _murmur3(seed, position, vocab_size, domain=0)
    if fp64:
        high = _murmur3(seed, position, vocab_size, domain=_SECOND_STREAM)
        return -np.log(-np.log(_uniform64(low, high)))
    return -np.log(-_log1p_neg(_uniform32(low)))


def uniform(seed: int, position: int) -> float:
    """``tl.rand(seed, position)``, kept above zero as vLLM's rejection sampler does.

    Philox4x32 with ten rounds (Salmon et al., 2011); the position fills two counter words.
    """
    c0, c1, c2, c3 = position & _MASK, (position >> 32) & _MASK, 0, 0
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & _MASK, (a >> 32) ^ c3 ^ k1, a & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    folded = c0 if c0 < 1 << 31 else _MASK - c0
    scale = np.float32(4.6566127342e-10)
    return float(max(np.float32(folded) * scale, scale))


def _murmur3(seed: int, position: int, vocab_size: int, domain: int) -> np.ndarray:
    """MurmurHash3 of (seed, position, 0 .. V-1): ``[V]`` uint32."""
    prefix = domain
    for word in (seed, seed >> 32, position):
        prefix = _rotate(prefix ^ _mix_key(word & _MASK), 13) * 5 + 0xE6546B64 & _MASK
    h = _token_keys(vocab_size) ^ np.uint32(prefix)
    h = (h << np.uint32(13)) | (h >> np.uint32(19))
    h *= np.uint32(5)
    h += np.uint32(0xE6546B64)
    h ^= np.uint32(16)
    h ^= h >> np.uint32(16)
    h *= np.uint32(0x85EBCA6B)
    h ^= h >> np.uint32(13)
    h *= np.uint32(0xC2B2AE35)
    h ^= h >> np.uint32(16)
    return h


def _rotate(value: int, shift: int) -> int:
    return ((value << shift) | (value >> (32 - shift))) & _MASK


def _mix_key(key: int) -> int:
    return _rotate(key * 0xCC9E2D51 & _MASK, 15) * 0x1B873593 & _MASK


@lru_cache(maxsize=4)
def _token_keys(vocab_size: int) -> np.ndarray:
    # The part of the hash that depends on the token alone.
    key = np.arange(vocab_size, dtype=np.uint32)
    key *= np.uint32(0xCC9E2D51)
    key = (key << np.uint32(15)) | (key >> np.uint32(17))
    key *= np.uint32(0x1B873593)
    key.setflags(write=False)
    return key


def _uniform32(bits: np.ndarray) -> np.ndarray:
    high = (bits >> np.uint32(16)).astype(np.float32) * np.float32(2.0**-16)
    low = (bits & np.uint32(0xFFFF)).astype(np.float32) + np.float32(0.5)
    return high + low * np.float32(2.0**-32)


def _uniform64(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    bits = ((high.astype(np.uint64) << np.uint64(32)) | low) >> np.uint64(11)
    drawn = (bits.astype(np.float64) + 0.5) * 2.0**-53
    return np.where(drawn == 1.0, drawn - 2.0**-53, drawn)


def _log1p_neg(value: np.ndarray) -> np.ndarray:
    """``log(1 - value)`` in float32, by a series below 1/4."""
    series = np.full_like(value, 1 / 8)
    for denominator in (7, 6, 5, 4, 3, 2, 1):
        series = np.float32(1 / denominator) + value * series
    direct = np.log(np.maximum(np.float32(1) - value, np.float32(2.0**-24)))
    return np.where(value < np.float32(0.25), -value * series, direct)
