"""A draft's copy of its target's embedding: left out, and put back."""

from pathlib import Path

import torch
from torch import Tensor

from vllm_griffin.model.checkpoint import CheckpointError, find_weights, read_weight
from vllm_griffin.model.layout import EMBEDDING

# As the Llama family names it.
TARGET_EMBEDDING = "model.embed_tokens.weight"
# A [h, ...] weight that every layout has.
OUTPUT = "layers.0.self_attn.o_proj.weight"
BLOCK_ROWS = 8192


def leave_out_embedding(tensors: dict[str, Tensor], target: Path) -> str:
    """Drop an embedding that is the target's, as serving and `add_embedding` put it back.

    Returns:
        "left out"; "kept" if it is the draft's own; "none" if there is none.

    Raises:
        CheckpointError: The target's weights cannot be read, or hold no embedding.
    """
    own = tensors.get(EMBEDDING)
    if own is None:
        return "none"
    if not _restores(own, _target_embedding(target), tensors[OUTPUT].dtype):
        return "kept"
    del tensors[EMBEDDING]
    return "left out"


def add_embedding(tensors: dict[str, Tensor], target: Path, vocab_size: int) -> str:
    """Put the target's embedding into a draft without one: first, as published, in the weights' dtype.

    Returns:
        "kept" if the draft has one, else "added".

    Raises:
        CheckpointError: As `leave_out_embedding`, or it is not [vocab_size, h].
    """
    if EMBEDDING in tensors:
        return "kept"
    embedding = _target_embedding(target)
    wanted = [vocab_size, tensors[OUTPUT].shape[0]]
    if list(embedding.shape) != wanted:
        raise CheckpointError(
            f"{target}: `{TARGET_EMBEDDING}` has shape {list(embedding.shape)}, the draft needs {wanted}"
        )
    rest = dict(tensors)
    tensors.clear()
    tensors |= {EMBEDDING: embedding.to(rest[OUTPUT].dtype)} | rest
    return "added"


def _restores(own: Tensor, target: Tensor, dtype: torch.dtype) -> bool:
    """Whether [V, h] `own` has the target's values, and bit for bit what `add_embedding` would add."""
    if own.shape != target.shape or own.dtype != dtype:
        return False
    for mine, theirs in zip(own.split(BLOCK_ROWS), target.split(BLOCK_ROWS), strict=True):
        added = theirs.to(dtype)
        same_bits = torch.equal(
            mine.contiguous().view(torch.uint8), added.contiguous().view(torch.uint8)
        )
        if not same_bits or not torch.equal(added.double(), theirs.double()):
            return False
    return True


def _target_embedding(folder: Path) -> Tensor:
    """[V, h] of the target, in its own dtype.

    Raises:
        CheckpointError: The target has no weights, or no embedding by the name of the Llama family.
    """
    weights = find_weights(folder)
    if weights is None:
        raise CheckpointError(f"{folder}: no weights, whose `{TARGET_EMBEDDING}` is needed")
    embedding = read_weight(folder, TARGET_EMBEDDING)
    if embedding is None:
        raise CheckpointError(f"{weights}: missing key `{TARGET_EMBEDDING}` of the target")
    return embedding
