"""English names for colours: the nearest of about forty anchors in CIE Lab, and skin tones by lightness."""

from functools import lru_cache

Lab = tuple[float, float, float]

# fmt: off
ANCHORS: dict[str, str] = {
    "black": "#1c1718", "dark gray": "#495057", "gray": "#8a8f98", "light gray": "#d8dce2", "white": "#fafafa",
    "dark brown": "#3f2a20", "brown": "#71472d", "auburn": "#a5522c", "light brown": "#b08045", "tan": "#cda06b", "blond": "#dcbc82",
    "cream": "#f0e4c4", "red": "#d63447", "dark red": "#a32424", "coral": "#ec7f72", "peach": "#ffd9b8", "orange": "#f4801f",
    "light orange": "#fdba74", "amber": "#c07a12", "yellow": "#f6c524", "light yellow": "#fcea7a", "lime": "#b6e65c",
    "green": "#3fae54", "light green": "#86e08f", "dark green": "#0f7a4a", "teal": "#159a8c", "mint": "#86dfc6",
    "dark teal": "#0f6f72", "cyan": "#8fe0f0", "light blue": "#9ccdf2", "blue": "#2f7de0", "dark blue": "#1f3f95", "navy": "#22304f",
    "indigo": "#5048c8", "periwinkle": "#9aaae6", "lavender": "#c6bdf5", "purple": "#7a3fd0", "dark violet": "#362c47",
    "magenta": "#b02aa5", "pink": "#f49ac0", "light pink": "#fdd5e0", "hot pink": "#e4508f", "orchid": "#e59af0", "crimson": "#bb164a",
}
# fmt: on
# lowest CIE lightness (0 .. 100) of each name
SKIN_TONES: tuple[tuple[float, str], ...] = ((84, "very light"), (74, "light"), (58, "medium"), (42, "brown"), (0, "dark brown"))


@lru_cache(maxsize=1024)
def colour_name(colour: str) -> str:
    """The anchor nearest to a colour written #rrggbb."""
    wanted = _lab(colour)
    return min(ANCHORS, key=lambda name: _distance(_lab(ANCHORS[name]), wanted))


@lru_cache(maxsize=1024)
def skin_tone_name(colour: str) -> str:
    """One of five names by the lightness of a skin colour written #rrggbb."""
    lightness = _lab(colour)[0]
    return next(name for low, name in SKIN_TONES if lightness >= low)


def rgb(colour: str) -> tuple[int, int, int]:
    """Red, green and blue (0 .. 255) of a colour written #rrggbb.

    Raises: ValueError if it is written otherwise.
    """
    if len(colour) != 7 or colour[0] != "#":
        raise ValueError(f"colour {colour!r} is not of the form #rrggbb")
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _distance(one: Lab, other: Lab) -> float:
    return sum((a - b) ** 2 for a, b in zip(one, other, strict=True))


@lru_cache(maxsize=1024)
def _lab(colour: str) -> Lab:
    """sRGB to CIE Lab under D65. Source: IEC 61966-2-1 and CIE 15."""
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (part / 255 for part in rgb(colour)))
    x, y, z = 0.4124 * r + 0.3576 * g + 0.1805 * b, 0.2126 * r + 0.7152 * g + 0.0722 * b, 0.0193 * r + 0.1192 * g + 0.9505 * b
    fx, fy, fz = (t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in (x / 0.9505, y, z / 1.089))
    return 116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)
