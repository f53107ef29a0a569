"""`birefnet train`: fine-tunes a model or trains a new one, and writes a complete model repository folder."""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageSegmentation,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import TensorBoardCallback, is_tensorboard_available
from transformers.utils.logging import disable_progress_bar

from birefnet import repository_folder
from birefnet.data.pairs import Pair, read_pairs
from birefnet.errors import CommandError, UsageError
from birefnet.hub.folders import write_folder
from birefnet.inference.loading import load_model
from birefnet.training.augmentation import AugmentationSettings, color_ranges, size_before_crop
from birefnet.training.card import training_card
from birefnet.training.dataset import MattingDataset
from birefnet.training.imagenet_weights import load_imagenet_weights
from birefnet.training.low_rank import add_low_rank_adapters, merged
from birefnet.training.progress import (
    CURVE_FILE,
    SHEET_FILE,
    SampleMattes,
    ValidationWatch,
    course_of,
    draw_curve,
    error_of,
    results,
    verdict,
)
from birefnet.training.recipes import (
    PUBLISHED_EPOCHS,
    Recipe,
    backbone_kind,
    computes_in_bfloat16,
    fill_in,
    fine_tuning_recipe,
    published_recipe,
)
from birefnet.training.trainer import BiRefNetTrainer


logger = logging.getLogger(__name__)

# Fields of BiRefNetConfig that shape the network. Any of these options starts a new network.
ARCHITECTURE_FIELDS = {
    "backbone": "of a new network: swin_v1_t/s/b/l, dino_v3_s/s_plus/b/l/h_plus/7b, or a timm model's name",
    "multi_scale_input": "of a new network: concat, add or none",
    "context_levels": "of a new network: 3 or 0",
    "squeeze_block": "of a new network: basic, residual, aspp, aspp_deformable or none",
    "decoder_block": "of a new network: basic or residual",
    "decoder_attention": "of a new network: aspp_deformable, aspp or none",
    "decoder_channels": "of a new network: a number, or none for a quarter of each block's input",
    "source_reference": "of a new network: patches, image or none",
    "gradient_reference": "of a new network: true or false",
    "multi_scale_supervision": "of a new network: true or false",
}
# Fields of BiRefNetConfig that change only the training. They are allowed in fine-tuning too.
LEARNING_FIELDS = {
    "drop_path_rate": "stochastic depth of a Swin backbone, in [0, 1)",
    "freeze_backbone": "true leaves the backbone as it is",
    "task": "chooses losses and recipe: dis, general or matting",
    "loss_weights": """instead of the task's: JSON such as '{"bce": 30, "ssim": 10}'""",
}

DEFAULT_RESOLUTION = 1024  # of new networks

LESS_MEMORY = (
    "To save memory: --bf16, a smaller --batch-size with --gradient-accumulation-steps, --gradient-checkpointing, "
    "--lora-rank 8, or a smaller --resolution."
)

EXAMPLES = """examples:
  fine-tune the weights in this repository on a folder with im/ (photos) and gt/ (masks of the same names)
    birefnet train --data my_photos --output my_model
  fine-tune another model, validate on its own data
    birefnet train --model OWNER/NAME --data train/ --validation-data validation/ --output my_model --bf16
  train a small network from scratch, as published
    birefnet train --backbone swin_v1_t --decoder-channels 32 --data 'train-*.parquet' --output my_model
  on a small GPU
    birefnet train --model ZhengPeng7/BiRefNet --data my_photos --output my_model --bf16 --batch-size 1 \\
        --gradient-accumulation-steps 4 --gradient-checkpointing --lora-rank 8
  on several GPUs
    accelerate launch --num_processes 4 -m birefnet train --data my_photos --output my_model
  continue after an interruption
    birefnet train … (the same arguments) --resume
"""


def add_arguments(parser: argparse.ArgumentParser):
    """Declares the command's options."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    _add_data_arguments(parser.add_argument_group("data"))
    _add_model_arguments(parser.add_argument_group("model"))
    _add_schedule_arguments(parser.add_argument_group("training"))
    _add_augmentation_arguments(parser.add_argument_group("augmentation"))
    _add_output_arguments(parser.add_argument_group("output"))


def _add_data_arguments(group):
    group.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="SOURCE",
        help="folders with im/ and gt/, parquet files, globs, or Hub data sets (owner/name or owner/name:split)",
    )
    group.add_argument("--validation-data", nargs="+", metavar="SOURCE", help="data to validate on, in the same forms")
    group.add_argument(
        "--validation-share",
        type=float,
        help="share of the data to hold out for validation if there is no --validation-data (default: 0.1, at least "
        "4 photos if there are 20 or more)",
    )
    group.add_argument("--image-column", default="image", help="column of the photos in tables (default: image)")
    group.add_argument("--mask-column", default="mask", help="column of the masks in tables (default: mask)")
    group.add_argument(
        "--on-bad-data",
        choices=("skip", "stop"),
        default="skip",
        help="what to do with unreadable photos, masks of another size, all-black masks and losses that are not "
        "finite: report and skip them, or stop (default: skip)",
    )
    group.add_argument(
        "--cache",
        choices=("auto", "memory", "device", "none"),
        default="auto",
        help="where to keep resized photos: in memory, in the memory of the training device, or nowhere "
        "(default: auto, in memory if they fit into half of the free memory)",
    )


def _add_model_arguments(group):
    group.add_argument(
        "--model",
        help="model to fine-tune: a folder, a Hub id, a file of weights, or a name that `birefnet variants` lists "
        "(default: the weights in this repository)",
    )
    group.add_argument("--init-config", help="config.json, or a folder with one, of a network to train from scratch")
    for field, text in {**ARCHITECTURE_FIELDS, **LEARNING_FIELDS}.items():
        option = f"--{field.replace('_', '-')}"
        group.add_argument(option, type=config_value, default=argparse.SUPPRESS, metavar="VALUE", help=text)
    group.add_argument(
        "--imagenet-backbone",
        nargs="?",
        const=True,
        metavar="FILE",
        help="start the backbone of a new network from ImageNet weights: from FILE, or downloaded by timm",
    )
    group.add_argument(
        "--lora-rank", type=int, help="train low-rank adapters of the backbone instead of the backbone itself"
    )
    group.add_argument("--resolution", type=int, help="side of the training pictures (default: the model's own)")
    group.add_argument(
        "--dynamic-resolution",
        type=int,
        nargs=2,
        metavar=("SMALLEST", "LARGEST"),
        help="give each batch a random height and width in this range (published: 256 2304); validation uses "
        "--resolution",
    )


def _add_schedule_arguments(group):
    group.add_argument(
        "--recipe",
        choices=("fine-tuning", "published"),
        help="default settings for all options below: safe ones for fine-tuning on few photos, or the published ones "
        "for a long training on several GPUs (default: fine-tuning for a trained model, published for a new network)",
    )
    group.add_argument("--batch-size", type=int, default=4, help="photos in a batch on each device (default: 4)")
    group.add_argument("--gradient-accumulation-steps", type=int, default=1, help="batches in an update (default: 1)")
    length = group.add_mutually_exclusive_group()
    length.add_argument(
        "--epochs",
        type=float,
        help="passes over the data (fine-tuning: about 80 updates, in 2 to 40 epochs; published: 200 for the "
        "general task, a tenth of it for a trained model)",
    )
    length.add_argument("--max-steps", type=int, default=-1, help="number of updates, instead of --epochs")
    group.add_argument(
        "--last-epochs", type=int, help="epochs at the end with region-level losses (fine-tuning: 0; published: 20)"
    )
    group.add_argument(
        "--learning-rate",
        type=float,
        help="fine-tuning: 2e-4, or 5e-5 for transformers; published: 1e-5 · √(batch/4), for dis ten times that",
    )
    group.add_argument(
        "--backbone-learning-rate",
        type=float,
        help="fine-tuning: 1e-4, or 1e-5 for transformers, or --learning-rate if it is lower; published: the same as "
        "--learning-rate",
    )
    group.add_argument(
        "--schedule",
        choices=("constant", "constant_with_warmup", "linear", "cosine"),
        help="learning rate schedule (fine-tuning: cosine; published: constant)",
    )
    group.add_argument(
        "--warmup-steps",
        type=float,
        help="updates until the full learning rate, or below 1 their share (fine-tuning: 0.2; published: 0)",
    )
    group.add_argument("--weight-decay", type=float, help="default: 0.01")
    group.add_argument(
        "--max-grad-norm", type=float, help="clip gradients to this norm (fine-tuning: 1; published: 0, off)"
    )
    group.add_argument(
        "--ema-decay", type=float, help="moving average of the weights (fine-tuning: 0.98; published: 0, off)"
    )
    precision = group.add_mutually_exclusive_group()
    precision.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        help="mixed precision in bfloat16 (fine-tuning: if the device has fast bfloat16; published: off)",
    )
    precision.add_argument("--fp16", action="store_true", help="mixed precision in float16")
    group.add_argument("--gradient-checkpointing", action="store_true", help="less memory, more time")
    group.add_argument("--compile", action="store_true", help="compile the network")
    group.add_argument("--cpu", action="store_true", help="train on the CPU even if there is a GPU")
    group.add_argument("--seed", type=int, default=42, help="default: 42")


def _add_augmentation_arguments(group):
    group.add_argument("--flip", type=float, help="probability of a horizontal flip (default: 0.5)")
    group.add_argument(
        "--crop",
        type=float,
        help="smallest share of a side that crops keep (fine-tuning: 0.8; published: 1, no crops)",
    )
    group.add_argument("--rotate", type=float, help="probability of a rotation by up to ±15° (default: 0.2)")
    group.add_argument("--noise", type=float, help="share of noisy pixels (fine-tuning: 0; published: 0.0015)")
    group.add_argument(
        "--background",
        type=float,
        default=0.0,
        help="probability of a plain background instead of the photo's own (default: 0)",
    )
    group.add_argument(
        "--no-color",
        dest="color",
        action="store_const",
        const=0.0,
        help="do not change brightness, contrast, saturation and sharpness (fine-tuning changes them by 0.4 of the "
        "published strength)",
    )


def _add_output_arguments(group):
    group.add_argument("--output", required=True, type=Path, help="folder of the trained model")
    group.add_argument(
        "--resume",
        nargs="?",
        const="last",
        metavar="CHECKPOINT",
        help="continue from a checkpoint folder (default: the last one under --output)",
    )
    group.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload the trained model to this repository")
    group.add_argument("--private", action="store_true", help="create that repository as a private one")
    group.add_argument("--save-steps", type=int, help="updates between checkpoints (default: one each epoch)")
    group.add_argument("--keep-checkpoints", type=int, default=2, help="how many checkpoints to keep (default: 2)")
    group.add_argument("--logging-steps", type=int, default=10, help="updates between log lines (default: 10)")


def config_value(text: str):
    """Parses a configuration field from the command line: JSON, else plain text. `none` means null.

    >>> config_value("64"), config_value("none"), config_value("concat"), config_value("false")
    (64, None, 'concat', False)
    """
    if text.lower() in ("none", "true", "false"):
        return {"none": None, "true": True, "false": False}[text.lower()]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def run(arguments: argparse.Namespace) -> int:
    """Runs the command and returns its exit code.

    Raises:
        CommandError: The training cannot go on. The message says why.
    """
    is_first = int(os.environ.get("RANK", 0)) == 0
    disable_progress_bar()  # Hides the bar of each weights file. The training's own bar stays.
    logging.basicConfig(level=logging.WARNING if is_first else logging.ERROR, format="%(message)s")
    logging.getLogger("birefnet.training").setLevel(logging.INFO if is_first else logging.ERROR)
    try:
        result = train(arguments)
    except torch.OutOfMemoryError as error:
        raise CommandError(f"{error}\n{LESS_MEMORY}") from error
    except (FloatingPointError, ImportError, OSError, ValueError) as error:
        raise CommandError(str(error)) from error
    if is_first:
        print(json.dumps(result))
    return 0


def train(arguments: argparse.Namespace) -> dict[str, float | str]:
    """Trains as the options say and writes the model's folder.

    Returns:
        `model`, the folder, and `result`, the verdict in words. With validation data also `mae` and `iou` of the
        model in the folder, `mae_last` and `iou_last` after the last epoch, and, in fine-tuning, `mae_before` and
        `iou_before`.
    """
    checkpoint = find_checkpoint(arguments)
    if arguments.push_to_hub:
        _create_hub_repository(arguments)
    set_seed(arguments.seed)
    model, processor = build_model(arguments)
    trainer = build_trainer(arguments, model, processor, checkpoint)
    best = BestModelCallback(trainer, arguments)
    trainer.add_callback(best)
    # The data's order has a generator of its own. Augmentation and dropout must differ between processes.
    torch.manual_seed(arguments.seed + trainer.args.process_index)
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.eval_dataset is None:
        best.save(trainer.state)
    trainer.save_state()
    if trainer.args.should_save:
        write_report(trainer, arguments)
        if arguments.push_to_hub:
            _push(arguments)
    # A process that exits while its connections to the others are open can be aborted.
    trainer.accelerator.end_training()
    course = course_of(trainer.state)
    validated = len(trainer.eval_dataset) if trainer.eval_dataset else 0
    return {"model": str(arguments.output), "result": verdict(course, validated), **results(course)}


def build_trainer(arguments: argparse.Namespace, model, processor, checkpoint: str | None = None) -> BiRefNetTrainer:
    """Builds the trainer with its data, schedule and logs. Fills in all options that were left open."""
    size = (processor.size["height"], processor.size["width"])
    pairs, held_out = read_data(arguments)
    recipe = choose_recipe(arguments, model.config, len(pairs))
    _fill_in(arguments, recipe)
    settings = augmentation_settings(arguments)
    training_data, validation_data = build_datasets(arguments, pairs, held_out, size, settings)
    trainer = BiRefNetTrainer(
        model=model,
        args=training_arguments(arguments, training_data, validation_data, checkpoint),
        train_dataset=training_data,
        eval_dataset=validation_data,
        processing_class=processor,
        size=size,
        size_range=arguments.dynamic_resolution,
        augmentation=settings,
        backbone_learning_rate=arguments.backbone_learning_rate,
        average_decay=arguments.ema_decay,
        on_bad_loss=arguments.on_bad_data,
        batch_statistics=recipe.batch_statistics,
    )
    if arguments.cache == "device":
        training_data.pixels = training_data.pixels.to(trainer.args.device)
    trainer.add_callback(LossScheduleCallback(arguments.last_epochs))
    if validation_data is not None:
        trainer.add_callback(ValidationWatch())
    if trainer.args.should_save:
        _add_logs(trainer, arguments)
    return trainer


def _add_logs(trainer: BiRefNetTrainer, arguments: argparse.Namespace):
    """Adds TensorBoard, if it is installed, and sample mattes."""
    writer = None
    if is_tensorboard_available():
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(arguments.output / "logs"))
        trainer.add_callback(TensorBoardCallback(writer))
    if trainer.eval_dataset is not None:
        trainer.add_callback(SampleMattes(trainer, samples_folder(arguments.output), writer))


def choose_recipe(arguments: argparse.Namespace, config, photos: int) -> Recipe:
    """The recipe that --recipe names. By default, trained models are fine-tuned and new networks train as published.

    Args:
        arguments: The options.
        config: Configuration of the network.
        photos: Number of training photos.
    """
    processes = int(os.environ.get("WORLD_SIZE", 1))
    batch = arguments.batch_size * arguments.gradient_accumulation_steps * processes
    is_new = from_scratch(arguments)
    if (arguments.recipe or ("published" if is_new else "fine-tuning")) == "published":
        if not is_new:
            logger.warning(
                "--recipe published mixes the statistics of small batches into a trained model's batch norms. This "
                "can make the model useless. Without the option, the statistics stay as they are."
            )
        return published_recipe(config.task, batch, fine_tunes=not is_new)
    return fine_tuning_recipe(photos, batch, backbone_kind(config.backbone))


def _fill_in(arguments: argparse.Namespace, recipe: Recipe):
    """Fills in the options that were left open."""
    if arguments.backbone_learning_rate is None and arguments.learning_rate is not None:
        rate = recipe.backbone_learning_rate
        arguments.backbone_learning_rate = None if rate is None else min(rate, arguments.learning_rate)
    fill_in(arguments, recipe)
    if arguments.bf16 is None:
        has_accelerator = torch.accelerator.is_available() and not arguments.cpu
        device = torch.accelerator.current_accelerator() if has_accelerator else torch.device("cpu")
        arguments.bf16 = not recipe.batch_statistics and not arguments.fp16 and computes_in_bfloat16(device)


def build_model(arguments: argparse.Namespace):
    """Builds the network, new or with trained weights, and the image processor at the training resolution."""
    from birefnet.repository.configuration_birefnet import SWIN_BACKBONES

    learning = {field: value for field, value in vars(arguments).items() if field in LEARNING_FIELDS}
    if from_scratch(arguments):
        model, processor = _new_model(arguments, learning)
    else:
        if arguments.imagenet_backbone:
            raise UsageError("--imagenet-backbone is for training from scratch: name a --backbone or --init-config.")
        model, processor = load_model(arguments.model or repository_folder(), **learning)
    if learning.get("drop_path_rate") and model.config.backbone not in SWIN_BACKBONES:
        raise UsageError(
            f"--drop-path-rate: backbone {model.config.backbone!r} has no stochastic depth. Leave the option out, "
            f"or train one of {', '.join(SWIN_BACKBONES)}."
        )
    if arguments.lora_rank:
        add_low_rank_adapters(model, arguments.lora_rank)
    if arguments.gradient_checkpointing:
        # transformers has renamed this method. The old name warns in new versions.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    _set_resolution(processor, arguments)
    # Convolutions are faster in this layout on CPUs and GPUs. It does not change the saved file.
    return model.to(memory_format=torch.channels_last), processor


def _new_model(arguments: argparse.Namespace, learning: dict):
    from birefnet.inference.registration import register_model
    from birefnet.repository.image_processing_birefnet import BiRefNetImageProcessor

    register_model()
    given = {field: value for field, value in vars(arguments).items() if field in ARCHITECTURE_FIELDS}
    if arguments.model:
        options = ", ".join(f"--{field.replace('_', '-')}" for field in given) or "--init-config"
        raise UsageError(
            f"--model and {options} exclude each other: a trained model has its own network. Leave out {options} to "
            "fine-tune, or --model to train a new network."
        )
    fields, source = {**given, **learning}, arguments.init_config
    config = AutoConfig.from_pretrained(source, **fields) if source else AutoConfig.for_model("birefnet", **fields)
    model = AutoModelForImageSegmentation.from_config(config)
    if arguments.imagenet_backbone:
        file = None if arguments.imagenet_backbone is True else arguments.imagenet_backbone
        load_imagenet_weights(model, file)
    return model, BiRefNetImageProcessor()


def _set_resolution(processor, arguments: argparse.Namespace):
    """Sets the processor's picture size to the size that the model is trained at."""
    default = DEFAULT_RESOLUTION if from_scratch(arguments) else processor.size["height"]
    side = arguments.resolution or default
    bounds = arguments.dynamic_resolution or ()
    for option, length in (("--resolution", side), *(("--dynamic-resolution", bound) for bound in bounds)):
        if length < 32 or length % 32:
            raise UsageError(f"{option} {length} is not a positive multiple of 32.")
    if bounds and bounds[0] > bounds[1]:
        raise UsageError(f"--dynamic-resolution {bounds[0]} {bounds[1]}: give the smaller side first.")
    processor.size = {"height": side, "width": side}
    processor.do_dynamic_resize = bool(bounds)
    if bounds:
        processor.minimum_size, processor.maximum_size = bounds


def from_scratch(arguments: argparse.Namespace) -> bool:
    """Whether the options ask for a new network."""
    return bool(arguments.init_config) or any(field in arguments for field in ARCHITECTURE_FIELDS)


def read_data(arguments: argparse.Namespace) -> tuple[list[Pair], list[Pair]]:
    """Lists the pairs to train on and those to validate on. Without --validation-data the latter are held out."""
    columns = (arguments.image_column, arguments.mask_column)
    pairs = read_pairs(arguments.data, *columns)
    if arguments.validation_data:
        return pairs, read_pairs(arguments.validation_data, *columns)
    return split_pairs(pairs, arguments.validation_share, arguments.seed)


def build_datasets(
    arguments: argparse.Namespace,
    pairs: list[Pair],
    held_out: list[Pair],
    size: tuple[int, int],
    settings: AugmentationSettings,
) -> tuple[MattingDataset, MattingDataset | None]:
    """Training and validation data; `None` for the latter if no pair is held out."""
    cache = {"auto": None, "none": False}.get(arguments.cache, True)
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    largest = (arguments.dynamic_resolution[1],) * 2 if arguments.dynamic_resolution else size
    training_data = MattingDataset(
        pairs, size_before_crop(largest, settings.crop), arguments.on_bad_data, cache, show_progress=first
    )
    if not held_out:
        return training_data, None
    return training_data, MattingDataset(held_out, size, arguments.on_bad_data, cache, show_progress=first)


def split_pairs(pairs: list[Pair], share: float | None, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Holds out a random share of the pairs, at least one pair unless the share is 0.

    Args:
        pairs: All pairs.
        share: In [0, 1). `None`: a tenth, but at least 4 of 20 or more pairs, because an average over fewer photos
            says little.
        seed: Chooses the pairs.

    Raises:
        UsageError: The share is not in [0, 1).
        ValueError: Nothing is left to train on.
    """
    if share is None:
        share = max(0.1, 4 / len(pairs)) if len(pairs) >= 20 else 0.1
    if not 0 <= share < 1:
        raise UsageError(f"--validation-share {share} is not at least 0 and below 1.")
    count = max(1, round(share * len(pairs))) if share else 0
    if count >= len(pairs):
        raise ValueError(f"{len(pairs)} pairs cannot be split: nothing is left to train on.")
    held_out = set(random.Random(seed).sample(range(len(pairs)), count))
    return (
        [pair for row, pair in enumerate(pairs) if row not in held_out],
        [pairs[row] for row in sorted(held_out)],
    )


def augmentation_settings(arguments: argparse.Namespace) -> AugmentationSettings:
    """The settings of the augmentation options."""
    return AugmentationSettings(
        flip=arguments.flip,
        crop=arguments.crop,
        rotate=arguments.rotate,
        noise=arguments.noise,
        background=arguments.background,
        **color_ranges(arguments.color),
    )


def training_arguments(
    arguments: argparse.Namespace,
    training_data: MattingDataset,
    validation_data: MattingDataset | None,
    checkpoint: str | None = None,
) -> TrainingArguments:
    """The `TrainingArguments` of options without open values."""
    validates = validation_data is not None
    return TrainingArguments(
        output_dir=str(checkpoints_folder(arguments.output)),
        per_device_train_batch_size=arguments.batch_size,
        per_device_eval_batch_size=arguments.batch_size,
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        num_train_epochs=arguments.epochs,
        max_steps=arguments.max_steps,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type=arguments.schedule,
        warmup_steps=arguments.warmup_steps,
        weight_decay=arguments.weight_decay,
        max_grad_norm=arguments.max_grad_norm,
        bf16=arguments.bf16,
        fp16=arguments.fp16,
        torch_compile=arguments.compile,
        # Without this, transformers refuses bf16 on a machine that has no accelerator.
        use_cpu=arguments.cpu or not torch.accelerator.is_available(),
        seed=arguments.seed,
        eval_strategy="epoch" if validates else "no",
        eval_on_start=validates and starts_with_validation(arguments, checkpoint),
        save_strategy="steps" if arguments.save_steps else "epoch",
        save_steps=arguments.save_steps or 500,
        save_total_limit=arguments.keep_checkpoints,
        logging_steps=arguments.logging_steps,
        # The trainer reports losses that are not finite together with their photos. Do not hide them.
        logging_nan_inf_filter=False,
        report_to=[],
        remove_unused_columns=False,
        # A batch from the cache is one index operation. Photos that are read anew are read ahead by workers.
        dataloader_num_workers=min(8, os.cpu_count() or 1) if training_data.pixels is None else 0,
        dataloader_pin_memory=False,
    )


def starts_with_validation(arguments: argparse.Namespace, checkpoint: str | None) -> bool:
    """Whether to validate before the first update.

    Fine-tuning measures the model that it starts from. A resumed run validates first if its checkpoint was written at
    the end of an epoch but before that epoch's validation, which happens with --save-steps.
    """
    if checkpoint is None:
        return not from_scratch(arguments)
    state = TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json"))
    validated = any("eval_mae" in entry and entry["step"] == state.global_step for entry in state.log_history)
    return state.epoch == int(state.epoch) and not validated


def checkpoints_folder(output: Path) -> Path:
    """The folder of the states to resume from. The model's own files lie beside it."""
    return output / "checkpoints"


def samples_folder(output: Path) -> Path:
    """The folder of the sample mattes that the contact sheet is made of."""
    return checkpoints_folder(output) / "samples"


def find_checkpoint(arguments: argparse.Namespace) -> str | None:
    """The checkpoint to resume from, or `None` to start anew.

    Raises:
        FileNotFoundError: The given folder is no complete checkpoint.
        UsageError: The output folder holds checkpoints of an earlier run, and --resume was not given.
    """
    folder = checkpoints_folder(arguments.output)
    # The state file is written last. A checkpoint without it is incomplete.
    states = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda path: int(path.parent.name[11:]))
    if arguments.resume is None:
        if states:
            raise UsageError(f"{folder} holds an earlier run: continue it with --resume, or choose another --output.")
        return None
    if arguments.resume == "last":
        if not states:
            raise FileNotFoundError(f"{folder} holds no checkpoint to resume from.")
        return str(states[-1].parent)
    if not (Path(arguments.resume) / "trainer_state.json").exists():
        raise FileNotFoundError(f"{arguments.resume} is not a complete checkpoint: it lacks trainer_state.json.")
    return arguments.resume


class LossScheduleCallback(TrainerCallback):
    """Sets the loss weights at the start of each epoch, from the epoch alone, so resumed runs have the same."""

    def __init__(self, last_epochs: int | None):
        self.last_epochs = last_epochs

    def on_epoch_begin(self, args, state, control, model=None, **kwargs):
        from birefnet.repository.loss_birefnet import loss_weights_at_epoch

        task, epochs = model.config.task, state.num_train_epochs
        last_epochs = default_last_epochs(task, epochs) if self.last_epochs is None else self.last_epochs
        model.loss_function.weights = loss_weights_at_epoch(
            task, int(state.epoch or 0), epochs, last_epochs, model.config.loss_weights
        )


def default_last_epochs(task: str, epochs: int) -> int:
    """The published number of last epochs. A shorter training gets the same share of its epochs."""
    from birefnet.repository.loss_birefnet import TASK_LAST_EPOCHS

    return min(TASK_LAST_EPOCHS[task], round(epochs * TASK_LAST_EPOCHS[task] / PUBLISHED_EPOCHS[task]))


class BestModelCallback(TrainerCallback):
    """Writes the model's folder whenever the validation error, MAE + (1 − IoU), is the lowest so far.

    The folder is complete at any time during the training. In fine-tuning it first holds the model as it was.
    """

    def __init__(self, trainer: BiRefNetTrainer, arguments: argparse.Namespace):
        self.trainer, self.arguments = trainer, arguments

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        error = error_of(metrics["eval_mae"], metrics["eval_iou"])
        if state.best_metric is not None and error >= state.best_metric:
            return
        state.best_metric = error
        self.save(state)

    def save(self, state):
        """Writes the folder of the model as it is now."""
        if self.trainer.args.should_save:
            save_model_folder(self.trainer, self.arguments.output, training_card(self.arguments, self.trainer, state))


def write_report(trainer: BiRefNetTrainer, arguments: argparse.Namespace):
    """Writes curve and contact sheet beside the model, and the whole course into its card. Logs the verdict."""
    folder, course = arguments.output, course_of(trainer.state)
    if course.last is not None:
        draw_curve(course, trainer.state, folder / CURVE_FILE)
        samples = next(c for c in trainer.callback_handler.callbacks if isinstance(c, SampleMattes))
        samples.sheet(course).save(folder / SHEET_FILE)
    card = folder / "README.md"
    partial = card.with_suffix(".partial")
    partial.write_text(training_card(arguments, trainer, trainer.state, is_final=True), encoding="utf-8")
    os.replace(partial, card)
    logger.info("%s", verdict(course, len(trainer.eval_dataset) if trainer.eval_dataset else 0))


def save_model_folder(trainer: BiRefNetTrainer, folder: Path, card: str):
    """Writes weights, configuration, processor, code and card: all files that `from_pretrained` and `birefnet` need.

    The files are written to a folder beside their place and then moved, so an interruption leaves the earlier files.
    """
    partial = folder / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_folder(partial, merged(trainer.trained_model), trainer.processing_class, card)
    for path in partial.iterdir():
        os.replace(path, folder / path.name)
    partial.rmdir()


def _create_hub_repository(arguments: argparse.Namespace):
    """Creates the repository before the training, so that a missing permission shows at once."""
    from huggingface_hub import HfApi

    if int(os.environ.get("RANK", 0)) == 0:
        HfApi().create_repo(arguments.push_to_hub, private=arguments.private, exist_ok=True)


def _push(arguments: argparse.Namespace):
    from huggingface_hub import HfApi

    HfApi().upload_folder(
        repo_id=arguments.push_to_hub,
        folder_path=arguments.output,
        ignore_patterns=["checkpoints/*", "logs/*"],
        commit_message="Model trained with birefnet train",
    )
