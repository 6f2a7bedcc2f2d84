#!/usr/bin/env python3
"""Writes crates/swin-moe/tests/fixtures/augment.json: what Pillow and timm compute.

    pip install pillow numpy && pip install --no-deps timm
    tools/augment_oracle.py > crates/swin-moe/tests/fixtures/augment.json

Needs no PyTorch: timm's files are loaded one by one, with an empty module in PyTorch's place, which
the functions used here only name. Two kinds of figures: images after each operation, and moments of
what timm draws at random.
"""

import importlib.util
import json
import math
import random
import sys
import types
from pathlib import Path

import numpy as np
from PIL import Image

DRAWS = 400_000


def timm_file(name):
    """A file of timm, without what importing the package would need."""
    for stub in ("torch", "torch.utils", "torch.utils.data"):
        sys.modules.setdefault(stub, types.ModuleType(stub))
    torch = sys.modules["torch"]
    torch.float32 = "float32"
    torch.empty = lambda *_, **__: types.SimpleNamespace(normal_=lambda: "noise")
    sys.modules["torch.utils.data"].default_collate = None
    folder = Path(importlib.util.find_spec("timm").origin).parent
    spec = importlib.util.spec_from_file_location(name, folder / "data" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


aa = timm_file("auto_augment")
erasing = timm_file("random_erasing")
mixup = timm_file("mixup")


def test_image(width, height, channels, low, high):
    """A gradient with noise, so that edges, flat parts and all channels matter."""
    rng = np.random.default_rng(width * 100 + height)
    y, x = np.mgrid[0:height, 0:width]
    planes = []
    for c in range(channels):
        wave = np.sin(x * (0.4 + 0.2 * c)) * np.cos(y * (0.3 + 0.1 * c))
        values = low + (high - low) * (0.5 + 0.4 * wave + 0.1 * rng.random((height, width)))
        planes.append(np.clip(values, 0, 255).astype(np.uint8))
    array = np.stack(planes, axis=2)
    return Image.fromarray(array[:, :, 0] if channels == 1 else array)


def record(image):
    array = np.asarray(image)
    channels = 1 if array.ndim == 2 else array.shape[2]
    return {
        "width": image.size[0],
        "height": image.size[1],
        "channels": channels,
        "bytes": array.astype(np.uint8).tobytes().hex(),
    }


FILL = (125, 123, 114)
SIDED = {"resample": Image.Resampling.BICUBIC}


def operations(image):
    fill = FILL[0] if image.mode == "L" else FILL
    geometric = dict(SIDED, fillcolor=fill)
    cases = [
        ("AutoContrast", None, aa.auto_contrast(image)),
        ("Equalize", None, aa.equalize(image)),
        ("Invert", None, aa.invert(image)),
    ]
    # timm's strongest magnitude keeps no bit, which newer Pillows refuse; Rust's test covers it.
    for bits in (1, 3, 4):
        cases.append(("Posterize", bits, aa.posterize(image, bits)))
    for threshold in (0, 26, 128, 256):
        cases.append(("Solarize", threshold, aa.solarize(image, threshold)))
    for add in (0, 99, 110):
        cases.append(("SolarizeAdd", add, aa.solarize_add(image, add)))
    for name, function in (
        ("Color", aa.color),
        ("Contrast", aa.contrast),
        ("Brightness", aa.brightness),
        ("Sharpness", aa.sharpness),
    ):
        for factor in (0.1, 0.75, 1.0, 1.81):
            cases.append((name, factor, function(image, factor)))
    for degrees in (-30.0, -7.5, 0.0, 27.0):
        cases.append(("Rotate", degrees, aa.rotate(image, degrees, **dict(geometric))))
    for name, function in (
        ("ShearX", aa.shear_x),
        ("ShearY", aa.shear_y),
        ("TranslateX", aa.translate_x_rel),
        ("TranslateY", aa.translate_y_rel),
    ):
        for by in (-0.27, 0.0, 0.11, 0.45):
            cases.append((name, by, function(image, by, **dict(geometric))))
    return [{"op": op, "argument": arg, "result": record(result)} for op, arg, result in cases]


def resizes(image):
    return [
        record(image.resize((width, height), Image.Resampling.BICUBIC))
        for width, height in ((8, 8), (24, 30), (13, 5))
    ]


def moments(values):
    values = np.asarray(values, dtype=np.float64)
    return {"count": len(values), "mean": values.mean(), "std": values.std()}


def rand_augment_levels():
    """For each operation at m9-mstd0.5-inc1: how often it is applied, and its argument."""
    hparams = {"magnitude_std": 0.5, "img_mean": FILL, "interpolation": Image.Resampling.BICUBIC}
    result = {}
    for name in aa._RAND_INCREASING_TRANSFORMS:
        op = aa.AugmentOp(name, prob=0.5, magnitude=9, hparams=hparams)
        drawn = []
        op.aug_fn = lambda image, *args, **_: drawn.append(args[0] if args else 0.0)
        for _ in range(DRAWS // 10):
            op(None)
        result[name] = {"applied": len(drawn) / (DRAWS // 10), **moments(drawn)}
    return result


class Canvas:
    def __init__(self):
        self.part = None

    def __setitem__(self, place, _):
        _, rows, columns = place
        self.part = (rows.start, rows.stop - rows.start, columns.start, columns.stop - columns.start)


def erased_parts(size):
    draw = erasing.RandomErasing(probability=0.25, mode="pixel", device="cpu")
    parts = []
    for _ in range(DRAWS):
        canvas = Canvas()
        draw._erase(canvas, 3, size, size, "float32")
        if canvas.part:
            parts.append(canvas.part)
    top, height, left, width = (np.array(column) for column in zip(*parts))
    return {
        "applied": len(parts) / DRAWS,
        "top": moments(top),
        "left": moments(left),
        "height": moments(height),
        "width": moments(width),
        "area": moments(height * width),
    }


def mixes(size):
    mixer = mixup.Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, prob=0.7, switch_prob=0.4)
    blends, pastes, rows, columns, none = [], [], [], [], 0
    for _ in range(DRAWS):
        share, use_cutmix = mixer._params_per_batch()
        if use_cutmix:
            box, share = mixup.cutmix_bbox_and_lam((3, size, size), share)
            pastes.append(float(share))
            rows.append(int(box[1] - box[0]))
            columns.append(int(box[3] - box[2]))
        elif share == 1.0:
            none += 1
        else:
            blends.append(share)
    return {
        "left_alone": none / DRAWS,
        "blends": len(blends) / DRAWS,
        "blend_share": moments(blends),
        "paste_share": moments(pastes),
        "paste_rows": moments(rows),
        "paste_columns": moments(columns),
    }


def main():
    random.seed(1)
    np.random.seed(1)
    images = [test_image(13, 11, 3, 30, 220), test_image(10, 17, 1, 90, 255)]
    # More values than 255 a channel, which flattening a histogram needs.
    images.append(test_image(23, 19, 3, 0, 140))
    json.dump(
        {
            "fill": FILL,
            "images": [
                {"image": record(i), "operations": operations(i), "resized": resizes(i)}
                for i in images
            ],
            "rand_augment": rand_augment_levels(),
            "erasing": {str(size): erased_parts(size) for size in (32, 7)},
            "mixing": {str(size): mixes(size) for size in (32, 9)},
        },
        sys.stdout,
        indent=1,
    )
    print()


main()
