"""Keys and values of a few rows: our copies leave the cache as vLLM's op does."""

from types import SimpleNamespace

import pytest
import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backend import AttentionType

from vllm_griffin.attention.cpu import COPIED_ROWS, TreeCPUAttentionImpl

HEADS, BLOCK, SIZE = 3, 32, 64
LAYER = SimpleNamespace(isa="vec", _k_scale_float=1.0, _v_scale_float=1.0)
# Slots of a step's rows, and whether we copy them.
STEPS = {
    "at the start of a block": ([64, 65, 66], True),
    "within a block": ([*range(70, 76)], True),
    "up to the end of a block": ([*range(96 - COPIED_ROWS, 96)], True),
    "into the next block": ([94, 95, 96], False),
    "two requests": ([40, 41, 70, 71], False),
    "another order": ([41, 40], False),
    "another request between": ([40, 70, 42], False),
    "a row without a slot": ([40, -1, 42], False),
    "a last row without a slot": ([40, 41, -1], False),
    "only rows without a slot": ([-1, -1], False),
    "one row": ([50], False),
    "many rows": ([*range(32, 33 + COPIED_ROWS)], False),
}


@pytest.mark.parametrize("kind", ["auto", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("step", STEPS)
def test_the_cache_is_as_vllms_op_leaves_it(step, dtype, kind, monkeypatch):
    slots, copied = STEPS[step]
    torch.manual_seed(0)
    # Heads of a wider tensor, as they come
    key, value = torch.randn(2, len(slots), 2 * HEADS, SIZE).to(dtype)[..., :HEADS, :]
    stored = torch.uint8 if kind == "fp8" else dtype
    expected, cache = torch.zeros(2, 4, HEADS, BLOCK, 2 * SIZE, dtype=stored)
    mapping = torch.tensor(slots)
    halves = expected.view(4, HEADS, 2 * BLOCK, SIZE).chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(
        key, value, *halves, mapping, "vec",
        k_scale=1.0, v_scale=1.0, kv_cache_dtype=kind,
    )  # fmt: skip

    impl = TreeCPUAttentionImpl.__new__(TreeCPUAttentionImpl)
    impl.head_size, impl.kv_cache_dtype, impl.attn_type = SIZE, kind, AttentionType.DECODER
    calls = []
    own = ops.cpu_attn_reshape_and_cache
    monkeypatch.setattr(
        ops, "cpu_attn_reshape_and_cache", lambda *a, **k: (calls.append(a), own(*a, **k))
    )
    impl.do_kv_cache_update(LAYER, key, value, cache, mapping)
    assert torch.equal(cache, expected)
    assert not calls if copied and kind == "auto" else len(calls) == 1
