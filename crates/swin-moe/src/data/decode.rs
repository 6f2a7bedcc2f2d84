//! Image files to pixels.

use std::io::Cursor;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use image::{DynamicImage, ImageReader, Limits};

use super::jpeg;

/// Larger files are refused unread.
const MAX_FILE_BYTES: u64 = 256 << 20;
/// Wider or higher images are refused before their pixels are decoded.
const MAX_SIDE: u32 = 16_384;
/// Memory that one decoder may ask for.
const MAX_DECODER_BYTES: u64 = 1 << 30;

/// Decodes one file; of an animation, the first frame. The error says why not, without the path.
///
/// The format is told by the content, not by the file's name.
pub(super) fn decode_file(path: &Path) -> Result<DynamicImage, String> {
    let metadata = std::fs::metadata(path).map_err(|error| error.to_string())?;
    if !metadata.is_file() {
        return Err("it is not a file".into());
    }
    if metadata.len() > MAX_FILE_BYTES {
        let bytes = metadata.len();
        return Err(format!("{bytes} bytes, allowed are {MAX_FILE_BYTES}"));
    }
    let bytes = std::fs::read(path).map_err(|error| error.to_string())?;
    // Decoders are third-party code that parses hostile input: should one panic, this file is
    // unreadable, and the run goes on. Nothing outlives the closure that a panic could leave in
    // disorder.
    catch_unwind(AssertUnwindSafe(|| decode_bytes(&bytes)))
        .unwrap_or_else(|_| Err("the decoder failed".into()))
}

fn decode_bytes(bytes: &[u8]) -> Result<DynamicImage, String> {
    if bytes.is_empty() {
        return Err("the file is empty".into());
    }
    if jpeg::is_jpeg(bytes) && jpeg::is_truncated(bytes) {
        return Err("the file is truncated".into());
    }
    let mut reader = ImageReader::new(Cursor::new(bytes))
        .with_guessed_format()
        .map_err(|error| error.to_string())?;
    if reader.format().is_none() {
        return Err("the content is not a known image format".into());
    }
    let mut limits = Limits::default();
    limits.max_image_width = Some(MAX_SIDE);
    limits.max_image_height = Some(MAX_SIDE);
    limits.max_alloc = Some(MAX_DECODER_BYTES);
    reader.limits(limits);
    let image = reader.decode().map_err(|error| error.to_string())?;
    if image.width() == 0 || image.height() == 0 {
        return Err("the image has no pixels".into());
    }
    Ok(image)
}
