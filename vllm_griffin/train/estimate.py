"""What a training run will take, measured on a few steps of it: ``vllm-griffin train --dry-run``."""

import resource
import tempfile
import time
from dataclasses import dataclass

import torch

from vllm_griffin.data.batch import pack
from vllm_griffin.data.shards import States
from vllm_griffin.train.loop import Trainer
from vllm_griffin.train.network import Draft
from vllm_griffin.train.settings import Settings
from vllm_griffin.train.setup import TargetParts


@dataclass
class Estimate:
    """Of a run: `documents` and `slots` of an epoch, `held_out` documents, `epochs`, `parameters` that are
    trained, `seconds` of all steps without validation, seconds of a step by pass count, bytes of the
    checkpoint on disk (twice while it is written), peak bytes of memory so far.
    """

    documents: int
    held_out: int
    slots: int
    epochs: float
    parameters: int
    seconds: float
    step_seconds: dict[int, float]
    disk: int
    memory: int

    def rows(self) -> list[tuple[str, str]]:
        """The same for people."""
        steps = ", ".join(f"{s:.2f} s with {p} passes" for p, s in self.step_seconds.items())
        return [
            ("documents", f"{self.documents} to train on, {self.held_out} held out"),
            ("rows (slots) an epoch", f"{self.slots}, {self.epochs:.1f} epochs"),
            ("parameters trained", f"{self.parameters / 1e6:.1f}M"),
            ("disk", f"{self.disk / 2**20:.0f} MiB"),
            ("memory", f"{self.memory / 2**20:.0f} MiB at most so far"),
            ("a step", steps),
            ("time", f"{self.seconds / 60:.0f} min without validation"),
        ]


def estimate(
    draft: Draft, states: States, target: TargetParts, settings: Settings, *, fresh: bool
) -> Estimate:
    """Run two steps of each pass count in a scratch folder, and time the second."""
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(draft, states, target, settings, scratch, fresh=fresh)
        trainer._new_optimisers()
        times = {}
        for stage, (passes, _) in enumerate(settings.stages):
            groups = trainer._documents()
            for _ in range(2):
                batch = pack(states, next(groups), settings.prompt_loss)
                began = time.perf_counter()
                trainer._train_step(batch, stage)
                times[passes] = time.perf_counter() - began
        trainer.save()
        disk = (trainer.folder / "checkpoint.pt").stat().st_size
    slots = sum(len(states.documents[i].tokens) - 1 for i in trainer.training)
    return Estimate(
        documents=len(trainer.training),
        held_out=len(trainer.validation),
        slots=slots,
        epochs=settings.total_steps * settings.batch_tokens / slots,
        parameters=sum(p.numel() for p in draft.parameters() if p.requires_grad),
        seconds=sum(times[passes] * steps for passes, steps in settings.stages),
        step_seconds=times,
        disk=2 * disk,
        memory=_peak_memory(),
    )


def _peak_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
