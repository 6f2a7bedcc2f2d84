//! Launch plan of the combination. Pure.

use crate::ops::tile::plan::ELEMWISE_UNITS;

/// Cubes for one unit per token and vector of columns.
pub(crate) fn cubes(tokens: usize, width: usize) -> usize {
    (tokens * width).div_ceil(ELEMWISE_UNITS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_has_a_unit() {
        assert_eq!(cubes(1, 1), 1);
        assert_eq!(cubes(64, 4), 1);
        assert_eq!(cubes(257, 3), 4);
        assert_eq!(cubes(0, 7), 0);
    }
}
