"""Which photo an annotation file means: by the id in its name, and by the bytes that its tool has stored."""

import base64
import hashlib
import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner
from skimage import data
from test_format_labelme import file_of, image_of, shape

from sa_engine.cli import main
from sa_engine.config import IngestConfig
from sa_engine.formats import labelme
from sa_engine.formats.matching import match_images
from sa_engine.formats.model import AnnotatedImage, FormatError
from sa_engine.reader import iter_records
from sa_engine.remote import RemotePath
from stages.ingest import IngestStage, hash_photos


def annotated(name: str, sha256: str | None = None) -> AnnotatedImage:
    return AnnotatedImage(
        name=name, width=None, height=None, annotations=(), source="export", sha256=sha256
    )


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("sa_12.jpg", "a/sa_000012__harbour.jpg"),
        ("3fa2bc91-sa_012__port.png", "a/sa_000012__harbour.jpg"),
        ("x/sa_0.jpg", "sa_000.jpg"),
        ("sa_7__b.jpg", "sa_7__b.jpg"),  # the whole name, though another photo has its id
        ("sa_12_13.jpg", None),
        ("usa_12.jpg", None),
        ("sa_12b.jpg", None),
        ("sa_1.jpg", None),
    ],
)
def test_an_id_decides_whatever_else_has_changed(name: str, key: str | None) -> None:
    keys = ["a/sa_000012__harbour.jpg", "sa_000.jpg", "b/sa_7__a.jpg", "sa_7__b.jpg", "c/port.png"]
    image = annotated(name)
    assert match_images([image], keys, allow_unmatched=True) == ({key: image} if key else {})


def test_an_id_that_two_photos_carry_is_refused() -> None:
    with pytest.raises(FormatError, match=r"sa_7\.jpg may be a/sa_07\.jpg or sa_7__x\.png"):
        match_images([annotated("sa_7.jpg")], ["a/sa_07.jpg", "sa_7__x.png"], allow_unmatched=True)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("/data/local-files/?d=images/a/x%201.jpg", "a/x 1.jpg"),
        ("images/b/x 1.jpg", "b/x 1.jpg"),
        ("images/x 1.jpg", "x 1.jpg"),  # ends with the whole of it
        ("q/b/c/x 1.jpg", "b/c/x 1.jpg"),
        ("c/x 1.jpg", "b/c/x 1.jpg"),
        ("d/c/y.jpg", "c/y.jpg"),
    ],
)
def test_folders_tell_photos_of_one_name_apart(name: str, key: str) -> None:
    keys = ["a/x 1.jpg", "b/x 1.jpg", "b/c/x 1.jpg", "x 1.jpg", "b/y.jpg", "c/y.jpg"]
    image = annotated(name)
    assert match_images([image], keys, allow_unmatched=True) == {key: image}
    with pytest.raises(FormatError, match=r"may be b/y\.jpg or c/y\.jpg"):
        match_images([annotated("images/y.jpg")], keys, allow_unmatched=True)


def test_a_picture_lies_by_its_labelme_file() -> None:
    for path, name in (
        ("x.jpg", "/t/a/x.jpg"),
        ("../images/x.jpg", "/t/images/x.jpg"),
        ("..\\b\\x.jpg", "/t/b/x.jpg"),
        ("/else/x.jpg", "/else/x.jpg"),
    ):
        (image,) = labelme.read(file_of(imagePath=path), "/t/a/x.json").images
        assert image.name == name


def test_bytes_decide_before_the_stem_and_only_free_photos_are_read() -> None:
    asked: list[str] = []

    def hash_photos(keys: Sequence[str]) -> list[str | None]:
        asked.extend(keys)
        return [{"old.jpg": "11", "new.jpg": "22", "gone.jpg": None}[key] for key in keys]

    keys = ["named.jpg", "old.jpg", "new.jpg", "gone.jpg"]
    named, moved = annotated("named.jpg", "22"), annotated("old.png", "22")
    found = match_images([moved, named], keys, True, hash_photos)
    assert found == {"new.jpg": moved, "named.jpg": named}
    assert asked == ["old.jpg", "new.jpg", "gone.jpg"]
    asked.clear()
    by_stem = annotated("old.png")
    assert match_images([named, by_stem], keys, True, hash_photos) == {
        "named.jpg": named,
        "old.jpg": by_stem,
    }
    assert not asked
    other = annotated("old.png", "33")  # encoded anew by its tool
    assert match_images([named, other], keys, True, hash_photos)["old.jpg"] is other
    with pytest.raises(FormatError, match=r"x\.jpg may be a\.jpg or b\.jpg"):
        match_images([annotated("x.jpg", "1")], ["a.jpg", "b.jpg"], True, lambda keys: ["1"] * 2)


def test_damaged_image_data_has_no_sha256() -> None:
    stored = base64.b64encode(b"picture").decode()
    found = [image_of(file_of(imageData=d)).sha256 for d in (stored, None, "", "a", "ä!", 5)]
    assert found == [hashlib.sha256(b"picture").hexdigest(), *[None] * 5]


@pytest.fixture
def labelled(tmp_path: Path) -> tuple[Path, Path]:
    """Two photos and their labelme files: one photo was renamed since, the other not."""
    photos, made = tmp_path / "photos", tmp_path / "made"
    photos.mkdir()
    made.mkdir()
    pictures = Path(data.__file__).parent
    for source, key in (("coffee.png", "renamed.png"), ("camera.png", "kept.png")):
        content = (pictures / source).read_bytes()
        (photos / key).write_bytes(content)
        name = "kept.png" if key == "kept.png" else source
        size = (512, 512) if key == "kept.png" else (400, 600)
        (made / f"{source}.json").write_text(
            json.dumps(
                file_of(
                    shape("polygon", (10, 10), (50, 10), (50, 50)),
                    size=size,
                    imagePath=name,
                    imageData=base64.b64encode(content).decode(),
                )
            )
        )
    return photos, made


def test_a_labelme_file_finds_its_renamed_photo(
    tmp_path: Path, labelled: tuple[Path, Path]
) -> None:
    photos, made = labelled
    command = ["ingest", f"--images={photos}", f"--annotations={made}", "--local"]
    result = CliRunner().invoke(main, [*command, f"--out={tmp_path / 'out'}"])
    assert result.exit_code == 0, result.output
    found = {str(record.source_path): record.width for record in iter_records(tmp_path / "out")}
    assert found == {"renamed.png": 600, "kept.png": 512}


def test_workers_read_no_photo_again_to_find_it(
    tmp_path: Path, labelled: tuple[Path, Path]
) -> None:
    photos, made = labelled
    config = IngestConfig(images=str(photos), annotations=str(made), out=str(tmp_path / "out"))
    stage = IngestStage()
    stage.identity(config)
    assert list(stage.hashes) == ["renamed.png"], "the other is found by its name"
    (photos / "renamed.png").write_bytes(b"other bytes")
    sent = pickle.loads(pickle.dumps(stage))
    assert sent.parsed is None
    assert sent.make_worker(config).matched.keys() == {"kept.png", "renamed.png"}


def test_photos_in_a_store_are_read_for_their_bytes(
    s3: Callable[[str], str], tmp_path: Path
) -> None:
    photos = RemotePath(s3("by-bytes"))
    (photos / "a" / "x.png").put(b"picture")
    expected = hashlib.sha256(b"picture").hexdigest()
    assert hash_photos(photos, ["a/x.png", "gone.png"]) == [expected, None]
    (tmp_path / "x.png").write_bytes(b"picture")
    (tmp_path / "folder.png").mkdir()
    keys = ["x.png", "folder.png", "gone.png"]
    assert hash_photos(tmp_path, keys) == [expected, None, None]
