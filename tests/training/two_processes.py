"""What each process of `test_loop.test_processes_share_a_run` does: arguments are target, data and output."""

import json
import sys
from pathlib import Path

import torch

from tests.training.test_loop import trainer


def main(target: Path, data: Path, folder: Path) -> None:
    """Train a few steps; write this process's weights and the documents it saw."""
    run = trainer(target, data, folder, stages=[(1, 2), (2, 2)], batch_tokens=100)
    seen: list[list[int]] = []
    documents = run._documents

    def watched():
        for group in documents():
            seen.append(group)
            yield group

    run._documents = watched  # type: ignore[method-assign]
    run.run(torch.float32)
    rank = run.accelerator.process_index
    torch.save(run.draft.state_dict(), folder / f"rank-{rank}.pt")
    (folder / f"rank-{rank}.json").write_text(json.dumps(seen[:4]))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
