"""A model in training: what of it learns, and what behaves as when it is used."""

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from sa_engine.modeling.image_encoder import Block
from sa_engine.modeling.sam import Sam
from sa_engine.modeling.tiny_vit import MBConv, PatchMerging, TinyViTBlock
from sa_engine.training.config import RetrainConfig

BLOCKS = (Block, MBConv, PatchMerging, TinyViTBlock)  # recomputed whole by gradient checkpointing


def set_trainable(sam: Sam, config: RetrainConfig) -> None:
    """Ask for gradients of what is trained: the encoder if it is; never a classification head left over."""
    sam.requires_grad_(True)
    if not config.train_encoder:
        sam.image_encoder.requires_grad_(False)
    for name, module in sam.image_encoder.named_children():
        if name in ("head", "norm_head"):
            module.requires_grad_(False)
    for name, parameter in sam.mask_decoder.named_parameters():
        if name.endswith("k_proj.bias"):
            # It cancels in the softmax: its gradient is rounding, which AdamW would blow up to whole steps.
            parameter.requires_grad_(False)
    if config.gradient_checkpointing and config.train_encoder:
        for block in sam.image_encoder.modules():
            if isinstance(block, BLOCKS):
                again = partial(checkpoint, type(block).forward, block, use_reentrant=False)
                block.forward = again  # type: ignore[method-assign]


def set_training_mode(sam: Sam, config: RetrainConfig) -> None:
    """Dropout and drop path as in training; a frozen encoder, and all batch norms, as when the model is used."""
    sam.train()
    if not config.train_encoder:
        sam.image_encoder.eval()
    for module in sam.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
