//! The one error type of this crate.

use burn::tensor::DType;

/// Why an operator refused its input. Every variant is raised before any kernel is launched.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OpsError {
    /// A tensor's shape does not fit the operator.
    #[error("{op}: {tensor} has shape {got:?}, expected {expected}; {remedy}")]
    Shape {
        /// The operator that was called.
        op: &'static str,
        /// The argument's name.
        tensor: &'static str,
        /// The shape it has.
        got: Vec<usize>,
        /// The shape it should have.
        expected: String,
        /// What the caller can do.
        remedy: &'static str,
    },
    /// A tensor's element type differs from that of the tensor it is combined with.
    #[error(
        "{op}: {tensor} is {got:?}, expected {expected}; cast it explicitly, operators never cast"
    )]
    DType {
        /// The operator that was called.
        op: &'static str,
        /// The argument's name.
        tensor: &'static str,
        /// The element type it has.
        got: DType,
        /// The element types that are allowed.
        expected: String,
    },
    /// `top_k` is zero or exceeds the number of experts.
    #[error("top_k ({top_k}) must be in 1..={num_experts} (num_experts); lower router.top_k")]
    TopK {
        /// The number of experts asked for per token.
        top_k: usize,
        /// The number of experts there are.
        num_experts: usize,
    },
    /// An expert id lies outside `0..num_experts`.
    #[error(
        "expert_ids[token {token}, choice {choice}] is {got}, allowed is 0..{num_experts}; check the router's output"
    )]
    ExpertId {
        /// Row of the offending id.
        token: usize,
        /// Column of the offending id.
        choice: usize,
        /// The id.
        got: i64,
        /// The number of experts.
        num_experts: usize,
    },
    /// A number is outside its range.
    #[error("{name} is {got}, allowed is {allowed}; {remedy}")]
    Value {
        /// The parameter's name.
        name: &'static str,
        /// What was given.
        got: String,
        /// What is allowed.
        allowed: &'static str,
        /// What the caller can do.
        remedy: &'static str,
    },
    /// The device reported a failure while data was read back.
    #[error("reading {tensor} from the device failed: {reason}")]
    Device {
        /// The tensor that was read.
        tensor: &'static str,
        /// The back-end's own words.
        reason: String,
    },
}

/// Result of an operator.
pub type Result<T> = core::result::Result<T, OpsError>;
