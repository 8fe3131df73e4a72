"""The decoder for training against the plain one: the same values and the same gradients."""

import pytest
import torch
from torch import Tensor
from training import SIDE, small_sam

from sa_engine.modeling.mask_decoder import Attended
from sa_engine.modeling.sam import Sam, load_sam
from sa_engine.modeling.trainable import attend, predict_masks
from sa_engine.modeling.weights import resolve


@pytest.fixture(scope="module", params=["small", "vit_t"])
def sam(request: pytest.FixtureRequest) -> Sam:
    return small_sam() if request.param == "small" else load_sam(resolve("vit_t"))


@pytest.mark.parametrize("with_mask", [False, True])
def test_values_and_gradients_are_the_plain_decoders(sam: Sam, with_mask: bool) -> None:
    torch.manual_seed(0)
    encoder, decoder = sam.prompt_encoder, sam.mask_decoder
    side = encoder.embedding_size
    embedding = (0.3 * torch.randn(1, 256, side, side)).requires_grad_()
    points, labels = SIDE * torch.rand(2, 3, 2), torch.tensor([[1.0, 0.0, -1.0], [1.0, 2.0, 3.0]])
    previous = torch.randn(2, 1, 4 * side, 4 * side) if with_mask else None
    found: list[dict[str, Tensor]] = []
    for plain in (True, False):
        sam.zero_grad()
        embedding.grad = None
        tokens = encoder.encode_points(points, labels)
        dense = encoder.no_mask() if previous is None else encoder.mask_downscaling(previous)
        positions = encoder.dense_positions()
        attended: Attended
        if plain:
            attended = decoder.attend(embedding, positions, tokens, dense)
            logits = decoder.predict_masks(attended)
        else:
            image = (embedding + dense).flatten(2).transpose(1, 2)
            attended = attend(decoder, image, positions.flatten(2).transpose(1, 2), tokens)
            logits = predict_masks(decoder, attended)
        iou = decoder.predict_iou(attended)
        (logits.square().mean() + iou.square().sum()).backward()
        assert embedding.grad is not None
        gradients = {n: p.grad.clone() for n, p in sam.named_parameters() if p.grad is not None}
        found.append(
            {
                "logits": logits.detach(),
                "iou": iou.detach(),
                "embedding": embedding.grad,
                **gradients,
            }
        )
    expected, ours = found
    # These biases cancel in a softmax over positions: their gradient is zero but for rounding.
    missing = expected.keys() - ours.keys()
    assert all(name.endswith("token_to_image.k_proj.bias") for name in missing)
    assert len(ours) > 100 and ours.keys() <= expected.keys()
    for name, value in ours.items():
        if name.endswith("k_proj.bias"):
            assert value.norm() < 1e-4  # it cancels in the softmax: this is rounding
        else:
            assert (value - expected[name]).norm() < 1e-4 * expected[name].norm() + 1e-9, name


def test_fewer_outputs_are_the_same_ones() -> None:
    sam = small_sam()
    attended = Attended(torch.randn(2, 256), torch.randn(2, 4, 256), torch.randn(2, 64, 256))
    every = predict_masks(sam.mask_decoder, attended)
    torch.testing.assert_close(predict_masks(sam.mask_decoder, attended, slice(0, 1)), every[:, :1])
    torch.testing.assert_close(
        predict_masks(sam.mask_decoder, attended, slice(1, None)), every[:, 1:]
    )


def test_dropout_is_as_the_modules_mode_says() -> None:
    sam = small_sam(dropout=0.5)
    image, positions = torch.randn(1, 64, 256), torch.randn(1, 64, 256)
    tokens = torch.randn(1, 2, 256)
    again = [attend(sam.mask_decoder, image, positions, tokens).iou_token for _ in range(2)]
    assert torch.equal(*again)
    sam.train()
    again = [attend(sam.mask_decoder, image, positions, tokens).iou_token for _ in range(2)]
    assert not torch.allclose(*again)
