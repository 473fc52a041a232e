"""The embedded source: cartoon faces with attributes and captions, each a pure function of (style, seed, number)."""

import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from importlib.resources import files
from typing import final

import resvg_py
from dicebear import Avatar, Style
from PIL import Image

from data_shards.config import CC0, DEFAULT_BACKGROUND, FACE_STYLES
from data_shards.sources.colours import ANCHORS, colour_name, rgb, skin_tone_name
from data_shards.sources.rows import Part, Row, even_parts

LICENCE_URLS = {CC0: "https://creativecommons.org/publicdomain/zero/1.0/"}
CC_BY_URL = "https://creativecommons.org/licenses/by/4.0/"
# for the styles that bring no background of their own
BACKGROUNDS = ("light blue", "lavender", "light pink", "peach", "mint", "light yellow", "light gray")
# drawn faces that are no person's: left out, so that a caption never names somebody a monster
LEFT_OUT = re.compile(r"cyclops|monster|.*WithFang")
NONE = "none"
# heads that are worn, not hair, and variants whose name needs another word
WORN = ("beanie", "hat", "hijab", "turban")
RENAMED = {"hatBeanie": "beanie", "hatHip": "hat", "smileLOL": "laughing", "smileBig": "big smile", "smileTeethGap": "gap-toothed smile"}


@dataclass(frozen=True)
class Trait:
    """An attribute, the option it is read from, and its phrase in the caption ("" keeps it out)."""

    name: str
    option: str
    phrase: str = ""


@dataclass(frozen=True)
class Look:
    """How faces of one style are described: the subject, then its traits in caption order."""

    subject: str
    traits: tuple[Trait, ...]


_BACKGROUND = Trait("background", "backgroundColor", "{} background")
_SKIN = Trait("skin", "skinColor", "{} skin")
_PERSON = "a cartoon portrait of a person"

LOOKS: dict[str, Look] = {
    "open-peeps": Look(
        _PERSON,
        (
            _SKIN,
            Trait("hair", "headVariant", "{} hair"),
            Trait("hair_colour", "headContrastColor"),
            Trait("expression", "expressionVariant", "{} expression"),
            Trait("facial_hair", "facialHairVariant", "{} facial hair"),
            Trait("glasses", "accessoriesVariant", "{}"),
            Trait("mask", "maskVariant", "{}"),
            Trait("shirt", "clothingColor", "{} shirt"),
            _BACKGROUND,
        ),
    ),
    "critters": Look(
        "a cartoon critter",
        (
            Trait("body_colour", "bodyColor", "{}"),
            Trait("body", "bodyVariant", "{} body"),
            Trait("top", "topVariant", "{}"),
            Trait("eyes", "eyesVariant", "{} eyes"),
            Trait("mouth", "mouthVariant", "{} mouth"),
            Trait("pattern", "patternVariant", "{} pattern"),
            Trait("cheeks", "cheeksVariant", "{} cheeks"),
            _BACKGROUND,
        ),
    ),
    "voxel-art": Look(
        "a voxel art figure",
        (
            _SKIN,
            Trait("hair_colour", "hairColor"),
            Trait("top", "topVariant", "{} top"),
            Trait("eyes", "eyesVariant", "{} eyes"),
            Trait("mouth", "mouthVariant", "{} mouth"),
            Trait("facial_hair", "beardVariant", "{} facial hair"),
            Trait("glasses", "glassesVariant", "{} glasses"),
            Trait("outfit", "outfitVariant", "{} outfit"),
            Trait("shirt", "shirtColor", "{} shirt"),
            _BACKGROUND,
        ),
    ),
    "toon-head": Look(
        _PERSON,
        (
            _SKIN,
            Trait("hair_colour", "hairColor", "{}"),
            Trait("hair", "hairVariant", "{} hair"),
            Trait("rear_hair", "rearHairVariant", "{} hair behind"),
            Trait("facial_hair", "beardVariant", "{} beard"),
            Trait("eyes", "eyesVariant", "{} eyes"),
            Trait("mouth", "mouthVariant", "{} mouth"),
            Trait("clothes_colour", "clothesColor", "{}"),
            Trait("clothes", "clothesVariant", "{}"),
            _BACKGROUND,
        ),
    ),
    "personas": Look(
        _PERSON,
        (
            _SKIN,
            Trait("hair_colour", "hairColor", "{}"),
            Trait("hair", "hairVariant", "{} hair"),
            Trait("facial_hair", "facialHairVariant", "{} facial hair"),
            Trait("eyes", "eyesVariant", "{} eyes"),
            Trait("mouth", "mouthVariant", "{} mouth"),
            Trait("shirt", "clothingColor", "{} shirt"),
            _BACKGROUND,
        ),
    ),
    "big-smile": Look(
        _PERSON,
        (
            _SKIN,
            Trait("hair_colour", "hairColor", "{}"),
            Trait("hair", "hairVariant", "{} hair"),
            Trait("eyes", "eyesVariant", "{} eyes"),
            Trait("mouth", "mouthVariant", "{} mouth"),
            Trait("accessory", "accessoriesVariant", "{}"),
            _BACKGROUND,
        ),
    ),
    "micah": Look(
        _PERSON,
        (
            Trait("skin", "baseColor", "{} skin"),
            Trait("hair_colour", "hairColor", "{}"),
            Trait("hair", "hairVariant", "{} hair"),
            Trait("facial_hair", "facialHairVariant", "{}"),
            Trait("eyes", "eyesVariant"),
            Trait("mouth", "mouthVariant", "{} mouth"),
            Trait("glasses", "glassesVariant", "{} glasses"),
            Trait("shirt", "shirtColor", "{} shirt"),
            _BACKGROUND,
        ),
    ),
}


@final
@dataclass(frozen=True)
class FacesSource:
    """Faces start .. start + count - 1 of (style, seed); another `start` gives faces held out of these.

    Raises: ValueError if the style is unknown, or asks for attribution and `allow_attribution` is not set.
    """

    style: str
    count: int
    seed: int = 0
    start: int = 0
    allow_attribution: bool = False

    def __post_init__(self) -> None:
        style = FACE_STYLES.get(self.style)
        if style is None:
            raise ValueError(f"face style {self.style!r} is unknown; the styles are {', '.join(FACE_STYLES)}")
        if style.licence != CC0 and not self.allow_attribution:
            free = ", ".join(name for name, other in FACE_STYLES.items() if other.licence == CC0)
            raise ValueError(
                f"face style {self.style!r} by {style.creator} is licensed {style.licence}: whoever shows its pictures must name "
                f"the artist; agree with --allow-attribution, or take a CC0 style: {free}"
            )
        if self.count < 1 or self.start < 0:
            raise ValueError(f"faces count={self.count} and start={self.start}: count must be at least 1 and start at least 0")

    def describe(self) -> dict[str, object]:
        """Style, numbers and the versions of the libraries that draw the faces."""
        drawn_by = {name: version(name) for name in ("dicebear-core", "dicebear-styles", "resvg-py")}
        return {"kind": "faces", "style": self.style, "count": self.count, "seed": self.seed, "start": self.start, "drawn_by": drawn_by}

    def licence(self) -> dict[str, object]:
        """The style's licence and artist, as its own meta data states them."""
        style = FACE_STYLES[self.style]
        meta = _definition(self.style)["meta"]
        assert isinstance(meta, dict), "a DiceBear definition has meta data"
        return {
            "name": style.licence,
            "url": LICENCE_URLS.get(style.licence, CC_BY_URL),
            "creators": [style.creator],
            "attribution_required": style.licence != CC0,
            "text": meta["license"]["text"],
        }

    def parts(self, rows: int) -> Sequence[Part]:
        """All faces, in order, as parts of `rows` faces."""
        return even_parts(self.count, rows)

    def read(self, part: Part, size: int | None) -> Iterator[Row]:
        """Faces start + part.first and on, drawn straight at `size` pixels on their own backgrounds.

        Raises: ValueError if there is no size.
        """
        if size is None:
            raise ValueError("faces are drawn at the wanted size and have none of their own; give one (--size 64)")
        assert part.count is not None, "parts() says how many faces a part has"
        return (self.row(number, size) for number in range(part.first, part.first + part.count))

    def row(self, number: int, size: int) -> Row:
        """Face start + number."""
        face = self.start + number
        svg, attributes, caption = draw_face(self.style, self.seed, face)
        return Row(key=f"{self.style}_{self.seed}_{face:08d}", image=_raster(svg, size), caption=caption, attributes=attributes)


def draw_face(style: str, seed: int, face: int, *, options: Mapping[str, object] | None = None) -> tuple[str, dict[str, str], str]:
    """SVG, attributes and caption of one face; `options` force DiceBear options, e.g. {"maskProbability": 0}."""
    wanted = {**_default_options(style), **(options or {}), "seed": f"halfstep/{style}/{seed}/{face}"}
    avatar = Avatar(_style(style), wanted)
    attributes = {"style": style, **_attributes(LOOKS[style], avatar.to_json()["options"])}
    return avatar.to_string(), attributes, _caption(LOOKS[style], attributes)


def words(variant: str) -> str:
    """`mediumBangs2` as `medium bangs`: numbered variants of one thing share a name."""
    return RENAMED.get(variant) or re.sub(r"(?<=[a-z])(?=[A-Z])", " ", variant.rstrip("0123456789")).lower()


def _attributes(look: Look, options: Mapping[str, object]) -> dict[str, str]:
    """One plain string a trait; a part that was not drawn is "none"."""
    attributes: dict[str, str] = {}
    for trait in look.traits:
        value = options.get(trait.option)
        if trait.option.endswith("Color"):
            colour = value[0] if isinstance(value, list) and value else None
            name = skin_tone_name if trait.name == "skin" else colour_name
            attributes[trait.name] = NONE if colour is None else name(str(colour))
        else:
            attributes[trait.name] = NONE if value is None else words(str(value))
    return attributes


def _caption(look: Look, attributes: Mapping[str, str]) -> str:
    """The subject and its drawn traits; a bare "{}" (a colour before its noun) joins the phrase after it."""
    phrases = [trait.phrase.format(attributes[trait.name]) for trait in look.traits if trait.phrase and attributes[trait.name] != NONE]
    text = ", ".join(_once(phrase) for phrase in phrases)
    for trait in look.traits:
        if trait.phrase == "{}" and trait.name.endswith("_colour"):
            text = text.replace(f"{attributes[trait.name]}, ", f"{attributes[trait.name]} ", 1)
    return f"{look.subject} with {text}"


def _once(phrase: str) -> str:
    """`no hair hair` as `no hair`, `beanie hair` as `beanie`."""
    worn = phrase.removesuffix(" hair")
    return worn if worn in WORN else re.sub(r"\b(\w+) \1\b", r"\1", phrase)


@lru_cache(maxsize=len(FACE_STYLES))
def _definition(style: str) -> dict[str, object]:
    return json.loads(files("dicebear_styles").joinpath(f"{style}.json").read_text(encoding="utf-8"))


@lru_cache(maxsize=len(FACE_STYLES))
def _style(style: str) -> Style:
    return Style(_definition(style))


@lru_cache(maxsize=len(FACE_STYLES))
def _default_options(style: str) -> dict[str, object]:
    """Every skin tone alike, no animation, our backgrounds where the style has none, nothing of LEFT_OUT."""
    definition = _definition(style)
    components, colours = definition["components"], definition["colors"]
    assert isinstance(components, dict) and isinstance(colours, dict), "a DiceBear definition has components and colours"
    options: dict[str, object] = {} if "background" in colours else {"backgroundColor": [ANCHORS[name] for name in BACKGROUNDS]}
    for name, component in components.items():
        variants = [variant for variant in component.get("variants", {}) if not LEFT_OUT.fullmatch(variant)]
        if name == "animation":
            options["animationVariant"] = ["none"]
        elif len(variants) < len(component.get("variants", {})):
            options[f"{name}Variant"] = variants
    return options


def _raster(svg: str, size: int) -> Image.Image:
    """The SVG drawn at size x size pixels, RGB."""
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    drawn = Image.open(io.BytesIO(png), formats=("PNG",)).convert("RGBA")
    image = Image.new("RGB", drawn.size, rgb(DEFAULT_BACKGROUND))
    image.paste(drawn, mask=drawn)
    return image
