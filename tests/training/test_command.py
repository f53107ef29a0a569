"""`birefnet train` on drawn photos, with a network of half a million weights."""

import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


pytest.importorskip("timm")
pytest.importorskip("kornia")
pytest.importorskip("accelerate")

from birefnet.errors import CommandError, UsageError
from birefnet.inference.loading import load_model
from birefnet.training import command as training
from birefnet.training import recipes
from birefnet.training.augmentation import AugmentationSettings
from birefnet.training.progress import TITLE_HEIGHT

from ..conftest import TINY_CONFIG
from ..drawn_photos import write_folder
from ..hub_server import LoopbackHub


pytestmark = pytest.mark.usefixtures("one_thread")


TINY_NETWORK = [
    word
    for field, value in TINY_CONFIG.items()
    for word in (f"--{field.replace('_', '-')}", str(value).lower() if value is not None else "none")
]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("photos"), [f"photo{i:02}" for i in range(14)], size=(64, 64))


def parse(*words):
    parser = argparse.ArgumentParser()
    training.add_arguments(parser)
    return parser.parse_args([str(word) for word in words])


def options(photos, output, *more, new=True):
    """Options of a quick training: 14 photos, 2 of them held out, 3 updates in each epoch."""
    network = TINY_NETWORK if new else []
    quick = ["--batch-size", 4, "--validation-share", 0.15, "--resolution", 64, "--logging-steps", 1, "--cpu"]
    return parse("--data", photos, "--output", output, *quick, *network, *more)


def history(folder, key="loss"):
    entries = json.loads((folder / "checkpoints" / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry[key] for entry in entries if key in entry}


def best_step(folder):
    """The step with the lowest MAE + (1 − IoU)."""
    errors, ious = history(folder, "eval_mae"), history(folder, "eval_iou")
    return min(errors, key=lambda step: errors[step] + 1 - ious[step])


def load(folder):
    from transformers import AutoModelForImageSegmentation

    return AutoModelForImageSegmentation.from_pretrained(folder, trust_remote_code=True)


# Resuming

LONG = ["--epochs", 3, "--learning-rate", 1e-3, "--schedule", "cosine", "--ema-decay", 0.8, "--crop", 0.8,
        "--background", 0.5, "--last-epochs", 2, "--save-steps", 1, "--keep-checkpoints", 20]  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(photos, one_thread, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    training.train(options(photos, folder, *LONG))
    return folder


@pytest.mark.parametrize("step", [4, 6], ids=["within an epoch", "between epochs"])
def test_resumed_run_equals_the_uninterrupted_one(photos, uninterrupted, tmp_path, step):
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / f"checkpoint-{step}").symlink_to(uninterrupted / "checkpoints" / f"checkpoint-{step}")
    (checkpoints / "checkpoint-9").mkdir()  # An incomplete checkpoint without a state is ignored.
    training.train(options(photos, tmp_path, *LONG, "--resume"))
    for key in ("loss", "grad_norm", "learning_rate", "loss_mae", "eval_mae", "eval_iou"):
        assert history(tmp_path, key) == history(uninterrupted, key), key
    assert sorted(history(tmp_path)) == list(range(1, 10))
    for name in (
        "checkpoints/checkpoint-9/model.safetensors",
        "checkpoints/checkpoint-9/averaged_weights.safetensors",
    ):
        resumed, expected = load_file(tmp_path / name), load_file(uninterrupted / name)
        assert all(torch.equal(resumed[key], expected[key]) for key in expected), name
    optimizers = [torch.load(f / "checkpoints/checkpoint-9/optimizer.pt")["state"] for f in (tmp_path, uninterrupted)]
    assert all(torch.equal(optimizers[0][i]["exp_avg_sq"], state["exp_avg_sq"]) for i, state in optimizers[1].items())


def test_average_follows_the_weights(uninterrupted):
    """The saved average equals the recurrence over the saved weights. Its decay rises to --ema-decay."""
    name, average = "decoder.conv_out1.0.weight", None
    for step in range(1, 10):
        folder = uninterrupted / "checkpoints" / f"checkpoint-{step}"
        weight = load_file(folder / "model.safetensors")[name]
        count = step - 1
        decay = min(0.8, (1 + count) / (10 + count))
        average = weight if average is None else decay * average + (1 - decay) * weight
        saved = load_file(folder / "averaged_weights.safetensors")
        torch.testing.assert_close(saved[f"module.{name}"], average)
        assert saved["n_averaged"] == step


def test_best_epoch_is_in_the_folder(uninterrupted):
    best = best_step(uninterrupted)
    saved = load_file(uninterrupted / "model.safetensors")
    expected = load_file(uninterrupted / "checkpoints" / f"checkpoint-{best}" / "averaged_weights.safetensors")
    assert set(expected) == {f"module.{key}" for key in saved} | {"n_averaged"}
    assert all(torch.equal(saved[key], expected[f"module.{key}"]) for key in saved)


def test_loss_weights_of_the_last_epochs(uninterrupted):
    assert set(history(uninterrupted, "loss_bce")) == {1, 2, 3}  # BCE is off in the last two of three epochs.
    assert set(history(uninterrupted, "loss_ssim")) == set(range(1, 10))


def test_sum_of_the_terms_is_the_loss(uninterrupted):
    terms = [history(uninterrupted, f"loss_{term}") for term in ("bce", "iou", "ssim", "mae")]
    for step, loss in history(uninterrupted).items():
        assert sum(term.get(step, 0) for term in terms) == pytest.approx(loss, rel=1e-5)


def test_earlier_run_is_not_overwritten_and_missing_checkpoints_are_named(photos, uninterrupted, tmp_path):
    with pytest.raises(UsageError, match="--resume"):
        training.train(options(photos, uninterrupted, *LONG))
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        training.train(options(photos, tmp_path, *LONG, "--resume"))
    with pytest.raises(FileNotFoundError, match="complete checkpoint"):
        training.train(options(photos, tmp_path, *LONG, "--resume", tmp_path))


# The result


def test_tensorboard_has_terms_and_mattes(uninterrupted):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = event_accumulator.EventAccumulator(str(uninterrupted / "logs"))
    events.Reload()
    tags = events.Tags()
    assert {"train/loss", "train/loss_mae", "eval/mae", "eval/iou"} <= set(tags["scalars"])
    assert tags["images"] == ["validation/0", "validation/1"]
    shown = events.Images("validation/0")
    assert len(shown) == 3 and (shown[0].width, shown[0].height) == (3 * 64, 64)


def test_folder_is_a_complete_repository(uninterrupted):
    """Loads model, processor and pipeline in a new process, as users do."""
    files = {path.name for path in uninterrupted.iterdir()}
    assert {"config.json", "preprocessor_config.json", "model.safetensors", "README.md", "LICENSE"} <= files
    code = f"""
from PIL import Image
from transformers import pipeline
remover = pipeline("background-removal", model={str(uninterrupted)!r}, trust_remote_code=True, device="cpu")
assert remover.image_processor.size["height"] == 64, remover.image_processor.size
result = remover(Image.new("RGB", (40, 30), "red"))
assert (result.mode, result.size) == ("RGBA", (40, 30)), result
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/", env=quiet())


def quiet(**more):
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


def test_report_is_beside_the_model(photos, uninterrupted, tiny_model_folder, tmp_path):
    """Checks the pictures of a new network and of a fine-tuned one. The latter also show the mattes before."""
    from PIL import Image

    more = ["--model", tiny_model_folder, "--epochs", 1]
    result = training.train(options(photos, tmp_path, *more, new=False))
    for folder, columns in ((uninterrupted, 3), (tmp_path, 4)):
        sheet = Image.open(folder / "before_after.png")
        assert sheet.size == (columns * 64, TITLE_HEIGHT + 2 * 64) and (folder / "curve.png").stat().st_size > 5000
        text = (folder / "README.md").read_text()
        assert "(curve.png)" in text and "(before_after.png)" in text
    assert result["result"] in text and f"| before training | 0 | {result['mae_before']:.4f} |" in text
    assert f"| after the last epoch | 1 | {result['mae_last']:.4f} |" in text


def test_card_states_data_and_measurement(photos, uninterrupted):
    text = (uninterrupted / "README.md").read_text()
    assert "library_name: transformers" in text
    assert f"{photos.name} (12 photos" in text and str(photos) not in text
    assert f"{history(uninterrupted, 'eval_mae')[best_step(uninterrupted)]:.4f}" in text


# Fine-tuning


def test_newcomer_fine_tunes_in_one_command_and_validation_improves(photos, tiny_model_folder, tmp_path):
    result = training.train(
        options(photos, tmp_path, "--model", tiny_model_folder, "--epochs", 12, "--learning-rate", 3e-3, new=False)
    )
    errors = history(tmp_path, "eval_mae")
    assert result["mae_before"] == errors[0] and result["mae"] == errors[best_step(tmp_path)]
    assert result["mae"] < 0.6 * result["mae_before"]
    load(tmp_path)


def test_folder_is_never_worse_than_the_start(photos, uninterrupted, tmp_path):
    """A far too high learning rate stops the training. The folder holds the model as it was and says so."""
    more = ["--model", uninterrupted, "--epochs", 4, "--learning-rate", 30]
    result = training.train(options(photos, tmp_path, *more, new=False))
    errors = history(tmp_path, "eval_mae")
    assert list(errors) == [0, 3] and errors[3] >= 2 * errors[0]
    assert result["mae"] == result["mae_before"] == errors[0] and result["mae_last"] == errors[3]
    assert result["result"].startswith("Not improved") and "stopped" in result["result"]
    assert result["result"] in (tmp_path / "README.md").read_text()
    saved, before = load_file(tmp_path / "model.safetensors"), load_file(uninterrupted / "model.safetensors")
    assert all(torch.equal(saved[key], before[key]) for key in before)


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--lora-rank", 2],
        ["--gradient-checkpointing"],
        ["--bf16"],
        ["--freeze-backbone", "true"],
        ["--resolution", 128],
    ],
    ids=lambda more: " ".join(map(str, more)) or "defaults",
)
def test_fine_tuning_never_collapses(photos, uninterrupted, tmp_path, more):
    """No epoch is much worse than the trained model that it starts from. Batch statistics doubled the error."""
    if "--lora-rank" in more:
        pytest.importorskip("peft")
    result = training.train(options(photos, tmp_path, "--model", uninterrupted, "--epochs", 2, *more, new=False))
    errors = history(tmp_path, "eval_mae")
    assert len(errors) == 3 and max(errors.values()) < 1.1 * errors[0]
    assert result["mae"] - result["iou"] <= result["mae_before"] - result["iou_before"]


def test_settings_that_shape_nothing_go_with_fine_tuning(photos, tiny_model_folder, tmp_path):
    more = ["--model", tiny_model_folder, "--task", "matting", "--freeze-backbone", "true", "--max-steps", 2]
    model, processor = training.build_model(options(photos, tmp_path, *more, new=False))
    assert model.config.task == "matting" and processor.size["height"] == 64
    assert not any(parameter.requires_grad for parameter in model.bb.parameters())
    assert all(parameter.requires_grad for parameter in model.decoder.parameters())
    training.train(options(photos, tmp_path, *more, "--learning-rate", 1e-3, new=False))
    before = load_file(tiny_model_folder / "model.safetensors")
    after = load_file(tmp_path / "checkpoints" / "checkpoint-2" / "model.safetensors")
    changed = {key for key in before if before[key].is_floating_point() and not torch.equal(before[key], after[key])}
    assert any(key.startswith("decoder.") for key in changed)
    assert not any(key.startswith("bb.") or "running_" in key for key in changed)


def test_foreign_weights_are_fine_tuned(tiny_model_folder, tmp_path):
    """Official releases are bare files in half precision, with prefixes of wrappers in the names."""
    state_dict = load_file(tiny_model_folder / "model.safetensors")
    halves = {f"module._orig_mod.{key}": value.half() if value.is_floating_point() else value
              for key, value in state_dict.items()}  # fmt: skip
    torch.save(halves, tmp_path / "weights.pth")
    shutil.copy(tiny_model_folder / "config.json", tmp_path)
    model, _ = load_model(tmp_path / "weights.pth", task="dis")
    assert model.dtype == torch.float32 and model.config.task == "dis"
    torch.testing.assert_close(model.state_dict()["decoder.conv_out1.0.weight"].half(),
                               state_dict["decoder.conv_out1.0.weight"].half())  # fmt: skip


def test_structure_and_model_exclude_each_other(photos, tiny_model_folder, tmp_path):
    with pytest.raises(UsageError, match="--backbone"):
        training.train(options(photos, tmp_path, "--model", tiny_model_folder))
    with pytest.raises(UsageError, match="--imagenet-backbone"):
        training.train(options(photos, tmp_path, "--model", tiny_model_folder, "--imagenet-backbone", new=False))


def test_stochastic_depth_is_refused_where_it_does_nothing(photos, tiny_model_folder, tmp_path):
    other = ("--model", tiny_model_folder, "--drop-path-rate")
    with pytest.raises(UsageError, match="--drop-path-rate: backbone .* swin_v1_t"):
        training.build_model(options(photos, tmp_path, *other, "0.1", new=False))
    assert training.build_model(options(photos, tmp_path, *other, "0", new=False))
    swin = options(photos, tmp_path, "--backbone", "swin_v1_t", "--drop-path-rate", "0.1", new=False)
    model, _ = training.build_model(swin)
    assert model.bb.layers[-1].blocks[-1].drop_path.rate == 0.1


def test_backbone_starts_from_a_file(photos, tmp_path):
    import timm

    source = timm.create_model(TINY_CONFIG["backbone"]).state_dict()
    torch.save(source, tmp_path / "weights.pth")
    arguments = options(photos, tmp_path / "out", "--imagenet-backbone", tmp_path / "weights.pth")
    mine = training.build_model(arguments)[0].bb.state_dict()
    assert mine and all(torch.equal(value, source[key]) for key, value in mine.items())


@pytest.mark.parametrize("wrong", [["--resolution", 65], ["--dynamic-resolution", 96, 64], ["--validation-share", 1]])
def test_wrong_options_are_named(photos, tmp_path, wrong):
    with pytest.raises(UsageError, match=str(wrong[0])):
        training.train(options(photos, tmp_path, *wrong))
    with pytest.raises(CommandError, match="decoder_block='none' is not one of"):
        training.run(options(photos, tmp_path, "--decoder-block", '"none"'))
    assert not any(tmp_path.iterdir())


def test_adapters_train_and_are_merged_on_save(photos, tiny_model_folder, tmp_path):
    pytest.importorskip("peft")
    more = ["--lora-rank", 2, "--epochs", 4, "--learning-rate", 3e-3, "--ema-decay", 0.5]
    result = training.train(options(photos, tmp_path, "--model", tiny_model_folder, *more, new=False))
    assert result["mae"] - result["iou"] < result["mae_before"] - result["iou_before"]
    before, after = load_file(tiny_model_folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    name = "bb.conv1.3.weight"
    change = (after[name] - before[name]).flatten(1)
    assert change.abs().max() > 0 and torch.linalg.matrix_rank(change, rtol=1e-3) <= 2
    load(tmp_path)


def test_adapters_resume_exactly(photos, tiny_model_folder, tmp_path):
    pytest.importorskip("peft")
    more = ["--model", tiny_model_folder, "--lora-rank", 2, "--max-steps", 3, "--save-steps", 1]
    training.train(options(photos, tmp_path / "whole", *more, "--keep-checkpoints", 5, new=False))
    (tmp_path / "resumed" / "checkpoints").mkdir(parents=True)
    shutil.copytree(*(tmp_path / run / "checkpoints" / "checkpoint-2" for run in ("whole", "resumed")))
    training.train(options(photos, tmp_path / "resumed", *more, "--resume", new=False))
    assert history(tmp_path / "resumed") == history(tmp_path / "whole")
    whole, resumed = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "resumed"))
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


# Schedules, data, precision


def filled_in(task, photos, *words):
    arguments = parse("--data", "x", "--output", "y", *words)
    config = argparse.Namespace(task=task, backbone="swin_v1_t" if "swin_v1_t" in words else "resnet18")
    recipe = training.choose_recipe(arguments, config, photos)
    training._fill_in(arguments, recipe)
    return arguments, recipe


def test_new_networks_train_as_published():
    for task, rate, epochs in (("dis", 1e-4, 500), ("general", 1e-5, 200), ("matting", 1e-5, 150)):
        arguments, recipe = filled_in(task, 100, "--batch-size", 16, "--backbone", "resnet18")
        assert (arguments.learning_rate, arguments.epochs, arguments.weight_decay) == (2 * rate, epochs, 1e-2)
        assert arguments.backbone_learning_rate is None and recipe.batch_statistics and not arguments.bf16
        assert training.augmentation_settings(arguments) == AugmentationSettings()
    assert training.default_last_epochs("general", 200) == 20
    assert training.default_last_epochs("general", 20) == 2
    assert training.default_last_epochs("dis", 1000) == 40


def test_fine_tuning_is_safe_without_options():
    for photos, batch, epochs in ((16, 4, 20), (100, 4, 3), (10_000, 4, 2), (4, 4, 40)):
        arguments, recipe = filled_in("general", photos, "--batch-size", batch)
        assert arguments.epochs == epochs and not recipe.batch_statistics
        assert (arguments.schedule, arguments.max_grad_norm, arguments.background) == ("cosine", 1.0, 0.0)
    backbone_rates = [
        filled_in("general", 20, *words)[0].backbone_learning_rate
        for words in ([], ["--learning-rate", 1e-5], ["--learning-rate", 1], ["--backbone-learning-rate", 3])
    ]
    assert backbone_rates == [1e-4, 1e-5, 1e-4, 3]
    transformer = recipes.fine_tuning_recipe(20, 4, recipes.backbone_kind("swin_v1_t"))
    assert (transformer.learning_rate, transformer.backbone_learning_rate) == (5e-5, 1e-5)


def test_published_recipe_is_one_option_away_and_warns(caplog):
    arguments, recipe = filled_in("general", 100, "--recipe", "published", "--epochs", 7)
    assert "statistics" in caplog.text
    assert (arguments.learning_rate, arguments.epochs, arguments.schedule) == (1e-5, 7, "constant")
    assert recipe.batch_statistics and arguments.ema_decay == 0


def test_bf16_needs_no_accelerator(monkeypatch):
    """transformers refuses bf16 on a machine without an accelerator, unless it is told to use the CPU."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    arguments, _ = filled_in("general", 20, "--bf16")
    found = training.training_arguments(arguments, argparse.Namespace(pixels=1), None)
    assert found.bf16 and found.device.type == "cpu"


def test_bf16_is_the_default_only_where_it_is_fast(monkeypatch):
    for fast in (True, False):
        monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda fast=fast: fast)
        assert filled_in("general", 20, "--cpu")[0].bf16 is fast
        assert not filled_in("general", 20, "--cpu", "--no-bf16")[0].bf16
        assert not filled_in("general", 20, "--cpu", "--fp16")[0].bf16


def test_split_is_repeatable_and_whole():
    pairs = list(range(20))
    kept, held_out = training.split_pairs(pairs, 0.1, seed=3)
    assert len(held_out) == 2 and sorted(kept + held_out) == pairs
    assert training.split_pairs(pairs, 0.1, seed=3) == (kept, held_out) != training.split_pairs(pairs, 0.1, seed=4)
    assert training.split_pairs(pairs, 0, seed=3) == (pairs, [])
    for count, expected in ((8, 1), (20, 4), (100, 10)):
        assert len(training.split_pairs(list(range(count)), None, seed=3)[1]) == expected
    with pytest.raises(ValueError, match="nothing is left"):
        training.split_pairs([1], 0.1, seed=3)


@pytest.mark.parametrize(
    "more",
    [
        ["--bf16", "--gradient-accumulation-steps", 2],
        ["--dynamic-resolution", 32, 96, "--cache", "none"],
        ["--validation-share", 0, "--cache", "device", "--no-color"],
    ],
    ids=["bf16", "dynamic", "no validation"],
)
def test_other_ways_to_train(photos, tmp_path, more):
    training.train(options(photos, tmp_path, "--max-steps", 2, *more))
    assert all(torch.isfinite(torch.tensor(loss)) for loss in history(tmp_path).values())
    assert sorted(history(tmp_path)) == [1, 2]
    load(tmp_path)


def test_bad_pair_is_reported_and_training_goes_on_or_stops(tmp_path, caplog):
    folder = write_folder(tmp_path / "photos", "abcdefgh", size=(64, 64))
    (folder / "im" / "c.jpg").write_bytes(b"no photo")
    with caplog.at_level(logging.WARNING):
        training.train(options(folder, tmp_path / "skipped", "--max-steps", 1))
    assert str(folder / "im" / "c.jpg") in caplog.text
    with pytest.raises(CommandError, match=r"c\.jpg.*cannot be read"):
        training.run(options(folder, tmp_path / "stopped", "--max-steps", 1, "--on-bad-data", "stop"))


# The Hub, several processes


def test_two_processes_fine_tune_one_model_and_push_it(photos, uninterrupted, tmp_path):
    # --multi_gpu starts the processes even without a GPU. --cpu makes them train on the CPU.
    launch = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    launch += " --main_process_port 0"
    words = "--max-steps 3 --batch-size 2 --resolution 64 --validation-share 0.25 --logging-steps 1 --ema-decay 0.5"
    words += " --push-to-hub author/mine --private --no-bf16"
    output = tmp_path / "out"
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch.split(), "-m", "birefnet", "train"]
    command += ["--data", str(photos), "--output", str(output), "--cpu", *words.split(), "--model", str(uninterrupted)]
    with LoopbackHub(tmp_path / "hub") as hub:
        environment = quiet(**hub.environment(tmp_path / "home"))
        done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        check_upload(hub, output)
    assert sorted(history(output)) == [1, 2, 3]
    checkpoint = output / "checkpoints" / "checkpoint-3"
    assert {path.name for path in checkpoint.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    generators = [torch.load(checkpoint / f"rng_state_{rank}.pth", weights_only=False)["cpu"] for rank in (0, 1)]
    assert not torch.equal(*generators)  # Each process augments with its own random numbers.
    # Validation does not depend on the number of processes.
    errors = history(output, "eval_mae")
    assert errors[3] < 1.1 * errors[0]
    arguments = options(
        photos, tmp_path / "again", "--model", output, "--validation-share", 0.25, "--no-bf16", new=False
    )
    alone = training.build_trainer(arguments, *training.build_model(arguments)).evaluate()
    assert alone["eval_mae"] == pytest.approx(errors[best_step(output)], abs=1e-6)


def check_upload(hub, output):
    """The repository has all files of the model and no checkpoints or logs."""
    uploaded = set(hub.files("author/mine"))
    assert hub.repositories["author/mine"].private
    assert {path.name for path in output.iterdir()} - {"checkpoints", "logs"} <= uploaded
    assert not [name for name in uploaded if name.startswith(("checkpoints", "logs"))]


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    assert "accelerate launch" in text and "--resume" in text and str(Path.cwd()) not in text
