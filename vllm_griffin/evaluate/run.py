"""A whole evaluation: drafts, prompt sets, temperatures and trees, in the engine or by replay."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from vllm_griffin.data.chat import load_tokenizer
from vllm_griffin.evaluate import metrics
from vllm_griffin.evaluate.engine import EngineSettings, evaluate_in_engine, generate
from vllm_griffin.evaluate.kept import KeptSteps
from vllm_griffin.evaluate.outputs import TAIL, Output, append_outputs, read_outputs
from vllm_griffin.evaluate.prompts import Prompt, load_prompts
from vllm_griffin.evaluate.replay import replay_outputs
from vllm_griffin.evaluate.states import OutputStates
from vllm_griffin.evaluate.steps import PromptSteps, compare
from vllm_griffin.model.checkpoint import DraftCheckpoint, find_folder
from vllm_griffin.model.config import read_json, read_sizes
from vllm_griffin.model.files import fingerprint
from vllm_griffin.train.checkpoint import load_draft
from vllm_griffin.train.network import Draft
from vllm_griffin.train.setup import TargetParts, load_target_parts
from vllm_griffin.tree_shape import TreeShape

Key = tuple[str, int, float]
# Of the environment, what chooses the code of a step
VARIABLES = ("VLLM_GRIFFIN_CPU", "VLLM_GRIFFIN_KERNELS", "VLLM_GRIFFIN_TREE_ATTENTION")


@dataclass(frozen=True)
class Request:
    """What to evaluate; see `vllm-griffin eval --help`."""

    target: str
    drafts: tuple[str, ...]
    prompts: tuple[Path, ...]
    temperatures: tuple[float, ...]
    trees: tuple[TreeShape, ...]
    limit: int | None
    max_tokens: int
    dtype: str
    batch: int
    draft_vocab_size: int | None = None
    chat_template: Path | None = None


class Evaluation:
    """One evaluation; the target's files and the prompts are read once."""

    def __init__(self, request: Request) -> None:
        """Read prompts and check that every draft fits.

        Raises:
            ValueError: A malformed prompt file, a prompt over the context, a draft that does not fit.
        """
        self.request = request
        tokenizer = load_tokenizer(request.target, request.chat_template)
        if not getattr(tokenizer, "chat_template", None):
            click.echo(
                "note: the target has no chat template, so prompts are given as they are (--chat-template "
                "FILE gives one)",
                err=True,
            )
        for name, value in _served_penalties(self.target_folder).items():
            click.echo(
                f"note: the target's generation_config.json sets {name}={value}, which a server gives to "
                "requests that do not say otherwise, and which holds their trees to a chain; here it is off, "
                "and so it is with vllm serve --generation-config vllm",
                err=True,
            )
        self.prompts = load_prompts(list(request.prompts), tokenizer, request.limit)
        hidden, vocabulary, context = read_sizes(
            self.target_folder, "hidden_size", "vocab_size", "max_position_embeddings"
        )
        # Of each draft, the tokens that it drafts from; None: all.
        self.vocabularies: dict[str, list[int] | None] = {}
        for draft in request.drafts:
            checkpoint = DraftCheckpoint.open(draft)
            checkpoint.check_target(hidden, vocabulary)
            checkpoint.validate()
            self.vocabularies[draft] = checkpoint.vocabulary(request.draft_vocab_size)
        for prompt in self.prompts:
            if len(prompt.tokens) + 1 >= context:
                raise ValueError(
                    f"prompt {prompt.id} of {prompt.set} has {len(prompt.tokens)} tokens; the target's "
                    f"context is {context}"
                )
        self.settings = EngineSettings(
            request.target,
            context,
            request.max_tokens,
            request.dtype,
            request.batch,
            request.draft_vocab_size,
        )

    @cached_property
    def target_folder(self) -> Path:
        """Where the target's config and weights are."""
        return find_folder(self.request.target)

    @cached_property
    def parts(self) -> TargetParts:
        """The target's config, embedding and head, for a replay; the engine has its own."""
        return load_target_parts(self.target_folder)

    def wanted(self, per_set: int | None = None) -> list[tuple[Prompt, float]]:
        """All prompts, or the first of each set, at all temperatures."""
        seen: dict[str, int] = {}
        chosen = []
        for prompt in self.prompts:
            seen[prompt.set] = seen.get(prompt.set, 0) + 1
            if per_set is None or seen[prompt.set] <= per_set:
                chosen.append(prompt)
        return [(prompt, t) for t in self.request.temperatures for prompt in chosen]

    def in_engine(
        self, file: Path | None = None, made: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """Rows of results, each draft and tree in an engine of its own.

        Args:
            file: Where steps are kept as they are found; those of the same evaluation are not made again.
            made: This process's `provenance`: an evaluation by other code or on another machine is another.
        """
        found: dict[tuple[str, TreeShape], list[PromptSteps]] = {}
        wanted = self.wanted()
        for draft, tree in self._pairs():
            kept = KeptSteps(file, self._run(draft, tree, made or {})) if file else None
            steps = kept.read(wanted) if kept else {}
            missing = [(p, t) for p, t in wanted if (p.set, p.id, t) not in steps]
            store = kept.append if kept else lambda *_: None
            if missing:
                text = f"engine {Path(draft).name} {tree}"
                with _bar(text, len(wanted), len(steps)) as done:
                    run = evaluate_in_engine(self.settings, draft, tree, missing, done, store)
                steps |= {prompt.key: prompt for prompt in run.prompts}
            found[draft, tree] = [steps[p.set, p.id, t] for p, t in wanted]
        return self._rows(found)

    def _run(self, draft: str, tree: TreeShape, made: dict[str, Any]) -> dict[str, Any]:
        """What decides a prompt's verify steps in the engine, as JSON has it."""
        return {
            "target": fingerprint(self.target_folder),
            # Two drafts under comparison may differ in a few weights only.
            "draft": fingerprint(find_folder(draft), whole=True),
            "vocabulary": self.vocabularies[draft],
            "tree": str(tree),
            "settings": asdict(self.settings),
            "environment": {name: os.environ.get(name) for name in VARIABLES},
            "made": {name: made.get(name) for name in ("commit", "versions", "hardware")},
        }

    def by_replay(
        self, file: Path, check: int = 0
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Rows of results from the stored outputs of `file`, and rows of the comparison with the engine.

        Args:
            file: Outputs; those that are missing are made first.
            check: So many prompts of each set are run in the engine too.
        """
        check_depth(self.request.trees)
        # A target that cannot be replayed is refused before it is asked for outputs.
        parts = self.parts
        states = OutputStates(
            self._stored(file), file.with_name(f"{file.stem}.states"), self.target_folder
        )
        if states.missing():
            with _bar("hidden states", len(states.missing())) as done:
                states.fill(done)
        context = self.settings.context
        found: dict[tuple[str, TreeShape], list[PromptSteps]] = {}
        for draft, tree in self._pairs():
            network = self._network(draft)
            with _bar(f"replay {Path(draft).name} {tree}", len(states.outputs)) as done:
                found[draft, tree] = replay_outputs(
                    network,
                    parts,
                    states,
                    tree,
                    context=context,
                    vocabulary=self.vocabularies[draft],
                    done=done,
                )
        checks = [
            self._check(draft, tree, states, found[draft, tree], check)
            for draft, tree in self._pairs()
            if check
        ]
        return self._rows(found), checks

    def _network(self, draft: str) -> Draft:
        return load_draft(find_folder(draft), self.parts.embeddings)

    def _pairs(self) -> list[tuple[str, TreeShape]]:
        return [(draft, tree) for draft in self.request.drafts for tree in self.request.trees]

    def _stored(self, file: Path) -> list[Output]:
        """The outputs of `file` for all prompts; what is missing is made and appended."""
        target = fingerprint(self.target_folder)[:16]
        wanted = self.wanted()
        outputs = _match(file, wanted, self.request.max_tokens, target)
        missing = [(p, t) for p, t in wanted if (p.set, p.id, t) not in outputs]
        if missing:
            with _bar("target's outputs", len(missing)) as done:

                def store(part: list[Output]) -> None:
                    append_outputs(file, [replace(output, target=target) for output in part])

                generate(self.settings, missing, store, done)
            outputs = _match(file, wanted, self.request.max_tokens, target)
        return [outputs[p.set, p.id, t] for p, t in wanted]

    def _check(
        self,
        draft: str,
        tree: TreeShape,
        states: OutputStates,
        replayed: Sequence[PromptSteps],
        count: int,
    ) -> dict[str, Any]:
        """Run the first prompts of each set in the engine; compare answers, steps and trees."""
        wanted = self.wanted(count)
        chosen = {(p.set, p.id, t) for p, t in wanted}
        stored = {output.key: output for output in states.outputs}
        with _bar(f"check {Path(draft).name} {tree}", len(wanted)) as done:
            run = evaluate_in_engine(self.settings, draft, tree, wanted, done)
        part = OutputStates([stored[o.key] for o in run.outputs], states.folder, states.target)
        whole = replay_outputs(
            self._network(draft),
            self.parts,
            part,
            tree,
            context=self.settings.context,
            vocabulary=self.vocabularies[draft],
            whole=True,
        )
        # The steps that count are those of the result, which grows no whole trees.
        steps = {prompt.key: prompt.steps for prompt in replayed if prompt.key in chosen}
        for prompt in whole:
            prompt.steps = steps[prompt.key]
        other = [
            o.key for o in run.outputs if o.response_token_ids != stored[o.key].response_token_ids
        ]
        return {
            "draft": draft,
            "tree": str(tree),
            **asdict(compare(run.prompts, whole)),
            "differing_answers": len(other),
        }

    def _rows(self, found: dict[tuple[str, TreeShape], list[PromptSteps]]) -> list[dict[str, Any]]:
        rows = []
        first = self.request.drafts[0]
        for name in dict.fromkeys(prompt.set for prompt in self.prompts):
            for temperature in self.request.temperatures:
                for tree in self.request.trees:
                    for draft in self.request.drafts:
                        records = _select(found[draft, tree], name, temperature)
                        row = {
                            "draft": draft,
                            "prompts_of": name,
                            "temperature": temperature,
                            "tree": str(tree),
                            **metrics.summarise(records, tree.levels),
                        }
                        if draft != first:
                            base = _select(found[first, tree], name, temperature)
                            row["against_first"] = metrics.compare_lengths(base, records)
                        rows.append(row)
        return rows


def _select(records: Sequence[PromptSteps], name: str, temperature: float) -> list[PromptSteps]:
    return [p for p in records if p.set == name and p.temperature == temperature]


def _match(
    file: Path, wanted: Sequence[tuple[Prompt, float]], max_tokens: int, target: str
) -> dict[Key, Output]:
    """Stored outputs by set, id and temperature.

    Raises:
        ValueError: An output is of another target, prompt or length.
    """
    stored = {output.key: output for output in read_outputs(file)}
    found: dict[Key, Output] = {}
    for prompt, temperature in wanted:
        key = (prompt.set, prompt.id, temperature)
        # Files of others may not name the set.
        output = stored.get(key) or stored.get(("", prompt.id, temperature))
        if output is None:
            continue
        name = f"{file}: the output of prompt {prompt.id} of {prompt.set} at T={temperature:g}"
        if output.prompt_token_ids != prompt.tokens:
            raise ValueError(f"{name} belongs to another prompt; give another file")
        if output.max_tokens not in (None, max_tokens):
            raise ValueError(
                f"{name} was made with --max-tokens {output.max_tokens}: take that, or another file"
            )
        if output.target not in (None, target):
            raise ValueError(f"{name} was made with another target; give another file")
        found[key] = replace(output, set=prompt.set)
    return found


@contextmanager
def _bar(text: str, total: int, initial: int = 0) -> Iterator[Callable[..., None]]:
    """A progress bar; yields what to call after each item."""
    with tqdm(total=total, initial=initial, desc=text, unit="prompt") as bar:
        yield lambda *_: bar.update() and None


def check_depth(trees: Sequence[TreeShape]) -> None:
    """Refuse trees that reach past the stored tails.

    Raises:
        ValueError: A tree has more levels than a tail has tokens.
    """
    for tree in trees:
        if tree.levels > TAIL:
            raise ValueError(
                f"tree {tree}: a replay knows {TAIL} levels at most; leave --replay out"
            )


def _served_penalties(target: Path) -> dict[str, float]:
    """Penalties of a target's `generation_config.json`, by name."""
    file = target / "generation_config.json"
    config = read_json(file) if file.is_file() else {}
    off = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    return {name: config[name] for name, none in off.items() if config.get(name, none) != none}
