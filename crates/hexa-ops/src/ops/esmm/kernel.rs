//! Device code of ESMM.

use cubecl::prelude::*;

use crate::ops::tile::kernel::{
    BLOCK, Origin, Quad, RowSource, TileShape, UnitPlace, block_column, block_row, line_quads,
    load_quad, multiply_add, source_row, stage_lines, stage_transposed, store_quad, unit_place,
};

/// What is fixed when the kernel is compiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct EsmmBlueprint {
    /// Tile of one cube.
    pub(crate) tile: TileShape,
    /// Rows of `x`.
    pub(crate) x_rows: RowSource,
    /// Rows of the result.
    pub(crate) out_rows: RowSource,
    /// Whether each expert's matrix is stored `[out, in]`.
    pub(crate) transposed: bool,
}

/// Extents and strides, in elements.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub(crate) struct EsmmExtents {
    /// Number of experts.
    num_experts: u32,
    /// Summed width.
    width_in: usize,
    /// Columns of the result.
    width_out: usize,
    /// Column tiles of the result.
    column_tiles: usize,
    /// From one row of `x` to the next.
    x_stride: usize,
    /// From one expert's matrix to the next.
    w_expert_stride: usize,
    /// From one row of a matrix to the next, as stored.
    w_row_stride: usize,
    /// From one expert's bias to the next.
    bias_stride: usize,
}

/// The positions that one row tile covers.
#[derive(CubeType, Clone, Copy)]
struct RowTile {
    /// The tile's expert.
    expert: usize,
    /// First position.
    first: usize,
    /// Number of positions, zero if there is no such tile.
    len: usize,
}

/// Positions of row tile number `tile`, the experts' tiles being numbered one after the other.
#[cube]
fn find_row_tile<I: Int>(
    offsets: &Array<I>,
    tile: usize,
    num_experts: u32,
    #[comptime] rows: usize,
) -> RowTile {
    let mut expert = 0usize;
    let mut first = 0usize;
    let mut len = 0usize;
    let mut tiles_before = 0usize;
    let mut begin = usize::cast_from(offsets[0]);
    for candidate in 0..num_experts as usize {
        let end = usize::cast_from(offsets[candidate + 1]);
        let tiles = (end - begin).div_ceil(rows);
        if tile >= tiles_before && tile < tiles_before + tiles {
            expert = candidate;
            first = begin + (tile - tiles_before) * rows;
            len = min(rows, end - first);
        }
        tiles_before += tiles;
        begin = end;
    }
    RowTile { expert, first, len }
}

/// One tile of `y = x · W[expert] + b[expert]`.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(crate) fn esmm<T: Numeric, A: Numeric, I: Int, N: Size>(
    x: &Array<Vector<T, N>>,
    w: &Array<Vector<T, N>>,
    bias: &ComptimeOption<Array<Vector<T, N>>>,
    slots: &Array<I>,
    offsets: &Array<I>,
    y: &mut Array<Vector<T, N>>,
    extents: EsmmExtents,
    #[comptime] blueprint: EsmmBlueprint,
    #[define(T, A, I)] _dtypes: [StorageType; 3],
) {
    let tile = comptime!(blueprint.tile);
    let units = comptime!(tile.units());
    let rows = find_row_tile::<I>(
        offsets,
        CUBE_POS / extents.column_tiles,
        extents.num_experts,
        tile.m,
    );
    if rows.len == 0 {
        terminate!();
    }
    let first_column = CUBE_POS % extents.column_tiles * tile.n;

    // Rows of the operands that the tile's lines come from; looked up once, read in every step.
    let mut x_rows = SharedMemory::<u32>::new(tile.m);
    let mut w_rows = SharedMemory::<u32>::new(tile.n);
    let mut line = UNIT_POS as usize;
    while line < rows.len {
        x_rows[line] = source_row::<I>(slots, rows.first + line, blueprint.x_rows) as u32;
        line += units;
    }
    if comptime!(blueprint.transposed) {
        let mut line = UNIT_POS as usize;
        while line < tile.n {
            w_rows[line] = (first_column + line) as u32;
            line += units;
        }
    }

    let place = unit_place(tile);
    let mut block = Array::<Quad<A>>::new(comptime!(2 * BLOCK));
    init_with_bias::<T, A, N>(
        &mut block,
        bias,
        rows.expert,
        first_column,
        extents,
        place,
        tile,
    );

    let mut x_stage = SharedMemory::<Quad<A>>::new(comptime!(tile.k * line_quads(tile.m)));
    let mut w_stage = SharedMemory::<Quad<A>>::new(comptime!(tile.k * line_quads(tile.n)));
    let w_base = rows.expert * extents.w_expert_stride;
    let mut k = 0usize;
    while k < extents.width_in {
        sync_cube();
        let x_origin = Origin {
            base: 0usize.runtime(),
            row_stride: extents.x_stride,
            column: k,
            width: extents.width_in,
        };
        stage_transposed::<T, A, N>(
            x,
            &x_rows,
            rows.len,
            &mut x_stage,
            x_origin,
            tile.m,
            tile.k,
            units,
        );
        if comptime!(blueprint.transposed) {
            let w_origin = Origin {
                base: w_base,
                row_stride: extents.w_row_stride,
                column: k,
                width: extents.width_in,
            };
            let columns = min(tile.n, extents.width_out - first_column);
            stage_transposed::<T, A, N>(
                w,
                &w_rows,
                columns,
                &mut w_stage,
                w_origin,
                tile.n,
                tile.k,
                units,
            );
        } else {
            let w_origin = Origin {
                base: w_base,
                row_stride: extents.w_row_stride,
                column: first_column,
                width: extents.width_out,
            };
            stage_lines::<T, A, I, N>(
                w,
                slots,
                &mut w_stage,
                w_origin,
                k,
                extents.width_in,
                comptime!(RowSource::POSITION),
                tile.n,
                tile.k,
                units,
            );
        }
        sync_cube();
        multiply_add::<A>(&x_stage, &w_stage, &mut block, place, tile);
        k += tile.k;
    }

    #[unroll]
    for i in 0..BLOCK {
        let line = block_row(place, i, tile);
        if line < rows.len {
            let row = source_row::<I>(slots, rows.first + line, blueprint.out_rows);
            #[unroll]
            for half in 0..2usize {
                let column = first_column + block_column(place, half, tile);
                store_quad::<T, A, N>(
                    y,
                    row * extents.width_out + column,
                    column,
                    extents.width_out,
                    block[comptime!(2 * i + half)],
                );
            }
        }
    }
}

/// Starts every row of the unit's block with the expert's bias, or zero.
#[cube]
fn init_with_bias<T: Numeric, A: Numeric, N: Size>(
    block: &mut Array<Quad<A>>,
    bias: &ComptimeOption<Array<Vector<T, N>>>,
    expert: usize,
    first_column: usize,
    extents: EsmmExtents,
    place: UnitPlace,
    #[comptime] tile: TileShape,
) {
    #[unroll]
    for half in 0..2usize {
        let mut start = Quad::<A>::empty();
        #[comptime]
        if let ComptimeOption::Some(bias) = bias {
            let column = first_column + block_column(place, half, tile);
            let offset = expert * extents.bias_stride + column;
            start = load_quad::<T, A, N>(bias, offset, column, extents.width_out, true);
        }
        #[unroll]
        for i in 0..BLOCK {
            block[comptime!(2 * i + half)] = start;
        }
    }
}
