"""Documents of token ids, with the tokens that are the assistant's."""

import json
import operator
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllm_griffin.whole_file import whole_file

HELD_OUT_EVERY = 20  # one prompt in 20 (5 %) is for validation
FILE = "documents.jsonl"


@dataclass
class Document:
    """One sequence of tokens.

    `id` is the number of its prompt; documents of one prompt share it. `answer` holds the ranges [a, b) of
    the assistant's tokens, in order and without overlap.
    """

    id: int
    tokens: list[int]
    answer: list[tuple[int, int]]

    @property
    def held_out(self) -> bool:
        """Whether the document is for validation; decided by its prompt alone."""
        return self.id % HELD_OUT_EVERY == HELD_OUT_EVERY - 1


def with_held_out(documents: list[Document]) -> list[Document]:
    """The documents, numbered anew where their own numbers would hold none out: by prompt, or one by one.

    Prompts may be numbered in tens, and a long text is one prompt of many documents.
    """
    if len(documents) < HELD_OUT_EVERY or any(d.held_out for d in documents):
        return documents
    prompts = {id_: number for number, id_ in enumerate(dict.fromkeys(d.id for d in documents))}
    if len(prompts) < HELD_OUT_EVERY:
        return [replace(d, id=number) for number, d in enumerate(documents)]
    return [replace(d, id=prompts[d.id]) for d in documents]


def write_documents(folder: str | Path, documents: Iterable[Document]) -> None:
    """Write ``documents.jsonl``, a line per document; the file is replaced as a whole."""
    path = Path(folder) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as scratch, open(scratch, "w", encoding="utf-8") as lines:
        for d in documents:
            lines.write(json.dumps({"id": d.id, "tokens": d.tokens, "answer": d.answer}) + "\n")


def read_documents(folder: str | Path) -> list[Document]:
    """Read ``documents.jsonl``.

    Raises:
        FileNotFoundError: The folder has none.
        ValueError: A line is malformed; its number is named.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {FILE}: make it with vllm-griffin data")
    documents = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                documents.append(_parse(json.loads(line)))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number}: {type(error).__name__}: {error}"
                ) from error
    return documents


def _parse(row: dict[str, Any]) -> Document:
    tokens = [operator.index(token) for token in row["tokens"]]
    spans = [(operator.index(a), operator.index(b)) for a, b in row["answer"]]
    edges = [0, *(edge for span in spans for edge in span), len(tokens)]
    if edges != sorted(edges):
        raise ValueError(f"answer {spans} is not in order within {len(tokens)} tokens")
    return Document(operator.index(row["id"]), tokens, spans)
