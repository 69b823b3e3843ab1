"""Pairs of a target and a draft that have a shape but no weights; engines load them with random numbers."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of a Llama.

    Attributes:
        heads, kv_heads: Of queries, and of keys and values.
        vocab: Tokens.
        tied: Whether the LM head is the embedding.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool = True

    def config(self, dtype: str) -> dict[str, Any]:
        """As in a checkpoint's ``config.json``; dtype "auto" is bfloat16."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden // self.heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "tie_word_embeddings": self.tied,
            "torch_dtype": "bfloat16" if dtype == "auto" else dtype,
        }


NAMED = {
    "llama-3-8b": LlamaShape(4096, 14336, 32, 32, 8, 128256, tied=False),
    "llama-3.2-1b": LlamaShape(2048, 8192, 16, 32, 8, 128256),
    "smollm2-135m": LlamaShape(576, 1536, 30, 9, 3, 49152),
    "toy": LlamaShape(64, 96, 2, 2, 1, 640),
}


def write_pair(folder: Path, config: dict[str, Any], draft_vocabulary: int) -> tuple[Path, Path]:
    """Folders of a target and of a draft of one layer; engines need ``load_format`` "dummy" for them.

    Args:
        config: The target's.
        draft_vocabulary: Tokens that the draft chooses from, as `vllm-griffin train` writes them. 0, or as
            many as the target has: all, and vLLM's own EAGLE takes the draft, too.
    """
    target, draft = folder / "target", folder / "draft"
    one_layer: dict[str, Any] = {"num_hidden_layers": 1}
    reduced = 0 < draft_vocabulary < config["vocab_size"]
    if reduced:
        one_layer["draft_vocab_size"] = draft_vocabulary
    for path, changes in ((target, {}), (draft, one_layer)):
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config | changes))
    if reduced:
        (draft / "vocabulary.json").write_text(json.dumps(list(range(draft_vocabulary))))
    return target, draft
