"""The engine: a loop of real steps from a file, waiting for people, going on, failing, stopped and resumed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from filelock import FileLock
from PIL import Image
from pycocotools import mask as coco

from sa_engine.cli import main
from sa_engine.engine.figures import look_at
from sa_engine.engine.file import Step
from sa_engine.engine.state import stamp
from sa_engine.lock import is_live
from sa_engine.reader import iter_records
from sa_engine.rounds import Parent, RoundInfo, Verdict
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


def engine(*words: Any) -> Result:
    return CliRunner().invoke(main, ["engine", *map(str, words)])


def state(out: Path) -> dict[str, Any]:
    content = json.loads((out / "engine.json").read_text())
    assert isinstance(content, dict)
    return content


def statuses(out: Path) -> dict[str, str]:
    return {step["name"]: step["status"] for step in state(out)["steps"]}


def logs(out: Path) -> dict[str, int]:
    """How often each command was begun."""
    return {
        path.stem: path.read_text().count("$ sa-engine") for path in (out / "_engine").glob("*.log")
    }


def boxes_drawn(folder: Path, file: Path) -> Path:
    """COCO polygons: a box on each photo, by its size."""
    images: list[dict[str, Any]] = []
    for number, path in enumerate(sorted(folder.rglob("*.jpg")), 1):
        width, height = Image.open(path).size
        name = path.relative_to(folder).as_posix()
        images.append({"id": number, "file_name": name, "width": width, "height": height})
    annotations = [
        {"id": image["id"], "image_id": image["id"], "category_id": 1, "iscrowd": 0,
         "segmentation": [[5, 5, image["width"] - 9, 5, image["width"] - 9, 40, 5, 40]]}
        for image in images
    ]  # fmt: skip
    categories = [{"id": 1, "name": "object"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    file.write_text(json.dumps(content))
    return file


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


def test_a_killed_engine_is_not_running(tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "loop.yaml"
    file.write_text(f"out: {out}\nsteps:\n  - one: weights path vit_t\n  - two: weights list\n")
    assert engine("run", file).exit_code == 0
    content = state(out)
    content["state"] = content["steps"][1]["status"] = "running"  # as kill -9 leaves it
    (out / "engine.json").write_text(json.dumps(content))
    assert "out: stopped, 1 of 2 steps done" in engine("status", file).stdout
    result = engine("run", file)
    assert result.exit_code == 0 and logs(out) == {"one": 1, "two": 2}
    whole = state(out)
    steps = [{**whole["steps"][0], "report": None}, *whole["steps"][1:]]
    for text, reason in (
        ("{", "JSONDecodeError: "),
        ("[]", "TypeError: "),
        (json.dumps({**whole, "schema_version": 9}), "schema_version 9, expected 1"),
        (json.dumps({key: whole[key] for key in whole if key != "state"}), "state: Field required"),
        (json.dumps({**whole, "steps": steps}), "steps.0.report: Input should be a valid string"),
    ):
        (out / "engine.json").write_text(text)
        for command in ("run", "status"):
            result = engine(command, file)
            assert result.exit_code == 2 and reason in result.stderr, result.stderr
            assert f"{out}/engine.json: " in result.stderr
    assert "damaged (steps.0.report" in result.stderr and "remove it: the next" in result.stderr
    with FileLock(out / "_engine" / "lock"):
        result = engine("run", file)
    assert result.exit_code == 2 and "another process runs a loop" in result.stderr


HANDED_OUT = """
out: {out}
inputs:
  photos: {photos}
  drawn: {drawn}
steps:
  - round0: ingest --images {{photos}} --annotations {{drawn}} --round 0 --local
  - handout: export {{round0}} --format labelme --names released --with-images
  - to-correct: audit {{round0}} --sample 2 --format labelme
  - returned:
      wait: returned
      tell: Correct the masks in {{handout}}, and copy it to this place.
  - round1: ingest --images {{returned}} --annotations {{returned}} --prefill {{round0}} --local
"""


def test_people_may_work_in_a_hand_out(photo_folder: Path, tmp_path: Path) -> None:
    drawn = boxes_drawn(photo_folder, tmp_path / "drawn.json")
    out, file = tmp_path / "out", tmp_path / "loop.yaml"
    file.write_text(HANDED_OUT.format(out=out, photos=photo_folder, drawn=drawn))
    assert engine("run", file).exit_code == 0
    begun, said = logs(out), [step["report"] for step in state(out)["steps"]]
    corrected = out / "handout" / "sa_1.json"
    for folder in ("handout", "to-correct"):
        (out / folder / ".DS_Store").write_bytes(b"of a Mac")
        (out / folder / "returned.json").write_text("{}")
    (out / "handout" / "returned.json").unlink()
    corrected.write_text(json.dumps({**json.loads(corrected.read_text()), "shapes": []}, indent=1))
    shutil.copytree(out / "handout", out / "returned")
    # As kill -9 leaves it: the folders are whole, and the engine has not heard of it.
    content = state(out)
    content["state"] = content["steps"][2]["status"] = "running"
    (out / "engine.json").write_text(json.dumps(content))
    result = engine("run", file)
    assert result.exit_code == 0, result.output
    assert set(statuses(out).values()) == {"done"}
    assert logs(out) == {**begun, "to-correct": 2, "round1": 1}
    assert "complete, and left as it is" in result.stdout
    assert (out / "to-correct" / "returned.json").exists()
    assert [step["report"] for step in state(out)["steps"]][:2] == said[:2]
    edits = [len(record.masks) for record in iter_records(out / "round1")]
    assert sorted(edits) == [0, 1, 1, 1]
    # Other masks are another export, which must not replace what people have in hand.
    file.write_text(file.read_text().replace("--format labelme --names", "--format cvat --names"))
    result = engine("run", file)
    assert result.exit_code == 2 and 'format was "labelme", now "cvat"' in result.stderr


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


def test_stamps_follow_the_content(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    assert stamp(str(folder)) == stamp(None) == ""
    folder.mkdir()
    (folder / "model.json").write_text('{"a": 1}')
    (folder / "model.safetensors").write_bytes(b"1234")
    before = stamp(str(folder))
    shutil.copytree(folder, tmp_path / "b")
    os.utime(tmp_path / "b" / "model.json", (0, 0))
    assert stamp(str(tmp_path / "b")) == before != ""
    (folder / "model.json").write_text('{"a": 2}')
    assert stamp(str(folder)) != before


@pytest.mark.parametrize("content", [{"stages": [{"source": 1}]}, {"stages": [None]}, {}, None, 1])
def test_a_report_of_another_version_is_told_in_a_note(tmp_path: Path, content: Any) -> None:
    (tmp_path / "report.json").write_text(json.dumps(content))
    (tmp_path / "report.html").touch()
    shown = look_at(Step(name="r", kind="report", out=str(tmp_path), reads={}))
    assert f"{tmp_path.resolve()} cannot be shown: " in shown.note and not shown.table
    assert shown.page == tmp_path.resolve() / "report.html"


def test_any_folder_is_told_by_all_of_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "returned"
    (folder / "inside").mkdir(parents=True)
    assert stamp(str(folder)) == ""
    seen = []
    for number in range(150):
        (folder / f"{number}.json").write_text('{"a": 1}')
    seen.append(stamp(str(folder)))
    (folder / "3.json").write_text('{"a": 2}')  # of the same size
    os.utime(folder / "3.json", (5, 5))
    seen.append(stamp(str(folder)))
    (folder / "inside" / "b.json").write_text("1")
    seen.append(stamp(str(folder)))
    (folder / "inside" / "b.json").rename(folder / "inside" / os.fsdecode(b"\xff.json"))
    seen.append(stamp(str(folder)))
    assert len(set(seen)) == 4 and "" not in seen
    assert stamp(str(folder), folder / "inside") == seen[1]


def test_what_a_command_line_names_is_looked_at_too(photo_folder: Path, tmp_path: Path) -> None:
    given, file, out = tmp_path / "given", tmp_path / "loop.yaml", photo_folder / "engine"
    given.mkdir()
    drawn = boxes_drawn(photo_folder, given / "drawn.json")
    ingest = ["ingest", f"--images={photo_folder}", f"--annotations={drawn}", "--local"]
    for name in ("before", "after"):
        more = [f"--out={tmp_path / name}", f"--round={len(name)}"]
        assert CliRunner().invoke(main, [*ingest, *more]).exit_code == 0
    shutil.copytree(tmp_path / "before", tmp_path / "run")
    file.write_text(f"""
out: {out}
inputs: {{photos: {photo_folder}, run: {tmp_path}/run}}
steps:
  - round0: ingest --images {{photos}} --annotations {given} --local
  - handout: export {{run}} --format labelme
  - report: report {{run}} {{round0}}
  - round1: ingest --images {{photos}} --annotations={{handout}} --local
""")
    assert engine("run", file).exit_code == 0

    def open_steps() -> list[str]:
        told = engine("run", file, "--dry-run").stdout.splitlines()
        steps = [line.split(": ") for line in told if line.endswith((": complete", ": run"))]
        return [name for name, does in steps if does == "run"]

    def asked_from(name: str) -> bool:
        """Whether this is the first step that is asked; those after it wait for it."""
        return open_steps()[:1] == [name]

    assert open_steps() == [], "the engine's own files are among the photos, and do not count"
    photo = next(photo_folder.rglob("*.jpg"))
    before = photo.stat().st_mtime_ns
    os.utime(photo)
    assert asked_from("round0")
    os.utime(photo, ns=(before, before))
    boxes_drawn(photo_folder, given / "more.json")
    assert asked_from("round0")
    (given / "more.json").unlink()
    assert open_steps() == []
    shutil.rmtree(tmp_path / "run")
    shutil.copytree(tmp_path / "after", tmp_path / "run")
    assert asked_from("handout")
    shutil.rmtree(tmp_path / "run")
    shutil.copytree(tmp_path / "before", tmp_path / "run")
    assert open_steps() == [], "a copy of a run is the same run"
    os.utime(next((out / "handout").rglob("*.json")))  # as if somebody had corrected a mask
    assert open_steps() == ["round1"], "what reads the hand-out, and not what wrote it"


def test_a_round_that_the_gate_refused_is_told(photo_folder: Path, tmp_path: Path) -> None:
    """Its `model.json` lies where a quick step writes, as no quick training is sure to be refused."""
    drawn, run = boxes_drawn(photo_folder, tmp_path / "drawn.json"), tmp_path / "run"
    ingest = ["ingest", f"--images={photo_folder}", f"--annotations={drawn}", f"--out={run}"]
    assert CliRunner().invoke(main, [*ingest, "--local"]).exit_code == 0
    verdict = Verdict(promoted=False, reason="mIoU fell <a lot>", before={}, after={}, margins={})
    parent = Parent(name="vit_t", fingerprint="0", sha256="1")
    info = RoundInfo(architecture="vit_t", decoder_depth=2, fingerprint="2", parent=parent, data=(),
                     config={}, iterations=1, seconds=1.0, metrics={}, gate=verdict)  # fmt: skip
    out, file = tmp_path / "out", tmp_path / "loop.yaml"
    (out / "rounds" / "01").mkdir(parents=True)
    (out / "rounds" / "01" / "model.json").write_text(json.dumps(asdict(info)))
    steps = f"out: {out}\nsteps:\n  - rounds/01: report {run}\n"
    file.write_text(steps)
    first = engine("run", file)
    assert first.exit_code == 0 and statuses(out) == {"rounds/01": "done"}, first.output
    assert "mIoU fell <a lot>. No later step of the loop reads it." in first.stdout
    file.write_text(f"{steps}  - listed: rounds {{rounds/01}}\n")
    result = engine("run", file)
    assert result.exit_code == 0 and "finished, 2 of 2 steps done" in result.stdout, result.output
    for told in (result.stdout, engine("status", file).stdout):
        (line,) = [line for line in told.splitlines() if line.startswith("rounds/01  ")]
        assert " REFUSED " in line and "the gate refused this round: mIoU fell <a lot>" in line
    assert (
        "The gate refused rounds/01: mIoU fell <a lot>. The loop goes on with it" in result.stdout
    )
    assert f"in listed: to use the earlier model there, name that in {file}" in result.stdout
    seen = (out / "index.html").read_text()
    assert "<b>To do: the gate refused rounds/01</b><br>mIoU fell &lt;a lot&gt;. The" in seen
    assert 'class="dot refused"' in seen


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
