"""What a run of ten million images costs outside of its images: the figures of docs/scale.md.

python benchmarks/scale.py             # all; a few minutes
python benchmarks/scale.py plan        # a plan of ten million keys: seconds, megabytes
python benchmarks/scale.py listing     # a folder of 200,000 files
python benchmarks/scale.py markers     # 78,125 finished shards: what is left, and the report
python benchmarks/scale.py ray         # 5,000 shards without work through Ray
python benchmarks/scale.py requests    # requests to an S3 server, by kind, for an image and a shard
python benchmarks/scale.py released    # what photos leave on disk, from folders given after it
"""

import collections
import os
import re
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ["PYTHONPATH"] = os.pathsep.join(str(Path(__file__).parents[up]) for up in (1, 0))
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import numpy as np
import psutil
import pyarrow as pa

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from s3_server import s3_server

from sa_engine.images import decode_image, encode_jpeg, fit_short_side, resize_image
from sa_engine.listing import COLUMNS, list_images
from sa_engine.option_groups import ShardConfig
from sa_engine.plan import Plan, make_plan, new_images, read_plan, shard_name, write_plan
from sa_engine.shards import ShardStats, committed_shards, read_markers
from sa_engine.storage import RunPaths, atomic_write, location

KEYS = 10_000_000
SHARD = 128
FILES = 200_000
NO_OPS = 5_000


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Print seconds, and what the process's memory has grown by."""
    before, start = psutil.Process().memory_info().rss, time.monotonic()
    yield
    grown = (psutil.Process().memory_info().rss - before) / 1e6
    print(f"{what:60} {time.monotonic() - start:8.2f} s {grown:+8.0f} MB")


def found(count: int, first: int = 0) -> pa.Table:
    """A listing with keys as a camera archive has them."""
    numbers = np.arange(first, first + count)
    keys = pa.array(
        [f"{2000 + n % 24}/{n % 12 + 1:02}/{n % 28 + 1:02}/IMG_{n:010}.jpg" for n in numbers]
    )
    sizes = pa.array(2_000_000 + numbers * 7919 % 3_000_000)
    times = pa.array(10**18 + numbers * 10**9)
    return pa.table([keys, sizes, times], schema=pa.schema(COLUMNS))


def plan(work: Path) -> None:
    """Plan, read and extend ten million keys."""
    with timed(f"{KEYS:,} keys made up (not part of a run)"):
        table = found(KEYS)
    with timed("sorted by key"):
        table = table.sort_by("key")
    with timed("numbered, cut into shards, compressed"):
        content = make_plan(table, SHARD)
    del table
    path = work / "plan.parquet"
    path.write_bytes(content)
    del content
    print(
        f"plan.parquet: {path.stat().st_size / 1e6:.0f} MB, {path.stat().st_size / KEYS:.1f} bytes a key"
    )
    with timed("opened by a worker"):
        opened = read_plan(path)
    with timed("100 shards from anywhere"):
        for index in np.random.default_rng(0).integers(len(opened), size=100):
            opened[int(index)]
    with timed("1,000 shards in a row"):
        for index in range(1000):
            opened[index]
    with timed("100,000 new keys found and added (--extend)"):
        more = new_images(found(KEYS // 100, KEYS), opened)
        Plan(make_plan(more, SHARD, opened))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"peak memory of all this: {peak:.1f} GB")


def listing(work: Path) -> None:
    """List a folder on this disk."""
    for number in range(FILES):
        folder = work / "files" / f"{number // 1000:03}"
        if number % 1000 == 0:
            folder.mkdir(parents=True)
        (folder / f"{number:06}.jpg").touch()
    with timed(f"{FILES:,} files listed"):
        list_images(work / "files")


def markers(work: Path) -> None:
    """Look at the markers of a finished run of ten million images."""
    paths = RunPaths(work / "out")
    count = KEYS // SHARD
    for index in range(count):
        name = shard_name(index)
        files = {
            f"{name}.{suffix}": {"sha256": "0" * 64, "bytes": 10**8}
            for suffix in ("tar", "parquet")
        }
        stats = ShardStats(
            name=name,
            planned=SHARD,
            ok=SHARD,
            skipped=0,
            failed=0,
            counts={"masks": 100 * SHARD},
            seconds=1.0,
            files=files,
        )
        atomic_write(paths.marker(name), stats.to_json().encode(), durable=False)
    with timed(f"which of {count:,} shards are left"):
        committed_shards(paths)
    with timed(f"report over {count:,} markers"):
        read_markers(paths, range(count))


def ray(work: Path) -> None:
    """Send shards that are committed already through Ray: all its time is Ray's."""
    from runner import CannedStage, copies

    from sa_engine import ray_pool
    from sa_engine.lock import RunLock
    from sa_engine.pipeline import WorkerSpec
    from sa_engine.resources import Resources

    images = copies(work / "images", 1)
    config = ShardConfig(images=str(images), out=str(work / "out"), formats=("parquet",))
    paths = RunPaths(work / "out")
    with RunLock(paths, "session"):
        write_plan(paths.plan, make_plan(found(NO_OPS), 1), paths.scratch)
        for index in range(NO_OPS):
            name = shard_name(index)
            stats = ShardStats(
                name=name, planned=1, ok=1, skipped=0, failed=0, counts={}, seconds=0.0, files={}
            )
            atomic_write(paths.marker(name), stats.to_json().encode(), durable=False)
        spec = WorkerSpec(
            stage=CannedStage(None),  # type: ignore[arg-type]  # it is never asked for a worker
            config=config,
            images=images,
            paths=paths,
            session="session",
            threads=1,
        )
        with (
            ray_pool.cluster(config),
            timed(f"{NO_OPS:,} finished shards through Ray, two workers"),
        ):
            for _ in ray_pool.run_on_ray(spec, range(NO_OPS), Resources(2, 1, 0)):
                pass


def requests(work: Path) -> None:
    """Count the requests of runs of two sizes with one shard; their difference is what an image costs."""
    from runner import CannedStage, CannedWorker, copies

    from sa_engine import runner

    os.environ.update(
        AWS_ACCESS_KEY_ID="k", AWS_SECRET_ACCESS_KEY="s", AWS_EC2_METADATA_DISABLED="true"
    )
    log = work / "log"
    with s3_server(log) as query:
        worker = CannedWorker()
        counts = {}
        for size in (8, 16):
            photos = location(f"s3://bucket/photos-{size}?{query}")
            for file in copies(work / str(size), size).iterdir():
                atomic_write(photos / file.name, file.read_bytes())
            before = len(log.read_bytes())
            config = ShardConfig(
                images=f"s3://bucket/photos-{size}?{query}",
                out=f"s3://bucket/out-{size}?{query}",
                shard_size=size,
                local=True,
            )
            runner.run(CannedStage(worker), config, dict)
            text = log.read_bytes()[before:].decode()
            counts[size] = collections.Counter(
                kind(method, path)
                for method, path in re.findall(r"(GET|PUT|POST|HEAD|DELETE) (\S+) HTTP", text)
            )
        for name in sorted({*counts[8], *counts[16]}):
            an_image = (counts[16][name] - counts[8][name]) / 8
            print(
                f"{name:8} {an_image:6.2f} an image, {counts[8][name] - 8 * an_image:6.1f} a run of one shard"
            )


def kind(method: str, path: str) -> str:
    """How a request is charged for."""
    if method == "GET" and "list-type" in path:
        return "LIST"
    return {"PUT": "PUT/POST", "POST": "PUT/POST"}.get(method, method)


def released(work: Path) -> None:
    """Compare photos with what is released of them, before masks."""
    for folder in sys.argv[2:]:
        ratios, sizes = [], []
        for path in sorted(Path(folder).iterdir())[:40]:
            image = decode_image(path.read_bytes())
            jpeg = encode_jpeg(
                resize_image(image, *fit_short_side(image.shape[0], image.shape[1], 1500)), 95
            )
            ratios.append(len(jpeg) / path.stat().st_size)
            sizes.append(len(jpeg))
        print(
            f"{Path(folder).parent.name:12} {len(sizes)} photos: released kB {np.mean(sizes) / 1e3:.0f} "
            f"({min(sizes) / 1e3:.0f} to {max(sizes) / 1e3:.0f}), "
            f"of the photo's size {np.mean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )


def main() -> None:
    parts = {f.__name__: f for f in (plan, listing, markers, ray, requests, released)}
    for name in sys.argv[1:2] or [name for name in parts if name != "released"]:
        with tempfile.TemporaryDirectory() as folder:
            parts[name](Path(folder))


if __name__ == "__main__":
    main()
