//! Device code shared by the tiled kernels.

use cubecl::prelude::*;

/// Four neighbouring elements; the unit of shared memory and of register blocks.
pub(crate) type Quad<A> = Vector<A, Const<4>>;

/// Elements in a [`Quad`].
pub(crate) const QUAD: usize = 4;

/// Rows and columns of the block that one unit accumulates: two quads each way.
pub(crate) const BLOCK: usize = 2 * QUAD;

/// Quads of padding at the end of each line in shared memory, against bank conflicts when a
/// block is stored transposed.
const PADDING: usize = 1;

/// Extent of the tile that one cube computes, and of the step along the summed dimension.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct TileShape {
    /// Rows of the result.
    pub(crate) m: usize,
    /// Columns of the result.
    pub(crate) n: usize,
    /// Summed elements per step.
    pub(crate) k: usize,
}

impl TileShape {
    /// Units that share the tile.
    pub(crate) const fn units(&self) -> usize {
        (self.m / BLOCK) * (self.n / BLOCK)
    }
}

/// Quads in one shared-memory line of `extent` elements.
pub(crate) const fn line_quads(extent: usize) -> usize {
    extent / QUAD + PADDING
}

/// Which row of a matrix belongs to a position.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct RowSource {
    /// Rows are found through the slot at the position; otherwise row = position.
    pub(crate) by_slot: bool,
    /// Slots that read the same row: `top_k` in token order, 1 in slot order.
    pub(crate) slots_per_row: usize,
}

impl RowSource {
    /// Rows in the order of the positions.
    pub(crate) const POSITION: RowSource = RowSource {
        by_slot: false,
        slots_per_row: 1,
    };
}

/// Row that belongs to `position`.
#[cube]
pub(crate) fn source_row<I: Int>(
    slots: &Array<I>,
    position: usize,
    #[comptime] source: RowSource,
) -> usize {
    if comptime!(source.by_slot) {
        usize::cast_from(slots[position]) / source.slots_per_row
    } else {
        position
    }
}

/// Four elements from `offset`, zero where `column` reaches `width` or `valid` is false.
///
/// `N` is 4 if all widths and strides are multiples of four, and 1 otherwise.
#[cube]
pub(crate) fn load_quad<T: Numeric, A: Numeric, N: Size>(
    source: &Array<Vector<T, N>>,
    offset: usize,
    column: usize,
    width: usize,
    valid: bool,
) -> Quad<A> {
    let lanes = N::value().comptime();
    let mut quad = Quad::<A>::empty();
    if comptime!(lanes == QUAD) {
        if valid && column < width {
            quad = Quad::<A>::cast_from(source[offset / QUAD]);
        }
    } else {
        #[unroll]
        for lane in 0..QUAD {
            if valid && column + lane < width {
                quad[lane] = A::cast_from(source[offset + lane]);
            }
        }
    }
    quad
}

/// Stores four elements at `offset`, as far as `column` stays below `width`.
#[cube]
pub(crate) fn store_quad<T: Numeric, A: Numeric, N: Size>(
    target: &mut Array<Vector<T, N>>,
    offset: usize,
    column: usize,
    width: usize,
    quad: Quad<A>,
) {
    let lanes = N::value().comptime();
    if comptime!(lanes == QUAD) {
        if column < width {
            target[offset / QUAD] = Vector::cast_from(quad);
        }
    } else {
        #[unroll]
        for lane in 0..QUAD {
            if column + lane < width {
                target[offset + lane] = Vector::cast_from(quad[lane]);
            }
        }
    }
}

/// Where an operand's tile begins in its matrix.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Origin {
    /// Element at which the matrix begins.
    pub(crate) base: usize,
    /// Elements from one row to the next.
    pub(crate) row_stride: usize,
    /// First column.
    pub(crate) column: usize,
    /// Columns of the matrix.
    pub(crate) width: usize,
}

/// Stages lines that already run along the tile: line `k` is the row of position `first + k`.
///
/// Lines at or after `last` and columns at or after the width become zero.
#[cube]
pub(crate) fn stage_lines<T: Numeric, A: Numeric, I: Int, N: Size>(
    source: &Array<Vector<T, N>>,
    slots: &Array<I>,
    stage: &mut SharedMemory<Quad<A>>,
    origin: Origin,
    first: usize,
    last: usize,
    #[comptime] rows: RowSource,
    #[comptime] extent: usize,
    #[comptime] depth: usize,
    #[comptime] units: usize,
) {
    let quads = comptime!(extent / QUAD);
    let total = comptime!(quads * depth);
    #[unroll]
    for round in 0..comptime!(total.div_ceil(units)) {
        let item = UNIT_POS as usize + round * units;
        if item < total {
            let line = item / quads;
            let lane = item % quads;
            let position = first + line;
            let column = origin.column + lane * QUAD;
            let valid = position < last;
            let mut quad = Quad::<A>::empty();
            if valid {
                let row = source_row::<I>(slots, position, rows);
                let offset = origin.base + row * origin.row_stride + column;
                quad = load_quad::<T, A, N>(source, offset, column, origin.width, valid);
            }
            stage[line * comptime!(line_quads(extent)) + lane] = quad;
        }
    }
}

/// Stages rows that run along the summed dimension, transposing blocks of four by four.
///
/// Row `i` of the tile is `rows[i]`, for `i < num_rows`; columns are summed, from
/// `origin.column`. What is missing becomes zero.
#[cube]
pub(crate) fn stage_transposed<T: Numeric, A: Numeric, N: Size>(
    source: &Array<Vector<T, N>>,
    rows: &SharedMemory<u32>,
    num_rows: usize,
    stage: &mut SharedMemory<Quad<A>>,
    origin: Origin,
    #[comptime] extent: usize,
    #[comptime] depth: usize,
    #[comptime] units: usize,
) {
    let steps = comptime!(depth / QUAD);
    let total = comptime!(extent / QUAD * steps);
    #[unroll]
    for round in 0..comptime!(total.div_ceil(units)) {
        let item = UNIT_POS as usize + round * units;
        if item < total {
            let step = item % steps;
            let lane = item / steps;
            let column = origin.column + step * QUAD;
            let mut block = Array::<Quad<A>>::new(QUAD);
            #[unroll]
            for i in 0..QUAD {
                let row = lane * QUAD + i;
                let valid = row < num_rows;
                let mut quad = Quad::<A>::empty();
                if valid {
                    let offset = origin.base + rows[row] as usize * origin.row_stride + column;
                    quad = load_quad::<T, A, N>(source, offset, column, origin.width, valid);
                }
                block[i] = quad;
            }
            #[unroll]
            for j in 0..QUAD {
                let mut line = Quad::<A>::empty();
                #[unroll]
                for i in 0..QUAD {
                    let quad = block[i];
                    line[i] = quad[j];
                }
                stage[(step * QUAD + j) * comptime!(line_quads(extent)) + lane] = line;
            }
        }
    }
}

/// Place of a unit's block in the tile, in quads.
///
/// A block's halves lie half a tile apart, so that neighbouring units touch neighbouring quads.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct UnitPlace {
    /// Quad of the unit's upper four rows.
    pub(crate) m: usize,
    /// Quad of the unit's left four columns.
    pub(crate) n: usize,
}

/// Place of the current unit.
#[cube]
pub(crate) fn unit_place(#[comptime] tile: TileShape) -> UnitPlace {
    let across = comptime!(tile.n / BLOCK);
    UnitPlace {
        m: UNIT_POS as usize / across,
        n: UNIT_POS as usize % across,
    }
}

/// Row within the tile of row `i` (0..8) of the unit's block.
#[cube]
pub(crate) fn block_row(
    place: UnitPlace,
    #[comptime] i: usize,
    #[comptime] tile: TileShape,
) -> usize {
    place.m * QUAD + comptime!(i / QUAD * (tile.m / 2) + i % QUAD)
}

/// Column within the tile of quad `half` (0 or 1) of the unit's block.
#[cube]
pub(crate) fn block_column(
    place: UnitPlace,
    #[comptime] half: usize,
    #[comptime] tile: TileShape,
) -> usize {
    place.n * QUAD + comptime!(half * (tile.n / 2))
}

/// Adds the product of the staged operands to the unit's block: row `i`, quad `half` of it is
/// `block[2 · i + half]`.
#[cube]
pub(crate) fn multiply_add<A: Numeric>(
    lhs: &SharedMemory<Quad<A>>,
    rhs: &SharedMemory<Quad<A>>,
    block: &mut Array<Quad<A>>,
    place: UnitPlace,
    #[comptime] tile: TileShape,
) {
    for k in 0..tile.k {
        let lhs_line = k * comptime!(line_quads(tile.m)) + place.m;
        let rhs_line = k * comptime!(line_quads(tile.n)) + place.n;
        let left = rhs[rhs_line];
        let right = rhs[rhs_line + comptime!(tile.n / BLOCK)];
        #[unroll]
        for half in 0..2usize {
            let column = lhs[lhs_line + comptime!(half * (tile.m / BLOCK))];
            #[unroll]
            for lane in 0..QUAD {
                let i = comptime!(2 * (half * QUAD + lane));
                let factor = Quad::<A>::new(column[lane]);
                block[i] = fma(factor, left, block[i]);
                block[i + 1] = fma(factor, right, block[i + 1]);
            }
        }
    }
}

/// `out[i] = Σ_s parts[s][i]`, in the order of `s`.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(crate) fn sum_parts<T: Numeric, A: Numeric>(
    parts: &Array<A>,
    out: &mut Array<T>,
    len: usize,
    num_parts: usize,
    #[define(T, A)] _dtypes: [StorageType; 2],
) {
    if ABSOLUTE_POS >= len {
        terminate!();
    }
    let mut sum = A::from_int(0);
    for part in 0..num_parts {
        sum += parts[part * len + ABSOLUTE_POS];
    }
    out[ABSOLUTE_POS] = T::cast_from(sum);
}
