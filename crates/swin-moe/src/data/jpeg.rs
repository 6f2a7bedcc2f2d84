//! Whether a JPEG file was cut off.
//!
//! Decoders fill up what is missing with grey and report success, so a half-written file would
//! become a half-grey training image. This walks the file's markers to its end-of-image marker.

/// Start of image.
const SOI: u8 = 0xd8;
/// End of image.
const EOI: u8 = 0xd9;
/// Start of scan: a header, then entropy-coded data up to the next marker.
const SOS: u8 = 0xda;

/// Whether the bytes start like a JPEG file.
pub(super) fn is_jpeg(bytes: &[u8]) -> bool {
    bytes.starts_with(&[0xff, SOI, 0xff])
}

/// Whether the file, which is a JPEG file, ends before its end-of-image marker.
pub(super) fn is_truncated(bytes: &[u8]) -> bool {
    let mut rest = &bytes[2..];
    loop {
        // Any number of fill bytes may precede a marker.
        let Some(marker_at) = rest.iter().position(|&byte| byte != 0xff) else {
            return true;
        };
        let marker = rest[marker_at];
        rest = &rest[marker_at + 1..];
        match marker {
            EOI => return false,
            // Markers without a segment: temporary private use, restarts.
            0x01 | 0xd0..=0xd7 => {}
            _ => {
                let [high, low, ..] = *rest else { return true };
                let length = usize::from(u16::from_be_bytes([high, low]));
                let Some(after) = rest.get(length.max(2)..) else {
                    return true;
                };
                rest = after;
            }
        }
        if marker == SOS {
            rest = skip_entropy_coded(rest);
        }
    }
}

/// Skips to the next marker. Inside of entropy-coded data a 0xff byte is followed by 0x00, and
/// restart markers belong to the data.
fn skip_entropy_coded(bytes: &[u8]) -> &[u8] {
    let next = bytes
        .windows(2)
        .position(|pair| pair[0] == 0xff && !matches!(pair[1], 0x00 | 0xd0..=0xd7 | 0xff));
    next.map_or(&[], |at| &bytes[at..])
}

#[cfg(test)]
mod tests {
    use super::{is_jpeg, is_truncated};

    /// Header with a thumbnail-like segment that holds an end marker, a scan with a stuffed byte
    /// and a restart, a second scan, the end, and trailing bytes.
    fn file() -> Vec<u8> {
        let mut bytes = vec![0xff, 0xd8];
        bytes.extend([0xff, 0xe1, 0, 6, 0xff, 0xda, 0xff, 0xd9]);
        bytes.extend([0xff, 0xda, 0, 3, 1, 7, 0xff, 0x00, 8, 0xff, 0xd0, 9]);
        bytes.extend([0xff, 0xff, 0xda, 0, 2, 5, 6]);
        bytes.extend([0xff, 0xd9]);
        bytes
    }

    #[test]
    fn only_the_whole_file_is_complete() {
        let whole = file();
        assert!(is_jpeg(&whole));
        assert!(!is_truncated(&whole));
        for length in 3..whole.len() {
            assert!(is_truncated(&whole[..length]), "{length} bytes");
        }
    }

    #[test]
    fn trailing_bytes_are_ignored() {
        let mut bytes = file();
        bytes.extend([0xff, 0xda, 1, 2, 3]);
        assert!(!is_truncated(&bytes));
    }

    #[test]
    fn lengths_of_segments_cannot_loop_or_overrun() {
        assert!(is_truncated(&[0xff, 0xd8, 0xff, 0xe0, 0, 0]));
        assert!(is_truncated(&[0xff, 0xd8, 0xff, 0xe0, 0xff, 0xff, 1]));
        assert!(is_truncated(&[0xff, 0xd8, 0xff]));
    }
}
