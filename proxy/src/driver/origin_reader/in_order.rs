//! The in-order read of a blob: bytes that follow the hashed prefix become pieces, and go to the driver one after the other.

use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use hawker_core::piece::{PieceIndex, PieceLayout};
use hawker_oci::digest::Chain;

use super::{Context, Rest, Unheard, Wishes};
use crate::buffer::PieceBuffer;
use crate::driver::Event;
use hawker_lanes::{self as lanes, Lane};

/// Without a file, an open request waits so long for memory: one that has brought no piece yet, and any other. Then it ends, and the
/// next one begins once there is memory for a piece. A request takes sockets and buffers of its own as long as it waits.
const FIRST_ROOM_WITHIN: Duration = Duration::from_millis(500);
const ROOM_WITHIN: Duration = Duration::from_secs(10);

/// The hashed prefix of the blob, and the piece that goes on with it.
struct Prefix {
    generation: u64,
    piece: PieceIndex,
    /// The place that gave the bytes of the piece so far; an empty name where several did.
    place: Option<Arc<str>>,
    /// Over all bytes before the piece, and those in the buffer.
    chain: Chain,
    /// The same at the start of the piece, while the buffer holds a part of it.
    piece_start: Option<Chain>,
    buffer: Option<PieceBuffer>,
    /// All of the buffer was read from the file.
    is_from_file: bool,
    /// When the buffer was taken, and when to look whether others wait for its memory.
    buffer_since: Instant,
    looks_at: Instant,
    /// The piece came too slowly for the memory that it took: it waits in the file until it is whole.
    is_parked: bool,
}

/// A piece in memory must be whole within this time while others wait for memory, and is looked at after so long.
const PIECE_WITHIN: Duration = Duration::from_secs(30);
const PIECE_LOOKED_AT: Duration = Duration::from_secs(5);
const LOOK_AGAIN: Duration = Duration::from_millis(500);

impl Prefix {
    fn position(&self, layout: PieceLayout) -> u64 {
        layout.start(self.piece)
            + self
                .buffer
                .as_ref()
                .map_or(0, |buffer| buffer.filled().len() as u64)
    }

    fn begin_piece(&mut self, buffer: PieceBuffer) {
        self.buffer = Some(buffer);
        self.piece_start = Some(self.chain.clone());
        self.buffer_since = Instant::now();
        self.looks_at = self.buffer_since + PIECE_LOOKED_AT;
        (self.is_from_file, self.place) = (true, None);
    }

    fn comes_from(&mut self, place: &Arc<str>) {
        match &self.place {
            None => self.place = Some(Arc::clone(place)),
            Some(known) if known == place => {}
            Some(_) => self.place = Some(Arc::from("")),
        }
    }

    /// Whether its piece will be whole in time, at the pace so far.
    fn is_on_its_way(&self) -> bool {
        let Some(buffer) = &self.buffer else {
            return true;
        };
        let filled = buffer.filled().len() as f64 / buffer.piece_len().max(1) as f64;
        self.buffer_since.elapsed().as_secs_f64() <= filled * PIECE_WITHIN.as_secs_f64()
    }
}

/// A wait for the memory of one piece, while no request is open.
struct Room {
    generation: u64,
    piece: PieceIndex,
    buffer: Pin<Box<dyn Future<Output = PieceBuffer> + Send + Sync>>,
}

/// The in-order read of one task, while there is one.
pub(super) struct InOrder {
    prefix: Option<Prefix>,
    /// Without a file, memory for the next piece is waited for before anything is asked for.
    room: Option<Room>,
    /// All bytes that the newest in-order read has passed to the driver.
    passed: Range<u64>,
    /// The generation of the last in-order read that ended, so that one wish is not carried out twice.
    ended: u64,
}

impl InOrder {
    pub(super) const fn new() -> Self {
        Self {
            prefix: None,
            room: None,
            passed: 0..0,
            ended: 0,
        }
    }

    /// Begins, unless this read has ended already. Whether it does.
    pub(super) fn begin(&mut self, layout: Option<PieceLayout>, rest: Rest) -> bool {
        if rest.generation <= self.ended {
            return false;
        }
        self.prefix = Some(Prefix {
            generation: rest.generation,
            piece: rest.from,
            place: None,
            chain: rest.chain,
            piece_start: None,
            buffer: None,
            is_from_file: true,
            buffer_since: Instant::now(),
            looks_at: Instant::now(),
            is_parked: false,
        });
        self.start_passing(layout);
        true
    }

    /// The read has passed nothing to the driver yet.
    pub(super) fn start_passing(&mut self, layout: Option<PieceLayout>) {
        if let (Some(prefix), Some(layout)) = (&self.prefix, layout) {
            let start = layout.start(prefix.piece);
            self.passed = start..start;
        }
    }

    /// The origin gives no more. The generation of the read that ends here, if there was one.
    pub(super) fn fail(&mut self) -> Option<u64> {
        let generation = self.prefix.take().map(|prefix| prefix.generation);
        self.ended = self.ended.max(generation.unwrap_or_default());
        generation
    }

    pub(super) const fn is_active(&self) -> bool {
        self.prefix.is_some()
    }

    pub(super) fn generation(&self) -> Option<u64> {
        self.prefix.as_ref().map(|prefix| prefix.generation)
    }

    /// The piece that is read next.
    pub(super) fn piece(&self) -> Option<PieceIndex> {
        self.prefix.as_ref().map(|prefix| prefix.piece)
    }

    /// The end of the hashed bytes.
    pub(super) fn position(&self, layout: Option<PieceLayout>) -> Option<u64> {
        self.prefix
            .as_ref()
            .zip(layout)
            .map(|(prefix, layout)| prefix.position(layout))
    }

    /// All bytes that the newest read has passed to the driver.
    pub(super) const fn passed(&self) -> &Range<u64> {
        &self.passed
    }

    /// Whether bytes at the position are taken in now. A piece that waits in the file takes none.
    pub(super) fn takes_bytes(&self) -> bool {
        self.prefix.as_ref().is_some_and(|prefix| !prefix.is_parked)
    }

    /// Whether the read waits for the memory of its next piece.
    pub(super) fn lacks_room(&self) -> bool {
        self.prefix
            .as_ref()
            .is_some_and(|prefix| prefix.buffer.is_none())
    }

    /// The moment to look whether others wait for the memory of its piece.
    pub(super) fn looks_at(&self) -> Option<Instant> {
        self.prefix
            .as_ref()
            .filter(|prefix| prefix.buffer.is_some())
            .map(|prefix| prefix.looks_at)
    }

    /// Whether a request may begin, as far as memory goes. If it may not, the wait for memory begins. With a file, or while a request
    /// is open already, memory is waited for as the bytes come.
    pub(super) fn has_room(
        &mut self,
        context: &Context,
        layout: PieceLayout,
        needs_room: bool,
        is_open: bool,
    ) -> bool {
        let waiting = self
            .prefix
            .as_ref()
            .filter(|prefix| needs_room && prefix.buffer.is_none());
        let Some(prefix) = waiting.filter(|_| !is_open) else {
            self.room = None;
            return true;
        };
        let (generation, piece) = (prefix.generation, prefix.piece);
        if self
            .room
            .as_ref()
            .is_none_or(|room| (room.generation, room.piece) != (generation, piece))
        {
            let (pool, len_bytes) = (context.pool.clone(), layout.len_bytes(piece) as usize);
            let buffer = Box::pin(async move { pool.get(len_bytes).await });
            self.room = Some(Room {
                generation,
                piece,
                buffer,
            });
        }
        false
    }

    /// There is memory for the next piece. Whether it may be asked for now.
    pub(super) fn take_room(&mut self, buffer: PieceBuffer) -> bool {
        let (Some(room), Some(prefix)) = (self.room.take(), &mut self.prefix) else {
            return false;
        };
        let is_awaited = (prefix.generation, prefix.piece) == (room.generation, room.piece)
            && prefix.buffer.is_none();
        if is_awaited {
            prefix.begin_piece(buffer);
        }
        is_awaited
    }

    /// Memory for the next piece, once there is some.
    pub(super) async fn room(&mut self) -> PieceBuffer {
        match &mut self.room {
            Some(room) => room.buffer.as_mut().await,
            None => std::future::pending().await,
        }
    }

    /// Puts bytes behind the prefix; each piece that becomes whole goes to the driver. The answer is what the prefix did not take,
    /// because it ended meanwhile.
    pub(super) async fn extend(
        &mut self,
        context: &Context,
        mut bytes: Bytes,
        place: &Arc<str>,
        is_from_file: bool,
    ) -> Result<Bytes, Unheard> {
        let Some(layout) = context.layout else {
            return Ok(bytes);
        };
        while let Some(prefix) = self.prefix.as_ref().filter(|_| !bytes.is_empty()) {
            if prefix.buffer.is_none() {
                let (piece, generation) = (prefix.piece, prefix.generation);
                let Some(buffer) = self.room_for(context, layout, piece, generation).await? else {
                    return Ok(bytes);
                };
                let Some(prefix) = &mut self.prefix else {
                    return Ok(bytes);
                };
                prefix.begin_piece(buffer);
            }
            let Some(prefix) = &mut self.prefix else {
                return Ok(bytes);
            };
            let Some(mut buffer) = prefix.buffer.take() else {
                return Ok(bytes);
            };
            let taken = buffer.extend(&bytes);
            prefix.chain.update(&bytes.split_to(taken));
            prefix.is_from_file &= is_from_file;
            prefix.comes_from(place);
            if buffer.missing() > 0 {
                prefix.buffer = Some(buffer);
                return Ok(bytes);
            }
            let (piece, generation, chain) =
                (prefix.piece, prefix.generation, prefix.chain.clone());
            let (is_on_disk, registry) =
                (prefix.is_from_file, prefix.place.take().unwrap_or_default());
            prefix.piece += 1;
            prefix.is_parked = false;
            let is_last = prefix.piece >= layout.count();
            let task = context.task;
            self.passed.end = layout.range(piece).end;
            let event = Event::OriginPiece {
                task,
                generation,
                registry,
                piece,
                buffer,
                chain,
                is_on_disk,
            };
            context.tell(event).await?;
            if is_last {
                self.prefix = None;
                self.ended = self.ended.max(generation);
                context.tell(Event::OriginOver { task, generation }).await?;
            }
        }
        Ok(bytes)
    }

    /// Waits for memory for a piece, and until it may be read; `None` when the in-order read ends before or, without a file, when
    /// the wait is too long for an open request.
    async fn room_for(
        &self,
        context: &Context,
        layout: PieceLayout,
        piece: PieceIndex,
        generation: u64,
    ) -> Result<Option<PieceBuffer>, Unheard> {
        let (mut wishes, mut window) = (context.wishes.clone(), context.window.clone());
        let room = async {
            window
                .wait_for(|end| piece < *end)
                .await
                .map_err(|_| Unheard)?;
            Ok(Some(
                context.pool.get(layout.len_bytes(piece) as usize).await,
            ))
        };
        let ended = async {
            let is_over = |wishes: &Wishes| {
                wishes.rest.as_ref().map(|rest| rest.generation) != Some(generation)
            };
            wishes
                .wait_for(is_over)
                .await
                .map(|_| ())
                .map_err(|_| Unheard)
        };
        let in_order_only = context.wishes.borrow().file.is_none();
        let within = if self.passed.is_empty() {
            FIRST_ROOM_WITHIN
        } else {
            ROOM_WITHIN
        };
        tokio::select! {
            biased;
            ended = ended => ended.map(|()| None),
            room = room => room,
            () = tokio::time::sleep(within), if in_order_only => Ok(None),
        }
    }

    /// Goes on with the prefix through loose bytes that follow it.
    pub(super) async fn absorb_loose(&mut self, context: &Context) -> Result<(), Unheard> {
        loop {
            let (Some(prefix), Some(layout)) = (&self.prefix, context.layout) else {
                return Ok(());
            };
            let position = prefix.position(layout);
            let piece_end = layout.range(prefix.piece).end;
            let (run, file) = {
                let state = context.shared.lock();
                (state.loose.run_at(position), state.file.clone())
            };
            let (Some((end, place)), Some(file)) = (run, file) else {
                return Ok(());
            };
            let end = end.min(piece_end);
            if prefix.is_parked && end < piece_end {
                return Ok(());
            }
            let read = lanes::run(Lane::Downloads, move || {
                let mut bytes = vec![0; (end - position) as usize];
                file.read_exact_at(&mut bytes, position)
                    .map(|()| Bytes::from(bytes))
            });
            match read.await {
                Some(Ok(bytes)) => {
                    if !self.extend(context, bytes, &place, true).await?.is_empty() {
                        return Ok(());
                    }
                }
                _ => {
                    // They are read from the origin again.
                    context
                        .shared
                        .update(|state| state.loose.remove(position..end));
                    return Ok(());
                }
            }
        }
    }

    /// Others wait for memory: a piece that comes slowly goes on in the file or, without one, the whole read ends. Whether requests
    /// are to be planned anew.
    pub(super) async fn give_memory_back(&mut self, context: &Context) -> Result<bool, Unheard> {
        let Some(prefix) = &mut self.prefix else {
            return Ok(false);
        };
        prefix.looks_at = Instant::now() + LOOK_AGAIN;
        if prefix.is_on_its_way() || !context.pool.has_long_waits() {
            return Ok(false);
        }
        let (piece, generation) = (prefix.piece, prefix.generation);
        if context.wishes.borrow().file.is_none() {
            context
                .tell(Event::OriginHogging {
                    task: context.task,
                    generation,
                })
                .await?;
            return Ok(false);
        }
        // The hash goes back to the start of the piece.
        let (Some(buffer), Some(start)) = (prefix.buffer.take(), prefix.piece_start.clone()) else {
            return Ok(false);
        };
        (prefix.chain, prefix.is_parked) = (start, true);
        let place = prefix.place.take().unwrap_or_default();
        context.write_part(piece, buffer, &place).await;
        Ok(true)
    }

    /// The in-order read ends here. The part of a piece that it has becomes loose.
    pub(super) async fn park(&mut self, context: &Context) {
        let Some(prefix) = self.prefix.take() else {
            return;
        };
        self.ended = self.ended.max(prefix.generation);
        if let Some(buffer) = prefix.buffer {
            let place = prefix.place.unwrap_or_default();
            context.write_part(prefix.piece, buffer, &place).await;
        }
    }
}
