//! Launch plan of ESS. Pure.

use super::kernel::EssBlueprint;
use crate::ops::tile::plan::{ELEMWISE_UNITS, row_source, sum_split};
use crate::types::RowOrder;

/// Vectors of columns per cube: a warp reads neighbouring ones together.
const COLUMNS: usize = 32;

/// What decides the plan.
#[derive(Clone, Copy, Debug)]
pub(crate) struct EssProblem {
    /// Number of slots.
    pub(crate) num_slots: usize,
    /// Choices per token.
    pub(crate) top_k: usize,
    /// Number of experts.
    pub(crate) num_experts: usize,
    /// Vectors of columns.
    pub(crate) width: usize,
    /// Order of the rows.
    pub(crate) x_order: RowOrder,
}

/// How to launch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct EssPlan {
    /// What the kernel is compiled for.
    pub(crate) blueprint: EssBlueprint,
    /// Blocks of columns.
    pub(crate) column_blocks: usize,
    /// Parts of each expert's positions; partial sums are added afterwards if more than one.
    pub(crate) parts: usize,
    /// Cubes: one per part, expert and block of columns.
    pub(crate) cubes: usize,
}

/// Plans one launch.
pub(crate) fn plan(problem: EssProblem) -> EssPlan {
    let column_blocks = problem.width.div_ceil(COLUMNS);
    let cubes_per_part = problem.num_experts * column_blocks;
    let parts = sum_split(problem.num_slots, problem.num_experts, cubes_per_part);
    EssPlan {
        blueprint: EssBlueprint {
            columns: COLUMNS,
            lanes: ELEMWISE_UNITS / COLUMNS,
            x_rows: row_source(problem.x_order, problem.top_k),
        },
        column_blocks,
        parts,
        cubes: cubes_per_part * parts,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lanes_form_a_tree_and_cubes_cover_the_columns() {
        let plan = plan(EssProblem {
            num_slots: 18_432,
            top_k: 1,
            num_experts: 8,
            width: 96,
            x_order: RowOrder::Expert,
        });
        assert!(plan.blueprint.lanes.is_power_of_two());
        assert_eq!(
            plan.blueprint.lanes * plan.blueprint.columns,
            ELEMWISE_UNITS
        );
        assert_eq!(plan.column_blocks, 3);
        assert_eq!(plan.parts, MAX_EXPECTED_PARTS);
        assert_eq!(plan.cubes, 8 * 3 * plan.parts);
    }

    /// By the cap on parts, before rows (18) or cubes (21) would limit them.
    const MAX_EXPECTED_PARTS: usize = 16;
}
