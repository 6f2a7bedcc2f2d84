//! Oracles, comparators, gradient checks and back-end selection for tests.
