//! A serial queue with a rate.

use std::time::Duration;

use hawker_core::Time;

/// One direction of one link.
#[derive(Clone, Debug)]
pub(super) struct Link {
    rate: f64,
    free_at: Time,
    bytes: u64,
}

/// Both directions of a host's link, and where it leads. They are looked at for each turn that anybody sends: they lie together.
pub(super) struct Links {
    pub(super) up: Link,
    pub(super) down: Link,
    pub(super) zone: u32,
}

impl Link {
    pub(super) fn new(rate: f64) -> Self {
        Self {
            rate,
            free_at: Time::default(),
            bytes: 0,
        }
    }

    fn takes(&self, bytes: u64) -> Duration {
        Duration::from_secs_f64(bytes as f64 / self.rate)
    }

    /// Takes in bytes that are there now: when the last of them leaves.
    pub(super) fn send(&mut self, now: Time, bytes: u64) -> Time {
        self.bytes += bytes;
        self.free_at = self.free_at.max(now) + self.takes(bytes);
        self.free_at
    }

    /// Takes in bytes of which the last is there at `last`, and the others came at this link's rate or slower: when the last of
    /// them leaves.
    pub(super) fn pass(&mut self, last: Time, bytes: u64) -> Time {
        self.bytes += bytes;
        let takes = self.takes(bytes);
        let first = Time(last.0.saturating_sub(takes));
        self.free_at = self.free_at.max(first) + takes;
        self.free_at
    }

    /// How long what is in it takes.
    pub(super) fn backlog(&self, now: Time) -> Duration {
        self.free_at.since(now)
    }

    /// All that ever went in.
    pub(super) const fn bytes(&self) -> u64 {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Time {
        Time(Duration::from_millis(ms))
    }

    #[test]
    fn a_link_sends_one_after_the_other() {
        let mut link = Link::new(1000.0);
        assert_eq!(link.send(at(0), 100), at(100));
        assert_eq!(link.send(at(50), 100), at(200));
        assert_eq!(link.backlog(at(50)), Duration::from_millis(150));
        assert_eq!(link.send(at(500), 100), at(600));
        assert_eq!(link.bytes(), 300);
    }

    #[test]
    fn what_comes_slower_than_the_link_passes_without_delay() {
        let mut link = Link::new(1000.0);
        assert_eq!(link.pass(at(400), 100), at(400));
        // A second stream that came at the same time shares the link: it has to wait.
        assert_eq!(link.pass(at(400), 100), at(500));
    }
}
