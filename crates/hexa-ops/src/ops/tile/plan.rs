//! Choice of tile shapes and of how sums over tokens are split. Pure.

use super::kernel::{QUAD, RowSource, TileShape};
use crate::types::RowOrder;

/// Rows in one tile of the expert matmul: BLK of arXiv:2411.01288v4, section 4.1.
pub(crate) const TILE_ROWS: usize = 64;

/// Units per cube of kernels with one unit per element.
pub(crate) const ELEMWISE_UNITS: usize = 256;

/// Columns of a result from which on the wider tile is used.
const WIDE_FROM: usize = 128;

/// Cubes that keep the largest devices busy; fewer and sums over tokens are split.
const ENOUGH_CUBES: usize = 512;

/// Rows of a sum that are worth a part of their own, on average over the experts.
const MIN_ROWS_PER_PART: usize = 128;

/// Most parts that a sum is split into: bounds the memory of the partial sums.
const MAX_PARTS: usize = 16;

/// The tile for a result of `columns` columns.
pub(crate) const fn tile_shape(columns: usize) -> TileShape {
    TileShape {
        m: TILE_ROWS,
        n: if columns >= WIDE_FROM { 128 } else { 64 },
        k: 16,
    }
}

/// How a matrix in `order` is read by position.
pub(crate) const fn row_source(order: RowOrder, top_k: usize) -> RowSource {
    match order {
        RowOrder::Token => RowSource {
            by_slot: true,
            slots_per_row: top_k,
        },
        RowOrder::Slot => RowSource {
            by_slot: true,
            slots_per_row: 1,
        },
        RowOrder::Expert => RowSource::POSITION,
    }
}

/// Elements per memory access: four if all widths and strides are multiples of it, else one.
///
/// Tensors of f64 are read one by one: four would exceed the widest access of the devices.
pub(crate) fn vector_size(element_bytes: usize, extents: &[usize]) -> usize {
    let aligned = extents.iter().all(|extent| extent.is_multiple_of(QUAD));
    if aligned && element_bytes <= 4 {
        QUAD
    } else {
        1
    }
}

/// Upper bound of the row tiles, whatever the routing: every expert may have one partial tile.
pub(crate) const fn row_tile_bound(num_slots: usize, num_experts: usize) -> usize {
    let experts_with_rows = if num_slots < num_experts {
        num_slots
    } else {
        num_experts
    };
    num_slots / TILE_ROWS + experts_with_rows
}

/// Parts into which each expert's sum over `num_slots / num_experts` rows is split, given the
/// cubes that one part takes. A function of shapes alone, so that sums are reproducible.
pub(crate) fn sum_split(num_slots: usize, num_experts: usize, cubes: usize) -> usize {
    let by_rows = num_slots / (num_experts * MIN_ROWS_PER_PART);
    let by_cubes = ENOUGH_CUBES / cubes.max(1);
    by_rows.min(by_cubes).clamp(1, MAX_PARTS)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The most row tiles any routing can need, by trying every distribution over the experts.
    fn worst_row_tiles(num_slots: usize, num_experts: usize) -> usize {
        if num_experts == 1 {
            return num_slots.div_ceil(TILE_ROWS);
        }
        (0..=num_slots)
            .map(|first| {
                first.div_ceil(TILE_ROWS) + worst_row_tiles(num_slots - first, num_experts - 1)
            })
            .max()
            .unwrap_or(0)
    }

    #[test]
    fn row_tile_bound_covers_every_routing() {
        for num_experts in 1..=3 {
            for num_slots in [0, 1, 2, 3, 5, 63, 64, 65, 127, 128, 129, 191, 200] {
                let worst = worst_row_tiles(num_slots, num_experts);
                let bound = row_tile_bound(num_slots, num_experts);
                assert!(
                    worst <= bound,
                    "{num_slots} {num_experts}: {worst} > {bound}"
                );
                assert!(
                    bound <= worst + 1,
                    "{num_slots} {num_experts}: wasteful {bound}"
                );
            }
        }
    }

    #[test]
    fn tiles_are_whole_numbers_of_blocks() {
        for columns in [1, 64, 127, 128, 1536] {
            let tile = tile_shape(columns);
            assert_eq!(tile.m, TILE_ROWS);
            assert_eq!(tile.units() * 64, tile.m * tile.n);
            assert!(tile.units() <= 256, "more than portable devices allow");
            assert_eq!(tile.k % 4, 0);
        }
    }

    #[test]
    fn one_odd_extent_or_a_wide_element_forbids_vectors() {
        assert_eq!(vector_size(4, &[384, 1536, 8]), 4);
        assert_eq!(vector_size(2, &[4]), 4);
        assert_eq!(vector_size(4, &[384, 1534]), 1);
        assert_eq!(vector_size(8, &[384]), 1);
    }

    #[test]
    fn sums_are_split_only_when_cubes_are_few_and_rows_many() {
        assert_eq!(sum_split(18_432, 8, 576), 1);
        assert_eq!(sum_split(18_432, 8, 48), 10);
        assert_eq!(sum_split(1_000_000, 4, 4), MAX_PARTS);
        assert_eq!(sum_split(100, 8, 1), 1);
        assert_eq!(sum_split(0, 8, 0), 1);
    }
}
