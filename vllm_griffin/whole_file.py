"""Files that are there as a whole or not at all, whatever ends the process that writes them."""

import json
from collections.abc import Iterator, Mapping
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


def scratch_of(path: Path) -> Path:
    """What `whole_file` writes first."""
    return path.with_suffix(".partial")
