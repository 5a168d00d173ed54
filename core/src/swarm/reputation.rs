//! The rule of evidence: accusations, the trust in reporters, and isolation.
//!
//! - An accusation counts only if the reporter and the accused were named to each other for that task: the caller sees
//!   to it.
//! - A seed is isolated on the word of [`REPORTERS_TO_ISOLATE_SEED`] reporters, and only if they are more than the
//!   others that it served within [`EVIDENCE_WINDOW`]. Reports never isolate the last seed: without it everybody reads
//!   the origin alone.
//! - Wrong bytes isolate a peer when two different reporters, both with a vote, said so within [`EVIDENCE_WINDOW`].
//! - So do stalls, and refusals of offered pieces, within [`STALL_WINDOW`], while nobody says that the peer served
//!   anything. A peer that two can't use and nobody can is of no use, be it by will or by a broken link. It is soon
//!   given another chance. A slow peer serves somebody; that refutes them.
//! - Two sealed statements of one issuer that contradict each other isolate it alone, whoever brings them.
//! - A reporter whose accusations nobody shares, or that were refuted, has no vote after [`LONE_ACCUSATIONS`] of them.
//!   No reporter takes part in more than [`VERDICTS_PER_REPORTER`] verdicts a window: two liars isolate a few peers at
//!   most.
//! - Failures to reach a peer never isolate: each peer finds them out by itself, and they may be its own. They lower
//!   the score, less the more peers a reporter complains about alone: a reporter that fails with everybody has a bad
//!   link.
//! - The record of a peer fades with [`SUSPICION_HALF_LIFE`]. After [`ISOLATION`] (for stalls [`STALL_ISOLATION`]) a
//!   peer is let back on probation: its suspicion starts high, so that it is chosen last.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use super::ReportKind;
use crate::Time;
use crate::piece::PeerId;

/// How long an isolated peer is named to nobody.
pub const ISOLATION: Duration = Duration::from_secs(10 * 60);
/// The same for one that stalled: a link that hung for a moment does not keep a peer out for the whole deploy.
pub const STALL_ISOLATION: Duration = Duration::from_secs(60);
/// How long a stall counts.
pub const STALL_WINDOW: Duration = Duration::from_secs(30);
/// How long an accusation counts.
pub const EVIDENCE_WINDOW: Duration = Duration::from_secs(10 * 60);
/// Reporters it takes to isolate a peer.
pub const REPORTERS_TO_ISOLATE: usize = 2;
/// Reporters it takes to isolate a seed. Two members that lie together isolate none.
pub const REPORTERS_TO_ISOLATE_SEED: usize = 3;
/// Unshared accusations of wrong bytes (of stalls) after which a reporter has no vote on them. Both are rare: one liar in a
/// thousand.
pub const LONE_ACCUSATIONS: usize = 3;
/// Unshared complaints of any kind at which a reporter is no longer believed; each takes an equal part of its credit.
const LONE_COMPLAINTS: f32 = 8.0;
/// Isolated peers that one reporter helped to isolate, within the window.
pub const VERDICTS_PER_REPORTER: usize = 3;
/// Suspicion halves in this time: a bad minute is forgiven within the hour, not within the pull.
pub const SUSPICION_HALF_LIFE: Duration = Duration::from_secs(5 * 60);

/// The suspicion that an accusation adds, out of 1: wrong bytes weigh as much as five stalls.
const WRONG_BYTES_WEIGHT: f32 = 0.5;
const STALLED_WEIGHT: f32 = 0.1;
const NOT_HELD_WEIGHT: f32 = 0.1;
const FAILED_WEIGHT: f32 = 0.1;
/// The suspicion at the end of an isolation.
const PROBATION_SUSPICION: f32 = 0.9;
/// Suspicion below this is none.
const NEGLIGIBLE: f32 = 0.01;
/// Accusations kept for one accused and for one reporter: far more than the rules above look at.
const KEPT: usize = 32;
/// Peers kept that a seed served: fewer than the accusations, so that enough accusers always outnumber them.
const SERVED_KEPT: usize = KEPT - 1;
/// Records kept. Beyond that new peers are not put on record; only peers that are here can be accused.
const MAX_RECORDS: usize = 65_536;
/// How often what has faded is dropped.
const SWEEP_EVERY: Duration = Duration::from_secs(60);

/// How much evidence it takes to isolate the accused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// An ordinary peer.
    Peer,
    /// One of several seeds that are here.
    Seed,
    /// The only seed that is here and not isolated.
    LastSeed,
}

/// Why a peer is isolated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum IsolationReason {
    /// Several got wrong bytes from it.
    WrongBytes,
    /// Several got nothing from it that it had offered, and nobody got anything.
    Stalled,
    /// It signed and sealed two different tables of one task.
    Contradiction,
}

impl fmt::Display for IsolationReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            IsolationReason::WrongBytes => "wrong bytes",
            IsolationReason::Stalled => "stalling",
            IsolationReason::Contradiction => "two seals that contradict each other",
        })
    }
}

/// The records of everybody who reported or was reported.
#[derive(Debug, Default)]
pub(super) struct Reputation {
    records: BTreeMap<PeerId, Record>,
    /// When isolated peers are let back.
    releases: BTreeSet<Time>,
    swept_at: Time,
}

#[derive(Debug, Default)]
struct Record {
    suspicion: f32,
    /// When `suspicion` was right.
    at: Time,
    isolated: Option<(IsolationReason, Time)>,
    /// When somebody last said that it served him.
    served_at: Option<Time>,
    /// Of a seed: the peers that said so, and when last.
    served: Vec<(PeerId, Time)>,
    /// The accusations against this peer.
    accusers: Vec<Accusation>,
    /// The accusations by this peer.
    accused: Vec<Accusation>,
}

#[derive(Clone, Copy, Debug)]
struct Accusation {
    /// The other one.
    peer: PeerId,
    charge: Charge,
    at: Time,
}

/// The kind of an accusation. Some kinds isolate, each by itself; the others only lower the score.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Charge {
    WrongBytes,
    Stalled,
    Failed,
}

impl Charge {
    /// The verdict that enough reporters lead to, the time for which their word counts, and the time of the isolation.
    const fn verdict(self) -> Option<(IsolationReason, Duration, Duration)> {
        match self {
            Charge::WrongBytes => Some((IsolationReason::WrongBytes, EVIDENCE_WINDOW, ISOLATION)),
            Charge::Stalled => Some((IsolationReason::Stalled, STALL_WINDOW, STALL_ISOLATION)),
            Charge::Failed => None,
        }
    }
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
        self.isolated.is_some_and(|(_, until)| now < until)
    }

    /// Whether it has served somebody since it was said to stall.
    fn refutes(&self, accusation: &Accusation) -> bool {
        accusation.charge == Charge::Stalled && self.served_at.is_some_and(|at| at >= accusation.at)
    }

    fn has_faded(&self, now: Time) -> bool {
        self.isolated.is_none()
            && self
                .served_at
                .is_none_or(|at| now.since(at) >= EVIDENCE_WINDOW)
            && self.accusers.is_empty()
            && self.accused.is_empty()
            && self.served.is_empty()
            && self.suspicion(now) < NEGLIGIBLE
    }
}

fn note(accusations: &mut Vec<Accusation>, new: Accusation) {
    match accusations
        .iter_mut()
        .find(|old| old.peer == new.peer && old.charge == new.charge)
    {
        Some(old) => old.at = new.at,
        None => {
            if accusations.len() == KEPT {
                accusations.remove(0);
            }
            accusations.push(new);
        }
    }
}

impl Reputation {
    /// 0 (nothing known against it) to 1.
    pub(super) fn suspicion(&self, now: Time, peer: PeerId) -> f32 {
        self.records
            .get(&peer)
            .map_or(0.0, |record| record.suspicion(now))
    }

    pub(super) fn is_isolated(&self, now: Time, peer: PeerId) -> bool {
        self.records
            .get(&peer)
            .is_some_and(|record| record.is_isolated(now))
    }

    /// Everybody who is isolated, ascending.
    pub(super) fn isolated(&self, now: Time) -> Vec<PeerId> {
        self.records
            .iter()
            .filter(|(_, record)| record.is_isolated(now))
            .map(|(peer, _)| *peer)
            .collect()
    }

    /// Takes in a report. `true`: `accused` is isolated from now on.
    pub(super) fn report(
        &mut self,
        now: Time,
        reporter: PeerId,
        accused: PeerId,
        standing: Standing,
        kind: ReportKind,
    ) -> bool {
        if reporter == accused || self.is_isolated(now, reporter) || self.is_isolated(now, accused)
        {
            return false;
        }
        let (weight, charge) = match kind {
            ReportKind::WrongBytes => (WRONG_BYTES_WEIGHT, Charge::WrongBytes),
            ReportKind::Stalled => (STALLED_WEIGHT, Charge::Stalled),
            ReportKind::NotHeld => (NOT_HELD_WEIGHT, Charge::Stalled),
            ReportKind::Failed => (FAILED_WEIGHT, Charge::Failed),
            ReportKind::Served(_) if standing != Standing::Peer => {
                if let Some(record) = self.record(accused) {
                    record.served_at = Some(now);
                    record.served.retain(|(peer, _)| *peer != reporter);
                    record.served.truncate(SERVED_KEPT - 1);
                    record.served.insert(0, (reporter, now));
                }
                return false;
            }
            ReportKind::Served(_) => {
                // Only those on record have anything to be refuted.
                if let Some(record) = self.records.get_mut(&accused) {
                    record.served_at = Some(now);
                }
                return false;
            }
        };
        let credit = self.credit(now, reporter, accused, charge);
        if let Some(record) = self.record(accused) {
            record.suspect(now, weight * credit);
            note(
                &mut record.accusers,
                Accusation {
                    peer: reporter,
                    charge,
                    at: now,
                },
            );
        }
        if let Some(record) = self.record(reporter) {
            note(
                &mut record.accused,
                Accusation {
                    peer: accused,
                    charge,
                    at: now,
                },
            );
        }
        self.judge(now, accused, standing, charge)
    }

    /// Isolates a peer that is guilty beyond doubt. `false`: it is isolated already, or there are too many records.
    pub(super) fn convict(
        &mut self,
        now: Time,
        peer: PeerId,
        reason: IsolationReason,
        isolation: Duration,
    ) -> bool {
        if self.is_isolated(now, peer) {
            return false;
        }
        let Some(record) = self.record(peer) else {
            return false;
        };
        record.isolated = Some((reason, now + isolation));
        self.releases.insert(now + isolation);
        true
    }

    /// Why a peer is isolated, and for how long from now on.
    pub(super) fn isolation(&self, now: Time, peer: PeerId) -> Option<(IsolationReason, Duration)> {
        let (reason, until) = self.records.get(&peer)?.isolated?;
        (now < until).then(|| (reason, until.since(now)))
    }

    /// Drops what has faded, at most once a minute. `true`: somebody is no longer isolated.
    pub(super) fn sweep(&mut self, now: Time) -> bool {
        if self.deadline().is_none_or(|deadline| now < deadline) {
            return false;
        }
        self.swept_at = now;
        while self.releases.first().is_some_and(|release| *release <= now) {
            self.releases.pop_first();
        }
        let mut released = false;
        for record in self.records.values_mut() {
            if record.isolated.is_some_and(|(_, until)| until <= now) {
                record.isolated = None;
                record.suspicion = PROBATION_SUSPICION;
                record.at = now;
                // Its time is served; only new evidence counts.
                record.accusers.clear();
                released = true;
            }
            record
                .accusers
                .retain(|accusation| now.since(accusation.at) < EVIDENCE_WINDOW);
            record
                .accused
                .retain(|accusation| now.since(accusation.at) < EVIDENCE_WINDOW);
            record
                .served
                .retain(|(_, at)| now.since(*at) < EVIDENCE_WINDOW);
        }
        self.records.retain(|_, record| !record.has_faded(now));
        released
    }

    /// When [`Reputation::sweep`] has something to do.
    pub(super) fn deadline(&self) -> Option<Time> {
        let sweep = (!self.records.is_empty()).then_some(self.swept_at + SWEEP_EVERY);
        self.releases
            .first()
            .copied()
            .into_iter()
            .chain(sweep)
            .min()
    }

    fn judge(&mut self, now: Time, accused: PeerId, standing: Standing, charge: Charge) -> bool {
        let Some((reason, window, isolation)) = charge.verdict() else {
            return false;
        };
        let Some(record) = self.records.get(&accused) else {
            return false;
        };
        let counts =
            |a: &&Accusation| a.charge == charge && now.since(a.at) < window && !record.refutes(a);
        let accuses = |peer: PeerId| {
            record
                .accusers
                .iter()
                .filter(counts)
                .any(|a| a.peer == peer)
        };
        let votes = record
            .accusers
            .iter()
            .filter(counts)
            .filter(|a| self.has_vote(now, a.peer, accused, charge))
            .count();
        let is_enough = match standing {
            Standing::Peer => votes >= REPORTERS_TO_ISOLATE,
            Standing::Seed => {
                let is_content = |(peer, at): &&(PeerId, Time)| {
                    now.since(*at) < EVIDENCE_WINDOW && !accuses(*peer)
                };
                let content = record.served.iter().filter(is_content).count();
                votes >= REPORTERS_TO_ISOLATE_SEED && votes > content
            }
            Standing::LastSeed => false,
        };
        is_enough && self.convict(now, accused, reason, isolation)
    }

    /// How much of a report is believed, 0 to 1.
    fn credit(&self, now: Time, reporter: PeerId, accused: PeerId, charge: Charge) -> f32 {
        if charge == Charge::WrongBytes && !self.has_vote(now, reporter, accused, charge) {
            return 0.0;
        }
        (1.0 - self.lone_accusations(now, reporter, accused, None) as f32 / LONE_COMPLAINTS)
            .max(0.0)
    }

    fn has_vote(&self, now: Time, reporter: PeerId, accused: PeerId, charge: Charge) -> bool {
        !self.is_isolated(now, reporter)
            && self.lone_accusations(now, reporter, accused, Some(charge)) < LONE_ACCUSATIONS
            && self.verdicts(now, reporter) < VERDICTS_PER_REPORTER
    }

    /// Of how many peers other than `but` the reporter says this (or anything) while nobody else does, or somebody refutes it.
    fn lone_accusations(
        &self,
        now: Time,
        reporter: PeerId,
        but: PeerId,
        charge: Option<Charge>,
    ) -> usize {
        let is_meant = |a: &Accusation| charge.is_none_or(|charge| a.charge == charge);
        let counts =
            |a: &&Accusation| a.peer != but && is_meant(a) && now.since(a.at) < EVIDENCE_WINDOW;
        let alone = |a: &&Accusation| {
            self.records.get(&a.peer).is_none_or(|record| {
                let is_shared = record
                    .accusers
                    .iter()
                    .any(|other| other.peer != reporter && is_meant(other));
                !is_shared || charge.is_some() && record.refutes(a)
            })
        };
        self.records.get(&reporter).map_or(0, |record| {
            record.accused.iter().filter(counts).filter(alone).count()
        })
    }

    /// How many of those it accuses of what isolates are isolated: no report is taken on an isolated peer, so it helped.
    fn verdicts(&self, now: Time, reporter: PeerId) -> usize {
        let Some(record) = self.records.get(&reporter) else {
            return 0;
        };
        let helped =
            |a: &&Accusation| a.charge.verdict().is_some() && self.is_isolated(now, a.peer);
        record.accused.iter().filter(helped).count()
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

    /// Reports wrong bytes as (reporter, accused), a second apart, and gives the peers isolated in the end.
    fn isolated_after(reports: &[(u8, u8)]) -> Vec<PeerId> {
        let mut reputation = Reputation::default();
        for (second, (reporter, accused)) in reports.iter().enumerate() {
            reputation.report(
                at(second as u64),
                peer(*reporter),
                peer(*accused),
                Standing::Peer,
                ReportKind::WrongBytes,
            );
        }
        reputation.isolated(at(reports.len() as u64))
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
            (
                "one liar about everybody",
                &[(1, 2), (1, 3), (1, 4), (1, 5), (1, 6)],
                nobody,
            ),
            (
                "a liar has no vote beside another's",
                &[(1, 2), (1, 3), (1, 4), (1, 5), (7, 5)],
                nobody,
            ),
            (
                "an isolated peer has no vote",
                &[(1, 9), (2, 9), (9, 3), (1, 3)],
                &[peer(9)],
            ),
            (
                "two liars isolate few",
                &[
                    (1, 3),
                    (2, 3),
                    (1, 4),
                    (2, 4),
                    (1, 5),
                    (2, 5),
                    (1, 6),
                    (2, 6),
                    (1, 7),
                    (2, 7),
                ],
                &[peer(3), peer(4), peer(5)],
            ),
        ];
        for (name, reports, expected) in cases {
            assert_eq!(isolated_after(reports), *expected, "{name}");
        }
    }

    #[test]
    fn failures_never_isolate_and_are_forgiven() {
        let mut reputation = Reputation::default();
        for reporter in 1..30 {
            assert!(!reputation.report(
                at(0),
                peer(reporter),
                peer(99),
                Standing::Peer,
                ReportKind::Failed
            ));
        }
        assert!(reputation.isolated(at(0)).is_empty());
        assert!(reputation.suspicion(at(0), peer(99)) > 0.9);
        assert!(reputation.suspicion(at(300), peer(99)) < 0.51);
        assert!(reputation.suspicion(at(1800), peer(99)) < 0.02);
    }

    #[test]
    fn who_serves_two_peers_nothing_and_nobody_anything_is_isolated_for_a_while() {
        use ReportKind::{NotHeld, Served, Stalled};
        type Case<'a> = (&'a str, &'a [(u64, u8, ReportKind)], bool);
        let cases: &[Case<'_>] = &[
            (
                "one reporter, often",
                &[(0, 1, Stalled), (1, 1, NotHeld), (2, 1, Stalled)],
                false,
            ),
            ("two reporters", &[(0, 1, Stalled), (5, 2, NotHeld)], true),
            ("too far apart", &[(0, 1, Stalled), (31, 2, Stalled)], false),
            (
                "a third got something between",
                &[(0, 1, Stalled), (3, 3, Served(1)), (5, 2, Stalled)],
                false,
            ),
            (
                "and then no more",
                &[(3, 3, Served(1)), (4, 1, Stalled), (5, 2, Stalled)],
                true,
            ),
            (
                "its own word is none",
                &[(0, 1, Stalled), (3, 9, Served(1)), (5, 2, Stalled)],
                true,
            ),
        ];
        for (name, reports, isolated) in cases {
            let mut reputation = Reputation::default();
            for (second, reporter, kind) in *reports {
                reputation.report(at(*second), peer(*reporter), peer(9), Standing::Peer, *kind);
            }
            assert_eq!(reputation.is_isolated(at(31), peer(9)), *isolated, "{name}");
        }
    }

    #[test]
    fn who_was_refuted_has_no_vote_on_stalls() {
        let mut reputation = Reputation::default();
        for accused in 10..13 {
            reputation.report(
                at(0),
                peer(1),
                peer(accused),
                Standing::Peer,
                ReportKind::Stalled,
            );
            reputation.report(
                at(1),
                peer(2),
                peer(accused),
                Standing::Peer,
                ReportKind::Served(1),
            );
        }
        reputation.report(at(2), peer(1), peer(9), Standing::Peer, ReportKind::Stalled);
        assert!(!reputation.report(at(3), peer(3), peer(9), Standing::Peer, ReportKind::Stalled));
        assert!(reputation.report(at(4), peer(4), peer(9), Standing::Peer, ReportKind::Stalled));
    }

    #[test]
    fn isolation_tells_why_and_how_long() {
        let mut reputation = Reputation::default();
        reputation.report(at(0), peer(1), peer(9), Standing::Peer, ReportKind::Stalled);
        reputation.report(at(0), peer(2), peer(9), Standing::Peer, ReportKind::Stalled);
        assert_eq!(
            reputation.isolation(at(20), peer(9)),
            Some((IsolationReason::Stalled, Duration::from_secs(40)))
        );
        assert!(reputation.convict(at(1), peer(8), IsolationReason::Contradiction, ISOLATION));
        assert!(!reputation.convict(at(2), peer(8), IsolationReason::Contradiction, ISOLATION));
        assert!(reputation.sweep(at(60)), "the shorter one ends first");
        assert_eq!(reputation.isolated(at(60)), [peer(8)]);
    }

    #[test]
    fn who_stalls_with_everybody_is_believed_less() {
        let mut reputation = Reputation::default();
        for accused in 2..40 {
            reputation.report(
                at(0),
                peer(1),
                peer(accused),
                Standing::Peer,
                ReportKind::Failed,
            );
        }
        assert!(reputation.suspicion(at(0), peer(2)) > 0.05);
        assert!(reputation.suspicion(at(0), peer(39)) < 0.001);
    }

    #[test]
    fn old_evidence_does_not_count() {
        let mut reputation = Reputation::default();
        reputation.report(
            at(0),
            peer(1),
            peer(9),
            Standing::Peer,
            ReportKind::WrongBytes,
        );
        assert!(!reputation.report(
            at(601),
            peer(2),
            peer(9),
            Standing::Peer,
            ReportKind::WrongBytes
        ));
    }

    #[test]
    fn isolation_ends_in_probation_and_everything_fades() {
        let mut reputation = Reputation::default();
        reputation.report(
            at(0),
            peer(1),
            peer(9),
            Standing::Peer,
            ReportKind::WrongBytes,
        );
        assert!(reputation.report(
            at(0),
            peer(2),
            peer(9),
            Standing::Peer,
            ReportKind::WrongBytes
        ));
        assert!(reputation.is_isolated(at(599), peer(9)));
        assert!(!reputation.is_isolated(at(600), peer(9)));
        assert!(reputation.sweep(at(600)));
        assert!(reputation.suspicion(at(600), peer(9)) > 0.8);
        let mut now = at(600);
        while let Some(deadline) = reputation.deadline() {
            assert!(deadline > now, "a sweep must not come due again at once");
            now = deadline;
            reputation.sweep(now);
        }
        assert!(reputation.records.is_empty() && now < at(7200));
    }

    #[test]
    fn a_seed_needs_three_reporters_who_outnumber_those_it_served() {
        use ReportKind::{Served, Stalled, WrongBytes};
        type Case<'a> = (&'a str, Standing, &'a [(u8, ReportKind)], bool);
        let cases: &[Case<'_>] = &[
            (
                "two liars",
                Standing::Seed,
                &[(1, WrongBytes), (2, WrongBytes)],
                false,
            ),
            (
                "three",
                Standing::Seed,
                &[(1, WrongBytes), (2, WrongBytes), (3, WrongBytes)],
                true,
            ),
            (
                "three stalls",
                Standing::Seed,
                &[(1, Stalled), (2, Stalled), (3, Stalled)],
                true,
            ),
            (
                "as many are content",
                Standing::Seed,
                &[
                    (5, Served(1)),
                    (6, Served(1)),
                    (7, Served(1)),
                    (1, WrongBytes),
                    (2, WrongBytes),
                    (3, WrongBytes),
                ],
                false,
            ),
            (
                "what it served to those who accuse it does not count for it",
                Standing::Seed,
                &[
                    (1, Served(1)),
                    (2, Served(1)),
                    (3, Served(1)),
                    (1, WrongBytes),
                    (2, WrongBytes),
                    (3, WrongBytes),
                ],
                true,
            ),
            (
                "the last one",
                Standing::LastSeed,
                &[
                    (1, WrongBytes),
                    (2, WrongBytes),
                    (3, WrongBytes),
                    (4, WrongBytes),
                    (5, WrongBytes),
                ],
                false,
            ),
        ];
        for (name, standing, reports, isolated) in cases {
            let mut reputation = Reputation::default();
            for (second, (reporter, kind)) in reports.iter().enumerate() {
                reputation.report(
                    at(second as u64),
                    peer(*reporter),
                    peer(9),
                    *standing,
                    *kind,
                );
            }
            assert_eq!(reputation.is_isolated(at(9), peer(9)), *isolated, "{name}");
        }
    }

    #[test]
    fn what_a_seed_served_is_bounded_and_fades() {
        let mut reputation = Reputation::default();
        for reporter in 0..200 {
            reputation.report(
                at(0),
                peer(reporter),
                peer(201),
                Standing::Seed,
                ReportKind::Served(1),
            );
        }
        assert_eq!(reputation.records[&peer(201)].served.len(), SERVED_KEPT);
        reputation.sweep(at(600));
        reputation.sweep(at(1200));
        assert!(reputation.records.is_empty());
    }
}
