//! The messages between Hawker's members: the generated protobuf code, and its conversion to core types.

pub mod convert;
mod redact;

/// The generated messages and services of `proto/`.
#[allow(missing_docs, unreachable_pub, unused_qualifications, clippy::all)]
pub mod v1 {
    tonic::include_proto!("hawker.v1");
}

/// The version that this build speaks. A peer with another major version is refused; a greater minor one is understood.
pub const VERSION: v1::Version = v1::Version { major: 1, minor: 0 };
