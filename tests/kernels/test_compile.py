"""Every kernel compiles for CUDA, which the interpreter does not prove."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

KERNELS = {
    "_advance_kernel",
    "_arrange_kernel",
    "_choose_kernel",
    "_compact_kernel",
    "_emit_kernel",
    "_fusion_norms_kernel",
    "_join_parts_kernel",
    "_merge_splits_kernel",
    "_path_ranks_kernel",
    "_top_of_part_kernel",
    "_tree_attention_kernel",
    "_tree_tail_kernel",
    "_walk_kernel",
}
# Shared memory of one program on the smallest data-centre and desktop GPUs since Ampere, bytes.
SHARED_MEMORY = 99 * 1024


# Not asked of triton.backends, which the CPU shim of this process replaces.
@pytest.mark.skipif(not find_spec("triton.backends.nvidia"), reason="Triton without CUDA compiler")
@pytest.mark.parametrize("capability", [pytest.param("80", marks=pytest.mark.full), "90"])
def test_kernels_compile_for_cuda(tmp_path, capability):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path)
    script = Path(__file__).with_name("compile_kernels.py")
    run = subprocess.run(
        [sys.executable, str(script), capability],
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    kernels = [line.split() for line in run.stdout.splitlines()]
    assert {name for name, _, _ in kernels} == KERNELS
    assert all(int(shared) <= SHARED_MEMORY for _, shared, _ in kernels), run.stdout
    assert all(spilled == "0" for _, _, spilled in kernels), run.stdout
