"""Documents of token ids, with the tokens that are the assistant's."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

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


def write_documents(folder: str | Path, documents: Iterable[Document]) -> None:
    """Write ``documents.jsonl``, a line per document; the file is replaced as a whole."""
    path = Path(folder) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".partial")
    with open(scratch, "w", encoding="utf-8") as lines:
        for d in documents:
            lines.write(json.dumps({"id": d.id, "tokens": d.tokens, "answer": d.answer}) + "\n")
    scratch.replace(path)


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
                row = json.loads(line)
                spans = [(int(a), int(b)) for a, b in row["answer"]]
                documents.append(Document(int(row["id"]), list(row["tokens"]), spans))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number}: {type(error).__name__}: {error}"
                ) from error
    return documents
