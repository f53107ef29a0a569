"""Speed of exported files beside PyTorch and, if there is one, the published code's graph in ONNX Runtime.

    birefnet export lite.pth exported --dtype float32 int8
    birefnet export lite.pth exported --format openvino
    python benchmarks/exported.py lite.pth exported --graph published.onnx --rounds 3

All run in turns on one photo, at the size of the folder's files. `published_graph.py` writes graph and weights.
"""

import argparse

import torch

from birefnet.export.benchmark import measure, recommend
from birefnet.inference.runtimes import BiRefNetOnnxModel


PUBLISHED = "ONNX Runtime, published graph"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="`embedded`, or a folder or file of weights")
    parser.add_argument("folder", help="what `birefnet export` wrote from it")
    parser.add_argument("--graph", metavar="FILE", help="ONNX graph of the published code with the same weights")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    others = {PUBLISHED: BiRefNetOnnxModel(arguments.graph, None)} if arguments.graph else {}
    timings = measure(arguments.model, arguments.folder, rounds=arguments.rounds, others=others)
    published = next((timing.seconds for timing in timings if timing.name == PUBLISHED), None)
    for timing in timings:
        ratio = f"   {published / timing.seconds:.2f} x" if published else ""
        print(timing.describe() + ratio)
    print(recommend(timings))


if __name__ == "__main__":
    main()
