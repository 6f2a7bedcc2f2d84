//! Launch plan of ESMM. Pure.

use super::kernel::EsmmBlueprint;
use crate::ops::tile::plan::{row_source, row_tile_bound, tile_shape};
use crate::types::RowOrder;

/// What decides the plan.
#[derive(Clone, Copy, Debug)]
pub(crate) struct EsmmProblem {
    /// Number of slots.
    pub(crate) num_slots: usize,
    /// Choices per token.
    pub(crate) top_k: usize,
    /// Number of experts.
    pub(crate) num_experts: usize,
    /// Columns of the result.
    pub(crate) width_out: usize,
    /// Order of the rows of `x`.
    pub(crate) x_order: RowOrder,
    /// Order of the rows of the result.
    pub(crate) out_order: RowOrder,
    /// Whether the matrices are stored `[out, in]`.
    pub(crate) transposed: bool,
}

/// How to launch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct EsmmPlan {
    /// What the kernel is compiled for.
    pub(crate) blueprint: EsmmBlueprint,
    /// Tiles across the result.
    pub(crate) column_tiles: usize,
    /// Cubes: column tiles times the bound of the row tiles.
    pub(crate) cubes: usize,
}

/// Plans one launch.
pub(crate) fn plan(problem: EsmmProblem) -> EsmmPlan {
    let tile = tile_shape(problem.width_out);
    let column_tiles = problem.width_out.div_ceil(tile.n);
    EsmmPlan {
        blueprint: EsmmBlueprint {
            tile,
            x_rows: row_source(problem.x_order, problem.top_k),
            out_rows: row_source(problem.out_order, problem.top_k),
            transposed: problem.transposed,
        },
        column_tiles,
        cubes: column_tiles * row_tile_bound(problem.num_slots, problem.num_experts),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn covers_all_columns_and_the_worst_routing() {
        let plan = plan(EsmmProblem {
            num_slots: 130,
            top_k: 2,
            num_experts: 8,
            width_out: 257,
            x_order: RowOrder::Token,
            out_order: RowOrder::Expert,
            transposed: false,
        });
        assert_eq!(plan.column_tiles, 3);
        assert_eq!(plan.cubes, 3 * (2 + 8));
        assert_eq!(plan.blueprint.x_rows.slots_per_row, 2);
        assert!(!plan.blueprint.out_rows.by_slot);
    }
}
