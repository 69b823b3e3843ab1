"""The speculative config: defaults, the largest tree, and that every field of vLLM's is known."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import envs
from vllm.config import SpeculativeConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator

from vllm_griffin import engine_features
from vllm_griffin.compat.patches import OWN_FIELDS
from vllm_griffin.config import (
    REFUSED_FIELDS,
    GriffinSpeculativeConfig,
    griffin_config,
)
from vllm_griffin.engine_features import check_engine
from vllm_griffin.runner.speculator import TreeSpeculator
from vllm_griffin.tree_shape import max_tree_nodes

GOLDEN = Path(__file__).parent / "data" / "golden" / "a"
DRAFT = GOLDEN / "draft"


def make(spec: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    """The engine's config for the golden pair, as ``LLM`` and ``vllm serve`` make it."""
    spec = {"method": "griffin", "model": str(DRAFT)} | (spec or {})
    arguments = {
        "model": str(GOLDEN / "target"),
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "max_model_len": 512,
        "speculative_config": spec,
    } | kwargs
    return EngineArgs(**arguments).create_engine_config()


def draft_with(tmp_path: Path, **config: Any) -> str:
    """A copy of the golden draft with other entries in its config.json."""
    folder = tmp_path / "draft"
    shutil.copytree(DRAFT, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return str(folder)


def test_the_papers_tree_is_the_default() -> None:
    spec = griffin_config(make())
    assert spec is not None
    assert (spec.num_speculative_tokens, spec.tree_depth, spec.tree_top_k) == (59, 6, 10)
    assert spec.use_eagle()
    assert "griffin" in repr(spec)


def test_a_draft_of_the_hub_goes_where_the_engine_downloads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = set()

    def download(repo: str, *, revision: str, cache_dir: str, allow_patterns: list[str]) -> str:
        asked.add((repo, revision, cache_dir))
        return str(DRAFT)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    make({"model": "someone/draft", "revision": "v1"}, download_dir=str(tmp_path))
    assert asked == {("someone/draft", "v1", str(tmp_path))}


def test_a_budget_is_below_the_nodes_of_one_request() -> None:
    spec = griffin_config(make({"num_speculative_tokens": 12, "tree_budget": 11}))
    assert (spec.num_speculative_tokens, spec.tree_budget) == (12, 11)
    assert "tree_budget=11" in repr(spec)
    spec = griffin_config(make())
    assert spec.tree_budget is None
    assert "tree_budget" not in repr(spec)


def test_a_draft_brings_its_tree(tmp_path: Path) -> None:
    tree = {"num_speculative_tokens": 20, "tree_depth": 4, "tree_top_k": 3}
    model = draft_with(tmp_path, tree=tree)
    spec = griffin_config(make({"model": model}))
    assert (spec.num_speculative_tokens, spec.tree_depth, spec.tree_top_k) == (20, 4, 3)
    spec = griffin_config(make({"model": model, "tree_top_k": 1}))
    assert (spec.num_speculative_tokens, spec.tree_depth, spec.tree_top_k) == (4, 4, 1)


def test_other_methods_stay_vllms_own() -> None:
    config = EngineArgs(
        model=str(GOLDEN / "target"),
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=512,
        speculative_config={"method": "ngram", "num_speculative_tokens": 2},
    ).create_engine_config()
    assert type(config.speculative_config) is SpeculativeConfig


def test_spec_flags_are_honoured() -> None:
    spec = griffin_config(
        make({"tree_depth": 3}, spec_tokens=7),
    )
    assert (spec.num_speculative_tokens, spec.tree_depth) == (7, 3)


@pytest.mark.parametrize(
    ("depth", "top_k", "most"), [(1, 10, 10), (6, 1, 6), (3, 4, 36), (6, 10, 510)]
)
def test_the_largest_tree(depth: int, top_k: int, most: int) -> None:
    assert max_tree_nodes(depth, top_k) == most
    shape = {"tree_depth": depth, "tree_top_k": top_k}
    budget = {"max_num_batched_tokens": 1024}
    spec = griffin_config(make(shape | {"num_speculative_tokens": most}, **budget))
    assert spec.tree_levels == min(depth, most)
    with pytest.raises(ValueError, match=rf"={most + 1} is above the {most} nodes"):
        make(shape | {"num_speculative_tokens": most + 1}, **budget)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"rejection_sample_method": "block"}, "leave it at 'standard'"),
        ({"synthetic_acceptance_length": 2.0}, "only valid with rejection_sample_method"),
        ({"rejection_sample_method": "synthetic"}, "requires exactly one of"),
        (
            {"rejection_sample_method": "synthetic", "synthetic_acceptance_length": 8.0},
            r"must be in \[1, 7\]",
        ),
        (
            {"rejection_sample_method": "synthetic", "synthetic_acceptance_rates": [0.5]},
            "must have length 6",
        ),
    ],
)
def test_forced_acceptance_is_for_benchmarks(fields: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        make(fields)


def test_every_field_of_vllm_is_honoured_or_refused() -> None:
    honoured = {
        "num_speculative_tokens",
        "num_speculative_tokens_per_batch_size",
        "model",
        "method",
        "revision",
        "draft_tensor_parallel_size",
        "disable_eagle_block_drop",
        "rejection_sample_method",
        "synthetic_acceptance_rates",
        "synthetic_acceptance_length",
    }
    set_by_vllm = {
        "target_model_config",
        "target_parallel_config",
        "draft_model_config",
        "draft_parallel_config",
    }
    fields = {f.name for f in dataclasses.fields(SpeculativeConfig)}
    assert fields == honoured | set_by_vllm | set(REFUSED_FIELDS)
    own = {f.name for f in dataclasses.fields(GriffinSpeculativeConfig)} - {"download_dir"}
    assert own - fields == set(OWN_FIELDS), "other methods refuse them by this list"


@pytest.mark.parametrize(
    ("named", "chosen"),
    [
        ({}, "FLASH_ATTN"),
        ({"attention_backend": "auto"}, "FLASH_ATTN"),
        ({"attention_backend": "TRITON_ATTN"}, "TRITON_ATTN"),
        ({"attention_config": {"backend": "FLASHINFER"}}, "FLASHINFER"),
        ({"kv_cache_dtype": "fp8"}, "FLASH_ATTN"),
        ({"kv_cache_dtype": "fp8", "family": 120}, "TRITON_ATTN"),
    ],
)
def test_where_vllm_prefers_flashinfer_a_backend_with_trees_is_named(
    named: dict[str, Any], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = named.pop("family", 100)
    gpu = SimpleNamespace(is_cuda=lambda: True, is_device_capability_family=lambda n: n == family)
    monkeypatch.setattr(engine_features, "current_platform", gpu)
    args = EngineArgs(model=str(GOLDEN / "target"), **named)
    engine_features.prefer_backend(args)
    found = args.attention_backend or args.attention_config.backend
    assert getattr(found, "name", found) == chosen
    assert make(**named).attention_config.backend.name == chosen


@pytest.mark.parametrize(
    ("spec", "advice"),
    [
        ({"num_speculative_tokens": 59}, "or give larger batches smaller trees"),
        ({"num_speculative_tokens": 59, "tree_budget": 9}, "Lower max_num_seqs"),
        ({"num_speculative_tokens": 7}, None),
        (
            {
                "num_speculative_tokens": 59,
                "num_speculative_tokens_per_batch_size": [(1, 8, 59), (9, 64, 0)],
            },
            None,
        ),
    ],
)
def test_more_trees_than_a_step_holds_are_warned_of(
    spec: dict[str, Any], advice: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(engine_features.logger, "warning", lambda text, *n: said.append(text % n))
    make(spec, max_num_seqs=64, max_num_batched_tokens=512)
    assert len(said) == (advice is not None)
    if advice is not None:
        assert "max_num_batched_tokens=512 holds the trees of 8 requests" in said[0]
        assert advice in said[0]
        # One is refused beside the other.
        assert ("per_batch_size" in said[0]) == ("tree_budget" not in spec)


@pytest.mark.parametrize(
    ("cpu", "spec", "own", "warned"),
    [
        (True, {}, {}, True),
        (True, {"num_speculative_tokens": 59}, {}, False),
        (True, {"tree_acceptance": {"3,1,3": 1.6}}, {}, False),
        (True, {}, {"tree": {"num_speculative_tokens": 5, "tree_depth": 2}}, False),
        (False, {}, {}, False),
    ],
)
def test_a_tree_that_nobody_named_is_warned_of_on_a_cpu(
    cpu: bool,
    spec: dict[str, Any],
    own: dict[str, Any],
    warned: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm_griffin import config

    said: list[str] = []
    monkeypatch.setattr(config.logger, "warning", lambda text, *n: said.append(text % n))
    monkeypatch.setattr(config, "current_platform", SimpleNamespace(is_cpu=lambda: cpu))
    make({"model": draft_with(tmp_path, **own)} | spec, max_num_seqs=2)
    assert len(said) == warned
    assert all("taking 59 nodes" in text and "--write-trees" in text for text in said)


def test_eight_bits_are_for_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_griffin import config

    spec = {"model": draft_with(tmp_path), "draft_quantization": "int8"}
    said: list[str] = []
    monkeypatch.setattr(config.logger, "warning", lambda text, *n: said.append(text % n))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for fast in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda fast=fast: fast)
        monkeypatch.setattr(config, "current_platform", SimpleNamespace(is_cpu=lambda: True))
        assert make(spec, max_num_seqs=2).speculative_config.draft_quantization == "int8"
        assert sum("AVX-512 VNNI" in text for text in said) == (not fast)
    monkeypatch.setattr(config, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    with pytest.raises(ValueError, match=r"draft_quantization'\]='int8' is for CPUs: leave it out"):
        make(spec, max_num_seqs=2)


@pytest.mark.parametrize(("cuda", "cache"), [(True, "fp8"), (True, "auto"), (False, "fp8")])
def test_a_gpu_that_rounds_weights_is_warned_of(
    cuda: bool, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the layers, as a checkpoint may name its cache."""
    from vllm_griffin.attention import backends

    class Plain:
        def __init__(self) -> None:
            self.kv_cache_dtype = cache

    class Tree(backends.TreeAttentionMixin, Plain):
        pass

    said: list[str] = []
    monkeypatch.setattr(backends, "current_platform", SimpleNamespace(is_cuda=lambda: cuda))
    monkeypatch.setattr(backends.logger, "warning_once", lambda text, *n: said.append(text % n))
    Tree()
    assert len(said) == (cuda and cache == "fp8")
    assert all("kv_cache_dtype='fp8' vLLM's attention may round" in text for text in said)


def test_an_absurd_shape_costs_no_more_than_its_nodes() -> None:
    shape = {"tree_depth": 10**9, "tree_top_k": 500, "num_speculative_tokens": 5}
    spec = griffin_config(make(shape))
    assert spec.tree_levels == spec.tree_width == 5


ENGINE_FEATURES = [
    ({"kv_offloading_size": 1.0}, "KV connectors and offloading"),
    (
        {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
        "KV connectors",
    ),
    ({"cpu_offload_gb": 1.0}, "weight offloading"),
    ({"offload_group_size": 2}, "weight offloading"),
    ({"weight_transfer_config": {"backend": "ipc"}}, "weight transfer"),
    ({"enable_batch_sharded_sampling": True, "tensor_parallel_size": 2}, "batch-sharded sampling"),
    ({"kv_cache_dtype": "bfloat16"}, "kv_cache_dtype='bfloat16'"),
]


@pytest.mark.parametrize(("arguments", "message"), ENGINE_FEATURES, ids=lambda v: str(v)[:40])
def test_engine_features_that_are_refused_by_name(arguments: dict, message: str) -> None:
    with pytest.raises((ValueError, NotImplementedError), match=message):
        make(**arguments)


# What vLLM itself refuses on a CPU or with the golden pair, but not everywhere.
ELSEWHERE = [
    ("model_config.enable_sleep_mode", "sleep mode"),
    ("parallel_config.enable_expert_parallel", "expert parallelism"),
    ("parallel_config.enable_eplb", "expert parallelism"),
    ("aux_output_config.enable_return_routed_experts", "routed-experts output"),
]


@pytest.mark.parametrize(("field", "message"), ELSEWHERE)
def test_what_only_some_engines_have_is_refused_too(field: str, message: str) -> None:
    config = make()
    *path, name = field.split(".")
    setattr(functools.reduce(getattr, path, config), name, 2)
    with pytest.raises(ValueError, match=f"'griffin' does not support {message}"):
        check_engine(config)


def test_batch_invariance_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = make()
    monkeypatch.setattr(envs, "VLLM_BATCH_INVARIANT", True, raising=False)
    with pytest.raises(ValueError, match="does not support batch-invariant mode: unset VLLM"):
        check_engine(config)


def test_a_backend_that_splits_blocks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its block tables are others than the engine's, which drafting and compaction read."""
    group = SimpleNamespace(
        kernel_block_size=128,
        kv_cache_spec=SimpleNamespace(block_size=256),
        backend=SimpleNamespace(get_name=lambda: "FLASH_ATTN"),
    )

    def set_attn(self: TreeSpeculator) -> None:
        self.attn_groups, self.target_attn_groups = [], [[group]]

    monkeypatch.setattr(DraftModelSpeculator, "set_attn", set_attn)
    speculator = TreeSpeculator.__new__(TreeSpeculator)
    with pytest.raises(ValueError, match="block_size=256 with attention backend FLASH_ATTN"):
        speculator.set_attn()
    group.kernel_block_size = None
    speculator.set_attn()


def test_a_draft_that_ranks_cannot_share_is_refused() -> None:
    make(tensor_parallel_size=2)
    with pytest.raises(ValueError, match=r"draft.config\.json: 2 attention heads .*_size 4"):
        make(tensor_parallel_size=4)


def test_a_short_draft_context_is_raised_to_the_targets(tmp_path: Path) -> None:
    spec = griffin_config(make({"model": draft_with(tmp_path, max_position_embeddings=128)}))
    assert spec.draft_model_config.hf_config.max_position_embeddings == 512


def test_a_config_built_for_another_method_is_refused() -> None:
    with pytest.raises(ValueError, match="for method 'griffin' only"):
        GriffinSpeculativeConfig(method="eagle", model="x")
