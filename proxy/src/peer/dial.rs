//! How connections come to be: dialling, accepting, TLS, and the hello from both sides.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use hawker_api::v1::peer_message::Message as Wire;
use hawker_api::{convert, v1};
use hawker_core::message::Role;
use hawker_core::piece::PeerId;
use hawker_identity::member;
use hawker_network::names::{self, NamedBy};
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncWriteExt, BufReader, ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::time::timeout;
use tokio_rustls::TlsStream;

use super::connection::Remote;
use super::frame::{Frame, FrameError, FrameReader, protocol, put_control};
use super::hub::{DialKey, DialTurn, Hub};
use super::{Dial, PeerError};

const CONNECT_DEADLINE: Duration = Duration::from_secs(3);
/// For TLS and the hello, where this node dialled.
const GREETING_DEADLINE: Duration = Duration::from_secs(5);
/// The same for strangers, who take places from others meanwhile.
const STRANGER_DEADLINE: Duration = Duration::from_secs(3);
/// A name may resolve to more; these are tried.
const RESOLVED_AT_MOST: usize = 4;
const HELLO_AT_MOST_BYTES: usize = 16 << 10;
/// A member has no more; further ones are not tried.
const ADDRESSES_AT_MOST: usize = 16;
/// The kernel takes no more than this ahead of what it can send: control never waits behind megabytes.
const UNSENT_BYTES: u32 = 128 << 10;
/// Read from the socket at once. Rustls on its own reads 4 KiB at a time.
const READ_BYTES: usize = 64 << 10;
/// Room for TLS records on their way out: a data frame with its header in one write.
const TLS_BUFFER_BYTES: usize = 128 << 10;

type Stream = TlsStream<BufReader<TcpStream>>;

/// An open connection's two directions.
pub(super) struct Halves {
    pub(super) frames: FrameReader<ReadHalf<Stream>>,
    pub(super) writer: WriteHalf<Stream>,
}

/// A connection with this member, new or warm. Concurrent dials of one member are one.
pub(super) async fn dial(hub: &Arc<Hub>, dial: &Dial) -> Result<PeerId, PeerError> {
    if dial.peer == Some(hub.identity.peer_id()) {
        return Err(PeerError::Unreachable(
            "that is this node itself".to_owned(),
        ));
    }
    if hub.is_draining() {
        return Err(PeerError::Unreachable("this node is stopping".to_owned()));
    }
    let key: DialKey = (
        dial.peer,
        if dial.peer.is_some() {
            Vec::new()
        } else {
            dial.addresses.clone()
        },
    );
    let (waiter, over) = oneshot::channel();
    match hub.dial_turn(dial, &key, waiter) {
        DialTurn::Warm(peer) => return Ok(peer),
        DialTurn::Wait => {}
        DialTurn::Ours => {
            // A task of its own: it goes on for the others when this caller gives up.
            let (hub, dial) = (Arc::clone(hub), dial.clone());
            hub.clone().tasks.spawn(async move {
                let result = tokio::select! {
                    result = try_addresses(&hub, &dial) => result,
                    () = hub.draining.cancelled() => Err(PeerError::Lost),
                };
                hub.dial_over(&key, &result);
            });
        }
    }
    over.await.unwrap_or(Err(PeerError::Lost))
}

async fn try_addresses(hub: &Arc<Hub>, dial: &Dial) -> Result<PeerId, PeerError> {
    let mut failures = Vec::new();
    for address in dial.addresses.iter().take(ADDRESSES_AT_MOST) {
        match try_address(hub, dial.peer, address).await {
            Ok(peer) => return Ok(peer),
            Err(why) => failures.push(format!("{address}: {why}")),
        }
    }
    if failures.is_empty() {
        failures.push("it has no address".to_owned());
    }
    Err(PeerError::Unreachable(failures.join("; ")))
}

async fn try_address(
    hub: &Arc<Hub>,
    peer: Option<PeerId>,
    address: &str,
) -> Result<PeerId, String> {
    // Addresses of the configuration come without an identity to expect.
    let named_by = if peer.is_some() {
        NamedBy::Member
    } else {
        NamedBy::Configuration
    };
    let resolved = names::resolve_address(address, named_by)
        .await
        .map_err(|e| e.to_string())?;
    let mut failure = "the name has no address".to_owned();
    for socket in resolved.into_iter().take(RESOLVED_AT_MOST) {
        match try_socket(hub, peer, address, socket).await {
            Ok(peer) => return Ok(peer),
            Err(why) => failure = why,
        }
    }
    Err(failure)
}

async fn try_socket(
    hub: &Arc<Hub>,
    peer: Option<PeerId>,
    address: &str,
    socket: SocketAddr,
) -> Result<PeerId, String> {
    if !hub.make_room(false) {
        return Err("all connections are busy".to_owned());
    }
    let tcp = timeout(CONNECT_DEADLINE, TcpStream::connect(socket)).await;
    let tcp = tcp
        .map_err(|_| "no answer in time")?
        .map_err(|e| e.to_string())?;
    let name = peer.map_or_else(|| member::role_name(Role::Seed), member::peer_name);
    let greeting = async {
        let tls = hub
            .connector
            .connect(name, tune(tcp))
            .await
            .map_err(|e| e.to_string())?;
        greet(hub, tls.into(), socket.ip(), Some(address.to_owned())).await
    };
    let (remote, halves) = timeout(GREETING_DEADLINE, greeting)
        .await
        .map_err(|_| "no greeting in time")??;
    let peer = remote.peer;
    hub.adopt(remote, halves).await.map_err(|e| e.to_string())?;
    Ok(peer)
}

/// Accepts connections until the daemon drains.
pub(super) async fn accept(hub: Arc<Hub>, listener: TcpListener) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = hub.draining.cancelled() => return,
        };
        let (tcp, from) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors or memory, or the connection went away: neither is helped by haste.
                tracing::warn!(%error, "can't accept a peer");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        if !hub.may_have_room() {
            tracing::debug!(%from, "turned a connection away: there are too many");
            continue;
        }
        let Some(handshake) = hub.handshake(from.ip()) else {
            tracing::debug!(%from, "turned a connection away: there are too many handshakes");
            continue;
        };
        let task_hub = Arc::clone(&hub);
        hub.tasks.spawn(async move {
            let greeting = async {
                let tls = task_hub
                    .acceptor
                    .accept(tune(tcp))
                    .await
                    .map_err(|e| e.to_string())?;
                greet(&task_hub, tls.into(), from.ip(), None).await
            };
            let greeted = tokio::select! {
                greeted = timeout(STRANGER_DEADLINE, greeting) => greeted,
                () = handshake.gives_way.cancelled() => return,
                () = task_hub.draining.cancelled() => return,
            };
            drop(handshake);
            match greeted {
                Ok(Ok((remote, halves))) if task_hub.make_room(true) => {
                    let name = remote.name.clone();
                    if let Err(error) = task_hub.adopt(remote, halves).await {
                        tracing::debug!(%from, name, %error, "turned a member away");
                    }
                }
                Ok(Ok(_)) => {
                    tracing::debug!(%from, "turned a member away: all connections are busy")
                }
                Ok(Err(error)) => {
                    if let Some(left_out) = task_hub.refused_log.admit() {
                        tracing::info!(%from, %error, left_out, "refused a connection");
                    }
                }
                Err(_) => tracing::debug!(%from, "a connection did not greet in time"),
            }
        });
    }
}

/// Socket options for a connection that carries both words and bulk.
fn tune(tcp: TcpStream) -> BufReader<TcpStream> {
    let keepalive = TcpKeepalive::new()
        .with_time(Duration::from_secs(15))
        .with_interval(Duration::from_secs(5))
        .with_retries(3);
    let socket = SockRef::from(&tcp);
    let options = [
        socket.set_tcp_nodelay(true),
        socket.set_tcp_notsent_lowat(UNSENT_BYTES),
        socket.set_tcp_keepalive(&keepalive),
        socket.set_tcp_user_timeout(Some(Duration::from_secs(30))),
    ];
    for error in options.into_iter().filter_map(Result::err) {
        tracing::debug!(%error, "a socket option was refused");
    }
    BufReader::with_capacity(READ_BYTES, tcp)
}

/// Says hello and hears theirs; their certificate tells the member.
async fn greet(
    hub: &Hub,
    mut tls: Stream,
    from: IpAddr,
    dialled: Option<String>,
) -> Result<(Remote, Halves), String> {
    let session = match &mut tls {
        TlsStream::Client(stream) => {
            let session = stream.get_mut().1;
            session.set_buffer_limit(Some(TLS_BUFFER_BYTES));
            session.peer_certificates()
        }
        TlsStream::Server(stream) => {
            let session = stream.get_mut().1;
            session.set_buffer_limit(Some(TLS_BUFFER_BYTES));
            session.peer_certificates()
        }
    };
    let certificate = session
        .and_then(|chain| chain.first())
        .ok_or("it showed no certificate")?;
    let (peer, role) = member::member_of(certificate).map_err(|e| e.to_string())?;
    if peer == hub.identity.peer_id() {
        return Err("that is this node itself".to_owned());
    }
    if let Some(left) = hub.refused_for(peer) {
        return Err(format!(
            "it broke the protocol and is refused for {} s more",
            left.as_secs() + 1
        ));
    }
    let (reader, mut writer) = tokio::io::split(tls);
    let mut frame = Vec::new();
    put_control(
        &v1::PeerMessage {
            message: Some(Wire::Hello(hub.hello.clone())),
        },
        &mut frame,
    );
    writer.write_all(&frame).await.map_err(|e| e.to_string())?;
    writer.flush().await.map_err(|e| e.to_string())?;
    let mut frames = FrameReader::new(reader);
    let hello = hear_hello(&mut frames).await.map_err(|error| {
        if let FrameError::Protocol(_) = &error {
            hub.broke_protocol(peer, "", &error.to_string());
        }
        error.to_string()
    })?;
    let instance = hello.instance;
    let (name, mut addresses) = convert::from_hello(hello).map_err(|e| e.to_string())?;
    // A member could point others at any address. The schedulers have checked the addresses that they pass on.
    addresses.retain(|address| is_at(address, from));
    if addresses.is_empty() {
        addresses.extend(dialled.clone());
    }
    Ok((
        Remote {
            peer,
            role,
            name,
            addresses,
            instance,
            dialled,
        },
        Halves { frames, writer },
    ))
}

/// Whether `host:port` is a port of this address.
fn is_at(address: &str, ip: IpAddr) -> bool {
    address
        .parse::<SocketAddr>()
        .is_ok_and(|address| address.ip().to_canonical() == ip.to_canonical())
}

async fn hear_hello(frames: &mut FrameReader<ReadHalf<Stream>>) -> Result<v1::Hello, FrameError> {
    let len = match frames.next().await? {
        Some(Frame::Control(len)) if len <= HELLO_AT_MOST_BYTES => len,
        Some(_) => return Err(protocol("it did not say hello first")),
        None => return Err(io::Error::other("it closed the connection without hello").into()),
    };
    let message = frames.control(len, || (), |_| false).await?;
    match message.message {
        Some(Wire::Hello(hello)) => Ok(hello),
        _ => Err(protocol("it did not say hello first")),
    }
}
