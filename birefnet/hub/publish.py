"""
`birefnet publish`: builds and verifies a variant's complete repository and uploads it to the Hub in one commit.

Publishing is safe to repeat: unchanged files are not uploaded again, and the next run completes an interrupted upload.
A version that is already published with other contents is refused, because people rely on its tag.
"""

import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from birefnet import __version__
from birefnet.errors import CommandError, UsageError
from birefnet.hub.folders import write_folder, written_whole
from birefnet.hub.load import load_variant
from birefnet.hub.variants import VARIANTS, get_variant
from birefnet.photos.drawing import draw_picture


TAG = f"v{__version__}"

# Largest allowed difference of mattes in [0, 1]. A fresh process may sum in another order of threads.
TOLERANCE = 1e-3


def build_repository(variant, repository, folder, checkpoints=None, token=None, with_onnx=False):
    """
    Writes a variant's complete repository into a new folder. The weights keep the dtype of the published file.

    Args:
        variant (`Variant`): A row of the table.
        repository (`str`): Name on the Hub, for the card's examples.
        folder (`Path`): A new or an empty folder. If an error occurs, nothing is written.
        checkpoints (`Path`, *optional*): Folder with official files, see [`load_variant`].
        token (`str`, *optional*): Hub token for gated repositories.
        with_onnx (`bool`, *optional*): Whether to add the files of [`add_onnx`].

    Returns:
        `tuple`: The model and the processor.

    Raises:
        DownloadError: The official file is unavailable or is not the published one.
    """
    from birefnet.hub.variant_card import variant_card

    model, processor = load_variant(variant.name, dtype="auto", folder=checkpoints, token=token)
    with written_whole(folder) as partial:
        write_folder(partial, model, processor, variant_card(variant, repository, with_onnx))
        if with_onnx:
            add_onnx(partial, model, processor)
    return model, processor


def add_onnx(folder, model, processor):
    """
    Adds ONNX files for transformers.js and ONNX Runtime to a repository that [`build_repository`] wrote: float32,
    float16 and int8, of the size in its `preprocessor_config.json`. That file then serves transformers.js too.

    Returns:
        `list[ExportedFile]`

    Raises:
        CommandError: A package is missing, or a file disagrees with PyTorch.
    """
    from birefnet.export.folders import file_paths, write_programs

    targets = file_paths("onnx", folder, ("float32", "float16", "int8"))
    return write_programs(model.float(), processor, folder, targets, "onnx", None, False)


def verify_repository(folder, model, processor):
    """
    Loads the folder in a fresh process, as users do, and compares its matte with the given model's.

    Returns:
        `float`: The largest difference of the two mattes.

    Raises:
        CommandError: The folder does not load, the mattes differ by more than `TOLERANCE`, or the processors resize
            the picture to different sizes.
    """
    picture = draw_picture()
    return compare_results(folder, run_in_fresh_process(folder, picture), model, processor, picture)


def run_in_fresh_process(folder, picture):
    """Runs `birefnet.hub.verification` on the folder and the picture and returns its `matte` and `shape`."""
    from birefnet.hub import verification

    with tempfile.TemporaryDirectory() as scratch:
        photo, result = Path(scratch, "picture.png"), Path(scratch, "result.npz")
        picture.save(photo)
        program = Path(verification.__file__).read_text(encoding="utf-8")
        command = [sys.executable, "-c", program, str(Path(folder).absolute()), str(photo), str(result)]
        # A fresh cache for remote code, so that code of an earlier folder is not used.
        environment = {**os.environ, "HF_MODULES_CACHE": str(Path(scratch, "modules")), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, env=environment, cwd=scratch, capture_output=True, text=True)
        if done.returncode:
            raise CommandError(f"the built folder {folder} does not load in a fresh process:\n{done.stderr.strip()}")
        with np.load(result) as arrays:
            return dict(arrays)


def compare_results(folder, result, model, processor, picture):
    """Returns the largest difference of the mattes. Raises a `CommandError` as [`verify_repository`] does."""
    from birefnet.hub import verification

    shape = verification.input_shape(processor, picture)
    if tuple(result["shape"]) != shape:
        found = tuple(int(side) for side in result["shape"])
        raise CommandError(f"the built folder {folder} resizes a picture to {found} instead of {shape}.")
    difference = float(np.abs(result["matte"] - verification.compute_matte(model.float(), processor, picture)).max())
    if not difference <= TOLERANCE:  # also true of NaN
        raise CommandError(f"the matte of the built folder {folder} differs by {difference:.2g} in a fresh process")
    return difference


def upload_repository(folder, repository, private=False, token=None, repo_type="model"):
    """
    Uploads a complete folder in one commit and tags it with the version. Safe to repeat.

    Args:
        folder (`Path`): The folder that [`build_repository`] wrote.
        repository (`str`): `owner/name`, or `name` for the user's own namespace. Created if it does not exist.
        private (`bool`, *optional*, defaults to `False`): Whether a new repository is private.
        token (`str`, *optional*): Hub token. Default: that of `hf auth login` or `HF_TOKEN`.
        repo_type (`str`, *optional*, defaults to `"model"`): `"space"` for a Space, whose SDK is Gradio.

    Returns:
        `tuple[str, bool]`: The tagged commit, and whether anything changed.

    Raises:
        CommandError: The Hub refuses the upload, or this version is published with other contents.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with _explained(repository):
        sdk = "gradio" if repo_type == "space" else None
        created = api.create_repo(repository, private=private, exist_ok=True, repo_type=repo_type, space_sdk=sdk)
        repository = created.repo_id
        tags = {tag.name: tag.target_commit for tag in api.list_repo_refs(repository, repo_type=repo_type).tags}
        head = api.repo_info(repository, repo_type=repo_type).sha
        changed = changed_files(api, folder, repository, tags.get(TAG, "main"), repo_type)
        if TAG in tags:
            if changed:
                names = ", ".join(changed)
                raise CommandError(
                    f"{repository} already has {TAG} with other contents ({names}). Increase the version to publish."
                )
            return tags[TAG], False
        if changed:
            # Deletes code files that an earlier version had and this one has not.
            # With `parent_commit`, the Hub refuses a retry of an upload that already succeeded.
            commit = api.upload_folder(
                repo_id=repository,
                repo_type=repo_type,
                folder_path=folder,
                commit_message=f"{Path(repository).name} {TAG}",
                parent_commit=head,
                delete_patterns=["birefnet/*"] if repo_type == "space" else ["*_birefnet.py"],
            )
            head = commit.oid
        message = f"birefnet {TAG}"
        api.create_tag(repository, tag=TAG, revision=head, tag_message=message, exist_ok=True, repo_type=repo_type)
    return head, True


def changed_files(api, folder, repository, revision, repo_type="model"):
    """Returns the names of files that are missing at a revision of the repository or differ from it."""
    from huggingface_hub.utils import sha

    entries = api.list_repo_tree(repository, revision=revision, recursive=True, repo_type=repo_type)
    remote = {entry.path: entry for entry in entries}
    changed = []
    for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        entry = remote.get(name)
        if entry is None or entry.size != path.stat().st_size:
            changed.append(name)
        elif entry.lfs is not None:
            with open(path, "rb") as file:
                if sha.sha_fileobj(file).hex() != entry.lfs.sha256:
                    changed.append(name)
        elif sha.git_hash(path.read_bytes()) != entry.blob_id:
            changed.append(name)
    return changed


@contextmanager
def _explained(repository):
    """Converts exceptions of the Hub's client into a `CommandError` that says what to do."""
    from huggingface_hub import errors as hub

    try:
        yield
    except hub.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            reason = "the Hub refuses it: run 'hf auth login' with a token that may write to the repository"
        elif status in (409, 412):
            reason = "somebody else changed the repository at the same time; publish again"
        elif status >= 500:
            reason = "the Hub has a problem; publish again later, nothing is uploaded twice"
        else:
            reason = "the Hub refuses it"
        raise CommandError(f"{repository} was not published: {reason} ({error})") from error
    except (hub.HTTPError, hub.OfflineModeIsEnabled, OSError, RuntimeError) as error:
        # The client raises a RuntimeError for a file that could not be uploaded. The reason is its cause.
        reason = f"{error} {error.__cause__ or ''}".strip()
        raise CommandError(
            f"{repository} was not published: {reason}. Publish again; nothing is uploaded twice."
        ) from error


def check_license(variant, private):
    """Raises a `UsageError` if the variant's licence is not known to allow a public copy."""
    if private or variant.official or variant.license_id == "mit":
        return
    terms = variant.license or "unknown"
    raise UsageError(f"{variant.name}: its licence ({terms}) may not allow a public copy; use --private")


def add_arguments(parser):
    """Adds the arguments of `birefnet publish` to an `argparse` parser."""
    parser.description = (
        "Build a variant's complete repository (weights, configuration, processor, code, licence, card), verify it\n"
        "in a fresh process, upload it in one commit and tag it. Safe to repeat."
    )
    parser.epilog = (
        "examples:\n"
        "  birefnet publish portrait --repo me/BiRefNet-portrait --dry-run\n"
        "  birefnet publish portrait --repo me/BiRefNet-portrait --private\n"
        "  birefnet publish lite --repo me/BiRefNet-lite --onnx\n"
        "  birefnet publish --all --repo me    # the 16 official ones: me/BiRefNet-general, me/BiRefNet-lite, ...\n"
        "  birefnet publish --space --repo me/cutouts    # a Space with the page of `birefnet serve`\n"
        "  birefnet publish general,portrait --space --repo me/cutouts\n"
    )
    parser.add_argument("variant", nargs="?", help="name of the variant, see `birefnet variants`")
    parser.add_argument("--all", action="store_true", help="publish the 16 official variants")
    parser.add_argument(
        "--space",
        action="store_true",
        help="a Space that serves the variants (separated by commas), or the embedded weights",
    )
    parser.add_argument("--repo", required=True, metavar="NAME", help="OWNER/NAME; with --all only OWNER")
    parser.add_argument("--private", action="store_true", help="make new repositories private")
    parser.add_argument(
        "--onnx", action="store_true", help="add ONNX files for transformers.js: float32, float16, int8"
    )
    parser.add_argument("--dry-run", action="store_true", help="build and verify only")
    parser.add_argument("--checkpoints", metavar="FOLDER", help="take official files from this folder")
    parser.add_argument("--folder", metavar="OUT", help="keep the built repository in OUT/NAME")
    parser.add_argument("--json", action="store_true", help="print one JSON object for each repository")


def run(arguments):
    """Runs `birefnet publish` and returns the exit code: 1 if a variant failed."""
    if arguments.space:
        report = _publish_space(arguments)
        print(json.dumps(report) if arguments.json else _describe(report), flush=True)
        return 0
    failed = False
    for variant, repository in _plan(arguments):
        try:
            report = _publish(variant, repository, arguments)
        except CommandError as error:
            if not arguments.all:
                raise
            failed, report = True, {"variant": variant.name, "repository": repository, "error": str(error)}
        print(json.dumps(report) if arguments.json else _describe(report), flush=True)
    return 1 if failed else 0


def _plan(arguments):
    """Returns the variants to publish, each with the name of its repository."""
    if arguments.all == (arguments.variant is not None):
        raise UsageError("name one variant or use --all")
    if arguments.all:
        if "/" in arguments.repo:
            raise UsageError(f"with --all, --repo is the owner only, not {arguments.repo}")
        official = [variant for variant in VARIANTS.values() if variant.official]
        return [(variant, f"{arguments.repo}/BiRefNet-{variant.name}") for variant in official]
    try:
        variant = get_variant(arguments.variant)
    except ValueError as error:
        raise UsageError(str(error)) from error
    check_license(variant, arguments.private)
    return [(variant, arguments.repo)]


def _publish(variant, repository, arguments):
    """Builds, verifies and uploads one variant. Returns its report."""
    with ExitStack() as stack:
        parent = arguments.folder or stack.enter_context(tempfile.TemporaryDirectory())
        folder = Path(parent, repository.split("/")[-1])
        try:
            options = {"checkpoints": arguments.checkpoints, "with_onnx": arguments.onnx}
            model, processor = build_repository(variant, repository, folder, **options)
        except ValueError as error:
            raise CommandError(f"{variant.name}: {error}") from error
        difference = verify_repository(folder, model, processor)
        report = {"variant": variant.name, "repository": repository, "files": _sizes(folder)}
        report["matte_difference"] = difference
        if not arguments.dry_run:
            report["commit"], report["changed"] = upload_repository(folder, repository, private=arguments.private)
            report["tag"] = TAG
    return report


def _publish_space(arguments):
    """Builds, starts and uploads a Space; returns what there is to report."""
    from birefnet.hub.space import build_space, verify_space

    if arguments.all:
        raise UsageError("--space and --all contradict each other: name the variants, separated by commas")
    if arguments.onnx:
        raise UsageError("--onnx is for repositories of weights; a Space has none")
    try:
        variants = ",".join(get_variant(name).name for name in (arguments.variant or "").split(",") if name)
    except ValueError as error:
        raise UsageError(str(error)) from error
    with ExitStack() as stack:
        parent = arguments.folder or stack.enter_context(tempfile.TemporaryDirectory())
        folder = Path(parent, arguments.repo.split("/")[-1])
        build_space(folder, arguments.repo, variants)
        if not variants:  # with variants it would download their weights to start
            verify_space(folder, draw_picture())
        report = {"repository": arguments.repo, "verified": not variants, "files": _sizes(folder)}
        if not arguments.dry_run:
            uploaded = upload_repository(folder, arguments.repo, private=arguments.private, repo_type="space")
            report["commit"], report["changed"] = uploaded
            report["tag"] = TAG
    return report


def _sizes(folder):
    """Returns the size of each file in bytes, by its path in the folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _describe(report):
    if "error" in report:
        return f"{report['repository']}: failed: {report['error']}"
    verified = ", verified" if report.get("verified", True) else ""
    size = f"{len(report['files'])} files, {sum(report['files'].values()) / 1e6:.1f} MB{verified}"
    if "commit" not in report:
        return f"{report['repository']}: {size}; nothing uploaded (--dry-run)"
    what = "published" if report["changed"] else "already published"
    return f"{report['repository']}: {size}; {what} as {report['tag']} at {report['commit'][:7]}"
