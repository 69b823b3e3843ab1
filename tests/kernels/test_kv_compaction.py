"""KV compaction: a copy of the cache moved row by row, the torch reference and the kernel agree."""

import pytest
import torch

from vllm_griffin.kernels.kv_compaction import (
    PagedCaches,
    compact_kv_reference,
    compact_kv_triton,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYERS = 3
OPS = [compact_kv_reference, compact_kv_triton]
# Paths of one batch: unequal lengths, a plain request, an inactive one.
BATCHES = {
    "unequal": [[0, 3, 7, 12], [0, 1, 2], [0], [0, 5]],
    "inactive": [[0, 2], [], [0, 1, 4]],
    "spine_then_jump": [[0, 1, 2, 59], [0, 2, 3, 4, 5, 60]],
    "alone": [[0, 1]],
}


def build(paths: list[list[int]], block_size: int, dim: int, transposed: bool, dtype: torch.dtype):
    torch.manual_seed(0)
    rows = [max(p, default=0) + 2 for p in paths]
    width = max(map(len, paths)) + 1
    num_blocks = sum(rows) // block_size + 3
    shape = (LAYERS, num_blocks, 3, block_size, dim)
    k, v = ((100 * torch.randn(shape)).to(dtype).to(DEVICE) for _ in range(2))
    if transposed:
        k = k.mT.contiguous().mT
    caches = PagedCaches(list(k), list(v))
    # Rows of a request lie in blocks in no order; a padding slot follows the last row.
    slots = torch.cat([torch.randperm(num_blocks * block_size)[: sum(rows)], torch.tensor([-1])])
    path = torch.tensor([p + [0] * (width - len(p)) for p in paths], dtype=torch.int32)
    start = torch.tensor([0, *rows[:-1]]).cumsum(0).int()
    accepted = torch.tensor([len(p) for p in paths], dtype=torch.int32)
    return caches, *(x.to(DEVICE) for x in (slots, start, path, accepted))


def moved_row_by_row(cache, slots, start, path, accepted) -> torch.Tensor:
    size = cache.shape[2]
    expected = cache.clone()
    for b in range(len(path)):
        for j in range(1, int(accepted[b])):
            source = int(slots[start[b] + path[b, j]])
            target = int(slots[start[b] + j])
            row = cache[source // size, :, source % size]
            expected[target // size, :, target % size] = row
    return expected


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize(
    ("block_size", "dim", "transposed", "dtype"),
    [
        (16, 32, False, torch.float32),
        (32, 80, True, torch.bfloat16),
        (128, 96, True, torch.float16),
        (16, 64, False, torch.uint8),
    ],
)
def test_moves_the_path_to_the_front(op, name, block_size, dim, transposed, dtype):
    check(op, *build(BATCHES[name], block_size, dim, transposed, dtype))


def check(op, caches: PagedCaches, *rest) -> None:
    """Every layer's keys and values are moved as row by row."""
    expected = [moved_row_by_row(cache, *rest) for cache in (*caches.keys, *caches.values)]
    op(caches, *rest)
    for cache, wanted in zip((*caches.keys, *caches.values), expected, strict=True):
        assert torch.equal(cache, wanted)


@pytest.mark.parametrize("op", OPS)
def test_overlapping_path_is_not_overwritten_before_it_is_read(op):
    path = [0, 2, 3, 4, 5, 6]
    check(op, *build([path, path], 16, 32, False, torch.float32))


@pytest.mark.parametrize("op", OPS)
def test_inactive_request_on_padding_slots_changes_nothing(op):
    caches, slots, start, path, accepted = build([[0, 2, 4]], 16, 32, False, torch.float32)
    start = torch.cat([start, torch.full_like(start, len(slots) - 1)])
    path, accepted = path.repeat(2, 1), torch.cat([accepted, torch.zeros_like(accepted)])
    check(op, caches, slots, start, path, accepted)


def test_layers_with_unlike_caches_are_refused():
    cache = torch.zeros(3, 2, 16, 32)
    for other in (cache.half(), cache[:2], cache.mT.contiguous().mT):
        with pytest.raises(ValueError, match="differ in their caches' layout"):
            PagedCaches([cache, other], [cache, cache])
        with pytest.raises(ValueError, match="differ in their caches' layout"):
            PagedCaches([cache, cache], [cache, other])
