"""`birefnet train`: trains from scratch or fine-tunes, and leaves a complete model repository folder."""

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
from birefnet.training.augmentation import AugmentationSettings, size_before_crop
from birefnet.training.card import training_card
from birefnet.training.dataset import MattingDataset
from birefnet.training.imagenet_weights import load_imagenet_weights
from birefnet.training.low_rank import add_low_rank_adapters, merged
from birefnet.training.trainer import BiRefNetTrainer


logger = logging.getLogger(__name__)

# Fields of BiRefNetConfig that shape the network: given, they mean training from scratch.
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
# Fields that say how it learns: they go with fine-tuning as well.
LEARNING_FIELDS = {
    "drop_path_rate": "stochastic depth, in [0, 1)",
    "freeze_backbone": "true leaves the backbone as it is",
    "task": "chooses losses and recipe: dis, general or matting",
    "loss_weights": """instead of the task's: JSON such as '{"bce": 30, "ssim": 10}'""",
}

PUBLISHED_LEARNING_RATES = {"dis": 1e-4, "general": 1e-5, "matting": 1e-5}
PUBLISHED_EPOCHS = {"dis": 500, "general": 200, "matting": 150}
FINE_TUNING_EPOCHS = 20
DEFAULT_RESOLUTION = 1024

LESS_MEMORY = (
    "What takes less memory: --bf16, a smaller --batch-size with "
    "--gradient-accumulation-steps, --gradient-checkpointing, --lora-rank 8, a smaller --resolution."
)

EXAMPLES = """examples:
  fine-tune the weights in this repository on a folder with im/ and gt/
    birefnet train --data my_photos --output my_model --resolution 512
  fine-tune another model, validate on its own data
    birefnet train --model OWNER/NAME --data train/ --validation-data validation/ --output my_model --bf16
  train a small network from scratch
    birefnet train --backbone swin_v1_t --decoder-channels 32 --data 'train-*.parquet' --output my_model
  on a small GPU
    birefnet train --model ZhengPeng7/BiRefNet --data my_photos --output my_model --bf16 --batch-size 1 \\
        --gradient-accumulation-steps 4 --gradient-checkpointing --lora-rank 8
  on several GPUs
    accelerate launch --num_processes 4 -m birefnet train --data my_photos --output my_model
  go on after an interruption
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
    group.add_argument("--validation-data", nargs="+", metavar="SOURCE", help="likewise, to validate on")
    group.add_argument(
        "--validation-share",
        type=float,
        default=0.1,
        help="share of the data that is held out to validate on where there is no --validation-data (default: 0.1)",
    )
    group.add_argument("--image-column", default="image", help="column of the photos in tables (default: image)")
    group.add_argument("--mask-column", default="mask", help="column of the masks in tables (default: mask)")
    group.add_argument(
        "--on-bad-data",
        choices=("skip", "stop"),
        default="skip",
        help="unreadable photos, masks of another size, all-black masks, losses that are not finite: report and "
        "leave out, or stop (default: skip)",
    )
    group.add_argument(
        "--cache",
        choices=("auto", "memory", "device", "none"),
        default="auto",
        help="where resized photos are kept: in memory, in the memory of the training device, or nowhere "
        "(default: auto, in memory where they fit into half of what is free)",
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
        help="start the backbone of a new network from its ImageNet weights: those of FILE, or what timm fetches",
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
        help="give every batch its own height and width in this range (published: 256 2304); photos are validated at "
        "--resolution",
    )


def _add_schedule_arguments(group):
    group.add_argument("--batch-size", type=int, default=4, help="photos in a batch on each device (default: 4)")
    group.add_argument("--gradient-accumulation-steps", type=int, default=1, help="batches in an update (default: 1)")
    length = group.add_mutually_exclusive_group()
    length.add_argument(
        "--epochs",
        type=float,
        help=f"passes over the data (default: {FINE_TUNING_EPOCHS} to fine-tune; from scratch what was published "
        "for the task)",
    )
    length.add_argument("--max-steps", type=int, default=-1, help="number of updates, instead of --epochs")
    group.add_argument(
        "--last-epochs",
        type=int,
        help="epochs at the end with region-level losses (default: as published for the task)",
    )
    group.add_argument("--learning-rate", type=float, help="default: as published for task and batch size")
    group.add_argument("--backbone-learning-rate", type=float, help="default: that of the rest")
    group.add_argument(
        "--schedule",
        default="constant",
        choices=("constant", "constant_with_warmup", "linear", "cosine"),
        help="course of the learning rate (default: constant)",
    )
    group.add_argument("--warmup-steps", type=int, default=0, help="updates until the full learning rate (default: 0)")
    group.add_argument("--weight-decay", type=float, default=1e-2, help="default: 0.01")
    group.add_argument("--max-grad-norm", type=float, default=0.0, help="clips gradients to this norm (default: off)")
    group.add_argument(
        "--ema-decay", type=float, default=0.0, help="average the weights, as with 0.999 (default: off)"
    )
    precision = group.add_mutually_exclusive_group()
    precision.add_argument("--bf16", action="store_true", help="mixed precision in bfloat16")
    precision.add_argument("--fp16", action="store_true", help="mixed precision in float16")
    group.add_argument("--gradient-checkpointing", action="store_true", help="less memory, more time")
    group.add_argument("--compile", action="store_true", help="compile the network")
    group.add_argument("--cpu", action="store_true", help="train on the CPU even where there is a GPU")
    group.add_argument("--seed", type=int, default=42, help="default: 42")


def _add_augmentation_arguments(group):
    defaults = AugmentationSettings()
    group.add_argument("--flip", type=float, default=defaults.flip, help="probability of a flip (default: 0.5)")
    group.add_argument(
        "--crop", type=float, default=defaults.crop, help="smallest share of a side that crops keep (default: 1, none)"
    )
    group.add_argument("--rotate", type=float, default=defaults.rotate, help="probability of ±15° (default: 0.2)")
    group.add_argument("--noise", type=float, default=defaults.noise, help="share of noisy pixels (default: 0.0015)")
    group.add_argument(
        "--background", type=float, default=0.0, help="probability of another, plain background (default: 0)"
    )
    group.add_argument("--no-color", action="store_true", help="leave brightness, contrast, saturation, sharpness")


def _add_output_arguments(group):
    group.add_argument("--output", required=True, type=Path, help="folder of the trained model")
    group.add_argument(
        "--resume",
        nargs="?",
        const="last",
        metavar="CHECKPOINT",
        help="go on from a checkpoint folder (default: the last one under --output)",
    )
    group.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload the trained model to this repository")
    group.add_argument("--private", action="store_true", help="create that repository as a private one")
    group.add_argument("--save-steps", type=int, help="updates between checkpoints (default: one each epoch)")
    group.add_argument("--keep-checkpoints", type=int, default=2, help="how many checkpoints to keep (default: 2)")
    group.add_argument("--logging-steps", type=int, default=10, help="updates between log lines (default: 10)")


def config_value(text: str):
    """A configuration field from the command line: JSON, or the text itself; `none` stands for null.

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
    """Runs the command; returns its exit code.

    Raises:
        CommandError: What ends the training, in a sentence.
    """
    is_first = int(os.environ.get("RANK", 0)) == 0
    disable_progress_bar()  # of every weights file that is written; the training's own bar stays
    logging.basicConfig(level=logging.WARNING if is_first else logging.ERROR, format="%(message)s")
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
        `model`, the folder, and where there is validation the MAE of the model in it (`mae`), with that before
        training (`mae_before`) of a model that was fine-tuned.
    """
    checkpoint = find_checkpoint(arguments)
    if arguments.push_to_hub:
        _create_hub_repository(arguments)
    set_seed(arguments.seed)
    model, processor = build_model(arguments)
    trainer = build_trainer(arguments, model, processor, checkpoint)
    best = BestModelCallback(trainer, arguments)
    trainer.add_callback(best)
    # The data's order has a generator of its own; augmentation and dropout must differ between processes.
    torch.manual_seed(arguments.seed + trainer.args.process_index)
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.eval_dataset is None:
        best.save(trainer.state)
    trainer.save_state()
    if arguments.push_to_hub and trainer.args.should_save:
        _push(arguments)
    # A process that leaves with its connections to the others open can be aborted on the way out.
    trainer.accelerator.end_training()
    measured = {"mae_before": best.mae_before(trainer.state), "mae": trainer.state.best_metric}
    return {"model": str(arguments.output), **{name: value for name, value in measured.items() if value is not None}}


def build_trainer(arguments: argparse.Namespace, model, processor, checkpoint: str | None = None) -> BiRefNetTrainer:
    """The trainer with its data, schedule and logs, to start anew or from a checkpoint."""
    size = (processor.size["height"], processor.size["width"])
    settings = augmentation_settings(arguments)
    training_data, validation_data = build_datasets(arguments, size, settings)
    trainer = BiRefNetTrainer(
        model=model,
        args=training_arguments(arguments, model.config.task, training_data, validation_data, checkpoint),
        train_dataset=training_data,
        eval_dataset=validation_data,
        processing_class=processor,
        size=size,
        size_range=arguments.dynamic_resolution,
        augmentation=settings,
        backbone_learning_rate=arguments.backbone_learning_rate,
        average_decay=arguments.ema_decay,
        on_bad_loss=arguments.on_bad_data,
    )
    if arguments.cache == "device":
        training_data.pixels = training_data.pixels.to(trainer.args.device)
    trainer.add_callback(LossScheduleCallback(arguments.last_epochs))
    if is_tensorboard_available() and trainer.args.should_save:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(arguments.output / "logs"))
        trainer.add_callback(TensorBoardCallback(writer))
        trainer.add_callback(SampleMattesCallback(trainer, writer))
    return trainer


def build_model(arguments: argparse.Namespace):
    """The network, from scratch or with its weights, and the image processor at the training resolution."""
    learning = {field: value for field, value in vars(arguments).items() if field in LEARNING_FIELDS}
    if from_scratch(arguments):
        model, processor = _new_model(arguments, learning)
    else:
        if arguments.imagenet_backbone:
            raise UsageError("--imagenet-backbone is for training from scratch: name a --backbone or --init-config.")
        model, processor = load_model(arguments.model or repository_folder(), **learning)
    if arguments.lora_rank:
        add_low_rank_adapters(model, arguments.lora_rank)
    if arguments.gradient_checkpointing:
        # Its newer name in transformers; the older one warns there.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    _set_resolution(processor, arguments)
    # Convolutions are faster in this layout, on CPUs and GPUs; what is saved is the same.
    return model.to(memory_format=torch.channels_last), processor


def _new_model(arguments: argparse.Namespace, learning: dict):
    import birefnet.repository  # registers the model with the Auto classes

    given = {field: value for field, value in vars(arguments).items() if field in ARCHITECTURE_FIELDS}
    if arguments.model:
        options = ", ".join(f"--{field.replace('_', '-')}" for field in given) or "--init-config"
        raise UsageError(f"--model has its own network: leave out {options} to fine-tune, or --model to start new.")
    fields, source = {**given, **learning}, arguments.init_config
    config = AutoConfig.from_pretrained(source, **fields) if source else AutoConfig.for_model("birefnet", **fields)
    model = AutoModelForImageSegmentation.from_config(config)
    if arguments.imagenet_backbone:
        file = None if arguments.imagenet_backbone is True else arguments.imagenet_backbone
        load_imagenet_weights(model, file)
    return model, birefnet.repository.BiRefNetImageProcessor()


def _set_resolution(processor, arguments: argparse.Namespace):
    """Tells the processor the size of the pictures that the model is trained for."""
    default = DEFAULT_RESOLUTION if from_scratch(arguments) else processor.size["height"]
    side = arguments.resolution or default
    bounds = arguments.dynamic_resolution or ()
    for option, length in (("--resolution", side), *(("--dynamic-resolution", bound) for bound in bounds)):
        if length < 32 or length % 32:
            raise UsageError(f"{option} {length} is not a positive multiple of 32.")
    if bounds and bounds[0] > bounds[1]:
        raise UsageError(f"--dynamic-resolution {bounds[0]} {bounds[1]}: the smallest side comes first.")
    processor.size = {"height": side, "width": side}
    processor.do_dynamic_resize = bool(bounds)
    if bounds:
        processor.minimum_size, processor.maximum_size = bounds


def from_scratch(arguments: argparse.Namespace) -> bool:
    """Whether the options describe a new network."""
    return bool(arguments.init_config) or any(field in arguments for field in ARCHITECTURE_FIELDS)


def build_datasets(
    arguments: argparse.Namespace, size: tuple[int, int], settings: AugmentationSettings
) -> tuple[MattingDataset, MattingDataset | None]:
    """Training and validation data; the latter is held out of the former where it has no source of its own."""
    columns = (arguments.image_column, arguments.mask_column)
    pairs = read_pairs(arguments.data, *columns)
    if arguments.validation_data:
        held_out = read_pairs(arguments.validation_data, *columns)
    else:
        pairs, held_out = split_pairs(pairs, arguments.validation_share, arguments.seed)
    cache = {"auto": None, "none": False}.get(arguments.cache, True)
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    largest = (arguments.dynamic_resolution[1],) * 2 if arguments.dynamic_resolution else size
    training_data = MattingDataset(
        pairs, size_before_crop(largest, settings.crop), arguments.on_bad_data, cache, show_progress=first
    )
    if not held_out:
        return training_data, None
    return training_data, MattingDataset(held_out, size, arguments.on_bad_data, cache, show_progress=first)


def split_pairs(pairs: list[Pair], share: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Holds out a random share of the pairs, at least one of them unless the share is 0.

    Raises:
        UsageError: The share is not in [0, 1).
        ValueError: Nothing is left to train on.
    """
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
    """The options of augmentation."""
    still = dict.fromkeys(("brightness", "contrast", "saturation", "sharpness"), (1.0, 1.0))
    return AugmentationSettings(
        flip=arguments.flip,
        crop=arguments.crop,
        rotate=arguments.rotate,
        noise=arguments.noise,
        background=arguments.background,
        **(still if arguments.no_color else {}),
    )


def training_arguments(
    arguments: argparse.Namespace,
    task: str,
    training_data: MattingDataset,
    validation_data: MattingDataset | None,
    checkpoint: str | None = None,
) -> TrainingArguments:
    """The `TrainingArguments`, with the published recipe of the task where the options leave something open."""
    validates = validation_data is not None
    epochs = PUBLISHED_EPOCHS[task] if from_scratch(arguments) else FINE_TUNING_EPOCHS
    processes = int(os.environ.get("WORLD_SIZE", 1))
    batch = arguments.batch_size * arguments.gradient_accumulation_steps * processes
    return TrainingArguments(
        output_dir=str(checkpoints_folder(arguments.output)),
        per_device_train_batch_size=arguments.batch_size,
        per_device_eval_batch_size=arguments.batch_size,
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        num_train_epochs=epochs if arguments.epochs is None else arguments.epochs,
        max_steps=arguments.max_steps,
        learning_rate=arguments.learning_rate or PUBLISHED_LEARNING_RATES[task] * (batch / 4) ** 0.5,
        lr_scheduler_type=arguments.schedule,
        warmup_steps=arguments.warmup_steps,
        weight_decay=arguments.weight_decay,
        max_grad_norm=arguments.max_grad_norm,
        bf16=arguments.bf16,
        fp16=arguments.fp16,
        torch_compile=arguments.compile,
        use_cpu=arguments.cpu or not torch.accelerator.is_available(),  # else transformers refuses bf16 there
        seed=arguments.seed,
        eval_strategy="epoch" if validates else "no",
        eval_on_start=validates and starts_with_validation(arguments, checkpoint),
        save_strategy="steps" if arguments.save_steps else "epoch",
        save_steps=arguments.save_steps or 500,
        save_total_limit=arguments.keep_checkpoints,
        logging_steps=arguments.logging_steps,
        # A loss that is not finite is reported with its photos by the trainer, not hidden.
        logging_nan_inf_filter=False,
        report_to=[],
        remove_unused_columns=False,
        # A cached batch is one index operation; photos that are read anew are read ahead.
        dataloader_num_workers=min(8, os.cpu_count() or 1) if training_data.pixels is None else 0,
        dataloader_pin_memory=False,
    )


def starts_with_validation(arguments: argparse.Namespace, checkpoint: str | None) -> bool:
    """Whether there is something to validate before the first update.

    There is what fine-tuning starts from, for it should improve on it; and the end of an epoch whose checkpoint was
    written, as those of --save-steps are, before its validation.
    """
    if checkpoint is None:
        return not from_scratch(arguments)
    state = TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json"))
    validated = any("eval_mae" in entry and entry["step"] == state.global_step for entry in state.log_history)
    return state.epoch == int(state.epoch) and not validated


def checkpoints_folder(output: Path) -> Path:
    """Where the states to resume from are kept, apart from the model's own files."""
    return output / "checkpoints"


def find_checkpoint(arguments: argparse.Namespace) -> str | None:
    """The checkpoint to resume from, or `None` to start anew.

    Raises:
        FileNotFoundError: The named checkpoint is none.
        UsageError: There are checkpoints of an earlier run and no --resume.
    """
    folder = checkpoints_folder(arguments.output)
    # The state file is written last: without it the checkpoint is half written.
    states = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda path: int(path.parent.name[11:]))
    if arguments.resume is None:
        if states:
            raise UsageError(f"{folder} holds an earlier run: go on with --resume, or choose another --output.")
        return None
    if arguments.resume == "last":
        if not states:
            raise FileNotFoundError(f"{folder} holds no checkpoint to resume from.")
        return str(states[-1].parent)
    if not (Path(arguments.resume) / "trainer_state.json").exists():
        raise FileNotFoundError(f"{arguments.resume} is not a complete checkpoint: it lacks trainer_state.json.")
    return arguments.resume


class LossScheduleCallback(TrainerCallback):
    """Sets the loss weights of every epoch: a function of the epoch, so that a resumed run continues it."""

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
    """The published number of last epochs, or their published share of a training that is shorter."""
    from birefnet.repository.loss_birefnet import TASK_LAST_EPOCHS

    return min(TASK_LAST_EPOCHS[task], round(epochs * TASK_LAST_EPOCHS[task] / PUBLISHED_EPOCHS[task]))


class BestModelCallback(TrainerCallback):
    """Writes the model's folder whenever the validation's MAE is the lowest so far.

    The folder is complete at every moment of the training, and what fine-tuning started from is its first content.
    """

    def __init__(self, trainer: BiRefNetTrainer, arguments: argparse.Namespace):
        self.trainer, self.arguments = trainer, arguments

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if state.best_metric is not None and metrics["eval_mae"] >= state.best_metric:
            return
        state.best_metric = metrics["eval_mae"]
        self.save(state, metrics)

    def save(self, state, metrics: dict[str, float] | None = None):
        """Writes the folder of the model as it is now."""
        if self.trainer.args.should_save:
            card = training_card(self.arguments, self.trainer, state, metrics or {})
            save_model_folder(self.trainer, self.arguments.output, card)

    @staticmethod
    def mae_before(state) -> float | None:
        """The validation's MAE before the first update, if it was measured."""
        return next(
            (entry["eval_mae"] for entry in state.log_history if entry["step"] == 0 and "eval_mae" in entry), None
        )


class SampleMattesCallback(TrainerCallback):
    """Shows a few validation photos with mask and matte in TensorBoard."""

    count = 4

    def __init__(self, trainer: BiRefNetTrainer, writer):
        self.trainer, self.writer = trainer, writer

    def on_evaluate(self, args, state, control, **kwargs):
        total = len(self.trainer.eval_dataset)
        for row in range(0, total, -(-total // self.count)):
            self.writer.add_image(f"validation/{row}", self.trainer.sample_matte(row), state.global_step)


def save_model_folder(trainer: BiRefNetTrainer, folder: Path, card: str):
    """Writes weights, configuration, processor, code and card: all that `from_pretrained` and `birefnet` need.

    Everything is written beside its place first and then moved, so that an interruption leaves the former files.
    """
    partial = folder / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_folder(partial, merged(trainer.trained_model), trainer.processing_class, card)
    for path in partial.iterdir():
        os.replace(path, folder / path.name)
    partial.rmdir()


def _create_hub_repository(arguments: argparse.Namespace):
    """Creates the repository before training, so that a missing permission shows now and not after it."""
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
