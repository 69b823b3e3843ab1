"""vLLM without an engine: a process group of one, engine configs, a loaded target."""

import os
from pathlib import Path

import pytest
import torch

from .draft_files import GOLDEN

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def engine_config(target: Path, draft: Path, tree: dict | None = None, **changes):
    """The config of an engine that speculates with a draft: griffin with a tree, else vLLM's own `eagle`."""
    from vllm.engine.arg_utils import EngineArgs

    speculative = {"method": "eagle", "model": str(draft), "num_speculative_tokens": 3}
    if tree is not None:
        speculative |= {"method": "griffin"} | tree
    arguments = {
        "model": str(target),
        "dtype": "float32",
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "max_model_len": 256,
        "speculative_config": speculative,
    }
    return EngineArgs(**(arguments | changes)).create_engine_config()


@pytest.fixture(scope="module")
def process_group(tmp_path_factory):
    """Tensor parallelism of one rank, as vLLM's layers want it."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        destroy_distributed_environment,
        destroy_model_parallel,
        init_distributed_environment,
        initialize_model_parallel,
    )

    rendezvous = f"file://{tmp_path_factory.mktemp('gloo') / 'rendezvous'}"
    case = GOLDEN / "a"
    with pytest.MonkeyPatch.context() as patch:
        # vLLM's loader calls it, and its CPU worker replaces it in the same way.
        patch.setattr(torch.accelerator, "empty_cache", lambda: None)
        # What an engine that ran in this process has left.
        destroy_model_parallel()
        destroy_distributed_environment()
        with set_current_vllm_config(engine_config(case / "target", case / "draft")):
            init_distributed_environment(1, 0, rendezvous, 0, "gloo")
            initialize_model_parallel(1, 1)
        yield
        destroy_model_parallel()
        destroy_distributed_environment()


@pytest.fixture(scope="module")
def targets(process_group):
    """case -> the golden case's target in vLLM."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model

    loaded = {}
    for case in ("a", "b"):
        config = engine_config(GOLDEN / case / "target", GOLDEN / case / "draft")
        with set_current_vllm_config(config):
            loaded[case] = get_model(vllm_config=config)
    return loaded


class PagedAttention(torch.nn.Module):
    """Stands in for vLLM's attention layer: causal over one sequence, keys kept in pages.

    `pages` are the blocks that the sequence fills, in order. `kv_views` and `quant_scales` are what
    griffin's attention backends offer.
    """

    def __init__(self, layer) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = layer.num_heads, layer.num_kv_heads, layer.head_size
        self.kv_cache = torch.full((8, self.kv_heads, 4, 2 * self.size), float("nan"))
        self.pages: list[int] = []
        self.impl = self

    def kv_views(self, kv_cache):
        return kv_cache.split(self.size, dim=-1)

    def quant_scales(self, layer, query):
        return None

    def forward(self, q, k, v):
        q, k, v = (x.unflatten(-1, (-1, self.size)) for x in (q, k, v))
        for t, page in enumerate(p for p in self.pages for _ in range(4)):
            if t < len(k):
                self.kv_cache[page, :, t % 4] = torch.cat([k[t], v[t]], -1)
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )
        return out.transpose(0, 1).flatten(1)


@pytest.fixture
def load(targets):
    """Load a draft for a golden target as the engine does, its attention replaced."""
    from vllm_griffin.model.draft import load_draft_model

    def load(draft: Path, case: str = "a", **changes):
        config = engine_config(GOLDEN / case / "target", draft, **changes)
        model = load_draft_model(targets[case], config)
        attention = model.layers[0].self_attn
        assert attention.attn.layer_name in config.compilation_config.static_forward_context
        attention.attn = PagedAttention(attention.attn)
        return model

    with torch.no_grad():
        yield load
