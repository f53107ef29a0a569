"""Which photos the user means: files, folders, glob patterns and standard input. Without torch."""

import glob
import os
from dataclasses import dataclass
from pathlib import Path


STANDARD_STREAM = "-"


# What a folder is searched for. A file that is named explicitly is tried whatever it is called.
PHOTO_SUFFIXES = (
    *(".avif", ".bmp", ".dib", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
)


@dataclass(frozen=True)
class PhotoSource:
    """A photo to read. `relative` is the path below the output folder (suffix not yet replaced)."""

    path: Path | None  # None: standard input
    relative: Path

    @property
    def name(self) -> str:
        return STANDARD_STREAM if self.path is None else str(self.path)


def find_photos(
    arguments: list[str], excluded_folder: Path | None = None
) -> tuple[list[PhotoSource], list[tuple[str, str]]]:
    """
    Expands files, folders (searched recursively), glob patterns and `-` into photos, each once, in the given order.

    Args:
        arguments: what the user named.
        excluded_folder: a folder below the searched ones that holds results, not photos.

    Returns:
        The photos, and each argument that leads to none with the reason.
    """
    photos: dict[str, PhotoSource] = {}
    problems = []
    for argument in arguments:
        found = list(_expand(argument, excluded_folder))
        if not found:
            problems.append((argument, _why_nothing(argument)))
        for photo in found:
            photos.setdefault(STANDARD_STREAM if photo.path is None else os.path.abspath(photo.path), photo)
    return list(photos.values()), problems


def _expand(argument: str, excluded_folder: Path | None):
    path = Path(argument)
    if argument == STANDARD_STREAM:
        yield PhotoSource(None, Path("stdin"))
    elif path.is_dir():
        yield from _walk(path, path, excluded_folder)
    elif path.exists() or not glob.has_magic(argument):  # a missing file is reported when it is read
        yield PhotoSource(path, Path(path.name))
    else:
        base = _folder_before_wildcards(path)
        for match in sorted(glob.glob(argument, recursive=True)):
            if os.path.isfile(match) and _is_photo(match):
                yield PhotoSource(Path(match), Path(match).relative_to(base))


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
    # Hidden files are thumbnails and macOS's "._photo.jpg", which hold no photo.
    return os.path.splitext(name)[1].lower() in PHOTO_SUFFIXES and not os.path.basename(name).startswith(".")


def _folder_before_wildcards(pattern: Path) -> Path:
    parts = []
    for part in pattern.parts[:-1]:
        if glob.has_magic(part):
            break
        parts.append(part)
    return Path(*parts)


def _why_nothing(argument: str) -> str:
    if os.path.isdir(argument):
        return f"no photo in this folder (looked for {' '.join(PHOTO_SUFFIXES)})"
    return "no photo matches this pattern"
