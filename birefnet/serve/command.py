"""
`birefnet serve`: the page and the APIs on one port.

This module has the arguments and starts the server. The import of torch, FastAPI and Gradio waits until it runs.
"""

import argparse
import functools
import importlib.util
import os

from birefnet.concurrency import limit_heaps
from birefnet.errors import CommandError, UsageError
from birefnet.inference.arguments import add_model_arguments, model_options, positive


DESCRIPTION = """\
Serves a page and HTTP APIs for cut-outs (remove.bg's, rembg's and OpenAI's interface, and ZIP archives).
Reachable from this machine only, unless --host says otherwise. http://127.0.0.1:7860/docs describes the APIs."""

EXAMPLES = """\
examples:
  birefnet serve                                        # http://127.0.0.1:7860, the embedded weights
  birefnet serve --variant general,portrait,matting     # loaded when first asked for
  birefnet serve --host 0.0.0.0 --api-key-file keys.txt # for others; URLs are then not fetched
  curl -F image_file=@photo.jpg -F size=auto http://127.0.0.1:7860/v1.0/removebg > subject.png"""

PACKAGES = ("fastapi", "fastapi_offline", "gradio", "httpx", "multipart", "prometheus_client", "uvicorn")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `birefnet serve`."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="default: 127.0.0.1, this machine only")
    parser.add_argument("--port", type=int, default=7860, help="default: 7860")
    parser.add_argument("--variant", metavar="NAMES", help="published checkpoints, such as general,portrait,matting")
    models = parser.add_argument_group("model")
    add_model_arguments(models, with_variant=False)
    parser.set_defaults(batch_size=0)  # by the device: 1 on a CPU, 8 on an accelerator
    models.add_argument(
        "--loaded-models", type=positive, default=2, metavar="N", help="most models in memory at a time (default: 2)"
    )
    access = parser.add_argument_group("access and limits")
    access.add_argument("--api-key-file", metavar="FILE", help="requests need one of its keys (one a line)")
    access.add_argument(
        "--allow-url",
        action=argparse.BooleanOptionalAction,
        help="fetch photos from public URLs (default: only when bound to this machine)",
    )
    access.add_argument("--queue", type=positive, default=32, metavar="N", help="photos at once; more get 429")
    access.add_argument("--max-megapixels", type=positive, default=50, metavar="N", help="default: 50")
    access.add_argument("--max-upload", type=positive, default=25, metavar="MIB", help="a photo's file; default: 25")
    access.add_argument("--timeout", type=positive, default=60, metavar="SECONDS", help="for one photo; default: 60")


def run(arguments: argparse.Namespace) -> int:
    """Runs `birefnet serve` until it is stopped, and returns its exit code."""
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise CommandError(f"this needs {', '.join(missing)}: pip install 'birefnet-transformers[serve]'")
    from birefnet.serve.running import serve

    limit_heaps()
    return serve(build_app(arguments), arguments.host, arguments.port)


def build_app(arguments: argparse.Namespace):
    """The ASGI application that the arguments ask for."""
    from birefnet.inference.remover import find_device
    from birefnet.serve.app import create_app
    from birefnet.serve.guard import is_loopback
    from birefnet.serve.keys import ApiKeys
    from birefnet.serve.limits import Limits

    local = is_loopback(arguments.host)
    keys = ApiKeys.from_file(arguments.api_key_file) if arguments.api_key_file else ApiKeys()
    on_cpu = find_device(arguments.device).type == "cpu"
    arguments.batch_size = arguments.batch_size or (1 if on_cpu else 8)
    in_space = "SPACE_ID" in os.environ  # set by Hugging Face, whose site shows the page in a frame
    return create_app(
        loaders_of(arguments),
        limits=Limits(
            upload_bytes=arguments.max_upload * 2**20,
            pixels=arguments.max_megapixels * 1_000_000,
            request_seconds=arguments.timeout,
            waiting=arguments.queue,
        ),
        keys=keys,
        allow_url=local if arguments.allow_url is None else arguments.allow_url,
        loopback_only=local,
        frame_ancestors="https://huggingface.co" if in_space else "'none'",
        capacity=arguments.loaded_models,
        workers=max(1, min(2, os.cpu_count() or 1)) if on_cpu else 1,
        batch_size=arguments.batch_size,
    )


def loaders_of(arguments: argparse.Namespace) -> dict:
    """For each model's name a function that loads it; the first is the default."""
    from birefnet.hub.variants import get_variant
    from birefnet.inference.remover import load_remover
    from birefnet.serve.shelf import EMBEDDED

    options = model_options(arguments)
    del options["model"], options["variant"]
    loaders = {}
    try:
        names = [get_variant(name.strip()).name for name in (arguments.variant or "").split(",") if name.strip()]
    except ValueError as error:
        raise UsageError(str(error)) from error
    if arguments.model:
        name = os.path.basename(os.path.normpath(arguments.model))
        loaders[name] = functools.partial(load_remover, arguments.model, **options)
    for name in names:
        loaders[name] = functools.partial(load_remover, variant=name, **options)
    return loaders or {EMBEDDED: functools.partial(load_remover, **options)}
