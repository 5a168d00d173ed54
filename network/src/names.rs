//! Name look-ups. Every connection by name goes through here.
//!
//! The C library looks names up and blocks a thread for as long as a silent name server lets it. Such threads are separate from
//! those that do disk work, and each kind of asker has its own bounded number of them. Names that clients choose therefore hold up
//! neither the configured registries, nor the members, nor the names that have resolved before. A look-up has a deadline, is made
//! once for all who wait for the same name, and a name that failed is not looked up again for a while.

use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs as _};
use std::num::NonZeroUsize;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use lru::LruCache;
use tokio::sync::{Semaphore, oneshot, watch};
use tokio::time::{Instant, timeout, timeout_at};

/// For one look-up, the wait for a thread included.
const DEADLINE: Duration = Duration::from_secs(5);
/// How long an answer counts. Many connections to one registry are often made at once.
const FRESH: Duration = Duration::from_secs(5);
/// How long an old answer stands in for a look-up that fails or takes longer than [`PATIENCE`].
const STALE: Duration = Duration::from_secs(10 * 60);
/// How long a new answer is waited for where there is an old one.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long a name that a client chose is not looked up again after it failed.
const FAILED: Duration = Duration::from_secs(30);
/// The same for names of the configuration and of members: their name server may just be starting.
const FAILED_OWN: Duration = Duration::from_secs(5);
/// Names remembered.
const CAPACITY: NonZeroUsize = NonZeroUsize::new(4096).expect("not zero");
/// Threads for each kind of asker.
const THREADS: [usize; 4] = [16, 16, 32, 32];
/// The stack of a thread that looks a name up, in bytes. Modules of the C library's name service take some.
const STACK_BYTES: usize = 512 << 10;
/// Longest name (RFC 1035, 2.3.4), with a trailing dot.
const MAX_NAME_BYTES: usize = 254;

/// The origin of a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NamedBy {
    /// The configuration: schedulers, seeds, registries, realms, proxies.
    Configuration,
    /// A member of the cluster.
    Member,
    /// A client, or a registry's answer.
    Client,
}

/// The reason why a name has no address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// The name server, or the hosts file, knows no such name.
    #[error("the name does not resolve: {0}")]
    Failed(String),
    /// No answer came in time.
    #[error("the name did not resolve in time; check the name servers of this node")]
    Slow,
    /// Too many other names wait for their answers.
    #[error("the name was not looked up: too many other names wait for an answer")]
    Busy,
}

/// The addresses of `host`, a name or an address (IPv6 with or without brackets), in the system's order of preference.
pub async fn resolve(
    host: &str,
    port: u16,
    named_by: NamedBy,
) -> Result<Vec<SocketAddr>, NameError> {
    static NAMES: LazyLock<Names> = LazyLock::new(|| Names::new(system));
    let addresses = NAMES.resolve(host, named_by).await?;
    Ok(addresses
        .into_iter()
        .map(|address| SocketAddr::new(address, port))
        .collect())
}

/// The same for `host:port`.
pub async fn resolve_address(
    address: &str,
    named_by: NamedBy,
) -> Result<Vec<SocketAddr>, NameError> {
    let parts = address
        .rsplit_once(':')
        .and_then(|(host, port)| Some((host, port.parse().ok()?)));
    let (host, port) = parts.ok_or_else(|| NameError::Failed("it is not HOST:PORT".to_owned()))?;
    resolve(host, port, named_by).await
}

/// Asks the C library. It blocks.
fn system(name: &str) -> io::Result<Vec<IpAddr>> {
    Ok((name, 0)
        .to_socket_addrs()?
        .map(|address| address.ip())
        .collect())
}

type Lookup = fn(&str) -> io::Result<Vec<IpAddr>>;

struct Names {
    lookup: Lookup,
    /// Free threads by kind of asker.
    threads: [Arc<Semaphore>; 4],
    known: Arc<Mutex<LruCache<String, Known>>>,
}

/// The state of one name.
#[derive(Default)]
struct Known {
    answer: Option<(Vec<IpAddr>, Instant)>,
    failure: Option<(NameError, Instant)>,
    /// A thread looks the name up, or did so last.
    has_begun: bool,
    /// A look-up under way. The sender is dropped when it is over.
    under_way: Option<watch::Receiver<()>>,
}

impl Known {
    fn answer(&self, now: Instant, age: Duration) -> Option<Vec<IpAddr>> {
        let (addresses, since) = self.answer.as_ref()?;
        (now.duration_since(*since) < age).then(|| addresses.clone())
    }
}

impl Names {
    fn new(lookup: Lookup) -> Self {
        Self {
            lookup,
            threads: THREADS.map(|count| Arc::new(Semaphore::new(count))),
            known: Arc::new(Mutex::new(LruCache::new(CAPACITY))),
        }
    }

    async fn resolve(&self, host: &str, named_by: NamedBy) -> Result<Vec<IpAddr>, NameError> {
        let bare = host
            .strip_prefix('[')
            .and_then(|host| host.strip_suffix(']'))
            .unwrap_or(host);
        if let Ok(address) = bare.parse() {
            return Ok(vec![address]);
        }
        if bare.is_empty() || bare.len() > MAX_NAME_BYTES {
            return Err(NameError::Failed("it is no name".to_owned()));
        }
        let (name, now) = (bare.to_ascii_lowercase(), Instant::now());
        let deadline = now + DEADLINE;
        let (mut over, old) = {
            let mut all = lock(&self.known);
            let known = all.get_or_insert_mut(name.clone(), Known::default);
            if let Some(addresses) = known.answer(now, FRESH) {
                return Ok(addresses);
            }
            let old = known.answer(now, STALE);
            let forget = if named_by == NamedBy::Client {
                FAILED
            } else {
                FAILED_OWN
            };
            if let Some((failure, since)) = &known.failure
                && now.duration_since(*since) < forget
            {
                return old.ok_or_else(|| failure.clone());
            }
            let is_over = |over: &watch::Receiver<()>| over.has_changed().is_err();
            let over = match known.under_way.clone().filter(|over| !is_over(over)) {
                Some(over) => over,
                None => {
                    let kind = kind_of(named_by, known.answer.is_some());
                    let over = self.start(name.clone(), kind, deadline);
                    known.under_way = Some(over.clone());
                    known.has_begun = false;
                    over
                }
            };
            (over, old)
        };
        let until = if old.is_some() {
            now + PATIENCE
        } else {
            deadline
        };
        // The sender never sends: this ends with an error when the look-up is over.
        let is_over = timeout_at(until, over.changed()).await.is_ok();
        let mut all = lock(&self.known);
        let known = all.get_or_insert_mut(name, Known::default);
        let now = Instant::now();
        if let Some(addresses) = known.answer(now, FRESH).or(old) {
            return Ok(addresses);
        }
        if !is_over && known.has_begun && known.failure.is_none() {
            known.failure = Some((NameError::Slow, now));
        }
        Err(known
            .failure
            .as_ref()
            .map_or(NameError::Busy, |(failure, _)| failure.clone()))
    }

    /// Looks a name up on a thread of its own. The look-up goes on when nobody waits any more.
    fn start(&self, name: String, kind: usize, deadline: Instant) -> watch::Receiver<()> {
        let (going_on, over) = watch::channel(());
        let (threads, known, lookup) = (
            Arc::clone(&self.threads[kind]),
            Arc::clone(&self.known),
            self.lookup,
        );
        tokio::spawn(async move {
            let _going_on = going_on;
            let Ok(Ok(place)) = timeout_at(deadline, threads.acquire_owned()).await else {
                // This says nothing about the name, and is not remembered.
                let mut all = lock(&known);
                let known = all.get_or_insert_mut(name, Known::default);
                known.failure = None;
                return;
            };
            lock(&known)
                .get_or_insert_mut(name.clone(), Known::default)
                .has_begun = true;
            let (done, answer) = oneshot::channel();
            let asked = name.clone();
            let work = move || {
                let _ = done.send(lookup(&asked));
                drop(place);
            };
            let thread = thread::Builder::new()
                .name("name look-up".to_owned())
                .stack_size(STACK_BYTES);
            let answer = match thread.spawn(work) {
                // No look-up of the C library takes longer than a few minutes.
                Ok(_) => timeout(Duration::from_secs(600), answer).await,
                Err(error) => Ok(Ok(Err(error))),
            };
            let now = Instant::now();
            let mut all = lock(&known);
            let known = all.get_or_insert_mut(name, Known::default);
            known.failure = None;
            match answer {
                Ok(Ok(Ok(addresses))) if !addresses.is_empty() => {
                    known.answer = Some((addresses, now))
                }
                Ok(Ok(Ok(_))) => {
                    known.failure = Some((NameError::Failed("it has no address".into()), now))
                }
                Ok(Ok(Err(error))) => {
                    known.failure = Some((NameError::Failed(error.to_string()), now))
                }
                Ok(Err(_)) | Err(_) => known.failure = Some((NameError::Slow, now)),
            }
        });
        over
    }
}

fn kind_of(named_by: NamedBy, has_resolved: bool) -> usize {
    match named_by {
        NamedBy::Configuration => 0,
        NamedBy::Member => 1,
        NamedBy::Client if has_resolved => 2,
        NamedBy::Client => 3,
    }
}

fn lock(known: &Mutex<LruCache<String, Known>>) -> MutexGuard<'_, LruCache<String, Known>> {
    known.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

    use super::*;

    const ADDRESS: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1));

    /// Names that begin with `silent` never get an answer within a test; `bad` does not exist.
    fn scripted(name: &str) -> io::Result<Vec<IpAddr>> {
        if name.starts_with("silent") {
            thread::sleep(Duration::from_secs(20));
        }
        if name.starts_with("bad") {
            Err(io::Error::other("no such name"))
        } else {
            Ok(vec![ADDRESS])
        }
    }

    #[tokio::test]
    async fn addresses_are_not_looked_up() {
        let names = Names::new(|name| panic!("{name} was looked up"));
        for (host, address) in [
            ("127.0.0.1", "127.0.0.1"),
            ("[::1]", "::1"),
            ("fd00::1", "fd00::1"),
        ] {
            let found = names.resolve(host, NamedBy::Client).await;
            assert_eq!(found, Ok(vec![address.parse().unwrap()]), "{host}");
        }
        for host in ["", "[]", &"a".repeat(300)] {
            assert!(
                names.resolve(host, NamedBy::Client).await.is_err(),
                "{host}"
            );
        }
    }

    #[tokio::test]
    async fn silent_names_of_clients_delay_no_other_kind_of_name() {
        let names = Arc::new(Names::new(scripted));
        assert_eq!(
            names.resolve("seen.example", NamedBy::Client).await,
            Ok(vec![ADDRESS])
        );
        lock(&names.known)
            .get_mut("seen.example")
            .unwrap()
            .answer
            .as_mut()
            .unwrap()
            .1 -= FRESH;
        let mut waiting = tokio::task::JoinSet::new();
        for i in 0..4000 {
            let names = Arc::clone(&names);
            waiting
                .spawn(async move { names.resolve(&format!("silent{i}"), NamedBy::Client).await });
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
        for (name, named_by) in [
            ("reg.example", NamedBy::Configuration),
            ("node.example", NamedBy::Member),
            ("seen.example", NamedBy::Client),
        ] {
            let begun = Instant::now();
            assert_eq!(
                names.resolve(name, named_by).await,
                Ok(vec![ADDRESS]),
                "{name}"
            );
            assert!(
                begun.elapsed() < Duration::from_millis(500),
                "{name} {:?}",
                begun.elapsed()
            );
        }
        let begun = Instant::now();
        assert!(waiting.join_all().await.iter().all(Result::is_err));
        assert!(
            begun.elapsed() < DEADLINE + Duration::from_secs(3),
            "{:?}",
            begun.elapsed()
        );
        let begun = Instant::now();
        assert_eq!(
            names.resolve("silent0", NamedBy::Client).await,
            Err(NameError::Slow)
        );
        assert!(begun.elapsed() < Duration::from_millis(100), "remembered");
    }

    #[tokio::test]
    async fn one_look_up_serves_all_and_its_outcome_is_remembered() {
        static LOOK_UPS: AtomicUsize = AtomicUsize::new(0);
        let names = Arc::new(Names::new(|name| {
            LOOK_UPS.fetch_add(1, Relaxed);
            thread::sleep(Duration::from_millis(50));
            scripted(name)
        }));
        for (name, works) in [("good.example", true), ("bad.example", false)] {
            LOOK_UPS.store(0, Relaxed);
            let mut all = tokio::task::JoinSet::new();
            for _ in 0..20 {
                let names = Arc::clone(&names);
                all.spawn(async move { names.resolve(name, NamedBy::Client).await.is_ok() });
            }
            assert_eq!(all.join_all().await, [works; 20]);
            assert_eq!(
                names
                    .resolve(&name.to_uppercase(), NamedBy::Client)
                    .await
                    .is_ok(),
                works
            );
            assert_eq!(LOOK_UPS.load(Relaxed), 1, "{name}");
        }
    }

    #[tokio::test]
    async fn an_old_answer_stands_in_for_a_look_up_that_fails_or_is_slow() {
        for name in ["bad.example", "silent.example"] {
            let names = Names::new(scripted);
            let long_ago = Instant::now() - FRESH;
            let old = Known {
                answer: Some((vec![ADDRESS], long_ago)),
                ..Known::default()
            };
            lock(&names.known).put(name.to_owned(), old);
            let begun = Instant::now();
            assert_eq!(
                names.resolve(name, NamedBy::Client).await,
                Ok(vec![ADDRESS]),
                "{name}"
            );
            assert!(
                begun.elapsed() < PATIENCE + Duration::from_millis(500),
                "{name}"
            );
        }
    }
}
