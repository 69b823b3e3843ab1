"""The trace of verified draft trees: its record, and how it is written, read and drawn.

``VLLM_GRIFFIN_TRACE=<file>`` makes the engine append one JSON line per request and verify step.
This module knows neither vLLM nor torch, so a trace can be read anywhere.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO

# Ids of the requests whose steps are timed at start-up begin so; they are not traced.
START_UP = "griffin-start-up-"


@dataclass(frozen=True)
class TraceRecord:
    """One draft tree, as the target verified it. Node 0 is the root, a token already sampled.

    Attributes:
        request_id: the request, as its client knows it.
        step: number of the request's verify step, from 0.
        position: the root's position in the request's token sequence.
        tokens: ``[1 + n]`` token ids.
        parents: ``[1 + n]`` node indices, each before its node; -1 for the root.
        depths: ``[1 + n]`` distances from the root.
        scores: ``[1 + n]`` the draft's cumulative log-probabilities; 0 for the root.
        accepted: node indices along the accepted path, the root included.
        bonus: the target's token after that path.

    """

    request_id: str
    step: int
    position: int
    tokens: list[int]
    parents: list[int]
    depths: list[int]
    scores: list[float]
    accepted: list[int]
    bonus: int

    @property
    def num_drafted(self) -> int:
        """Drafted nodes, the root not counted."""
        return len(self.tokens) - 1

    @property
    def num_generated(self) -> int:
        """Tokens that this step gave its request: those accepted after the root, and the bonus."""
        return len(self.accepted)


_LISTS = ("tokens", "parents", "depths", "scores", "accepted")


def parse_record(line: str) -> TraceRecord:
    """Reads one line of a trace.

    Raises:
        ValueError: it is not JSON, lacks a field or has one too many, or is not a tree.

    """
    values = json.loads(line)
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    names = {field.name for field in fields(TraceRecord)}
    if names != values.keys():
        raise ValueError(
            "; ".join(
                f"{what}: {', '.join(sorted(which))}"
                for what, which in (
                    ("missing", names - values.keys()),
                    ("unknown", values.keys() - names),
                )
                if which
            )
        )
    for name in _LISTS:
        if not isinstance(values[name], list):
            raise ValueError(f"{name} is not a list")
    record = TraceRecord(**values)
    _check_tree(record)
    return record


def _check_tree(record: TraceRecord) -> None:
    size = len(record.tokens)
    if not size or not len(record.parents) == len(record.depths) == len(record.scores) == size:
        raise ValueError("tokens, parents, depths and scores differ in length, or are empty")
    if record.parents[0] != -1 or record.depths[0] != 0:
        raise ValueError("node 0 is not a root")
    for node in range(1, size):
        parent = record.parents[node]
        if not 0 <= parent < node:
            raise ValueError(f"node {node} does not come after its parent {parent}")
        if record.depths[node] != record.depths[parent] + 1:
            raise ValueError(f"node {node} is not one deeper than its parent")
    if not record.accepted or record.accepted[0] != 0:
        raise ValueError("the accepted path does not start at the root")
    for parent, node in zip(record.accepted, record.accepted[1:], strict=False):
        if not 0 < node < size or record.parents[node] != parent:
            raise ValueError(f"accepted node {node} is not a child of {parent}")


class TraceWriter:
    """Appends records to a trace file, whole lines at a time, so that a crash leaves no half one.

    Several processes may append to one file: each call is one write.
    """

    def __init__(self, path: str | Path) -> None:
        # Unbuffered: what is given to one write stays together.
        self._file: IO[bytes] = open(path, "ab", buffering=0)  # noqa: SIM115 - kept open

    def write(self, records: Iterable[TraceRecord]) -> None:
        text = "".join(json.dumps(asdict(record)) + "\n" for record in records)
        if text:
            self._file.write(text.encode())

    def close(self) -> None:
        self._file.close()


def open_trace(path: str) -> TraceWriter:
    """The writer of the file that ``VLLM_GRIFFIN_TRACE`` names.

    Raises:
        ValueError: it cannot be written.

    """
    try:
        return TraceWriter(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"VLLM_GRIFFIN_TRACE={path} cannot be written: {error}") from error


def read_trace(path: str | Path) -> list[TraceRecord]:
    """Reads a trace file.

    Raises:
        ValueError: a line is malformed; it is named by file and number.

    """
    records = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                records.append(parse_record(line))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
    return records


@dataclass(frozen=True)
class TraceSummary:
    """What a trace says as a whole.

    Attributes:
        requests: distinct requests.
        steps: verify steps, over all requests.
        tokens: tokens generated in them, bonus tokens included.
        drafted: drafted nodes verified.

    """

    requests: int
    steps: int
    tokens: int
    drafted: int

    @property
    def acceptance_length(self) -> float:
        """Tokens per verify step, the bonus token included."""
        return self.tokens / self.steps if self.steps else math.nan


def summarize(records: Sequence[TraceRecord]) -> TraceSummary:
    """Adds up the records of a trace."""
    return TraceSummary(
        requests=len({record.request_id for record in records}),
        steps=len(records),
        tokens=sum(record.num_generated for record in records),
        drafted=sum(record.num_drafted for record in records),
    )


def draw_tree(record: TraceRecord, decode: Callable[[int], str] | None = None) -> str:
    """A tree as lines of text: accepted nodes starred, each with its share of its parent's mass.

    Args:
        record: the tree.
        decode: token id to text; without it, ids are shown.

    """
    show = (lambda token: repr(decode(token))) if decode else str
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(record.parents):
        children.setdefault(parent, []).append(node)
    accepted = set(record.accepted)
    last = record.accepted[-1]
    lines: list[str] = []

    def draw(node: int, lead: str, branch: str) -> None:
        text = f"{lead}{branch}{'* ' if node in accepted else ''}{show(record.tokens[node])}"
        if node:
            share = math.exp(record.scores[node] - record.scores[record.parents[node]])
            text += f" {share:.2f}"
        if node == last:
            text += f"  => {show(record.bonus)}"
        lines.append(text)
        below = sorted(children.get(node, []), key=lambda child: -record.scores[child])
        lead += {"": "", "├─ ": "│  ", "└─ ": "   "}[branch]
        for child in below:
            draw(child, lead, "└─ " if child == below[-1] else "├─ ")

    draw(0, "", "")
    return "\n".join(lines)
