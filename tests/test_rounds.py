"""Rounds: written and read back, used as checkpoints, and put in order."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from sa_engine.cli import main
from sa_engine.lineage import lineage, natural
from sa_engine.modeling import weights
from sa_engine.modeling.sam import Sam, build_sam, load_sam, model_fingerprint
from sa_engine.modeling.weights import find, resolve, size_of
from sa_engine.rounds import (
    Parent,
    RoundError,
    RoundInfo,
    TrainingData,
    Verdict,
    model_facts,
    notes,
    read_round,
    write_model,
)

REFUSED = Verdict(
    promoted=False, reason="box mIoU fell", before={}, after={}, margins={"miou": 0.01}
)
DATA = TrainingData(
    run="/runs/a", name="a", fingerprint="f" * 64, images=1200, masks=3, left_out={"crowd": 1}
)


@pytest.fixture(scope="module")
def sam() -> Sam:
    return build_sam("vit_t")


@pytest.fixture(scope="module")
def info(sam: Sam) -> RoundInfo:
    parent = Parent(name="vit_t", fingerprint="0" * 64, sha256="1" * 64, notes=("as it was",))
    metrics = {"before": {"miou_1pt": 0.5, "images": 4}, "after": {"miou_1pt": 0.625}}
    return RoundInfo(
        **model_facts(sam), parent=parent, data=(DATA, DATA), config={"lr": 8e-4, "steps": None},
        iterations=90_000, seconds=90.0, metrics=metrics, gate=REFUSED,
    )  # fmt: skip


@pytest.fixture(scope="module")
def written(sam: Sam, info: RoundInfo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rounds") / "01"
    write_model(out, sam, info)
    return out


@pytest.fixture
def round_01(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "rounds" / "01"))


def describe(folder: Path, info: RoundInfo, name: str, **changes: Any) -> None:
    """A round's `model.json` alone: all that its place among others depends on."""
    from dataclasses import asdict

    (folder / name).mkdir(parents=True)
    (folder / name / "model.json").write_text(json.dumps(asdict(replace(info, **changes))))


def grown(name: str, fingerprint: str) -> Parent:
    return Parent(name=name, fingerprint=fingerprint * 64, sha256="")


def rounds(*arguments: Any) -> Result:
    return CliRunner().invoke(main, ["rounds", *map(str, arguments)])


def test_a_round_is_read_back(written: Path, sam: Sam, info: RoundInfo) -> None:
    assert sorted(path.name for path in written.iterdir()) == ["model.json", "model.safetensors"]
    assert read_round(written) == info
    loaded = load_sam(resolve(str(written)))
    assert model_fingerprint(loaded) == info.fingerprint == model_fingerprint(sam)
    assert (info.architecture, info.decoder_depth) == ("vit_t", 2)
    assert info.validation() == (0.5, 0.625)


def test_a_round_is_a_checkpoint(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written / "model.safetensors"
    assert resolve(str(written)) == find(str(written)) == resolve(str(file)) == file
    assert size_of(str(written)) == file.stat().st_size > 40_000_000
    monkeypatch.chdir(written.parent)
    assert resolve("01") == Path("01/model.safetensors")
    (told,) = notes("01")
    assert told == "the gate refused the round 01: box mIoU fell"
    assert notes(str(file)) == notes("vit_t") == notes("missing") == []


def test_auto_takes_a_round_and_tells_that_it_was_refused(
    written: Path, photo_folder: Path, tmp_path: Path
) -> None:
    arguments = ["auto", f"--images={photo_folder}", f"--out={tmp_path / 'out'}", "--dry-run"]
    result = CliRunner().invoke(main, [*arguments, f"--checkpoint={written}"])
    assert result.exit_code == 0, result.output
    assert f"Note: the gate refused the round {written}: box mIoU fell" in result.stderr
    assert CliRunner().invoke(main, arguments).stderr == ""


def test_a_folder_that_is_no_round_is_told(round_01: Path) -> None:
    (round_01.parent / "empty").mkdir()
    with pytest.raises(weights.WeightsError, match="without model.safetensors; expected a file, a"):
        resolve(str(round_01.parent / "empty"))
    (round_01 / "model.json").unlink()  # training that did not come to its end
    with pytest.raises(RoundError, match="not a round: there is no model.json in it. A round is a"):
        resolve(str(round_01))
    assert resolve(str(round_01 / "model.safetensors")).is_file()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "damaged, it is not JSON"),
        (b"\xff\x00", "damaged, it is not JSON"),
        (b"[]", "schema_version none, expected 1"),
        (b'{"model_type": "sam"}', "schema_version none, expected 1: it is of another program"),
        ({"schema_version": 2}, "schema_version 2, expected 1"),
        ({"parent": "vit_t"}, "parent: Input should be an object; found \"vit_t\""),
        ({"iterations": "many"}, "iterations: Input should be a valid integer; found \"many\""),
        ({"seconds": None}, "seconds: Input should be a valid number; found null"),
        ({"data": [{"run": "a"}]}, "data.0.name: Field required"),
        ({"gate": {}}, "gate.promoted: Field required; found {}"),
    ],
)  # fmt: skip
def test_damaged_descriptions_are_told(
    content: bytes | dict[str, Any], words: str, round_01: Path
) -> None:
    file = round_01 / "model.json"
    if isinstance(content, dict):
        content = json.dumps({**json.loads(file.read_bytes()), **content}).encode()
    file.write_bytes(content)
    with pytest.raises(RoundError) as caught:
        resolve(str(round_01))
    assert words in str(caught.value) and str(file) in str(caught.value)


def test_weights_that_are_not_the_rounds_own_are_told(round_01: Path) -> None:
    file = round_01 / "model.safetensors"
    content = json.loads((round_01 / "model.json").read_bytes())
    (round_01 / "model.json").write_text(json.dumps({**content, "fingerprint": "a" * 64}))
    with pytest.raises(RoundError, match=f"{content['fingerprint'][:12]}, expected {'a' * 12}"):
        resolve(str(round_01))
    (round_01 / "model.json").write_text(json.dumps(content))
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(RoundError, match="has no weights that can be read"):
        resolve(str(round_01))
    file.unlink()
    with pytest.raises(RoundError, match="has no weights that can be read"):
        find(str(round_01))


def test_what_is_not_finite_does_not_cost_the_model(
    sam: Sam, info: RoundInfo, tmp_path: Path
) -> None:
    metrics = {"before": {"miou_1pt": float("nan")}, "loss": [np.float32(0.5), torch.tensor(2)]}
    write_model(tmp_path, sam, replace(info, metrics=metrics, gate=None))
    found = read_round(tmp_path)
    assert found.metrics == {"before": {"miou_1pt": None}, "loss": [0.5, 2]}
    assert found.validation() is None


def test_a_round_appears_whole_or_not_at_all(
    round_01: Path, sam: Sam, info: RoundInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (round_01 / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="another model"):
        write_model(round_01, sam, replace(info, decoder_depth=3))
    file = round_01 / "in the way"
    file.touch()
    with pytest.raises(RoundError, match="cannot write the round .*name a folder that can be"):
        write_model(file, sam, info)
    with monkeypatch.context() as killed:  # between the two files
        killed.setattr("sa_engine.rounds.atomic_write", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_model(round_01, sam, info)
    assert sorted(p.name for p in round_01.iterdir()) == ["in the way", "model.safetensors"]
    write_model(round_01, sam, info)
    assert (round_01 / "model.safetensors").read_bytes() == before
    assert read_round(round_01) == info


def test_names_sort_naturally() -> None:
    names = ["10", "2", "01", "round10/b", "round2/b", "1a", "ⅷ", "x²", "", "٣"]
    assert sorted(["10", "9", "01", "1"], key=natural) == ["01", "1", "9", "10"]
    assert sorted(names, key=natural)[1:4] == ["01", "1a", "2"]
    assert natural("round10/b") > natural("round2/b")


def test_a_parent_comes_before_its_children(info: RoundInfo, tmp_path: Path) -> None:
    def add(name: str, own: str, parent: Parent) -> None:
        describe(tmp_path, info, name, fingerprint=own * 64, parent=parent)

    add("10", "a", grown("vit_t", "v"))
    add("9", "b", grown(str(tmp_path / "10"), "a"))
    add("2", "c", grown("rounds/9/model.safetensors", "b"))
    add("11", "d", grown("10", "a"))
    add("other/1", "e", grown("vit_t", "v"))
    found = lineage(tmp_path)
    assert [(one.name, one.parent) for one in found.rounds] == [
        ("10", None), ("9", "10"), ("2", "9"), ("11", "10"), ("other/1", None),
    ]  # fmt: skip
    assert found.notes == ()
    assert [one.name for one in lineage(tmp_path / "9").rounds] == ["9"]


def test_orphans_and_twins_are_told(info: RoundInfo, tmp_path: Path) -> None:
    def add(name: str, own: str, parent: Parent) -> None:
        describe(tmp_path, info, name, fingerprint=own * 64, parent=parent)

    add("01", "a", grown("vit_t", "v"))
    add("02", "b", grown("rounds/01", "x"))  # 01 was trained again since
    add("03", "c", grown("gone.pt", "y"))
    add("04", "a", grown("vit_t", "v"))  # as 01
    add("05", "d", grown("rounds/04", "a"))
    add("06", "d", grown("rounds/05", "d"))  # nothing was learned
    add("07", "e", grown("08", "f"))
    add("08", "f", grown("07", "e"))  # nonsense, but no endless loop
    (tmp_path / "09").mkdir()
    (tmp_path / "09" / "model.json").write_text("{}")
    found = lineage(tmp_path)
    parents = {one.name: one.parent for one in found.rounds}
    assert parents == {"01": None, "02": None, "03": None, "04": None, "05": "04", "06": "05",
                       "07": "08", "08": "07"}  # fmt: skip
    told = "\n".join(found.notes)
    assert f"{tmp_path / '09' / 'model.json'}: schema_version none" in told
    assert "01 and 04 have the same weights\n05 and 06 have the same weights" in told
    assert (
        "02 started from rounds/01 when that had other weights (fingerprint xxxxxxxxxxxx)" in told
    )
    assert "03 started from gone.pt, which is not here any more" in told
    assert len(found.notes) == 5


def test_the_command_gives_a_table(written: Path, info: RoundInfo, tmp_path: Path) -> None:
    shutil.copytree(written, tmp_path / "01")
    (tmp_path / "01" / "_run").mkdir()
    (tmp_path / "01" / "_run" / "model.json").write_text("not ours")
    promoted = replace(REFUSED, promoted=True, before={"miou_1pt": 0.6}, after={"miou_1pt": 0.5})
    parent = Parent(name=str(tmp_path / "01"), fingerprint=info.fingerprint, sha256="")
    describe(tmp_path, info, "02", fingerprint="b" * 64, decoder_depth=3, parent=parent,
             metrics={}, gate=promoted)  # fmt: skip
    describe(tmp_path, info, "03", fingerprint="c" * 64, metrics={}, gate=None)
    result = rounds(tmp_path)
    assert result.exit_code == 0 and result.stderr == ""
    lines = [line.split("  ") for line in result.stdout.splitlines()]
    table = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert table == [
        ["round", "parent", "model", "images", "masks", "iterations", "minutes", "measure",
         "before", "after", "gain", "gate"],
        ["01", "vit_t", "vit_t", "2,400", "6", "90,000", "1.5", "1 point", "0.500", "0.625", "+0.125", "refused"],
        ["02", "01", "vit_t (3 decoder layers)", "2,400", "6", "90,000", "1.5", "1 point", "0.600",
         "0.500", "-0.100", "promoted"],
        ["03", "vit_t", "vit_t", "2,400", "6", "90,000", "1.5", "1 point", "-", "-", "-", "-"],
        [],
        ["01 refused: box mIoU fell"],
    ]  # fmt: skip
    content = json.loads(rounds(tmp_path, "--json").stdout)
    assert [one["parent_round"] for one in content["rounds"]] == [None, "01", None]
    assert content["rounds"][0]["data"][0]["left_out"] == {"crowd": 1}


def test_a_folder_without_rounds_is_told(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        result = rounds(folder)
        assert result.exit_code == 2
        assert (
            f"{folder} has no rounds: expected folders in it with model.safetensors"
            in result.stderr
        )
    (tmp_path / "model.json").write_text("{")
    assert "damaged, it is not JSON" in rounds(tmp_path).stderr
