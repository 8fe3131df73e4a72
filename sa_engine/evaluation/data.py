"""The truth of an evaluation: images and masks of a run's finished shards."""

import hashlib
import tarfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from sa_engine.evaluation.interactive import EvaluationError
from sa_engine.holdout import chooser
from sa_engine.images import BadImage, decode_image
from sa_engine.pictures import released_photo
from sa_engine.plan import read_plan
from sa_engine.reader import iter_records, open_tar, read_member, shard_records
from sa_engine.records import ImageRecord, image_name
from sa_engine.run_dir import read_info
from sa_engine.shards import read_markers
from sa_engine.storage import AnyPath, RunPaths


@dataclass(frozen=True)
class DataSet:
    """Images with masks, all of a run's or some; iterating gives (record, (H, W, 3) uint8 RGB).

    Attributes:
        name: for tables.
        out: the run's folder.
        config: the run's options.
        image_ids: of the images, ascending.
        masks: on them.
        fingerprint: sha256 over the photos' hashes and all masks of the images.
    """

    name: str
    out: AnyPath
    config: dict[str, Any]
    image_ids: tuple[int, ...]
    masks: int
    fingerprint: str

    def __iter__(self) -> Iterator[tuple[ImageRecord, np.ndarray]]:
        paths, wanted = RunPaths(self.out), set(self.image_ids)
        plan = read_plan(paths.plan)
        shards = sorted({index for one in wanted if (index := plan.shard_of(one)) is not None})
        for index, stats in read_markers(paths, shards).items():
            shard = plan[index]
            records = [
                one for one in shard_records(self.out, shard, stats) if one.image_id in wanted
            ]
            yield from self._with_images(shard.name, records)

    def _with_images(
        self, shard: str, records: list[ImageRecord]
    ) -> Iterator[tuple[ImageRecord, np.ndarray]]:
        """A shard's records with their images; a run without pictures makes them again from its photos."""
        has_pictures = self.config["write_images"] and "tar" in self.config["formats"]
        path = self.out / f"{shard}.tar"
        try:
            with open_tar(path) if has_pictures else nullcontext() as archive:
                for record in records:
                    if archive is None:
                        image = released_photo(self.config, record)
                    else:
                        image = decode_image(read_member(archive, image_name(record.image_id)))
                    yield record, image
        except (OSError, KeyError, tarfile.TarError, BadImage) as error:
            raise EvaluationError(
                f"cannot read the images of {path}: {error}; `sa-engine verify {self.out}` says what "
                "is damaged"
            ) from None


def open_data(
    out: AnyPath, name: str, split: str = "all", limit: int | None = None, seed: int = 0
) -> DataSet:
    """The images of a run that have masks; reads all its records once.

    Args:
        out: folder of a run of shards, as `ingest` and `auto` write them.
        name: for tables.
        split: "holdout", the images of `holdout.json`; "rest", the others; "all".
        limit: so many images, a random sample of them; None: all.
        seed: of the sample.

    Raises:
        RunError: no run there, a damaged one, or no split.
        EvaluationError: no masks there.
    """
    config = shards_config(out)
    inside = chooser(out, split)
    finished = 0
    digests: dict[int, tuple[int, str]] = {}
    for record in iter_records(out):
        finished += 1
        if record.masks and inside(record.image_id):
            digests[record.image_id] = (len(record.masks), _digest(record))
    if not digests:
        where = "" if split == "all" else f" in its split {split!r}"
        raise EvaluationError(
            f"{out} has no masks to evaluate with{where}: none of its {finished} finished images has any; "
            "`sa-engine status` says how far it is"
        )
    chosen = sorted(digests)
    if limit is not None and limit < len(chosen):
        chosen = sorted(np.random.default_rng(seed).choice(chosen, limit, replace=False).tolist())
    together = hashlib.sha256("".join(digests[one][1] for one in chosen).encode())
    masks = sum(digests[one][0] for one in chosen)
    return DataSet(name, out, config, tuple(chosen), masks, together.hexdigest())


def shards_config(out: AnyPath) -> dict[str, Any]:
    """The options of a run of shards. Raises RunError if there is no run, EvaluationError if it has no shards."""
    config = read_info(RunPaths(out)).config
    if "formats" not in config:
        raise EvaluationError(f"{out} has no masks: it is no run of shards")
    return config


def _digest(record: ImageRecord) -> str:
    """Sha256 of an image's photo and masks."""
    parts = [f"{record.image_id} {record.width} {record.height} {record.sha256}"]
    parts += [f"{mask.id} {mask.segmentation['counts']}" for mask in record.masks]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
