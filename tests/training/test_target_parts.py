"""What a draft takes from its target, for targets that are not plain Llamas."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from vllm_griffin.train.setup import load_target_parts

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
}
SCALES = {"llama": {}, "granite": {"logits_scaling": 8.0}, "cohere": {"logit_scale": 0.0625}}


def save_model(folder: Path, kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **SCALES[kind]))
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("kind", SCALES)
def test_head_times_feature_is_the_targets_logits(tmp_path: Path, kind: str) -> None:
    model = save_model(tmp_path, kind)
    tokens = torch.arange(10)[None]
    features = model.base_model(tokens).last_hidden_state
    parts = load_target_parts(tmp_path)
    torch.testing.assert_close(features @ parts.head.T, model(tokens).logits)
    torch.testing.assert_close(parts.embeddings, model.get_input_embeddings().weight)


def test_soft_capped_logits_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path, "llama")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"final_logit_softcapping": 30.0}))
    with pytest.raises(ValueError, match="soft-capped"):
        load_target_parts(tmp_path)
