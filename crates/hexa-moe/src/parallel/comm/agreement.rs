//! What ranks compare before data move, and what they compute from each other's data.

use core::fmt;

use super::{Collective, CommError, CommResult, DeviceCollective, Payload};

/// What a rank is about to do, without the data: [`Collective::Announce`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Announcement(pub(super) Header);

/// Announcement of a collective; equal on all ranks but for `sent`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    pub tensor: String,
    pub kind: Kind,
    /// The counts that this rank expects of every rank.
    pub counts: Vec<usize>,
    /// Elements that it brings.
    pub sent: usize,
}

/// Operation and element type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    AllGatherF32,
    AllGatherU32,
    ReduceScatter,
    AllReduce,
    BroadcastF32(usize),
    BroadcastU32(usize),
    Barrier,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Kind::AllGatherF32 => f.write_str("all_gather_v (f32)"),
            Kind::AllGatherU32 => f.write_str("all_gather_v (u32)"),
            Kind::ReduceScatter => f.write_str("reduce_scatter_v"),
            Kind::AllReduce => f.write_str("all_reduce"),
            Kind::BroadcastF32(root) => write!(f, "broadcast (f32) from rank {root}"),
            Kind::BroadcastU32(root) => write!(f, "broadcast (u32) from rank {root}"),
            Kind::Barrier => f.write_str("barrier"),
        }
    }
}

impl Header {
    pub fn new(tensor: &str, collective: &Collective) -> Self {
        let (kind, counts, sent) = match collective {
            Collective::AllGatherV { data, counts } => {
                let kind = match data {
                    Payload::U32(_) => Kind::AllGatherU32,
                    Payload::F32(_) | Payload::Device(_) => Kind::AllGatherF32,
                };
                (kind, counts.clone(), on_host(data))
            }
            Collective::ReduceScatterV { data, counts } => {
                let sent = data.as_ref().map_or(0, Vec::len);
                (Kind::ReduceScatter, counts.clone(), sent)
            }
            Collective::AllReduce { data } => (Kind::AllReduce, vec![data.len()], data.len()),
            Collective::Broadcast { data, root, len } => {
                let kind = match data {
                    Payload::U32(_) => Kind::BroadcastU32(*root),
                    Payload::F32(_) | Payload::Device(_) => Kind::BroadcastF32(*root),
                };
                (kind, vec![*len], on_host(data))
            }
            Collective::Barrier => (Kind::Barrier, Vec::new(), 0),
            // Where the data are is each rank's own business.
            Collective::OnDevice(collective) => match collective {
                DeviceCollective::AllGatherV { part, counts } => {
                    let sent = part.as_ref().map_or(0, |part| part.len());
                    (Kind::AllGatherF32, counts.clone(), sent)
                }
                DeviceCollective::ReduceScatterV { addend, counts, .. } => {
                    let sent = addend.as_ref().map_or(0, |addend| addend.len());
                    (Kind::ReduceScatter, counts.clone(), sent)
                }
                DeviceCollective::AllReduce { addend } => {
                    (Kind::AllReduce, vec![addend.len()], addend.len())
                }
            },
            Collective::Announce(Announcement(header)) => return header.clone(),
        };
        Self {
            tensor: tensor.to_owned(),
            kind,
            counts,
            sent,
        }
    }

    /// Whether the collective makes sense for this number of ranks.
    fn fits(&self, world_size: usize) -> bool {
        match self.kind {
            Kind::AllGatherF32 | Kind::AllGatherU32 | Kind::ReduceScatter => {
                self.counts.len() == world_size
            }
            Kind::BroadcastF32(root) | Kind::BroadcastU32(root) => root < world_size,
            Kind::AllReduce | Kind::Barrier => true,
        }
    }

    /// Elements that `rank` may send: either number.
    fn allowed(&self, rank: usize) -> [usize; 2] {
        let total = self.counts.iter().sum();
        match self.kind {
            Kind::AllGatherF32 | Kind::AllGatherU32 => [self.counts[rank]; 2],
            Kind::ReduceScatter => [total, 0],
            Kind::AllReduce => [total; 2],
            Kind::BroadcastF32(root) | Kind::BroadcastU32(root) => {
                [if rank == root { total } else { 0 }; 2]
            }
            Kind::Barrier => [0; 2],
        }
    }
}

/// Elements that a collective of the host's can send.
fn on_host(data: &Payload) -> usize {
    match data {
        Payload::Device(_) => 0,
        data => data.len(),
    }
}

/// Compares the announcements of all ranks; every rank comes to the same conclusion.
pub fn check(headers: &[&Header]) -> CommResult<()> {
    let Some(&first) = headers.first() else {
        return Ok(());
    };
    for (rank, header) in headers.iter().enumerate() {
        if header.kind != first.kind || header.tensor != first.tensor {
            return Err(CommError::Order {
                rank,
                got: format!("{} of `{}`", header.kind, header.tensor),
                other: 0,
                expected: format!("{} of `{}`", first.kind, first.tensor),
            });
        }
        if header.counts != first.counts {
            return Err(CommError::Counts {
                tensor: header.tensor.clone(),
                rank,
                got: header.counts.clone(),
                other: 0,
                expected: first.counts.clone(),
            });
        }
    }
    if !first.fits(headers.len()) {
        return Err(CommError::Shape {
            tensor: first.tensor.clone(),
            collective: first.kind.to_string(),
            counts: first.counts.clone(),
            world_size: headers.len(),
        });
    }
    for (rank, header) in headers.iter().enumerate() {
        let allowed = first.allowed(rank);
        if !allowed.contains(&header.sent) {
            return Err(CommError::Length {
                tensor: header.tensor.clone(),
                rank,
                sent: header.sent,
                expected: allowed[0],
            });
        }
    }
    Ok(())
}

/// Sum of the ranks' addends in the order of ranks.
pub fn sum<'a>(addends: impl Iterator<Item = &'a [f32]>, len: usize) -> Vec<f32> {
    let mut addends = addends;
    let Some(first) = addends.next() else {
        return vec![0.0; len];
    };
    let mut total = first.to_vec();
    for addend in addends {
        for (total, x) in total.iter_mut().zip(addend) {
            *total += x;
        }
    }
    total
}

/// Where part `rank` lies among parts of these sizes.
pub fn part(counts: &[usize], rank: usize) -> core::ops::Range<usize> {
    let start = counts[..rank].iter().sum();
    start..start + counts[rank]
}
