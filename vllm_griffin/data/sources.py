"""What training data is made from: prompts, chats, token ids with responses, and plain text.

A line of JSONL is told apart by its fields:

    prompts  {"turns": [user, ...]} or {"prompt": user}; with "response" it is a chat
    chat     {"messages": [{"role", "content"}]} or ShareGPT's {"conversations": [{"from", "value"}]}
    tokens   {"prompt_token_ids", "response_token_ids"}
    text     {"text"}

A file that is one JSON list (as ShareGPT is published) is read as if each entry were a line. A file that is
neither is one plain text, or as "prompts" a prompt a line.
"""

import codecs
import json
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import click

Message: TypeAlias = dict[str, str]  # {"role", "content"}
_FIELDS = {
    "tokens": "prompt_token_ids and response_token_ids",
    "chat": "messages or conversations",
    "prompts": "turns or prompt",
    "text": "text",
}
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"}
_SHOWN = 20  # problems that are printed one by one


@dataclass(frozen=True)
class Chat:
    """A conversation; a prompt is one that ends with its user's turn."""

    messages: list[Message]

    @property
    def opening(self) -> list[Message]:
        """The turns up to the first of the user's, with it: what a response can be generated to."""
        roles = [message["role"] for message in self.messages]
        return self.messages[: roles.index("user") + 1]


@dataclass(frozen=True)
class Tokens:
    """A prompt and a response as token ids."""

    prompt: list[int]
    response: list[int]


@dataclass(frozen=True)
class Text:
    """Plain text, all of it trained on."""

    text: str


Content: TypeAlias = Chat | Tokens | Text


@dataclass(frozen=True)
class Record:
    """One piece of input. `id` numbers its prompt, `where` names its file and line."""

    id: int
    where: str
    content: Content


@dataclass
class Problems:
    """Input that cannot be used: each is named; with `stop` the first one ends the run."""

    stop: bool
    count: int = 0

    def add(self, where: str, reason: object) -> None:
        """Name a problem.

        Raises:
            click.ClickException: The run is to stop at a problem.
        """
        message = " ".join(f"{where}: {reason}".split())
        if self.stop:
            raise click.ClickException(f"{message} (--on-error skip leaves such input out)")
        self.count += 1
        if self.count <= _SHOWN:
            click.echo(f"skipped {message}", err=True)
        elif self.count == _SHOWN + 1:
            click.echo("skipped more; only their number is given at the end", err=True)


@dataclass
class Numbering:
    """Numbers of prompts, in order of appearance; equal prompts have equal numbers."""

    _known: dict[Hashable, int] = field(default_factory=dict)

    def number(self, content: Content, own: int | None = None) -> int:
        """The number of the content's prompt; a new prompt takes `own` if it has one."""
        number = len(self._known) if own is None else own
        return self._known.setdefault(_prompt_key(content), number)


def _prompt_key(content: Content) -> Hashable:
    if isinstance(content, Chat):
        return tuple((m["role"], m["content"]) for m in content.opening)
    if isinstance(content, Tokens):
        return tuple(content.prompt)
    return content.text


def read_records(paths: Sequence[Path], form: str | None, problems: Problems) -> list[Record]:
    """Read all inputs.

    Args:
        paths: Files. If there is one, the integer `id` of its lines numbers its prompts.
        form: "prompts", "chat", "tokens" or "text" for every line, or None to tell by the fields.
        problems: Takes lines that are malformed or empty.
    """
    numbering = Numbering()
    records: list[Record] = []
    for path in paths:
        for where, read in _entries(path, form):
            try:
                row = read()
                content = row if isinstance(row, Text) else parse(row, form)
            except ValueError as error:
                problems.add(where, error)
                continue
            own = row.get("id") if len(paths) == 1 and isinstance(row, dict) else None
            # Training data hold 64 bits.
            usable = isinstance(own, int) and not isinstance(own, bool) and 0 <= own < 1 << 63
            number = numbering.number(content, own if usable else None)
            records.append(Record(number, where, content))
    return records


def _entries(path: Path, form: str | None) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(name, how to read it) of a file's lines, list entries, or of the file as a text."""
    with open(path, "rb") as file:
        lines = (line.removeprefix(codecs.BOM_UTF8) for line in file)
        first = next((line for line in lines if line.strip()), b"").lstrip()[:1]
    by_line = first == b"{" or path.suffix == ".jsonl"
    if first == b"[" and path.suffix == ".json":
        for number, entry in enumerate(_json_list(path), 1):
            yield f"{path}, entry {number}", partial(_same, entry)
    elif by_line and (form != "text" or path.suffix == ".jsonl"):
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                yield f"{path}, line {number}", partial(_json, line)
    elif form == "prompts":
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}, line {number}", partial(_prompt, line)
    else:
        yield str(path), partial(_plain, path, form)


def _same(entry: Any) -> Any:
    return entry


def _json_list(path: Path) -> list[Any]:
    try:
        entries: list[Any] = json.loads(path.read_bytes())
    except ValueError as error:
        raise click.ClickException(f"{path}: not JSON: {error}") from error
    return entries


def _json(line: bytes) -> Any:
    if not line.strip():
        raise ValueError("empty line")
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError("not UTF-8") from error


def _prompt(line: bytes) -> dict[str, str]:
    try:
        return {"prompt": line.decode("utf-8-sig").strip()}
    except UnicodeDecodeError as error:
        raise ValueError("not UTF-8") from error


def _plain(path: Path, form: str | None) -> Text:
    if form in ("chat", "tokens"):
        raise ValueError(f"is no JSON and has no {_FIELDS[form]}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError("not UTF-8") from error
    return Text(_filled(text, "text"))


def parse(row: Any, form: str | None) -> Content:
    """The content of one decoded JSON line.

    Raises:
        ValueError: It is no object, lacks the fields of its format, or they hold nothing usable.
    """
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    form = form or _detect(row)
    if form == "tokens" and {"prompt_token_ids", "response_token_ids"} <= row.keys():
        return Tokens(_ids(row, "prompt_token_ids"), _ids(row, "response_token_ids"))
    if form == "chat" and ("messages" in row or "conversations" in row):
        return Chat(_chat(row))
    if form == "prompts" and ("turns" in row or "prompt" in row):
        return Chat(_turns(row))
    if form == "text" and "text" in row:
        return Text(_filled(row["text"], "text"))
    raise ValueError(f"has no {_FIELDS[form]}" if form else _unknown())


def _detect(row: dict[str, Any]) -> str | None:
    if "prompt_token_ids" in row:
        return "tokens"
    if "messages" in row or "conversations" in row:
        return "chat"
    if "turns" in row or "prompt" in row:
        return "prompts"
    return "text" if "text" in row else None


def _unknown() -> str:
    return "has none of the fields " + "; ".join(_FIELDS.values())


def _filled(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is no text")
    if not value.strip():
        raise ValueError(f"{name} is empty")
    # JSON can hold half a surrogate pair, which is no text and raises a ValueError here.
    value.encode()
    return value


def _ids(row: dict[str, Any], name: str) -> list[int]:
    value = row[name]
    if not isinstance(value, list) or not all(type(token) is int for token in value):
        raise ValueError(f"{name} is no list of token ids")
    if not value:
        raise ValueError(f"{name} is empty")
    return value


def _turns(row: dict[str, Any]) -> list[Message]:
    turns = row["turns"] if "turns" in row else [row["prompt"]]
    if not isinstance(turns, list) or not turns:
        raise ValueError("turns is no list of texts, or is empty")
    messages = [{"role": "user", "content": _filled(turn, "a turn")} for turn in turns]
    if "response" in row:
        content = _filled(row["response"], "response")
        return [messages[0], {"role": "assistant", "content": content}]
    return messages


def _chat(row: dict[str, Any]) -> list[Message]:
    role, content = ("role", "content") if "messages" in row else ("from", "value")
    turns = row["messages"] if "messages" in row else row["conversations"]
    if not isinstance(turns, list):
        raise ValueError("the conversation is no list of turns")
    messages = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or role not in turn or content not in turn:
            raise ValueError(f"turn {number} has no {role} and {content}")
        who = str(turn[role]).lower()
        text = _filled(turn[content], f"{content} of turn {number}")
        messages.append({"role": _ROLES.get(who, who), "content": text})
    # ShareGPT's longer chats are published in parts, of which some begin with an answer.
    while messages and messages[0]["role"] == "assistant":
        messages.pop(0)
    if not any(message["role"] == "user" for message in messages):
        raise ValueError("the conversation has no turn of a user")
    return messages
