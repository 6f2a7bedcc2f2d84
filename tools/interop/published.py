#!/usr/bin/env python3
"""Loads a run's exported weights into the published PyTorch model, strictly, and compares logits.

    tools/interop/published.py --program FILE --swin DIR [--tutel DIR] --run RUN_DIR IMAGE...

FILE is a build of swin-moe, which exports the run and scores the images. The published model is
`models/swin_transformer_moe.py` in DIR, a checkout of microsoft/Swin-Transformer; nothing of it is
copied here. It needs torch, timm, safetensors and, for models with experts, Tutel: installed
(`NO_CUDA=1 pip install --no-build-isolation --no-deps CHECKOUT` builds it for the CPU), or a checkout
with its compiled `tutel_custom_kernel`, named with --tutel.

Computes on the CPU in float64 (the router in float32, as published), in evaluation mode. Prints the
largest difference, and fails above --tolerance, relative to the largest logit.
"""

import argparse
import importlib.util
import inspect
import logging
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file


def published_arguments(config, num_classes):
    """The published constructor's arguments for a run's config.toml."""
    model, moe = config["model"], config["moe"]
    has_experts = any(block >= 0 for blocks in moe["blocks"] for block in blocks)
    if has_experts and (moe["shared_d_ff"] > 0 or moe["activation"] != "gelu"):
        sys.exit(
            "the published model has no shared experts and no activation but gelu; "
            f"this run has shared_d_ff = {moe['shared_d_ff']}, activation = {moe['activation']!r}"
        )
    return {
        "img_size": model["image_size"],
        "patch_size": model["patch_size"],
        "in_chans": model["in_chans"],
        "num_classes": num_classes,
        "embed_dim": model["embed_dim"],
        "depths": model["depths"],
        "num_heads": model["num_heads"],
        "window_size": model["window_size"],
        "mlp_ratio": model["mlp_ratio"],
        "patch_norm": model["patch_norm"],
        "drop_path_rate": model["drop_path_rate"],
        "pretrained_window_sizes": model["pretrained_window_sizes"],
        "mlp_fc2_bias": moe["fc2_bias"],
        "init_std": moe["init_std"],
        "moe_blocks": moe["blocks"],
        "num_local_experts": moe["num_experts"],
        "top_value": moe["top_k"],
        # Nothing is dropped.
        "capacity_factor": 0.0,
        "cosine_router": moe["router"] == "cosine",
        "cosine_router_dim": moe["cosine_router_dim"],
        "cosine_router_init_t": moe["cosine_router_init_t"],
        "normalize_gate": moe["normalize_gate"],
        "use_bpr": False,
        "is_gshard_loss": moe["aux_loss"] == "gshard",
        "gate_noise": moe["gate_noise"],
        "moe_drop": moe["dropout"],
        "aux_loss_weight": moe["aux_loss_weight"],
    }


def published_model(checkout, arguments):
    """Builds the published model; its file alone is imported, as its package asks for more."""
    path = checkout / "models" / "swin_transformer_moe.py"
    if not path.is_file():
        sys.exit(f"{path} is missing; --swin is a checkout of microsoft/Swin-Transformer")
    spec = importlib.util.spec_from_file_location("swin_transformer_moe", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    has_experts = any(block >= 0 for blocks in arguments["moe_blocks"] for block in blocks)
    if has_experts and module.tutel_moe is None:
        sys.exit("Tutel cannot be imported; install it, or name a checkout with --tutel")
    constructor = module.SwinTransformerMoE
    known = inspect.signature(constructor.__init__).parameters
    unknown = sorted(set(arguments) - set(known))
    if unknown:
        sys.exit(f"the published constructor does not know {', '.join(unknown)}; use f82860b")
    return constructor(**arguments)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--program", required=True, help="a build of swin-moe")
    parser.add_argument("--swin", type=Path, required=True, help="checkout of Swin-Transformer")
    parser.add_argument("--tutel", type=Path, help="checkout of Tutel, if it is not installed")
    parser.add_argument("--run", type=Path, required=True, help="directory of a run")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    options = parser.parse_args()
    if options.tutel:
        sys.path.insert(0, str(options.tutel))
    logging.disable(logging.WARNING)

    with tempfile.TemporaryDirectory() as folder:
        weights, scores = (Path(folder) / f"{name}.safetensors" for name in ("weights", "scores"))
        run = ["--run", options.run]
        program = [options.program]
        quiet = {"check": True, "stdout": subprocess.DEVNULL}
        subprocess.run([*program, "export", *run, "--output", weights], **quiet)
        subprocess.run([*program, "predict", *run, "--tensors", scores, *options.images], **quiet)
        weights, scores = load_file(weights), load_file(scores)
        # The published layer looks at the group of processes when it is built.
        dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)
        with open(options.run / "config.toml", "rb") as file:
            config = tomllib.load(file)
        ours = scores["logits"].double()
        arguments = published_arguments(config, ours.shape[1])
        model = published_model(options.swin, arguments)
        # Tutel's layers fill in what is missing, and reshape what has as many elements.
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        if found != expected:
            names = sorted(name for name, _ in set(found.items()) ^ set(expected.items()))
            sys.exit(f"FAILED: missing, unexpected or of another shape: {', '.join(names)}")
        model.load_state_dict(weights, strict=True)
        print(f"strict: {len(weights)} tensors loaded, torch {torch.__version__}")
        model = model.double().eval()
        with torch.no_grad():
            theirs = model(scores["images"].double())
        # Models with experts also hand out their balance loss.
        theirs = theirs[0] if isinstance(theirs, tuple) else theirs
        dist.destroy_process_group()

    largest = theirs.abs().max().item()
    difference = (ours - theirs).abs().max().item()
    same = (ours.argmax(1) == theirs.argmax(1)).sum().item()
    print(
        f"{len(ours)} images: largest difference {difference:.2e} of logits up to {largest:.3f} "
        f"(relative {difference / largest:.2e}); same class for {same} of {len(ours)}"
    )
    if not difference <= options.tolerance * largest:
        sys.exit(f"FAILED: above {options.tolerance:g} relative to the largest logit")
    print(f"passed: within {options.tolerance:g}")


if __name__ == "__main__":
    main()
