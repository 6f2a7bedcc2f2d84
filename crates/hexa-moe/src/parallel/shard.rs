//! Which part of the experts a rank owns, and how parts become whole and whole becomes parts.

use core::ops::Range;

use crate::error::{MoeError, Result};

/// Slices of the hidden width of all experts, one for each rank.
///
/// Rank `p` owns columns of `w1` and `b1` and rows of `w2` for its contiguous slice of `d_ff`;
/// slices may be unequal and empty. `b2` is on all ranks. On the wire, a rank's part is its `w1`,
/// then its `b1`, then its `w2`, each row-major.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpertShards {
    /// Number of experts.
    pub num_experts: usize,
    /// Width of a token.
    pub d_model: usize,
    /// Columns of the first layer per hidden unit: 2 for gated activations, else 1.
    pub columns_per_unit: usize,
    /// Whether the first layer has a bias.
    pub has_b1: bool,
    /// Hidden units of each rank.
    pub widths: Vec<usize>,
}

/// Host copies of the experts' first weights, first biases and second weights.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct HostExperts {
    /// `[num_experts, d_model, columns]`.
    pub w1: Vec<f32>,
    /// `[num_experts, columns]`; empty without bias.
    pub b1: Vec<f32>,
    /// `[num_experts, d_ff, d_model]`.
    pub w2: Vec<f32>,
}

impl ExpertShards {
    /// Hidden width of the whole.
    pub fn d_ff(&self) -> usize {
        self.widths.iter().sum()
    }

    /// Columns of the first layer, for `units` hidden units.
    pub fn columns(&self, units: usize) -> usize {
        units * self.columns_per_unit
    }

    /// The hidden units of `rank`.
    pub fn units(&self, rank: usize) -> Range<usize> {
        let start = self.widths[..rank].iter().sum();
        start..start + self.widths[rank]
    }

    /// Elements of each rank's part.
    pub fn counts(&self) -> Vec<usize> {
        let per_unit = self.columns_per_unit * (self.d_model + usize::from(self.has_b1));
        let per_unit = self.num_experts * (per_unit + self.d_model);
        self.widths.iter().map(|width| width * per_unit).collect()
    }

    /// Bytes of the whole in f32.
    pub fn whole_bytes(&self) -> usize {
        self.counts().iter().sum::<usize>() * size_of::<f32>()
    }

    /// The rank that adds `b2` where outputs are sums over ranks: the one with the widest slice.
    pub fn bias_owner(&self) -> usize {
        let owner = (0..self.widths.len()).reduce(|a, b| {
            if self.widths[b] > self.widths[a] {
                b
            } else {
                a
            }
        });
        owner.unwrap_or(0)
    }

    /// Checks that the slices make up `d_ff` and that there is one for each rank.
    ///
    /// # Errors
    /// [`MoeError::Split`].
    pub fn validate(&self, d_ff: usize, world_size: usize) -> Result<()> {
        if self.widths.len() == world_size && self.d_ff() == d_ff {
            return Ok(());
        }
        Err(MoeError::Split {
            got: format!(
                "slices {:?} for d_ff {d_ff} and {world_size} ranks",
                self.widths
            ),
            allowed: "one slice per rank whose sum is d_ff",
        })
    }

    /// A rank's part for the wire.
    pub fn pack(part: HostExperts) -> Vec<f32> {
        let HostExperts { mut w1, b1, w2 } = part;
        w1.reserve_exact(b1.len() + w2.len());
        w1.extend(b1);
        w1.extend(w2);
        w1
    }

    /// The reverse of [`ExpertShards::pack`] for `rank`'s part.
    pub fn unpack(&self, rank: usize, mut part: Vec<f32>) -> HostExperts {
        let columns = self.columns(self.widths[rank]);
        let w1_len = self.num_experts * self.d_model * columns;
        let b1_len = if self.has_b1 {
            self.num_experts * columns
        } else {
            0
        };
        let w2 = part.split_off(w1_len + b1_len);
        let b1 = part.split_off(w1_len);
        HostExperts { w1: part, b1, w2 }
    }

    /// The whole, from all ranks' parts in the order of ranks.
    pub fn assemble(&self, parts: &[f32]) -> HostExperts {
        let mut whole = self.zeros(self.d_ff());
        let mut source = parts;
        self.for_each_run(|place, at| {
            let (run, rest) = source.split_at(at.len());
            source = rest;
            whole.of(place)[at].copy_from_slice(run);
        });
        whole
    }

    /// The parts of all ranks in the order of ranks, from the whole.
    pub fn scatter(&self, whole: &HostExperts) -> Vec<f32> {
        let mut parts = Vec::with_capacity(self.counts().iter().sum());
        self.for_each_run(|place, at| {
            let source = match place {
                Place::W1 => &whole.w1,
                Place::B1 => &whole.b1,
                Place::W2 => &whole.w2,
            };
            parts.extend_from_slice(&source[at]);
        });
        parts
    }

    /// `rank`'s part of the whole.
    pub fn slice(&self, rank: usize, whole: &HostExperts) -> HostExperts {
        let parts = self.scatter(whole);
        let range = super::comm::part(&self.counts(), rank);
        self.unpack(rank, parts[range].to_vec())
    }

    fn zeros(&self, d_ff: usize) -> HostExperts {
        let columns = self.columns(d_ff);
        let b1_len = if self.has_b1 {
            self.num_experts * columns
        } else {
            0
        };
        HostExperts {
            w1: vec![0.0; self.num_experts * self.d_model * columns],
            b1: vec![0.0; b1_len],
            w2: vec![0.0; self.num_experts * d_ff * self.d_model],
        }
    }

    /// Visits the contiguous runs of the whole in the order that they have on the wire.
    fn for_each_run(&self, mut visit: impl FnMut(Place, Range<usize>)) {
        let all_columns = self.columns(self.d_ff());
        let d_ff = self.d_ff();
        for rank in 0..self.widths.len() {
            let units = self.units(rank);
            let columns = self.columns(units.start)..self.columns(units.end);
            for row in 0..self.num_experts * self.d_model {
                let start = row * all_columns;
                visit(Place::W1, start + columns.start..start + columns.end);
            }
            for expert in 0..if self.has_b1 { self.num_experts } else { 0 } {
                let start = expert * all_columns;
                visit(Place::B1, start + columns.start..start + columns.end);
            }
            for expert in 0..self.num_experts {
                let row = |unit| (expert * d_ff + unit) * self.d_model;
                visit(Place::W2, row(units.start)..row(units.end));
            }
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum Place {
    W1,
    B1,
    W2,
}

impl HostExperts {
    fn of(&mut self, place: Place) -> &mut Vec<f32> {
        match place {
            Place::W1 => &mut self.w1,
            Place::B1 => &mut self.b1,
            Place::W2 => &mut self.w2,
        }
    }
}
