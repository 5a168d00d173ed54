//! The reading half of a connection: messages to the driver, bytes of pieces into their buffers, hashed as they come.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use hawker_api::v1::peer_message::Message as Wire;
use hawker_api::{convert, v1};
use hawker_core::message::{Message, Refusal};
use tokio::io::AsyncRead;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::timeout;

use super::connection::{Asked, Connection, STALLED_AFTER, Taken};
use super::frame::{Frame, FrameError, FrameReader, Kind, ORDINARY_AT_MOST_BYTES, protocol};
use super::hub::Hub;
use super::{PeerError, PeerEvent};
use crate::limits::Direction;

/// How long a manifest may take to be answered.
pub(super) const MANIFEST_DEADLINE: Duration = Duration::from_secs(30);
/// A long message may take so long to come: nobody waits longer for the memory that it takes.
const LONG_MESSAGE_DEADLINE: Duration = Duration::from_secs(30);
/// A manifest's body at most.
const MANIFEST_AT_MOST_BYTES: usize = 4 << 20;

pub(super) struct Receiver<R> {
    pub(super) hub: Arc<Hub>,
    pub(super) connection: Arc<Connection>,
    pub(super) frames: FrameReader<R>,
}

impl<R: AsyncRead + Unpin> Receiver<R> {
    /// Reads until the other side closes (`Ok`) or something breaks.
    pub(super) async fn run(&mut self) -> Result<(), FrameError> {
        while let Some(frame) = self.frames.next().await? {
            self.connection.clock.heard();
            match frame {
                Frame::Control(len) => {
                    let mut places = Vec::new();
                    if len > ORDINARY_AT_MOST_BYTES {
                        let long = Arc::clone(&self.connection.member.long).acquire_owned();
                        places.extend(self.connection.clock.hold(long).await.ok());
                    }
                    let (clock, connection) = (&self.connection.clock, &self.connection);
                    let may_be_long = |kind| match kind {
                        Kind::Table => true,
                        Kind::Manifest => connection.expects_manifests(),
                        Kind::Ordinary => false,
                    };
                    let message = self.frames.control(len, || clock.heard(), may_be_long);
                    let message = timeout(LONG_MESSAGE_DEADLINE, message).await;
                    let message =
                        message.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
                    let wait = connection.member.count(message.message.as_ref(), len);
                    if !wait.is_zero() {
                        clock.hold(tokio::time::sleep(wait)).await;
                    }
                    self.control(message, places).await?;
                }
                Frame::Data { request, len } => self.data(request, len).await?,
                Frame::Unknown(len) => self.frames.skip(len).await?,
            }
        }
        Ok(())
    }

    async fn data(&mut self, request: u32, len: usize) -> Result<(), FrameError> {
        self.connection.note_traffic();
        match self.connection.take(request) {
            Taken::NotAsked => return Err(protocol("bytes that were not asked for")),
            Taken::Skip => self.frames.skip(len).await?,
            Taken::Slot(slot) if len > slot.missing() => {
                return Err(protocol("more bytes than the piece has"));
            }
            Taken::Slot(mut slot) => {
                let mut left = len;
                while left > 0 {
                    let read = timeout(STALLED_AFTER, self.frames.data(slot.vec(), left));
                    let Ok(read) = read.await else {
                        self.connection.give_up(request, PeerError::Stalled);
                        slot.fail(PeerError::Stalled);
                        return self.frames.skip(left).await;
                    };
                    let read = read?;
                    slot.hash_last(read);
                    left -= read;
                }
                self.connection.clock.heard();
                self.connection.put_back(request, slot);
            }
        }
        // Charged after it came: the socket's window passes the rate on to the sender.
        let charge = self.hub.limits.take(Direction::Download, len as u64);
        self.connection.clock.hold(charge).await;
        Ok(())
    }

    async fn control(
        &mut self,
        message: v1::PeerMessage,
        places: Vec<OwnedSemaphorePermit>,
    ) -> Result<(), FrameError> {
        match message.message {
            Some(Wire::Ping(v1::Ping { nonce })) => {
                let pong = v1::PeerMessage {
                    message: Some(Wire::Pong(v1::Pong { nonce })),
                };
                self.connection.say_raw(pong, None);
                return Ok(());
            }
            Some(Wire::Pong(_)) => return Ok(()),
            _ => self.connection.note_traffic(),
        }
        match message.message {
            Some(Wire::Hello(_)) => Err(protocol("a second hello")),
            Some(Wire::ManifestRequest(request)) => self.answer_manifest(request),
            Some(Wire::ManifestReply(reply)) => {
                self.take_manifest(reply);
                Ok(())
            }
            _ => match convert::from_peer_message(message).map_err(|e| protocol(e.to_string()))? {
                Some(message) => self.pieces(message, places).await,
                None => Ok(()),
            },
        }
    }

    /// A message about pieces: the part of the transport is done here, the rest is the driver's.
    async fn pieces(
        &mut self,
        message: Message,
        mut places: Vec<OwnedSemaphorePermit>,
    ) -> Result<(), FrameError> {
        match &message {
            Message::Request { request, .. } => {
                let refusal = match self.connection.ask(*request) {
                    Asked::Twice => return Err(protocol("a request number used twice")),
                    Asked::TooMany => Some(Refusal::Busy),
                    Asked::Noted if self.hub.is_draining() => {
                        self.connection.no_more_asked(*request);
                        Some(Refusal::Draining)
                    }
                    Asked::Noted => None,
                };
                if let Some(reason) = refusal {
                    self.connection.say(&Message::Reject {
                        request: *request,
                        reason,
                    });
                    return Ok(());
                }
            }
            Message::Cancel { request } => {
                self.connection
                    .clock
                    .hold(self.connection.drop_upload(*request))
                    .await;
            }
            Message::Reject { request, reason } => {
                self.connection.refused(*request, *reason);
                return Ok(());
            }
            _ => {}
        }
        let place = Arc::clone(&self.connection.member.queue).acquire_owned();
        places.extend(self.connection.clock.hold(place).await.ok());
        let event = PeerEvent::Message {
            peer: self.connection.remote.peer,
            message,
            places,
        };
        // An error means that the daemon is ending; so will this connection.
        let _ = self
            .connection
            .clock
            .hold(self.hub.events.send(event))
            .await;
        Ok(())
    }

    fn answer_manifest(&self, asked: v1::ManifestRequest) -> Result<(), FrameError> {
        let v1::ManifestRequest {
            request,
            source,
            digest,
            token,
        } = asked;
        let digest = convert::from_task(&digest).map_err(|e| protocol(e.to_string()))?;
        let source = convert::from_source(source).map_err(|e| protocol(e.to_string()))?;
        let token = convert::from_token(&token).map_err(|e| protocol(e.to_string()))?;
        let Ok(duty) = Arc::clone(&self.connection.manifest_duty).try_acquire_owned() else {
            return Err(protocol("too many manifest requests"));
        };
        let (hub, connection) = (Arc::clone(&self.hub), Arc::clone(&self.connection));
        self.hub.tasks.spawn(async move {
            let answer = tokio::select! {
                answer = timeout(MANIFEST_DEADLINE, hub.manifests.manifest(source, digest, token)) => answer,
                () = connection.close.cancelled() => return,
            };
            let (status, media_type, body, given) = match answer {
                Ok(answer) if answer.2.len() <= MANIFEST_AT_MOST_BYTES => answer,
                Ok(_) => (502, String::new(), bytes::Bytes::new(), false),
                Err(_) => (504, String::new(), bytes::Bytes::new(), false),
            };
            let reply = v1::ManifestReply { request, status: u32::from(status), media_type, body, given };
            connection.say_raw(v1::PeerMessage { message: Some(Wire::ManifestReply(reply)) }, Some(duty));
        });
        Ok(())
    }

    fn take_manifest(&self, reply: v1::ManifestReply) {
        let Some(answer) = self.connection.manifest_over(reply.request) else {
            return;
        };
        // A status that is none is the seed's failure.
        let status = convert::from_status(reply.status).unwrap_or(502);
        let _ = answer.send((status, reply.media_type, reply.body, reply.given));
    }
}
