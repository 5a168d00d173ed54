//! The form of indexes, tables and manifests on disk: records, each with its kind, length and checksum.
//!
//! ```text
//! kind u8 | length of the payload u32 | payload | CRC-32 over all before it u32        numbers are big-endian
//! ```
//!
//! The first record is a header with the version. A file is read up to the first record that is not whole; records of an
//! unknown kind are skipped; fields that a later minor version appends to a known kind are ignored.

use std::ops::Range;

use hawker_core::piece::{
    MAX_BLOB_BYTES, PeerId, PieceIndex, PieceLayout, PieceSet, PieceTable, SignedPrefix,
};
use hawker_oci::digest::{Algorithm, ChainValue, Digest};

const MAGIC: &[u8; 6] = b"hawker";
/// Readers refuse another major version. 2: blobs up to 256 MiB are cut into more pieces than in 1; 3: those up to 128 MiB once more,
/// and those of 1 to 2 GiB; 4: without an id of the run that noted the pieces.
const MAJOR: u8 = 4;
/// Grows with additions that older readers can ignore.
const MINOR: u8 = 0;

const HEADER: u8 = 1;
const PIECE: u8 = 2;
const VALUES: u8 = 3;
const SIGNED: u8 = 4;
// 5 is a media type, in manifest files of older versions.
const BODY: u8 = 6;

/// A record's checksum.
const SUM_BYTES: usize = 4;
/// Kind and length before the payload, checksum after it.
const FRAME_BYTES: usize = 1 + 4 + SUM_BYTES;

/// Values in one record, so that a torn one costs little.
const VALUES_PER_RECORD: usize = 4096;

/// The subject of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// The digest of its task.
    pub(super) digest: Digest,
    /// Size of the blob or manifest.
    pub(super) size_bytes: u64,
}

/// Why a file can't be read at all.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Unreadable {
    #[error("it does not begin with a header")]
    NoHeader,
    #[error("it has format version {0}, this daemon reads version {MAJOR}")]
    Version(u8),
}

/// The content of an index or a table file.
#[derive(Debug)]
pub(super) struct Contents {
    pub(super) header: Header,
    pub(super) held: PieceSet,
    pub(super) table: PieceTable,
    /// How far the file is whole.
    pub(super) whole_bytes: usize,
}

impl Contents {
    /// Whether the table can verify every piece.
    pub(super) fn table_is_full(&self) -> bool {
        self.table.values().len() == self.table.full_count() as usize
    }

    /// Takes out pieces that the table says nothing about: nobody can tell any more whether they are right. Whether there were
    /// any.
    pub(super) fn drop_unverifiable(&mut self) -> bool {
        let verifiable = self.table.verifiable();
        let beyond: Vec<_> = self
            .held
            .iter()
            .filter(|piece| *piece >= verifiable)
            .collect();
        beyond.iter().for_each(|piece| {
            self.held.remove(*piece);
        });
        !beyond.is_empty()
    }
}

/// Reads an index or a table file, as far as it is whole.
pub(super) fn read(raw: &[u8]) -> Result<Contents, Unreadable> {
    let mut records = Records::new(raw);
    let header = read_header(records.next())?;
    let layout = PieceLayout::new(header.size_bytes);
    let mut contents = Contents {
        held: PieceSet::empty(layout.count()),
        table: PieceTable::new(header.digest, layout),
        header,
        whole_bytes: records.offset,
    };
    while let Some((kind, payload)) = records.next() {
        if take_in(&mut contents, kind, payload).is_none() {
            break;
        }
        contents.whole_bytes = records.offset;
    }
    Ok(contents)
}

/// One record's meaning; `None` when it has none, and nothing after it is believed.
fn take_in(contents: &mut Contents, kind: u8, payload: &[u8]) -> Option<()> {
    let mut fields = Fields(payload);
    match kind {
        PIECE => {
            contents.held.insert(fields.u32()?);
        }
        VALUES => {
            let (first, count) = (fields.u32()?, fields.u32()?);
            let algorithm = contents.header.digest.algorithm();
            let raw = fields.take((count as usize).checked_mul(algorithm.len_bytes())?)?;
            let values: Option<Vec<_>> = raw
                .chunks_exact(algorithm.len_bytes())
                .map(|v| ChainValue::from_bytes(algorithm, v))
                .collect();
            contents.table.extend(first, &values?, None).ok()?;
        }
        SIGNED => {
            let signed = read_signed(&mut fields)?;
            let known = contents.table.values().len() as u32;
            contents.table.extend(known, &[], Some(signed)).ok()?;
        }
        _ => {}
    }
    Some(())
}

fn read_header(first: Option<(u8, &[u8])>) -> Result<Header, Unreadable> {
    let Some((HEADER, payload)) = first else {
        return Err(Unreadable::NoHeader);
    };
    let mut fields = Fields(payload);
    if fields.take(MAGIC.len()) != Some(MAGIC) {
        return Err(Unreadable::NoHeader);
    }
    match fields.u8() {
        Some(MAJOR) => {}
        Some(other) => return Err(Unreadable::Version(other)),
        None => return Err(Unreadable::NoHeader),
    }
    read_subject(&mut fields)
        .filter(|h| h.size_bytes <= MAX_BLOB_BYTES)
        .ok_or(Unreadable::NoHeader)
}

fn read_subject(fields: &mut Fields<'_>) -> Option<Header> {
    let _minor = fields.u8()?;
    let algorithm = match fields.u8()? {
        0 => Algorithm::Sha256,
        1 => Algorithm::Sha512,
        _ => return None,
    };
    let digest = Digest::from_bytes(algorithm, fields.take(algorithm.len_bytes())?)?;
    let size_bytes = fields.u64()?;
    Some(Header { digest, size_bytes })
}

fn read_signed(fields: &mut Fields<'_>) -> Option<SignedPrefix> {
    let mut signed = SignedPrefix {
        count: fields.u32()?,
        sealed: fields.u8()? != 0,
        signed_at_s: fields.u64()?,
        issuer: PeerId::from_bytes(fields.take(16)?)?,
        registries: Vec::new(),
        certificate: fields.counted()?.into(),
        signature: fields.counted()?.to_vec(),
    };
    // Earlier versions wrote none.
    while let Some(registry) = fields.counted() {
        signed
            .registries
            .push(String::from_utf8(registry.to_vec()).ok()?);
    }
    Some(signed)
}

/// The header record.
pub(super) fn header(header: &Header) -> Vec<u8> {
    let mut payload = MAGIC.to_vec();
    payload.extend_from_slice(&[MAJOR, MINOR]);
    payload.push(match header.digest.algorithm() {
        Algorithm::Sha256 => 0,
        Algorithm::Sha512 => 1,
    });
    payload.extend_from_slice(header.digest.as_bytes());
    payload.extend_from_slice(&header.size_bytes.to_be_bytes());
    record(HEADER, &payload)
}

/// "This piece is in the file."
pub(super) fn piece(index: PieceIndex) -> Vec<u8> {
    record(PIECE, &index.to_be_bytes())
}

/// The values of a table from `first` on, and its signature if `signed`.
pub(super) fn table(table: &PieceTable, first: usize, signed: bool) -> Vec<u8> {
    let mut out = Vec::new();
    let news = table.values().get(first..).unwrap_or_default();
    for (at, values) in news.chunks(VALUES_PER_RECORD).enumerate() {
        let mut payload = Vec::new();
        payload.extend_from_slice(&((first + at * VALUES_PER_RECORD) as u32).to_be_bytes());
        payload.extend_from_slice(&(values.len() as u32).to_be_bytes());
        values.iter().for_each(|value| value.write_to(&mut payload));
        out.extend(record(VALUES, &payload));
    }
    if let Some(signed) = table.signed().filter(|_| signed) {
        let mut payload = Vec::new();
        payload.extend_from_slice(&signed.count.to_be_bytes());
        payload.push(u8::from(signed.sealed));
        payload.extend_from_slice(&signed.signed_at_s.to_be_bytes());
        payload.extend_from_slice(&signed.issuer.0);
        put_counted(&mut payload, &signed.certificate);
        put_counted(&mut payload, &signed.signature);
        signed
            .registries
            .iter()
            .for_each(|registry| put_counted(&mut payload, registry.as_bytes()));
        out.extend(record(SIGNED, &payload));
    }
    out
}

/// A whole index (or, with no pieces, a table file).
pub(super) fn index(about: &Header, known: &PieceTable, held: &PieceSet) -> Vec<u8> {
    let mut out = header(about);
    out.extend(table(known, 0, true));
    held.iter().for_each(|index| out.extend(piece(index)));
    out
}

/// The parts of a manifest file before the body and behind it: a body may be long, and is not copied.
pub(super) fn manifest(digest: &Digest, body: &[u8]) -> (Vec<u8>, [u8; SUM_BYTES]) {
    let about = Header {
        digest: *digest,
        size_bytes: body.len() as u64,
    };
    let mut before = header(&about);
    let start = before.len();
    before.push(BODY);
    put_length(&mut before, body);
    let sum = crc32(before[start..].iter().chain(body));
    (before, sum.to_be_bytes())
}

/// The digest of a manifest file, and where its body is; `None` when it is not whole. Files of older versions also have the media
/// type that one registry told; it does not count, since it may be wrong and was told of another repository.
pub(super) fn read_manifest(raw: &[u8]) -> Option<(Digest, Range<usize>)> {
    let mut records = Records::new(raw);
    let digest = read_header(records.next()).ok()?.digest;
    let mut body = None;
    while let Some((kind, payload)) = records.next() {
        if kind == BODY {
            let start = payload.as_ptr().addr() - raw.as_ptr().addr();
            body = Some(start..start + payload.len());
        }
    }
    Some((digest, body?))
}

fn record(kind: u8, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(payload.len() + FRAME_BYTES);
    out.push(kind);
    put_counted(&mut out, payload);
    let sum = crc32(&out);
    out.extend_from_slice(&sum.to_be_bytes());
    out
}

fn put_length(out: &mut Vec<u8>, bytes: &[u8]) {
    // Nothing stored is near 4 GiB; a length that were would only fail its checksum.
    out.extend_from_slice(&(bytes.len() as u32).to_be_bytes());
}

fn put_counted(out: &mut Vec<u8>, bytes: &[u8]) {
    put_length(out, bytes);
    out.extend_from_slice(bytes);
}

/// Walks over whole records.
struct Records<'a> {
    raw: &'a [u8],
    offset: usize,
}

impl<'a> Records<'a> {
    const fn new(raw: &'a [u8]) -> Self {
        Self { raw, offset: 0 }
    }

    /// Kind and payload of the next record; `None` at the end, or where the file is torn.
    fn next(&mut self) -> Option<(u8, &'a [u8])> {
        let rest = &self.raw[self.offset..];
        let mut fields = Fields(rest);
        let kind = fields.u8()?;
        let payload = fields.counted()?;
        let sum = fields.u32()?;
        let whole = payload.len() + FRAME_BYTES;
        if crc32(&rest[..whole - SUM_BYTES]) != sum {
            return None;
        }
        self.offset += whole;
        Some((kind, payload))
    }
}

/// Takes fields off the front of a payload.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (field, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(field)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }

    fn u8(&mut self) -> Option<u8> {
        self.array().map(u8::from_be_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// A field with its length, u32, before it.
    fn counted(&mut self) -> Option<&'a [u8]> {
        let len = self.u32()?;
        self.take(len as usize)
    }
}

/// CRC-32 as in ISO 3309 and ITU-T V.42 (reflected polynomial EDB88320).
fn crc32<'a>(bytes: impl IntoIterator<Item = &'a u8>) -> u32 {
    !bytes.into_iter().fold(!0, |sum, byte| {
        sum >> 8 ^ CRC_TABLE[usize::from(sum as u8 ^ byte)]
    })
}

const CRC_TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut at = 0;
    while at < 256 {
        let mut sum = at as u32;
        let mut bit = 0;
        while bit < 8 {
            sum = if sum & 1 == 1 {
                sum >> 1 ^ 0xedb8_8320
            } else {
                sum >> 1
            };
            bit += 1;
        }
        table[at] = sum;
        at += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use hawker_oci::digest::Chain;
    use proptest::prelude::*;

    use super::*;

    fn about(algorithm: Algorithm, size_bytes: u64) -> Header {
        Header {
            digest: Digest::of(algorithm, b"x"),
            size_bytes,
        }
    }

    fn signed(count: u32) -> SignedPrefix {
        SignedPrefix {
            count,
            sealed: true,
            signed_at_s: 1_700_000_000,
            issuer: PeerId([7; 16]),
            registries: vec!["r.example".to_owned()],
            certificate: [1, 2, 3].into(),
            signature: vec![9; 64],
        }
    }

    /// Any values do here: nothing is hashed.
    fn some_table(about: &Header) -> PieceTable {
        let algorithm = about.digest.algorithm();
        let mut table = PieceTable::new(about.digest, PieceLayout::new(about.size_bytes));
        for at in 0..table.full_count() {
            let mut chain = Chain::new(algorithm);
            chain.update(&[at as u8; 128]);
            table.push(chain.value().unwrap());
        }
        table.sign(signed(table.full_count()));
        table
    }

    #[test]
    fn the_checksum_is_the_usual_one() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
        assert_ne!(crc32(&[0; 5]), 0, "a hole of zeros in a file is no record");
    }

    #[test]
    fn what_is_written_is_read() {
        for (algorithm, size) in [
            (Algorithm::Sha256, 9 << 20),
            (Algorithm::Sha512, 3 << 19),
            (Algorithm::Sha256, 0),
        ] {
            let about = about(algorithm, size);
            let table = some_table(&about);
            let mut held = PieceSet::empty(table.layout().count());
            held.insert(1);
            held.insert(3);
            let raw = index(&about, &table, &held);
            let got = read(&raw).unwrap();
            assert_eq!(
                (got.header.clone(), got.held.clone(), got.whole_bytes),
                (about, held, raw.len())
            );
            assert_eq!(
                (got.table.values(), got.table.signed()),
                (table.values(), table.signed())
            );
            assert!(got.table_is_full());
        }
    }

    #[test]
    fn tables_longer_than_a_record_are_read() {
        let about = about(Algorithm::Sha512, 16 << 30);
        let table = some_table(&about);
        assert!(table.values().len() > VALUES_PER_RECORD);
        let got = read(&index(&about, &table, &PieceSet::empty(0))).unwrap();
        assert_eq!(got.table.values(), table.values());
    }

    #[test]
    fn unknown_kinds_are_skipped_and_unknown_versions_refused() {
        let about = about(Algorithm::Sha256, 4 << 20);
        let mut raw = header(&about);
        raw.extend(record(200, b"from the future"));
        raw.extend(piece(2));
        let got = read(&raw).unwrap();
        assert!(got.held.contains(2));
        assert_eq!(got.whole_bytes, raw.len());

        let mut payload = MAGIC.to_vec();
        payload.extend_from_slice(&[MAJOR + 1, 0]);
        assert_eq!(
            read(&record(HEADER, &payload)).unwrap_err(),
            Unreadable::Version(MAJOR + 1)
        );
        assert_eq!(read(&piece(1)).unwrap_err(), Unreadable::NoHeader);
        assert_eq!(read(b"").unwrap_err(), Unreadable::NoHeader);
    }

    #[test]
    fn a_size_no_blob_has_is_refused_before_anything_is_allocated() {
        assert_eq!(
            read(&header(&about(Algorithm::Sha256, u64::MAX))).unwrap_err(),
            Unreadable::NoHeader
        );
    }

    #[test]
    fn manifests_are_read_back() {
        let digest = Digest::of(Algorithm::Sha256, b"{}");
        let (before, after) = manifest(&digest, b"{}");
        let (raw, body) = (
            [&before, &b"{}"[..], &after].concat(),
            before.len()..before.len() + 2,
        );
        assert_eq!(read_manifest(&raw), Some((digest, body)));
        for cut in 0..raw.len() {
            assert_eq!(read_manifest(&raw[..cut]), None);
        }
        let told = record(5, b"text/html");
        let head = header(&Header {
            digest,
            size_bytes: 2,
        })
        .len();
        let old = [&before[..head], &told, &before[head..], b"{}", &after].concat();
        let start = before.len() + told.len();
        assert_eq!(
            read_manifest(&old),
            Some((digest, start..start + 2)),
            "a file of an older version"
        );
    }

    #[test]
    fn an_index_torn_anywhere_gives_a_prefix_of_what_was_noted() {
        let about = about(Algorithm::Sha256, 6 << 20);
        let table = some_table(&about);
        let order = [4, 0, 7, 2, 1];
        let mut raw = header(&about);
        raw.extend(super::table(&table, 0, true));
        let tail_from = raw.len();
        order.iter().for_each(|p| raw.extend(piece(*p)));
        for cut in tail_from..=raw.len() {
            let whole = (cut - tail_from) / piece(0).len();
            let got = read(&raw[..cut]).unwrap();
            let mut want = PieceSet::empty(got.held.count());
            for piece in &order[..whole] {
                want.insert(*piece);
            }
            assert_eq!(got.held, want);
            assert_eq!(got.whole_bytes, tail_from + whole * piece(0).len());
        }
    }

    proptest! {
        #[test]
        fn garbage_is_never_believed_nor_a_reason_to_panic(
            noise in prop::collection::vec(any::<u8>(), 0..200),
            flip in any::<prop::sample::Index>(),
            bit in 0..8u8,
        ) {
            let _ = read(&noise);
            let about = about(Algorithm::Sha256, 3 << 20);
            let table = some_table(&about);
            let mut held = PieceSet::empty(table.layout().count());
            held.insert_range(0..3);
            let mut raw = index(&about, &table, &held);
            let at = flip.index(raw.len());
            raw[at] ^= 1 << bit;
            if let Ok(got) = read(&raw) {
                prop_assert!(got.whole_bytes <= at, "nothing at or after the flipped byte counts");
                prop_assert_eq!(got.header, about);
                prop_assert!(table.values().starts_with(got.table.values()));
            }
        }
    }
}
