"""The equality matrix: each sampling parameter with griffin against the engine without speculation.

A *bench* is a pair with its engine settings; its plain engine runs every request once, and engines
with griffin run the same requests in each cell of the matrix.
"""

import contextlib
import dataclasses
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from tests.engine.compare import difference
from tests.engine.harness import PAIRS, Outcome, Request, engine, random_prompt, run
from tests.engine.oracle import oracle_trees
from tests.engine.parameters import PARAMETERS, Case, Parameter
from tests.engine.processors import NoRepeat, Sharpen
from tests.engine.ties import recorded_gaps
from vllm_griffin.trace import read_trace

ALONE, MIXED = "alone", "mixed"
BATCHES = (1, 8)
# pair -> tokens of its vocabulary, end token
VOCABULARIES = {"tiny": (2048, 1), "golden-a": (512, 2), "golden-b": (512, 2)}
# One at a time: a request arrives when the one before has finished.
NEVER = 1 << 30


@dataclass(frozen=True)
class Bench:
    """A pair, its engine's settings, and which rows it runs; ``suffix`` marks the rows' names."""

    pair: str
    settings: dict[str, Any]
    rows: tuple[Parameter, ...]
    oracle: bool = True
    suffix: str = ""


@dataclass(frozen=True)
class Cell:
    """One column: nodes of a tree, requests at a time, and whether rows share the batch."""

    nodes: int
    batch: int
    company: str

    @property
    def name(self) -> str:
        return f"N {self.nodes}, batch {self.batch}, {self.company}"


@dataclass
class Count:
    """One cell of one row."""

    requests: int = 0
    differ: int = 0
    ties: int = 0
    # tokens accepted besides the roots, and those of them off the spine
    accepted: int = 0
    off_spine: int = 0
    # what differed, in words
    notes: list[str] = field(default_factory=list)


# row -> cell's name -> count
Matrix = dict[str, dict[str, Count]]


def _rows(*needs: str | None) -> tuple[Parameter, ...]:
    return tuple(p for p in PARAMETERS if p.needs in needs)


def _named(*names: str) -> tuple[Parameter, ...]:
    return tuple(p for p in PARAMETERS if p.name in names)


SCORES = _named("logprobs", "logprob_token_ids", "prompt_logprobs", "logprobs with penalties")
TINY = Bench(
    "tiny",
    {
        "skip_tokenizer_init": False,
        "reasoning_config": {"reasoning_start_str": " self", "reasoning_end_str": " return self"},
    },
    _rows(None, "tokenizer"),
    oracle=False,
)
GOLDEN = Bench("golden-a", {"logits_processors": [NoRepeat, Sharpen]}, _rows(None, "processors"))
# Log-probs in vLLM's other modes; half of them with the asynchronous scheduler, GPUs' default.
MODES = tuple(
    Bench(
        pair,
        {"logprobs_mode": mode, "async_scheduling": pair == "golden-b"},
        SCORES,
        suffix=f" ({mode})",
    )
    for pair, mode in (
        ("golden-b", "processed_logprobs"),
        ("golden-a", "raw_logits"),
        ("golden-b", "processed_logits"),
    )
)
BENCHES = (TINY, GOLDEN, *MODES)


def how(row: str) -> str:
    """Where a row of the matrix is verified: "tree" or "spine"."""
    return next(p.how for p in PARAMETERS if row in {p.name + b.suffix for b in BENCHES})


def make_requests(bench: Bench, count: int) -> dict[str, list[Request]]:
    """Row -> ``count`` requests; the second one's prompt is a single token."""
    size, eos = VOCABULARIES[bench.pair]
    generator = torch.Generator().manual_seed(29)
    text: list[int] = []
    if bench.pair == "tiny":
        source = Path(textwrap.__file__).read_text()
        text = AutoTokenizer.from_pretrained(PAIRS["tiny"][0])(source)["input_ids"]
    rows: dict[str, list[Request]] = {}
    for row, parameter in enumerate(bench.rows):
        rows[parameter.name] = []
        for i in range(count):
            length = 1 if i == 1 else 4 + 9 * i
            start = 53 * row + 97 * i
            prompt = text[start : start + length] or random_prompt(generator, length, size)
            params = parameter.params(Case(i, size, eos, len(prompt)))
            rows[parameter.name].append(Request(f"{parameter.name}:{i}", prompt, params))
    return rows


def arrivals(rows: dict[str, list[Request]], cell: Cell) -> list[list[Request]]:
    """The cell's runs: each row for itself, or one of each row by turns."""
    if cell.company == ALONE:
        runs = list(rows.values())
    else:
        longest = max(map(len, rows.values()))
        runs = [[r[i] for i in range(longest) for r in rows.values() if i < len(r)]]
    return [
        [
            dataclasses.replace(r, arrival=NEVER if cell.batch == 1 else i // 3)
            for i, r in enumerate(requests)
        ]
        for requests in runs
    ]


class Plain:
    """What the engine without speculation gives, and how close its decisions were."""

    def __init__(self, bench: Bench, rows: dict[str, list[Request]]) -> None:
        self.requests = {r.name: r for requests in rows.values() for r in requests}
        with recorded_gaps() as gaps, engine(bench.pair, **_settings(bench)) as llm:
            self.outcome = run(llm, arrivals(rows, Cell(0, max(BATCHES), MIXED))[0])
        self.gaps = gaps

    def texts(self) -> dict[str, list[int]]:
        """Name of a request, or of one of its n, to its prompt and output, for the oracle."""
        found = {}
        for name, request in self.requests.items():
            for c in self.outcome.outputs[name].outputs:
                child = name if request.params.n == 1 else f"{c.index}_{name}"
                found[child] = request.prompt + list(c.token_ids)
        return found


def _settings(bench: Bench) -> dict[str, Any]:
    return {"max_num_seqs": max(BATCHES), "max_logprobs": -1} | bench.settings


@contextlib.contextmanager
def griffin(bench: Bench, plain: Plain, nodes: int, trace: Path) -> Iterator[Any]:
    """The bench's engine with trees of so many nodes."""
    spec = {"num_speculative_tokens": nodes, "tree_depth": 6, "tree_top_k": 4}
    trees = (
        oracle_trees(plain.texts(), VOCABULARIES[bench.pair][0])
        if bench.oracle
        else contextlib.nullcontext()
    )
    with engine(bench.pair, spec, trace=trace, **_settings(bench)) as llm, trees:
        yield llm


def fill(
    matrix: Matrix,
    bench: Bench,
    cells: Sequence[Cell],
    counts: dict[int, int],
    folder: Path,
) -> None:
    """Runs the bench's rows in each of the cells; ``counts``: batch -> requests of a row."""
    rows = make_requests(bench, max(counts.values()))
    plain = Plain(bench, rows)
    for nodes in sorted({cell.nodes for cell in cells}):
        trace = folder / f"{bench.pair}{bench.suffix}-{nodes}.jsonl"
        with griffin(bench, plain, nodes, trace) as llm:
            for cell in (c for c in cells if c.nodes == nodes):
                fewer = {name: requests[: counts[cell.batch]] for name, requests in rows.items()}
                read = len(read_trace(trace)) if trace.exists() else 0
                for requests in arrivals(fewer, cell):
                    _count(matrix, bench, cell, plain, requests, run(llm, requests))
                _count_accepted(matrix, bench, cell, read_trace(trace)[read:])


def _row(matrix: Matrix, bench: Bench, cell: Cell, request: str) -> Count:
    """The count that a request, or one of its n, belongs to."""
    name = request.rpartition(":")[0]
    row = name if any(p.name == name for p in bench.rows) else name.partition("_")[2]
    return matrix.setdefault(row + bench.suffix, {}).setdefault(cell.name, Count())


def _count(
    matrix: Matrix,
    bench: Bench,
    cell: Cell,
    plain: Plain,
    requests: list[Request],
    outcome: Outcome,
) -> None:
    for request in requests:
        count = _row(matrix, bench, cell, request.name)
        count.requests += 1
        expected = plain.outcome.outputs[request.name]
        differs = difference(request, expected, outcome.outputs[request.name], plain.gaps)
        if differs is None:
            continue
        if differs.near_tie:
            count.ties += 1
        else:
            count.differ += 1
        count.notes.append(f"{cell.name}, {bench.pair}, {request.name}: {differs.what}")


def _count_accepted(matrix: Matrix, bench: Bench, cell: Cell, records: list[Any]) -> None:
    for record in records:
        count = _row(matrix, bench, cell, record.request_id)
        count.accepted += len(record.accepted) - 1
        count.off_spine += sum(row != place for place, row in enumerate(record.accepted))
