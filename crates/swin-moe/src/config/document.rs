//! The TOML document: names, types, overrides, and where each value came from.

use std::collections::BTreeMap;

use serde::Deserialize;
use toml::de::DeTable;
use toml::{Table, Value};

use super::error::ConfigError;
use super::fields::field_names;
use super::raw::{
    RawAugment, RawCheckpoint, RawConfig, RawData, RawInit, RawModel, RawMoe, RawParallel, RawTrain,
};

/// Values longer than this are cut in messages.
const MAX_SHOWN_CHARS: usize = 60;

/// A parsed document whose sections and keys exist and whose values have the right types.
#[derive(Debug, Clone)]
pub(super) struct Document {
    origin: String,
    table: Table,
    /// Dotted key → file and line, or the override.
    places: BTreeMap<String, String>,
}

impl Document {
    /// Parses a document and checks its names and types.
    pub(super) fn parse(text: &str, origin: &str) -> Result<Self, ConfigError> {
        let spans = DeTable::parse(text).map_err(|error| syntax_error(&error, text, origin))?;
        let table: Table =
            toml::from_str(text).map_err(|error| syntax_error(&error, text, origin))?;

        let at = |offset: usize| format!("{origin}:{}", line_and_column(text, offset).0);
        let mut places = BTreeMap::new();
        for (section, keys) in spans.get_ref() {
            let name = section.get_ref();
            places.insert(name.to_string(), at(section.span().start));
            for (key, _) in keys.get_ref().as_table().into_iter().flatten() {
                places.insert(format!("{name}.{}", key.get_ref()), at(key.span().start));
            }
        }

        let document = Self {
            origin: origin.into(),
            table,
            places,
        };
        for (name, value) in &document.table {
            let place = document.place(name);
            let section = Section::find(name, &place)?;
            let Value::Table(keys) = value else {
                return Err(ConfigError::Type {
                    place,
                    key: name.clone(),
                    value: shown(value),
                    reason: format!("expected a section; write [{name}] and its keys below it"),
                });
            };
            for (key, value) in keys {
                section.check(key, value, &document.place(&format!("{name}.{key}")))?;
            }
        }
        Ok(document)
    }

    /// Applies one `section.key=value`.
    ///
    /// The value is read as TOML if it is a TOML value of the key's type, otherwise as a string.
    pub(super) fn apply_override(&mut self, text: &str) -> Result<(), ConfigError> {
        let malformed = |reason| ConfigError::Override {
            text: shorten(text),
            reason,
        };
        let (path, given) = text.split_once('=').ok_or(malformed("it has no `=`"))?;
        let (section_name, key) = path
            .trim()
            .split_once('.')
            .ok_or(malformed("the key has no section"))?;
        if section_name.is_empty() || key.is_empty() {
            return Err(malformed("the key is not complete"));
        }

        let place = format!("--set {}", shorten(text));
        let section = Section::find(section_name, &place)?;
        section.known(key, &place)?;
        let as_string = || Value::String(given.to_owned());
        let mut value = parse_value(given).unwrap_or_else(as_string);
        if let Err(error) = section.check(key, &value, &place) {
            // A folder may be called `2024`; but `train.lr=abc` is reported as it was read.
            section
                .check(key, &as_string(), &place)
                .map_err(|_| error)?;
            value = as_string();
        }

        let entry = self
            .table
            .entry(section_name)
            .or_insert_with(|| Value::Table(Table::new()));
        if let Value::Table(keys) = entry {
            keys.insert(key.to_owned(), value);
        }
        self.places.insert(format!("{section_name}.{key}"), place);
        Ok(())
    }

    /// The document as structs, absent keys filled with their defaults.
    pub(super) fn read(&self) -> Result<RawConfig, ConfigError> {
        self.table
            .clone()
            .try_into()
            .map_err(|error: toml::de::Error| ConfigError::Syntax {
                place: self.origin.clone(),
                reason: error.message().to_owned(),
            })
    }

    /// Where a key or a section was written; the document's name for what was not.
    ///
    /// `key` may go on behind the dotted key, as in `moe.blocks[1]`.
    pub(super) fn place(&self, key: &str) -> String {
        let written = key.split('[').next().unwrap_or(key);
        self.places
            .get(written)
            .cloned()
            .unwrap_or_else(|| self.origin.clone())
    }
}

/// One section: its name, its keys, and whether a value fits a key.
struct Section {
    name: &'static str,
    keys: &'static [&'static str],
    /// Reads a table with a single key as the section's struct.
    read: fn(Table) -> Result<(), toml::de::Error>,
}

impl Section {
    fn of<T: for<'de> Deserialize<'de>>(name: &'static str) -> Self {
        Self {
            name,
            keys: field_names::<T>(),
            read: |table| table.try_into::<T>().map(drop),
        }
    }

    fn all() -> [Self; 8] {
        [
            Self::of::<RawModel>("model"),
            Self::of::<RawMoe>("moe"),
            Self::of::<RawInit>("init"),
            Self::of::<RawTrain>("train"),
            Self::of::<RawAugment>("augment"),
            Self::of::<RawData>("data"),
            Self::of::<RawCheckpoint>("checkpoint"),
            Self::of::<RawParallel>("parallel"),
        ]
    }

    fn find(name: &str, place: &str) -> Result<Self, ConfigError> {
        Self::all()
            .into_iter()
            .find(|section| section.name == name)
            .ok_or_else(|| ConfigError::UnknownSection {
                place: place.to_owned(),
                got: shorten(name),
                hint: section_hint(name),
            })
    }

    fn known(&self, key: &str, place: &str) -> Result<(), ConfigError> {
        if self.keys.contains(&key) {
            return Ok(());
        }
        Err(ConfigError::UnknownKey {
            place: place.to_owned(),
            section: self.name.to_owned(),
            key: shorten(key),
            hint: key_hint(self, key),
        })
    }

    /// Checks that the key exists and that the value has its type.
    fn check(&self, key: &str, value: &Value, place: &str) -> Result<(), ConfigError> {
        self.known(key, place)?;
        let mut alone = Table::new();
        alone.insert(key.to_owned(), value.clone());
        (self.read)(alone).map_err(|error| ConfigError::Type {
            place: place.to_owned(),
            key: format!("{}.{key}", self.name),
            value: shown(value),
            reason: plain_words(error.message()),
        })
    }
}

fn section_hint(name: &str) -> String {
    let names: Vec<&str> = Section::all().iter().map(|section| section.name).collect();
    // A key at the top of the file, outside of its section, is the likelier slip.
    if let Some(home) = Section::all().iter().find(|s| s.keys.contains(&name)) {
        return format!("`{name}` is a key of [{}]", home.name);
    }
    match nearest(name, &names) {
        Some(name) => format!("did you mean [{name}]?"),
        None => format!("the sections are {}", names.join(", ")),
    }
}

fn key_hint(section: &Section, key: &str) -> String {
    if let Some(home) = Section::all().iter().find(|s| s.keys.contains(&key)) {
        return format!("it is a key of [{}]: {}.{key}", home.name, home.name);
    }
    match nearest(key, section.keys) {
        Some(name) => format!("did you mean `{name}`?"),
        None => format!("the keys are {}", section.keys.join(", ")),
    }
}

/// The most similar name, if it is similar enough to be meant.
fn nearest<'a>(got: &str, names: &[&'a str]) -> Option<&'a str> {
    names
        .iter()
        .map(|name| (strsim::jaro_winkler(got, name), *name))
        .filter(|(similarity, _)| *similarity > 0.75)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, name)| name)
}

/// Reads one TOML value.
fn parse_value(text: &str) -> Option<Value> {
    // A value followed by a line break and more keys must not get in as several keys.
    let table: Table = toml::from_str(&format!("value = {text}")).ok()?;
    if table.len() != 1 {
        return None;
    }
    table.into_iter().next().map(|(_, value)| value)
}

fn syntax_error(error: &toml::de::Error, text: &str, origin: &str) -> ConfigError {
    let place = match error.span() {
        Some(span) => {
            let (line, column) = line_and_column(text, span.start);
            format!("{origin}:{line}:{column}")
        }
        None => origin.to_owned(),
    };
    let words: Vec<&str> = error.message().split_whitespace().collect();
    ConfigError::Syntax {
        place,
        reason: words.join(" "),
    }
}

/// Line and column, counted from one, of a byte offset.
fn line_and_column(text: &str, offset: usize) -> (usize, usize) {
    let before = text.get(..offset).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    let column = before.chars().rev().take_while(|&c| c != '\n').count() + 1;
    (line, column)
}

/// Serde's message with TOML's names of types instead of Rust's.
fn plain_words(message: &str) -> String {
    let mut words = message.replace("invalid type: ", "got ");
    words = words.replace("invalid value: ", "got ");
    words = words.replace("invalid length ", "got length ");
    for (rust, plain) in [
        ("expected usize", "expected a whole number, 0 or more"),
        ("expected u64", "expected a whole number, 0 or more"),
        ("expected i64", "expected a whole number"),
        ("expected f64", "expected a number"),
        ("expected a boolean", "expected true or false"),
        ("expected a sequence", "expected an array"),
    ] {
        words = words.replace(rust, plain);
    }
    words
}

fn shown(value: &Value) -> String {
    shorten(&value.to_string())
}

/// One line of at most [`MAX_SHOWN_CHARS`] characters.
fn shorten(text: &str) -> String {
    let mut line: String = text
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(MAX_SHOWN_CHARS)
        .collect();
    if text.chars().nth(MAX_SHOWN_CHARS).is_some() {
        line.push('…');
    }
    line
}
