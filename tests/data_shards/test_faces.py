"""Faces are pure functions of (style, seed, number), described truly, and licensed as their artists wish."""

from collections import Counter

import pytest
from PIL import Image

from data_shards.config import CC0, FACE_STYLES
from data_shards.sources.colours import ANCHORS, colour_name, rgb, skin_tone_name
from data_shards.sources.faces import LEFT_OUT, LOOKS, FacesSource, draw_face, words


def picture(source: FacesSource, number: int, size: int) -> Image.Image:
    image = source.row(number, size).image
    assert isinstance(image, Image.Image)
    return image


@pytest.mark.parametrize("style", FACE_STYLES)
def test_a_face_is_a_function_of_style_seed_and_number(style: str) -> None:
    source = FacesSource(style, 10, seed=3, allow_attribution=True)
    shifted = FacesSource(style, 4, seed=3, start=2, allow_attribution=True)
    once, again = source.row(5, 24), shifted.row(3, 24)
    assert picture(source, 5, 24).tobytes() == picture(shifted, 3, 24).tobytes()
    assert (once.key, once.caption, once.attributes) == (again.key, again.caption, again.attributes)
    assert picture(source, 5, 24).size == (24, 24) and picture(source, 5, 24).mode == "RGB"


def test_parts_hold_every_face_once_and_in_order() -> None:
    source = FacesSource("open-peeps", 10, start=4)
    parts = source.parts(4)
    assert [(part.first, part.count) for part in parts] == [(0, 4), (4, 4), (8, 2)]
    keys = [row.key for part in parts for row in source.read(part, 8)]
    assert keys == [f"open-peeps_0_{face:08d}" for face in range(4, 14)]


def test_faces_have_no_size_of_their_own() -> None:
    source = FacesSource("open-peeps", 1)
    with pytest.raises(ValueError, match="have none of their own; give one"):
        list(source.read(source.parts(1)[0], None))


def test_seeds_and_numbers_give_different_faces() -> None:
    pictures = [picture(FacesSource("open-peeps", 9, seed=seed), i, 16).tobytes() for seed in (0, 1) for i in range(9)]
    assert len(set(pictures)) == len(pictures)


def test_another_size_is_the_same_face() -> None:
    source = FacesSource("critters", 1)
    assert source.row(0, 16).attributes == source.row(0, 64).attributes
    assert picture(source, 0, 64).size == (64, 64)


def test_skin_tones_are_uniform() -> None:
    counts = Counter(draw_face("open-peeps", 0, face)[1]["skin"] for face in range(500))
    assert set(counts) == {"very light", "light", "medium", "brown", "dark brown"}
    # chi-square, 4 degrees of freedom: 18.5 is exceeded once in a thousand
    assert sum((count - 100) ** 2 / 100 for count in counts.values()) < 18.5


def test_no_face_is_a_cyclops_a_monster_or_has_fangs() -> None:
    expressions = {draw_face("open-peeps", 1, face)[1]["expression"] for face in range(400)}
    assert len(expressions) > 20
    assert not any(LEFT_OUT.fullmatch(variant) for variant in ("smile", "veryAngry"))
    assert all(LEFT_OUT.fullmatch(variant) for variant in ("cyclops", "monster", "angryWithFang"))
    assert not expressions & {words(variant) for variant in ("cyclops", "monster", "angryWithFang")}


@pytest.mark.parametrize("style", FACE_STYLES)
def test_attributes_are_plain_strings_with_the_same_names_for_every_face(style: str) -> None:
    for face in range(20):
        _, attributes, caption = draw_face(style, 0, face)
        assert list(attributes) == ["style", *(trait.name for trait in LOOKS[style].traits)]
        assert all(isinstance(value, str) and value for value in attributes.values())
        assert caption.startswith(LOOKS[style].subject) and "none" not in caption and "{" not in caption


def test_the_caption_says_what_the_attributes_say() -> None:
    _, attributes, caption = draw_face("open-peeps", 0, 1)
    assert f"{attributes['skin']} skin" in caption
    assert f"{attributes['shirt']} shirt" in caption
    assert caption.endswith(f"{attributes['background']} background")


def test_forced_options_change_only_what_they_name() -> None:
    _, masked, _ = draw_face("open-peeps", 0, 2, options={"maskProbability": 100})
    _, bare, caption = draw_face("open-peeps", 0, 2, options={"maskProbability": 0})
    assert masked["mask"] != "none" and bare["mask"] == "none" and "mask" not in caption
    assert {name for name in masked if masked[name] != bare[name]} == {"mask"}


@pytest.mark.parametrize("style", [name for name, style in FACE_STYLES.items() if style.licence != CC0])
def test_a_style_that_asks_for_attribution_needs_consent(style: str) -> None:
    with pytest.raises(ValueError, match=r"--allow-attribution.*CC0 style: open-peeps, critters, voxel-art"):
        FacesSource(style, 1)


@pytest.mark.parametrize("style", FACE_STYLES)
def test_the_licence_names_the_artist_as_the_style_does(style: str) -> None:
    licence = FacesSource(style, 1, allow_attribution=True).licence()
    assert licence["creators"] == [FACE_STYLES[style].creator]
    assert FACE_STYLES[style].creator in str(licence["text"])
    assert str(licence["name"]).split("-")[0] in str(licence["text"])
    assert licence["attribution_required"] is (FACE_STYLES[style].licence != CC0)


def test_an_unknown_style_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'open-peep' is unknown; the styles are open-peeps, critters"):
        FacesSource("open-peep", 1)


def test_no_face_at_all_is_an_error() -> None:
    with pytest.raises(ValueError, match="count must be at least 1"):
        FacesSource("open-peeps", 0)


def test_variants_become_words() -> None:
    assert [words(name) for name in ("mediumBangs2", "veryAngry", "hatBeanie", "noHair3")] == [
        "medium bangs",
        "very angry",
        "beanie",
        "no hair",
    ]


def test_every_anchor_is_its_own_name() -> None:
    assert {name: colour_name(colour) for name, colour in ANCHORS.items()} == {name: name for name in ANCHORS}


def test_skin_tones_go_by_lightness() -> None:
    assert [skin_tone_name(f"#{grey:02x}{grey:02x}{grey:02x}") for grey in (230, 190, 150, 110, 60)] == [
        "very light",
        "light",
        "medium",
        "brown",
        "dark brown",
    ]


def test_a_colour_that_is_not_hexadecimal_is_named() -> None:
    with pytest.raises(ValueError, match="'white' is not of the form #rrggbb"):
        rgb("white")
