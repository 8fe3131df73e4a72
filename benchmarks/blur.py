"""How fast `sa-engine blur` is on one core, and where its time goes.

    python benchmarks/blur.py photo.jpg ...                 # each scaled to 2250x1500: half a minute
    python benchmarks/blur.py --size 6000x4000 photo.jpg    # at another size, for its memory

The photos go through the stage's own steps, one after another, with one thread: decode, detect, redact,
encode, and the detection in what was encoded.
"""

import argparse
import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cv2
import numpy as np

from sa_engine.config import BlurConfig
from sa_engine.images import decode_image, encode_jpeg, resize_image
from sa_engine.plan import PlannedImage
from sa_engine.privacy import pyramid, redactor
from sa_engine.privacy.detectors import AnchorNetwork
from stages import blur

# Name in the table, where the function is, and its name; an inner part is taken off the outer one.
PARTS: tuple[tuple[str, Any, str], ...] = (
    ("detection: networks", AnchorNetwork, "detect"),
    ("tiling: pyramid, tiles, merging", redactor, "search"),
    ("redaction", redactor, "redact"),
    ("encoding", blur, "encode_as"),
    ("decoding, twice", blur, "decode_image"),
)


class Stopwatch:
    """Adds up what every part takes by itself."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner = [0.0]

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as stack:
            for part, owner, name in PARTS:
                timed = self._timed(part, getattr(owner, name))
                stack.enter_context(patch.object(owner, name, timed))
            yield

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*inputs: Any, **options: Any) -> Any:
            self._inner.append(0.0)
            start = time.perf_counter()
            result = function(*inputs, **options)
            seconds = time.perf_counter() - start
            self.seconds[part] += seconds - self._inner.pop()
            self._inner[-1] += seconds
            return result

        return call


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("photos", nargs="+", type=Path)
    parser.add_argument("--size", default="2250x1500", help="width x height")
    given = parser.parse_args()
    width, height = map(int, given.size.split("x"))
    files = []
    for path in given.photos:  # one after another: memory is measured
        files.append(encode_jpeg(resize_image(decode_image(path.read_bytes()), height, width), 95))
    cv2.setNumThreads(1)
    config = BlurConfig(images="-", out="-", threads_per_worker=1)
    start = time.perf_counter()
    worker = blur.BlurStage().make_worker(config)
    print(f"{time.perf_counter() - start:.1f} s to load and try the detectors")
    watch = Stopwatch()
    passes = regions = 0
    start = time.perf_counter()
    with watch.watching():
        for number, data in enumerate(files, 1):
            item = PlannedImage(number, f"{number}.jpg", len(data), 0)
            decoded, redacted = worker.process(item, worker.prepare(item, data))
            worker.finish(item, (decoded, redacted))
            passes += 1 + redacted.checks
            regions += len(redacted.regions)
    seconds = time.perf_counter() - start
    print(
        f"{len(files)} photos of {width}x{height}, {regions} regions, {passes} looks at them: "
        f"{len(files) / seconds:.3f} images a second on one core"
    )
    for part, _, _ in PARTS:
        print(f"{watch.seconds[part] / seconds:7.1%}  {part}")
    print(f"{1 - sum(watch.seconds.values()) / seconds:7.1%}  else")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # kB on Linux
    print(f"peak memory {peak:.2f} GB")
    views = pyramid._views(np.zeros((height, width, 3), np.uint8), config.detect_scale, 80)
    shown = sum(view.picture.shape[0] * view.picture.shape[1] for view in views)
    print(f"a face detector is shown {shown / 1e6:.1f} megapixels of {height * width / 1e6:.1f}")


if __name__ == "__main__":
    main()
