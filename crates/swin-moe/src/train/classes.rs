//! Accuracy class by class, and what classes are mistaken for.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Classes that a class is mistaken for, of which a score names so many.
const MISTAKES: usize = 3;

/// How one class fared on the test set.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClassScore {
    /// The class' name.
    pub class: String,
    /// Its test images.
    pub images: u64,
    /// Of these, the share taken for this class, in percent.
    pub top1: f32,
    /// What the others were most often taken for, and how many of them.
    pub mistaken_for: Vec<(String, u64)>,
}

/// How often an image of one class was taken for another.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Confusion {
    /// (label, highest-scored class) → images.
    counts: BTreeMap<(usize, usize), u64>,
}

impl Confusion {
    /// Adds a batch. `logits`: `[labels.len(), num_classes]`, row-major. Of equal scores the first
    /// counts; scores that are no numbers are the last class'.
    pub fn add(&mut self, logits: &[f32], labels: &[usize]) {
        let num_classes = (logits.len() / labels.len().max(1)).max(1);
        for (row, &label) in logits.chunks_exact(num_classes).zip(labels) {
            let best = (0..row.len())
                .rev()
                .max_by(|&a, &b| row[a].total_cmp(&row[b]));
            *self.counts.entry((label, best.unwrap_or(0))).or_default() += 1;
        }
    }

    /// The counts as they travel between ranks: label, class and images, which are fewer than 2³².
    pub(super) fn to_words(&self) -> Vec<u32> {
        let words = |(&(label, best), &count): (&(usize, usize), &u64)| {
            [label as u32, best as u32, count as u32]
        };
        self.counts.iter().flat_map(words).collect()
    }

    /// The sums of [`Confusion::to_words`] of several, one after the other.
    pub(super) fn of_words(words: &[u32]) -> Self {
        let mut sum = Self::default();
        for word in words.chunks_exact(3) {
            let place = (word[0] as usize, word[1] as usize);
            *sum.counts.entry(place).or_default() += u64::from(word[2]);
        }
        sum
    }

    /// Every class that has images, the least accurate first; of equal ones in the classes' order.
    pub fn scores(&self, names: &[String]) -> Vec<ClassScore> {
        let name = |class: usize| {
            names
                .get(class)
                .cloned()
                .unwrap_or_else(|| class.to_string())
        };
        let mut classes: BTreeMap<usize, Vec<(usize, u64)>> = BTreeMap::new();
        for (&(label, best), &count) in &self.counts {
            classes.entry(label).or_default().push((best, count));
        }
        let mut scores: Vec<ClassScore> = classes
            .into_iter()
            .map(|(label, mut found)| {
                let images: u64 = found.iter().map(|(_, count)| count).sum();
                let right = found.iter().find(|(best, _)| *best == label);
                let right = right.map_or(0, |(_, count)| *count);
                found.retain(|(best, _)| *best != label);
                found.sort_by_key(|&(best, count)| (std::cmp::Reverse(count), best));
                ClassScore {
                    class: name(label),
                    images,
                    top1: (100.0 * right as f64 / images as f64) as f32,
                    mistaken_for: found
                        .into_iter()
                        .take(MISTAKES)
                        .map(|(best, count)| (name(best), count))
                        .collect(),
                }
            })
            .collect();
        scores.sort_by(|a, b| a.top1.total_cmp(&b.top1));
        scores
    }
}

impl ClassScore {
    /// What the images that were not recognised were taken for, in words.
    pub fn mistakes(&self) -> String {
        let of = |(name, count): &(String, u64)| format!("{name} ({count})");
        self.mistaken_for
            .iter()
            .map(of)
            .collect::<Vec<_>>()
            .join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_accurate_class_comes_first_with_its_mistakes() {
        let names = ["cat", "dog", "owl"].map(str::to_owned);
        let mut confusion = Confusion::default();
        let row = |best: usize| std::array::from_fn::<f32, 3, _>(|c| f32::from(c == best));
        // (label, taken for): cats are mostly dogs, owls are owls; there is no dog.
        let seen = [(0, 1), (2, 2), (0, 1), (0, 0), (0, 2), (0, 1)];
        for batch in seen.chunks(4) {
            let logits: Vec<f32> = batch.iter().flat_map(|&(_, best)| row(best)).collect();
            let labels: Vec<usize> = batch.iter().map(|&(label, _)| label).collect();
            confusion.add(&logits, &labels);
        }
        let scores = confusion.scores(&names);
        assert_eq!(scores.len(), 2);
        assert_eq!((scores[0].class.as_str(), scores[0].images), ("cat", 5));
        assert_eq!(scores[0].top1, 20.0);
        assert_eq!(scores[0].mistakes(), "dog (3), owl (1)");
        assert_eq!((scores[1].class.as_str(), scores[1].top1), ("owl", 100.0));
    }

    #[test]
    fn the_first_of_equal_scores_counts() {
        let mut confusion = Confusion::default();
        confusion.add(&[0.5; 4], &[0]);
        assert_eq!(confusion.scores(&[])[0].top1, 100.0);
    }
}
