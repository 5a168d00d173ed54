//! A registry for tests: real sockets, answers given byte by byte, so that it can lie, stall and break off.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use hawker_oci::digest::{Algorithm, Digest};
use hawker_oci::reference::Source;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::limits::Limits;
use crate::origin::Origin;
use crate::settings::{LiveSettings, Registries, RegistrySettings};

/// A request as the registry saw it.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) method: String,
    /// Path and query, or what else stood there.
    pub(crate) target: String,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: String,
    /// Counts the connections.
    pub(crate) connection: usize,
}

impl Seen {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(n, _)| n.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.as_str())
    }
}

/// The registry's reaction to a request.
pub(crate) enum Reply {
    /// Sends this and keeps the connection.
    Say(Vec<u8>),
    /// Sends this and closes.
    Cut(Vec<u8>),
    /// Sends this and resets the connection.
    Reset(Vec<u8>),
    /// Says nothing.
    Silence,
}

/// A whole response. `Content-Length` is added unless the headers have it; for HEAD only the head goes out.
pub(crate) fn say(seen: &Seen, status: u16, headers: &[(&str, &str)], body: &[u8]) -> Reply {
    let mut bytes = format!("HTTP/1.1 {status} X\r\n");
    for (name, value) in headers {
        bytes += &format!("{name}: {value}\r\n");
    }
    if !headers.iter().any(|(name, _)| {
        name.eq_ignore_ascii_case("content-length") || *name == "transfer-encoding"
    }) {
        bytes += &format!("Content-Length: {}\r\n", body.len());
    }
    let mut bytes = (bytes + "\r\n").into_bytes();
    if seen.method != "HEAD" {
        bytes.extend_from_slice(body);
    }
    Reply::Say(bytes)
}

impl Seen {
    /// The values of a parameter, of the query or of a form, decoded.
    pub(crate) fn values(&self, name: &str) -> Vec<String> {
        let query = self.target.split_once('?').map_or("", |(_, query)| query);
        let pairs = [query, &self.body].map(|text| url::form_urlencoded::parse(text.as_bytes()));
        let named = pairs.into_iter().flatten().filter(|(n, _)| n == name);
        named.map(|(_, value)| value.into_owned()).collect()
    }
}

/// A running test registry; it stops when dropped.
pub(crate) struct TestRegistry {
    pub(crate) address: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for TestRegistry {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl TestRegistry {
    pub(crate) async fn start(reply: impl Fn(&Seen) -> Reply + Send + Sync + 'static) -> Self {
        Self::start_at("127.0.0.1:0", reply).await
    }

    pub(crate) async fn start_at(
        at: &str,
        reply: impl Fn(&Seen) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind(at).await.unwrap();
        let address = listener.local_addr().unwrap();
        let seen: Arc<Mutex<Vec<Seen>>> = Arc::default();
        let (log, reply) = (Arc::clone(&seen), Arc::new(reply));
        let task = tokio::spawn(async move {
            let mut conversations = tokio::task::JoinSet::new();
            for connection in 0.. {
                let Ok((socket, _)) = listener.accept().await else {
                    break;
                };
                let (log, reply) = (Arc::clone(&log), Arc::clone(&reply));
                conversations
                    .spawn(async move { converse(socket, connection, &log, &*reply).await });
            }
        });
        Self {
            address,
            seen,
            task,
        }
    }

    /// The registry as references name it.
    pub(crate) fn name(&self) -> String {
        self.address.to_string()
    }

    pub(crate) fn source(&self, repository: &str) -> Source {
        Source {
            registry: self.name(),
            repository: repository.to_owned(),
        }
    }

    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.seen
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// How many requests `METHOD /path…` came.
    pub(crate) fn count(&self, method: &str, target: &str) -> usize {
        self.seen()
            .iter()
            .filter(|s| s.method == method && s.target.starts_with(target))
            .count()
    }
}

async fn converse(
    mut socket: TcpStream,
    connection: usize,
    log: &Mutex<Vec<Seen>>,
    reply: &(dyn Fn(&Seen) -> Reply + Send + Sync),
) {
    let mut buffer = Vec::new();
    loop {
        let end = loop {
            if let Some(at) = buffer.windows(4).position(|w| w == b"\r\n\r\n") {
                break at + 4;
            }
            match socket.read_buf(&mut buffer).await {
                Ok(0) | Err(_) => return,
                Ok(_) => {}
            }
        };
        let head = String::from_utf8_lossy(&buffer[..end]).into_owned();
        buffer.drain(..end);
        let mut lines = head.lines();
        let mut first = lines
            .next()
            .unwrap_or_default()
            .split(' ')
            .map(str::to_owned);
        let mut seen = Seen {
            method: first.next().unwrap_or_default(),
            target: first.next().unwrap_or_default(),
            headers: lines
                .filter_map(|l| l.split_once(": "))
                .map(|(n, v)| (n.to_owned(), v.to_owned()))
                .collect(),
            body: String::new(),
            connection,
        };
        let body_bytes = seen
            .header("content-length")
            .map_or(0, |length| length.parse().unwrap());
        while buffer.len() < body_bytes {
            if !matches!(socket.read_buf(&mut buffer).await, Ok(1..)) {
                return;
            }
        }
        seen.body = String::from_utf8(buffer.drain(..body_bytes).collect()).unwrap();
        log.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(seen.clone());
        let (bytes, then) = match reply(&seen) {
            Reply::Say(bytes) => (bytes, "go on"),
            Reply::Cut(bytes) => (bytes, "close"),
            Reply::Reset(bytes) => (bytes, "reset"),
            Reply::Silence => (Vec::new(), "wait"),
        };
        if socket.write_all(&bytes).await.is_err() {
            return;
        }
        match then {
            "go on" => {}
            "wait" => tokio::time::sleep(Duration::from_secs(600)).await,
            "reset" => {
                tokio::time::sleep(Duration::from_millis(50)).await;
                let _ = socket2::SockRef::from(&socket).set_linger(Some(Duration::ZERO));
                return;
            }
            _ => return,
        }
    }
}

/// Settings that know these registries, each at its own address.
pub(crate) fn knowing(registries: &[&TestRegistry]) -> Arc<ArcSwap<LiveSettings>> {
    let mut settings = Registries::default();
    for registry in registries {
        let endpoints = vec![format!("http://{}", registry.address).parse().unwrap()];
        settings.known.insert(
            registry.name(),
            RegistrySettings {
                endpoints,
                ..RegistrySettings::default()
            },
        );
    }
    Arc::new(ArcSwap::from_pointee(LiveSettings {
        registries: settings,
        ..LiveSettings::default()
    }))
}

/// A client with these settings, without the environment's proxy.
pub(crate) fn origin(live: &Arc<ArcSwap<LiveSettings>>) -> Origin {
    let matcher = hyper_util::client::proxy::matcher::Matcher::builder().build();
    let proxies = super::connect::Proxies::new(matcher, Vec::new());
    Origin::through(
        Arc::clone(live),
        Limits::new(Arc::clone(live)),
        proxies,
        Arc::default(),
    )
}

/// Bytes that look like nothing, the same for the same seed.
pub(crate) fn noise(len: usize, seed: u64) -> Vec<u8> {
    use rand::{Rng, SeedableRng};
    let mut bytes = vec![0; len];
    rand::rngs::StdRng::seed_from_u64(seed).fill_bytes(&mut bytes);
    bytes
}

/// The SHA-256 digest.
pub(crate) fn sha256(data: &[u8]) -> Digest {
    Digest::of(Algorithm::Sha256, data)
}
