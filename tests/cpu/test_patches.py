"""The catalogue: each entry is needed, takes effect everywhere, and knows what it replaces."""

import importlib
import sys
import types

import pytest
import torch
from triton.runtime.errors import InterpreterError
from vllm.v1.sample.ops import topk_topp_sampler
from vllm.v1.worker.gpu import structured_outputs
from vllm.v1.worker.gpu.sample import sampler, states
from vllm.v1.worker.gpu.spec_decode import rejection_sampler

from vllm_griffin.cpu import patches
from vllm_griffin.cpu.twins import gumbel, rejection, sampling
from vllm_griffin.cpu.twins.grammar import _apply_grammar_bitmask_kernel


def test_targets_are_replaced_once():
    targets = [patch.target for patch in patches.CATALOGUE]
    twins = [patch.twin for patch in patches.CATALOGUE]
    assert len(set(targets)) == len(targets)
    assert len(set(twins)) == len(twins)


@pytest.mark.parametrize("patch", patches.CATALOGUE, ids=lambda patch: patch.target)
def test_vllm_has_every_target(patch):
    """Importing checks the parameters too."""
    importlib.import_module(patch.target.partition(":")[0])
    assert patch.target in patches._originals
    assert patch.reason
    assert patch.until


def test_importers_by_name_have_the_twins():
    assert sampler.gumbel_sample is gumbel.gumbel_sample
    assert sampler.apply_top_k_top_p is sampling.apply_top_k_top_p
    assert states.apply_top_k_top_p is sampling.apply_top_k_top_p
    assert states.apply_temperature is sampling.apply_temperature
    assert rejection_sampler.rejection_sample is rejection.rejection_sample


def test_applying_twice_changes_nothing():
    hooks = list(sys.meta_path)
    patches.apply()
    assert sys.meta_path == hooks


def test_top_k_top_p_still_fails_in_the_interpreter():
    """When this test fails, its entry in the catalogue can go."""
    with pytest.raises(InterpreterError):
        patches.original(sampling.apply_top_k_top_p)(
            torch.randn(8, 3000), torch.full((8,), 5).int(), torch.full((8,), 0.5)
        )
    assert topk_topp_sampler.apply_top_k_top_p is sampling.apply_top_k_top_p


def test_grammar_bitmask_still_fails_in_the_interpreter():
    """When this test fails, its entry in the catalogue can go."""
    logits, bitmask = torch.zeros(1, 64), torch.zeros(1, 2).int()
    with pytest.raises(InterpreterError):
        patches.original(_apply_grammar_bitmask_kernel)[(1, 1)](
            logits,
            64,
            torch.zeros(1).int(),
            torch.tensor([0, 1]).int(),
            bitmask,
            2,
            64,
            MASK_STRIDE=1,
            BLOCK_SIZE=8192,
        )
    assert structured_outputs._apply_grammar_bitmask_kernel.func is _apply_grammar_bitmask_kernel


@pytest.mark.parametrize("replaced", [None, lambda logits, other: None])
def test_another_signature_is_refused(replaced):
    module = types.ModuleType("changed")
    module.apply_min_p = replaced
    patch = patches.Twin(
        "changed:apply_min_p", "vllm_griffin.cpu.twins.sampling:apply_min_p", "", ""
    )
    with pytest.raises(RuntimeError, match="changed:apply_min_p"):
        patches._replace(module, patch)


def test_a_module_imported_too_early_is_refused(monkeypatch):
    monkeypatch.setattr(patches, "_hook", None)
    with pytest.raises(RuntimeError, match="imported already"):
        patches.apply()
