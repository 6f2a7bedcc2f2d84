//! The training program.

fn main() -> std::process::ExitCode {
    swin_moe::cli::main()
}
