"""What a draft takes from its target: the embedding, the LM head, and how logits are scaled."""

from dataclasses import dataclass
from typing import Any

from torch import nn
from vllm.lora.layers.base import BaseLayerWithLoRA
from vllm.model_executor.models.utils import PPMissingLayer


class TargetError(ValueError):
    """The target model's class has no embedding or LM head that a draft could share."""


@dataclass
class SharedModules:
    """Modules of the target. The draft uses them without the target's LoRA adapters."""

    embedding: nn.Module
    lm_head: nn.Module
    logit_scale: float
    logit_soft_cap: float | None


def shared_modules(target: nn.Module) -> SharedModules:
    """Find the shared modules of a vLLM model: `model.embed_tokens` and `lm_head`.

    Works for the Llama family, Qwen2, Mistral, Mixtral and whatever else has both, tied or not. Cohere's and
    others' tied head is the embedding, and no module of its own.

    Raises:
        TargetError: Names the model class and what it lacks.
    """
    language: Any = target
    if hasattr(target, "get_language_model"):
        language = target.get_language_model()  # type: ignore[operator]
    embedding = _plain(getattr(getattr(language, "model", None), "embed_tokens", None))
    tied = getattr(getattr(language, "config", None), "tie_word_embeddings", False)
    head = _plain(getattr(language, "lm_head", embedding if tied else None))
    for name, part in (("model.embed_tokens", embedding), ("lm_head", head)):
        if part is None or isinstance(part, PPMissingLayer):
            raise TargetError(
                f"griffin does not support the target model {type(target).__name__}: it has no "
                f"`{name}` on this rank for the draft to share; use a target that has one"
            )
    processor = _plain(getattr(language, "logits_processor", None))
    assert embedding is not None and head is not None
    return SharedModules(
        embedding=embedding,
        lm_head=head,
        logit_scale=getattr(processor, "scale", 1.0),
        logit_soft_cap=getattr(processor, "soft_cap", None),
    )


def _plain(module: nn.Module | None) -> nn.Module | None:
    return module.base_layer if isinstance(module, BaseLayerWithLoRA) else module
