"""Builds the background-removal pipeline on its device."""

from birefnet import repository_folder
from birefnet.errors import CommandError, UsageError
from birefnet.hub.load import load_variant
from birefnet.inference.loading import garbage_collection_paused, load_model


@garbage_collection_paused()
def load_remover(
    model: str | None = None,
    variant: str | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    resolution: str | tuple[int, int] | None = None,
    batch_size: int = 1,
    runtime: str = "pytorch",
):
    """
    Loads a model and its processor, and builds the background-removal pipeline from them.

    Args:
        model: A folder, a Hub repository or a weights file. Default: the embedded weights.
        variant: Name of a published checkpoint, instead of `model`.
        device: A device, or `"auto"`: the machine's accelerator if there is one, else the CPU.
        dtype: `"float32"`, `"float16"`, `"bfloat16"`, `"int8"` (CPUs only) or `"auto"`: the dtype that `compute_plan`
            chooses for the device.
        resolution: Input size of the network: (height, width) in pixels, or `"dynamic"`. Default: the processor's.
        batch_size: Photos per network call. int8 allows only 1.
        runtime: `"pytorch"`, `"onnx"` or `"openvino"`. The last two need a folder that `birefnet export` wrote, as
            `model`. `dtype` then selects the file in that folder.

    Returns:
        `BiRefNetPipeline`

    Raises:
        CommandError: The model cannot be loaded, or the device does not exist or does not support the dtype.
    """
    import torch  # imported here, because these imports take seconds
    from transformers.utils.logging import disable_progress_bar

    from birefnet.repository.pipeline_birefnet import BiRefNetPipeline

    disable_progress_bar()
    if variant and model:
        raise UsageError("use either --variant or --model, not both")
    device = find_device(device)
    if runtime != "pytorch":
        return _load_exported_remover(runtime, model, device, dtype, resolution, batch_size)
    weights_dtype = _weights_dtype(dtype, device, batch_size)
    source = str(variant or model or repository_folder())
    try:
        if variant:
            chosen = None if dtype == "auto" else getattr(torch, weights_dtype)
            network, processor = load_variant(variant, device, chosen)
        else:
            network, processor = load_model(source, weights_dtype)
    except (OSError, ValueError, RuntimeError) as error:
        raise CommandError(f"the model {source} cannot be loaded: {error}") from error
    if dtype == "int8":
        from birefnet.inference.quantization import quantize

        quantize(network)
    _set_resolution(processor, resolution)
    return BiRefNetPipeline(model=network, image_processor=processor, device=device, task="background-removal")


def _load_exported_remover(runtime: str, folder: str | None, device, dtype: str, resolution, batch_size: int):
    from transformers import AutoImageProcessor

    from birefnet.inference.runtimes import RUNTIMES
    from birefnet.repository.pipeline_birefnet import BiRefNetPipeline

    if folder is None:
        raise UsageError(f"--runtime {runtime} needs --model FOLDER, a folder that `birefnet export` wrote")
    network = RUNTIMES[runtime].from_pretrained(folder, "float32" if dtype == "auto" else dtype, device)
    processor = AutoImageProcessor.from_pretrained(folder)
    _set_resolution(processor, resolution)
    side = ("height", "width")
    size = (None, None) if processor.do_dynamic_resize else tuple(processor.size[name] for name in side)
    for option, own, given in (
        ("--batch-size", network.input_shape[0], batch_size),
        ("--resolution", network.input_shape[2:], size),
    ):
        fits = own is None or own == given or (option == "--resolution" and None in own)
        if not fits:
            raise UsageError(
                f"{option}: the file in {folder} only accepts {own}, not {given}; export it again for other values"
            )
    return BiRefNetPipeline(model=network, image_processor=processor, device=device, task="background-removal")


def find_device(name: str):
    """
    Returns the named device. `"auto"` is the machine's accelerator if there is one, else the CPU.

    Raises:
        UsageError: This machine does not have the device.
    """
    import torch

    if name == "auto":
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"--device {name}: not available here ({str(error).splitlines()[0]})") from None


def _weights_dtype(dtype: str, device, batch_size: int) -> str:
    """The dtype of the loaded weights. For int8: the faster floating-point dtype, used outside the matrix products."""
    import torch

    from birefnet.repository.hardware_birefnet import compute_plan

    if dtype == "auto":
        return str(compute_plan(device).storage).removeprefix("torch.")
    if dtype != "int8":
        return dtype
    from birefnet.inference.quantization import obstacle

    if reason := obstacle(device):
        raise UsageError(f"--dtype int8: {reason}")
    if batch_size > 1:
        raise UsageError(
            "--dtype int8 needs --batch-size 1: in a batch, each photo would change the mattes of the others"
        )
    return str(compute_plan(device, torch.bfloat16).arithmetic).removeprefix("torch.")


def _set_resolution(processor, resolution: str | tuple[int, int] | None) -> None:
    if resolution is None:
        return
    processor.do_dynamic_resize = resolution == "dynamic"
    if resolution != "dynamic":
        processor.size = {"height": resolution[0], "width": resolution[1]}
