//! Fine-tuning: `[init]` that names nothing usable, or weights of another model.

use std::fs;
use std::path::Path;

use crate::bad_input::Case;
use crate::harness::{TOP1_LINEAR, fixture, sets, succeed, words};

pub fn cases(scratch: &Path) -> Vec<Case> {
    let config = scratch.join("finetune.toml");
    fs::write(&config, TOP1_LINEAR).unwrap();
    let pth = fixture("top1_linear/checkpoint.pth");
    let source = scratch.join("finetune-source");
    succeed(&words(&format!(
        "import {} --config {} --output {}",
        pth.display(),
        config.display(),
        source.display()
    )));
    let empty = scratch.join("finetune-empty");
    fs::create_dir(&empty).unwrap();
    let whole = fs::read(&pth).unwrap();
    let cut = scratch.join("finetune-cut.pth");
    fs::write(&cut, &whole[..whole.len() / 2]).unwrap();

    let run = format!("init.run={}", source.display());
    let weights = format!("init.weights={}", pth.display());
    let empty = format!("init.run={}", empty.display());
    let cut = format!("init.weights={}", cut.display());
    let probe = "init.freeze=backbone";
    let shallow = ["model.depths=[2,1]", "moe.blocks=[[1],[-1]]"];
    let cases: [(&str, &[&str], &[&str]); 20] = [
        (
            "an unknown freeze",
            &[&run, "init.freeze=head"],
            &["init.freeze", "`none` or `backbone`"],
        ),
        (
            "nothing to freeze",
            &[probe],
            &["init.freeze is \"backbone\" without weights", "init.run"],
        ),
        (
            "two sources",
            &[&run, &weights],
            &["one of init.run and init.weights"],
        ),
        ("a slip in a key", &["init.rum=x"], &["did you mean `run`?"]),
        (
            "a missing run",
            &["init.run=finetune-missing"],
            &["finetune-missing", "there is no such run directory"],
        ),
        (
            "a missing run, frozen",
            &["init.run=finetune-missing", probe],
            &["there is no such run directory"],
        ),
        (
            "a run without checkpoints",
            &[&empty],
            &["there is no checkpoint"],
        ),
        (
            "missing weights",
            &["init.weights=finetune-missing.pth"],
            &["finetune-missing.pth"],
        ),
        (
            "weights of no known kind",
            &["init.weights=finetune.toml"],
            &["unknown kind of checkpoint"],
        ),
        ("half a file", &[&cut], &["not a readable checkpoint"]),
        (
            "classes that the data lack, frozen",
            &[&run, probe, "model.num_classes=9"],
            &["the data has 10 classes"],
        ),
        (
            "a run that is deeper",
            &[&run, shallow[0], shallow[1]],
            &["unexpected: layers.1.blocks.1", "[model] and [moe]"],
        ),
        (
            "weights that are deeper",
            &[&weights, shallow[0], shallow[1]],
            &["unexpected  layers.1.blocks.1", "[model] and [moe]"],
        ),
        (
            "a run that is shallower",
            &[&run, "model.depths=[2,3]", probe],
            &["missing: layers.1.blocks.2"],
        ),
        (
            "weights that are shallower",
            &[&weights, "model.depths=[2,3]", probe],
            &["missing     layers.1.blocks.2"],
        ),
        (
            "a run that is narrower",
            &[&run, "model.embed_dim=32"],
            &[
                "of another shape",
                "head.weight (got [48, 10], allowed [64, 10])",
            ],
        ),
        (
            "weights that are narrower",
            &[&weights, "model.embed_dim=32"],
            &["mis-shaped  head.weight: file [10, 48], model [10, 64]"],
        ),
        (
            "other patches",
            &[&run, "model.patch_size=4"],
            &["patch_embed.proj.weight (got [12, 24], allowed [48, 24])"],
        ),
        (
            "other experts",
            &[&weights, "moe.num_experts=5"],
            &["mis-shaped", "experts.batched_fc1_w"],
        ),
        (
            "dense blocks",
            &[&run, "moe.blocks=[[],[1]]"],
            &[
                "missing: layers.0.blocks.1.mlp",
                "unexpected: layers.0.blocks.1.mlp",
            ],
        ),
    ];
    let train = words(&format!(
        "train --output never-made --config {}",
        config.display()
    ));
    cases
        .into_iter()
        .map(|(name, settings, says)| {
            let arguments = [&train[..], &sets(settings)].concat();
            Case::new(format!("fine-tuning: {name}"), arguments, says)
        })
        .collect()
}
