//! Log lines that strangers cause: a few at once, then few.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use hawker_core::Time;
use hawker_core::admission::Allowance;

const LINES_AT_ONCE: f64 = 10.0;
const LINES_A_SECOND: f64 = 0.2;

/// Bounds the lines of one kind.
pub(crate) struct LogLimit {
    started: Instant,
    state: Mutex<(Allowance, u64)>,
}

impl LogLimit {
    pub(crate) fn new() -> Self {
        let allowance = Allowance::new(LINES_AT_ONCE, LINES_A_SECOND, Time::default());
        Self {
            started: Instant::now(),
            state: Mutex::new((allowance, 0)),
        }
    }

    /// Whether a line may be written now, and how many were left out since the last one.
    pub(crate) fn admit(&self) -> Option<u64> {
        let now = Time(self.started.elapsed());
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (allowance, left_out) = &mut *state;
        if allowance.left(now) < 1.0 {
            *left_out += 1;
            return None;
        }
        allowance.take(now, 1.0);
        Some(std::mem::take(left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_lines_is_cut() {
        let limit = LogLimit::new();
        let written = (0..1000).filter(|_| limit.admit().is_some()).count();
        assert!((10..=12).contains(&written), "{written}");
    }
}
