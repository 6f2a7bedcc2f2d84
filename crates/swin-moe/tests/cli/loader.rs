//! Image folders through the loader.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use swin_moe::config::Config;
use swin_moe::data::{Batch, DataError, Dataset, Loader, LoaderConfig, Split};

use crate::files::{image_folder, picture};

fn config(folder: &Path, settings: &[&str]) -> Config {
    let mut all = vec![
        format!("data.dir={}", folder.display()),
        "model.in_chans=3".to_owned(),
        "augment.mean=[0.0]".to_owned(),
        "augment.std=[1.0]".to_owned(),
    ];
    all.extend(settings.iter().map(|&setting| setting.to_owned()));
    Config::load(None, &all).unwrap()
}

fn dataset(config: &Config, split: Split) -> Arc<Dataset> {
    Arc::new(Dataset::open(config, split).unwrap())
}

/// A shuffled epoch of batches of three.
fn epoch(dataset: &Arc<Dataset>, workers: usize, epoch: u64) -> Vec<Result<Batch, DataError>> {
    let config = LoaderConfig {
        batch_size: 3,
        seed: 7,
        epoch,
        start_batch: 0,
        shuffle: true,
        drop_last: false,
        workers,
        part: None,
    };
    Loader::new(Arc::clone(dataset), config).unwrap().collect()
}

fn whole(batches: Vec<Result<Batch, DataError>>) -> Vec<Batch> {
    batches.into_iter().map(Result::unwrap).collect()
}

#[test]
fn images_are_what_was_written() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(&image_folder(dir.path()), &[]);
    let dataset = dataset(&config, Split::Eval);
    assert_eq!(dataset.class_names(), ["down", "up"]);
    let options = LoaderConfig {
        batch_size: 4,
        seed: 0,
        epoch: 0,
        start_batch: 0,
        shuffle: false,
        drop_last: false,
        workers: 2,
        part: None,
    };
    let batches = whole(Loader::new(dataset, options).unwrap().collect());
    let shapes: Vec<_> = batches.iter().map(|batch| batch.shape).collect();
    assert_eq!(shapes, [[4, 3, 8, 8], [2, 3, 8, 8]]);
    let labels: Vec<u32> = batches.iter().flat_map(|b| b.labels.clone()).collect();
    assert_eq!(labels, [0, 0, 0, 1, 1, 1]);
    // Without loss: png, bmp and png again, for each class.
    let values: Vec<f32> = batches.into_iter().flat_map(|batch| batch.images).collect();
    for (image, values) in values.chunks(3 * 8 * 8).enumerate() {
        let expected = picture(image as u32 / 3, image as u32 % 3);
        for (at, value) in values.iter().enumerate() {
            let (channel, y, x) = (at / 64, at / 8 % 8, at % 8);
            let pixel = expected.get_pixel(x as u32, y as u32)[channel];
            assert!(
                (value - f32::from(pixel) / 255.0).abs() < 1e-6,
                "{image} {at}"
            );
        }
    }
}

/// The first batch is never ready at once; waiting is a part of the time that passes.
#[test]
fn waiting_for_batches_is_counted() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(&image_folder(dir.path()), &[]);
    let options = LoaderConfig {
        batch_size: 3,
        seed: 7,
        epoch: 0,
        start_batch: 0,
        shuffle: true,
        drop_last: false,
        workers: 1,
        part: None,
    };
    let since = std::time::Instant::now();
    let mut loader = Loader::new(dataset(&config, Split::Train), options).unwrap();
    assert!(loader.waited().is_zero());
    assert_eq!(loader.next().unwrap().unwrap().len(), 3);
    let first = loader.waited();
    assert!(!first.is_zero() && first <= since.elapsed());
    while loader.next().is_some() {}
    assert!(loader.waited() >= first && loader.waited() <= since.elapsed());
}

#[test]
fn threads_change_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let settings = [
        "augment.flip=true",
        "augment.random_resized_crop=true",
        // Neither does the cache.
        "data.cache_bytes=600",
    ];
    let config = config(&image_folder(dir.path()), &settings);
    let dataset = dataset(&config, Split::Train);
    let alone = whole(epoch(&dataset, 1, 0));
    assert_eq!(alone.len(), 6);
    let mut indices: Vec<u32> = alone.iter().flat_map(|b| b.indices.clone()).collect();
    assert!(!indices.is_sorted());
    indices.sort_unstable();
    assert!(indices.into_iter().eq(0..16));
    for workers in [2, 3, 7, 16] {
        assert_eq!(
            whole(epoch(&dataset, workers, 0)),
            alone,
            "{workers} threads"
        );
    }
    assert_ne!(whole(epoch(&dataset, 2, 1)), alone);
}

/// Two unreadable files among sixteen.
fn damaged(root: &Path) {
    image_folder(root);
    fs::write(root.join("train/down/0.png"), "no image").unwrap();
    fs::write(root.join("train/up/5.bmp"), "").unwrap();
}

#[test]
fn unreadable_images_are_named_counted_and_left_out() {
    let dir = tempfile::tempdir().unwrap();
    damaged(dir.path());
    let config = config(dir.path(), &["data.max_corrupt=2"]);
    for workers in [1, 4] {
        let dataset = dataset(&config, Split::Train);
        let batches = whole(epoch(&dataset, workers, 0));
        assert_eq!(batches.iter().map(Batch::len).sum::<usize>(), 14);
        // An unreadable image is counted once, whatever the number of epochs.
        whole(epoch(&dataset, workers, 1));
        let named: Vec<_> = dataset
            .corrupt_files()
            .into_iter()
            .map(|file| (file.path, file.reason))
            .collect();
        let expected = [
            (
                "train/down/0.png",
                "the content is not a known image format",
            ),
            ("train/up/5.bmp", "the file is empty"),
        ]
        .map(|(path, reason)| (dir.path().join(path), reason.to_owned()));
        assert_eq!(named, expected);
    }
}

#[test]
fn one_unreadable_image_too_many_ends_the_epoch() {
    let dir = tempfile::tempdir().unwrap();
    damaged(dir.path());
    let config = config(dir.path(), &["data.max_corrupt=1"]);
    for workers in [1, 4] {
        let batches = epoch(&dataset(&config, Split::Train), workers, 0);
        let error = batches.last().unwrap().as_ref().unwrap_err().to_string();
        assert!(error.contains("2 unreadable images"), "{error}");
        assert!(
            error.contains("0.png") && error.contains("5.bmp"),
            "{error}"
        );
        assert!(batches[..batches.len() - 1].iter().all(Result::is_ok));
    }
}
