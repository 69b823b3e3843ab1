"""Drafts from one layout to another: bit for bit, and refused by name where they are odd."""

import hashlib
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from tests.model.draft_files import CONFIG, random_weights, write_draft
from vllm_griffin.cli import main
from vllm_griffin.convert import convert
from vllm_griffin.model.checkpoint import CheckpointError, DraftCheckpoint, DraftLayout
from vllm_griffin.train.checkpoint import load_draft
from vllm_griffin.tree_shape import TreeShape

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "data" / "golden"
MODELS = ROOT / "examples" / "models"
TARGET = GOLDEN / "a" / "target"
PLAIN = DraftLayout()
PAIRS = [
    pytest.param(GOLDEN / "a" / "draft", GOLDEN / "a" / "target", id="golden-a"),
    pytest.param(GOLDEN / "b" / "draft", GOLDEN / "b" / "target", id="golden-b"),
    pytest.param(MODELS / "griffin", MODELS / "target", id="griffin"),
    pytest.param(MODELS / "eagle", MODELS / "target", id="eagle"),
]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return dict(DraftCheckpoint.open(folder).weights())


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, tuple]:
    return {
        key: (t.dtype, tuple(t.shape), t.contiguous().view(torch.uint8).numpy().tobytes())
        for key, t in tensors.items()
    }


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(("draft", "target"), PAIRS)
@pytest.mark.parametrize("middle", ["griffin", "speculators", "published"])
def test_round_trips_are_exact(draft: Path, target: Path, middle: str, tmp_path: Path) -> None:
    back = "published" if draft.name == "draft" else "griffin"
    convert(draft, target, tmp_path / "middle", middle)
    convert(tmp_path / "middle", target, tmp_path / "back", back)
    assert bits(tensors_of(tmp_path / "back")) == bits(tensors_of(draft))
    if back == "published" or middle != "published":
        assert config_of(tmp_path / "back") == config_of(draft)
    before, after = (DraftCheckpoint.open(f).config for f in (draft, tmp_path / "back"))
    ignored = {"source": "", "architectures": ()}
    assert vars(before) | ignored == vars(after) | ignored


@pytest.mark.parametrize(("draft", "target"), PAIRS)
def test_what_each_layout_holds(draft: Path, target: Path, tmp_path: Path) -> None:
    network = "EAGLE" if draft.name == "eagle" else "GRIFFIN"
    name = "EagleLlamaForCausalLM" if network == "EAGLE" else "GriffinForCausalLM"
    made = convert(draft, target, tmp_path / "griffin")
    assert made.network == network
    assert made.embedding == ("left out" if draft.name == "draft" else "none")
    assert "embed_tokens.weight" not in load_file(made.folder / "model.safetensors")
    config = config_of(made.folder)
    assert config["architectures"] == [name]
    assert list(config["tree"].values()) == [59, 6, 10]

    published = convert(draft, target, tmp_path / "published", "published").folder
    state = torch.load(published / "pytorch_model.bin", weights_only=True)
    assert torch.equal(
        state["embed_tokens.weight"],
        load_file(target / "model.safetensors")["model.embed_tokens.weight"].to(
            state["embed_tokens.weight"].dtype
        ),
    )
    config = config_of(published)
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "tree" not in config and "rope_parameters" not in config
    assert config["rope_theta"] and config["rope_scaling"] is None
    # The network that training has loads keys strictly, as the published loader.
    load_draft(published)


@pytest.mark.parametrize("form", ["safetensors", "bin", "sharded-safetensors", "sharded-bin"])
def test_every_form_of_file_and_its_provenance(form: str, tmp_path: Path) -> None:
    weights = random_weights(CONFIG, PLAIN)
    weights["embed_tokens.weight"] = load_file(TARGET / "model.safetensors")[
        "model.embed_tokens.weight"
    ]
    draft = write_draft(tmp_path / "draft", CONFIG, weights, form)
    made = convert(
        draft,
        TARGET,
        tmp_path / "out",
        tree=TreeShape(5, 2, 3),
    )
    assert made.embedding == "left out"
    del weights["embed_tokens.weight"]
    assert bits(tensors_of(made.folder)) == bits(weights)
    assert list(config_of(made.folder)["tree"].values()) == [5, 2, 3]
    record = json.loads((made.folder / "provenance.json").read_text())
    expected = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in draft.iterdir()}
    assert record["files"] == expected and len(expected) == (5 if "sharded" in form else 2)
    assert record["source"] == str(draft) and record["versions"]["torch"] == torch.__version__
    assert (made.folder / "README.md").is_file()


def test_an_embedding_of_its_own_is_kept(tmp_path: Path) -> None:
    weights = random_weights(CONFIG, PLAIN)
    embedding = load_file(TARGET / "model.safetensors")["model.embed_tokens.weight"].clone()
    embedding[-1, -1] = torch.nextafter(embedding[-1, -1], torch.tensor(9.0))
    weights["embed_tokens.weight"] = embedding
    draft = write_draft(tmp_path / "draft", CONFIG, weights)
    made = convert(draft, TARGET, tmp_path / "out")
    assert made.embedding == "kept"
    assert bits(tensors_of(made.folder)) == bits(weights)


def test_an_added_embedding_has_the_weights_dtype(tmp_path: Path) -> None:
    weights = random_weights(CONFIG, DraftLayout(own_embedding=False))
    weights = {key: weight.bfloat16() for key, weight in weights.items()}
    draft = write_draft(tmp_path / "draft", CONFIG, weights)
    made = convert(draft, TARGET, tmp_path / "out", "published")
    assert made.embedding == "added"
    embedding = load_file(TARGET / "model.safetensors")["model.embed_tokens.weight"]
    expected = {"embed_tokens.weight": embedding.bfloat16()} | weights
    assert bits(tensors_of(made.folder)) == bits(expected)


def test_a_rounded_embedding_is_not_the_targets(tmp_path: Path) -> None:
    """What serving would put back has other values than what the draft was trained with."""
    weights = {k: v.half() for k, v in random_weights(CONFIG, PLAIN).items()}
    weights["embed_tokens.weight"] = load_file(TARGET / "model.safetensors")[
        "model.embed_tokens.weight"
    ].half()
    draft = write_draft(tmp_path / "draft", CONFIG, weights)
    assert convert(draft, TARGET, tmp_path / "out").embedding == "kept"


@pytest.mark.parametrize("to", ["griffin", "published", "speculators"])
def test_query_key_value_biases_are_kept(to: str, tmp_path: Path) -> None:
    weights = random_weights(CONFIG, DraftLayout(qkv_bias=True, own_embedding=False))
    draft = write_draft(tmp_path / "draft", CONFIG, weights, "bin")
    made = convert(draft, TARGET, tmp_path / "out", to)
    found = tensors_of(made.folder)
    found.pop("embed_tokens.weight", None)
    assert bits(found) == bits(weights)
    assert DraftCheckpoint.open(made.folder).config.qkv_bias


def test_new_names_of_rope_fields_become_the_old_ones(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}
    config = {k: v for k, v in CONFIG.items() if k != "rope_theta"} | {"rope_parameters": rope}
    draft = write_draft(tmp_path / "draft", config, random_weights(config, PLAIN))
    made = convert(draft, TARGET, tmp_path / "out", "published")
    written = config_of(made.folder)
    assert written["rope_theta"] == 5000.0
    assert written["rope_scaling"] == {"type": "linear", "rope_type": "linear", "factor": 4.0}
    assert DraftCheckpoint.open(made.folder).config.rope_parameters == rope


def test_views_of_one_storage_are_saved_alone(tmp_path: Path) -> None:
    weights = random_weights(CONFIG, PLAIN)
    joined = torch.cat([weights[f"layers.0.self_attn.{n}_proj.weight"] for n in "qkv"])
    for n, part in zip("qkv", joined.chunk(3), strict=True):
        weights[f"layers.0.self_attn.{n}_proj.weight"] = part
    weights["layers.0.self_attn.o_proj.weight"] = weights["layers.0.self_attn.o_proj.weight"].T
    draft = write_draft(tmp_path / "draft", CONFIG, weights, "bin")
    made = convert(draft, TARGET, tmp_path / "out")
    assert bits(tensors_of(made.folder)) == bits(weights)


def test_training_companions_go_along(tmp_path: Path) -> None:
    draft = tmp_path / "draft"
    shutil.copytree(MODELS / "griffin", draft)
    (draft / "run.json").write_text(json.dumps({"command": "vllm-griffin train ...", "seed": 3}))
    (draft / "README.md").write_text("---\nlicense: mit\n---\n# Old card\n")
    made = convert(draft, MODELS / "target", tmp_path / "out")
    assert json.loads((made.folder / "run.json").read_text())["seed"] == 3
    card = (made.folder / "README.md").read_text()
    assert "license: mit" in card and "Old card" not in card and "vllm-griffin train ..." in card
    (draft / "log.jsonl").write_text('{"step": 1}\n{"step": 2, "ch')
    convert(draft, MODELS / "target", tmp_path / "of a killed run")
    (draft / "log.jsonl").write_text('{"step": 1, "ch\n{"step": 2}\n')
    with pytest.raises(CheckpointError, match=rf"^{draft}/log.jsonl, line 1: not JSON"):
        convert(draft, MODELS / "target", tmp_path / "damaged")
    assert not (tmp_path / "damaged").exists()


MISTAKES = [
    (lambda w, c: w.pop("fc.fc.bias"), "missing key `fc.fc.bias`"),
    (lambda w, c: w.update(midlayer=torch.ones(2)), "unexpected key `midlayer`"),
    (lambda w, c: w.update({"fc.fc.bias": torch.ones(3)}), r"`fc.fc.bias` has shape \[3\]"),
    (
        lambda w, c: w.update({"fc.fc.bias": torch.ones(64, dtype=torch.int32)}),
        "`fc.fc.bias` is int32",
    ),
    (lambda w, c: c.pop("hidden_size"), "`hidden_size` must be a positive integer, it is missing"),
    (lambda w, c: c.update(num_hidden_layers=2), "`num_hidden_layers` must be 1"),
    (lambda w, c: c.update(tree={"tree_width": 3}), r"`tree.tree_width` is not known"),
    (
        lambda w, c: c.update(tree={"tree_depth": 1, "tree_top_k": 2}),
        "make at most 2 nodes; choose another",
    ),
]


@pytest.mark.parametrize(
    ("change", "message"), MISTAKES, ids=lambda v: v if isinstance(v, str) else ""
)
def test_odd_checkpoints_are_refused_by_name(change, message: str, tmp_path: Path) -> None:
    weights, config = random_weights(CONFIG, PLAIN), dict(CONFIG)
    change(weights, config)
    draft = write_draft(tmp_path / "draft", config, weights)
    with pytest.raises(CheckpointError, match=message):
        convert(draft, TARGET, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["draft"]


def test_targets_are_refused_by_name(tmp_path: Path) -> None:
    draft = write_draft(tmp_path / "draft", CONFIG, random_weights(CONFIG, PLAIN))
    with pytest.raises(
        CheckpointError, match=r"`hidden_size` is 64, but the target model's is 128"
    ):
        convert(draft, GOLDEN / "b" / "target", tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"nowhere: no such folder"):
        convert(draft, tmp_path / "nowhere", tmp_path / "out")
    bare = tmp_path / "bare"
    bare.mkdir()
    with pytest.raises(CheckpointError, match=r"bare/config.json: missing"):
        convert(draft, bare, tmp_path / "out")
    (bare / "config.json").write_text((TARGET / "config.json").read_text())
    with pytest.raises(
        CheckpointError, match=r"bare: no weights, whose `model.embed_tokens.weight`"
    ):
        convert(draft, bare, tmp_path / "out")
    save_file({"wte.weight": torch.ones(1)}, bare / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"missing key `model.embed_tokens.weight` of the target"
    ):
        convert(draft, bare, tmp_path / "out")
    save_file({"model.embed_tokens.weight": torch.ones(600, 64)}, bare / "model.safetensors")
    weights = random_weights(CONFIG, DraftLayout(own_embedding=False))
    without = write_draft(tmp_path / "without", CONFIG, weights)
    with pytest.raises(
        CheckpointError, match=r"has shape \[600, 64\], the draft needs \[512, 64\]"
    ):
        convert(without, bare, tmp_path / "out", "published")


def test_a_head_size_that_the_published_code_cannot_have(tmp_path: Path) -> None:
    config = CONFIG | {"head_dim": 16}
    draft = write_draft(tmp_path / "draft", config, random_weights(config, PLAIN))
    with pytest.raises(
        CheckpointError, match=r"`head_dim` 16 has no place in the published layout"
    ):
        convert(draft, TARGET, tmp_path / "out", "published")


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years")
    with pytest.raises(CheckpointError, match="not an empty folder"):
        convert(MODELS / "griffin", MODELS / "target", tmp_path / "out")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years"


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vllm_griffin.convert.save_file", full)
    with pytest.raises(CheckpointError, match=r"out could not be written: .*No space left"):
        convert(MODELS / "griffin", MODELS / "target", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


class Bomb:
    """Unpickled with leave to run code, it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_no_code_of_a_checkpoint_is_run(tmp_path: Path) -> None:
    draft, mark = tmp_path / "draft", tmp_path / "mark"
    draft.mkdir()
    (draft / "config.json").write_text(json.dumps(CONFIG))
    torch.save({"fc.weight": Bomb(mark)}, draft / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin: not a readable"):
        convert(draft, TARGET, tmp_path / "out")
    assert not mark.exists()
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists(), "the checkpoint would not have run anything"


def test_the_command(tmp_path: Path) -> None:
    common = ["convert", str(GOLDEN / "a" / "draft"), "--target", str(TARGET)]

    def call(*arguments: str) -> tuple[int, str]:
        done = CliRunner().invoke(main, [*common, "--output", str(tmp_path / "out"), *arguments])
        return done.exit_code, done.output

    code, text = call("--tree", "20,4,3")
    assert code == 0, text
    assert "GRIFFIN in the griffin layout; embedding left out; tree 20,4,3" in text
    assert list(config_of(tmp_path / "out")["tree"].values()) == [20, 4, 3]
    for arguments, message in (
        ((), "not an empty folder"),
        (("--tree", "20,4"), "is neither nodes,depth,top_k"),
        (("--tree", "20,0,4"), "at least 1"),
        (("--tree", "20,2,3"), "at most 12 nodes"),
        (("--tree", "20,4,3", "--to", "published"), "--tree has no place"),
        (("--verifier", "a/b"), "--verifier is for --to speculators"),
    ):
        code, text = call(*arguments)
        assert code and message in text and "Traceback" not in text, text


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="a folder has no revision 'main': leave it out"):
        convert(MODELS / "griffin", MODELS / "target", tmp_path / "out", revision="main")
