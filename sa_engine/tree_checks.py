"""The checks of what a run has redacted: the audit against the marker and the plan, and the released
images against the audit."""

from collections import Counter

from sa_engine.checks import Tally, order_problem
from sa_engine.plan import Shard
from sa_engine.reader import read_audit
from sa_engine.shards import ShardStats
from sa_engine.storage import RunPaths, sha256_file


def check_audit(
    paths: RunPaths, shard: Shard, stats: ShardStats, left_out: set[int] | None, tally: Tally
) -> None:
    """Check a committed shard's audit, and its images if the output is a tree.

    Args:
        paths: of the run.
        shard: as planned.
        stats: its marker.
        left_out: ids of the images that failed or were skipped; None: not known.
        tally: takes what is wrong.
    """
    file = f"audit/{shard.name}.jsonl"
    with tally.reading(file):
        lines = read_audit(paths, shard.name, stats)
        if left_out is not None:
            expected = [image.image_id for image in shard.images if image.image_id not in left_out]
            tally.add(file, order_problem(list(lines), expected))
        if paths.work is None:
            return
        counts: Counter[str] = Counter()
        for line in lines.values():
            counts.update(line["counts"])
        if dict(counts) != stats.counts:
            tally.add(file, f"counts {dict(counts)}, its marker {stats.counts}")
        tally.images += len(lines)
        for image in shard.images:
            with tally.reading(image.key):
                _check_image(paths, image.key, lines.get(image.image_id, {}), tally)


def _check_image(paths: RunPaths, key: str, line: dict[str, str], tally: Tally) -> None:
    if not line:
        if (paths.out / key).exists():
            tally.add(key, "is there, but the audit does not say that it was redacted")
    elif line["key"] != key:
        tally.add(key, f"the audit calls this image {line['key']!r}")
    elif (found := sha256_file(paths.out / key)) != line["sha256_out"]:
        tally.add(key, f"sha256 is {found}, the audit says {line['sha256_out']}")
