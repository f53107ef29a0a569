"""
`birefnet publish`: a variant's complete repository, built, verified and uploaded to the Hub in one commit.

Publishing again changes nothing: files that are there already are neither uploaded nor committed, and the tag is set
once. An upload that broke off is finished by the next one. A version that is already published with other contents is
refused, since a tag that people rely on must not come to mean something else.
"""

import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from birefnet import __version__
from birefnet.errors import CommandError, UsageError
from birefnet.hub.folders import write_folder, written_whole
from birefnet.hub.load import load_variant
from birefnet.hub.variants import VARIANTS, get_variant


TAG = f"v{__version__}"

# Agreement of mattes in [0, 1]: the fresh process computes the same in the same way, but for the threads' order.
TOLERANCE = 1e-3


def build_repository(variant, repository, folder, checkpoints=None, token=None):
    """
    Writes a variant's complete repository into a new folder, its weights in the dtype of the published file.

    Args:
        variant (`Variant`): A row of the table.
        repository (`str`): Name on the Hub, for the card's examples.
        folder (`Path`): A new or empty folder; it is written whole or not at all.
        checkpoints (`Path`, *optional*): Folder of official files, see [`load_variant`].
        token (`str`, *optional*): For gated repositories.

    Returns:
        `tuple`: the model and the processor that were written.

    Raises:
        DownloadError: if the official file cannot be had or is not the published one.
    """
    from birefnet.hub.variant_card import variant_card

    model, processor = load_variant(variant.name, dtype="auto", folder=checkpoints, token=token)
    with written_whole(folder) as partial:
        write_folder(partial, model, processor, variant_card(variant, repository))
    return model, processor


def draw_picture(width=320, height=256):
    """A picture with a subject: a shaded disc before stripes, the same on every machine."""
    x, y = np.meshgrid(np.linspace(-1, 1, width), np.linspace(-1, 1, height))
    stripes = 90 + 40 * np.sin(12 * (x + 0.5 * y))
    disc = 230 - 60 * (x + y)
    inside = (x / 0.6) ** 2 + (y / 0.7) ** 2 < 1
    channels = [np.where(inside, disc * tint, stripes) for tint in (1.0, 0.8, 0.4)]
    return Image.fromarray(np.stack(channels, axis=-1).clip(0, 255).astype(np.uint8))


def verify_repository(folder, model, processor):
    """
    Loads the folder in a fresh process, as users do, and compares its matte of a picture with this model's.

    Returns:
        `float`: the largest difference of the two mattes.

    Raises:
        CommandError: if the folder does not load there, the mattes differ by more than `TOLERANCE`, or the processors
            bring the picture to different sizes.
    """
    picture = draw_picture()
    return compare_results(folder, run_in_fresh_process(folder, picture), model, processor, picture)


def run_in_fresh_process(folder, picture):
    """What `birefnet.hub.verification` computes of the folder and the picture: a dict of `matte` and `shape`."""
    from birefnet.hub import verification

    with tempfile.TemporaryDirectory() as scratch:
        photo, result = Path(scratch, "picture.png"), Path(scratch, "result.npz")
        picture.save(photo)
        program = Path(verification.__file__).read_text(encoding="utf-8")
        command = [sys.executable, "-c", program, str(Path(folder).absolute()), str(photo), str(result)]
        # A fresh cache for the code of folders, so that nothing of an earlier one is found in it.
        environment = {**os.environ, "HF_MODULES_CACHE": str(Path(scratch, "modules")), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, env=environment, cwd=scratch, capture_output=True, text=True)
        if done.returncode:
            raise CommandError(f"the built folder {folder} does not load in a fresh process:\n{done.stderr.strip()}")
        with np.load(result) as there:
            return dict(there)


def compare_results(folder, there, model, processor, picture):
    """The largest difference of the mattes; raises `CommandError` as [`verify_repository`] says."""
    from birefnet.hub import verification

    shape = verification.input_shape(processor, picture)
    if tuple(there["shape"]) != shape:
        found = tuple(int(side) for side in there["shape"])
        raise CommandError(f"the built folder {folder} brings a picture to {found} instead of {shape}.")
    difference = float(np.abs(there["matte"] - verification.compute_matte(model.float(), processor, picture)).max())
    if not difference <= TOLERANCE:  # also true of NaN
        raise CommandError(f"the built folder {folder} gives another matte in a fresh process: by {difference:.2g}.")
    return difference


def upload_repository(folder, repository, private=False, token=None, repo_type="model"):
    """
    Uploads a complete folder in one commit and tags it with this version; safe to repeat.

    Args:
        folder (`Path`): What [`build_repository`] wrote.
        repository (`str`): `owner/name`, or `name` for the user's own; created if need be.
        private (`bool`, *optional*, defaults to `False`): Whether a new repository is private.
        token (`str`, *optional*): By default that of `hf auth login` or `HF_TOKEN`.
        repo_type (`str`, *optional*, defaults to `"model"`): `"space"` for a Space, whose SDK is Gradio.

    Returns:
        `tuple[str, bool]`: the tagged commit, and whether anything was changed.

    Raises:
        CommandError: if the Hub refuses, or this version is published with other contents.
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
                    f"{repository} has {TAG} already, with other contents ({names}). Raise the version to publish."
                )
            return tags[TAG], False
        if changed:
            # Code files of an earlier version that this one no longer has would be loaded by nobody, but mislead.
            # The parent makes it one commit: a retry of one that went through unnoticed is refused, not doubled.
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
    """Names of the folder's files that the repository lacks at a revision or has with other contents."""
    from huggingface_hub.utils import sha

    entries = api.list_repo_tree(repository, revision=revision, recursive=True, repo_type=repo_type)
    there = {entry.path: entry for entry in entries}
    changed = []
    for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        entry = there.get(name)
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
    """Turns what the Hub's client raises into a `CommandError` that says what to do."""
    from huggingface_hub import errors as hub

    try:
        yield
    except hub.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            reason = "the Hub refuses it: run 'hf auth login' with a token that may write there"
        elif status in (409, 412):
            reason = "somebody else changed the repository meanwhile; publish again"
        elif status >= 500:
            reason = "the Hub has a problem; publish again later, nothing is done twice"
        else:
            reason = "the Hub refuses it"
        raise CommandError(f"{repository} was not published, {reason} ({error})") from error
    except (hub.HTTPError, hub.OfflineModeIsEnabled, OSError, RuntimeError) as error:
        # The client reports a file that could not be uploaded as a RuntimeError, with what happened as its cause.
        reason = f"{error} {error.__cause__ or ''}".strip()
        raise CommandError(
            f"{repository} was not published: {reason}. Publish again, nothing is done twice."
        ) from error


def check_license(variant, private):
    """Raises `UsageError` where the variant's terms are not known to allow a public copy."""
    if private or variant.official or variant.license_id == "mit":
        return
    terms = variant.license or "not established"
    raise UsageError(f"{variant.name}: its licence ({terms}) is not known to allow a public copy; use --private.")


def add_arguments(parser):
    """Adds the arguments of `birefnet publish` to an `argparse` parser."""
    parser.description = (
        "Builds a variant's complete repository (weights, configuration, processor, code, licence, card), loads it\n"
        "in a fresh process and compares a matte, then uploads it in one commit and tags it. Safe to repeat."
    )
    parser.epilog = (
        "examples:\n"
        "  birefnet publish portrait --repo me/BiRefNet-portrait --dry-run\n"
        "  birefnet publish portrait --repo me/BiRefNet-portrait --private\n"
        "  birefnet publish --all --repo me          the sixteen, as me/BiRefNet-general, me/BiRefNet-lite, ...\n"
        "  birefnet publish --space --repo me/cutouts              a Space with the page of `birefnet serve`\n"
        "  birefnet publish general,portrait --space --repo me/cutouts\n"
    )
    parser.add_argument("variant", nargs="?", help="name of the variant, see 'birefnet variants'")
    parser.add_argument("--all", action="store_true", help="publish the sixteen official ones")
    parser.add_argument(
        "--space",
        action="store_true",
        help="a Space that serves the variants (separated by commas), or the embedded weights",
    )
    parser.add_argument("--repo", required=True, metavar="NAME", help="owner/name; with --all the owner")
    parser.add_argument("--private", action="store_true", help="make new repositories private")
    parser.add_argument("--dry-run", action="store_true", help="build and verify, upload nothing")
    parser.add_argument("--checkpoints", metavar="FOLDER", help="take the official files from here, not from the Hub")
    parser.add_argument("--folder", metavar="OUT", help="keep what is built in OUT/NAME")
    parser.add_argument("--json", action="store_true", help="print one JSON object per repository")


def run(arguments):
    """Runs `birefnet publish`; returns the exit code, 1 if any of several variants failed."""
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
    """The variants to publish and the names of their repositories."""
    if arguments.all == (arguments.variant is not None):
        raise UsageError("name one variant, or give --all")
    if arguments.all:
        if "/" in arguments.repo:
            raise UsageError(f"--all needs the owner alone as --repo, not {arguments.repo}")
        official = [variant for variant in VARIANTS.values() if variant.official]
        return [(variant, f"{arguments.repo}/BiRefNet-{variant.name}") for variant in official]
    try:
        variant = get_variant(arguments.variant)
    except ValueError as error:
        raise UsageError(str(error)) from error
    check_license(variant, arguments.private)
    return [(variant, arguments.repo)]


def _publish(variant, repository, arguments):
    """Builds, verifies and uploads one variant; returns what there is to report."""
    with ExitStack() as stack:
        parent = arguments.folder or stack.enter_context(tempfile.TemporaryDirectory())
        folder = Path(parent, repository.split("/")[-1])
        try:
            model, processor = build_repository(variant, repository, folder, checkpoints=arguments.checkpoints)
        except ValueError as error:
            raise CommandError(f"{variant.name}: {error}") from error
        difference = verify_repository(folder, model, processor)
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        report = {"variant": variant.name, "repository": repository, "files": sizes, "matte_difference": difference}
        if not arguments.dry_run:
            report["commit"], report["changed"] = upload_repository(folder, repository, private=arguments.private)
            report["tag"] = TAG
    return report


def _publish_space(arguments):
    """Builds, starts and uploads a Space; returns what there is to report."""
    from birefnet.hub.space import build_space, verify_space

    if arguments.all:
        raise UsageError("--space and --all contradict each other: name the variants, separated by commas")
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
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        report = {"repository": arguments.repo, "verified": not variants}
        report["files"] = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
        if not arguments.dry_run:
            uploaded = upload_repository(folder, arguments.repo, private=arguments.private, repo_type="space")
            report["commit"], report["changed"] = uploaded
            report["tag"] = TAG
    return report


def _describe(report):
    if "error" in report:
        return f"{report['repository']}: failed: {report['error']}"
    verified = ", verified" if report.get("verified", True) else ""
    size = f"{len(report['files'])} files, {sum(report['files'].values()) / 1e6:.1f} MB{verified}"
    if "commit" not in report:
        return f"{report['repository']}: {size}; nothing uploaded (--dry-run)"
    what = "published" if report["changed"] else "already published"
    return f"{report['repository']}: {size}; {what} as {report['tag']} at {report['commit'][:7]}"
