"""Script: compile every kernel for a CUDA architecture, on a machine without a GPU.

The interpreter accepts Python that the compiler refuses. This runs the launchers on CPU tensors
with a driver that only names a target, and stops each launch after the compiler.
"""

import contextlib
import io
import re
import sys
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from vllm_griffin.kernels.kv_compaction import PagedCaches, compact_kv_triton
from vllm_griffin.kernels.path_ranks import path_ranks_triton
from vllm_griffin.kernels.token_fusion import fusion_norms_triton
from vllm_griffin.kernels.top_tokens import top_tokens_triton
from vllm_griffin.kernels.tree_attention import (
    QuantScales,
    TreeContext,
    tree_attention_triton,
)
from vllm_griffin.kernels.tree_growth import advance_frontier_triton
from vllm_griffin.kernels.tree_order import order_tree_triton
from vllm_griffin.kernels.tree_tail import tree_tail_triton
from vllm_griffin.kernels.verify import walk_tree_triton

LAUNCH = triton.JITFunction.run
LONG, INT = torch.long, torch.int32


class CompileOnly:
    """The part of a Triton driver that the compiler asks."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


def compile_instead(self, *args, grid, warmup=False, **kwargs):
    """Prints name, bytes of shared memory, and bytes that attention in 16 bits spills from registers."""
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = LAUNCH(self, *args, grid=grid, warmup=True, **kwargs)
    found = re.findall(r"(\d+) bytes spill", log.getvalue())
    # Products of float32 are made of scalars, which no number of registers holds.
    attends = kwargs.get("COMPUTE") in (tl.bfloat16, tl.float16)
    assert found or not attends, f"no word on registers: {log.getvalue()}"
    print(self.__name__, compiled.metadata.shared, sum(map(int, found)) if attends else 0)
    return compiled


def zeros(*shape: int, dtype: torch.dtype = INT) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def attention_arguments(
    dtype: torch.dtype,
    head_dim: int,
    tail_cached: bool,
    cache_dtype: torch.dtype | None = None,
    quantised_queries: bool = False,
) -> tuple[dict, dict]:
    """Of attention to a prefix and a tail: those that all its kernels have, and the tail's tensors."""
    cache, tail = zeros(5, 2, 16, head_dim, dtype=cache_dtype or dtype), zeros(70, 2, head_dim)
    out, bits = zeros(70, 6, head_dim, dtype=dtype), zeros(2, 60, 1, dtype=LONG)
    one = torch.ones(1).expand(2)
    scales = cache_dtype and QuantScales(one, one, one if quantised_queries else None)
    shared = {
        "q": out.to(cache_dtype) if quantised_queries else out,
        "k_cache": cache,
        "v_cache": cache,
        "context": TreeContext(zeros(2, 4), *[zeros(2)] * 4, bits, tail_cached),
        "scale": 0.1,
        "out": out,
        "scales": scales,
    }
    return shared, {"k_tail": tail.to(dtype), "v_tail": tail.to(dtype)}


def tree_attention(splits: int, *arguments: Any) -> None:
    shared, tail = attention_arguments(*arguments)
    tree_attention_triton(**shared, **tail, splits=splits)


def tree_tail(*arguments: Any) -> None:
    shared, _ = attention_arguments(*arguments)
    tree_tail_triton(**shared, prefix_out=shared["out"], prefix_lse=torch.zeros(6, 70))


def main(capability: int) -> None:
    driver.set_active(CompileOnly(capability))
    triton.JITFunction.run = compile_instead
    triton.knobs.nvidia.dump_ptxas_log = True
    tree_attention(1, torch.bfloat16, 80, True)
    # The most shared memory of all that is cut into three stages.
    tree_attention(4, torch.float32, 128, False)
    tree_tail(torch.bfloat16, 128, True)
    # Older architectures have no 8-bit floats of this kind, and vLLM no such cache on them.
    if capability >= 89:
        tree_attention(4, torch.bfloat16, 128, False, torch.float8_e4m3fn)
        tree_attention(1, torch.float16, 64, True, torch.float8_e4m3fn, True)
        tree_tail(torch.bfloat16, 64, True, torch.float8_e4m3fn, True)
    for vocabulary, k in ((128256, 10), (256000, 64), (1000, 1)):
        top_tokens_triton(zeros(2, vocabulary, dtype=torch.bfloat16), k)
    level = zeros(2, 10, 10, dtype=torch.float32), zeros(2, 10, 10, dtype=LONG)
    advance_frontier_triton(*level, level[0][:, 0], level[1][:, :, :1], 10, 10)
    pool = zeros(2, 510, dtype=LONG), zeros(2, 510, dtype=torch.float32), zeros(2, 510)
    for spine_first in (None, zeros(2, dtype=torch.bool)):
        order_tree_triton(*pool, zeros(510), 130, 6, spine_first)
    slots = zeros(4), zeros(4), zeros(4, dtype=torch.bool)
    trees = zeros(4, 59, dtype=LONG), zeros(4, 60)
    sampled, invalid = zeros(70, dtype=LONG), zeros(70, dtype=torch.bool)
    for mask in (None, invalid):
        walk_tree_triton(sampled, zeros(3), zeros(2, dtype=LONG), *trees, *slots, mask, 7)
    path_ranks_triton(zeros(2, 7), zeros(3), zeros(2, dtype=LONG), trees[1], trees[1], slots[0])
    cache = zeros(5, 2, 16, 64, dtype=torch.bfloat16)
    caches = PagedCaches([cache.mT.contiguous().mT], [cache])
    compact_kv_triton(caches, sampled, zeros(2), zeros(2, 7), zeros(2))
    a = zeros(3, 3584, dtype=torch.bfloat16)
    fusion_norms_triton(a, a, a, a[0], a[0], 1e-6)


if __name__ == "__main__":
    main(int(sys.argv[1]))
