//! Launch plan of ESTMM. Pure.

use super::kernel::EstmmBlueprint;
use crate::ops::tile::plan::{row_source, sum_split, tile_shape};
use crate::types::RowOrder;

/// What decides the plan.
#[derive(Clone, Copy, Debug)]
pub(crate) struct EstmmProblem {
    /// Number of slots.
    pub(crate) num_slots: usize,
    /// Choices per token.
    pub(crate) top_k: usize,
    /// Number of experts.
    pub(crate) num_experts: usize,
    /// Columns of `a`.
    pub(crate) m: usize,
    /// Columns of `b`.
    pub(crate) n: usize,
    /// Order of the rows of `a`.
    pub(crate) a_order: RowOrder,
    /// Order of the rows of `b`.
    pub(crate) b_order: RowOrder,
}

/// How to launch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct EstmmPlan {
    /// What the kernel is compiled for.
    pub(crate) blueprint: EstmmBlueprint,
    /// Tiles along `m`.
    pub(crate) m_tiles: usize,
    /// Tiles along `n`.
    pub(crate) n_tiles: usize,
    /// Parts of each expert's positions; partial sums are added afterwards if more than one.
    pub(crate) parts: usize,
    /// Cubes: one per part, expert and tile.
    pub(crate) cubes: usize,
}

/// Plans one launch.
pub(crate) fn plan(problem: EstmmProblem) -> EstmmPlan {
    let tile = tile_shape(problem.n);
    let m_tiles = problem.m.div_ceil(tile.m);
    let n_tiles = problem.n.div_ceil(tile.n);
    let cubes_per_part = problem.num_experts * m_tiles * n_tiles;
    let parts = sum_split(problem.num_slots, problem.num_experts, cubes_per_part);
    EstmmPlan {
        blueprint: EstmmBlueprint {
            tile,
            a_rows: row_source(problem.a_order, problem.top_k),
            b_rows: row_source(problem.b_order, problem.top_k),
        },
        m_tiles,
        n_tiles,
        parts,
        cubes: cubes_per_part * parts,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(num_slots: usize, m: usize, n: usize) -> EstmmProblem {
        EstmmProblem {
            num_slots,
            top_k: 1,
            num_experts: 8,
            m,
            n,
            a_order: RowOrder::Token,
            b_order: RowOrder::Expert,
        }
    }

    #[test]
    fn large_results_need_no_parts_and_small_ones_do() {
        let large = plan(problem(18_432, 384, 1536));
        assert_eq!((large.m_tiles, large.n_tiles, large.parts), (6, 12, 1));
        let small = plan(problem(18_432, 96, 384));
        assert_eq!((small.m_tiles, small.n_tiles, small.parts), (2, 3, 10));
        assert_eq!(small.cubes, 8 * 2 * 3 * 10);
    }
}
