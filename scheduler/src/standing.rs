//! A member's standing: its place by its address, and the answer once it was removed.

use std::net::SocketAddr;

use hawker_core::place::{Networks, Place};
use tonic::Status;

/// The place of a member, by the first of its addresses that an entry covers.
pub(crate) fn by_address(networks: &Networks, addresses: &[String]) -> Option<Place> {
    let ips = addresses
        .iter()
        .filter_map(|address| address.parse::<SocketAddr>().ok());
    ips.map(|address| address.ip())
        .find_map(|ip| networks.of(ip))
        .cloned()
}

/// The answer to a member that was removed.
pub(crate) fn removed() -> Status {
    Status::permission_denied(
        "this member was removed from the cluster. To let it join again, stop it, delete its identity folder and start it with a \
         new token",
    )
}
