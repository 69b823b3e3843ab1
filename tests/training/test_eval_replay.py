"""Replay against the engine, against whole trees, and against the published code's trees."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.engine.harness import GOLDEN, MODELS
from tests.engine.test_invariants import heldout_requests
from vllm_griffin.evaluate import engine
from vllm_griffin.evaluate.drafting import top
from vllm_griffin.evaluate.outputs import Output
from vllm_griffin.evaluate.prompts import Prompt
from vllm_griffin.evaluate.replay import replay_outputs
from vllm_griffin.evaluate.states import OutputStates
from vllm_griffin.evaluate.steps import compare, paths
from vllm_griffin.train.checkpoint import load_draft
from vllm_griffin.train.setup import TargetParts, load_target_parts
from vllm_griffin.tree_shape import TreeShape

TARGET, DRAFT = MODELS / "target", MODELS / "griffin"
NEW_TOKENS = 24


class Given:
    """Outputs with given hidden states."""

    def __init__(self, outputs: list[Output], features: list[torch.Tensor]) -> None:
        self.outputs = outputs
        self._features = features

    def features(self, number: int) -> torch.Tensor:
        return self._features[number]


@pytest.fixture(scope="module")
def parts() -> TargetParts:
    return load_target_parts(TARGET)


@pytest.fixture(scope="module")
def wanted() -> list[tuple[Prompt, float]]:
    prompts = [Prompt("held", i, r.prompt) for i, r in enumerate(heldout_requests(5, 50, 1))]
    # One that ends at the context's end, with room for a part of a tree only.
    prompts.append(Prompt("held", 5, (prompts[0].tokens * 50)[: 2048 - 20]))
    return [(prompt, t) for prompt in prompts for t in (0.0, 1.0)]


@pytest.fixture(scope="module")
def settings() -> engine.EngineSettings:
    return engine.EngineSettings(str(TARGET), 2048, NEW_TOKENS, batch=4)


@pytest.fixture(scope="module")
def states(
    wanted: list, settings: engine.EngineSettings, tmp_path_factory: pytest.TempPathFactory
) -> OutputStates:
    outputs: list[Output] = []
    engine.generate(settings, wanted, outputs.extend)
    stored = OutputStates(outputs, tmp_path_factory.mktemp("states"), TARGET)
    stored.fill()
    assert not stored.missing()
    return stored


@pytest.mark.parametrize("tree", ["59,6,10", "chain:6", "7,3,4"])
def test_replay_is_the_engines_trace(
    tree: str, wanted: list, settings: engine.EngineSettings, states: OutputStates, parts
) -> None:
    shape = TreeShape.parse(tree)
    run = engine.evaluate_in_engine(settings, str(DRAFT), shape, wanted)
    assert [o.text for o in run.outputs] == [o.text for o in states.outputs]
    draft = load_draft(DRAFT, parts.embeddings)
    for whole in (False, True):
        result = compare(run.prompts, replay_outputs(draft, parts, states, shape, whole=whole))
        print(tree, "whole" if whole else "", result)
        assert result.steps > 100
        assert result.differing_steps == 0
        # Only a near-tie at the cut may differ; these trees have none.
        assert result.differing_trees == 0
    steps = [step for prompt in run.prompts for step in prompt.steps]
    assert any(step.accepted > step.rest for step in steps), (
        "no last step ran past its answer's end"
    )
    assert any(step.drafted < shape.nodes for step in steps), "no tree was trimmed"


def test_replay_is_the_engines_trace_with_a_reduced_vocabulary(
    wanted: list, settings: engine.EngineSettings, states: OutputStates, parts, tmp_path: Path
) -> None:
    """And the outputs stay those of the target's whole vocabulary."""
    folder = Path(shutil.copytree(DRAFT, tmp_path / "draft"))
    answers = Counter(t for o in states.outputs for t in o.response_token_ids)
    ranking = [token for token, _ in answers.most_common()]
    (folder / "vocabulary.json").write_text(json.dumps(ranking))
    shape, size = TreeShape(20, 4, 5), len(ranking) // 2
    fewer = replace(settings, draft_vocab_size=size)
    run = engine.evaluate_in_engine(fewer, str(folder), shape, wanted)
    assert [o.text for o in run.outputs] == [o.text for o in states.outputs]
    kept = set(ranking[:size])
    assert not kept.issuperset(answers)
    drafted = {t for prompt in run.prompts for tokens, _ in prompt.trees for t in tokens[1:]}
    assert drafted <= kept and len(drafted) > 20
    result = compare(
        run.prompts,
        replay_outputs(
            load_draft(folder, parts.embeddings),
            parts,
            states,
            shape,
            vocabulary=sorted(kept),
            whole=True,
        ),
    )
    assert result.steps > 100
    assert result.differing_steps == result.differing_trees == 0


@pytest.mark.parametrize("tree", ["59,6,10", "9,5,10", "12,4,3", "1,1,1", "2,2,1", "52,4,4"])
def test_pruned_trees_give_the_steps_of_whole_trees(
    tree: str, states: OutputStates, parts: TargetParts
) -> None:
    shape = TreeShape.parse(tree)
    draft = load_draft(DRAFT, parts.embeddings)
    short = [output for output in states.outputs if output.end < 200]
    states = OutputStates(short, states.folder, TARGET)
    # A flat draft, whose trees are wide and often cut; and small batches.
    flat = TargetParts(parts.config, parts.embeddings, parts.head * 0.4)
    for head in (parts, flat):
        fast = replay_outputs(draft, head, states, shape, batch=5)
        whole = replay_outputs(draft, head, states, shape, whole=True)
        assert [p.steps for p in fast] == [p.steps for p in whole]


def test_without_a_tail_the_last_step_ends_with_the_answer(
    states: OutputStates, parts: TargetParts
) -> None:
    draft, shape = load_draft(DRAFT, parts.embeddings), TreeShape(59, 6, 10)
    with_tail = replay_outputs(draft, parts, states, shape)
    cut = [Output(**{**vars(o), "tail_token_ids": []}) for o in states.outputs]
    without = replay_outputs(draft, parts, OutputStates(cut, states.folder, TARGET), shape)
    for long, short in zip(with_tail, without, strict=True):
        assert long.steps[:-1] == short.steps[:-1]
        assert short.steps[-1].accepted == min(long.steps[-1].accepted, long.steps[-1].rest)


@pytest.mark.parametrize(("case", "prompts"), [("a", 3), ("b", 2)])
def test_tree_is_the_published_one(case: str, prompts: int) -> None:
    parts = load_target_parts(GOLDEN / case / "target")
    draft = load_draft(GOLDEN / case / "draft", parts.embeddings)
    expected = load_file(GOLDEN / case / "expected.safetensors")
    for j in range(prompts):
        ids, features = expected[f"{j}.input_ids"], expected[f"{j}.features"]
        root = int(expected[f"{j}.root"])
        # The root's own feature is unknown when its tree is drafted; any value must do.
        given = Given(
            [Output(0, 0.0, ids.tolist(), [root, 0])],
            [torch.cat([features, features[-1:] * 0 + 7])],
        )
        (found,) = replay_outputs(draft, parts, given, TreeShape(59, 6, 10), whole=True)
        wanted = paths(
            [root, *expected[f"{j}.tree_tokens"].tolist()[1:]],
            expected[f"{j}.tree_parents"].tolist(),
        )
        assert paths(*found.trees[0]) == wanted


def test_what_the_draft_itself_wrote_is_accepted() -> None:
    """Where the answer is the draft's own best chain, a chain and a tree accept all of it."""
    folder = GOLDEN / "a"
    parts = load_target_parts(folder / "target")
    draft = load_draft(folder / "draft", parts.embeddings)
    expected = load_file(folder / "expected.safetensors")
    prompt, root = expected["1.input_ids"].tolist(), int(expected["1.root"])
    features = torch.cat([expected["1.features"], torch.zeros(5, 64)])

    def steps(answer: list[int], tree: str):
        given = Given([Output(0, 0.0, prompt, answer)], [features])
        return replay_outputs(draft, parts, given, TreeShape.parse(tree), whole=True)[0]

    chain = steps([root, 0], "chain:4").trees[0][0]
    for tree in ("chain:4", "52,4,4"):  # 52 is all that such a tree can hold
        (step,) = steps(chain, tree).steps
        assert (step.accepted, step.spine_right, step.spine_wrong) == (4, 4, False)
    wrong = [*chain[:2], (chain[2] + 1) % 512, *chain[3:]]
    first = steps(wrong, "chain:4").steps[0]
    assert (first.accepted, first.spine_right, first.spine_wrong) == (1, 1, True)


def test_states_are_made_once_and_never_reused_for_another_text(
    states: OutputStates, tmp_path: Path
) -> None:
    output = states.outputs[0]
    other = Output(**{**vars(output), "response_token_ids": [*output.response_token_ids[:-1], 5]})
    stored = OutputStates([output, other], states.folder, TARGET)
    assert stored.missing() == [1]
    assert stored.features(0).shape == (output.end - 1, 128)


@pytest.mark.parametrize(("size", "k"), [(2048, 1), (2048, 7), (6400, 10), (100, 10), (1000, 3)])
def test_fast_top_is_top(size: int, k: int) -> None:
    logits = torch.randn(40, size, generator=torch.Generator().manual_seed(size))
    values, indices = top(logits, k)
    assert torch.equal(values, logits.topk(k).values)
    assert torch.equal(indices, logits.topk(k).indices)
