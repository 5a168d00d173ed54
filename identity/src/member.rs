//! The identity of a member: its key, its certificate from the cluster's authority, and the TLS that rests on them.
//!
//! A member's certificate carries DNS names and nothing else that matters: `<peer id>.peer.hawker.internal` always, and
//! `seed.hawker.internal` or `scheduler.hawker.internal` for these roles. So the standard verification by name is all there is:
//! dial a known member by its id's name, an unknown seed or scheduler by its role's name, whatever its address.

mod authority;
pub mod files;
mod removed;

use std::collections::HashMap;
use std::fmt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use hawker_core::message::Role;
use hawker_core::piece::{PeerId, PieceTable, SignedPrefix};
use ring::signature::Ed25519KeyPair;
use rustls::client::{ResolvesClientCert, Resumption, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, ring as provider};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{
    ClientHello, NoServerSessionStorage, ResolvesServerCert, WebPkiClientVerifier,
};
use rustls::sign::CertifiedKey;
use rustls::{RootCertStore, SignatureScheme};
use webpki::{EndEntityCert, KeyUsage};

pub use authority::{AuthorityKey, authority_params, serial};
pub use removed::RemovedMembers;

pub use hawker_api::convert::MAX_REMOVED;

/// All members' names end in this.
const DOMAIN: &str = "hawker.internal";
const KEY_FILE: &str = "key.pem";
const CERTIFICATE_FILE: &str = "certificate.pem";
const AUTHORITY_FILE: &str = "authority.pem";
/// Ids of removed members, a JSON list.
const REMOVED_FILE: &str = "removed.json";
/// How many issuers' certificates are remembered as checked: far more than a cluster has issuers.
const CHECKED_AT_MOST: usize = 1024;

/// The fault of an identity, ours or another's.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A file of ours could not be read or written. Ours; retry helps when the disk is mended.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// A key or certificate makes no sense.
    #[error("unusable key or certificate: {0}")]
    Unusable(String),
}

pub(crate) fn unusable(why: impl fmt::Display) -> IdentityError {
    IdentityError::Unusable(why.to_string())
}

/// This member's key and certificate. Cheap to clone; a renewed certificate is seen by all clones at once.
#[derive(Clone)]
pub struct Identity {
    inner: Arc<Inner>,
}

struct Inner {
    /// PKCS #8, DER.
    key: PrivatePkcs8KeyDer<'static>,
    signer: Ed25519KeyPair,
    authority: CertificateDer<'static>,
    roots: Arc<RootCertStore>,
    current: Arc<ArcSwap<Current>>,
    removed: RemovedMembers,
    /// Certificates of issuers that were found to come from our authority, by their SHA-256.
    checked: Mutex<HashMap<[u8; 32], Checked>>,
}

/// The part that changes when the certificate is renewed.
#[derive(Debug)]
struct Current {
    certified: Arc<CertifiedKey>,
    certificate: CertificateDer<'static>,
    member: Checked,
}

/// The facts in a certificate, whose chain to our authority has been verified.
#[derive(Clone, Copy, Debug)]
struct Checked {
    peer: PeerId,
    role: Role,
    not_before_s: u64,
    not_after_s: u64,
}

impl Identity {
    /// Loads the files that `save` wrote into `dir`; `None` when there is nothing yet.
    pub fn load(dir: &Path) -> Result<Option<Self>, IdentityError> {
        // The certificate is written last: without it nothing was completed.
        let Some(certificate) = files::read_if_there(&dir.join(CERTIFICATE_FILE))? else {
            return Ok(None);
        };
        let key = files::read(&dir.join(KEY_FILE))?;
        let authority = files::read(&dir.join(AUTHORITY_FILE))?;
        let key = PrivatePkcs8KeyDer::from_pem_slice(&key)
            .map_err(|_| unusable("no PKCS #8 key in key.pem"))?;
        let identity = Self::assemble(
            key,
            files::certificate(&certificate)?,
            files::certificate(&authority)?,
        )?;
        identity.load_removed(dir);
        Ok(Some(identity))
    }

    /// A damaged list is no reason to stay away: the next scheduler sends the whole list again.
    fn load_removed(&self, dir: &Path) {
        let Ok(Some(text)) = files::read_if_there(&dir.join(REMOVED_FILE)) else {
            return;
        };
        match serde_json::from_slice::<Vec<String>>(&text) {
            Ok(ids) => drop(
                self.inner
                    .removed
                    .add(ids.iter().filter_map(|id| id.parse().ok())),
            ),
            Err(error) => {
                tracing::warn!(dir = %dir.display(), %error, "removed.json cannot be read")
            }
        }
    }

    /// Writes the list of removed members into `dir`, where [`Identity::load`] finds it.
    pub fn save_removed(&self, dir: &Path) -> Result<(), IdentityError> {
        let ids: Vec<String> = self
            .inner
            .removed
            .all()
            .iter()
            .map(ToString::to_string)
            .collect();
        files::write(
            &dir.join(REMOVED_FILE),
            &serde_json::to_vec(&ids).map_err(unusable)?,
        )
    }

    /// The members that the authority removed. Handshakes and statements of these are refused by all that this identity checks.
    pub fn removed(&self) -> &RemovedMembers {
        &self.inner.removed
    }

    /// A new Ed25519 key and a certificate request (PKCS #10, DER) for it.
    pub fn request() -> Result<PendingIdentity, IdentityError> {
        let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).map_err(unusable)?;
        let certificate_request = certificate_request(&key)?;
        Ok(PendingIdentity {
            certificate_request,
            key: PrivatePkcs8KeyDer::from(key.serialize_der()),
        })
    }

    /// Writes key (mode 0600), certificate and authority, each by write, fsync, rename.
    pub fn save(&self, dir: &Path) -> Result<(), IdentityError> {
        let key = self.rcgen_key()?.serialize_pem();
        files::write(&dir.join(KEY_FILE), key.as_bytes())?;
        files::write(
            &dir.join(AUTHORITY_FILE),
            &files::certificate_pem(&self.inner.authority),
        )?;
        files::write(
            &dir.join(CERTIFICATE_FILE),
            &files::certificate_pem(&self.certificate()),
        )
    }

    /// Our id.
    pub fn peer_id(&self) -> PeerId {
        self.inner.current.load().member.peer
    }

    /// Our role.
    pub fn role(&self) -> Role {
        self.inner.current.load().member.role
    }

    /// The certificate we show now.
    pub fn certificate(&self) -> CertificateDer<'static> {
        self.inner.current.load().certificate.clone()
    }

    /// The authority's certificate.
    pub fn authority(&self) -> &CertificateDer<'static> {
        &self.inner.authority
    }

    /// The cluster's name, as the authority's certificate has it.
    pub fn cluster(&self) -> String {
        organization(self.authority()).unwrap_or_default()
    }

    /// From when until when our certificate holds, in seconds since 1970.
    pub fn validity_s(&self) -> (u64, u64) {
        let member = self.inner.current.load().member;
        (member.not_before_s, member.not_after_s)
    }

    /// When to renew: at two thirds of the certificate's life.
    pub fn renew_at(&self) -> SystemTime {
        let member = self.inner.current.load().member;
        let life_s = member.not_after_s.saturating_sub(member.not_before_s);
        UNIX_EPOCH + Duration::from_secs(member.not_before_s + life_s / 3 * 2)
    }

    /// Whether the certificate has run out: nobody believes it any more, and nobody renews it.
    pub fn has_expired(&self, now: SystemTime) -> bool {
        now >= UNIX_EPOCH + Duration::from_secs(self.validity_s().1)
    }

    /// A certificate request for the key we have.
    pub fn renewal_request(&self) -> Result<Vec<u8>, IdentityError> {
        certificate_request(&self.rcgen_key()?)
    }

    /// Puts a renewed certificate in place; connections from now on use it.
    pub fn renew(&self, certificate: CertificateDer<'static>) -> Result<(), IdentityError> {
        let current = current(
            &self.inner.key,
            certificate,
            &self.inner.authority,
            &self.inner.roots,
        )?;
        self.inner.current.store(Arc::new(current));
        Ok(())
    }

    /// TLS for dialling members: shows our certificate, checks theirs against the authority. ALPN as given.
    pub fn client_config(&self, alpn: &[u8]) -> Arc<rustls::ClientConfig> {
        let mut config = rustls::ClientConfig::builder_with_provider(crypto())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("the ring provider has TLS 1.3")
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(removed::Servers {
                usual: WebPkiServerVerifier::builder_with_provider(
                    Arc::clone(&self.inner.roots),
                    crypto(),
                )
                .build()
                .expect("there is one root and no revocation list"),
                removed: self.inner.removed.clone(),
            }))
            .with_client_cert_resolver(self.shown());
        config.alpn_protocols = vec![alpn.to_vec()];
        // A resumed session would carry the certificates of an earlier handshake past their renewal and their end.
        config.resumption = Resumption::disabled();
        Arc::new(config)
    }

    /// TLS for accepting members. With `strangers_too`, also clients without a certificate, which want to join, and removed
    /// members, which are to be told so, get in: the caller tells these apart, by [`Identity::removed`]. The chain that is shown
    /// ends in the authority, for joiners that know no more of it than its hash.
    pub fn server_config(&self, alpn: &[u8], strangers_too: bool) -> Arc<rustls::ServerConfig> {
        let verifier =
            WebPkiClientVerifier::builder_with_provider(Arc::clone(&self.inner.roots), crypto());
        let verifier = if strangers_too {
            verifier.allow_unauthenticated()
        } else {
            verifier
        };
        let usual = verifier
            .build()
            .expect("there is one root and no revocation list");
        let verifier: Arc<dyn ClientCertVerifier> = match strangers_too {
            true => usual,
            false => Arc::new(removed::Clients {
                usual,
                removed: self.inner.removed.clone(),
            }),
        };
        let mut config = rustls::ServerConfig::builder_with_provider(crypto())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("the ring provider has TLS 1.3")
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(self.shown());
        config.alpn_protocols = vec![alpn.to_vec()];
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Arc::new(config)
    }

    /// Signs all values that `table` knows, as their issuer, and attaches the statement. `registries`: those that gave this node
    /// the bytes, or proved that they have them.
    pub fn sign(
        &self,
        table: &mut PieceTable,
        sealed: bool,
        registries: Vec<String>,
        now: SystemTime,
    ) {
        let current = self.inner.current.load();
        let signed_at_s = unix_seconds(now);
        let signature = self
            .inner
            .signer
            .sign(&table.statement(sealed, signed_at_s, &registries));
        table.sign(SignedPrefix {
            count: table.values().len() as u32,
            sealed,
            signed_at_s,
            issuer: current.member.peer,
            registries,
            certificate: Arc::from(&current.certificate[..]),
            signature: signature.as_ref().to_vec(),
        });
    }

    /// Whether a statement was signed by a member of this cluster that was not removed; its role. The certificate must have been valid when it
    /// was signed, by the issuer's clock: tables outlive certificates.
    pub fn check(&self, signed: &SignedPrefix, statement: &[u8]) -> Option<Role> {
        let certificate = CertificateDer::from(&signed.certificate[..]);
        let issuer = self.checked(&certificate, signed.signed_at_s)?;
        if issuer.peer != signed.issuer || self.inner.removed.contains(issuer.peer) {
            return None;
        }
        let end_entity = EndEntityCert::try_from(&certificate).ok()?;
        end_entity
            .verify_signature(webpki::ring::ED25519, statement, &signed.signature)
            .ok()?;
        Some(issuer.role)
    }

    /// The facts in a certificate of our authority, if it was valid at that time. Issuers sign again and again: their
    /// certificates are remembered.
    fn checked(&self, certificate: &CertificateDer<'_>, at_s: u64) -> Option<Checked> {
        let hash = fingerprint(certificate);
        let known = self.checked_certificates().get(&hash).copied();
        if let Some(known) = known {
            return (known.not_before_s..=known.not_after_s)
                .contains(&at_s)
                .then_some(known);
        }
        let checked = verify(certificate, &self.inner.roots, at_s).ok()?;
        let mut certificates = self.checked_certificates();
        if certificates.len() >= CHECKED_AT_MOST {
            certificates.clear();
        }
        certificates.insert(hash, checked);
        Some(checked)
    }

    fn checked_certificates(&self) -> std::sync::MutexGuard<'_, HashMap<[u8; 32], Checked>> {
        self.inner
            .checked
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn assemble(
        key: PrivatePkcs8KeyDer<'static>,
        certificate: CertificateDer<'static>,
        authority: CertificateDer<'static>,
    ) -> Result<Self, IdentityError> {
        // Ring's strict reading wants the public key beside the private one; both forms are sound, and `current` compares
        // the key with the certificate.
        let signer =
            Ed25519KeyPair::from_pkcs8_maybe_unchecked(key.secret_pkcs8_der()).map_err(unusable)?;
        let mut roots = RootCertStore::empty();
        roots.add(authority.clone()).map_err(unusable)?;
        let current = current(&key, certificate, &authority, &roots)?;
        Ok(Self {
            inner: Arc::new(Inner {
                key,
                signer,
                authority,
                roots: Arc::new(roots),
                current: Arc::new(ArcSwap::from_pointee(current)),
                removed: RemovedMembers::default(),
                checked: Mutex::default(),
            }),
        })
    }

    fn rcgen_key(&self) -> Result<rcgen::KeyPair, IdentityError> {
        rcgen::KeyPair::try_from(&self.inner.key).map_err(unusable)
    }

    fn shown(&self) -> Arc<Shown> {
        Arc::new(Shown(Arc::clone(&self.inner.current)))
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({:?}, {})", self.peer_id(), self.role())
    }
}

/// A key that waits for its certificate.
pub struct PendingIdentity {
    /// The certificate request, DER.
    pub certificate_request: Vec<u8>,
    key: PrivatePkcs8KeyDer<'static>,
}

impl PendingIdentity {
    /// The identity, once the authority has answered.
    pub fn complete(
        &self,
        certificate: CertificateDer<'static>,
        authority: CertificateDer<'static>,
    ) -> Result<Identity, IdentityError> {
        Identity::assemble(self.key.clone_key(), certificate, authority)
    }
}

impl fmt::Debug for PendingIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PendingIdentity")
    }
}

/// The certificate that TLS shows: whichever is current when a handshake needs it.
#[derive(Debug)]
struct Shown(Arc<ArcSwap<Current>>);

impl ResolvesServerCert for Shown {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0.load().certified))
    }
}

impl ResolvesClientCert for Shown {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0.load().certified))
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// Our own certificate, checked as others will check it, together with its key.
fn current(
    key: &PrivatePkcs8KeyDer<'static>,
    certificate: CertificateDer<'static>,
    authority: &CertificateDer<'static>,
    roots: &RootCertStore,
) -> Result<Current, IdentityError> {
    // Whether it has run out is no matter here: a node that slept too long must still load its key to join again.
    let (_, not_after_s) = validity_s(&certificate)?;
    let member = verify(&certificate, roots, not_after_s)?;
    let signing = provider::sign::any_eddsa_type(key).map_err(unusable)?;
    let chain = vec![certificate.clone(), authority.clone()];
    let certified = CertifiedKey::new(chain, signing);
    certified
        .keys_match()
        .map_err(|_| unusable("the certificate is for another key; remove both and join again"))?;
    Ok(Current {
        certified: Arc::new(certified),
        certificate,
        member,
    })
}

/// Verifies the chain to our authority as of `at_s` and reads who the member is.
fn verify(
    certificate: &CertificateDer<'_>,
    roots: &RootCertStore,
    at_s: u64,
) -> Result<Checked, IdentityError> {
    EndEntityCert::try_from(certificate)
        .and_then(|end_entity| {
            let at = UnixTime::since_unix_epoch(Duration::from_secs(at_s));
            let usage = KeyUsage::client_auth();
            end_entity.verify_for_usage(
                webpki::ALL_VERIFICATION_ALGS,
                &roots.roots,
                &[],
                at,
                usage,
                None,
                None,
            )?;
            Ok(())
        })
        .map_err(unusable)?;
    let (peer, role) = member_of(certificate)?;
    let (not_before_s, not_after_s) = validity_s(certificate)?;
    Ok(Checked {
        peer,
        role,
        not_before_s,
        not_after_s,
    })
}

/// From when until when a certificate holds, in seconds since 1970.
pub fn validity_s(certificate: &CertificateDer<'_>) -> Result<(u64, u64), IdentityError> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).map_err(unusable)?;
    let seconds = |time: x509_parser::time::ASN1Time| u64::try_from(time.timestamp()).unwrap_or(0);
    Ok((
        seconds(parsed.validity().not_before),
        seconds(parsed.validity().not_after),
    ))
}

/// The cluster's name in its authority's certificate.
fn organization(certificate: &CertificateDer<'_>) -> Result<String, IdentityError> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).map_err(unusable)?;
    let organization = parsed.subject().iter_organization().next();
    Ok(organization
        .and_then(|name| name.as_str().ok())
        .unwrap_or_default()
        .to_owned())
}

/// A request carries the key only: the authority decides the names.
fn certificate_request(key: &rcgen::KeyPair) -> Result<Vec<u8>, IdentityError> {
    let mut params = rcgen::CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    Ok(params
        .serialize_request(key)
        .map_err(unusable)?
        .der()
        .to_vec())
}

/// Ring, said explicitly. AES-128 comes first: it takes a quarter less CPU than AES-256, and each byte of every
/// layer goes through it.
fn crypto() -> Arc<CryptoProvider> {
    let suites = vec![
        provider::cipher_suite::TLS13_AES_128_GCM_SHA256,
        provider::cipher_suite::TLS13_AES_256_GCM_SHA384,
        provider::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
    ];
    Arc::new(CryptoProvider {
        cipher_suites: suites,
        ..provider::default_provider()
    })
}

fn unix_seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

/// The owner of a certificate: id (from the key) and role (from the names). The chain has been verified already.
pub fn member_of(certificate: &CertificateDer<'_>) -> Result<(PeerId, Role), IdentityError> {
    let end_entity = EndEntityCert::try_from(certificate).map_err(unusable)?;
    let peer = peer_id_of_spki(&end_entity.subject_public_key_info());
    let role = [Role::Seed, Role::Scheduler, Role::Peer]
        .into_iter()
        .find(|role| {
            names(peer, *role)
                .iter()
                .all(|name| end_entity.valid_dns_names().any(|n| n == name))
        })
        .ok_or_else(|| unusable("the certificate does not carry its key's name"))?;
    Ok((peer, role))
}

/// The id that belongs to a public key (SubjectPublicKeyInfo, DER).
pub fn peer_id_of_spki(spki: &[u8]) -> PeerId {
    let hash = sha256(spki);
    PeerId::from_bytes(&hash[..16]).expect("half of 32 bytes")
}

/// The DNS names in the certificate of a member: its own, then its role's.
pub fn names(peer: PeerId, role: Role) -> Vec<String> {
    let own = format!("{peer}.peer.{DOMAIN}");
    match role {
        Role::Peer => vec![own],
        Role::Seed | Role::Scheduler => vec![own, format!("{role}.{DOMAIN}")],
    }
}

/// The name under which to dial this member.
pub fn peer_name(peer: PeerId) -> ServerName<'static> {
    server_name(format!("{peer}.peer.{DOMAIN}"))
}

/// The name under which to dial any member of this role (seed or scheduler).
pub fn role_name(role: Role) -> ServerName<'static> {
    server_name(format!("{role}.{DOMAIN}"))
}

fn server_name(name: String) -> ServerName<'static> {
    ServerName::try_from(name).expect("hex and our own words make a DNS name")
}

/// The SHA-256 of a certificate, as tokens pin it.
pub fn fingerprint(certificate: &CertificateDer<'_>) -> [u8; 32] {
    sha256(certificate)
}

fn sha256(data: &[u8]) -> [u8; 32] {
    let hash = ring::digest::digest(&ring::digest::SHA256, data);
    hash.as_ref().try_into().expect("SHA-256 has 32 bytes")
}

#[cfg(test)]
mod tests;
