//! Just enough HTTP/1.1 to serve, and to break every rule of it on purpose: a proper server library cannot lie about a
//! length or reset a connection in mid-body.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

const MAX_HEAD_BYTES: usize = 64 << 10;
const MAX_REQUEST_BODY_BYTES: usize = 16 << 20;
/// A client that neither asks nor reads for so long is gone.
const IDLE: Duration = Duration::from_secs(120);

/// A connection that a client opened.
pub(crate) struct Connection {
    stream: Stream,
    /// Bytes read after the last request's head.
    rest: Vec<u8>,
}

enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// The head of a request.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) method: String,
    /// Path and query, as they came.
    pub(crate) target: String,
    headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Request {
    pub(crate) fn path(&self) -> &str {
        self.target.split('?').next().unwrap_or_default()
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(other, _)| other.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.as_str())
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.headers.iter().map(|(name, _)| name.as_str())
    }

    pub(crate) fn wants_close(&self) -> bool {
        self.header("connection")
            .is_some_and(|value| value.eq_ignore_ascii_case("close"))
    }
}

impl Connection {
    pub(crate) async fn accept(tcp: TcpStream, tls: Option<&TlsAcceptor>) -> io::Result<Self> {
        tcp.set_nodelay(true)?;
        let stream = match tls {
            None => Stream::Plain(tcp),
            Some(acceptor) => Stream::Tls(Box::new(timeout(acceptor.accept(tcp)).await?)),
        };
        Ok(Self {
            stream,
            rest: Vec::new(),
        })
    }

    /// The next request; `None` when the client is done.
    pub(crate) async fn request(&mut self) -> io::Result<Option<Request>> {
        let end = loop {
            if let Some(end) = self
                .rest
                .windows(4)
                .position(|window| window == b"\r\n\r\n")
            {
                break end + 4;
            }
            if self.rest.len() > MAX_HEAD_BYTES {
                return Err(invalid("request head too long"));
            }
            if self.fill().await? == 0 {
                return Ok(None);
            }
        };
        let mut request = parse(&self.rest[..end])?;
        self.rest.drain(..end);
        let length = request
            .header("content-length")
            .map_or(Ok(0), str::parse)
            .map_err(|_| invalid("content-length"))?;
        if length > MAX_REQUEST_BODY_BYTES {
            return Err(invalid("request body too long"));
        }
        while self.rest.len() < length {
            if self.fill().await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        request.body = self.rest.drain(..length).collect();
        Ok(Some(request))
    }

    pub(crate) async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        timeout(async {
            match &mut self.stream {
                Stream::Plain(stream) => stream.write_all(bytes).await,
                Stream::Tls(stream) => {
                    stream.write_all(bytes).await?;
                    stream.flush().await
                }
            }
        })
        .await
    }

    /// An answer whose body is JSON.
    pub(crate) async fn write_json(
        &mut self,
        status: u16,
        value: &serde_json::Value,
    ) -> io::Result<()> {
        let text = value.to_string();
        let headers = [
            ("Content-Type", "application/json".to_owned()),
            ("Content-Length", text.len().to_string()),
        ];
        self.write(&head(status, &headers)).await?;
        self.write(text.as_bytes()).await
    }

    /// Ends the connection with FIN.
    pub(crate) async fn close(mut self) {
        // The client may be gone already: then there is nothing to end.
        let _ = timeout(async {
            match &mut self.stream {
                Stream::Plain(stream) => stream.shutdown().await,
                Stream::Tls(stream) => stream.get_mut().0.shutdown().await,
            }
        })
        .await;
    }

    /// Ends the connection with RST, once what was written has had time to arrive.
    pub(crate) async fn reset(self) {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let tcp = match &self.stream {
            Stream::Plain(stream) => stream,
            Stream::Tls(stream) => stream.get_ref().0,
        };
        // A socket that the client closed first has nothing to reset.
        let _ = tcp.set_zero_linger();
    }

    async fn fill(&mut self) -> io::Result<usize> {
        timeout(async {
            match &mut self.stream {
                Stream::Plain(stream) => stream.read_buf(&mut self.rest).await,
                Stream::Tls(stream) => stream.read_buf(&mut self.rest).await,
            }
        })
        .await
    }
}

async fn timeout<T>(work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    tokio::time::timeout(IDLE, work)
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

fn parse(head: &[u8]) -> io::Result<Request> {
    let head = std::str::from_utf8(head).map_err(|_| invalid("request head is not text"))?;
    let mut lines = head.split("\r\n");
    let mut words = lines.next().unwrap_or_default().split(' ');
    let (Some(method), Some(target), Some("HTTP/1.1" | "HTTP/1.0")) =
        (words.next(), words.next(), words.next())
    else {
        return Err(invalid("request line"));
    };
    let headers = lines.filter_map(|line| line.split_once(':'));
    Ok(Request {
        method: method.to_owned(),
        target: target.to_owned(),
        headers: headers
            .map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
            .collect(),
        body: Vec::new(),
    })
}

/// The head of an answer.
pub(crate) fn head(status: u16, headers: &[(&str, String)]) -> Vec<u8> {
    let reason = http::StatusCode::from_u16(status)
        .ok()
        .and_then(|code| code.canonical_reason())
        .unwrap_or("Fault");
    let mut text = format!("HTTP/1.1 {status} {reason}\r\n");
    for (name, value) in headers {
        text.push_str(&format!("{name}: {value}\r\n"));
    }
    text.push_str("\r\n");
    text.into_bytes()
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}
