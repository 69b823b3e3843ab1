"""What a draft takes from its target: configuration, embedding and LM head."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from vllm_griffin.train.network import Draft, DraftConfig

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass
class TargetParts:
    """`config` is the target's `config.json`; `embeddings` and `head` [V, h] float32."""

    config: dict[str, Any]
    embeddings: Tensor
    head: Tensor


def load_target_parts(target: str | Path) -> TargetParts:
    """Read embedding and LM head of a model folder with safetensors, single or sharded.

    Raises:
        FileNotFoundError: No folder with `config.json` there.
        KeyError: The folder's weights have no embedding.
    """
    folder = Path(target)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{target} is not a model folder (no config.json)")
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as weights:
            for key in (EMBEDDING, HEAD):
                if key in weights.keys():  # noqa: SIM118  (safe_open is no mapping)
                    found[key] = weights.get_tensor(key).float()
    if EMBEDDING not in found:
        raise KeyError(f"{target}: no {EMBEDDING} in its safetensors files")
    config = json.loads((folder / "config.json").read_text())
    # A tied head is not stored.
    return TargetParts(config, found[EMBEDDING], found.get(HEAD, found[EMBEDDING]))


def new_draft(parts: TargetParts, eagle: bool = False) -> Draft:
    """A draft of the target's own layer sizes with the target's embedding."""
    config = DraftConfig.from_dict(parts.config, fusion=not eagle, two_heads=not eagle)
    draft = Draft(config)
    with torch.no_grad():
        draft.embed_tokens.weight.copy_(parts.embeddings)
    return draft
