//! The choice of the back-end at run time. No other file names a concrete one.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};

use burn::tensor::Tensor;
use burn::tensor::backend::{Backend, Device, DeviceId};
use hexa_ops::{ExpertOps, TrainingBackend, supports_precision};
use serde::{Deserialize, Serialize};

use crate::config::Precision;

/// The back-ends there are, compiled in or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BackendKind {
    /// burn-flex on the processor.
    Cpu,
    /// Vulkan, Metal or WebGPU.
    Wgpu,
    /// NVIDIA GPUs.
    Cuda,
}

impl BackendKind {
    /// All back-ends.
    pub const ALL: [BackendKind; 3] = [BackendKind::Cpu, BackendKind::Wgpu, BackendKind::Cuda];

    /// Its name on the command line, which is that of the feature that compiles it in.
    pub fn name(self) -> &'static str {
        match self {
            BackendKind::Cpu => "cpu",
            BackendKind::Wgpu => "wgpu",
            BackendKind::Cuda => "cuda",
        }
    }

    /// Whether this program contains it.
    pub fn is_compiled_in(self) -> bool {
        match self {
            BackendKind::Cpu => cfg!(feature = "cpu"),
            BackendKind::Wgpu => cfg!(feature = "wgpu"),
            BackendKind::Cuda => cfg!(feature = "cuda"),
        }
    }
}

impl fmt::Display for BackendKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for BackendKind {
    type Err = BackendError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        BackendKind::ALL
            .into_iter()
            .find(|kind| kind.name() == text)
            .ok_or_else(|| BackendError::Unknown(text.to_owned()))
    }
}

/// Why a back-end cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BackendError {
    /// There is no back-end of this name.
    #[error("back-end {0:?} is unknown, allowed are cpu, wgpu and cuda")]
    Unknown(String),
    /// The program was built without it.
    #[error(
        "this program was built without the back-end {kind} (it has: {available}); build it with \
         `cargo build --release --features {kind}`"
    )]
    NotCompiledIn {
        /// The back-end that was asked for.
        kind: BackendKind,
        /// Those that are there.
        available: String,
    },
    /// Its device does not answer.
    #[error("the back-end {kind} found no usable device: {reason}; {remedy}")]
    NoDevice {
        /// The back-end that was asked for.
        kind: BackendKind,
        /// The driver's or the back-end's words.
        reason: String,
        /// What the user can do.
        remedy: &'static str,
    },
    /// Its device has no such arithmetic.
    #[error(
        "this device ({device}) does not compute in {precision}; it has {available}: set \
         train.precision (or --precision) to one of these, or choose another --backend"
    )]
    Precision {
        /// The device's name.
        device: String,
        /// The arithmetic that was asked for.
        precision: &'static str,
        /// Those that the device has.
        available: String,
    },
}

/// Refuses arithmetic that the device lacks.
///
/// # Errors
/// [`BackendError::Precision`], which names those that it has.
pub fn check_precision<B: ExpertOps>(
    device: &B::Device,
    precision: Precision,
) -> Result<(), BackendError> {
    let has = |precision: &Precision| supports_precision::<B>(device, precision.matmul());
    if has(&precision) {
        return Ok(());
    }
    let available = Precision::ALL.into_iter().filter(has).map(Precision::name);
    Err(BackendError::Precision {
        device: B::name(device),
        precision: precision.name(),
        available: available.collect::<Vec<_>>().join(", "),
    })
}

/// Work that any back-end can do.
pub trait Job {
    /// What comes out of it.
    type Output;

    /// Does the work on a device that has answered.
    fn run<B: TrainingBackend>(self, device: &B::Device) -> Self::Output;
}

/// Runs `job` on the back-end `kind`.
///
/// # Errors
/// [`BackendError`] if the back-end is not compiled in or its device does not answer.
pub fn dispatch<J: Job>(kind: BackendKind, job: J) -> Result<J::Output, BackendError> {
    match kind {
        #[cfg(feature = "cpu")]
        BackendKind::Cpu => run_on::<hexa_ops::backends::Cpu, J>(kind, job),
        #[cfg(feature = "wgpu")]
        BackendKind::Wgpu => run_on::<hexa_ops::backends::Wgpu, J>(kind, job),
        #[cfg(feature = "cuda")]
        BackendKind::Cuda => run_on::<hexa_ops::backends::Cuda, J>(kind, job),
        #[allow(unreachable_patterns)]
        missing => {
            let available: Vec<_> = BackendKind::ALL
                .into_iter()
                .filter(|kind| kind.is_compiled_in())
                .map(BackendKind::name)
                .collect();
            drop(job);
            Err(BackendError::NotCompiledIn {
                kind: missing,
                available: available.join(", "),
            })
        }
    }
}

fn run_on<B: hexa_ops::ExpertKernels, J: Job>(
    kind: BackendKind,
    job: J,
) -> Result<J::Output, BackendError> {
    let device = probe::<B>().map_err(|reason| BackendError::NoDevice {
        kind,
        reason,
        remedy: match kind {
            BackendKind::Cuda => "check the NVIDIA driver with nvidia-smi, or use --backend cpu",
            _ => "check the graphics driver with vulkaninfo, or use --backend cpu",
        },
    })?;
    Ok(job.run::<burn::backend::Autodiff<B>>(&device))
}

/// The devices of which ranks of one process can have one each: all GPUs of the best kind there
/// is, or the processor, once.
pub fn devices<B: Backend>(kind: BackendKind, default: &B::Device) -> Vec<B::Device> {
    // Discrete, integrated, virtual, as the devices' types are numbered; NVIDIA's are all of one.
    let types = match kind {
        BackendKind::Cpu => 0..0,
        BackendKind::Cuda => 0..1,
        BackendKind::Wgpu => 0..3,
    };
    let found = types.into_iter().find_map(|type_id| {
        let count = B::device_count(type_id);
        (count > 0).then(|| {
            (0..count)
                .map(|index| B::Device::from_id(DeviceId::new(type_id, index as u16)))
                .collect()
        })
    });
    found.unwrap_or_else(|| vec![default.clone()])
}

/// Opens the default device and has it add two numbers.
///
/// Drivers that are missing make the layers below panic; this is the one place where that is
/// ordinary, and turned into words.
fn probe<B: Backend>() -> Result<B::Device, String> {
    // The hook is the process': ranks on several threads must not restore each other's.
    static PROBING: Mutex<()> = Mutex::new(());
    let _alone = PROBING.lock().unwrap_or_else(PoisonError::into_inner);
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let device = B::Device::default();
        let sum = Tensor::<B, 1>::ones([2], &device).sum();
        let data = sum.try_into_data().map_err(|error| error.to_string())?;
        match data.iter::<f32>().next() {
            Some(2.0) => Ok(device),
            other => Err(format!("it says that 1 + 1 is {other:?}")),
        }
    }));
    std::panic::set_hook(hook);
    match outcome {
        Ok(outcome) => outcome,
        Err(panic) => Err(panic_text(panic.as_ref())),
    }
}

/// The first line of a panic's message.
pub fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("no reason given");
    text.lines().next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_others_are_refused() {
        for kind in BackendKind::ALL {
            assert_eq!(kind.name().parse(), Ok(kind));
        }
        assert!("gpu".parse::<BackendKind>().is_err());
    }

    struct Name;

    impl Job for Name {
        type Output = String;

        fn run<B: TrainingBackend>(self, device: &B::Device) -> String {
            B::name(device)
        }
    }

    #[test]
    fn a_missing_back_end_is_named_with_its_feature() {
        for kind in BackendKind::ALL {
            if !kind.is_compiled_in() {
                let message = dispatch(kind, Name).unwrap_err().to_string();
                assert!(message.contains(&format!("--features {kind}")), "{message}");
            }
        }
    }
}
