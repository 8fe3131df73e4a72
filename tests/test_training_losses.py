"""Losses against independent implementations: torchvision's focal loss, dice and IoU counted by hand."""

import numpy as np
import pytest
import torch
from torchvision.ops import sigmoid_focal_loss

from sa_engine.training.losses import LossRules, dice_loss, focal_loss, mask_iou, prompt_losses


@pytest.fixture
def drawn() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (3, 4, 32, 40) and masks (3, 32, 40)."""
    generator = torch.Generator().manual_seed(0)
    logits = 6 * torch.randn(3, 4, 32, 40, generator=generator)
    return logits, torch.rand(3, 32, 40, generator=generator) > 0.7


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.8, 2.0), (0.25, 0.0), (0.5, 1.5)])
def test_focal_loss_is_torchvisions(
    drawn: tuple[torch.Tensor, torch.Tensor], alpha: float, gamma: float
) -> None:
    logits, masks = drawn
    logits.requires_grad_()
    truth = masks[:, None].expand_as(logits)
    ours = focal_loss(logits, truth, alpha, gamma)
    (own_gradient,) = torch.autograd.grad(ours.sum(), logits)
    theirs = sigmoid_focal_loss(logits, truth.float(), alpha, gamma).mean(dim=(-2, -1))
    (gradient,) = torch.autograd.grad(theirs.sum(), logits)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(own_gradient, gradient, rtol=1e-4, atol=1e-9)


def test_focal_loss_of_extreme_logits_is_finite() -> None:
    logits = torch.tensor([[[1e4, -1e4], [-1e4, 1e4]]], requires_grad=True)
    loss = focal_loss(logits, torch.tensor([[[True, True], [False, False]]]), 0.25, 2.0)
    loss.sum().backward()
    assert loss.isfinite().all() and logits.grad is not None and logits.grad.isfinite().all()


def test_dice_loss_by_hand(drawn: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, masks = drawn
    ours = dice_loss(logits, masks[:, None].expand_as(logits)).numpy()
    for row in range(3):
        for output in range(4):
            chance = 1 / (1 + np.exp(-logits[row, output].double().numpy()))
            both = sum(
                p * t for p, t in zip(chance.ravel(), masks[row].numpy().ravel(), strict=True)
            )
            by_hand = 1 - (2 * both + 1) / (chance.sum() + int(masks[row].sum()) + 1)
            assert ours[row, output] == pytest.approx(by_hand, abs=1e-5)


def test_iou_of_masks_by_hand() -> None:
    first = torch.tensor([[[1, 1, 0], [0, 0, 0]], [[0, 0, 0], [0, 0, 0]]], dtype=torch.bool)
    second = torch.tensor([[[0, 1, 1], [0, 0, 1]], [[0, 0, 0], [0, 0, 0]]], dtype=torch.bool)
    assert mask_iou(first, second).tolist() == [0.25, 0.0]


def test_only_the_best_mask_gets_a_gradient(drawn: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, masks = drawn
    logits[1, 2] = torch.where(masks[1], 4.0, -4.0)  # the best by far
    logits.requires_grad_()
    iou = torch.zeros(3, 4, requires_grad=True)
    outputs = torch.tensor([[False, True, True, True]] * 3)
    losses = prompt_losses(logits, iou, outputs, masks, LossRules())
    losses.total.sum().backward()
    assert logits.grad is not None and losses.best[1] == 2
    changed = (logits.grad != 0).any(dim=(-2, -1))
    assert changed.sum(dim=1).tolist() == [1, 1, 1]
    assert torch.equal(changed.int().argmax(dim=1), losses.best)


def test_masks_that_are_no_output_cost_nothing(drawn: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, masks = drawn
    logits[:, 0] = torch.where(masks, 9.0, -9.0)  # the single mask would win
    iou = torch.full((3, 4), 0.5, requires_grad=True)
    outputs = torch.tensor([[False, True, True, True]] * 2 + [[True, False, False, False]])
    losses = prompt_losses(logits, iou, outputs, masks, LossRules())
    losses.iou.sum().backward()
    assert (losses.best[:2] > 0).all() and losses.best[2] == 0
    assert iou.grad is not None and torch.equal(iou.grad != 0, outputs)


def test_predicted_iou_learns_the_true_one(drawn: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, masks = drawn
    iou = torch.rand(3, 4, generator=torch.Generator().manual_seed(1))
    outputs = torch.ones(3, 4, dtype=torch.bool)
    every = prompt_losses(logits, iou, outputs, masks, LossRules())
    true = mask_iou(logits > 0, masks[:, None].expand_as(logits))
    torch.testing.assert_close(every.true_iou, true)
    torch.testing.assert_close(every.iou, ((iou - true) ** 2).mean(dim=1))
    best = prompt_losses(logits, iou, outputs, masks, LossRules(iou_of_all=False))
    rows = torch.arange(3)
    torch.testing.assert_close(best.iou, (iou - true)[rows, best.best] ** 2)


def test_temperature_divides_what_the_losses_of_masks_see(
    drawn: tuple[torch.Tensor, torch.Tensor],
) -> None:
    logits, masks = drawn
    iou, outputs = torch.zeros(3, 4), torch.ones(3, 4, dtype=torch.bool)
    warm = prompt_losses(logits, iou, outputs, masks, LossRules(temperature=4.0))
    plain = prompt_losses(logits / 4, iou, outputs, masks, LossRules())
    torch.testing.assert_close(warm, plain)
    assert not torch.allclose(
        warm.dice, prompt_losses(logits, iou, outputs, masks, LossRules()).dice
    )


def test_losses_are_weighted_as_the_paper_says(drawn: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, masks = drawn
    iou, outputs = torch.zeros(3, 4), torch.ones(3, 4, dtype=torch.bool)
    losses = prompt_losses(logits.bfloat16(), iou.bfloat16(), outputs, masks, LossRules())
    assert losses.total.dtype == torch.float32
    torch.testing.assert_close(losses.total, 20 * losses.focal + losses.dice + losses.iou)
