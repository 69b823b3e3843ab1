"""Twin of ``gumbel_sample``: one seeded draw per logits row."""

import numpy as np
import torch

from vllm_griffin.cpu.twins.noise import gumbel_noise


def gumbel_sample(
    logits: torch.Tensor,  # [num_tokens, vocab_size]
    expanded_idx_mapping: torch.Tensor,  # [num_tokens]
    temperature: torch.Tensor,  # [max_num_reqs]
    seed: torch.Tensor,  # [max_num_reqs]
    pos: torch.Tensor,  # [num_tokens]
    apply_temperature: bool,
    is_drafting: bool,
    logits_cache: torch.Tensor | None = None,  # [max_num_reqs, num_cols, vocab_size]
    logits_cache_col: torch.Tensor | None = None,  # scalar or [num_tokens]
    use_fp64: bool = False,
    logits_cache_source: torch.Tensor | None = None,  # [num_tokens, vocab_size]
) -> torch.Tensor:
    """Argmax of each row, with Gumbel noise keyed by (seed, pos, token) where it is not greedy.

    A row without a request (``expanded_idx_mapping`` of -1) is greedy. The rows of a draft tree
    that stand at one depth of one request share a position and so their noise, which is made once.

    Returns:
        ``[num_tokens]`` int64 token ids.

    """
    slots: list[int] = expanded_idx_mapping.tolist()
    if logits_cache is not None:
        assert logits_cache_col is not None
        source = logits if logits_cache_source is None else logits_cache_source
        _cache_logits(logits_cache, logits_cache_col, source, slots)
    elif logits_cache_source is not None:
        raise ValueError("logits_cache_source requires logits_cache")

    positions: list[int] = pos.tolist()
    temperatures: list[float] = temperature.tolist()
    seeds: list[int] = seed.tolist()
    rows = logits.detach().float().numpy()
    noise: dict[tuple[int, int], np.ndarray] = {}
    sampled = np.empty(len(rows), dtype=np.int64)
    for index, (row, slot, position) in enumerate(zip(rows, slots, positions, strict=True)):
        temp = temperatures[slot] if slot >= 0 else 0.0
        if temp != 0.0:
            key = (slot, position)
            if key not in noise:
                noise[key] = gumbel_noise(
                    seeds[slot], position, len(row), drafting=is_drafting, fp64=use_fp64
                )
            scaled = row / np.float32(temp) if apply_temperature else row
            row = scaled + noise[key]
        sampled[index] = row.argmax()
    return torch.from_numpy(sampled)


def _cache_logits(
    cache: torch.Tensor, column: torch.Tensor, source: torch.Tensor, slots: list[int]
) -> None:
    """Stores the rows of ``source`` that have a request, before temperature."""
    assert source.dtype == cache.dtype, "logits cache source and destination differ in dtype"
    assert cache.size(-1) >= source.size(-1), "the logits cache is narrower than the logits"
    columns = column.expand(len(slots)).tolist()
    for row, slot, target in zip(source, slots, columns, strict=True):
        if slot >= 0:
            cache[slot, target, : source.size(-1)] = row
