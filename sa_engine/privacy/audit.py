"""The audit: what was done to each photo, and with what; a line of JSON for each, no pixels."""

from collections.abc import Mapping
from typing import Any

from sa_engine import __version__
from sa_engine.option_groups import PrivacyConfig
from sa_engine.plan import PlannedImage
from sa_engine.privacy.redactor import Redacted


def audit_of(
    item: PlannedImage,
    redacted: Redacted,
    *,
    sha256_in: str,
    sha256_out: str | None,
    detectors: list[dict[str, Any]],
    config: PrivacyConfig,
) -> Mapping[str, Any]:
    """What was done to a photo.

    Args:
        item: the photo.
        redacted: what became of it.
        sha256_in, sha256_out: hex, of the photo's file and of the released one, if there is one.
        detectors: as `Redactor.describe` gives them.
        config: how it was redacted.
    """
    return {
        "image_id": item.image_id,
        "key": item.key,
        "sha256_in": sha256_in,
        "sha256_out": sha256_out,
        "width": redacted.image.shape[1],
        "height": redacted.image.shape[0],
        "counts": redacted.counts,
        "regions": [region.to_dict() for region in redacted.regions],
        "checks": redacted.checks,
        "detections_inside": redacted.inside,
        "redaction": config.redaction,
        "soft_edge": config.soft_edge,
        "detectors": detectors,
        "version": __version__,
    }
