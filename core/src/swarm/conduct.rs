//! Who reported whom, who is trusted less for it, and who is isolated: the rule of evidence.
//!
//! - Wrong bytes isolate a peer when two different reporters, both with a vote, said so within [`EVIDENCE_WINDOW`].
//! - A reporter whose accusations of wrong bytes nobody shares has no vote after [`LONE_ACCUSATIONS`] of them, and no
//!   reporter takes part in more than [`VERDICTS_PER_REPORTER`] verdicts a window: two liars isolate a few peers at most.
//! - Stalls and failures never isolate. They lower a peer's score, less the more peers a reporter complains about alone:
//!   who stalls with everybody has a bad link of his own.
//! - What a peer did fades with [`SUSPICION_HALF_LIFE`]. After [`ISOLATION`] a peer is let back, on probation: its suspicion
//!   starts high, so that it is chosen last.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use super::ReportKind;
use crate::Time;
use crate::piece::PeerId;

/// How long an isolated peer is named to nobody.
pub const ISOLATION: Duration = Duration::from_secs(10 * 60);
/// How long an accusation counts.
pub const EVIDENCE_WINDOW: Duration = Duration::from_secs(10 * 60);
/// Reporters it takes to isolate a peer.
pub const REPORTERS_TO_ISOLATE: usize = 2;
/// Unshared accusations of wrong bytes after which a reporter has no vote. Wrong bytes are rare: one liar in a thousand.
pub const LONE_ACCUSATIONS: usize = 3;
/// Unshared complaints of any kind at which a reporter is no longer believed; each takes an equal part of its credit.
const LONE_COMPLAINTS: f32 = 8.0;
/// Isolated peers that one reporter helped to isolate, within the window.
pub const VERDICTS_PER_REPORTER: usize = 3;
/// Suspicion halves in this time: a bad minute is forgiven within the hour, not within the pull.
pub const SUSPICION_HALF_LIFE: Duration = Duration::from_secs(5 * 60);

/// What an accusation adds to suspicion, out of 1: wrong bytes weigh as much as five stalls.
const WRONG_BYTES_WEIGHT: f32 = 0.5;
const STALLED_WEIGHT: f32 = 0.1;
const FAILED_WEIGHT: f32 = 0.1;
/// Where suspicion starts again when isolation ends.
const PROBATION_SUSPICION: f32 = 0.9;
/// Suspicion below this is none.
const NEGLIGIBLE: f32 = 0.01;
/// Accusations kept for one accused and for one reporter: far more than the rules above look at.
const KEPT: usize = 32;
/// Records kept. Beyond that new peers are not put on record; only peers that are here can be accused.
const MAX_RECORDS: usize = 65_536;
/// How often what has faded is dropped.
const SWEEP_EVERY: Duration = Duration::from_secs(60);

/// The records of everybody who reported or was reported.
#[derive(Debug, Default)]
pub(super) struct Conduct {
    records: BTreeMap<PeerId, Record>,
    /// When isolated peers are let back, in order: all are isolated for the same time.
    releases: VecDeque<Time>,
    swept_at: Time,
}

#[derive(Debug, Default)]
struct Record {
    suspicion: f32,
    /// When `suspicion` was right.
    at: Time,
    isolated_until: Option<Time>,
    /// Who accused this peer.
    accusers: Vec<Accusation>,
    /// Whom this peer accused.
    accused: Vec<Accusation>,
}

#[derive(Clone, Copy, Debug)]
struct Accusation {
    /// The other one.
    peer: PeerId,
    wrong_bytes: bool,
    at: Time,
}

impl Record {
    fn suspicion(&self, now: Time) -> f32 {
        let half_lives = now.since(self.at).as_secs_f32() / SUSPICION_HALF_LIFE.as_secs_f32();
        self.suspicion * (-half_lives).exp2()
    }

    fn suspect(&mut self, now: Time, weight: f32) {
        self.suspicion = (self.suspicion(now) + weight).min(1.0);
        self.at = now;
    }

    fn is_isolated(&self, now: Time) -> bool {
        self.isolated_until.is_some_and(|until| now < until)
    }

    fn has_faded(&self, now: Time) -> bool {
        self.isolated_until.is_none()
            && self.accusers.is_empty()
            && self.accused.is_empty()
            && self.suspicion(now) < NEGLIGIBLE
    }
}

fn note(accusations: &mut Vec<Accusation>, new: Accusation) {
    match accusations.iter_mut().find(|old| old.peer == new.peer && old.wrong_bytes == new.wrong_bytes) {
        Some(old) => old.at = new.at,
        None => {
            if accusations.len() == KEPT {
                accusations.remove(0);
            }
            accusations.push(new);
        }
    }
}

impl Conduct {
    /// 0 (nothing known against it) to 1.
    pub(super) fn suspicion(&self, now: Time, peer: PeerId) -> f32 {
        self.records.get(&peer).map_or(0.0, |record| record.suspicion(now))
    }

    pub(super) fn is_isolated(&self, now: Time, peer: PeerId) -> bool {
        self.records.get(&peer).is_some_and(|record| record.is_isolated(now))
    }

    /// Everybody who is isolated, ascending.
    pub(super) fn isolated(&self, now: Time) -> Vec<PeerId> {
        self.records.iter().filter(|(_, record)| record.is_isolated(now)).map(|(peer, _)| *peer).collect()
    }

    /// Takes in a report. `true`: `accused` is isolated from now on.
    pub(super) fn report(&mut self, now: Time, reporter: PeerId, accused: PeerId, kind: ReportKind) -> bool {
        let (weight, wrong_bytes) = match kind {
            ReportKind::WrongBytes => (WRONG_BYTES_WEIGHT, true),
            ReportKind::Stalled => (STALLED_WEIGHT, false),
            ReportKind::Failed => (FAILED_WEIGHT, false),
            ReportKind::Served(_) => return false,
        };
        if reporter == accused || self.is_isolated(now, reporter) || self.is_isolated(now, accused) {
            return false;
        }
        let credit = self.credit(now, reporter, accused, wrong_bytes);
        if let Some(record) = self.record(accused) {
            record.suspect(now, weight * credit);
            note(&mut record.accusers, Accusation { peer: reporter, wrong_bytes, at: now });
        }
        if let Some(record) = self.record(reporter) {
            note(&mut record.accused, Accusation { peer: accused, wrong_bytes, at: now });
        }
        wrong_bytes && self.judge(now, accused)
    }

    /// Drops what has faded, at most once a minute. `true`: somebody is no longer isolated.
    pub(super) fn sweep(&mut self, now: Time) -> bool {
        if self.deadline().is_none_or(|deadline| now < deadline) {
            return false;
        }
        self.swept_at = now;
        while self.releases.front().is_some_and(|release| *release <= now) {
            self.releases.pop_front();
        }
        let mut released = false;
        for record in self.records.values_mut() {
            if record.isolated_until.is_some_and(|until| until <= now) {
                record.isolated_until = None;
                record.suspicion = PROBATION_SUSPICION;
                record.at = now;
                // Its time is served; only new evidence counts.
                record.accusers.clear();
                released = true;
            }
            record.accusers.retain(|accusation| now.since(accusation.at) < EVIDENCE_WINDOW);
            record.accused.retain(|accusation| now.since(accusation.at) < EVIDENCE_WINDOW);
        }
        self.records.retain(|_, record| !record.has_faded(now));
        released
    }

    /// When [`Conduct::sweep`] has something to do.
    pub(super) fn deadline(&self) -> Option<Time> {
        let sweep = (!self.records.is_empty()).then_some(self.swept_at + SWEEP_EVERY);
        self.releases.front().copied().into_iter().chain(sweep).min()
    }

    fn judge(&mut self, now: Time, accused: PeerId) -> bool {
        let Some(record) = self.records.get(&accused) else { return false };
        let recent = |a: &&Accusation| a.wrong_bytes && now.since(a.at) < EVIDENCE_WINDOW;
        let votes =
            record.accusers.iter().filter(recent).filter(|a| self.has_vote(now, a.peer, accused)).count();
        if votes < REPORTERS_TO_ISOLATE {
            return false;
        }
        if let Some(record) = self.records.get_mut(&accused) {
            record.isolated_until = Some(now + ISOLATION);
            self.releases.push_back(now + ISOLATION);
        }
        true
    }

    /// How much of a report is believed, 0 to 1.
    fn credit(&self, now: Time, reporter: PeerId, accused: PeerId, wrong_bytes: bool) -> f32 {
        if wrong_bytes && !self.has_vote(now, reporter, accused) {
            return 0.0;
        }
        (1.0 - self.lone_accusations(now, reporter, accused, false) as f32 / LONE_COMPLAINTS).max(0.0)
    }

    fn has_vote(&self, now: Time, reporter: PeerId, accused: PeerId) -> bool {
        !self.is_isolated(now, reporter)
            && self.lone_accusations(now, reporter, accused, true) < LONE_ACCUSATIONS
            && self.verdicts(now, reporter) < VERDICTS_PER_REPORTER
    }

    /// How many peers other than `but` the reporter accuses of wrong bytes (or of anything) while nobody else does.
    fn lone_accusations(&self, now: Time, reporter: PeerId, but: PeerId, wrong_bytes: bool) -> usize {
        let counts = |a: &&Accusation| {
            a.peer != but && (a.wrong_bytes || !wrong_bytes) && now.since(a.at) < EVIDENCE_WINDOW
        };
        let alone = |a: &&Accusation| {
            self.records.get(&a.peer).is_none_or(|record| {
                record
                    .accusers
                    .iter()
                    .all(|other| other.peer == reporter || (wrong_bytes && !other.wrong_bytes))
            })
        };
        self.records
            .get(&reporter)
            .map_or(0, |record| record.accused.iter().filter(counts).filter(alone).count())
    }

    /// How many of those it accuses of wrong bytes are isolated: no report is taken on an isolated peer, so it helped.
    fn verdicts(&self, now: Time, reporter: PeerId) -> usize {
        let Some(record) = self.records.get(&reporter) else { return 0 };
        record.accused.iter().filter(|a| a.wrong_bytes && self.is_isolated(now, a.peer)).count()
    }

    fn record(&mut self, peer: PeerId) -> Option<&mut Record> {
        if self.records.len() >= MAX_RECORDS && !self.records.contains_key(&peer) {
            return None;
        }
        Some(self.records.entry(peer).or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(n: u8) -> PeerId {
        PeerId([n; 16])
    }

    fn at(seconds: u64) -> Time {
        Time(Duration::from_secs(seconds))
    }

    /// Reports of wrong bytes as (reporter, accused), a second apart; who is isolated in the end.
    fn isolated_after(reports: &[(u8, u8)]) -> Vec<PeerId> {
        let mut conduct = Conduct::default();
        for (second, (reporter, accused)) in reports.iter().enumerate() {
            conduct.report(at(second as u64), peer(*reporter), peer(*accused), ReportKind::WrongBytes);
        }
        conduct.isolated(at(reports.len() as u64))
    }

    #[test]
    fn wrong_bytes_need_two_reporters_with_a_vote() {
        let nobody: &[PeerId] = &[];
        type Case<'a> = (&'a str, &'a [(u8, u8)], &'a [PeerId]);
        let cases: &[Case<'_>] = &[
            ("one reporter", &[(1, 9)], nobody),
            ("one reporter, often", &[(1, 9), (1, 9), (1, 9)], nobody),
            ("about itself", &[(9, 9), (1, 9)], nobody),
            ("two reporters", &[(1, 9), (2, 9)], &[peer(9)]),
            ("one liar about everybody", &[(1, 2), (1, 3), (1, 4), (1, 5), (1, 6)], nobody),
            ("a liar has no vote beside another's", &[(1, 2), (1, 3), (1, 4), (1, 5), (7, 5)], nobody),
            ("an isolated peer has no vote", &[(1, 9), (2, 9), (9, 3), (1, 3)], &[peer(9)]),
            (
                "two liars isolate few",
                &[(1, 3), (2, 3), (1, 4), (2, 4), (1, 5), (2, 5), (1, 6), (2, 6), (1, 7), (2, 7)],
                &[peer(3), peer(4), peer(5)],
            ),
        ];
        for (name, reports, expected) in cases {
            assert_eq!(isolated_after(reports), *expected, "{name}");
        }
    }

    #[test]
    fn stalls_never_isolate_and_are_forgiven() {
        let mut conduct = Conduct::default();
        for reporter in 1..30 {
            assert!(!conduct.report(at(0), peer(reporter), peer(99), ReportKind::Stalled));
        }
        assert!(conduct.isolated(at(0)).is_empty());
        assert!(conduct.suspicion(at(0), peer(99)) > 0.9);
        assert!(conduct.suspicion(at(300), peer(99)) < 0.51);
        assert!(conduct.suspicion(at(1800), peer(99)) < 0.02);
    }

    #[test]
    fn who_stalls_with_everybody_is_believed_less() {
        let mut conduct = Conduct::default();
        for accused in 2..40 {
            conduct.report(at(0), peer(1), peer(accused), ReportKind::Stalled);
        }
        assert!(conduct.suspicion(at(0), peer(2)) > 0.05);
        assert!(conduct.suspicion(at(0), peer(39)) < 0.001);
    }

    #[test]
    fn old_evidence_does_not_count() {
        let mut conduct = Conduct::default();
        conduct.report(at(0), peer(1), peer(9), ReportKind::WrongBytes);
        assert!(!conduct.report(at(601), peer(2), peer(9), ReportKind::WrongBytes));
    }

    #[test]
    fn isolation_ends_in_probation_and_everything_fades() {
        let mut conduct = Conduct::default();
        conduct.report(at(0), peer(1), peer(9), ReportKind::WrongBytes);
        assert!(conduct.report(at(0), peer(2), peer(9), ReportKind::WrongBytes));
        assert!(conduct.is_isolated(at(599), peer(9)));
        assert!(!conduct.is_isolated(at(600), peer(9)));
        assert!(conduct.sweep(at(600)));
        assert!(conduct.suspicion(at(600), peer(9)) > 0.8);
        let mut now = at(600);
        while let Some(deadline) = conduct.deadline() {
            assert!(deadline > now, "a sweep must not come due again at once");
            now = deadline;
            conduct.sweep(now);
        }
        assert!(conduct.records.is_empty() && now < at(7200));
    }
}
