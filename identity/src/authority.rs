//! The cluster's certificate authority: its key, the tokens that let nodes join once, certificates made and renewed.
//!
//! On disk, below the data directory: `authority/` with key and certificate, `authority/tokens/<id>` for tokens not
//! used yet, `<id>.spent` for those that were (so that a second user is told so). A token's file holds the SHA-256 of
//! its secret, never the secret. The rename of the file spends the token: the file system picks the one winner.
//!
//! `authority/members/<peer id>` records each certificate that was made, for `hawker member ls`. `authority/removed/<peer id>`
//! names a member that was removed. `hawker member rm` writes it, running or not; a running scheduler notices within a second.

use std::collections::HashMap;
use std::fs;
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::join::Token;
use crate::member::{AuthorityKey, Identity, IdentityError, MAX_REMOVED, member_of, validity_s};
use hawker_core::message::Role;
use hawker_core::piece::PeerId;
use hawker_oci::digest::{Algorithm, Digest};
use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize};

use hawker_network::client::Client;

/// How long a certificate lives unless told otherwise. It renews itself at two thirds.
pub const CERTIFICATE_LIFE: Duration = Duration::from_secs(7 * 24 * 3600);
/// How long a token lives unless told otherwise.
pub const TOKEN_TTL: Duration = Duration::from_secs(3600);
/// Tokens are kept this long after their end, to say why they no longer work.
const KEPT_AFTER_END: Duration = Duration::from_secs(24 * 3600);
/// Joins with a known token from one address, a second and at once: a fleet of thousands behind one address starts within a
/// minute or two. Requests without a known token cost no more than a look-up, and count for nobody.
const JOINS_PER_SECOND: f64 = 50.0;
const JOINS_BURST: f64 = 200.0;

/// Addresses whose joins are counted. Beyond that, those with a full allowance are forgotten first.
const ALLOWANCES: usize = 4096;
/// Records of members whose certificate ended this long ago are dropped.
const RECORD_KEPT: Duration = Duration::from_secs(30 * 24 * 3600);

/// The folder of the authority within its data directory.
pub const AUTHORITY_DIR: &str = "authority";
const MEMBERS_DIR: &str = "members";
const REMOVED_DIR: &str = "removed";
const TOKENS_DIR: &str = "tokens";
const SPENT: &str = "spent";
/// A token that is just being written.
const NEW: &str = "new";

/// An error of the authority's files. The fault is ours.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// A file could not be read or written; retry helps when the disk is mended.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The key or the certificate is unusable.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// No more members can be removed.
    #[error(
        "{MAX_REMOVED} members were removed already, which is the most that a cluster keeps; start a new cluster"
    )]
    TooManyRemoved,
    /// There is no authority here.
    #[error(
        "{0} holds no authority: run this where `hawker up` or the first `hawker scheduler` runs, with its --data-dir"
    )]
    Missing(PathBuf),
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> AuthorityError {
    let path = path.to_owned();
    move |source| AuthorityError::File { path, source }
}

/// Why somebody gets no certificate. The asker's fault, but for the last two.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// Never made here, or long ago.
    #[error(
        "this token is not known here: it was made elsewhere, or expired long ago; make a new one with `hawker token create`"
    )]
    Unknown,
    /// The id is right, the secret is not.
    #[error("this token's secret is wrong: check that it was copied whole")]
    WrongSecret,
    /// Somebody was faster.
    #[error(
        "this token was used already: each token lets one node join; make a new one with `hawker token create`"
    )]
    Spent,
    /// By this machine's clock.
    #[error("this token has expired: make a new one with `hawker token create`")]
    Expired,
    /// The certificate request is none, or for another key.
    #[error("the certificate request is unusable: {0}")]
    Request(String),
    /// `hawker member rm` removed this key.
    #[error(
        "this node's key was removed from the cluster: remove the node's identity folder and join with a new token"
    )]
    Removed,
    /// A retry helps.
    #[error("too many nodes join at once")]
    Busy,
    /// The disk's fault.
    #[error("the authority's own disk fails: {0}")]
    Disk(#[from] AuthorityError),
}

/// A token as it lies on disk.
#[derive(Debug, Serialize, Deserialize)]
struct StoredToken {
    /// Hex of the SHA-256 of the secret.
    sha256: String,
    role: String,
    /// Seconds since 1970 by the authority's clock, which alone counts.
    expires_at: u64,
    /// The key that it was spent for: a second request with that key has lost the answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    spent_for: Option<String>,
}

impl StoredToken {
    fn role(&self) -> Option<Role> {
        [Role::Peer, Role::Seed, Role::Scheduler]
            .into_iter()
            .find(|role| role.to_string() == self.role)
    }
}

/// The cluster's certificate authority.
pub struct Authority {
    key: AuthorityKey,
    dir: PathBuf,
    tokens: PathBuf,
    life: Duration,
    /// Joins that each address may still make, and as of when.
    allowances: Mutex<HashMap<Client, (f64, Instant)>>,
}

impl Authority {
    /// The authority that `data_dir` holds; `None` when there is none.
    pub fn open(data_dir: &Path, life: Duration) -> Result<Option<Self>, AuthorityError> {
        let dir = data_dir.join(AUTHORITY_DIR);
        let key = AuthorityKey::load(&dir)?;
        Ok(key.map(|key| Self {
            key,
            tokens: dir.join(TOKENS_DIR),
            dir,
            life,
            allowances: Mutex::default(),
        }))
    }

    /// The same; at first start a new authority for the cluster of this name.
    pub fn open_or_create(
        data_dir: &Path,
        cluster: &str,
        life: Duration,
    ) -> Result<Self, AuthorityError> {
        if let Some(authority) = Self::open(data_dir, life)? {
            return Ok(authority);
        }
        let dir = data_dir.join(AUTHORITY_DIR);
        fs::create_dir_all(&dir).map_err(at(&dir))?;
        AuthorityKey::generate(cluster)?.save(&dir)?;
        Self::open(data_dir, life)?.ok_or(AuthorityError::Missing(dir))
    }

    /// The cluster's name.
    pub fn cluster(&self) -> &str {
        self.key.cluster()
    }

    /// The authority's own certificate.
    pub const fn certificate(&self) -> &CertificateDer<'static> {
        self.key.certificate()
    }

    /// A new identity for a member of this process.
    pub fn identity(&self, role: Role) -> Result<Identity, AuthorityError> {
        let pending = Identity::request()?;
        let certificate = self.key.issue(
            &pending.certificate_request,
            role,
            self.life,
            SystemTime::now(),
        )?;
        Ok(pending.complete(certificate, self.key.certificate().clone())?)
    }

    /// A certificate for the client at `from` that holds this token, which is spent by it. `name` is for people.
    pub fn join(
        &self,
        token_id: &str,
        secret: &str,
        request: &[u8],
        name: &str,
        from: IpAddr,
        now: SystemTime,
    ) -> Result<(CertificateDer<'static>, Role), Refusal> {
        let found = self.find(token_id)?;
        if !self.may_join(from) {
            return Err(Refusal::Busy);
        }
        let (token, role) = Self::check(found, secret, now)?;
        // A request that is no good costs no token.
        let certificate = self.issue(request, role, now)?;
        let (peer, _) =
            member_of(&certificate).map_err(|error| Refusal::Request(error.to_string()))?;
        if self.is_removed(peer) {
            return Err(Refusal::Removed);
        }
        let asker = Some(peer.to_string());
        match token.spent_for {
            None => self.spend(
                token_id,
                StoredToken {
                    spent_for: asker,
                    ..token
                },
            )?,
            spent_for if spent_for == asker => {}
            Some(_) => return Err(Refusal::Spent),
        }
        self.record(&certificate, Some(name))?;
        Ok((certificate, role))
    }

    /// A new certificate for a member that showed a valid one.
    pub fn renew(
        &self,
        (peer, role): (PeerId, Role),
        request: &[u8],
        now: SystemTime,
    ) -> Result<CertificateDer<'static>, Refusal> {
        let certificate = self.issue(request, role, now)?;
        match member_of(&certificate) {
            Ok((key, _)) if key == peer => {}
            _ => {
                return Err(Refusal::Request(
                    "it is for another key than the certificate shown".into(),
                ));
            }
        }
        if self.is_removed(peer) {
            return Err(Refusal::Removed);
        }
        self.record(&certificate, None)?;
        Ok(certificate)
    }

    /// The ids of removed members, ascending, as the folder says now.
    pub fn removed(&self) -> Result<Vec<PeerId>, AuthorityError> {
        ids_in(&self.dir.join(REMOVED_DIR))
    }

    /// When a member was removed last. The folder is read again only when this changes.
    pub fn removed_changed_at(&self) -> Option<SystemTime> {
        fs::metadata(self.dir.join(REMOVED_DIR))
            .and_then(|metadata| metadata.modified())
            .ok()
    }

    fn is_removed(&self, peer: PeerId) -> bool {
        self.dir.join(REMOVED_DIR).join(peer.to_string()).exists()
    }

    /// Notes a certificate that was made. Without a name the member keeps the one it has.
    fn record(
        &self,
        certificate: &CertificateDer<'_>,
        name: Option<&str>,
    ) -> Result<(), AuthorityError> {
        let (peer, role) = member_of(certificate)?;
        let (_, certificate_until_s) = validity_s(certificate)?;
        let dir = self.dir.join(MEMBERS_DIR);
        let path = dir.join(peer.to_string());
        let name = match name {
            Some(name) => name.to_owned(),
            None => read_json(&path)?
                .map(|record: StoredMember| record.name)
                .unwrap_or_default(),
        };
        fs::create_dir_all(&dir).map_err(at(&dir))?;
        let record = StoredMember {
            name,
            role: role.to_string(),
            certificate_until_s,
        };
        write_json(&path, &record).map_err(at(&path))
    }

    /// Removes tokens and records of members that ended long ago.
    pub fn sweep(&self, now: SystemTime) -> Result<(), AuthorityError> {
        for member in members(&self.dir)? {
            if member.certificate_until_s + RECORD_KEPT.as_secs() < unix_seconds(now) {
                let path = self.dir.join(MEMBERS_DIR).join(member.peer.to_string());
                fs::remove_file(&path).map_err(at(&path))?;
            }
        }
        self.sweep_tokens(now)
    }

    fn sweep_tokens(&self, now: SystemTime) -> Result<(), AuthorityError> {
        let entries = match fs::read_dir(&self.tokens) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            entries => entries.map_err(at(&self.tokens))?,
        };
        for entry in entries {
            let path = entry.map_err(at(&self.tokens))?.path();
            if path.extension().is_some_and(|extension| extension == NEW) {
                continue;
            }
            let over = |token: StoredToken| {
                token.expires_at + KEPT_AFTER_END.as_secs() < unix_seconds(now)
            };
            if read_json(&path)?.is_none_or(over) {
                fs::remove_file(&path).map_err(at(&path))?;
            }
        }
        Ok(())
    }

    fn issue(
        &self,
        request: &[u8],
        role: Role,
        now: SystemTime,
    ) -> Result<CertificateDer<'static>, Refusal> {
        self.key
            .issue(request, role, self.life, now)
            .map_err(|error| Refusal::Request(error.to_string()))
    }

    /// The token with this id, and whether it is spent.
    fn find(&self, id: &str) -> Result<(StoredToken, bool), Refusal> {
        let path = self.path(id)?;
        match read_json(&path)? {
            Some(token) => Ok((token, false)),
            None => Ok((
                read_json(&path.with_extension(SPENT))?.ok_or(Refusal::Unknown)?,
                true,
            )),
        }
    }

    /// A token, if it is good or was, and the role that it gives.
    fn check(
        (token, spent): (StoredToken, bool),
        secret: &str,
        now: SystemTime,
    ) -> Result<(StoredToken, Role), Refusal> {
        if !same_in_constant_time(token.sha256.as_bytes(), hashed(secret).as_bytes()) {
            return Err(Refusal::WrongSecret);
        }
        if spent && token.spent_for.is_none() {
            return Err(Refusal::Spent);
        }
        if token.expires_at <= unix_seconds(now) {
            return Err(if spent {
                Refusal::Spent
            } else {
                Refusal::Expired
            });
        }
        let role = token.role().ok_or(Refusal::Unknown)?;
        Ok((token, role))
    }

    /// Of all who try, one succeeds.
    fn spend(&self, id: &str, token: StoredToken) -> Result<(), Refusal> {
        let path = self.path(id)?;
        let spent = path.with_extension(SPENT);
        match fs::rename(&path, &spent) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(Refusal::Spent),
            done => done.map_err(at(&path))?,
        }
        // A kill in between spends it for nobody: the safe side.
        Ok(write_json(&spent, &token).map_err(at(&spent))?)
    }

    /// The file of a token. An id that is not hex is no path of ours.
    fn path(&self, id: &str) -> Result<PathBuf, Refusal> {
        let is_id = (1..=64).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_hexdigit());
        if is_id {
            Ok(self.tokens.join(id))
        } else {
            Err(Refusal::Unknown)
        }
    }

    fn may_join(&self, from: IpAddr) -> bool {
        let mut allowances = self
            .allowances
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let earned = |(left, at): (f64, Instant)| {
            (left + now.duration_since(at).as_secs_f64() * JOINS_PER_SECOND).min(JOINS_BURST)
        };
        if allowances.len() >= ALLOWANCES {
            allowances.retain(|_, allowance| earned(*allowance) < JOINS_BURST);
        }
        let client = Client::from(from);
        if allowances.len() >= ALLOWANCES && !allowances.contains_key(&client) {
            return false;
        }
        let left = allowances
            .get(&client)
            .map_or(JOINS_BURST, |allowance| earned(*allowance));
        let may = left >= 1.0;
        allowances.insert(client, (left - f64::from(u8::from(may)), now));
        may
    }
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Authority({})", self.cluster())
    }
}

/// A new token that lets one node join with `role` within `ttl`. `data_dir` is that of the process with the authority,
/// which may run or not.
pub fn create_token(data_dir: &Path, role: Role, ttl: Duration) -> Result<Token, AuthorityError> {
    let authority = Authority::open(data_dir, CERTIFICATE_LIFE)?
        .ok_or_else(|| AuthorityError::Missing(data_dir.into()))?;
    let token = Token::generate(authority.certificate())?;
    let stored = StoredToken {
        sha256: hashed(&token.secret),
        role: role.to_string(),
        expires_at: unix_seconds(SystemTime::now() + ttl),
        spent_for: None,
    };
    let dir = &authority.tokens;
    fs::create_dir_all(dir).map_err(at(dir))?;
    let path = dir.join(&token.id);
    write_json(&path, &stored).map_err(at(&path))?;
    Ok(token)
}

/// A member that the authority made a certificate for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KnownMember {
    /// The hash of its key.
    pub peer: PeerId,
    /// For people.
    pub name: String,
    /// `peer`, `seed` or `scheduler`.
    pub role: String,
    /// When its newest certificate ends, in seconds since 1970.
    pub certificate_until_s: u64,
}

/// A member's record on disk.
#[derive(Debug, Serialize, Deserialize)]
struct StoredMember {
    name: String,
    role: String,
    certificate_until_s: u64,
}

/// The authority's folder below `data_dir`, if there is an authority.
fn authority_dir(data_dir: &Path) -> Result<PathBuf, AuthorityError> {
    let dir = data_dir.join(AUTHORITY_DIR);
    if dir.is_dir() {
        Ok(dir)
    } else {
        Err(AuthorityError::Missing(data_dir.into()))
    }
}

/// All members that the authority in `data_dir` knows, by id.
pub fn known_members(data_dir: &Path) -> Result<Vec<KnownMember>, AuthorityError> {
    members(&authority_dir(data_dir)?)
}

/// The members that were removed from the cluster of the authority in `data_dir`, by id.
pub fn removed_members(data_dir: &Path) -> Result<Vec<PeerId>, AuthorityError> {
    ids_in(&authority_dir(data_dir)?.join(REMOVED_DIR))
}

/// Removes a member from the cluster of the authority in `data_dir`: its key counts nowhere any more, and never again. A running
/// scheduler notices within a second. Returns the file that says so.
pub fn remove_member(data_dir: &Path, peer: PeerId) -> Result<PathBuf, AuthorityError> {
    let dir = authority_dir(data_dir)?.join(REMOVED_DIR);
    let path = dir.join(peer.to_string());
    if path.exists() {
        return Ok(path);
    }
    if ids_in(&dir)?.len() >= MAX_REMOVED {
        return Err(AuthorityError::TooManyRemoved);
    }
    fs::create_dir_all(&dir).map_err(at(&dir))?;
    let removed_at_s = unix_seconds(SystemTime::now());
    write_json(&path, &serde_json::json!({ "removed_at_s": removed_at_s })).map_err(at(&path))?;
    fs::File::open(&dir)
        .and_then(|dir| dir.sync_all())
        .map_err(at(&dir))?;
    Ok(path)
}

fn members(authority: &Path) -> Result<Vec<KnownMember>, AuthorityError> {
    let dir = authority.join(MEMBERS_DIR);
    let mut members = Vec::new();
    for peer in ids_in(&dir)? {
        // A record that makes no sense is written anew when its member renews.
        if let Some(StoredMember {
            name,
            role,
            certificate_until_s,
        }) = read_json(&dir.join(peer.to_string()))?
        {
            members.push(KnownMember {
                peer,
                name,
                role,
                certificate_until_s,
            });
        }
    }
    Ok(members)
}

/// The ids that name files of a folder, ascending; none when there is no folder.
fn ids_in(dir: &Path) -> Result<Vec<PeerId>, AuthorityError> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(at(dir))?,
    };
    let mut ids = Vec::new();
    for entry in entries {
        let name = entry.map_err(at(dir))?.file_name();
        ids.extend(name.to_str().and_then(|name| name.parse::<PeerId>().ok()));
    }
    ids.sort_unstable();
    Ok(ids)
}

fn write_json(path: &Path, value: &impl Serialize) -> io::Result<()> {
    let new = path.with_extension(NEW);
    let mut options = fs::OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    let mut file = options.open(&new)?;
    file.write_all(&serde_json::to_vec(value)?)?;
    file.sync_all()?;
    fs::rename(new, path)
}

/// A file of ours; `None` when there is none, or when it makes no sense.
fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Option<T>, AuthorityError> {
    match fs::read(path) {
        Ok(text) => Ok(serde_json::from_slice(&text).ok()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(at(path)(error)),
    }
}

fn hashed(secret: &str) -> String {
    Digest::of(Algorithm::Sha256, secret.as_bytes()).hex()
}

fn same_in_constant_time(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len()
        && a.iter()
            .zip(b)
            .fold(0, |difference, (a, b)| difference | (a ^ b))
            == 0
}

fn unix_seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);
    const HOME: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    fn authority() -> (tempfile::TempDir, Authority) {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::open_or_create(dir.path(), "c", CERTIFICATE_LIFE).unwrap();
        (dir, authority)
    }

    fn join(authority: &Authority, token: &Token, now: SystemTime) -> Result<Role, Refusal> {
        let request = Identity::request().unwrap().certificate_request;
        authority
            .join(&token.id, &token.secret, &request, "n", HOME, now)
            .map(|(_, role)| role)
    }

    #[test]
    fn a_token_works_once_and_says_so() {
        let (dir, authority) = authority();
        let token = create_token(dir.path(), Role::Seed, HOUR).unwrap();
        let wrong = Token {
            secret: token.secret.chars().rev().collect(),
            ..token.clone()
        };
        let unknown = Token {
            id: "00".into(),
            ..token.clone()
        };
        let outside = Token {
            id: "../key".into(),
            ..token.clone()
        };
        let now = SystemTime::now();
        assert!(matches!(
            join(&authority, &wrong, now),
            Err(Refusal::WrongSecret)
        ));
        assert!(matches!(
            join(&authority, &unknown, now),
            Err(Refusal::Unknown)
        ));
        assert!(matches!(
            join(&authority, &outside, now),
            Err(Refusal::Unknown)
        ));
        let bad_request = authority.join(&token.id, &token.secret, b"?", "n", HOME, now);
        assert!(
            matches!(bad_request, Err(Refusal::Request(_))),
            "and costs no token"
        );
        let request = Identity::request().unwrap().certificate_request;
        let once = || {
            authority
                .join(&token.id, &token.secret, &request, "n", HOME, now)
                .map(|(_, role)| role)
        };
        assert_eq!(once().unwrap(), Role::Seed);
        assert_eq!(
            once().unwrap(),
            Role::Seed,
            "whoever lost the answer asks again with the same key"
        );
        assert!(matches!(join(&authority, &token, now), Err(Refusal::Spent)));
        assert!(matches!(
            join(&authority, &wrong, now),
            Err(Refusal::WrongSecret)
        ));
    }

    #[test]
    fn of_many_at_once_one_joins() {
        let (dir, authority) = authority();
        let token = create_token(dir.path(), Role::Peer, HOUR).unwrap();
        let joined = std::thread::scope(|scope| {
            let tries: Vec<_> = (0..8)
                .map(|_| scope.spawn(|| join(&authority, &token, SystemTime::now()).is_ok()))
                .collect();
            tries
                .into_iter()
                .map(|one| one.join().unwrap())
                .filter(|joined| *joined)
                .count()
        });
        assert_eq!(joined, 1);
    }

    #[test]
    fn an_expired_token_says_so_and_goes_in_the_end() {
        let (dir, authority) = authority();
        let token = create_token(dir.path(), Role::Peer, HOUR).unwrap();
        let later = SystemTime::now() + HOUR * 2;
        assert!(matches!(
            join(&authority, &token, later),
            Err(Refusal::Expired)
        ));
        authority.sweep(later).unwrap();
        assert!(matches!(
            join(&authority, &token, later),
            Err(Refusal::Expired)
        ));
        authority.sweep(later + KEPT_AFTER_END).unwrap();
        assert!(matches!(
            join(&authority, &token, later),
            Err(Refusal::Unknown)
        ));
    }

    #[test]
    fn the_authority_outlives_the_process_and_keeps_its_files_private() {
        let (dir, first) = authority();
        let again = Authority::open_or_create(dir.path(), "another", CERTIFICATE_LIFE).unwrap();
        assert_eq!(again.certificate(), first.certificate());
        assert_eq!(again.cluster(), "c");
        let token = create_token(dir.path(), Role::Peer, HOUR).unwrap();
        for file in ["key.pem".into(), format!("tokens/{}", token.id)] {
            let mode = fs::metadata(dir.path().join("authority").join(file))
                .unwrap()
                .permissions()
                .mode();
            assert_eq!(mode & 0o077, 0);
        }
        let text = fs::read_to_string(dir.path().join("authority/tokens").join(&token.id)).unwrap();
        assert!(!text.contains(&token.secret));
    }

    #[test]
    fn where_there_is_no_authority_no_token_is_made() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(
            create_token(dir.path(), Role::Peer, HOUR),
            Err(AuthorityError::Missing(_))
        ));
    }

    #[test]
    fn a_renewal_keeps_key_and_role() {
        let (_dir, authority) = authority();
        let seed = authority.identity(Role::Seed).unwrap();
        let now = SystemTime::now();
        let request = seed.renewal_request().unwrap();
        let renewed = authority
            .renew((seed.peer_id(), Role::Seed), &request, now)
            .unwrap();
        assert_eq!(member_of(&renewed).unwrap(), (seed.peer_id(), Role::Seed));
        let other = authority.identity(Role::Peer).unwrap();
        assert!(matches!(
            authority.renew((other.peer_id(), Role::Peer), &request, now),
            Err(Refusal::Request(_))
        ));
    }

    #[test]
    fn joins_are_limited_for_each_address_and_only_with_a_known_token() {
        let (dir, authority) = authority();
        let token = create_token(dir.path(), Role::Peer, HOUR).unwrap();
        let (unknown, wrong) = (
            Token {
                id: "00".into(),
                ..token.clone()
            },
            Token {
                secret: "00".into(),
                ..token.clone()
            },
        );
        let (now, elsewhere) = (SystemTime::now(), IpAddr::from([10, 0, 0, 9]));
        let answer =
            |token: &Token, from| authority.join(&token.id, &token.secret, b"?", "n", from, now);
        assert!((0..2000).all(|_| matches!(answer(&unknown, HOME), Err(Refusal::Unknown))));
        assert!(
            matches!(answer(&wrong, HOME), Err(Refusal::WrongSecret)),
            "strangers' tries count for nobody"
        );
        assert!((0..2000).any(|_| matches!(answer(&wrong, HOME), Err(Refusal::Busy))));
        assert!(matches!(
            answer(&wrong, elsewhere),
            Err(Refusal::WrongSecret)
        ));
    }

    #[test]
    fn a_removed_member_neither_renews_nor_joins_again_with_its_key() {
        let (dir, authority) = authority();
        let now = SystemTime::now();
        let pending = Identity::request().unwrap();
        let join = || {
            let token = create_token(dir.path(), Role::Peer, HOUR).unwrap();
            let request = &pending.certificate_request;
            (
                authority.join(&token.id, &token.secret, request, "n", HOME, now),
                token,
            )
        };
        let (certificate, role) = join().0.unwrap();
        let (peer, _) = member_of(&certificate).unwrap();
        let known = known_members(dir.path()).unwrap();
        assert_eq!(
            (known.len(), known[0].peer, known[0].name.as_str()),
            (1, peer, "n")
        );
        remove_member(dir.path(), peer).unwrap();
        remove_member(dir.path(), peer).unwrap();
        assert_eq!(authority.removed().unwrap(), [peer]);
        let renewed = authority.renew((peer, role), &pending.certificate_request, now);
        assert!(matches!(renewed, Err(Refusal::Removed)));
        let (again, token) = join();
        assert!(matches!(again, Err(Refusal::Removed)));
        let request = Identity::request().unwrap().certificate_request;
        authority
            .join(&token.id, &token.secret, &request, "n", HOME, now)
            .expect("the token is not spent");
        let reopened = Authority::open(dir.path(), CERTIFICATE_LIFE)
            .unwrap()
            .unwrap();
        assert_eq!(reopened.removed().unwrap(), [peer]);
    }

    #[test]
    fn records_of_members_go_long_after_their_certificates() {
        let (dir, authority) = authority();
        let token = create_token(dir.path(), Role::Peer, HOUR).unwrap();
        let now = SystemTime::now();
        join(&authority, &token, now).unwrap();
        authority.sweep(now + CERTIFICATE_LIFE + HOUR).unwrap();
        assert_eq!(known_members(dir.path()).unwrap().len(), 1);
        authority
            .sweep(now + CERTIFICATE_LIFE + RECORD_KEPT + HOUR)
            .unwrap();
        assert!(known_members(dir.path()).unwrap().is_empty());
    }
}
