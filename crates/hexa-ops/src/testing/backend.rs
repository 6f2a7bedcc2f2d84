//! The choice of the back-end for tests, at run time.
//!
//! `HEXA_TEST_BACKEND` names one of the compiled-in back-ends, so that one test executable, built
//! with `--features cuda,wgpu,testing`, can be carried to another machine and run there without
//! cargo. `HEXA_TEST_STRICT=1` turns skipped tests into failures.

use core::fmt;
use std::io::Write;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::backend::ExpertKernels;

/// Environment variable that names the back-end.
pub const BACKEND_VARIABLE: &str = "HEXA_TEST_BACKEND";

/// Environment variable that makes skips failures.
pub const STRICT_VARIABLE: &str = "HEXA_TEST_STRICT";

/// A back-end that tests can run on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TestBackend {
    /// burn-flex.
    Cpu,
    /// CubeCL on Vulkan, Metal or WebGPU.
    Wgpu,
    /// CubeCL on CUDA.
    Cuda,
    /// The former, under burn-fusion.
    FusionWgpu,
    /// The former, under burn-fusion.
    FusionCuda,
}

impl TestBackend {
    /// All back-ends that this crate can be built with.
    pub const ALL: [TestBackend; 5] = [
        TestBackend::Cpu,
        TestBackend::Wgpu,
        TestBackend::Cuda,
        TestBackend::FusionWgpu,
        TestBackend::FusionCuda,
    ];

    /// Its value of [`BACKEND_VARIABLE`].
    pub fn name(self) -> &'static str {
        match self {
            TestBackend::Cpu => "cpu",
            TestBackend::Wgpu => "wgpu",
            TestBackend::Cuda => "cuda",
            TestBackend::FusionWgpu => "fusion-wgpu",
            TestBackend::FusionCuda => "fusion-cuda",
        }
    }

    /// The features that compile it in.
    pub fn features(self) -> &'static str {
        match self {
            TestBackend::Cpu => "cpu",
            TestBackend::Wgpu => "wgpu",
            TestBackend::Cuda => "cuda",
            TestBackend::FusionWgpu => "wgpu,fusion",
            TestBackend::FusionCuda => "cuda,fusion",
        }
    }

    /// Whether it is compiled in.
    pub fn is_compiled_in(self) -> bool {
        match self {
            TestBackend::Cpu => cfg!(feature = "cpu"),
            TestBackend::Wgpu => cfg!(feature = "wgpu"),
            TestBackend::Cuda => cfg!(feature = "cuda"),
            TestBackend::FusionWgpu => cfg!(all(feature = "wgpu", feature = "fusion")),
            TestBackend::FusionCuda => cfg!(all(feature = "cuda", feature = "fusion")),
        }
    }

    /// The back-end called `name`.
    ///
    /// # Errors
    /// [`BackendChoiceError`] if there is none or it is not compiled in.
    pub fn parse(name: &str) -> Result<Self, BackendChoiceError> {
        let backend = Self::ALL
            .into_iter()
            .find(|b| b.name() == name)
            .ok_or_else(|| BackendChoiceError::Unknown(name.to_string()))?;
        if backend.is_compiled_in() {
            Ok(backend)
        } else {
            Err(BackendChoiceError::NotCompiledIn(backend))
        }
    }

    /// The back-end that the environment asks for; `cpu` if it does not say.
    ///
    /// # Errors
    /// [`BackendChoiceError`] as for [`TestBackend::parse`].
    pub fn selected() -> Result<Self, BackendChoiceError> {
        match std::env::var(BACKEND_VARIABLE) {
            Ok(name) => Self::parse(&name),
            Err(_) => Self::parse("cpu"),
        }
    }

    /// Whether the device is a processor's emulation of one, or may be, so that tests should keep
    /// their shapes small.
    pub fn prefers_small_shapes(self) -> bool {
        matches!(self, TestBackend::Wgpu | TestBackend::FusionWgpu)
    }

    /// Whether burn-fusion orders the operations.
    pub fn is_fused(self) -> bool {
        matches!(self, TestBackend::FusionWgpu | TestBackend::FusionCuda)
    }
}

/// Why no back-end can be chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BackendChoiceError {
    /// There is no back-end of this name.
    Unknown(String),
    /// The executable was built without it.
    NotCompiledIn(TestBackend),
}

impl fmt::Display for BackendChoiceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BackendChoiceError::Unknown(name) => {
                let names = TestBackend::ALL.map(TestBackend::name).join(", ");
                write!(
                    f,
                    "{BACKEND_VARIABLE} is {name:?}, allowed are {names}; name one of them"
                )
            }
            BackendChoiceError::NotCompiledIn(backend) => write!(
                f,
                "{BACKEND_VARIABLE} is {:?}, which is not compiled in; build with --features {}",
                backend.name(),
                backend.features()
            ),
        }
    }
}

impl std::error::Error for BackendChoiceError {}

/// A test that runs on any back-end; [`backend_test!`](crate::backend_test) makes one of a
/// generic function.
pub trait BackendTest {
    /// The test, on the kernels `K`.
    fn run<K: ExpertKernels>(self);
}

/// Runs a test on the back-end that the environment asks for.
///
/// # Panics
/// With the reason, if that back-end is not compiled in, as a test that silently ran elsewhere would
/// prove nothing; or if a task failed on the device ([`watch`](super::watch)).
pub fn dispatch(test: impl BackendTest) {
    match TestBackend::selected() {
        Ok(backend) => run_on(backend, test),
        Err(error) => panic!("{error}"),
    }
}

fn run_on(backend: TestBackend, test: impl BackendTest) {
    match backend {
        #[cfg(feature = "cpu")]
        TestBackend::Cpu => watched::<crate::backends::Cpu>(test),
        #[cfg(feature = "wgpu")]
        TestBackend::Wgpu => watched::<crate::backends::Wgpu>(test),
        #[cfg(feature = "cuda")]
        TestBackend::Cuda => watched::<crate::backends::Cuda>(test),
        #[cfg(all(feature = "wgpu", feature = "fusion"))]
        TestBackend::FusionWgpu => watched::<burn_fusion::Fusion<crate::backends::Wgpu>>(test),
        #[cfg(all(feature = "cuda", feature = "fusion"))]
        TestBackend::FusionCuda => watched::<burn_fusion::Fusion<crate::backends::Cuda>>(test),
        #[allow(unreachable_patterns, reason = "with all features nothing is left")]
        other => panic!("{}", BackendChoiceError::NotCompiledIn(other)),
    }
}

/// A test that compares a back-end with itself under burn-fusion;
/// [`backend_test!`](crate::backend_test) makes one of a generic function.
pub trait FusionTest {
    /// The test, on the kernels `Plain` and on the same under fusion.
    fn run<Plain: ExpertKernels, Fused: ExpertKernels>(self);
}

/// Runs a test on the CubeCL back-end that the environment asks for, with and without fusion;
/// skips it if there is none.
///
/// # Panics
/// As [`dispatch`].
pub fn dispatch_fusion(name: &str, test: impl FusionTest) {
    match TestBackend::selected() {
        #[cfg(all(feature = "wgpu", feature = "fusion"))]
        Ok(TestBackend::Wgpu | TestBackend::FusionWgpu) => {
            type Plain = crate::backends::Wgpu;
            super::watch::watched::<Plain>(|| test.run::<Plain, burn_fusion::Fusion<Plain>>());
        }
        #[cfg(all(feature = "cuda", feature = "fusion"))]
        Ok(TestBackend::Cuda | TestBackend::FusionCuda) => {
            type Plain = crate::backends::Cuda;
            super::watch::watched::<Plain>(|| test.run::<Plain, burn_fusion::Fusion<Plain>>());
        }
        Ok(TestBackend::Cpu) => skip(name, "the CPU has no fusion"),
        #[allow(unreachable_patterns, reason = "with all features nothing is left")]
        Ok(_) => {
            let _ = test;
            skip(name, "built without the feature fusion");
        }
        Err(error) => panic!("{error}"),
    }
}

fn watched<K: ExpertKernels>(test: impl BackendTest) {
    super::watch::watched::<K>(|| test.run::<K>());
}

static SKIPPED: AtomicUsize = AtomicUsize::new(0);

/// Records that a test cannot run here, on the error stream even if the harness captures output.
///
/// # Panics
/// If `HEXA_TEST_STRICT=1`.
pub fn skip(test: &str, reason: &str) {
    let strict = std::env::var(STRICT_VARIABLE).is_ok_and(|value| value == "1");
    assert!(!strict, "{test} would be skipped: {reason}");
    let count = SKIPPED.fetch_add(1, Ordering::Relaxed) + 1;
    // A closed error stream must not fail a test.
    let _ = writeln!(
        std::io::stderr().lock(),
        "SKIPPED {test}: {reason} ({count} skipped so far)"
    );
}

/// Declares a `#[test]` that runs a generic function on the back-end the environment asks for.
///
/// `backend_test!(name, function)` calls `function::<Autodiff<K>>()`;
/// `backend_test!(kernels name, function)` calls `function::<K>()`, `K` being an
/// [`ExpertKernels`](crate::ExpertKernels) back-end; `backend_test!(fusion name, function)` calls
/// `function::<K, Fusion<K>>()`.
#[macro_export]
macro_rules! backend_test {
    (fusion $name:ident, $function:ident) => {
        #[test]
        fn $name() {
            struct Case;
            impl $crate::testing::backend::FusionTest for Case {
                fn run<P: $crate::ExpertKernels, F: $crate::ExpertKernels>(self) {
                    $function::<P, F>();
                }
            }
            $crate::testing::backend::dispatch_fusion(stringify!($name), Case);
        }
    };
    (kernels $name:ident, $function:ident) => {
        #[test]
        fn $name() {
            struct Case;
            impl $crate::testing::backend::BackendTest for Case {
                fn run<K: $crate::ExpertKernels>(self) {
                    $function::<K>();
                }
            }
            $crate::testing::backend::dispatch(Case);
        }
    };
    ($name:ident, $function:ident) => {
        #[test]
        fn $name() {
            struct Case;
            impl $crate::testing::backend::BackendTest for Case {
                fn run<K: $crate::ExpertKernels>(self) {
                    $function::<::burn::backend::Autodiff<K>>();
                }
            }
            $crate::testing::backend::dispatch(Case);
        }
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_parsed_and_missing_back_ends_name_their_feature() {
        for backend in TestBackend::ALL {
            match TestBackend::parse(backend.name()) {
                Ok(parsed) => assert_eq!(parsed, backend),
                Err(error) => {
                    assert!(!backend.is_compiled_in());
                    let message = error.to_string();
                    assert!(message.contains(backend.features()), "{message}");
                }
            }
        }
    }

    #[test]
    fn unknown_names_list_the_known_ones() {
        let message = TestBackend::parse("tpu").unwrap_err().to_string();
        for backend in TestBackend::ALL {
            assert!(message.contains(backend.name()), "{message}");
        }
    }
}
