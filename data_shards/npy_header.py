"""What a .npy file holds, from its header alone: plain numbers or nothing; no text of it is ever evaluated."""

import re

from data_shards.image_header import DecodeError

MAX_HEADER_BYTES = 1024
# As numpy writes it, in every version of the format; `O` (objects, by pickle) and structured types have no place here
_HEADER = re.compile(
    r"\{'descr': '([<|](?:b1|[iu][1248]|f[248]|V2))', 'fortran_order': (False|True), 'shape': \(((?:\d{1,9}, ?)*\d{0,9})\), \} *\n"
)


def npy_type_and_shape(content: bytes) -> tuple[str, tuple[int, ...]]:
    """Type (as `<f2`; bfloat16 comes as `<V2`) and shape of a .npy file whose data is as long as they say.

    Raises: DecodeError if it is no .npy of plain little-endian numbers in C order, or longer or shorter than its header says.
    """
    if content[:6] != b"\x93NUMPY" or content[6:7] not in (b"\1", b"\2", b"\3"):
        raise DecodeError("the .npy does not begin as numpy writes it")
    width = 2 if content[6] == 1 else 4
    length = int.from_bytes(content[8 : 8 + width], "little")
    start = 8 + width + length
    if length > MAX_HEADER_BYTES or start > len(content):
        raise DecodeError(f"the .npy has a header of {length} bytes, at most {MAX_HEADER_BYTES} are read")
    text = content[8 + width : start].decode("ascii", "backslashreplace")
    found = _HEADER.fullmatch(text)
    if found is None:
        raise DecodeError(f"the .npy holds no plain numbers: its header is {text.strip()!r:.120}")
    if found[2] == "True":
        raise DecodeError("the .npy is in Fortran's order, wanted C's")
    shape = tuple(int(side) for side in found[3].split(",") if side.strip())
    wanted = int(found[1][-1])
    for side in shape:
        wanted *= side
    if wanted != len(content) - start:
        raise DecodeError(f"the .npy has {len(content) - start} bytes of data, {found[1]} of shape {shape} wants {wanted}")
    return found[1], shape
