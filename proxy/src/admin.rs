//! The pages for people, Prometheus and `hawker doctor`: `/healthy`, `/readyz`, `/metrics`, `/status` and `/requests`,
//! on loopback.
//!
//! It is read-only and tells no secrets, but it is for this machine: bind it to loopback.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::{Deserialize, Serialize};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::recent::RecentPage;

/// Connections at once; the next ones wait in the listener's queue.
const MAX_CONNECTIONS: usize = 32;
/// For a request's head to arrive.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// For a connection as a whole: one request each, and answers are small.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(20);
/// Before accepting again after an error such as no file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The content of `/status`, which `hawker status` prints. Unknown fields are ignored, missing ones are empty: two
/// versions may talk.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    /// For people.
    pub name: String,
    /// In hex; empty for a node that runs alone.
    pub peer_id: String,
    /// `peer`, `seed`, `scheduler`, or `alone`.
    pub role: String,
    /// The cluster's name as the scheduler gives it, if any.
    pub cluster: String,
    /// The program's.
    pub version: String,
    /// Since the start.
    pub uptime_s: u64,
    /// Whether the mirror serves.
    pub ready: bool,
    /// Why this node serves alone though it was a member, if so.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub problem: String,
    /// The addresses of the mirror for runtimes.
    pub mirror: Vec<String>,
    /// The addresses of the forward proxy; empty if there is none.
    pub forward_proxy: Vec<String>,
    /// The schedulers that this node asks.
    pub schedulers: Vec<SchedulerStatus>,
    /// The members of the cluster, this node included.
    pub members: Vec<MemberStatus>,
    /// Since the start.
    pub bytes: BytesStatus,
    /// The same by application, of those that a rule names.
    pub applications: Vec<ApplicationStatus>,
    /// On disk.
    pub store: StoreStatus,
    /// Downloads that run.
    pub tasks: Vec<TaskStatus>,
    /// When this node's certificate begins and ends to be valid, if it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub certificate: Option<CertificateStatus>,
    /// The daemon's process; [`Admin`] fills it in.
    pub process: ProcessStatus,
}

/// One scheduler.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SchedulerStatus {
    /// `host:port`.
    pub address: String,
    /// Whether its stream is up.
    pub connected: bool,
    /// Why it is not, as far as this is known; empty otherwise.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub problem: String,
}

/// One member of the cluster.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct MemberStatus {
    /// For people.
    pub name: String,
    /// In hex.
    pub peer_id: String,
    /// `peer`, `seed` or `scheduler`.
    pub role: String,
    /// `host:port`, as it advertises itself.
    pub addresses: Vec<String>,
    /// Whether this node has a connection to it.
    pub connected: bool,
    /// Whether the scheduler keeps it away from others.
    pub isolated: bool,
    /// Why; empty when it is not isolated.
    pub isolated_for: String,
    /// How much longer.
    pub isolated_for_s: u64,
}

/// Body bytes since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct BytesStatus {
    /// From peers that are no seeds.
    pub received_peers: u64,
    /// From seeds.
    pub received_seeds: u64,
    /// From registries.
    pub received_origin: u64,
    /// To runtimes.
    pub served: u64,
    /// To runtimes, from committed blobs.
    pub served_cache: u64,
    /// To peers.
    pub uploaded: u64,
}

/// The counts of one application's pulls since the start, or of its peers at a scheduler.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ApplicationStatus {
    /// Its name; `other` for all that no rule names.
    pub name: String,
    /// Bytes to clients.
    pub served: u64,
    /// Bytes from peers and seeds.
    pub received: u64,
    /// Bytes from registries, for the cluster.
    pub origin: u64,
    /// Bytes to peers.
    pub uploaded: u64,
    /// Requests that were told to come later.
    pub refused: u64,
}

impl ApplicationStatus {
    /// Whether anything was counted.
    pub const fn is_any(&self) -> bool {
        self.served + self.received + self.origin + self.uploaded + self.refused > 0
    }
}

/// The content of the disk.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct StoreStatus {
    /// Committed.
    pub blobs: u64,
    /// Begun.
    pub partials: u64,
    /// Of both.
    pub bytes: u64,
    /// Whether the disk refuses writes.
    pub degraded: bool,
    /// How full its file system is, in percent; [`disk_used_percent`] tells.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_used_percent: Option<u8>,
    /// The start of eviction, in percent; 0 when not told.
    pub high_percent: u8,
}

/// One download.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct TaskStatus {
    /// The digest.
    pub task: String,
    /// Zero while unknown.
    pub size_bytes: u64,
    /// Verified pieces here.
    pub pieces: u64,
    /// Pieces in all.
    pub of: u64,
    /// `running`, `lingering`, …
    pub state: String,
    /// Runtimes that read it now.
    pub readers: u64,
}

/// Validity of this node's certificate, seconds since 1970.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CertificateStatus {
    /// `NotBefore`.
    pub not_before_s: u64,
    /// `NotAfter`.
    pub not_after_s: u64,
}

/// The limits of the system for the daemon, and its use of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ProcessStatus {
    /// Its process id.
    pub pid: u32,
    /// Open now; 0 when the system does not tell.
    pub open_files: u64,
    /// Open at most.
    pub open_files_limit: u64,
}

impl ProcessStatus {
    /// This process, now.
    pub fn now() -> Self {
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        let open = std::fs::read_dir("/proc/self/fd").map(|entries| entries.count() as u64);
        Self {
            pid: std::process::id(),
            open_files: open.unwrap_or(0),
            open_files_limit: limit.unwrap_or(u64::MAX),
        }
    }
}

/// The use of the file system of `path`, as `df` counts: space that only root may use counts as used.
pub fn disk_used_percent(path: &Path) -> Option<u8> {
    let fs = rustix::fs::statvfs(path).ok()?;
    let used = fs.f_blocks.saturating_sub(fs.f_bfree);
    let total = used + fs.f_bavail;
    u8::try_from(u128::from(used) * 100 / u128::from(total.max(1))).ok()
}

/// The source of the daemon's status.
pub trait StatusSource: Send + Sync {
    /// As of now. Cheap: called for each `/status`.
    fn status(&self) -> Status;

    /// The requests at the mirror with numbers from `after` on, for `/requests`; `None` where there is no mirror.
    fn requests(&self, after: u64) -> Option<RecentPage> {
        let _ = after;
        None
    }
}

/// The content of the admin server.
pub struct Admin {
    /// For `/status` and `/readyz`.
    pub status: Arc<dyn StatusSource>,
    /// For `/metrics`: the OpenMetrics text, such as [`crate::metrics::Metrics::encode`] makes.
    pub metrics: Box<dyn Fn() -> String + Send + Sync>,
}

impl Admin {
    /// Answers until `shutdown`. Keep it up while draining: `/readyz` then says 503 and `/healthy` still 200.
    pub async fn serve(self, listener: TcpListener, shutdown: CancellationToken) {
        let admin = Arc::new(self);
        let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let accepting = async {
            loop {
                let slot = Arc::clone(&slots)
                    .acquire_owned()
                    .await
                    .expect("the semaphore is never closed");
                match listener.accept().await {
                    Ok((stream, from)) => {
                        let admin = Arc::clone(&admin);
                        tokio::spawn(async move {
                            admin.connection(stream, from).await;
                            drop(slot);
                        });
                    }
                    Err(error) => {
                        tracing::warn!(%error, "admin: cannot accept a connection");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                }
            }
        };
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = accepting => {}
        }
    }

    async fn connection(self: Arc<Self>, stream: TcpStream, from: SocketAddr) {
        let answer = service_fn(|request| {
            let response = self.answer(&request);
            async move { Ok::<_, Infallible>(response) }
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIMEOUT)
            .keep_alive(false)
            .max_buf_size(16 << 10)
            .serve_connection(TokioIo::new(stream), answer);
        match tokio::time::timeout(CONNECTION_TIMEOUT, connection).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%from, %error, "admin: connection failed"),
            Err(_) => tracing::debug!(%from, "admin: connection took too long"),
        }
    }

    fn full_status(&self) -> Status {
        Status {
            process: ProcessStatus::now(),
            ..self.status.status()
        }
    }

    fn answer<B>(&self, request: &Request<B>) -> Response<Full<Bytes>> {
        if request.method() != Method::GET && request.method() != Method::HEAD {
            let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n");
            response
                .headers_mut()
                .insert(header::ALLOW, header::HeaderValue::from_static("GET, HEAD"));
            return response;
        }
        match request.uri().path() {
            "/healthy" => text(StatusCode::OK, "ok\n"),
            "/readyz" if self.status.status().ready => text(StatusCode::OK, "ready\n"),
            "/readyz" => text(StatusCode::SERVICE_UNAVAILABLE, "not ready\n"),
            "/metrics" => typed(OPENMETRICS, (self.metrics)()),
            "/status" => json(&self.full_status()),
            "/requests" => match self.status.requests(number_after(request.uri().query())) {
                Some(page) => json(&page),
                None => text(StatusCode::NOT_FOUND, "this daemon has no mirror\n"),
            },
            _ => text(
                StatusCode::NOT_FOUND,
                "here are /healthy, /readyz, /metrics, /status and /requests\n",
            ),
        }
    }
}

const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The number in `after=N`; 0 without it.
fn number_after(query: Option<&str>) -> u64 {
    let mut pairs = query.unwrap_or_default().split('&');
    pairs
        .find_map(|pair| pair.strip_prefix("after=")?.parse().ok())
        .unwrap_or(0)
}

fn json(page: &impl Serialize) -> Response<Full<Bytes>> {
    match serde_json::to_string(page) {
        Ok(json) => typed("application/json", json),
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, &format!("{error}\n")),
    }
}

fn text(status: StatusCode, body: &str) -> Response<Full<Bytes>> {
    let mut response = typed("text/plain; charset=utf-8", body.to_owned());
    *response.status_mut() = status;
    response
}

fn typed(content_type: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        header::HeaderValue::from_static(content_type),
    );
    response
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;
    use crate::metrics::Metrics;

    struct Node {
        ready: AtomicBool,
    }

    impl StatusSource for Node {
        fn status(&self) -> Status {
            let ready = self.ready.load(Ordering::Relaxed);
            Status {
                name: "a".into(),
                ready,
                ..Status::default()
            }
        }
    }

    struct Running {
        address: SocketAddr,
        node: Arc<Node>,
        shutdown: CancellationToken,
        task: tokio::task::JoinHandle<()>,
    }

    async fn start() -> Running {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let node = Arc::new(Node {
            ready: AtomicBool::new(false),
        });
        let metrics = Metrics::new();
        let admin = Admin {
            status: node.clone(),
            metrics: Box::new(move || metrics.encode()),
        };
        let shutdown = CancellationToken::new();
        let task = tokio::spawn(admin.serve(listener, shutdown.clone()));
        Running {
            address,
            node,
            shutdown,
            task,
        }
    }

    /// Sends `request` as it is and returns all that comes back.
    async fn raw(address: SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    async fn get(address: SocketAddr, path: &str) -> String {
        raw(address, &format!("GET {path} HTTP/1.1\r\nhost: a\r\n\r\n")).await
    }

    #[tokio::test]
    async fn each_page_says_what_it_is_for() {
        let running = start().await;
        assert!(
            get(running.address, "/healthy")
                .await
                .starts_with("HTTP/1.1 200")
        );
        assert!(
            get(running.address, "/readyz")
                .await
                .starts_with("HTTP/1.1 503")
        );
        running.node.ready.store(true, Ordering::Relaxed);
        assert!(
            get(running.address, "/readyz")
                .await
                .starts_with("HTTP/1.1 200")
        );
        let metrics = get(running.address, "/metrics").await;
        assert!(
            metrics.contains("application/openmetrics-text"),
            "{metrics}"
        );
        assert!(metrics.ends_with("# EOF\n"), "{metrics}");
        let status = get(running.address, "/status").await;
        let json = status.split("\r\n\r\n").nth(1).unwrap();
        let status: Status = serde_json::from_str(json).unwrap();
        assert!(status.ready && status.name == "a");
        assert!(status.process.open_files > 2 && status.process.open_files_limit > 2);
        assert!(disk_used_percent(Path::new("/")).is_some_and(|percent| percent <= 100));
        assert!(get(running.address, "/").await.starts_with("HTTP/1.1 404"));
    }

    #[tokio::test]
    async fn nothing_but_reading_is_allowed() {
        let running = start().await;
        let answer = raw(
            running.address,
            "POST /status HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n\r\n",
        )
        .await;
        assert!(answer.starts_with("HTTP/1.1 405"), "{answer}");
        let head = raw(running.address, "HEAD /status HTTP/1.1\r\nhost: a\r\n\r\n").await;
        assert!(
            head.starts_with("HTTP/1.1 200") && head.ends_with("\r\n\r\n"),
            "{head}"
        );
    }

    #[tokio::test]
    async fn garbage_and_silent_clients_leave_the_others_served() {
        let running = start().await;
        let _silent = TcpStream::connect(running.address).await.unwrap();
        let garbage = raw(running.address, "\x01\x02\r\n\r\n").await;
        assert!(
            garbage.is_empty() || garbage.starts_with("HTTP/1.1 400"),
            "{garbage}"
        );
        let long = format!("GET /{} HTTP/1.1\r\nhost: a\r\n\r\n", "x".repeat(12_000));
        assert!(raw(running.address, &long).await.starts_with("HTTP/1.1 4"));
        assert!(
            get(running.address, "/healthy")
                .await
                .starts_with("HTTP/1.1 200")
        );
    }

    #[tokio::test]
    async fn shutdown_closes_the_listener() {
        let running = start().await;
        running.shutdown.cancel();
        running.task.await.unwrap();
        assert!(TcpStream::connect(running.address).await.is_err());
    }

    #[test]
    fn a_status_of_another_version_is_still_read() {
        let status: Status =
            serde_json::from_str(r#"{"name":"a","news":1,"bytes":{"served":3}}"#).unwrap();
        assert_eq!((status.name.as_str(), status.bytes.served), ("a", 3));
    }
}
