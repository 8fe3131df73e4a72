"""Annotation files as they come: archives that would reach elsewhere, damaged or encrypted ones, and encodings."""

import io
import json
import random
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest
from test_format_coco import GOOD
from test_format_cvat import whole_file

from sa_engine.formats.files import read_annotations
from sa_engine.formats.model import FormatError

TEXT = json.dumps(GOOD).encode()


def packed(name: str, suffix: str, compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    """An archive whose one member has this name."""
    out = io.BytesIO()
    if suffix == "zip":
        with zipfile.ZipFile(out, "w", compression) as archive:
            archive.writestr(name, TEXT)
    else:
        with tarfile.open(fileobj=out, mode=f"w:{suffix.removeprefix('tar').lstrip('.')}") as tar:
            member = tarfile.TarInfo(name)
            member.size = len(TEXT)
            tar.addfile(member, io.BytesIO(TEXT))
    return out.getvalue()


@pytest.mark.parametrize("suffix", ["zip", "tar"])
@pytest.mark.parametrize("name", ["../x.json", "a/../../../x.json", "/{}/x.json", "..\\x.json"])
def test_members_that_would_reach_elsewhere_are_read_and_never_written(
    tmp_path: Path, name: str, suffix: str
) -> None:
    folder = tmp_path / "deep" / "in"
    folder.mkdir(parents=True)
    path = folder / f"export.{suffix}"
    path.write_bytes(packed(name.replace("{}", str(tmp_path).strip("/")), suffix))
    before = sorted(tmp_path.rglob("*"))
    (parsed,) = read_annotations(path)
    assert len(parsed.images) == 1
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path("../x.json").exists()


def test_links_in_a_tar_are_not_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret.json"
    secret.write_bytes(TEXT)
    with tarfile.open(tmp_path / "export.tar", "w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            member = tarfile.TarInfo(f"{ord(kind)}.json")
            member.type, member.linkname = kind, str(secret)
            archive.addfile(member)
    with pytest.raises(FormatError, match="no annotations there"):
        read_annotations(tmp_path / "export.tar")


def test_an_encrypted_zip_is_told(tmp_path: Path) -> None:
    data = bytearray(packed("a.json", "zip"))
    for signature, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        data[data.index(signature) + offset] |= 1  # the flag of encryption
    (tmp_path / "export.zip").write_bytes(data)
    with pytest.raises(FormatError, match=r"export\.zip: .*encrypted.*password"):
        read_annotations(tmp_path / "export.zip")


def test_a_member_that_says_it_is_larger_than_any_export_is_not_unpacked(tmp_path: Path) -> None:
    data = bytearray(packed("a.json", "zip"))
    size = data.index(b"PK\1\2") + 24
    data[size : size + 4] = struct.pack("<I", 4_200_000_000)
    (tmp_path / "export.zip").write_bytes(data)
    with pytest.raises(FormatError, match=r"a\.json: 4,200,000,000 bytes unpacked: at most"):
        read_annotations(tmp_path / "export.zip")


@pytest.mark.parametrize(
    ("suffix", "compression"),
    [
        ("zip", zipfile.ZIP_STORED),
        ("zip", zipfile.ZIP_DEFLATED),
        ("zip", zipfile.ZIP_BZIP2),
        ("zip", zipfile.ZIP_LZMA),
        ("tar", 0),
        ("tar.gz", 0),
        ("tar.bz2", 0),
        ("tar.xz", 0),
    ],
)
def test_whatever_is_wrong_with_an_archive_is_one_error(
    tmp_path: Path, suffix: str, compression: int
) -> None:
    whole = packed("a.json", suffix, compression)
    rng = random.Random(suffix)
    path, refused = tmp_path / f"export.{suffix}", 0
    for _ in range(60):
        data = bytearray(whole)
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        else:
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            read_annotations(path)
        except FormatError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 5


NAMED = json.dumps({**GOOD, "images": [{**GOOD["images"][0], "file_name": "bäckerei.jpg"}]})
NAMED = NAMED.replace("\\u00e4", "ä")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_json_of_any_unicode_encoding_is_read(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.json").write_bytes(NAMED.encode(encoding))
    (parsed,) = read_annotations(tmp_path / "a.json")
    assert parsed.images[0].name == "bäckerei.jpg"


def test_json_of_another_encoding_is_told(tmp_path: Path) -> None:
    data = NAMED.encode("latin-1")
    (tmp_path / "a.json").write_bytes(data)
    at = data.index("ä".encode("latin-1"))
    with pytest.raises(FormatError, match=f"a.json: not UTF-8 text: .* at byte {at}"):
        read_annotations(tmp_path / "a.json")
    (tmp_path / "a.json").write_bytes(NAMED.encode("utf-16")[:-1])
    with pytest.raises(FormatError, match=r"a\.json: not UTF-8 text"):
        read_annotations(tmp_path / "a.json")


def test_xml_is_read_in_the_encoding_that_it_names(tmp_path: Path) -> None:
    xml = whole_file().decode().replace("a.jpg", "bäckerei.jpg")
    path = tmp_path / "a.xml"
    for encoding in ("utf-8", "utf-16", "latin-1"):
        path.write_bytes(f'<?xml version="1.0" encoding="{encoding}"?>{xml}'.encode(encoding))
        assert read_annotations(path)[0].images[0].name == "bäckerei.jpg"
    path.write_bytes(xml.encode("latin-1"))
    with pytest.raises(FormatError, match=r"a\.xml: not XML"):
        read_annotations(path)
    path.write_bytes(b'<?xml version="1.0" encoding="klingon"?>' + xml.encode())
    with pytest.raises(FormatError, match=r"a\.xml: not XML"):
        read_annotations(path)
