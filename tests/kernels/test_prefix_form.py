"""Both forms of verification attention give one result, and each layer takes the one it was told."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import pad
from vllm.config.compilation import CUDAGraphMode

from tests.kernels.attention_cases import (
    UNTOUCHED,
    Case,
    build,
    context_of,
    flash_attention,
    rows_of_trees,
    run,
)
from vllm_griffin.attention import backends, prefix
from vllm_griffin.kernels.tree_attention import tree_attention_reference

# Of three requests the second has no tree; the others' trees follow a prompt, or nothing.
MIXED = Case(prefix=[37, 0, 0], rows=[5, 0, 3], other_rows=[4, 6, 0], tail_cached=True)


def step(case: Case) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """Inputs, first rows of the requests [B + 1], and what is right."""
    x = build(case, torch.float32)
    ends = x["q_start"] + x["num_rows"]
    query_start = torch.cat([ends.new_zeros(1), ends])
    expected = x | {"out": x["out"].clone()}
    run(tree_attention_reference, expected)
    return x, query_start, expected["out"]


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_from_the_prefix_as_in_one(kernels, monkeypatch):
    monkeypatch.setenv("VLLM_GRIFFIN_KERNELS", kernels)
    x, query_start, expected = step(MIXED)
    prefix.attend_from_prefix(
        *(flash_attention, x["q"], x["k_cache"], x["v_cache"], context_of(x)),
        *(query_start, 9, 37, x["scale"], x["out"]),
    )
    torch.testing.assert_close(x["out"], expected)
    assert (x["out"][~rows_of_trees(x)] == UNTOUCHED).all()


@pytest.fixture
def layer(monkeypatch):
    """A FlashAttention layer with trees, and the calls of FlashAttention that it makes."""
    calls = []

    def flash(**arguments):
        calls.append(arguments["num_splits"])
        return flash_attention(**arguments)

    monkeypatch.setattr(backends, "flash_attention", lambda version: flash)
    impl_cls = backends._flash_backend().get_impl_cls()
    impl = impl_cls.__new__(impl_cls)
    impl.num_heads, impl.num_kv_heads, impl.head_size, impl.scale = 4, 2, 32, 32**-0.5
    impl.vllm_flash_attn_version, impl.fa4_hd256, impl.kv_cache_dtype = 3, False, "auto"
    return impl, calls


@pytest.mark.parametrize(
    ("forms", "first"),
    [
        ({1: True}, True),
        ({1: False}, False),
        ({1: False, 2: True}, True),
        ({1: True, 2: False, 4: True}, False),
    ],
)
def test_a_layer_takes_the_form_of_its_batch(layer, forms, first):
    impl, calls = layer
    impl.prefix_first = forms
    case = Case(prefix=[37, 0, 20], rows=[5, 2, 3], other_rows=[0, 0, 0], tail_cached=True)
    x, query_start, expected = step(case)
    cache = torch.cat([x["k_cache"], x["v_cache"]], -1)
    tail = torch.full((len(x["q"]), 2, 32), float("nan"))
    metadata = SimpleNamespace(
        tree=context_of(x | {"block_table": pad(x["block_table"], (0, 0, 0, 1))}),
        only_tree=True,
        # One padded row, and a padded request.
        num_actual_tokens=len(x["q"]) - 1,
        query_start_loc=torch.cat([query_start, query_start[-1:]]),
        max_query_len=5,
        max_seq_len=42,
        max_num_splits=7,
    )
    impl.forward(None, x["q"], tail, tail, cache, metadata, x["out"])
    torch.testing.assert_close(x["out"], expected)
    assert calls == ([7] if first else [])


@pytest.mark.parametrize(("form", "forms"), [("split", {1: False}), ("prefix", {1: True})])
def test_the_variable_overrides_the_timing(layer, form, forms, monkeypatch):
    monkeypatch.setenv(prefix.ENV, form)
    assert backends.choose_form(layer[0], None, None, torch.device("cpu"), 0) == forms


def test_what_flash_attention_cannot_is_refused(layer, monkeypatch):
    impl, _ = layer
    impl.fa4_hd256 = True
    assert backends.choose_form(impl, None, None, torch.device("cpu"), 0) == {1: False}
    monkeypatch.setenv(prefix.ENV, "prefix")
    with pytest.raises(ValueError, match="does not work with FlashAttention 4 at head size 256"):
        backends.choose_form(impl, None, None, torch.device("cpu"), 0)
    impl.kv_cache_dtype = "fp8"
    with pytest.raises(ValueError, match="does not work with kv_cache_dtype='fp8'"):
        backends.choose_form(impl, None, None, torch.device("cpu"), 0)
    other = SimpleNamespace(get_name=lambda: "TRITON_ATTN")
    with pytest.raises(ValueError, match="needs attention backend FLASH_ATTN, and this is TRITON"):
        backends.tree_backend(other)
    monkeypatch.setenv(prefix.ENV, "flash")
    with pytest.raises(ValueError, match="is not one of auto, split, prefix"):
        prefix.demanded_form()


@pytest.mark.parametrize(("rows", "context"), [(8, 108), (64, 164), (65, 165), (60, 20)])
def test_timed_forms_are_one_result(rows, context, monkeypatch):
    """Both forms of a synthetic step attend the same tree, also where the context holds no whole one."""
    results = []
    monkeypatch.setattr(
        torch, "empty_like", lambda like: results.append(torch.zeros_like(like)) or results[-1]
    )
    shape = prefix.Shape(4, 2, 32, 16, torch.float32, rows, context, 4)
    split, from_prefix = prefix.both_forms(shape, 2, flash_attention, torch.device("cpu"))
    split()
    expected = results[0].clone()
    results[0].zero_()
    from_prefix()
    assert expected.abs().sum() > 0
    torch.testing.assert_close(results[0], expected)


IMPL = SimpleNamespace(
    fa4_hd256=False,
    num_heads=4,
    num_kv_heads=2,
    head_size=32,
    vllm_flash_attn_version=2,
    quantised_cache=False,
)
SPEC = SimpleNamespace(block_size=16, dtype=torch.float32)
ENGINE = SimpleNamespace(
    num_speculative_tokens=6,
    model_config=SimpleNamespace(max_model_len=70),
    scheduler_config=SimpleNamespace(max_num_seqs=64, max_num_batched_tokens=70),
    compilation_config=SimpleNamespace(
        max_cudagraph_capture_size=27, cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE
    ),
)


def test_our_kernel_stands_in_where_flash_attention_refuses(monkeypatch):
    monkeypatch.delenv(prefix.ENV, raising=False)

    def refuse(**_):
        raise error

    def choose():
        prefix.faster_forms.cache_clear()
        return backends.choose_form(IMPL, SPEC, ENGINE, torch.device("cpu"), 32)

    monkeypatch.setattr(prefix, "flash_attention", lambda version: refuse)
    monkeypatch.setattr("triton.testing.do_bench_cudagraph", lambda attend, **_: attend() or 1.0)
    error = NotImplementedError("no log-sum-exp\nof this shape")
    assert choose() == {1: False}
    error = torch.OutOfMemoryError("full")
    with pytest.raises(torch.OutOfMemoryError):
        choose()
    # What our own kernel raises is no refusal of FlashAttention's.
    monkeypatch.setattr(prefix, "tree_attention", lambda *_: 1 / 0)
    monkeypatch.setattr(prefix, "attend_from_prefix", lambda *_: None)
    with pytest.raises(ZeroDivisionError):
        choose()


def test_forms_are_timed_for_batches_that_can_be(monkeypatch):
    """Up to the requests whose trees fit into a step; a layer goes by the size below its own."""
    monkeypatch.delenv(prefix.ENV, raising=False)
    tokens, splits, captured = [], [], []

    def bench(attend, return_mode):
        before = len(tokens)
        attend()
        # FlashAttention takes 1.5 for one request and half of that for four, the other form 1.
        return 1.5 / len(tokens) if len(tokens) > before else 1.0

    def bench_graph(attend, return_mode):
        captured.append(True)
        return bench(attend, return_mode)

    def flash(num_splits, **arguments):
        tokens.append(len(arguments["q"]))
        splits.append(num_splits)
        return flash_attention(**arguments)

    monkeypatch.setattr("triton.testing.do_bench", bench)
    monkeypatch.setattr("triton.testing.do_bench_cudagraph", bench_graph)
    monkeypatch.setattr(prefix, "flash_attention", lambda version: flash)
    found = backends.choose_form(IMPL, SPEC, ENGINE, torch.device("cpu"), 32)
    assert tokens == [7, 28], "ten requests at most, so one and four are timed"
    assert splits == [32, 0], "the larger step is not captured"
    assert len(captured) == 2, "both forms of the captured one are timed as graphs"
    assert found == {1: False, 4: True}


def test_a_cache_of_another_format_is_refused_by_the_layer(layer):
    """Also where a checkpoint names it, after the engine's own check."""
    impl, _ = layer
    impl.kv_cache_dtype = "fp8_e5m2"
    with pytest.raises(ValueError, match="does not support kv_cache_dtype='fp8_e5m2'"):
        impl._refuse_unsupported()
