"""A process that loads the plugin and does not ask for griffin behaves as without it."""

import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_griffin.compat.patch import Patch, UnsupportedVllmError, replace_attribute
from vllm_griffin.compat.patches import (
    COMMAND_PATCHES,
    CONFIG_PATCHES,
    ENGINE_PATCHES,
    RUNNER_PATCHES,
)
from vllm_griffin.environment import KNOWN, register_variables

GOLDEN = Path(__file__).parent / "data" / "golden" / "a"
PLAIN = """
import json, sys
from vllm import LLM, SamplingParams
llm = LLM({target!r}, dtype="float32", enforce_eager=True, skip_tokenizer_init=True,
          max_model_len=256)
params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
prompts = [{{"prompt_token_ids": list(range(5, 5 + n))}} for n in (3, 40)]
outputs = llm.generate(prompts, params, use_tqdm=False)
ours = sorted(m for m in sys.modules if m.startswith("vllm_griffin"))
import vllm.v1.attention.selector as selector
owner = selector.get_attn_backend.__module__
print("RESULT" + json.dumps([[list(o.outputs[0].token_ids) for o in outputs], ours, owner]))
"""


def _plain_run(plugins: str | None) -> list:
    environment = dict(os.environ)
    # The CPU shim is a switch of its own; here it is off for both.
    for name in (
        "VLLM_GRIFFIN_CPU",
        "TRITON_INTERPRET",
        "VLLM_USE_V2_MODEL_RUNNER",
        "VLLM_PLUGINS",
    ):
        environment.pop(name, None)
    if plugins is not None:
        environment["VLLM_PLUGINS"] = plugins
    script = PLAIN.format(target=str(GOLDEN / "target"))
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    line = next(x for x in done.stdout.splitlines() if x.startswith("RESULT"))
    return json.loads(line.removeprefix("RESULT"))


def test_a_plain_engine_runs_vllms_own_code() -> None:
    with_tokens, ours, owner = _plain_run(None)
    without_tokens, none, _ = _plain_run("")
    assert with_tokens == without_tokens
    assert none == []
    assert ours, "the plugin was not loaded, so nothing was tested"
    light = ("vllm_griffin", "vllm_griffin.environment")
    assert all(m in light or m.startswith("vllm_griffin.compat") for m in ours), ours
    assert owner == "vllm.v1.attention.selector"


@pytest.mark.parametrize(
    "patch",
    (*CONFIG_PATCHES, *ENGINE_PATCHES, *RUNNER_PATCHES, *COMMAND_PATCHES),
    ids=lambda p: p.name,
)
def test_every_seam_is_where_it_was(patch: Patch) -> None:
    patch.apply()
    seam = f"{patch.module}:{patch.name}"
    replaced = pkgutil.resolve_name(seam)
    patch.apply()
    assert pkgutil.resolve_name(seam) is replaced
    assert patch.reason and patch.until


def test_a_moved_seam_gives_one_sentence_that_names_it() -> None:
    moved = Patch(
        module="vllm.v1.attention.selector",
        name="get_mamba_attn_backend",
        parameters=("something", "else"),
        replacement=lambda original: original,
        reason="test",
        until="never",
    )
    with pytest.raises(UnsupportedVllmError, match=r"selector.get_mamba_attn_backend has changed"):
        moved.apply()


def test_an_attribute_that_has_gone_gives_one_sentence_that_names_it() -> None:
    class Runner:
        number = 1

    runner = Runner()
    replace_attribute(runner, "number", 2)
    assert runner.number == 2
    with pytest.raises(UnsupportedVllmError, match=r"vLLM's Runner\.budget has gone; install"):
        replace_attribute(runner, "budget", 3)


def test_vllm_knows_our_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with ``--fail-on-environ-validation``; a misspelt one it still refuses."""
    from vllm import envs
    from vllm.platforms import current_platform

    monkeypatch.setattr(envs, "environment_variables", dict(envs.environment_variables))
    for name in [name for name in os.environ if name.startswith("VLLM_")]:
        monkeypatch.delenv(name)  # vLLM itself sets some that it does not know
    for name in KNOWN:
        monkeypatch.setenv(name, "1")
    register_variables()
    current_platform.validate_environ(True)
    assert all(envs.environment_variables[name]() is None for name in KNOWN)
    monkeypatch.setenv("VLLM_GRIFFIN_KERNEL", "1")
    with pytest.raises(ValueError, match=r"VLLM_GRIFFIN_KERNEL$"):
        current_platform.validate_environ(True)


@pytest.mark.parametrize("version", ["0.31.2", "0.33.0", "1.0.0"])
def test_another_vllm_is_refused_in_one_sentence(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_griffin import compat

    monkeypatch.setattr(compat, "_vllm_version", lambda: version)
    with pytest.raises(UnsupportedVllmError, match=rf"vLLM 0.32.x, but {version} is installed"):
        compat.check_version()


def test_importing_transformers_from_the_root_is_not_disturbed() -> None:
    root = Path(__file__).parents[1]
    script = (
        "import transformers, sys; assert 'kernels' not in sys.modules or 'site-packages' in "
        "sys.modules['kernels'].__file__; import vllm_griffin.kernels.backend"
    )
    subprocess.run([sys.executable, "-c", script], cwd=root, check=True)
