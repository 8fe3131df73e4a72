"""The interactive simulation run on a real (small) model: what is decoded at each step, and what is learned from it."""

import itertools
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from training import SIDE, SIMULATION, discs, small_sam

from sa_engine.modeling.prompt_encoder import BACKGROUND, FOREGROUND
from sa_engine.modeling.sam import Sam
from sa_engine.training.losses import Losses, prompt_losses
from sa_engine.training.prompts import PromptRules, Prompts
from sa_engine.training.simulate import Simulation, carry_on, enlarge, shrink
from sa_engine.training.tally import Tally

MASKS = discs((40, 40, 20), (90, 50, 12), (64, 48, 30))


@dataclass
class Step:
    """What a decode was given, and what came out."""

    points: np.ndarray
    labels: np.ndarray
    previous: Tensor | None
    logits: Tensor
    iou: Tensor


@dataclass(frozen=True, kw_only=True)
class Watched(Simulation):
    """The simulation, which keeps what went through its decoder."""

    steps: list[Step] = field(default_factory=list)

    def _decode(
        self, sam: Sam, embedding: Tensor, prompts: Prompts, previous: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        logits, iou = super()._decode(sam, embedding, prompts, previous)
        points, labels = prompts.encoded()
        self.steps.append(Step(points, labels, previous, logits.detach(), iou.detach()))
        return logits, iou


@pytest.fixture(scope="module")
def sam() -> Sam:
    return small_sam()


@pytest.fixture(scope="module")
def embedding(sam: Sam) -> Tensor:
    with torch.no_grad():
        return sam.image_encoder(torch.randn(1, 3, SIDE, SIDE))


def watch(sam: Sam, embedding: Tensor, seed: int = 0, **rules: float) -> tuple[list[Step], Tally]:
    simulation = Watched(loss_size=32, prompts=PromptRules(**rules))  # type: ignore[arg-type]
    tally = Tally()
    sam.zero_grad()
    simulation.train(sam, embedding, MASKS, np.random.default_rng(seed), tally)
    return simulation.steps, tally


def test_an_object_is_prompted_eleven_times(sam: Sam, embedding: Tensor) -> None:
    for seed in range(4):
        steps, tally = watch(sam, embedding, seed)
        counts = [step.labels.shape[1] for step in steps]
        assert len(steps) == 11 and counts[0] == 2 and tally.count == 3
        added = np.diff(counts).tolist()
        assert sorted(added) == [0, 0] + [1] * 8 and added[-1] == 0


def test_the_previous_logits_are_fed_back(sam: Sam, embedding: Tensor) -> None:
    steps, _ = watch(sam, embedding)
    assert steps[0].previous is None and steps[0].logits.shape == (3, 4, 32, 32)
    chosen = 1 + steps[0].iou[:, 1:].argmax(dim=1)  # of the three masks, by predicted IoU
    first = steps[1].previous
    assert first is not None and torch.equal(first[:, 0], steps[0].logits[range(3), chosen])
    for before, after in itertools.pairwise(steps[1:]):
        assert before.logits.shape == (3, 1, 32, 32)
        assert after.previous is not None and torch.equal(after.previous, before.logits)
        assert not after.previous.requires_grad
        assert len(after.previous.unique()) > 100  # logits, not a mask


def test_new_points_lie_in_the_error_of_the_mask_before(sam: Sam, embedding: Tensor) -> None:
    steps, _ = watch(sam, embedding, box_odds=0)
    seen = set()
    for before, after in itertools.pairwise(steps):
        if after.labels.shape[1] == before.labels.shape[1]:
            continue
        assert after.previous is not None
        predicted = (enlarge(after.previous, SIDE, MASKS.shape[1:])[:, 0] > 0).numpy()
        for row in range(3):
            # The newest point stands before the padding.
            (x, y), label = after.points[row, -2].astype(int), after.labels[row, -2]
            assert (
                MASKS[row, y, x] != predicted[row, y, x] or not (MASKS[row] ^ predicted[row]).any()
            )
            assert label == (FOREGROUND if MASKS[row, y, x] else BACKGROUND)
            seen.add(int(label))
    assert seen == {FOREGROUND, BACKGROUND}


def test_earlier_prompts_stay(sam: Sam, embedding: Tensor) -> None:
    steps, _ = watch(sam, embedding)
    for row in range(3):
        boxed = steps[0].labels[row, 0] > FOREGROUND
        tail = 2 if boxed else 1
        for before, after in itertools.pairwise(steps):
            kept = before.points.shape[1] - tail
            assert np.array_equal(before.points[row, :kept], after.points[row, :kept])
            assert np.array_equal(before.points[row, -tail:], after.points[row, -tail:])


def test_only_the_best_of_three_masks_is_trained(sam: Sam, embedding: Tensor) -> None:
    one = replace(SIMULATION, prompts=PromptRules(box_odds=0, corrections=0, mask_only_steps=0))
    for seed in range(5):
        sam.zero_grad()
        tally = Tally()
        one.train(sam, embedding, MASKS[:1], np.random.default_rng(seed), tally)
        heads = sam.mask_decoder.output_hypernetworks_mlps
        gradients = [next(head.parameters()).grad for head in heads]
        trained = [i for i, grad in enumerate(gradients) if grad is not None and grad.any()]
        assert [tally.sums[f"best_{i}"] for i in range(4)] == [
            float(i in trained) for i in range(4)
        ]
        assert len(trained) == 1 and trained[0] > 0


def test_a_box_may_be_answered_by_the_single_mask(sam: Sam, embedding: Tensor) -> None:
    rules = PromptRules(box_odds=1, corrections=0, mask_only_steps=0, box_multimask=False)
    sam.zero_grad()
    tally = Tally()
    replace(SIMULATION, prompts=rules).train(sam, embedding, MASKS, np.random.default_rng(0), tally)
    assert tally.sums["best_0"] == 3 and tally.sums["boxes"] == 3
    (used, *others) = [
        any(p.grad is not None and p.grad.any() for p in head.parameters())
        for head in sam.mask_decoder.output_hypernetworks_mlps
    ]
    assert used and not any(others)


def test_steps_are_averaged_or_summed(sam: Sam, embedding: Tensor) -> None:
    def gradient(reduce_steps: str) -> Tensor:
        sam.zero_grad()
        simulation = replace(SIMULATION, reduce_steps=reduce_steps)
        simulation.train(sam, embedding, MASKS, np.random.default_rng(0), Tally())
        found = sam.mask_decoder.iou_token.weight.grad
        assert found is not None
        return found.clone()

    torch.testing.assert_close(gradient("sum"), 11 * gradient("mean"), rtol=1e-4, atol=1e-6)


def test_the_encoder_learns_as_from_one_backward_pass(sam: Sam) -> None:
    """Losses go into a leaf, and its gradient once through the encoder: the same as through the whole graph."""
    pixels = torch.randn(1, 3, SIDE, SIDE)
    gradients = []
    for whole in (False, True):
        sam.zero_grad()
        embedding = sam.image_encoder(pixels)
        leaf = embedding if whole else embedding.detach().requires_grad_()
        simulation = replace(SIMULATION, prompts=PromptRules(corrections=0, mask_only_steps=0))
        simulation.train(sam, leaf, MASKS, np.random.default_rng(0), Tally())
        if not whole:
            embedding.backward(leaf.grad)
        gradients.append(
            [p.grad.clone() for p in sam.image_encoder.parameters() if p.grad is not None]
        )
    assert len(gradients[0]) == len(gradients[1]) > 20
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-7)


def test_what_is_carried_on_is_the_most_confident_output() -> None:
    logits = torch.arange(2 * 4).reshape(2, 4, 1, 1).expand(2, 4, 5, 5).float().requires_grad_()
    iou = torch.tensor([[0.9, 0.1, 0.5, 0.2], [0.9, 0.1, 0.5, 0.2]])
    outputs = torch.tensor([[False, True, True, True], [True, False, False, False]])
    previous, chosen = carry_on(logits, iou, outputs)
    assert chosen.tolist() == [2, 0] and not previous.requires_grad
    assert previous[:, 0, 0, 0].tolist() == [2, 4]


def test_small_masks_do_not_vanish_when_shrunk() -> None:
    masks = torch.from_numpy(discs((40, 40, 20), (90, 50, 0)))
    small = shrink(masks, 4)
    assert small.shape == (2, 24, 32)
    assert small[1].nonzero().tolist() == [[12, 22]]
    assert abs(int(small[0].sum()) * 16 - int(masks[0].sum())) < 60
    ragged = torch.from_numpy(discs((20, 20, 9), size=(41, 43)))
    assert shrink(ragged, 4).shape == (1, 11, 11)
    assert torch.equal(shrink(masks, 1), masks)


def test_bfloat16_is_of_the_decoder_and_never_of_the_losses(
    sam: Sam, embedding: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost: list[tuple[Tensor, ...]] = []

    def losses_of(logits: Tensor, iou: Tensor, *more: Any) -> Losses:
        found = prompt_losses(logits, iou, *more)
        lost.append((logits, iou, found.total))
        return found

    monkeypatch.setattr("sa_engine.training.simulate.prompt_losses", losses_of)
    first = []
    for bf16 in (False, True):
        simulation = Watched(loss_size=32, bf16=bf16, prompts=PromptRules(corrections=0))
        simulation.train(sam, embedding, MASKS, np.random.default_rng(0), Tally())
        first.append(simulation.steps[0])
    assert {one.dtype for each in lost for one in each} == {torch.float32}
    exact, rough = first
    for name in ("logits", "iou"):
        one, other = getattr(exact, name), getattr(rough, name)
        assert not torch.equal(one, other)
        assert float((one - other).abs().max()) < 0.1 * float(one.abs().max())
    # Numbers of bfloat16 have eight bits: such are the decoder's, and not what the losses make of them.
    assert torch.equal(rough.logits, rough.logits.bfloat16().float())
    totals = lost[-1][2].detach()
    assert not torch.equal(totals, totals.bfloat16().float())
