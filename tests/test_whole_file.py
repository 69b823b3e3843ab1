"""A file is replaced as a whole, and a writer that fails leaves nothing behind."""

import json
from pathlib import Path

import pytest

from vllm_griffin.whole_file import append_lines, whole_file, write_json


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


@pytest.mark.parametrize("half", ['{"b": ', '{"b": "' + 200_000 * "x"])
def test_half_a_line_gives_way_to_the_next(tmp_path: Path, half: str) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    append_lines(path, [{"a": 1}, {"a": 2}])
    with path.open("a") as file:
        file.write(half)
    append_lines(path, [{"c": 3}])
    assert path.read_text() == '{"a":1}\n{"a":2}\n{"c":3}\n'
    path.write_text(half)
    append_lines(path, [])
    assert path.read_text() == ""
