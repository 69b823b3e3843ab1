"""vLLM's attention backends with one addition: tree rows see their ancestors only.

Each backend here is a subclass of the one that vLLM chose. It writes the KV cache, attends prefill
chunks and plain decodes as ever, and then overwrites the rows that belong to a draft tree.
"""

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.config.compilation import CUDAGraphMode
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.utils.torch_utils import is_quantized_kv_cache
from vllm.v1.attention.backend import AttentionBackend, AttentionType
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_griffin.attention.metadata import attached_tree, only_tree
from vllm_griffin.attention.prefix import (
    ENV,
    FlashAttentionRefusal,
    Shape,
    attend_from_prefix,
    demanded_form,
    faster_forms,
    flash_attention,
)
from vllm_griffin.config import QUANTISED_CACHES, griffin_config
from vllm_griffin.config_errors import first_line
from vllm_griffin.kernels.tree_attention import QuantScales, TreeContext, tree_attention

# vLLM shows what is logged below its own name.
logger = init_logger("vllm.griffin.attention")


class TreeAttentionMixin:
    """Adds tree rows to a vLLM attention implementation."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    kv_cache_dtype: str

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._refuse_unsupported()
        # A CPU attends all rows in the activations' dtype.
        if self.quantised_cache and current_platform.is_cuda():
            logger.warning_once(
                "griffin: with kv_cache_dtype=%r vLLM's attention may round its weights to 8 bits, and that "
                "of tree rows does not, so outputs may differ from those without speculation by that "
                "rounding. Leave kv_cache_dtype out where they must not",
                self.kv_cache_dtype,
            )

    def _refuse_unsupported(self) -> None:
        if getattr(self, "attn_type", AttentionType.DECODER) != AttentionType.DECODER:
            raise ValueError(
                "method 'griffin' supports decoder attention only: use a decoder-only target"
            )
        for name in ("alibi_slopes", "sinks", "logits_soft_cap"):
            value = getattr(self, name, None)
            if value is not None and not (isinstance(value, (int, float)) and value == 0):
                raise ValueError(
                    f"method 'griffin' does not support attention with {name}: use a target without"
                )
        # The engine's own check comes before a checkpoint may name such a cache.
        if self.quantised_cache and self.kv_cache_dtype not in QUANTISED_CACHES:
            raise ValueError(
                f"method 'griffin' does not support kv_cache_dtype={self.kv_cache_dtype!r}: set it to "
                "'fp8', or use a checkpoint that names no such cache"
            )
        window = getattr(self, "sliding_window", None)
        if window not in (None, -1, (-1, -1)):
            raise ValueError(
                f"method 'griffin' does not support sliding_window={window}: use a full-attention target"
            )

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """No: tree rows are written as they are, whatever vLLM's own part could do."""
        return False

    @property
    def quantised_cache(self) -> bool:
        """Whether the KV cache holds 8-bit floats."""
        return is_quantized_kv_cache(self.kv_cache_dtype)

    def kv_views(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as strided views ``[num_blocks, num_kv_heads, block_size, head_dim]``."""
        if self.quantised_cache:
            # To vLLM they are bytes.
            kv_cache = kv_cache.view(current_platform.fp8_dtype())
        return self.split_cache(kv_cache)

    def split_cache(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`kv_views` of a cache in its own dtype."""
        # vLLM keeps both of a head side by side: [num_blocks, num_kv_heads, block, 2 * head_dim].
        key, value = kv_cache.split(self.head_size, dim=-1)
        return key, value

    def quant_scales(self, layer: Any, query: torch.Tensor) -> QuantScales | None:
        """Those of a layer whose cache is quantised, and of its queries if vLLM has quantised them too."""
        if not self.quantised_cache:
            return None
        k, v, q = (
            scale.view(-1).expand(self.num_kv_heads)
            for scale in (layer._k_scale, layer._v_scale, layer._q_scale)
        )
        return QuantScales(k, v, q if query.dtype == current_platform.fp8_dtype() else None)

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
        tree = attached_tree(attn_metadata)
        if tree is None or not only_tree(attn_metadata):
            output = super().forward(  # type: ignore[misc]
                layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs
            )
        if tree is not None:
            shape = (-1, self.num_heads, self.head_size)
            kv_shape = (-1, self.num_kv_heads, self.head_size)
            self.attend_tree(
                query.view(shape),
                key.view(kv_shape),
                value.view(kv_shape),
                self.kv_views(kv_cache),
                self.quant_scales(layer, query),
                attn_metadata,
                tree,
                output.view(shape),
            )
        return output

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
        """Writes the tree rows of `output`; shapes as in `tree_attention`."""
        tree_attention(query, *caches, key, value, tree, self.scale, output, scales)


class PrefixAttentionMixin(TreeAttentionMixin):
    """Tree rows of a FlashAttention layer, which has two forms of attending them (`prefix.py`)."""

    vllm_flash_attn_version: int
    # Whether FlashAttention attends the prefix, by the smallest number of requests for which that holds.
    prefix_first: Mapping[int, bool] = MappingProxyType({1: False})

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
        """Writes the tree rows of `output`, in the form that is faster for so many requests."""
        requests = len(tree.num_rows)
        if not self.prefix_first[max(n for n in self.prefix_first if n <= max(requests, 1))]:
            super().attend_tree(query, key, value, caches, scales, attn_metadata, tree, output)
            return
        tokens = attn_metadata.num_actual_tokens
        attend_from_prefix(
            functools.partial(
                flash_attention(self.vllm_flash_attn_version),
                num_splits=attn_metadata.max_num_splits,
            ),
            query[:tokens],
            *caches,
            tree,
            attn_metadata.query_start_loc[: requests + 1],
            attn_metadata.max_query_len,
            attn_metadata.max_seq_len,
            self.scale,
            output[:tokens],
        )


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
    if demanded_form() == "prefix" and name != "FLASH_ATTN":
        raise ValueError(f"{ENV}='prefix' needs attention backend FLASH_ATTN, and this is {name}")
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
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.attention.backends.flash_attn import (
        FlashAttentionBackend,
        FlashAttentionImpl,
        FlashAttentionMetadataBuilder,
    )

    class ChoosingBuilder(FlashAttentionMetadataBuilder):
        """Tells its layers in which form they attend tree rows."""

        def __init__(
            self,
            kv_cache_spec: AttentionSpec,
            layer_names: list[str],
            vllm_config: VllmConfig,
            device: torch.device,
        ) -> None:
            super().__init__(kv_cache_spec, layer_names, vllm_config, device)
            layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names).values()
            spec = griffin_config(vllm_config)
            chains = spec is not None and spec.tree_width == 1
            for layer in layers:
                # A draft's tree levels have their tail elsewhere: they always take our kernel. Chains are
                # verified by FlashAttention's own causal attention.
                if layer.is_draft_layer or chains:
                    continue
                impl: Any = layer.impl
                impl.prefix_first = choose_form(
                    impl, kv_cache_spec, vllm_config, device, self.max_num_splits
                )

    return _with_tree(
        FlashAttentionBackend, FlashAttentionImpl, ChoosingBuilder, PrefixAttentionMixin
    )


def choose_form(
    impl: Any,
    spec: AttentionSpec,
    vllm_config: VllmConfig,
    device: torch.device,
    graph_splits: int,
) -> Mapping[int, bool]:
    """What `PrefixAttentionMixin.prefix_first` is for a layer: as demanded, or as timed on `device`.

    Args:
        graph_splits: Parts into which FlashAttention may cut a prefix in captured steps; 0: its choice.

    Raises:
        ValueError: the prefix form is demanded where FlashAttention cannot take part.
    """
    form = demanded_form()
    if impl.quantised_cache:
        # FlashAttention would round the weights of the prefix to 8 bits as well.
        if form == "prefix":
            raise ValueError(
                f"{ENV}='prefix' does not work with kv_cache_dtype={impl.kv_cache_dtype!r}"
            )
        form = "split"
    if impl.fa4_hd256:
        # It takes block tables of exact width, which only vLLM's own call knows.
        if form == "prefix":
            raise ValueError(f"{ENV}='prefix' does not work with FlashAttention 4 at head size 256")
        form = "split"
    if form != "auto":
        return {1: form == "prefix"}
    rows = 1 + vllm_config.num_speculative_tokens
    compilation = vllm_config.compilation_config
    captures = compilation.cudagraph_mode.decode_mode() == CUDAGraphMode.FULL
    scheduler = vllm_config.scheduler_config
    shape = Shape(
        heads=impl.num_heads,
        kv_heads=impl.num_kv_heads,
        head_dim=impl.head_size,
        block_size=spec.block_size,
        dtype=spec.dtype,
        rows=rows,
        context=vllm_config.model_config.max_model_len,
        # More trees do not fit into a step.
        batch=min(scheduler.max_num_seqs, max(1, scheduler.max_num_batched_tokens // rows)),
        graph_splits=graph_splits,
        graph_rows=(compilation.max_cudagraph_capture_size or 0) if captures else 0,
    )
    try:
        found = faster_forms(shape, impl.vllm_flash_attn_version, device)
    except FlashAttentionRefusal as refusal:
        error = refusal.error
        logger.warning_once(
            "griffin: FlashAttention %s cannot attend the prefix of trees here (%s: %s), our kernel does",
            *(impl.vllm_flash_attn_version, type(error).__name__, first_line(error)),
        )
        return {1: False}
    logger.info_once(
        "griffin: what attends the prefix of trees, by the number of requests from which on: %s",
        ", ".join(
            f"{n}: {'FlashAttention' if flash else 'our kernel'}" for n, flash in found.items()
        ),
    )
    return found


@functools.cache
def _triton_backend() -> type[AttentionBackend]:
    from vllm.v1.attention.backends.triton_attn import (
        TritonAttentionBackend,
        TritonAttentionImpl,
        TritonAttentionMetadataBuilder,
    )

    return _with_tree(TritonAttentionBackend, TritonAttentionImpl, TritonAttentionMetadataBuilder)


def _with_tree(
    backend: Any, impl: Any, builder: Any, mixin: type = TreeAttentionMixin
) -> type[AttentionBackend]:
    """A subclass of a CUDA backend whose implementation knows trees."""
    from vllm.v1.attention.backend import AttentionCGSupport

    tree_impl = type(f"Tree{impl.__name__}", (mixin, impl), {})

    class TreeMetadataBuilder(builder):  # type: ignore[misc]
        @classmethod
        def get_cudagraph_support(cls, *args: Any, **kwargs: Any) -> AttentionCGSupport:
            # A full graph of more than one row a request holds tree attention alone (or causal attention,
            # of chains), for batches in which every request has a tree of one size.
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
