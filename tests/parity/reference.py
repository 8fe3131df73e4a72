"""The reference implementations (code that is not ours), driven with our weights."""

import warnings
from typing import Any

import numpy as np
import torch

from sa_engine.modeling.sam import load_sam, model_fingerprint
from sa_engine.modeling.weights import resolve

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # mobile_sam imports old timm paths
    import mobile_sam

Annotation = dict[str, Any]


def photo(name: str) -> np.ndarray:
    """One of scikit-image's bundled colour photos: (H, W, 3) uint8."""
    from skimage import data

    return np.ascontiguousarray(getattr(data, name)()[..., :3])


def load_reference(name: str) -> tuple[torch.nn.Module, str]:
    """MobileSAM's own model with the weights we use, and the fingerprint of those weights."""
    sam = load_sam(resolve(name))
    model = mobile_sam.sam_model_registry["vit_t"]()
    model.load_state_dict(sam.state_dict())
    return model.eval(), model_fingerprint(sam)


def reference_masks(model: torch.nn.Module, image: np.ndarray, **options: Any) -> list[Annotation]:
    """Masks of the reference's automatic generator as SA-1B annotations with COCO RLE."""
    generator = mobile_sam.SamAutomaticMaskGenerator(model, output_mode="coco_rle", **options)
    return generator.generate(image)
