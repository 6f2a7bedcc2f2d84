//! Operations against Pillow's, draws against timm's: `tools/augment_oracle.py` wrote both.

use std::collections::BTreeMap;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::Deserialize;

use super::ops::Op;
use super::rand_augment::Kind;
use super::{ColorJitter, Mix, Mixer, RandAugment, RandomErasing};
use crate::config::{MixConfig, RandAugmentConfig};
use crate::data::Batch;
use crate::data::pixels::{Area, Pixels};

#[derive(Deserialize)]
struct Oracle {
    fill: [u8; 3],
    images: Vec<ImageCases>,
    rand_augment: BTreeMap<String, Level>,
    erasing: BTreeMap<usize, Erased>,
    mixing: BTreeMap<usize, Mixed>,
}

#[derive(Deserialize)]
struct ImageCases {
    image: Record,
    operations: Vec<Operation>,
    resized: Vec<Record>,
}

#[derive(Deserialize)]
struct Record {
    width: usize,
    height: usize,
    channels: usize,
    bytes: String,
}

#[derive(Deserialize)]
struct Operation {
    op: String,
    argument: Option<f64>,
    result: Record,
}

#[derive(Deserialize, Clone, Copy)]
struct Moments {
    count: usize,
    mean: f64,
    std: f64,
}

#[derive(Deserialize)]
struct Level {
    applied: f64,
    #[serde(flatten)]
    argument: Moments,
}

#[derive(Deserialize)]
struct Erased {
    applied: f64,
    top: Moments,
    left: Moments,
    height: Moments,
    width: Moments,
    area: Moments,
}

#[derive(Deserialize)]
struct Mixed {
    left_alone: f64,
    blends: f64,
    blend_share: Moments,
    paste_share: Moments,
    paste_rows: Moments,
    paste_columns: Moments,
}

fn oracle() -> Oracle {
    serde_json::from_str(include_str!("../../../tests/fixtures/augment.json")).unwrap()
}

impl Record {
    fn pixels(&self) -> Pixels {
        let byte = |at: usize| u8::from_str_radix(&self.bytes[2 * at..2 * at + 2], 16).unwrap();
        let bytes = (0..self.bytes.len() / 2).map(byte).collect();
        Pixels::new(self.width, self.height, self.channels, bytes).unwrap()
    }
}

fn operation(name: &str, argument: Option<f64>) -> Op {
    let x = argument.unwrap_or_default();
    match name {
        "AutoContrast" => Op::AutoContrast,
        "Equalize" => Op::Equalize,
        "Invert" => Op::Invert,
        "Rotate" => Op::Rotate(x),
        "Posterize" => Op::Posterize(x as u32),
        "Solarize" => Op::Solarize(x as u32),
        "SolarizeAdd" => Op::SolarizeAdd(x as u32),
        "Color" => Op::Color(x as f32),
        "Contrast" => Op::Contrast(x as f32),
        "Brightness" => Op::Brightness(x as f32),
        "Sharpness" => Op::Sharpness(x as f32),
        "ShearX" => Op::ShearX(x),
        "ShearY" => Op::ShearY(x),
        "TranslateX" => Op::TranslateX(x),
        "TranslateY" => Op::TranslateY(x),
        other => panic!("{other}"),
    }
}

/// Largest difference of two images' bytes, and how many differ.
fn difference(a: &Pixels, b: &Pixels) -> (u8, usize) {
    assert_eq!((a.width(), a.height()), (b.width(), b.height()));
    let pairs = a.data().iter().zip(b.data());
    let differences: Vec<u8> = pairs.map(|(a, b)| a.abs_diff(*b)).collect();
    let most = differences.iter().copied().max().unwrap_or(0);
    (most, differences.iter().filter(|&&d| d > 0).count())
}

#[test]
fn operations_are_pillows() {
    let oracle = oracle();
    let mut changed = BTreeMap::new();
    for case in &oracle.images {
        let image = case.image.pixels();
        for Operation {
            op,
            argument,
            result,
        } in &case.operations
        {
            let mut got = image.clone();
            let fill = &oracle.fill[..image.channels()];
            operation(op, *argument).apply(&mut got, fill);
            let expected = result.pixels();
            let (most, count) = difference(&got, &expected);
            // A value on the edge between two bytes may fall to either side, in few places.
            let rare = count * 50 <= got.data().len();
            assert!(
                most <= 1 && rare,
                "{op} {argument:?}: {most}, {count} bytes"
            );
            *changed.entry(op.clone()).or_insert(false) |= difference(&got, &image).1 > 0;
        }
    }
    assert_eq!(changed.len(), Kind::ALL.len());
    let unchanged: Vec<_> = changed.iter().filter(|(_, changed)| !**changed).collect();
    assert!(
        unchanged.is_empty(),
        "no case shows anything of {unchanged:?}"
    );
}

#[test]
fn no_bit_is_kept_at_the_greatest_magnitude() {
    let mut image = oracle().images[0].image.pixels();
    assert_eq!(Kind::Posterize.at(10.0, false), Op::Posterize(0));
    Op::Posterize(0).apply(&mut image, &[0; 3]);
    assert!(image.data().iter().all(|&v| v == 0));
}

/// Random parts are resized as Pillow does it: bicubic, the filter widened when shrinking.
#[test]
fn resizing_is_pillows() {
    for case in oracle().images {
        let image = case.image.pixels();
        let whole = Area {
            x: 0,
            y: 0,
            width: image.width() as u32,
            height: image.height() as u32,
        };
        for expected in case.resized.iter().map(Record::pixels) {
            let got = image.resized(whole, expected.width(), expected.height());
            // Pillow rounds its weights, and the values between its two passes.
            assert!(difference(&got, &expected).0 <= 2);
        }
    }
}

fn rng() -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(3)
}

/// Both are means of finite samples; six standard errors of their difference never happen.
#[track_caller]
fn assert_same_mean(what: &str, got: &[f64], expected: Moments) {
    let count = got.len() as f64;
    let mean = got.iter().sum::<f64>() / count;
    let std = (got.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / count).sqrt();
    let error = expected.std * (1.0 / count + 1.0 / expected.count as f64).sqrt();
    assert!(
        (mean - expected.mean).abs() <= 6.0 * error + 1e-9,
        "{what}: mean {mean}, expected {} ± {error}",
        expected.mean
    );
    // The spread of a spread is smaller than that of a value, of light-tailed distributions.
    assert!(
        (std - expected.std).abs() <= 12.0 * error + 1e-9,
        "{what}: spread {std}, expected {} ± {error}",
        expected.std
    );
}

#[track_caller]
fn assert_same_share(what: &str, got: usize, of: usize, expected: f64, of_expected: usize) {
    let share = got as f64 / of as f64;
    let variance = expected * (1.0 - expected);
    let error = (variance * (1.0 / of as f64 + 1.0 / of_expected as f64)).sqrt();
    assert!(
        (share - expected).abs() <= 6.0 * error,
        "{what}: {share}, expected {expected} ± {error}"
    );
}

fn name_and_argument(op: Op) -> (&'static str, f64) {
    match op {
        Op::AutoContrast => ("AutoContrast", 0.0),
        Op::Equalize => ("Equalize", 0.0),
        Op::Invert => ("Invert", 0.0),
        Op::Rotate(x) => ("Rotate", x),
        Op::Posterize(x) => ("PosterizeIncreasing", x.into()),
        Op::Solarize(x) => ("SolarizeIncreasing", x.into()),
        Op::SolarizeAdd(x) => ("SolarizeAdd", x.into()),
        Op::Color(x) => ("ColorIncreasing", x.into()),
        Op::Contrast(x) => ("ContrastIncreasing", x.into()),
        Op::Brightness(x) => ("BrightnessIncreasing", x.into()),
        Op::Sharpness(x) => ("SharpnessIncreasing", x.into()),
        Op::ShearX(x) => ("ShearX", x),
        Op::ShearY(x) => ("ShearY", x),
        Op::TranslateX(x) => ("TranslateXRel", x),
        Op::TranslateY(x) => ("TranslateYRel", x),
    }
}

#[test]
fn rand_augment_draws_as_timm_does() {
    const DRAWS: usize = 300_000;
    let config = RandAugmentConfig {
        magnitude: 9.0,
        std: 0.5,
        layers: 2,
        probability: 0.5,
    };
    let rand_augment = RandAugment::new(config, &[0.5; 3]);
    let mut drawn: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    let mut rng = rng();
    for _ in 0..DRAWS {
        if let Some(op) = rand_augment.draw(&mut rng) {
            let (name, argument) = name_and_argument(op);
            drawn.entry(name).or_default().push(argument);
        }
    }
    let oracle = oracle().rand_augment;
    assert!(drawn.keys().copied().eq(oracle.keys().map(String::as_str)));
    for (name, level) in oracle {
        let arguments = &drawn[name.as_str()];
        let share = 0.5 / Kind::ALL.len() as f64;
        assert_same_share(&name, arguments.len(), DRAWS, share, usize::MAX);
        assert!((level.applied - 0.5).abs() < 0.02);
        assert_same_mean(&name, arguments, level.argument);
    }
}

#[test]
fn erased_parts_are_timms() {
    const DRAWS: usize = 200_000;
    for (size, expected) in oracle().erasing {
        let erasing = RandomErasing::new(0.25);
        let mut rng = rng();
        let parts: Vec<_> = (0..DRAWS)
            .filter_map(|_| erasing.draw(size, &mut rng))
            .collect();
        let of = 2 * DRAWS;
        assert_same_share("erased", parts.len(), DRAWS, expected.applied, of);
        let values = |of: fn(&super::erase::Rectangle) -> usize| -> Vec<f64> {
            parts.iter().map(|part| of(part) as f64).collect()
        };
        assert_same_mean("top", &values(|p| p.top), expected.top);
        assert_same_mean("left", &values(|p| p.left), expected.left);
        assert_same_mean("height", &values(|p| p.height), expected.height);
        assert_same_mean("width", &values(|p| p.width), expected.width);
        assert_same_mean("area", &values(|p| p.height * p.width), expected.area);
    }
}

/// Inside of the rectangle are standard normal numbers, outside is what was there.
#[test]
fn erasing_writes_noise_into_one_rectangle() {
    let (size, channels) = (24, 3);
    let erasing = RandomErasing::new(1.0);
    let mut rng = rng();
    let mut noise = Vec::new();
    for _ in 0..200 {
        let part = erasing.draw(size, &mut rng.clone()).unwrap();
        let mut values = vec![9.0f32; channels * size * size];
        erasing.apply(&mut values, size, &mut rng);
        for (at, &v) in values.iter().enumerate() {
            let (row, column) = (at / size % size, at % size);
            let inside = (part.top..part.top + part.height).contains(&row)
                && (part.left..part.left + part.width).contains(&column);
            assert_eq!(v != 9.0, inside, "{part:?} {row} {column}");
            if inside {
                noise.push(f64::from(v));
            }
        }
    }
    let standard = Moments {
        count: usize::MAX,
        mean: 0.0,
        std: 1.0,
    };
    assert_same_mean("noise", &noise, standard);
}

#[test]
fn colour_jitter_is_uniform_in_every_order() {
    const DRAWS: usize = 60_000;
    let jitter = ColorJitter::new(0.4);
    let mut rng = rng();
    let mut factors: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    let mut orders: BTreeMap<Vec<&str>, usize> = BTreeMap::new();
    for _ in 0..DRAWS {
        let ops = jitter.draw(&mut rng).map(name_and_argument);
        for (name, factor) in ops {
            factors.entry(name).or_default().push(factor);
        }
        *orders
            .entry(ops.map(|(name, _)| name).to_vec())
            .or_default() += 1;
    }
    // Uniform on 0.6..1.4.
    let uniform = Moments {
        count: usize::MAX,
        mean: 1.0,
        std: 0.8 / 12f64.sqrt(),
    };
    assert_eq!((factors.len(), orders.len()), (3, 6));
    for (name, factors) in &factors {
        assert!(factors.iter().all(|f| (0.599..1.401).contains(f)));
        assert_same_mean(name, factors, uniform);
    }
    for (order, count) in orders {
        assert_same_share(&format!("{order:?}"), count, DRAWS, 1.0 / 6.0, usize::MAX);
    }
}

#[test]
fn batches_are_mixed_as_timm_does() {
    const DRAWS: usize = 200_000;
    let config = MixConfig {
        mixup: 0.8,
        cutmix: 1.0,
        probability: 0.7,
        switch_probability: 0.4,
    };
    for (size, expected) in oracle().mixing {
        let mixer = Mixer::new(config).unwrap();
        let mut rng = rng();
        let (mut alone, mut blends) = (0, Vec::new());
        let (mut shares, mut heights, mut widths) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..DRAWS {
            let mix = mixer.draw(size, &mut rng);
            match mix {
                None => alone += 1,
                Some(Mix::Blend { share }) => blends.push(f64::from(share)),
                Some(mix @ Mix::Paste { rows, columns }) => {
                    assert!(rows[0] <= rows[1] && rows[1] <= size);
                    shares.push(f64::from(mix.share(size)));
                    heights.push((rows[1] - rows[0]) as f64);
                    widths.push((columns[1] - columns[0]) as f64);
                }
            }
        }
        let of = 2 * DRAWS;
        assert_same_share("left alone", alone, DRAWS, expected.left_alone, of);
        assert_same_share("blends", blends.len(), DRAWS, expected.blends, of);
        assert_same_mean("blend", &blends, expected.blend_share);
        assert_same_mean("paste", &shares, expected.paste_share);
        assert_same_mean("rows", &heights, expected.paste_rows);
        assert_same_mean("columns", &widths, expected.paste_columns);
    }
}

#[test]
fn one_method_alone_and_none() {
    let config = MixConfig {
        mixup: 0.0,
        cutmix: 1.0,
        probability: 1.0,
        switch_probability: 0.0,
    };
    let mut rng = rng();
    let paste = Mixer::new(config).unwrap();
    assert!((0..50).all(|_| matches!(paste.draw(8, &mut rng), Some(Mix::Paste { .. }))));
    let blend = Mixer::new(MixConfig {
        mixup: 0.5,
        cutmix: 0.0,
        ..config
    });
    let blend = blend.unwrap();
    assert!((0..50).all(|_| matches!(blend.draw(8, &mut rng), Some(Mix::Blend { .. }))));
    for off in [
        MixConfig {
            cutmix: 0.0,
            ..config
        },
        MixConfig {
            probability: 0.0,
            ..config
        },
    ] {
        assert!(Mixer::new(off).is_none());
    }
}

fn batch(images: usize) -> Batch {
    let (channels, size) = (2, 5);
    let len = channels * size * size;
    Batch {
        images: (0..images * len).map(|i| (i / len) as f32).collect(),
        labels: (0..images as u32).map(|i| 10 + i).collect(),
        partners: None,
        share: 1.0,
        indices: (0..images as u32).collect(),
        shape: [images, channels, size, size],
        position: 0,
    }
}

/// Image i holds the number i everywhere: its mean says how much of whom is in it.
#[test]
fn targets_have_the_shares_of_the_pixels() {
    for (mixup, cutmix) in [(0.8, 0.0), (0.0, 1.0)] {
        let mixer = Mixer::new(MixConfig {
            mixup,
            cutmix,
            probability: 1.0,
            switch_probability: 0.5,
        });
        let mixer = mixer.unwrap();
        let mut rng = rng();
        for images in [1, 4, 5] {
            let mut mixed = batch(images);
            mixer.apply(&mut mixed, &mut rng);
            let partners = mixed.partners.clone().unwrap();
            let values = mixed.images.chunks_exact(mixed.images.len() / images);
            for (image, values) in values.enumerate() {
                let mean = values.iter().sum::<f32>() / values.len() as f32;
                let [own, other] = [mixed.labels[image], partners[image]].map(|c| c as f32 - 10.0);
                assert_eq!(other as usize, images - 1 - image);
                let expected = mixed.share * own + (1.0 - mixed.share) * other;
                assert!((mean - expected).abs() < 1e-5, "{mean} {expected}");
            }
        }
    }
}

#[test]
fn parts_of_a_batch_are_the_batch() {
    for images in [1, 5, 8] {
        for parts in [1, 2, 3, 8, 20] {
            let mut whole = batch(images);
            whole.partners = Some(whole.labels.iter().rev().copied().collect());
            whole.share = 0.25;
            let cut = whole.clone().into_parts(parts);
            assert_eq!(cut.len(), parts.min(images));
            let sizes: Vec<usize> = cut.iter().map(Batch::len).collect();
            let (least, most) = (sizes.iter().min().unwrap(), sizes.iter().max().unwrap());
            assert!(most - least <= 1, "{sizes:?}");
            for part in &cut {
                assert_eq!(part.shape, [part.len(), 2, 5, 5]);
                assert_eq!(part.share, 0.25);
            }
            let images: Vec<f32> = cut.iter().flat_map(|p| p.images.clone()).collect();
            let labels: Vec<u32> = cut.iter().flat_map(|p| p.labels.clone()).collect();
            let partners = cut.iter().flat_map(|p| p.partners.clone().unwrap());
            assert!(images == whole.images && labels == whole.labels);
            assert!(partners.eq(whole.partners.unwrap()));
        }
    }
}
