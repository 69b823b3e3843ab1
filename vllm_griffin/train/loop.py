"""The training loop: stages of one and of several passes, validation, checkpoints that resume exactly."""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from vllm_griffin.train.align import first_mask, next_mask
from vllm_griffin.train.checkpoint import condition, mark_blocks, save_draft
from vllm_griffin.train.data import Batch, HiddenStates
from vllm_griffin.train.losses import LossVocabulary, feature_loss, head_terms
from vllm_griffin.train.network import Draft
from vllm_griffin.train.optim import make_optimisers, schedule
from vllm_griffin.train.passes import multi_pass
from vllm_griffin.train.settings import Settings

VALIDATION_PASSES = 6  # the depth of the paper's tree


class TrainingError(RuntimeError):
    """Training cannot go on; the last good checkpoint is kept."""


class Trainer:
    """Trains one draft on stored hidden states."""

    def __init__(
        self,
        draft: Draft,
        data: HiddenStates,
        head: Tensor,
        settings: Settings,
        folder: str | Path,
        target_config: dict,
        *,
        fresh: bool = True,
    ) -> None:
        """Set up a run, and continue it if `folder` holds its checkpoint.

        Args:
            draft: The network; its `embed_tokens` must be the target's.
            data: Training and validation documents.
            head: [V, h] weight of the target's LM head.
            settings: The run's settings; a continued run may be given other stages.
            folder: Output folder: the draft, `checkpoint.pt`, `log.jsonl`.
            target_config: The target's `config.json`.
            fresh: Initialise the network here; False for weights that were loaded.
        """
        torch.manual_seed(settings.seed)
        self.draft, self.data, self.settings = draft, data, settings
        self.folder, self.target_config = Path(folder), target_config
        self.folder.mkdir(parents=True, exist_ok=True)
        self.training, self.validation = data.split(False), data.split(True)
        if fresh:
            some = data.batch(self.training[:64], True)
            condition(draft, some.features, some.tokens)
        mark_blocks(draft)
        counts = data.token_counts(len(head))
        self.vocabulary = LossVocabulary(head, counts, settings.vocabulary or None)
        self.optimisers = make_optimisers(draft, settings.optimiser, settings.lr, settings.muon_lr)
        self.step = 0
        self._resume()

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def _resume(self) -> None:
        if not self._checkpoint.exists():
            return
        saved = torch.load(self._checkpoint, weights_only=True)
        self.draft.load_state_dict(saved["draft"], strict=False)  # all but the frozen embedding
        for optimiser, state in zip(self.optimisers, saved["optimisers"], strict=True):
            optimiser.load_state_dict(state)
        self.step = saved["step"]

    def save(self) -> None:
        """Write the checkpoint as a whole or not at all."""
        state = {k: v for k, v in self.draft.state_dict().items() if not k.startswith("embed")}
        saved = {
            "draft": state,
            "optimisers": [o.state_dict() for o in self.optimisers],
            "step": self.step,
        }
        scratch = self._checkpoint.with_suffix(".partial")
        torch.save(saved, scratch)
        os.replace(scratch, self._checkpoint)

    def run(self, dtype: torch.dtype = torch.bfloat16) -> None:
        """Train up to the last step, then write the draft folder in `dtype`."""
        s = self.settings
        (self.folder / "settings.json").write_text(json.dumps(asdict(s), indent=2) + "\n")
        bar = tqdm(total=s.total_steps, initial=self.step, unit="step", mininterval=5)
        for documents in self._documents():
            if self.step >= s.total_steps:
                break
            passes = s.passes_at(self.step)
            terms = self._train_step(self.data.batch(documents, s.prompt_loss), passes)
            self.step += 1
            bar.update()
            bar.set_postfix({k: f"{v:.3f}" for k, v in terms.items()}, refresh=False)
            if self.step % s.validate_every == 0 or self.step == s.total_steps:
                self._log({"step": self.step, "passes": passes} | terms | self.validate())
            if self.step % s.save_every == 0 or self.step == s.total_steps:
                self.save()
        bar.close()
        save_draft(self.draft, self.folder, self.target_config, dtype)

    def _documents(self) -> Iterator[list[int]]:
        """Batches from the current step on; the order depends on the seed and the epoch alone."""
        step, epoch = 0, 0
        while True:
            order_seed = self.settings.seed * 10_000 + epoch
            for batch in self.data.batches(self.training, self.settings.batch_tokens, order_seed):
                if step >= self.step:
                    yield batch
                step += 1
            epoch += 1

    def _train_step(self, batch: Batch, passes: int) -> dict[str, float]:
        s = self.settings
        factor = schedule(self.step, s.total_steps, s.warmup, s.decay)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = factor * (s.muon_lr if "momentum" in group else s.lr)
            optimiser.zero_grad(set_to_none=True)
        features = self._noisy(batch)
        total, terms = self._losses(batch, features, passes, s.top_weight if passes > 1 else 0.0)
        if not torch.isfinite(total):
            raise TrainingError(f"the loss is {total.item()} at step {self.step}")
        total.backward()
        trained = [p for p in self.draft.parameters() if p.requires_grad]
        torch.nn.utils.clip_grad_norm_(trained, s.clip)
        for optimiser in self.optimisers:
            optimiser.step()
        return terms

    def _noisy(self, batch: Batch) -> Tensor:
        """Input features with uniform noise of width `noise` * 512 / document length."""
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + self.step)
        noise = torch.rand(batch.features.shape, generator=generator) - 0.5
        starts = torch.tensor(batch.starts)
        lengths = starts.diff().repeat_interleave(starts.diff())
        return batch.features + noise * (self.settings.noise * 512 / lengths)[:, None]

    def _losses(
        self, batch: Batch, features: Tensor, passes: int, top_weight: float
    ) -> tuple[Tensor, dict[str, float]]:
        """Sum of the losses of all passes, and what to show of them."""
        s = self.settings
        labels = self.vocabulary.rows(batch.labels)
        mask = first_mask(batch.positions, batch.prompt_len)
        total = torch.zeros(())
        terms: dict[str, float] = {}
        outputs = multi_pass(
            self.draft, features, batch.tokens, batch.positions, batch.starts, passes
        )
        for n, (predict, regress) in enumerate(outputs):
            rows = mask.nonzero()[:, 0]
            count = len(rows) + 1e-5
            wanted = batch.wanted[rows]
            head = head_terms(
                predict[rows],
                wanted,
                self.vocabulary.head,
                labels[rows],
                s.token_weight,
                top_weight,
            )
            token = head.token_loss.sum() / count
            feature = feature_loss(regress[rows], wanted).sum() / count
            total = total + token + s.feature_weight * feature
            hits = torch.zeros_like(mask)
            hits[rows] = head.rank < (s.align_top_k or 1)
            terms |= {f"token{n}": token.item(), f"feature{n}": feature.item()}
            terms[f"agree{n}"] = head.agree.sum().item() / count
            mask = next_mask(mask, hits if s.align_top_k else None, batch.positions)
        return total, terms

    @torch.inference_mode()
    def validate(self) -> dict[str, float]:
        """Held-out figures: cross-entropy, agreement per pass, and estimated acceptance lengths.

        `chain` is 1 + the expected number of first passes whose best token is the document's (which is what
        a chain accepts of it), `top3` the same for "among the best three".
        """
        batch = self.data.batch(self.validation[: self.settings.validate_documents], False)
        labels = self.vocabulary.rows(batch.labels)
        mask = first_mask(batch.positions, batch.prompt_len)
        # Roots whose six drafted tokens all exist, so that every pass counts the same roots.
        room = torch.tensor(batch.starts).diff()
        room = room.repeat_interleave(room) - batch.positions > VALIDATION_PASSES
        chain, top3 = mask & room, mask & room
        roots = max(1, int(chain.sum()))
        result = {"chain": 1.0, "top3": 1.0}
        outputs = multi_pass(
            self.draft, batch.features, batch.tokens, batch.positions, batch.starts, 6
        )
        for n, (predict, regress) in enumerate(outputs):
            head = head_terms(predict, batch.wanted, self.vocabulary.head, labels)
            chain, top3 = chain & (head.rank == 0), top3 & (head.rank < 3)
            result["chain"] += int(chain.sum()) / roots
            result["top3"] += int(top3.sum()) / roots
            chain, top3 = torch.roll(chain, 1), torch.roll(top3, 1)
            if n < 3:
                result[f"val_agree{n}"] = head.agree[mask].float().mean().item()
                result[f"val_token{n}"] = head.token_loss[mask].mean().item()
                result[f"val_feature{n}"] = (
                    feature_loss(regress[mask], batch.wanted[mask]).mean().item()
                )
        return result

    def _log(self, row: dict[str, float]) -> None:
        with open(self.folder / "log.jsonl", "a", encoding="utf-8") as log:
            log.write(json.dumps({k: round(v, 4) for k, v in row.items()}) + "\n")
        shown = ("step", "val_agree0", "val_token0", "val_feature0", "val_agree1", "chain", "top3")
        tqdm.write("  ".join(f"{k} {row[k]:.4g}" for k in shown))
