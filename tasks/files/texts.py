"""Text that people wrote in a file, whatever encoding their editor used."""

from pathlib import Path

MOST_FOREIGN = 0.3  # share of characters beyond ASCII that a text in cp1252 may have; more is another alphabet, misread


def read_text_file(path: Path) -> tuple[str, str | None]:
    """Return a file's text and, if it is not UTF-8, the encoding it was read as: UTF-16 or cp1252.

    Raises ValueError, with one sentence, for what is none of them.
    """
    content = path.read_bytes()
    encodings = ["utf-8-sig"]
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        encodings = ["utf-16"]
    elif 0 in content:  # UTF-16 without its mark: of Latin text every other byte is 0
        encodings = ["utf-16-le" if content[1:2] == b"\0" else "utf-16-be"]
    else:
        encodings.append("cp1252")
    for encoding in encodings:
        try:
            text = content.decode(encoding)
        except UnicodeDecodeError:
            continue
        foreign = sum(character > "\x7f" for character in text) / max(1, len(text))
        if all(character.isprintable() or character in "\t\r\n" for character in text.lstrip("\ufeff")) and (
            encoding.startswith("utf-8") or foreign <= MOST_FOREIGN or encoding == "utf-16"
        ):
            return text.lstrip("\ufeff"), None if encoding == "utf-8-sig" else encoding
    raise ValueError(f"{path.name} is no text in UTF-8, UTF-16 or cp1252; save it as UTF-8")
