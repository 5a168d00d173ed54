//! Joining a cluster with a token, renewing the certificate, and dialling a scheduler: the client's side of the authority.

use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hawker_core::message::Role;
use hawker_core::piece::PeerId;
use hawker_oci::digest::{Digest, hex};
use hyper_util::rt::TokioIo;
use ring::rand::{SecureRandom, SystemRandom};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use crate::member::{Identity, IdentityError, PendingIdentity, fingerprint, member_of, role_name};
use hawker_api::convert::{self, ConvertError, Member};
use hawker_api::v1;
use hawker_api::v1::authority_client::AuthorityClient;
use hawker_network::names::{self, NamedBy};

/// The protocol that TLS negotiates for gRPC.
pub const ALPN: &[u8] = b"h2";
/// The first part of every token. A later form gets another number.
const TOKEN_FORM: &str = "hawker1";
/// To reach one address, and to shake hands with it.
const DIAL_TIMEOUT: Duration = Duration::from_secs(5);
/// For one question to the authority.
const CALL_TIMEOUT: Duration = Duration::from_secs(20);
/// A connection over which nothing comes back for twice this long is given up.
const KEEPALIVE: Duration = Duration::from_secs(10);

/// A join token: it lets a node join once, and is shown to people as `hawker1.<id>.<secret>.<SHA-256 of the
/// authority's certificate>`.
///
/// `Display` shows all of it, for the one who made it; `Debug` hides the secret.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    /// Which token: lower-case hex.
    pub id: String,
    /// The secret, in lower-case hex.
    pub secret: String,
    /// The SHA-256 of the certificate of the authority that the joiner trusts.
    pub authority: [u8; 32],
}

/// A text that is no token. The caller's fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "this is no token: it has the form hawker1.<id>.<secret>.<fingerprint>; make one with `hawker token create`"
)]
pub struct TokenError;

impl Token {
    /// A new one for this authority, from the system's randomness: 64 bits of id, 256 of secret.
    pub fn generate(authority: &CertificateDer<'_>) -> Result<Self, IdentityError> {
        let (mut id, mut secret) = ([0; 8], [0; 32]);
        let random = SystemRandom::new();
        random
            .fill(&mut id)
            .and_then(|()| random.fill(&mut secret))
            .map_err(|_| IdentityError::Unusable("the system gives no randomness".into()))?;
        Ok(Self {
            id: hex(&id),
            secret: hex(&secret),
            authority: fingerprint(authority),
        })
    }
}

impl FromStr for Token {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, TokenError> {
        let parts: Vec<&str> = text.trim().split('.').collect();
        let [TOKEN_FORM, id, secret, authority] = parts[..] else {
            return Err(TokenError);
        };
        let is_hex = |text: &str, digits: usize| {
            text.len() == digits
                && text
                    .bytes()
                    .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
        };
        if !is_hex(id, 16) || !is_hex(secret, 64) {
            return Err(TokenError);
        }
        let authority: Digest = format!("sha256:{authority}")
            .parse()
            .map_err(|_| TokenError)?;
        let authority = authority.as_bytes().try_into().map_err(|_| TokenError)?;
        Ok(Self {
            id: id.to_owned(),
            secret: secret.to_owned(),
            authority,
        })
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{TOKEN_FORM}.{}.{}.{}",
            self.id,
            self.secret,
            hex(&self.authority)
        )
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token({}, …)", self.id)
    }
}

/// Why a scheduler can't be spoken to.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ConnectError {
    /// No address answers. The network's or the address's fault; a retry may help.
    #[error(
        "the scheduler at {address} cannot be reached: {why}; check the address, and that `hawker scheduler` or `hawker up` runs there"
    )]
    Unreachable {
        /// As it was given.
        address: String,
        /// The result of the last try.
        why: String,
    },
    /// Somebody answers, but not a scheduler of our cluster.
    #[error("{address} is no scheduler of this cluster: {why}")]
    Stranger {
        /// As it was given.
        address: String,
        /// The fault of its certificate.
        why: String,
    },
    /// Our own certificate does not suffice.
    #[error("our own certificate cannot be used: {0}")]
    Ours(String),
}

/// The reason why joining or renewing failed. The text for people names the cure.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// No scheduler there.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// Somebody answers whom the token does not vouch for.
    #[error(
        "{address} belongs to another cluster than the token: its authority has another fingerprint; use a token made there, or the address of the cluster that made the token"
    )]
    WrongAuthority {
        /// As it was given.
        address: String,
    },
    /// The authority does not take the token, or the certificate. A retry does not help; the text says why.
    #[error("the authority refused: {0}")]
    Refused(String),
    /// This scheduler has no authority; the text says who has.
    #[error("{0}")]
    NoAuthority(String),
    /// Too many join at once, or the answer did not come. A retry helps.
    #[error("the authority did not answer: {0}; try again")]
    Busy(String),
    /// Our key, or the certificate that came.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// It says what no authority of this version says.
    #[error("the authority's answer makes no sense: {0}")]
    Answer(#[from] ConvertError),
}

impl JoinError {
    /// Whether it is worth trying the same again.
    pub const fn is_transient(&self) -> bool {
        matches!(
            self,
            Self::Busy(_) | Self::Connect(ConnectError::Unreachable { .. })
        )
    }

    fn from_status(status: &Status) -> Self {
        let text = status.message().to_owned();
        match status.code() {
            Code::Unauthenticated | Code::PermissionDenied | Code::InvalidArgument => {
                Self::Refused(text)
            }
            Code::FailedPrecondition => Self::NoAuthority(text),
            _ => Self::Busy(if text.is_empty() {
                status.code().to_string()
            } else {
                text
            }),
        }
    }
}

/// A connection to a scheduler. It is not dialled again when it breaks: the next dial resolves the name again.
#[derive(Clone, Debug)]
pub struct Connection {
    /// For the generated clients.
    pub channel: Channel,
    /// Which scheduler this is.
    pub peer: PeerId,
    /// This host's end of the connection.
    pub local: std::net::SocketAddr,
}

/// Joins the cluster whose scheduler is at `address`: with a new key ([`Identity::request`]), for the certificate that
/// the token buys. A second try uses the same key: an answer that was lost has spent the token for that key alone.
/// Also gives the members (seeds and schedulers) and the cluster's name. `name` is for people. Nothing is written to
/// disk.
pub async fn join(
    address: &str,
    token: &Token,
    name: &str,
    pending: &PendingIdentity,
) -> Result<(Identity, Vec<Member>, String), JoinError> {
    let stream = dial(address, pinned_config(token.authority)?)
        .await
        .map_err(|error| match error {
            Dial::Failed(error) => error.into(),
            Dial::Tls(error) if error == not_pinned() => JoinError::WrongAuthority {
                address: address.into(),
            },
            Dial::Tls(error) => JoinError::Connect(stranger(address, &error)),
        })?;
    let channel = channel(address, stream).await?;
    let request = v1::JoinRequest {
        version: Some(hawker_api::VERSION),
        token_id: token.id.clone(),
        token_secret: token.secret.clone(),
        certificate_request: pending.certificate_request.clone(),
        name: name.to_owned(),
    };
    let reply = call(AuthorityClient::new(channel).join(request)).await?;
    let authority = CertificateDer::from(reply.authority);
    if fingerprint(&authority) != token.authority {
        return Err(JoinError::WrongAuthority {
            address: address.into(),
        });
    }
    let identity = pending.complete(CertificateDer::from(reply.certificate), authority)?;
    let members = convert::from_members(reply.members.unwrap_or_default().members)?;
    Ok((
        identity,
        members,
        convert::from_label(reply.cluster, "cluster")?,
    ))
}

/// Asks for a new certificate for the same key and role, and puts it in place. The caller saves it.
pub async fn renew(address: &str, identity: &Identity) -> Result<(), JoinError> {
    let connection = connect(address, identity).await?;
    let certificate_request = identity.renewal_request()?;
    let request = v1::RenewRequest {
        version: Some(hawker_api::VERSION),
        certificate_request,
    };
    let reply = call(AuthorityClient::new(connection.channel).renew(request)).await?;
    Ok(identity.renew(CertificateDer::from(reply.certificate))?)
}

/// Dials the scheduler at `address` (`host:port`, resolved now) as a member.
pub async fn connect(address: &str, identity: &Identity) -> Result<Connection, ConnectError> {
    let stream =
        dial(address, identity.client_config(ALPN))
            .await
            .map_err(|error| match error {
                Dial::Failed(error) => error,
                Dial::Tls(error) => stranger(address, &error),
            })?;
    let certificates = stream.get_ref().1.peer_certificates();
    let scheduler = certificates.and_then(|chain| chain.first()).map(member_of);
    let Some(Ok((peer, Role::Scheduler))) = scheduler else {
        return Err(ConnectError::Stranger {
            address: address.into(),
            why: "it is another member".into(),
        });
    };
    let local = stream.get_ref().0.local_addr();
    let local = local.map_err(|error| ConnectError::Unreachable {
        address: address.into(),
        why: error.to_string(),
    })?;
    Ok(Connection {
        channel: channel(address, stream).await?,
        peer,
        local,
    })
}

async fn call<T>(
    call: impl Future<Output = Result<tonic::Response<T>, Status>>,
) -> Result<T, JoinError> {
    match timeout(CALL_TIMEOUT, call).await {
        Ok(Ok(reply)) => Ok(reply.into_inner()),
        Ok(Err(status)) => Err(JoinError::from_status(&status)),
        Err(_) => Err(JoinError::Busy("no answer in time".into())),
    }
}

enum Dial {
    Failed(ConnectError),
    Tls(rustls::Error),
}

type Stream = TlsStream<TcpStream>;

/// Resolves the name and tries its addresses in turn, up to a TLS connection with a scheduler.
async fn dial(address: &str, config: Arc<ClientConfig>) -> Result<Stream, Dial> {
    let unreachable = |why: String| {
        Dial::Failed(ConnectError::Unreachable {
            address: address.to_owned(),
            why,
        })
    };
    let resolved = names::resolve_address(address, NamedBy::Configuration).await;
    let resolved = resolved.map_err(|error| unreachable(error.to_string()))?;
    let mut last = unreachable("the name has no address".into());
    for socket_address in resolved {
        match timeout(DIAL_TIMEOUT, handshake(socket_address, Arc::clone(&config))).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) => match error
                .get_ref()
                .and_then(|inner| inner.downcast_ref::<rustls::Error>())
            {
                Some(tls) => last = Dial::Tls(tls.clone()),
                None => last = unreachable(error.to_string()),
            },
            Err(_) => last = unreachable("no answer in time".into()),
        }
    }
    Err(last)
}

async fn handshake(
    address: std::net::SocketAddr,
    config: Arc<ClientConfig>,
) -> std::io::Result<Stream> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    TlsConnector::from(config)
        .connect(role_name(Role::Scheduler), stream)
        .await
}

/// gRPC over a stream that is there.
async fn channel(address: &str, stream: Stream) -> Result<Channel, ConnectError> {
    let stream = Mutex::new(Some(TokioIo::new(stream)));
    let once = tower::service_fn(move |_: http::Uri| {
        let taken = stream.lock().unwrap_or_else(PoisonError::into_inner).take();
        async move { taken.ok_or_else(|| std::io::Error::from(std::io::ErrorKind::ConnectionAborted)) }
    });
    let unreachable = |why: String| ConnectError::Unreachable {
        address: address.to_owned(),
        why,
    };
    // The name is of no use: TLS has verified by role already, and there is one server behind the stream.
    Endpoint::from_static("http://scheduler.hawker.internal")
        .connect_timeout(DIAL_TIMEOUT)
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE)
        .keep_alive_while_idle(true)
        .connect_with_connector(once)
        .await
        .map_err(|error| unreachable(error.to_string()))
}

fn stranger(address: &str, error: &rustls::Error) -> ConnectError {
    match error {
        rustls::Error::AlertReceived(rustls::AlertDescription::CertificateRevoked) => {
            ConnectError::Ours(format!(
                "{address} says that this node was removed from the cluster; to come back, remove its identity folder and join with \
             a new token"
            ))
        }
        // The other side's judgement of our certificate.
        rustls::Error::AlertReceived(alert) => ConnectError::Ours(format!(
            "{address} answered {alert:?}; join again with a new token"
        )),
        rustls::Error::InvalidCertificate(
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. },
        ) => ConnectError::Stranger {
            address: address.to_owned(),
            why: "its certificate is not valid yet; check this machine's clock".into(),
        },
        error => ConnectError::Stranger {
            address: address.to_owned(),
            why: error.to_string(),
        },
    }
}

/// TLS for somebody who knows nothing but the authority's fingerprint.
fn pinned_config(authority: [u8; 32]) -> Result<Arc<ClientConfig>, IdentityError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| IdentityError::Unusable(error.to_string()))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Pinned {
            authority,
            provider,
        }))
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(Arc::new(config))
}

/// The error of [`Pinned`] for a chain without the authority.
fn not_pinned() -> rustls::Error {
    rustls::Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure)
}

/// Trusts the authority with this fingerprint, wherever in the chain it is shown, and whom it vouches for as usual.
#[derive(Debug)]
struct Pinned {
    authority: [u8; 32],
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let authority = intermediates
            .iter()
            .find(|shown| fingerprint(shown) == self.authority);
        let mut roots = RootCertStore::empty();
        roots.add(authority.ok_or_else(not_pinned)?.clone().into_owned())?;
        WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&self.provider))
            .build()
            .map_err(|error| rustls::Error::General(error.to_string()))?
            .verify_server_cert(end_entity, &[], server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(
            message,
            certificate,
            signature,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(
            message,
            certificate,
            signature,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::member::AuthorityKey;

    fn token() -> Token {
        let authority = AuthorityKey::generate("test").expect("a key");
        Token::generate(authority.certificate()).expect("randomness")
    }

    #[test]
    fn a_token_survives_being_written_down() {
        let token = token();
        assert_eq!(format!(" {token}\n").parse(), Ok(token));
    }

    #[test]
    fn a_token_does_not_show_its_secret_by_accident() {
        let token = token();
        assert!(!format!("{token:?}").contains(&token.secret));
    }

    #[test]
    fn what_is_no_token_is_refused() {
        let good = token().to_string();
        let cases = [
            String::new(),
            "hawker1".into(),
            good.replace("hawker1", "hawker2"),
            good.to_uppercase(),
            format!("{good}0"),
            format!("{good}.0"),
            good.replacen('.', "..", 1),
            good.replacen('.', "./", 1),
        ];
        for text in cases {
            assert_eq!(text.parse::<Token>(), Err(TokenError), "{text}");
        }
    }

    #[tokio::test]
    async fn an_address_where_nobody_is_says_so() {
        let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = free.local_addr().expect("bound").to_string();
        drop(free);
        let pending = Identity::request().expect("a key");
        let error = join(&address, &token(), "n", &pending)
            .await
            .expect_err("nobody is there");
        assert!(
            error.is_transient() && error.to_string().contains(&address),
            "{error}"
        );
    }
}
