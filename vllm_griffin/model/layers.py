"""The draft's layers in vLLM's parallel layers: fusion, attention, decoder layer.

Legend of shapes: T tokens, h hidden size, i intermediate size, nh/nkv heads of this rank, hd head
size.
Formulas: GRIFFIN (arXiv 2502.11018, section 4.2) as its published code computes them.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm import _custom_ops as ops
from vllm.config import CacheConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.platforms import current_platform

from vllm_griffin.kernels.backend import runs_own_form
from vllm_griffin.kernels.token_fusion import fusion_norms
from vllm_griffin.kernels.token_fusion_cpu import fusion_norms_cpu
from vllm_griffin.kernels.tree_attention import tree_attention
from vllm_griffin.model.config import DraftConfig
from vllm_griffin.model.layout import DraftLayout
from vllm_griffin.model.level import TreeLevel


def device_kernel(op: Any) -> Callable[..., Any]:
    """An operation of vLLM's by the device's own kernel, where it has one.

    vLLM turns these kernels off for an engine that compiles its target; the draft is not compiled.
    """
    kernel: Callable[..., Any] = op
    if current_platform.is_cuda():
        kernel = op.forward_cuda
    elif current_platform.is_cpu():
        kernel = op.forward_cpu
    return kernel


def add_and_norm(norm: RMSNorm, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """(norm(x + residual), x + residual), each [T, h], in one launch; may overwrite both inputs.

    As `device_kernel`; the norm's own form is many launches.
    """
    if current_platform.is_cuda() or current_platform.is_cpu():
        ops.fused_add_rms_norm(x, residual, norm.weight.data, norm.variance_epsilon)
        return x, residual
    normed, total = norm(x, residual)
    return normed, total


class PairLinear(nn.Module):
    """A linear over (embedding, feature), embedding first, as the sum of two: nothing is concatenated.

    A checkpoint's weight [h, 2h] holds both, side by side. In 16 bits each product is rounded by itself.
    """

    def __init__(self, config: DraftConfig, bias: bool, prefix: str) -> None:
        super().__init__()
        h = config.hidden_size
        self.token = ReplicatedLinear(h, h, bias=bias, prefix=f"{prefix}.token", return_bias=False)
        self.feature = ReplicatedLinear(
            h, h, bias=False, prefix=f"{prefix}.feature", return_bias=False
        )


class PlainFusion(PairLinear):
    """EAGLE's fusion: one linear over (embedding, feature)."""

    def fuse(self, embeds: Tensor, features: Tensor) -> Tensor:
        """Embeddings and features [T, h] -> input of the decoder layer [T, h]."""
        fused: Tensor = self.token(embeds).add_(self.feature(features))
        return fused


class FusionMLP(nn.Module):
    """Weights of the ungated MLP of token-guided fusion; one norm serves both of its inputs."""

    def __init__(self, config: DraftConfig, prefix: str) -> None:
        super().__init__()
        h, i = config.hidden_size, config.intermediate_size
        self.input_layernorm = RMSNorm(h, eps=config.rms_norm_eps)
        self.up_proj = ColumnParallelLinear(
            2 * h, i, bias=False, prefix=f"{prefix}.up_proj", return_bias=False
        )
        self.down_proj = RowParallelLinear(
            i, h, bias=False, prefix=f"{prefix}.down_proj", return_bias=False
        )


class TokenGuidedFusion(nn.Module):
    """Token-guided fusion (TGF): the token's embedding enters twice.

    a = fc([e, f]);  out = a + down(silu(up([norm_in(norm_post(a)), norm_in(e)])))
    """

    def __init__(self, config: DraftConfig, prefix: str) -> None:
        super().__init__()
        h = config.hidden_size
        self.eps = config.rms_norm_eps
        self.fc = PairLinear(config, bias=True, prefix=f"{prefix}.fc")
        self.post_attention_layernorm = RMSNorm(h, eps=config.rms_norm_eps)
        self.mlp = FusionMLP(config, f"{prefix}.mlp")
        own = runs_own_form(torch.device(current_platform.device_type))
        self.norms = fusion_norms_cpu if own else fusion_norms

    def fuse(self, embeds: Tensor, features: Tensor) -> Tensor:
        """Embeddings and features [T, h] -> input of the decoder layer [T, h]."""
        fused, pair = self.norms(
            self.fc.token(embeds),
            self.fc.feature(features),
            embeds,
            self.post_attention_layernorm.weight,
            self.mlp.input_layernorm.weight,
            self.eps,
        )
        return fused + self.mlp.down_proj(F.silu(self.mlp.up_proj(pair)))


class DraftAttention(nn.Module):
    """Llama attention; keys are in vLLM's paged cache, those of tree nodes in a scratch buffer."""

    def __init__(
        self,
        config: DraftConfig,
        qkv_bias: bool,
        cache_config: CacheConfig | None,
        max_position: int,
        prefix: str,
    ) -> None:
        super().__init__()
        ranks = get_tensor_model_parallel_world_size()
        nh, nkv = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.num_heads = nh // ranks
        self.num_kv_heads = max(1, nkv // ranks)
        self.scale = self.head_dim**-0.5
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            self.head_dim,
            nh,
            nkv,
            bias=qkv_bias,
            prefix=f"{prefix}.qkv_proj",
            return_bias=False,
        )
        self.o_proj = RowParallelLinear(
            nh * self.head_dim,
            config.hidden_size,
            bias=False,
            prefix=f"{prefix}.o_proj",
            return_bias=False,
        )
        # As long as the target's context, whatever length of text the draft was trained on.
        self.rotary_emb = get_rope(
            self.head_dim, max_position=max_position, rope_parameters=config.rope_parameters
        )
        self.rotate = device_kernel(self.rotary_emb)
        self.attn = Attention(
            self.num_heads,
            self.head_dim,
            self.scale,
            num_kv_heads=self.num_kv_heads,
            cache_config=cache_config,
            prefix=f"{prefix}.attn",
        )

    def forward(self, positions: Tensor, x: Tensor, level: TreeLevel | None) -> Tensor:
        """x [T, h] at RoPE positions [T] -> [T, h]."""
        sizes = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        q, k, v = self.qkv_proj(x).split([n * self.head_dim for n in sizes], dim=-1)
        q, k = self.rotate(positions, q, k)
        out = self.attn(q, k, v) if level is None else self._attend_tree(q, k, v, level)
        return self.o_proj(out)

    def _attend_tree(self, q: Tensor, k: Tensor, v: Tensor, level: TreeLevel) -> Tensor:
        """q [T, nh * hd], k and v [T, nkv * hd] of one tree level -> [T, nh * hd]."""
        rows = q.shape[0]
        level.k_scratch.index_copy_(0, level.write_rows, k.view(rows, -1, self.head_dim))
        level.v_scratch.index_copy_(0, level.write_rows, v.view(rows, -1, self.head_dim))
        # `kv_views` and `quant_scales` are what griffin's attention backends add to vLLM's.
        impl: Any = self.attn.impl
        k_cache, v_cache = impl.kv_views(self.attn.kv_cache)
        out = q.new_empty(rows, self.num_heads, self.head_dim)
        tree_attention(
            q.view(rows, -1, self.head_dim),
            k_cache,
            v_cache,
            level.k_scratch,
            level.v_scratch,
            level.context,
            self.scale,
            out,
            impl.quant_scales(self.attn, q),
        )
        return out.view(rows, -1)


class DraftMLP(nn.Module):
    """Llama's gated MLP; with two heads its output is [T, 2h], one half for each."""

    def __init__(self, config: DraftConfig, two_heads: bool, prefix: str) -> None:
        super().__init__()
        h, i = config.hidden_size, config.intermediate_size
        self.gate_up_proj = MergedColumnParallelLinear(
            h, [i, i], bias=False, prefix=f"{prefix}.gate_up_proj", return_bias=False
        )
        self.down_proj = RowParallelLinear(
            i,
            h * (2 if two_heads else 1),
            bias=False,
            prefix=f"{prefix}.down_proj",
            return_bias=False,
        )
        self.act_fn = device_kernel(SiluAndMul())

    def forward(self, x: Tensor) -> Tensor:
        """x [T, h] -> [T, h] or [T, 2h]."""
        return self.down_proj(self.act_fn(self.gate_up_proj(x)))


class DraftLayer(nn.Module):
    """A Llama decoder layer without input norm; a token-enhanced head (TEH) doubles its output."""

    def __init__(
        self,
        config: DraftConfig,
        layout: DraftLayout,
        cache_config: CacheConfig | None,
        max_position: int,
        prefix: str,
    ) -> None:
        super().__init__()
        self.two_heads = layout.two_heads
        self.self_attn = DraftAttention(
            config, layout.qkv_bias, cache_config, max_position, f"{prefix}.self_attn"
        )
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = DraftMLP(config, layout.two_heads, f"{prefix}.mlp")

    def forward(
        self, positions: Tensor, fused: Tensor, level: TreeLevel | None
    ) -> tuple[Tensor, Tensor]:
        """Fused input [T, h] -> (predict, regress), each [T, h]; one tensor twice without TEH."""
        attended = self.self_attn(positions, fused, level)
        normed, u = add_and_norm(self.post_attention_layernorm, attended, fused)
        m = self.mlp(normed)
        if not self.two_heads:
            both = u + m
            return both, both
        predict, regress = m.chunk(2, dim=-1)
        return u + predict, u + regress
