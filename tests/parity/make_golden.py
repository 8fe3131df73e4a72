"""Store the reference implementation's masks for redistributable photos, at the paper's full setting.

    python tests/parity/make_golden.py [--photo NAME ...]

Runs ``SamAutomaticMaskGenerator`` of the package mobilesam-mirror with the real ``vit_t`` weights: 32x32 points, 2x2
and 4x4 crops, clean-up at 100 px. Many minutes a photo, which is why the result is committed. ``make parity`` compares
our masks with these files. Needs the dev packages; run it with ``PYTHONPATH=tests``.
"""

import argparse
import gzip
import json
import time
from pathlib import Path

import torch
from parity.reference import load_reference, photo, reference_masks

GOLDEN = Path(__file__).parent / "golden"
PHOTOS = ("coffee", "rocket", "astronaut", "hubble_deep_field", "retina")
# Grids, crops and clean-up are the paper's; lower thresholds give more masks (chelsea: 8 at 0.88 and 0.95).
OPTIONS = {
    "crop_n_layers": 2,
    "crop_n_points_downscale_factor": 2,
    "min_mask_region_area": 100,
    "pred_iou_thresh": 0.7,
    "stability_score_thresh": 0.85,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photo", action="append", choices=PHOTOS)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, fingerprint = load_reference("vit_t")
    GOLDEN.mkdir(exist_ok=True)
    for name in arguments.photo or PHOTOS:
        start = time.monotonic()
        masks = reference_masks(model, photo(name), **OPTIONS)
        seconds = round(time.monotonic() - start, 1)
        golden = {
            "photo": name,
            "options": OPTIONS,
            "model_fingerprint": fingerprint,
            "torch": torch.__version__,
            "masks": masks,
        }
        text = json.dumps(golden, indent=0).encode()
        (GOLDEN / f"{name}.json.gz").write_bytes(gzip.compress(text, mtime=0))
        print(f"{name}: {len(masks)} masks in {seconds} s", flush=True)


if __name__ == "__main__":
    main()
