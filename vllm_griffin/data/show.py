"""What ``vllm-griffin data`` prints: one sample, the counts, and what a run would take."""

import sys
from typing import Any

import click

from vllm_griffin.data.documents import Document

_TOKENS = 600  # of the sample


def sample(document: Document, tokenizer: Any) -> None:
    """Print a document with the assistant's tokens coloured, or in brackets where there are no colours."""
    coloured = sys.stdout.isatty()
    count = sum(b - a for a, b in document.answer)
    how = "green" if coloured else "in ⟦ ⟧"
    click.echo(
        f"one document, of prompt {document.id}: {len(document.tokens)} tokens, {count} of them the "
        f"assistant's ({how})"
    )
    end = min(len(document.tokens), _TOKENS)
    at, parts = 0, []
    for a, b in [*document.answer, (end, end)]:
        a, b = min(a, end), min(b, end)
        parts.append(tokenizer.decode(document.tokens[at:a]))
        text = tokenizer.decode(document.tokens[a:b])
        if text:
            parts.append(click.style(text, fg="green") if coloured else f"⟦{text}⟧")
        at = b
    click.echo("".join(parts) + ("" if end == len(document.tokens) else " ...") + "\n")


_NOTES = {
    "cut_documents": "documents were longer than --max-length and cut",
    "excluded_prompts": "prompts are among those to exclude and left out",
    "repeated_prompts": "prompts came again and were answered once",
    "skipped": "lines or chats could not be used and were skipped",
}


def counts(found: dict[str, int]) -> None:
    """Print what was made, and what was not."""
    click.echo(
        f"{found['documents']} documents of {found['prompts']} prompts, {found['tokens']} tokens, "
        f"{found['assistant_tokens']} of them the assistant's; {found['held_out_documents']} documents are "
        "held out"
    )
    if not found["held_out_documents"]:
        click.echo(
            "none is held out, since one prompt in 20 is: training cannot validate without 20 prompts, "
            "chats, texts or text files"
        )
    for name, text in _NOTES.items():
        if found[name]:
            click.echo(f"{found[name]} {text}")


def size(count: float) -> str:
    """Bytes as a reader takes them in."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def duration(seconds: float) -> str:
    """Seconds as a reader takes them in."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
