//! Device code of ESS.

use cubecl::prelude::*;

use crate::ops::estmm::kernel::positions_of_part;
use crate::ops::tile::kernel::{RowSource, source_row};

/// What is fixed when the kernel is compiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct EssBlueprint {
    /// Vectors of columns per cube.
    pub(crate) columns: usize,
    /// Row lanes per cube, a power of two.
    pub(crate) lanes: usize,
    /// Rows of `x`.
    pub(crate) x_rows: RowSource,
}

/// Extents and strides; columns and strides in vectors.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub(crate) struct EssExtents {
    /// Number of experts.
    num_experts: usize,
    /// Columns.
    width: usize,
    /// Blocks of columns.
    column_blocks: usize,
    /// From one row of `x` to the next.
    x_stride: usize,
    /// Parts of each expert's positions.
    parts: usize,
}

/// Sum of one block of columns over one part of an expert's positions; `out` is
/// `[parts, num_experts, n]`.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(crate) fn ess<T: Numeric, A: Numeric, O: Numeric, I: Int, N: Size>(
    x: &Array<Vector<T, N>>,
    gates: &ComptimeOption<Array<T>>,
    slots: &Array<I>,
    offsets: &Array<I>,
    out: &mut Array<Vector<O, N>>,
    extents: EssExtents,
    #[comptime] blueprint: EssBlueprint,
    #[define(T, A, O, I)] _dtypes: [StorageType; 4],
) {
    let columns = comptime!(blueprint.columns);
    let lanes = comptime!(blueprint.lanes);
    let row_of_sums = CUBE_POS / extents.column_blocks;
    let expert = row_of_sums % extents.num_experts;
    let part = row_of_sums / extents.num_experts;
    if part >= extents.parts {
        terminate!();
    }
    let place = UNIT_POS as usize;
    let column = CUBE_POS % extents.column_blocks * columns + place % columns;
    let lane = place / columns;
    let positions = positions_of_part::<I>(offsets, expert, part, extents.parts, 1usize);

    let mut sum = Vector::<A, N>::new(A::from_int(0));
    if column < extents.width {
        let mut position = positions.first + lane;
        while position < positions.last {
            let row = source_row::<I>(slots, position, blueprint.x_rows);
            let mut value = Vector::<A, N>::cast_from(x[row * extents.x_stride + column]);
            #[comptime]
            if let ComptimeOption::Some(gates) = gates {
                let gate = A::cast_from(gates[usize::cast_from(slots[position])]);
                value *= Vector::<A, N>::new(gate);
            }
            sum += value;
            position += lanes;
        }
    }

    let mut sums = SharedMemory::<Vector<A, N>>::new(comptime!(columns * lanes));
    sums[place] = sum;
    let mut half = comptime!(lanes / 2).runtime();
    while half > 0 {
        sync_cube();
        if lane < half {
            let other = sums[place + half * columns];
            sums[place] += other;
        }
        half /= 2;
    }
    if lane == 0 && column < extents.width {
        out[row_of_sums * extents.width + column] = Vector::cast_from(sums[place]);
    }
}
