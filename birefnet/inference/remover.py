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
):
    """
    Loads a model and its processor, and builds the background-removal pipeline from them.

    Args:
        model: A folder, a Hub repository or a weights file. Default: the embedded weights.
        variant: Name of a published checkpoint, instead of `model`.
        device: A device, or `"auto"`: the machine's accelerator if there is one, else the CPU.
        dtype: `"float32"`, `"float16"`, `"bfloat16"`, `"int8"` (CPUs only) or `"auto"`, the exact one for the device.
        resolution: Input size of the network: (height, width) in pixels, or `"dynamic"`. Default: the processor's.
        batch_size: photos per network call. int8 takes photos one by one.

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
    """The dtype to load the weights in. An int8 model keeps the faster floating-point dtype between its products."""
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
        raise UsageError("--dtype int8 takes photos one by one, as the others of a batch would change their mattes")
    return str(compute_plan(device, torch.bfloat16).arithmetic).removeprefix("torch.")


def _set_resolution(processor, resolution: str | tuple[int, int] | None) -> None:
    if resolution is None:
        return
    processor.do_dynamic_resize = resolution == "dynamic"
    if resolution != "dynamic":
        processor.size = {"height": resolution[0], "width": resolution[1]}
