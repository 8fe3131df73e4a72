"""The interactive simulation (paper §A): an object is prompted, corrected and prompted again, and every answer trained.

Each step has its own backward pass, into an embedding that is a leaf: of all steps and masks only one decode is in
memory at a time, and the image encoder is passed once, backwards, after all of them.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sa_engine.modeling.mask_decoder import MULTIMASK_OUTPUTS
from sa_engine.modeling.sam import Sam
from sa_engine.modeling.trainable import attend, predict_masks
from sa_engine.training.losses import LossRules, prompt_losses
from sa_engine.training.prompts import PromptRules, Prompts, mask_only_places
from sa_engine.training.tally import Tally


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """How masks are trained.

    Attributes:
        prompts: how objects are prompted.
        losses: what their masks cost.
        reduce_steps: "mean" or "sum" of a mask's losses over its steps. The paper does not say which.
        loss_size: side of the square logits that losses see: 256, as they are decoded, or 1024, enlarged.
        masks_per_decode: objects prompted at once; memory grows with it.
        bf16: decode in bfloat16 by autocast; losses stay in float32.
    """

    prompts: PromptRules = field(default_factory=PromptRules)
    losses: LossRules = field(default_factory=LossRules)
    reduce_steps: str = "mean"
    loss_size: int = 256
    masks_per_decode: int = 4
    bf16: bool = False

    def train(
        self,
        sam: Sam,
        embedding: Tensor,
        masks: np.ndarray,
        rng: np.random.Generator,
        tally: Tally,
    ) -> None:
        """Prompt one image's objects through all steps, and add the gradients of their summed losses.

        Args:
            sam: the model.
            embedding: (1, 256, 64, 64), a leaf; gets a gradient if it requires one.
            masks: (M, h, w) bool, none empty, in the model-input frame: the truth.
            rng: of all draws.
            tally: receives the losses, and what they were made of.
        """
        for start in range(0, len(masks), self.masks_per_decode):
            some = masks[start : start + self.masks_per_decode]
            self._train_some(sam, embedding, some, rng, tally)

    def _train_some(
        self,
        sam: Sam,
        embedding: Tensor,
        masks: np.ndarray,
        rng: np.random.Generator,
        tally: Tally,
    ) -> None:
        size, scale = masks.shape[1:], 1 / self.prompts.steps
        truth = torch.from_numpy(masks).to(embedding.device)
        small = shrink(truth, sam.image_size // self.loss_size)
        prompts = Prompts(masks, self.prompts, rng)
        single = torch.zeros(len(masks), 1, dtype=torch.bool, device=embedding.device)
        multimask = torch.from_numpy(prompts.multimask)[:, None].to(embedding.device)
        outputs = torch.cat([~multimask, multimask.expand(-1, MULTIMASK_OUTPUTS)], dim=1)
        previous = None
        for number, new_point in enumerate([False, *mask_only_places(self.prompts, rng)]):
            if new_point and previous is not None:
                with torch.no_grad(), tally.timed("prompts", embedding.device):
                    predicted = (enlarge(previous, sam.image_size, size)[:, 0] > 0).cpu().numpy()
                    for row, (mask, mistaken) in enumerate(zip(masks, predicted, strict=True)):
                        prompts.correct(row, mask, mistaken)
            with tally.timed("decoder", embedding.device):
                logits, iou = self._decode(sam, embedding, prompts, previous)
            with tally.timed("losses", embedding.device):
                seen = enlarge(logits, self.loss_size, small.shape[1:])
                losses = prompt_losses(seen, iou, outputs, small, self.losses)
                loss = losses.total.sum() * (scale if self.reduce_steps == "mean" else 1.0)
            with tally.timed("backward", embedding.device):
                loss.backward()
            previous, chosen = carry_on(logits, iou, outputs)
            tally.note(
                losses, chosen, iou, torch.from_numpy(prompts.boxed), (number, self.prompts.steps)
            )
            outputs = ~single
        tally.count += len(masks)

    def _decode(
        self, sam: Sam, embedding: Tensor, prompts: Prompts, previous: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Logits (B, M, 256, 256) and predicted IoU (B, M): of all 4 outputs at first, later of the single one."""
        points, labels = (torch.from_numpy(a).to(embedding.device) for a in prompts.encoded())
        wanted = slice(None) if previous is None else slice(0, 1)
        with torch.autocast(embedding.device.type, torch.bfloat16, enabled=self.bf16):
            encoder = sam.prompt_encoder
            tokens = encoder.encode_points(points, labels)
            dense = encoder.no_mask() if previous is None else encoder.mask_downscaling(previous)
            image = (embedding + dense).flatten(2).transpose(1, 2)
            positions = encoder.dense_positions().flatten(2).transpose(1, 2)
            attended = attend(sam.mask_decoder, image, positions, tokens)
            logits = predict_masks(sam.mask_decoder, attended, wanted)
            iou = sam.mask_decoder.predict_iou(attended)[:, wanted]
        return logits.float(), iou.float()


def carry_on(logits: Tensor, iou: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """The mask prompt of the next step: the logits of the output with the highest predicted IoU.

    Args:
        logits: (B, M, 256, 256).
        iou: (B, M) predicted.
        outputs: (B, M) bool, among which to choose.

    Returns:
        Logits (B, 1, 256, 256), not binarised and without gradient, and the index of each (B,).
    """
    chosen = iou.detach().masked_fill(~outputs, -torch.inf).argmax(dim=1)
    return logits.detach()[torch.arange(len(logits)), chosen][:, None], chosen


def shrink(masks: Tensor, factor: int) -> Tensor:
    """(M, h, w) bool masks at 1 / factor of their size, rounded up: set where at least half of a cell is.

    A mask that no cell shows keeps the cells in which it has its most pixels.
    """
    if factor == 1:
        return masks
    height, width = masks.shape[1:]
    padded = F.pad(masks[:, None].float(), (0, -width % factor, 0, -height % factor))
    shares = F.avg_pool2d(padded, factor)[:, 0]
    most = shares.amax(dim=(1, 2), keepdim=True)
    return shares >= most.clamp(max=0.5)


def enlarge(logits: Tensor, side: int, size: tuple[int, ...]) -> Tensor:
    """(B, M, 256, 256) logits of the padded square at another side, bilinear, cut to the image's (h, w)."""
    if logits.shape[-1] != side:
        logits = F.interpolate(logits, (side, side), mode="bilinear", align_corners=False)
    return logits[..., : size[0], : size[1]]
