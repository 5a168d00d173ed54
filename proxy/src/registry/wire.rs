//! The socket under a connection: sends memory as it is, and files without copying them, or through TLS.
//!
//! hyper wants a body as bytes in memory. A file's bytes are stood in for by slices of [`PHANTOM`], memory that nobody reads
//! or writes, while the [`Line`] remembers which file they stand for. [`Wire`] knows such a slice by its address and sends the
//! file in its place: on a plain socket the kernel does (`sendfile(2)`), for TLS it is read block by block. hyper passes slices
//! of a body on uncopied as long as the socket can write vectors, which `Wire` says it can. A phantom that does not fit what
//! the line remembers ends the connection.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, IoSlice};
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use bytes::Bytes;
use hawker_core::connections::Doing;
use hyper::rt::{Read, ReadBufCursor, Write};
use rustix::fs::{Advice, fadvise, sendfile};
use rustix::net::sockopt::set_tcp_cork;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_rustls::server::TlsStream;

/// Stands for bytes of files; never read, never written, so it takes no memory.
static PHANTOM: [u8; 1 << 20] = [0; 1 << 20];
/// The most that one phantom stands for.
const MAX_SPAN_BYTES: u64 = PHANTOM.len() as u64;
/// How far ahead of the sending position the kernel is asked to read.
const READ_AHEAD_BYTES: u64 = 4 << 20;
/// The most bytes that one read takes from the socket.
const READ_BYTES: usize = 8 << 10;
/// The bytes read of a file at once for TLS: as much as a record holds (RFC 8446, 5.1).
const BLOCK_BYTES: usize = 16 << 10;

/// For a request's head to come, from its first byte to its last.
const HEAD: Duration = Duration::from_secs(10);
/// For a connection to wait for its next request.
const IDLE: Duration = Duration::from_secs(90);
/// For a client to take at least this much of what is sent to it, or all of it: containerd may rest for minutes, but a connection and
/// what it holds are not for who takes a byte now and then.
const STALLED: Duration = Duration::from_secs(600);
const PROGRESS_BYTES: usize = 1 << 20;
/// A connection whose client has not taken that much for this long, or that waits for its answer for this long, gives way where places
/// are scarce.
const RESTS: Duration = Duration::from_secs(20);

/// The line between the parts of one connection.
pub(super) struct Line(Mutex<State>);

struct State {
    /// The spans behind the phantoms on their way, in order.
    spans: VecDeque<Span>,
    phase: Phase,
    /// Something of the current response is not sent yet.
    unsent: bool,
    /// A body that waits until all is sent.
    flushed: Option<Waker>,
    /// Since when it is waited for [`PROGRESS_BYTES`], and how many of these came.
    progress: Instant,
    moved_bytes: usize,
}

#[derive(Clone)]
struct Span {
    file: Arc<File>,
    offset: u64,
    len: usize,
    /// The next one goes on where it ends.
    more: bool,
}

/// The state of a connection with its requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Between requests.
    Idle(Instant),
    /// A request has begun to come, or the connection is new.
    Head(Instant),
    /// A request is being answered.
    Busy(Instant),
    /// It carries other bytes, and somebody else looks after it.
    Tunnel,
}

impl Line {
    pub(super) fn new() -> Self {
        let now = Instant::now();
        let (phase, spans) = (Phase::Head(now), VecDeque::new());
        Self(Mutex::new(State {
            spans,
            phase,
            unsent: false,
            flushed: None,
            progress: now,
            moved_bytes: 0,
        }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next bytes of a file of which this `range` is to be sent, at most [`MAX_SPAN_BYTES`] and `limit_bytes`, as what goes into
    /// the body for them, if there are any. They must go there next.
    pub(super) fn phantom(
        &self,
        file: &Arc<File>,
        range: &Range<u64>,
        limit_bytes: u64,
    ) -> Option<Bytes> {
        let (offset, len) = (
            range.start,
            (range.end - range.start)
                .min(MAX_SPAN_BYTES)
                .min(limit_bytes),
        );
        if len == 0 {
            return None;
        }
        if offset / READ_AHEAD_BYTES != (offset + len) / READ_AHEAD_BYTES || offset == 0 {
            // Only a hint: if it does not work, reading waits for the disk. Not past the range: a blob that still
            // comes has holes, and the pages read of them would be filled twice.
            let ahead =
                NonZeroU64::new(range.end.saturating_sub(offset + len).min(READ_AHEAD_BYTES));
            let _ = ahead.map(|ahead| fadvise(file, offset + len, Some(ahead), Advice::WillNeed));
        }
        let phantom = Bytes::from_static(&PHANTOM[..len as usize]);
        let more = len < limit_bytes && offset + len < range.end;
        self.state().spans.push_back(Span {
            file: Arc::clone(file),
            offset,
            len: phantom.len(),
            more,
        });
        Some(phantom)
    }

    /// A request's head is complete. The answer: it was here already when the response before it ended.
    pub(super) fn begin(&self) -> bool {
        let mut state = self.state();
        let was_here = matches!(state.phase, Phase::Idle(_));
        state.phase = Phase::Busy(Instant::now());
        was_here
    }

    /// The connection begins anew, with TLS inside.
    pub(super) fn renew(&self) {
        let mut state = self.state();
        state.spans.clear();
        (state.phase, state.unsent) = (Phase::Head(Instant::now()), false);
    }

    /// The connection becomes a tunnel.
    pub(super) fn tunnel(&self) {
        self.state().phase = Phase::Tunnel;
    }

    /// The activity of the connection at `now`, and its start.
    pub(super) fn doing(&self, now: Instant) -> (Doing, Instant) {
        let state = self.state();
        let busy = |since: Instant| match now.saturating_duration_since(since) > RESTS {
            true => (Doing::Stalled, since),
            false => (Doing::Moving, since),
        };
        match state.phase {
            _ if state.unsent => busy(state.progress),
            Phase::Busy(since) => busy(since),
            Phase::Head(since) | Phase::Idle(since) => (Doing::Waiting, since),
            Phase::Tunnel => (Doing::Moving, now),
        }
    }

    /// Something of the response is about to be sent.
    pub(super) fn owe(&self) {
        let mut state = self.state();
        if !state.unsent {
            state.unsent = true;
            (state.progress, state.moved_bytes) = (Instant::now(), 0);
        }
    }

    /// The client took so many bytes.
    fn moved(&self, bytes: usize) {
        let mut state = self.state();
        state.moved_bytes += bytes;
        if state.moved_bytes >= PROGRESS_BYTES {
            (state.progress, state.moved_bytes) = (Instant::now(), 0);
        }
    }

    /// The response is over, as far as its body goes.
    pub(super) fn end(&self) {
        self.state().phase = Phase::Idle(Instant::now());
    }

    /// Waits until all bytes given to the connection are sent: bytes before a failure still arrive.
    pub(super) fn poll_flushed(&self, cx: &Context<'_>) -> Poll<()> {
        let mut state = self.state();
        if !state.unsent {
            return Poll::Ready(());
        }
        state.flushed = Some(cx.waker().clone());
        Poll::Pending
    }

    /// Why the connection should be given up at `now`, if it should.
    pub(super) fn overdue(&self, now: Instant) -> Option<&'static str> {
        let state = self.state();
        let longer = |since: Instant, limit: Duration| now.saturating_duration_since(since) > limit;
        if state.unsent {
            return longer(state.progress, STALLED).then_some("it took next to no bytes");
        }
        match state.phase {
            Phase::Busy(_) | Phase::Tunnel => None,
            Phase::Head(began) => longer(began, HEAD).then_some("its request came too slowly"),
            Phase::Idle(began) => longer(began, IDLE).then_some("it was idle"),
        }
    }
}

/// A client's connection, for hyper.
pub(super) struct Wire {
    pub(super) channel: Channel,
    pub(super) line: Arc<Line>,
}

/// The channel of a connection's bytes.
pub(super) enum Channel {
    Plain(Plain),
    Tls(Box<TlsStream<Plain>>),
}

/// A client's socket, shared with the part that ends it. Bytes that were read of it too early come first.
pub(super) struct Plain {
    pub(super) socket: Arc<TcpStream>,
    pub(super) early: Bytes,
    /// The kernel holds back what does not fill a segment (`TCP_CORK`).
    pub(super) corked: bool,
}

/// The first part of some slices.
enum Next<'a, 'b> {
    Nothing,
    /// Memory, up to the first phantom.
    Memory(&'a [IoSlice<'b>]),
    /// A phantom of this length.
    Phantom(usize),
}

fn is_phantom(slice: &[u8]) -> bool {
    slice.as_ptr().addr().wrapping_sub(PHANTOM.as_ptr().addr()) < PHANTOM.len()
}

fn next<'a, 'b>(slices: &'a [IoSlice<'b>]) -> Next<'a, 'b> {
    let first = slices
        .iter()
        .position(|s| !s.is_empty())
        .unwrap_or(slices.len());
    let slices = &slices[first..];
    match slices.first() {
        None => Next::Nothing,
        Some(phantom) if is_phantom(phantom) => Next::Phantom(phantom.len()),
        Some(_) => {
            let memory = slices
                .iter()
                .position(|s| !s.is_empty() && is_phantom(s))
                .unwrap_or(slices.len());
            Next::Memory(&slices[..memory])
        }
    }
}

impl Line {
    /// The span behind the next phantom, `len` bytes long.
    fn stood_for(&self, len: usize) -> io::Result<Span> {
        let state = self.state();
        let span = state.spans.front().filter(|span| span.len == len).cloned();
        span.ok_or_else(|| io::Error::other("a body's bytes are out of step with their files"))
    }

    /// So much of the next phantom is sent.
    fn sent(&self, bytes: usize) {
        let mut state = self.state();
        if let Some(span) = state.spans.front_mut() {
            span.offset += bytes as u64;
            span.len -= bytes;
            if span.len == 0 {
                state.spans.pop_front();
            }
        }
    }
}

fn shrunk() -> io::Error {
    io::Error::new(
        io::ErrorKind::UnexpectedEof,
        "a file in the store is shorter than it was",
    )
}

impl Plain {
    pub(super) const fn new(socket: Arc<TcpStream>) -> Self {
        Self {
            socket,
            early: Bytes::new(),
            corked: false,
        }
    }

    fn poll_send(
        &self,
        cx: &mut Context<'_>,
        send: impl Fn(&TcpStream) -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.socket.poll_write_ready(cx))?;
            match send(&self.socket) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                sent => return Poll::Ready(sent),
            }
        }
    }

    fn poll_send_file(&mut self, cx: &mut Context<'_>, span: &Span) -> Poll<io::Result<usize>> {
        if span.more {
            self.cork(true);
        }
        let sent = ready!(self.poll_send(cx, |socket| {
            let mut offset = span.offset;
            let send = || Ok(sendfile(socket, &span.file, Some(&mut offset), span.len)?);
            let sent = socket.try_io(Interest::WRITABLE, send)?;
            if sent == 0 { Err(shrunk()) } else { Ok(sent) }
        }))?;
        if !span.more && sent == span.len {
            self.cork(false);
        }
        Poll::Ready(Ok(sent))
    }

    /// Between two spans of a file no short segment is sent: each would wake the client for a few bytes. On loopback that was a
    /// third of what serving a cached blob costs.
    fn cork(&mut self, corked: bool) {
        if self.corked != corked {
            self.corked = corked;
            // Only the cut into segments depends on it: corked bytes are sent after 200 ms at the latest.
            let _ = set_tcp_cork(&*self.socket, corked);
        }
    }
}

impl AsyncRead for Plain {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if !self.early.is_empty() {
            let len = self.early.len().min(buf.remaining());
            buf.put_slice(&self.early.split_to(len));
            return Poll::Ready(Ok(()));
        }
        loop {
            ready!(self.socket.poll_read_ready(cx))?;
            match self.socket.try_read(buf.initialize_unfilled()) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Poll::Ready(Err(e)),
                Ok(n) => {
                    buf.advance(n);
                    return Poll::Ready(Ok(()));
                }
            }
        }
    }
}

impl AsyncWrite for Plain {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_send(cx, |socket| socket.try_write(buf))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_send(cx, |socket| socket.try_write_vectored(slices))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(hang_up(&self.socket))
    }
}

impl Channel {
    fn poll_send_file(&mut self, cx: &mut Context<'_>, span: &Span) -> Poll<io::Result<usize>> {
        match self {
            Channel::Plain(plain) => plain.poll_send_file(cx, span),
            Channel::Tls(tls) => {
                let mut block = [0; BLOCK_BYTES];
                let read = span
                    .file
                    .read_at(&mut block[..span.len.min(BLOCK_BYTES)], span.offset)?;
                if read == 0 {
                    return Poll::Ready(Err(shrunk()));
                }
                Pin::new(tls).poll_write(cx, &block[..read])
            }
        }
    }

    fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        memory: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self {
            Channel::Plain(plain) => Pin::new(plain).poll_write_vectored(cx, memory),
            Channel::Tls(tls) => Pin::new(tls).poll_write_vectored(cx, memory),
        }
    }
}

impl Write for Wire {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(buf)])
    }

    /// Sends what comes first of `slices`.
    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let sent = match next(slices) {
            Next::Nothing => 0,
            Next::Memory(memory) => ready!(self.channel.poll_send(cx, memory))?,
            Next::Phantom(len) => {
                let span = self.line.stood_for(len)?;
                let sent = ready!(self.channel.poll_send_file(cx, &span))?;
                self.line.sent(sent);
                sent
            }
        };
        self.line.moved(sent);
        Poll::Ready(Ok(sent))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// Called when nothing is left to write.
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Channel::Tls(tls) = &mut self.channel {
            ready!(Pin::new(tls).poll_flush(cx))?;
        }
        let mut state = self.line.state();
        state.unsent = false;
        if let Some(waker) = state.flushed.take() {
            waker.wake();
        }
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.channel {
            Channel::Plain(plain) => Pin::new(plain).poll_shutdown(cx),
            Channel::Tls(tls) => Pin::new(tls).poll_shutdown(cx),
        }
    }
}

/// Sends FIN after what is on its way.
pub(super) fn hang_up(socket: &TcpStream) -> io::Result<()> {
    Ok(rustix::net::shutdown(socket, rustix::net::Shutdown::Write)?)
}

impl Read for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        mut buf: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        let mut bytes = [0; READ_BYTES];
        let mut heard = ReadBuf::new(&mut bytes[..buf.remaining().min(READ_BYTES)]);
        ready!(match &mut self.channel {
            Channel::Plain(plain) => Pin::new(plain).poll_read(cx, &mut heard),
            Channel::Tls(tls) => Pin::new(tls).poll_read(cx, &mut heard),
        })?;
        buf.put_slice(heard.filled());
        self.line.state().heard(heard.filled().len());
        Poll::Ready(Ok(()))
    }
}

impl State {
    /// The first bytes after a response begin the next request.
    fn heard(&mut self, bytes: usize) {
        if bytes > 0 && matches!(self.phase, Phase::Idle(_)) {
            self.phase = Phase::Head(Instant::now());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_client_that_takes_a_byte_now_and_then_is_given_up() {
        let (line, soon) = (Line::new(), Duration::from_secs(200));
        line.owe();
        line.state().progress -= STALLED - soon / 2;
        line.moved(PROGRESS_BYTES - 1);
        assert!(line.overdue(Instant::now()).is_none());
        assert!(line.overdue(Instant::now() + soon).is_some());
        line.moved(1);
        assert!(line.overdue(Instant::now() + soon).is_none());
    }
}
