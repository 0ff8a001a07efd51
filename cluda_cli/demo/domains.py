"""The two domains of the embedded dataset: layout of the streets, colours, weather and lens of each."""

from collections.abc import Mapping
from dataclasses import dataclass

from cluda_cli.demo.houses import Range
from cluda_cli.demo.objects import Palette
from cluda_cli.demo.scenes import StreetStyle


@dataclass(frozen=True)
class DomainStyle:
    """Look of a domain. Ranges are drawn from once per image."""

    streets: StreetStyle
    palette: Palette
    sun_height: Range
    """Degrees above the horizon."""
    overcast: Range
    """0 for hard sunlight to 1 for none."""
    fog: Range
    """Extinction per metre."""
    grain: float
    """Strength of surface textures."""
    lit: Range
    """Share of lit windows."""
    exposure: Range
    """Stops."""
    warmth: float
    """Standard deviation of the white balance."""
    saturation: Range
    blur: Range
    """Standard deviation, pixels."""
    vignette: Range
    """Share of light lost in the corners."""
    noise: Range
    """Standard deviation at mid grey, 0..255."""


# RGB colours of each part. Each thing takes one of them, varied at random.
_RENDER_PALETTE: Palette = {
    "road": ((84, 84, 92), (92, 90, 96), (112, 108, 106)),
    "marking": ((245, 245, 245),),
    "kerb": ((205, 205, 205),),
    "joint": ((176, 150, 140),),
    "sidewalk": ((214, 186, 170), (206, 190, 180)),
    "terrain": ((112, 190, 74), (130, 196, 84), (156, 180, 84)),
    "building": (
        (226, 150, 92), (236, 206, 140), (200, 92, 78), (150, 170, 205), (232, 222, 204), (176, 196, 150),
        (160, 152, 146), (150, 100, 84),
    ),
    "window": ((70, 108, 150), (60, 84, 120)),
    "roof": ((176, 70, 56), (120, 84, 76)),
    "wall": ((190, 160, 210), (170, 150, 190), (176, 160, 156)),
    "fence": ((150, 98, 54), (240, 240, 240)),
    "fence gap": ((90, 120, 70),),
    "pole": ((150, 154, 160), (126, 130, 140)),
    "light housing": ((34, 36, 40),),
    "sign red": ((226, 30, 36),), "sign white": ((246, 246, 246),),
    "sign blue": ((30, 90, 210),), "sign yellow": ((250, 205, 30),),
    "vegetation": ((44, 140, 52), (62, 156, 44), (36, 120, 60), (92, 140, 56)),
    "trunk": ((116, 80, 50),),
    "skin": ((240, 200, 170), (170, 116, 82)), "hair": ((60, 40, 30), (200, 150, 70)),
    "shirt": ((240, 60, 140), (50, 190, 200), (250, 220, 60), (230, 230, 240), (130, 70, 200)),
    "trousers": ((40, 56, 120), (60, 60, 70), (150, 120, 80)),
    "helmet": ((250, 240, 240), (250, 120, 30)),
    "paint": (
        (214, 36, 36), (36, 84, 206), (240, 240, 244), (40, 44, 50), (240, 190, 30), (40, 150, 110), (150, 152, 158),
    ),
    "glass": ((36, 50, 70),), "tyre": ((26, 26, 30),), "rim": ((190, 190, 196),),
    "rear lamp": ((190, 10, 20),), "head lamp": ((255, 250, 220),), "plate": ((250, 250, 250),),
    "cargo": ((236, 236, 240), (60, 120, 200), (230, 120, 40)),
    "bus": ((250, 200, 20), (220, 40, 50)), "stripe": ((250, 250, 250),),
    "frame": ((220, 40, 60), (30, 110, 220), (40, 160, 80)),
    "bin": ((60, 110, 90),),
}  # fmt: skip

_CAMERA_PALETTE: Palette = {
    "road": ((104, 102, 100), (94, 93, 94), (118, 115, 112)),
    "marking": ((218, 214, 205),),
    "kerb": ((166, 165, 160),),
    "joint": ((126, 116, 110),),
    "sidewalk": ((176, 162, 152), (180, 164, 148), (164, 154, 148)),
    "terrain": ((122, 148, 70), (140, 148, 84), (114, 134, 68)),
    "building": ((176, 138, 106), (150, 94, 78), (188, 174, 150), (124, 128, 138), (204, 188, 160), (150, 154, 138)),
    "window": ((58, 70, 86), (74, 84, 96)),
    "roof": ((120, 68, 58), (92, 84, 86)),
    "wall": ((156, 138, 140), (142, 120, 122), (154, 150, 144)),
    "fence": ((102, 84, 66), (158, 154, 146)),
    "fence gap": ((72, 84, 58),),
    "pole": ((116, 118, 118), (92, 98, 100)),
    "light housing": ((38, 42, 40), (52, 51, 40)),
    "sign red": ((190, 44, 44),), "sign white": ((222, 220, 214),),
    "sign blue": ((42, 86, 168),), "sign yellow": ((222, 180, 50),),
    "vegetation": ((62, 112, 48), (84, 120, 54), (52, 94, 56), (130, 112, 50)),
    "trunk": ((94, 76, 60),),
    "skin": ((218, 178, 152), (144, 100, 76)), "hair": ((48, 38, 32), (146, 116, 76)),
    "shirt": ((134, 62, 84), (84, 104, 118), (146, 140, 98), (186, 182, 178), (90, 78, 112)),
    "trousers": ((45, 53, 84), (60, 57, 58), (112, 98, 80)),
    "helmet": ((134, 130, 132), (200, 154, 120)),
    "paint": (
        (128, 48, 50), (70, 92, 136), (196, 196, 194), (140, 143, 147), (60, 62, 66), (44, 66, 62), (150, 140, 112),
    ),
    "glass": ((42, 50, 58), (60, 70, 78)), "tyre": ((30, 30, 31),), "rim": ((146, 146, 148),),
    "rear lamp": ((166, 24, 26),), "head lamp": ((242, 236, 210),), "plate": ((214, 212, 202),),
    "cargo": ((200, 198, 194), (92, 114, 146), (166, 110, 72)),
    "bus": ((200, 162, 50), (160, 48, 49), (176, 170, 130)), "stripe": ((206, 206, 202),),
    "frame": ((118, 42, 50), (48, 80, 126), (56, 90, 68)),
    "bin": ((64, 86, 72),),
}  # fmt: skip

DOMAINS: Mapping[str, DomainStyle] = {
    "render": DomainStyle(
        StreetStyle(
            camera_height=(1.6, 2.0), horizon=(0.42, 0.46), focal=(0.72, 0.8), yaw=0.04, gap=(5, 16), heavy=0.13,
            people=(4, 12), two_wheelers=(0, 3), greenery=0.3, building_height=(8, 18), crossing=0.4,
        ),
        _RENDER_PALETTE, sun_height=(35, 70), overcast=(0.0, 0.6), fog=(0.0005, 0.003), grain=0.3, lit=(0.0, 0.0),
        exposure=(-0.2, 0.2), warmth=0.02, saturation=(0.9, 1.1), blur=(0.0, 0.0), vignette=(0.0, 0.0),
        noise=(0.0, 0.0),
    ),
    "camera": DomainStyle(
        StreetStyle(
            camera_height=(1.3, 2.4), horizon=(0.39, 0.49), focal=(0.66, 0.9), yaw=0.09, gap=(4, 20), heavy=0.1,
            people=(3, 16), two_wheelers=(0, 3), greenery=0.38, building_height=(7, 22), crossing=0.45,
        ),
        _CAMERA_PALETTE, sun_height=(8, 50), overcast=(0.1, 0.8), fog=(0.002, 0.009), grain=0.7, lit=(0.02, 0.2),
        exposure=(-1.1, -0.2), warmth=0.05, saturation=(0.8, 1.1), blur=(0.35, 0.75), vignette=(0.1, 0.35),
        noise=(1.5, 5.0),
    ),
}  # fmt: skip
