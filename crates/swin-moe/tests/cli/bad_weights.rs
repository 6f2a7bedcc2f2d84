//! Published weights that are damaged, or do not belong to the model.

use std::fs;
use std::ops::Range;
use std::path::Path;

use crate::bad_input::Case;
use crate::files::{Numbers, archive};
use crate::harness::{TOP1_LINEAR, fixture, words};

/// Damaged copies of each kind of file.
const COPIES: usize = 8;

pub fn cases(scratch: &Path) -> Vec<Case> {
    let config = scratch.join("top1.toml");
    fs::write(&config, TOP1_LINEAR).unwrap();
    let mut cases = published(scratch, &config);
    cases.extend(pickles(scratch, &config));
    cases
}

fn import(weights: &Path, config: &Path, number: usize, more: &str) -> Vec<String> {
    words(&format!(
        "import {} --config {} --output imported-{number} {more}",
        weights.display(),
        config.display()
    ))
}

/// Weights in the published names.
fn published(scratch: &Path, config: &Path) -> Vec<Case> {
    let mut cases = Vec::new();
    let mut numbers = Numbers(2);
    for (kind, name) in [
        ("pth", "top1_linear/checkpoint.pth"),
        ("safetensors", "top2_cosine/weights.safetensors"),
    ] {
        let whole = fs::read(fixture(name)).unwrap();
        for copy in 0..COPIES {
            let length = numbers.below(whole.len());
            let path = scratch.join(format!("cut-{copy}.{kind}"));
            fs::write(&path, &whole[..length]).unwrap();
            let name = format!("{kind} of {length} of {} bytes", whole.len());
            let arguments = import(&path, config, copy, "");
            cases.push(Case::new(name, arguments, &["not a readable checkpoint"]));
        }
        // In safetensors, a flip in the numbers makes other numbers: only the header can be wrong.
        let places = match kind {
            "pth" => entries(&fixture(name)),
            _ => std::iter::once(0..9).collect(),
        };
        for copy in 0..COPIES {
            let place = places[numbers.below(places.len())].clone();
            let at = place.start + numbers.below(place.len());
            let mut bytes = whole.clone();
            bytes[at] ^= 1 << numbers.below(8);
            let path = scratch.join(format!("flip-{copy}.{kind}"));
            fs::write(&path, bytes).unwrap();
            let name = format!("{kind} with another bit in byte {at}");
            let arguments = import(&path, config, copy, "");
            cases.push(Case::new(name, arguments, &["error"]));
        }
    }
    let pth = fixture("top1_linear/checkpoint.pth");
    let renamed = scratch.join("weights.txt");
    fs::copy(&pth, &renamed).unwrap();
    let disguised = scratch.join("disguised.safetensors");
    fs::copy(&pth, &disguised).unwrap();
    let other = fixture("top2_cosine/weights.safetensors");
    let missing = scratch.join("missing.pth");
    for (name, path, more, says) in [
        ("a missing file", &missing, "", "missing.pth"),
        (
            "an unknown extension",
            &renamed,
            "",
            "unknown kind of checkpoint",
        ),
        (
            "a .pth that calls itself safetensors",
            &disguised,
            "",
            "not a readable checkpoint",
        ),
        (
            "another model's weights",
            &other,
            "",
            "does not fit the model",
        ),
        (
            "a wider model",
            &pth,
            "--set model.embed_dim=32",
            "does not fit the model",
        ),
        (
            "another router",
            &pth,
            "--set moe.router=cosine",
            "does not fit the model",
        ),
        (
            "no number of classes",
            &pth,
            "--set model.num_classes=0",
            "--set model.num_classes=N",
        ),
        ("a directory", &scratch.join("dir.pth"), "", "dir.pth"),
    ] {
        fs::create_dir_all(scratch.join("dir.pth")).unwrap();
        let arguments = import(path, config, 99, more);
        cases.push(Case::new(format!("import of {name}"), arguments, &[says]));
    }
    let upcycle = |line: &str| words(&format!("upcycle {line} --output upcycled"));
    let (pth, config) = (pth.display(), config.display());
    for (name, line, says) in [
        ("nothing", String::new(), "--weights"),
        (
            "weights without settings",
            format!("--weights {pth}"),
            "--config",
        ),
        (
            "weights with experts",
            format!("--weights {pth} --config {config}"),
            "it has experts already",
        ),
        (
            "weights without a number of classes",
            format!("--weights {pth} --config {config} --set model.num_classes=0"),
            "--set model.num_classes=N",
        ),
        (
            "a missing file",
            format!("--weights {} --config {config}", missing.display()),
            "missing.pth",
        ),
        (
            "a missing run",
            "--run missing-run".to_owned(),
            "missing-run",
        ),
    ] {
        cases.push(Case::new(
            format!("upcycling of {name}"),
            upcycle(&line),
            &[says],
        ));
    }
    cases
}

/// Where the pickle and the storages of a `.pth` are; between them is what nobody reads.
fn entries(path: &Path) -> Vec<Range<usize>> {
    let mut zip = zip::ZipArchive::new(fs::File::open(path).unwrap()).unwrap();
    let mut places = Vec::new();
    for index in 0..zip.len() {
        let file = zip.by_index(index).unwrap();
        if file.name().ends_with("/data.pkl") || file.name().contains("/data/") {
            let start = file.data_start().unwrap() as usize;
            places.push(start..start + file.size() as usize);
        }
    }
    places
}

/// Zip archives with pickles that no PyTorch has written.
fn pickles(scratch: &Path, config: &Path) -> Vec<Case> {
    // A tensor "w": _rebuild_tensor_v2(storage("0", 4 f32), 0, shape, strides).
    let tensor = |shape: &[u8], strides: &[u8]| {
        [
            &b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n("[..],
            &b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000"[..],
            b"X\x03\x00\x00\x00cpuK\x04tQK\x00",
            shape,
            strides,
            b"\x89}tRs.",
        ]
        .concat()
    };
    let huge = b"\x8a\x07\xff\xff\xff\xff\xff\xff\x00\x85";
    let nested = [
        &b"\x80\x02"[..],
        &b"]".repeat(1 << 20),
        &b"a".repeat((1 << 20) - 1),
        b".",
    ]
    .concat();
    let system = b"cos\nsystem\nX\x0b\x00\x00\x00touch owned\x85R.";
    let entries: [(&str, &str, &[u8], &str); 9] = [
        ("no data.pkl", "archive/other.pkl", b"", "no data.pkl"),
        ("an empty pickle", "archive/data.pkl", b"", "ends too early"),
        (
            "a list a million deep",
            "archive/data.pkl",
            &nested,
            "not a dictionary",
        ),
        (
            "a call of a command",
            "archive/data.pkl",
            system,
            "not a dictionary",
        ),
        (
            "a string of 2^60 bytes",
            "archive/data.pkl",
            b"\x8d\0\0\0\0\0\0\0\x10",
            "too early",
        ),
        (
            "a pop of nothing",
            "archive/data.pkl",
            b"0.",
            "stack is empty",
        ),
        (
            "a mark without items",
            "archive/data.pkl",
            b"t.",
            "lacks a mark",
        ),
        (
            "a tensor of 2^48 elements",
            "archive/data.pkl",
            &tensor(huge, b"K\x01\x85"),
            "larger than the file",
        ),
        (
            "a tensor repeated by stride 0",
            "archive/data.pkl",
            &tensor(huge, b"K\x00\x85"),
            "larger than the file",
        ),
    ];
    let mut cases = Vec::new();
    for (number, (name, entry, pickle, says)) in entries.into_iter().enumerate() {
        let path = scratch.join(format!("pickle-{number}.pth"));
        archive(&path, &[(entry, pickle), ("archive/data/0", &[0; 16])]);
        let arguments = import(&path, config, 98, "");
        let says = ["not a readable checkpoint", says];
        cases.push(Case::new(format!("a .pth with {name}"), arguments, &says));
    }
    // The machinery above is right: with four elements it is a tensor, of another model.
    let path = scratch.join("pickle-good.pth");
    let pickle = tensor(b"K\x04\x85", b"K\x01\x85");
    archive(&path, &[("a/data.pkl", &pickle), ("a/data/0", &[0; 16])]);
    let arguments = import(&path, config, 98, "");
    cases.push(Case::new(
        "a .pth of another model",
        arguments,
        &["does not fit the model"],
    ));
    cases
}
