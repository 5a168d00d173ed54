//! The identity of the cluster's members: keys, certificates, the TLS that rests on them, and the way to get them.
//!
//! - [`member`]: a member's key and certificate, and the TLS that verifies others
//! - [`join`]: joining with a token, renewing, dialling a scheduler
//! - [`authority`]: the cluster's authority on disk: its key, tokens, certificates made, members removed
//! - [`member_file`]: the list of seeds and schedulers on disk

pub mod authority;
pub mod join;
pub mod member;
pub mod member_file;
