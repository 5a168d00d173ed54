//! The grammar of OCI registries and of the HTTP that carries it: text and bytes from the wire become typed values, or an error that
//! says why not. Nothing here does I/O or decides anything.
//!
//! - [`digest`]: names of content, and hashing that can stop and go on; [`reference`]: hosts, repositories, tags
//! - [`range`], [`accept`]: the wishes in a client's headers; [`challenge`]: the demands of a registry before it
//!   answers
//! - [`manifest`], [`media_type`], [`schema_1`]: the content of a manifest, and its kind
//!
//! Sources: the OCI distribution and image specifications, RFC 9110, Docker's manifest schemas.

pub mod accept;
pub mod challenge;
pub mod digest;
pub mod manifest;
pub mod media_type;
pub mod range;
pub mod reference;
pub mod schema_1;
