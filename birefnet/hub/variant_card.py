"""Makes model cards of variants from the table: metadata with the published results as `model-index`, and text."""

import re
from pathlib import Path

from birefnet.hub.variants import LICENSE_CAVEAT, Variant


TAGS = ("birefnet", "background-removal", "matting", "dichotomous-image-segmentation", "transformers", "safetensors")

#: Names of measures on a card, by their key in the table.
MEASURES = {
    "Smeasure": "S-measure",
    "wFmeasure": "weighted F-measure",
    "maxFm": "maximum F-measure",
    "meanFm": "mean F-measure",
    "adpFm": "adaptive F-measure",
    "maxEm": "maximum E-measure",
    "meanEm": "mean E-measure",
    "adpEm": "adaptive E-measure",
    "MAE": "mean absolute error",
    "MSE": "mean squared error",
    "MAE_or_MSE": "mean absolute or squared error",
    "HCE": "human correction efforts",
    "mBA": "mean boundary accuracy",
    "maxBIoU": "maximum boundary IoU",
    "meanBIoU": "mean boundary IoU",
    "pixel_accuracy": "pixel accuracy",
}

# Example pictures from the Hub's own documentation.
WIDGET = (
    ("Tiger", "https://huggingface.co/datasets/mishig/sample_images/resolve/main/tiger.jpg"),
    ("Football match", "https://huggingface.co/datasets/mishig/sample_images/resolve/main/football-match.jpg"),
)

UNKNOWN = "unknown"

USAGE = """\
## Use

```python
import torch
from transformers import pipeline

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.float16 if device == "cuda" else torch.float32  # most CPUs are very slow in float16
remover = pipeline(
    "background-removal", model="{repository}", trust_remote_code=True, device=device, dtype=dtype
)
remover("photo.jpg").save("subject.png")
```

Or with the model itself:

```python
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, AutoModelForImageSegmentation

model = AutoModelForImageSegmentation.from_pretrained("{repository}", trust_remote_code=True, dtype=dtype).to(device)
processor = AutoImageProcessor.from_pretrained("{repository}", trust_remote_code=True)
photo = ImageOps.exif_transpose(Image.open("photo.jpg"))  # upright
with torch.inference_mode():
    outputs = model(**processor(photo, return_tensors="pt").to(device))
matte = processor.post_process_alpha_matte(outputs, target_sizes=[photo.size[::-1]])[0]  # (height, width) in [0, 1]
```

`pipeline("image-segmentation", ...)` returns hard masks. The processor resizes photos to {size} (width × height).
`handler.py` serves the model on Inference Endpoints.
"""


ONNX_USAGE = """\
### In JavaScript

```js
import {{ pipeline }} from '@huggingface/transformers';

const remover = await pipeline('background-removal', '{repository}', {{ dtype: 'fp32' }});  // or fp16, q8
const cutOut = await remover('photo.jpg');
```

`onnx/` has the network in float32, float16 and int8, for one photo at the size in `preprocessor_config.json`.
"""


def variant_card(variant: Variant, repository: str, with_onnx: bool = False) -> str:
    """
    Returns the README.md of a variant: YAML metadata and text.

    Args:
        variant: A row of the table. The card calls facts that are `None` unknown.
        repository: Name on the Hub, for the examples.
        with_onnx: Whether the repository has ONNX files.
    """
    parts = [
        f"# {variant.title}",
        f"The weights of [{variant.repository}](https://huggingface.co/{variant.repository}), unchanged, with code "
        "and an image processor that load in transformers 5. The network is BiRefNet "
        "([Zheng et al., CAAI AIR 2024](https://arxiv.org/abs/2401.03407)).",
        f"**Good for:** {variant.good_for}\n\n**Not for:** {variant.avoid}",
        USAGE.format(repository=repository, size=variant.size_text).rstrip(),
        ONNX_USAGE.format(repository=repository).rstrip() if with_onnx else None,
        _results(variant),
        _facts(variant),
    ]
    return f"{_metadata(variant, repository, with_onnx)}\n" + "\n\n".join(part for part in parts if part) + "\n"


def plain_card(name: str, source: str, config) -> str:
    """Returns the README.md of a converted checkpoint that is not in the table."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(library_name="transformers", pipeline_tag="image-segmentation", tags=list(TAGS))
    usage = USAGE.format(repository=name, size="the size in `preprocessor_config.json`").rstrip()
    text = f"Converted from `{Path(source).name}` by `birefnet convert`. Backbone: `{config.backbone}`."
    return f"---\n{data.to_yaml()}\n---\n\n# {name}\n\n{text}\n\n{usage}\n"


def _metadata(variant, repository, with_onnx):
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        license=variant.license_id or ("mit" if variant.official else "unknown"),
        library_name="transformers",
        pipeline_tag="image-segmentation",
        tags=[*TAGS, "onnx", "transformers.js"] if with_onnx else list(TAGS),
        base_model=variant.repository,
        model_name=repository.split("/")[-1],
        eval_results=_evaluations(variant) or None,
        widget=[{"src": source, "example_title": title} for title, source in WIDGET],
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _evaluations(variant):
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="image-segmentation",
            dataset_type=re.sub(r"[^a-z0-9]+", "-", row["dataset"].lower()),
            dataset_name=row["dataset"],
            dataset_config=_setting(row) or None,
            metric_type=MEASURES[measure].lower().replace(" ", "_"),
            metric_name=MEASURES[measure],
            metric_value=value,
            source_name="as published for the original",
            source_url=f"https://huggingface.co/{variant.repository}",
        )
        for row in variant.metrics
        for measure, value in row["values"].items()
    ]


def _setting(row):
    """Returns the checkpoint's own name and the input size, if known. They distinguish results on one data set."""
    return ", ".join(filter(None, (row["method"], row["resolution"] and row["resolution"].replace("x", " × "))))


def _results(variant):
    if not variant.metrics:
        return "## Published results\n\nNone known."
    lines = ["## Published results", "", "As published for the original, not measured again.", ""]
    for row in variant.metrics:
        values = "; ".join(f"{MEASURES[measure]} {value}" for measure, value in row["values"].items())
        lines.append(f"- {row['dataset']} ({_setting(row) or 'unknown setting'}): {values}")
    return "\n".join(lines)


def _facts(variant):
    size = f"{variant.bytes:,} bytes" if variant.bytes else f"size {UNKNOWN}"
    trained = "{width} × {height}".format(**variant.training_size) if variant.training_size else UNKNOWN
    lines = [
        "## Origin",
        "",
        f"- Original: `{variant.weights_file}` of `{variant.repository}` at revision `{variant.revision or UNKNOWN}`, "
        f"{size}, SHA-256 `{variant.sha256 or UNKNOWN}`, {variant.dtype or f'dtype {UNKNOWN}'}",
        f"- Network: {variant.config['backbone']}, {variant.parameters:,} parameters; purpose: {variant.purpose}",
        f"- Fine-tuned from: {variant.derived_from}" if variant.derived_from else None,
        f"- Training sets: {', '.join(variant.training_sets or (UNKNOWN,))}",
        f"- Validation sets: {', '.join(variant.validation_sets or (UNKNOWN,))}",
        f"- Trained at (width × height): {trained}",
        *(f"- {note}" for note in variant.notes),
        "",
        "## Licence",
        "",
        f"Declared: {variant.license or UNKNOWN}. {LICENSE_CAVEAT if variant.official else ''}".rstrip(" .") + ".",
    ]
    return "\n".join(line for line in lines if line is not None)
