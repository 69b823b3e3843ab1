"""What the draft takes from the target: embedding, LM head, scale of the logits."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vllm_griffin.model.checkpoint import DraftLayout

from .conftest import engine_config
from .draft_files import CONFIG, GOLDEN, random_weights, write_draft


def target(**parts) -> nn.Module:
    """A target of two bare modules, or others."""
    model = nn.Module()
    model.model = nn.Module()
    model.model.embed_tokens = parts.pop("embed_tokens", nn.Embedding(8, 4))
    model.lm_head = nn.Linear(4, 8, bias=False)
    for name, part in parts.items():
        setattr(model, name, part)
    return model


def test_lora_wrappers_are_taken_off(process_group):
    from vllm.lora.layers.base import BaseLayerWithLoRA

    from vllm_griffin.model.target import shared_modules

    class Wrapped(BaseLayerWithLoRA):
        def __init__(self, base):
            super().__init__()
            self.base_layer = base

    plain = target(logits_processor=nn.Module())
    plain.logits_processor.scale, plain.logits_processor.soft_cap = 0.5, 30.0
    wrapped = target(
        embed_tokens=Wrapped(plain.model.embed_tokens),
        lm_head=Wrapped(plain.lm_head),
        logits_processor=Wrapped(plain.logits_processor),
    )
    parts = shared_modules(wrapped)
    assert parts.embedding is plain.model.embed_tokens
    assert parts.lm_head is plain.lm_head
    assert (parts.logit_scale, parts.logit_soft_cap) == (0.5, 30.0)


def test_language_model_of_a_larger_target(process_group):
    from vllm_griffin.model.target import shared_modules

    outer, inner = nn.Module(), target()
    outer.get_language_model = lambda: inner
    assert shared_modules(outer).lm_head is inner.lm_head


def test_tied_head_without_a_module_of_its_own_is_the_embedding(process_group):
    from types import SimpleNamespace

    from vllm_griffin.model.target import shared_modules

    tied = target()
    del tied.lm_head
    tied.config = SimpleNamespace(tie_word_embeddings=True)
    assert shared_modules(tied).lm_head is tied.model.embed_tokens


def test_target_without_the_modules_is_refused_by_name(process_group):
    from vllm.model_executor.models.utils import PPMissingLayer

    from vllm_griffin.model.target import TargetError, shared_modules

    class Strange(nn.Module):
        pass

    with pytest.raises(TargetError, match=r"Strange.*`model\.embed_tokens`"):
        shared_modules(Strange())
    with pytest.raises(TargetError, match="`lm_head`"):
        shared_modules(target(lm_head=None))
    with pytest.raises(TargetError, match=r"`model\.embed_tokens`"):
        shared_modules(target(embed_tokens=PPMissingLayer()))


def test_logits_are_scaled_as_the_targets(load, targets, tmp_path):
    draft = load(write_draft(tmp_path, CONFIG, random_weights(CONFIG, DraftLayout())))
    hidden = torch.randn(3, 64)
    plain = draft.compute_logits(hidden)
    torch.testing.assert_close(plain, targets["a"].compute_logits(hidden))
    other = SimpleNamespace(scale=0.25, soft_cap=2.0)
    draft.share_with_target(target(logits_processor=other, lm_head=draft.lm_head))
    torch.testing.assert_close(draft.compute_logits(hidden), (plain / 2).tanh() * 2 * 0.25)


@pytest.mark.parametrize("change", [None, "value", "dtype", "shape", "quantised"])
def test_embedding_is_shared_only_if_equal(load, tmp_path, change):
    draft = load(write_draft(tmp_path, CONFIG, random_weights(CONFIG, DraftLayout())))
    own = draft.embed_tokens
    other = nn.Embedding.from_pretrained(own.weight.detach().clone())
    if change == "value":
        other.weight[7, 7] += 1e-6
    if change == "dtype":
        other = other.to(torch.bfloat16)
    if change == "shape":
        other = nn.Embedding(500, 64)
    if change == "quantised":
        other = nn.Module()
    draft.share_with_target(target(embed_tokens=other))
    assert draft.embed_tokens is (other if change is None else own)


def test_another_targets_draft_is_refused_before_anything_is_built(targets):
    from vllm_griffin.model.checkpoint import CheckpointError
    from vllm_griffin.model.draft import load_draft_model

    config = engine_config(GOLDEN / "a" / "target", GOLDEN / "b" / "draft")
    with pytest.raises(CheckpointError, match=r"`hidden_size` is 128, but .* is 64"):
        load_draft_model(targets["a"], config)
