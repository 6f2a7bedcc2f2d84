#!/usr/bin/env python3
"""Writes an image folder of JPEG files for timing loaders.

Random parts of scikit-image's own photographs, enlarged to the sizes that photographs in ImageNet
have (500 pixels at the long side, mostly), quality 92, in train/CLASS/. The same seed gives the
same files.

Needs: pip install pillow scikit-image
"""

import argparse
import pathlib
import random

from PIL import Image
from skimage import data

SIZES = [(500, 375), (375, 500), (500, 333), (333, 500), (500, 500), (640, 480)]


def photographs():
    names = ["astronaut", "chelsea", "coffee", "rocket"]
    return [Image.fromarray(getattr(data, name)()).convert("RGB") for name in names]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--images", type=int, default=2048)
    args = parser.parse_args()
    draw = random.Random(0)
    photos = photographs()
    for number in range(args.images):
        photo = draw.choice(photos)
        width, height = draw.choice(SIZES)
        share = draw.uniform(0.6, 1.0) * min(photo.width / width, photo.height / height)
        part = (share * width, share * height)
        left = draw.uniform(0, photo.width - part[0])
        top = draw.uniform(0, photo.height - part[1])
        box = (left, top, left + part[0], top + part[1])
        image = photo.resize((width, height), Image.Resampling.BICUBIC, box=box)
        folder = args.folder / "train" / f"class-{number % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{number:05}.jpg", quality=92)


if __name__ == "__main__":
    main()
