//! Folders and images that are missing, damaged or not what they seem.

use std::fs;
use std::path::Path;

use crate::bad_input::Case;
use crate::files::{image_folder, jpeg, png_of_size};
use crate::harness::{TINY, sets, words};

/// Training on a folder, one epoch of two batches.
fn train(folder: &Path, output: &Path, settings: &[&str]) -> Vec<String> {
    let line = format!(
        "train --data {} --output {}",
        folder.display(),
        output.display()
    );
    let mut arguments = words(&line);
    arguments.extend(sets(&TINY));
    arguments.extend(sets(&[
        "train.batch_size=4",
        "train.epochs=1",
        "train.warmup_epochs=0",
    ]));
    arguments.extend(sets(settings));
    arguments
}

/// A change to a good folder, and what the answer must say.
type Damage = (&'static str, fn(&Path), &'static str);

const FOLDERS: [Damage; 11] = [
    (
        "missing",
        |root| fs::remove_dir_all(root).unwrap(),
        "there is no such folder",
    ),
    (
        "a file",
        |root| {
            fs::remove_dir_all(root).unwrap();
            fs::write(root, "not a folder").unwrap();
        },
        "there is no such folder",
    ),
    (
        "empty",
        |root| {
            fs::remove_dir_all(root.join("train")).unwrap();
            fs::remove_dir_all(root.join("test")).unwrap();
        },
        "no folder `train`",
    ),
    (
        "no train",
        |root| fs::remove_dir_all(root.join("train")).unwrap(),
        "no folder `train`",
    ),
    (
        "no test",
        |root| fs::remove_dir_all(root.join("test")).unwrap(),
        "neither val nor test",
    ),
    (
        "no classes",
        |root| {
            fs::remove_dir_all(root.join("train")).unwrap();
            fs::create_dir(root.join("train")).unwrap();
            fs::write(root.join("train/a.png"), jpeg()).unwrap();
        },
        "it has no class folders",
    ),
    (
        "a class without images",
        |root| {
            fs::remove_dir_all(root.join("train/up")).unwrap();
            fs::create_dir(root.join("train/up")).unwrap();
            fs::write(root.join("train/up/list.txt"), "a.png").unwrap();
        },
        "it has no images",
    ),
    (
        "a class less in test",
        |root| fs::remove_dir_all(root.join("test/down")).unwrap(),
        "only in train: down",
    ),
    (
        "another class in test",
        |root| fs::rename(root.join("test/down"), root.join("test/left")).unwrap(),
        "only in test: left",
    ),
    (
        "fewer images than a batch",
        |root| {
            for class in ["down", "up"] {
                for number in 1..8 {
                    let extension = ["png", "bmp", "PNG", "webp"][number % 4];
                    let path = root.join(format!("train/{class}/{number}.{extension}"));
                    fs::remove_file(path).unwrap();
                }
            }
        },
        "train.batch_size",
    ),
    (
        "test images that are folders",
        |root| {
            for class in ["down", "up"] {
                let dir = root.join("test").join(class);
                fs::remove_dir_all(&dir).unwrap();
                fs::create_dir_all(dir.join("0.png")).unwrap();
            }
        },
        "it has no images",
    ),
];

/// Files that are no images: name, content, the decoder's words.
fn broken_images() -> Vec<(&'static str, &'static str, Vec<u8>, &'static str)> {
    let jpeg = jpeg();
    let png = png_of_size(8, 8);
    vec![
        (
            "a truncated jpeg",
            "a.jpg",
            jpeg[..jpeg.len() - 9].to_vec(),
            "truncated",
        ),
        (
            "half a jpeg",
            "a.jpeg",
            jpeg[..jpeg.len() / 2].to_vec(),
            "truncated",
        ),
        ("no bytes", "a.png", Vec::new(), "the file is empty"),
        (
            "text",
            "a.png",
            b"I am no image\n".to_vec(),
            "not a known image format",
        ),
        (
            "a truncated png",
            "a.png",
            png[..png.len() / 2].to_vec(),
            "",
        ),
        (
            "a png of 10^10 pixels",
            "a.png",
            png_of_size(100_000, 100_000),
            "",
        ),
        (
            "a png of 2^62 pixels",
            "a.png",
            png_of_size(0x7fff_ffff, 0x7fff_ffff),
            "",
        ),
        ("a png without pixels", "a.png", png_of_size(0, 0), ""),
        (
            "a png of more rows than it has",
            "a.png",
            png_of_size(8, 9000),
            "",
        ),
        ("a gif's first bytes", "a.gif", b"GIF89a\x08".to_vec(), ""),
        (
            "a webp's first bytes",
            "a.webp",
            b"RIFF\xff\xff\xff\xffWEBPVP8 ".to_vec(),
            "",
        ),
        (
            "a bmp's first bytes",
            "a.bmp",
            b"BM\xff\xff\xff\xff".to_vec(),
            "",
        ),
    ]
}

pub fn cases(scratch: &Path) -> Vec<Case> {
    let mut cases = Vec::new();
    for (number, (name, damage, says)) in FOLDERS.into_iter().enumerate() {
        let root = image_folder(&scratch.join(format!("folder-{number}")));
        damage(&root);
        let arguments = train(&root, &scratch.join(format!("folder-run-{number}")), &[]);
        cases.push(Case::new(
            format!("image folder: {name}"),
            arguments,
            &[says],
        ));
    }
    for (number, (name, file, content, says)) in broken_images().into_iter().enumerate() {
        let root = image_folder(&scratch.join(format!("images-{number}")));
        let broken = root.join("train/up").join(file);
        fs::write(&broken, content).unwrap();
        let arguments = train(
            &root,
            &scratch.join(format!("image-run-{number}")),
            &["train.batch_size=1"],
        );
        let path = broken.display().to_string();
        let says = [says, &path, "1 unreadable images in the training split"];
        cases.push(Case::new(format!("image: {name}"), arguments, &says));
    }

    let root = image_folder(&scratch.join("three-broken"));
    for name in ["x.png", "y.png", "z.png"] {
        fs::write(root.join("test/down").join(name), "no image").unwrap();
    }
    // Training images are whole, and one unreadable image less is put up with than there is.
    let arguments = train(&root, &scratch.join("broken-run"), &["data.max_corrupt=2"]);
    let says = [
        "3 unreadable images in the evaluation split",
        "allowed are 2",
    ];
    cases.push(Case::new(
        "more unreadable images than allowed",
        arguments,
        &says,
    ));
    cases
}
