//! The two facts that come before bytes: this caller may read this repository, and this digest belongs to it.
//!
//! The first is remembered per caller, for as long as the origin's yes may count: for anybody a few minutes, and a grace while
//! the origin can't be asked; for a client with credentials at most as long as its token lives. A runtime can't renew its token in
//! mid-pull, so a pull that is under way may go on after that: each blob that a manifest names which the client read within its
//! token's life, once, and while bytes go out. The second is a fact of the registry, the same for every caller.

use std::collections::{HashMap, VecDeque};
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ::lru::LruCache;
use hawker_core::lru;
use hawker_oci::digest::Digest;
use hawker_oci::reference::Source;
use tokio::time::Instant;

use crate::grant::Grant;
use crate::settings::LiveSettings;

/// How long a repository counts as readable by anybody before the origin is asked again.
const READABLE: Duration = Duration::from_secs(5 * 60);
/// How long a digest counts as part of a repository before the origin is asked again.
const BELONGS: Duration = Duration::from_secs(24 * 60 * 60);
/// How long after its token has run out a pull may be under way at most, however busy it is.
pub(super) const LONGEST_PULL: Duration = Duration::from_secs(15 * 60);
/// How long what a manifest names is not looked at again.
const READ: Duration = Duration::from_secs(60);
/// Manifests whose parts are remembered, and parts of one.
const MANIFESTS: NonZeroUsize = NonZeroUsize::new(4096).expect("not zero");
const PARTS: usize = 512;
/// Manifests that one caller may be pulling by, the newest ones.
const PULLS: usize = 8;
/// Facts of each kind that are remembered.
const CAPACITY: NonZeroUsize = NonZeroUsize::new(64 << 10).expect("not zero");

/// The caller, as far as it matters for remembered facts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Caller {
    /// Without credentials: may have what this node has a right of its own to.
    Anybody,
    /// With credentials, of which this is the hash.
    Client(Digest),
}

/// The facts about a digest in a repository. Sizes are in bytes, if known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// Both facts are fresh.
    Confirmed(Option<u64>),
    /// Both were confirmed once: they count if the origin can't be asked.
    Stale(Option<u64>),
    /// The origin has to be asked.
    Unknown,
}

/// The facts remembered.
pub(super) struct Access {
    facts: Mutex<Facts>,
    /// How long a client may be silent and its pull still be under way.
    pull_grace: Duration,
}

struct Facts {
    readable: LruCache<(Caller, Source), Readable>,
    belongs: LruCache<(Source, Digest), Belonging>,
    /// Manifests whose parts have been noted, when, and the parts.
    read: LruCache<(Source, Digest), (Instant, Parts)>,
}

/// The configuration and layers that a manifest names, by [`short`].
pub(super) type Parts = Arc<[u64]>;

/// A digest's first bytes. Two parts of one repository that share them open nothing that the caller may not have.
fn short(digest: &Digest) -> u64 {
    digest
        .as_bytes()
        .first_chunk()
        .map_or(0, |bytes| u64::from_be_bytes(*bytes))
}

/// The short form of what a manifest names.
pub(super) fn short_parts<'a>(digests: impl Iterator<Item = &'a Digest>) -> Parts {
    digests.take(PARTS).map(short).collect()
}

/// The origin's yes to a caller.
struct Readable {
    confirmed: Instant,
    /// How long it counts.
    life: Duration,
    /// When the caller last asked within its token's life, or when bytes of a blob last went to it.
    used: Instant,
    /// The manifests that it read within its token's life: the blobs in them may still come after that.
    pulls: VecDeque<Parts>,
    /// Bytes of such blobs that went to it.
    served: HashMap<u64, u64>,
    /// Whether this node's own credentials were needed, and under which settings: then it is no yes to everybody. It ends with
    /// these settings, and has no grace.
    by: Option<Arc<LiveSettings>>,
}

#[derive(Clone, Copy)]
struct Belonging {
    confirmed: Instant,
    size_bytes: Option<u64>,
}

/// How good a yes is by now, best last.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Age {
    Void,
    Stale,
    Fresh,
}

impl Readable {
    fn age(&self, caller: Caller, live: &Arc<LiveSettings>, now: Instant) -> Age {
        let age = now.saturating_duration_since(self.confirmed);
        match caller {
            _ if self.by.as_ref().is_some_and(|by| !Arc::ptr_eq(by, live)) => Age::Void,
            _ if age <= self.life => Age::Fresh,
            Caller::Anybody if self.by.is_none() && age <= live.staleness.public_grace => {
                Age::Stale
            }
            _ => Age::Void,
        }
    }

    /// Whether a pull that outlives its token may have this blob: a manifest that the caller read in time names it, it has not
    /// gone to the caller yet, and the pull moves.
    fn may_finish(
        &self,
        blob: &Digest,
        size_bytes: Option<u64>,
        pull_grace: Duration,
        now: Instant,
    ) -> bool {
        let moves = now.saturating_duration_since(self.used) <= pull_grace;
        let in_time = now.saturating_duration_since(self.confirmed) <= self.life + LONGEST_PULL;
        let blob = short(blob);
        let served = self.served.get(&blob).copied().unwrap_or(0);
        moves
            && in_time
            && self.by.is_none()
            && self.pulls.iter().any(|parts| parts.contains(&blob))
            && (served == 0 || size_bytes.is_some_and(|size| served < size))
    }
}

impl Belonging {
    fn age(&self, public_grace: Duration, now: Instant) -> Age {
        let age = now.saturating_duration_since(self.confirmed);
        if age <= BELONGS {
            Age::Fresh
        } else if age <= public_grace {
            Age::Stale
        } else {
            Age::Void
        }
    }
}

impl Caller {
    /// The caller of a grant.
    pub(super) fn of(grant: &Grant) -> Self {
        grant
            .authorization
            .as_ref()
            .map_or(Caller::Anybody, |a| Caller::Client(a.hash()))
    }
}

impl Access {
    pub(super) fn new(pull_grace: Duration) -> Self {
        let facts = Facts {
            readable: lru::bounded(CAPACITY),
            belongs: lru::bounded(CAPACITY),
            read: lru::bounded(MANIFESTS),
        };
        Self {
            facts: Mutex::new(facts),
            pull_grace,
        }
    }

    fn facts(&self) -> MutexGuard<'_, Facts> {
        self.facts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the caller's right to read something of the repository is remembered, be it that of anybody while the origin can't
    /// be asked.
    pub(super) fn reads(
        &self,
        caller: Caller,
        source: &Source,
        live: &Arc<LiveSettings>,
        now: Instant,
    ) -> bool {
        let mut facts = self.facts();
        let readable = facts.readable.get(&(caller, source.clone()));
        readable.is_some_and(|r| r.age(caller, live, now) > Age::Void)
    }

    /// The facts at `now`. A fresh yes counts as used. `live`: the present settings, which also say how long public
    /// content stays readable while the origin can't be asked.
    pub(super) fn standing(
        &self,
        caller: Caller,
        source: &Source,
        digest: &Digest,
        live: &Arc<LiveSettings>,
        now: Instant,
    ) -> Standing {
        let mut facts = self.facts();
        let Some(belongs) = facts.belongs.get(&(source.clone(), *digest)).copied() else {
            return Standing::Unknown;
        };
        let Some(readable) = facts.readable.get_mut(&(caller, source.clone())) else {
            return Standing::Unknown;
        };
        let belongs_age = belongs.age(live.staleness.public_grace, now);
        match readable.age(caller, live, now).min(belongs_age) {
            Age::Fresh => {
                readable.used = now;
                Standing::Confirmed(belongs.size_bytes)
            }
            Age::Void
                if belongs_age == Age::Fresh
                    && matches!(caller, Caller::Client(_))
                    && readable.may_finish(digest, belongs.size_bytes, self.pull_grace, now) =>
            {
                Standing::Confirmed(belongs.size_bytes)
            }
            Age::Stale => Standing::Stale(belongs.size_bytes),
            Age::Void => Standing::Unknown,
        }
    }

    /// The origin gave this caller something of the repository. `life`: how long that counts for a client. `by`: it took this
    /// node's own credentials, which it has under these settings.
    pub(super) fn readable(
        &self,
        caller: Caller,
        source: &Source,
        life: Duration,
        by: Option<Arc<LiveSettings>>,
        now: Instant,
    ) {
        let life = if caller == Caller::Anybody {
            READABLE
        } else {
            life
        };
        let (key, mut facts) = ((caller, source.clone()), self.facts());
        // Anew within its token's life: earlier bytes do not count against it.
        let pulls = facts
            .readable
            .pop(&key)
            .map(|before| before.pulls)
            .unwrap_or_default();
        let served = HashMap::new();
        facts.readable.put(
            key,
            Readable {
                confirmed: now,
                life,
                used: now,
                pulls,
                served,
                by,
            },
        );
    }

    /// The caller has read a manifest that names these blobs. It counts within its token's life only.
    pub(super) fn pulls(
        &self,
        caller: Caller,
        source: &Source,
        parts: Parts,
        live: &Arc<LiveSettings>,
        now: Instant,
    ) {
        let mut facts = self.facts();
        let readable = facts.readable.get_mut(&(caller, source.clone()));
        let Some(readable) = readable.filter(|r| r.age(caller, live, now) == Age::Fresh) else {
            return;
        };
        if caller == Caller::Anybody || readable.pulls.contains(&parts) {
            return;
        }
        if readable.pulls.len() >= PULLS {
            readable.pulls.pop_front();
        }
        readable.pulls.push_back(parts);
    }

    /// Bytes of a blob went to the caller.
    pub(super) fn served(
        &self,
        caller: Caller,
        source: &Source,
        blob: &Digest,
        bytes: u64,
        now: Instant,
    ) {
        if let Some(readable) = self.facts().readable.get_mut(&(caller, source.clone())) {
            readable.used = now;
            let blob = short(blob);
            if readable.pulls.iter().any(|parts| parts.contains(&blob)) {
                *readable.served.entry(blob).or_default() += bytes;
            }
        }
    }

    /// How long ago the origin said that `digest` is part of the repository; `None` if that is not known.
    pub(super) fn age(&self, source: &Source, digest: &Digest, now: Instant) -> Option<Duration> {
        let facts = self.facts();
        let belongs = facts.belongs.peek(&(source.clone(), *digest))?;
        Some(now.saturating_duration_since(belongs.confirmed))
    }

    /// The origin, or a manifest read there, says that `digest` is part of the repository.
    pub(super) fn belongs(
        &self,
        source: &Source,
        digest: &Digest,
        size_bytes: Option<u64>,
        now: Instant,
    ) {
        let mut facts = self.facts();
        let key = (source.clone(), *digest);
        let size_bytes = size_bytes.or_else(|| facts.belongs.peek(&key).and_then(|b| b.size_bytes));
        facts.belongs.put(
            key,
            Belonging {
                confirmed: now,
                size_bytes,
            },
        );
    }

    /// The parts of a manifest of this repository, if they were noted within the last minute: a manifest may be long.
    pub(super) fn parts_of(
        &self,
        source: &Source,
        manifest: &Digest,
        now: Instant,
    ) -> Option<Parts> {
        let mut facts = self.facts();
        let (at, parts) = facts.read.get(&(source.clone(), *manifest))?;
        (now.saturating_duration_since(*at) < READ).then(|| Arc::clone(parts))
    }

    /// A manifest of this repository names these.
    pub(super) fn names(&self, source: &Source, manifest: &Digest, parts: &Parts, now: Instant) {
        self.facts()
            .read
            .put((source.clone(), *manifest), (now, Arc::clone(parts)));
    }

    /// The origin refuses the repository to this caller. A refusal within the life of its token is a revocation and ends
    /// everything; after that it is what is to be expected, and a pull under way may still finish.
    pub(super) fn refused(&self, caller: Caller, source: &Source, now: Instant) {
        let (key, mut facts) = ((caller, source.clone()), self.facts());
        let has_run_out =
            |readable: &Readable| now.saturating_duration_since(readable.confirmed) > readable.life;
        if caller == Caller::Anybody || !facts.readable.peek(&key).is_some_and(has_run_out) {
            facts.readable.pop(&key);
        }
    }

    /// The origin does not have the digest in this repository.
    pub(super) fn gone(&self, source: &Source, digest: &Digest) {
        self.facts().belongs.pop(&(source.clone(), *digest));
    }
}

#[cfg(test)]
mod tests {
    use hawker_oci::digest::Algorithm;

    use super::*;
    use crate::settings::Staleness;

    const LIFE: Duration = Duration::from_secs(100);

    /// Settings with that grace for what is public.
    fn grace(public_grace: Duration) -> Arc<LiveSettings> {
        let staleness = Staleness {
            tags: None,
            public_grace,
        };
        Arc::new(LiveSettings {
            staleness,
            ..LiveSettings::default()
        })
    }

    /// A day.
    fn live() -> Arc<LiveSettings> {
        grace(Duration::from_secs(24 * 60 * 60))
    }

    fn source(repository: &str) -> Source {
        Source {
            registry: "r.example".into(),
            repository: repository.into(),
        }
    }

    fn blob() -> Digest {
        Digest::of(Algorithm::Sha256, b"x")
    }

    fn client(n: u8) -> Caller {
        Caller::Client(Digest::of(Algorithm::Sha256, &[n]))
    }

    fn access() -> Access {
        Access::new(Duration::from_secs(60))
    }

    #[test]
    fn both_facts_are_needed_and_each_grows_old() {
        let (a, digest, t) = (source("a"), blob(), Instant::now());
        let minutes = |m: u64| t + Duration::from_secs(60 * m);
        let access = access();
        assert_eq!(
            access.standing(Caller::Anybody, &a, &digest, &live(), t),
            Standing::Unknown
        );
        access.readable(Caller::Anybody, &a, LIFE, None, t);
        assert_eq!(
            access.standing(Caller::Anybody, &a, &digest, &live(), t),
            Standing::Unknown
        );
        access.belongs(&a, &digest, Some(1), t);
        for (at, expected) in [
            (0, Standing::Confirmed(Some(1))),
            (5, Standing::Confirmed(Some(1))),
            (6, Standing::Stale(Some(1))),
            (24 * 60, Standing::Stale(Some(1))),
            (24 * 60 + 1, Standing::Unknown),
        ] {
            assert_eq!(
                access.standing(Caller::Anybody, &a, &digest, &live(), minutes(at)),
                expected,
                "after {at} min"
            );
        }
        access.readable(Caller::Anybody, &a, LIFE, None, minutes(23 * 60));
        let standing = access.standing(Caller::Anybody, &a, &digest, &live(), minutes(23 * 60 + 1));
        assert_eq!(standing, Standing::Confirmed(Some(1)));
    }

    #[test]
    fn the_grace_is_as_long_as_the_configuration_says_and_for_what_is_public_alone() {
        let (a, digest, t) = (source("a"), blob(), Instant::now());
        let access = access();
        access.belongs(&a, &digest, None, t);
        for caller in [Caller::Anybody, client(1)] {
            access.readable(caller, &a, LIFE, None, t);
        }
        let hours = |h: u64| Duration::from_secs(3600 * h);
        for (grace_hours, after, stale) in
            [(0, 1, false), (1, 1, true), (2, 3, false), (48, 47, true)]
        {
            let (live, at) = (grace(hours(grace_hours)), t + hours(after));
            let standing = access.standing(Caller::Anybody, &a, &digest, &live, at);
            assert_eq!(
                standing == Standing::Stale(None),
                stale,
                "{grace_hours} {after}"
            );
            assert_eq!(
                access.reads(Caller::Anybody, &a, &live, at),
                stale,
                "{grace_hours} {after}"
            );
            assert!(
                !access.reads(client(1), &a, &live, at),
                "{grace_hours} {after}"
            );
        }
        assert!(
            access.reads(client(1), &a, &grace(Duration::ZERO), t)
                && !access.reads(client(2), &a, &live(), t)
        );
    }

    #[test]
    fn what_this_nodes_credentials_opened_ends_with_the_settings_that_allow_it_and_has_no_grace() {
        let (a, digest, t) = (source("a"), blob(), Instant::now());
        let (access, before, after) = (access(), live(), live());
        access.belongs(&a, &digest, None, t);
        access.readable(Caller::Anybody, &a, LIFE, Some(Arc::clone(&before)), t);
        let standing = |live, at| access.standing(Caller::Anybody, &a, &digest, live, at);
        assert_eq!(standing(&before, t), Standing::Confirmed(None));
        assert_eq!(
            standing(&after, t),
            Standing::Unknown,
            "the configuration was read anew"
        );
        assert!(
            access.reads(Caller::Anybody, &a, &before, t)
                && !access.reads(Caller::Anybody, &a, &after, t)
        );
        assert_eq!(
            standing(&before, t + READABLE + Duration::from_secs(1)),
            Standing::Unknown
        );
        access.readable(Caller::Anybody, &a, LIFE, None, t);
        assert_eq!(
            standing(&after, t),
            Standing::Confirmed(None),
            "what is public is public under all settings"
        );
    }

    #[test]
    fn a_clients_right_is_nobody_elses_and_ends_with_its_token() {
        let (a, digest, t) = (source("a"), blob(), Instant::now());
        let access = access();
        access.readable(client(1), &a, LIFE, None, t);
        access.belongs(&a, &digest, Some(1), t);
        assert_eq!(
            access.standing(client(2), &a, &digest, &live(), t),
            Standing::Unknown
        );
        assert_eq!(
            access.standing(Caller::Anybody, &a, &digest, &live(), t),
            Standing::Unknown
        );
        assert_eq!(
            access.standing(client(1), &a, &digest, &live(), t),
            Standing::Confirmed(Some(1))
        );
        let silent = t + LIFE + Duration::from_secs(1);
        assert_eq!(
            access.standing(client(1), &a, &digest, &live(), silent),
            Standing::Unknown
        );
    }

    /// Two blobs of a manifest that client 1 read at `t`, with a token of 100 s; a third one that it does not name.
    fn pull(read_after_s: u64) -> (Access, [Digest; 3], Instant) {
        let (access, t) = (access(), Instant::now());
        let blobs = [b"x", b"y", b"z"].map(|data| Digest::of(Algorithm::Sha256, data));
        access.readable(client(1), &source("a"), LIFE, None, t);
        blobs
            .iter()
            .for_each(|blob| access.belongs(&source("a"), blob, Some(1000), t));
        let read = t + Duration::from_secs(read_after_s);
        access.pulls(
            client(1),
            &source("a"),
            short_parts(blobs[..2].iter()),
            &live(),
            read,
        );
        (access, blobs, t)
    }

    fn let_in(access: &Access, blob: &Digest, at: Instant) -> bool {
        access.standing(client(1), &source("a"), blob, &live(), at)
            == Standing::Confirmed(Some(1000))
    }

    #[test]
    fn a_pull_outlives_its_token_while_bytes_go_out_but_not_for_ever() {
        let (access, [moving, waiting, _], t) = pull(0);
        let at = |seconds| t + Duration::from_secs(seconds);
        assert!(let_in(&access, &waiting, at(60)));
        let last = (100..10_000)
            .step_by(50)
            .take_while(|s| {
                access.served(client(1), &source("a"), &moving, 1, at(*s));
                let_in(&access, &waiting, at(*s + 40))
            })
            .last();
        assert_eq!(last, Some(950), "100 s of its token and 15 minutes");
        let (access, [moving, waiting, _], t) = pull(0);
        access.served(client(1), &source("a"), &moving, 1, t + LIFE);
        assert!(let_in(
            &access,
            &waiting,
            t + LIFE + Duration::from_secs(60)
        ));
        assert!(
            !let_in(&access, &waiting, t + LIFE + Duration::from_secs(61)),
            "61 s without a byte end it"
        );
        assert!(!access.reads(
            client(1),
            &source("a"),
            &live(),
            t + LIFE + Duration::from_secs(1)
        ));
    }

    #[test]
    fn asking_alone_keeps_no_pull_alive() {
        let (access, [_, waiting, _], t) = pull(0);
        let asked = (100..400)
            .step_by(10)
            .take_while(|s| let_in(&access, &waiting, t + Duration::from_secs(*s)));
        assert_eq!(
            asked.last(),
            Some(160),
            "its last request within its token's life was the one at 100 s"
        );
    }

    #[test]
    fn after_its_token_a_client_gets_the_blobs_of_its_manifest_once_and_nothing_else() {
        let (access, [first, second, other], t) = pull(0);
        let late = t + LIFE + Duration::from_secs(1);
        access.served(client(1), &source("a"), &first, 999, t + LIFE);
        assert!(let_in(&access, &first, late), "the rest of it");
        access.served(client(1), &source("a"), &first, 1, late);
        assert!(!let_in(&access, &first, late), "it went out whole");
        assert!(let_in(&access, &second, late) && !let_in(&access, &other, late));
        access.readable(client(1), &source("a"), LIFE, None, late);
        assert!(let_in(&access, &first, late), "a new yes opens all");
    }

    #[test]
    fn a_refusal_ends_a_pull_within_the_life_of_its_token_only() {
        let (access, [first, ..], t) = pull(0);
        let late = t + LIFE + Duration::from_secs(1);
        access.served(client(1), &source("a"), &first, 1, t + LIFE);
        access.refused(client(1), &source("a"), late);
        assert!(let_in(&access, &first, late), "its token had run out");
        let (access, [first, ..], t) = pull(0);
        access.served(client(1), &source("a"), &first, 1, t);
        access.refused(client(1), &source("a"), t + Duration::from_secs(1));
        assert!(
            !let_in(&access, &first, t + Duration::from_secs(2)),
            "its token was revoked"
        );
    }

    #[test]
    fn a_manifest_that_was_read_too_late_begins_no_pull() {
        let (access, [first, ..], t) = pull(101);
        assert!(
            let_in(&access, &first, t + LIFE)
                && !let_in(&access, &first, t + LIFE + Duration::from_secs(1))
        );
    }

    #[test]
    fn what_belongs_to_one_repository_belongs_to_no_other() {
        let (a, b, digest, t) = (source("a"), source("b"), blob(), Instant::now());
        let access = access();
        access.readable(client(1), &a, LIFE, None, t);
        access.readable(client(1), &b, LIFE, None, t);
        access.belongs(&a, &digest, None, t);
        assert_eq!(
            access.standing(client(1), &b, &digest, &live(), t),
            Standing::Unknown
        );
    }

    #[test]
    fn a_refusal_takes_a_fact_back() {
        let (a, digest, t) = (source("a"), blob(), Instant::now());
        let access = access();
        for take_back in [
            (|access, source| access.refused(client(1), source, Instant::now()))
                as fn(&Access, &Source),
            |access, source| access.gone(source, &blob()),
        ] {
            access.readable(client(1), &a, LIFE, None, t);
            access.belongs(&a, &digest, Some(3), t);
            assert_eq!(
                access.standing(client(1), &a, &digest, &live(), t),
                Standing::Confirmed(Some(3))
            );
            take_back(&access, &a);
            assert_eq!(
                access.standing(client(1), &a, &digest, &live(), t),
                Standing::Unknown
            );
        }
    }

    #[test]
    fn what_a_manifest_names_is_looked_at_once_a_minute_for_each_repository() {
        let (access, t) = (access(), Instant::now());
        access.names(&source("a"), &blob(), &short_parts([blob()].iter()), t);
        let known = |repository, seconds| {
            access
                .parts_of(
                    &source(repository),
                    &blob(),
                    t + Duration::from_secs(seconds),
                )
                .is_some()
        };
        assert!(known("a", 0) && known("a", 59) && !known("b", 1) && !known("a", 60));
    }

    #[test]
    fn a_size_once_known_is_not_forgotten() {
        let (a, digest, t) = (source("a"), blob(), Instant::now());
        let access = access();
        access.readable(Caller::Anybody, &a, LIFE, None, t);
        access.belongs(&a, &digest, Some(3), t);
        access.belongs(&a, &digest, None, t);
        assert_eq!(
            access.standing(Caller::Anybody, &a, &digest, &live(), t),
            Standing::Confirmed(Some(3))
        );
    }
}
