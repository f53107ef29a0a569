"""
Builds models from checkpoints of other sources, including the old layout.

Checkpoints from before 2 May 2024 (`BiRefNet-DIS_ep580.pth`, `BiRefNet-ep480.pth` and their fine-tunes) have an older
layout. The present network contains the old one: it has two more branches in every pooling block, one more image
branch and one more gate. `upgrade_old_layout` sets the weights of these parts so that they change nothing.
"""

# The sigmoid is exactly 1 in float32 and float16 for inputs of 17 and more.
OPEN_GATE = 40.0


def is_old_layout(state_dict):
    """Whether a cleaned state dict has the layout from before 2 May 2024, without the deepest image branch."""
    return "decoder.ipt_blk4.conv1.weight" in state_dict and "decoder.ipt_blk5.conv1.weight" not in state_dict


def upgrade_old_layout(state_dict):
    """
    Converts a state dict of the old layout into one of the present layout that computes the same.

    The differences were read from the published code before and after the change:

    - The old pooling blocks have one deformable branch (3×3) instead of three (1×1, 3×3, 7×7). The weights after the
      two new branches are set to zero.
    - The old first decoder stage gets no image patches. The weights after the new patches are set to zero.
    - The old first decoder stage has no gradient gate. The new gate is set to 1.
    - The image patches have another order, see [`reorder_patches`].

    Args:
        state_dict (`dict[str, torch.Tensor]`): A cleaned state dict for which [`is_old_layout`] is true.

    Returns:
        `dict[str, torch.Tensor]`: The new state dict.
    """
    import torch

    state_dict = reorder_patches(state_dict, rows_first=True)
    upgraded = dict(state_dict)
    like = state_dict["decoder.decoder_block4.conv_in.weight"]

    def add(prefix, *shape, fill=0.0, bias=True):
        upgraded[f"{prefix}.weight"] = torch.zeros(shape, dtype=like.dtype)
        if bias:
            upgraded[f"{prefix}.bias"] = torch.full(shape[:1], fill, dtype=like.dtype)

    def add_norm(prefix, channels):
        for leaf, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
            upgraded[f"{prefix}.{leaf}"] = torch.full((channels,), value, dtype=like.dtype)
        upgraded[f"{prefix}.num_batches_tracked"] = torch.zeros((), dtype=torch.int64)

    for key in state_dict:
        if ".aspp_deforms.0." in key:
            upgraded[key.replace(".aspp_deforms.0.", ".aspp_deforms.1.")] = upgraded.pop(key)
    for key, weight in state_dict.items():
        if not key.endswith(".aspp_deforms.0.atrous_conv.regular_conv.weight"):
            continue
        planes, channels = weight.shape[:2]
        attention = key.split(".aspp_deforms")[0]
        for branch, kernel in ((0, 1), (2, 7)):
            prefix = f"{attention}.aspp_deforms.{branch}"
            add(f"{prefix}.atrous_conv.offset_conv", 2 * kernel**2, channels, kernel, kernel)
            add(f"{prefix}.atrous_conv.modulator_conv", kernel**2, channels, kernel, kernel)
            add(f"{prefix}.atrous_conv.regular_conv", planes, channels, kernel, kernel, bias=False)
            add_norm(f"{prefix}.bn", planes)
        point, deformable, pooled = state_dict[f"{attention}.conv1.weight"].split(planes, dim=1)
        nothing = torch.zeros_like(point)
        upgraded[f"{attention}.conv1.weight"] = torch.cat([point, nothing, deformable, nothing, pooled], dim=1)

    patches = state_dict["decoder.ipt_blk4.conv_out.weight"].shape[0]
    hidden, tiles = state_dict["decoder.ipt_blk4.conv1.weight"].shape[:2]
    add("decoder.ipt_blk5.conv1", hidden, 4 * tiles if tiles > 3 else tiles, 3, 3)
    add("decoder.ipt_blk5.conv_out", patches, hidden, 3, 3)
    upgraded["decoder.decoder_block4.conv_in.weight"] = torch.cat([like, like.new_zeros(len(like), patches, 3, 3)], 1)
    if "decoder.gdt_convs_3.0.weight" in state_dict:
        gate = state_dict["decoder.gdt_convs_3.0.weight"].shape[0]
        add("decoder.gdt_convs_4.0", gate, state_dict["decoder.decoder_block4.conv_out.weight"].shape[0], 3, 3)
        add_norm("decoder.gdt_convs_4.1", gate)
        add("decoder.gdt_convs_pred_4.0", 1, gate, 1, 1)
        add("decoder.gdt_convs_attn_4.0", 1, gate, 1, 1, fill=OPEN_GATE)
    return upgraded


def reorder_patches(state_dict, rows_first):
    """
    Changes the order in which the source references expect the patches of the image, by moving their weights.

    Until 5 November 2024 the published code stacked patches by (column, row, channel), as ComfyUI's node still does.
    Since then it stacks them by (channel, row, column). Weights whose source is the whole image stay as they are.

    Args:
        state_dict (`dict[str, torch.Tensor]`): A cleaned state dict.
        rows_first (`bool`): Whether to change from the first order to the second, or back.

    Returns:
        `dict[str, torch.Tensor]`: A new state dict.
    """
    reordered = dict(state_dict)
    for level in (2, 3, 4, 5):
        key, side = f"decoder.ipt_blk{level}.conv1.weight", 2**level  # so many patches on each side of the image
        weight = state_dict.get(key)  # (64, 3·side², 3, 3)
        if weight is not None and weight.shape[1] == 3 * side**2:
            order = (side, side, 3) if rows_first else (3, side, side)
            swapped = weight.unflatten(1, order).transpose(1, 3)  # rows keep their place, columns and channels swap
            reordered[key] = swapped.flatten(1, 3).contiguous()
    return reordered


def read_state_dict(path):
    """
    Reads a checkpoint file and returns its state dict with the present names and layout.

    Raises:
        ValueError: The file is not a checkpoint of this network. The message says what it is.
    """
    from birefnet.repository.checkpoint_birefnet import clean_state_dict, read_checkpoint

    state_dict = clean_state_dict(read_checkpoint(path))
    return upgrade_old_layout(state_dict) if is_old_layout(state_dict) else state_dict


def build_config(fields):
    """Returns a `BiRefNetConfig` with the given fields and default values for the others."""
    from birefnet.repository.configuration_birefnet import BiRefNetConfig

    return BiRefNetConfig(**fields)


def build_processor(settings):
    """Returns a `BiRefNetImageProcessor` with the given settings and default values for the others."""
    from birefnet.repository.image_processing_birefnet import BiRefNetImageProcessor

    return BiRefNetImageProcessor(**settings)


def model_from_state_dict(config, state_dict, dtype=None):
    """
    Builds a model from a configuration and a complete state dict.

    Args:
        config (`BiRefNetConfig`): The configuration.
        state_dict (`dict[str, torch.Tensor]`): The cleaned state dict.
        dtype (`torch.dtype`, *optional*): Dtype of the model. Default: the dtype of the weights.

    Raises:
        ValueError: Weights are missing, unexpected or of another shape. The message names the first of them.
    """
    from birefnet.repository.modeling_birefnet import BiRefNetForImageSegmentation

    dtype = dtype or next(tensor.dtype for tensor in state_dict.values() if tensor.is_floating_point())
    model, report = BiRefNetForImageSegmentation.from_pretrained(
        None, config=config, state_dict=state_dict, dtype=dtype, output_loading_info=True
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[problem]:
            names = sorted(map(str, report[problem]))
            raise ValueError(f"{len(names)} {problem.replace('_keys', '')} weights; the first one is {names[0]}.")
    return model
