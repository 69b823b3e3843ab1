"""Files, and lines of files, that are there as a whole or not at all, whatever ends their writer."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A scratch file beside `path`, which replaces it at the end of the block.

    If the block raises, the scratch file goes and `path` stays as it was. A kill can leave the scratch file
    behind; the next writer takes it over.
    """
    scratch = scratch_of(path)
    try:
        yield scratch
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write `record` as JSON, and its folder if need be; the file is replaced as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as scratch:
        scratch.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def whole_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of a JSONL file's lines; none if there is no such file."""
    if not path.exists():
        return
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            # A run that was killed may leave half a line at the end; it is made again.
            if line.strip() and line.endswith("\n"):
                yield number, line


def append_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows to a JSONL file, made with its folder if need be, in one write.

    Half a line at its end, which a killed process leaves, is dropped first.

    Raises:
        OSError: The file is as it was, but for half a line.
    """
    text = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    _drop_half_line(path)
    with open(path, "ab", buffering=0) as file:
        before = file.tell()
        try:
            if file.write(text) < len(text):
                raise OSError(28, "No space left on device", str(path))
        except OSError:
            file.truncate(before)
            raise


def _drop_half_line(path: Path) -> None:
    with open(path, "a+b") as file:
        end = file.tell()
        while end:
            first = max(0, end - 65536)
            file.seek(first)
            block = file.read(end - first)
            if newline := block.rfind(b"\n") + 1:
                file.truncate(first + newline)
                return
            end = first
        file.truncate(0)


def scratch_of(path: Path) -> Path:
    """What `whole_file` writes first."""
    return path.with_suffix(".partial")
