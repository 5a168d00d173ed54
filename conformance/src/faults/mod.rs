//! Fault runs: real daemons on shaped links, broken by a seeded plan while clients pull through them.
//!
//! [`Plan::of`] turns a seed into everything that will happen; [`run`] plays it in a lab of its own and tells what must not
//! have happened. The same seed is the same plan; how the daemons' threads and packets fall in between is the machine's.
//!
//! A client does as runtimes do: after a short body it asks for the rest, after an error it asks again, and after wrong bytes it
//! starts over. It compares each byte that it gets. The rule, where a pull's *path* is its own node and the origin, their
//! processes and their links, and nothing else (no seed, no scheduler, no peer is ever needed):
//!
//! 1. **Wrong bytes.** No answer that is complete and has the blob's last byte has a wrong byte. No other answer has one
//!    either, unless the origin itself sent wrong bytes of this blob before (what comes from the origin in order is passed on
//!    before the whole is known to be right). The one exception to both: a blob that lay on the node's own disk when the run
//!    turned bytes of that file around: the node may give these until a client has come back for them.
//! 2. **Errors and short bodies.** Only while the path is broken: some moment between the request and the answer's end lies in a
//!    fault of the path. A node's faults are kill -9 until it is ready again, SIGSTOP, an unplugged link; the origin's are an
//!    unplugged link and whatever it does wrong. Also once the origin sent wrong bytes of the blob, for the reason in 1.
//! 3. **Hangs.** Each pull has all its bytes [`PULL_WITHIN`] after it began, or after the last fault of its path ended, a slow link
//!    counted among these. Invariant: every wait has a deadline. The longest one that a client sees is for an answer's head,
//!    30 s; the rest is for the bytes of a blob that takes two seconds.
//! 4. **Daemons.** None ends by itself or panics, and each one is ready within 15 s of its restart.
//!
//! After the last fault every node gets every blob, by the same rule.

mod books;
mod client;
mod schedule;
mod storm;

use std::time::Duration;

pub use books::{Kind, Violation};
pub use schedule::{Fault, Member, NODES, Plan, Trouble};
pub use storm::{Outcome, run};

/// How long a pull may take on a whole path.
pub const PULL_WITHIN: Duration = Duration::from_secs(40);
