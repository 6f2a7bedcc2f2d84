//! The memory of this process, as Linux counts it.

/// Most memory that this process has had since it began (`VmHWM`); none elsewhere than on Linux.
pub fn peak_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    bytes_of(&status, "VmHWM:")
}

/// The value of a line `key  N kB`.
pub(super) fn bytes_of(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kibibytes.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peak_counts_what_was_touched_and_freed() {
        let Some(before) = peak_bytes() else { return };
        let touched = vec![1u8; before as usize + (8 << 20)];
        assert_eq!(touched[touched.len() - 1], 1);
        drop(touched);
        assert!(peak_bytes().unwrap() >= before + (8 << 20));
    }
}
