//! Addresses and names below every protocol of Hawker.
//!
//! - [`names`]: look-ups of names, bounded and remembered
//! - [`address`]: the address at which others reach this host
//! - [`client`]: the addresses that count as one client

pub mod address;
pub mod client;
pub mod names;
