"""Meshes of coloured quadrilaterals, and the two shapes that a body consists of."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike


class Mesh:
    """Quadrilaterals, each with a colour.

    quads [Q, 4, 3] in metres; colours [Q, 3] in 0..255; bias [Q] in metres, added to the distance
    from the camera before sorting, so that an outer layer is painted after the layer below it.
    """

    def __init__(self) -> None:
        self._parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, quads: np.ndarray, colours: ArrayLike, bias: float = 0.0) -> None:
        """Append quads [..., 4, 3], colours broadcastable to [..., 3]."""
        quads = quads.reshape(-1, 4, 3)
        colours = np.asarray(colours, float)
        colours = np.broadcast_to(colours.reshape(-1, 3), (len(quads), 3))
        self._parts.append((quads, colours, np.full(len(quads), bias)))

    def stack(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(quads, colours, bias) of all parts."""
        quads, colours, bias = (np.concatenate(part) for part in zip(*self._parts, strict=True))
        return quads, colours, bias


def tube(
    path: ArrayLike, across: ArrayLike, along: ArrayLike, sides: int = 10, square: float = 2.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The surface of a bent tube with elliptic rings.

    path [R, 3]: centres of the rings, downwards or forwards, so that quads face outwards; across
    and along [R]: the ring's half axes to the side and to the front; square: 2 for ellipses, more
    for boxier rings. Returns quads [R-1, sides, 4, 3], u [R-1, sides], the angle around the tube (0
    front, pi back), and v [R-1, sides], the position along the path, from 0 to 1.
    """
    path = np.asarray(path, float)
    rings = len(path)
    step = np.gradient(path, axis=0)
    step /= np.linalg.norm(step, axis=1, keepdims=True)
    side = np.array([1.0, 0.0, 0.0]) - step[:, :1] * step
    side /= np.linalg.norm(side, axis=1, keepdims=True)
    front = np.cross(side, step)
    angle = np.arange(sides + 1) * (2 * np.pi / sides)
    power = 2.0 / square
    sine = np.sign(np.sin(angle)) * np.abs(np.sin(angle)) ** power
    cosine = np.sign(np.cos(angle)) * np.abs(np.cos(angle)) ** power
    out_side = np.broadcast_to(across, rings)[:, None, None] * sine[None, :, None]
    out_front = np.broadcast_to(along, rings)[:, None, None] * cosine[None, :, None]
    ring = path[:, None] + out_side * side[:, None] + out_front * front[:, None]
    quads = np.stack([ring[:-1, :-1], ring[:-1, 1:], ring[1:, 1:], ring[1:, :-1]], axis=2)
    middle = angle[:-1] + np.pi / sides
    u = np.where(middle > np.pi, middle - 2 * np.pi, middle)
    v = (np.arange(rings - 1) + 0.5) / (rings - 1)
    return quads, np.broadcast_to(u, (rings - 1, sides)), np.repeat(v[:, None], sides, 1)


def ball(
    centre: ArrayLike, radii: Sequence[float] | np.ndarray, rings: int = 6, sides: int = 8
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The surface of an ellipsoid with radii (x, y, z) in metres. Returns the same as `tube`."""
    polar = np.linspace(0.04, np.pi - 0.04, rings + 1)
    path = np.array(centre) + np.outer(np.cos(polar), (0.0, 0.0, radii[2]))
    return tube(path, radii[0] * np.sin(polar), radii[1] * np.sin(polar), sides)


def limb(joints: ArrayLike, radii: Sequence[float], rings: int) -> tuple[np.ndarray, np.ndarray]:
    """A path [rings, 3] through three joints, and radii [rings] interpolated along it."""
    at = np.linspace(0, 2, rings)
    path = np.stack([np.interp(at, (0, 1, 2), np.array(joints)[:, i]) for i in range(3)], axis=1)
    return path, np.interp(at, np.linspace(0, 2, len(radii)), radii)


def flat_colours(shape: tuple[int, int], base: ArrayLike) -> np.ndarray:
    """Colours [*shape, 3], all equal to `base`, to be changed afterwards."""
    return np.broadcast_to(np.asarray(base, float), (*shape, 3)).copy()
