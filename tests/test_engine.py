"""The engine: a loop of real steps from a file, waiting for people, going on, failing, stopped and resumed."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from looping import boxes_drawn, engine, logs, state, statuses
from pycocotools import mask as coco

from sa_engine.cli import main
from sa_engine.lock import is_live
from sa_engine.reader import iter_records
from sa_engine.storage import RunPaths

LOOP = """
out: {out}
inputs:
  photos: {photos}
  drawn: {drawn}
steps:
  - round0: ingest --images {{photos}} --annotations {{drawn}} --round 0 --local
  - held-out: split {{round0}} --holdout 1
  - handout: sa-engine export {{round0}} --format coco-rle --names released --with-images
  - returned:
      wait: returned.json
      tell: Look through the masks in {{handout}}.
  - round1: >
      ingest --images {{handout}}/images --annotations {{returned}} --prefill {{round0}}
      --round 1 --local
  - all/report: report {{round0}} {{round1}}
"""


def come_back(handout: Path, file: Path) -> None:
    """The annotator adds a mask to every photo."""
    content = json.loads((handout / "annotations.json").read_text())
    for image in content["images"]:
        added = coco.frPyObjects([[0, 42, 30, 42, 30, 60, 0, 60]], image["height"], image["width"])
        rle = {"size": added[0]["size"], "counts": added[0]["counts"].decode()}
        content["annotations"].append({"id": 900_000 + image["id"], "image_id": image["id"],
                                       "category_id": 1, "iscrowd": 0, "segmentation": rle})  # fmt: skip
    file.write_text(json.dumps(content))


@pytest.fixture
def loop(photo_folder: Path, tmp_path: Path) -> Path:
    drawn = boxes_drawn(photo_folder, tmp_path / "drawn.json")
    file = tmp_path / "loop.yaml"
    file.write_text(LOOP.format(out=tmp_path / "loop out", photos=photo_folder, drawn=drawn))
    return file


def test_the_loop_waits_goes_on_and_is_not_done_twice(loop: Path, tmp_path: Path) -> None:
    out = tmp_path / "loop out"
    result = engine("run", loop)
    assert result.exit_code == 0, result.output
    assert f"Look through the masks in {out}/handout." in result.stdout
    assert list(statuses(out).values()) == ["done", "done", "done", "waiting", "open", "open"]
    assert state(out)["state"] == "waiting"
    assert not (out / "round1").exists()
    # Every command is one that a user could type: the shell's own quotes around the space.
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("[handout] ")]
    assert line.endswith(f"--with-images --out '{out}/handout'")
    begun = logs(out)
    again = engine("run", loop)
    assert again.exit_code == 0 and logs(out) == begun, again.output
    assert again.stdout.count(": complete\n") == 3

    come_back(out / "handout", out / "returned.json")
    result = engine("run", loop)
    assert result.exit_code == 0, result.output
    assert set(statuses(out).values()) == {"done"} and state(out)["state"] == "finished"
    masks = [mask for record in iter_records(out / "round1") for mask in record.masks]
    assert sorted(str(mask.edit_status) for mask in masks) == ["added"] * 4 + ["kept"] * 4
    assert {mask.round for mask in masks} == {1}
    report = json.loads((out / "all" / "report" / "report.json").read_text())
    assert [row["masks"] for row in report["stages"]] == [4, 8]
    seen = (out / "index.html").read_text()
    assert "finished: 6 of 6 steps done" in seen and "astronaut: 1 mask<" in seen
    assert seen.count("data:image/jpeg;base64,") == 8 and ">2.0 <" in seen
    assert 'href="all/report/report.html"' in seen and "s/mask median" in seen

    begun, worked = logs(out), [step["seconds"] for step in state(out)["steps"]]
    assert engine("run", loop).stdout.count(": complete\n") == 5 and logs(out) == begun
    told = engine("status", loop).stdout
    assert "finished, 6 of 6 steps done" in told and "4 images: 4 ok" in told

    # What is changed is made again, and what was made of it; its equal, not.
    moved = tmp_path / "moved"
    shutil.copytree(out / "round0", moved)
    shutil.rmtree(out / "round0")
    shutil.move(moved, out / "round0")
    other = out / "all" / "report" / "report.json"
    other.write_text('{"stages": [{"source": "manual"}]}')  # as an older version may have left it
    result = engine("run", loop)
    assert result.exit_code == 0, result.output
    assert logs(out) == {**begun, "all-report": 2} and json.loads(other.read_text()) == report
    assert [step["seconds"] for step in state(out)["steps"]][:5] == worked[:5]


def test_a_failing_step_ends_the_loop_with_its_exit_code(loop: Path, tmp_path: Path) -> None:
    out, text = tmp_path / "loop out", loop.read_text()
    for path in (tmp_path / "photos").rglob("coffee.jpg"):
        path.write_bytes(path.read_bytes()[:2000])
    result = engine("run", loop)
    assert result.exit_code == 3, result.output
    assert "step round0 failed with exit code 3" in result.stderr
    assert "1 of 4 images failed" in result.stderr and f"engine run {loop}" in result.stderr
    assert statuses(out)["round0"] == "failed" and statuses(out)["held-out"] == "open"
    assert "1 of 4 images failed" in state(out)["steps"][0]["error"]
    assert "1 of 4 images failed" in (out / "index.html").read_text()
    # Other options for what is there: the stage refuses, and the engine does not know better.
    loop.write_text(text.replace("--round 0", "--round 5"))
    result = engine("run", loop)
    assert result.exit_code == 2 and "round was 0" in result.stderr, result.output
    loop.write_text(text.replace("--round 0", "--round 0 --max-failed 0.5"))
    result = engine("run", loop)
    assert result.exit_code == 0 and statuses(out)["handout"] == "done", result.output


START = """
import sys; sys.argv[0] = "sa-engine"; from sa_engine.cli import main; main()
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_step_and_the_loop_goes_on(
    photo_folder: Path, tmp_path: Path, signum: int
) -> None:
    out, file = tmp_path / "out", tmp_path / "loop.yaml"
    file.write_text(
        f"out: {out}\nsteps:\n"
        f"  - weights: weights path vit_t\n"
        f"  - masks: auto --images {photo_folder} --local --threads-per-worker 1 "
        f"--set points_per_side=4 --set crop_n_layers=0\n"
    )
    command = [sys.executable, "-c", START, "engine", "run", str(file)]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    paths = RunPaths(out / "masks")
    while not paths.info.exists() and run.poll() is None:
        time.sleep(0.05)
    run.send_signal(signum)
    stdout, stderr = run.communicate(timeout=300)
    assert run.returncode == 128 + signum, stdout + stderr
    assert "stopped in step masks; the same `sa-engine engine run" in stderr
    assert "Traceback" not in stderr and "resume with: sa-engine auto" in stderr
    assert statuses(out) == {"weights": "done", "masks": "stopped"}
    assert state(out)["state"] == "stopped"
    assert not is_live(paths)
    if signum == signal.SIGINT:
        return
    result = engine("run", file)
    assert result.exit_code == 0 and "weights: complete" in result.stdout, result.output
    assert statuses(out) == {"weights": "done", "masks": "done"}
    assert len(list(iter_records(out / "masks"))) == 4


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(loop: Path, tmp_path: Path) -> None:
    result = engine("run", loop, "--dry-run")
    assert result.exit_code == 0, result.output
    out = tmp_path / "loop out"
    assert not out.exists()
    assert "round0: run\n" in result.stdout and "not there yet" in result.stdout
    assert f"report '{out}/round0' '{out}/round1' --out '{out}/all/report'" in result.stdout


ONE = "out: o\nsteps:\n  - "


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is empty: expected `out:` and `steps:`"),
        ("out: [", "not valid YAML"),
        ("out: o\nstep: []", "unknown key 'step': expected out, inputs, steps"),
        ("out: o", "has no `steps:`"),
        ("out: s3://bucket/o\nsteps: [a: weights list]", "expected a folder on this machine"),
        ("out: o\nsteps: {a: b}", "expected a list of `- name: command`"),
        ("out: o\nsteps: [auto]", "step 1 is 'auto': expected `- name: command`"),
        ("out: o\ninputs: [p]\nsteps: [a: weights list]", "expected lines of `name: path`"),
        (ONE + "a: [auto]", "step a: is ['auto']: expected a command line"),
        (ONE + "a: autoo --images p", "there is no command 'autoo' for a step: did you mean auto?"),
        (ONE + "a: engine run x.yaml", "there is no command 'engine' for a step"),
        (ONE + "a: retrain detector --dat x", "No such option '--dat'"),
        (ONE + "a: retrain detecter", "Got unexpected extra argument (detecter)"),
        (ONE + "a: weights", "'' for a step after weights: expected one of list, pull, path"),
        (ONE + "a: auto --imagse p", "No such option '--imagse'"),
        (ONE + "a: export", "step a: Missing"),
        (ONE + "a: ingest --round one", "step a: Invalid value for '--round'"),
        (ONE + "a: retrain --data d --overwrite", "--overwrite in a step: it would be given again"),
        (ONE + "a: auto --help", "asks for help only"),
        (ONE + "a: auto -h", "asks for help only"),
        (ONE + "a: auto --images 'p", "is no command line: No closing quotation"),
        (ONE + "a: 'auto --images {photo}'", "{photo} is neither an input nor a step before"),
        (ONE + "a: 'show {b}'\n  - b: auto --images p", "{b} is no step before this one"),
        (ONE + "a: weights list\n  - b: 'show {a}'", "{a} writes no folder of its own"),
        (ONE + "round: auto --images p\n  - b: 'show {roud}'", "did you mean {round}?"),
        (ONE + "a: weights list\n  - a: weights list", "the name a is there twice"),
        (ONE + "a/b: auto --images p\n  - a: auto --images p", "into the other's folder"),
        (ONE + "../a: auto --images p", "step '../a': expected a name"),
        (ONE + "_engine: auto --images p", "step '_engine': expected a name"),
        (ONE + "a: {wait: x}", "tell is empty: expected `wait:` with a file"),
        (ONE + "a: {wait: x, tell: y, for: z}", "unknown key 'for': expected wait, tell"),
    ],
)
def test_what_is_wrong_in_the_file_is_told(tmp_path: Path, text: str, reason: str) -> None:
    file = tmp_path / "loop.yaml"
    file.write_text(text)
    result = CliRunner().invoke(main, ["engine", "run", str(file)])
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit), result.output
    assert reason in " ".join(result.stderr.split()) and str(file) in result.stderr
    assert not (tmp_path / "o").exists() and not Path("o").exists()
    missing = engine("run", tmp_path / "none.yaml")
    assert missing.exit_code == 2 and "none.yaml: cannot be read: No such file" in missing.stderr


def test_a_step_may_have_its_own_place_and_options_that_look_like_it(tmp_path: Path) -> None:
    file = tmp_path / "loop.yaml"
    file.write_text(
        f"out: {tmp_path}/out\nsteps:\n  - a: auto --images p --out={tmp_path}/b\n  - c: show {{a}}\n"
    )
    told = engine("run", file, "--dry-run").stdout
    assert f"auto --images p --out={tmp_path}/b\n" in told and f"show {tmp_path}/b --out" in told


@pytest.mark.parametrize("name", ["configs/engine.yaml", "docs/demo/engine.yaml"])
def test_the_loops_that_are_here_can_be_read(name: str) -> None:
    """All of their commands are known, with their flags; the paper's order is in both."""
    result = engine("run", Path(__file__).parents[1] / name, "--dry-run")
    assert result.exit_code == 0, result.output
    commands = [line.split()[1] for line in result.stdout.splitlines() if line.startswith("  sa-")]
    stages = [
        one for one in commands if one in ("blur", "ingest", "retrain", "prefill", "auto", "report")
    ]
    assert stages == [
        "blur",
        "ingest",
        "retrain",
        "retrain",
        "prefill",
        "ingest",
        "retrain",
        "auto",
        "report",
    ]
    assert "retrain detector --data" in result.stdout and "--detector" in result.stdout


def test_a_damaged_output_is_told_on_the_page(loop: Path, tmp_path: Path) -> None:
    out = tmp_path / "loop out"
    loop.write_text(loop.read_text().partition("  - held-out")[0])
    assert engine("run", loop).exit_code == 0
    assert "4 images: 4 ok" in (out / "index.html").read_text()
    (marker, *_) = (out / "round0").glob("sa_*.json")
    marker.write_text("{}")
    result = engine("run", loop)  # the stage does not like it either
    assert result.exit_code != 0 and statuses(out) == {"round0": "failed"}
    assert "round0 cannot be shown: " in (out / "index.html").read_text()
