"""A finished run for the tests of `verify`, and what changes its files."""

import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from small_stage import run, small_config

from sa_engine.records import ARROW_SCHEMA, from_table, to_sa1b
from sa_engine.shards import ShardStats
from sa_engine.storage import RunPaths, sha256_file
from sa_engine.verify import Verification, verify

FORMATS = {"both": ("tar", "parquet"), "tar": ("tar",), "parquet": ("parquet",)}
# Ids by key: 1 astronaut, 2 broken, 3 chelsea, 4 coffee, 5 more/rocket; two images to a shard.
FIRST, SECOND, LAST = "sa_000000", "sa_000001", "sa_000002"
FAILURES = "_run/errors/sa_000000.jsonl"
SKIPS = "_run/errors/sa_000001.jsonl"

Rows = list[dict[str, Any]]
Members = list[tuple[str, bytes]]


def finished(photos: Path, out: Path, formats: str = "both", **options: Any) -> Path:
    """A run with three photos that are ok, one that failed and one that was skipped."""
    broken = photos / "broken.jpg"
    if not broken.exists():
        broken.write_bytes((photos / "coffee.jpg").read_bytes()[:500])
    given = {"formats": FORMATS[formats], "skip": "coffee.jpg", "max_failed": 1.0, **options}
    run(small_config(photos, out, **given))
    return out


def check(out: Path) -> Verification:
    return verify(out, workers=1)


def only_file(found: Verification) -> str:
    """The one file that all problems are about."""
    files = {problem.file for problem in found.problems}
    assert len(files) == 1, found
    return files.pop()


def data_files(out: Path) -> list[Path]:
    return sorted([*out.glob("*.tar"), *out.glob("*.parquet")])


def flip(path: Path, position: int, bit: int) -> bytes:
    """Flip a bit of a file; return what it held before."""
    before = path.read_bytes()
    after = bytearray(before)
    after[position] ^= 1 << bit
    path.write_bytes(after)
    return before


# Hand-made shards: what they hold is changed, and their markers with it


def edit_marker(out: Path, shard: str, **changes: Any) -> None:
    marker = RunPaths(out).marker(shard)
    marker.write_text(replace(ShardStats.from_json(marker.read_bytes()), **changes).to_json())


def seal(out: Path, shard: str) -> None:
    """Make a shard's marker that of its files as they are now."""
    stats = ShardStats.from_json(RunPaths(out).marker(shard).read_bytes())
    files = {
        name: {"sha256": sha256_file(out / name), "bytes": (out / name).stat().st_size}
        for name in stats.files
    }
    errors = RunPaths(out).errors(shard)
    sha256 = sha256_file(errors) if errors.exists() else None
    edit_marker(out, shard, files=files, errors_sha256=sha256)


def edit_rows(out: Path, shard: str, change: Callable[[Rows], Any], schema: Any = None) -> None:
    """Change a shard's Parquet rows as dicts."""
    path = out / f"{shard}.parquet"
    rows = pq.read_table(path).to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema or ARROW_SCHEMA), path)
    seal(out, shard)


def edit_members(out: Path, shard: str, change: Callable[[Members], Any]) -> None:
    """Change a shard's tar as a list of names and contents."""
    path = out / f"{shard}.tar"
    with tarfile.open(path) as archive:
        members = [(m.name, archive.extractfile(m).read()) for m in archive]  # type: ignore[union-attr]
    change(members)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    seal(out, shard)


def edit_json(change: Callable[[dict[str, Any]], Any]) -> Callable[[Members], None]:
    """Change the JSON of a shard's first image."""

    def edit(members: Members) -> None:
        content = json.loads(members[1][1])
        change(content)
        members[1] = (members[1][0], json.dumps(content).encode())

    return edit


def edit_record(out: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the record of image 5 in all files of the last shard, which then agree."""
    contents: list[dict[str, Any]] = []
    if (out / f"{LAST}.parquet").exists():
        edit_rows(out, LAST, lambda rows: change(rows[0]))
        contents = [to_sa1b(r) for r in from_table(pq.read_table(out / f"{LAST}.parquet"))]
    if (out / f"{LAST}.tar").exists():

        def edit(members: Members) -> None:
            content = json.loads(members[1][1])
            if contents:
                content = contents[0]
            else:
                record = {**content["image"], "masks": content["annotations"]}
                change(record)
                content["image"] = {key: record[key] for key in content["image"]}
                content["annotations"] = record["masks"]
            members[1] = (members[1][0], json.dumps(content).encode())

        edit_members(out, LAST, edit)
