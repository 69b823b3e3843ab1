"""A target of a few thousand weights, and training data of it."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vllm_griffin import provenance
from vllm_griffin.data.documents import Document, write_documents
from vllm_griffin.data.shards import write_shard
from vllm_griffin.whole_file import write_json


@pytest.fixture(scope="session")
def small_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with two layers."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("target")
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_data(small_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hidden states of 60 random documents in three shards."""
    folder = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(1)
    documents = []
    for i in range(60):
        length = int(torch.randint(8, 30, (1,), generator=generator))
        tokens = torch.randint(60, (length,), generator=generator).tolist()
        documents.append(Document(i, tokens, [(1 + i % 5, length)]))
    model = LlamaForCausalLM.from_pretrained(small_target).eval()
    with torch.inference_mode():
        hidden = [
            model.model(torch.tensor([d.tokens])).last_hidden_state[0].clone() for d in documents
        ]
    for number, first in enumerate(range(0, 60, 25)):
        part = slice(first, first + 25)
        write_shard(folder / f"shard-{number:05d}.safetensors", documents[part], hidden[part])
    write_documents(folder, documents)
    settings = {"target": str(small_target), "hidden_states": "stored"}
    record = {"settings": settings, "counts": {"documents": 60}, "finished": True}
    write_json(folder / "data.json", {**provenance.describe(), **record})
    return folder
