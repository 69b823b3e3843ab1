"""Deliberate bugs, each of which a named test must catch.

    python tests/mutations.py

A bug is a text replacement in a copy of the repository. Its test has to pass in the copy as it is,
and to fail with the bug. Prints a table, and writes ``docs/results/mutations.json``; exits with 1 if
a bug slips through.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from vllm_griffin import provenance
from vllm_griffin.whole_file import write_json

ROOT = Path(__file__).parents[1]
COPIED, LINKED = ("vllm_griffin", "kernels", "tests", "pyproject.toml"), ("examples", "benchmarks")
VERIFY = "tests/kernels/test_verify.py::"
REQUESTS = "tests/engine/test_requests.py::"
EQUALITY = "tests/engine/test_equality.py::"


@dataclass(frozen=True)
class Mutation:
    """A bug: ``old`` becomes ``new`` in ``file``, and ``test`` has to notice."""

    bug: str
    file: str
    old: str
    new: str
    test: str


MUTATIONS = (
    Mutation(
        "a replayed graph verifies the trees that it was captured with",
        "vllm_griffin/runner/model_state.py",
        "rows = self.rows.of(num_reqs, self.rows.bits.shape[1])",
        "rows = TreeRows.empty(num_reqs, self.trees.bits)",
        "tests/engine/test_graphs.py::test_replays_give_what_eager_steps_give",
    ),
    Mutation(
        "a replayed graph grows trees behind the texts that it was captured with",
        "vllm_griffin/runner/graphs.py",
        "        into.prefix_lens.copy_(start.prefix_lens)\n",
        "",
        "tests/engine/test_graphs.py::test_replays_give_what_eager_steps_give",
    ),
    Mutation(
        "a step shares out the nodes that are worth least",
        "vllm_griffin/tree/share.py",
        'worth.where(rows < most.unsqueeze(1), float("-inf"))',
        '-worth.where(rows < most.unsqueeze(1), float("inf"))',
        "tests/engine/test_tree_budget.py::test_outputs_are_those_without_speculation[sync]",
    ),
    Mutation(
        "a row without prefix takes what FlashAttention has left there",
        "kernels/tree_tail.py",
        "known = row < tl.where(prefix_len > 0, num_rows, 0)",
        "known = row < num_rows",
        "tests/kernels/test_tree_tail.py::test_goes_on_from_the_prefix",
    ),
    Mutation(
        "the deepest nodes do not see their first ancestor",
        "kernels/tree_order.py",
        "    for _ in range(max_depth):\n        ancestor =",
        "    for _ in range(max_depth - 2):\n        ancestor =",
        "tests/kernels/test_tree_growth.py::test_order_tree",
    ),
    Mutation(
        "no compaction in the first layer",
        "kernels/kv_compaction.py",
        "for cache in (*caches.keys, *caches.values):\n        cache[",
        "for cache in (*caches.keys[1:], *caches.values[1:]):\n        cache[",
        "tests/kernels/test_kv_compaction.py::test_moves_the_path_to_the_front",
    ),
    Mutation(
        "compaction reads what it has overwritten",
        "kernels/kv_compaction.py",
        "    for j in range(1, num_accepted):",
        "    for step in range(1, num_accepted):\n        j = num_accepted - step",
        "tests/kernels/test_kv_compaction.py::test_overlapping_path_is_not_overwritten_before_it_is_read",
    ),
    Mutation(
        "the step does not compact the target's cache",
        "vllm_griffin/runner/speculator.py",
        "            self._compact_target_cache(input_batch, slot_mappings, walk)",
        "            pass",
        REQUESTS + "test_mixed_batch_is_lossless",
    ),
    Mutation(
        "positions of tree rows are one too high",
        "vllm_griffin/runner/model_state.py",
        "input_batch.positions[rows] += depth - local",
        "input_batch.positions[rows] += depth - local + (depth > 0)",
        REQUESTS + "test_mixed_batch_is_lossless",
    ),
    Mutation(
        "tree rows miss the last key of the context",
        "vllm_griffin/runner/model_state.py",
        "before = batch.seq_lens[:num_reqs] - rows.num_rows",
        "before = batch.seq_lens[:num_reqs] - rows.num_rows - 1",
        REQUESTS + "test_mixed_batch_is_lossless",
    ),
    Mutation(
        "the bonus token is drawn at the next row",
        "kernels/verify.py",
        "sampled[(first + here).clamp(max=last)]",
        "sampled[(first + here + 1).clamp(max=last)]",
        VERIFY + "test_walk_is_verify_tree",
    ),
    Mutation(
        "every request's rows begin as if the first one's number were everyone's",
        "kernels/verify.py",
        "    first = cu_num_logits[:-1].long()\n    num_rows = cu_num_logits[1:].long() - first\n",
        "    num_rows = cu_num_logits.long().diff()\n    first = torch.arange(len(slots)) * num_rows[0]\n",
        VERIFY + "test_walk_is_verify_tree",
    ),
    Mutation(
        "a node that the scheduler trimmed is accepted",
        "kernels/verify.py",
        "limit = torch.minimum(num_rows - 1, num_nodes[slots].long())",
        "limit = num_nodes[slots].long()",
        VERIFY + "test_walk_is_verify_tree",
    ),
    Mutation(
        "spine_only is ignored",
        "kernels/verify.py",
        "torch.where(spine_only[slots], torch.minimum(limit, spine_len[slots].long()), limit)",
        "limit",
        VERIFY + "test_spine_only_requests_stay_on_their_spine",
    ),
    Mutation(
        "a new request inherits its slot's tree",
        "vllm_griffin/tree/slots.py",
        "        self.num_nodes[slot : slot + 1].fill_(0)\n",
        "",
        REQUESTS + "test_reused_slots_do_not_inherit_trees",
    ),
    Mutation(
        "the draft's extend pass reads rows in their order instead of the accepted ones",
        "vllm_griffin/runner/extend.py",
        "root_row + walk.path[request, path_row]",
        "root_row + path_row",
        "tests/training/test_against_engine.py::test_pass_n_is_draft_step_n_plus_1[tree]",
    ),
    Mutation(
        "the captured first pass reads rows in their order instead of the accepted ones",
        "vllm_griffin/runner/extend.py",
        "hidden_states[(root + walk.path)",
        "hidden_states[(root + local)",
        "tests/engine/test_graphs.py::test_the_captured_first_pass_is_the_eager_one",
    ),
    Mutation(
        "noise is keyed by the row instead of the depth",
        "vllm_griffin/runner/sampler.py",
        "            batch.positions[indices],\n",
        "            batch.positions[indices] - self.trees.depths[batch.expanded_idx_mapping[rows], "
        "batch.expanded_local_pos[rows].long()] + batch.expanded_local_pos[rows],\n",
        REQUESTS + "test_mixed_batch_is_lossless",
    ),
    Mutation(
        "log-probabilities of the first rows instead of the accepted ones",
        "vllm_griffin/runner/sampler.py",
        "rows = first_row[request] + walk.path[request, place]",
        "rows = first_row[request] + place",
        REQUESTS + "test_logprobs_are_those_of_the_accepted_rows",
    ),
    Mutation(
        "a request with bad words is verified on the tree",
        "vllm_griffin/runner/model_state.py",
        "        or params.bad_words\n",
        "",
        EQUALITY + "test_who_reads_its_history_is_verified_on_its_spine",
    ),
    Mutation(
        "a custom processor's request is verified on the tree",
        "vllm_griffin/runner/processors.py",
        "            self.trees.keep_to_spine(req_idx)",
        "            pass",
        EQUALITY + "test_custom_processors_say_who_stays_on_the_spine",
    ),
    Mutation(
        "min_p and logit_bias pass under every speculative method",
        "vllm_griffin/compat/patches.py",
        "if not isinstance(speculative_config, GriffinSpeculativeConfig):",
        "if speculative_config is None:",
        EQUALITY + "test_another_method_refuses_what_griffin_honours",
    ),
    Mutation(
        "on a CPU, tree rows see their siblings",
        "kernels/tree_attention_cpu.py",
        "        space.tail_scores.add_(space.tail_mask)\n",
        "",
        "tests/kernels/test_tree_attention.py::test_layers_of_a_step_share_buffers_but_no_numbers",
    ),
    Mutation(
        "on a CPU, rows of two requests are copied into the cache as one's",
        "vllm_griffin/attention/cpu.py",
        " and slots == [*range(first, first + rows)]:",
        ":",
        "tests/cpu/test_cache_rows.py::test_the_cache_is_as_vllms_op_leaves_it",
    ),
)


def copy_repository(folder: Path) -> None:
    """What the tests need; ``kernels`` appears where an installed package has it."""
    ignore = shutil.ignore_patterns("__pycache__", ".*_cache")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(source, folder / name)
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)
    kernels = folder / "vllm_griffin" / "kernels"
    if not kernels.exists():
        kernels.symlink_to(Path("..") / "kernels")


def run_tests(folder: Path, *tests: str) -> int:
    """pytest's exit status: 0 all passed, 1 some failed, else nothing was tested."""
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True).returncode


def apply(folder: Path, mutation: Mutation) -> str:
    """Puts the bug into the copy and returns the file's text without it.

    Raises:
        click.ClickException: the text to replace is not there, or not once.
    """
    path = folder / mutation.file
    text = path.read_text(encoding="utf-8")
    if (found := text.count(mutation.old)) != 1:
        raise click.ClickException(
            f"'{mutation.bug}': its text is {found} times in {mutation.file}, expected once"
        )
    path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    return text


def try_out(folder: Path, mutation: Mutation) -> dict:
    """One line of the table: whether the test fails with the bug, and how long that took."""
    original = apply(folder, mutation)
    began = time.perf_counter()
    status = run_tests(folder, mutation.test)
    (folder / mutation.file).write_text(original, encoding="utf-8")
    if status not in (0, 1):
        raise click.ClickException(f"'{mutation.bug}': pytest could not run {mutation.test}")
    seconds = round(time.perf_counter() - began, 1)
    return asdict(mutation) | {"caught": status == 1, "seconds": seconds}


@click.command()
@click.option(
    "--output", type=click.Path(path_type=Path), default=ROOT / "docs/results/mutations.json"
)
@click.option(
    "--only", default="", help="Bugs with this text in their name or test; writes nothing."
)
def main(output: Path, only: str) -> None:
    """Tries out every bug."""
    record = provenance.describe()
    chosen = [m for m in MUTATIONS if only in m.bug or only in m.test]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_repository(folder)
        for mutation in chosen:  # a text that is gone should be known before an hour has passed
            (folder / mutation.file).write_text(apply(folder, mutation), encoding="utf-8")
        tests = sorted({m.test for m in chosen})
        if run_tests(folder, *tests) != 0:
            raise click.ClickException(f"not all pass without a bug: {' '.join(tests)}")
        print("| bug | caught by | |\n|---|---|---|", flush=True)
        results = []
        for mutation in chosen:
            result = try_out(folder, mutation)
            verdict = "caught" if result["caught"] else "**NOT CAUGHT**"
            print(f"| {mutation.bug} | `{mutation.test}` | {verdict} |", flush=True)
            results.append(result)
    if not only:
        write_json(output, record | {"mutations": results})
    sys.exit(0 if all(r["caught"] for r in results) else 1)


if __name__ == "__main__":
    main()
