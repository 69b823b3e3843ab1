"""Inputs: each kind of line, how it is told apart, and lines that cannot be used."""

import json
from pathlib import Path

import click
import pytest

from vllm_griffin.data.sources import Chat, Problems, Text, Tokens, parse, read_records


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def bot(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("row", "content"),
    [
        ({"turns": ["a", "b"], "reference": ["c"]}, Chat([user("a"), user("b")])),
        ({"prompt": "a"}, Chat([user("a")])),
        ({"prompt": "a", "response": "b"}, Chat([user("a"), bot("b")])),
        ({"messages": [user("a"), bot("b")]}, Chat([user("a"), bot("b")])),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            Chat([user("a"), bot("b")]),
        ),
        ({"messages": [bot("x"), user("a"), bot("b")]}, Chat([user("a"), bot("b")])),
        ({"prompt_token_ids": [1], "response_token_ids": [2, 3]}, Tokens([1], [2, 3])),
        ({"text": "a"}, Text("a")),
    ],
)
def test_kinds(row: dict, content: object) -> None:
    assert parse(row, None) == content


@pytest.mark.parametrize(
    ("row", "form", "reason"),
    [
        ([], None, "not a JSON object"),
        ({"words": "a"}, None, "none of the fields"),
        ({"text": " "}, None, "text is empty"),
        ({"prompt": None}, None, "no text"),
        ({"turns": []}, None, "turns"),
        ({"messages": [{"role": "user"}]}, None, "turn 1 has no role and content"),
        ({"messages": [bot("b")]}, None, "no turn of a user"),
        ({"prompt_token_ids": [1]}, None, "response_token_ids"),
        ({"prompt_token_ids": [1], "response_token_ids": [True]}, None, "no list of token ids"),
        ({"prompt_token_ids": [], "response_token_ids": [1]}, None, "prompt_token_ids is empty"),
        ({"prompt": "a", "text": "b"}, "chat", "messages or conversations"),
        ({"text": "half a pair: \ud83d"}, None, "surrogates not allowed"),
    ],
)
def test_unusable_rows_say_why(row: object, form: str | None, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse(row, form)


def test_format_overrules_the_fields() -> None:
    assert parse({"prompt": "a", "text": "b"}, "text") == Text("b")


def test_problems_are_named_by_line_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = lines(tmp_path / "a.jsonl", {"prompt": "a"}, "{broken", "", {"prompt": "b"})
    problems = Problems(stop=False)
    records = read_records([path], None, problems)
    assert [r.where for r in records] == [f"{path}, line 1", f"{path}, line 4"]
    assert problems.count == 2
    told = capsys.readouterr().err
    assert f"{path}, line 2: not JSON" in told and f"{path}, line 3: empty line" in told


def test_stop_ends_at_the_first_problem(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"prompt": "a"}, "{broken")
    with pytest.raises(click.ClickException, match=r"line 2: not JSON.*--on-error skip"):
        read_records([path], None, Problems(stop=True))


def test_numbers_are_of_prompts(tmp_path: Path) -> None:
    first = lines(tmp_path / "a.jsonl", {"prompt": "a"}, {"prompt": "b"}, {"prompt": "a"})
    second = lines(tmp_path / "b.jsonl", {"messages": [user("b"), bot("x")]}, {"prompt": "c"})
    found = read_records([first, second], None, Problems(stop=True))
    assert [r.id for r in found] == [0, 1, 0, 1, 2]


def test_one_file_keeps_its_own_numbers(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"id": 7, "prompt": "a"}, {"id": 19, "prompt": "b"})
    other = lines(tmp_path / "b.jsonl", {"id": 7, "prompt": "c"})
    assert [r.id for r in read_records([path], None, Problems(stop=True))] == [7, 19]
    assert [r.id for r in read_records([path, other], None, Problems(stop=True))] == [0, 1, 2]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    row = json.dumps({"messages": [user("a")]})
    paths = [tmp_path / name for name in ("list.json", "lines.json", "lines.jsonl", "a.txt")]
    for path, text in zip(paths, (f"[{row}]", row + "\n", row + "\n", "words"), strict=True):
        path.write_text(text, encoding="utf-8-sig")
    found = read_records(paths, None, Problems(stop=True))
    assert [r.content for r in found] == [*[Chat([user("a")])] * 3, Text("words")]


def test_a_json_list_and_plain_text(tmp_path: Path) -> None:
    listed = tmp_path / "chats.json"
    listed.write_text(json.dumps([{"messages": [user("a")]}, {"messages": 3}]))
    plain, binary = tmp_path / "a.txt", tmp_path / "b.txt"
    plain.write_text("words\nmore")
    binary.write_bytes(b"\xff\xfe")
    problems = Problems(stop=False)
    found = read_records([listed, plain, binary], None, problems)
    assert [r.content for r in found] == [Chat([user("a")]), Text("words\nmore")]
    assert problems.count == 2


def test_plain_text_in_another_format(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone?\r\n\n two? \n\xff\n")
    problems = Problems(stop=False)
    found = read_records([path], "prompts", problems)
    assert [r.content for r in found] == [Chat([user("one?")]), Chat([user("two?")])]
    assert problems.count == 1
    with pytest.raises(click.ClickException, match="has no messages or conversations"):
        read_records([path], "chat", Problems(stop=True))


def test_numbers_beyond_64_bits_are_names(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"id": 1 << 70, "prompt": "a"})
    assert [r.id for r in read_records([path], None, Problems(stop=True))] == [0]
