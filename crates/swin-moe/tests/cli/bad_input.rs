//! Bad input of every kind: a non-zero status and one clear message, never a panic.

use std::io::Write;

use crate::harness::{Said, program};
use crate::{bad_arguments, bad_configs, bad_data, bad_files, bad_finetune, bad_weights};

/// One bad input.
pub struct Case {
    /// What is bad.
    pub name: String,
    /// The program's arguments.
    pub arguments: Vec<String>,
    /// What the message must contain, among others.
    pub says: Vec<String>,
}

impl Case {
    pub fn new(name: impl Into<String>, arguments: Vec<String>, says: &[&str]) -> Self {
        Self {
            name: name.into(),
            arguments,
            says: says.iter().map(|&text| text.to_owned()).collect(),
        }
    }
}

/// Exit statuses of a panic: one that the program caught, and one that it did not.
const DEFECTS: [i32; 2] = [70, 101];

/// What no message may contain.
const NEVER: [&str; 5] = [
    "panicked",
    "a defect in this program",
    "stack backtrace",
    "RUST_BACKTRACE",
    "called `",
];

/// What is wrong with the program's answer, if anything.
fn complaint(case: &Case, said: &Said) -> Option<String> {
    let Said { status, stderr, .. } = said;
    let Some(status) = *status else {
        return Some("it was killed".into());
    };
    if status == 0 || DEFECTS.contains(&status) {
        return Some(format!("status {status}"));
    }
    if let Some(words) = NEVER.iter().find(|words| stderr.contains(**words)) {
        return Some(format!("it says {words:?}"));
    }
    let errors = stderr.lines().filter(|line| line.starts_with("error: "));
    if errors.count() != 1 {
        return Some("there is not one line with `error: `".into());
    }
    let missing = case.says.iter().find(|text| !stderr.contains(*text))?;
    Some(format!("it does not say {missing:?}"))
}

#[test]
fn every_bad_input_ends_with_one_clear_message() {
    let scratch = tempfile::tempdir().unwrap();
    let mut cases = bad_arguments::cases(scratch.path());
    cases.extend(bad_configs::cases(scratch.path()));
    cases.extend(bad_data::cases(scratch.path()));
    cases.extend(bad_files::cases(scratch.path()));
    cases.extend(bad_finetune::cases(scratch.path()));
    cases.extend(bad_weights::cases(scratch.path()));
    // Past the test harness, which keeps back what passing tests print.
    let _ = writeln!(std::io::stderr(), "{} bad inputs", cases.len());
    assert!(cases.len() >= 50, "{} bad inputs", cases.len());

    let mut failures = Vec::new();
    for case in &cases {
        let mut command = program(&case.arguments);
        let said = Said::from(command.current_dir(scratch.path()).output().unwrap());
        if let Some(complaint) = complaint(case, &said) {
            failures.push(format!("{}: {complaint}\n{}", case.name, said.stderr));
        }
    }
    assert!(
        failures.is_empty(),
        "{} of {}:\n{}",
        failures.len(),
        cases.len(),
        failures.join("\n")
    );
}
