"""The training loop and its command on a target of a few thousand weights."""

import errno
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from click.testing import CliRunner
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import distributed

from vllm_griffin.cli import main
from vllm_griffin.data.documents import Document, read_documents, write_documents
from vllm_griffin.data.shards import OnlineStates, StoredStates, write_shard
from vllm_griffin.report import read_run
from vllm_griffin.train.checkpoint import load_draft, save_draft
from vllm_griffin.train.loop import Trainer, TrainingError
from vllm_griffin.train.settings import PRESETS, Settings, staged
from vllm_griffin.train.setup import load_target_parts, new_draft


def trainer(target: Path, data: Path, folder: Path, **changes) -> Trainer:
    """A short run of one and of two passes."""
    fields = {"stages": [(1, 4), (2, 4)], "batch_tokens": 200, "vocabulary": 40, "save_every": 3}
    parts = load_target_parts(target)
    settings = Settings(**(fields | changes))
    torch.manual_seed(0)
    draft = new_draft(parts, fusion=settings.fusion, two_heads=settings.two_heads)
    return Trainer(draft, StoredStates(data), parts, settings, folder)


def killed_at(run: Trainer, step: int) -> None:
    """Run until the process "is killed" before step `step`."""
    whole_step = run._train_step

    def dying(*arguments):
        if run.step == step:
            raise KeyboardInterrupt
        return whole_step(*arguments)

    run._train_step = dying  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run.run(torch.float32)


def rows(folder: Path) -> list[dict]:
    """What the log says, without times."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k != "seconds"} for x in lines]


@pytest.mark.parametrize(("optimiser", "kill"), [("muon", 2), ("muon", 5), ("adamw", 7)])
def test_resumed_run_equals_an_uninterrupted_one(
    small_target: Path, small_data: Path, tmp_path: Path, optimiser: str, kill: int
) -> None:
    """Killed before the first checkpoint, in either stage, and after a validation that was not saved."""
    changes = {"optimiser": optimiser, "validate_every": 2}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trainer(small_target, small_data, whole, **changes).run(torch.float32)
    killed_at(trainer(small_target, small_data, parts, **changes), kill)
    second = trainer(small_target, small_data, parts, **changes)
    assert second.step == {2: 0, 5: 4, 7: 6}[kill]
    second.run(torch.float32)
    for name in ["model.safetensors", "config.json", "vocabulary.json"]:
        assert (whole / name).read_bytes() == (parts / name).read_bytes()
    assert rows(whole) == rows(parts)


def test_stages_are_runs_of_their_own(small_target: Path, small_data: Path, tmp_path: Path) -> None:
    """Optimiser and schedule start anew: the first steps of a stage do not depend on the lengths before."""
    run = trainer(
        small_target, small_data, tmp_path, stages=[(1, 3), (2, 3)], later_lr=0.5, warmup=3
    )
    run.run()
    logged = [row["lr"] for row in rows(tmp_path)]
    assert logged == pytest.approx([1e-3 / 1.8, 0.5e-3 / 1.8], rel=1e-5)
    assert [row["passes"] for row in rows(tmp_path)] == [1, 2]
    steps = {s["step"].item() for o in run.optimisers for s in o.state.values() if "step" in s}
    assert steps == {3}


def test_other_settings_do_not_continue_a_run(
    small_target: Path, small_data: Path, tmp_path: Path
) -> None:
    trainer(small_target, small_data, tmp_path).run()
    with pytest.raises(TrainingError, match="noise"):
        trainer(small_target, small_data, tmp_path, noise=0.1)
    with pytest.raises(TrainingError, match=r"stages; begun with --stages 1:4,2:4, of which"):
        trainer(small_target, small_data, tmp_path, stages=[(1, 8)])
    assert trainer(small_target, small_data, tmp_path, stages=[(1, 4), (2, 9)]).step == 8


@pytest.mark.parametrize("changes", [{}, {"mask": "published", "attention": "published"},
                                     {"tvd_plus_weight": 0.1, "align_top_k": 0},
                                     {"two_heads": False}, {"fusion": False}])  # fmt: skip
def test_training_lowers_the_loss(
    small_target: Path, small_data: Path, tmp_path: Path, changes: dict
) -> None:
    stages = [(1, 30), (2, 6)]
    run = trainer(
        small_target, small_data, tmp_path, stages=stages, batch_tokens=600, warmup=2, **changes
    )
    before = run.validate()["val_token0"]
    run.run()
    assert run.validate()["val_token0"] < before - 0.1


def test_gradient_checkpointing_changes_nothing(
    small_target: Path, small_data: Path, tmp_path: Path
) -> None:
    for name, kept in (("kept", False), ("again", True)):
        changes = {"stages": [(3, 3)], "gradient_checkpointing": kept, "align_top_k": 20}
        trainer(small_target, small_data, tmp_path / name, **changes).run(torch.float32)
    one, other = (load_draft(tmp_path / n, load_target_parts(small_target).embeddings)
                  for n in ("kept", "again"))  # fmt: skip
    for (name, x), y in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, msg=name)


def test_online_states_are_the_stored_ones(small_target: Path, small_data: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(small_target).eval()
    online, stored = OnlineStates(read_documents(small_data), model), StoredStates(small_data)
    assert online.documents == stored.documents
    for i in (0, 24, 25, 59):
        torch.testing.assert_close(stored.features(i), online.features(i), atol=5e-3, rtol=1e-3)


def test_the_best_draft_is_kept(small_target: Path, small_data: Path, tmp_path: Path) -> None:
    run = trainer(small_target, small_data, tmp_path, stages=[(1, 6)], validate_every=2)
    values = iter([2.0, 3.0, 1.0])
    run.validate = lambda: {**dict.fromkeys(  # type: ignore[method-assign]
        ("val_agree0", "val_token0", "val_feature0", "val_agree1", "chain"), 0.0),
        "top3": next(values)}  # fmt: skip
    states = []
    logged = run._log

    def log(*arguments):
        logged(*arguments)
        states.append((tmp_path / "model.safetensors").read_bytes())

    run._log = log  # type: ignore[method-assign]
    run.run()
    assert states[0] != states[1] == states[2]
    assert run.best == 3.0


def test_answers_shorter_than_the_passes_have_a_best_draft(
    small_target: Path, small_data: Path, tmp_path: Path
) -> None:
    """There is nothing to accept of them, so the loss tells."""
    run = trainer(small_target, small_data, tmp_path, stages=[(1, 6)], validate_every=2)
    losses = iter([3.0, 2.0, 2.5])
    run.validate = lambda: {**dict.fromkeys(  # type: ignore[method-assign]
        ("val_agree0", "val_feature0", "val_agree1"), 0.0),
        "chain": 1.0, "top3": 1.0, "val_token0": next(losses)}  # fmt: skip
    run.run()
    assert run.best == -2.0
    assert read_run(tmp_path, "run").best["step"] == 4


def test_a_damaged_checkpoint_is_named(
    small_target: Path, small_data: Path, tmp_path: Path
) -> None:
    trainer(small_target, small_data, tmp_path).run()
    saved = tmp_path / "checkpoint.pt"
    for size in (0, saved.stat().st_size // 2):
        saved.write_bytes(saved.read_bytes()[:size])
        with pytest.raises(TrainingError, match=r"checkpoint\.pt is damaged"):
            trainer(small_target, small_data, tmp_path)


def test_a_draft_drafts_from_the_tokens_it_learnt(
    small_target: Path, small_data: Path, tmp_path: Path
) -> None:
    for vocabulary, drafted in ((40, 40), (0, None), (99, None)):
        folder = tmp_path / str(vocabulary)
        trainer(small_target, small_data, folder, vocabulary=vocabulary).run()
        config = json.loads((folder / "config.json").read_text())
        assert config.get("draft_vocab_size") == drafted


def test_bad_loss_stops_and_keeps_the_checkpoint(
    small_target: Path, small_data: Path, tmp_path: Path
) -> None:
    trainer(small_target, small_data, tmp_path, stages=[(1, 3)]).run()
    kept = [(tmp_path / name).read_bytes() for name in ("checkpoint.pt", "model.safetensors")]
    run = trainer(small_target, small_data, tmp_path, stages=[(1, 3), (1, 3)])
    run._noisy = lambda batch: batch.features * float("nan")  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match=r"nan at step 3.*keeps the last good"):
        run.run()
    assert kept == [(tmp_path / n).read_bytes() for n in ("checkpoint.pt", "model.safetensors")]


@pytest.mark.parametrize(
    ("changes", "what"),
    [({"save_every": 1}, "the weights are not"), ({"validate_every": 1}, "documents are not")],
)
def test_an_update_that_breaks_the_weights_is_not_kept(
    small_target: Path, small_data: Path, tmp_path: Path, changes: dict, what: str
) -> None:
    """The loss before it was still fine."""
    trainer(small_target, small_data, tmp_path, stages=[(1, 3)]).run()
    names = ("checkpoint.pt", "model.safetensors")
    kept = [(tmp_path / name).read_bytes() for name in names]
    run = trainer(small_target, small_data, tmp_path, stages=[(1, 3), (1, 3)], **changes)
    whole_step = run._train_step

    def breaking(*arguments):
        terms = whole_step(*arguments)
        next(iter(run.draft.layer.parameters())).data.fill_(float("nan"))
        return terms

    run._train_step = breaking  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match=f"{what} finite at step 4.*keeps the last good"):
        run.run()
    assert kept == [(tmp_path / name).read_bytes() for name in names]


def test_only_the_same_run_goes_on(small_target: Path, small_data: Path, tmp_path: Path) -> None:
    """With the same target, data, first weights, network and processes; where they lie does not matter."""
    trainer(small_target, small_data, tmp_path).run()
    parts, states = load_target_parts(small_target), StoredStates(small_data)

    def begin(**changed) -> Trainer:
        settings = Settings(stages=[(1, 4), (2, 4)], batch_tokens=200, vocabulary=40, save_every=3)
        draft = new_draft(parts, fusion=changed.pop("fusion", True))
        given = {"states": states, "target": parts} | changed
        return Trainer(draft, settings=settings, folder=tmp_path, **given)

    assert begin().step == 8
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    del saved["made_from"]["network"]["fc_bias"]  # as before there was such a field
    torch.save(saved, tmp_path / "checkpoint.pt")
    assert begin().step == 8
    other = replace(parts, head=parts.head + 1)
    for name, changed in (
        ("target", {"target": other}),
        ("data", {"states": StoredStates(small_data, 2)}),
        ("init-from", {"fresh": False}),
        ("embedding", {"target": replace(parts, embeddings=parts.embeddings + 1)}),
        ("network", {"fusion": False}),
    ):
        with pytest.raises(TrainingError, match=rf"other settings \({name}\)"):
            begin(**changed)


def test_a_draft_is_not_written_over(small_target: Path, small_data: Path, tmp_path: Path) -> None:
    trainer(small_target, small_data, tmp_path).run()
    (tmp_path / "checkpoint.pt").unlink()
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(TrainingError, match=r"holds a draft, and no checkpoint.*another folder"):
        trainer(small_target, small_data, tmp_path, noise=0.1)
    assert kept == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_full_disk_under_a_draft(
    small_target: Path, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors has an error of its own for it."""

    def full(*_arguments: object, **_named: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("vllm_griffin.train.checkpoint.save_file", full)
    with pytest.raises(TrainingError, match=r"cannot write.*No space left.*checkpoint is kept"):
        trainer(small_target, small_data, tmp_path, stages=[(1, 1)]).run()


def test_full_disk_keeps_the_checkpoint(
    small_target: Path, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer(small_target, small_data, tmp_path, stages=[(1, 3)]).run()
    kept = (tmp_path / "checkpoint.pt").read_bytes()
    run = trainer(small_target, small_data, tmp_path, stages=[(1, 3), (1, 3)])

    def full(_saved: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(TrainingError, match=r"checkpoint\.pt.*No space left"):
        run.run()
    assert (tmp_path / "checkpoint.pt").read_bytes() == kept
    assert not list(tmp_path.glob("*.partial"))


def test_too_few_documents(small_target: Path, small_data: Path, tmp_path: Path) -> None:
    states = StoredStates(small_data)
    states.documents = states.documents[:10]
    parts = load_target_parts(small_target)
    with pytest.raises(TrainingError, match="0 held out"):
        Trainer(new_draft(parts), states, parts, Settings(), tmp_path)


def test_stages_of_presets() -> None:
    assert staged(1, 10) == [(1, 10)]
    assert staged(3, 1000) == [(1, 600), (2, 200), (3, 200)]
    assert staged(4, 4) == [(1, 1), (2, 1), (3, 1), (4, 1)] or sum(n for _, n in staged(4, 4)) == 4
    with pytest.raises(ValueError, match="too few"):
        staged(3, 2)
    for changes in PRESETS.values():
        Settings(**{k: v for k, v in changes.items() if k != "passes"})


def run_command(*arguments: object) -> str:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def test_command(small_target: Path, small_data: Path, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("batch-tokens: 64\nvocabulary: 0\nseed: 3\nnoise: 0.1\n")
    base = [
        "train",
        "--config",
        tmp_path / "c.yaml",
        "--target",
        small_target,
        "--data",
        small_data,
    ]
    out = tmp_path / "griffin"
    shown = run_command(*base, "--output", out, "--stages", "1:2,2:1", "--noise", "0.3")
    assert "is ready" in shown, shown
    record = json.loads((out / "run.json").read_text())
    assert record["command"].endswith("--noise 0.3") or "command" in record
    settings = record["settings"]
    assert (settings["noise"], settings["batch_tokens"], settings["seed"]) == (0.3, 64, 3)
    assert record["data"]["counts"] == {"documents": 60} and record["versions"]["torch"]
    assert (out / "README.md").is_file()
    eagle = tmp_path / "eagle"
    shown = run_command(*base, "--output", eagle, "--preset", "eagle2", "--steps", 2)
    names = [json.loads((d / "config.json").read_text())["architectures"][0] for d in (out, eagle)]
    assert names == ["GriffinForCausalLM", "EagleLlamaForCausalLM"], shown
    more = tmp_path / "more"
    shown = run_command(*base, "--output", more, "--init-from", out, "--stages", "3:1")
    assert "is ready" in shown, shown


def test_command_says_what_is_wrong(
    small_target: Path, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = ["train", "--target", small_target, "--data", small_data, "--output", tmp_path / "d"]
    (tmp_path / "c.yaml").write_text("bach_tokens: 64\n")
    assert "unknown option bach_tokens" in run_command(*base, "--config", tmp_path / "c.yaml")
    assert "passes:steps" in run_command(*base, "--stages", "3")
    assert "too few" in run_command(*base, "--steps", "2")
    (tmp_path / "c.yaml").write_text("passes: 2\n")
    config = ("--config", tmp_path / "c.yaml")
    shown = run_command(*base, *config, "--stages", "1:2", "--steps", "2")
    assert ": --steps would be ignored beside --stages" in " ".join(shown.split())
    (tmp_path / "c.yaml").write_text("passes: 2\nstages: 1:2\n")
    shown = run_command(*base, *config, "--steps", "2")
    assert "--steps, --passes would be ignored beside --stages" in " ".join(shown.split())
    for tracker in ("wandb", "tensorbord"):
        monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: ["tensorboard"])
        shown = " ".join(run_command(*base, "--report-to", tracker).split())
        assert f"--report-to {tracker}: no such tracker is installed (found: tensorboard)" in shown
    shown = run_command(*base, "--stages", "1:2", "--warmup", "2", "--dry-run")
    assert "its learning rate stays low" in " ".join(shown.split())
    (tmp_path / "empty").mkdir()
    shown = run_command("train", "--target", small_target, "--data", tmp_path / "empty",
                        "--output", tmp_path / "d")  # fmt: skip
    assert "has no data.json" in shown and "vllm-griffin data" in shown
    shown = run_command("train", "--target", tmp_path / "empty", "--data", small_data,
                        "--output", tmp_path / "d")  # fmt: skip
    assert "no config.json" in shown


@pytest.mark.parametrize(
    ("record", "vocab", "hidden", "said"),
    [
        ({"finished": False}, 60, 32, "is not finished: run its vllm-griffin data again"),
        ({}, 61, 32, "has the token 60, the target 60 tokens"),
        ({}, 60, 16, "hidden states of size 16, the target of size 32"),
        ({"settings": {"hidden_states": "online"}}, 60, 32, "--shards: the data's hidden states"),
    ],
)
def test_data_that_do_not_fit(
    small_target: Path, tmp_path: Path, record: dict, vocab: int, hidden: int, said: str
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    documents = [Document(i, [1, 2, vocab - 1], [(0, 3)]) for i in range(60)]
    write_documents(data, documents)
    write_shard(data / "shard-00000.safetensors", documents, [torch.ones(3, hidden)] * 60)
    whole = {"settings": {"target": "another"}, "finished": True} | record
    (data / "data.json").write_text(json.dumps(whole))
    shown = run_command("train", "--target", small_target, "--data", data, "--output",
                        tmp_path / "d", "--steps", 3, "--shards", 1)  # fmt: skip
    assert said in " ".join(shown.split())
    assert (record.get("finished") is False) or "was made for the target" in shown


def test_a_system_error_is_said_in_words(small_target: Path, small_data: Path) -> None:
    shown = run_command("train", "--target", small_target, "--data", small_data, "--output",
                        "/proc/nowhere/draft", "--steps", 3)  # fmt: skip
    assert "No such file or directory" in shown


@pytest.mark.parametrize(
    ("where", "error", "said"),
    [
        (
            "train.step.DraftLoss.forward",
            torch.OutOfMemoryError("CUDA out of memory"),
            "lower --batch-tokens, or give --gradient-checkpointing",
        ),
        (
            "card.write_card",
            OSError(errno.ENOSPC, "No space left on device"),
            "the draft is ready, its card is not written: [Errno 28] No space left on device",
        ),
    ],
)
def test_a_full_machine_is_said_in_words(
    small_target: Path, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    where: str, error: Exception, said: str,
) -> None:  # fmt: skip
    def full(*_arguments: object, **_named: object) -> None:
        raise error

    monkeypatch.setattr(f"vllm_griffin.{where}", full)
    shown = run_command("train", "--target", small_target, "--data", small_data, "--output",
                        tmp_path / "d", "--stages", "1:1")  # fmt: skip
    assert said in " ".join(shown.split())


def test_a_yaml_file_has_the_flags_of_the_command_line(
    small_target: Path, small_data: Path, tmp_path: Path
) -> None:
    """Those that switch off, too; and `1:2` is no number of base 60."""
    (tmp_path / "c.yaml").write_text(
        "no-tgf: true\nno-teh: true\nno-prompt-loss: false\nstages: 1:2\n"
    )
    run_command("train", "--config", tmp_path / "c.yaml", "--target", small_target, "--data",
                small_data, "--output", tmp_path / "d")  # fmt: skip
    settings = json.loads((tmp_path / "d" / "run.json").read_text())["settings"]
    wanted = {"fusion": False, "two_heads": False, "prompt_loss": True, "stages": [[1, 2]]}
    assert {name: settings[name] for name in wanted} == wanted


def test_weights_to_start_from_by_their_name_on_the_hub(
    small_target: Path, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = load_target_parts(small_target)
    save_draft(new_draft(parts), tmp_path / "hub", parts.config, torch.float32)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path / "hub"))
    base = ["train", "--target", small_target, "--data", small_data, "--output", tmp_path / "d"]
    shown = run_command(*base, "--init-from", "someone/draft", "--stages", "1:1", "--dry-run")
    assert "57 to train on" in shown
    assert "a/b/c: no such folder" in run_command(*base, "--init-from", "a/b/c")


def test_a_loaded_draft_keeps_its_embedding(
    small_target: Path, small_data: Path, tmp_path: Path
) -> None:
    """Its own, where it has one; a copy of the target's is left out, as serving takes the target's."""
    parts = load_target_parts(small_target)
    base = ["train", "--target", small_target, "--data", small_data, "--dtype", "float32"]
    for name, factor in (("own", 1.5), ("copy", 1.0)):
        draft = new_draft(parts)
        draft.embed_tokens.weight.mul_(factor)
        save_draft(draft, tmp_path / name, parts.config, torch.float32, own_embedding=True)
        more = tmp_path / f"{name}-more"
        run_command(*base, "--init-from", tmp_path / name, "--output", more, "--stages", "1:1")
        written = load_file(more / "model.safetensors")
        assert ("embed_tokens.weight" in written) == (name == "own")
        found = load_draft(more, parts.embeddings).embed_tokens.weight
        assert torch.equal(found, parts.embeddings * factor)


def test_a_loaded_draft_keeps_its_layout(
    small_target: Path, small_data: Path, tmp_path: Path
) -> None:
    """What the record says is what was trained; another layout asked for is refused."""
    base = ["train", "--target", small_target, "--data", small_data, "--batch-tokens", 64]
    run_command(*base, "--output", tmp_path / "griffin", "--stages", "1:1")
    going_on = [*base, "--init-from", tmp_path / "griffin", "--output", tmp_path / "more"]
    assert "--no-tgf: --init-from has the layout" in run_command(*going_on, "--no-tgf")
    run_command(*going_on, "--preset", "hass", "--stages", "2:1")
    record = json.loads((tmp_path / "more" / "run.json").read_text())
    assert record["settings"]["fusion"] and record["settings"]["two_heads"]


def test_dry_run_writes_nothing(small_target: Path, small_data: Path, tmp_path: Path) -> None:
    shown = run_command("train", "--target", small_target, "--data", small_data, "--output",
                        tmp_path / "d", "--stages", "1:20,2:10", "--batch-tokens", 100,
                        "--dry-run")  # fmt: skip
    assert "57 to train on, 3 held out" in shown and "with 2 passes" in shown
    for what in ("disk", "memory"):
        assert re.search(rf"{what}  [\d.]+ [KMG]iB", shown), shown
    assert not (tmp_path / "d").exists()


def test_tensorboard(small_target: Path, small_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    shown = run_command("train", "--target", small_target, "--data", small_data, "--output",
                        tmp_path / "d", "--stages", "1:2", "--batch-tokens", 100, "--report-to",
                        "tensorboard")  # fmt: skip
    assert "is ready" in shown, shown
    assert list((tmp_path / "d").rglob("events.out.tfevents*"))


@pytest.mark.timeout(300)
def test_processes_share_a_run(small_target: Path, small_data: Path, tmp_path: Path) -> None:
    """Two processes see different documents and end with the same weights."""
    root = Path(__file__).parents[2]
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--standalone",
    ]
    script = ["-m", "tests.training.two_processes", small_target, small_data, tmp_path]
    result = subprocess.run(
        [*launch, *map(str, script)],
        cwd=root,
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    one, other = (torch.load(tmp_path / f"rank-{i}.pt", weights_only=True) for i in (0, 1))
    for name in one:
        assert torch.equal(one[name], other[name]), name
    here, there = (json.loads((tmp_path / f"rank-{i}.json").read_text()) for i in (0, 1))
    assert len(here) == 4 and all(a != b for a, b in zip(here, there, strict=True))
    alone = trainer(small_target, small_data, tmp_path / "alone", stages=[(1, 2), (2, 2)],
                    batch_tokens=50)  # fmt: skip
    alone.run(torch.float32)
    down = "layers.0.mlp.down_proj.parametrizations.weight.original"
    assert not torch.allclose(one[down], alone.draft.state_dict()[down])


def test_leaves_another_owners_process_group(
    small_target: Path, small_data: Path, tmp_path: Path
) -> None:
    """Such as that of a vLLM engine in this process."""
    made = not distributed.is_initialized()
    if made:
        distributed.init_process_group(
            "gloo", f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1
        )
    group = distributed.group.WORLD
    trainer(small_target, small_data, tmp_path / "run", stages=[(1, 1)]).run(torch.float32)
    assert distributed.is_initialized() and distributed.group.WORLD is group
    if made:
        distributed.destroy_process_group()


def test_bf16(small_target: Path, small_data: Path, tmp_path: Path) -> None:
    """Close to float32, and not the same."""
    finished = []
    for bf16 in (False, True):
        AcceleratorState._reset_state(reset_partial_state=True)  # one precision a process
        run = trainer(small_target, small_data, tmp_path / str(bf16), stages=[(2, 2)], bf16=bf16)
        run.run(torch.float32)
        finished.append(run.validate()["val_token0"])
    AcceleratorState._reset_state(reset_partial_state=True)
    assert finished[0] != finished[1]
    assert finished[0] == pytest.approx(finished[1], rel=0.02)
