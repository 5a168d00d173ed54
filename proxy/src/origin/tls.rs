//! TLS to upstream registries: the system's authorities, a registry's own, or, where the configuration says so, any.

use std::io::ErrorKind;
use std::path::Path;
use std::sync::{Arc, LazyLock};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use rustls_pki_types::pem::{self, PemObject};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};

use super::policy::Trust;
use crate::settings::ClientIdentity;

/// The system's authorities, read once.
static NATIVE: LazyLock<RootCertStore> = LazyLock::new(|| {
    let found = rustls_native_certs::load_native_certs();
    for error in &found.errors {
        tracing::warn!(%error, "some of the system's certificate authorities can't be read");
    }
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(found.certs);
    roots
});

/// A client's configuration. The error is for people: it names the file.
pub(super) fn client_config(trust: &Trust) -> Result<ClientConfig, String> {
    let provider = Arc::new(ring::default_provider());
    let identity = trust.identity.as_ref().map(read_identity).transpose()?;
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|e| e.to_string())?;
    let builder = if trust.insecure {
        builder
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AnyCertificate(provider)))
    } else {
        let mut roots = NATIVE.clone();
        if let Some(file) = &trust.ca {
            add_authorities(&mut roots, file)?;
        }
        builder.with_root_certificates(roots)
    };
    let Some((certificates, key)) = identity else {
        return Ok(builder.with_no_client_auth());
    };
    let files = trust
        .identity
        .as_ref()
        .map(ClientIdentity::to_string)
        .unwrap_or_default();
    builder
        .with_client_auth_cert(certificates, key)
        .map_err(|e| {
            format!("{files} can't be used: {e}; give the key that belongs to the certificate")
        })
}

/// Reads a certificate and its key, and tries them. The error is for people: it names the file, and shows nothing of the key.
pub fn check_identity(identity: &ClientIdentity) -> Result<(), String> {
    client_config(&Trust {
        identity: Some(identity.clone()),
        ..Trust::default()
    })
    .map(drop)
}

type Identity = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

fn read_identity(identity: &ClientIdentity) -> Result<Identity, String> {
    let ClientIdentity { certificate, key } = identity;
    let unusable = |what: &str, file: &Path, why: &pem::Error| {
        let cure = match why {
            pem::Error::Io(error) if error.kind() == ErrorKind::PermissionDenied => {
                "; make it readable for the user that runs hawker"
            }
            pem::Error::NoItemsFound => "; give an unencrypted PEM file",
            _ => "",
        };
        format!(
            "the client's {what} {} can't be used: {why}{cure}",
            file.display()
        )
    };
    let certificates = CertificateDer::pem_file_iter(certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .and_then(|all| {
            if all.is_empty() {
                Err(pem::Error::NoItemsFound)
            } else {
                Ok(all)
            }
        })
        .map_err(|why| unusable("certificate", certificate, &why))?;
    let key = PrivateKeyDer::from_pem_file(key).map_err(|why| unusable("key", key, &why))?;
    Ok((certificates, key))
}

fn add_authorities(roots: &mut RootCertStore, file: &Path) -> Result<(), String> {
    let unusable = |why: String| format!("the CA file {} can't be used: {why}", file.display());
    let certificates = CertificateDer::pem_file_iter(file)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|e| unusable(e.to_string()))?;
    if certificates.is_empty() {
        return Err(unusable("it has no certificate".into()));
    }
    for certificate in certificates {
        roots
            .add(certificate)
            .map_err(|e| unusable(e.to_string()))?;
    }
    Ok(())
}

/// Accepts any certificate of a registry that the configuration calls insecure; the handshake's signatures are still checked.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(
            message,
            cert,
            dss,
            &self.0.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(
            message,
            cert,
            dss,
            &self.0.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
