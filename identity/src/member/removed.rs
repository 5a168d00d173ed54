//! Members whose keys the authority removed: their certificates no longer count, in either direction of a connection.
//!
//! The list only grows. A member's id is the hash of its key, so an id that was removed never comes back with another key.

use std::collections::BTreeSet;
use std::sync::{Arc, PoisonError, RwLock};

use hawker_core::piece::PeerId;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, Error, SignatureScheme};

use super::member_of;
use hawker_api::convert::MAX_REMOVED;

/// The ids of removed members. Cheap to clone; all clones share one list.
#[derive(Clone, Debug, Default)]
pub struct RemovedMembers(Arc<RwLock<BTreeSet<PeerId>>>);

impl RemovedMembers {
    /// Whether this member was removed.
    pub fn contains(&self, peer: PeerId) -> bool {
        self.0
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .contains(&peer)
    }

    /// Adds ids, up to [`MAX_REMOVED`]. Returns those that are new.
    pub fn add(&self, ids: impl IntoIterator<Item = PeerId>) -> Vec<PeerId> {
        let mut all = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let mut new = Vec::new();
        for id in ids {
            if all.len() < MAX_REMOVED && all.insert(id) {
                new.push(id);
            }
        }
        new
    }

    /// All ids, ascending.
    pub fn all(&self) -> Vec<PeerId> {
        self.0
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
            .copied()
            .collect()
    }

    fn check(&self, certificate: &CertificateDer<'_>) -> Result<(), Error> {
        match member_of(certificate) {
            Ok((peer, _)) if !self.contains(peer) => Ok(()),
            Ok(_) => Err(Error::InvalidCertificate(CertificateError::Revoked)),
            Err(_) => Err(Error::InvalidCertificate(CertificateError::BadEncoding)),
        }
    }
}

/// Verifies a client's certificate as usual, and that its member was not removed.
#[derive(Debug)]
pub(super) struct Clients {
    pub(super) usual: Arc<dyn ClientCertVerifier>,
    pub(super) removed: RemovedMembers,
}

impl ClientCertVerifier for Clients {
    fn offer_client_auth(&self) -> bool {
        self.usual.offer_client_auth()
    }

    fn client_auth_mandatory(&self) -> bool {
        self.usual.client_auth_mandatory()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.usual.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self
            .usual
            .verify_client_cert(end_entity, intermediates, now)?;
        self.removed.check(end_entity)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.usual
            .verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.usual
            .verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.usual.supported_verify_schemes()
    }
}

/// Verifies a server's certificate as usual, and that its member was not removed.
#[derive(Debug)]
pub(super) struct Servers {
    pub(super) usual: Arc<dyn ServerCertVerifier>,
    pub(super) removed: RemovedMembers,
}

impl ServerCertVerifier for Servers {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let verified = self.usual.verify_server_cert(
            end_entity,
            intermediates,
            server_name,
            ocsp_response,
            now,
        )?;
        self.removed.check(end_entity)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.usual
            .verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.usual
            .verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.usual.supported_verify_schemes()
    }
}
