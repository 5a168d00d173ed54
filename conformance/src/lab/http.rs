//! A plain HTTP/1.1 client that tells how a response ended: complete, short with FIN, or reset. Ordinary clients hide that,
//! and what runtimes do depends on it.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use sha2::{Digest as _, Sha256};

use super::host::Host;

/// Headers longer than this are not from a sane server.
const MAX_HEAD_BYTES: usize = 64 << 10;
/// The bytes kept of a discarded body: enough for an error's text.
const GLIMPSE_BYTES: usize = 2 << 10;

/// One request. The connection is closed after it.
#[derive(Clone, Debug)]
pub struct Request {
    method: String,
    address: SocketAddr,
    target: String,
    headers: Vec<(String, String)>,
    deadline: Duration,
    bytes_per_s: Option<u64>,
    leave_after_bytes: Option<u64>,
    keep_bytes: usize,
}

/// How a response ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// As many bytes as the header promised (or FIN where it promised nothing).
    Complete,
    /// FIN before that.
    Short,
    /// RST.
    Reset,
    /// The client left, as [`Request::leave_after`] told it.
    Left,
}

/// An answer.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// Header fields; names in lower case, in the order of arrival.
    pub headers: Vec<(String, String)>,
    /// The body, or its beginning if [`Request::discard`] was said.
    pub body: Vec<u8>,
    /// Bytes of body received.
    pub body_bytes: u64,
    /// `sha256:…` of the body as received.
    pub digest: String,
    /// How it ended.
    pub end: End,
    /// From the request to the end of the header.
    pub first_byte: Duration,
    /// From the request to the end.
    pub total: Duration,
}

impl Answer {
    /// The first header field of that name (lower case).
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(n, _)| n == name)
            .map(|(_, value)| value.as_str())
    }

    /// The parts of a `multipart/byteranges` body (RFC 9110, 14.6): each one's `Content-Range`, and its bytes.
    ///
    /// # Errors
    /// When it is none.
    pub fn parts(&self) -> Result<Vec<(String, &[u8])>> {
        let content_type = self.header("content-type").unwrap_or_default();
        let boundary = content_type.strip_prefix("multipart/byteranges; boundary=");
        let boundary =
            boundary.with_context(|| format!("{} {content_type}: {}", self.status, self.text()))?;
        let (mut rest, mut parts) = (self.body.as_slice(), Vec::new());
        loop {
            let line = format!("{}--{boundary}", if parts.is_empty() { "" } else { "\r\n" });
            rest = rest
                .strip_prefix(line.as_bytes())
                .context("a part does not begin with the boundary")?;
            if rest == b"--\r\n" {
                return Ok(parts);
            }
            let end = rest
                .windows(4)
                .position(|w| w == b"\r\n\r\n")
                .context("a part's head has no end")?;
            let head = std::str::from_utf8(&rest[..end])?;
            let range = head
                .lines()
                .find_map(|line| line.strip_prefix("Content-Range: "));
            let range = range.with_context(|| format!("no Content-Range in {head:?}"))?;
            let (first, last) = range
                .strip_prefix("bytes ")
                .and_then(|range| range.split_once('/')?.0.split_once('-'))
                .with_context(|| format!("a strange Content-Range: {range}"))?;
            let length = last.parse::<usize>()? + 1 - first.parse::<usize>()?;
            ensure!(rest.len() >= end + 4 + length, "the part {range} is short");
            parts.push((range.to_owned(), &rest[end + 4..end + 4 + length]));
            rest = &rest[end + 4 + length..];
        }
    }

    /// The body as text.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

impl Request {
    /// A GET of `target` (path and query) at `address`.
    #[must_use]
    pub fn get(address: SocketAddr, target: impl Into<String>) -> Self {
        Self::new("GET", address, target)
    }

    /// Any method.
    #[must_use]
    pub fn new(method: &str, address: SocketAddr, target: impl Into<String>) -> Self {
        Self {
            method: method.into(),
            address,
            target: target.into(),
            headers: Vec::new(),
            deadline: Duration::from_secs(60),
            bytes_per_s: None,
            leave_after_bytes: None,
            keep_bytes: usize::MAX,
        }
    }

    /// Adds a header field.
    #[must_use]
    pub fn header(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }

    /// How long all of it may take; a minute if not said.
    #[must_use]
    pub fn within(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Reads no faster than this.
    #[must_use]
    pub fn slowly(mut self, bytes_per_s: u64) -> Self {
        self.bytes_per_s = Some(bytes_per_s);
        self
    }

    /// Closes the connection once this much of the body has come.
    #[must_use]
    pub fn leave_after(mut self, bytes: u64) -> Self {
        self.leave_after_bytes = Some(bytes);
        self
    }

    /// Counts and hashes the body without keeping more than a glimpse of it.
    #[must_use]
    pub fn discard(mut self) -> Self {
        self.keep_bytes = GLIMPSE_BYTES;
        self
    }

    /// Sends it from `host` and reads the answer to its end.
    ///
    /// # Errors
    /// When no whole header came, or the deadline passed. A short or reset body is no error: see [`Answer::end`].
    pub fn send(&self, host: &Host) -> Result<Answer> {
        host.enter(|| self.send_here())
            .and_then(|answer| answer)
            .with_context(|| {
                format!(
                    "{} http://{}{} from {}",
                    self.method,
                    self.address,
                    self.target,
                    host.name()
                )
            })
    }

    /// As [`Request::send`], from the namespace that this thread is in.
    ///
    /// # Errors
    /// As [`Request::send`].
    pub fn send_here(&self) -> Result<Answer> {
        let start = Instant::now();
        let mut stream =
            TcpStream::connect_timeout(&self.address, self.deadline).context("connecting")?;
        stream.set_read_timeout(Some(self.deadline))?;
        stream
            .write_all(self.head().as_bytes())
            .context("sending the request")?;
        let (head, rest) = read_head(&mut stream)?;
        let (status, headers) = parse_head(&head)?;
        let first_byte = start.elapsed();
        let mut answer = Answer {
            status,
            headers,
            body: Vec::new(),
            body_bytes: 0,
            digest: String::new(),
            end: End::Complete,
            first_byte,
            total: Duration::ZERO,
        };
        self.read_body(&mut stream, rest, start, &mut answer)?;
        answer.total = start.elapsed();
        Ok(answer)
    }

    fn head(&self) -> String {
        let mut head = format!("{} {} HTTP/1.1\r\n", self.method, self.target);
        if !self
            .headers
            .iter()
            .any(|(name, _)| name.eq_ignore_ascii_case("host"))
        {
            head += &format!("host: {}\r\n", self.address);
        }
        for (name, value) in &self.headers {
            head += &format!("{name}: {value}\r\n");
        }
        head + "connection: close\r\n\r\n"
    }

    fn read_body(
        &self,
        stream: &mut TcpStream,
        mut chunk: Vec<u8>,
        start: Instant,
        answer: &mut Answer,
    ) -> Result<()> {
        let mut chunks = answer
            .header("transfer-encoding")
            .map(|_| Chunks::default());
        let no_body = self.method == "HEAD" || matches!(answer.status, 204 | 304);
        let promised: Option<u64> = match answer.header("content-length") {
            _ if no_body => Some(0),
            Some(length) => Some(length.parse().context("content-length")?),
            None => None,
        };
        let mut hash = Sha256::new();
        let body_start = Instant::now();
        loop {
            if let Some(chunks) = &mut chunks {
                chunk = chunks.decode(&chunk)?;
            }
            answer.body_bytes += chunk.len() as u64;
            hash.update(&chunk);
            let room = self.keep_bytes - answer.body.len();
            answer
                .body
                .extend_from_slice(&chunk[..chunk.len().min(room)]);
            ensure!(
                promised.is_none_or(|length| answer.body_bytes <= length),
                "more body than content-length said"
            );
            if promised == Some(answer.body_bytes)
                || chunks.as_ref().is_some_and(|chunks| chunks.over)
            {
                break;
            }
            if self
                .leave_after_bytes
                .is_some_and(|limit| answer.body_bytes >= limit)
            {
                answer.end = End::Left;
                break;
            }
            ensure!(
                start.elapsed() < self.deadline,
                "no end after {:?}: {} bytes",
                self.deadline,
                answer.body_bytes
            );
            if let Some(rate) = self.bytes_per_s {
                let due = Duration::from_secs_f64(answer.body_bytes as f64 / rate as f64);
                std::thread::sleep(due.saturating_sub(body_start.elapsed()));
            }
            chunk.resize(
                self.bytes_per_s.map_or(256 << 10, |rate| rate.div_ceil(20)) as usize,
                0,
            );
            match stream.read(&mut chunk) {
                Ok(0) => {
                    let told = promised.is_some() || chunks.is_some();
                    answer.end = if told { End::Short } else { End::Complete };
                    break;
                }
                Ok(length) => chunk.truncate(length),
                Err(error) if error.kind() == ErrorKind::ConnectionReset => {
                    answer.end = End::Reset;
                    break;
                }
                Err(error) => {
                    return Err(error)
                        .with_context(|| format!("after {} bytes", answer.body_bytes));
                }
            }
        }
        let hex: String = hash
            .finalize()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        answer.digest = format!("sha256:{hex}");
        Ok(())
    }
}

/// A chunked body (RFC 9112, 7.1), without extensions and trailers.
#[derive(Default)]
struct Chunks {
    /// Bytes that came and are not decoded yet.
    raw: Vec<u8>,
    /// The rest of the chunk, and of the line end after it.
    left: usize,
    /// The last chunk has come.
    over: bool,
}

impl Chunks {
    /// The bytes of the body among `came` and what came before it.
    fn decode(&mut self, came: &[u8]) -> Result<Vec<u8>> {
        self.raw.extend_from_slice(came);
        let mut body = Vec::new();
        while !self.over {
            if self.left > 2 {
                let taken = self.raw.len().min(self.left - 2);
                body.extend(self.raw.drain(..taken));
                self.left -= taken;
            }
            if self.left > 2 || self.raw.len() < self.left {
                break;
            }
            self.raw.drain(..std::mem::take(&mut self.left));
            let Some(end) = self.raw.windows(2).position(|window| window == b"\r\n") else {
                break;
            };
            let line: Vec<u8> = self.raw.drain(..end + 2).collect();
            let size = usize::from_str_radix(std::str::from_utf8(&line)?.trim(), 16)
                .context("a chunk's size")?;
            self.over = size == 0;
            self.left = size + 2;
        }
        Ok(body)
    }
}

/// The header's bytes, and what came of the body with them.
fn read_head(stream: &mut TcpStream) -> Result<(Vec<u8>, Vec<u8>)> {
    let mut got = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        if let Some(end) = got.windows(4).position(|window| window == b"\r\n\r\n") {
            let rest = got.split_off(end + 4);
            return Ok((got, rest));
        }
        ensure!(got.len() < MAX_HEAD_BYTES, "an endless header");
        match stream.read(&mut chunk).context("reading the header")? {
            0 => bail!("the connection closed after {} bytes of header", got.len()),
            length => got.extend_from_slice(&chunk[..length]),
        }
    }
}

type Headers = Vec<(String, String)>;

fn parse_head(head: &[u8]) -> Result<(u16, Headers)> {
    let text = std::str::from_utf8(head).context("a header that is not text")?;
    let mut lines = text.split("\r\n");
    let status_line = lines.next().unwrap_or_default();
    let status = status_line
        .split(' ')
        .nth(1)
        .with_context(|| format!("a strange status line: {status_line:?}"))?;
    let fields = lines.filter_map(|line| line.split_once(':'));
    let headers = fields
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
        .collect();
    Ok((status.parse()?, headers))
}

#[cfg(test)]
mod tests {
    use super::Chunks;

    #[test]
    fn a_chunked_body_is_the_same_however_it_arrives() {
        let raw = b"5\r\nhello\r\nb\r\n to you all\r\n0\r\n\r\n";
        for step in 1..raw.len() {
            let mut chunks = Chunks::default();
            let body: Vec<u8> = raw
                .chunks(step)
                .flat_map(|part| chunks.decode(part).unwrap())
                .collect();
            assert_eq!(body, b"hello to you all", "in steps of {step}");
            assert!(chunks.over);
        }
        let mut cut = Chunks::default();
        assert_eq!(cut.decode(&raw[..7]).unwrap(), b"hell");
        assert!(!cut.over);
    }
}
