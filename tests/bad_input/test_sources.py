"""No source of this repository unpickles a file with leave to run code."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("vllm_griffin", "kernels", "examples", "benchmarks")


def unsafe_loads(source: str) -> list[int]:
    """Lines with a `torch.load` without `weights_only=True`, or with a way around it."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            if {"pickle", "cloudpickle", "dill", "joblib", "marshal"} & {*names}:
                lines.append(node.lineno)
            if isinstance(node, ast.ImportFrom) and names[0] == "torch" and "load" in names:
                lines.append(node.lineno)
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if node.func.attr == "load" and ast.unparse(node.func.value) == "torch":
            options = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if options.get("weights_only") != "True":
                lines.append(node.lineno)
    return lines


def test_every_load_is_of_weights_only() -> None:
    sources = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    assert len(sources) > 100
    found = {str(path): lines for path in sources if (lines := unsafe_loads(path.read_text()))}
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "torch.load(file, weights_only=safe)",
        "torch.load(file, **options)",
        "from torch import load",
        "import pickle",
        "from pickle import loads",
    ],
)
def test_what_would_run_code_is_seen(source: str) -> None:
    assert unsafe_loads(source) == [1]
    assert unsafe_loads("torch.load(file, weights_only=True)\njson.load(file)") == []
