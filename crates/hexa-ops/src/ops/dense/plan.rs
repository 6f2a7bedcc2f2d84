//! Which kernels a product may run on, best first, and which layouts they read.

use burn::tensor::DType;

use crate::types::MatmulPrecision;

/// A kernel for a dense product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Candidate {
    /// Matrix units; f32 operands are rounded to TF32 where the device has it.
    MatrixUnits,
    /// Register tiles, in the operands' own arithmetic.
    RegisterTiles,
    /// One unit per element; accepts everything.
    Strided,
}

/// Candidates for operands of `dtype`, in the order in which they are tried.
pub fn candidates(dtype: DType, precision: MatmulPrecision) -> &'static [Candidate] {
    use Candidate::{MatrixUnits, RegisterTiles, Strided};
    match (dtype, precision) {
        (DType::F64, _) => &[Strided],
        (DType::F32, MatmulPrecision::Strict) => &[RegisterTiles, Strided],
        _ => &[MatrixUnits, RegisterTiles, Strided],
    }
}

/// Rows and columns of the results that one cube of a tiled kernel computes, at most.
const CUBE_TILE: usize = 64;

/// Cubes that keep the largest devices busy.
const ENOUGH_CUBES: usize = 512;

/// Shortest sum that is worth a part of its own.
const MIN_PART: usize = 256;

/// Parts into which the sums over `k` of `batches` products `[m, k] · [k, n]` are cut, a divisor of
/// `k`; one where the results alone keep the device busy. A function of shapes: sums are
/// reproducible.
///
/// A linear layer's weight gradient is what needs it: a small result, summed over all tokens.
pub fn parts_of_sum(batches: usize, m: usize, n: usize, k: usize) -> usize {
    let cubes = batches * m.div_ceil(CUBE_TILE) * n.div_ceil(CUBE_TILE);
    let most = (ENOUGH_CUBES / cubes.max(1)).min(k / MIN_PART);
    // What does not divide would need a remainder's product of its own.
    (1..=most)
        .rev()
        .find(|&parts| k.is_multiple_of(parts))
        .unwrap_or(1)
}

/// Whether tiled kernels read this layout as it is: one of the matrix axes has unit stride, the
/// other one does not overlap it, and matrices lie one after the other.
pub fn is_readable(shape: &[usize], strides: &[usize]) -> bool {
    let [.., rows, columns] = *shape else {
        return false;
    };
    let [batch_strides @ .., row_stride, column_stride] = strides else {
        return false;
    };
    let row_major = *column_stride == 1 && *row_stride >= columns;
    let column_major = *row_stride == 1 && *column_stride >= rows;
    let matrix = rows.max(1) * row_stride.max(column_stride);
    // Axes of length one have arbitrary strides, which tiled kernels may misread.
    let plain = shape.iter().all(|&len| len > 1);
    plain && (row_major || column_major) && batch_strides.iter().all(|&stride| stride >= matrix)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strict_f32_never_touches_matrix_units() {
        let strict = candidates(DType::F32, MatmulPrecision::Strict);
        assert!(!strict.contains(&Candidate::MatrixUnits));
    }

    #[test]
    fn every_list_ends_with_the_kernel_that_accepts_everything() {
        for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
            for precision in [MatmulPrecision::Strict, MatmulPrecision::Tf32] {
                assert_eq!(
                    candidates(dtype, precision).last(),
                    Some(&Candidate::Strided)
                );
            }
        }
    }

    #[test]
    fn long_sums_of_small_results_are_cut_evenly() {
        assert_eq!(parts_of_sum(1, 64, 192, 65_536), 128);
        assert_eq!(parts_of_sum(1, 65_536, 192, 64), 1, "many rows, short sums");
        assert_eq!(parts_of_sum(8192, 16, 16, 512), 1, "many products");
        assert_eq!(parts_of_sum(1, 64, 64, 65_537), 1, "a prime");
        assert_eq!(parts_of_sum(1, 1, 1, 0), 1);
        for k in 1..2000 {
            assert!(k % parts_of_sum(1, 3, 5, k) == 0);
        }
    }

    #[test]
    fn padded_and_transposed_rows_are_readable() {
        assert!(is_readable(&[3, 5], &[5, 1]));
        assert!(is_readable(&[3, 5], &[8, 1]), "padded rows");
        assert!(is_readable(&[3, 5], &[1, 3]), "transposed");
        assert!(is_readable(&[2, 3, 5], &[24, 8, 1]), "batched");
    }

    #[test]
    fn overlapping_and_scattered_elements_are_not_readable() {
        assert!(!is_readable(&[3, 5], &[0, 1]), "broadcast rows");
        assert!(!is_readable(&[3, 5], &[20, 2]), "every other column");
        assert!(
            !is_readable(&[2, 3, 5], &[5, 10, 1]),
            "interleaved matrices"
        );
        assert!(!is_readable(&[2, 3, 5], &[0, 5, 1]), "broadcast batch");
        assert!(!is_readable(&[5], &[1]), "no matrix");
    }
}
