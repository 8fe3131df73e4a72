"""The shared SAM against the released implementations: segment-anything (ViT) and mobilesam-mirror (TinyViT)."""

from pathlib import Path

import numpy as np
import pytest
import segment_anything
import torch
from parity.reference import load_reference, photo
from safetensors.torch import save_file
from torch import nn

from sa_engine.modeling.folded import FoldedDecoder
from sa_engine.modeling.layers import DropPath
from sa_engine.modeling.sam import (
    CheckpointError,
    Sam,
    build_sam,
    load_sam,
    model_fingerprint,
    select_device,
)
from sa_engine.modeling.weights import resolve

EMBEDDING_TOLERANCE = 1e-4
LOGIT_TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def tiny() -> tuple[Sam, nn.Module]:
    """Our TinyViT SAM and MobileSAM's, both with the real weights."""
    return load_sam(resolve("vit_t")), load_reference("vit_t")[0]


@pytest.fixture(scope="module")
def vit_b() -> tuple[Sam, nn.Module]:
    """Our ViT-B SAM and Meta's, with the same random weights."""
    torch.manual_seed(0)
    reference = segment_anything.sam_model_registry["vit_b"]().eval()
    for name, parameter in reference.named_parameters():
        if "rel_pos" in name or "pos_embed" in name:  # zero when fresh: would hide mistakes
            nn.init.normal_(parameter, std=0.02)
    ours = build_sam("vit_b")
    ours.load_state_dict(reference.state_dict())
    return ours, reference


def pixels() -> torch.Tensor:
    """A real photo as model input before normalisation: (1, 3, 683, 1024)."""
    image = torch.from_numpy(photo("coffee")).permute(2, 0, 1)[None].float()
    return nn.functional.interpolate(image, (683, 1024), mode="bilinear")


@pytest.mark.parametrize(
    ("models", "kinds_of_prompt"),
    [("tiny", ("p", "b", "m", "pb", "pm", "bm", "pbm")), ("vit_b", ("p", "pbm"))],
)
def test_embeddings_and_logits_equal_the_released_models(
    models: str, kinds_of_prompt: tuple[str, ...], request: pytest.FixtureRequest
) -> None:
    """Points, boxes and masks, alone and together, multimask and single."""
    ours, reference = request.getfixturevalue(models)
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(3, 2, 2, generator=generator) * 1000
    labels = torch.tensor([[1, 0], [1, 1], [1, -1]])
    boxes = torch.tensor([[100, 80, 400, 500.0]]).repeat(3, 1)
    masks = torch.randn(3, 1, 256, 256, generator=generator)
    with torch.inference_mode():
        expected = reference.image_encoder(reference.preprocess(pixels()))
        embedding = ours.image_encoder(ours.preprocess(pixels()))
        assert embedding.std() > 0.01
        assert (embedding - expected).abs().max() <= EMBEDDING_TOLERANCE
        image_pe = ours.prompt_encoder.dense_positions()
        assert torch.equal(image_pe, reference.prompt_encoder.get_dense_pe())
        for kinds in kinds_of_prompt:
            given = {
                "points": (points, labels) if "p" in kinds else None,
                "boxes": boxes if "b" in kinds else None,
                "masks": masks if "m" in kinds else None,
            }
            sparse, dense = reference.prompt_encoder(**given)
            tokens, added = ours.prompt_encoder(
                *(given["points"] or (None, None)), given["boxes"], given["masks"]
            )
            assert torch.allclose(tokens, sparse, atol=1e-6)
            for multimask in (True, False):
                want = reference.mask_decoder(expected, image_pe, sparse, dense, multimask)
                got = ours.mask_decoder(expected, image_pe, tokens, added, multimask)
                for value, target in zip(got, want, strict=True):
                    assert value.shape == target.shape
                    assert (value - target).abs().max() <= LOGIT_TOLERANCE


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("with_mask", [False, True])
def test_folded_decoder_equals_the_plain_one(depth: int, with_mask: bool) -> None:
    """Exact to rounding, for random weights with random biases and any number of layers."""
    torch.manual_seed(0)
    model = build_sam("vit_t", decoder_depth=depth)
    for parameter in model.mask_decoder.parameters():
        nn.init.normal_(parameter, std=0.1)
    image = torch.randn(1, 256, 64, 64)
    points, labels = torch.rand(3, 2, 2) * 1000, torch.ones(3, 2)
    with torch.inference_mode():
        positions = model.prompt_encoder.dense_positions()
        masks = torch.randn(3, 1, 256, 256) if with_mask else None
        tokens, dense = model.prompt_encoder(points, labels, None, masks)
        folded = FoldedDecoder(model.mask_decoder, positions)
        attended = folded.attend(folded.share(image, dense), tokens)
        for multimask, wanted in ((True, slice(1, None)), (False, slice(0, 1))):
            logits, iou = model.mask_decoder(image, positions, tokens, dense, multimask)
            found = folded.predict_masks(attended, wanted)
            assert (found - logits).abs().max() <= 1e-5 * logits.abs().max()
            assert torch.allclose(
                folded.predict_iou(attended)[:, wanted], iou, atol=1e-5, rtol=1e-5
            )


def test_state_dict_round_trip(vit_b: tuple[Sam, nn.Module]) -> None:
    """Ours loads strictly into the reference, and back."""
    ours, _ = vit_b
    fresh = segment_anything.sam_model_registry["vit_b"]()
    fresh.load_state_dict(ours.state_dict())
    again = build_sam("vit_b")
    again.load_state_dict(fresh.state_dict())
    assert model_fingerprint(again) == model_fingerprint(ours)


@pytest.mark.parametrize("name", ["vit_b", "vit_l", "vit_h"])
def test_names_and_shapes_of_the_released_vits(name: str) -> None:
    """Key for key, without allocating ViT-H's 2.5 GB."""
    with torch.device("meta"):
        ours, reference = build_sam(name), segment_anything.sam_model_registry[name]()
    shapes = {key: value.shape for key, value in ours.state_dict().items()}
    assert shapes == {key: value.shape for key, value in reference.state_dict().items()}


def test_a_checkpoint_tells_its_architecture_and_depth(tmp_path: Path) -> None:
    """A data-generation model with three decoder layers loads as what it is."""
    model = build_sam("vit_t", decoder_depth=3)
    torch.save(model.state_dict(), tmp_path / "three.pth")
    loaded = load_sam(tmp_path / "three.pth")
    assert len(loaded.mask_decoder.transformer.layers) == 3
    assert model_fingerprint(loaded) == model_fingerprint(model)


def test_a_checkpoint_of_an_old_pytorch_loads(tmp_path: Path) -> None:
    """Files from before the zip format, and safetensors, give the same model."""
    model = build_sam("vit_t")
    path = tmp_path / "old.pth"
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False)
    save_file(model.state_dict(), tmp_path / "new.safetensors")
    fingerprints = {model_fingerprint(load_sam(p)) for p in tmp_path.iterdir()}
    assert fingerprints == {model_fingerprint(model)}


def test_fingerprint_sees_one_changed_value(tiny: tuple[Sam, nn.Module]) -> None:
    """The smallest change of one weight is another model."""
    model = build_sam("vit_t")
    model.load_state_dict(tiny[0].state_dict())
    before = model_fingerprint(model)
    assert before == model_fingerprint(tiny[0])
    with torch.no_grad():
        weight = model.mask_decoder.iou_token.weight
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(10.0))
    assert model_fingerprint(model) != before


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"not a checkpoint", "cannot read checkpoint"),
        ({"model": {"a": torch.zeros(1)}}, "flat state dict"),
        ({"backbone.weight": torch.zeros(1)}, "found backbone"),
        ({"image_encoder.patch_embed.proj.weight": torch.zeros(768, 3, 16, 16)}, "do not fit"),
    ],
)
def test_a_wrong_checkpoint_is_named(content: object, told: str, tmp_path: Path) -> None:
    """The message names the file and what was found."""
    path = tmp_path / "wrong.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=told) as error:
        load_sam(path)
    assert str(path) in str(error.value)


def test_training_drops_and_learns() -> None:
    """Dropout and drop path act in training mode only, and every part that serves masks gets a gradient."""
    torch.manual_seed(0)
    model = build_sam("vit_t", dropout=0.1, drop_path=0.4).train()
    image = model.preprocess(pixels())
    prompt = (torch.tensor([[[500.0, 300.0]]]), torch.tensor([[1]]), None, None)

    def forward() -> tuple[torch.Tensor, torch.Tensor]:
        tokens, dense = model.prompt_encoder(*prompt)
        positions = model.prompt_encoder.dense_positions()
        return model.mask_decoder(model.image_encoder(image), positions, tokens, dense, True)

    logits, iou = forward()
    with torch.no_grad():
        assert not torch.equal(logits, forward()[0])
        model.eval()
        assert torch.equal(forward()[0], forward()[0])
    model.train()
    (logits.square().mean() + iou.square().mean()).backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    unused = ("image_encoder.head", "image_encoder.norm_head", "prompt_encoder.mask_downscaling")
    other_prompts = ("prompt_encoder.point_embeddings", "mask_decoder.output_hypernetworks_mlps.0")
    assert all(name.startswith(unused + other_prompts) for name in without), without


def test_drop_path_keeps_the_mean_and_drops_whole_samples() -> None:
    torch.manual_seed(0)
    drop = DropPath(0.25)
    x = torch.ones(8000, 3, 2)
    out = drop.train()(x)
    kept = out.flatten(1)
    assert torch.equal(kept.amin(dim=1), kept.amax(dim=1))
    assert kept.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert float(out.mean()) == pytest.approx(1, abs=0.02)
    assert drop.eval()(x) is x


def test_bf16_stays_near_fp32(tiny: tuple[Sam, nn.Module]) -> None:
    """Autocast arithmetic: another rounding, the same picture."""
    from sa_engine.predictor import Predictor

    image = photo("chelsea")
    point = {"points": np.array([[[300.0, 100.0]]]), "labels": np.array([[1]])}
    exact, rounded = (
        (p := Predictor(tiny[0], precision)).predict(p.embed(image), **point)
        for precision in ("fp32", "bf16")
    )
    assert rounded.logits.dtype == torch.float32
    agreement = ((exact.logits > 0) == (rounded.logits > 0)).float().mean()
    assert agreement > 0.97
    assert not torch.equal(exact.logits, rounded.logits)


def test_select_device() -> None:
    """auto always finds something; a device that is absent is refused by name."""
    assert select_device("auto").type in {"cpu", "cuda", "mps"}
    if not torch.backends.mps.is_available():
        with pytest.raises(Exception, match="mps is not available"):
            select_device("mps")
