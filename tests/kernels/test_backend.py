"""The choice between Triton kernels and torch references."""

import subprocess
import sys

import pytest
import torch

from vllm_griffin.kernels import backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("choice", "own_form", "on_cpu", "on_cuda"),
    [
        (None, True, False, True),
        ("auto", True, False, True),
        ("torch", False, False, False),
        ("triton", False, True, True),
    ],
)
def test_choice(monkeypatch, choice, own_form, on_cpu, on_cuda):
    monkeypatch.setattr(backend, "interpreted", lambda: True)
    monkeypatch.delenv(backend.ENV, raising=False)
    if choice is not None:
        monkeypatch.setenv(backend.ENV, choice)
    assert backend.use_triton(CPU) is on_cpu
    assert backend.use_triton(CUDA) is on_cuda
    assert backend.runs_own_form(CPU) is own_form
    assert not backend.runs_own_form(CUDA)


def test_unknown_choice_names_variable_and_values(monkeypatch):
    monkeypatch.setenv(backend.ENV, "cuda")
    with pytest.raises(ValueError, match=r"VLLM_GRIFFIN_KERNELS='cuda'.*auto, torch, triton"):
        backend.use_triton(CPU)


def test_triton_on_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setenv(backend.ENV, "triton")
    monkeypatch.setattr(backend, "interpreted", lambda: False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        backend.use_triton(CPU)
    assert backend.use_triton(CUDA)


@pytest.mark.parametrize(
    ("choice", "interpreted", "name"),
    [
        ("torch", False, "torch"),
        ("triton", False, "Triton kernels"),
        ("triton", True, "Triton kernels in the interpreter"),
    ],
)
def test_describe(monkeypatch, choice, interpreted, name):
    monkeypatch.setenv(backend.ENV, choice)
    monkeypatch.setattr(backend, "interpreted", lambda: interpreted)
    assert backend.describe(CUDA) == name


def test_works_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from vllm_griffin.kernels import backend\n"
        "assert backend.describe(torch.device('cpu')) == 'torch'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
