//! Which registries have which content: they gave it to this node, a seed or an issuer said so, or they proved it.
//!
//! A registry's HEAD, or a manifest of its own, only claims that it has a blob. Content that this node holds from elsewhere goes to
//! that registry's clients after the proof: the registry sends a random part of it ([`hawker_core::proof`]) and this node compares.
//! A registry without the bytes can't answer, and one that has them learns nothing.

use std::collections::HashMap;
use std::net::IpAddr;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ::lru::LruCache;
use bytes::{Bytes, BytesMut};
use hawker_core::lru;
use hawker_core::piece::{PieceIndex, PieceSet, PieceTable};
use hawker_core::proof;
use hawker_oci::digest::{Algorithm, Digest};
use hawker_oci::reference::Source;
use http::header::{CONTENT_ENCODING, RANGE};
use http::{HeaderMap, HeaderValue, StatusCode};
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout};

use crate::download::Segment;
use crate::origin::ranges::{content_range_start, skip};
use crate::origin::{Content, Origin, OriginBody, OriginError, Target};
use crate::settings::LiveSettings;
use crate::store::TaskStore;
use hawker_lanes::{self as lanes, Lane};

/// Facts that are kept in memory; the store keeps those about what it holds.
const CAPACITY: NonZeroUsize = NonZeroUsize::new(64 << 10).expect("not zero");
/// Registries and clients whose proofs under way are counted.
const COUNTED: NonZeroUsize = NonZeroUsize::new(1024).expect("not zero");
/// Proofs under way for one registry, and for one client.
const AT_ONCE: usize = 8;
/// Tasks in play whose givers are remembered; the clients of registries of more must prove what they have.
const TASKS: usize = 8192;
/// Registries that may be named as givers of one task.
const GIVERS: usize = 4;
/// From the first wait to the last byte compared. Runtimes wait 30 s for an answer.
const WITHIN: Duration = Duration::from_secs(20);
/// A registry that sent wrong bytes is not asked again for this long.
const FAILED_FOR: Duration = Duration::from_secs(30);
/// Bytes that a registry that ignores `Range` may send before the compared part.
const MAX_SKIP_BYTES: u64 = 64 << 20;

/// Why a registry has not proved that it has some content.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum Unproved {
    /// It sent other bytes than this node holds.
    #[error("it has not proved that it has {0}")]
    Wrong(Digest),
    /// It did not send the bytes.
    #[error("it answered {0} when it was asked to prove that it has the content")]
    Refused(StatusCode, HeaderMap),
    /// It could not be asked.
    #[error(transparent)]
    Origin(#[from] OriginError),
    /// It did not send them in time.
    #[error("it did not prove in time that it has the content")]
    Slow,
    /// Nothing follows from its answer, or the content is too regular. All of it can still come from the registry itself.
    #[error("it can't prove that it has {0}")]
    Unclear(Digest),
}

/// A request for a proof, about one registry.
pub(crate) struct Asking<'a> {
    pub(crate) source: &'a Source,
    /// The client's right, and what else the registry should see.
    pub(crate) headers: HeaderMap,
    pub(crate) client: IpAddr,
}

/// The facts about possession on this node.
pub struct Proofs {
    store: Arc<dyn TaskStore>,
    origin: Origin,
    facts: Mutex<Facts>,
    /// The files of the store are read and then written.
    writing: Mutex<()>,
    /// The secret that decides which part of a task is compared, chosen at random when the daemon starts.
    secret: [u8; 32],
}

struct Facts {
    proved: LruCache<(String, Digest), ()>,
    failed: LruCache<(String, Digest), Instant>,
    /// Of the tasks in play: which pieces each registry gave.
    given: HashMap<Digest, Vec<Giver>>,
    turns: LruCache<Turn, Arc<Semaphore>>,
}

struct Giver {
    registry: String,
    pieces: PieceSet,
}

#[derive(Clone, PartialEq, Eq, Hash)]
enum Turn {
    Registry(String),
    Client(IpAddr),
}

impl Proofs {
    /// Nothing is known yet but what the store has noted.
    pub fn new(store: Arc<dyn TaskStore>, origin: Origin) -> Arc<Self> {
        let facts = Facts {
            proved: lru::bounded(CAPACITY),
            failed: lru::bounded(CAPACITY),
            given: HashMap::new(),
            turns: lru::bounded(COUNTED),
        };
        Arc::new(Self {
            store,
            origin,
            facts: Mutex::new(facts),
            writing: Mutex::new(()),
            secret: rand::random(),
        })
    }

    fn facts(&self) -> MutexGuard<'_, Facts> {
        self.facts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether this registry's clients may have the content: the configuration names the registry, or it has proved it.
    pub(crate) async fn knows(
        self: &Arc<Self>,
        live: &LiveSettings,
        registry: &str,
        digest: &Digest,
    ) -> bool {
        live.registries.is_believed(registry) || self.has_proved(registry, digest).await
    }

    /// Whether the registry has given or proved the content, by what is in memory.
    pub(crate) fn is_proved(&self, registry: &str, digest: &Digest) -> bool {
        self.facts()
            .proved
            .get(&(registry.to_owned(), *digest))
            .is_some()
    }

    /// The same, by what is on disk as well.
    pub(crate) async fn has_proved(self: &Arc<Self>, registry: &str, digest: &Digest) -> bool {
        if self.is_proved(registry, digest) {
            return true;
        }
        let (proofs, task) = (Arc::clone(self), *digest);
        // A failure to read says no more than that nothing is known.
        let _ = lanes::run(Lane::Clients, move || proofs.recall(&task)).await;
        self.is_proved(registry, digest)
    }

    /// Whether the registry failed to give the content a moment ago.
    pub(crate) fn has_failed(&self, registry: &str, digest: &Digest) -> bool {
        let mut facts = self.facts();
        facts
            .failed
            .get(&(registry.to_owned(), *digest))
            .is_some_and(|at| at.elapsed() < FAILED_FOR)
    }

    /// It was this node that had wrong bytes.
    pub(crate) fn forget_failure(&self, registry: &str, digest: &Digest) {
        self.facts().failed.pop(&(registry.to_owned(), *digest));
    }

    /// The registry did not give the content.
    pub(crate) fn note_failure(&self, registry: &str, digest: &Digest) {
        self.facts()
            .failed
            .put((registry.to_owned(), *digest), Instant::now());
    }

    /// Takes in what the disk says about a digest. Blocking.
    fn recall(&self, digest: &Digest) {
        let names = self.store.origins(digest);
        let mut facts = self.facts();
        for name in names {
            facts.proved.put((name, *digest), ());
        }
    }

    /// A registry gave the whole content, or proved that it has it.
    pub(crate) fn note(self: &Arc<Self>, registry: &str, digest: &Digest) {
        {
            let mut facts = self.facts();
            let key = (registry.to_owned(), *digest);
            facts.failed.pop(&key);
            facts.proved.put(key, ());
        }
        self.write(registry, digest);
    }

    fn write(self: &Arc<Self>, registry: &str, digest: &Digest) {
        let (proofs, registry, digest) = (Arc::clone(self), registry.to_owned(), *digest);
        lanes::start(Lane::Upkeep, move || {
            let _writing = proofs
                .writing
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            if let Err(error) = proofs.store.add_origin(&digest, &registry) {
                tracing::debug!(%digest, registry, %error, "the registry will have to prove again that it has this");
            }
        });
    }

    // ---- tasks in play ------------------------------------------------------------------------------------------

    /// A registry gave these pieces of a task, which has `count`.
    pub(crate) fn gave(
        &self,
        task: &Digest,
        registry: &str,
        pieces: Range<PieceIndex>,
        count: u32,
    ) {
        let mut facts = self.facts();
        let is_full = facts.given.len() >= TASKS && !facts.given.contains_key(task);
        if registry.is_empty() || count == 0 || is_full {
            return;
        }
        let givers = facts.given.entry(*task).or_default();
        givers.retain(|giver| giver.pieces.count() == count);
        if let Some(giver) = givers.iter_mut().find(|giver| giver.registry == registry) {
            giver.pieces.insert_range(pieces);
        } else if givers.len() < GIVERS {
            let mut set = PieceSet::empty(count);
            set.insert_range(pieces);
            givers.push(Giver {
                registry: registry.to_owned(),
                pieces: set,
            });
        }
    }

    /// A committed blob is in play again: notes the facts on the disk about it. Blocking.
    pub(crate) fn reopened(&self, table: &PieceTable) {
        let count = table.layout().count();
        for registry in self.store.origins(table.task()) {
            self.gave(table.task(), &registry, 0..count, count);
        }
        self.claims(table);
    }

    /// Notes the registries that an issuer that counts names in its table.
    pub(crate) fn claims(&self, table: &PieceTable) {
        let Some(signed) = table.signed() else { return };
        let count = table.layout().count();
        let covered = if signed.sealed {
            count
        } else {
            signed.count.min(count)
        };
        for registry in &signed.registries {
            self.gave(table.task(), registry, 0..covered, count);
        }
    }

    /// The registries that gave the first `pieces` of a task, or have proved to have it: this node may sign them as an
    /// issuer.
    pub(crate) fn givers(&self, task: &Digest, pieces: u32) -> Vec<String> {
        let facts = self.facts();
        let gave = facts.given.get(task).into_iter().flatten();
        let mut names: Vec<String> = gave
            .filter(|giver| {
                facts.proved.contains(&(giver.registry.clone(), *task))
                    || pieces > 0 && giver.pieces.first_missing(0) >= pieces
            })
            .map(|giver| giver.registry.clone())
            .collect();
        names.sort_unstable();
        names
    }

    /// The task is committed: a registry that gave all of it has all of it.
    pub(crate) fn settle(self: &Arc<Self>, task: &Digest) {
        let whole: Vec<String> = {
            let facts = self.facts();
            let givers = facts.given.get(task).into_iter().flatten();
            givers
                .filter(|giver| giver.pieces.is_full())
                .map(|giver| giver.registry.clone())
                .collect()
        };
        whole.iter().for_each(|registry| self.note(registry, task));
    }

    /// Forgets a task: its bytes turned out to be wrong, or nobody needs it any more.
    pub(crate) fn forget(&self, task: &Digest) {
        self.facts().given.remove(task);
    }

    /// Takes out of `pieces` those that the registry gave.
    pub(crate) fn subtract_given(&self, registry: &str, task: &Digest, pieces: &mut PieceSet) {
        let facts = self.facts();
        let mut givers = facts.given.get(task).into_iter().flatten();
        if let Some(giver) = givers
            .find(|giver| giver.registry == registry && giver.pieces.count() == pieces.count())
        {
            pieces.subtract(&giver.pieces);
        }
    }

    /// Whether the registry gave this piece.
    pub(crate) fn has_given(&self, registry: &str, task: &Digest, piece: PieceIndex) -> bool {
        let facts = self.facts();
        let mut givers = facts.given.get(task).into_iter().flatten();
        givers.any(|giver| giver.registry == registry && giver.pieces.contains(piece))
    }

    // ---- proof --------------------------------------------------------------------------------------------------

    /// Makes a registry prove that it has a task, by a random part of what is `held` here; `read` gives those bytes.
    pub(crate) async fn challenge(
        &self,
        asking: &Asking<'_>,
        task: &Digest,
        held: &[Range<u64>],
        read: impl Fn(&Range<u64>) -> Option<Segment>,
    ) -> Result<(), Unproved> {
        if self.has_failed(&asking.source.registry, task) {
            return Err(Unproved::Wrong(*task));
        }
        let proved = Box::pin(async {
            let turns = [
                Turn::Client(asking.client),
                Turn::Registry(asking.source.registry.clone()),
            ];
            let [client, registry] = turns.map(|turn| self.turn(turn));
            let (_client, _registry) = (client.acquire().await, registry.acquire().await);
            let (window, expected) = self
                .draw(task, held, read)
                .await
                .ok_or(Unproved::Unclear(*task))?;
            self.compare(asking, task, window, &expected).await
        });
        let proved = timeout(WITHIN, proved).await.unwrap_or(Err(Unproved::Slow));
        if let Err(reason) = &proved {
            let registry = &asking.source.registry;
            tracing::info!(registry, %task, %reason, "the registry has not proved that it has the content");
            if matches!(reason, Unproved::Wrong(_)) {
                self.note_failure(registry, task);
            }
        }
        proved
    }

    fn turn(&self, of: Turn) -> Arc<Semaphore> {
        let mut facts = self.facts();
        Arc::clone(
            facts
                .turns
                .get_or_insert(of, || Arc::new(Semaphore::new(AT_ONCE))),
        )
    }

    /// A part of what is held, and its bytes; `None` when no part is hard enough to guess.
    ///
    /// Nobody outside can foresee which part it is, and as long as the same is held it is the same part for every registry that is
    /// asked. Otherwise a registry that has a little of the task could leave questions unanswered until one is about that.
    async fn draw(
        &self,
        task: &Digest,
        held: &[Range<u64>],
        read: impl Fn(&Range<u64>) -> Option<Segment>,
    ) -> Option<(Range<u64>, Bytes)> {
        for turn in 0..proof::DRAWS {
            let window = proof::window(held, self.chance(task, turn))?;
            let Some(bytes) = bytes_of(read(&window)).await else {
                continue;
            };
            if bytes.len() as u64 == window.end - window.start && proof::is_hard_to_guess(&bytes) {
                return Some((window, bytes));
            }
        }
        None
    }

    /// A number that only this daemon can compute.
    fn chance(&self, task: &Digest, turn: usize) -> u64 {
        let seed = [
            &self.secret[..],
            task.to_string().as_bytes(),
            &turn.to_be_bytes(),
        ]
        .concat();
        let hash = Digest::of(Algorithm::Sha256, &seed);
        hash.as_bytes()
            .first_chunk()
            .map_or(0, |bytes| u64::from_be_bytes(*bytes))
    }

    async fn compare(
        &self,
        asking: &Asking<'_>,
        task: &Digest,
        window: Range<u64>,
        expected: &[u8],
    ) -> Result<(), Unproved> {
        let mut headers = asking.headers.clone();
        let range = HeaderValue::try_from(format!("bytes={}-{}", window.start, window.end - 1));
        headers.insert(RANGE, range.expect("digits are a header's value"));
        let target = Target {
            source: asking.source.clone(),
            content: Content::Blob(*task),
        };
        let answer = self.origin.get(&target, &headers).await?;
        if answer
            .headers()
            .get(CONTENT_ENCODING)
            .is_some_and(|e| !e.as_bytes().eq_ignore_ascii_case(b"identity"))
        {
            return Err(Unproved::Unclear(*task));
        }
        let (body, first) = match answer.status() {
            StatusCode::PARTIAL_CONTENT
                if content_range_start(answer.headers()) == Some(window.start) =>
            {
                (answer.into_body(), Bytes::new())
            }
            StatusCode::OK if window.start <= MAX_SKIP_BYTES => {
                let skipped = skip(answer.into_body(), window.start).await;
                skipped.map_err(|_| Unproved::Wrong(*task))?
            }
            StatusCode::OK | StatusCode::PARTIAL_CONTENT => return Err(Unproved::Unclear(*task)),
            StatusCode::RANGE_NOT_SATISFIABLE => return Err(Unproved::Wrong(*task)),
            status => return Err(Unproved::Refused(status, answer.headers().clone())),
        };
        let sent = read_exactly(body, first, expected.len()).await?;
        if sent.is_some_and(|sent| sent == expected) {
            Ok(())
        } else {
            Err(Unproved::Wrong(*task))
        }
    }
}

/// The first `len` bytes; `None` when there are fewer.
async fn read_exactly(
    mut body: OriginBody,
    first: Bytes,
    len: usize,
) -> Result<Option<Bytes>, Unproved> {
    let mut bytes = BytesMut::from(&first[..first.len().min(len)]);
    while bytes.len() < len {
        let Some(chunk) = body.next().await.transpose()? else {
            return Ok(None);
        };
        bytes.extend_from_slice(&chunk[..chunk.len().min(len - bytes.len())]);
    }
    Ok(Some(bytes.freeze()))
}

async fn bytes_of(segment: Option<Segment>) -> Option<Bytes> {
    match segment? {
        Segment::Memory(bytes) | Segment::Passed(bytes) => Some(bytes),
        Segment::File { file, range } => {
            let read = move || {
                let mut bytes = vec![0; usize::try_from(range.end - range.start).ok()?];
                file.read_exact_at(&mut bytes, range.start).ok()?;
                Some(Bytes::from(bytes))
            };
            lanes::run(Lane::Clients, read).await?
        }
    }
}
