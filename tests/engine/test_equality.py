"""Every sampling parameter is exact on the tree or on the spine, or refused by name.

A smaller cut of the matrix that ``benchmarks/equality.py`` prints.
"""

import types

import pytest
import torch
from vllm import SamplingParams
from vllm.config import SpeculativeConfig
from vllm.exceptions import VLLMValidationError
from vllm.v1.worker.gpu.sample.bad_words import BadWordsState

from tests.engine.equality import GOLDEN, MIXED, MODES, TINY, Bench, Cell, Matrix, fill, how
from tests.engine.parameters import NOT_SAMPLING, PARAMETERS, REFUSED, Case, Parameter
from tests.engine.processors import NoRepeat
from tests.test_config import make
from vllm_griffin.runner.model_state import reads_history
from vllm_griffin.runner.processors import watch_processors
from vllm_griffin.tree import DraftTrees

CASES = [Case(i, size=2048, eos=1, length=9) for i in range(8)]


def test_every_field_of_vllm_has_a_row_or_a_reason() -> None:
    used = {field for p in PARAMETERS for case in CASES for field in p.fields(case)}
    listed = [*used, *NOT_SAMPLING, *REFUSED]
    assert sorted(listed) == sorted(SamplingParams.__struct_fields__)


@pytest.mark.parametrize("row", PARAMETERS, ids=lambda p: p.name)
def test_who_reads_its_history_is_verified_on_its_spine(row: Parameter) -> None:
    # What a custom processor changes is known to the processor alone.
    spine = row.how == "spine" and row.needs != "processors"
    assert {reads_history(row.params(case)) for case in CASES} == {spine}


# What runs here of the matrix: bench, requests at a time -> requests of a row.
CUTS: dict[str, tuple[Bench, dict[int, int]]] = {
    "tiny": (TINY, {8: 2}),
    "golden": (GOLDEN, {8: 3, 1: 2}),
    "processed-logits": (MODES[-1], {8: 6}),
}


@pytest.fixture(scope="module", params=CUTS)
def matrix(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    """A bench's rows, mixed, N 12."""
    bench, counts = CUTS[request.param]
    cells = [Cell(12, batch, MIXED) for batch in counts]
    found: Matrix = {}
    fill(found, bench, cells, counts, tmp_path_factory.mktemp("traces"))
    assert found.keys() == {row.name + bench.suffix for row in bench.rows}
    return found


def test_nothing_differs(matrix: Matrix) -> None:
    counts = [count for row in matrix.values() for count in row.values()]
    assert not [note for count in counts if count.differ for note in count.notes]
    # A near-tie is one in some thousands of decisions.
    assert sum(count.ties for count in counts) <= 1


def test_trees_are_accepted_beside_the_spine_where_the_table_says_so(matrix: Matrix) -> None:
    tree = {row: counts.values() for row, counts in matrix.items() if how(row) == "tree"}
    spine = {row: counts.values() for row, counts in matrix.items() if how(row) == "spine"}
    assert sum(any(c.off_spine for c in counts) for counts in tree.values()) > len(tree) // 2
    assert not any(c.off_spine for counts in spine.values() for c in counts)
    # A spine that is never accepted proves nothing.
    assert any(c.accepted for counts in spine.values() for c in counts)


def test_custom_processors_say_who_stays_on_the_spine() -> None:
    slots = types.SimpleNamespace(total_len=None, all_token_ids=None)
    native = BadWordsState.__new__(BadWordsState)
    sampler = types.SimpleNamespace(logits_processors=[native, NoRepeat(None, slots)])
    trees = DraftTrees(slots=4, num_nodes=3, device=torch.device("cpu"))
    watch_processors(sampler, trees)
    assert sampler.logits_processors[0] is native
    watched = sampler.logits_processors[1]
    assert watched.add_request(2, SamplingParams(extra_args={"no_repeat": 3}))
    assert not watched.add_request(3, SamplingParams())
    assert trees.spine_only.tolist() == [False, False, True, False]


def test_what_is_refused_is_named() -> None:
    config = make(skip_tokenizer_init=True)
    for field, message in REFUSED.items():
        params = SamplingParams(**{field: [3, 4]})
        with pytest.raises(ValueError, match=message):
            params.verify(config.model_config, config.speculative_config, None, None)


@pytest.mark.parametrize("fields", [{"min_p": 0.1}, {"logit_bias": {3: 1.0}}])
def test_another_method_refuses_what_griffin_honours(fields: dict) -> None:
    config = make()
    params = SamplingParams(**fields)
    params.verify(config.model_config, config.speculative_config, None, None)
    ngram = SpeculativeConfig(
        method="ngram",
        num_speculative_tokens=2,
        target_model_config=config.model_config,
        target_parallel_config=config.parallel_config,
    )
    with pytest.raises(VLLMValidationError, match="min_p and logit_bias"):
        params.verify(config.model_config, ngram, None, None)
