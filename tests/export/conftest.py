"""Networks to export: the embedded one, and one of the lite network's form that is small enough for tests."""

import os
import shutil
import subprocess

import pytest


@pytest.fixture(scope="session")
def tiny_swin():
    """A network with all blocks of the lite one, narrower and shallower, and its processor at 64 x 96."""
    import torch

    from birefnet.repository import configuration_birefnet as configuration
    from birefnet.repository.image_processing_birefnet import BiRefNetImageProcessor
    from birefnet.repository.modeling_birefnet import BiRefNetForImageSegmentation

    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.setitem(configuration.SWIN_BACKBONES, "swin_v1_tiny", (32, (1, 2, 1, 1), (1, 2, 4, 8), 7))
        torch.manual_seed(0)
        config = configuration.BiRefNetConfig(backbone="swin_v1_tiny")
        model = BiRefNetForImageSegmentation(config).eval()
        with torch.no_grad():
            for module in model.modules():
                if type(module).__name__ == "ZeroInitializedConvolution":  # so that samples lie between pixels
                    module.weight.normal_(std=0.05)
        yield model, BiRefNetImageProcessor(size={"height": 64, "width": 96})


@pytest.fixture(scope="session")
def embedded_folder(tmp_path_factory):
    """The embedded network in all dtypes for ONNX, and the photo that it was compared on."""
    pytest.importorskip("timm")
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    from birefnet.export import export_model

    folder = tmp_path_factory.mktemp("export") / "embedded"
    reports = export_model("embedded", folder, dtypes=("float32", "float16", "int8"))
    return folder, reports


@pytest.fixture(scope="session")
def run_node(node_modules, tmp_path_factory):
    """Runs a script of this folder in Node with the packages; gives its standard output."""
    place = tmp_path_factory.mktemp("scripts")
    (place / "node_modules").symlink_to(node_modules)

    def run(script, *arguments, timeout=300, **environment):
        shutil.copy(os.path.join(os.path.dirname(__file__), script), place)
        command = ["node", str(place / script), *map(str, arguments)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, env={**os.environ, **environment}
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
