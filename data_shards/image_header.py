"""How large an image is and whether it is of its extension's format, from its bytes alone: no decoder is asked, nothing is unpacked.

Sources: PNG 3rd edition (W3C 2025), JPEG T.81 annex B, WebP RFC 9649."""

import struct
import zlib

from data_shards.config import IMAGE_FORMATS, MAX_IMAGE_PIXELS

MAX_PNG_CHUNKS = 2**14  # 64 MiB in libpng's chunks of 8 KiB are half as many
MAX_TEXT_BYTES = 2**20  # of one compressed text or colour profile, unpacked; Pillow's own limit
MAX_TEXTS_BYTES = 2**23  # of all of them together
MAX_JPEG_SEGMENTS = 1000  # before the first scan
MAX_JPEG_SCANS = 100  # cameras and encoders write 1 to 15; each costs a pass over the whole image
SEARCHED_BYTES = 2**15  # from here on reading the head is quicker than searching all: 4 us, not 75 of a JPEG of 90 kB
_PNG = b"\x89PNG\r\n\x1a\n"
_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive: what Pillow decodes
_SEQUENTIAL = (0xC0, 0xC1)
_TABLES = (0xC4, 0xDB, 0xDD, 0xFE)  # Huffman, quantization, restart interval, comment
_OTHER_FRAMES = (0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)
_COMPRESSED_CHUNKS = (b"zTXt", b"iTXt", b"iCCP")
_STARTS: tuple[tuple[bytes, str], ...] = (
    (_PNG, "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"%!PS", "PostScript"),
    (b"\xc5\xd0\xd3\xc6", "PostScript"),
    (b"%PDF", "PDF"),
    (b"PK\x03\x04", "zip"),
    (b"\x1f\x8b", "gzip"),
    (b"8BPS", "Photoshop"),
    (b"\0\0\1\0", "ICO"),
)


class DecodeError(ValueError):
    """Bytes that are not what their extension says, or beyond a limit."""


def image_header_size(content: bytes, extension: str) -> tuple[int, int]:
    """Width and height in pixels of an encoded image, as its header says.

    Raises: DecodeError if it is of another format than its extension, animated, cut, larger than MAX_IMAGE_PIXELS, or made to cost time
    or memory: too many chunks or scans, texts that unpack to more than MAX_TEXT_BYTES.
    """
    wanted, found = IMAGE_FORMATS[extension], image_kind(content)
    if found != wanted:
        raise DecodeError(f"the .{extension} is {found or 'no image'}, wanted {wanted}")
    try:
        width, height = {"PNG": _png_size, "JPEG": _jpeg_size, "WEBP": _webp_size}[wanted](content)
    except (struct.error, IndexError):
        raise DecodeError(f"the {wanted} is cut after {len(content)} bytes") from None
    if not (width > 0 and height > 0 and width * height <= MAX_IMAGE_PIXELS):
        raise DecodeError(f"the {wanted} is {width} x {height} pixels, at most {MAX_IMAGE_PIXELS} pixels are allowed")
    return width, height


def image_kind(content: bytes) -> str | None:
    """The format that a file begins like, by its first bytes; None if it is none that we know by name."""
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "WEBP"
    found = next((name for start, name in _STARTS if content.startswith(start)), None)
    if found is None and b"<svg" in content[:512].lower():
        return "SVG"
    return found


def _png_size(content: bytes) -> tuple[int, int]:
    """Also walks all chunks to the end."""
    at, texts, animated = len(_PNG), 0, False
    width = height = 0
    for number in range(MAX_PNG_CHUNKS):
        length, kind = struct.unpack_from(">I4s", content, at)
        end = at + 12 + length
        if length > 2**31 - 1 or end > len(content):
            raise DecodeError(f"the PNG is cut in chunk {kind!r} after {len(content)} bytes")
        if (number == 0) != (kind == b"IHDR") or (number == 0 and length != 13):
            raise DecodeError("the PNG does not begin with one IHDR chunk")
        if number == 0:
            width, height = struct.unpack_from(">II", content, at + 8)
            if zlib.crc32(content[at + 4 : at + 21]) != struct.unpack_from(">I", content, at + 21)[0]:
                raise DecodeError("the checksum of the PNG's header is wrong")
        elif kind in _COMPRESSED_CHUNKS:
            texts += _unpacked_bytes(content[at + 8 : at + 8 + length], kind)
            if texts > MAX_TEXTS_BYTES:
                raise DecodeError(f"the PNG's texts unpack to more than {MAX_TEXTS_BYTES} bytes")
        elif kind == b"acTL":
            animated = True
        elif kind == b"IEND":
            if end != len(content):
                raise DecodeError(f"{len(content) - end} bytes follow the end of the PNG")
            if animated:
                raise DecodeError("the PNG is animated")
            return width, height
        at = end
    raise DecodeError(f"the PNG has more than {MAX_PNG_CHUNKS} chunks")


def _unpacked_bytes(content: bytes, kind: bytes) -> int:
    """How much a compressed chunk unpacks to, found without keeping more than the limit. Raises: DecodeError beyond it."""
    if kind == b"iTXt":
        _, _, rest = content.partition(b"\0")
        if rest[:1] != b"\1":
            return len(rest)
        content = rest[2:].partition(b"\0")[2].partition(b"\0")[2]
    else:
        content = content.partition(b"\0")[2][1:]
    unpacker = zlib.decompressobj()
    try:
        size = len(unpacker.decompress(content, MAX_TEXT_BYTES + 1))
    except zlib.error as error:
        raise DecodeError(f"the PNG's chunk {kind.decode()} can't be unpacked: {error}") from None
    if size > MAX_TEXT_BYTES:
        raise DecodeError(f"the PNG's chunk {kind.decode()} unpacks to more than {MAX_TEXT_BYTES} bytes")
    return size


def _jpeg_size(content: bytes) -> tuple[int, int]:
    """Also counts scans and looks for the end."""
    check_scans(content)
    at, size = 2, None
    for _ in range(MAX_JPEG_SEGMENTS):
        while content[at] == 0xFF and content[at + 1] == 0xFF:
            at += 1
        if content[at] != 0xFF:
            raise DecodeError(f"the JPEG has no marker at byte {at}")
        marker = content[at + 1]
        (length,) = struct.unpack_from(">H", content, at + 2)
        if marker in _OTHER_FRAMES:
            raise DecodeError(f"the JPEG is coded in a way (SOF{marker - 0xC0}) that is not decoded here")
        if marker in _FRAMES:
            if size is not None:
                raise DecodeError("the JPEG has two frames")
            _, height, width, components = struct.unpack_from(">BHHB", content, at + 4)
            if components not in (1, 3, 4):
                raise DecodeError(f"the JPEG has {components} components, wanted 1, 3 or 4")
            size = width, height
        elif marker == 0xDA:
            if size is None:
                raise DecodeError("the JPEG's first scan comes before its size")
            if content.rfind(b"\xff\xd9") < at:
                raise DecodeError(f"the JPEG is cut after {len(content)} bytes: it has no end")
            return size
        at += 2 + length
    raise DecodeError(f"the JPEG has more than {MAX_JPEG_SEGMENTS} segments before its first scan")


def check_scans(content: bytes) -> None:
    """Raises DecodeError if a JPEG may have more than MAX_JPEG_SCANS scans: in coded data 0xFF never stands before their marker."""
    if len(content) >= SEARCHED_BYTES and _is_one_scan(content):
        return
    scans = content.count(b"\xff\xda")
    if scans > MAX_JPEG_SCANS:
        raise DecodeError(f"the JPEG has {scans} scans, at most {MAX_JPEG_SCANS} are decoded")


def _is_one_scan(content: bytes) -> bool:
    """Whether a JPEG's head says that its first scan is all of it, which libjpeg then holds it to: a second one is an error there."""
    at, components = 2, None
    for _ in range(MAX_JPEG_SEGMENTS):
        head = content[at : at + 10]
        if len(head) < 10 or head[0] != 0xFF:
            return False
        if head[1] in _SEQUENTIAL and components is None:
            components = head[9]
        elif head[1] == 0xDA:
            return head[4] == components
        elif not (0xE0 <= head[1] <= 0xEF or head[1] in _TABLES):
            return False  # anything out of the ordinary: another frame, a marker without a length
        at += 2 + (head[2] << 8 | head[3])
    return False


def _webp_size(content: bytes) -> tuple[int, int]:
    """By the first chunk."""
    (riff_bytes,) = struct.unpack_from("<I", content, 4)
    kind = content[12:16]
    if riff_bytes + 8 > len(content):
        raise DecodeError(f"the WEBP is cut after {len(content)} bytes, wanted {riff_bytes + 8}")
    if len(content) > riff_bytes + 9:
        raise DecodeError(f"{len(content) - riff_bytes - 8} bytes follow the end of the WEBP")
    if kind == b"VP8 ":
        if content[23:26] != b"\x9d\x01\x2a":
            raise DecodeError("the WEBP has no key frame")
        width, height = struct.unpack_from("<HH", content, 26)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L":
        if content[20] != 0x2F:
            raise DecodeError("the WEBP has no lossless signature")
        (bits,) = struct.unpack_from("<I", content, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8X":
        if content[20] & 2:
            raise DecodeError("the WEBP is animated")
        width, height = (int.from_bytes(content[at : at + 3], "little") + 1 for at in (24, 27))
        if len(content) < 30:
            raise IndexError
        return width, height
    raise DecodeError(f"the WEBP begins with chunk {kind!r}, wanted VP8, VP8L or VP8X")
