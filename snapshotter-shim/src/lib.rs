//! A containerd snapshotter (proxy plugin): the Snapshots service over a unix socket, with overlay for every image.
//!
//! - [`catalog`]: all snapshots and the decisions about them, without I/O.
//! - [`filter`]: the filters of `List`, without I/O.
//! - [`mounts`]: the mounts of a snapshot, without I/O.
//! - [`store`]: records and folders on disk.
//! - [`service`]: the gRPC service over the store, and the one place that maps errors to gRPC.
//! - [`server`]: the unix socket.

pub mod catalog;
pub mod filter;
pub mod mounts;
pub mod server;
pub mod service;
pub mod store;

/// The generated messages and service.
#[allow(missing_docs, unreachable_pub, unused_qualifications, clippy::all)]
pub mod api {
    /// Messages that containerd's services share.
    pub mod types {
        tonic::include_proto!("containerd.types");
    }
    /// `containerd.services.snapshots.v1`.
    pub mod services {
        /// Its snapshots.
        pub mod snapshots {
            /// Version 1.
            pub mod v1 {
                tonic::include_proto!("containerd.services.snapshots.v1");
            }
        }
    }
}
