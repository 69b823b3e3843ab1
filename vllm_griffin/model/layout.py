"""Which network a draft checkpoint holds, told from its tensors, and which tensors it needs.

Legend of shapes: h hidden size, i intermediate size, nh/nkv heads, hd head size, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from vllm_griffin.model.config import DraftConfig

Shape = tuple[int, ...]
QKV_BIASES = tuple(f"layers.0.self_attn.{name}_proj.bias" for name in "qkv")
DOWN_PROJ = "layers.0.mlp.down_proj.weight"
EMBEDDING = "embed_tokens.weight"


@dataclass(frozen=True)
class DraftLayout:
    """The variant of the network.

    GRIFFIN has token-guided fusion (TGF) and two heads (TEH); an EAGLE draft has neither; with only
    one of the two it is an ablation of GRIFFIN.

    Attributes:
        fusion: TGF in front of the layer; else one linear over (embedding, feature).
        two_heads: The layer writes `predict` and `regress`; else one output serves as both.
        qkv_bias: Biases on the q, k and v projections.
        fc_bias: Bias on the linear over (embedding, feature); GRIFFIN always has it.
        own_embedding: The checkpoint brings `embed_tokens.weight`.
    """

    fusion: bool = True
    two_heads: bool = True
    qkv_bias: bool = False
    fc_bias: bool = True
    own_embedding: bool = True

    @property
    def name(self) -> str:
        """What people call it."""
        if self.fusion:
            return "GRIFFIN" if self.two_heads else "GRIFFIN without TEH"
        return "GRIFFIN without TGF" if self.two_heads else "EAGLE"

    @classmethod
    def detect(cls, shapes: Mapping[str, Shape], config: DraftConfig) -> "DraftLayout":
        """Tell the layout from tensor names and shapes [key -> shape].

        Where tensors contradict each other the nearest layout is returned, so that comparing with
        `expected_shapes` says what is wrong.
        """
        fusion = "fc.fc.weight" in shapes or "fc.weight" not in shapes
        rows = shapes.get(DOWN_PROJ, (0,))[0]
        two_heads = rows != config.hidden_size if fusion else rows == 2 * config.hidden_size
        return cls(
            fusion=fusion,
            two_heads=two_heads,
            qkv_bias=any(key in shapes for key in QKV_BIASES),
            fc_bias=fusion or "fc.bias" in shapes,
            own_embedding=EMBEDDING in shapes,
        )

    @classmethod
    def from_config(cls, config: DraftConfig) -> "DraftLayout":
        """Guess the layout where there are no tensors to look at."""
        eagle = any(name.startswith("Eagle") for name in config.architectures)
        return cls(
            fusion=not eagle,
            two_heads=not eagle,
            qkv_bias=config.qkv_bias,
            fc_bias=not eagle,
            own_embedding=False,
        )


def expected_shapes(config: DraftConfig, layout: DraftLayout) -> dict[str, Shape]:
    """Every key of a checkpoint of this layout, with its shape."""
    h, i = config.hidden_size, config.intermediate_size
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    shapes: dict[str, Shape] = {}
    if layout.own_embedding:
        shapes[EMBEDDING] = (config.vocab_size, h)
    fc = "fc.fc" if layout.fusion else "fc"
    shapes[f"{fc}.weight"] = (h, 2 * h)
    if layout.fc_bias:
        shapes[f"{fc}.bias"] = (h,)
    if layout.fusion:
        shapes["fc.post_attention_layernorm.weight"] = (h,)
        shapes["fc.mlp.input_layernorm.weight"] = (h,)
        shapes["fc.mlp.up_proj.weight"] = (i, 2 * h)
        shapes["fc.mlp.down_proj.weight"] = (h, i)
    for name, rows in (("q", q), ("k", kv), ("v", kv)):
        shapes[f"layers.0.self_attn.{name}_proj.weight"] = (rows, h)
        if layout.qkv_bias:
            shapes[f"layers.0.self_attn.{name}_proj.bias"] = (rows,)
    shapes["layers.0.self_attn.o_proj.weight"] = (h, q)
    shapes["layers.0.post_attention_layernorm.weight"] = (h,)
    shapes["layers.0.mlp.gate_proj.weight"] = (i, h)
    shapes["layers.0.mlp.up_proj.weight"] = (i, h)
    shapes[DOWN_PROJ] = (2 * h if layout.two_heads else h, i)
    return shapes
