"""The switch VLLM_GRIFFIN_CPU, in processes of its own where it decides at import."""

import logging
import os
import subprocess
import sys
import textwrap

import pytest

from vllm_griffin.cpu import shim

OWN = ("VLLM_GRIFFIN_CPU", "TRITON_INTERPRET", "VLLM_USE_V2_MODEL_RUNNER")


def run(code, **variables):
    environment = {name: value for name, value in os.environ.items() if name not in OWN}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=300,
    )


LOAD_PLUGINS = """
    import os, sys
    from vllm.platforms import current_platform
    from vllm.plugins import load_general_plugins
    from vllm.triton_utils import HAS_TRITON, tl
    load_general_plugins()
    own = sorted(name for name in sys.modules if name.startswith("vllm_griffin.cpu"))
    print(HAS_TRITON, type(getattr(tl, "sum", None)).__name__, bool(own), current_platform.is_cpu())
    print(os.environ.get("TRITON_INTERPRET"), os.environ.get("VLLM_USE_V2_MODEL_RUNNER"))
"""


def test_off_nothing_of_the_shim_runs():
    result = run(LOAD_PLUGINS)
    assert result.stdout.splitlines() == ["False NoneType False True", "None None"], result.stderr


def test_on_it_needs_no_other_variable():
    result = run(LOAD_PLUGINS, VLLM_GRIFFIN_CPU="1")
    assert result.stdout.splitlines() == ["True InterpretedFunction True True", "1 1"], (
        result.stderr
    )


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"VLLM_GRIFFIN_CPU": "yes"}, "VLLM_GRIFFIN_CPU='yes'"),
        ({"VLLM_GRIFFIN_CPU": "1", "VLLM_PLUGINS": "griffin"}, "griffin_cpu"),
    ],
)
def test_errors_are_seen(variables, message):
    """Although vLLM swallows what a platform plugin raises."""
    result = run(LOAD_PLUGINS, **variables)
    assert result.returncode != 0
    assert message in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", OWN[1:])
def test_a_contradiction_is_refused(monkeypatch, name):
    monkeypatch.setenv(shim.SWITCH, "1")
    monkeypatch.setenv(name, "0")
    with pytest.raises(ValueError, match=f"{name}=1"):
        shim.prepare_process()


@pytest.mark.parametrize(("value", "on"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_values(monkeypatch, value, on):
    if value is None:
        monkeypatch.delenv(shim.SWITCH, raising=False)
    else:
        monkeypatch.setenv(shim.SWITCH, value)
    assert shim.switched_on() is on


@pytest.mark.parametrize("value", ["2", "true", " 1"])
def test_other_values_are_refused(monkeypatch, value):
    monkeypatch.setenv(shim.SWITCH, value)
    with pytest.raises(ValueError, match=shim.SWITCH):
        shim.prepare_process()


def test_a_gpu_makes_it_a_line_in_the_log(monkeypatch, caplog):
    monkeypatch.setenv(shim.SWITCH, "1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(shim, "_gpu_is_active", lambda: True)
    monkeypatch.setattr(shim, "_gpu_reported", False)
    # Where else vLLM's logger hands its records depends on what ran before, so listen at the source.
    logger = logging.getLogger("vllm.griffin.cpu")
    monkeypatch.setattr(logger, "propagate", False)
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.INFO, "vllm.griffin.cpu"):
        shim.prepare_process()
        shim.prepare_process()
    logger.removeHandler(caplog.handler)
    assert len(caplog.records) == 1
    assert "GPU" in caplog.text
    assert "TRITON_INTERPRET" not in os.environ


def test_triton_cpu_needs_no_interpreter(monkeypatch):
    for name in OWN[1:]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(shim.SWITCH, "1")
    monkeypatch.setattr(shim, "_has_triton_cpu", lambda: True)
    shim.prepare_process()
    assert os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "1"
    assert "TRITON_INTERPRET" not in os.environ
