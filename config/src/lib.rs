//! Hawker's configuration.
//!
//! [`schema`] lists every key once. A configuration comes in layers ([`layers`]): defaults, the schedulers, the file, the environment, flags. A
//! later layer replaces the values of an earlier one, key by key, and each value keeps its origin. [`Effective`] is the result
//! with all its problems; [`reference`] prints the pages for people.

mod choice;
mod de;
pub mod layers;
pub mod problem;
pub mod pushed;
pub mod quantity;
pub mod reference;
pub mod schema;
#[cfg(test)]
mod tests;
pub mod value;

pub use layers::{Effective, Layer, Layered, Origin};
pub use problem::{Problem, Problems, Wrong};
pub use pushed::{Document, Pushed};
pub use schema::{Config, Daemon, Key};
