"""Downloads official checkpoints and verifies that a file is the published one before anything reads it."""

import errno
import hashlib
import shutil
from contextlib import contextmanager
from pathlib import Path

from birefnet.errors import CommandError


_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DownloadError(CommandError):
    """A variant's file is unavailable or is not the published one. The message says what to do."""


def fetch_checkpoint(variant, folder=None, cache_dir=None, token=None):
    """
    Downloads a variant's published file if needed, verifies it, and returns its path.

    Size and SHA-256 are compared with the table on every call. If the table has no hash, the hash under which the Hub
    stores the file is used. A file that fails the check is removed from the cache, so that the next call downloads it
    again. Files in `folder` are never removed.

    Args:
        variant (`Variant`): A row of the table in `birefnet.hub.variants`.
        folder (`str` or `Path`, *optional*): A folder with the file, directly or in a sub-folder with the repository's
            name (`BiRefNet-portrait/model.safetensors`). With a folder, nothing is downloaded.
        cache_dir, token (*optional*): As in `huggingface_hub.hf_hub_download`.

    Raises:
        DownloadError: The file is missing, cannot be downloaded, or is not the published one.
    """
    if folder is not None:
        path = _find_in_folder(variant, Path(folder))
        check_file(path, variant)
        return path
    path = _download(variant, cache_dir, token)
    try:
        check_file(path, variant)
    except DownloadError:
        _remove_from_cache(path)
        raise
    return path


def check_file(path, variant):
    """Raises a `DownloadError` if the file's size or SHA-256 is not the published one."""
    size = path.stat().st_size
    if variant.bytes is not None and size != variant.bytes:
        what = "incomplete" if size < variant.bytes else "another file"
        raise DownloadError(f"{path} is {what}: it has {size:,} bytes, {variant.name} has {variant.bytes:,}.")
    # The Hub stores a large file under its SHA-256 and the cache keeps that name. Use it if the table has no hash.
    stored_as = path.resolve().name
    expected = variant.sha256 or (stored_as if len(stored_as) == 64 else None)
    if expected is not None and (found := _sha256(path)) != expected:
        raise DownloadError(f"{path} is not the published {variant.name}: its SHA-256 is {found}, not {expected}.")


def _sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _find_in_folder(variant, folder):
    places = [folder / variant.weights_file, folder / variant.repository.split("/")[1] / variant.weights_file]
    for place in places:
        if place.is_file():
            return place
    raise DownloadError(f"{variant.name} is not in the folder {folder}: neither {places[0]} nor {places[1]} exists.")


def _remove_from_cache(path):
    """Removes a cached file: the entry of the snapshot and what it points to."""
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _download(variant, cache_dir, token):
    """Downloads a variant's file into the Hub's cache if it is not there yet, and returns its path."""
    what = f"{variant.name} ({variant.repository})"
    with _explained(variant.repository, what):
        revision = _complete_revision(variant, cache_dir, token)
        _check_space(variant, revision, cache_dir)
    return download_file(variant.repository, variant.weights_file, what, revision, cache_dir, token)


def download_file(repository, file, what, revision=None, cache_dir=None, token=None):
    """
    Downloads one file into the Hub's cache if it is not there yet, and returns its path.

    Raises:
        DownloadError: The file is unavailable. The message calls it `what`.
    """
    from huggingface_hub import hf_hub_download

    with _explained(repository, what):
        return Path(hf_hub_download(repository, file, revision=revision, cache_dir=cache_dir, token=token))


@contextmanager
def _explained(repository, what):
    """Converts exceptions of the Hub's client into a `DownloadError` that says what to do."""
    from huggingface_hub import constants, is_offline_mode
    from huggingface_hub import errors as hub

    try:
        yield
    except hub.GatedRepoError as error:
        page = f"{constants.ENDPOINT}/{repository}"
        raise DownloadError(f"{what} is gated: accept its terms on {page}, then run 'hf auth login'.") from error
    except hub.RepositoryNotFoundError as error:
        raise DownloadError(f"{what} was not found, or needs a login: run 'hf auth login'.") from error
    except hub.RevisionNotFoundError as error:
        raise DownloadError(f"{what}: the revision in the table no longer exists on the Hub.") from error
    except hub.RemoteEntryNotFoundError as error:
        raise DownloadError(f"{what}: the repository has no such weights file: {error}") from error
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled) as error:
        cause = str(error.__cause__ or error).splitlines()[0]
        reason = "HF_HUB_OFFLINE is set" if is_offline_mode() else f"the download failed ({cause})"
        raise DownloadError(f"{what} is not in the cache, and {reason}.") from error
    except hub.HfHubHTTPError as error:
        if error.response.status_code == 401:
            raise DownloadError(f"{what}: the Hub rejected your token; run 'hf auth login'.") from error
        raise DownloadError(f"{what} could not be downloaded: {error}") from error
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise DownloadError(f"{what} does not fit on the disk of the cache: {error}") from error
        raise DownloadError(f"{what} could not be downloaded: {error}") from error
    except hub.HTTPError as error:  # the connection broke, and so did every attempt to resume
        raise DownloadError(f"{what} could not be downloaded completely: {error}. Try again.") from error


def _complete_revision(variant, cache_dir, token):
    """Returns the variant's revision with 40 digits, as the Hub's cache needs it, or `None` if it is unknown."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.file_download import repo_folder_name

    short = variant.revision
    if short is None or len(short) == 40:
        return short
    repository = repo_folder_name(repo_id=variant.repository, repo_type="model")
    cached = Path(cache_dir or constants.HF_HUB_CACHE, repository, "snapshots").glob(
        f"{short}*/{variant.weights_file}"
    )
    for path in cached:
        return path.parent.name
    for commit in HfApi().list_repo_commits(variant.repository, token=token):
        if commit.commit_id.startswith(short):
            return commit.commit_id
    raise DownloadError(f"{variant.name} ({variant.repository}) no longer has the revision {short}.")


def _check_space(variant, revision, cache_dir):
    """Raises a `DownloadError` before the download if the cache's disk has too little space for the file."""
    from huggingface_hub import constants, try_to_load_from_cache

    cache = Path(cache_dir or constants.HF_HUB_CACHE)
    cached = try_to_load_from_cache(variant.repository, variant.weights_file, cache_dir=cache, revision=revision)
    if variant.bytes is None or isinstance(cached, str):
        return
    existing = next(place for place in (cache, *cache.absolute().parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if free < variant.bytes:
        sizes = f"it needs {variant.bytes / 1e6:.0f} MB, {free / 1e6:.0f} MB are free"
        raise DownloadError(f"{variant.name} does not fit on the disk of the cache {cache}: {sizes}.")
