//! All collectives of one rank, over any number of ranks. Values are whole numbers, so that sums are
//! exact in any order.

use burn::backend::Autodiff;
use burn::tensor::{DType, Tensor, TensorPrimitive};
use hexa_moe::backends::{Cpu, Cuda};
use hexa_moe::parallel::Communicator;
use hexa_moe::parallel::comm::nccl::NcclCommunicator;
use hexa_moe::parallel::comm::{Collective, CommResult, DeviceCollective, DeviceTensor, Payload};
use hexa_ops::testing::compare::host;

/// Element `i` of what `rank` brings.
fn value(rank: usize, i: usize) -> f32 {
    (rank * 1000 + i % 777) as f32
}

fn values(rank: usize, len: usize) -> Vec<f32> {
    (0..len).map(|i| value(rank, i)).collect()
}

/// Elements per rank: uneven with zeros, even, none at all, and more than one step of staging.
fn counts(ranks: usize) -> Vec<Vec<usize>> {
    [
        [3, 0, 5, 1],
        [4; 4],
        [0; 4],
        [0, 7, 0, 2],
        [700_001, 13, 0, 300_000],
    ]
    .iter()
    .map(|counts| counts.iter().copied().cycle().take(ranks).collect())
    .collect()
}

fn gathered(counts: &[usize]) -> Vec<f32> {
    let parts = counts.iter().enumerate();
    parts.flat_map(|(rank, &len)| values(rank, len)).collect()
}

/// The part of `rank` of the sum over the ranks that add something.
fn summed(counts: &[usize], rank: usize, adds: impl Fn(usize) -> bool) -> Vec<f32> {
    let start: usize = counts[..rank].iter().sum();
    let sum = |i| {
        (0..counts.len())
            .filter(|&r| adds(r))
            .map(|r| value(r, i))
            .sum()
    };
    (start..start + counts[rank]).map(sum).collect()
}

/// The host's collectives.
pub fn on_host(comm: &NcclCommunicator) -> CommResult<()> {
    let (rank, ranks) = (comm.rank(), comm.world_size());
    for counts in counts(ranks) {
        let total: usize = counts.iter().sum();
        let part = values(rank, counts[rank]);
        assert_eq!(
            comm.all_gather_v("gather", part, &counts)?,
            gathered(&counts)
        );
        let addend = Some(values(rank, total));
        let sum = comm.reduce_scatter_v("sum", addend, &counts)?;
        assert_eq!(sum, summed(&counts, rank, |_| true));
        // The first rank brings nothing, and then nobody does.
        let addend = (rank > 0).then(|| values(rank, total));
        let sum = comm.reduce_scatter_v("sum of some", addend, &counts)?;
        assert_eq!(sum, summed(&counts, rank, |r| r > 0));
        let sum = comm.reduce_scatter_v("sum of none", None, &counts)?;
        assert_eq!(sum, vec![0.0; counts[rank]]);
    }
    for len in [0, 1, 5000, 1_000_003] {
        let sum = comm.all_reduce("total", values(rank, len))?;
        assert_eq!(
            sum,
            summed(&[&[len][..], &vec![0; ranks - 1]].concat(), 0, |_| true)
        );
        for root in 0..ranks {
            let data = comm.broadcast("broadcast", values(rank, len), root, len)?;
            assert_eq!(data, values(root, len));
        }
    }
    let ids = comm.all_gather_u32("ids", vec![u32::MAX - rank as u32, 7])?;
    let expected = (0..ranks).flat_map(|rank| [u32::MAX - rank as u32, 7]);
    assert_eq!(ids, expected.collect::<Vec<_>>());
    in_flight(comm)?;
    comm.barrier("end")
}

/// Two in flight, waited for out of order, and one that nobody waits for.
fn in_flight(comm: &NcclCommunicator) -> CommResult<()> {
    let addend = |x: f32| Collective::AllReduce { data: vec![x] };
    let ranks = comm.world_size() as f32;
    let first = comm.start("first", addend(2.0));
    drop(comm.start("dropped", addend(3.0)));
    let second = comm.start("second", addend(5.0));
    assert_eq!(second.wait()?.into_f32(), [5.0 * ranks]);
    assert_eq!(first.wait()?.into_f32(), [2.0 * ranks]);
    Ok(())
}

type Gpu = Tensor<Cuda, 1>;

fn upload(comm: &NcclCommunicator, values: Vec<f32>) -> Option<DeviceTensor> {
    let tensor = (!values.is_empty()).then(|| Gpu::from_data(&values[..], comm.device()))?;
    // The result of a kernel that has just been queued.
    let tensor = tensor.clone() + tensor.clone() - tensor;
    Some(DeviceTensor::new::<Cuda>(tensor.into_primitive().tensor()))
}

fn moved(comm: &NcclCommunicator, collective: DeviceCollective) -> CommResult<Vec<f64>> {
    let payload = comm
        .start("on device", Collective::OnDevice(collective))
        .wait()?;
    let Payload::Device(tensor) = payload else {
        assert!(payload.is_empty(), "the result came to the host");
        return Ok(Vec::new());
    };
    let tensor = tensor.get::<Cuda>().expect("a CUDA tensor");
    assert_eq!(tensor.device, *comm.device());
    Ok(host(Gpu::from_primitive(TensorPrimitive::Float(tensor))))
}

fn widen(values: Vec<f32>) -> Vec<f64> {
    values.into_iter().map(f64::from).collect()
}

/// Those of tensors that stay on the device.
pub fn on_device(comm: &NcclCommunicator) -> CommResult<()> {
    let (rank, ranks) = (comm.rank(), comm.world_size());
    for counts in counts(ranks) {
        let total: usize = counts.iter().sum();
        let part = upload(comm, values(rank, counts[rank]));
        assert!(part.iter().all(|part| comm.takes(part)));
        let gather = DeviceCollective::AllGatherV {
            part,
            counts: counts.clone(),
        };
        assert_eq!(moved(comm, gather)?, widen(gathered(&counts)));
        for first_adds in [true, false] {
            let adds = |r: usize| first_adds || r > 0;
            let addend = upload(comm, values(rank, if adds(rank) { total } else { 0 }));
            let sum = DeviceCollective::ReduceScatterV {
                addend,
                counts: counts.clone(),
            };
            assert_eq!(moved(comm, sum)?, widen(summed(&counts, rank, adds)));
        }
    }
    let len = 70_001;
    if let Some(addend) = upload(comm, values(rank, len)) {
        let sum = moved(comm, DeviceCollective::AllReduce { addend })?;
        let counts = [&[len][..], &vec![0; ranks - 1]].concat();
        assert_eq!(sum, widen(summed(&counts, 0, |_| true)));
    }
    choices(comm);
    comm.barrier("end")
}

/// What stays on the device, and what goes through the host.
fn choices(comm: &NcclCommunicator) {
    let float = |tensor: Gpu| DeviceTensor::new::<Cuda>(tensor.into_primitive().tensor());
    let tensor = Gpu::ones([4], comm.device());
    assert!(comm.takes(&float(tensor.clone())));
    let tracked = Tensor::<Autodiff<Cuda>, 1>::from_inner(tensor.clone());
    let tracked = DeviceTensor::new::<Autodiff<Cuda>>(tracked.into_primitive().tensor());
    assert!(comm.takes(&tracked));
    assert!(!comm.takes(&float(tensor.cast(DType::BF16))));
    let cpu = Tensor::<Cpu, 1>::ones([4], &Default::default());
    assert!(!comm.takes(&DeviceTensor::new::<Cpu>(cpu.into_primitive().tensor())));
}
