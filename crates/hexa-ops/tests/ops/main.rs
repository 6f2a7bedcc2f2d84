//! Tests of the operators on the back-end that `HEXA_TEST_BACKEND` names.

mod cases;
