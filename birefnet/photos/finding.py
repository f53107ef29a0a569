"""Finding the photos that the user named: files, folders, glob patterns, URLs and standard input."""

import glob
import os
import posixpath
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit


STANDARD_STREAM = "-"


# Folders are searched for these suffixes. A file that the user names explicitly may have any suffix.
PHOTO_SUFFIXES = (
    *(".avif", ".bmp", ".dib", ".gif", ".heic", ".heif", ".hif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
)


@dataclass(frozen=True)
class PhotoSource:
    """
    A photo to read: a file (`path`), a download (`url`), or standard input (neither).

    `relative` is the path of its result below the output folder, before the suffix is replaced. `content` holds the
    encoded photo where it was read already.
    """

    path: Path | None
    relative: Path
    url: str | None = None
    content: bytes | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """The photo in messages."""
        return self.url or (STANDARD_STREAM if self.path is None else str(self.path))


def find_photos(
    arguments: list[str], excluded_folder: Path | None = None
) -> tuple[list[PhotoSource], list[tuple[str, str]]]:
    """
    Expands files, folders (searched recursively), glob patterns, URLs and `-` into photos.

    Args:
        arguments: the user's arguments.
        excluded_folder: a folder that is not searched, since it holds the results.

    Returns:
        The photos, each once and in the given order, and each argument without a photo with the reason.
    """
    photos: dict[str, PhotoSource] = {}
    problems = []
    for argument in arguments:
        found = list(_expand(argument, excluded_folder))
        if not found:
            problems.append((argument, _reason_for_nothing(argument)))
        for photo in found:
            photos.setdefault(photo.name if photo.path is None else os.path.abspath(photo.path), photo)
    return list(photos.values()), problems


def _expand(argument: str, excluded_folder: Path | None):
    path = Path(argument)
    if argument == STANDARD_STREAM:
        yield PhotoSource(None, Path("stdin"))
    elif is_url(argument):
        yield PhotoSource(None, _name_in_url(argument), url=argument)
    elif path.is_dir():
        yield from _walk(path, path, excluded_folder)
    elif path.exists() or not glob.has_magic(argument):  # a missing file is reported when it is read
        yield PhotoSource(path, Path(path.name))
    else:
        base = _folder_before_wildcards(path)
        for match in sorted(glob.glob(argument, recursive=True)):
            if os.path.isfile(match) and _is_photo(match):
                yield PhotoSource(Path(match), Path(match).relative_to(base))


def is_url(argument: str) -> bool:
    """Whether an argument names a photo on the web. A scheme other than http and https is refused when it is read."""
    return "://" in argument and not os.path.exists(argument)


def _name_in_url(url: str) -> Path:
    """The file name in a URL; `download` where it has none."""
    name = posixpath.basename(unquote(urlsplit(url).path)).replace("\\", "_").replace("\0", "_")
    return Path(name if name not in ("", ".", "..") else "download")


def _walk(folder: Path, base: Path, excluded_folder: Path | None):
    excluded = None if excluded_folder is None else os.path.realpath(excluded_folder)
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and os.path.realpath(os.path.join(parent, name)) != excluded
        )
        for name in sorted(files):
            if _is_photo(name):
                path = Path(parent, name)
                yield PhotoSource(path, path.relative_to(base))


def _is_photo(name: str) -> bool:
    # Hidden files are skipped: they are thumbnails, or macOS's "._photo.jpg" without a photo.
    return os.path.splitext(name)[1].lower() in PHOTO_SUFFIXES and not os.path.basename(name).startswith(".")


def _folder_before_wildcards(pattern: Path) -> Path:
    parts = []
    for part in pattern.parts[:-1]:
        if glob.has_magic(part):
            break
        parts.append(part)
    return Path(*parts)


def _reason_for_nothing(argument: str) -> str:
    if os.path.isdir(argument):
        return f"no photo in this folder (searched for {' '.join(PHOTO_SUFFIXES)})"
    return "no photo matches this pattern"
