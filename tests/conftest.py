"""Fixtures of several test modules, such as a complete but tiny model folder."""

import os
import re
import shutil
import subprocess

import pytest


TINY_CONFIG = {
    "backbone": "test_resnet",  # a timm backbone made for tests
    "multi_scale_input": None,
    "context_levels": 0,
    "squeeze_block": None,
    "decoder_attention": None,
    "decoder_channels": 8,
    "source_reference": "image",
    "gradient_reference": False,
}


@pytest.fixture(scope="module")
def one_thread():
    """Uses one thread: faster for small networks, and sums have a fixed order."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory):
    """A complete model folder (code, configuration, weights, processor): half a million random weights, 64 x 64."""
    import torch

    pytest.importorskip("timm")

    from birefnet.repository.configuration_birefnet import BiRefNetConfig
    from birefnet.repository.image_processing_birefnet import BiRefNetImageProcessor
    from birefnet.repository.modeling_birefnet import BiRefNetForImageSegmentation

    folder = tmp_path_factory.mktemp("tiny")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BiRefNetForImageSegmentation(BiRefNetConfig(**TINY_CONFIG)).eval()
    with torch.no_grad():  # scales the random network's mattes to the range 0 to 1
        logits = model(torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))).logits
        head = model.decoder.conv_out1[0]
        head.weight *= 4 / logits.std()
        head.bias.copy_((head.bias - logits.mean()) * 4 / logits.std())
    model.save_pretrained(folder)
    BiRefNetImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def node_modules(tmp_path_factory):
    """A folder with the npm packages of all tests. `BIREFNET_NODE_MODULES` names one that has them already."""
    packages = ["@huggingface/transformers@4", "onnxruntime-web", "playwright-core@1", "axe-core@4"]
    if given := os.environ.get("BIREFNET_NODE_MODULES"):
        return given
    if shutil.which("npm") is None:
        pytest.skip("needs npm, which brings the JavaScript packages: apt install npm")
    folder = tmp_path_factory.mktemp("node")
    (folder / "package.json").write_text('{"private": true}')
    command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", *packages]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    if re.search("E404|ENOTFOUND|EAI_AGAIN|ECONN|ETIMEDOUT|ENETUNREACH", done.stderr) and done.returncode:
        pytest.skip(f"needs an npm registry that has {' '.join(packages)}: {done.stderr.strip()[-300:]}")
    assert done.returncode == 0, done.stderr  # any other error is a fault of the packages or of this list
    return str(folder / "node_modules")
