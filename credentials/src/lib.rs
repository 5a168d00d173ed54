//! Names and passwords for registries: their files, and the registry of each.
//!
//! [`docker`], [`containerd`] and [`kubernetes`] read what these have; [`pattern`] says what an entry is for; [`helper`] runs
//! docker's credential helpers. [`Keychain`] puts them together. Nothing here is logged but names of files and registries.

mod containerd;
mod docker;
mod helper;
mod kubernetes;
mod pattern;

use std::fmt;
use std::fs::File;
use std::io::Read as _;
use std::num::NonZeroUsize;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use ::lru::LruCache;
use base64::Engine as _;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use hawker_core::lru;
use http::HeaderValue;
use tokio::sync::Mutex;
use tokio::time::Instant;

use self::pattern::Pattern;
use hawker_config::schema::CredentialSource;
use hawker_lanes::{self as lanes, Lane};

/// Longest file read.
const MAX_FILE_BYTES: u64 = 1 << 20;
/// Files of one folder that are read.
const MAX_FILES: usize = 256;
/// How long a helper's answer counts: ECR's lasts 12 h, others' an hour.
const HELPED: Duration = Duration::from_secs(5 * 60);
/// Answers of helpers that are kept.
const HELPED_CAPACITY: NonZeroUsize = NonZeroUsize::new(256).expect("not zero");
/// The user that stands before an identity token where only names and passwords have a place.
const TOKEN_USER: &str = "<token>";

const BASE64: GeneralPurpose = GeneralPurpose::new(
    &base64::alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// Text that nobody gets to see by accident.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Keeps `text` out of sight.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text, to be sent to where it belongs.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// The credential for a registry, or its realm.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Credential {
    /// Name and password.
    Password {
        /// The name.
        user: String,
        /// The password, or what passes for one.
        password: Secret,
    },
    /// An OAuth2 refresh token, which docker calls identity token: it buys tokens, and opens nothing itself.
    IdentityToken(Secret),
}

impl Credential {
    /// Name and password as they stand beside each other in files and helpers; `None` when both are empty.
    fn of(user: String, password: String) -> Option<Self> {
        match user.as_str() {
            "" if password.is_empty() => None,
            TOKEN_USER => Some(Self::IdentityToken(Secret(password))),
            _ => Some(Self::Password {
                user,
                password: Secret(password),
            }),
        }
    }

    /// From `Authorization: Basic …` (RFC 7617).
    pub fn from_basic(value: &HeaderValue) -> Option<Self> {
        let (scheme, encoded) = value.to_str().ok()?.split_once(' ')?;
        if !scheme.eq_ignore_ascii_case("basic") {
            return None;
        }
        Self::from_encoded(encoded)
    }

    /// From `user:password` in base64.
    fn from_encoded(encoded: &str) -> Option<Self> {
        let decoded = String::from_utf8(BASE64.decode(encoded.trim()).ok()?).ok()?;
        let (user, password) = decoded.split_once(':')?;
        // Docker pads some of its own with zeros.
        Self::of(user.to_owned(), password.trim_matches('\0').to_owned())
    }

    /// As `Authorization: Basic …`; an identity token can't be sent like that.
    pub fn to_basic(&self) -> Option<HeaderValue> {
        let Credential::Password { user, password } = self else {
            return None;
        };
        let encoded = BASE64.encode(format!("{user}:{}", password.0));
        let mut value = HeaderValue::try_from(format!("Basic {encoded}")).ok()?;
        value.set_sensitive(true);
        Some(value)
    }
}

/// The entries of one source.
#[derive(Debug, Default)]
struct Entries {
    listed: Vec<(Pattern, Credential)>,
    /// Helpers for single registries.
    helpers: Vec<(Pattern, String)>,
    /// The helper for all others.
    store: Option<String>,
}

/// The place of the answer to a question.
#[derive(Debug, PartialEq, Eq)]
enum Found<'a> {
    Here(&'a Credential),
    AtHelper(&'a str),
}

impl Entries {
    /// In the order docker looks: a registry's own helper, the helper for all, what is written here.
    fn find(&self, registry: &str, repository: &str) -> Vec<Found<'_>> {
        let own = self
            .helpers
            .iter()
            .filter(|(pattern, _)| pattern.matches(registry, repository).is_some());
        let helpers = own
            .map(|(_, helper)| helper)
            .chain(&self.store)
            .map(|helper| Found::AtHelper(helper));
        let listed = self.listed.iter().filter_map(|(pattern, credential)| {
            Some((pattern.matches(registry, repository)?, credential))
        });
        // The first of those that match most closely.
        let best = listed.reduce(|best, next| if next.0 > best.0 { next } else { best });
        helpers
            .chain(best.map(|(_, credential)| Found::Here(credential)))
            .collect()
    }
}

/// The entries that were read, and their files.
#[derive(Debug)]
struct Loaded {
    stamps: Vec<(PathBuf, Option<Stamp>)>,
    entries: Arc<Entries>,
}

/// The facts that change when a file does.
#[derive(Debug, PartialEq, Eq)]
pub struct Stamp {
    modified: Option<SystemTime>,
    inode: u64,
    len_bytes: u64,
}

impl Stamp {
    /// The stamp of a file; `None` if there is none that may be looked at.
    pub fn of(file: &Path) -> Option<Self> {
        let about = std::fs::metadata(file).ok()?;
        Some(Self {
            modified: about.modified().ok(),
            inode: about.ino(),
            len_bytes: about.len(),
        })
    }
}

/// All credentials of this node.
#[derive(Debug)]
pub struct Keychain {
    sources: Vec<CredentialSource>,
    /// By source. Held while files are read.
    loaded: Mutex<Vec<Option<Loaded>>>,
    /// By helper and registry. Held while a helper runs: one at a time.
    helped: Mutex<LruCache<(String, String), Helped>>,
}

/// A helper's answer, and its time.
#[derive(Debug)]
struct Helped {
    credential: Option<Credential>,
    since: Instant,
}

impl Keychain {
    /// A keychain that reads nothing before it is asked.
    pub fn new(sources: Vec<CredentialSource>) -> Self {
        let loaded = Mutex::new(sources.iter().map(|_| None).collect());
        Self {
            sources,
            loaded,
            helped: Mutex::new(lru::bounded(HELPED_CAPACITY)),
        }
    }

    /// The credential for `repository` at `registry`: the closest entry of the first source that has one. An
    /// unreadable source is logged, once for each change, and counts as empty.
    pub async fn find(&self, registry: &str, repository: &str) -> Option<Credential> {
        for entries in self.all().await {
            for found in entries.find(registry, repository) {
                let credential = match found {
                    Found::Here(credential) => Some(credential.clone()),
                    Found::AtHelper(helper) => self.helped(helper, registry).await,
                };
                if credential.is_some() {
                    return credential;
                }
            }
        }
        None
    }

    /// The registry refused the answers of helpers about `registry`: they are asked again.
    pub async fn doubt(&self, registry: &str) {
        let mut helped = self.helped.lock().await;
        let doubted = helped
            .iter()
            .filter(|((_, r), _)| r == registry)
            .map(|(key, _)| key.clone());
        for key in doubted.collect::<Vec<_>>() {
            helped.pop(&key);
        }
    }

    async fn helped(&self, helper: &str, registry: &str) -> Option<Credential> {
        let key = (helper.to_owned(), registry.to_owned());
        let mut helped = self.helped.lock().await;
        if let Some(said) = helped
            .get(&key)
            .filter(|said| said.since.elapsed() < HELPED)
        {
            return said.credential.clone();
        }
        let credential = helper::get(helper, registry)
            .await
            .unwrap_or_else(|reason| {
                tracing::warn!(helper, registry, %reason, "a credential helper gave nothing");
                None
            });
        helped.put(
            key,
            Helped {
                credential: credential.clone(),
                since: Instant::now(),
            },
        );
        credential
    }

    /// The entries of each source now.
    async fn all(&self) -> Vec<Arc<Entries>> {
        let mut loaded = self.loaded.lock().await;
        let (sources, mut now) = (self.sources.clone(), std::mem::take(&mut *loaded));
        let read = move || {
            now.resize_with(sources.len(), || None);
            for (source, loaded) in sources.iter().zip(&mut now) {
                refresh(source, loaded);
            }
            now
        };
        // It does not fail: an unreadable source is logged and empty. If it did, all is read anew next time.
        *loaded = lanes::run(Lane::Upkeep, read).await.unwrap_or_default();
        loaded
            .iter()
            .flatten()
            .map(|loaded| Arc::clone(&loaded.entries))
            .collect()
    }
}

/// Reads a source again if it has changed.
fn refresh(source: &CredentialSource, loaded: &mut Option<Loaded>) {
    let stamp = |file: PathBuf| {
        let stamp = Stamp::of(&file);
        (file, stamp)
    };
    let stamps: Vec<_> = files(source).into_iter().map(stamp).collect();
    if loaded
        .as_ref()
        .is_some_and(|loaded| loaded.stamps == stamps)
    {
        return;
    }
    let entries = entries(source, &stamps);
    *loaded = Some(Loaded {
        stamps,
        entries: Arc::new(entries),
    });
}

/// The files of a source, as they are now.
fn files(source: &CredentialSource) -> Vec<PathBuf> {
    match source {
        CredentialSource::Docker(file) | CredentialSource::Containerd(file) => vec![file.clone()],
        CredentialSource::Kubernetes(path) => kubernetes::files(path),
        CredentialSource::Environment(_) => Vec::new(),
    }
}

fn entries(source: &CredentialSource, stamps: &[(PathBuf, Option<Stamp>)]) -> Entries {
    let parse: fn(&str) -> Result<Entries, String> = match source {
        CredentialSource::Docker(_) => docker::parse,
        CredentialSource::Containerd(_) => containerd::parse,
        CredentialSource::Kubernetes(_) => kubernetes::parse,
        CredentialSource::Environment(name) => {
            let text = std::env::var(name).map_err(|_| "it is not set, or no text".to_owned());
            return text
                .and_then(|text| docker::parse(&text))
                .unwrap_or_else(|reason| {
                    tracing::warn!(
                        variable = name,
                        reason,
                        "credentials can't be read from the environment"
                    );
                    Entries::default()
                });
        }
    };
    let mut all = Entries::default();
    for (file, _) in stamps {
        match read(file).and_then(|text| parse(&text)) {
            Ok(entries) => {
                all.listed.extend(entries.listed);
                all.helpers.extend(entries.helpers);
                all.store = all.store.or(entries.store);
            }
            Err(reason) => {
                tracing::warn!(file = %file.display(), reason, "credentials can't be read")
            }
        }
    }
    all
}

fn read(file: &Path) -> Result<String, String> {
    let mut text = String::new();
    let open = File::open(file).map_err(|e| e.to_string())?;
    open.take(MAX_FILE_BYTES + 1)
        .read_to_string(&mut text)
        .map_err(|e| e.to_string())?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(format!("it is longer than {MAX_FILE_BYTES} bytes"));
    }
    Ok(text)
}

/// The place of a JSON error; the parser's own words may quote the content.
fn json_error(error: &serde_json::Error) -> String {
    format!(
        "it is not what it should be at line {}, column {}",
        error.line(),
        error.column()
    )
}

#[cfg(test)]
mod tests;
