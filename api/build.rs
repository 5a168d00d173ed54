//! Compiles the protobuf sources with a compiler written in Rust, so that no `protoc` is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let sources = [
        "proto/common.proto",
        "proto/peer.proto",
        "proto/scheduler.proto",
        "proto/authority.proto",
    ];
    for source in sources {
        println!("cargo:rerun-if-changed={source}");
    }
    let descriptors = protox::compile(sources, ["proto"])?;
    tonic_prost_build::configure()
        .bytes(".hawker.v1.ManifestReply.body")
        // These carry secrets: `src/redact.rs` shows them without.
        .skip_debug([
            ".hawker.v1.Interest",
            ".hawker.v1.ManifestRequest",
            ".hawker.v1.JoinRequest",
        ])
        .compile_fds(descriptors)?;
    Ok(())
}
