//! TLS with clients: whichever certificate is shown, they need neither ALPN nor a server's name, and speak HTTP/1.1 inside.

use std::path::Path;
use std::sync::Arc;

use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls::server::ServerSessionMemoryCache;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

/// Sessions that may be resumed, for each certificate: runtimes make a connection for each request.
const SESSIONS: usize = 64;

/// The configuration with a certificate and its key from PEM files. The error is for people: it names the file.
pub fn from_files(certificate: &Path, key: &Path) -> Result<Arc<ServerConfig>, String> {
    let chain = CertificateDer::pem_file_iter(certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|e| format!("{}: {e}", certificate.display()))?;
    if chain.is_empty() {
        return Err(format!("{} has no certificate", certificate.display()));
    }
    // A parser's error may quote what it read.
    let key_der = PrivateKeyDer::from_pem_file(key).map_err(|_| {
        format!(
            "{} has no private key in PEM form that can be read",
            key.display()
        )
    })?;
    server_config(chain, key_der).map_err(|e| {
        format!(
            "{} with the key {}: {e}",
            certificate.display(),
            key.display()
        )
    })
}

/// The configuration with this certificate, its issuers after it.
pub(crate) fn server_config(
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<Arc<ServerConfig>, rustls::Error> {
    let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, key)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    config.session_storage = ServerSessionMemoryCache::new(SESSIONS);
    Ok(Arc::new(config))
}
