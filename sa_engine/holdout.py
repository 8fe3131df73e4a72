"""A random test split of a run's images that stays the same when images are added (paper §F: ~2k held out).

An image is held out if the hash of its content is small enough, so that neither its place in the
plan nor the other images matter, and copies of one photo always fall on the same side.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sa_engine.reader import Source, iter_sources
from sa_engine.run_dir import read_run
from sa_engine.storage import AnyPath, RunError, RunPaths, atomic_write

SPLITS = ("all", "holdout", "rest")
_SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Holdout:
    """The images that no model may be trained on: the content of `holdout.json` beside the shards.

    Attributes:
        seed: another seed gives another split.
        threshold: hex; an image whose hash is at most this is held out.
        images: image_id, sha256 and source_path of each, by image_id.
    """

    seed: int
    threshold: str
    images: list[dict[str, Any]]

    @property
    def image_ids(self) -> frozenset[int]:
        """Ids of the images."""
        return frozenset(int(image["image_id"]) for image in self.images)


def split(out: AnyPath, count: int, seed: int = 0) -> Holdout:
    """Hold out `count` random images of a run, and write `holdout.json`.

    Called again after images were added, it keeps the threshold of the first call: what was held
    out stays held out, and of the new images the same share joins them.

    Args:
        out: the run's folder; only its finished images are looked at.
        count: images to hold out, at the first call.
        seed: of the split.

    Raises:
        RunError: no run there, fewer images than asked for, or a split with another seed is there.
    """
    read_run(RunPaths(out))
    images = [(photo_hash(image, str(seed)), image) for image in iter_sources(out)]
    before = read_holdout(out)
    if before is None:
        ordered = sorted({digest for digest, _ in images})
        if count > len(ordered):
            raise RunError(
                f"{out} has {len(ordered)} different finished images: cannot hold out {count}"
            )
        threshold = ordered[count - 1]
    else:
        if before.seed != seed:
            raise RunError(
                f"{out} has a split with seed {before.seed} already: another one would put test "
                f"images into training; keep the seed, or remove {out / 'holdout.json'} if no "
                "model has been trained yet"
            )
        threshold = before.threshold
    held_out = [vars(image) for digest, image in images if digest <= threshold]
    holdout = Holdout(seed=seed, threshold=threshold, images=held_out)
    content = {"schema_version": _SCHEMA_VERSION, **vars(holdout)}
    atomic_write(out / "holdout.json", json.dumps(content, indent=1).encode())
    return holdout


def read_holdout(out: AnyPath) -> Holdout | None:
    """The split of a run, or None. Raises RunError if the file is damaged."""
    path = out / "holdout.json"
    try:
        content = json.loads(path.read_bytes())
        del content["schema_version"]
        return Holdout(**content)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"cannot read {path}: {error}; put back the file that was written") from None


def chooser(out: AnyPath, split: str) -> Callable[[int], bool]:
    """Which image ids of a run belong to a split: one of `SPLITS`.

    Raises RunError if images were never held out, and the split is not "all".
    """
    if split == "all":
        return lambda image_id: True
    holdout = read_holdout(out)
    if holdout is None:
        raise RunError(
            f"{out} has no split: hold images out with `sa-engine split {out} --holdout N`, or take "
            "--split all"
        )
    held_out = holdout.image_ids
    return lambda image_id: (image_id in held_out) == (split == "holdout")


def kept_from_training(outs: Sequence[AnyPath]) -> list[Callable[[Source], bool]]:
    """Which images of some runs no model may be trained on, one function for each run.

    A photo that one run holds out is held out of all of them. Of a run's images that were added since its
    `split`, those that the next one will hold out are held out already.

    Raises RunError if a `holdout.json` is damaged.
    """
    holdouts = [read_holdout(out) for out in outs]
    photos = {image["sha256"] for one in holdouts if one for image in one.images} - {None}

    def of_run(holdout: Holdout | None) -> Callable[[Source], bool]:
        if holdout is None:
            return lambda image: image.sha256 in photos
        ids, seed, threshold = holdout.image_ids, str(holdout.seed), holdout.threshold
        return lambda image: (
            image.image_id in ids or image.sha256 in photos or photo_hash(image, seed) <= threshold
        )

    return [of_run(holdout) for holdout in holdouts]


def photo_hash(image: Source, salt: str) -> str:
    """Of an image's content; of its path where a run without Parquet does not know the content.

    Another salt gives an independent hash: 64 hex digits, evenly distributed.
    """
    return hashlib.sha256(f"{salt}:{image.sha256 or image.source_path}".encode()).hexdigest()
