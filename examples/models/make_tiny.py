"""Make the tiny pair: a small Llama trained on the Python standard library, and drafts for it.

    python examples/models/make_tiny.py target     # examples/models/target, heldout.txt
    python examples/models/make_tiny.py texts --output tiny     # text to train a draft on, and prompts
    vllm-griffin data --target examples/models/target ...       # the rest: README, "Train a draft"

The text is on every machine that has Python; files are split into training and held-out files by the hash
of their names, and the held-out ones are listed in `heldout.txt`.
"""

import hashlib
import json
import sysconfig
import time
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vllm_griffin.train.optim import Muon, schedule

HERE = Path(__file__).parent
LENGTH = 512
# Tests, generated tables and vendored packages are not typical source text.
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "encodings", "site-packages", "pydoc_data"}
SKIPPED |= {"dist-packages", "__pycache__", "_sysconfigdata", "lib-dynload", "ensurepip"}


def stdlib_files() -> tuple[list[Path], list[Path]]:
    """The standard library's source files, (training, held-out), sorted by name."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [p for p in sorted(root.rglob("*.py")) if not SKIPPED & set(p.relative_to(root).parts)]
    parts: tuple[list[Path], list[Path]] = ([], [])
    for path in files:
        if 400 < path.stat().st_size < 200_000 and not path.name.startswith("_sysconfigdata"):
            digest = hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()
            parts[digest[0] % 16 == 0].append(path)
    return parts


def read(path: Path) -> str:
    """A source file's text."""
    return path.read_text(encoding="utf-8", errors="ignore")


def windows(tokenizer: PreTrainedTokenizerFast, text: str, length: int) -> list[list[int]]:
    """A text's tokens in pieces of `length`."""
    tokens = tokenizer(text)["input_ids"]
    return [tokens[i : i + length] for i in range(0, len(tokens), length)]


def write_lines(path: Path, rows: list[dict]) -> None:
    """Write JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def train_tokenizer(files: list[Path]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 2048 tokens; `<s>` opens a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (read(p) for p in files)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=2048
    )


def new_target(seed: int) -> LlamaForCausalLM:
    """1.05M parameters; head counts divide by two, heads of 32 run in vLLM on a CPU."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=2048,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
            tie_word_embeddings=True,
        )
    )


def train_target(
    model: LlamaForCausalLM, tokens: torch.Tensor, steps: int, batch: int, seed: int
) -> None:
    """Next-token training on random windows of `tokens` [T]; Muon for matrices, AdamW for the rest."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    rates = [0.02, 3e-3]
    optimisers = [Muon(matrices, lr=rates[0]), torch.optim.AdamW(others, lr=rates[1])]
    generator = torch.Generator().manual_seed(seed)
    began = time.time()
    for step in range(steps):
        first = torch.randint(len(tokens) - LENGTH - 1, (batch,), generator=generator)
        window = torch.stack([tokens[a : a + LENGTH + 1] for a in first.tolist()])
        logits = model(input_ids=window[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
        for optimiser, rate in zip(optimisers, rates, strict=True):
            optimiser.zero_grad()
            optimiser.param_groups[0]["lr"] = rate * schedule(step, steps, 20, 0.6)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
        if (step + 1) % 50 == 0:
            click.echo(
                f"step {step + 1}/{steps}  loss {loss.item():.3f}  {time.time() - began:.0f} s"
            )


@click.group()
def main() -> None:
    """Make the tiny pair."""


@main.command()
@click.option("--steps", default=1000, show_default=True, help="Optimiser steps.")
@click.option("--batch", default=8, show_default=True, help="Windows of 512 tokens a step.")
@click.option("--seed", default=0, show_default=True)
@click.option("--output", default=HERE / "target", type=click.Path(path_type=Path))
def target(steps: int, batch: int, seed: int, output: Path) -> None:
    """Train tokenizer and target, and list the held-out files."""
    training, held_out = stdlib_files()
    tokenizer = train_tokenizer(training)
    tokens = torch.tensor([t for p in training for t in tokenizer(read(p))["input_ids"]])
    click.echo(f"{len(training)} files, {len(tokens)} tokens; {len(held_out)} files held out")
    model = new_target(seed)
    train_target(model, tokens, steps, batch, seed)
    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)
    for path in output.iterdir():
        path.chmod(0o644)
    root = Path(sysconfig.get_path("stdlib"))
    names = [p.relative_to(root).as_posix() for p in held_out]
    (HERE / "heldout.txt").write_text("\n".join(names) + "\n")


@main.command()
@click.option("--target", "folder", default=HERE / "target", type=click.Path(path_type=Path))
@click.option("--files", default=80, show_default=True, help="Files to train a draft on.")
@click.option("--prompts", default=40, show_default=True, help="Beginnings of held-out text.")
@click.option("--output", required=True, type=click.Path(path_type=Path))
def texts(folder: Path, files: int, prompts: int, output: Path) -> None:
    """Write text.jsonl (training files), and prompts.jsonl (64 tokens each, from held-out files)."""
    training, _ = stdlib_files()
    output.mkdir(parents=True, exist_ok=True)
    # Spread over all files rather than the first of the alphabet.
    chosen = training[:: max(1, len(training) // files)][:files]
    rows = [{"id": i, "text": read(path)} for i, path in enumerate(chosen)]
    write_lines(output / "text.jsonl", rows)
    root = Path(sysconfig.get_path("stdlib"))
    # Distributions ship some of the library, such as tkinter, in packages of their own.
    held_out = [p for n in (HERE / "heldout.txt").read_text().split() if (p := root / n).is_file()]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    pieces = [p for f in held_out for p in windows(tokenizer, read(f), 64) if len(p) == 64]
    pieces = pieces[:: max(1, len(pieces) // prompts)][:prompts]
    starts = [tokenizer.decode(piece, skip_special_tokens=True) for piece in pieces]
    write_lines(
        output / "prompts.jsonl", [{"question_id": i, "turns": [t]} for i, t in enumerate(starts)]
    )


if __name__ == "__main__":
    main()
