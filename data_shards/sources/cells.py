"""What the cells of a table hold: images as Parquet files and `datasets` store them, and captions."""


def image_cell(value: object) -> tuple[bytes | None, str | None]:
    """Bytes and path of an image as a cell holds them."""
    match value:
        case bytes():
            return value, None
        case str():
            return None, value
        case {"bytes": bytes() as content, **rest}:
            return content, str(rest["path"]) if rest.get("path") else None
        case {"path": str() as path}:
            return None, path
        case _:
            return None, None


def caption_cell(value: object) -> str | None:
    """The text of a cell, of a list its first; None where there is none."""
    if isinstance(value, list):
        value = next((one for one in value if one), None)
    return value.strip() or None if isinstance(value, str) else None
