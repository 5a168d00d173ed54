//! Hawker checked from outside: real daemons, real clients, real sockets, several hosts on one machine.
//!
//! - [`lab`]: hosts in network namespaces with shaped links, and the daemons that run on them.
//! - [`attacker`]: a member of a cluster that floods others.
//! - [`faults`]: daemons broken by a seeded plan while clients pull through them.
//! - [`origin`]: a registry that notes its answers and misbehaves on demand.
//! - [`rogue`]: a member of a cluster that lies.
//! - [`sim`]: a swarm of thousands in one process.
//! - [`scene`]: the start of most end-to-end tests: such an origin, a cluster and blobs that nobody has seen.
//!
//! The end-to-end tests are in `tests/`, the benches in `src/bench/` (binary `hawker-bench`). All of it needs root and the
//! Debian packages that `conformance/run.sh` installs.

pub mod attacker;
pub mod faults;
pub mod lab;
pub mod origin;
pub mod rogue;
pub mod scene;
pub mod sim;
