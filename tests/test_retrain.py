"""`sa-engine retrain` as a user runs it: real weights, real photos, masks drawn with SAM's help."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import load_file
from training import Masks, make_run, quarters

from sa_engine.cache import cache_dir
from sa_engine.cli import main
from sa_engine.evaluation.data import open_data
from sa_engine.holdout import split
from sa_engine.lineage import lineage
from sa_engine.modeling.sam import load_sam, model_fingerprint
from sa_engine.modeling.weights import resolve
from sa_engine.rounds import read_round
from sa_engine.storage import RunPaths
from sa_engine.training import gate
from sa_engine.training.report import RoundReport
from sa_engine.training.worker import read_metrics

CONFIG = """\
iterations: 3
batch_size: 1
max_masks: 1
train_encoder: false
corrections: 0
mask_only_steps: 1
warmup: 1
lr: 0.0001
log_every: 1
save_every: 1
validation: 0.3
validation_images: 1
validate_every: 3
gate_images: 1
"""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory, photos: list[np.ndarray]) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number, photo in enumerate(photos):
        Image.fromarray(photo).reduce(2).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def shards(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(pictures, tmp_path_factory.mktemp("runs") / "shards", quarters)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("retrain")
    (folder / "retrain.yaml").write_text(CONFIG)
    return folder


def arguments(shards: Path, folder: Path, *more: str) -> list[str]:
    kept = f"embeddings={folder / 'embeddings'}"
    return ["retrain", "--config", str(folder / "retrain.yaml"), "--data", str(shards),
            "--set", kept, "--threads-per-worker", "1", *more]  # fmt: skip


def invoke(*args: str) -> Result:
    return CliRunner().invoke(main, list(args), catch_exceptions=False)


@pytest.fixture(scope="module")
def done(shards: Path, folder: Path) -> tuple[Path, Result]:
    """A round and what its training said."""
    out = folder / "rounds" / "01"
    return out, invoke(*arguments(shards, folder, "--out", str(out)))


def test_a_round_is_a_checkpoint_that_knows_where_it_comes_from(
    done: tuple[Path, Result], shards: Path
) -> None:
    out, result = done
    assert result.exit_code == 0, result.output
    assert "3 iterations of 1 images" in result.stderr and "GB of memory" in result.stderr
    info = read_round(out)
    sam, parent = load_sam(resolve(str(out))), load_sam(resolve("vit_t"))
    assert info.fingerprint == model_fingerprint(sam) != model_fingerprint(parent)
    assert info.parent.fingerprint == model_fingerprint(parent)
    assert (info.architecture, info.iterations, info.data[0].run) == ("vit_t", 3, str(shards))
    assert info.metrics["before"]["miou_1pt"] > 0 and info.metrics["kept_iteration"] == 3
    moved = {name.split(".")[0] for name, value in sam.state_dict().items()
             if not torch.equal(value, parent.state_dict()[name])}  # fmt: skip
    assert moved == {"prompt_encoder", "mask_decoder"}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "total" in line] == [1, 2, 3]
    assert Image.open(out / "curves.png").size[0] > 1000
    assert sorted(path.name for path in (out / "_run").iterdir()) == [
        "run.json",
        "tensorboard",
    ]
    (events,) = (out / "_run" / "tensorboard").iterdir()
    assert b"point_miou" in events.read_bytes()


def test_a_finished_round_is_left_alone(
    done: tuple[Path, Result], shards: Path, folder: Path
) -> None:
    out, _ = done
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    again = invoke(*arguments(shards, folder, "--out", str(out)))
    assert again.exit_code == 0 and "3 iterations" in again.output
    other = invoke(*arguments(shards, folder, "--out", str(out), "--lr", "0.5"))
    assert other.exit_code == 2 and "lr was 0.0001 and is now 0.5" in other.output
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before


@pytest.fixture
def copied(done: tuple[Path, Result], tmp_path: Path) -> Path:
    """The finished round, in another folder."""
    return shutil.copytree(done[0], tmp_path / "copied")


def test_a_finished_round_is_of_its_own_data_and_weights(
    copied: Path, shards: Path, folder: Path, tmp_path: Path
) -> None:
    """However these are written."""
    (tmp_path / "link").symlink_to(shards)
    weights = str(resolve("vit_t"))
    same = invoke(*arguments(tmp_path / "link", folder, f"--out={copied}", f"--init={weights}"))
    assert same.exit_code == 0, same.output
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(
        photos / "a.png"
    )
    other = make_run(photos, tmp_path / "other", quarters)
    both = invoke(*arguments(shards, folder, f"--out={copied}", f"--data={other}"))
    assert both.exit_code == 2
    assert (
        f"{copied} is of other data (without what gates hold out): {shards} (" in both.output
        and f", {other} (1 images, " in both.output
    )
    init = invoke(
        *arguments(shards, folder, f"--out={copied}", f"--init={copied.parent / 'nowhere'}")
    )
    assert init.exit_code == 2 and "nowhere" in init.output
    gate = invoke(*arguments(shards, folder, f"--out={copied}", f"--gate={other}"))
    assert gate.exit_code == 2 and f"was not judged on gate {other}" in gate.output


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_a_round_is_not_written_over_what_it_comes_from(
    copied: Path, shards: Path, folder: Path, overwrite: list[str]
) -> None:
    before = (copied / "model.safetensors").read_bytes()
    result = invoke(*arguments(shards, folder, f"--out={copied}", f"--init={copied}", *overwrite))
    assert result.exit_code == 2 and f"init {copied} lies in out = {copied}" in result.output
    assert (copied / "model.safetensors").read_bytes() == before


def test_a_round_without_its_run_file_is_not_taken_for_ones_own(
    copied: Path, shards: Path, folder: Path
) -> None:
    shutil.rmtree(copied / "_run")
    result = invoke(*arguments(shards, folder, f"--out={copied}"))
    assert result.exit_code == 2 and "run.json" in result.output


def test_what_a_kill_left_behind_a_finished_round_is_removed(
    copied: Path, shards: Path, folder: Path
) -> None:
    (copied / "_run" / "state.pt").write_bytes(b"state")
    for name in ("embeddings", "tmp"):
        (copied / "_run" / name).mkdir()
        (copied / "_run" / name / "file").touch()
    assert invoke(*arguments(shards, folder, f"--out={copied}")).exit_code == 0
    assert sorted(path.name for path in (copied / "_run").iterdir()) == ["run.json", "tensorboard"]


def test_a_home_folder_is_found_and_killed_while_it_is_written_a_round_goes_on(
    shards: Path, folder: Path, tmp_path: Path
) -> None:
    options = ["--iterations=1", "--set=validation=0", "--out=~/round"]
    code = "import os, sa_engine.rounds as rounds; from sa_engine.cli import main; {}main()"
    killed, whole = (
        subprocess.run(
            [sys.executable, "-c", code.format(kill), *arguments(shards, folder, *options)],
            cwd=tmp_path,
            env={**os.environ, "HOME": str(tmp_path / "home"), "SA_ENGINE_CACHE": str(cache_dir())},
        ).returncode
        for kill in ("rounds.place = lambda *_: os._exit(9); ", "")
    )
    assert (killed, whole) == (9, 0)
    out = tmp_path / "home" / "round"
    assert {path.name for path in tmp_path.iterdir()} == {"home"}
    names = {path.name for path in out.iterdir()}
    assert names == {"_run", "curves.png", "metrics.jsonl", "model.json", "model.safetensors"}
    assert {path.name for path in (out / "_run").iterdir()} == {"run.json", "tensorboard"}
    modes = {(out / name).stat().st_mode for name in ("model.json", "model.safetensors")}
    assert len(modes) == 1, "readable by the same people"


def test_a_signal_while_the_round_is_judged_and_written_is_obeyed(
    shards: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = arguments(shards, folder, f"--out={tmp_path}", "--iterations=1", "--set=validation=0")
    with monkeypatch.context() as busy:
        busy.setattr(
            "stages.retrain.plot_curves", lambda lines: signal.raise_signal(signal.SIGTERM)
        )
        stopped = invoke(*options)
    assert stopped.exit_code == 143 and "all 1 iterations are done" in stopped.output
    assert not (tmp_path / "_run" / "lock").exists() and not (tmp_path / "model.json").exists()
    assert invoke(*options).exit_code == 0 and read_round(tmp_path).iterations == 1


def test_it_is_told_which_weights_were_kept(done: tuple[Path, Result]) -> None:
    out, result = done
    assert "weights of" not in result.output
    info = read_round(out)
    told = {
        kept: str(
            RoundReport(
                RunPaths(out), replace(info, metrics={**info.metrics, "kept_iteration": kept})
            )
        )
        for kept in (0, 2)
    }
    assert "weights of iteration 0: on the validation images none was better" in told[0]
    assert "weights of iteration 2, the best on the validation images" in told[2]


def test_a_cut_off_line_of_metrics_is_left_out(copied: Path) -> None:
    whole = read_metrics(RunPaths(copied))
    with (copied / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 4, "lo')
    assert read_metrics(RunPaths(copied)) == whole != []


def test_a_full_disk_is_told_and_the_state_before_is_kept(tmp_path: Path) -> None:
    code = f"""if True:
        import resource, torch
        from pathlib import Path
        from sa_engine.storage import RunPaths, told_if_output_fails
        from sa_engine.training.state import TrainingState, load_state, save_state
        paths = RunPaths(Path({str(tmp_path)!r}))
        save_state(paths, TrainingState(1, {{}}, {{}}))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
        try:
            with told_if_output_fails(paths):
                save_state(paths, TrainingState(2, {{"a": torch.zeros(1_000_000), "b": torch.zeros(9)}}, {{}}))
        finally:
            print(load_state(paths).iteration, *paths.scratch.iterdir())
    """
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.stdout == "1\n" and "OutputError: cannot read or write the output" in ended.stderr


def test_the_next_round_has_the_first_as_its_parent(
    done: tuple[Path, Result], shards: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = done
    monkeypatch.setattr("stages.retrain.CALIBRATION_IMAGES", 1)
    monkeypatch.setattr("sa_engine.training.calibrate.POINTS_PER_SIDE", 2)
    out = folder / "rounds" / "02"
    result = invoke(*arguments(shards, folder, "--init", str(first), "--out", str(out), "--iterations", "1",
                               "--set", "validation=0", "--set", "calibrate_iou=true"))  # fmt: skip
    assert result.exit_code == 0, result.output
    lines = json.loads((out / "model.json").read_text())["metrics"]["iou_calibration"]
    assert lines["multimask"]["scale"] > 0 and lines["single"]["scale"] > 0
    assert [(one.name, one.parent) for one in lineage(folder / "rounds").rounds] == [
        ("01", None),
        ("02", "01"),
    ]
    table = invoke("rounds", str(folder / "rounds"))
    assert table.exit_code == 0 and "vit_t" in table.output and table.output.count("\n") >= 3


def test_a_ruined_model_is_not_promoted(
    pictures: Path, shards: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step at a huge rate, judged on what another run of the same photos holds out."""
    coarse = partial(gate.measure, points_per_side=4)
    monkeypatch.setattr("sa_engine.training.gate.measure", coarse)
    judges = make_run(pictures, tmp_path / "judges", quarters)
    (held_out,) = split(judges, 1).images
    out = tmp_path / "rounds" / "ruined"
    result = invoke(*arguments(shards, folder, "--out", str(out), "--gate", str(judges), "--lr", "0.05",
                               "--iterations", "1", "--set", "validation=0"))  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "gate: judges, 1 images\n" in result.stderr
    assert "data: shards, 3 images, 12 masks; 1 held out\n" in result.stderr
    info = read_round(out)
    assert info.gate is not None and not info.gate.promoted
    assert "mean 1-point mIoU fell from" in info.gate.reason
    assert f"gate: NOT promoted: {info.gate.reason}" in result.output
    before, after = info.gate.before, info.gate.after
    assert before["miou_1pt"] > after["miou_1pt"] + 0.1
    assert before["miou_box"] > after["miou_box"] + 0.1
    # Both on the one photo that was held out, and `before` is what the parent makes of it.
    ((one,), (other,)) = before["data"], after["data"]
    data = open_data(judges, "judges", "holdout")
    assert data.image_ids == (held_out["image_id"],)
    assert (one["images"], one["masks"], one["fingerprint"]) == (1, 4, data.fingerprint)
    assert (other["images"], other["masks"], other["fingerprint"]) == (1, 4, data.fingerprint)
    expected = coarse(load_sam(resolve("vit_t")), [data], images=1)
    assert before["miou_1pt"] == pytest.approx(expected.miou_1pt, abs=1e-6)
    table = invoke("rounds", str(tmp_path / "rounds"))
    assert table.exit_code == 0 and f"ruined refused: {info.gate.reason}" in table.output
    assert f"{before['miou_1pt']:.3f}  {after['miou_1pt']:.3f}" in table.output


@pytest.mark.parametrize("command", ["status", "verify", "report"])
def test_commands_for_shards_say_that_it_is_a_round(
    done: tuple[Path, Result], command: str
) -> None:
    result = invoke(command, str(done[0]))
    assert result.exit_code == 2 and "is a round of `sa-engine retrain`" in result.stderr


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--gate", "{shards}"], "is trained on: name another run, or hold images out"),
        (["--init", "nowhere"], "nowhere"),
        (["--data", "{folder}"], "is not the output of a run"),
        (["--set", "validation_images=0"], "expected a whole number of at least 1"),
        (["--device", "cuda"], "device cuda is not available"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(
    shards: Path, folder: Path, tmp_path: Path, more: list[str], reason: str
) -> None:
    more = [text.format(shards=shards, folder=folder) for text in more]
    result = invoke(*arguments(shards, folder, "--out", str(tmp_path / "new"), *more))
    assert result.exit_code == 2 and reason in result.output
    assert not (tmp_path / "new").exists()


def test_a_folder_with_other_things_is_refused(shards: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("irreplaceable")
    for overwrite in ([], ["--overwrite"]):
        result = invoke(*arguments(shards, folder, "--out", str(tmp_path), *overwrite))
        assert result.exit_code == 2 and "thesis.tex" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_dry_run_writes_nothing(shards: Path, folder: Path, tmp_path: Path) -> None:
    result = invoke(*arguments(shards, folder, "--out", str(tmp_path / "new"), "--dry-run"))
    assert result.exit_code == 0 and "trained: 4.1 of 10.1 million" in result.stdout
    assert "train_encoder: false" in result.stdout and not (tmp_path / "new").exists()


@pytest.mark.slow
def test_killed_at_random_steps_and_resumed_it_ends_with_the_same_weights(
    shards: Path, folder: Path, tmp_path: Path
) -> None:
    """By SIGTERM, which saves, and by SIGKILL, which loses what came after the last save.

    The first training fills the folder of embeddings, and the others read them: that must not matter either.
    """
    more = ["--iterations", "8", "--set", "validate_every=4", "--set", "dropout=0.1",
            "--set", f"embeddings={tmp_path / 'embeddings'}"]  # fmt: skip
    out, rng, ended = tmp_path / "killed", np.random.default_rng(), []
    whole, command = (
        [sys.executable, "-c", "from sa_engine.cli import main; main()",
         *arguments(shards, folder, "--out", str(place), *more)]
        for place in (tmp_path / "whole", out)
    )  # fmt: skip
    assert subprocess.run(whole).returncode == 0
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGTERM):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        lines = _lines(out)
        while process.poll() is None and _lines(out) == lines:
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 1.5))
        process.send_signal(number)
        told = process.communicate()[1]
        ended.append(process.returncode)
        if number == signal.SIGTERM and process.returncode:
            assert process.returncode == 143 and "go on with:" in told
    assert subprocess.run(command).returncode == 0
    assert any(ended), "it was never stopped before its end"
    assert (
        load_file(out / "model.safetensors").keys()
        == load_file(tmp_path / "whole" / "model.safetensors").keys()
    )
    expected = load_file(tmp_path / "whole" / "model.safetensors")
    for name, value in load_file(out / "model.safetensors").items():
        assert torch.equal(value, expected[name]), name


def _lines(out: Path) -> int:
    metrics = out / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def different(key: str, height: int, width: int) -> Masks:
    """One mask on every other picture, two on the others."""
    return quarters(key, height, width)[: 1 + int(key[0]) % 2]


@pytest.mark.slow
def test_two_workers_on_ray_train_a_round(
    pictures: Path, folder: Path, tmp_path: Path, ray_address: str
) -> None:
    """Steps of two and four masks, of which one is clipped: AdamW alone would hide a wrong scale."""
    data = make_run(pictures, tmp_path / "data", different)
    chosen = (
        "batch_size=2",
        "iterations=2",
        "validation=0",
        "max_masks=2",
        "mask_only_steps=0",
        "clip_norm=230",
    )
    options = [f"--set={one}" for one in chosen]
    alone, ray = tmp_path / "alone", tmp_path / "ray"
    for out, more in ((alone, []), (ray, ["--ray-address", ray_address, "--num-workers", "2"])):
        result = invoke(*arguments(data, folder, "--out", str(out), *options, *more))
        assert result.exit_code == 0, result.output
    expected = load_file(alone / "model.safetensors")
    for name, value in load_file(ray / "model.safetensors").items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5)
