//! Announcements as bytes: little-endian, in the order of the fields.

use super::agreement::{Header, Kind};

/// What a rank tells the others before data move.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    Header(Header),
    /// It leaves, for this reason.
    Bye(String),
}

const BYE: u64 = 7;

impl Message {
    pub fn encode(&self) -> Vec<u8> {
        let (numbers, text) = match self {
            Message::Header(header) => {
                let (kind, root) = match header.kind {
                    Kind::AllGatherF32 => (0, 0),
                    Kind::AllGatherU32 => (1, 0),
                    Kind::ReduceScatter => (2, 0),
                    Kind::AllReduce => (3, 0),
                    Kind::BroadcastF32(root) => (4, root),
                    Kind::BroadcastU32(root) => (5, root),
                    Kind::Barrier => (6, 0),
                };
                let mut numbers = vec![kind, root as u64, header.sent as u64];
                numbers.extend(header.counts.iter().map(|&count| count as u64));
                (numbers, &header.tensor)
            }
            Message::Bye(reason) => (vec![BYE, 0, 0], reason),
        };
        let count = numbers.len() as u64;
        let mut bytes: Vec<u8> = std::iter::once(count)
            .chain(numbers)
            .flat_map(u64::to_le_bytes)
            .collect();
        bytes.extend(text.as_bytes());
        bytes
    }

    /// `None` if these are not the bytes of a message.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let (count, rest) = bytes.split_first_chunk::<8>()?;
        let count = usize::try_from(u64::from_le_bytes(*count)).ok()?;
        let (numbers, text) = rest.split_at_checked(count.checked_mul(8)?)?;
        let numbers: Vec<usize> = numbers
            .chunks_exact(8)
            .map(|n| u64::from_le_bytes(n.try_into().unwrap_or_default()) as usize)
            .collect();
        let text = String::from_utf8(text.to_vec()).ok()?;
        let [kind, root, sent, counts @ ..] = numbers.as_slice() else {
            return None;
        };
        let kind = match *kind as u64 {
            0 => Kind::AllGatherF32,
            1 => Kind::AllGatherU32,
            2 => Kind::ReduceScatter,
            3 => Kind::AllReduce,
            4 => Kind::BroadcastF32(*root),
            5 => Kind::BroadcastU32(*root),
            6 => Kind::Barrier,
            BYE => return Some(Message::Bye(text)),
            _ => return None,
        };
        Some(Message::Header(Header {
            tensor: text,
            kind,
            counts: counts.to_vec(),
            sent: *sent,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_survive_the_wire_and_noise_does_not() {
        for kind in [
            Kind::AllGatherF32,
            Kind::AllGatherU32,
            Kind::ReduceScatter,
            Kind::AllReduce,
            Kind::BroadcastF32(3),
            Kind::BroadcastU32(1),
            Kind::Barrier,
        ] {
            let message = Message::Header(Header {
                tensor: "layer 3: w₁".to_owned(),
                kind,
                counts: vec![7, 0, 1 << 40],
                sent: 7,
            });
            assert_eq!(Message::decode(&message.encode()), Some(message));
        }
        let bye = Message::Bye("panicked".to_owned());
        let bytes = bye.encode();
        assert_eq!(Message::decode(&bytes), Some(bye));
        for len in 0..32 {
            assert_eq!(Message::decode(&bytes[..len]), None);
        }
        assert_eq!(Message::decode(&[255; 40]), None);
    }
}
