"""What a draft takes from its target, for targets that are not plain Llamas."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from vllm_griffin.model.files import fingerprint
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


def test_weights_in_torch_files(tmp_path: Path) -> None:
    """As many targets of the paper have them: two shards and an index."""
    model = save_model(tmp_path, "llama")
    wanted = load_target_parts(tmp_path)
    before = fingerprint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(KeyError, match=r"no model\.embed_tokens\.weight in its weights"):
        load_target_parts(tmp_path)
    state = model.state_dict()
    names = {key: f"pytorch_model-{i % 2}.bin" for i, key in enumerate(state)}
    for name in set(names.values()):
        torch.save({k: v for k, v in state.items() if names[k] == name}, tmp_path / name)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    found = load_target_parts(tmp_path)
    assert torch.equal(found.embeddings, wanted.embeddings)
    assert torch.equal(found.head, wanted.head)
    # What is stored beside outputs belongs to these weights.
    here = fingerprint(tmp_path)
    state["model.norm.weight"] = state["model.norm.weight"] + 1
    name = names["model.norm.weight"]
    torch.save({k: v for k, v in state.items() if names[k] == name}, tmp_path / name)
    assert len({before, here, fingerprint(tmp_path)}) == 3


def test_a_target_without_a_length_of_context(tmp_path: Path) -> None:
    save_model(tmp_path, "llama")
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["max_position_embeddings"]
    path.write_text(json.dumps(config))
    with pytest.raises(KeyError, match="no 'max_position_embeddings'"):
        load_target_parts(tmp_path)


def test_soft_capped_logits_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path, "llama")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"final_logit_softcapping": 30.0}))
    with pytest.raises(ValueError, match="soft-capped"):
        load_target_parts(tmp_path)
