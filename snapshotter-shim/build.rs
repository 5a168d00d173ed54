//! Compiles the protobuf source with a compiler written in Rust, so that no `protoc` is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let source = "proto/snapshots.proto";
    println!("cargo:rerun-if-changed={source}");
    println!("cargo:rerun-if-changed=proto/mount.proto");
    tonic_prost_build::configure().compile_fds(protox::compile([source], ["proto"])?)?;
    Ok(())
}
