"""What a loop knows of its steps: what has changed since, what was killed, what people hold, what a gate refused."""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from filelock import FileLock
from looping import boxes_drawn, engine, logs, state, statuses

from sa_engine.cli import main
from sa_engine.engine.figures import look_at
from sa_engine.engine.file import Step
from sa_engine.engine.state import stamp
from sa_engine.reader import iter_records
from sa_engine.rounds import Parent, RoundInfo, Verdict


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
