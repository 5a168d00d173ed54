//! The messages between peers, as `api` compiles them.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=../api/proto");
    let sources = [
        "common.proto",
        "peer.proto",
        "scheduler.proto",
        "authority.proto",
    ];
    let descriptors = protox::compile(sources, ["../api/proto"])?;
    prost_build::Config::new()
        .bytes([".hawker.v1.ManifestReply.body"])
        .compile_fds(descriptors)?;
    Ok(())
}
