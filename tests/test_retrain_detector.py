"""The box detector over real weights, as a user runs it: from training to drawn masks."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from training import make_run, quarters, small_sam, turned_run

from sa_engine.cli import main
from sa_engine.detection.detector import Detector
from sa_engine.detection.files import load_detector
from sa_engine.detection.measure import embedder
from sa_engine.modeling.sam import load_sam
from sa_engine.modeling.weights import resolve
from sa_engine.reader import iter_records
from sa_engine.rounds import RoundError


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory, photo_files: list[Path]) -> Path:
    folder = tmp_path_factory.mktemp("real")
    for file in photo_files[:2]:
        (folder / file.name).write_bytes(file.read_bytes())
    return make_run(folder, tmp_path_factory.mktemp("runs") / "drawn", quarters)


def invoke(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(one) for one in arguments])


@pytest.fixture(scope="module")
def detector(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("detectors") / "01"
    result = invoke("retrain", "detector", "--data", drawn, "--out", out, "--iterations", 2,
                    "--batch-size", 1, "--set", "validation=0.5", "--threads-per-worker", 1)  # fmt: skip
    assert result.exit_code == 0, result.output
    return out


def test_a_detector_is_a_round(detector: Path, drawn: Path) -> None:
    info = json.loads((detector / "model.json").read_bytes())
    assert info["detector"]["backbone"] == "sam" and info["parent"]["name"] == "fresh"
    assert info["data"][0]["images"] == 1 and "ar_100" in info["metrics"]["after"]
    assert (detector / "curves.png").stat().st_size > 10_000
    assert not (detector / "_run" / "state.pt").exists()
    again = invoke("retrain", "detector", "--data", drawn, "--out", detector, "--iterations", 2,
                   "--batch-size", 1, "--set", "validation=0.5", "--threads-per-worker", 1)  # fmt: skip
    assert again.exit_code == 0 and "2 iterations" in again.output
    table = invoke("rounds", detector.parent).output
    assert "AR@100" in table and "fresh" in table and "not here" not in table


def test_prefill_draws_what_a_detector_finds(
    detector: Path, photo_files: list[Path], tmp_path: Path
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    Image.open(photo_files[1]).save(images / "coffee.png")
    out = tmp_path / "prefilled"
    result = invoke("prefill", "--images", images, "--detector", detector, "--out", out, "--local",
                    "--threads-per-worker", 1, "--set", "pred_iou_thresh=0.5", "--set", "max_boxes=20",
                    "--set", "stability_score_thresh=0.5", "--set", "box_score_thresh=0")  # fmt: skip
    assert result.exit_code == 0, result.output
    (record,) = iter_records(out)
    assert record.masks and all(0 < mask.box_score <= 1 for mask in record.masks)
    # A finished run is told from that of another detector without looking at weights.
    other = shutil.copytree(detector, tmp_path / "other")
    info = json.loads((other / "model.json").read_bytes())
    (other / "model.json").write_text(json.dumps({**info, "fingerprint": "0" * 64}))
    refused = invoke("prefill", "--images", images, "--detector", other, "--out", out, "--local",
                     "--threads-per-worker", 1, "--set", "pred_iou_thresh=0.5", "--set", "max_boxes=20",
                     "--set", "stability_score_thresh=0.5", "--set", "box_score_thresh=0")  # fmt: skip
    assert refused.exit_code == 2 and "detector" in refused.output and "0000" in refused.output
    # The same as when it is asked by hand, and its boxes are prompts.
    image = np.asarray(Image.open(images / "coffee.png").convert("RGB"))
    sam = load_sam(resolve("vit_t"))
    model, _ = load_detector(detector, sam)
    boxes, scores = Detector(model).detect(image, embedder(sam, "fp32")(image))
    far = [min(abs(scores[:20] - mask.box_score)) for mask in record.masks]
    assert max(far) < 1e-5 and len(boxes) == len(scores)


def test_a_folder_that_is_no_such_detector_is_refused(
    detector: Path, drawn: Path, tmp_path: Path
) -> None:
    prefill = ("prefill", "--images", tmp_path, "--out", tmp_path / "out", "--local", "--detector")
    (tmp_path / "photo.png").write_bytes(b"")
    result = invoke(*prefill, tmp_path / "nowhere")
    assert result.exit_code == 2 and "is not a round" in result.output
    result = invoke("auto", "--images", tmp_path, "--out", tmp_path / "out", "--local",
                    "--checkpoint", detector)  # fmt: skip
    assert result.exit_code == 2 and "is of a detector" in result.output
    with pytest.raises(RoundError, match="another image encoder"):
        load_detector(detector, small_sam())
    (detector / "copy").mkdir()
    info = json.loads((detector / "model.json").read_bytes())
    info["detector"] = None
    (detector / "copy" / "model.json").write_text(json.dumps(info))
    result = invoke(*prefill, detector / "copy")
    assert result.exit_code == 2 and "expected a detector" in result.output


def damaged(detector: Path, out: Path) -> Path:
    """A copy whose weights differ in one number from what their header and `model.json` say."""
    file = shutil.copytree(detector, out) / "model.safetensors"
    with safe_open(file, "numpy") as content:
        header = content.metadata()
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] += 1e-3
    save_file(tensors, file, header)
    return out


def test_weights_that_are_not_what_their_header_says_are_refused(
    detector: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        RoundError, match=r"model.safetensors is damaged: .* expected [0-9a-f]{12} by model.json"
    ):
        load_detector(damaged(detector, tmp_path / "changed"))
    assert load_detector(Path(shutil.copytree(detector, tmp_path / "same")))


def test_a_dry_run_of_prefill_looks_at_model_and_detector(
    detector: Path, photo_folder: Path, tmp_path: Path
) -> None:
    (bare := Path(shutil.copytree(detector, tmp_path / "bare"))).joinpath(
        "model.safetensors"
    ).unlink()
    other = Path(shutil.copytree(detector, tmp_path / "other"))
    info = json.loads((other / "model.json").read_bytes())
    info["detector"]["encoder"] = "0" * 64
    (other / "model.json").write_text(json.dumps(info))
    changed = damaged(detector, tmp_path / "changed")
    for one, reason in ((bare, "no weights that can be read"), (other, "another image encoder"),
                        (changed, "is damaged"), (detector, None)):  # fmt: skip
        result = invoke("prefill", "--images", photo_folder, "--detector", one, "--out", tmp_path / "out",
                        "--local", "--dry-run")  # fmt: skip
        assert (result.exit_code, reason is None or reason in result.stderr) == (
            2 if reason else 0,
            True,
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["status", "verify", "report", "errors", "split"])
def test_commands_for_shards_say_that_it_is_a_detector(detector: Path, command: str) -> None:
    result = invoke(command, detector, *(("--holdout", 1) if command == "split" else ()))
    assert result.exit_code == 2 and "is a round of `sa-engine retrain detector`" in result.stderr


@pytest.mark.parametrize("command", ["auto", "prefill", "ingest"])
@pytest.mark.parametrize("stage", ["retrain", "retrain detector"])
def test_a_run_into_a_rounds_folder_is_refused(
    detector: Path, photo_folder: Path, tmp_path: Path, command: str, stage: str
) -> None:
    out = Path(shutil.copytree(detector, tmp_path / "out"))
    info = json.loads((out / "_run" / "run.json").read_bytes())
    (out / "_run" / "run.json").write_text(json.dumps({**info, "stage": stage}))
    (tmp_path / "coco.json").write_text('{"images": [], "annotations": [], "categories": []}')
    more = {
        "auto": (),
        "prefill": ("--detector", detector),
        "ingest": ("--annotations", tmp_path / "coco.json"),
    }
    for dry in ((), ("--dry-run",)):
        result = invoke(
            command, "--images", photo_folder, "--out", out, "--local", *more[command], *dry
        )
        assert result.exit_code == 2 and f"is a round of `sa-engine {stage}`" in result.stderr


def test_recall_is_measured_of_a_detectors_boxes(detector: Path, drawn: Path) -> None:
    arguments = ("recall", drawn, "--detector", detector, "--proposals", "10,100")
    result = invoke(*arguments, "--boxes", "--json")
    assert result.exit_code == 0, result.output
    content = json.loads(result.output)
    (measured,) = content["runs"]
    assert measured["name"] == "01" and content["masks"]["all"] == 8
    assert 0 <= measured["average_recall"]["all"]["10"]["value"] <= 1
    assert "add --boxes" in invoke(*arguments).output
    assert "nothing to measure" in invoke("recall", drawn).output


def test_boxes_come_from_one_place(tmp_path: Path) -> None:
    arguments = ("prefill", "--images", tmp_path, "--out", tmp_path / "out")
    assert "neither of detector and boxes" in invoke(*arguments).output
    both = invoke(*arguments, "--detector", "a", "--boxes", "b.json")
    assert both.exit_code == 2 and "both of detector and boxes" in both.output


def test_a_detector_can_start_from_another(
    detector: Path, drawn: Path, photos: list[np.ndarray], tmp_path: Path
) -> None:
    run = turned_run(tmp_path, photos)
    common = ("retrain", "detector", "--data", drawn, "--iterations", 1, "--batch-size", 1,
              "--set", "validation=0.5", "--threads-per-worker", 1, "--init", detector)  # fmt: skip
    refused = invoke(*common, "--out", tmp_path / "a", "--set", "objectness=iou")
    assert refused.exit_code == 2 and "objectness = class, expected iou" in refused.output
    grown = invoke(*common, "--out", tmp_path / "b", "--gate", run, "--set", "gate_images=1")
    assert grown.exit_code == 0, grown.output
    info = json.loads((tmp_path / "b" / "model.json").read_bytes())
    parent = json.loads((detector / "model.json").read_bytes())
    assert info["parent"]["fingerprint"] == parent["fingerprint"]
    assert info["metrics"]["before"] == parent["metrics"]["after"]
    gate = info["gate"]
    assert gate["promoted"] == (gate["after"]["ar_100"] >= gate["before"]["ar_100"] - 0.01)
