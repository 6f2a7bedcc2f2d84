//! Device code of ESTMM.

use cubecl::prelude::*;

use crate::ops::tile::kernel::{
    BLOCK, Origin, Quad, RowSource, TileShape, block_column, block_row, line_quads, multiply_add,
    stage_lines, store_quad, unit_place,
};

/// What is fixed when the kernel is compiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct EstmmBlueprint {
    /// Tile of one cube.
    pub(crate) tile: TileShape,
    /// Rows of `a`.
    pub(crate) a_rows: RowSource,
    /// Rows of `b`.
    pub(crate) b_rows: RowSource,
}

/// Extents and strides, in elements.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub(crate) struct EstmmExtents {
    /// Number of experts.
    num_experts: usize,
    /// Columns of `a`, rows of each result.
    m: usize,
    /// Columns of `b` and of each result.
    n: usize,
    /// Tiles along `m`.
    m_tiles: usize,
    /// Tiles along `n`.
    n_tiles: usize,
    /// From one row of `a` to the next.
    a_stride: usize,
    /// From one row of `b` to the next.
    b_stride: usize,
    /// Parts of each expert's positions.
    parts: usize,
}

/// A contiguous range of positions.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Positions {
    /// First position.
    pub(crate) first: usize,
    /// Position after the last one.
    pub(crate) last: usize,
}

/// Part number `part` of an expert's positions, cut into `parts` at multiples of `step`.
#[cube]
pub(crate) fn positions_of_part<I: Int>(
    offsets: &Array<I>,
    expert: usize,
    part: usize,
    parts: usize,
    #[comptime] step: usize,
) -> Positions {
    let begin = usize::cast_from(offsets[expert]);
    let end = usize::cast_from(offsets[expert + 1]);
    let per_part = (end - begin).div_ceil(parts).div_ceil(step) * step;
    Positions {
        first: min(begin + part * per_part, end),
        last: min(begin + (part + 1) * per_part, end),
    }
}

/// One tile of `Σ aᵀ b` over one part of an expert's positions; `out` is
/// `[parts, num_experts, m, n]`.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(crate) fn estmm<T: Numeric, A: Numeric, O: Numeric, I: Int, N: Size>(
    a: &Array<Vector<T, N>>,
    b: &Array<Vector<T, N>>,
    slots: &Array<I>,
    offsets: &Array<I>,
    out: &mut Array<Vector<O, N>>,
    extents: EstmmExtents,
    #[comptime] blueprint: EstmmBlueprint,
    #[define(T, A, O, I)] _dtypes: [StorageType; 4],
) {
    let tile = comptime!(blueprint.tile);
    let units = comptime!(tile.units());
    let first_n = CUBE_POS % extents.n_tiles * tile.n;
    let rest = CUBE_POS / extents.n_tiles;
    let first_m = rest % extents.m_tiles * tile.m;
    let matrix = rest / extents.m_tiles;
    let expert = matrix % extents.num_experts;
    let part = matrix / extents.num_experts;
    if part >= extents.parts {
        terminate!();
    }
    let positions = positions_of_part::<I>(offsets, expert, part, extents.parts, tile.k);

    let a_origin = Origin {
        base: 0usize.runtime(),
        row_stride: extents.a_stride,
        column: first_m,
        width: extents.m,
    };
    let b_origin = Origin {
        base: 0usize.runtime(),
        row_stride: extents.b_stride,
        column: first_n,
        width: extents.n,
    };
    let place = unit_place(tile);
    let mut block = Array::<Quad<A>>::new(comptime!(2 * BLOCK));
    #[unroll]
    for i in 0..comptime!(2 * BLOCK) {
        block[i] = Quad::<A>::new(A::from_int(0));
    }
    let mut a_stage = SharedMemory::<Quad<A>>::new(comptime!(tile.k * line_quads(tile.m)));
    let mut b_stage = SharedMemory::<Quad<A>>::new(comptime!(tile.k * line_quads(tile.n)));
    let mut first = positions.first;
    while first < positions.last {
        sync_cube();
        stage_lines::<T, A, I, N>(
            a,
            slots,
            &mut a_stage,
            a_origin,
            first,
            positions.last,
            blueprint.a_rows,
            tile.m,
            tile.k,
            units,
        );
        stage_lines::<T, A, I, N>(
            b,
            slots,
            &mut b_stage,
            b_origin,
            first,
            positions.last,
            blueprint.b_rows,
            tile.n,
            tile.k,
            units,
        );
        sync_cube();
        multiply_add::<A>(&a_stage, &b_stage, &mut block, place, tile);
        first += tile.k;
    }

    #[unroll]
    for i in 0..BLOCK {
        let row = first_m + block_row(place, i, tile);
        if row < extents.m {
            #[unroll]
            for half in 0..2usize {
                let column = first_n + block_column(place, half, tile);
                store_quad::<O, A, N>(
                    out,
                    (matrix * extents.m + row) * extents.n + column,
                    column,
                    extents.n,
                    block[comptime!(2 * i + half)],
                );
            }
        }
    }
}
