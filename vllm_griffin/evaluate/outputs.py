"""The target's stored outputs: JSONL, one line per prompt and temperature.

    {"set", "id", "temperature", "seed", "max_tokens", "target", "prompt_token_ids", "response_token_ids",
     "tail_token_ids"}

The tail holds the tokens that the target would go on with after the answer's end: the engine's last
verify step runs past the end and counts what it accepts there, so a replay needs them too. Files of others
may lack `set`, `seed`, `max_tokens`, `target` (a digest) and the tail; without one a replay counts the last
step up to the answer's end.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from vllm_griffin.whole_file import append_lines, whole_lines

# Tokens past the end of an answer that are stored; a last step accepts at most a tree's depth of them.
TAIL = 16


@dataclass
class Output:
    """One answer of the target; `seed`, `max_tokens` and `target` are None where the file does not say."""

    id: int
    temperature: float
    prompt_token_ids: list[int]
    response_token_ids: list[int]
    tail_token_ids: list[int] = field(default_factory=list)
    set: str = ""
    seed: int | None = None
    max_tokens: int | None = None
    target: str | None = None

    @property
    def key(self) -> tuple[str, int, float]:
        """What a prompt's answer is looked up by."""
        return self.set, self.id, self.temperature

    @property
    def end(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.prompt_token_ids) + len(self.response_token_ids)

    @property
    def text(self) -> list[int]:
        """Prompt and answer."""
        return self.prompt_token_ids + self.response_token_ids


def _parse(line: str) -> Output:
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    names = Output.__dataclass_fields__
    output = Output(**{name: value for name, value in row.items() if name in names})
    if not output.prompt_token_ids or not output.response_token_ids:
        raise ValueError("an empty prompt or response")
    return output


def read_outputs(path: Path) -> list[Output]:
    """Read stored outputs; none if there is no such file.

    Raises:
        ValueError: A line is malformed; it is named by its number.
    """
    outputs = []
    for number, line in whole_lines(path):
        try:
            outputs.append(_parse(line))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return outputs


def append_outputs(path: Path, outputs: Iterable[Output]) -> None:
    """Append outputs, a line each."""
    append_lines(path, map(asdict, outputs))
