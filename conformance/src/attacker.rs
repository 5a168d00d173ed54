//! A member that dials others and says what it likes: it has joined with a token like any other.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use hawker_api::v1::peer_message::Message as Wire;
use hawker_api::{convert, v1};
use hawker_core::application::Purpose;
use hawker_core::message::Message;
use hawker_core::piece::{PeerId, PieceLayout, PieceTable};
use hawker_identity::join::{self, Token};
use hawker_identity::member::{self, Identity};
use hawker_oci::digest::{Algorithm, ChainValue, Digest};
use hawker_oci::reference::Source;
use prost::Message as _;
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, ReadHalf, WriteHalf};
use tokio::net::TcpStream;
use tokio::sync::Mutex;
use tokio::task::JoinHandle;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::lab::{Hawker, Host};

/// The protocol that peers negotiate in TLS.
const ALPN: &[u8] = b"hawker-peer/3";
/// How long joining, and connecting, may take.
const DEADLINE: Duration = Duration::from_secs(20);
/// Kind of a frame that carries a message.
const CONTROL: u8 = 1;

/// A member that means harm. Dropping it ends it.
pub struct Attacker {
    membership: Membership,
    runtime: tokio::runtime::Runtime,
}

/// An attacker's key and certificate, for connections on any runtime.
#[derive(Clone)]
pub struct Membership {
    identity: Identity,
}

/// One of its connections; dropping it ends it. The messages of the other side are read: pings are answered, refusals are counted.
pub struct Line {
    out: Arc<Mutex<Out>>,
    refusals: Arc<AtomicU64>,
    listener: JoinHandle<()>,
    runtime: tokio::runtime::Handle,
}

type Out = WriteHalf<TlsStream<TcpStream>>;

impl Attacker {
    /// Joins the cluster of `authority` as a peer on `host`.
    ///
    /// # Errors
    /// When it is not let in.
    pub fn join(host: &Host, authority: &Hawker) -> Result<Self> {
        let token: Token = authority.token("peer")?.parse()?;
        let scheduler = authority.scheduler().to_string();
        let runtime = host.runtime(1)?;
        // Spawned: the runtime's own threads are on the host, this one is not.
        let joined = runtime.spawn(async move {
            let request = Identity::request()?;
            let joining = join::join(&scheduler, &token, "attacker", &request);
            anyhow::Ok(
                tokio::time::timeout(DEADLINE, joining)
                    .await
                    .context("joining")??
                    .0,
            )
        });
        let identity = runtime.block_on(joined)??;
        Ok(Self {
            membership: Membership { identity },
            runtime,
        })
    }

    /// Its key and certificate.
    #[must_use]
    pub const fn membership(&self) -> &Membership {
        &self.membership
    }

    /// Connects to a member's peer port and greets it.
    ///
    /// # Errors
    /// When it is turned away.
    pub fn connect(&self, to: &Hawker) -> Result<Line> {
        let (peer, address): (PeerId, _) = (to.status()?.peer_id.parse()?, to.peer());
        let membership = self.membership.clone();
        self.runtime.block_on(
            self.runtime
                .spawn(async move { membership.connect(address, peer).await }),
        )?
    }

    /// See [`Membership::table`].
    #[must_use]
    pub fn table(&self, task: Digest, size_bytes: u64) -> Message {
        self.membership.table(task, size_bytes)
    }
}

impl Membership {
    /// Connects to the peer port of a member and greets it.
    ///
    /// # Errors
    /// When it is turned away, or the deadline.
    pub async fn connect(&self, address: SocketAddr, peer: PeerId) -> Result<Line> {
        let greeting = self.greet(address, peer);
        let (mut reader, out) = tokio::time::timeout(DEADLINE, greeting)
            .await
            .context("connecting")??;
        let (out, refusals) = (Arc::new(Mutex::new(out)), Arc::new(AtomicU64::new(0)));
        let (answers, refused) = (Arc::clone(&out), Arc::clone(&refusals));
        let listener = tokio::spawn(async move {
            while let Ok(message) = hear(&mut reader).await {
                match message {
                    Some(Wire::Unavailable(_)) => drop(refused.fetch_add(1, Ordering::Relaxed)),
                    Some(Wire::Ping(v1::Ping { nonce })) => {
                        // If it cannot be written, nothing is heard either.
                        let _ = write(
                            &mut *answers.lock().await,
                            &encoded(Wire::Pong(v1::Pong { nonce })),
                        )
                        .await;
                    }
                    _ => {}
                }
            }
        });
        Ok(Line {
            out,
            refusals,
            listener,
            runtime: tokio::runtime::Handle::current(),
        })
    }

    async fn greet(
        &self,
        address: SocketAddr,
        peer: PeerId,
    ) -> Result<(ReadHalf<TlsStream<TcpStream>>, Out)> {
        let tcp = TcpStream::connect(address).await?;
        let connector = TlsConnector::from(self.identity.client_config(ALPN));
        let tls = connector.connect(member::peer_name(peer), tcp).await?;
        let (mut reader, mut out) = tokio::io::split(tls);
        write(&mut out, &encoded(Wire::Hello(hello()))).await?;
        let Wire::Hello(_) = hear(&mut reader).await?.context("no hello")? else {
            bail!("no hello")
        };
        Ok((reader, out))
    }

    /// TLS for dialling the cluster's schedulers without a certificate, as strangers do.
    ///
    /// # Errors
    /// When the authority's certificate is of no use.
    pub fn stranger(&self) -> Result<Arc<ClientConfig>> {
        let mut roots = RootCertStore::empty();
        roots.add(self.identity.authority().clone())?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![join::ALPN.to_vec()];
        Ok(Arc::new(config))
    }

    /// A table that it has signed, of an invented blob of this size.
    #[must_use]
    pub fn table(&self, task: Digest, size_bytes: u64) -> Message {
        let mut table = PieceTable::new(task, PieceLayout::new(size_bytes));
        (0..table.full_count()).for_each(|_| table.push(ChainValue::initial(Algorithm::Sha256)));
        self.identity
            .sign(&mut table, true, Vec::new(), std::time::SystemTime::now());
        let (values, signed) = (table.values().to_vec(), table.signed().cloned());
        Message::Table {
            task,
            size_bytes,
            first: 0,
            values,
            signed,
        }
    }
}

impl Line {
    /// Says something. Waits while the other side does not read, up to a deadline.
    ///
    /// # Errors
    /// When the connection is over, or the deadline.
    pub fn say(&mut self, message: &Message, within: Duration) -> Result<()> {
        self.runtime.block_on(self.tell(message, within))
    }

    /// The same for a task of the runtime that the connection was made on.
    ///
    /// # Errors
    /// As [`Line::say`].
    pub async fn tell(&self, message: &Message, within: Duration) -> Result<()> {
        let message = convert::peer_message(message)
            .message
            .context("a message")?;
        self.put(&encoded(message), within).await
    }

    /// Writes these bytes as they are.
    ///
    /// # Errors
    /// As [`Line::say`].
    pub fn write(&mut self, bytes: &[u8], within: Duration) -> Result<()> {
        self.runtime.block_on(self.put(bytes, within))
    }

    async fn put(&self, bytes: &[u8], within: Duration) -> Result<()> {
        let writing = async { write(&mut *self.out.lock().await, bytes).await };
        tokio::time::timeout(within, writing)
            .await
            .context("writing")?
    }

    /// Tasks that it was told not to wait for.
    #[must_use]
    pub fn refusals(&self) -> u64 {
        self.refusals.load(Ordering::Relaxed)
    }

    /// Whether the other side has closed it.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.listener.is_finished()
    }

    /// Waits until the other side closes it.
    pub async fn over(&mut self) {
        // However its listener ends, the connection is over.
        let _ = (&mut self.listener).await;
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.listener.abort();
    }
}

/// An interest in a blob of a repository.
#[must_use]
pub fn interest(task: Digest, registry: &str, repository: &str) -> Message {
    Message::Interest {
        task,
        source: Source {
            registry: registry.to_owned(),
            repository: repository.to_owned(),
        },
        size_bytes: None,
        token: None,
        purpose: Purpose::default(),
        far: None,
        passive: false,
        partial: false,
    }
}

/// A digest that nothing has.
#[must_use]
pub fn invented(n: u32) -> Digest {
    Digest::of(Algorithm::Sha256, &n.to_be_bytes())
}

fn hello() -> v1::Hello {
    let (version, name) = (Some(hawker_api::VERSION), "attacker".into());
    v1::Hello {
        version,
        name,
        addresses: Vec::new(),
        instance: 1,
    }
}

fn encoded(message: Wire) -> Vec<u8> {
    let payload = v1::PeerMessage {
        message: Some(message),
    }
    .encode_to_vec();
    let length = (payload.len() as u32 + 1).to_be_bytes();
    [&length[..], &[CONTROL], &payload].concat()
}

async fn write(out: &mut Out, bytes: &[u8]) -> Result<()> {
    out.write_all(bytes).await?;
    Ok(out.flush().await?)
}

/// The next message; `None` for a frame of another kind.
async fn hear(reader: &mut ReadHalf<TlsStream<TcpStream>>) -> Result<Option<Wire>> {
    let length = reader.read_u32().await? as usize;
    let mut payload = vec![0; length.min(8 << 20)];
    reader.read_exact(&mut payload).await?;
    Ok(match payload.split_first() {
        Some((&CONTROL, message)) => v1::PeerMessage::decode(message)?.message,
        _ => None,
    })
}
