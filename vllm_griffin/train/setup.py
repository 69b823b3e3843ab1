"""What a draft takes from its target: configuration, embedding and LM head."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_griffin.model.checkpoint import TensorInfo, find_folder, find_weights, list_tensors
from vllm_griffin.model.embedding import TARGET_EMBEDDING
from vllm_griffin.model.files import read_tensors
from vllm_griffin.train.network import Draft, NetworkConfig

HEAD = "lm_head.weight"


@dataclass
class TargetParts:
    """`config` is the target's `config.json`; `embeddings` and `head` [V, h] float32.

    `head` @ feature are the target's logits: a scale that the target applies to them is multiplied in.
    """

    config: dict[str, Any]
    embeddings: Tensor
    head: Tensor


def check_target(target: str | Path) -> None:
    """Refuse a target that drafts cannot be trained for, before its data are made.

    Raises:
        What `load_target_parts` raises.
    """
    _open(target)


def load_target_parts(target: str | Path) -> TargetParts:
    """Read embedding and LM head of a model, in one file or in shards: a folder or a hub name.

    Raises:
        CheckpointError: Neither a folder nor a model that the hub could give, or a damaged weight file.
        FileNotFoundError: A folder without `config.json`.
        KeyError: The weights have no embedding by the name that Llama-like models give it, or the config no
            length of context.
        ValueError: The LM head has a bias, or logits are soft-capped, which a draft's head cannot have.
    """
    config, tensors = _open(target)
    found = {
        key: tensor.float()
        for key in (TARGET_EMBEDDING, HEAD)
        if key in tensors
        for _, tensor in read_tensors(tensors[key].file, [key])
    }
    # A tied head is not stored.
    head, scale = found.get(HEAD, found[TARGET_EMBEDDING]), _logit_scale(config)
    return TargetParts(config, found[TARGET_EMBEDDING], head if scale == 1 else head * scale)


def _open(target: str | Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """A target's `config.json`, and where its weights are."""
    folder = find_folder(target)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{target} is not a model folder (no config.json)")
    source = find_weights(folder)
    tensors = list_tensors(source) if source else {}
    if "lm_head.bias" in tensors:
        raise ValueError(
            f"{target}: its LM head has a bias, which drafts do not support; take another target"
        )
    if TARGET_EMBEDDING not in tensors:
        raise KeyError(
            f"{target}: no {TARGET_EMBEDDING} in its weights; take a target of the Llama family"
        )
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "max_position_embeddings" not in config:
        raise KeyError(f"{target}: its config.json has no 'max_position_embeddings'")
    if config.get("final_logit_softcapping"):
        raise ValueError(
            f"{target}: its logits are soft-capped, which drafts do not support; take another target"
        )
    return config, tensors


def _logit_scale(config: dict[str, Any]) -> float:
    """Cohere and others multiply their logits by a constant, Granite divides them by one."""
    scale: float = config.get("logit_scale", 1.0) / config.get("logits_scaling", 1.0)
    return scale


def new_draft(parts: TargetParts, *, fusion: bool = True, two_heads: bool = True) -> Draft:
    """A draft of the target's own layer sizes with the target's embedding.

    Args:
        parts: Of the target.
        fusion: Token-guided fusion (TGF).
        two_heads: Token-enhanced head (TEH); without both it is an EAGLE draft.

    Raises:
        KeyError: The target's configuration lacks a size; it is named.
    """
    try:
        config = NetworkConfig.from_dict(
            parts.config,
            fusion=fusion,
            two_heads=two_heads,
            head_dim=parts.config.get("head_dim") or 0,
        )
    except KeyError as error:
        raise KeyError(f"the target's config.json has no {error.args[0]!r}") from error
    draft = Draft(config)
    with torch.no_grad():
        draft.embed_tokens.weight.copy_(parts.embeddings)
    return draft
