//! Choice of tiles and of how long sums are cut. Pure.

use super::source::{CLUSTER, STAGE_DEPTH, TILE_ROWS};

/// Widths that a tile can have.
const TILE_COLUMNS: [usize; 3] = [256, 192, 128];

/// Cycles that a step takes at least: the way from a free stage to a filled one.
const MIN_STEP_CYCLES: usize = 800;

/// Cycles of an epilogue, for each column.
const EPILOGUE_CYCLES_PER_COLUMN: usize = 18;

/// The width of the tiles: the one with the least estimated time.
///
/// Clusters work on `row_pairs` × ⌈`width` / columns⌉ pairs of tiles in rounds; a round takes
/// `depth / 64` steps and an epilogue.
pub(super) fn tile_columns(
    row_pairs: usize,
    width: usize,
    depth: usize,
    multiprocessors: usize,
) -> usize {
    let clusters = (multiprocessors / CLUSTER).max(1);
    let cycles = |columns: usize| {
        let rounds = (row_pairs * width.div_ceil(columns)).div_ceil(clusters);
        // 128 rows × 64 × columns products, at 1024 × 2 cycles for 256 columns and both cubes.
        let step = (4 * columns).max(MIN_STEP_CYCLES);
        rounds * (depth.div_ceil(STAGE_DEPTH) * step + EPILOGUE_CYCLES_PER_COLUMN * columns)
    };
    TILE_COLUMNS
        .into_iter()
        .min_by_key(|&columns| cycles(columns))
        .unwrap_or(TILE_COLUMNS[0])
}

/// Pairs of row tiles of ESMM that balanced experts have.
pub(super) fn row_pairs(num_slots: usize, num_experts: usize) -> usize {
    let pair = CLUSTER * TILE_ROWS;
    num_slots / pair + num_experts.min(num_slots).div_ceil(2)
}

/// Narrowest hidden width for which [`sorts_rows`].
const SORTED_WIDTH: usize = 8192;

/// Whether rows in token order are copied into expert order before they are multiplied.
///
/// Rows that lie as they are read come by bulk copies, which makes the four products that would
/// gather them 4 to 10 % faster: time that grows with `d_ff`, while the copies' does not.
pub(super) fn sorts_rows(d_ff: usize) -> bool {
    d_ff >= SORTED_WIDTH
}

/// Columns of one piece of the activation's gradient, whose weighted activations are then summed to
/// their piece of the second weights' gradient and forgotten.
///
/// Two pieces halve the largest buffer of the backward pass. They pay where that pass needs the most
/// memory (with more choices per token it is the forward pass), where slots outnumber the weights'
/// rows, and where each piece is made of whole tiles.
pub(super) fn gradient_piece(
    (num_slots, top_k): (usize, usize),
    num_experts: usize,
    d_model: usize,
    d_ff: usize,
) -> usize {
    if top_k == 1 && num_slots > num_experts * d_model && d_ff.is_multiple_of(2 * TILE_COLUMNS[0]) {
        d_ff / 2
    } else {
        d_ff
    }
}

/// How sums over an expert's rows are cut, so that one expert with most of the rows keeps the
/// device busy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SumSplit {
    /// Rows of a part; experts with no more of them have one, and write their result directly.
    pub(super) chunk: usize,
    /// Most parts there can be.
    pub(super) max_parts: usize,
}

/// The cut, or none where one expert's tiles suffice. A function of shapes alone: sums are
/// reproducible.
///
/// A part holds half again the rows of an average expert, so that balanced routing needs no parts,
/// and all parts together take at most 4/3 `num_experts` results in f32. Nothing is cut if one
/// expert's tiles occupy most of the device.
pub(super) fn sum_split(
    num_slots: usize,
    num_experts: usize,
    m: usize,
    n: usize,
    multiprocessors: usize,
) -> Option<SumSplit> {
    let tiles = m.div_ceil(CLUSTER * TILE_ROWS) * CLUSTER * n.div_ceil(TILE_COLUMNS[0]);
    if num_experts < 2 || 4 * tiles >= 3 * multiprocessors {
        return None;
    }
    let chunk = (3 * num_slots)
        .div_ceil(2 * num_experts)
        .next_multiple_of(STAGE_DEPTH);
    // Each cut expert has more than `chunk` rows, and at most one part that is not full.
    let full = num_slots / chunk;
    Some(SumSplit {
        chunk,
        max_parts: full + full.min(num_experts),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn narrow_results_get_tiles_that_fit() {
        // Stage 3 of Swin-MoE-Small: 384 columns are two tiles of 192.
        assert_eq!(tile_columns(row_pairs(18_432, 8), 384, 1536, 132), 192);
        assert_eq!(tile_columns(row_pairs(18_432, 8), 1536, 384, 132), 256);
        assert_eq!(tile_columns(1, 8, 8, 132), 128);
        assert_eq!(tile_columns(0, 8, 8, 1), 256);
    }

    /// Parts that the kernel counts for these experts' rows.
    fn parts(rows: &[usize], chunk: usize) -> usize {
        rows.iter()
            .filter(|&&rows| rows > chunk)
            .map(|rows| rows.div_ceil(chunk))
            .sum()
    }

    #[test]
    fn parts_never_exceed_their_bound() {
        for num_experts in 2..5 {
            for num_slots in [1, 63, 64, 500, 1000] {
                let Some(split) = sum_split(num_slots, num_experts, 8, 8, 132) else {
                    panic!("small results are cut");
                };
                for first in (0..=num_slots).step_by(7) {
                    let rest = num_slots - first;
                    let mut rows = vec![0; num_experts];
                    rows[0] = first;
                    rows[1] = rest;
                    let found = parts(&rows, split.chunk);
                    assert!(found <= split.max_parts, "{rows:?} {split:?}: {found}");
                }
            }
        }
    }

    #[test]
    fn wide_results_and_single_experts_are_not_cut() {
        assert_eq!(sum_split(8192, 8, 4096, 14_336, 132), None);
        assert_eq!(sum_split(8192, 1, 64, 64, 132), None);
        assert_eq!(sum_split(4608, 8, 1024, 4096, 132), None);
        assert!(sum_split(18_432, 8, 384, 1536, 132).is_some());
    }

    #[test]
    fn pieces_are_whole_tiles_of_layers_with_many_slots() {
        assert_eq!(gradient_piece((18_432, 1), 8, 384, 1536), 768);
        assert_eq!(gradient_piece((18_432, 1), 8, 384, 1500), 1500);
        assert_eq!(gradient_piece((36_864, 2), 8, 384, 1536), 1536);
        assert_eq!(gradient_piece((16_384, 1), 8, 4096, 14_336), 14_336);
    }
}
