"""A draft that names its target is served without a flag, and read like any other."""

import json
import sys
from pathlib import Path

import pytest
from vllm import SamplingParams

from tests.engine.harness import MODELS, Request, engine, run
from vllm_griffin.convert import convert
from vllm_griffin.model.checkpoint import CheckpointError
from vllm_griffin.model.speculators import flatten, verifier_of, wrap
from vllm_griffin.tree_shape import TreeShape

TARGET, DRAFT = MODELS / "target", MODELS / "griffin"
TREE = TreeShape(20, 4, 3)


@pytest.fixture(scope="module")
def speculator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speculators") / "draft"
    return convert(DRAFT, TARGET, folder, "speculators", tree=TREE).folder


def requests() -> list[Request]:
    params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, detokenize=False)
    return [Request(str(n), list(range(5, 5 + n)), params) for n in (3, 40)]


def engine_config(folder: Path, **arguments):
    from vllm.engine.arg_utils import EngineArgs

    common = {"dtype": "float32", "skip_tokenizer_init": True, "max_model_len": 256}
    return EngineArgs(str(folder), **(common | arguments)).create_engine_config()


def test_a_draft_alone_is_served_with_its_target_and_tree(speculator: Path) -> None:
    with engine("tiny") as llm:
        plain = run(llm, requests())
    with engine("tiny", model=str(speculator)) as llm:
        config = llm.llm_engine.vllm_config
        drafted = run(llm, requests())
    assert config.model_config.model == str(TARGET)
    spec = config.speculative_config
    assert (spec.num_speculative_tokens, spec.tree_depth, spec.tree_top_k) == (20, 4, 3)
    assert drafted.tokens == plain.tokens
    assert drafted.acceptance_length > 1


def test_what_griffin_refuses_is_refused_of_a_draft_alone_too(speculator: Path) -> None:
    with pytest.raises(ValueError, match="does not support KV connectors and offloading"):
        engine_config(speculator, kv_offloading_size=1.0)


def test_named_beside_its_target_it_is_a_draft_like_any_other(speculator: Path) -> None:
    spec = {"method": "griffin", "model": str(speculator), "tree_depth": 3}
    config = engine_config(TARGET, speculative_config=spec).speculative_config
    assert (config.num_speculative_tokens, config.tree_depth, config.tree_top_k) == (20, 3, 3)


def test_what_the_user_says_of_the_tree_wins(speculator: Path) -> None:
    chain = {"num_speculative_tokens": 4, "tree_top_k": 1}
    config = engine_config(speculator, speculative_config=chain).speculative_config
    assert (config.num_speculative_tokens, config.tree_depth, config.tree_top_k) == (4, 4, 1)
    with pytest.raises(ValueError, match="num_speculative_tokens=20 is above the 4 nodes"):
        engine_config(speculator, speculative_config={"tree_top_k": 1})


def test_a_target_that_is_not_there_is_named_by_vllm(speculator: Path, tmp_path: Path) -> None:
    raw = json.loads((speculator / "config.json").read_text())
    raw["speculators_config"]["verifier"]["name_or_path"] = str(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(Exception, match="nowhere"):
        engine_config(tmp_path)


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ({"target": "target"}, "{cwd}/target"),
        ({"target": "./target"}, "{cwd}/target"),
        ({"target": "target", "verifier": "HuggingFaceTB/SmolLM2"}, "HuggingFaceTB/SmolLM2"),
    ],
)
def test_a_relative_target_is_resolved(
    given: dict, written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "target").symlink_to(TARGET)
    monkeypatch.chdir(tmp_path)
    folder = convert(DRAFT, output=tmp_path / "out", to="speculators", **given).folder
    file = folder / "config.json"
    name = verifier_of(json.loads(file.read_text()), str(file))
    expected = str(TARGET.resolve()) if "{cwd}" in written else written
    assert name == expected


def test_a_relative_verifier_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"\.\./nowhere: the target's name must be a folder"):
        convert(DRAFT, TARGET, tmp_path / "out", "speculators", verifier="../nowhere")


@pytest.mark.parametrize("more", [{}, {"draft_vocab_size": 500}])
def test_flatten_undoes_wrap(more: dict) -> None:
    config = json.loads((DRAFT / "config.json").read_text()) | {"tree": TREE.fields} | more
    wrapped = wrap(config, "some/target", ["LlamaForCausalLM"])
    assert wrapped.get("draft_vocab_size") == more.get("draft_vocab_size")
    assert "model_type" not in wrapped, "vLLM would take it for a plain model"
    assert flatten(wrapped, "config.json") == config
    assert flatten(config, "config.json") is config
    assert verifier_of(wrapped, "config.json") == "some/target"
    assert verifier_of(config, "config.json") is None


@pytest.mark.parametrize("verifier", [{}, {"name_or_path": ""}, {"name_or_path": 3}])
def test_a_config_without_a_target_is_refused(verifier: dict) -> None:
    raw = {"speculators_model_type": "griffin", "speculators_config": {"verifier": verifier}}
    with pytest.raises(CheckpointError, match="name_or_path` must name the target"):
        verifier_of(raw, "config.json")


def test_a_vllm_without_the_table_still_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.engine.arg_utils  # noqa: F401  (a front end)

    from vllm_griffin.compat import speculators

    module = "vllm.transformers_utils.configs.speculators.algos"
    monkeypatch.setitem(sys.modules, module, None)
    said: list[str] = []

    class Logger:
        def warning(self, text: str, *arguments: object) -> None:
            said.append(text % arguments)

    monkeypatch.setattr("vllm.logger.init_logger", lambda _: Logger())
    speculators.register_layout()
    assert len(said) == 1 and "table of speculators has moved" in said[0]
