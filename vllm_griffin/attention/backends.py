"""vLLM's attention backends with one addition: tree rows see their ancestors only.

Each backend here is a subclass of the one that vLLM chose. It writes the KV cache, attends prefill
chunks and plain decodes as ever, and then overwrites the rows that belong to a draft tree.
"""

import functools
from typing import Any

import torch
from vllm.v1.attention.backend import AttentionBackend, AttentionType

from vllm_griffin.attention.metadata import attached_tree, only_tree
from vllm_griffin.kernels.tree_attention import tree_attention


class TreeAttentionMixin:
    """Adds tree rows to a vLLM attention implementation."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._refuse_unsupported(kwargs)

    def _refuse_unsupported(self, kwargs: dict[str, Any]) -> None:
        if getattr(self, "attn_type", AttentionType.DECODER) != AttentionType.DECODER:
            raise ValueError("method 'griffin' supports decoder attention only")
        for name in ("alibi_slopes", "sinks", "logits_soft_cap"):
            value = getattr(self, name, None)
            if value is not None and not (isinstance(value, (int, float)) and value == 0):
                raise ValueError(f"method 'griffin' does not support attention with {name}")
        window = getattr(self, "sliding_window", None)
        if window not in (None, -1, (-1, -1)):
            raise ValueError(f"method 'griffin' does not support sliding_window={window}")

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """No: tree rows are written as they are, whatever vLLM's own part could do."""
        return False

    def kv_views(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as strided views ``[num_blocks, num_kv_heads, block_size, head_dim]``."""
        # vLLM keeps both of a head side by side: [num_blocks, num_kv_heads, block, 2 * head_dim].
        key, value = kv_cache.split(self.head_size, dim=-1)
        return key, value

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As vLLM's for causal rows, then the tree rows of ``output``.

        Backends here write the cache before and apart from this, so a batch of trees skips vLLM's part.

        Shapes: ``query``, ``output`` [num_tokens, num_heads, head_dim]; ``key``, ``value``
        [num_tokens, num_kv_heads, head_dim].
        """
        if not only_tree(attn_metadata):
            output = super().forward(  # type: ignore[misc]
                layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs
            )
        tree = attached_tree(attn_metadata)
        if tree is not None:
            k_cache, v_cache = self.kv_views(kv_cache)
            shape = (-1, self.num_heads, self.head_size)
            kv_shape = (-1, self.num_kv_heads, self.head_size)
            tree_attention(
                query.view(shape),
                k_cache,
                v_cache,
                key.view(kv_shape),
                value.view(kv_shape),
                tree,
                self.scale,
                output.view(shape),
            )
        return output


def tree_backend(backend: type[AttentionBackend]) -> type[AttentionBackend]:
    """The tree form of the backend that vLLM chose.

    Raises:
        ValueError: names the backends that have one.
    """
    makers = {
        "CPU_ATTN": _cpu_backend,
        "FLASH_ATTN": _flash_backend,
        "TRITON_ATTN": _triton_backend,
    }
    name = backend.get_name()
    if name not in makers:
        raise ValueError(
            f"method 'griffin' does not support attention backend {name}: set "
            f"attention_config backend to one of {', '.join(makers)}"
        )
    return makers[name]()


@functools.cache
def _cpu_backend() -> type[AttentionBackend]:
    from vllm_griffin.attention.cpu import TreeCPUAttentionBackend

    return TreeCPUAttentionBackend


@functools.cache
def _flash_backend() -> type[AttentionBackend]:
    from vllm.v1.attention.backends.flash_attn import (
        FlashAttentionBackend,
        FlashAttentionImpl,
        FlashAttentionMetadataBuilder,
    )

    return _with_tree(FlashAttentionBackend, FlashAttentionImpl, FlashAttentionMetadataBuilder)


@functools.cache
def _triton_backend() -> type[AttentionBackend]:
    from vllm.v1.attention.backends.triton_attn import (
        TritonAttentionBackend,
        TritonAttentionImpl,
        TritonAttentionMetadataBuilder,
    )

    return _with_tree(TritonAttentionBackend, TritonAttentionImpl, TritonAttentionMetadataBuilder)


def _with_tree(backend: Any, impl: Any, builder: Any) -> type[AttentionBackend]:
    """A subclass of a CUDA backend whose implementation knows trees."""
    from vllm.v1.attention.backend import AttentionCGSupport

    tree_impl = type(f"Tree{impl.__name__}", (TreeAttentionMixin, impl), {})

    class TreeMetadataBuilder(builder):  # type: ignore[misc]
        @classmethod
        def get_cudagraph_support(cls, *args: Any, **kwargs: Any) -> AttentionCGSupport:
            # A full graph holds tree attention alone, for batches in which every request has a
            # tree of one size; others run between piecewise graphs.
            support = super().get_cudagraph_support(*args, **kwargs)
            return min(support, AttentionCGSupport.UNIFORM_BATCH, key=lambda s: s.value)

    return type(
        f"Tree{backend.__name__}",
        (backend,),
        {
            "get_impl_cls": staticmethod(lambda: tree_impl),
            "get_builder_cls": staticmethod(lambda: TreeMetadataBuilder),
        },
    )
