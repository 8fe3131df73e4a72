"""Where our mask generator's time goes, and the least its matrix products could take."""

import functools
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from sa_engine import generator, masks, rle
from sa_engine.modeling.folded import FoldedDecoder
from sa_engine.predictor import Predictor
from sa_engine.upsampling import Upsampler

# Name in the table, where the function is, its name, and the argument whose length is the number of units.
PARTS: tuple[tuple[str, Any, str, Callable[..., int]], ...] = (
    ("image encoder", Predictor, "embed_pixels", lambda self, pixels, sizes: len(pixels)),
    ("decoder: transformer", FoldedDecoder, "attend", lambda self, shared, tokens: len(tokens)),
    ("decoder: upscaling", FoldedDecoder, "predict_masks", lambda self, of, *_: len(of.image)),
    ("area, stability, box", Upsampler, "measure", lambda self, logits, offset: len(logits)),
    ("box NMS", masks, "greedy_nms", lambda boxes, *_: len(boxes)),
    ("rendering", generator, "_rendered", lambda *_: 1),
    ("clean-up", masks, "clean_up", lambda *_: 1),
    ("RLE", rle, "encode_window", lambda *_: 1),
)
GEMM_SIDE = 2048


def matrix_rate(dtype: torch.dtype) -> float:
    """This machine's GFLOP/s in large matrix products, with the threads that are set."""
    a = torch.randn(GEMM_SIDE, GEMM_SIDE).to(dtype)
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    return 2 * GEMM_SIDE**3 / min(seconds) / 1e9


class Stopwatch:
    """Adds up what every part takes. Parts that run side by side count by their share of the threads."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.units: dict[str, int] = defaultdict(int)
        self._lock = threading.Lock()

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as stack:
            for part, owner, name, count in PARTS:
                stack.enter_context(
                    patch.object(owner, name, self._timed(part, getattr(owner, name), count))
                )
            yield

    def _timed(
        self, part: str, function: Callable[..., Any], count: Callable[..., int]
    ) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any) -> Any:
            start = time.perf_counter()
            result = function(*args)
            seconds = time.perf_counter() - start
            alone = threading.current_thread() is threading.main_thread()
            with self._lock:
                self.seconds[part] += seconds if alone else seconds / self._threads
                self.units[part] += count(*args)
            return result

        self._threads = torch.get_num_threads()
        return timed


def arithmetic(predictor: Predictor) -> dict[str, float]:
    """GFLOP in the matrix products of one unit of the parts that consist of them."""
    image = np.zeros((predictor.sam.image_size,) * 2 + (3,), np.uint8)
    sizes = [image.shape[:2]]
    with predictor.inference():
        embedding = predictor.embed_pixels([image], sizes)[0]
        point = {"points": np.full((1, 1, 2), 500.0), "labels": np.ones((1, 1))}
        attended = predictor.attend(embedding, **point)
        calls: dict[str, Callable[[], Any]] = {
            "image encoder": lambda: predictor.embed_pixels([image], sizes),
            "decoder: transformer": lambda: predictor.attend(embedding, **point),
            "decoder: upscaling": lambda: predictor.decoder.predict_masks(attended, slice(1, None)),
        }
        found = {}
        for part, call in calls.items():
            with FlopCounterMode(display=False) as counter:
                call()
            found[part] = counter.get_total_flops() / 1e9
    return found


def table(result: dict[str, Any], rate: float) -> str:
    """The parts of one run, longest first, against the floor that a matrix rate (GFLOP/s) sets.

    Args:
        result: ``wall`` and ``seconds`` by part, ``units`` by part, ``gflop`` of a unit by part.
    """
    seconds, units, gflop = result["seconds"], result["units"], result["gflop"]
    lines = [
        f"{'part':22}{'s':>8}{'share':>7}{'units':>8}{'ms/unit':>9}{'floor s':>9}{'x floor':>9}"
    ]
    decoder = [0.0, 0.0]
    for part in sorted(seconds, key=lambda part: -seconds[part]):
        line = (
            f"{part:22}{seconds[part]:8.2f}{seconds[part] / result['wall']:7.0%}"
            f"{units[part]:8}{1e3 * seconds[part] / units[part]:9.2f}"
        )
        if part in gflop:
            floor = gflop[part] * units[part] / rate
            line += f"{floor:9.2f}{seconds[part] / floor:9.1f}"
            if part.startswith("decoder"):
                decoder = [decoder[0] + seconds[part], decoder[1] + floor]
        lines.append(line)
    other = result["wall"] - sum(seconds.values())
    lines.append(f"{'everything else':22}{other:8.2f}{other / result['wall']:7.0%}")
    lines.append(
        f"decoder: {decoder[0]:.1f} s; its matrix products alone take {decoder[1]:.1f} s at "
        f"{rate:.0f} GFLOP/s: {decoder[0] / decoder[1]:.2f} times the floor"
    )
    return "\n".join(lines)
