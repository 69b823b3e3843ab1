"""The training loop: stages of one and of several passes, validation, checkpoints that resume exactly."""

import hashlib
import itertools
import json
import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from vllm_griffin import provenance
from vllm_griffin.data.batch import Batch, epoch, pack, split, token_counts
from vllm_griffin.data.shards import States
from vllm_griffin.report import quality
from vllm_griffin.train.checkpoint import condition, mark_blocks, save_draft
from vllm_griffin.train.losses import LossVocabulary
from vllm_griffin.train.network import Draft, NetworkConfig
from vllm_griffin.train.optim import make_optimisers, schedule
from vllm_griffin.train.settings import Settings
from vllm_griffin.train.setup import TargetParts
from vllm_griffin.train.step import VALIDATION_TOKENS, DraftLoss, held_out_counts
from vllm_griffin.whole_file import whole_file, write_json

SHOWN = ("step", "val_agree0", "val_token0", "val_feature0", "val_agree1", "chain", "top3")


class TrainingError(RuntimeError):
    """Training cannot go on; the last good checkpoint is kept."""


class Trainer:
    """Trains one draft on one target's hidden states.

    Output folder: the best draft so far (``config.json``, ``model.safetensors``, ``vocabulary.json`` if the
    losses look at part of it), ``run.json``, ``log.jsonl`` and ``checkpoint.pt``.
    """

    def __init__(
        self,
        draft: Draft,
        states: States,
        target: TargetParts,
        settings: Settings,
        folder: str | Path,
        *,
        fresh: bool = True,
        report_to: str | None = None,
        record: dict[str, Any] | None = None,
    ) -> None:
        """Set up a run, and continue it if `folder` holds its checkpoint.

        Args:
            draft: The network; its `embed_tokens` stay as they are.
            states: Training and validation documents.
            target: The target's configuration and LM head.
            settings: The run's settings; a continued run may only be given more steps.
            folder: Output folder: a new one, or one of a run with these settings, data and processes.
            fresh: Initialise the network here; False for weights that were loaded.
            report_to: A tracker that accelerate knows, such as "tensorboard".
            record: What `run.json` says besides settings and provenance.

        Raises:
            TrainingError: No document to train on or to validate with, or the folder holds another run or
                a draft that no run has made.
        """
        self.settings, self.folder, self.target = settings, Path(folder), target
        self.states = states
        # A group that was here before, such as that of a vLLM engine in this process, is not ours to end.
        self._own_group = not torch.distributed.is_initialized()
        self.accelerator = Accelerator(
            mixed_precision="bf16" if settings.bf16 else "no",
            log_with=report_to,
            project_dir=str(folder),
        )
        if report_to:
            self.accelerator.init_trackers("vllm-griffin", config={"seed": settings.seed})
        self.training, self.validation = (split(states.documents, part) for part in (False, True))
        if not self.training or not self.validation:
            raise TrainingError(
                f"{len(self.training)} documents to train on and {len(self.validation)} held out are too "
                "few: one prompt in 20 is held out; give `data` at least 20 prompts"
            )
        torch.manual_seed(settings.seed)
        some = pack(states, self.training[:64], True)
        condition(draft, some.features, some.tokens, initialise=fresh)
        counts = token_counts(states.documents, self.training, len(target.head))
        device = self.accelerator.device
        vocabulary = LossVocabulary(
            target.head.to(device), counts.to(device), settings.vocabulary or None
        )
        embedding = draft.embed_tokens.weight.detach().cpu()
        # Of a loaded draft that was trained elsewhere; it is written beside the weights
        self._own_embedding = not torch.equal(embedding, target.embeddings)
        draft.to(device)
        mark_blocks(draft)
        self.draft, self.vocabulary = draft, vocabulary
        self.loss = self.accelerator.prepare(DraftLoss(draft, vocabulary, settings))
        self.optimisers: list[torch.optim.Optimizer] = []
        self.step, self.best, self.seconds = 0, float("-inf"), 0.0
        self.folder.mkdir(parents=True, exist_ok=True)
        self._record = (record or {}) | {
            "documents": len(self.training),
            "held_out": len(self.validation),
        }
        # What must be as it was, besides the settings, for a run to go on as if it had not stopped.
        self._made_from = {
            "target": _digest(target.head),
            "init-from": not fresh,
            "embedding": _digest(embedding) if self._own_embedding else None,
            "data": [len(states.documents), sum(len(d.tokens) for d in states.documents)],
            "network": asdict(draft.config),
            "number of processes": self.accelerator.num_processes,
        }
        self._resume()

    def _resume(self) -> None:
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            self._check_unclaimed()
            self._forget_rows()
            return
        try:
            saved = torch.load(path, weights_only=True, map_location=self.accelerator.device)
        # For a damaged file: RuntimeError, UnpicklingError, EOFError, KeyError and more.
        except Exception as error:
            raise TrainingError(
                f"{path} is damaged, so the run cannot go on: give another folder, or remove this one"
            ) from error
        wrong = self.settings.differences(saved["settings"])
        before = saved["made_from"]
        # A run begun before the network had all of these fields had their defaults.
        before["network"] = asdict(NetworkConfig(**before["network"]))
        wrong += [name for name, value in self._made_from.items() if before.get(name) != value]
        done = _steps_until(saved["settings"]["stages"], saved["step"])
        if wrong or done != _steps_until(self.settings.stages, saved["step"]):
            begun = ",".join(f"{passes}:{steps}" for passes, steps in saved["settings"]["stages"])
            stages = f"stages; begun with --stages {begun}, of which the last can be made longer"
            raise TrainingError(
                f"{self.folder} holds a run with other settings ({', '.join(wrong or [stages])}): "
                "give those, or another folder"
            )
        self.draft.load_state_dict(saved["draft"], strict=False)  # all but the frozen embedding
        self.step, self.best, self.seconds = (saved[k] for k in ("step", "best", "seconds"))
        self._forget_rows()
        within = self.step < self.settings.total_steps
        if within and self.step > self.settings.stage_at(self.step)[1]:
            self._new_optimisers()
            for optimiser, state in zip(self.optimisers, saved["optimisers"], strict=True):
                optimiser.load_state_dict(state)

    def _check_unclaimed(self) -> None:
        """Refuse to write over a draft, unless this run itself was stopped before its first checkpoint."""
        if not (self.folder / "model.safetensors").exists():
            return
        try:
            record = json.loads((self.folder / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            record = {}
        settings = json.loads(json.dumps(asdict(self.settings)))
        if record.get("settings") != settings:
            raise TrainingError(
                f"{self.folder} holds a draft, and no checkpoint of a run to go on with: give another folder"
            )

    def _forget_rows(self) -> None:
        """Drop what was logged after the checkpoint: those steps are done again."""
        path = self.folder / "log.jsonl"
        if path.exists() and self.accelerator.is_main_process:
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _logged_step(line) <= self.step]
            with whole_file(path) as scratch:
                scratch.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def _new_optimisers(self) -> None:
        s = self.settings
        made = make_optimisers(self.draft, s.optimiser, s.lr, s.muon_lr)
        self.optimisers = [self.accelerator.prepare(o) for o in made]

    def save(self) -> None:
        """Write the checkpoint as a whole or not at all.

        Raises:
            TrainingError: The weights are not finite, or the disk is full.
        """
        if not self.accelerator.is_main_process:
            return
        if not all(bool(p.isfinite().all()) for p in self.draft.parameters()):
            raise self._diverged("the weights are not finite")
        state = {k: v for k, v in self.draft.state_dict().items() if not k.startswith("embed")}
        saved = {
            "draft": state,
            "optimisers": [o.state_dict() for o in self.optimisers],
            "step": self.step,
            "best": self.best,
            "seconds": self.seconds,
            "settings": asdict(self.settings),
            "made_from": self._made_from,
        }
        path = self.folder / "checkpoint.pt"
        try:
            with whole_file(path) as scratch:
                torch.save(saved, scratch)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            raise self._not_written(path, error) from error

    def _not_written(self, path: Path, error: Exception) -> TrainingError:
        return TrainingError(f"cannot write {path} ({error}); the last good checkpoint is kept")

    def _diverged(self, what: str) -> TrainingError:
        return TrainingError(
            f"{what} at step {self.step}; {self.folder} keeps the last good checkpoint and draft: try a "
            "lower learning rate"
        )

    def run(self, dtype: torch.dtype = torch.bfloat16) -> None:
        """Train up to the last step; the best draft by held-out documents is written in `dtype`.

        Raises:
            TrainingError: The loss is not finite, or the disk is full.
        """
        s = self.settings
        main = self.accelerator.is_main_process
        if main:
            record = {**provenance.describe(s.seed), "settings": asdict(s), **self._record}
            write_json(self.folder / "run.json", record)
        bar = tqdm(
            total=s.total_steps, initial=self.step, unit="step", mininterval=5, disable=not main
        )
        for documents in self._documents():
            if self.step >= s.total_steps:
                break
            stage, first = s.stage_at(self.step)
            if self.step == first or not self.optimisers:
                self._new_optimisers()
            passes, steps = s.stages[stage]
            began = time.perf_counter()
            terms = self._train_step(pack(self.states, documents, s.prompt_loss), stage)
            self.seconds += time.perf_counter() - began
            self.step += 1
            bar.update()
            bar.set_postfix({"loss": f"{terms['loss']:.3f}"}, refresh=False)
            last = self.step == first + steps
            if self.step % s.validate_every == 0 or last:
                self._log(self._row(passes) | terms | self.validate(), dtype)
            if self.step % s.save_every == 0 or last:
                self.save()
        bar.close()
        if self._own_group:
            self.accelerator.end_training()
        else:
            for tracker in self.accelerator.trackers:
                tracker.finish()

    def timed_steps(self, stage: int, count: int) -> list[tuple[float, int]]:
        """Seconds and slots of each of `count` steps of a stage; they change the draft."""
        if not self.optimisers:
            self._new_optimisers()
        groups = self._documents()
        found = []
        for _ in range(count):
            batch = pack(self.states, next(groups), self.settings.prompt_loss)
            began = time.perf_counter()
            self._train_step(batch, stage)
            found.append((time.perf_counter() - began, len(batch.tokens)))
        return found

    def _row(self, passes: int) -> dict[str, float]:
        return {"step": self.step, "passes": passes, "seconds": self.seconds}

    def _documents(self) -> Iterator[list[int]]:
        """This process's documents from the current step on; their order depends on seed and epoch alone."""
        s, world = self.settings, self.accelerator.num_processes
        groups = (
            group
            for number in itertools.count()
            for group in epoch(
                self.states.documents,
                self.training,
                max(1, s.batch_tokens // world),
                s.seed * 10_000 + number,
            )
        )
        return itertools.islice(
            groups, self.step * world + self.accelerator.process_index, None, world
        )

    def _train_step(self, batch: Batch, stage: int) -> dict[str, float]:
        s = self.settings
        passes, steps = s.stages[stage]
        first = sum(n for _, n in s.stages[:stage])
        factor = schedule(self.step - first, steps, s.warmup, s.decay)
        factor *= s.later_lr if stage else 1.0
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = factor * (s.muon_lr if "momentum" in group else s.lr)
            optimiser.zero_grad(set_to_none=True)
        batch = batch.to(self.accelerator.device)
        with self.accelerator.autocast():
            total, shown = self.loss(batch, self._noisy(batch), passes)
        terms = {name: value.item() for name, value in shown.items()}
        if not torch.isfinite(total):
            raise self._diverged(f"the loss is {total.item()}")
        self.accelerator.backward(total)
        trained = [p for p in self.draft.parameters() if p.requires_grad]
        if s.clip:
            self.accelerator.clip_grad_norm_(trained, s.clip)
        if s.clip_value:
            self.accelerator.clip_grad_value_(trained, s.clip_value)
        for optimiser in self.optimisers:
            optimiser.step()
        return {"loss": total.item(), "lr": factor * s.lr} | terms

    def _noisy(self, batch: Batch) -> Tensor:
        """Input features with uniform noise of width `noise` * 512 / document length."""
        place = self.step * self.accelerator.num_processes + self.accelerator.process_index
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + place)
        noise = torch.rand(batch.features.shape, generator=generator) - 0.5
        slots = torch.tensor(batch.starts).diff()
        scale = self.settings.noise * 512 / (slots + 1).repeat_interleave(slots)
        return batch.features + (noise * scale[:, None]).to(batch.features.device)

    def validate(self) -> dict[str, float]:
        """Held-out figures, averaged: losses and agreement per pass, and acceptance lengths.

        `chain` is 1 + the mean number of first passes whose best token is the document's (what a chain of 6
        accepts of it), `top3` the same for "among the best three". Fed with the document's tokens.
        """
        sums: Counter[str] = Counter()
        documents = self.validation[: self.settings.validate_documents]
        for group in _groups(self.states, documents):
            batch = pack(self.states, group).to(self.accelerator.device)
            sums.update(held_out_counts(self.draft, self.vocabulary, batch))
        roots, slots = max(1, sums.pop("roots")), max(1, sums.pop("slots"))
        acceptance = {name: 1 + sums.pop(name) / roots for name in ("chain", "top3")}
        return acceptance | {name: value / slots for name, value in sums.items()}

    def _log(self, row: dict[str, float], dtype: torch.dtype) -> None:
        if not self.accelerator.is_main_process:
            return
        if not all(math.isfinite(value) for value in row.values()):
            raise self._diverged("figures of held-out documents are not finite")
        row = {k: float(f"{v:.6g}") for k, v in row.items()}
        with open(self.folder / "log.jsonl", "a", encoding="utf-8") as log:
            log.write(json.dumps(row) + "\n")
        self.accelerator.log(row, step=self.step)
        tqdm.write("  ".join(f"{k} {row[k]:.4g}" for k in SHOWN))
        if quality(row) > self.best:
            self.best = quality(row)
            kept = self.vocabulary.ranking.tolist() if self.settings.vocabulary else None
            try:
                save_draft(
                    self.draft, self.folder, self.target.config, dtype, kept, self._own_embedding
                )
            except (OSError, SafetensorError) as error:
                raise self._not_written(self.folder, error) from error


def _digest(rows: Tensor) -> str:
    """Of the first 64 rows."""
    return hashlib.sha256(rows[:64].numpy().tobytes()).hexdigest()


def _groups(states: States, documents: list[int]) -> Iterator[list[int]]:
    """Consecutive documents, about `VALIDATION_TOKENS` slots at a time."""
    group: list[int] = []
    size = 0
    for number in documents:
        group.append(number)
        size += len(states.documents[number].tokens)
        if size >= VALIDATION_TOKENS:
            yield group
            group, size = [], 0
    if group:
        yield group


def _logged_step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except ValueError:  # half a line, from a killed process
        return float("inf")


def _steps_until(stages: list, step: int) -> list[int]:
    """The number of passes of each step before `step`."""
    return [passes for passes, steps in stages for _ in range(steps)][:step]
