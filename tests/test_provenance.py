"""What is written beside results, and options from a file."""

import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from vllm_griffin import provenance
from vllm_griffin.commands.options import config_option

# In parts: no file of this repository may name a home folder.
SUPERUSER, HOMES = ("/" + name for name in ("root", "home"))


@pytest.mark.parametrize(
    ("program", "wanted"),
    [
        ("/somewhere/bin/vllm-griffin", "vllm-griffin data 'a b'"),
        ("/somewhere/vllm_griffin/cli.py", "vllm-griffin data 'a b'"),
        ("benchmarks/x.py", "python benchmarks/x.py data 'a b'"),
        ("/elsewhere/x.py", "python x.py data 'a b'"),
    ],
)
def test_command(monkeypatch: pytest.MonkeyPatch, program: str, wanted: str) -> None:
    monkeypatch.setattr(sys, "argv", [program, "data", "a b"])
    monkeypatch.delenv("VLLM_GRIFFIN_CPU", raising=False)
    assert provenance.describe(3)["command"] == wanted
    monkeypatch.setenv("VLLM_GRIFFIN_CPU", "1")
    assert provenance.describe(3)["command"] == f"VLLM_GRIFFIN_CPU=1 {wanted}"
    assert provenance.describe(3)["seed"] == 3
    paths = [f"{SUPERUSER}/model", f"/data{SUPERUSER}/x", f"--out={HOMES}/ann/model"]
    monkeypatch.setattr(sys, "argv", [program, *paths])
    assert provenance.describe(3)["command"].endswith(f" ~/model /data{SUPERUSER}/x --out=~/model")


@pytest.mark.parametrize(
    ("own", "text", "wanted"),
    [
        (
            f"/data{HOMES}/ann",
            f"/data{HOMES}/ann/x {HOMES}/bob/y /data{HOMES}/eve/z",
            f"~/x ~/y /data{HOMES}/eve/z",
        ),
        ("/", f"/x {SUPERUSER}/y", "/x ~/y"),
    ],
)
def test_home_folders(own: str, text: str, wanted: str) -> None:
    assert provenance.home_pattern(Path(own)).sub("~", text) == wanted


def test_commit_and_versions() -> None:
    record = provenance.describe()
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    ).stdout.strip()
    if head:
        assert head.startswith(record["commit"].removesuffix("+"))
    assert {"python", "torch", "vllm", "vllm-griffin"} <= record["versions"].keys()
    assert record["hardware"]["cores"] >= 1


@pytest.mark.parametrize(
    ("script", "driver"),
    [("echo 570.86\necho 570.86", "570.86"), ("echo no devices; exit 9", None), (None, None)],
)
def test_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, driver: str | None
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    if script is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    assert provenance.describe()["hardware"]["driver"] == driver


@click.command()
@config_option
@click.option("--many", multiple=True, type=int)
@click.option("--no-mask/--mask", "bare", default=None)
@click.option("--batch-tokens", default=5, type=int)
def show(many: tuple[int, ...], bare: bool | None, batch_tokens: int) -> None:
    """Prints its options."""
    click.echo(f"{many} {bare} {batch_tokens}")


@pytest.mark.parametrize(
    ("text", "flags", "shown"),
    [
        ("", [], "() None 5"),
        ("many: [1, 2]\nbatch-tokens: 7", [], "(1, 2) None 7"),
        ("batch_tokens: 7\nno-mask: true", ["--batch-tokens", "9"], "() True 9"),
        ("batch_tokens: x", [], "'x' is not a valid integer"),
        ("batchtokens: 1", [], "unknown option batchtokens"),
        ("- 1", [], "not a list of"),
        ("a: [", [], "c.yaml"),
    ],
)
def test_options_from_a_file(tmp_path: Path, text: str, flags: list[str], shown: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    result = CliRunner().invoke(show, ["--config", str(tmp_path / "c.yaml"), *flags])
    assert shown in result.output.replace("\n", " ").replace("│", "").replace("  ", " ")
