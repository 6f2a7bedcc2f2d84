//! How many bytes a tensor takes: types, and rows that are padded.

use crate::backend::BackendKind;

/// Bytes of an f32.
pub(super) const F32: u64 = 4;

/// How a back-end lays rows out in memory.
///
/// CubeCL's CUDA runtime pads the rows of most results to a power of two of up to 512 bytes, so that
/// a row of 144 f32 takes 1,024 bytes rather than 576. The project's own kernels write packed rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rows {
    /// One after the other.
    Packed,
    /// Padded where the runtime chooses.
    Padded,
}

impl Rows {
    /// What the devices of a back-end do.
    pub fn of(backend: BackendKind) -> Self {
        match backend {
            BackendKind::Cuda => Rows::Padded,
            BackendKind::Cpu | BackendKind::Wgpu => Rows::Packed,
        }
    }

    /// Offsets at which a part of a tensor can be read in place; a part elsewhere is copied.
    pub(super) fn alignment(self) -> u64 {
        match self {
            Rows::Packed => 64,
            Rows::Padded => WIDEST_ROW,
        }
    }

    /// Bytes of `rows` rows of `width` values.
    pub(super) fn bytes(self, rows: u64, width: u64, value: u64) -> u64 {
        let row = width.saturating_mul(value);
        let row = match self {
            Rows::Packed => row,
            Rows::Padded if width == 1 => row,
            Rows::Padded => {
                let step = row.checked_next_power_of_two().unwrap_or(u64::MAX);
                row.next_multiple_of(step.clamp(16, WIDEST_ROW))
            }
        };
        rows.saturating_mul(row)
    }
}

/// Padded rows start at multiples of this many bytes at most.
const WIDEST_ROW: u64 = 512;

/// Types and rows of a training step.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    pub rows: Rows,
    /// Bytes of an operand of the products: 2 in half precision.
    pub operand: u64,
}

impl Layout {
    pub fn is_half(self) -> bool {
        self.operand < F32
    }

    /// Rows of f32 that Burn wrote.
    pub fn f32(self, rows: u64, width: u64) -> u64 {
        self.rows.bytes(rows, width, F32)
    }

    /// Rows of operands that Burn wrote.
    pub fn operands(self, rows: u64, width: u64) -> u64 {
        self.rows.bytes(rows, width, self.operand)
    }

    /// Rows of operands that the project's kernels wrote.
    pub fn packed(self, rows: u64, width: u64) -> u64 {
        Rows::Packed.bytes(rows, width, self.operand)
    }

    /// A copy of weights, rounded to half precision; none in f32.
    pub fn copy(self, rows: u64, width: u64) -> u64 {
        if self.is_half() {
            self.operands(rows, width)
        } else {
            0
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_padded_as_the_runtime_pads_them() {
        let padded = |width, value| Rows::Padded.bytes(1, width, value);
        assert_eq!(padded(144, 4), 1024);
        assert_eq!(padded(144, 2), 512);
        assert_eq!(padded(96, 4), 512);
        assert_eq!(padded(192, 4), 1024);
        assert_eq!(padded(384, 4), 1536);
        assert_eq!(padded(3, 4), 16);
        assert_eq!(padded(1, 4), 4);
        assert_eq!(Rows::Packed.bytes(5, 3, 2), 30);
    }
}
