//! The authority's key, which signs the certificates of a cluster's members.

use std::fmt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use hawker_core::message::Role;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData,
    SerialNumber,
};
use ring::rand::{SecureRandom, SystemRandom};
use rustls::pki_types::{CertificateDer, CertificateSigningRequestDer};

use super::{IdentityError, files, names, peer_id_of_spki, unusable};

const KEY_FILE: &str = "key.pem";
const CERTIFICATE_FILE: &str = "certificate.pem";
/// The authority is pinned by every member: it outlives the cluster.
const AUTHORITY_LIFE: Duration = Duration::from_secs(30 * 365 * 24 * 3600);
/// How far members' clocks may lag behind the authority's.
const CLOCK_SLACK: Duration = Duration::from_secs(3600);

/// The certificate of an authority that signs those of others, and no other authority's.
pub fn authority_params(
    organization: &str,
    name: &str,
    life: Duration,
) -> Result<CertificateParams, IdentityError> {
    let now = SystemTime::now();
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params
        .distinguished_name
        .push(DnType::OrganizationName, organization);
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.serial_number = Some(serial()?);
    params.not_before = (now - CLOCK_SLACK).into();
    params.not_after = (now + life).into();
    Ok(params)
}

/// A cluster's certificate authority: an Ed25519 key and its self-signed certificate.
pub struct AuthorityKey {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    cluster: String,
}

impl AuthorityKey {
    /// A new authority for the cluster of this name.
    pub fn generate(cluster: &str) -> Result<Self, IdentityError> {
        let key = KeyPair::generate_for(&rcgen::PKCS_ED25519).map_err(unusable)?;
        let params = authority_params(cluster, "Hawker authority", AUTHORITY_LIFE)?;
        let certificate = params.self_signed(&key).map_err(unusable)?.der().clone();
        Self::assemble(key, certificate)
    }

    /// Loads the files that `save` wrote into `dir`; `None` when there is nothing yet. A key without its certificate
    /// is an error: with a new authority in its place, no member would belong to the cluster any more.
    pub fn load(dir: &Path) -> Result<Option<Self>, IdentityError> {
        let Some(certificate) = files::read_if_there(&dir.join(CERTIFICATE_FILE))? else {
            return match files::read_if_there(&dir.join(KEY_FILE))? {
                None => Ok(None),
                Some(_) => Err(unusable(format!(
                    "{CERTIFICATE_FILE} is missing beside the authority's key"
                ))),
            };
        };
        let key = String::from_utf8(files::read(&dir.join(KEY_FILE))?)
            .map_err(|_| unusable("the authority's key is not PEM"))?;
        let key = KeyPair::from_pem(&key).map_err(unusable)?;
        Self::assemble(key, files::certificate(&certificate)?).map(Some)
    }

    /// Writes key (mode 0600) and certificate, each by write, fsync, rename.
    pub fn save(&self, dir: &Path) -> Result<(), IdentityError> {
        files::write(
            &dir.join(KEY_FILE),
            self.issuer.key().serialize_pem().as_bytes(),
        )?;
        files::write(
            &dir.join(CERTIFICATE_FILE),
            &files::certificate_pem(&self.certificate),
        )
    }

    /// The authority's own certificate, which every member trusts and every token pins.
    pub const fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// The cluster's name.
    pub fn cluster(&self) -> &str {
        &self.cluster
    }

    /// A certificate for the key in `request` (PKCS #10, DER), valid from an hour before `now` until `life` after it.
    ///
    /// The request proves the possession of its key. Names in it count for nothing: they follow from the key and the role.
    pub fn issue(
        &self,
        request: &[u8],
        role: Role,
        life: Duration,
        now: SystemTime,
    ) -> Result<CertificateDer<'static>, IdentityError> {
        let request =
            CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(request))
                .map_err(|e| unusable(format!("the certificate request: {e}")))?;
        let key = request.public_key;
        if key.algorithm() != &rcgen::PKCS_ED25519 {
            return Err(unusable("members' keys are Ed25519"));
        }
        let peer = peer_id_of_spki(&key.subject_public_key_info());
        let mut params = CertificateParams::new(names(peer, role)).map_err(unusable)?;
        params.distinguished_name = DistinguishedName::new();
        params
            .distinguished_name
            .push(DnType::CommonName, peer.to_string());
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.serial_number = Some(serial()?);
        params.use_authority_key_identifier_extension = true;
        params.not_before = (now - CLOCK_SLACK).into();
        params.not_after = (now + life).into();
        Ok(params
            .signed_by(&key, &self.issuer)
            .map_err(unusable)?
            .der()
            .clone())
    }

    fn assemble(key: KeyPair, certificate: CertificateDer<'static>) -> Result<Self, IdentityError> {
        let cluster = {
            let (_, parsed) =
                x509_parser::parse_x509_certificate(&certificate).map_err(unusable)?;
            if parsed.public_key().raw != key.subject_public_key_info() {
                return Err(unusable("the authority's certificate is for another key"));
            }
            let organization = parsed.subject().iter_organization().next();
            organization
                .and_then(|name| name.as_str().ok())
                .unwrap_or_default()
                .to_owned()
        };
        let issuer = Issuer::from_ca_cert_der(&certificate, key).map_err(unusable)?;
        Ok(Self {
            issuer,
            certificate,
            cluster,
        })
    }
}

impl fmt::Debug for AuthorityKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AuthorityKey({:?})", self.cluster)
    }
}

/// A new certificate's number: random, so that no two of an issuer are the same.
pub fn serial() -> Result<SerialNumber, IdentityError> {
    let mut bytes = [0; 16];
    SystemRandom::new()
        .fill(&mut bytes)
        .map_err(|_| unusable("the system gives no random numbers"))?;
    // Positive and not zero, as X.509 wants it.
    bytes[0] = bytes[0] & 0x7f | 0x40;
    Ok(SerialNumber::from_slice(&bytes))
}
