"""Script: compile every kernel for a CUDA architecture, on a machine without a GPU.

The interpreter accepts Python that the compiler refuses. This runs the launchers on CPU tensors
with a driver that only names a target, and stops each launch after the compiler.
"""

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from vllm_griffin.kernels.kv_compaction import PagedCaches, compact_kv_triton
from vllm_griffin.kernels.path_ranks import path_ranks_triton
from vllm_griffin.kernels.token_fusion import fusion_norms_triton
from vllm_griffin.kernels.tree_attention import TreeContext, tree_attention_triton
from vllm_griffin.kernels.tree_growth import advance_frontier_triton, order_tree_triton
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
    compiled = LAUNCH(self, *args, grid=grid, warmup=True, **kwargs)
    print(self.__name__, compiled.metadata.shared)
    return compiled


def zeros(*shape: int, dtype: torch.dtype = INT) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def tree_attention(dtype: torch.dtype, head_dim: int, splits: int) -> None:
    cache, tail = zeros(5, 2, 16, head_dim, dtype=dtype), zeros(70, 2, head_dim, dtype=dtype)
    q, per_request, bits = (
        zeros(70, 6, head_dim, dtype=dtype),
        zeros(2),
        zeros(2, 60, 1, dtype=LONG),
    )
    context = TreeContext(zeros(2, 4), per_request, per_request, per_request, per_request, bits)
    tree_attention_triton(q, cache, cache, tail, tail, context, 0.1, q.clone(), splits)


def main(capability: int) -> None:
    driver.set_active(CompileOnly(capability))
    triton.JITFunction.run = compile_instead
    tree_attention(torch.bfloat16, 80, 1)
    tree_attention(torch.float32, 64, 4)
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
    fusion_norms_triton(a, a, a[0], a[0], 1e-6)


if __name__ == "__main__":
    main(int(sys.argv[1]))
