"""Pixels into outlines: polygons that become the same mask again.

There are two kinds, because there are two ways to fill a polygon. pycocotools fills between edges, so its polygons run
along the edges of pixels; OpenCV's ``fillPoly``, by which YOLO's tools fill, paints the outline too, so these run
through the centres of the outermost pixels. Both keep holes: a ring goes along a slit into each hole and back, inside
the mask, and filling by parity leaves the hole out.
"""

import cv2
import numpy as np

Ring = np.ndarray  # (N, 2) int64 of x, y; closed, without its first corner at the end


def edge_rings(mask: np.ndarray, tolerance: float = 0.0) -> list[Ring]:
    """Outlines along the edges of pixels: pycocotools makes exactly the mask of them.

    Args:
        mask: (H, W) bool.
        tolerance: pixels by which an outline may be simplified.

    Returns:
        A ring for each 8-connected part, x from 0 to W and y from 0 to H.
    """
    window, origin = _window(mask)
    # In a mask of twice the size, a pixel's edge lies between two centres.
    twice = window.repeat(2, axis=0).repeat(2, axis=1)
    return [_simplified((ring + 1) // 2, tolerance) + origin for ring in _rings(twice)]


def centre_rings(mask: np.ndarray, tolerance: float = 0.0) -> list[Ring]:
    """Outlines through the outermost pixels: ``cv2.fillPoly`` makes exactly the mask of each of them, and their union.

    Args:
        mask: (H, W) bool.
        tolerance: pixels by which an outline may be simplified.

    Returns:
        A ring for each 8-connected part, x from 0 to W - 1 and y from 0 to H - 1; a single pixel is one corner.
    """
    window, origin = _window(mask)
    return [_simplified(ring, tolerance) + origin for ring in _rings(window)]


def chain(rings: list[Ring]) -> Ring:
    """One ring that goes from part to part and back, the nearest first: for formats of one ring per mask."""
    joined, rest = rings[0], rings[1:]
    while rest:
        distances = [_nearest(joined, ring) for ring in rest]
        which = min(range(len(rest)), key=lambda index: distances[index][0])
        _, here, there = distances[which]
        joined = _inserted(joined, here, rest.pop(which), there)
    return joined


def _nearest(one: Ring, other: Ring) -> tuple[int, int, int]:
    """Squared distance of the nearest corners of two rings, and their indices."""
    best = (np.iinfo(np.int64).max, 0, 0)
    for there, corner in enumerate(other):
        squared = ((one - corner) ** 2).sum(axis=1)
        here = int(squared.argmin())
        best = min(best, (int(squared[here]), here, there))
    return best


def _window(mask: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    """A mask's box, and the x and y of its first pixel."""
    left, top, width, height = cv2.boundingRect(mask.astype(np.uint8))
    return mask[top : top + height, left : left + width], (left, top)


def _rings(mask: np.ndarray) -> list[Ring]:
    """Every outermost pixel of each part in order, holes joined in."""
    contours, hierarchy = cv2.findContours(
        mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE
    )
    rings: list[Ring] = []
    if hierarchy is None:
        return rings
    holes: dict[int, list[Ring]] = {}
    for contour, (_, _, _, parent) in zip(contours, hierarchy[0], strict=True):
        if parent >= 0:
            holes.setdefault(int(parent), []).append(contour[:, 0].astype(np.int64))
    for index, contour in enumerate(contours):
        if hierarchy[0][index][3] < 0:
            ring = contour[:, 0].astype(np.int64)
            # From the left, so that the ring left of a hole is joined already.
            for hole in sorted(holes.get(index, []), key=lambda points: tuple(_leftmost(points))):
                ring = _with_hole(ring, hole, mask)
            rings.append(ring)
    return rings


def _leftmost(points: Ring) -> np.ndarray:
    return points[np.lexsort((points[:, 1], points[:, 0]))[0]]


def _with_hole(ring: Ring, hole: Ring, mask: np.ndarray) -> Ring:
    """Join a hole to the first outline on its left, which lies on `ring`."""
    x, y = _leftmost(hole)
    empty = np.flatnonzero(~mask[y, :x])
    target = (int(empty[-1]) + 1 if len(empty) else 0, y)
    here = int(np.flatnonzero((ring == target).all(axis=1))[0])
    there = int(np.flatnonzero((hole == (x, y)).all(axis=1))[0])
    return _inserted(ring, here, hole, there)


def _inserted(ring: Ring, here: int, other: Ring, there: int) -> Ring:
    """Leave `ring` at a corner for a whole round of `other`, from one of its corners, and come back."""
    round_trip = np.roll(other, -there, axis=0)
    return np.concatenate([ring[: here + 1], round_trip, round_trip[:1], ring[here:]])


def _simplified(ring: Ring, tolerance: float) -> Ring:
    """Without corners that repeat the last one or lie on a straight way on; with fewer, if there is a tolerance."""
    ring = ring[(ring != np.roll(ring, 1, axis=0)).any(axis=1)] if len(ring) > 1 else ring
    if len(ring) > 2:
        before, after = ring - np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0) - ring
        cross = before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0]
        onward = (before * after).sum(axis=1) > 0  # a slit's end turns back
        ring = ring[(cross != 0) | ~onward]
    if tolerance and len(ring) > 3:
        fewer = cv2.approxPolyDP(ring[:, None].astype(np.int32), tolerance, True)[:, 0]
        ring = fewer.astype(np.int64) if len(fewer) > 2 else ring
    return ring
