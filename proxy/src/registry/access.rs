//! The two facts that come before bytes: this caller may read this repository, and this digest belongs to it.
//!
//! The first is remembered per caller, for as long as the origin's yes may count: for anybody a few minutes, and a grace while
//! the origin can't be asked; for a client with credentials at most as long as its token lives, and without any grace but for
//! the pull that is under way (a runtime can't renew its token in mid-pull). The second is a fact of the registry, whoever asks.

use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hawker_core::digest::Digest;
use hawker_core::reference::Source;
use lru::LruCache;
use tokio::time::Instant;

use crate::grant::Grant;
use crate::settings::LiveSettings;

/// How long a repository counts as readable by anybody before the origin is asked again.
const READABLE: Duration = Duration::from_secs(5 * 60);
/// How long a digest counts as part of a repository before the origin is asked again.
const BELONGS: Duration = Duration::from_secs(24 * 60 * 60);
/// How long after its token has run out a pull may be under way at most, however busy it is.
pub(super) const LONGEST_PULL: Duration = Duration::from_secs(60 * 60);
/// How long what a manifest names is not looked at again.
const READ: Duration = Duration::from_secs(60);
/// Facts of each kind that are remembered.
const CAPACITY: NonZeroUsize = NonZeroUsize::new(64 << 10).expect("not zero");

/// Who asks, as far as it matters for what is remembered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Caller {
    /// Without credentials: may have what this node has a right of its own to.
    Anybody,
    /// With credentials, of which this is the hash.
    Client(Digest),
}

/// What is known about a digest in a repository. Sizes are in bytes, where known.
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
    /// Manifests whose parts have been noted, and when.
    read: LruCache<(Source, Digest), Instant>,
}

/// The origin's yes to a caller.
struct Readable {
    confirmed: Instant,
    /// How long it counts.
    life: Duration,
    /// When the caller last asked for something and was let, or had got all of it.
    used: Instant,
    /// Answers on their way to it.
    open: u32,
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
    fn age(&self, caller: Caller, pull_grace: Duration, live: &Arc<LiveSettings>, now: Instant) -> Age {
        let age = now.saturating_duration_since(self.confirmed);
        let silent = if self.open > 0 { Duration::ZERO } else { now.saturating_duration_since(self.used) };
        match caller {
            _ if self.by.as_ref().is_some_and(|by| !Arc::ptr_eq(by, live)) => Age::Void,
            _ if age <= self.life => Age::Fresh,
            Caller::Anybody if self.by.is_none() && age <= live.staleness.public_grace => Age::Stale,
            Caller::Client(_) if silent <= pull_grace && age <= self.life + LONGEST_PULL => Age::Fresh,
            _ => Age::Void,
        }
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
    /// Whose right a grant is.
    pub(super) fn of(grant: &Grant) -> Self {
        grant.authorization.as_ref().map_or(Caller::Anybody, |a| Caller::Client(a.hash()))
    }
}

impl Access {
    pub(super) fn new(pull_grace: Duration) -> Self {
        let facts = Facts {
            readable: LruCache::new(CAPACITY),
            belongs: LruCache::new(CAPACITY),
            read: LruCache::new(CAPACITY),
        };
        Self { facts: Mutex::new(facts), pull_grace }
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
        readable.is_some_and(|r| r.age(caller, self.pull_grace, live, now) > Age::Void)
    }

    /// What is known at `now`. A fresh yes counts as used. `live`: the settings that count now, which also say how long what
    /// anybody could read counts while the origin can't be asked.
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
        let readable_age = readable.age(caller, self.pull_grace, live, now);
        match readable_age.min(belongs.age(live.staleness.public_grace, now)) {
            Age::Fresh => {
                readable.used = now;
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
        let life = if caller == Caller::Anybody { READABLE } else { life };
        let (key, mut facts) = ((caller, source.clone()), self.facts());
        let open = facts.readable.peek(&key).map_or(0, |before| before.open);
        facts.readable.put(key, Readable { confirmed: now, life, used: now, open, by });
    }

    /// An answer begins its way to the caller (`true`), or has ended it.
    pub(super) fn answering(&self, caller: Caller, source: &Source, begins: bool, now: Instant) {
        if let Some(readable) = self.facts().readable.get_mut(&(caller, source.clone())) {
            readable.open = if begins { readable.open + 1 } else { readable.open.saturating_sub(1) };
            readable.used = now;
        }
    }

    /// The origin, or a manifest read there, says that `digest` is part of the repository.
    pub(super) fn belongs(&self, source: &Source, digest: &Digest, size_bytes: Option<u64>, now: Instant) {
        let mut facts = self.facts();
        let key = (source.clone(), *digest);
        let size_bytes = size_bytes.or_else(|| facts.belongs.peek(&key).and_then(|b| b.size_bytes));
        facts.belongs.put(key, Belonging { confirmed: now, size_bytes });
    }

    /// Whether what a manifest of this repository names is to be noted: not again within a minute, as it may be long.
    pub(super) fn is_to_be_read(&self, source: &Source, manifest: &Digest, now: Instant) -> bool {
        let (mut facts, key) = (self.facts(), (source.clone(), *manifest));
        let fresh = facts.read.get(&key).is_some_and(|at| now.saturating_duration_since(*at) < READ);
        if !fresh {
            facts.read.put(key, now);
        }
        !fresh
    }

    /// The origin refuses the repository to this caller.
    pub(super) fn refused(&self, caller: Caller, source: &Source) {
        self.facts().readable.pop(&(caller, source.clone()));
    }

    /// The origin does not have the digest in this repository.
    pub(super) fn gone(&self, source: &Source, digest: &Digest) {
        self.facts().belongs.pop(&(source.clone(), *digest));
    }
}

#[cfg(test)]
mod tests {
    use hawker_core::digest::Algorithm;

    use super::*;
    use crate::settings::Staleness;

    const LIFE: Duration = Duration::from_secs(100);

    /// Settings with that grace for what is public.
    fn grace(public_grace: Duration) -> Arc<LiveSettings> {
        let staleness = Staleness { tags: None, public_grace };
        Arc::new(LiveSettings { staleness, ..LiveSettings::default() })
    }

    /// A day.
    fn live() -> Arc<LiveSettings> {
        grace(Duration::from_secs(24 * 60 * 60))
    }

    fn source(repository: &str) -> Source {
        Source { registry: "r.example".into(), repository: repository.into() }
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
        assert_eq!(access.standing(Caller::Anybody, &a, &digest, &live(), t), Standing::Unknown);
        access.readable(Caller::Anybody, &a, LIFE, None, t);
        assert_eq!(access.standing(Caller::Anybody, &a, &digest, &live(), t), Standing::Unknown);
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
        for (grace_hours, after, stale) in [(0, 1, false), (1, 1, true), (2, 3, false), (48, 47, true)] {
            let (live, at) = (grace(hours(grace_hours)), t + hours(after));
            let standing = access.standing(Caller::Anybody, &a, &digest, &live, at);
            assert_eq!(standing == Standing::Stale(None), stale, "{grace_hours} {after}");
            assert_eq!(access.reads(Caller::Anybody, &a, &live, at), stale, "{grace_hours} {after}");
            assert!(!access.reads(client(1), &a, &live, at), "{grace_hours} {after}");
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
        assert_eq!(standing(&after, t), Standing::Unknown, "the configuration was read anew");
        assert!(
            access.reads(Caller::Anybody, &a, &before, t) && !access.reads(Caller::Anybody, &a, &after, t)
        );
        assert_eq!(standing(&before, t + READABLE + Duration::from_secs(1)), Standing::Unknown);
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
        assert_eq!(access.standing(client(2), &a, &digest, &live(), t), Standing::Unknown);
        assert_eq!(access.standing(Caller::Anybody, &a, &digest, &live(), t), Standing::Unknown);
        assert_eq!(access.standing(client(1), &a, &digest, &live(), t), Standing::Confirmed(Some(1)));
        let silent = t + LIFE + Duration::from_secs(1);
        assert_eq!(access.standing(client(1), &a, &digest, &live(), silent), Standing::Unknown);
    }

    #[test]
    fn a_pull_outlives_its_token_as_long_as_it_goes_on_but_not_for_ever() {
        let (a, digest, t) = (source("a"), blob(), Instant::now());
        let access = access();
        access.readable(client(1), &a, LIFE, None, t);
        access.belongs(&a, &digest, None, t);
        let let_in = |seconds| {
            let at = t + Duration::from_secs(seconds);
            access.standing(client(1), &a, &digest, &live(), at) == Standing::Confirmed(None)
        };
        let last = (0..10_000).step_by(50).take_while(|at| let_in(*at)).last();
        assert_eq!(last, Some(3700), "the token's 100 s and an hour");
        access.readable(client(1), &a, LIFE, None, t);
        assert!(let_in(90) && let_in(140) && !let_in(201), "61 s of silence end it");
        access.answering(client(1), &a, true, t);
        assert!(let_in(1000), "while a body is on its way it is not silent");
        access.answering(client(1), &a, false, t + Duration::from_secs(2000));
        assert!(let_in(2059) && !let_in(2130));
    }

    #[test]
    fn what_belongs_to_one_repository_belongs_to_no_other() {
        let (a, b, digest, t) = (source("a"), source("b"), blob(), Instant::now());
        let access = access();
        access.readable(client(1), &a, LIFE, None, t);
        access.readable(client(1), &b, LIFE, None, t);
        access.belongs(&a, &digest, None, t);
        assert_eq!(access.standing(client(1), &b, &digest, &live(), t), Standing::Unknown);
    }

    #[test]
    fn a_refusal_takes_a_fact_back() {
        let (a, digest, t) = (source("a"), blob(), Instant::now());
        let access = access();
        for take_back in [
            (|access, source| access.refused(client(1), source)) as fn(&Access, &Source),
            |access, source| access.gone(source, &blob()),
        ] {
            access.readable(client(1), &a, LIFE, None, t);
            access.belongs(&a, &digest, Some(3), t);
            assert_eq!(access.standing(client(1), &a, &digest, &live(), t), Standing::Confirmed(Some(3)));
            take_back(&access, &a);
            assert_eq!(access.standing(client(1), &a, &digest, &live(), t), Standing::Unknown);
        }
    }

    #[test]
    fn what_a_manifest_names_is_looked_at_once_a_minute_for_each_repository() {
        let (access, t) = (access(), Instant::now());
        let read = |repository, seconds| {
            access.is_to_be_read(&source(repository), &blob(), t + Duration::from_secs(seconds))
        };
        assert!(read("a", 0) && !read("a", 59) && read("b", 1) && read("a", 60) && !read("a", 61));
    }

    #[test]
    fn a_size_once_known_is_not_forgotten() {
        let (a, digest, t) = (source("a"), blob(), Instant::now());
        let access = access();
        access.readable(Caller::Anybody, &a, LIFE, None, t);
        access.belongs(&a, &digest, Some(3), t);
        access.belongs(&a, &digest, None, t);
        assert_eq!(access.standing(Caller::Anybody, &a, &digest, &live(), t), Standing::Confirmed(Some(3)));
    }
}
