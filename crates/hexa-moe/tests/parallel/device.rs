//! The path of tensors that stay on their device, with an engine that takes the CPU's.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use burn::backend::Autodiff;
use burn::tensor::{Tensor, TensorPrimitive};
use hexa_moe::backends::Cpu;
use hexa_moe::parallel::Communicator;
use hexa_moe::parallel::comm::local::{self, LocalCommunicator};
use hexa_moe::parallel::comm::{
    Collective, CommError, DeviceCollective, DeviceTensor, Payload, Pending,
};
use hexa_ops::testing::compare::host;

use crate::equivalence::{cases, check};

/// Moves tensors of the CPU as an engine for devices would; counts them.
#[derive(Debug)]
struct OnDevice {
    local: LocalCommunicator,
    moved: Arc<AtomicUsize>,
}

fn elements(tensor: &DeviceTensor) -> Vec<f32> {
    let tensor = tensor.get::<Cpu>().or_else(|| {
        let tracked = tensor.get::<Autodiff<Cpu>>()?;
        Some(tracked.primitive)
    });
    let tensor = tensor.expect("a tensor that is taken");
    let values = host(Tensor::<Cpu, 1>::from_primitive(TensorPrimitive::Float(
        tensor,
    )));
    values.into_iter().map(|v| v as f32).collect()
}

fn tensor(values: &[f32]) -> Payload {
    let tensor = Tensor::<Cpu, 1>::from_data(values, &Default::default());
    Payload::Device(DeviceTensor::new::<Cpu>(tensor.into_primitive().tensor()))
}

impl Communicator for OnDevice {
    fn rank(&self) -> usize {
        self.local.rank()
    }
    fn world_size(&self) -> usize {
        self.local.world_size()
    }
    fn start(&self, name: &str, collective: Collective) -> Pending {
        let Collective::OnDevice(collective) = collective else {
            return self.local.start(name, collective);
        };
        self.moved.fetch_add(1, Ordering::Relaxed);
        let read = |tensor: Option<DeviceTensor>| tensor.map(|tensor| elements(&tensor));
        let collective = match collective {
            DeviceCollective::AllGatherV { part, counts } => Collective::AllGatherV {
                data: Payload::F32(read(part).unwrap_or_default()),
                counts,
            },
            DeviceCollective::ReduceScatterV { addend, counts } => Collective::ReduceScatterV {
                data: read(addend),
                counts,
            },
            DeviceCollective::AllReduce { addend } => Collective::AllReduce {
                data: elements(&addend),
            },
        };
        let pending = self.local.start(name, collective);
        Pending::new(move || {
            let received = pending.wait()?.into_f32();
            Ok(if received.is_empty() {
                Payload::F32(received)
            } else {
                tensor(&received)
            })
        })
    }
    fn leave(&self) {
        self.local.leave();
    }
    fn failure(&self) -> Option<CommError> {
        self.local.failure()
    }
    fn takes(&self, tensor: &DeviceTensor) -> bool {
        tensor.get::<Cpu>().is_some() || tensor.get::<Autodiff<Cpu>>().is_some()
    }
}

/// Every rank but the last, which goes through the host, moves tensors as they are.
#[test]
fn tensors_that_stay_on_devices_equal_one_device() {
    for case in cases(3) {
        let moved = Arc::new(AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for comm in local::world_with_timeout(3, Duration::from_secs(20)) {
                let (case, moved) = (&case, moved.clone());
                scope.spawn(move || {
                    let rank = comm.rank();
                    let outcome = if rank < 2 {
                        let comm = OnDevice { local: comm, moved };
                        check::<Autodiff<Cpu>, Autodiff<Cpu>>(comm, case)
                    } else {
                        check::<Autodiff<Cpu>, Autodiff<Cpu>>(comm, case)
                    };
                    outcome.unwrap_or_else(|e| panic!("rank {rank} of {case:?}: {e}"));
                });
            }
        });
        // Two ranks, ten steps: the gradients at least, and what each layer moves.
        let moved = moved.load(Ordering::Relaxed);
        assert!(moved >= 2 * 10 * (1 + case.layers), "{moved} in {case:?}");
    }
}

/// Engines without such a path refuse, on all ranks.
#[test]
fn engines_refuse_tensors_they_do_not_take() {
    std::thread::scope(|scope| {
        for comm in local::world_with_timeout(2, Duration::from_secs(20)) {
            scope.spawn(move || {
                let Payload::Device(addend) = tensor(&[1.0, 2.0]) else {
                    unreachable!("made on the device")
                };
                assert!(!comm.takes(&addend));
                let collective = Collective::OnDevice(DeviceCollective::AllReduce { addend });
                let error = comm.start("sum", collective).wait().unwrap_err();
                assert!(matches!(error, CommError::Engine { .. }), "{error}");
                assert_eq!(comm.failure(), Some(error));
            });
        }
    });
}
