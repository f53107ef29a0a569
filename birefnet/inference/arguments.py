"""Command-line arguments of all commands that run a network: model, device, dtype, input size."""

import argparse


def add_model_arguments(group, with_variant: bool = True) -> None:
    """Adds the arguments for [`model_options`] to an `argparse` parser or group."""
    if with_variant:
        group.add_argument("--variant", metavar="NAME", help="a published checkpoint; see `birefnet variants`")
    group.add_argument("--model", metavar="FOLDER|HUB_ID", help="default: the embedded weights")
    group.add_argument(
        "--resolution",
        type=resolution,
        metavar="SIZE",
        help="input size of the network: 1024, HEIGHTxWIDTH such as 1440x2560 (multiples of 32), or dynamic (the "
        "photo's own size within limits); default: the model's training size",
    )
    group.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps, ...")
    group.add_argument(
        "--dtype",
        choices=["auto", "float32", "float16", "bfloat16", "int8"],
        default="auto",
        help="default: float32 on a CPU, float16 on a GPU; int8 is for CPUs: faster and less exact",
    )
    group.add_argument(
        "--runtime",
        choices=["pytorch", "onnx", "openvino"],
        default="pytorch",
        help="what runs the network (default: pytorch); with onnx and openvino, --model is a folder that "
        "`birefnet export` wrote, and --dtype chooses the file in it",
    )
    group.add_argument(
        "--batch-size", type=positive, metavar="N", default=1, help="photos per network call (default: 1)"
    )


def model_options(arguments: argparse.Namespace) -> dict:
    """Returns the parsed arguments as keyword arguments of [`load_remover`]."""
    names = ("model", "variant", "device", "dtype", "resolution", "batch_size", "runtime")
    return {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}


def positive(text: str) -> int:
    """`argparse` type: an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1")
    return int(text)


def resolution(text: str) -> str | tuple[int, int]:
    """`argparse` type: `"dynamic"`, or (height, width) in multiples of 32."""
    if text == "dynamic":
        return text
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 and int(side) % 32 == 0 for side in sides):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size; allowed are 1024, HEIGHTxWIDTH such as 1440x2560 (multiples of 32), and dynamic"
        )
    return int(sides[0]), int(sides[-1])
