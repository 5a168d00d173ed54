//! A member that misbehaves: it has joined with a token like any other, speaks the peers' protocol, and lies.

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, bail, ensure};
use hawker_api::v1::from_peer::Event as Say;
use hawker_api::v1::peer_message::Message as Wire;
use hawker_api::v1::scheduler_client::SchedulerClient;
use hawker_api::{convert, v1};
use hawker_core::message::{Message, Offer};
use hawker_core::piece::{PeerId, PieceIndex, PieceLayout, PieceTable};
use hawker_identity::join::{self, Token};
use hawker_identity::member::Identity;
use hawker_oci::digest::Chain;
use prost::Message as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;

use crate::lab::{Hawker, Host};
use crate::origin::{Blob, Content};

/// The protocol that peers negotiate in TLS.
const ALPN: &[u8] = b"hawker-peer/3";
const PORT: u16 = 6501;
/// How long joining and being known may take.
const JOIN: Duration = Duration::from_secs(20);
/// Kinds of frames.
const CONTROL: u8 = 1;
const DATA: u8 = 2;
const DATA_AT_MOST_BYTES: usize = 64 << 10;
/// Longer than anything that a node says here.
const CONTROL_AT_MOST_BYTES: usize = 1 << 20;

/// The answers of a rogue to a request for a piece, and its claims before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Conduct {
    /// Sends other bytes than the blob's.
    WrongBytes,
    /// Sends a piece, and then more under the same number.
    TooManyBytes,
    /// Sends half of a piece and resets the connection.
    Reset,
    /// Sends half of a piece and then nothing.
    Stall,
    /// Signs a piece table for other bytes, says that it has verified them all, and sends them.
    SignsLies,
}

/// A rogue member: it tells the scheduler that it holds a blob whole, and waits for peers. Dropping it ends it.
pub struct Rogue {
    shared: Arc<Shared>,
    _runtime: tokio::runtime::Runtime,
}

struct Shared {
    identity: Identity,
    conduct: Conduct,
    blob: Blob,
    layout: PieceLayout,
    content: Content,
    lies: Option<PieceTable>,
    asked: AtomicU64,
    /// To the scheduler; the stream lives as long as this.
    say: OnceLock<mpsc::Sender<v1::FromPeer>>,
}

impl Rogue {
    /// Joins the cluster of `authority` as `role` (`peer` or `seed`) on `host`. `content` is what it sends in place of `blob`.
    ///
    /// # Errors
    /// When it is not let in, or cannot listen.
    pub fn start(
        host: &Host,
        authority: &Hawker,
        role: &str,
        conduct: Conduct,
        blob: &Blob,
        content: &Content,
    ) -> Result<Self> {
        ensure!(
            content.size_bytes() == blob.size_bytes,
            "its bytes must be as many as the blob's"
        );
        let token: Token = authority.token(role)?.parse()?;
        let (scheduler, address, content) = (
            authority.scheduler().to_string(),
            host.at(PORT),
            content.clone(),
        );
        let runtime = host.runtime(1)?;
        let (name, blob) = (host.name().to_owned(), *blob);
        // Spawned: the runtime's own threads are on the host, this one is not.
        let started = runtime.spawn(async move {
            let (identity, _, _) =
                join::join(&scheduler, &token, &name, &Identity::request()?).await?;
            let layout = PieceLayout::new(blob.size_bytes);
            let lies = (conduct == Conduct::SignsLies)
                .then(|| lies(&identity, &blob, layout, &content))
                .transpose()?;
            let shared = Arc::new(Shared {
                identity,
                conduct,
                blob,
                layout,
                content,
                lies,
                asked: AtomicU64::new(0),
                say: OnceLock::new(),
            });
            let listener = TcpListener::bind(address).await.context("listening")?;
            tokio::spawn(Arc::clone(&shared).accept(listener));
            tokio::time::timeout(JOIN, Arc::clone(&shared).announce(&scheduler, address))
                .await
                .context("the scheduler does not answer")??;
            anyhow::Ok(shared)
        });
        let shared = runtime.block_on(started)??;
        Ok(Self {
            shared,
            _runtime: runtime,
        })
    }

    /// Its id.
    #[must_use]
    pub fn peer_id(&self) -> PeerId {
        self.shared.identity.peer_id()
    }

    /// Tells the scheduler that all of `others` sent it wrong bytes.
    ///
    /// # Errors
    /// When its stream is over.
    pub fn slander(&self, others: &[PeerId]) -> Result<()> {
        let report = |peer: &PeerId| v1::Report {
            peer_id: peer.0.to_vec(),
            task: self.shared.blob.digest.to_string(),
            kind: v1::report::Kind::WrongBytes.into(),
            bytes: 0,
            reporter: Vec::new(),
        };
        let reports = v1::Reports {
            reports: others.iter().map(report).collect(),
        };
        let say = self
            .shared
            .say
            .get()
            .context("it has not announced itself")?;
        Ok(say.try_send(v1::FromPeer {
            event: Some(Say::Reports(reports)),
        })?)
    }

    /// Asks the scheduler who else has its blob: from then on it has been told of those.
    ///
    /// # Errors
    /// When its stream is over.
    pub fn want(&self) -> Result<()> {
        let Blob { digest, size_bytes } = self.shared.blob;
        let want = v1::Want {
            task: digest.to_string(),
            size_bytes,
            ..v1::Want::default()
        };
        let say = self
            .shared
            .say
            .get()
            .context("it has not announced itself")?;
        Ok(say.try_send(v1::FromPeer {
            event: Some(Say::Want(want)),
        })?)
    }

    /// Pieces that it was asked for.
    #[must_use]
    pub fn asked(&self) -> u64 {
        self.shared.asked.load(Ordering::Relaxed)
    }
}

/// The table of `content` as that of `blob`, signed and sealed.
fn lies(
    identity: &Identity,
    blob: &Blob,
    layout: PieceLayout,
    content: &Content,
) -> Result<PieceTable> {
    let mut table = PieceTable::new(blob.digest, layout);
    let mut chain = Chain::new(blob.digest.algorithm());
    for piece in 0..table.full_count() {
        chain.update(&bytes_of(layout, content, piece)?);
        table.push(chain.value().context("a piece ends at a block's end")?);
    }
    identity.sign(&mut table, true, Vec::new(), SystemTime::now());
    Ok(table)
}

fn bytes_of(layout: PieceLayout, content: &Content, piece: PieceIndex) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; layout.len_bytes(piece) as usize];
    content.read_at(layout.start(piece), &mut bytes)?;
    Ok(bytes)
}

impl Shared {
    /// Tells the scheduler that the blob is here, and keeps the stream; returns once the scheduler has answered.
    async fn announce(self: Arc<Self>, scheduler: &str, address: SocketAddr) -> Result<()> {
        let connection = join::connect(scheduler, &self.identity).await?;
        let (say, outgoing) = mpsc::channel(8);
        let register = v1::Register {
            version: Some(hawker_api::VERSION),
            name: "rogue".into(),
            addresses: vec![address.to_string()],
            zone: String::new(),
            rack: String::new(),
            upload_slots: 8,
            upload_rate_bytes: 0,
            reads_origins: false,
        };
        let holding = v1::Holding {
            task: self.blob.digest.to_string(),
            size_bytes: self.blob.size_bytes,
            pieces: self.layout.count(),
            complete: true,
        };
        let holdings = v1::Holdings {
            replaces_all: true,
            holdings: vec![holding],
        };
        for event in [Say::Register(register), Say::Holdings(holdings)] {
            say.send(v1::FromPeer { event: Some(event) }).await?;
        }
        let mut client = SchedulerClient::new(connection.channel);
        let mut stream = client
            .track(ReceiverStream::new(outgoing))
            .await?
            .into_inner();
        stream
            .message()
            .await?
            .context("the scheduler closed the stream")?;
        let _ = self.say.set(say);
        tokio::spawn(async move { while let Ok(Some(_)) = stream.message().await {} });
        Ok(())
    }

    async fn accept(self: Arc<Self>, listener: TcpListener) {
        while let Ok((tcp, _)) = listener.accept().await {
            let this = Arc::clone(&self);
            // A connection's end is what some of this is about.
            tokio::spawn(async move { this.serve(tcp).await });
        }
    }

    async fn serve(&self, tcp: TcpStream) -> Result<()> {
        let acceptor = TlsAcceptor::from(self.identity.server_config(ALPN, false));
        let mut tls = acceptor.accept(tcp).await?;
        let hello = v1::Hello {
            version: Some(hawker_api::VERSION),
            name: "rogue".into(),
            addresses: Vec::new(),
            instance: 1,
        };
        say(&mut tls, Wire::Hello(hello)).await?;
        loop {
            match hear(&mut tls).await? {
                Some(Wire::Ping(ping)) => {
                    say(&mut tls, Wire::Pong(v1::Pong { nonce: ping.nonce })).await?
                }
                Some(Wire::Interest(interest)) if interest.task == self.blob.digest.to_string() => {
                    self.offer(&mut tls).await?;
                }
                Some(Wire::Request(request)) => {
                    self.asked.fetch_add(1, Ordering::Relaxed);
                    self.misserve(&mut tls, request.request, request.piece)
                        .await?;
                }
                _ => {}
            }
        }
    }

    async fn offer(&self, tls: &mut TlsStream<TcpStream>) -> Result<()> {
        let (task, size_bytes) = (self.blob.digest, self.blob.size_bytes);
        if let Some(table) = &self.lies {
            let (values, signed) = (table.values().to_vec(), table.signed().cloned());
            say_of_pieces(
                tls,
                &Message::Table {
                    task,
                    size_bytes,
                    first: 0,
                    values,
                    signed,
                },
            )
            .await?;
        }
        say_of_pieces(
            tls,
            &Message::Have {
                task,
                size_bytes,
                offer: Offer::All,
            },
        )
        .await
    }

    async fn misserve(
        &self,
        tls: &mut TlsStream<TcpStream>,
        request: u32,
        piece: PieceIndex,
    ) -> Result<()> {
        let bytes = bytes_of(self.layout, &self.content, piece)?;
        let half = &bytes[..bytes.len() / 2];
        match self.conduct {
            Conduct::WrongBytes | Conduct::SignsLies => send(tls, request, &bytes).await,
            Conduct::TooManyBytes => {
                send(tls, request, &bytes).await?;
                send(tls, request, half).await
            }
            Conduct::Reset => {
                send(tls, request, half).await?;
                rustix::net::sockopt::set_socket_linger(tls.get_ref().0, Some(Duration::ZERO))?;
                bail!("reset")
            }
            Conduct::Stall => send(tls, request, half).await,
        }
    }
}

async fn say_of_pieces(tls: &mut TlsStream<TcpStream>, message: &Message) -> Result<()> {
    match convert::peer_message(message).message {
        Some(message) => say(tls, message).await,
        None => Ok(()),
    }
}

async fn say(tls: &mut TlsStream<TcpStream>, message: Wire) -> Result<()> {
    let payload = v1::PeerMessage {
        message: Some(message),
    }
    .encode_to_vec();
    frame(tls, CONTROL, &payload).await
}

/// A piece's bytes, in as many frames as it takes.
async fn send(tls: &mut TlsStream<TcpStream>, request: u32, bytes: &[u8]) -> Result<()> {
    for part in bytes.chunks(DATA_AT_MOST_BYTES) {
        frame(tls, DATA, &[&request.to_be_bytes(), part].concat()).await?;
    }
    Ok(())
}

async fn frame(tls: &mut TlsStream<TcpStream>, kind: u8, payload: &[u8]) -> Result<()> {
    tls.write_u32(payload.len() as u32 + 1).await?;
    tls.write_u8(kind).await?;
    tls.write_all(payload).await?;
    Ok(tls.flush().await?)
}

/// The next message; `None` for a frame of another kind.
async fn hear(tls: &mut TlsStream<TcpStream>) -> Result<Option<Wire>> {
    let length = tls.read_u32().await? as usize;
    ensure!(
        (1..=CONTROL_AT_MOST_BYTES).contains(&length),
        "a frame of {length} bytes"
    );
    let kind = tls.read_u8().await?;
    let mut payload = vec![0; length - 1];
    tls.read_exact(&mut payload).await?;
    Ok(if kind == CONTROL {
        v1::PeerMessage::decode(&payload[..])?.message
    } else {
        None
    })
}
