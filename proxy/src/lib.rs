//! The per-node daemon.
//!
//! A blob GET goes [`registry`] → [`flight`] → [`driver`] → `hawker_core::node`: four places, one direction. Around them:
//! [`store`] bytes on disk, [`peer`] the piece protocol, [`origin`] upstream registries, `source` blobs at them, [`grant`] with whose right they are
//! asked, [`hawker_tracker`] the scheduler's stream, [`intercept`] the forward proxy, [`admin`] what people and Prometheus look at.
//! [`daemon`] puts them together.

pub mod admin;
pub mod applications;
pub mod buffer;
mod coalesce;
pub mod daemon;
pub mod download;
pub mod driver;
pub mod flight;
pub mod grant;
pub mod intercept;
pub mod limits;
mod log_limit;
pub mod metrics;
pub mod origin;
pub mod peer;
pub mod proof;
pub mod recent;
pub mod registry;
pub mod settings;
mod source;
pub mod store;
