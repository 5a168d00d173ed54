//! The reads of one blob at its origin: which spans to ask for, and over how many connections at once.
//!
//! A *span* is one range request. Spans under way never overlap, and none covers bytes that are present: so concurrent
//! readers share each request, and the origin sends each byte once. Bytes that a reader waits for come first. The rest of the
//! blob, where it is wanted, is read from the front over a *width* of connections that grows as long as that pays.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

use crate::Time;
use crate::byte_set::ByteSet;

/// Connections that one task uses at most, however many readers wait.
pub const CONNECTIONS_MAX: usize = 16;

/// Connections for the rest of a blob at most. Object stores limit each connection to some tens of MB/s.
const WIDTH_MAX: usize = 8;

/// A blob up to this size, wanted as a whole, is asked for without `Range`: one plain GET works at every registry.
const WHOLE_BYTES: u64 = 16 << 20;

/// The range that the first request for a blob of unknown size names; `None`: a plain request. `guess`: the size that somebody told
/// who need not be right.
pub fn first_range(guess: Option<u64>) -> Option<Range<u64>> {
    guess
        .filter(|size| *size > WHOLE_BYTES)
        .map(|_| 0..FIRST_LONE_SPAN_BYTES)
}

/// The length of a span before any rate is known: for several connections, and for one.
const FIRST_SPAN_BYTES: u64 = 4 << 20;
const FIRST_LONE_SPAN_BYTES: u64 = 8 << 20;

/// A span with less than this left is about to end: the next one begins beside it, so that no round trip passes between them.
const NEARLY_DONE_BYTES: u64 = 1 << 20;

/// New bytes that make up for earlier failures.
const PROGRESS_BYTES: u64 = 64 << 10;

/// A reader this close to bytes that nothing brings waits for them soon.
const SOON_BYTES: u64 = 512 << 10;

/// A span this far before a reader's position does not get there soon.
const FAR_BYTES: u64 = 4 << 20;

/// A span should take about this long. A shorter one wastes round trips; a longer one delays the in-order prefix, which peers
/// wait for.
const SPAN_TAKES: Duration = Duration::from_secs(1);
const SPAN_BYTES_MIN: u64 = 2 << 20;
const SPAN_BYTES_MAX: u64 = 32 << 20;
const LONE_SPAN_TAKES: Duration = Duration::from_secs(2);
const LONE_SPAN_BYTES_MIN: u64 = 4 << 20;
const LONE_SPAN_BYTES_MAX: u64 = 64 << 20;

/// How long the rate at one width is measured.
const SAMPLE: Duration = Duration::from_millis(250);

/// A doubled width is kept when the rate grows by this factor.
const WORTH_IT: f64 = 1.2;

/// A width that did not pay is tried again after this long: links and origins change.
const PROBE_AGAIN: Duration = Duration::from_secs(10);

/// A throttling origin gets one connection for this long.
const THROTTLED_FOR: Duration = Duration::from_secs(30);

/// Failures in a row, without a byte in between, after which the origin counts as failed.
const TRIES: u32 = 3;

/// The wait after the first failure; it doubles.
const FIRST_WAIT: Duration = Duration::from_millis(200);

/// The name of a span among those of its task.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpanId(pub u32);

/// A range request to make.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// Its name.
    pub id: SpanId,
    /// The bytes to deliver, in order.
    pub bytes: Range<u64>,
    /// Ask without `Range`: the span begins at 0 and ends with the blob.
    pub plain: bool,
}

/// How a span ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpanEnd {
    /// All of its bytes came.
    Done,
    /// It broke off; the missing bytes are asked for again.
    Broken,
    /// The origin answered with an error of its own (500, 502 and the like), which may be meant for the range.
    Refused,
    /// The origin ignores `Range`: one request for all is the only way.
    RangeIgnored,
    /// The origin asks for fewer requests (429).
    Throttled,
    /// The origin answered 503: it asks for fewer requests, or cannot serve ranges.
    Unavailable,
}

/// The bytes wanted of the blob at this moment.
#[derive(Clone, Debug)]
pub struct Demand<'a> {
    /// Bytes that need no read: they are here, or peers bring them.
    pub present: &'a ByteSet,
    /// For each waiting reader the bytes from its position, or from an earlier one, to the end of its range.
    pub readers: &'a [Range<u64>],
    /// All bytes of this range are wanted, reader or not: the rest of the blob.
    pub rest: Range<u64>,
    /// Connections that the registry's bound leaves to this task, those under way included.
    pub connections: usize,
    /// The rest is read over one connection: a rate holds it back, or bytes can be taken in order only.
    pub lone: bool,
    /// Spans under way that wait, and take no part in these counts.
    pub paused: usize,
}

/// Whether an origin honours `Range`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RangeSupport {
    /// Nothing has been asked yet.
    #[default]
    Unknown,
    /// It answered 206.
    Honoured,
    /// It answered 200 to a range.
    Ignored,
}

/// Experience with an origin, for the next blob from there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Experience {
    /// It honours ranges.
    pub takes_ranges: bool,
    /// The number of connections that paid.
    pub width: usize,
}

impl Default for Experience {
    fn default() -> Self {
        Self {
            takes_ranges: false,
            width: 1,
        }
    }
}

/// A span under way.
#[derive(Clone, Debug)]
struct Open {
    /// The next byte to come.
    at: u64,
    end: u64,
    plain: bool,
}

/// The reads of one blob at its origin.
#[derive(Clone, Debug)]
pub struct OriginReads {
    size_bytes: u64,
    open: BTreeMap<SpanId, Open>,
    next_id: u32,
    support: RangeSupport,
    width: Width,
    /// Failures since the last progress, and the new bytes since the last failure.
    failures: u32,
    progress_bytes: u64,
    rests_until: Time,
    /// The origin has answered a range with that range.
    has_honoured: bool,
    /// A plain request broke off at an origin that has honoured ranges: ranges are the better way there.
    is_plain_worse: bool,
}

impl OriginReads {
    /// No reads yet of a blob of this size.
    pub fn new(size_bytes: u64, experience: Experience) -> Self {
        let support = if experience.takes_ranges {
            RangeSupport::Honoured
        } else {
            RangeSupport::Unknown
        };
        Self {
            size_bytes,
            open: BTreeMap::new(),
            next_id: 0,
            support,
            width: Width {
                width: experience.width.clamp(1, WIDTH_MAX),
                ..Width::default()
            },
            failures: 0,
            progress_bytes: 0,
            rests_until: Time::default(),
            has_honoured: false,
            is_plain_worse: false,
        }
    }

    /// The next request to make, if any. The caller repeats until `None`, and again when anything changes.
    ///
    /// A reader inside a span that is far from getting there gets a span of its own; the other one then ends before it, see
    /// [`OriginReads::end_of`].
    pub fn next(&mut self, now: Time, demand: &Demand<'_>) -> Option<Span> {
        if now < self.rests_until || self.is_failed() {
            return None;
        }
        let most = match self.support {
            RangeSupport::Honoured => demand.connections.min(CONNECTIONS_MAX),
            // A second request to an origin that ignores ranges would be a second copy of the blob.
            RangeSupport::Unknown | RangeSupport::Ignored => 1,
        };
        let reading = self.open.len().saturating_sub(demand.paused);
        if reading >= most {
            return None;
        }
        let mut taken = demand.present.clone();
        self.open
            .values()
            .for_each(|open| taken.insert(open.at..open.end));
        let width = if demand.lone { 1 } else { self.width.current() };
        let nearly_done = self
            .open
            .values()
            .filter(|open| open.end - open.at < NEARLY_DONE_BYTES)
            .count();
        let bytes = match self
            .gap_of_readers(demand, &taken)
            .or_else(|| self.cut_for_reader(demand))
        {
            Some(gap) => gap,
            None if reading.saturating_sub(nearly_done) < width => {
                self.gap_of_rest(demand, &taken, 0)?
            }
            None => return None,
        };
        let wants_all = demand.rest.start == 0 && demand.rest.end >= self.size_bytes;
        // If a part is here already, a request for all would bring it again.
        let is_small = self.size_bytes <= WHOLE_BYTES && width == 1 && taken.is_empty();
        let plain = match self.support {
            RangeSupport::Ignored => true,
            _ if is_small && wants_all && bytes.start == 0 => true,
            RangeSupport::Unknown => false,
            RangeSupport::Honoured => bytes == (0..self.size_bytes),
        };
        Some(self.start(now, if plain { 0..self.size_bytes } else { bytes }, plain))
    }

    /// The request that told the size is under way: a range request for the first bytes, or a plain one; this is its span.
    pub fn adopt_first(&mut self, now: Time, plain: bool) -> Span {
        let end = if plain {
            self.size_bytes
        } else {
            self.size_bytes.min(FIRST_LONE_SPAN_BYTES)
        };
        self.start(now, 0..end, plain)
    }

    fn start(&mut self, now: Time, bytes: Range<u64>, plain: bool) -> Span {
        let id = SpanId(self.next_id);
        self.next_id = self.next_id.wrapping_add(1);
        self.open.insert(
            id,
            Open {
                at: bytes.start,
                end: bytes.end,
                plain,
            },
        );
        self.width.measure(now, self.open.len());
        Span { id, bytes, plain }
    }

    /// The stretch nearest to a reader's position that nothing brings, if a reader gets there soon.
    fn gap_of_readers(&self, demand: &Demand<'_>, taken: &ByteSet) -> Option<Range<u64>> {
        let soon = |reader: &Range<u64>| {
            // A reader takes all that is here at once.
            let at = demand.present.end_of(reader.start);
            let gap = taken.first_gap(at..reader.end.min(self.size_bytes).max(at))?;
            let distance = gap.start - at;
            (distance < SOON_BYTES).then_some((distance, gap))
        };
        let (_, gap) = demand
            .readers
            .iter()
            .filter_map(soon)
            .min_by_key(|(distance, gap)| (*distance, gap.start))?;
        // If the rest is wanted anyway, the reader only says where to begin.
        self.gap_of_rest(demand, taken, gap.start)
            .filter(|rest| rest.start == gap.start)
            .or_else(|| {
                let end = gap
                    .end
                    .min(gap.start.saturating_add(self.span_bytes(demand)));
                Some(gap.start..end)
            })
    }

    fn gap_of_rest(&self, demand: &Demand<'_>, taken: &ByteSet, from: u64) -> Option<Range<u64>> {
        let start = demand.rest.start.max(from);
        let gap = taken.first_gap(start..demand.rest.end.min(self.size_bytes).max(start))?;
        let end = gap
            .end
            .min(gap.start.saturating_add(self.span_bytes(demand)));
        Some(gap.start..end)
    }

    /// Takes a stretch for a reader out of a span that is far from getting there.
    fn cut_for_reader(&mut self, demand: &Demand<'_>) -> Option<Range<u64>> {
        if self.support != RangeSupport::Honoured {
            return None;
        }
        let needs = |reader: &Range<u64>| {
            demand
                .present
                .first_gap(reader.clone())
                .map(|gap| gap.start)
        };
        let far = |at: &u64| {
            self.open
                .iter()
                .find(|(_, open)| (open.at.saturating_add(FAR_BYTES)..open.end).contains(at))
                .map(|(id, _)| *id)
        };
        let (at, id) = demand
            .readers
            .iter()
            .filter_map(needs)
            .find_map(|at| Some((at, far(&at)?)))?;
        let span_bytes = self.span_bytes(demand);
        let open = self.open.get_mut(&id)?;
        let end = std::mem::replace(&mut open.end, at);
        Some(at..end.min(at.saturating_add(span_bytes)))
    }

    /// A span that asked for a range is answered with the whole blob: from now on it brings everything, and nothing else is asked.
    pub fn became_plain(&mut self, id: SpanId) {
        self.support = RangeSupport::Ignored;
        if let Some(open) = self.open.get_mut(&id) {
            *open = Open {
                at: 0,
                end: self.size_bytes,
                plain: true,
            };
        }
    }

    /// The end of a span by now; `None` when it is over. Bytes past it belong to other spans.
    pub fn end_of(&self, id: SpanId) -> Option<u64> {
        self.open.get(&id).map(|open| open.end)
    }

    /// How long a span should be.
    ///
    fn span_bytes(&self, demand: &Demand<'_>) -> u64 {
        if demand.lone || demand.connections <= 1 {
            return u64::MAX;
        }
        let (first, takes, least, most) =
            match self.width.current() == 1 && demand.readers.len() <= 1 {
                true => (
                    FIRST_LONE_SPAN_BYTES,
                    LONE_SPAN_TAKES,
                    LONE_SPAN_BYTES_MIN,
                    LONE_SPAN_BYTES_MAX,
                ),
                false => (FIRST_SPAN_BYTES, SPAN_TAKES, SPAN_BYTES_MIN, SPAN_BYTES_MAX),
            };
        let Some(rate) = self.width.rate_of_one() else {
            return first;
        };
        ((rate * takes.as_secs_f64()) as u64).clamp(least, most)
    }

    /// Bytes of a span came. Whether it may pay to ask [`OriginReads::next`] again.
    pub fn moved(&mut self, now: Time, id: SpanId, bytes: u64) -> bool {
        let Some(open) = self.open.get_mut(&id) else {
            return false;
        };
        let is_nearly_done = |open: &Open| open.end - open.at < NEARLY_DONE_BYTES;
        let was_nearly_done = is_nearly_done(open);
        open.at = open.at.saturating_add(bytes).min(open.end);
        let is_news = is_nearly_done(open) != was_nearly_done;
        let before = self.width.current();
        self.width.moved(now, bytes, self.open.len());
        is_news || self.width.current() != before
    }

    /// So many bytes came that were not here before. An origin that goes on giving new bytes does not fail.
    pub fn progressed(&mut self, bytes: u64) {
        self.progress_bytes = self.progress_bytes.saturating_add(bytes);
        if self.progress_bytes >= PROGRESS_BYTES {
            self.failures = 0;
        }
    }

    /// The head of an answer with the bytes that were asked for came. `takes_ranges`: the answer is a 206, or says that ranges
    /// are taken.
    pub fn answered(&mut self, id: SpanId, takes_ranges: bool) {
        if takes_ranges && self.support == RangeSupport::Unknown {
            self.support = RangeSupport::Honoured;
        }
        // A promise in the answer to a plain request has not been kept yet.
        self.has_honoured |= takes_ranges && self.open.get(&id).is_some_and(|open| !open.plain);
    }

    /// Whether a plain request may do better than ranges that are answered badly.
    pub const fn may_ask_plain(&self) -> bool {
        !self.is_plain_worse
    }

    /// A span is over.
    pub fn ended(&mut self, now: Time, id: SpanId, end: SpanEnd) {
        let Some(Open { plain, .. }) = self.open.remove(&id) else {
            return;
        };
        match end {
            SpanEnd::Done => {}
            SpanEnd::RangeIgnored => self.turn_plain(),
            SpanEnd::Throttled | SpanEnd::Unavailable | SpanEnd::Broken | SpanEnd::Refused => {
                if matches!(end, SpanEnd::Throttled | SpanEnd::Unavailable) {
                    self.width.throttle(now);
                }
                self.rests_until = now + FIRST_WAIT * (1 << self.failures.min(8));
                self.failures += 1;
                self.progress_bytes = 0;
            }
        }
        let may_mean_ranges = matches!(end, SpanEnd::Refused | SpanEnd::Unavailable);
        if plain && end == SpanEnd::Broken && self.has_honoured {
            self.is_plain_worse = true;
            self.support = RangeSupport::Honoured;
        } else if !plain && may_mean_ranges && self.is_failed() && self.may_ask_plain() {
            // Some gateways answer every range with an error. A plain request is the last try: another copy is better than none.
            self.failures = TRIES - 1;
            self.turn_plain();
        }
    }

    /// From now on the whole blob is asked for, without ranges.
    fn turn_plain(&mut self) {
        self.support = RangeSupport::Ignored;
        // A request for all that is under way brings all of it: nobody else can take the end of it any more.
        if let [(_, only)] = &mut self.open.iter_mut().collect::<Vec<_>>()[..]
            && only.plain
        {
            only.end = self.size_bytes;
        }
    }

    /// Whether the origin failed so often in a row that it counts as failed.
    pub const fn is_failed(&self) -> bool {
        self.failures >= TRIES
    }

    /// Starts anew after [`OriginReads::is_failed`].
    pub const fn forgive(&mut self) {
        self.failures = 0;
    }

    /// The experience of these reads with the origin.
    pub fn experience(&self) -> Experience {
        let width = self.width.current() / if self.width.is_trial { 2 } else { 1 };
        Experience {
            takes_ranges: self.support == RangeSupport::Honoured,
            width,
        }
    }

    /// When [`OriginReads::next`] may answer otherwise though nothing else happens.
    pub fn deadline(&self, now: Time) -> Option<Time> {
        (now < self.rests_until).then_some(self.rests_until)
    }
}

/// How many connections read the rest of a blob: doubled as long as the rate grows with them.
#[derive(Clone, Debug)]
struct Width {
    /// The width in use.
    width: usize,
    /// The rate at the last width that paid, in bytes a second.
    paid: Option<f64>,
    /// The last doubling is on trial.
    is_trial: bool,
    /// No doubling before this moment.
    holds_until: Time,
    sample: Option<Sample>,
    /// The last rate measured, and over how many connections.
    last: Option<(f64, usize)>,
}

/// A measurement under way at an unchanged number of connections.
#[derive(Clone, Debug)]
struct Sample {
    began: Time,
    connections: usize,
    bytes: u64,
}

impl Default for Width {
    fn default() -> Self {
        Self {
            width: 1,
            paid: None,
            is_trial: false,
            holds_until: Time::default(),
            sample: None,
            last: None,
        }
    }
}

impl Width {
    const fn current(&self) -> usize {
        self.width
    }

    /// The rate of one connection as last measured, in bytes a second.
    fn rate_of_one(&self) -> Option<f64> {
        self.last
            .map(|(rate, connections)| rate / connections.max(1) as f64)
    }

    /// So many connections read from now on.
    fn measure(&mut self, now: Time, connections: usize) {
        if self
            .sample
            .as_ref()
            .is_none_or(|sample| sample.connections < connections)
        {
            self.sample = Some(Sample {
                began: now,
                connections,
                bytes: 0,
            });
        }
    }

    fn moved(&mut self, now: Time, bytes: u64, connections: usize) {
        let Some(sample) = &mut self.sample else {
            self.measure(now, connections);
            return;
        };
        sample.bytes += bytes;
        let took = now.since(sample.began);
        if took < SAMPLE {
            return;
        }
        let (rate, at) = (sample.bytes as f64 / took.as_secs_f64(), sample.connections);
        self.last = Some((rate, at));
        self.sample = Some(Sample {
            began: now,
            connections,
            bytes: 0,
        });
        if at < self.width {
            return;
        }
        self.judge(now, rate);
    }

    /// Draws the conclusion from a rate measured at the full width.
    fn judge(&mut self, now: Time, rate: f64) {
        let pays = self.paid.is_none_or(|paid| rate >= paid * WORTH_IT);
        if self.is_trial && !pays {
            self.width /= 2;
            self.is_trial = false;
            self.holds_until = now + PROBE_AGAIN;
            return;
        }
        self.paid = Some(rate);
        self.is_trial = false;
        if now >= self.holds_until && self.width < WIDTH_MAX {
            self.width *= 2;
            self.is_trial = true;
        }
    }

    fn throttle(&mut self, now: Time) {
        *self = Self {
            holds_until: now + THROTTLED_FOR,
            last: self.last,
            ..Self::default()
        };
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;
    const KNOWN: Experience = Experience {
        takes_ranges: true,
        width: 1,
    };

    fn at_ms(ms: u64) -> Time {
        Time(Duration::from_millis(ms))
    }

    /// All of a blob of 100 MiB is wanted, over as many connections as pay.
    fn wanted<'a>(present: &'a ByteSet, readers: &'a [Range<u64>]) -> Demand<'a> {
        Demand {
            present,
            readers,
            rest: 0..100 * MIB,
            connections: 16,
            lone: false,
            paused: 0,
        }
    }

    /// An origin of which each connection is limited, and all of them together.
    struct FakeOrigin {
        of_one: u64,
        of_all: u64,
        honours_ranges: bool,
    }

    struct Outcome {
        took_ms: u64,
        sent_bytes: u64,
        connections: usize,
        present: ByteSet,
    }

    /// Reads until nothing is wanted any more, in steps of 10 ms.
    fn read(
        size: u64,
        origin: &FakeOrigin,
        readers: &[Range<u64>],
        rest: Range<u64>,
        most: usize,
    ) -> Outcome {
        let mut reads = OriginReads::new(size, Experience::default());
        let (mut present, mut spans) = (ByteSet::default(), BTreeMap::new());
        let (mut sent_bytes, mut connections) = (0, 0);
        for step in 0..100_000 {
            let now = at_ms(10 * step);
            let open: Vec<_> = readers
                .iter()
                .filter(|r| !present.contains(r))
                .cloned()
                .collect();
            if open.is_empty() && present.contains(&rest) {
                return Outcome {
                    took_ms: 10 * step,
                    sent_bytes,
                    connections,
                    present,
                };
            }
            let demand = Demand {
                present: &present,
                readers: &open,
                rest: rest.clone(),
                connections: most,
                lone: false,
                paused: 0,
            };
            while let Some(span) = reads.next(now, &demand) {
                for id in spans.keys() {
                    let other: &Span = &spans[id];
                    let bytes = other.bytes.start..reads.end_of(*id).unwrap_or(other.bytes.start);
                    assert!(
                        bytes.end <= span.bytes.start || span.bytes.end <= bytes.start,
                        "spans overlap"
                    );
                }
                if !origin.honours_ranges && !span.plain {
                    reads.ended(now, span.id, SpanEnd::RangeIgnored);
                    continue;
                }
                reads.answered(span.id, !span.plain);
                spans.insert(span.id, span);
            }
            connections = connections.max(spans.len());
            assert!(!spans.is_empty(), "something is wanted and nothing is read");
            let share = (origin.of_one / 100)
                .min(origin.of_all / 100 / spans.len() as u64)
                .max(1);
            for (id, mut span) in std::mem::take(&mut spans) {
                let Some(end) = reads.end_of(id) else {
                    continue;
                };
                span.bytes.end = end;
                let bytes = share.min(span.bytes.end - span.bytes.start);
                sent_bytes += bytes;
                present.insert(span.bytes.start..span.bytes.start + bytes);
                span.bytes.start += bytes;
                reads.moved(now, id, bytes);
                reads.progressed(bytes);
                if span.bytes.is_empty() {
                    reads.ended(now, id, SpanEnd::Done);
                } else {
                    spans.insert(id, span);
                }
            }
        }
        panic!("it never ends");
    }

    #[test]
    fn a_slow_connection_is_multiplied_until_the_link_is_full() {
        let origin = FakeOrigin {
            of_one: 10 * MIB,
            of_all: 1 << 40,
            honours_ranges: true,
        };
        let read = read(256 * MIB, &origin, &[], 0..256 * MIB, 16);
        assert_eq!(read.sent_bytes, 256 * MIB);
        // The next span begins before the one before it has ended.
        assert!(
            (WIDTH_MAX..=CONNECTIONS_MAX).contains(&read.connections),
            "{}",
            read.connections
        );
        assert!(read.took_ms < 25_600 / 4, "{} ms", read.took_ms);
    }

    #[test]
    fn the_next_blob_begins_with_the_width_that_paid() {
        let mut reads = OriginReads::new(
            100 * MIB,
            Experience {
                takes_ranges: true,
                width: 4,
            },
        );
        let present = ByteSet::default();
        let demand = wanted(&present, &[]);
        let spans: Vec<Span> = std::iter::from_fn(|| reads.next(at_ms(0), &demand)).collect();
        assert_eq!(spans.len(), 4);
        for step in 1..60 {
            for span in &spans {
                reads.moved(at_ms(10 * step), span.id, 50_000);
            }
        }
        // A doubling on trial has not paid yet.
        assert_eq!(
            reads.experience(),
            Experience {
                takes_ranges: true,
                width: 4
            }
        );
        reads.ended(at_ms(700), spans[0].id, SpanEnd::Throttled);
        assert_eq!(reads.experience().width, 1);
    }

    #[test]
    fn a_small_blob_of_which_a_part_is_here_is_not_read_whole() {
        let origin = FakeOrigin {
            of_one: 10 * MIB,
            of_all: 1 << 40,
            honours_ranges: true,
        };
        let reader = 1..2;
        let read = read(38, &origin, std::slice::from_ref(&reader), 0..38, 1);
        assert_eq!(read.sent_bytes, 38);
    }

    #[test]
    fn a_full_link_keeps_two_connections_at_most() {
        let origin = FakeOrigin {
            of_one: 12 * MIB,
            of_all: 12 * MIB,
            honours_ranges: true,
        };
        let read = read(256 * MIB, &origin, &[], 0..256 * MIB, 16);
        assert!(
            read.sent_bytes == 256 * MIB && read.connections <= 4,
            "{}",
            read.connections
        );
    }

    #[test]
    fn a_small_blob_is_one_plain_request() {
        let origin = FakeOrigin {
            of_one: 10 * MIB,
            of_all: 1 << 40,
            honours_ranges: false,
        };
        let read = read(16 * MIB, &origin, &[], 0..16 * MIB, 16);
        assert_eq!((read.sent_bytes, read.connections), (16 * MIB, 1));
    }

    #[test]
    fn an_origin_that_ignores_ranges_is_read_once_over_one_connection() {
        let origin = FakeOrigin {
            of_one: 10 * MIB,
            of_all: 1 << 40,
            honours_ranges: false,
        };
        let read = read(
            64 * MIB,
            &origin,
            &[5 * MIB..6 * MIB, 40 * MIB..41 * MIB],
            0..64 * MIB,
            16,
        );
        assert_eq!((read.sent_bytes, read.connections), (64 * MIB, 1));
    }

    #[test]
    fn scattered_ranges_are_read_at_once_and_nothing_beside_them() {
        let origin = FakeOrigin {
            of_one: 10 * MIB,
            of_all: 1 << 40,
            honours_ranges: true,
        };
        let readers: Vec<_> = (0..16)
            .map(|i| i * 10 * MIB..i * 10 * MIB + 128 * 1024)
            .collect();
        let read = read(200 * MIB, &origin, &readers, 0..0, 16);
        assert_eq!(
            (read.sent_bytes, read.connections),
            (16 * 128 * 1024, 16),
            "all at once"
        );
        assert!(read.took_ms <= 100, "{} ms", read.took_ms);
        assert!(readers.iter().all(|range| read.present.contains(range)));
    }

    #[test]
    fn readers_come_before_the_rest() {
        let mut reads = OriginReads::new(100 * MIB, KNOWN);
        let present = ByteSet::default();
        let reader = 50 * MIB..51 * MIB;
        let demand = wanted(&present, std::slice::from_ref(&reader));
        assert_eq!(
            reads.next(at_ms(0), &demand).map(|span| span.bytes),
            Some(50 * MIB..58 * MIB)
        );
        assert_eq!(
            reads.next(at_ms(0), &demand),
            None,
            "one connection until more are known to pay"
        );
    }

    #[test]
    fn a_throttling_origin_gets_one_connection_and_rest() {
        let mut reads = OriginReads::new(100 * MIB, KNOWN);
        let present = ByteSet::default();
        let demand = wanted(&present, &[]);
        let first = reads.next(at_ms(0), &demand).expect("a span");
        reads.ended(at_ms(10), first.id, SpanEnd::Throttled);
        assert_eq!(reads.next(at_ms(100), &demand), None);
        assert_eq!(reads.deadline(at_ms(100)), Some(at_ms(210)));
        assert!(reads.next(at_ms(210), &demand).is_some());
    }

    #[test]
    fn the_last_try_at_an_origin_that_refuses_ranges_is_a_plain_request() {
        for (refusal, is_plain) in [
            (SpanEnd::Refused, true),
            (SpanEnd::Unavailable, true),
            (SpanEnd::Throttled, false),
            (SpanEnd::Broken, false),
        ] {
            let mut reads = OriginReads::new(100 * MIB, KNOWN);
            let present = ByteSet::default();
            let demand = wanted(&present, &[]);
            let next =
                |reads: &mut OriginReads, second: u64| reads.next(at_ms(second * 5000), &demand);
            for second in 0..u64::from(TRIES) {
                let span = next(&mut reads, second).expect("a span");
                assert!(!span.plain);
                reads.ended(at_ms(second * 5000), span.id, refusal);
            }
            let last = next(&mut reads, 4);
            assert_eq!(last.is_some(), is_plain, "{refusal:?}");
            if let Some(last) = last {
                assert!(last.plain && last.bytes == (0..100 * MIB));
                reads.ended(at_ms(20_000), last.id, refusal);
            }
            assert!(reads.is_failed() && next(&mut reads, 9).is_none());
        }
    }

    #[test]
    fn an_origin_that_honours_ranges_and_breaks_plain_answers_is_asked_for_ranges() {
        let mut reads = OriginReads::new(100 * MIB, Experience::default());
        let present = ByteSet::default();
        let demand = wanted(&present, &[]);
        let range = reads.next(at_ms(0), &demand).expect("a span");
        reads.answered(range.id, true);
        assert!(reads.may_ask_plain());
        // The caller takes short parts for a reason to ask for the whole.
        reads.ended(at_ms(10), range.id, SpanEnd::RangeIgnored);
        let plain = reads.next(at_ms(10), &demand).expect("a span");
        assert!(plain.plain);
        reads.ended(at_ms(20), plain.id, SpanEnd::Broken);
        assert!(!reads.may_ask_plain());
        assert!(!reads.next(at_ms(1000), &demand).expect("a span").plain);
    }

    #[test]
    fn an_origin_that_fails_again_and_again_counts_as_failed() {
        let mut reads = OriginReads::new(100 * MIB, KNOWN);
        let present = ByteSet::default();
        let demand = wanted(&present, &[]);
        for second in 0..TRIES {
            assert!(!reads.is_failed());
            let span = reads
                .next(at_ms(u64::from(second) * 5000), &demand)
                .expect("a span");
            reads.ended(at_ms(u64::from(second) * 5000), span.id, SpanEnd::Broken);
        }
        assert!(reads.is_failed() && reads.next(at_ms(60_000), &demand).is_none());
        reads.forgive();
        assert!(reads.next(at_ms(60_000), &demand).is_some());
    }

    proptest! {
        /// All wanted bytes come, no byte twice, and nothing else beside the read-ahead of the readers' own ranges.
        #[test]
        fn each_wanted_byte_is_read_once(
            size in 1..(40 * MIB),
            readers in prop::collection::vec((0..40 * MIB, 1..3 * MIB), 0..12),
            rest in any::<bool>(),
            of_one in MIB..(50 * MIB),
            most in 1..20_usize,
        ) {
            let readers: Vec<_> = readers.iter().map(|(at, len)| {
                let at = at % size;
                at..(at + len).min(size)
            }).collect();
            let rest = if rest { 0..size } else { 0..0 };
            let origin = FakeOrigin { of_one, of_all: 100 * MIB, honours_ranges: true };
            let mut wanted = ByteSet::default();
            readers.iter().chain([&rest]).for_each(|range| wanted.insert(range.clone()));
            let read = read(size, &origin, &readers, rest, most);
            prop_assert_eq!(read.sent_bytes, wanted.len_bytes());
            prop_assert!(read.connections <= most.min(CONNECTIONS_MAX));
        }
    }
}
