//! The origin registry of tests and benches: it serves blobs and manifests, notes every request, and misbehaves on demand.
//!
//! It runs on a thread of its own, so that the work of a test or bench does not hold it up; started from a thread
//! inside a network namespace, it stays there. Its faults can be changed at any time, through [`Origin`] or the
//! control port:
//!
//! | request to the control port | what for |
//! |---|---|
//! | `POST /blobs` `{"repository", "seed", "size_bytes"}` or `{"repository", "file"}` | add a blob; `{"digest", "size_bytes"}` |
//! | `POST /manifests` `{"repository", "reference", "media_type", "text"}` | add a manifest; `{"digest", "size_bytes"}` |
//! | `POST /faults` a [`Rule`] | add a fault; `{"id"}` |
//! | `DELETE /faults`, `DELETE /faults/ID` | end all faults, or one |
//! | `GET /log`, `DELETE /log` | the requests so far ([`Entry`]); forget them |
//! | `GET /totals` | [`Totals`] of the log |

mod answer;
mod content;
mod control;
mod fault;
pub(crate) mod http;
mod log;
mod serve;

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;

use hawker_oci::digest::{Algorithm, Digest};
use oci_spec::image::{DescriptorBuilder, ImageManifestBuilder, MediaType};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;

pub use content::Content;
pub use fault::{Fault, Rule};
pub use log::{Entry, Totals};

/// The addresses of an origin.
pub struct OriginConfig {
    /// The address for registry clients; port 0 picks a free one.
    pub listen: SocketAddr,
    /// The address of the control port, if there is to be one.
    pub control: Option<SocketAddr>,
    /// Serve HTTPS with this certificate.
    pub tls: Option<Arc<rustls::ServerConfig>>,
}

impl OriginConfig {
    /// Plain HTTP here, without a control port.
    pub const fn http(listen: SocketAddr) -> Self {
        Self {
            listen,
            control: None,
            tls: None,
        }
    }
}

/// A running origin; dropping it closes every connection and the port.
pub struct Origin {
    state: Arc<State>,
    address: SocketAddr,
    control_address: Option<SocketAddr>,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// A blob that the origin holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blob {
    /// Its digest.
    pub digest: Digest,
    /// Its length.
    pub size_bytes: u64,
}

impl Origin {
    /// Starts an origin, and returns once it listens.
    ///
    /// # Errors
    /// When the thread cannot start, or an address cannot be bound.
    pub fn start(config: OriginConfig) -> io::Result<Self> {
        let state = Arc::new(State::default());
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let (ready, started) = mpsc::sync_channel(1);
        let theirs = Arc::clone(&state);
        let thread = std::thread::Builder::new()
            .name("origin".to_owned())
            .spawn(move || {
                let outcome = Listeners::open(config, theirs);
                let (report, listeners) = match outcome {
                    Ok(listeners) => (listeners.addresses(), Some(listeners)),
                    Err(error) => (Err(error), None),
                };
                // Nobody waits for the report only when `start` itself is gone.
                let _ = ready.send(report);
                if let Some(listeners) = listeners {
                    listeners.run(stopped);
                }
            })?;
        let (address, control_address) = started.recv().map_err(io::Error::other)??;
        Ok(Self {
            state,
            address,
            control_address,
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    /// The address for registry clients.
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// The address of the control port, if there is one.
    pub const fn control_address(&self) -> Option<SocketAddr> {
        self.control_address
    }

    /// Adds a blob to a repository. Reads it once, for its digest.
    ///
    /// # Errors
    /// When its file cannot be read.
    pub fn add_blob(&self, repository: &str, content: Content) -> io::Result<Blob> {
        self.state.add_blob(repository, content, Algorithm::Sha256)
    }

    /// Adds content under a digest that it need not have: a blob too long to be read for its digest.
    pub fn add_claimed_blob(&self, repository: &str, digest: &Digest, content: Content) {
        lock(&self.state.shelves)
            .blobs
            .insert((repository.to_owned(), digest.to_string()), content);
    }

    /// Adds a blob whose digest is by this algorithm.
    ///
    /// # Errors
    /// When its file cannot be read.
    pub fn add_blob_by(
        &self,
        algorithm: Algorithm,
        repository: &str,
        content: Content,
    ) -> io::Result<Blob> {
        self.state.add_blob(repository, content, algorithm)
    }

    /// Adds a manifest to a repository, under its digest and under `reference` (a tag; its digest does no harm).
    pub fn add_manifest(
        &self,
        repository: &str,
        reference: &str,
        media_type: &str,
        text: &[u8],
    ) -> Blob {
        self.state
            .add_manifest(repository, reference, media_type, text)
    }

    /// Adds an image of these layers: an empty configuration and a manifest, tagged `tag`. Returns the manifest.
    ///
    /// # Errors
    /// When a layer's file cannot be read.
    pub fn add_image(&self, repository: &str, tag: &str, layers: &[Content]) -> io::Result<Blob> {
        let describe = |blob: Blob, media_type: MediaType| {
            let digest: oci_spec::image::Digest =
                blob.digest.to_string().parse().map_err(io::Error::other)?;
            let builder = DescriptorBuilder::default()
                .media_type(media_type)
                .digest(digest)
                .size(blob.size_bytes);
            builder.build().map_err(io::Error::other)
        };
        let config = self.add_blob(repository, Content::bytes(*b"{}"))?;
        let layers = layers.iter().map(|layer| {
            describe(
                self.add_blob(repository, layer.clone())?,
                MediaType::ImageLayer,
            )
        });
        let manifest = ImageManifestBuilder::default()
            .schema_version(2_u32)
            .media_type(MediaType::ImageManifest)
            .config(describe(config, MediaType::ImageConfig)?)
            .layers(layers.collect::<io::Result<Vec<_>>>()?)
            .build()
            .and_then(|manifest| manifest.to_string())
            .map_err(io::Error::other)?;
        Ok(self.add_manifest(
            repository,
            tag,
            MediaType::ImageManifest.as_ref(),
            manifest.as_bytes(),
        ))
    }

    /// Puts a fault in force; the id ends it again.
    pub fn add_fault(&self, rule: Rule) -> u64 {
        self.state.change_rules(|rules| rules.add(rule))
    }

    /// Ends a fault.
    pub fn remove_fault(&self, id: u64) {
        self.state.change_rules(|rules| rules.remove(id));
    }

    /// Ends all faults.
    pub fn clear_faults(&self) {
        self.state.change_rules(fault::Rules::clear);
    }

    /// The requests so far, those under way included.
    pub fn log(&self) -> Vec<Entry> {
        self.state.log.entries()
    }

    /// Forgets the requests so far.
    pub fn clear_log(&self) {
        self.state.log.clear();
    }

    /// Sums of the log.
    pub fn totals(&self) -> Totals {
        self.state.log.totals()
    }
}

impl Drop for Origin {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic over there has been printed there.
            let _ = thread.join();
        }
    }
}

/// The state that all connections share.
#[derive(Default)]
struct State {
    shelves: Mutex<Shelves>,
    rules: Mutex<fault::Rules>,
    /// Whether the listener must be closed.
    refusing: watch::Sender<bool>,
    /// Signed URLs handed out.
    redirects: AtomicU64,
    log: log::Log,
}

/// The content of the repositories, by repository and reference.
#[derive(Default)]
struct Shelves {
    blobs: HashMap<(String, String), Content>,
    manifests: HashMap<(String, String), Manifest>,
}

#[derive(Clone)]
struct Manifest {
    media_type: String,
    digest: Digest,
    content: Content,
}

impl State {
    fn add_blob(
        &self,
        repository: &str,
        content: Content,
        algorithm: Algorithm,
    ) -> io::Result<Blob> {
        let blob = Blob {
            digest: content.digest_by(algorithm)?,
            size_bytes: content.size_bytes(),
        };
        lock(&self.shelves)
            .blobs
            .insert((repository.to_owned(), blob.digest.to_string()), content);
        Ok(blob)
    }

    fn add_manifest(
        &self,
        repository: &str,
        reference: &str,
        media_type: &str,
        text: &[u8],
    ) -> Blob {
        let digest = Digest::of(Algorithm::Sha256, text);
        let manifest = Manifest {
            media_type: media_type.to_owned(),
            digest,
            content: Content::bytes(text),
        };
        let mut shelves = lock(&self.shelves);
        for reference in [reference.to_owned(), digest.to_string()] {
            shelves
                .manifests
                .insert((repository.to_owned(), reference), manifest.clone());
        }
        Blob {
            digest,
            size_bytes: text.len() as u64,
        }
    }

    fn change_rules<T>(&self, change: impl FnOnce(&mut fault::Rules) -> T) -> T {
        let mut rules = lock(&self.rules);
        let result = change(&mut rules);
        self.refusing.send_replace(rules.refusing());
        result
    }
}

/// A panic while a lock is held fails its test anyway; the others may go on.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The origin's side of [`Origin::start`]: its runtime and its ports.
struct Listeners {
    runtime: tokio::runtime::Runtime,
    registry: TcpListener,
    control: Option<TcpListener>,
    tls: Option<TlsAcceptor>,
    state: Arc<State>,
}

impl Listeners {
    fn open(config: OriginConfig, state: Arc<State>) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let registry = runtime.block_on(TcpListener::bind(config.listen))?;
        let control = config
            .control
            .map(|address| runtime.block_on(TcpListener::bind(address)))
            .transpose()?;
        Ok(Self {
            runtime,
            registry,
            control,
            tls: config.tls.map(TlsAcceptor::from),
            state,
        })
    }

    fn addresses(&self) -> io::Result<(SocketAddr, Option<SocketAddr>)> {
        let control = self
            .control
            .as_ref()
            .map(TcpListener::local_addr)
            .transpose()?;
        Ok((self.registry.local_addr()?, control))
    }

    /// Serves until the other end of `stopped` is dropped.
    fn run(self, stopped: tokio::sync::oneshot::Receiver<()>) {
        let Self {
            runtime,
            registry,
            control,
            tls,
            state,
        } = self;
        runtime.block_on(async {
            if let Some(control) = control {
                tokio::spawn(control::serve(control, Arc::clone(&state)));
            }
            tokio::select! {
                () = serve::serve(registry, tls, state) => {}
                _ = stopped => {}
            }
        });
    }
}

#[cfg(test)]
mod tests;
