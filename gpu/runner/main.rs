//! `runner`: all that is done on a GPU machine, in one program.

fn main() -> std::process::ExitCode {
    gpu::run(std::env::args_os())
}
