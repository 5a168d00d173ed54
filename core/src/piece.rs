//! Pieces: the cuts of a blob, the set of held pieces, and the table of the values that each piece must hash to.

use std::cmp::Ordering;
use std::fmt;
use std::ops::Range;

use hawker_oci::digest::{Algorithm, Chain, ChainValue, Digest};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// The first pieces are small, so that the first bytes can be verified and passed on early.
const SMALL_PIECES: u32 = 4;
/// Length in bytes of a small piece.
const SMALL_BYTES: u64 = 256 * KIB;

/// Largest blob that is distributed in pieces: a million of them. It bounds what a size from a stranger can make us allocate.
pub const MAX_BLOB_BYTES: u64 = 16 << 40;

/// Number of a piece within its task, from 0.
pub type PieceIndex = u32;

/// The cuts of a blob into pieces: a function of its size alone, so that everyone agrees.
///
/// Four pieces of 256 KiB, then 256 KiB each for blobs up to 128 MiB, 512 KiB up to 256 MiB, 1 MiB up to 2 GiB, 4 MiB up to 16 GiB,
/// 16 MiB above. All lengths but the last are multiples of 128 bytes, the longer of the two block lengths. A blob of no bytes has no
/// pieces.
///
/// A swarm starts and ends at the pace of single pieces: of 512 KiB 16 nodes are 5 % later with 128 MiB, of 4 MiB 2,600 are 8 % later
/// with two blobs of 1.5 GB. Some hundreds to two thousand keep messages and tables short.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PieceLayout {
    size_bytes: u64,
    piece_bytes: u64,
}

impl PieceLayout {
    /// The pieces of a blob of `size_bytes`.
    pub const fn new(size_bytes: u64) -> Self {
        let piece_bytes = if size_bytes <= 128 * MIB {
            MIB / 4
        } else if size_bytes <= 256 * MIB {
            MIB / 2
        } else if size_bytes <= 2 * GIB {
            MIB
        } else if size_bytes <= 16 * GIB {
            4 * MIB
        } else {
            16 * MIB
        };
        Self {
            size_bytes,
            piece_bytes,
        }
    }

    /// The same in pieces of at least 4 MiB: for simulations of so many nodes that all of a blob's real pieces take too long to work
    /// out.
    pub const fn long(size_bytes: u64) -> Self {
        let Self { piece_bytes, .. } = Self::new(size_bytes);
        Self {
            size_bytes,
            piece_bytes: if piece_bytes < 4 * MIB {
                4 * MIB
            } else {
                piece_bytes
            },
        }
    }

    /// The blob's size.
    pub const fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Length of a piece after the small ones.
    pub const fn piece_bytes(&self) -> u64 {
        self.piece_bytes
    }

    /// How many pieces there are. A size whose count would not fit is cut off: no blob is that long.
    pub fn count(&self) -> u32 {
        let head = SMALL_BYTES * u64::from(SMALL_PIECES);
        let count = if self.size_bytes <= head {
            self.size_bytes.div_ceil(SMALL_BYTES)
        } else {
            u64::from(SMALL_PIECES) + (self.size_bytes - head).div_ceil(self.piece_bytes())
        };
        u32::try_from(count).unwrap_or(u32::MAX)
    }

    /// The start of piece `index`; the blob's size for an index past the last.
    pub fn start(&self, index: PieceIndex) -> u64 {
        let small = u64::from(index.min(SMALL_PIECES)) * SMALL_BYTES;
        let large =
            u64::from(index.saturating_sub(SMALL_PIECES)).saturating_mul(self.piece_bytes());
        small.saturating_add(large).min(self.size_bytes)
    }

    /// The byte range of piece `index`; empty past the last.
    pub fn range(&self, index: PieceIndex) -> Range<u64> {
        self.start(index)..self.start(index.saturating_add(1))
    }

    /// Length in bytes of piece `index`.
    pub fn len_bytes(&self, index: PieceIndex) -> u64 {
        let range = self.range(index);
        range.end - range.start
    }

    /// The piece that holds the byte at `offset`, which is less than the size.
    pub fn containing(&self, offset: u64) -> PieceIndex {
        let head = SMALL_BYTES * u64::from(SMALL_PIECES);
        let index = if offset < head {
            offset / SMALL_BYTES
        } else {
            u64::from(SMALL_PIECES) + (offset - head) / self.piece_bytes()
        };
        u32::try_from(index).unwrap_or(u32::MAX)
    }

    /// The pieces that a byte range touches.
    pub fn covering(&self, bytes: Range<u64>) -> Range<PieceIndex> {
        if bytes.start >= bytes.end.min(self.size_bytes) {
            return 0..0;
        }
        let last = self.containing(bytes.end.min(self.size_bytes) - 1);
        self.containing(bytes.start)..last.saturating_add(1)
    }

    /// The last piece, which is held back until the whole digest is known to match.
    pub fn last(&self) -> Option<PieceIndex> {
        self.count().checked_sub(1)
    }
}

/// A set of pieces of one task.
///
/// A set without pieces holds no memory: a node knows many sets of blobs that it never reads, and a blob of 2 TB has 131,076 pieces.
#[derive(Clone)]
pub struct PieceSet {
    /// One bit a piece; nothing until the first piece comes in.
    words: Vec<u64>,
    count: u32,
    held: u32,
}

impl PartialEq for PieceSet {
    fn eq(&self, other: &Self) -> bool {
        (self.count, self.held) == (other.count, other.held)
            && (self.held == 0 || self.words == other.words)
    }
}

impl Eq for PieceSet {}

impl PieceSet {
    /// No pieces out of `count`.
    pub fn empty(count: u32) -> Self {
        Self {
            words: Vec::new(),
            count,
            held: 0,
        }
    }

    /// The bits, to be written.
    #[inline]
    fn words_mut(&mut self) -> &mut [u64] {
        if self.words.is_empty() {
            self.words.resize(self.count.div_ceil(64) as usize, 0);
        }
        &mut self.words
    }

    /// All of `count` pieces.
    pub fn full(count: u32) -> Self {
        let mut set = Self::empty(count);
        set.insert_range(0..count);
        set
    }

    /// The set whose bytes [`PieceSet::to_bytes`] gave; bits past `count` are ignored, missing bytes are zero.
    pub fn from_bytes(count: u32, bytes: &[u8]) -> Self {
        let mut set = Self::empty(count);
        for (index, byte) in bytes.iter().enumerate().take(count.div_ceil(8) as usize) {
            for bit in (0..8).filter(|bit| byte >> bit & 1 == 1) {
                set.insert(index as u32 * 8 + bit);
            }
        }
        set
    }

    /// One bit a piece, lowest bit first.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes: Vec<u8> = self.words.iter().flat_map(|w| w.to_le_bytes()).collect();
        bytes.resize(self.count.div_ceil(8) as usize, 0);
        bytes
    }

    /// Out of how many pieces.
    pub const fn count(&self) -> u32 {
        self.count
    }

    /// How many are in the set.
    #[inline]
    pub const fn len(&self) -> u32 {
        self.held
    }

    /// Whether none is.
    pub const fn is_empty(&self) -> bool {
        self.held == 0
    }

    /// Whether all are.
    pub const fn is_full(&self) -> bool {
        self.held == self.count
    }

    /// Whether piece `index` is in the set; `false` past the count.
    #[inline]
    pub fn contains(&self, index: PieceIndex) -> bool {
        self.words
            .get(index as usize / 64)
            .is_some_and(|w| w >> (index % 64) & 1 == 1)
    }

    /// Puts piece `index` in; `true` when it was not there. Past the count nothing happens.
    #[inline]
    pub fn insert(&mut self, index: PieceIndex) -> bool {
        let new = index < self.count && !self.contains(index);
        if new {
            self.words_mut()[index as usize / 64] |= 1 << (index % 64);
            self.held += 1;
        }
        new
    }

    /// Takes piece `index` out; `true` when it was there.
    #[inline]
    pub fn remove(&mut self, index: PieceIndex) -> bool {
        let there = self.contains(index);
        if there {
            self.words[index as usize / 64] &= !(1 << (index % 64));
            self.held -= 1;
        }
        there
    }

    /// Puts in a range of pieces.
    pub fn insert_range(&mut self, range: Range<PieceIndex>) {
        let end = range.end.min(self.count);
        let mut index = range.start;
        while index < end {
            // As many bits of one word as the range has.
            let bits = (64 - index % 64).min(end - index);
            let mask = (u64::MAX >> (64 - bits)) << (index % 64);
            let word = &mut self.words_mut()[index as usize / 64];
            let new = (mask & !*word).count_ones();
            *word |= mask;
            self.held += new;
            index += bits;
        }
    }

    /// Puts in all that `other` has.
    pub fn unite(&mut self, other: &PieceSet) {
        self.combine(other, |own, other| own | other);
    }

    /// Takes out all that `other` has.
    pub fn subtract(&mut self, other: &PieceSet) {
        self.combine(other, |own, other| own & !other);
    }

    /// Takes out all that `other` lacks.
    pub fn intersect(&mut self, other: &PieceSet) {
        self.combine(other, |own, other| own & other);
    }

    /// Whether there is a piece that both have.
    #[inline]
    pub fn meets(&self, other: &PieceSet) -> bool {
        self.words
            .iter()
            .zip(&other.words)
            .any(|(own, other)| own & other != 0)
    }

    /// Bits of `other` past this set's count are ignored.
    fn combine(&mut self, other: &PieceSet, word: impl Fn(u64, u64) -> u64) {
        if other.held == 0 && self.held == 0 {
            return;
        }
        let mut held = 0;
        for (at, own) in self.words_mut().iter_mut().enumerate() {
            *own = word(*own, other.words.get(at).copied().unwrap_or(0));
            held += own.count_ones();
        }
        let past = self.count % 64;
        if let Some(last) = self.words.last_mut().filter(|_| past > 0) {
            held -= (*last >> past).count_ones();
            *last &= (1 << past) - 1;
        }
        self.held = held;
    }

    /// The pieces in the set, ascending.
    pub fn iter(&self) -> impl Iterator<Item = PieceIndex> + '_ {
        self.words.iter().enumerate().flat_map(|(at, word)| {
            let rest = *word;
            ones(at, rest)
        })
    }

    /// The pieces in the set, from `from` to the end and then from the start up to it.
    pub fn iter_from(&self, from: PieceIndex) -> impl Iterator<Item = PieceIndex> + '_ {
        let words = self.words.len();
        let first = (from / 64) as usize;
        (0..=words).flat_map(move |step| {
            // The first word is visited twice: its upper part first, its lower part last.
            let at = if words == 0 {
                0
            } else {
                (first + step) % words
            };
            let below = (1u64 << (from % 64)) - 1;
            let mask = if step == 0 {
                !below
            } else if step == words {
                below
            } else {
                !0
            };
            let rest = self.words.get(at).map_or(0, |w| w & mask);
            ones(at, rest)
        })
    }

    /// The pieces in this set and not in `other`, ascending.
    pub fn minus<'a>(&'a self, other: &'a PieceSet) -> impl Iterator<Item = PieceIndex> + 'a {
        self.words.iter().enumerate().flat_map(move |(at, word)| {
            let rest = word & !other.words.get(at).copied().unwrap_or(0);
            ones(at, rest)
        })
    }

    /// The pieces not in the set, ascending.
    pub fn missing(&self) -> impl Iterator<Item = PieceIndex> + '_ {
        (0..self.count).filter(|index| !self.contains(*index))
    }

    /// The first piece at or after `from` that is not in the set; the count when there is none.
    pub fn first_missing(&self, from: PieceIndex) -> PieceIndex {
        let mut index = from.min(self.count);
        while index < self.count {
            let rest = !self.words.get(index as usize / 64).copied().unwrap_or(0) >> (index % 64);
            if rest != 0 {
                return (index + rest.trailing_zeros()).min(self.count);
            }
            index = (index / 64 + 1) * 64;
        }
        self.count
    }
}

/// The pieces whose bits are set in word `at`.
fn ones(at: usize, mut word: u64) -> impl Iterator<Item = PieceIndex> {
    std::iter::from_fn(move || {
        let bit = word.trailing_zeros();
        // The lowest bit goes; of zero nothing can be taken.
        word &= word.checked_sub(1)?;
        Some(at as u32 * 64 + bit)
    })
}

impl fmt::Debug for PieceSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PieceSet({}/{})", self.held, self.count)
    }
}

/// The id of a member: the first 16 bytes of the SHA-256 of its public key (SubjectPublicKeyInfo).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct PeerId(pub [u8; 16]);

impl Ord for PeerId {
    /// As the bytes are ordered, but compared as one number: maps by peer are looked into all the time.
    #[inline]
    fn cmp(&self, other: &Self) -> Ordering {
        u128::from_be_bytes(self.0).cmp(&u128::from_be_bytes(other.0))
    }
}

impl PartialOrd for PeerId {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PeerId {
    /// From raw bytes; `None` when there are not 16.
    pub fn from_bytes(raw: &[u8]) -> Option<Self> {
        raw.try_into().ok().map(Self)
    }
}

impl fmt::Display for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hawker_oci::digest::hex(&self.0))
    }
}

impl fmt::Debug for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hawker_oci::digest::hex(&self.0[..4]))
    }
}

impl std::str::FromStr for PeerId {
    type Err = hawker_oci::digest::DigestError;

    /// 32 digits of hex.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // A peer id is half as long as a SHA-256 digest: pad it to reuse the one hex parser.
        let digest: Digest = format!("sha256:{text}{}", "0".repeat(32)).parse()?;
        Self::from_bytes(&digest.as_bytes()[..16]).ok_or(hawker_oci::digest::DigestError::Hex)
    }
}

/// An issuer's statement about the first `count` values of a table, made once; it travels from peer to peer as it is.
///
/// The signature covers [`SignedPrefix::statement`]. Whether the issuer may issue, and whether the signature holds, is
/// checked by whoever receives it, before it reaches [`PieceTable`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SignedPrefix {
    /// How many values the signature covers.
    pub count: u32,
    /// The seal: the issuer has verified the whole blob.
    pub sealed: bool,
    /// When it was signed, in seconds since 1970 by the issuer's clock: its certificate must have held then.
    pub signed_at_s: u64,
    /// The signer.
    pub issuer: PeerId,
    /// The registries that gave the issuer every byte this covers (the whole blob, if sealed), or proved that they have them.
    pub registries: Vec<String>,
    /// The issuer's certificate (DER), which the cluster's authority signed.
    pub certificate: std::sync::Arc<[u8]>,
    /// Ed25519 signature over the statement.
    pub signature: Vec<u8>,
}

impl SignedPrefix {
    /// The bytes that are signed: version, task, size, the first `count` values, the seal, the time, the registries.
    pub fn statement(
        task: &Digest,
        size_bytes: u64,
        values: &[ChainValue],
        sealed: bool,
        signed_at_s: u64,
        registries: &[String],
    ) -> Vec<u8> {
        // The values are folded into one digest, so that a statement stays short however long the table is.
        let mut folded = Chain::new(Algorithm::Sha256);
        let mut raw = Vec::with_capacity(64);
        for value in values {
            raw.clear();
            value.write_to(&mut raw);
            folded.update(&raw);
        }
        let mut statement = b"hawker piece table 2\n".to_vec();
        statement.extend_from_slice(task.to_string().as_bytes());
        statement.extend_from_slice(&size_bytes.to_be_bytes());
        statement.extend_from_slice(&(values.len() as u64).to_be_bytes());
        statement.extend_from_slice(folded.finish().as_bytes());
        statement.push(u8::from(sealed));
        statement.extend_from_slice(&signed_at_s.to_be_bytes());
        for registry in registries {
            statement.extend_from_slice(&(registry.len() as u64).to_be_bytes());
            statement.extend_from_slice(registry.as_bytes());
        }
        statement
    }
}

/// The values that the pieces of a task must hash to: the chaining values at the piece boundaries, from the first
/// piece on, as far as they are known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PieceTable {
    task: Digest,
    layout: PieceLayout,
    /// `values[i]` is the value after piece `i`. The last piece has none: the digest takes its place.
    values: Vec<ChainValue>,
    signed: Option<SignedPrefix>,
}

/// A number for each piece of one task, such as how many peers have it. Counts hold no memory until the first one.
#[derive(Clone, Debug, Default)]
pub struct PieceCounts {
    counts: Vec<u16>,
    of: u32,
}

impl PieceCounts {
    /// Zero for each of `count` pieces.
    pub fn new(count: u32) -> Self {
        Self {
            counts: Vec::new(),
            of: count,
        }
    }

    /// The number of a piece; zero past the count.
    #[inline]
    pub fn get(&self, piece: PieceIndex) -> u16 {
        self.counts.get(piece as usize).copied().unwrap_or(0)
    }

    /// One more; the new number.
    pub fn add(&mut self, piece: PieceIndex) -> u16 {
        if self.counts.is_empty() {
            self.counts.resize(self.of as usize, 0);
        }
        self.change(piece, |number| number.saturating_add(1))
    }

    /// One less, but never less than zero; the new number.
    pub fn subtract(&mut self, piece: PieceIndex) -> u16 {
        self.change(piece, |number| number.saturating_sub(1))
    }

    fn change(&mut self, piece: PieceIndex, change: impl FnOnce(u16) -> u16) -> u16 {
        let Some(number) = self.counts.get_mut(piece as usize) else {
            return 0;
        };
        *number = change(*number);
        *number
    }
}

/// A table that contradicts what is known already. Somebody lied or the origin changed its mind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("two piece tables of one task contradict each other at piece {0}")]
pub struct Contradiction(pub PieceIndex);

impl PieceTable {
    /// A table that knows nothing yet.
    pub const fn new(task: Digest, layout: PieceLayout) -> Self {
        Self {
            task,
            layout,
            values: Vec::new(),
            signed: None,
        }
    }

    /// The task.
    pub const fn task(&self) -> &Digest {
        &self.task
    }

    /// How the task is cut.
    pub const fn layout(&self) -> PieceLayout {
        self.layout
    }

    /// How many values a full table has: one fewer than pieces.
    pub fn full_count(&self) -> u32 {
        self.layout.count().saturating_sub(1)
    }

    /// The values known so far.
    pub fn values(&self) -> &[ChainValue] {
        &self.values
    }

    /// The latest signed statement over a prefix.
    pub const fn signed(&self) -> Option<&SignedPrefix> {
        self.signed.as_ref()
    }

    /// Whether an issuer has said that the whole blob is right.
    pub fn is_sealed(&self) -> bool {
        self.signed.as_ref().is_some_and(|s| s.sealed)
    }

    /// How many pieces can be verified: those whose value before and after is known.
    pub fn verifiable(&self) -> u32 {
        let known = self.values.len() as u32;
        if known == self.full_count() {
            self.layout.count()
        } else {
            known
        }
    }

    /// A hash that starts where piece `index` starts; `None` when the value there is not known.
    pub fn chain_at(&self, index: PieceIndex) -> Option<Chain> {
        let value = match index.checked_sub(1) {
            None => ChainValue::initial(self.task.algorithm()),
            Some(before) => *self.values.get(before as usize)?,
        };
        Some(Chain::resume(value, self.layout.start(index)))
    }

    /// Whether a hash that ran over the whole of piece `index` came out as it must; `None` when that is not known.
    pub fn verify(&self, index: PieceIndex, chain: &Chain) -> Option<bool> {
        if Some(index) == self.layout.last() {
            return Some(
                chain.total_bytes() == self.layout.size_bytes()
                    && chain.clone().finish() == self.task,
            );
        }
        self.values
            .get(index as usize)
            .map(|value| chain.value() == Some(*value))
    }

    /// Notes the value after piece `values().len()`, which this node computed from the origin's bytes.
    pub fn push(&mut self, value: ChainValue) {
        if (self.values.len() as u32) < self.full_count() {
            self.values.push(value);
        }
    }

    /// Takes in checked values from elsewhere: `first` is the index of the first of `values`. A gap before `first` means
    /// nothing is taken. `signed`, whose signature was checked, replaces an older one.
    pub fn extend(
        &mut self,
        first: u32,
        values: &[ChainValue],
        signed: Option<SignedPrefix>,
    ) -> Result<bool, Contradiction> {
        let known = self.values.len();
        let first = first as usize;
        if first > known || first + values.len() > self.full_count() as usize {
            return Ok(false);
        }
        for (at, value) in values.iter().enumerate() {
            if self
                .values
                .get(first + at)
                .is_some_and(|ours| ours != value)
            {
                return Err(Contradiction((first + at) as u32));
            }
        }
        self.values.extend(values.iter().skip(known - first));
        let mut grew = self.values.len() > known;
        if let Some(new) = signed {
            let better = self
                .signed
                .as_ref()
                .is_none_or(|old| (new.sealed, new.count) > (old.sealed, old.count));
            if better && new.count as usize <= self.values.len() {
                self.signed = Some(new);
                grew = true;
            }
        }
        Ok(grew)
    }

    /// The statement an issuer would sign now over all values known.
    pub fn statement(&self, sealed: bool, signed_at_s: u64, registries: &[String]) -> Vec<u8> {
        let size_bytes = self.layout.size_bytes();
        SignedPrefix::statement(
            &self.task,
            size_bytes,
            &self.values,
            sealed,
            signed_at_s,
            registries,
        )
    }

    /// The statement that `signed`, which came with this table, must have been made over.
    pub fn statement_of(&self, signed: &SignedPrefix) -> Vec<u8> {
        let covered = &self.values[..(signed.count as usize).min(self.values.len())];
        SignedPrefix::statement(
            &self.task,
            self.layout.size_bytes(),
            covered,
            signed.sealed,
            signed.signed_at_s,
            &signed.registries,
        )
    }

    /// The issuer that sealed both this table and `other` though they differ; `None` if there is none. If both
    /// signatures hold, that is proof of a lie: a seal says that the whole blob was verified, and one digest has one
    /// table. Statements without a seal prove nothing: an honest issuer may have signed the bytes of a broken origin
    /// before the digest told.
    pub fn contradiction(&self, other: &PieceTable) -> Option<PeerId> {
        let sealed = |table: &PieceTable| {
            let signed = table.signed.as_ref().filter(|signed| signed.sealed)?;
            (signed.count as usize == table.values.len()).then_some(signed.issuer)
        };
        let differs = (self.layout, &self.values) != (other.layout, &other.values);
        let issuer = sealed(self).filter(|issuer| Some(*issuer) == sealed(other));
        issuer.filter(|_| self.task == other.task && differs)
    }

    /// Attaches this node's own signature over all values known.
    pub fn sign(&mut self, signed: SignedPrefix) {
        self.signed = Some(signed);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    /// The oracle: cuts a blob from its start to its end, one piece after the other.
    fn cut(size: u64) -> Vec<Range<u64>> {
        let sizes = [
            (128 * MIB, MIB / 4),
            (256 * MIB, MIB / 2),
            (2 * GIB, MIB),
            (16 * GIB, 4 * MIB),
            (u64::MAX, 16 * MIB),
        ];
        let large = sizes
            .into_iter()
            .find(|(at_most, _)| size <= *at_most)
            .unwrap()
            .1;
        let mut pieces = Vec::new();
        let mut at = 0;
        while at < size {
            let length = if pieces.len() < 4 { 256 * KIB } else { large };
            let end = (at + length).min(size);
            pieces.push(at..end);
            at = end;
        }
        pieces
    }

    /// Sizes of all kinds, many of them near where the rule changes.
    fn size() -> impl Strategy<Value = u64> {
        let edge = prop::sample::select(
            &[
                0,
                256 * KIB,
                MIB,
                2 * MIB,
                128 * MIB,
                256 * MIB,
                2 * GIB,
                16 * GIB,
            ][..],
        );
        prop_oneof![
            0..8 * MIB,
            0..3 * GIB,
            0..20 * GIB,
            (edge, 0..600u64).prop_map(|(edge, near)| (edge + near).saturating_sub(300)),
        ]
    }

    #[test]
    fn counts_and_lengths_at_the_edges() {
        // size, count, length of the last piece
        let table = [
            (0, 0, 0),
            (1, 1, 1),
            (256 * KIB, 1, 256 * KIB),
            (256 * KIB + 1, 2, 1),
            (MIB, 4, 256 * KIB),
            (MIB + 1, 5, 1),
            (2 * MIB, 8, MIB / 4),
            (128 * MIB, 512, MIB / 4),
            (128 * MIB + 1, 4 + 255, 1),
            (256 * MIB, 4 + 510, MIB / 2),
            (256 * MIB + 1, 4 + 256, 1),
            (2 * GIB, 4 + 2047, MIB),
            (2 * GIB + 1, 4 + 512, 3 * MIB + 1),
            (16 * GIB, 4 + 4096, 3 * MIB),
            (16 * GIB + 1, 4 + 1024, 15 * MIB + 1),
            (MAX_BLOB_BYTES, 4 + (1 << 20), 15 * MIB),
        ];
        for (size, count, last) in table {
            let layout = PieceLayout::new(size);
            assert_eq!(layout.count(), count, "{size}");
            assert_eq!(
                layout.last().map_or(0, |piece| layout.len_bytes(piece)),
                last,
                "{size}"
            );
        }
    }

    #[test]
    fn sizes_that_no_blob_has_do_no_harm() {
        let layout = PieceLayout::new(u64::MAX);
        assert_eq!(layout.count(), u32::MAX);
        assert_eq!(layout.covering(0..u64::MAX), 0..u32::MAX);
        assert!(layout.range(u32::MAX).is_empty());
        assert_eq!(PieceLayout::new(10).range(u32::MAX), 10..10);
    }

    #[test]
    fn a_statement_covers_every_word_in_it() {
        let task = Digest::of(Algorithm::Sha256, b"a");
        let value = |n: u8| ChainValue::from_bytes(Algorithm::Sha256, &[n; 32]).unwrap();
        let names = |names: &[&str]| {
            names
                .iter()
                .map(|name| (*name).to_owned())
                .collect::<Vec<_>>()
        };
        let from = |registries: &[&str]| {
            SignedPrefix::statement(
                &task,
                9,
                &[value(1), value(2)],
                false,
                5,
                &names(registries),
            )
        };
        let statement = |task, size, values: &[ChainValue], sealed, at| {
            SignedPrefix::statement(task, size, values, sealed, at, &[])
        };
        let all = [
            statement(&task, 9, &[value(1), value(2)], false, 5),
            statement(
                &Digest::of(Algorithm::Sha256, b"b"),
                9,
                &[value(1), value(2)],
                false,
                5,
            ),
            statement(&task, 8, &[value(1), value(2)], false, 5),
            statement(&task, 9, &[value(2), value(1)], false, 5),
            statement(&task, 9, &[value(1)], false, 5),
            statement(&task, 9, &[value(1), value(2)], true, 5),
            statement(&task, 9, &[value(1), value(2)], false, 6),
            from(&["a"]),
            from(&["ab"]),
            from(&["a", "b"]),
            from(&["b", "a"]),
        ];
        assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), all.len());
    }

    #[test]
    fn only_two_seals_of_one_issuer_on_different_tables_contradict_each_other() {
        let table = |task: &[u8], size, n: u8, sealed, issuer: u8| {
            let layout = PieceLayout::new(size);
            let mut table = PieceTable::new(Digest::of(Algorithm::Sha256, task), layout);
            (1..layout.count()).for_each(|_| {
                table.push(ChainValue::from_bytes(Algorithm::Sha256, &[n; 32]).unwrap())
            });
            table.sign(SignedPrefix {
                count: table.full_count(),
                sealed,
                signed_at_s: u64::from(n),
                issuer: PeerId([issuer; 16]),
                registries: vec!["r.example".to_owned()],
                certificate: [][..].into(),
                signature: Vec::new(),
            });
            table
        };
        let sealed = table(b"a", 2 * MIB, 1, true, 7);
        let cases = [
            ("other values", table(b"a", 2 * MIB, 2, true, 7), true),
            ("another size", table(b"a", 2 * MIB - 1, 1, true, 7), true),
            ("the same", table(b"a", 2 * MIB, 1, true, 7), false),
            ("another task", table(b"b", 2 * MIB, 2, true, 7), false),
            ("no seal", table(b"a", 2 * MIB, 2, false, 7), false),
            ("another issuer", table(b"a", 2 * MIB, 2, true, 8), false),
        ];
        for (name, other, contradicts) in cases {
            let expected = contradicts.then_some(PeerId([7; 16]));
            assert_eq!(
                (sealed.contradiction(&other), other.contradiction(&sealed)),
                (expected, expected),
                "{name}"
            );
        }
    }

    #[test]
    fn a_peer_id_survives_text() {
        let id = PeerId([0xab; 16]);
        assert_eq!(id.to_string().parse(), Ok(id));
        for text in [
            "",
            "ab",
            &"AB".repeat(16),
            &"ab".repeat(17),
            &"ab".repeat(32),
            "sha256:",
            &"é".repeat(16),
        ] {
            assert!(text.parse::<PeerId>().is_err(), "{text}");
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Insert(u32),
        Remove(u32),
        InsertRange(u32, u32),
    }

    fn step() -> impl Strategy<Value = Step> {
        let index = 0..220u32;
        prop_oneof![
            index.clone().prop_map(Step::Insert),
            index.clone().prop_map(Step::Remove),
            (index.clone(), index).prop_map(|(from, to)| Step::InsertRange(from, to)),
        ]
    }

    fn check(set: &PieceSet, model: &BTreeSet<u32>, count: u32) -> Result<(), TestCaseError> {
        prop_assert_eq!(set.count(), count);
        prop_assert_eq!(set.len() as usize, model.len());
        prop_assert_eq!(
            (set.is_empty(), set.is_full()),
            (model.is_empty(), model.len() == count as usize)
        );
        prop_assert!(set.iter().eq(model.iter().copied()));
        prop_assert!(
            set.missing()
                .eq((0..count).filter(|index| !model.contains(index)))
        );
        for index in 0..count + 70 {
            prop_assert_eq!(set.contains(index), model.contains(&index));
            let missing = (index..count)
                .find(|index| !model.contains(index))
                .unwrap_or(count);
            prop_assert_eq!(set.first_missing(index), missing);
        }
        Ok(())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn a_layout_is_what_cutting_from_the_start_gives(size in size()) {
            let (layout, pieces) = (PieceLayout::new(size), cut(size));
            prop_assert_eq!(layout.count() as usize, pieces.len());
            for (index, piece) in (0u32..).zip(&pieces) {
                prop_assert_eq!(&layout.range(index), piece);
                prop_assert_eq!(layout.start(index), piece.start);
                prop_assert_eq!(layout.len_bytes(index), piece.end - piece.start);
                prop_assert_eq!(piece.start % 128, 0, "a chaining value exists at every boundary");
            }
            prop_assert!(layout.range(layout.count()).is_empty());
            prop_assert_eq!(layout.start(layout.count()), size);
            prop_assert_eq!(layout.last(), layout.count().checked_sub(1));
        }

        #[test]
        fn the_piece_of_a_byte_contains_it(size in size(), at in any::<prop::sample::Index>()) {
            prop_assume!(size > 0);
            let offset = at.index(size as usize) as u64;
            let layout = PieceLayout::new(size);
            let piece = layout.containing(offset);
            prop_assert!(piece < layout.count());
            prop_assert!(layout.range(piece).contains(&offset));
        }

        #[test]
        fn a_range_is_covered_by_the_pieces_that_share_a_byte_with_it(
            size in size(), start in 0..21 * GIB, length in 0..4 * GIB,
        ) {
            let start = start % (size + 1000);
            let bytes = start..start + length;
            let shares = |piece: &Range<u64>| piece.start.max(bytes.start) < piece.end.min(bytes.end);
            let expected: Vec<u32> =
                (0u32..).zip(cut(size)).filter(|(_, piece)| shares(piece)).map(|(index, _)| index).collect();
            let covering: Vec<u32> = PieceLayout::new(size).covering(bytes).collect();
            prop_assert_eq!(covering, expected);
        }

        #[test]
        fn a_piece_set_does_what_a_plain_set_does(count in 0..200u32, steps in prop::collection::vec(step(), 0..30)) {
            let (mut set, mut model) = (PieceSet::empty(count), BTreeSet::new());
            for step in steps {
                match step {
                    Step::Insert(index) => prop_assert_eq!(set.insert(index), index < count && model.insert(index)),
                    Step::Remove(index) => prop_assert_eq!(set.remove(index), model.remove(&index)),
                    Step::InsertRange(from, to) => {
                        set.insert_range(from..to);
                        model.extend(from..to.min(count));
                    }
                }
                check(&set, &model, count)?;
            }
            let bytes = set.to_bytes();
            prop_assert_eq!(bytes.len(), count.div_ceil(8) as usize);
            prop_assert_eq!(PieceSet::from_bytes(count, &bytes), set);
        }

        #[test]
        fn a_full_set_is_full(count in 0..300u32) {
            check(&PieceSet::full(count), &(0..count).collect(), count)?;
        }

        #[test]
        fn no_bitfield_puts_in_what_is_not_there(count in 0..200u32, bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            let bit = |index: &u32| bytes.get(*index as usize / 8).is_some_and(|byte| byte >> (index % 8) & 1 == 1);
            check(&PieceSet::from_bytes(count, &bytes), &(0..count).filter(bit).collect(), count)?;
        }
    }

    /// A blob and its full table, as the origin's reader makes it.
    fn issued(algorithm: Algorithm, size: u64) -> (Vec<u8>, PieceTable) {
        let blob: Vec<u8> = (0..size).map(|at| (at * 31 + at / 251) as u8).collect();
        let layout = PieceLayout::new(size);
        let mut table = PieceTable::new(Digest::of(algorithm, &blob), layout);
        let mut chain = Chain::new(algorithm);
        for index in 0..layout.count() {
            chain.update(slice(&blob, layout.range(index)));
            table.push(chain.value().unwrap_or(ChainValue::initial(algorithm)));
        }
        (blob, table)
    }

    fn slice(blob: &[u8], range: Range<u64>) -> &[u8] {
        &blob[range.start as usize..range.end as usize]
    }

    fn verify(table: &PieceTable, index: PieceIndex, bytes: &[u8]) -> Option<bool> {
        let mut chain = table.chain_at(index)?;
        chain.update(bytes);
        table.verify(index, &chain)
    }

    fn signed(count: u32, sealed: bool) -> Option<SignedPrefix> {
        let (certificate, signature) = (Vec::new().into(), Vec::new());
        let (issuer, registries) = (PeerId([0; 16]), Vec::new());
        Some(SignedPrefix {
            count,
            sealed,
            signed_at_s: 0,
            issuer,
            registries,
            certificate,
            signature,
        })
    }

    #[test]
    fn each_piece_verifies_alone_and_nothing_else_passes_for_it() {
        for algorithm in [Algorithm::Sha256, Algorithm::Sha512] {
            for size in [1, 256 * KIB, 256 * KIB + 1, MIB, 2 * MIB + 77, 3 * MIB] {
                let (blob, table) = issued(algorithm, size);
                let layout = table.layout();
                assert_eq!(table.values().len() as u32, table.full_count());
                assert_eq!(table.verifiable(), layout.count());
                for index in (0..layout.count()).rev() {
                    let piece = slice(&blob, layout.range(index));
                    assert_eq!(
                        verify(&table, index, piece),
                        Some(true),
                        "{algorithm:?} {size} {index}"
                    );
                    let mut wrong = piece.to_vec();
                    *wrong.last_mut().unwrap() ^= 1;
                    assert_eq!(verify(&table, index, &wrong), Some(false));
                    assert_eq!(verify(&table, index, &piece[1..]), Some(false), "short");
                    assert_eq!(
                        verify(&table, index, &[piece, &[0]].concat()),
                        Some(false),
                        "long"
                    );
                    assert_eq!(verify(&table, index, &[]), Some(false));
                }
            }
        }
    }

    #[test]
    fn a_blob_of_no_bytes_has_nothing_to_verify() {
        let (_, table) = issued(Algorithm::Sha256, 0);
        assert_eq!(
            (table.verifiable(), table.full_count(), table.values().len()),
            (0, 0, 0)
        );
        assert_eq!(verify(&table, 0, b""), None);
    }

    #[test]
    fn a_piece_verifies_only_when_both_its_values_are_known() {
        let (blob, full) = issued(Algorithm::Sha256, 3 * MIB);
        for known in 0..full.values().len() {
            let mut table = PieceTable::new(*full.task(), full.layout());
            assert_eq!(
                table.extend(0, &full.values()[..known], None),
                Ok(known > 0)
            );
            assert_eq!(table.verifiable() as usize, known);
            for index in 0..full.layout().count() {
                let verdict = verify(&table, index, slice(&blob, full.layout().range(index)));
                assert_eq!(
                    verdict,
                    ((index as usize) < known).then_some(true),
                    "{known} {index}"
                );
            }
        }
    }

    #[test]
    fn the_last_piece_cannot_hide_a_poisoned_table() {
        let (blob, full) = issued(Algorithm::Sha256, 2 * MIB);
        let layout = full.layout();
        // An issuer that lies consistently: another first byte, and the values that follow from it.
        let mut lie = blob.clone();
        lie[0] ^= 1;
        let mut poisoned = PieceTable::new(*full.task(), layout);
        let mut chain = Chain::new(Algorithm::Sha256);
        for index in 0..layout.count() {
            chain.update(slice(&lie, layout.range(index)));
            poisoned.push(chain.value().unwrap());
        }
        for index in 0..layout.count() - 1 {
            assert_eq!(
                verify(&poisoned, index, slice(&lie, layout.range(index))),
                Some(true)
            );
        }
        let last = layout.last().unwrap();
        assert_eq!(
            verify(&poisoned, last, slice(&lie, layout.range(last))),
            Some(false)
        );
    }

    #[test]
    fn statements_grow_and_a_seal_is_the_last_word() {
        let (_, full) = issued(Algorithm::Sha256, 3 * MIB);
        let mut table = PieceTable::new(*full.task(), full.layout());
        let values = full.values();
        assert_eq!(
            table.extend(0, &[], signed(1, false)),
            Ok(false),
            "covers what is not known"
        );
        assert_eq!(table.extend(0, &values[..2], signed(2, false)), Ok(true));
        assert_eq!(
            table.extend(0, &values[..2], signed(2, false)),
            Ok(false),
            "nothing new"
        );
        assert_eq!(
            table.extend(0, &values[..1], signed(1, false)),
            Ok(false),
            "an older one"
        );
        assert_eq!(table.signed().map(|signed| signed.count), Some(2));
        assert_eq!(table.extend(2, &values[2..], None), Ok(true));
        assert!(!table.is_sealed());
        assert_eq!(
            table.extend(table.full_count(), &[], signed(table.full_count(), true)),
            Ok(true)
        );
        assert!(table.is_sealed());
        assert_eq!(
            table.extend(0, &[], signed(table.full_count(), false)),
            Ok(false)
        );
        assert!(table.is_sealed());
        assert_eq!(table.statement(true, 3, &[]), full.statement(true, 3, &[]));
    }

    #[test]
    fn no_more_values_are_taken_than_a_table_has() {
        let (_, full) = issued(Algorithm::Sha256, 3 * MIB);
        let mut table = full.clone();
        let extra = ChainValue::initial(Algorithm::Sha256);
        table.push(extra);
        assert_eq!(table.values(), full.values());
        assert_eq!(table.extend(full.full_count(), &[extra], None), Ok(false));
        assert_eq!(table.values(), full.values());
    }

    proptest! {
        #[test]
        fn sets_are_combined_as_sets_are(
            count in 0..200u32, one in prop::collection::btree_set(0..200u32, 0..99),
            other_count in 0..200u32, other in prop::collection::btree_set(0..200u32, 0..99),
        ) {
            let set = |count: u32, of: &BTreeSet<u32>| {
                let mut set = PieceSet::empty(count);
                of.iter().for_each(|piece| {
                    set.insert(*piece);
                });
                set
            };
            let (mine, theirs) = (set(count, &one), set(other_count, &other));
            let (one, other): (Vec<u32>, Vec<u32>) = (mine.iter().collect(), theirs.iter().collect());
            let expected = |keep: &dyn Fn(bool, bool) -> bool| -> Vec<u32> {
                (0..count).filter(|piece| keep(one.contains(piece), other.contains(piece))).collect()
            };
            type Combine = fn(&mut PieceSet, &PieceSet);
            let cases: [(Combine, Vec<u32>); 3] = [
                (PieceSet::unite, expected(&|a, b| a || b)),
                (PieceSet::subtract, expected(&|a, b| a && !b)),
                (PieceSet::intersect, expected(&|a, b| a && b)),
            ];
            for (combine, expected) in cases {
                let mut combined = mine.clone();
                combine(&mut combined, &theirs);
                prop_assert_eq!(combined.iter().collect::<Vec<_>>(), expected.clone());
                prop_assert_eq!(combined.len() as usize, expected.len());
            }
            prop_assert_eq!(mine.meets(&theirs), one.iter().any(|piece| other.contains(piece)));
        }

        #[test]
        fn a_table_takes_what_follows_and_finds_the_first_lie(
            says in prop::collection::vec((0..8u32, 0..8usize, prop::option::of(0..8usize)), 1..8),
        ) {
            // Nine true values, n of them to be taken in per say; one of the said values may be a lie.
            let task = Digest::of(Algorithm::Sha256, b"");
            let truth: Vec<_> = (0..9u8).map(|n| ChainValue::from_bytes(Algorithm::Sha256, &[n; 32]).unwrap()).collect();
            let lie = ChainValue::from_bytes(Algorithm::Sha256, &[99; 32]).unwrap();
            let mut table = PieceTable::new(task, PieceLayout::new(10 * MIB / 4));
            prop_assert_eq!(table.full_count(), 9);
            let mut model: Vec<ChainValue> = Vec::new();
            for (first, count, lie_at) in says {
                let end = (first as usize + count).min(9);
                let mut values = truth[first as usize..end].to_vec();
                if let Some(value) = lie_at.and_then(|at| values.get_mut(at)) {
                    *value = lie;
                }
                let differs = |(at, value): (usize, &ChainValue)| {
                    model.get(first as usize + at).is_some_and(|known| known != value).then_some(first + at as u32)
                };
                let gap = first as usize > model.len();
                let contradiction = values.iter().enumerate().find_map(differs).filter(|_| !gap);
                let outcome = table.extend(first, &values, None);
                if let Some(at) = contradiction {
                    prop_assert_eq!(outcome, Err(Contradiction(at)));
                } else {
                    let grows = !gap && first as usize + values.len() > model.len();
                    prop_assert_eq!(outcome, Ok(grows));
                    if grows {
                        model.truncate(first as usize);
                        model.extend(values);
                    }
                }
                prop_assert_eq!(table.values(), &model[..]);
            }
        }
    }
}
