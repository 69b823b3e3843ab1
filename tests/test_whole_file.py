"""A file is replaced as a whole, and a writer that fails leaves nothing behind."""

import json
from pathlib import Path

import pytest

from vllm_griffin.whole_file import whole_file, write_json


def test_written_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "run.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    with pytest.raises(OSError, match="disk full"), whole_file(path) as scratch:
        scratch.write_text("half")
        assert json.loads(path.read_text()) == {"a": 1}
        raise OSError("disk full")
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(path.parent.iterdir()) == [path]
