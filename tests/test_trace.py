"""The trace: what is written is read, malformed lines are named, trees are drawn."""

import json
from dataclasses import asdict, replace

import pytest
from click.testing import CliRunner

from vllm_griffin.cli import main
from vllm_griffin.trace import (
    TraceRecord,
    TraceWriter,
    draw_tree,
    parse_record,
    read_trace,
    summarize,
)

TREE = TraceRecord(
    request_id="chat-1",
    step=0,
    position=12,
    tokens=[5, 7, 9, 8, 6, 4],
    parents=[-1, 0, 1, 0, 1, 3],
    depths=[0, 1, 2, 1, 2, 2],
    scores=[0.0, -0.6931471805599453, -0.8, -1.2039728043259361, -2.0, -3.0],
    accepted=[0, 3],
    bonus=2,
)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "trace.jsonl"
    writer = TraceWriter(path)
    writer.write([TREE, replace(TREE, request_id="chat-2", accepted=[0, 1, 2])])
    writer.write([])
    writer.write([replace(TREE, step=1, position=14, accepted=[0])])
    writer.close()
    return path


def test_what_is_written_is_read(file):
    records = read_trace(file)
    assert [(r.request_id, r.step) for r in records] == [
        ("chat-1", 0),
        ("chat-2", 0),
        ("chat-1", 1),
    ]
    assert records[0] == TREE
    assert [json.loads(line).keys() for line in file.read_text().splitlines()] == [
        asdict(TREE).keys()
    ] * 3


def test_writers_append(file):
    TraceWriter(file).write([TREE])
    assert len(read_trace(file)) == 4


def test_written_lines_are_there_before_the_file_is_closed(tmp_path):
    path = tmp_path / "trace.jsonl"
    writer = TraceWriter(path)
    writer.write([TREE])
    assert read_trace(path) == [TREE]
    writer.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", "line 4"),
        ("[1]", "not a JSON object"),
        ({"bonus": None, "extra": 1}, "missing: bonus; unknown: extra"),
        ({"tokens": 3}, "tokens is not a list"),
        ({"tokens": [1]}, "differ in length"),
        ({"parents": [0, 0, 1, 0, 1, 3]}, "node 0 is not a root"),
        ({"parents": [-1, 0, 4, 0, 1, 3]}, "node 2 does not come after its parent 4"),
        ({"depths": [0, 1, 2, 1, 1, 2]}, "node 4 is not one deeper"),
        ({"accepted": []}, "does not start at the root"),
        ({"accepted": [0, 2]}, "accepted node 2 is not a child of 0"),
        ({"accepted": [0, 9]}, "accepted node 9"),
    ],
)
def test_a_malformed_line_is_named(file, change, message):
    if isinstance(change, dict):
        values = asdict(TREE) | change
        change = json.dumps({name: value for name, value in values.items() if value is not None})
    with file.open("a") as lines:
        lines.write(change + "\n")
    with pytest.raises(ValueError, match="line 4") as caught:
        read_trace(file)
    assert message in str(caught.value)
    result = CliRunner().invoke(main, ["trace", str(file)])
    assert result.exit_code == 1
    assert "line 4" in result.output


def test_a_record_is_one_line():
    line = json.dumps(asdict(TREE))
    assert parse_record(line) == TREE


def test_drawing():
    assert draw_tree(TREE).splitlines() == [
        "* 5",
        "├─ 7 0.50",
        "│  ├─ 9 0.90",
        "│  └─ 6 0.27",
        "└─ * 8 0.30  => 2",
        "   └─ 4 0.17",
    ]


def test_drawing_with_text():
    first = draw_tree(TREE, "abcdefghij".__getitem__).splitlines()[0]
    assert first == "* 'f'"


def test_a_tree_of_nothing_accepted():
    assert draw_tree(replace(TREE, accepted=[0])).splitlines()[0] == "* 5  => 2"


def test_summary(file):
    summary = summarize(read_trace(file))
    assert (summary.requests, summary.steps, summary.tokens, summary.drafted) == (2, 3, 6, 15)
    assert summary.acceptance_length == 2.0


def test_command(file):
    result = CliRunner().invoke(main, ["trace", str(file)])
    assert result.exit_code == 0, result.output
    assert "request chat-2, step 0, position 12: 5 drafted, 2 accepted" in result.output
    assert result.output.count("position") == 3
    assert "2 requests, 3 verify steps, 6 tokens, 15 nodes drafted: acceptance length 2.00" in (
        result.output
    )


@pytest.mark.parametrize(
    ("options", "drawn", "summary"),
    [
        (["--request", "chat-1"], 2, "1 requests, 2 verify steps, 3 tokens"),
        (["--step", "0"], 2, "2 requests, 2 verify steps, 5 tokens"),
        (["--request", "chat-1", "--step", "1"], 1, "1 requests, 1 verify steps, 1 tokens"),
        (["--limit", "1"], 1, "2 requests, 3 verify steps"),
        (["--limit", "0"], 0, "2 requests, 3 verify steps"),
    ],
)
def test_command_selects(file, options, drawn, summary):
    result = CliRunner().invoke(main, ["trace", str(file), *options])
    assert result.exit_code == 0, result.output
    assert result.output.count("position") == drawn
    assert summary in result.output


def test_command_without_a_match(file):
    result = CliRunner().invoke(main, ["trace", str(file), "--request", "nobody"])
    assert result.exit_code == 1
    assert "no verify step that matches" in result.output
