"""The published code as an ONNX graph, to be compared with the files of `birefnet export`.

    python benchmarks/published_graph.py CHECKOUT lite WEIGHTS.pth published.onnx --size 1024

`torch.onnx.export` translates torchvision's deformable convolution to ONNX's DeformConv, as does this project. The
published code itself is not changed. It needs a checkout from GitHub and that code's own requirements.
"""

import argparse
from pathlib import Path

import torch
from subjects import BACKBONES, drawn_weights, import_published_network

from birefnet.export.programs import OPSET
from birefnet.repository.configuration_birefnet import BiRefNetConfig


class LastLogits(torch.nn.Module):
    """The published network gives a list of logits. Its last are the result."""

    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.network = network

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.network(pixel_values)[-1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", help="folder of the published code")
    parser.add_argument("model", choices=["lite", "general"])
    parser.add_argument("weights", help="where to write the weights (.pth), random ones, for `birefnet export`")
    parser.add_argument("graph", help="where to write the ONNX graph")
    parser.add_argument("--size", type=int, default=1024)
    arguments = parser.parse_args()
    config = BiRefNetConfig(backbone=BACKBONES[arguments.model])
    network = import_published_network(Path(arguments.checkout).resolve(), config.backbone)(bb_pretrained=False)
    weights = {**network.state_dict(), **drawn_weights(config)}
    network.load_state_dict(weights)
    torch.save(weights, arguments.weights)
    pixel_values = torch.randn(1, 3, arguments.size, arguments.size)
    names = {"input_names": ["pixel_values"], "output_names": ["logits"]}
    with torch.inference_mode():
        program = torch.onnx.export(
            LastLogits(network).eval(), (pixel_values,), dynamo=True, opset_version=OPSET, **names
        )
    program.save(arguments.graph)


if __name__ == "__main__":
    main()
