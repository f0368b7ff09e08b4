"""Reads small text files of a user: class names, templates, relevance."""

from pathlib import Path

from mmcontrast.errors import UserError


def lines_of(text: str) -> list[str]:
    """Return the lines of a text, parted as those of a file are: by \\n, \\r\\n or \\r, unlike by `str.splitlines`."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return lines if lines[-1] else lines[:-1]


def read_text(path: str | Path) -> str:
    """Return a file's text, UTF-8 with or without a byte order mark.

    Raises:
        UserError: if it cannot be read, or is not UTF-8, with the line and the byte.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = data[: error.start].count(b"\n") + 1, data[error.start]
        raise UserError(f"{path}, line {line}: byte 0x{byte:02x} is not UTF-8: save the file as UTF-8") from error
