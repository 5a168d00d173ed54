//! The writing half of a connection: control first, then the pieces asked for, frame by frame in turn.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hawker_core::message::{Message, Refusal};
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::sync::ReusableBoxFuture;

use super::PieceSource;
use super::connection::{Connection, Order, Outgoing, Queues};
use super::frame::{DATA_AT_MOST_BYTES, data_header, put_control};
use super::hub::Hub;
use crate::limits::Direction;
use hawker_lanes::{self as lanes, Lane};

/// Pieces sent at once on one connection, in turn; more wait. Their read-ahead is what a connection costs in memory.
const ACTIVE_AT_MOST: usize = 4;
/// Bytes read from a file at once, on a thread of its own: a cold disk must not hold up the runtime. A chunk is ahead of
/// the one being sent.
const CHUNK_BYTES: usize = 256 << 10;
/// Control messages gathered into one write.
const GATHERED_BYTES: usize = 64 << 10;
/// A write that makes no progress for this long ends the connection.
const WRITE_DEADLINE: Duration = Duration::from_secs(30);
/// For the last words of a connection.
const FAREWELL_DEADLINE: Duration = Duration::from_secs(1);

pub(super) struct Transmitter<W> {
    hub: Arc<Hub>,
    connection: Arc<Connection>,
    io: W,
    queues: Queues,
    /// Encoded control messages, to be written next.
    control: Vec<u8>,
    active: VecDeque<Upload>,
    waiting: VecDeque<(u32, PieceSource)>,
    /// Uploads that are over, for the driver to be told.
    over: VecDeque<Over>,
    /// Bytes that the rate limit has granted and that are not sent yet.
    granted: u64,
    /// Resolves when `asked_for` bytes more are granted.
    grant: ReusableBoxFuture<'static, ()>,
    asked_for: u64,
    chunk_in: mpsc::Sender<Chunk>,
    chunks: mpsc::Receiver<Chunk>,
    spare: Vec<Vec<u8>>,
    next_serial: u64,
}

/// How an upload ended: its number, the bytes that went, whether these were all.
struct Over {
    request: u32,
    sent: u64,
    complete: bool,
}

/// Bytes of a file on their way to the upload that wants them.
struct Chunk {
    upload: u64,
    bytes: io::Result<Vec<u8>>,
}

struct Upload {
    /// Ours, never used twice; the asker may use its number again.
    serial: u64,
    request: u32,
    sent: u64,
    source: Sending,
}

enum Sending {
    Memory(Bytes),
    File {
        file: Arc<File>,
        /// The bytes not read yet.
        unread: Range<u64>,
        reading: bool,
        now: Vec<u8>,
        /// How much of `now` is sent.
        at: usize,
        ahead: Option<Vec<u8>>,
    },
}

impl Sending {
    fn new(piece: PieceSource) -> Self {
        match piece {
            PieceSource::Memory(bytes) => Self::Memory(bytes),
            PieceSource::File { file, range } => Self::File {
                file,
                unread: range,
                reading: false,
                now: Vec::new(),
                at: 0,
                ahead: None,
            },
        }
    }
}

impl Upload {
    /// The bytes that can be sent without waiting.
    fn ready(&self) -> &[u8] {
        match &self.source {
            Sending::Memory(bytes) => bytes,
            Sending::File { now, at, .. } => &now[*at..],
        }
    }

    fn next_frame_bytes(&self) -> usize {
        self.ready().len().min(DATA_AT_MOST_BYTES)
    }

    fn is_over(&self) -> bool {
        match &self.source {
            Sending::Memory(bytes) => bytes.is_empty(),
            Sending::File {
                unread,
                reading,
                now,
                at,
                ahead,
                ..
            } => unread.is_empty() && !reading && *at == now.len() && ahead.is_none(),
        }
    }

    fn advance(&mut self, count: usize) {
        self.sent += count as u64;
        match &mut self.source {
            Sending::Memory(bytes) => drop(bytes.split_to(count)),
            Sending::File { at, .. } => *at += count,
        }
    }
}

impl<W: AsyncWrite + Unpin> Transmitter<W> {
    pub(super) fn new(hub: Arc<Hub>, connection: Arc<Connection>, io: W, queues: Queues) -> Self {
        // Each active upload has one read under way at most.
        let (chunk_in, chunks) = mpsc::channel(ACTIVE_AT_MOST);
        Self {
            hub,
            connection,
            io,
            queues,
            control: Vec::new(),
            active: VecDeque::new(),
            waiting: VecDeque::new(),
            over: VecDeque::new(),
            granted: 0,
            grant: ReusableBoxFuture::new(std::future::pending()),
            asked_for: 0,
            chunk_in,
            chunks,
            spare: Vec::new(),
            next_serial: 0,
        }
    }

    /// Writes until the connection is closed, from either side.
    pub(super) async fn run(mut self) {
        let connection = Arc::clone(&self.connection);
        let end = tokio::select! {
            end = self.write() => end,
            () = connection.close.cancelled() => Ok(()),
        };
        connection.close.cancel();
        if end.is_ok() {
            // close_notify and FIN, so that the other side knows that nothing was cut off.
            let _ = timeout(FAREWELL_DEADLINE, self.io.shutdown()).await;
        }
        self.tell_unfinished().await;
    }

    async fn write(&mut self) -> io::Result<()> {
        loop {
            self.gather();
            self.advance_uploads();
            self.tell_over().await;
            if !self.control.is_empty() {
                self.write_control().await?;
            } else if let Some(len) = self.next_frame_bytes() {
                if self.granted >= len as u64 {
                    self.write_frame().await?;
                } else {
                    self.ask_for(len as u64 - self.granted);
                    self.wait().await?;
                }
            } else {
                self.wait().await?;
            }
        }
    }

    /// Waits until there is something new to do.
    async fn wait(&mut self) -> io::Result<()> {
        write_within(self.io.flush()).await?;
        tokio::select! {
            biased;
            Some(outgoing) = self.queues.control.recv() => put(&self.connection, &mut self.control, &outgoing),
            Some(order) = self.queues.orders.recv() => self.obey(order),
            Some(chunk) = self.chunks.recv() => self.place(chunk),
            () = self.grant.get_pin(), if self.asked_for > 0 => {
                self.granted += self.asked_for;
                self.asked_for = 0;
            }
        }
        Ok(())
    }

    fn gather(&mut self) {
        while self.control.len() < GATHERED_BYTES {
            let Ok(outgoing) = self.queues.control.try_recv() else {
                break;
            };
            put(&self.connection, &mut self.control, &outgoing);
        }
    }

    fn advance_uploads(&mut self) {
        while let Ok(order) = self.queues.orders.try_recv() {
            self.obey(order);
        }
        while let Ok(chunk) = self.chunks.try_recv() {
            self.place(chunk);
        }
        while let Some(at) = self.active.iter().position(Upload::is_over) {
            self.end(at, true);
        }
        while self.active.len() < ACTIVE_AT_MOST {
            let Some((request, piece)) = self.waiting.pop_front() else {
                break;
            };
            let serial = self.next_serial;
            self.next_serial += 1;
            self.active.push_back(Upload {
                serial,
                request,
                sent: 0,
                source: Sending::new(piece),
            });
        }
        for at in 0..self.active.len() {
            self.read_ahead(at);
        }
    }

    fn obey(&mut self, order: Order) {
        match order {
            Order::Send(request, piece) => self.waiting.push_back((request, piece)),
            Order::Drop(request) => {
                if let Some(at) = self
                    .active
                    .iter()
                    .position(|upload| upload.request == request)
                {
                    self.end(at, false);
                } else if let Some(at) = self
                    .waiting
                    .iter()
                    .position(|(waiting, _)| *waiting == request)
                {
                    self.waiting.remove(at);
                    self.over.push_back(Over {
                        request,
                        sent: 0,
                        complete: false,
                    });
                }
            }
        }
    }

    /// Ends an active upload.
    fn end(&mut self, at: usize, complete: bool) {
        if let Some(Upload { request, sent, .. }) = self.active.remove(at) {
            self.connection.no_more_asked(request);
            self.over.push_back(Over {
                request,
                sent,
                complete,
            });
        }
    }

    async fn tell_over(&mut self) {
        while let Some(Over {
            request,
            sent,
            complete,
        }) = self.over.front()
        {
            self.hub
                .uploaded(self.connection.remote.peer, *request, *sent, *complete)
                .await;
            self.over.pop_front();
        }
    }

    /// Keeps one chunk of a file ahead of the one being sent.
    fn read_ahead(&mut self, at: usize) {
        let Some(upload) = self.active.get_mut(at) else {
            return;
        };
        let serial = upload.serial;
        let Sending::File {
            file,
            unread,
            reading,
            now,
            at,
            ahead,
        } = &mut upload.source
        else {
            return;
        };
        if *at == now.len()
            && let Some(next) = ahead.take()
        {
            let sent = std::mem::replace(now, next);
            *at = 0;
            if sent.capacity() > 0 && self.spare.len() < ACTIVE_AT_MOST {
                self.spare.push(sent);
            }
        }
        if *reading || ahead.is_some() || unread.is_empty() {
            return;
        }
        *reading = true;
        let len = (unread.end - unread.start).min(CHUNK_BYTES as u64);
        let (file, offset) = (Arc::clone(file), unread.start);
        unread.start += len;
        let mut bytes = self.spare.pop().unwrap_or_default();
        let chunk_in = self.chunk_in.clone();
        lanes::start(Lane::Uploads, move || {
            bytes.resize(len as usize, 0);
            let bytes = file.read_exact_at(&mut bytes, offset).map(|()| bytes);
            // An error means that the connection has ended and nobody wants it.
            let _ = chunk_in.blocking_send(Chunk {
                upload: serial,
                bytes,
            });
        });
    }

    fn place(&mut self, chunk: Chunk) {
        let Some(at) = self
            .active
            .iter()
            .position(|upload| upload.serial == chunk.upload)
        else {
            return;
        };
        let Sending::File { reading, ahead, .. } = &mut self.active[at].source else {
            return;
        };
        *reading = false;
        match chunk.bytes {
            Ok(bytes) => *ahead = Some(bytes),
            Err(error) => {
                tracing::warn!(%error, "a piece can't be read from the store; its upload is broken off");
                let request = self.active[at].request;
                self.end(at, false);
                self.connection.say(&Message::Reject {
                    request,
                    reason: Refusal::Unable,
                });
            }
        }
    }

    /// Turns to the next upload that has something to send; how much its frame carries.
    fn next_frame_bytes(&mut self) -> Option<usize> {
        for _ in 0..self.active.len() {
            match self.active.front().map_or(0, Upload::next_frame_bytes) {
                0 => self.active.rotate_left(1),
                len => return Some(len),
            }
        }
        None
    }

    fn ask_for(&mut self, bytes: u64) {
        if self.asked_for == 0 {
            self.asked_for = bytes;
            let limits = self.hub.limits.clone();
            self.grant
                .set(async move { limits.take(Direction::Upload, bytes).await });
        }
    }

    /// Sends a frame of the upload in front and puts it behind the others.
    async fn write_frame(&mut self) -> io::Result<()> {
        // It stays in its place while the write is under way: the write may be broken off, its end must be told.
        let Some(upload) = self.active.front() else {
            return Ok(());
        };
        let len = upload.next_frame_bytes();
        let header = data_header(upload.request, len);
        write_all_vectored(&mut self.io, &header, &upload.ready()[..len]).await?;
        self.granted = self.granted.saturating_sub(len as u64);
        self.connection.note_traffic();
        if let Some(upload) = self.active.front_mut() {
            upload.advance(len);
        }
        self.active.rotate_left(1);
        Ok(())
    }

    async fn write_control(&mut self) -> io::Result<()> {
        write_all_vectored(&mut self.io, &self.control, &[]).await?;
        self.control.clear();
        self.control.shrink_to(GATHERED_BYTES);
        Ok(())
    }

    async fn tell_unfinished(mut self) {
        self.queues.orders.close();
        while let Ok(order) = self.queues.orders.try_recv() {
            self.obey(order);
        }
        while let Some(upload) = self.active.front() {
            self.end(0, upload.is_over());
        }
        for (request, _) in std::mem::take(&mut self.waiting) {
            self.over.push_back(Over {
                request,
                sent: 0,
                complete: false,
            });
        }
        self.tell_over().await;
    }
}

fn put(connection: &Connection, control: &mut Vec<u8>, outgoing: &Outgoing) {
    use hawker_api::v1::peer_message::Message::{Ping, Pong};
    if !matches!(outgoing.message.message, Some(Ping(_) | Pong(_))) {
        connection.note_traffic();
    }
    put_control(&outgoing.message, control);
}

/// Both slices, in as few writes as the socket takes: TLS makes its records across their border.
async fn write_all_vectored<W: AsyncWrite + Unpin>(
    io: &mut W,
    first: &[u8],
    second: &[u8],
) -> io::Result<()> {
    let mut slices = [IoSlice::new(first), IoSlice::new(second)];
    let mut rest = &mut slices[..];
    IoSlice::advance_slices(&mut rest, 0);
    while !rest.is_empty() {
        match write_within(io.write_vectored(rest)).await? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            written => IoSlice::advance_slices(&mut rest, written),
        }
    }
    Ok(())
}

async fn write_within<T>(write: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    timeout(WRITE_DEADLINE, write)
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}
