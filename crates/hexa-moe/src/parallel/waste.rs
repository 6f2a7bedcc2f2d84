//! Tile waste over all ranks, whose tiles may differ.

use super::context::Mode;
use crate::load::{excess, tiled_rows};

/// What one rank's tiles are filled with.
pub(super) struct RankTiles {
    /// Rows of a tile.
    pub rows: usize,
    /// Slots of this rank's own tokens, by expert.
    pub tokens_per_expert: Vec<u64>,
}

/// [`LoadReport::tile_waste`](crate::LoadReport::tile_waste) of all ranks' arithmetic. `widths`:
/// each rank's part of the experts' hidden units.
pub(super) fn tile_waste(mode: Mode, widths: &[usize], ranks: &[RankTiles]) -> f64 {
    let (mut computed, mut needed) = (0.0, 0.0);
    match mode {
        // Each rank computes its own tokens, in the whole width.
        Mode::DataCentric => {
            for rank in ranks {
                computed += tiled_rows(&rank.tokens_per_expert, rank.rows) as f64;
                needed += rank.tokens_per_expert.iter().sum::<u64>() as f64;
            }
        }
        // Each rank computes all tokens, in its part of the width.
        Mode::ModelCentric => {
            let mut all = Vec::new();
            for rank in ranks {
                all.resize(rank.tokens_per_expert.len(), 0);
                for (sum, count) in all.iter_mut().zip(&rank.tokens_per_expert) {
                    *sum += count;
                }
            }
            for (rank, &width) in ranks.iter().zip(widths) {
                computed += width as f64 * tiled_rows(&all, rank.rows) as f64;
                needed += width as f64 * all.iter().sum::<u64>() as f64;
            }
        }
    }
    excess(computed, needed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranks() -> [RankTiles; 3] {
        [(4, [3, 0, 5]), (1, [2, 1, 0]), (8, [0, 0, 0])].map(|(rows, counts)| RankTiles {
            rows,
            tokens_per_expert: counts.to_vec(),
        })
    }

    #[test]
    fn data_centric_tiles_hold_their_ranks_tokens() {
        // 4 + 0 + 8 rows for 8 slots, 3 for 3, none for none.
        let waste = tile_waste(Mode::DataCentric, &[5, 2, 1], &ranks());
        assert!((waste - (15.0 / 11.0 - 1.0)).abs() < 1e-12, "{waste}");
    }

    #[test]
    fn model_centric_tiles_hold_all_tokens_in_a_part_of_the_width() {
        // All ranks have 5, 1 and 5 slots: 8 + 4 + 8 rows in 5 units, 11 in 2, 24 in 1.
        let waste = tile_waste(Mode::ModelCentric, &[5, 2, 1], &ranks());
        let want = (5.0 * 20.0 + 2.0 * 11.0 + 24.0) / (8.0 * 11.0) - 1.0;
        assert!((waste - want).abs() < 1e-12, "{waste}");
        assert_eq!(tile_waste(Mode::ModelCentric, &[5, 2, 1], &[]), 0.0);
    }
}
