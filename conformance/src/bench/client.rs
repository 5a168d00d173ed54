//! A client that costs next to nothing, so that what is measured is the server: it has the kernel throw the body away
//! (`MSG_TRUNC`, tcp(7)) and never copies it.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::net::{AddressFamily, RecvFlags, SocketType, bind, connect, recv, socket};

/// Nothing that is measured may be silent for so long.
const SILENCE: Duration = Duration::from_secs(60);
const MAX_HEAD_BYTES: usize = 16 << 10;
/// How much may be thrown away at once.
const DISCARD_BYTES: usize = 1 << 20;

/// How a GET went.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Got {
    /// When the request was sent.
    pub(crate) start: Instant,
    /// When the first byte of the body was here.
    pub(crate) first_byte: Instant,
    /// When the last one was.
    pub(crate) end: Instant,
    /// Length of the body.
    pub(crate) body_bytes: u64,
}

impl Got {
    pub(crate) fn seconds(&self) -> f64 {
        (self.end - self.start).as_secs_f64()
    }

    pub(crate) fn first_byte_ms(&self) -> f64 {
        (self.first_byte - self.start).as_secs_f64() * 1e3
    }
}

/// Fetches `target` from `server`, in the network namespace of the calling thread, and discards the body.
/// `from` is the address to come from, where it matters.
///
/// # Errors
/// Any answer but a 200 with a whole body of known length, and silence for a minute.
pub(crate) fn get(server: SocketAddr, target: &str, from: Option<IpAddr>) -> Result<Got> {
    fetch(server, target, from).with_context(|| format!("GET http://{server}{target}"))
}

fn fetch(server: SocketAddr, target: &str, from: Option<IpAddr>) -> Result<Got> {
    let mut stream = connected(server, from)?;
    stream.set_read_timeout(Some(SILENCE))?;
    let start = Instant::now();
    stream.write_all(
        format!("GET {target} HTTP/1.1\r\nHost: {server}\r\nConnection: close\r\n\r\n").as_bytes(),
    )?;
    let mut buffer = vec![0; DISCARD_BYTES];
    let (head_bytes, read_bytes) = read_head(&mut stream, &mut buffer)?;
    let length = content_length(&buffer[..head_bytes])?;
    let mut body_bytes = (read_bytes - head_bytes) as u64;
    let mut first_byte = (body_bytes > 0).then(Instant::now);
    while body_bytes < length {
        let (_, discarded) = recv(&stream, buffer.as_mut_slice(), RecvFlags::TRUNC)?;
        ensure!(
            discarded > 0,
            "the body ended after {body_bytes} of {length} bytes"
        );
        body_bytes += discarded as u64;
        first_byte.get_or_insert_with(Instant::now);
    }
    let end = Instant::now();
    Ok(Got {
        start,
        first_byte: first_byte.unwrap_or(end),
        end,
        body_bytes,
    })
}

/// Fetches the first `len` bytes of an answer to a range request, and closes the connection.
///
/// # Errors
/// Any answer but a 206 with so many bytes, and silence for a minute.
pub(crate) fn get_part(server: SocketAddr, target: &str, range: &str, len: u64) -> Result<()> {
    part(server, target, range, len)
        .with_context(|| format!("GET http://{server}{target}, {range}"))
}

fn part(server: SocketAddr, target: &str, range: &str, len: u64) -> Result<()> {
    let mut stream = connected(server, None)?;
    stream.set_read_timeout(Some(SILENCE))?;
    stream.write_all(
        format!(
            "GET {target} HTTP/1.1\r\nHost: {server}\r\nRange: {range}\r\nConnection: close\r\n\r\n"
        )
        .as_bytes(),
    )?;
    let mut buffer = vec![0; DISCARD_BYTES];
    let (head_bytes, read_bytes) = read_head(&mut stream, &mut buffer)?;
    let status = String::from_utf8_lossy(&buffer[..head_bytes]);
    ensure!(
        status.starts_with("HTTP/1.1 206 "),
        "answered {}",
        status.lines().next().unwrap_or_default()
    );
    let mut body_bytes = (read_bytes - head_bytes) as u64;
    while body_bytes < len {
        let most = (len - body_bytes).min(DISCARD_BYTES as u64) as usize;
        let (_, discarded) = recv(&stream, &mut buffer[..most], RecvFlags::TRUNC)?;
        ensure!(
            discarded > 0,
            "the body ended after {body_bytes} of {len} bytes"
        );
        body_bytes += discarded as u64;
    }
    Ok(())
}

fn connected(server: SocketAddr, from: Option<IpAddr>) -> Result<TcpStream> {
    let family = if server.is_ipv4() {
        AddressFamily::INET
    } else {
        AddressFamily::INET6
    };
    let socket = socket(family, SocketType::STREAM, None)?;
    if let Some(from) = from {
        bind(&socket, &SocketAddr::new(from, 0))?;
    }
    connect(&socket, &server).context("connecting")?;
    Ok(socket.into())
}

/// Reads until the head is complete; its length, and how much was read.
fn read_head(stream: &mut TcpStream, buffer: &mut [u8]) -> Result<(usize, usize)> {
    let mut read_bytes = 0;
    loop {
        let count = stream.read(&mut buffer[read_bytes..MAX_HEAD_BYTES])?;
        ensure!(count > 0, "the connection ended within the head");
        read_bytes += count;
        if let Some(end) = buffer[..read_bytes]
            .windows(4)
            .position(|window| window == b"\r\n\r\n")
        {
            return Ok((end + 4, read_bytes));
        }
    }
}

/// The length that the head of a 200 tells.
pub(crate) fn content_length(head: &[u8]) -> Result<u64> {
    let head = std::str::from_utf8(head).context("the head is not text")?;
    ensure!(
        head.starts_with("HTTP/1.1 200 "),
        "answered {}",
        head.lines().next().unwrap_or_default()
    );
    let mut fields = head.lines().filter_map(|line| line.split_once(':'));
    let Some((_, length)) = fields.find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
    else {
        bail!("no Content-Length");
    };
    length.trim().parse().context("Content-Length")
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use hawker_conformance::origin::{Content, Fault, Origin, OriginConfig, Rule};

    use super::*;

    const SIZE: u64 = 5_000_000;

    #[test]
    fn a_whole_body_is_counted_and_a_short_one_is_an_error() {
        let origin = Origin::start(OriginConfig::http((Ipv4Addr::LOCALHOST, 0).into())).unwrap();
        let blob = origin.add_blob("r", Content::generated(1, SIZE)).unwrap();
        let target = format!("/v2/r/blobs/{}", blob.digest);
        let from = Ipv4Addr::new(127, 0, 0, 77).into();
        let got = get(origin.address(), &target, Some(from)).unwrap();
        assert_eq!(got.body_bytes, SIZE);
        assert!(got.start <= got.first_byte && got.first_byte <= got.end);

        assert!(get(origin.address(), "/v2/r/blobs/none", None).is_err());
        for fault in [
            Fault::TruncateAfter { bytes: 1000 },
            Fault::ResetAfter { bytes: 1000 },
            Fault::NoLength { chunked: true },
        ] {
            origin.clear_faults();
            origin.add_fault(Rule::always(fault.clone()));
            assert!(get(origin.address(), &target, None).is_err(), "{fault:?}");
        }
    }
}
