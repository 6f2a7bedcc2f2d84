//! `inspect`: pictures of experts, from image files to a page.

use std::fs;

use image::{Rgb, RgbImage};

use crate::files::write_picture;
use crate::harness::{last_checkpoint, run, succeed, train_tiny, words};

#[test]
fn pictures_of_all_layers_are_on_the_page() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    train_tiny(
        &run,
        &["model.in_chans=1", "train.epochs=1"],
        "--max-steps 1",
    );
    // Of another size and format than the run's.
    write_picture(&dir.path().join("one.gif"), 0, 3);
    let wide = RgbImage::from_pixel(40, 20, Rgb([200, 30, 90]));
    wide.save(dir.path().join("two.png")).unwrap();

    let images = format!("{0}/one.gif {0}/two.png", dir.path().display());
    let said = succeed(&words(&format!("inspect --run {} {images}", run.display()))).stdout;
    let page = run.join("inspect/inspect.html");
    assert_eq!(said, format!("6 pictures: {}\n", page.display()));
    let html = fs::read_to_string(&page).unwrap();
    for stem in ["001-one", "002-two"] {
        // 8 pixels are enlarged to 384, beside a legend.
        for (picture, width) in [("input", 384), ("layer-0", 530), ("layer-1", 530)] {
            let name = format!("{stem}-{picture}.png");
            assert!(html.contains(&format!("src=\"{name}\"")), "{html}");
            let image = image::open(run.join("inspect").join(&name)).unwrap();
            assert_eq!((image.width(), image.height()), (width, 384), "{name}");
        }
    }
    for text in [
        "MoE layer 0: stage 0, block 0, 4 × 4 patches",
        "MoE layer 1: stage 1, block 0, 2 × 2 patches",
        "taken for: ",
    ] {
        assert_eq!(html.matches(&format!(">{text}")).count(), 2, "{text}");
    }
    assert!(!html.contains("http") && !html.contains("<script"));

    // A second time, over the first, from a checkpoint.
    let before = fs::read(run.join("inspect/002-two-layer-0.png")).unwrap();
    let line = format!(
        "inspect --checkpoint {} --output {} {images}",
        last_checkpoint(&run).display(),
        run.join("inspect").display()
    );
    succeed(&words(&line));
    let after = fs::read(run.join("inspect/002-two-layer-0.png")).unwrap();
    assert!(before == after);
}

#[test]
fn a_model_without_experts_has_nothing_to_show() {
    let dir = tempfile::tempdir().unwrap();
    let dense = dir.path().join("dense");
    train_tiny(
        &dense,
        &["moe.blocks=[[-1],[-1]]", "train.epochs=1"],
        "--max-steps 1",
    );
    let picture = dir.path().join("picture.png");
    write_picture(&picture, 0, 1);
    let line = format!("inspect --run {} {}", dense.display(), picture.display());
    let said = run(&words(&line));
    assert_eq!(said.status, Some(1), "{said:?}");
    assert!(
        said.stderr.contains("no Mixture-of-Experts layer"),
        "{said:?}"
    );
    assert!(!dense.join("inspect").exists());
}
