"""The draft network in plain PyTorch: GRIFFIN, and the plain EAGLE layout.

Legend of shapes: T tokens (slots), h hidden size, i intermediate size, nh/nkv heads, d head size.

Slot t holds the pair (feature f_t of the target after its final norm, token x_{t+1}) and predicts
f_{t+1} twice: `predict` goes to the target's LM head and gives x_{t+2}, `regress` is the feature of the
next slot when drafting (GRIFFIN, arXiv 2502.11018, section 4.2). Its RoPE position is t. State-dict keys
are those of published checkpoints.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class NetworkConfig:
    """What the network needs of a Hugging Face `config.json`.

    `fusion` is token-guided fusion (TGF), `two_heads` the token-enhanced head (TEH); a plain EAGLE draft
    has neither. `fc_bias` is for drafts without TGF, which always has one. `head_dim` 0 stands for hidden
    size / heads.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    qkv_bias: bool = False
    fusion: bool = True
    two_heads: bool = True
    head_dim: int = 0
    fc_bias: bool = False

    def __post_init__(self) -> None:
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)

    @classmethod
    def from_dict(
        cls,
        raw: dict[str, Any],
        *,
        fusion: bool,
        two_heads: bool,
        qkv_bias: bool = False,
        head_dim: int = 0,
        fc_bias: bool = False,
    ) -> "NetworkConfig":
        """Read the sizes of a `config.json`, the target's or a draft's; its `head_dim` is not looked at."""
        rope = raw.get("rope_parameters") or {}
        heads = raw["num_attention_heads"]
        return cls(
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_attention_heads=heads,
            num_key_value_heads=raw.get("num_key_value_heads") or heads,
            rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
            rope_theta=rope.get("rope_theta") or raw.get("rope_theta") or 10000.0,
            qkv_bias=qkv_bias,
            fusion=fusion,
            two_heads=two_heads,
            head_dim=head_dim,
            fc_bias=fc_bias,
        )


class RMSNorm(nn.Module):
    """Root-mean-square norm with a weight, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide * scale).to(x.dtype)


class FusionMLP(nn.Module):
    """Second half of token-guided fusion: an ungated MLP over two normed inputs that share one norm."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        h, i = config.hidden_size, config.intermediate_size
        self.input_layernorm = RMSNorm(h, config.rms_norm_eps)
        self.up_proj = nn.Linear(2 * h, i, bias=False)
        self.down_proj = nn.Linear(i, h, bias=False)

    def forward(self, fused: Tensor, embeds: Tensor) -> Tensor:
        pair = torch.cat([self.input_layernorm(fused), self.input_layernorm(embeds)], dim=-1)
        return self.down_proj(F.silu(self.up_proj(pair)))


class Fusion(nn.Module):
    """Token-guided fusion (TGF): embedding and feature [T, h] -> input of the decoder layer [T, h]."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        h = config.hidden_size
        self.fc = nn.Linear(2 * h, h)
        self.post_attention_layernorm = RMSNorm(h, config.rms_norm_eps)
        self.mlp = FusionMLP(config)

    def forward(self, embeds: Tensor, features: Tensor) -> Tensor:
        fused = self.fc(torch.cat([embeds, features], dim=-1))
        return fused + self.mlp(self.post_attention_layernorm(fused), embeds)


class PlainFusion(nn.Linear):
    """EAGLE's fusion: one linear over (embedding, feature)."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(2 * config.hidden_size, config.hidden_size, bias=config.fc_bias)

    def forward(self, embeds: Tensor, features: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(torch.cat([embeds, features], dim=-1))


class Attention(nn.Module):
    """The four projections of Llama attention; who attends to whom is decided by the caller."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        h, d, bias = config.hidden_size, config.head_dim, config.qkv_bias
        self.head_dim = d
        self.q_proj = nn.Linear(h, self.heads * d, bias=bias)
        self.k_proj = nn.Linear(h, self.kv_heads * d, bias=bias)
        self.v_proj = nn.Linear(h, self.kv_heads * d, bias=bias)
        self.o_proj = nn.Linear(self.heads * d, h, bias=False)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, h] -> q, k, v, each [nh, T, d]; RoPE applied, grouped keys and values repeated."""
        q = self.q_proj(x).view(-1, self.heads, self.head_dim).transpose(0, 1)
        k = self.k_proj(x).view(-1, self.kv_heads, self.head_dim).transpose(0, 1)
        v = self.v_proj(x).view(-1, self.kv_heads, self.head_dim).transpose(0, 1)
        repeat = self.heads // self.kv_heads
        k, v = rotate(k, cos, sin).repeat_interleave(repeat, 0), v.repeat_interleave(repeat, 0)
        return rotate(q, cos, sin), k, v


class GatedMLP(nn.Module):
    """Llama's MLP; with two heads it writes both halves of the output at once."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        h, i = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(h, i, bias=False)
        self.up_proj = nn.Linear(h, i, bias=False)
        self.down_proj = nn.Linear(i, h * (2 if config.two_heads else 1), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DraftLayer(nn.Module):
    """A Llama decoder layer without input norm."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config)


class Draft(nn.Module):
    """The draft model. The LM head is the target's and stays outside."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_tokens.requires_grad_(False)
        self.fc = Fusion(config) if config.fusion else PlainFusion(config)
        self.layers = nn.ModuleList([DraftLayer(config)])

    def fuse(self, features: Tensor, tokens: Tensor) -> Tensor:
        """Features [T, h] and the tokens one later [T] -> input of the decoder layer [T, h]."""
        return self.fc(self.embed_tokens(tokens), features)

    @property
    def layer(self) -> DraftLayer:
        """The one decoder layer."""
        return cast(DraftLayer, self.layers[0])

    def project(self, fused: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [nh, T, d] of fused inputs at RoPE positions [T]."""
        cos, sin = rope_table(positions, self.config.head_dim, self.config.rope_theta)
        return self.layer.self_attn.project(fused, cos, sin)

    def finish(self, fused: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
        """Residual input [T, h] and attention output [nh, T, d] -> (predict, regress), each [T, h].

        Without the second head both are the same tensor.
        """
        layer = self.layer
        u = fused + layer.self_attn.o_proj(attended.transpose(0, 1).flatten(1))
        m = layer.mlp(layer.post_attention_layernorm(u))
        if not self.config.two_heads:
            return u + m, u + m
        predict, regress = m.chunk(2, dim=-1)
        return u + predict, u + regress

    def forward(
        self, features: Tensor, tokens: Tensor, positions: Tensor, starts: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Causal forward over packed documents.

        Args:
            features: [T, h] target features f_t, document after document.
            tokens: [T] the tokens one later, x_{t+1}.
            positions: [T] t, counted from 0 in every document.
            starts: n + 1 offsets; document j is the range starts[j]:starts[j + 1].

        Returns:
            (predict, regress), each [T, h].
        """
        fused = self.fuse(features, tokens)
        q, k, v = self.project(fused, positions)
        return self.finish(fused, causal_attention(q, k, v, starts))


def causal_attention(q: Tensor, k: Tensor, v: Tensor, starts: Sequence[int]) -> Tensor:
    """Causal attention within each document: q, k, v [nh, T, d] -> [nh, T, d].

    Document by document, so nothing is spent on padding or on pairs across documents.
    """
    parts = [
        F.scaled_dot_product_attention(
            q[None, :, a:b], k[None, :, a:b], v[None, :, a:b], is_causal=True
        )[0]
        for a, b in itertools.pairwise(starts)
    ]
    return torch.cat(parts, dim=1)


def rope_table(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, d] of rotary embedding, the two halves alike (Llama's convention)."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device) / head_dim
    angles = positions[:, None].float() / theta**exponents
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary embedding to x [n, T, d]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
