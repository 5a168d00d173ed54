//! The authority whose certificates opened connections show: made at first start, trusted by those runtimes alone that were told
//! to, and good for nothing else.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use ::lru::LruCache;
use hawker_core::lru;
use hawker_identity::member::{IdentityError, authority_params, files, serial};
use rcgen::{
    CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256,
};
use rustls::ServerConfig;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

use crate::registry::tls;

const KEY_FILE: &str = "key.pem";
/// The authority's certificate, in PEM: clients of the forward proxy put it into their trust stores.
pub const CERTIFICATE_FILE: &str = "ca.pem";
/// It is put into trust stores by hand.
const AUTHORITY_LIFE: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// A host's certificate is made anew well before its end.
const LEAF_LIFE: Duration = Duration::from_secs(7 * 24 * 3600);
const LEAF_RENEWAL: Duration = Duration::from_secs(24 * 3600);
/// How far clients' clocks may lag behind.
const CLOCK_SLACK: Duration = Duration::from_secs(3600);
/// Hosts whose certificates are kept.
const HOSTS: NonZeroUsize = NonZeroUsize::new(128).expect("not zero");

/// Makes certificates for hosts.
pub(super) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    /// All hosts' certificates are for this one key, new at each start.
    leaf_key: KeyPair,
    leaves: Mutex<LruCache<String, Leaf>>,
}

#[derive(Clone)]
struct Leaf {
    config: Arc<ServerConfig>,
    renew_at: SystemTime,
}

/// The folder of the authority for a daemon with this data folder.
pub fn authority_dir(data_dir: &Path) -> PathBuf {
    data_dir.join("intercept")
}

fn unusable(why: impl std::fmt::Display) -> IdentityError {
    IdentityError::Unusable(why.to_string())
}

impl Authority {
    /// The authority in `dir`; made there if there is none. `name` is the node's, for people who look at trust stores.
    pub(super) fn open_or_create(dir: &Path, name: &str) -> Result<Self, IdentityError> {
        // The certificate is written last: without it nothing was completed.
        let Some(certificate) = files::read_if_there(&dir.join(CERTIFICATE_FILE))? else {
            return Self::create(dir, name);
        };
        let key = String::from_utf8(files::read(&dir.join(KEY_FILE))?).map_err(unusable)?;
        // A parser's error may quote what it read.
        let key = KeyPair::from_pem(&key).map_err(|_| {
            unusable(format!(
                "{} has no private key",
                dir.join(KEY_FILE).display()
            ))
        })?;
        Self::assemble(key, files::certificate(&certificate)?)
    }

    fn create(dir: &Path, name: &str) -> Result<Self, IdentityError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(unusable)?;
        let name = format!("Hawker forward proxy on {name}");
        let params = authority_params("Hawker", &name, AUTHORITY_LIFE)?;
        let certificate = params.self_signed(&key).map_err(unusable)?.der().clone();
        files::write(&dir.join(KEY_FILE), key.serialize_pem().as_bytes())?;
        files::write(
            &dir.join(CERTIFICATE_FILE),
            &files::certificate_pem(&certificate),
        )?;
        Self::assemble(key, certificate)
    }

    fn assemble(key: KeyPair, certificate: CertificateDer<'static>) -> Result<Self, IdentityError> {
        let issuer = Issuer::from_ca_cert_der(&certificate, key).map_err(unusable)?;
        let leaf_key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(unusable)?;
        Ok(Self {
            issuer,
            certificate,
            leaf_key,
            leaves: Mutex::new(lru::bounded(HOSTS)),
        })
    }

    /// TLS as this host, a name or an address without brackets.
    pub(super) fn server_config(
        &self,
        host: &str,
        now: SystemTime,
    ) -> Result<Arc<ServerConfig>, IdentityError> {
        let mut leaves = self.leaves.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(leaf) = leaves.get(host).filter(|leaf| now < leaf.renew_at) {
            return Ok(Arc::clone(&leaf.config));
        }
        let leaf = self.issue(host, now)?;
        leaves.put(host.to_owned(), leaf.clone());
        Ok(leaf.config)
    }

    fn issue(&self, host: &str, now: SystemTime) -> Result<Leaf, IdentityError> {
        // An address in text becomes an address in the certificate.
        let mut params = CertificateParams::new([host.to_owned()]).map_err(unusable)?;
        params.distinguished_name = DistinguishedName::new();
        params
            .distinguished_name
            .push(DnType::OrganizationName, "Hawker forward proxy");
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.serial_number = Some(serial()?);
        params.use_authority_key_identifier_extension = true;
        params.not_before = (now - CLOCK_SLACK).into();
        params.not_after = (now + LEAF_LIFE).into();
        let leaf = params
            .signed_by(&self.leaf_key, &self.issuer)
            .map_err(unusable)?
            .der()
            .clone();
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(self.leaf_key.serialize_der()));
        let config =
            tls::server_config(vec![leaf, self.certificate.clone()], key).map_err(unusable)?;
        Ok(Leaf {
            config,
            renew_at: now + (LEAF_LIFE - LEAF_RENEWAL),
        })
    }
}
