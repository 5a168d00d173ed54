//! The wire format between peers, alone: the very sources of `api` and `proxy`, without the TLS, the gRPC and the daemon around
//! them, which would take minutes to instrument.

// To those sources, this crate is both of theirs.
extern crate self as hawker_api;

#[path = "../../api/src/convert.rs"]
pub mod convert;

#[path = "../../proxy/src/peer/frame.rs"]
#[expect(dead_code, reason = "only what reads frames is tried here")]
mod frame;

/// The generated messages.
#[allow(missing_docs, clippy::all)]
pub mod v1 {
    include!(concat!(env!("OUT_DIR"), "/hawker.v1.rs"));
}

/// As `api` has it.
const VERSION: v1::Version = v1::Version { major: 1, minor: 0 };

/// Reads frames until the stream's end or a broken one, as a connection does; gives the messages that came.
///
/// # Panics
/// When a reader takes more than the bytes that came would justify.
pub fn messages(mut stream: &[u8]) -> Vec<v1::PeerMessage> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .expect("a runtime without drivers");
    let bound = 2 * stream.len().max(frame::DATA_AT_MOST_BYTES);
    runtime.block_on(async {
        let mut reader = frame::FrameReader::new(&mut stream);
        let (mut messages, mut piece) = (Vec::new(), Vec::new());
        while let Ok(Some(next)) = reader.next().await {
            let read = match next {
                frame::Frame::Control(len) => reader
                    .control(len, || (), |_| true)
                    .await
                    .map(|message| messages.push(message)),
                frame::Frame::Unknown(len) => reader.skip(len).await,
                frame::Frame::Data { len, .. } => {
                    piece.clear();
                    reader
                        .data(&mut piece, len)
                        .await
                        .map(|read| assert!((1..=len).contains(&read)))
                }
            };
            assert!(
                piece.capacity() <= bound,
                "{} bytes for a piece",
                piece.capacity()
            );
            if read.is_err() {
                break;
            }
        }
        messages
    })
}
