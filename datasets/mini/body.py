"""The body of a walking, dressed person, as a small mesh of coloured quadrilaterals.

Body axes, in metres: x to the side, y forward, z up, the origin on the ground between the feet.
Because both views are pictures of one mesh, they agree with each other; two flat drawings would
not.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from .mesh import Mesh, ball, flat_colours, limb, tube
from .people import COLOURS, GIRTH, HAIR_COLOURS, SKINS, STATURE, Person

# Lower edge of the upper garment, as a fraction of the person's height.
_HEM = {
    "t-shirt": 0.475,
    "polo shirt": 0.475,
    "shirt": 0.465,
    "tank top": 0.485,
    "sweater": 0.475,
    "hoodie": 0.46,
    "jacket": 0.46,
    "down jacket": 0.45,
    "blazer": 0.43,
    "coat": 0.27,
    "dress": 0.28,
}
# Thickness of the cloth, as a fraction of the person's height.
_THICK = {"down jacket": 0.017, "coat": 0.009, "jacket": 0.008, "hoodie": 0.008, "sweater": 0.005}
# Half width and half depth of the trunk (men, women), at heights _TRUNK_Z. All are fractions of the
# person's height.
_TRUNK_Z = (0.27, 0.45, 0.50, 0.55, 0.62, 0.70, 0.76, 0.80, 0.825, 0.845, 0.862)
_TRUNK_W = (
    (0.128, 0.104, 0.097, 0.092, 0.092, 0.106, 0.116, 0.116, 0.094, 0.052, 0.036),
    (0.140, 0.112, 0.104, 0.094, 0.079, 0.093, 0.102, 0.104, 0.085, 0.047, 0.034),
)
_TRUNK_D = (
    (0.118, 0.080, 0.070, 0.067, 0.066, 0.072, 0.070, 0.062, 0.050, 0.040, 0.036),
    (0.126, 0.088, 0.074, 0.066, 0.060, 0.078, 0.072, 0.058, 0.046, 0.038, 0.034),
)


def body_mesh(
    person: Person, phase: float, stride: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mesh of a person at one moment of walking.

    phase (radians) is the moment within a walking cycle, stride (radians) how far the legs swing.
    Returns quads [Q, 4, 3] in metres with the lower sole at z = 0, colours [Q, 3] in 0..255, and
    bias [Q] in metres (see `Mesh`).
    """
    builder = _BodyBuilder(person, phase, stride)
    sole = builder.legs()
    for part in (builder.hips, builder.trunk, builder.arms, builder.bag, builder.head_and_hair):
        part()
    quads, colours, bias = builder.mesh.stack()
    rise = np.clip(quads[..., 2] - 0.5 * builder.h, 0, None)
    stoop = 0.42 if person.age == 2 else 0.06
    quads[..., 1] += stoop * rise**2 / builder.h
    quads[..., 2] -= 0.1 * stoop * rise + sole
    return quads, np.clip(colours, 0, 255), bias


class _BodyBuilder:
    """Builds the mesh of one person, part by part, and keeps the values that the parts share."""

    def __init__(self, person: Person, phase: float, stride: float) -> None:
        self.p, self.mesh = person, Mesh()
        # Height in metres, and relative width.
        self.h = STATURE[person.height] * (0.94 if person.age == 1 else 1.0)
        self.k = GIRTH[person.weight]
        self.skin = np.array(SKINS[person.skin], float)
        self.upper = np.array(COLOURS[person.upper_colour]) * person.tone
        self.lower = np.array(COLOURS[person.lower_colour]) * person.tone
        self.thick = _THICK.get(person.upper, 0.003)
        self.head = 1.13 if person.age == 1 else 1.0
        tight = person.upper in ("coat", "dress") or person.lower == "skirt"
        self.swing = min(stride, 0.26) if tight else stride
        self.phase = phase

    def trunk_radii(self, z: float | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Half width and half depth of the trunk without clothes, at heights z. All are fractions
        of the person's height."""
        p = self.p
        width = np.interp(z, _TRUNK_Z, _TRUNK_W[p.gender])
        depth = np.interp(z, _TRUNK_Z, _TRUNK_D[p.gender])
        below = np.clip((0.85 - np.asarray(z)) / 0.12, 0, 1)
        belly = np.exp(-(((np.asarray(z) - 0.59) / 0.1) ** 2)) * (0.35 if p.weight == 2 else 0)
        return width * (1 + (self.k - 1) * below), depth * (1 + (self.k - 1 + belly) * below)

    def cloth(self, u: np.ndarray, v: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Colours of a part of the upper garment, with pattern and folds. u and v are those of
        `tube`, rows the row number of each quad."""
        p, other = self.p, COLOURS[self.p.pattern_colour]
        colours = flat_colours(u.shape, self.upper)
        if p.pattern == "stripes":
            colours[(rows % 3) == 0] = other
        elif p.pattern == "checks":
            columns = np.arange(u.shape[1])[None, :] + 0 * rows
            colours[(rows % 4) == 0] = 0.4 * self.upper + 0.6 * np.array(other)
            cross = (columns % 4) == 0
            colours[cross] = 0.5 * colours[cross] + 0.5 * np.array(other)
        folds = 1 + 0.05 * np.sin(4 * u + 9 * v) + 0.03 * np.sin(23 * v - 2 * u)
        if p.upper == "down jacket":
            folds = folds * np.where(rows % 3 == 0, 0.8, 1.05)
        return colours * folds[..., None]

    def trunk(self) -> None:
        p, h = self.p, self.h
        hem = _HEM[p.upper]
        z = np.linspace(0.862, hem, 19 if hem > 0.4 else 25)
        width, depth = self.trunk_radii(z)
        cover = self.thick * np.clip((0.86 - z) / 0.05, 0, 1)
        path = np.stack([0 * z, 0 * z, z * h], axis=1)
        quads, u, v = tube(path, (width + cover) * h, (depth + cover) * h, 20, 2.3)
        rows = np.repeat(np.arange(len(v))[:, None], u.shape[1], 1)
        level = 0.862 + (hem - 0.862) * v
        colours, middle = self.cloth(u, v, rows), np.abs(u)
        if p.opened:
            lapel = 0.16 + 0.75 * np.clip((level - 0.66) / 0.2, 0, 1) + 0.25 * (level < 0.55)
            colours[middle < lapel] = COLOURS[p.inner_colour]
            edge = (middle >= lapel) & (middle < lapel + 0.32)
            colours[edge] *= 0.8
        elif p.upper in ("jacket", "down jacket", "coat"):
            colours[middle < 0.17] *= 0.6
        elif p.upper in ("shirt", "polo shirt"):
            reach = 0.3 if p.upper == "shirt" else 0.72
            colours[(middle < 0.17) & (level > reach) & (rows % 2 == 1)] *= 0.72
        if p.pattern == "print":
            badge = (middle < 0.75) & (level < 0.765) & (level > 0.66)
            colours[badge] = COLOURS[p.pattern_colour]
            dots = badge & (rows % 2 == 0) & (middle < 0.4) & (middle > 0.1)
            colours[dots] = 0.4 * self.upper + 0.6 * np.array(COLOURS[p.pattern_colour])
        if p.upper in ("shirt", "polo shirt", "jacket", "blazer", "coat"):
            colours[(level > 0.842) & (middle > 0.5)] *= 1.15 if self.upper.mean() < 128 else 0.82
            colours[(level > 0.842) & (middle <= 0.5)] = (
                COLOURS[p.inner_colour] if p.opened else self.skin
            )
        if p.upper in ("t-shirt", "tank top", "dress", "sweater"):
            scoop = 0.835 if p.upper in ("t-shirt", "sweater") else 0.79
            colours[(level > scoop) & (middle < 0.9)] = self.skin
        if p.sleeve == "none":
            colours[(level > 0.805) & (np.abs(middle - 1.57) < 0.5)] = self.skin
        if p.upper in ("sweater", "hoodie", "down jacket"):
            colours[-1] *= 0.8
        if p.bag == "backpack":
            straps = (middle > 0.45) & (middle < 0.9) & (level > 0.63) & (level < 0.85)
            colours[straps] = np.array(COLOURS[p.bag_colour]) * 0.9
        if p.upper == "dress":
            colours[(level < 0.64) & (level > 0.615)] *= 0.62
        self.mesh.add(quads, colours)
        if p.upper == "hoodie":
            hood = ball((0, -0.055 * h, 0.835 * h), (0.07 * h, 0.036 * h, 0.036 * h), 6, 12)[0]
            self.mesh.add(hood, self.upper * 0.86, -0.02)

    def hips(self) -> None:
        """The upper part of the trousers, or the skirt."""
        p, h = self.p, self.h
        if p.lower == "dress" or p.upper == "coat":  # hidden, so drawing it would only take time
            return
        bottom = 0.29 if p.lower == "skirt" else 0.455
        z = np.linspace(0.60, bottom, 12 if p.lower == "skirt" else 6)
        width, depth = self.trunk_radii(z)
        scale = 1.02 if p.lower == "skirt" else 0.95
        path = np.stack([0 * z, 0 * z, z * h], axis=1)
        quads, u, v = tube(path, width * h * scale, depth * h * scale, 16, 2.3)
        pleats = 1 + (0.10 if p.lower == "skirt" else 0.03) * np.sin(8 * u)
        self.mesh.add(quads, self.lower * pleats[..., None], 0.05)

    def legs(self) -> float:
        """Both legs and shoes. Returns the height of the lower sole, in metres, usually below 0."""
        p, h, k = self.p, self.h, self.k
        loose = {"trousers": 1.12, "shorts": 1.2, "jeans": 1.0}.get(p.lower, 0.86)
        sole = 0.0
        for sign in (-1, 1):
            turn = sign * self.swing * np.sin(self.phase)
            bend = (
                0.06 + 1.3 * max(0.0, -turn) + 0.5 * self.swing * max(0, sign * np.cos(self.phase))
            )
            hip = np.array((sign * 0.05 * h * (0.5 + 0.5 * k), 0.0, 0.49 * h))
            knee = hip + 0.235 * h * np.array((0.0, np.sin(turn), -np.cos(turn)))
            ankle = knee + 0.215 * h * np.array((0.0, np.sin(turn - bend), -np.cos(turn - bend)))
            path, radius = limb((hip, knee, ankle), (0.055, 0.046, 0.034, 0.033, 0.023), 12)
            ends = np.clip((np.linspace(0, 2, 12) - 1) * 1.4, 0, 1)
            radius = radius * h * (0.45 + 0.55 * k)
            if p.lower in ("trousers", "jeans"):
                radius = radius * loose + 0.008 * h * ends
            quads, u, v = tube(path, radius, radius, 10)
            folds = 1 + 0.06 * np.sin(3 * u + 17 * v) * v
            colours = flat_colours(u.shape, self.skin)
            reach = {"shorts": 0.5, "skirt": 0.0, "dress": 0.0, "leggings": 0.93}.get(p.lower, 1.0)
            covered = v < reach
            colours[covered] = self.lower
            if p.lower == "jeans":
                faded = covered & (np.abs(u) < 0.9) & (v > 0.12) & (v < 0.6)
                colours[faded] = self.lower * 0.9 + 20
            if p.shoes == "boots":
                colours[v > (0.76 if reach < 1 or loose < 0.9 else 0.94)] = COLOURS[p.shoe_colour]
            if p.lower == "shorts":
                wide = tube(path[:7], radius[:7] * 1.22, radius[:7] * 1.22, 10)[0]
                self.mesh.add(wide, self.lower * folds[:6, :, None], 0.03)
            self.mesh.add(quads, colours * folds[..., None], 0.03)
            sole = min(sole, self.shoe(ankle, turn - 0.6 * bend))
        return sole

    def shoe(self, ankle: np.ndarray, pitch: float) -> float:
        """One shoe under the ankle, its toe raised by pitch (radians). Returns its lowest z."""
        p, h = self.p, self.h
        size = 1.12 if p.age == 1 else 1.0
        along = np.linspace(-0.035, 0.105, 8) * h * size
        ahead = np.array((0.0, np.cos(0.5 * pitch), np.sin(0.5 * pitch)))
        path = ankle + np.outer(along, ahead) - np.array((0, 0, 0.022 * h))
        height = np.array((0.012, 0.027, 0.03, 0.028, 0.023, 0.019, 0.016, 0.004)) * h * size
        width = np.array((0.010, 0.022, 0.025, 0.025, 0.027, 0.028, 0.024, 0.006)) * h * size
        path[:, 2] += height - 0.024 * h
        quads, u, v = tube(path, width, height, 10, 2.4)
        colours = flat_colours(u.shape, COLOURS[p.shoe_colour])
        if p.shoes == "sneakers":
            colours[np.abs(u) > 2.2] = (
                (236, 236, 232) if p.shoe_colour != "white" else (188, 190, 194)
            )
        elif p.shoes == "sandals":
            colours[(np.abs(u) < 1.9) & ((v > 0.78) | (np.abs(v - 0.45) < 0.1))] = self.skin
        else:
            colours[np.abs(u) > 2.2] *= 0.5
        self.mesh.add(quads, colours, -0.01)
        return float(quads[..., 2].min())

    def arms(self) -> None:
        p, h, k = self.p, self.h, self.k
        width = float(self.trunk_radii(0.79)[0]) + self.thick
        for sign in (-1, 1):
            turn = -0.9 * sign * self.swing * np.sin(self.phase)
            bend = 0.22 + 0.5 * max(0.0, turn)
            if sign > 0 and p.item == "phone":
                turn, bend = 0.35, 1.75
            elif (sign > 0 and p.item == "cane") or (sign < 0 and p.bag == "handbag"):
                turn, bend = 0.15, 0.45
            spread = 0.14 + 0.12 * (p.weight == 2) + 0.1 * (_HEM[p.upper] < 0.4)
            shoulder = np.array((sign * (width - 0.012) * h, 0.0, 0.808 * h))
            out = sign * np.sin(spread)
            elbow = shoulder + 0.165 * h * np.array((out, np.sin(turn), -np.cos(turn)))
            fore = np.array((0.2 * out, np.sin(turn + bend), -np.cos(turn + bend)))
            wrist = elbow + 0.145 * h * fore
            path, radius = limb((shoulder, elbow, wrist), (0.033, 0.031, 0.027, 0.025, 0.018), 11)
            reach = {"none": 0.0, "short": 0.42, "long": 0.97}[p.sleeve]
            sleeve = np.linspace(0, 1, 11) < reach
            radius = (radius * (0.55 + 0.45 * k) + np.where(sleeve, self.thick + 0.004, 0)) * h
            radius[:2] *= (0.35, 0.9)  # makes the shoulder round, not the flat end of a tube
            quads, u, v = tube(path, radius, radius, 10)
            rows = np.repeat(np.arange(len(v))[:, None], u.shape[1], 1)
            colours = self.cloth(u, v, rows)
            colours[v > reach] = self.skin
            self.mesh.add(quads, colours)
            hand = wrist + 0.03 * h * fore
            self.mesh.add(ball(hand, np.array((0.018, 0.021, 0.031)) * h)[0], self.skin)
            self.carry(sign, hand)

    def carry(self, sign: int, hand: np.ndarray) -> None:
        """What the hand on this side holds."""
        p, h = self.p, self.h
        if sign < 0:
            if p.bag == "handbag":
                self.box(
                    hand - (0.01 * h, 0, 0.125 * h), (0.042, 0.088, 0.062), COLOURS[p.bag_colour]
                )
                for y in (-0.04, 0.04):
                    ends = (hand, hand + (0, y * h, -0.03 * h), hand + (0, y * h, -0.07 * h))
                    self.mesh.add(tube(ends, 0.006 * h, 0.006 * h, 6)[0], COLOURS[p.bag_colour])
        elif p.item == "phone":
            self.box(hand + (0, 0.02 * h, 0.025 * h), (0.02, 0.006, 0.04), (24, 26, 32))
        elif p.item in ("umbrella", "cane"):
            end = np.array((hand[0], hand[1] + 0.03 * h, 0.02 * h))
            if p.item == "cane":
                self.mesh.add(tube((hand, end), 0.008 * h, 0.008 * h, 6)[0], (92, 58, 34))
            else:
                path = np.linspace(hand, hand + (0, 0.06 * h, -0.32 * h), 6)
                furled = np.array((0.006, 0.01, 0.026, 0.024, 0.016, 0.004)) * h
                self.mesh.add(tube(path, furled, furled, 8)[0], (44, 60, 120))

    def box(
        self, centre: ArrayLike, half: Sequence[float], colour: ArrayLike, darker: float = 0.8
    ) -> None:
        """A soft box with a darker flap. half: half its size (x, y, z), as fractions of the
        person's height."""
        drop = np.array((1.0, 0.97, 0.6, 0.2, -0.2, -0.6, -0.97, -1.0)) * half[2] * self.h
        girth = np.array((0.02, 0.9, 1.0, 1.0, 1.0, 1.0, 0.9, 0.02)) * self.h
        path = np.asarray(centre) + np.outer(drop, (0.0, 0.0, 1.0))
        quads, u, v = tube(path, girth * half[0], girth * half[1], 16, 5.0)
        colours = flat_colours(u.shape, colour)
        colours[(v > 0.5) & (v < 0.9)] *= darker
        colours[np.abs(v - 0.5) < 0.08] *= 0.6
        self.mesh.add(quads, colours, -0.01)

    def bag(self) -> None:
        p, h = self.p, self.h
        colour = np.array(COLOURS[p.bag_colour], float)
        back = float(self.trunk_radii(0.7)[1]) + self.thick
        if p.bag == "backpack":
            self.box((0, -(back + 0.045) * h, 0.70 * h), (0.088, 0.056, 0.115), colour)
        elif p.bag == "shoulder bag":
            width, depth = (float(r) + self.thick for r in self.trunk_radii(0.52))
            self.box((-(width + 0.045) * h, 0.0, 0.49 * h), (0.034, 0.085, 0.066), colour)
            turn = np.linspace(0, 2 * np.pi, 25)
            x = -0.03 + 0.9 * width * np.cos(turn)
            z = 0.70 + 0.135 * np.cos(turn)
            wide, deep = self.trunk_radii(z)
            arch = np.sqrt(np.clip(1 - (x / (wide + 0.02)) ** 2, 0.05, 1))
            y = np.sign(np.sin(turn)) * (deep + self.thick + 0.008) * arch
            strap = np.stack([x, y, z], axis=1) * h
            wide_strap = np.stack([strap, strap + (0.0, 0.0, 0.024 * h)], axis=1)
            quads = np.concatenate([wide_strap[:-1], wide_strap[1:, ::-1]], axis=1)
            self.mesh.add(quads, colour * 0.85, -0.03)
            self.mesh.add(quads[:, ::-1], colour * 0.85, -0.03)

    def head_and_hair(self) -> None:
        p, h, s = self.p, self.h, self.head
        centre = np.array((0, 0.012 * h, (0.932 + 0.066 * (s - 1)) * h))
        radii = np.array((0.045, 0.053, 0.066)) * h * s
        neck = ((0, 0, 0.9 * h), (0, 0, 0.87 * h), (0, 0, 0.84 * h))
        self.mesh.add(tube(neck, 0.03 * h, 0.031 * h, 10)[0], self.skin * 0.92)
        self.mesh.add(ball(centre, radii, 10, 16)[0], self.skin)
        self.face(centre, radii)
        hair = np.array(HAIR_COLOURS[p.hair_colour], float)
        quads, u, v = ball(centre, radii * 1.1, 12, 18)
        side = np.abs(u)
        if p.hair == "bald":
            covered = (side > 1.7) & (v > 0.4) & (v < 0.62) if p.age == 2 else v < 0
        else:
            covered = (v < 0.24) | ((side > 0.95) & (v < 0.5)) | ((side > 1.75) & (v < 0.74))
        strands = 1 + 0.12 * np.sin(11 * u) + 0.1 * (v < 0.3)
        self.mesh.add(quads[covered], (hair * strands[..., None])[covered], -0.015)
        if p.hair in ("long", "bob"):
            low = 0.745 if p.hair == "long" else 0.855
            z = np.linspace(0.95, low, 9)
            path = np.stack([0 * z, 0.0 - 0.12 * (0.95 - z), z], axis=1) * h
            spread = np.interp(z, (low, 0.9, 0.95), (0.062, 0.06, 0.049)) * h * s
            deep = np.interp(z, (low, 0.84, 0.95), (0.068, 0.062, 0.056)) * h * s
            quads, u, v = tube(path, spread, deep, 18)
            covered = np.abs(u) > 1.15
            strands = 1 + 0.13 * np.sin(13 * u)
            self.mesh.add(quads[covered], (hair * strands[..., None])[covered], -0.03)
        elif p.hair == "ponytail":
            bones = ((0, -0.05, 0.965), (0, -0.09, 0.955), (0, -0.105, 0.89), (0, -0.1, 0.80))
            tail = np.array(bones) * h
            self.mesh.add(
                tube(tail, np.array((0.012, 0.022, 0.026, 0.008)) * h, 0.022 * h, 8)[0], hair, -0.03
            )
        elif p.hair == "bun":
            bun = ball((0, -0.05 * h, 0.985 * h), np.array((0.03, 0.03, 0.028)) * h, 6, 10)[0]
            self.mesh.add(bun, hair * 1.1, -0.02)
        if p.hat != "none":
            self.hat(centre, radii)

    def face(self, centre: np.ndarray, radii: np.ndarray) -> None:
        p, h, s = self.p, self.h, self.head

        def spot(
            place: tuple[float, float, float],
            size: tuple[float, float, float],
            colour: ArrayLike,
            bias: float = -0.012,
        ) -> None:
            at = centre + np.array(place) * h * s
            self.mesh.add(ball(at, np.array(size) * h * s, 4, 6)[0], colour, bias)

        spot((0, 0.056, -0.012), (0.007, 0.008, 0.012), self.skin * 1.04)
        for x in (-0.018, 0.018):
            spot((x, 0.047, 0.006), (0.007, 0.005, 0.005), (40, 30, 28))
            spot((x, 0.047, 0.019), (0.011, 0.004, 0.003), self.skin * 0.45)
            if p.glasses:
                spot((x, 0.053, 0.005), (0.016, 0.004, 0.011), (26, 26, 30), -0.02)
        spot((0, 0.046, -0.034), (0.014, 0.005, 0.004), (176, 84, 80))
        if p.mask:
            quads, u, v = ball(centre, radii * 1.08, 10, 16)
            worn = (np.abs(u) < 1.3) & (v > 0.53) & (v < 0.9)
            self.mesh.add(quads[worn], (204, 226, 240), -0.03)

    def hat(self, centre: np.ndarray, radii: np.ndarray) -> None:
        p, h = self.p, self.h
        colour = np.array(COLOURS[p.hat_colour], float)
        quads, u, v = ball(centre + (0, 0, 0.012 * h), radii * (1.18, 1.16, 1.12), 10, 16)
        self.mesh.add(quads[v < 0.45], colour, -0.04)
        if p.hat == "cap":
            brim = ball(
                centre + (0, 0.075 * h, 0.022 * h), np.array((0.042, 0.05, 0.006)) * h, 4, 12
            )
        else:
            brim = ball(centre + (0, 0, 0.022 * h), np.array((0.098, 0.105, 0.007)) * h, 4, 18)
            band = (v > 0.3) & (v < 0.45)
            self.mesh.add(quads[band], colour * 0.55, -0.05)
        self.mesh.add(brim[0], colour * 0.88, -0.04)
