"""What a training set is made with, and that a folder is only ever made with one of it."""

import hashlib
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click

from vllm_griffin import provenance
from vllm_griffin.whole_file import scratch_of

# They change how a run goes, not what it makes.
_FREE = {"output", "threads", "dry_run", "on_error", "tensor_parallel"}


@dataclass(frozen=True)
class Settings:
    """The options of ``vllm-griffin data``; its help says what each does."""

    target: Path
    output: Path
    input: tuple[Path, ...]
    exclude: tuple[Path, ...]
    format: str | None
    chat_template: Path | None
    generate: bool
    draw: int | None
    temperatures: tuple[float, ...]
    max_new_tokens: int
    prompt_tokens: int
    hidden_states: str
    length: int | None
    max_length: int | None
    limit: int | None
    seed: int
    threads: int | None
    tensor_parallel: int
    on_error: str
    dry_run: bool

    def record(self) -> dict[str, Any]:
        """What must be equal for a run to go on in the same folder; files by name and hash."""
        return {
            field.name: _plain(getattr(self, field.name))
            for field in fields(self)
            if field.name not in _FREE
        }


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        # The target's folder, or its name on the hub.
        if not value.is_file():
            return str(value)
        return {"file": str(value), "sha256": _hash(value)}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def claim(s: Settings, weights: str | None = None) -> dict[str, Any]:
    """The record for ``data.json`` of a run in `s.output`, which is made if it is not there.

    Args:
        weights: The target's `fingerprint`, where the data come from its weights.

    Raises:
        click.ClickException: The folder holds something else, or data made with other settings.
    """
    s.output.mkdir(parents=True, exist_ok=True)
    path, settings = s.output / "data.json", s.record()
    # A kill while the record was first written leaves a part of it.
    ours = {path, scratch_of(path)}
    others = any(found not in ours for found in s.output.iterdir())
    if path.exists() and others:
        record = json.loads(path.read_text(encoding="utf-8"))
        before = record.get("settings", {})
        changed = [name for name in settings if before.get(name) != settings[name]]
        # What an earlier version made does not say which weights it is of, and never will.
        made_of = record.get("target_weights")
        if not changed and made_of not in (None, weights):
            raise click.ClickException(
                f"{s.output} holds data of {s.target} before its config or weights changed: give another "
                "--output"
            )
        weights = made_of
        if changed:
            options = ", ".join("--" + name.replace("_", "-") for name in changed)
            raise click.ClickException(
                f"{s.output} holds data made with another {options}: give another --output, or the same "
                "settings to go on"
            )
    elif others:
        raise click.ClickException(f"{s.output} is not empty and holds no training data")
    made = provenance.describe(s.seed)
    return made | {"settings": settings, "target_weights": weights, "finished": False}
