#!/usr/bin/env python3
"""Images per second of torchvision's loader: random resized crop (bicubic), flip, normalisation.

Needs: pip install torch torchvision
"""

import argparse
import time

import torch
from torchvision import datasets, transforms


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="image folder: train/CLASS/*.jpg")
    parser.add_argument("--size", type=int, default=192)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=2)
    args = parser.parse_args()
    # One thread a worker, as DataLoader sets it for its workers.
    torch.set_num_threads(1)
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(
                args.size, interpolation=transforms.InterpolationMode.BICUBIC
            ),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    images = datasets.ImageFolder(f"{args.folder}/train", transform)
    loader = torch.utils.data.DataLoader(
        images,
        args.batch_size,
        shuffle=True,
        num_workers=args.workers,
        drop_last=True,
        persistent_workers=True,
    )
    for epoch in range(args.epochs):
        start = time.perf_counter()
        delivered = sum(len(labels) for _, labels in loader)
        seconds = time.perf_counter() - start
        rate = delivered / seconds
        print(f"epoch {epoch + 1}: {delivered} images in {seconds:.2f} s, {rate:.0f} images/s")


if __name__ == "__main__":
    main()
