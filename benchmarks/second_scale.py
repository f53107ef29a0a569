"""Adds the second input scale to a trained network of one scale. The result of the network stays the same.

    python benchmarks/second_scale.py embedded two-scales --data 'train-*.parquet'

With `multi_scale_input="concat"` the backbone also encodes the picture at half its size, and the decoder has twice the
channels. The old channels keep their weights and have weights of zero for the new ones. The new channels start with
random weights. Their batch norms get the mean and variance of training photos, because training goes on with fixed
statistics. The folder can be trained with `birefnet train --model`.
"""

import argparse
import copy
import random

import torch

from birefnet.data.pairs import read_pairs
from birefnet.hub.folders import write_folder, written_whole
from birefnet.inference.loading import load_model
from birefnet.training.dataset import MattingDataset


NOT_POSSIBLE = "Only networks of basic blocks whose channels are multiples of 8 can be widened."
CARD = "# BiRefNet\n\nA second scale was added by `benchmarks/second_scale.py` and is not yet trained.\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or name of a model of one scale")
    parser.add_argument("output", help="folder to write, which must not exist")
    parser.add_argument("--data", nargs="+", required=True, help="photos for the statistics of the new channels")
    parser.add_argument("--photos", type=int, default=192)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    old, processor = load_model(arguments.model)
    torch.manual_seed(arguments.seed)
    try:
        new = with_second_scale(old)
    except ValueError as error:
        parser.error(str(error))
    pairs = read_pairs(arguments.data)
    pairs = random.Random(arguments.seed).sample(pairs, min(arguments.photos, len(pairs)))
    size = (processor.size["height"], processor.size["width"])
    pixels = MattingDataset(pairs, size, cache=True).pixels[:, :3].float() / 255
    mean, deviation = (torch.tensor(v)[:, None, None] for v in (processor.image_mean, processor.image_std))
    measure_new_statistics(new, old, ((pixels - mean) / deviation).split(arguments.batch_size))
    with written_whole(arguments.output) as partial:
        write_folder(partial, new, processor, CARD)


@torch.no_grad()
def with_second_scale(old):
    """
    A network with `multi_scale_input="concat"` that computes what `old`, a network of one scale, computes.

    Raises:
        ValueError: `old` has two scales, or a part whose channels this script cannot double.
    """
    if old.config.multi_scale_input is not None:
        raise ValueError(f"The network has two scales: multi_scale_input={old.config.multi_scale_input!r}.")
    config = copy.deepcopy(old.config)
    config.multi_scale_input = "concat"
    new = type(old)(config).eval()
    inputs = parts_of_inputs(old)
    weights = old.state_dict()
    for name, value in new.state_dict().items():
        weight = weights[name].to(value.dtype)
        if value.shape == weight.shape:
            value.copy_(weight)
            continue
        if any(new_size not in (size, 2 * size) for new_size, size in zip(value.shape, weight.shape, strict=True)):
            raise ValueError(NOT_POSSIBLE)
        rows = len(weight)
        value[:rows] = 0
        if weight.ndim == 1:
            value[:rows] = weight
        else:
            value[:rows, first_halves(inputs.get(name, [weight.shape[1]]))] = weight
    picture = torch.randn(1, 3, 256, 256)
    expected, found = (network.compute_as_planned(picture).logits for network in (old.eval(), new))
    if (found - expected).abs().max() > 1e-4 * expected.std():
        raise ValueError(NOT_POSSIBLE)
    return new


def parts_of_inputs(old) -> dict[str, list[int]]:
    """Channels of the maps that are concatenated into the input of a convolution, by the name of its weight."""
    decoder = old.decoder
    sources = {level: decoder.source_channels(level) for level in (5, 4, 3, 2, 1)}
    encoder = [getattr(decoder, f"lateral_block{level}").conv.in_channels for level in (2, 3, 4)]
    deepest = decoder.decoder_block4.conv_in.in_channels - sources[5]
    blocks = {"decoder.decoder_block4.conv_in": [deepest, sources[5]]}
    for level in (3, 2, 1):
        block = getattr(decoder, f"decoder_block{level}")
        blocks[f"decoder.decoder_block{level}.conv_in"] = [
            block.conv_in.in_channels - sources[level + 1],
            sources[level + 1],
        ]
    head = decoder.conv_out1[0]
    blocks["decoder.conv_out1.0"] = [head.in_channels - sources[1], sources[1]]
    if old.config.context_levels:
        blocks["squeeze_module.0.conv_in"] = [*encoder, deepest]
    return {f"{name}.weight": [part for part in parts if part] for name, parts in blocks.items()}


def first_halves(parts: list[int]) -> torch.Tensor:
    """Positions of the old channels when each part of a concatenation gets as many new ones behind its old ones."""
    positions, start = [], 0
    for channels in parts:
        positions += range(start, start + channels)
        start += 2 * channels
    return torch.tensor(positions)


@torch.no_grad()
def measure_new_statistics(new, old, batches):
    """Set the running statistics of new channels to their mean and variance over batches of pictures (B, 3, H, W)."""
    norms = dict(old.named_modules())
    grown = {
        name: norm
        for name, norm in new.named_modules()
        if isinstance(norm, torch.nn.BatchNorm2d) and norm.num_features != norms[name].num_features
    }
    for norm in grown.values():
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
        norm.train()
    for batch in batches:
        new.compute_as_planned(batch)
    for name, norm in grown.items():
        known = norms[name]
        norm.running_mean[: known.num_features] = known.running_mean
        norm.running_var[: known.num_features] = known.running_var
        norm.num_batches_tracked.copy_(known.num_batches_tracked)
        norm.momentum = known.momentum
        norm.eval()


if __name__ == "__main__":
    main()
