//! The phases of one task's download, and every transition between them.
//!
//! ```text
//!            Started                 Sized                 Filled              Committed
//!    Idle ───────────▶ Locating ───────────▶ Fetching ───────────▶ Committing ───────────▶ Done
//!     ▲ ▲                │  │ Paused          │  │  ▲                   │                    │
//!     │ └────────────────┼──┴─────────────────┘  │  └───────────────────┴────────────────────┤
//!     │                  │ GaveUp                │            Lost, and the rest is wanted   │
//!     │                  ▼                       │                                           │
//!     │               Failed ◀───────────────────┘ GaveUp                                    │
//!     └──────────────────────────────────────────────────────────────────────────────────────┘
//!                            Lost, and nobody wants the rest; Discarded
//! ```
//!
//! `Started` leads from `Idle` and from `Failed` to `Locating`, or to `Fetching` when the size is known.

use super::Failure;

/// How far the download of a task is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Nobody here wants more of the task. Pieces that are held stay on offer.
    Idle,
    /// The download runs, and the size is not known yet.
    Locating,
    /// The download runs, and the size is known.
    Fetching,
    /// Every piece is verified. The shell writes the rest of them and commits the blob.
    Committing,
    /// The blob is committed.
    Done,
    /// Neither peers nor the origin gave the task.
    Failed(Failure),
}

/// An event that may change the phase of a download.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// Clients or children want the task.
    Started { is_sized: bool },
    /// The size became known.
    Sized,
    /// Nobody wants the task any more.
    Paused,
    /// The last missing piece is verified.
    Filled,
    /// The shell has committed the blob.
    Committed,
    /// Pieces that were held are gone, because they were in memory only. `resumes`: they are wanted again.
    Lost { resumes: bool },
    /// All that was held turned out to be wrong.
    Discarded,
    /// Nobody is left who could give the task.
    GaveUp(Failure),
}

impl Phase {
    /// The phase that follows. A change that has no meaning in a phase leaves it as it is.
    pub(super) const fn after(self, change: Change) -> Self {
        match (self, change) {
            (Self::Idle | Self::Failed(_), Change::Started { is_sized: false }) => Self::Locating,
            (Self::Idle | Self::Failed(_), Change::Started { is_sized: true }) => Self::Fetching,
            (Self::Locating, Change::Sized) => Self::Fetching,
            (Self::Locating | Self::Fetching, Change::Paused) => Self::Idle,
            (Self::Locating | Self::Fetching, Change::GaveUp(failure)) => Self::Failed(failure),
            // A piece that was under way may come after the download has ended.
            (Self::Idle | Self::Locating | Self::Fetching | Self::Failed(_), Change::Filled) => {
                Self::Committing
            }
            (Self::Committing, Change::Committed) => Self::Done,
            (_, Change::Lost { resumes: true }) => Self::Fetching,
            (
                Self::Committing | Self::Done,
                Change::Lost { resumes: false } | Change::Discarded,
            ) => Self::Idle,
            (phase, _) => phase,
        }
    }

    /// Whether the download runs.
    pub const fn is_running(self) -> bool {
        matches!(self, Self::Locating | Self::Fetching)
    }

    /// Whether every piece is held.
    pub const fn is_complete(self) -> bool {
        matches!(self, Self::Committing | Self::Done)
    }

    /// The reason of the failure that ended the download.
    pub const fn failure(self) -> Option<Failure> {
        if let Self::Failed(failure) = self {
            Some(failure)
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FAILURE: Failure = Failure::Status(404);
    const FAILED: Phase = Phase::Failed(FAILURE);

    /// The columns of the table below.
    const CHANGES: [Change; 10] = [
        Change::Started { is_sized: false },
        Change::Started { is_sized: true },
        Change::Sized,
        Change::Paused,
        Change::Filled,
        Change::Committed,
        Change::Lost { resumes: true },
        Change::Lost { resumes: false },
        Change::Discarded,
        Change::GaveUp(FAILURE),
    ];

    #[test]
    fn each_change_leads_from_each_phase_to_the_phase_of_the_table() {
        use Phase::{Committing, Done, Fetching, Idle, Locating};
        let table = [
            (
                Idle,
                [
                    Locating, Fetching, Idle, Idle, Committing, Idle, Fetching, Idle, Idle, Idle,
                ],
            ),
            (
                Locating,
                [
                    Locating, Locating, Fetching, Idle, Committing, Locating, Fetching, Locating,
                    Locating, FAILED,
                ],
            ),
            (
                Fetching,
                [
                    Fetching, Fetching, Fetching, Idle, Committing, Fetching, Fetching, Fetching,
                    Fetching, FAILED,
                ],
            ),
            (
                Committing,
                [
                    Committing, Committing, Committing, Committing, Committing, Done, Fetching,
                    Idle, Idle, Committing,
                ],
            ),
            (
                Done,
                [
                    Done, Done, Done, Done, Done, Done, Fetching, Idle, Idle, Done,
                ],
            ),
            (
                FAILED,
                [
                    Locating, Fetching, FAILED, FAILED, Committing, FAILED, Fetching, FAILED,
                    FAILED, FAILED,
                ],
            ),
        ];
        for (phase, followers) in table {
            for (change, expected) in CHANGES.into_iter().zip(followers) {
                assert_eq!(phase.after(change), expected, "{phase:?} after {change:?}");
            }
        }
    }
}
