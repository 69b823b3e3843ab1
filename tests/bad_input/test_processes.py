"""A server with a wrong config or checkpoint ends by itself, and its log says why."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engine.harness import MODELS, ROOT

TARGET, DRAFT = MODELS / "target", MODELS / "griffin"
# A start on a busy machine; what hangs fails here.
TIMEOUT_S = 400


class Ended(NamedTuple):
    """A server that is over."""

    code: int
    log: str
    # Whether a process of the server's was still there.
    left: bool


def _copy(folder: Path) -> Path:
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((DRAFT / name).read_bytes())
    return folder


def _damaged(folder: Path) -> Path:
    weights = _copy(folder) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    return folder


def _not_a_number(folder: Path) -> Path:
    weights = _copy(folder) / "model.safetensors"
    tensors = load_file(weights)
    tensors["fc.fc.bias"] = torch.full_like(tensors["fc.fc.bias"], float("nan"))
    save_file(tensors, weights)
    return folder


def _start(log: Path, draft: Path, spec: dict) -> subprocess.Popen:
    spec = {"method": "griffin", "model": str(draft), "num_speculative_tokens": 4} | spec
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(TARGET)]
    command += ["--dtype", "float32", "--max-model-len", "128", "--enforce-eager", "--port", "0"]
    command += ["--max-num-seqs", "2", "--speculative-config", json.dumps(spec)]
    # As a user has it: the engine in a process of its own.
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _end(process: subprocess.Popen, log: Path) -> Ended:
    code = process.wait(TIMEOUT_S)
    patience = time.monotonic() + 20
    while _has_processes(process.pid) and time.monotonic() < patience:
        time.sleep(0.2)
    return Ended(code, log.read_text(), _has_processes(process.pid))


def _has_processes(session: int) -> bool:
    """Whether a server, or a process that it started, is still there."""
    try:
        os.killpg(session, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Ended]]:
    """All at once, since each of them waits most of the time."""
    tmp = tmp_path_factory.mktemp("servers")
    starts = {
        "config": (DRAFT, {"tree_topk": 4}),
        "checkpoint": (_damaged(tmp / "damaged"), {}),
        "weights": (_not_a_number(tmp / "nan"), {}),
    }
    logs = {name: tmp / f"{name}.log" for name in starts}
    running = {name: _start(logs[name], *arguments) for name, arguments in starts.items()}
    try:
        yield {name: _end(process, logs[name]) for name, process in running.items()}
    finally:
        for process in running.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "config",
            "speculative_config['tree_topk'] is not a field of method 'griffin': did you mean "
            "'tree_top_k'?",
        ),
        ("checkpoint", "damaged/model.safetensors: not a readable safetensors file, damaged or"),
    ],
)
def test_what_the_front_end_sees_is_the_logs_last_line(
    name: str, sentence: str, servers: dict[str, Ended]
) -> None:
    ended = servers[name]
    assert ended.code > 0 and not ended.left
    assert sentence in ended.log.splitlines()[-1], ended.log[-3000:]


def test_what_only_the_loader_sees_is_in_the_log(servers: dict[str, Ended]) -> None:
    ended = servers["weights"]
    assert ended.code > 0 and not ended.left
    assert "`fc.fc.bias` holds a NaN or an infinity: train or convert" in ended.log
