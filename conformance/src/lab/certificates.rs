//! A private CA, as companies put before their registries: nobody trusts it who was not told to.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, Result};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use rustls_pki_types::PrivateKeyDer;
use rustls_pki_types::pem::PemObject as _;

use super::Lab;
use super::host::Host;

/// A CA that no system's trust store knows.
#[derive(Debug)]
pub struct PrivateCa {
    issuer: Issuer<'static, KeyPair>,
    certificate: PathBuf,
}

/// A server's certificate and its key, as files.
#[derive(Clone, Debug)]
pub struct ServerCertificate {
    /// PEM.
    pub certificate: PathBuf,
    /// PEM.
    pub key: PathBuf,
}

impl PrivateCa {
    /// A new one, whose files are the lab's.
    ///
    /// # Errors
    /// When its certificate cannot be written.
    pub fn new(lab: &Lab) -> Result<Self> {
        let mut params = CertificateParams::default();
        params
            .distinguished_name
            .push(DnType::CommonName, "a company's CA");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let key = KeyPair::generate()?;
        // A folder of its own: some clients take one, and trust all in it.
        let dir = lab.dir().join("ca");
        fs::create_dir(&dir).context("one private CA a lab is enough")?;
        let certificate = dir.join("ca.crt");
        fs::write(&certificate, params.self_signed(&key)?.pem())?;
        Ok(Self {
            issuer: Issuer::new(params, key),
            certificate,
        })
    }

    /// Its own certificate (PEM), for those who are to trust it: `ca.crt`, alone in its folder.
    #[must_use]
    pub fn certificate(&self) -> &Path {
        &self.certificate
    }

    /// A certificate for what serves at a host's address.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn issue(&self, host: &Host) -> Result<ServerCertificate> {
        self.issue_for(host, &[])
    }

    /// The same for a server that has names, too.
    ///
    /// # Errors
    /// As [`PrivateCa::issue`].
    pub fn issue_for(&self, host: &Host, names: &[&str]) -> Result<ServerCertificate> {
        let key = KeyPair::generate()?;
        let names: Vec<_> = names
            .iter()
            .map(|&name| name.to_owned())
            .chain([host.ip().to_string()])
            .collect();
        let params = CertificateParams::new(names)?;
        let files = ServerCertificate {
            certificate: host.dir().join("server.crt"),
            key: host.dir().join("server.key"),
        };
        fs::write(
            &files.certificate,
            params.signed_by(&key, &self.issuer)?.pem(),
        )?;
        fs::write(&files.key, key.serialize_pem())?;
        Ok(files)
    }
}

impl ServerCertificate {
    /// For servers of this process.
    ///
    /// # Errors
    /// When the files are gone.
    pub fn tls(&self) -> Result<Arc<rustls::ServerConfig>> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = rustls::ServerConfig::builder_with_provider(provider);
        let builder = builder
            .with_safe_default_protocol_versions()?
            .with_no_client_auth();
        let certificate = rustls_pki_types::CertificateDer::from_pem_file(&self.certificate)?;
        let key = PrivateKeyDer::from_pem_file(&self.key)?;
        Ok(Arc::new(builder.with_single_cert(vec![certificate], key)?))
    }
}
