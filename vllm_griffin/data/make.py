"""``vllm-griffin data``: from inputs to the folder that training reads."""

import functools
import resource
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
from huggingface_hub.errors import StrictDataclassError

from vllm_griffin.commands.options import reason
from vllm_griffin.data import hidden, show
from vllm_griffin.data.build import Builder
from vllm_griffin.data.chat import load_tokenizer
from vllm_griffin.data.documents import Document, with_held_out, write_documents
from vllm_griffin.data.engine import engine, prepare_environment
from vllm_griffin.data.respond import Engine, Sampling, draw_prompts, respond
from vllm_griffin.data.settings import Settings, claim
from vllm_griffin.data.sources import Chat, Problems, Record, read_records
from vllm_griffin.model.checkpoint import CheckpointError, find_folder
from vllm_griffin.model.files import fingerprint
from vllm_griffin.train.setup import check_target
from vllm_griffin.whole_file import write_json

SAMPLE = 4  # what a dry run makes to tell how long all of it takes


@dataclass(frozen=True)
class TargetSizes:
    """`context` in tokens; `hidden` is the width of the target's states."""

    context: int
    hidden: int
    vocabulary: int


@dataclass(frozen=True)
class Made:
    """Documents and their builder; all that the inputs ask for are `share` times as many.

    `seconds` is how long they took, without the start of the engine.
    """

    builder: Builder
    documents: list[Document]
    share: float
    seconds: float


def target_sizes(target: Path) -> TargetSizes:
    """Sizes from the target's config.

    Raises:
        click.ClickException: There is no config that transformers knows, or its attention has a sliding
            window, which griffin would refuse to serve once the draft is trained.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(target).get_text_config()
    except (OSError, ValueError, StrictDataclassError) as error:
        raise click.ClickException(
            f"{target} is neither a model folder nor a model that the hub could give: {error}"
        ) from error
    window = getattr(config, "sliding_window", None)
    if window:
        advice = f"if {window} tokens are enough, set sliding_window to null in a copy of its config.json"
        if "sliding_attention" in (getattr(config, "layer_types", None) or []):
            advice = "take another target"
        raise click.ClickException(
            f"{target} attends through a sliding window of {window} tokens, and griffin serves full "
            f"attention only: {advice}"
        )
    names = ("max_position_embeddings", "hidden_size", "vocab_size")
    for name in names:
        if not isinstance(getattr(config, name, None), int):
            raise click.ClickException(f"{target}: its config has no {name}")
    return TargetSizes(*(getattr(config, name) for name in names))


def make(s: Settings) -> None:
    """Make the training data, or say what it would take.

    Raises:
        click.ClickException: Anything that the user can mend.
    """
    prepare_environment(s.threads)
    if s.threads is not None:
        import torch

        torch.set_num_threads(s.threads)
    sizes = target_sizes(s.target)
    weights = None
    if s.generate or s.draw or s.hidden_states != "online":
        # Training would refuse it, too, but after hours. Only here are the weights needed anyway.
        try:
            check_target(str(s.target))
            weights = fingerprint(find_folder(str(s.target)))
        except (CheckpointError, OSError, KeyError, ValueError) as error:
            raise click.ClickException(reason(error)) from error
    s = replace(s, max_length=_max_length(s, sizes.context))
    if s.dry_run:
        _estimate(s, sizes)
        return
    with hidden.full_disk_explained(s.output):
        record = claim(s, weights)
        write_json(s.output / "data.json", record)
        made = _documents(s, sizes, s.output)
        documents = made.documents
        show.sample(documents[0], made.builder.tokenizer)
        write_documents(s.output, documents)
        if s.hidden_states != "online":
            tokens = hidden.shard_tokens(sizes.hidden)
            hidden.store(_source(s), documents, s.output, tokens)
        counts = made.builder.counts(documents)
        write_json(s.output / "data.json", record | {"counts": counts, "finished": True})
    show.counts(counts)
    click.echo(f"training data in {s.output}")


def _max_length(s: Settings, context: int) -> int:
    # vLLM generates a token behind a document, which must fit in the context.
    longest = context - 1 if s.hidden_states == "vllm" else context
    if s.max_length is not None and s.max_length > longest:
        raise click.UsageError(f"--max-length {s.max_length} is over the target's {longest} tokens")
    return s.max_length or min(2048, longest)


def _documents(s: Settings, sizes: TargetSizes, folder: Path, sample: int | None = None) -> Made:
    """All documents; of those that the target generates, into `folder`, the first `sample` if given.

    Raises:
        click.ClickException: There are none.
    """
    assert s.max_length is not None
    problems = Problems(stop=s.on_error == "stop")
    builder = Builder(s, load_tokenizer(str(s.target), s.chat_template), sizes.vocabulary, problems)
    with _EngineAtNeed(s) as llm:
        start = time.perf_counter()
        if s.draw is not None:
            records = _drawn(s, builder, llm, folder, sample)
        else:
            records = read_records(s.input, s.format, problems)
        records = builder.without_excluded(records)[: s.limit]
        if s.generate or s.draw is not None:
            requests = builder.requests(records)
            wanted = len(requests) if sample is None or s.draw is None else s.draw
            asked = requests[:sample]
            documents = builder.generated(
                asked, respond(llm, asked, _sampling(s), folder / "responses.jsonl")
            )
            share = wanted / max(len(asked), 1)
        else:
            documents, share = builder.given(records), 1.0
    if not documents:
        raise click.ClickException("there is nothing to train on in the inputs")
    documents = with_held_out(documents)
    return Made(builder, documents, share, time.perf_counter() - start - llm.seconds)


def _estimate(s: Settings, sizes: TargetSizes) -> None:
    """Print what the run would take, from making and timing a small part of it; nothing is kept."""
    with TemporaryDirectory(prefix="vllm-griffin-") as folder:
        made = _documents(s, sizes, Path(folder), SAMPLE)
        seconds = made.seconds * made.share
        if s.hidden_states != "online":
            part = made.documents[:SAMPLE]
            with _source(s)() as source:
                start = time.perf_counter()
                source(part)
                each = (time.perf_counter() - start) / hidden.count_tokens(part)
            seconds += each * hidden.count_tokens(made.documents) * made.share
    show.sample(made.documents[0], made.builder.tokenizer)
    counts = made.builder.counts(made.documents)
    if made.share > 1:
        click.echo(
            f"The target generated {SAMPLE} of the responses; the rest is taken to be like them."
        )
        scaled = ("documents", "prompts", "tokens", "assistant_tokens", "held_out_documents")
        counts |= {name: round(counts[name] * made.share) for name in scaled}
    show.counts(counts)
    stored = hidden.BYTES * sizes.hidden * counts["tokens"] * (s.hidden_states != "online")
    shard = hidden.BYTES * sizes.hidden * min(hidden.shard_tokens(sizes.hidden), counts["tokens"])
    # ru_maxrss counts KiB.
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + 2 * shard
    click.echo(
        f"hidden states: {show.size(stored)} on disk; memory: about {show.size(memory)}; time: at most "
        f"about {show.duration(seconds)}"
    )


def _drawn(
    s: Settings, builder: Builder, llm: Engine, folder: Path, sample: int | None
) -> list[Record]:
    assert s.draw is not None
    count = s.draw if sample is None else min(sample, s.draw)
    prompts = draw_prompts(llm, builder.template, count, _sampling(s), folder / "prompts.jsonl")
    return [
        Record(i, f"drawn prompt {i}", Chat([{"role": "user", "content": prompt}]))
        for i, prompt in enumerate(prompts)
    ]


def _sampling(s: Settings) -> Sampling:
    return Sampling(s.temperatures, s.max_new_tokens, s.seed)


class _EngineAtNeed:
    """Gives the engine, which starts when it is first asked for; `seconds` is how long that took."""

    def __init__(self, s: Settings) -> None:
        assert s.max_length is not None
        self._engine = engine(str(s.target), s.max_length, s.seed, s.tensor_parallel)
        self._stack = ExitStack()
        self._llm: Any = None
        self.seconds = 0.0

    def __enter__(self) -> "_EngineAtNeed":
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    def __call__(self) -> Any:
        if self._llm is None:
            start = time.perf_counter()
            self._llm = self._stack.enter_context(self._engine)
            self.seconds = time.perf_counter() - start
        return self._llm


def _source(s: Settings) -> Callable[[], AbstractContextManager[hidden.Source]]:
    if s.hidden_states == "stored":
        return lambda: hidden.hugging_face_states(str(s.target))
    from vllm_griffin.data.extract import vllm_states

    assert s.max_length is not None
    return functools.partial(vllm_states, str(s.target), s.max_length, s.seed, s.tensor_parallel)
