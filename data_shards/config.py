"""Names and limits of shards; imports no torch, so that `launch` may use it on a login node."""

from dataclasses import dataclass
from typing import Literal

OnBadSample = Literal["raise", "skip"]
ImageFormat = Literal["png", "webp", "jpg"]
Field = str  # image, caption, attributes, mask.png, or the extension of a tensor: latents.npy

INDEX_NAME = "index.json"
INDEX_SCHEMA_VERSION = 2
READABLE_SCHEMA_VERSIONS = (1, 2)
DEFAULT_SAMPLES_PER_SHARD = 500
DEFAULT_BACKGROUND = "#ffffff"

CAPTION_EXTENSION = "txt"
ATTRIBUTES_EXTENSION = "json"
# extension -> the one Pillow format that may stand behind it
IMAGE_FORMATS: dict[str, str] = {"png": "PNG", "webp": "WEBP", "jpg": "JPEG", "jpeg": "JPEG"}
ORIGINAL_CAPTION_EXTENSION = "original.txt"  # what stood in .txt before a captioner wrote there
TENSOR_EXTENSION = "npy"
MASK_EXTENSION = "mask.png"  # of its image's size; white: to be painted, black: to be kept
# A member is KEY.EXTENSION or KEY.NAME.EXTENSION, with one of these last: latents.npy, original.txt
ALLOWED_EXTENSIONS: tuple[str, ...] = (*IMAGE_FORMATS, CAPTION_EXTENSION, ATTRIBUTES_EXTENSION, TENSOR_EXTENSION)

MAX_IMAGE_PIXELS = 2**26  # 8192 x 8192
MAX_IMAGE_BYTES = 2**26
MAX_CAPTION_BYTES = 2**16
MAX_ATTRIBUTES_BYTES = 2**20
MAX_TENSOR_BYTES = 2**26
MAX_REPLACEMENTS = 16  # bad samples in a row before `skip` gives up

CC0 = "CC0-1.0"
CC_BY = "CC-BY-4.0"


@dataclass(frozen=True)
class FaceStyle:
    """One style of the faces source: its licence and the artist to name."""

    name: str
    licence: str
    creator: str
    title: str
    source_url: str


FACE_STYLES: dict[str, FaceStyle] = {
    style.name: style
    for style in (
        FaceStyle("open-peeps", CC0, "Pablo Stanley", "Open Peeps", "https://www.openpeeps.com/"),
        FaceStyle("critters", CC0, "DiceBear", "Critters", "https://www.dicebear.com"),
        FaceStyle("voxel-art", CC0, "DiceBear", "Voxel Art", "https://www.dicebear.com"),
        FaceStyle("toon-head", CC_BY, "Johan Melin", "ToonHead", "https://www.figma.com/community/file/1589627891082866389"),
        FaceStyle("personas", CC_BY, "Draftbit - draftbit.com", "Personas by Draftbit", "https://personas.draftbit.com/"),
        FaceStyle("big-smile", CC_BY, "Ashley Seo", "Custom Avatar", "https://www.figma.com/community/file/881358461963645496"),
        FaceStyle("micah", CC_BY, "Micah Lanier", "Avatar Illustration System", "https://www.figma.com/community/file/829741575478342595"),
    )
}


def is_allowed_extension(extension: str) -> bool:
    """Whether a member may end so: in one of ALLOWED_EXTENSIONS, with at most one plain name before it."""
    name, _, last = extension.rpartition(".")
    return last in ALLOWED_EXTENSIONS and (not name or name.replace("_", "").isalnum()) and name.isascii()


def is_image(extension: str) -> bool:
    """Whether members of this extension are the samples' images; a name before it, as in mask.png, makes it something else."""
    return extension in IMAGE_FORMATS


def member_limit_bytes(extension: str) -> int:
    """Largest size a member of this allowed extension may have."""
    match extension.rpartition(".")[2]:
        case "txt":
            return MAX_CAPTION_BYTES
        case "json":
            return MAX_ATTRIBUTES_BYTES
        case "npy":
            return MAX_TENSOR_BYTES
        case _:
            return MAX_IMAGE_BYTES
