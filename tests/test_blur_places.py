"""The privacy stage on Ray and in buckets: the same bytes."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from blurring import assert_done, audit_files, blur, files, work_of
from test_cli import assert_refused, sa_engine

from sa_engine.remote import RemotePath

# Other machines, other stores


def test_the_same_bytes_on_ray(ray_address: str, pair: Path, tmp_path: Path) -> None:
    assert_done(blur(pair, tmp_path / "here"))
    words = ["--threads-per-worker", 1, "--num-workers", 1, "--set", "detect_scale=1"]
    words += ["--set", "memory_per_worker=0.2"]
    out = tmp_path / "there"
    assert_done(sa_engine("blur", "--images", pair, "--out", out, *words))
    assert files(out) == files(tmp_path / "here")
    assert audit_files(work_of(out)) == audit_files(tmp_path / "here.run")


@pytest.fixture
def in_bucket(s3: Callable[[str], str], pair: Path, tmp_path: Path) -> Callable[[str], str]:
    """The two photos in a bucket, in a folder of the test's own; gives the URIs of its folders."""
    name = tmp_path.name
    for key, data in files(pair).items():
        (RemotePath(s3(f"{name}/photos")) / key).put(data)
    return lambda folder: s3(f"{name}/{folder}")


def stored(place: RemotePath) -> dict[str, bytes]:
    return {key: (place / key).read_bytes() for key, _, _ in place.find_files()}


def test_the_same_bytes_in_a_bucket(
    in_bucket: Callable[[str], str], pair: Path, tmp_path: Path
) -> None:
    assert_done(blur(pair, tmp_path / "out"))
    for _ in range(2):  # the second time there is nothing left to do
        assert_done(blur(in_bucket("photos"), in_bucket("out")))
        assert stored(RemotePath(in_bucket("out"))) == files(tmp_path / "out")
    audits = stored(RemotePath(in_bucket("out.run")) / "audit")
    assert audits == audit_files(work_of(tmp_path / "out"))
    assert_refused(blur(in_bucket("photos"), in_bucket("photos")), "lies in --images")
    assert stored(RemotePath(in_bucket("photos"))) == files(pair)


def test_folders_of_a_bucket_that_touch_each_other_are_refused(
    in_bucket: Callable[[str], str], pair: Path
) -> None:
    photos = in_bucket("photos")
    assert_refused(blur(photos, in_bucket("photos/out")), "lies in --images")
    assert_refused(blur(photos, in_bucket("out"), "--work", in_bucket("out/work")), "lies in --out")
    assert stored(RemotePath(photos)) == files(pair)


@pytest.mark.parametrize("start", ["", "--overwrite"])
def test_no_key_of_a_bucket_reaches_beyond_the_output(
    s3: Callable[[str], str], pair: Path, tmp_path: Path, start: str
) -> None:
    """An object's name may have an empty part; a photo of that name is left out."""
    import boto3

    private = tmp_path / "private.png"
    shutil.copy(pair / "people" / "astronaut.png", private)
    name = f"{tmp_path.name}/photos"
    uri = s3(name)
    endpoint = uri.partition("endpoint_override=")[2].partition("&")[0]
    store = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
    for key in ("a.png", str(private)):
        store.put_object(Bucket="bucket", Key=f"{name}/{key}", Body=private.read_bytes())
    out = tmp_path / "out"
    result = blur(uri, out)
    assert_done(result)
    assert "left out: 1 name with an empty part" in result.output
    if start:
        assert_done(blur(uri, out, start))
    assert set(files(out)) == {"a.png"}
    assert private.exists()


def test_operators_find_a_run_in_a_bucket(in_bucket: Callable[[str], str]) -> None:
    assert_done(blur(in_bucket("photos"), in_bucket("out")))
    for named in ("out", "out.run"):
        for command in ("status", "errors", "verify"):
            assert_done(sa_engine(command, in_bucket(named)))
