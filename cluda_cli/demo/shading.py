"""Colours of the painted surfaces of the embedded dataset: patterns, light, shadow, sky and fog, all pixels at once.

The ray of a pixel meets the plane of its surface; that point gives depth and place in the surface's pattern.
H W size of the image, pixels; S surfaces.
"""

import math
from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cluda_cli.demo.canvas import FINE, HEIGHT, SKY_DISTANCE, WIDTH, Camera, Floats, Light, Painting

NOISE_SIDE = 256
_NOISE_CELLS = 8  # coarsest cells along a side of the noise tile
_LAMPLIGHT = (250.0, 205.0, 130.0)
_GLASS_CONTRAST = 0.3  # standard deviation of the brightness of window panes


def make_noise(generator: np.random.Generator) -> Floats:
    """A tile of cloudy noise that repeats without seams, mean 0, standard deviation 1."""
    frequency = np.hypot(np.fft.fftfreq(NOISE_SIDE)[:, None], np.fft.fftfreq(NOISE_SIDE)[None])
    spectrum = np.fft.fft2(generator.standard_normal((NOISE_SIDE, NOISE_SIDE)))
    spectrum *= np.clip(frequency, _NOISE_CELLS / NOISE_SIDE, None) ** -1.1
    tile = np.fft.ifft2(spectrum).real
    return ((tile - tile.mean()) / tile.std()).astype(np.float32)


def shade(painting: Painting, camera: Camera, light: Light, noise: Floats, ground: Collection[int]) -> Floats:
    """Light at the lens, RGB around 0..255, H W 3. Shadows fall on the labels in `ground`."""
    index = painting.reduce_index()
    planes = _find_planes(painting.frames)
    lit = _illuminate(planes[:3], camera, light)  # S 3
    colors = np.clip(np.array([look.color for look in painting.looks], np.float32) * lit, 0, 255).astype(np.uint8)
    image = np.asarray(Image.fromarray(_gather(colors, painting.index)).reduce(FINE), np.float32)

    u, v, depth, footprint = _locate(planes, index, camera)
    image = _add_pattern(image, painting, index, lit, light, noise, (u, v, footprint))
    shadowed = np.isin(painting.labels, list(ground))[index] * painting.shadow * light.shadow
    image *= (1 - shadowed)[..., None]
    sky, skyline = index == 0, np.array(light.skyline, np.float32)
    image *= np.where(sky[..., None], _shade_sky(camera, light) / skyline, np.float32(1))
    clear = np.exp(-light.fog * np.where(sky, 0, depth))[..., None]  # H W 1
    image -= skyline
    return image * clear + skyline


def _gather(table: NDArray[np.generic], index: NDArray[np.intp]) -> NDArray[np.generic]:
    """Rows of a table, by surface. "clip" is numpy's fast path; no index is out of range."""
    return table.take(index, 0, mode="clip")


def _find_planes(frames: Floats) -> Floats:
    """Unit normal away from the camera, its product with the origin, then axis and offset of u and of v, 12 S."""
    origins = frames[:, 0]
    u_axes = _normalise(frames[:, 1] - origins)
    v_axes = frames[:, 2] - origins
    v_axes = _normalise(v_axes - (v_axes * u_axes).sum(1, keepdims=True) * u_axes)
    normals = np.cross(u_axes, v_axes)
    normals *= np.where((normals * origins).sum(1, keepdims=True) < 0, -1, 1)
    rows = [part for axes in (normals, u_axes, v_axes) for part in (*axes.T, (axes * origins).sum(1))]
    return np.array(rows, np.float32)


def _illuminate(normals: Floats, camera: Camera, light: Light) -> Floats:
    """Light on each surface, RGB factors, S 3."""
    (x, y, z), cos, sin = light.sun, math.cos(camera.yaw), math.sin(camera.yaw)
    sun = np.array((x * cos - z * sin, y, x * sin + z * cos), np.float32)
    facing = np.clip(-(sun @ normals), 0, 1)[:, None]
    lit = np.array(light.ambient, np.float32) + facing * np.array(light.sun_color, np.float32)
    lit[0] = 1.0  # the sky needs no light
    return lit


def _locate(planes: Floats, index: NDArray[np.intp], camera: Camera) -> tuple[Floats, Floats, Floats, Floats]:
    """u, v, depth and size of a pixel on the surface, metres, each H W."""
    focal = camera.focal * WIDTH
    x = ((np.arange(WIDTH, dtype=np.float32) + 0.5 - WIDTH / 2) / focal)[None]
    y = ((camera.horizon * HEIGHT - np.arange(HEIGHT, dtype=np.float32) - 0.5) / focal)[:, None]
    nx, ny, nz, n0, ux, uy, uz, u0, vx, vy, vz, v0 = planes.take(index, 1, mode="clip")
    slope = np.maximum(nx * x + ny * y + nz, 1e-4)
    depth = np.clip(n0 / slope, 0, SKY_DISTANCE)
    footprint = np.maximum(depth / focal / np.clip(slope, 0.02, 1), 1e-4)
    return depth * (ux * x + uy * y + uz) - u0, depth * (vx * x + vy * y + vz) - v0, depth, footprint


def _add_pattern(
    image: Floats, painting: Painting, index: NDArray[np.intp], lit: Floats, light: Light, noise: Floats,
    place: tuple[Floats, Floats, Floats],
) -> Floats:  # fmt: skip
    """Add windows, bricks, bars and grain. Each fades to its mean where it is finer than a pixel."""
    u, v, footprint = place
    rows = [(*look.pitch, *look.fill, look.bond, look.glass, look.grain, look.scale) for look in painting.looks]
    table = np.array(rows, np.float32).T.take(index, 1, mode="clip")
    pitch_u, pitch_v, fill_u, fill_v, bond, glass, grain, scale = table
    row = np.floor(v / pitch_v)
    odd = row / 2 != np.floor(row / 2)
    column = u / pitch_u + odd * bond
    inside = _cover_stripes(column, pitch_u, fill_u, footprint)
    inside *= _cover_stripes(v / pitch_v, pitch_v, fill_v, footprint)
    pane = _sample(noise, row * 37, np.floor(column) * 91)
    accents = np.array([look.accent for look in painting.looks], np.float32) * lit
    accent = _gather(accents, index) * (1 + _GLASS_CONTRAST * glass * pane)[..., None]
    burning = glass * (pane > _find_quantile(light.lit))
    accent += burning[..., None] * (np.array(_LAMPLIGHT, np.float32) - accent)
    image = image + inside[..., None] * (accent - image)
    step = NOISE_SIDE / _NOISE_CELLS / scale
    strength = light.grain * grain * np.minimum(scale / footprint, 1)
    return image * np.clip(1 + strength * _sample(noise, v * step, u * step), 0.2, 2)[..., None]


def _cover_stripes(position: Floats, period: Floats, share: Floats, footprint: Floats) -> Floats:
    """Share of a pixel in stripes that take `share` of their period."""
    distance = np.abs(position - np.floor(position) - 0.5)
    sharp = np.clip((share / 2 - distance) * period / footprint + 0.5, 0, 1)
    return sharp + np.minimum(footprint / period, 1) * (share - sharp)


def _sample(noise: Floats, rows: Floats, columns: Floats) -> Floats:
    last = NOISE_SIDE - 1  # of a power of two, so that & repeats the tile
    return noise.take((rows.astype(np.intp) & last) * NOISE_SIDE + (columns.astype(np.intp) & last), mode="clip")


def _shade_sky(camera: Camera, light: Light) -> Floats:
    """From the skyline's colour to the zenith's, H 1 3."""
    up = (camera.horizon * HEIGHT - np.arange(HEIGHT, dtype=np.float32)) / (camera.focal * WIDTH)
    share = (np.clip(up * 2.5, 0, 1) ** 0.7)[:, None, None]
    return np.array(light.skyline, np.float32) * (1 - share) + np.array(light.zenith, np.float32) * share


def _normalise(vectors: Floats) -> Floats:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)


def _find_quantile(share: float) -> float:
    """Value that about `share` of standard normal draws exceed (logistic approximation)."""
    return math.log((1 - share) / share) / 1.702 if 0 < share < 1 else math.inf
