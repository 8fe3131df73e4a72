"""What tests of training share: a SAM small enough to train in a test, and objects whose shape is known."""

import numpy as np
import torch

from sa_engine.modeling.image_encoder import ImageEncoderViT
from sa_engine.modeling.mask_decoder import MaskDecoder
from sa_engine.modeling.prompt_encoder import PromptEncoder
from sa_engine.modeling.sam import Sam
from sa_engine.training.simulate import Simulation

SIDE = 128  # pixels of its input; embeddings are 8x8, logits 32x32
SIMULATION = Simulation(loss_size=32)


def small_sam(seed: int = 0, drop_path: float = 0.0, dropout: float = 0.0) -> Sam:
    """A whole SAM with random weights, in eval mode: a ViT of two blocks, the released decoder."""
    torch.manual_seed(seed)
    encoder = ImageEncoderViT(32, 2, 2, (1,), image_size=SIDE, window_size=4, drop_path=drop_path)
    torch.nn.init.normal_(encoder.pos_embed, std=0.5)
    prompts = PromptEncoder(image_size=SIDE, embedding_size=SIDE // 16)
    return Sam(encoder, prompts, MaskDecoder(dropout=dropout)).eval()


def discs(*circles: tuple[int, int, int], size: tuple[int, int] = (96, SIDE)) -> np.ndarray:
    """Masks (M, h, w) of circles: x, y, radius."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    return np.stack([(columns - x) ** 2 + (rows - y) ** 2 <= r * r for x, y, r in circles])
