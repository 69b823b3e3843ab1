"""Command line: `python -m vllm_griffin.train --help`."""

import json
from pathlib import Path

import click


def _stages(
    _context: click.Context, _parameter: click.Parameter, text: str
) -> list[tuple[int, int]]:
    try:
        return [(int(p), int(n)) for p, n in (part.split(":") for part in text.split(","))]
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not like 1:800,3:100 (passes:steps)") from error


@click.group(help="Train a draft model for a target model.")
@click.option("--threads", type=int, default=0, help="CPU threads (0: PyTorch's choice).")
def main(threads: int) -> None:
    """Group of the commands."""
    if threads:
        import torch

        torch.set_num_threads(threads)


@main.command(help="Store the target's hidden states for token ids or text files.")
@click.option("--target", required=True, help="Target model: folder or hub name.")
@click.option(
    "--responses", type=click.Path(exists=True), help="JSONL: prompt and response token ids."
)
@click.option("--text", "texts", multiple=True, type=click.Path(exists=True), help="A text file.")
@click.option("--length", default=512, show_default=True, help="Tokens per document of text files.")
@click.option("--limit", type=int, help="Use only the first documents.")
@click.option("--output", required=True, type=click.Path(), help="Folder for the shards.")
def extract(
    target: str,
    responses: str | None,
    texts: tuple[str, ...],
    length: int,
    limit: int | None,
    output: str,
) -> None:
    """Run the target over documents and store what the draft is trained on."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from vllm_griffin.train import data

    if bool(responses) == bool(texts):
        raise click.UsageError("give either --responses or --text")
    if responses:
        documents = data.read_responses(responses, limit)
    else:
        tokenizer = AutoTokenizer.from_pretrained(target)
        documents = data.read_texts([Path(t) for t in texts], tokenizer, length)[:limit]
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    data.extract(model, documents, output)


@main.command(help="Train a draft on stored hidden states; continues OUTPUT if it was begun.")
@click.option("--target", required=True, help="Target model: folder or hub name.")
@click.option("--data", "data_folder", required=True, type=click.Path(exists=True), help="Shards.")
@click.option("--output", required=True, type=click.Path(), help="Folder for the draft.")
@click.option(
    "--kind", type=click.Choice(["griffin", "eagle"]), default="griffin", show_default=True
)
@click.option("--init-from", type=click.Path(exists=True), help="Start from this draft.")
@click.option(
    "--stages",
    default="1:1000",
    callback=_stages,
    show_default=True,
    help="passes:steps, joined by commas; a continued run may be given others.",
)
@click.option("--batch-tokens", default=4096, show_default=True)
@click.option(
    "--optimiser", type=click.Choice(["muon", "adamw"]), default="muon", show_default=True
)
@click.option("--lr", default=1e-3, show_default=True, help="AdamW.")
@click.option("--muon-lr", default=0.02, show_default=True, help="Muon, for matrices.")
@click.option("--warmup", default=20, show_default=True, help="Steps.")
@click.option("--decay", default=0.6, show_default=True, help="Last part of the run, linear to 0.")
@click.option("--feature-weight", default=1.0, show_default=True, help="Smooth L1 on features.")
@click.option("--token-weight", default=0.1, show_default=True, help="Soft cross-entropy.")
@click.option(
    "--top-weight", default=0.5, show_default=True, help="Top-10 term, several passes only."
)
@click.option("--align-top-k", default=3, show_default=True, help="Alignment mask; 0: none (HASS).")
@click.option(
    "--vocabulary",
    default=8192,
    show_default=True,
    help="Losses over the most frequent tokens; 0: all.",
)
@click.option("--noise", default=0.2, show_default=True, help="Uniform noise on input features.")
@click.option("--prompt-loss/--no-prompt-loss", default=False, help="Train on prompts too.")
@click.option("--shards", type=int, help="Use only the first shards.")
@click.option("--seed", default=0, show_default=True)
@click.option("--validate-every", default=100, show_default=True, help="Steps.")
@click.option("--save-every", default=50, show_default=True, help="Steps.")
def train(
    target: str,
    data_folder: str,
    output: str,
    kind: str,
    init_from: str | None,
    shards: int | None,
    **options: object,
) -> None:
    """Train; every option that is not named here is a field of `Settings`."""
    from vllm_griffin.train.checkpoint import load_draft
    from vllm_griffin.train.data import HiddenStates
    from vllm_griffin.train.loop import Trainer
    from vllm_griffin.train.settings import Settings
    from vllm_griffin.train.setup import load_target_parts, new_draft

    parts = load_target_parts(target)
    draft = (
        load_draft(init_from, parts.embeddings)
        if init_from
        else new_draft(parts, eagle=kind == "eagle")
    )
    settings = Settings(**options)  # type: ignore[arg-type]
    click.echo(json.dumps(vars(settings)))
    data = HiddenStates(data_folder, shards)
    Trainer(draft, data, parts.head, settings, output, parts.config, fresh=init_from is None).run()


@main.command(help="Let the target answer prompts greedily (test sets for `replay`).")
@click.option("--target", required=True, help="Chat model: folder or hub name.")
@click.option("--prompts", required=True, type=click.Path(exists=True), help="JSONL with `turns`.")
@click.option("--limit", type=int, help="Only the first prompts.")
@click.option("--new-tokens", default=128, show_default=True)
@click.option("--output", required=True, type=click.Path(), help="JSONL that `extract` reads.")
def generate(target: str, prompts: str, limit: int | None, new_tokens: int, output: str) -> None:
    """Write greedy answers to first turns."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from vllm_griffin.train.generate import greedy_answers, read_prompts

    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(target)
    answers = greedy_answers(model, tokenizer, read_prompts(prompts, limit), new_tokens)
    Path(output).write_text("".join(json.dumps(answer) + "\n" for answer in answers))


@main.command(help="Acceptance length at T=0 by replaying stored greedy outputs.")
@click.option("--target", required=True, type=click.Path(exists=True), help="Target model folder.")
@click.option("--draft", "drafts", multiple=True, required=True, type=click.Path(exists=True))
@click.option("--data", "data_folder", required=True, type=click.Path(exists=True), help="Shards.")
@click.option(
    "--tree",
    "trees",
    multiple=True,
    default=("59,6,10", "6,6,1"),
    show_default=True,
    help="nodes,depth,top_k; top_k 1 is a chain.",
)
@click.option("--limit", type=int, help="Only the first documents.")
def replay(
    target: str,
    drafts: tuple[str, ...],
    data_folder: str,
    trees: tuple[str, ...],
    limit: int | None,
) -> None:
    """Print one JSON line per draft and tree."""
    from vllm_griffin.train.checkpoint import load_draft
    from vllm_griffin.train.data import HiddenStates
    from vllm_griffin.train.setup import load_target_parts
    from vllm_griffin.train.simulate import replay as run

    parts = load_target_parts(target)
    data = HiddenStates(data_folder)
    for folder in drafts:
        draft = load_draft(folder, parts.embeddings)
        for tree in trees:
            nodes, depth, top_k = (int(x) for x in tree.split(","))
            result = run(
                draft, parts.head, data, nodes=nodes, depth=depth, top_k=top_k, limit=limit
            )
            row = {
                "draft": folder,
                "tree": tree,
                "acceptance_length": round(result.acceptance_length, 3),
                "steps": result.steps,
                "per_depth": [round(n / max(1, result.steps), 3) for n in result.accepted_at],
            }
            click.echo(json.dumps(row))


if __name__ == "__main__":
    main()
