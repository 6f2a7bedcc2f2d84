//! Configurations with unknown names, wrong types, values out of range or at odds.

use std::fs;
use std::path::Path;

use crate::bad_input::Case;
use crate::harness::words;

/// What `--set` is given, and what the answer must say.
const SETTINGS: [(&str, &str); 80] = [
    ("train.lr", "it has no `=`"),
    ("=1", "the key has no section"),
    ("lr=1", "the key has no section"),
    ("train.=1", "the key is not complete"),
    (".lr=1", "the key is not complete"),
    ("trian.lr=1", "did you mean [train]?"),
    ("modle.embed_dim=8", "did you mean [model]?"),
    ("train.learning=1", "[train]"),
    ("moe.num_expert=4", "did you mean `num_experts`?"),
    ("train.warmup_epoch=1", "did you mean `warmup_epochs`?"),
    ("train.num_experts=4", "it is a key of [moe]"),
    ("train.a\nb=1", "unknown key"),
    ("train.lr=fast", "train.lr"),
    ("train.lr=true", "expected a number"),
    ("train.lr=nan", "train.lr"),
    ("train.lr=inf", "train.lr"),
    ("train.lr=-0.1", "train.lr"),
    ("train.lr=0", "train.lr"),
    ("train.lr=1e999", "train.lr"),
    ("train.warmup_lr=5", "train.warmup_lr"),
    ("train.epochs=0", "train.epochs"),
    ("train.epochs=-3", "train.epochs"),
    ("train.epochs=2.5", "whole number"),
    ("train.epochs=99999999999999999999", "train.epochs"),
    ("train.warmup_epochs=1000", "train.warmup_epochs"),
    ("train.batch_size=0", "train.batch_size"),
    ("train.batch_size=9223372036854775807", "train.batch_size"),
    ("train.batch_size=5000", "batch"),
    ("train.betas=[0.9]", "train.betas"),
    ("train.betas=[0.9,1.0]", "train.betas[1]"),
    ("train.eps=0", "train.eps"),
    ("train.clip_grad=-1", "train.clip_grad"),
    ("train.label_smoothing=1", "train.label_smoothing"),
    ("data.workers=5000", "data.workers"),
    ("train.precision=f8", "train.precision"),
    ("train.log_every=0", "train.log_every"),
    ("train.ema_decay=1", "train.ema_decay"),
    ("train.accumulation_steps=0", "train.accumulation_steps"),
    ("train.accumulation_steps=65", "train.accumulation_steps"),
    ("augment.rand_augment=m9", "augment.rand_augment"),
    ("augment.rand_augment=rand-m9", "inc1"),
    ("augment.rand_augment=rand-m11-inc1", "0..=10"),
    ("augment.rand_augment=rand-m9-inc0", "inc0"),
    ("augment.rand_augment=rand-n1.5-inc1", "n1.5"),
    ("augment.rand_augment=rand-mstd-inc1", "mstd"),
    ("augment.rand_augment=rand-m1é-inc1", "m1é"),
    ("augment.color_jitter=1.5", "augment.color_jitter"),
    ("augment.random_erasing=-0.1", "augment.random_erasing"),
    ("augment.mixup=nan", "augment.mixup"),
    ("augment.mixup=0.001", "augment.mixup"),
    ("augment.cutmix=-1", "augment.cutmix"),
    ("augment.mix_probability=2", "augment.mix_probability"),
    (
        "augment.mix_switch_probability=2",
        "augment.mix_switch_probability",
    ),
    ("train.seed=-1", "train.seed"),
    ("model.image_size=9", "a multiple of model.patch_size"),
    ("model.image_size=10", "model.image_size"),
    ("model.image_size=0", "model.image_size"),
    ("model.image_size=1000000", "model.image_size"),
    ("model.patch_size=0", "model.patch_size"),
    ("model.window_size=3", "model.window_size"),
    ("model.in_chans=2", "1 or 3"),
    ("model.num_classes=9", "the data has 10 classes"),
    (
        "model.num_heads=[3,8]",
        "a divisor of the stage's 64 channels",
    ),
    ("model.num_heads=[4]", "one for each entry of model.depths"),
    ("model.num_heads=[0,8]", "model.num_heads[0]"),
    ("model.depths=[]", "model.depths"),
    ("model.depths=[2,0]", "model.depths[1]"),
    ("model.depths=2", "expected an array"),
    ("model.mlp_ratio=0.001", "model.mlp_ratio"),
    ("model.drop_path_rate=1.5", "model.drop_path_rate"),
    (
        "model.pretrained_window_sizes=[1,0]",
        "model.pretrained_window_sizes[0]",
    ),
    ("moe.top_k=5", "lower moe.top_k or raise moe.num_experts"),
    ("moe.top_k=0", "moe.top_k"),
    ("moe.num_experts=100000", "moe.num_experts"),
    ("moe.blocks=[[2],[1]]", "moe.blocks[0]"),
    ("moe.blocks=[[1,1],[1]]", "listing 1 twice"),
    ("moe.gate_noise=0", "moe.gate_noise"),
    ("augment.std=[0]", "augment.std"),
    ("parallel.ranks=0", "parallel.ranks"),
    (
        "parallel.rebalance_threshold=nan",
        "parallel.rebalance_threshold is NaN",
    ),
];

/// Several settings that are valid alone.
const TOGETHER: [(&str, &str, &[&str]); 7] = [
    (
        "two crops",
        "choose one of the two crops",
        &[
            "augment.random_resized_crop=true",
            "augment.random_crop_padding=2",
        ],
    ),
    (
        "means of three channels for one",
        "model.in_chans",
        &["augment.mean=[0.1,0.2,0.3]"],
    ),
    (
        "more weights than any machine has",
        "weights in all",
        &["model.embed_dim=8192", "model.depths=[200,200]"],
    ),
    (
        "more weights than this machine has",
        "this machine's memory",
        &[
            "model.embed_dim=8192",
            "model.mlp_ratio=4",
            "model.depths=[2,1]",
            "moe.num_experts=20",
            "moe.blocks=[[0],[-1]]",
        ],
    ),
    (
        "more pixels than fit",
        "pixel values",
        &["model.image_size=4096", "train.batch_size=1000"],
    ),
    (
        "a shared expert of a million columns for all images at once",
        "this machine's memory",
        &[
            "model.patch_size=1",
            "moe.shared_d_ff=1048576",
            "train.batch_size=1437",
        ],
    ),
    (
        "attention over a whole large image",
        "this machine's memory",
        &[
            "model.image_size=1024",
            "model.window_size=256",
            "train.batch_size=128",
        ],
    ),
];

/// Whole files.
const FILES: [(&str, &[u8], &str); 8] = [
    ("not TOML", b"[train\nlr = 1", "not valid TOML"),
    ("no text", b"\xff\xfe\x00", "cannot read the configuration"),
    ("a key at the top", b"lr = 1e-3", "`lr` is a key of [train]"),
    (
        "a section that is a value",
        b"train = 3",
        "expected a section",
    ),
    (
        "an unknown section",
        b"\n[optimizer]\nlr = 1",
        "unknown section [optimizer]",
    ),
    (
        "a key given twice",
        b"[train]\nlr = 1\nlr = 2",
        "not valid TOML",
    ),
    (
        "a list of sections",
        b"[[train]]\nlr = 1",
        "expected a section",
    ),
    (
        "the line of a bad value",
        b"[train]\n\nlr = -1",
        ":3: train.lr is -1",
    ),
];

pub fn cases(scratch: &Path) -> Vec<Case> {
    // The output is never made: settings are checked first. What is too large for the machine is
    // found out before the directory is made, too.
    let train = words("train --output never-made");
    let mut cases = Vec::new();
    for (setting, says) in SETTINGS {
        let arguments = [&train[..], &["--set".to_owned(), setting.to_owned()]].concat();
        cases.push(Case::new(format!("--set {setting:?}"), arguments, &[says]));
    }
    for (name, says, settings) in TOGETHER {
        let arguments = [&train[..], &crate::harness::sets(settings)].concat();
        cases.push(Case::new(name, arguments, &[says]));
    }
    for (number, (name, content, says)) in FILES.into_iter().enumerate() {
        let path = scratch.join(format!("{number}.toml"));
        fs::write(&path, content).unwrap();
        let line = format!("train --output never-made --config {}", path.display());
        cases.push(Case::new(name, words(&line), &[says]));
    }
    let large = scratch.join("large.toml");
    fs::write(&large, "#".repeat((1 << 20) + 1)).unwrap();
    for (name, file, says) in [
        ("a missing file", "missing.toml", "cannot read"),
        ("a directory", ".", "it is not a file"),
        ("a large file", "large.toml", "allowed are"),
    ] {
        let line = format!("info --config {file}");
        cases.push(Case::new(format!("config: {name}"), words(&line), &[says]));
    }
    cases
}
