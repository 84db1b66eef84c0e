"""The model card of a pipeline: what it is, how it is used, what it was trained and judged on;
nothing that was not given.
"""

from collections.abc import Mapping
from typing import Any

from flowspace.vision.generator import CrossFlowGenerator

__all__ = ["PLACE", "model_card"]

PLACE = "PATH_OR_REPOSITORY"
"""Stands in a card for where the pipeline is."""

TEXT = """---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags: [flowspace, crossflow, one-step]
---

# {name}

A cross-space flow map (CrossFlow, arXiv 2606.19970): from a noisy latent of {channels} x {height}
x {width} to an image of {image_height} x {image_width} pixels in one evaluation, without a
decoder. Trained and shipped with flowspace.

```python
import torch
from flowspace.vision import CrossFlowPipeline

pipeline = CrossFlowPipeline.from_pretrained("{place}")
image = pipeline({call}, generator=torch.Generator().manual_seed(0)).images[0]
```

Without flowspace, diffusers draws the same image by the code in this folder, which needs timm.
Read it before you trust it: `pipeline.py` and `generator/crossflow_generator.py`.

```python
import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{place}", trust_remote_code=True)
image = pipeline({call}, generator=torch.Generator().manual_seed(0)).images[0]
```

## Model

{size}, {parameters:.1f} million parameters, conditioned on {condition};
schedule alpha = {alpha}, beta = {beta}.

## Training

{training}

## Evaluation

{scores}

## Citation

CrossFlow, arXiv 2606.19970.
"""


def model_card(
    name: str,
    generator: CrossFlowGenerator,
    alpha: str,
    beta: str,
    training: Mapping[str, Any] | None = None,
    scores: Mapping[str, float] | None = None,
) -> str:
    """Return the card as Markdown with the hub's front matter.

    Args:
        name: of the model.
        generator: whose sizes are told.
        alpha: of the schedule, a formula in t.
        beta: likewise.
        training: settings that are listed; None says that none are known.
        scores: numbers by name; None says that it was not evaluated.
    """
    c = generator.config
    channels, height, width = generator.latent_shape
    kinds, call = "no classes", "count=1"
    if c["classes"]:
        kinds, call = f"{c['classes']} classes", "labels=[0]"
    listed = "Not recorded."
    if training:
        listed = "\n".join(f"- {key}: {value}" for key, value in training.items())
    table = "Not evaluated."
    if scores:
        rows = [f"| {key} | {value:.4g} |" for key, value in scores.items()]
        table = "\n".join(["| measure | value |", "| --- | ---: |", *rows])
    return TEXT.format(
        name=name,
        place=PLACE,
        channels=channels,
        height=height,
        width=width,
        image_height=height * c["patch"],
        image_width=width * c["patch"],
        call=call,
        size=f"{c['depth']} blocks of width {c['width']}, {kinds}",
        parameters=sum(p.numel() for p in generator.parameters()) / 1e6,
        condition=c["condition"],
        alpha=alpha,
        beta=beta,
        training=listed,
        scores=table,
    )
