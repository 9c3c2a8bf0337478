"""One picture of one person: camera, background, light, occlusion, blur and noise."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw, ImageFilter

from .body import body_mesh
from .people import Person, sample_person

SOURCES = ("AG-ReID", "G2APS-AG")
SIDE, FRONT, BACK = 0, 1, 2  # labels of the angle
_FINE = 3  # antialiasing: the person is drawn this many times larger, then averaged down
_HEIGHTS = {  # pixels, lowest and highest, by (source, aerial)
    (0, True): (92, 140),
    (0, False): (162, 240),
    (1, True): (112, 170),
    (1, False): (204, 280),
}

Metres: TypeAlias = Any  # floats of Python and NumPy; on Python 3.10 NumPy's types differ


@dataclass(frozen=True)
class View:
    """How a picture is taken. Angles in radians, lengths in metres unless noted."""

    source: int  # index into SOURCES
    aerial: bool
    angle: int  # SIDE, FRONT or BACK
    yaw: float  # direction in which the person faces; 0 is away from the camera
    dim: int  # 1 at dusk or night, 0 in daylight
    phase: float  # moment within a walking cycle
    stride: float  # how far the legs swing
    size: tuple[int, int]  # width and height of the picture, pixels
    elevation: float  # of the camera above the horizon, seen from the person
    roll: float  # of the camera
    span: float  # metres that fit into the height of the picture, at the person's distance
    centre: tuple[float, ...]  # x and y of the person in the picture, as fractions of its size
    occluder: str  # none, pole, bush, person
    seed: int  # of the background and the noise


def sample_view(rng: np.random.Generator, person: Person, source: int, aerial: bool) -> View:
    """Sample how a picture of `person` is taken."""
    angle = int(rng.choice(3, p=(0.3, 0.37, 0.33)))
    facing = {FRONT: np.pi, BACK: 0.0, SIDE: rng.choice((-0.5, 0.5)) * np.pi}[angle]
    height = int(rng.integers(*_HEIGHTS[source, aerial], endpoint=True))
    aspect = rng.uniform(0.50, 0.56) if aerial else rng.uniform(0.38, 0.43)
    elevation = rng.uniform(0.72, 1.0) if aerial else rng.uniform(0.06, 0.13)
    spread = 1.0 if aerial else 0.55
    return View(
        source=source,
        aerial=aerial,
        angle=angle,
        yaw=float(facing + rng.uniform(-0.55, 0.55)),
        dim=person.light if rng.random() < 0.9 else 1 - person.light,
        phase=float(rng.uniform(0, 2 * np.pi)),
        stride=float(rng.choice((rng.uniform(0.02, 0.12), rng.uniform(0.25, 0.5)), p=(0.3, 0.7))),
        size=(round(height * aspect), height),
        elevation=float(elevation),
        roll=float(rng.normal(0, 0.07 if aerial else 0.012)),
        span=float((0.62 + 1.72 * np.cos(elevation) if aerial else 2.08) * rng.uniform(0.97, 1.04)),
        centre=tuple(float(c) for c in 0.5 + rng.uniform(-0.035, 0.035, 2) * spread),
        occluder=str(rng.choice(("none", "pole", "bush", "person"), p=(0.88, 0.04, 0.04, 0.04))),
        seed=int(rng.integers(2**31)),
    )


def paint(person: Person | None, view: View) -> Image.Image:
    """An RGB picture of `person` (None: without a person), taken as `view` says."""
    rng = np.random.default_rng(view.seed)
    camera = _Camera(view)
    image = Image.new("RGB", view.size, (150, 150, 150))
    (_floor if view.aerial else _street)(_Canvas(image, camera), view, rng)
    image = _mottle(image.filter(ImageFilter.GaussianBlur(0.8)), rng, 0.04)
    azimuth, rise = rng.uniform(0, 2 * np.pi), rng.uniform(0.7, 1.1)
    if not view.aerial:  # sun on the camera's side; otherwise people would be silhouettes
        azimuth = -np.pi / 2 + rng.uniform(-1.1, 1.1)
    flat = np.cos(rise)
    sun = np.array((flat * np.cos(azimuth), flat * np.sin(azimuth), np.sin(rise)))
    mesh = None
    if person is not None:
        mesh = _placed(person, view.phase, view.stride, view.yaw)
        image = _shadow(image, camera, mesh[0], sun, view)
    width, height = view.size
    image = image.resize((width * _FINE, height * _FINE), Image.Resampling.NEAREST)
    canvas = _Canvas(image, _Camera(view, _FINE))
    if mesh is not None:
        _draw_mesh(canvas, mesh, sun, view.dim)
    if view.occluder != "none":
        _occlude(canvas, view, rng, sun)
    return _develop(image.reduce(_FINE), view, rng)


class _Camera:
    """Perspective camera that looks at the middle of a person standing at the origin."""

    def __init__(self, view: View, zoom: int = 1) -> None:
        sine, cosine = np.sin(view.elevation), np.cos(view.elevation)
        distance = 6.5 if view.aerial else 7.5
        self.target = np.array((0.0, 0.0, 0.95 if view.aerial else 0.99))
        self.place = self.target + distance * np.array((0.0, -cosine, sine))
        self.up = np.array((0.0, sine, cosine))
        self.ahead = np.array((0.0, cosine, -sine))
        self.focal = zoom * distance * view.size[1] / view.span
        self.middle = zoom * np.array(view.centre) * view.size
        self.turn = np.cos(view.roll), np.sin(view.roll)

    def __call__(self, points: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """Pixels [..., 2] and distances along the optical axis [...] of points [..., 3]."""
        away = np.asarray(points, float) - self.place
        depth = np.maximum(away @ self.ahead, 0.3)
        x, y = self.focal * away[..., 0] / depth, -self.focal * (away @ self.up) / depth
        cosine, sine = self.turn
        pixels = np.stack([x * cosine - y * sine, x * sine + y * cosine], axis=-1)
        return pixels + self.middle, depth


class _Canvas:
    """A picture on which polygons are drawn in world coordinates."""

    def __init__(self, image: Image.Image, camera: _Camera) -> None:
        self.image, self.draw, self.camera = image, ImageDraw.Draw(image), camera

    def area(self, points: ArrayLike, colour: ArrayLike) -> None:
        pixels, _ = self.camera(points)
        self.draw.polygon(pixels.ravel().tolist(), fill=_ink(colour))

    def wall(
        self, x0: Metres, x1: Metres, z0: Metres, z1: Metres, colour: ArrayLike, y: float = 3.0
    ) -> None:
        """A vertical rectangle that faces the camera, at distance y behind the person."""
        self.area([(x0, y, z0), (x1, y, z0), (x1, y, z1), (x0, y, z1)], colour)

    def ground(
        self, x0: Metres, x1: Metres, y0: Metres, y1: Metres, colour: ArrayLike, turn: float = 0.0
    ) -> None:
        """A rectangle on the ground, rotated around the origin by `turn`."""
        x, y = np.array((x0, x1, x1, x0)), np.array((y0, y0, y1, y1))
        cosine, sine = np.cos(turn), np.sin(turn)
        self.area(np.stack([x * cosine - y * sine, x * sine + y * cosine, 0 * x], axis=1), colour)

    def blob(
        self,
        rng: np.random.Generator,
        middle: tuple[Metres, Metres, Metres],
        radius: float,
        colour: ArrayLike,
        leaves: int = 40,
    ) -> None:
        """Leaves of a plant: overlapping ellipses of different brightness around a point. radius in
        metres."""
        (x, y), _ = self.camera(middle)
        scale = radius * self.camera.focal / np.linalg.norm(self.camera.place - middle)
        for _ in range(leaves):
            dx, dy = rng.normal(0, 0.42, 2) * scale
            r = scale * rng.uniform(0.14, 0.34)
            box = (x + dx - r, y + dy - r, x + dx + r, y + dy + r)
            self.draw.ellipse(box, fill=_ink(np.array(colour) * rng.uniform(0.65, 1.25)))


def _street(canvas: _Canvas, view: View, rng: np.random.Generator) -> None:
    """Background of a ground picture: pavement, a facade 3 m behind the person, other objects."""
    city = view.source == 1
    paving = _shade((150, 148, 146) if city else (186, 178, 166), rng)
    canvas.ground(-9, 9, -6, 3.0, paving)
    for x in np.arange(-2.4, 2.4, 0.6) + rng.uniform(0, 0.6):
        canvas.ground(x, x + 0.025, -6, 3, paving * 0.86)
    for y in np.arange(-1.8, 3, 0.6):
        canvas.ground(-9, 9, y, y + 0.03, paving * 0.86)
    scenes = ("shop", "shutter", "road") if city else ("brick", "glass", "hedge", "lawn")
    scene, shift = rng.choice(scenes), rng.uniform(-1.2, 1.2)
    if scene in ("shop", "shutter"):
        facade = _shade(((176, 160, 146), (146, 150, 158), (190, 176, 150))[rng.integers(3)], rng)
        canvas.wall(-9, 9, 0, 6, facade)
        sign = ((150, 60, 54), (50, 84, 130), (52, 110, 84), (170, 140, 70))[rng.integers(4)]
        for x in (shift - 3.4, shift - 0.9, shift + 1.6):
            if scene == "shop":
                canvas.wall(x, x + 2.1, 0.4, 2.15, (66, 78, 88))
                canvas.area(
                    [(x, 3, 0.5), (x + 0.9, 3, 0.5), (x + 1.7, 3, 2.1), (x + 0.8, 3, 2.1)],
                    (112, 128, 138),
                )
                canvas.wall(x + 1.03, x + 1.09, 0.4, 2.15, (44, 46, 50))
            else:
                canvas.wall(x, x + 2.1, 0.05, 2.15, (142, 146, 150))
                for z in np.arange(0.05, 2.15, 0.14):
                    canvas.wall(x, x + 2.1, z, z + 0.035, (112, 116, 120))
            canvas.wall(x - 0.05, x + 2.2, 2.2, 2.65, sign)
    elif scene == "road":
        canvas.ground(-9, 9, 0.9, 3.2, (86, 88, 92))
        canvas.ground(-9, 9, 0.75, 0.95, (190, 188, 182))
        canvas.wall(-9, 9, 0, 6, _shade((168, 162, 156), rng), 3.3)
        for x in np.arange(-3, 3, 1.5) + shift:
            canvas.wall(x, x + 0.8, 1.3, 2.3, (92, 104, 116), 3.3)
        car = _shade(
            ((176, 178, 182), (120, 40, 42), (50, 70, 104), (226, 226, 224))[rng.integers(4)], rng
        )
        x = shift - 1.6
        canvas.wall(x, x + 3.6, 0.3, 0.85, car, 2.6)
        roof = [
            (x + 0.7, 2.6, 0.85),
            (x + 1.2, 2.6, 1.4),
            (x + 2.5, 2.6, 1.4),
            (x + 3.1, 2.6, 0.85),
        ]
        canvas.area(roof, car * 0.6)
        for wheel in (x + 0.7, x + 2.9):
            canvas.wall(wheel - 0.28, wheel + 0.28, 0.02, 0.45, (34, 34, 36), 2.55)
    elif scene == "brick":
        brick = _shade((164, 112, 92), rng)
        canvas.wall(-9, 9, 0, 6, brick * 0.82)
        for row, z in enumerate(np.arange(0, 2.8, 0.16)):
            for x in np.arange(-1.3, 1.2, 0.42) + 0.21 * (row % 2):
                canvas.wall(x, x + 0.39, z, z + 0.135, _shade(brick, rng, 0.1))
        canvas.wall(shift - 0.5, shift + 0.5, 0, 2.1, (92, 74, 60))
        canvas.wall(shift - 0.42, shift + 0.42, 0.08, 2.02, (118, 94, 74))
    elif scene == "glass":
        canvas.wall(-9, 9, 0, 6, (196, 194, 188))
        for x in np.arange(-3.3, 3.3, 1.1) + shift:
            canvas.wall(x, x + 1.0, 0.1, 2.1, _shade((116, 140, 150), rng, 0.15))
            canvas.wall(x, x + 1.0, 2.3, 3.4, _shade((128, 150, 160), rng, 0.15))
    else:
        canvas.wall(-9, 9, 0, 8, (196, 212, 224), 4.0)
        canvas.ground(-9, 9, 1.2 if scene == "hedge" else -0.2, 4.0, _shade((104, 142, 80), rng))
        low, tall = (0.5, 9) if scene == "hedge" else (1.7, 6)
        for x in np.linspace(-2.4, 2.4, tall) + shift * 0.3:
            if scene == "lawn":
                canvas.wall(x - 0.1, x + 0.1, 0, 2.0, (104, 82, 62), 3.6)
            canvas.blob(rng, (x, 3.4, low + rng.uniform(0, 0.9)), 0.9, (72, 112, 62), 30)
    side = rng.choice((-1, 1))
    if rng.random() < 0.6:  # a bollard or a railing, always 1 m high, to compare the person with
        for x in (0.62, 1.9) if city else np.arange(0.5, 1.6, 0.22):
            canvas.wall(
                side * x - 0.05 * city,
                side * x + (0.05 if city else 0.03),
                0,
                1.0,
                (70, 76, 84),
                0.9,
            )
        if not city:
            canvas.wall(side * 0.48, side * 4, 0.95, 1.0, (70, 76, 84), 0.9)


def _floor(canvas: _Canvas, view: View, rng: np.random.Generator) -> None:
    """Background of an aerial picture: the ground with its lines, and plants at the edges."""
    turn = rng.uniform(-0.7, 0.7)
    city = view.source == 1
    scenes = ("zebra", "road", "tiles") if city else ("paving", "lawn", "path", "paving")
    scene = rng.choice(scenes)
    if scene in ("zebra", "road"):
        canvas.ground(-9, 9, -9, 9, _shade((104, 106, 110), rng, 0.12))
        if scene == "zebra":
            for x in np.arange(-2.7, 2.7, 0.9) + rng.uniform(0, 0.9):
                canvas.ground(x, x + 0.42, -3, 3, _shade((206, 206, 202), rng, 0.04), turn)
        else:
            x = rng.choice((-1, 1)) * rng.uniform(0.35, 0.8)
            canvas.ground(x, x + 0.13, -9, 9, (214, 212, 204), turn)
            if rng.random() < 0.5:
                canvas.ground(x + 0.25, x + 0.38, -9, 9, (208, 178, 82), turn)
    elif scene in ("tiles", "paving"):
        tone = _shade((168, 160, 156) if city else (190, 180, 164), rng)
        canvas.ground(-9, 9, -9, 9, tone)
        pitch = rng.uniform(0.3, 0.6)
        for x in np.arange(-2.4, 2.4, pitch):
            for y in np.arange(-2.4, 2.4, pitch):
                if rng.random() < 0.25:
                    canvas.ground(x, x + pitch, y, y + pitch, _shade(tone, rng, 0.1), turn)
            canvas.ground(x, x + 0.03, -5, 5, tone * 0.82, turn)
            canvas.ground(-5, 5, x, x + 0.03, tone * 0.82, turn)
        if city and rng.random() < 0.6:
            canvas.ground(0.5, 0.9, -9, 9, (196, 166, 78), turn)
    else:
        grass = _shade((112, 142, 84), rng)
        canvas.ground(-9, 9, -9, 9, grass)
        if scene == "path":
            canvas.ground(-0.8, 0.8, -9, 9, _shade((188, 182, 172), rng), turn)
            canvas.ground(-0.88, -0.8, -9, 9, (150, 146, 140), turn)
            canvas.ground(0.8, 0.88, -9, 9, (150, 146, 140), turn)
    if rng.random() < 0.35:
        place = rng.choice((-1, 1)) * rng.uniform(0.8, 1.1), rng.uniform(-1.2, 1.6), 0.3
        canvas.blob(rng, place, 0.5, (64, 104, 56), 34)


def _mottle(image: Image.Image, rng: np.random.Generator, strength: float) -> Image.Image:
    """Add smooth brightness noise on two scales, like dirt and uneven light."""
    width, height = image.size
    gain = np.ones((height, width))
    for cells in (3, 24):
        coarse = rng.normal(0, strength, (cells * 2, cells)).astype(np.float32)
        fine = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        gain += np.asarray(fine)
    return Image.fromarray(np.clip(np.asarray(image) * gain[..., None], 0, 255).astype(np.uint8))


def _placed(
    person: Person, phase: float, stride: float, yaw: float, at: Sequence[float] = (0.0, 0.0)
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The person's mesh, rotated by yaw and moved to (x, y) on the ground."""
    quads, colours, bias = body_mesh(person, phase, stride)
    cosine, sine = np.cos(yaw), np.sin(yaw)
    x, y = quads[..., 0].copy(), quads[..., 1].copy()
    quads[..., 0] = x * cosine - y * sine + at[0]
    quads[..., 1] = x * sine + y * cosine + at[1]
    return quads, colours, bias


def _shadow(
    image: Image.Image, camera: _Camera, quads: np.ndarray, sun: np.ndarray, view: View
) -> Image.Image:
    """Darken the ground in the person's shadow. At dusk the shadow is only around the feet."""
    mask = Image.new("L", image.size, 0)
    draw = ImageDraw.Draw(mask)
    if view.dim:
        (x, y), _ = camera((0.0, 0.0, 0.0))
        r = 0.3 * view.size[1] / view.span
        flat = r * (0.75 if view.aerial else 0.2)
        draw.ellipse((x - r, y - flat, x + r, y + flat), fill=70)
    else:
        cast = quads - quads[..., 2:] * (sun / sun[2])
        pixels, _ = camera(cast[::2])  # half of the surface is enough, because it is blurred
        for corner in pixels.reshape(-1, 8).tolist():
            draw.polygon(corner, fill=120)
    mask = mask.filter(ImageFilter.GaussianBlur(view.size[1] / 130))
    return Image.composite(Image.new("RGB", image.size, (22, 24, 36)), image, mask)


def _draw_mesh(
    canvas: _Canvas, mesh: tuple[np.ndarray, np.ndarray, np.ndarray], sun: np.ndarray, dim: int
) -> None:
    """Draw a mesh from back to front, lit by the sun (a unit vector towards it) and the sky."""
    quads, colours, bias = mesh
    pixels, depth = canvas.camera(quads)
    first, second = pixels[:, 2] - pixels[:, 0], pixels[:, 3] - pixels[:, 1]
    facing = first[:, 0] * second[:, 1] - first[:, 1] * second[:, 0] < 0
    quads, colours, pixels = quads[facing], colours[facing], pixels[facing]
    order = np.argsort(-(depth.mean(axis=1) + bias)[facing], kind="stable")
    normal = np.cross(quads[:, 2] - quads[:, 0], quads[:, 3] - quads[:, 1])
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-9)
    toward = -(normal @ canvas.camera.ahead)
    sunlit = np.clip(normal @ sun, 0, 1)
    light = 0.66 + 0.10 * normal[:, 2] + 0.16 * np.abs(toward) + (0.08 if dim else 0.34) * sunlit
    fill = np.clip(colours * light[:, None] + 5, 0, 255).astype(int)[order].tolist()
    for corner, colour in zip(pixels[order].reshape(-1, 8).tolist(), fill, strict=True):
        canvas.draw.polygon(corner, fill=tuple(colour))


def _occlude(canvas: _Canvas, view: View, rng: np.random.Generator, sun: np.ndarray) -> None:
    """Draw something that hides a small part of the person."""
    side = float(rng.choice((-1, 1)))
    if view.occluder == "pole":
        x = side * rng.uniform(0.2, 0.34)
        tone = _shade((120, 124, 128), rng, 0.3)
        canvas.wall(x - 0.05, x + 0.05, -0.3, 4, tone, -0.7)
        canvas.wall(x - 0.045, x - 0.015, -0.3, 4, tone * 1.25, -0.71)
    elif view.occluder == "bush":
        for x in np.linspace(0.1, 0.9, 5):
            canvas.blob(rng, (side * x, -0.8, 0.12), 0.3, (66, 108, 56), 30)
    elif view.occluder == "person":
        other = sample_person(rng)
        at = (side * rng.uniform(0.52, 0.62), -0.45)
        mesh = _placed(other, view.phase + 1, 0.2, rng.uniform(0, 6.28), at)
        _draw_mesh(canvas, mesh, sun, view.dim)


def _develop(image: Image.Image, view: View, rng: np.random.Generator) -> Image.Image:
    """Add the effects of light and camera: blur, brightness, colour cast and noise."""
    blur = (0.75, 0.5) if view.aerial else (0.6, 0.35)
    image = image.filter(ImageFilter.GaussianBlur(blur[view.source] * rng.uniform(0.5, 1.0)))
    pixels: np.ndarray = np.asarray(image, np.float32)
    cast = ((1.03, 1.0, 0.95), (0.96, 1.0, 1.05))[view.source]
    if view.dim:
        tint = np.array(((0.94, 0.98, 1.12), (1.09, 0.98, 0.88))[rng.integers(2)])
        pixels = (pixels * 0.9 + 10) * (rng.uniform(0.5, 0.62) * tint)
    else:
        pixels = (pixels - 128) * rng.uniform(1.0, 1.1) + 128 + rng.uniform(4, 16)
    pixels = pixels * np.array(cast) * rng.uniform(0.96, 1.04, 3)
    grain = (5.0 if view.aerial else 3.0) * (1.25 if view.dim else 1.0)
    pixels += grain * rng.standard_normal(pixels.shape, dtype=np.float32)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _shade(colour: ArrayLike, rng: np.random.Generator, spread: float = 0.08) -> np.ndarray:
    return np.array(colour, float) * rng.uniform(1 - spread, 1 + spread)


def _ink(colour: ArrayLike) -> tuple[int, ...]:
    return tuple(int(c) for c in np.clip(colour, 0, 255))
