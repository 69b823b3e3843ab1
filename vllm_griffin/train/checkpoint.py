"""Drafts on disk: published key layout, `config.json` for the engine, and conditioning while training."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from vllm_griffin.model.checkpoint import DraftCheckpoint
from vllm_griffin.model.config import PAPER_TREE
from vllm_griffin.model.layout import EMBEDDING
from vllm_griffin.model.vocabulary import VOCABULARY_FILE
from vllm_griffin.train.network import Draft, Fusion, NetworkConfig
from vllm_griffin.whole_file import whole_file, write_json


class _Scaled(nn.Module):
    """A weight that is trained divided by a fixed scale."""

    scale: Tensor

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.scale

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / self.scale


def condition(draft: Draft, features: Tensor, tokens: Tensor, *, initialise: bool) -> None:
    """Let all inputs and outputs of a draft count alike in training, and give a new one its first weights.

    Embeddings are some ten times smaller than features, and single feature channels ten times larger
    than others. The fusion's input columns are therefore trained in units of 1 / rms of their channel
    and the output rows in units of the features' deviation. The function that the network computes has
    the published form: `published_state` multiplies the scales in.

    Args:
        draft: A network whose `embed_tokens` is the target's.
        features: [T, h] features of some training documents.
        tokens: [T] their tokens.
        initialise: Draw the weights anew; False keeps the function that a loaded draft computes.
    """
    h = draft.config.hidden_size
    embeds = draft.embed_tokens(tokens)
    rms = torch.cat([embeds, features], dim=-1).square().mean(0).sqrt()
    spread = features.std(0)
    # A channel that is the same in all of these documents need not be so in others.
    rms, spread = (x.clamp_min(1e-3 * x.median()) for x in (rms, spread))
    fc = draft.fc.fc if isinstance(draft.fc, Fusion) else draft.fc
    down = draft.layer.mlp.down_proj
    if initialise:
        _initialise(draft)
        fc.weight.data.div_(rms)
    rows = (spread / spread.median()).repeat(down.out_features // h)[:, None]
    parametrize.register_parametrization(fc, "weight", _Scaled(1 / rms))
    parametrize.register_parametrization(down, "weight", _Scaled(rows))


@torch.no_grad()
def _initialise(draft: Draft) -> None:
    """Normal weights of variance 1 / inputs, no bias; the residual branches start small."""
    for linear in [m for m in draft.modules() if isinstance(m, nn.Linear)]:
        nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
    fusion = draft.fc.mlp.down_proj if isinstance(draft.fc, Fusion) else None
    for branch in [draft.layer.mlp.down_proj, draft.layer.self_attn.o_proj, fusion]:
        if branch is not None:
            branch.weight.mul_(0.3)


def mark_blocks(draft: Draft) -> None:
    """Tell Muon which weights join two matrices, and along which dimension (see `optim.Muon`)."""
    joined = {"fc.fc": 1, "fc.mlp.up_proj": 1} if draft.config.fusion else {"fc": 1}
    if draft.config.two_heads:
        joined["layers.0.mlp.down_proj"] = 0
    for name, dim in joined.items():
        module = draft.get_submodule(name)
        for p in module.parameters():
            if p.ndim == 2:
                p.block_dim = dim  # type: ignore[attr-defined]


def published_state(draft: Draft) -> dict[str, Tensor]:
    """State dict with the published keys (without `embed_tokens`); scales of `condition` multiplied in."""
    state = {k: v for k, v in draft.state_dict().items() if ".parametrizations." not in k}
    for name, module in draft.named_modules():
        if parametrize.is_parametrized(module):
            state[f"{name}.weight"] = module.weight.detach()
    state.pop(EMBEDDING)
    return state


def draft_config_json(target: dict[str, Any], draft: NetworkConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` of a draft for a target with the given `config.json`."""
    name = "GriffinForCausalLM" if draft.fusion or draft.two_heads else "EagleLlamaForCausalLM"
    return {
        "architectures": [name],
        "model_type": "llama",
        "hidden_size": draft.hidden_size,
        "intermediate_size": draft.intermediate_size,
        "num_attention_heads": draft.num_attention_heads,
        "num_key_value_heads": draft.num_key_value_heads,
        "head_dim": draft.head_dim,
        "num_hidden_layers": 1,
        "hidden_act": "silu",
        "rms_norm_eps": draft.rms_norm_eps,
        "rope_theta": draft.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": draft.rope_theta},
        "qkv_bias": draft.qkv_bias,
        "attention_bias": False,
        "mlp_bias": False,
        "vocab_size": draft.vocab_size,
        "max_position_embeddings": target["max_position_embeddings"],
        "bos_token_id": target.get("bos_token_id"),
        "eos_token_id": target.get("eos_token_id"),
        "tie_word_embeddings": False,
        "dtype": dtype,
        "tree": dict(PAPER_TREE),
    }


def save_draft(
    draft: Draft,
    folder: str | Path,
    target: dict[str, Any],
    dtype: torch.dtype,
    vocabulary: list[int] | None = None,
    own_embedding: bool = False,
) -> None:
    """Write `config.json` and `model.safetensors`; each file is replaced as a whole.

    Args:
        draft: The network.
        folder: Where to.
        target: The target's `config.json`.
        dtype: Of the stored weights.
        vocabulary: The tokens that the losses looked at, where that is not all, the most frequent first;
            for `vocabulary.json`.
        own_embedding: Write the embedding, too; serving takes the target's where there is none.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = published_state(draft)
    if own_embedding:
        state[EMBEDDING] = draft.embed_tokens.weight
    state = {k: v.detach().to(dtype).contiguous() for k, v in state.items()}
    with whole_file(folder / "model.safetensors") as scratch:
        save_file(state, scratch, metadata={"format": "pt"})
        scratch.chmod(0o644)
    config = draft_config_json(target, draft.config, str(dtype).removeprefix("torch."))
    if vocabulary is not None and len(vocabulary) < draft.config.vocab_size:
        # It learnt to tell these apart, and no others.
        config["draft_vocab_size"] = len(vocabulary)
    write_json(folder / "config.json", config)
    if vocabulary is not None:
        with whole_file(folder / VOCABULARY_FILE) as scratch:
            scratch.write_text(json.dumps(vocabulary) + "\n")


def load_draft(folder: str | Path, embeddings: Tensor | None = None) -> Draft:
    """Load a draft of any layout that the engine reads, as float32.

    Args:
        folder: The draft's folder, or its name on the hub.
        embeddings: [V, h] the target's, for a checkpoint that leaves `embed_tokens` out.

    Raises:
        CheckpointError: No draft there, or a key that is missing, unexpected or of the wrong shape.
        KeyError: No embedding, or a part that the training network does not have, by name.
        ValueError: Its rotary embedding is scaled, which the training network does not do.
    """
    checkpoint = DraftCheckpoint.open(folder)
    layout = checkpoint.validate()
    if embeddings is not None:
        checkpoint.check_target(hidden_size=embeddings.shape[1], vocab_size=embeddings.shape[0])
    rope = checkpoint.config.rope_parameters.get("rope_type", "default")
    if rope != "default":
        raise ValueError(f"{folder}: drafts with rope_type {rope!r} cannot be trained or replayed")
    draft = Draft(
        NetworkConfig.from_dict(
            checkpoint.raw_config,
            fusion=layout.fusion,
            two_heads=layout.two_heads,
            qkv_bias=layout.qkv_bias,
            head_dim=checkpoint.config.head_dim,
            fc_bias=layout.fc_bias and not layout.fusion,
        )
    )
    state = dict(checkpoint.weights())
    if embeddings is not None:
        state.setdefault(EMBEDDING, embeddings)
    wrong = draft.state_dict().keys() ^ state.keys()
    if wrong:
        raise KeyError(f"{folder}: missing or unexpected keys: {', '.join(sorted(wrong))}")
    draft.load_state_dict({k: v.float() for k, v in state.items()})
    return draft
