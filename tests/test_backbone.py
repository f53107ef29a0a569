"""Parts of the Swin backbone against direct formulations."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from birefnet.repository import hardware_birefnet
from birefnet.repository.backbone_birefnet import (
    DropPath,
    PatchMerging,
    SwinBlock,
    SwinTransformer,
    create_backbone,
    join_partitions,
    partition_windows,
    relative_position_index,
)
from birefnet.repository.configuration_birefnet import BiRefNetConfig


def test_relative_position_index_equals_its_definition():
    size = 3
    index = relative_position_index(size)
    for query in range(size * size):
        for key in range(size * size):
            rows, columns = query // size - key // size, query % size - key % size
            assert index[query, key] == (rows + size - 1) * (2 * size - 1) + columns + size - 1


def cut_into_windows(hidden_states, size):
    """(B, H, W, C) → (B·H/size·W/size, size², C)"""
    batch, height, width, channels = hidden_states.shape
    windows = hidden_states.view(batch, height // size, size, width // size, size, channels).transpose(2, 3)
    return windows.reshape(-1, size * size, channels)


def merge_windows(windows, shape):
    """Inverse of `cut_into_windows` for a map of `shape` (B, H, W, C)."""
    batch, height, width, channels = shape
    size = int(windows.shape[1] ** 0.5)
    windows = windows.view(batch, height // size, width // size, size, size, channels)
    return windows.transpose(2, 3).reshape(shape)


def test_partition_lists_the_tokens_window_by_window():
    partition = partition_windows((2, 4, 6), 2, 0, torch.zeros(()))
    assert partition.is_token is None and partition.groups == [(12, None)]
    # rows 0 and 1, columns 2 and 3 of the first map
    assert partition.to_windows.view(12, 4)[1].tolist() == [2, 3, 8, 9]
    assert partition.to_windows[partition.from_windows].tolist() == list(range(48))


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("size", [(11, 14), (5, 10), (3, 4)])
def test_each_token_is_in_one_window_and_the_rest_is_padding(shift, size):
    partition = partition_windows((2, *size), 5, shift, torch.zeros(()))
    tokens = torch.arange(2 * size[0] * size[1])
    assert torch.equal(partition.to_windows[partition.from_windows], tokens)
    is_token = tokens.new_zeros(len(partition.to_windows)).index_fill_(0, partition.from_windows, 1)
    if partition.is_token is None:
        assert is_token.all()
    else:
        assert torch.equal(partition.is_token.flatten(), is_token.float())
    assert 25 * sum(number for number, _ in partition.groups) == len(partition.to_windows)


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("sizes", [((10, 15), (5, 10)), ((11, 14), (6, 7)), ((10, 10), (3, 4))])
def test_joined_partitions_keep_the_windows_and_their_masks(shift, sizes):
    parts = [partition_windows((2, *size), 5, shift, torch.zeros(())) for size in sizes]
    joined = join_partitions(parts)
    numbers = [2 * height * width for height, width in sizes]
    assert torch.equal(joined.to_windows[joined.from_windows], torch.arange(sum(numbers)))

    def windows(partition, first_token):  # of each group, the tokens of its windows; -1 stands for padding
        tokens = partition.to_windows + first_token
        if partition.is_token is not None:
            tokens = tokens.where(partition.is_token.flatten() > 0, -1)
        groups = tokens.view(-1, 25).split([number for number, _ in partition.groups])
        return [group.tolist() for group in groups]

    own = zip(windows(parts[0], 0), windows(parts[1], numbers[0]), strict=True)
    assert windows(joined, 0) == [full + half for full, half in own]
    assert len(joined.groups) == (4 if shift else 1)
    assert all(mask is same for (_, mask), (_, same) in zip(joined.groups, parts[0].groups, strict=True))


def test_scales_encoded_together_equal_scales_encoded_alone():
    torch.manual_seed(0)
    backbone = SwinTransformer(BiRefNetConfig(backbone="swin_v1_t")).eval()
    for stage in backbone.layers:
        for block in stage.blocks:  # the network's `_init_weights` would initialise it
            torch.nn.init.normal_(block.attn.relative_position_bias_table)
    scales = torch.randn(2, 3, 96, 128), torch.randn(2, 3, 48, 64)
    with torch.no_grad():
        together, alone = backbone(*scales), [backbone(images) for images in scales]
    for maps, *expected in zip(together, *alone, strict=True):
        for found, map_alone in zip(maps, expected, strict=True):
            torch.testing.assert_close(found, map_alone, rtol=1e-4, atol=1e-5)


def attention_with_an_expanded_mask(block, hidden_states):
    """Shifted window attention as published: one mask for every window of the rolled map."""
    batch, height, width, dimension = hidden_states.shape
    size, shift = block.attn.window_size, block.shift
    padded = F.pad(hidden_states, (0, 0, 0, -width % size, 0, -height % size))
    rows, columns = padded.shape[1:3]
    region = torch.zeros(1, rows, columns, 1)
    cuts = (slice(0, -size), slice(-size, -shift), slice(-shift, None)) if shift else (slice(None),)
    for i, row in enumerate(cuts):
        for j, column in enumerate(cuts):
            region[:, row, column] = 3 * i + j
    padded = torch.roll(padded, (-shift, -shift), dims=(1, 2))
    windows, regions = cut_into_windows(padded, size), cut_into_windows(region, size).squeeze(-1)
    number, heads = len(windows), block.attn.num_heads
    query, key, value = block.attn.qkv(windows).view(number, size**2, 3, heads, -1).permute(2, 0, 3, 1, 4)
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5 + block.attn.relative_position_bias()
    differ = (regions[:, :, None] != regions[:, None, :]).repeat(batch, 1, 1)
    attended = scores.masked_fill(differ[:, None], float("-inf")).softmax(-1) @ value
    merged = merge_windows(attended.transpose(1, 2).reshape(number, size**2, dimension), padded.shape)
    return torch.roll(merged, (shift, shift), dims=(1, 2))[:, :height, :width]


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("size", [(11, 14), (5, 10), (3, 4)])
@pytest.mark.parametrize("tile", [hardware_birefnet.CPU_TILE_BYTES, 1])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_block_equals_the_formulation_with_one_mask_per_window(attention, tile, shift, size, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(hardware_birefnet, "CPU_TILE_BYTES", tile)  # 1 byte: one window or one token per tile
    config = BiRefNetConfig(attn_implementation=attention)
    block = SwinBlock(config, dimension=64, num_heads=2, window_size=5, shift=shift, drop_path_rate=0.0).eval()
    torch.nn.init.normal_(block.attn.relative_position_bias_table)
    hidden_states = torch.randn(2, *size, 64)
    with torch.no_grad():
        found = block(hidden_states.flatten(0, 2), partition_windows((2, *size), 5, shift, hidden_states))
        attended = attention_with_an_expanded_mask(block, block.norm1(hidden_states))
        expected = hidden_states + block.attn.proj(attended)
        expected = expected + block.mlp(block.norm2(expected))
    assert (found.view_as(expected) - expected).abs().max() < 1e-5


def test_patch_merging_pads_odd_sizes_and_keeps_the_published_order():
    module = PatchMerging(1)
    module.norm = module.reduction = torch.nn.Identity()
    merged = module(torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]]).view(1, 3, 3, 1))
    assert merged[0, 0, 0].tolist() == [1, 4, 2, 5]  # (0,0), (1,0), (0,1), (1,1)
    assert merged[0, 1, 1].tolist() == [9, 0, 0, 0]


def test_drop_path_keeps_the_mean_and_is_off_in_evaluation():
    torch.manual_seed(0)
    module = DropPath(0.25)
    dropped = module(torch.ones(4000 * 3, 2), batch=4000).view(4000, 6)
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert torch.equal(dropped, dropped[:, :1].expand(-1, 6))  # drops whole samples
    assert dropped.mean().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(module.eval()(torch.ones(4, 2), batch=4), torch.ones(4, 2))


def test_stochastic_depth_rises_linearly_over_the_blocks():
    with torch.device("meta"):
        backbone = SwinTransformer(BiRefNetConfig(backbone="swin_v1_t", drop_path_rate=0.22))
    rates = [block.drop_path.rate for stage in backbone.layers for block in stage.blocks]
    assert rates == pytest.approx([0.02 * i for i in range(12)])
    shifts = [block.shift for stage in backbone.layers for block in stage.blocks]
    assert shifts == [0, 3] * 6


# timm's EfficientNet with folded norms


@pytest.fixture
def efficientnet():
    """A backbone of timm whose norms have random statistics, and the same backbone with timm's own forward passes."""
    pytest.importorskip("timm", reason="the backbone is timm's")
    torch.manual_seed(0)
    folded, _, _ = create_backbone(BiRefNetConfig(backbone="tf_efficientnet_lite0"))
    for norm in folded.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.running_mean.normal_(std=0.1)
            norm.running_var.uniform_(0.5, 2)
            torch.nn.init.normal_(norm.bias, std=0.1)
    original = copy.deepcopy(folded)
    for module in original.modules():
        vars(module).pop("forward", None)
    return folded.eval(), original.eval()


def largest_difference(found, expected):
    return max(((a - b).abs().max() / b.std()).item() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("size", [(64, 96), (56, 40)])
def test_folded_norms_equal_timm(efficientnet, size, monkeypatch):
    folded, original = efficientnet
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = original(images)
        monkeypatch.setattr(F, "batch_norm", None)  # must not be called
        assert largest_difference(folded(images), expected) < 1e-4


def test_folded_norms_follow_changes_of_the_parameters(efficientnet):
    folded, original = efficientnet
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        folded(images)
        for backbone in efficientnet:
            backbone.blocks[1][0].bn2.running_mean.data.add_(0.3)
            backbone.conv_stem.weight.data.mul_(1.5)
        assert largest_difference(folded(images), original(images)) < 1e-4


def test_folded_norms_leave_training_hooks_and_adapters_to_timm(efficientnet):
    folded, original = efficientnet
    images, seen = torch.randn(2, 3, 64, 64), []
    for backbone in efficientnet:  # an adapter adds something to its layer's output
        backbone.blocks[2][1].conv_pw = torch.nn.Sequential(backbone.blocks[2][1].conv_pw, torch.nn.Softplus())
    folded.blocks[3][0].bn1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        assert largest_difference(folded(images), original(images)) < 1e-4
    assert len(seen) == 1
    for found, expected in zip(folded(images), original(images), strict=True):  # with gradients
        assert torch.equal(found, expected)
    torch.manual_seed(1)
    found = folded.train()(images)
    torch.manual_seed(1)
    assert largest_difference(found, original.train()(images)) == 0
    assert torch.equal(folded.bn1.running_mean, original.bn1.running_mean)


def test_backbones_with_folded_norms_can_be_copied_and_pickled(efficientnet):
    folded, _ = efficientnet
    images = torch.randn(1, 3, 64, 64)
    for copied in (copy.deepcopy(folded), pickle.loads(pickle.dumps(folded))):
        with torch.no_grad():
            assert largest_difference(copied(images), folded(images)) == 0
            for parameter in copied.parameters():
                parameter.zero_()
            assert all((maps == 0).all() for maps in copied(images)[:1])
        assert folded(images)[0].abs().sum() > 0
