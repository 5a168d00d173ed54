//! Frames on the wire: a 4-byte big-endian length of what follows it, one byte of kind, the payload.

use std::io;

use bytes::BufMut;
use hawker_api::v1;
use prost::Message as _;
use tokio::io::{AsyncRead, AsyncReadExt};

/// Kind of a frame that carries a protobuf message.
const CONTROL: u8 = 1;
/// Kind of a frame that carries bytes of a piece.
const DATA: u8 = 2;
/// Length field and kind.
const HEADER_BYTES: usize = 5;
/// The header before the bytes of a piece: length field, kind, request number.
pub(super) const DATA_HEADER_BYTES: usize = HEADER_BYTES + 4;
/// Bytes of a piece in one frame at most: control never waits behind more than this.
pub(super) const DATA_AT_MOST_BYTES: usize = 64 << 10;
/// A control message at most: a manifest of 4 MiB and what is around it.
pub(super) const CONTROL_AT_MOST_BYTES: usize = (4 << 20) + (64 << 10);
/// A message longer than this leaves no memory behind.
const CONTROL_KEPT_BYTES: usize = 64 << 10;
/// A message of any other kind than a table or a manifest at most: the held pieces of the longest blob take 128 KiB.
pub(super) const ORDINARY_AT_MOST_BYTES: usize = 256 << 10;

/// The reason for the end of a connection.
#[derive(Debug, thiserror::Error)]
pub(super) enum FrameError {
    /// The socket or TLS broke. Nobody's fault; dial again.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The other side sent what no honest member of this version sends.
    #[error("it broke the protocol: {0}")]
    Protocol(String),
}

pub(super) fn protocol(why: impl Into<String>) -> FrameError {
    FrameError::Protocol(why.into())
}

/// The kind of the next frame. Its payload follows in the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Frame {
    /// A protobuf message of this many bytes.
    Control(usize),
    /// Bytes of a piece.
    Data {
        /// The number under which it was asked for.
        request: u32,
        /// How many bytes follow, at least one.
        len: usize,
    },
    /// A kind of a later minor version, this many bytes: to be skipped.
    Unknown(usize),
}

/// The kind of a message, by the tag that it begins with (protobuf, one-byte tags: field number and wire type).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Values of a piece table.
    Table,
    /// A manifest that was asked for.
    Manifest,
    /// Anything else.
    Ordinary,
}

impl Kind {
    const fn of(tag: u8) -> Self {
        match (tag >> 3, tag & 7) {
            (4, 2) => Self::Table,
            (12, 2) => Self::Manifest,
            _ => Self::Ordinary,
        }
    }
}

/// Appends a control frame.
pub(super) fn put_control(message: &v1::PeerMessage, out: &mut Vec<u8>) {
    out.put_u32(message.encoded_len() as u32 + 1);
    out.put_u8(CONTROL);
    message.encode_raw(out);
}

/// The header before `len` bytes of a piece.
pub(super) fn data_header(request: u32, len: usize) -> [u8; DATA_HEADER_BYTES] {
    let mut header = [0; DATA_HEADER_BYTES];
    let mut out = &mut header[..];
    out.put_u32((1 + 4 + len) as u32);
    out.put_u8(DATA);
    out.put_u32(request);
    header
}

/// Reads frames. The payload of a data frame is left in the stream, so that it goes to where it belongs without a detour.
pub(super) struct FrameReader<R> {
    io: R,
    control: Vec<u8>,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    pub(super) const fn new(io: R) -> Self {
        Self {
            io,
            control: Vec::new(),
        }
    }

    /// The next frame; `None` at the stream's end. The frame before must have been read whole.
    pub(super) async fn next(&mut self) -> Result<Option<Frame>, FrameError> {
        let mut header = [0; HEADER_BYTES];
        let first = self.io.read(&mut header).await?;
        if first == 0 {
            return Ok(None);
        }
        self.io.read_exact(&mut header[first..]).await?;
        let [length @ .., kind] = header;
        let payload = (u32::from_be_bytes(length) as usize)
            .checked_sub(1)
            .ok_or_else(|| protocol("a frame without kind"))?;
        match kind {
            DATA => {
                let len = payload
                    .checked_sub(4)
                    .filter(|len| (1..=DATA_AT_MOST_BYTES).contains(len));
                let len =
                    len.ok_or_else(|| protocol(format!("a data frame of {payload} bytes")))?;
                Ok(Some(Frame::Data {
                    request: self.io.read_u32().await?,
                    len,
                }))
            }
            _ if payload > CONTROL_AT_MOST_BYTES => {
                Err(protocol(format!("a frame of {payload} bytes")))
            }
            CONTROL => Ok(Some(Frame::Control(payload))),
            _ => Ok(Some(Frame::Unknown(payload))),
        }
    }

    /// The message of a control frame of `len` bytes; `heard` is called as they come. Memory grows with what has come, not
    /// with what was announced; and of the kinds that `may_be_long` does not name little is read.
    pub(super) async fn control(
        &mut self,
        len: usize,
        mut heard: impl FnMut(),
        may_be_long: impl Fn(Kind) -> bool,
    ) -> Result<v1::PeerMessage, FrameError> {
        self.control.clear();
        while self.control.len() < len {
            let missing = len - self.control.len();
            self.read_more(missing).await?;
            let kind = self
                .control
                .first()
                .map_or(Kind::Ordinary, |tag| Kind::of(*tag));
            if len > ORDINARY_AT_MOST_BYTES && !may_be_long(kind) {
                return Err(protocol(format!("a message of {len} bytes")));
            }
            heard();
        }
        let message =
            v1::PeerMessage::decode(&self.control[..]).map_err(|e| protocol(e.to_string()));
        if self.control.capacity() > CONTROL_KEPT_BYTES {
            self.control = Vec::new();
        }
        message
    }

    /// Appends to `out` some of the bytes of a data frame: at most `len`, at least one.
    pub(super) async fn data(
        &mut self,
        out: &mut Vec<u8>,
        len: usize,
    ) -> Result<usize, FrameError> {
        read_some(&mut self.io, out, len).await
    }

    /// Throws away `len` bytes.
    pub(super) async fn skip(&mut self, mut len: usize) -> Result<(), FrameError> {
        while len > 0 {
            self.control.clear();
            len -= self.read_more(len).await?;
        }
        Ok(())
    }

    async fn read_more(&mut self, len: usize) -> Result<usize, FrameError> {
        // Vec doubles when it grows; the reservation only keeps the steps from being small.
        let step = len.min(16 << 10);
        self.control.reserve(step);
        read_some(&mut self.io, &mut self.control, step).await
    }
}

async fn read_some<R: AsyncRead + Unpin>(
    io: &mut R,
    out: &mut Vec<u8>,
    len: usize,
) -> Result<usize, FrameError> {
    match io.read_buf(&mut out.limit(len)).await? {
        0 => Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
        read => Ok(read),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ping(nonce: u64) -> v1::PeerMessage {
        v1::PeerMessage {
            message: Some(v1::peer_message::Message::Ping(v1::Ping { nonce })),
        }
    }

    fn block_on<F: Future>(future: F) -> F::Output {
        tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap()
            .block_on(future)
    }

    /// Reads until the end or an error, as a connection does; how many frames there were.
    async fn read_all(mut bytes: &[u8]) -> (usize, usize, Result<(), FrameError>) {
        let (mut frames, mut largest) = (0, 0);
        let mut reader = FrameReader::new(&mut bytes);
        let mut sink = Vec::with_capacity(DATA_AT_MOST_BYTES);
        let end = loop {
            let step = match reader.next().await {
                Ok(None) => break Ok(()),
                Ok(Some(Frame::Control(len))) => {
                    reader.control(len, || (), |_| true).await.map(|_| ())
                }
                Ok(Some(Frame::Unknown(len))) => reader.skip(len).await,
                Ok(Some(Frame::Data { len, .. })) => {
                    sink.clear();
                    reader.data(&mut sink, len).await.map(|_| ())
                }
                Err(e) => Err(e),
            };
            largest = largest.max(reader.control.capacity()).max(sink.capacity());
            if let Err(e) = step {
                break Err(e);
            }
            frames += 1;
        };
        (frames, largest, end)
    }

    #[test]
    fn frames_come_out_as_they_went_in() {
        let mut wire = Vec::new();
        put_control(&ping(7), &mut wire);
        wire.extend_from_slice(&data_header(9, 3));
        wire.extend_from_slice(b"abc");
        wire.extend_from_slice(&[0, 0, 0, 3, 200, 1, 2]);
        put_control(&ping(8), &mut wire);
        block_on(async {
            let mut reader = FrameReader::new(&wire[..]);
            let Some(Frame::Control(len)) = reader.next().await.unwrap() else {
                panic!()
            };
            assert_eq!(reader.control(len, || (), |_| true).await.unwrap(), ping(7));
            assert_eq!(
                reader.next().await.unwrap(),
                Some(Frame::Data { request: 9, len: 3 })
            );
            let mut data = Vec::with_capacity(3);
            assert_eq!(reader.data(&mut data, 3).await.unwrap(), 3);
            assert_eq!(data, b"abc");
            assert_eq!(reader.next().await.unwrap(), Some(Frame::Unknown(2)));
            reader.skip(2).await.unwrap();
            let Some(Frame::Control(len)) = reader.next().await.unwrap() else {
                panic!()
            };
            assert_eq!(reader.control(len, || (), |_| true).await.unwrap(), ping(8));
            assert_eq!(reader.next().await.unwrap(), None);
        });
    }

    #[test]
    fn frames_that_are_too_long_or_too_short_are_refused_before_memory_is_spent() {
        let too_much = (CONTROL_AT_MOST_BYTES as u32 + 2).to_be_bytes();
        let data_too_much = (DATA_AT_MOST_BYTES as u32 + 6).to_be_bytes();
        let cases: [(&[u8], u8); 6] = [
            (&[0; 4], 1),
            (&too_much, 1),
            (&too_much, 77),
            (&data_too_much, 2),
            (&[0, 0, 0, 5], 2),
            (&[0xff; 4], 2),
        ];
        for (length, kind) in cases {
            let wire = [length, &[kind], &[0; 64]].concat();
            let (_, largest, end) = block_on(read_all(&wire));
            assert!(
                matches!(end, Err(FrameError::Protocol(_))),
                "{length:?} {kind}"
            );
            assert!(largest <= DATA_AT_MOST_BYTES);
        }
    }

    #[test]
    fn an_announced_message_takes_memory_only_as_it_comes() {
        let mut wire = (CONTROL_AT_MOST_BYTES as u32).to_be_bytes().to_vec();
        wire.extend_from_slice(&[1, 0, 0]);
        let (_, largest, end) = block_on(read_all(&wire));
        assert!(matches!(end, Err(FrameError::Io(_))));
        assert!(largest <= DATA_AT_MOST_BYTES, "{largest}");
    }

    proptest! {
        #[test]
        fn garbage_never_panics_nor_takes_much_memory(bytes in proptest::collection::vec(any::<u8>(), 0..4096)) {
            let (_, largest, _) = block_on(read_all(&bytes));
            prop_assert!(largest <= 2 * DATA_AT_MOST_BYTES);
        }

        #[test]
        fn plausible_garbage_never_panics(
            frames in proptest::collection::vec((0u32..200, 0u8..4, proptest::collection::vec(any::<u8>(), 0..200)), 0..40)
        ) {
            let mut wire = Vec::new();
            for (length, kind, payload) in frames {
                wire.extend_from_slice(&length.to_be_bytes());
                wire.push(kind);
                wire.extend_from_slice(&payload);
            }
            let (_, largest, _) = block_on(read_all(&wire));
            prop_assert!(largest <= 2 * DATA_AT_MOST_BYTES);
        }
    }
}
