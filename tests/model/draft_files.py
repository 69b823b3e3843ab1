"""Small drafts on disk for the tests, and the network once more in plain torch."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from vllm_griffin.model.checkpoint import DraftConfig, DraftLayout, expected_shapes

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
# As the target of golden case a: hidden size 64, 512 tokens.
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "model_type": "llama",
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "torch_dtype": "float32",
    "vocab_size": 512,
}


def random_weights(raw_config: dict, layout: DraftLayout, seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors of a layout, of a size that keeps activations near one."""
    generator = torch.Generator().manual_seed(seed)
    config = DraftConfig.from_dict(raw_config, "config.json")
    weights = {}
    for key, shape in expected_shapes(config, layout).items():
        weight = torch.randn(shape, generator=generator)
        weights[key] = 1 + 0.1 * weight if "layernorm" in key else weight * shape[-1] ** -0.5
    return weights


def write_draft(
    folder: Path, raw_config: dict, weights: dict[str, torch.Tensor], form: str = "safetensors"
) -> Path:
    """Write a draft as `safetensors`, `bin`, or either with a `sharded-` before it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw_config))
    kind = form.removeprefix("sharded-")
    stem = "model" if kind == "safetensors" else "pytorch_model"
    if form == kind:
        write_tensors(folder / f"{stem}.{kind}", weights)
        return folder
    keys, weight_map = sorted(weights), {}
    for n in range(3):
        shard = f"{stem}-0000{n + 1}-of-00003.{kind}"
        write_tensors(folder / shard, {key: weights[key] for key in keys[n::3]})
        weight_map |= dict.fromkeys(keys[n::3], shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps(index))
    return folder


def write_tensors(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    if file.suffix == ".bin":
        torch.save(tensors, file)
    else:
        save_file(tensors, file)


class PlainDraft:
    """The network of the method's description over a dict of weights, one causal sequence."""

    def __init__(self, raw_config: dict, weights: dict[str, torch.Tensor]) -> None:
        # Read here once more, so that a misread config shows.
        self.w = weights
        self.heads = raw_config["num_attention_heads"]
        self.kv_heads = raw_config.get("num_key_value_heads") or self.heads
        self.head_dim = raw_config.get("head_dim") or raw_config["hidden_size"] // self.heads
        self.eps = raw_config["rms_norm_eps"]
        new_rope = raw_config.get("rope_parameters") or {}
        self.theta = raw_config.get("rope_theta") or new_rope["rope_theta"]
        self.stretch = (raw_config.get("rope_scaling") or {}).get("factor", 1.0)

    def __call__(
        self, tokens: torch.Tensor, features: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """tokens [T], features [T, h] -> (predict, regress) [T, h]; slot t has RoPE position t."""
        w, embeds = self.w, self.w["embed_tokens.weight"][tokens]
        both = torch.cat([embeds, features], -1)
        if "fc.fc.weight" in w:
            fused = both @ w["fc.fc.weight"].T + w["fc.fc.bias"]
            n = self.norm(fused, "fc.post_attention_layernorm")
            pair = [self.norm(x, "fc.mlp.input_layernorm") for x in (n, embeds)]
            up = torch.cat(pair, -1) @ w["fc.mlp.up_proj.weight"].T
            fused = fused + F.silu(up) @ w["fc.mlp.down_proj.weight"].T
        else:
            fused = both @ w["fc.weight"].T + w.get("fc.bias", 0)
        u = fused + self.attend(fused) @ w["layers.0.self_attn.o_proj.weight"].T
        n = self.norm(u, "layers.0.post_attention_layernorm")
        gate, up, down = (w[f"layers.0.mlp.{x}_proj.weight"] for x in ("gate", "up", "down"))
        m = (F.silu(n @ gate.T) * (n @ up.T)) @ down.T
        if m.shape[-1] == u.shape[-1]:
            return u + m, u + m
        predict, regress = (torch.cat([u, u], -1) + m).chunk(2, -1)
        return predict, regress

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        scale = (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return x * scale * self.w[f"{name}.weight"]

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        hd, group = self.head_dim, self.heads // self.kv_heads
        q, k, v = (self.project(x, name).unflatten(-1, (-1, hd)).transpose(0, 1) for name in "qkv")
        q, k = self.rotate(q), self.rotate(k)
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        scores = q @ k.mT * hd**-0.5
        hidden = torch.ones(len(x), len(x)).triu(1).bool()
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        return (weights @ v).transpose(0, 1).flatten(1)

    def project(self, x: torch.Tensor, name: str) -> torch.Tensor:
        key = f"layers.0.self_attn.{name}_proj"
        return x @ self.w[f"{key}.weight"].T + self.w.get(f"{key}.bias", 0)

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        frequency = self.theta ** -(torch.arange(0, self.head_dim, 2) / self.head_dim)
        angles = torch.arange(x.shape[1])[:, None] / self.stretch * frequency
        cos, sin = angles.cos(), angles.sin()
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
