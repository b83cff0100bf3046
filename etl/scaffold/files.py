"""How a project's own files are written: whole, and never over one that is there."""

from pathlib import Path

from etl.storage import LocalRoot


class Refused(ValueError):
    """What was asked cannot be written; the message says why, in a sentence."""


def create(project: Path, path: str, text: str) -> None:
    """A new file, with a path below the project. Raises Refused when there is one already."""
    if not LocalRoot(str(project)).create(path, text.encode()):
        raise Refused(f"{path} is there already: nothing was written")


def replace(project: Path, path: str, text: str) -> None:
    """A file's new text, in one step."""
    LocalRoot(str(project)).write(path, text.encode())


def read(project: Path, path: str) -> str:
    """A file's text. Raises Refused when it cannot be read."""
    try:
        return (project / path).read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise Refused(f"{path} cannot be read: {why}") from None
