//! A connection whose bytes go somewhere else and back, whatever they are.

use std::io::{self, ErrorKind};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep_until};

use super::connection::Stop;
use super::wire::{Plain, hang_up};
use crate::metrics::Metrics;
use crate::origin::Stream;

/// The most bytes on their way in each direction.
const BUFFER_BYTES: usize = 16 << 10;
/// Without a byte in either direction.
const IDLE: Duration = Duration::from_secs(600);

/// Carries bytes both ways until both sides have ended, one breaks off, or nothing moves any more; why it is over.
pub(super) async fn run(
    client: Plain,
    there: Stream,
    stop: &Stop,
    metrics: &Metrics,
) -> &'static str {
    let moved = Mutex::new(Instant::now());
    let _open = metrics.tunnel();
    let both = async {
        match there {
            Stream::Tcp(there) => {
                let up = pump(&client.socket, &there, &client.early, &moved, metrics);
                let down = pump(&there, &client.socket, &[], &moved, metrics);
                tokio::try_join!(up, down).map(drop)
            }
            Stream::Tls(there) => {
                let (from, to) = tokio::io::split(there);
                let up = pump_into(&client.socket, to, &client.early, &moved, metrics);
                let down = pump_from(from, &client.socket, &moved, metrics);
                tokio::try_join!(up, down).map(drop)
            }
        }
    };
    tokio::select! {
        done = both => if done.is_ok() { "the tunnel ended" } else { "the tunnel broke off" },
        () = idle(&moved) => "the tunnel was idle",
        () = stop.over() => "the daemon stops",
    }
}

/// Carries `early`, then what comes `from` one side, `to` the other, and the end as well.
async fn pump(
    from: &TcpStream,
    to: &TcpStream,
    early: &[u8],
    moved: &Mutex<Instant>,
    metrics: &Metrics,
) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_BYTES];
    send(to, early, moved, metrics).await?;
    loop {
        from.readable().await?;
        match from.try_read(&mut buffer) {
            Ok(0) => return hang_up(to),
            Ok(n) => send(to, &buffer[..n], moved, metrics).await?,
            Err(e) if e.kind() == ErrorKind::WouldBlock => {}
            Err(e) => return Err(e),
        }
    }
}

/// Carries `early`, then what the client sends, through TLS to the proxy before the other side.
async fn pump_into(
    from: &TcpStream,
    mut to: impl AsyncWrite + Unpin,
    early: &[u8],
    moved: &Mutex<Instant>,
    metrics: &Metrics,
) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_BYTES];
    to.write_all(early).await?;
    note(early.len(), moved, metrics);
    loop {
        from.readable().await?;
        match from.try_read(&mut buffer) {
            Ok(0) => return to.shutdown().await,
            Ok(n) => {
                to.write_all(&buffer[..n]).await?;
                to.flush().await?;
                note(n, moved, metrics);
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => {}
            Err(e) => return Err(e),
        }
    }
}

/// Carries what comes through TLS to the client.
async fn pump_from(
    mut from: impl AsyncRead + Unpin,
    to: &TcpStream,
    moved: &Mutex<Instant>,
    metrics: &Metrics,
) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        match from.read(&mut buffer).await? {
            0 => return hang_up(to),
            n => send(to, &buffer[..n], moved, metrics).await?,
        }
    }
}

fn note(bytes: usize, moved: &Mutex<Instant>, metrics: &Metrics) {
    metrics.tunnelled.inc_by(bytes as u64);
    *moved.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
}

async fn send(
    to: &TcpStream,
    mut bytes: &[u8],
    moved: &Mutex<Instant>,
    metrics: &Metrics,
) -> io::Result<()> {
    while !bytes.is_empty() {
        to.writable().await?;
        match to.try_write(bytes) {
            Ok(n) => {
                // If both sides are fast, others want a turn too.
                tokio::task::consume_budget().await;
                bytes = &bytes[n..];
                note(n, moved, metrics);
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

async fn idle(moved: &Mutex<Instant>) {
    loop {
        let until = *moved.lock().unwrap_or_else(PoisonError::into_inner) + IDLE;
        if Instant::now() >= until {
            return;
        }
        sleep_until(until).await;
    }
}
