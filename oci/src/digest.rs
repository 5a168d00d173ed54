//! OCI digests, and the chain of hash states that lets a piece be verified on its own.
//!
//! SHA-256 and SHA-512 are chains (FIPS 180-4, section 6): each block turns one state into the next. The state after
//! a whole number of blocks is a [`ChainValue`]. Running a piece's bytes from the value before it must give the value
//! after it; running the last piece and the padding must give the digest itself.

use std::fmt;
use std::str::FromStr;

use sha2::block_api::{compress256, compress512};

/// Initial state of SHA-256 (FIPS 180-4, 5.3.3).
const INITIAL_256: [u32; 8] = [
    0x6a09_e667,
    0xbb67_ae85,
    0x3c6e_f372,
    0xa54f_f53a,
    0x510e_527f,
    0x9b05_688c,
    0x1f83_d9ab,
    0x5be0_cd19,
];

/// Initial state of SHA-512 (FIPS 180-4, 5.3.5).
const INITIAL_512: [u64; 8] = [
    0x6a09_e667_f3bc_c908,
    0xbb67_ae85_84ca_a73b,
    0x3c6e_f372_fe94_f82b,
    0xa54f_f53a_5f1d_36f1,
    0x510e_527f_ade6_82d1,
    0x9b05_688c_2b3e_6c1f,
    0x1f83_d9ab_fb41_bd6b,
    0x5be0_cd19_137e_2179,
];

/// A digest algorithm of the OCI image spec ("Registered algorithms").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Algorithm {
    /// `sha256`
    Sha256,
    /// `sha512`
    Sha512,
}

impl Algorithm {
    /// The name before the colon.
    pub const fn name(self) -> &'static str {
        match self {
            Algorithm::Sha256 => "sha256",
            Algorithm::Sha512 => "sha512",
        }
    }

    /// Length in bytes of a digest, and of a chaining value.
    pub const fn len_bytes(self) -> usize {
        match self {
            Algorithm::Sha256 => 32,
            Algorithm::Sha512 => 64,
        }
    }

    /// Length in bytes of a block: chaining values exist at multiples of it.
    pub const fn block_bytes(self) -> usize {
        match self {
            Algorithm::Sha256 => 64,
            Algorithm::Sha512 => 128,
        }
    }
}

/// Why a text is no digest. The caller's fault; a retry does not help.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DigestError {
    /// Not `algorithm:hex`.
    #[error("a digest has the form algorithm:hex")]
    Form,
    /// An algorithm other than sha256 and sha512.
    #[error("only sha256 and sha512 digests are supported")]
    Algorithm,
    /// The hex part is not lower-case hex of the algorithm's length.
    #[error(
        "the digest's hex part has the wrong length or characters (lower-case hex is required)"
    )]
    Hex,
}

/// The digest of a blob or manifest, as OCI names content: also the name of its task.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest {
    algorithm: Algorithm,
    bytes: [u8; 64],
}

impl Digest {
    /// A digest from its raw bytes; `None` when the length is not the algorithm's.
    pub fn from_bytes(algorithm: Algorithm, raw: &[u8]) -> Option<Self> {
        let mut bytes = [0; 64];
        if raw.len() != algorithm.len_bytes() {
            return None;
        }
        bytes[..raw.len()].copy_from_slice(raw);
        Some(Self { algorithm, bytes })
    }

    /// The digest of `data`.
    pub fn of(algorithm: Algorithm, data: &[u8]) -> Self {
        let mut chain = Chain::new(algorithm);
        chain.update(data);
        chain.finish()
    }

    /// The algorithm.
    pub const fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// The raw bytes, 32 or 64.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.algorithm.len_bytes()]
    }

    /// The part after the colon.
    pub fn hex(&self) -> String {
        hex(self.as_bytes())
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.algorithm.name(), self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, DigestError> {
        let (name, hex) = text.split_once(':').ok_or(DigestError::Form)?;
        let algorithm = match name {
            "sha256" => Algorithm::Sha256,
            "sha512" => Algorithm::Sha512,
            _ => return Err(DigestError::Algorithm),
        };
        let mut bytes = [0; 64];
        if hex.len() != 2 * algorithm.len_bytes() {
            return Err(DigestError::Hex);
        }
        for (byte, pair) in bytes.iter_mut().zip(hex.as_bytes().chunks_exact(2)) {
            *byte = nibble(pair[0])? << 4 | nibble(pair[1])?;
        }
        Ok(Self { algorithm, bytes })
    }
}

fn nibble(c: u8) -> Result<u8, DigestError> {
    match c {
        b'0'..=b'9' => Ok(c - b'0'),
        b'a'..=b'f' => Ok(c - b'a' + 10),
        _ => Err(DigestError::Hex),
    }
}

/// Lower-case hex.
pub fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    bytes
        .iter()
        .flat_map(|b| {
            [
                DIGITS[usize::from(b >> 4)] as char,
                DIGITS[usize::from(b & 15)] as char,
            ]
        })
        .collect()
}

/// The hash state at a block boundary: an entry of the piece table.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ChainValue(State);

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum State {
    Sha256([u32; 8]),
    Sha512([u64; 8]),
}

impl ChainValue {
    /// The value before the first piece.
    pub const fn initial(algorithm: Algorithm) -> Self {
        match algorithm {
            Algorithm::Sha256 => Self(State::Sha256(INITIAL_256)),
            Algorithm::Sha512 => Self(State::Sha512(INITIAL_512)),
        }
    }

    /// A value from its big-endian bytes (32 or 64); `None` when the length is not the algorithm's.
    pub fn from_bytes(algorithm: Algorithm, raw: &[u8]) -> Option<Self> {
        if raw.len() != algorithm.len_bytes() {
            return None;
        }
        Some(Self(match algorithm {
            Algorithm::Sha256 => {
                let mut state = [0; 8];
                for (word, b) in state.iter_mut().zip(raw.as_chunks().0) {
                    *word = u32::from_be_bytes(*b);
                }
                State::Sha256(state)
            }
            Algorithm::Sha512 => {
                let mut state = [0; 8];
                for (word, b) in state.iter_mut().zip(raw.as_chunks().0) {
                    *word = u64::from_be_bytes(*b);
                }
                State::Sha512(state)
            }
        }))
    }

    /// Appends the value's big-endian bytes.
    pub fn write_to(&self, out: &mut Vec<u8>) {
        match &self.0 {
            State::Sha256(state) => state
                .iter()
                .for_each(|w| out.extend_from_slice(&w.to_be_bytes())),
            State::Sha512(state) => state
                .iter()
                .for_each(|w| out.extend_from_slice(&w.to_be_bytes())),
        }
    }
}

impl fmt::Debug for ChainValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut raw = Vec::with_capacity(64);
        self.write_to(&mut raw);
        write!(f, "ChainValue({})", hex(&raw[..8]))
    }
}

/// A running hash that can start from any chaining value and show the value at any block boundary.
#[derive(Clone)]
pub struct Chain {
    state: State,
    /// Bytes of a block that is not complete yet.
    pending: [u8; 128],
    pending_bytes: usize,
    total_bytes: u64,
}

impl Chain {
    /// A hash of data from its first byte.
    pub const fn new(algorithm: Algorithm) -> Self {
        Self::resume(ChainValue::initial(algorithm), 0)
    }

    /// A hash that goes on after `bytes_before` bytes, a multiple of the block length, whose value was `value`.
    pub const fn resume(value: ChainValue, bytes_before: u64) -> Self {
        Self {
            state: value.0,
            pending: [0; 128],
            pending_bytes: 0,
            total_bytes: bytes_before,
        }
    }

    /// Takes in more data.
    pub fn update(&mut self, mut data: &[u8]) {
        let block = self.block_bytes();
        self.total_bytes += data.len() as u64;
        if self.pending_bytes > 0 {
            let take = data.len().min(block - self.pending_bytes);
            self.pending[self.pending_bytes..self.pending_bytes + take]
                .copy_from_slice(&data[..take]);
            self.pending_bytes += take;
            data = &data[take..];
            if self.pending_bytes < block {
                return;
            }
            let full = self.pending;
            self.compress(&full[..block]);
            self.pending_bytes = 0;
        }
        let whole = data.len() - data.len() % block;
        self.compress(&data[..whole]);
        let rest = &data[whole..];
        self.pending[..rest.len()].copy_from_slice(rest);
        self.pending_bytes = rest.len();
    }

    /// Bytes hashed so far, those before a resumed value included.
    pub const fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    /// The value here; `None` inside a block.
    pub fn value(&self) -> Option<ChainValue> {
        (self.pending_bytes == 0).then_some(ChainValue(self.state))
    }

    /// Pads (FIPS 180-4, 5.1) and gives the digest of everything from the first byte.
    pub fn finish(mut self) -> Digest {
        let block = self.block_bytes();
        let length_bytes = block / 8;
        let bits = u128::from(self.total_bytes) * 8;
        let mut tail = [0; 256];
        tail[..self.pending_bytes].copy_from_slice(&self.pending[..self.pending_bytes]);
        tail[self.pending_bytes] = 0x80;
        let end = if self.pending_bytes + 1 + length_bytes <= block {
            block
        } else {
            2 * block
        };
        tail[end - length_bytes..end].copy_from_slice(&bits.to_be_bytes()[16 - length_bytes..]);
        self.compress(&tail[..end]);
        let mut raw = Vec::with_capacity(64);
        ChainValue(self.state).write_to(&mut raw);
        let mut bytes = [0; 64];
        bytes[..raw.len()].copy_from_slice(&raw);
        Digest {
            algorithm: self.algorithm(),
            bytes,
        }
    }

    const fn algorithm(&self) -> Algorithm {
        match self.state {
            State::Sha256(_) => Algorithm::Sha256,
            State::Sha512(_) => Algorithm::Sha512,
        }
    }

    const fn block_bytes(&self) -> usize {
        self.algorithm().block_bytes()
    }

    /// `data` is a whole number of blocks.
    fn compress(&mut self, data: &[u8]) {
        match &mut self.state {
            State::Sha256(state) => compress256(state, data.as_chunks().0),
            State::Sha512(state) => compress512(state, data.as_chunks().0),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use sha2::{Digest as _, Sha256, Sha512};

    use super::*;

    const BOTH: [Algorithm; 2] = [Algorithm::Sha256, Algorithm::Sha512];

    /// The oracle: the whole-digest implementation of `sha2`.
    fn oracle(algorithm: Algorithm, data: &[u8]) -> Vec<u8> {
        match algorithm {
            Algorithm::Sha256 => Sha256::digest(data).to_vec(),
            Algorithm::Sha512 => Sha512::digest(data).to_vec(),
        }
    }

    fn algorithm() -> impl Strategy<Value = Algorithm> {
        prop::sample::select(&BOTH[..])
    }

    #[test]
    fn published_examples() {
        // FIPS 180 examples: no bytes, and "abc".
        let table = [
            (
                Algorithm::Sha256,
                "",
                "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
            ),
            (
                Algorithm::Sha256,
                "abc",
                "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
            ),
            (
                Algorithm::Sha512,
                "abc",
                "ddaf35a193617abacc417349ae20413112e6fa4e89a97ea20a9eeee64b55d39a\
                 2192992a274fc1a836ba3c23a3feebbd454d4423643ce80e2a9ac94fa54ca49f",
            ),
        ];
        for (algorithm, data, expected) in table {
            assert_eq!(
                Digest::of(algorithm, data.as_bytes()).hex(),
                expected,
                "{data}"
            );
        }
    }

    #[test]
    fn every_length_around_the_padding_is_right() {
        let data: Vec<u8> = (0..=255u8).cycle().take(600).collect();
        for algorithm in BOTH {
            for length in 0..data.len() {
                let digest = Digest::of(algorithm, &data[..length]);
                assert_eq!(
                    digest.as_bytes(),
                    oracle(algorithm, &data[..length]),
                    "{algorithm:?} {length}"
                );
            }
        }
    }

    #[test]
    fn a_digest_has_one_spelling() {
        let hex_256 = "0123456789abcdef".repeat(4);
        let hex_512 = "0123456789abcdef".repeat(8);
        let table = [
            (format!("sha256:{hex_256}"), Ok(())),
            (format!("sha512:{hex_512}"), Ok(())),
            (String::new(), Err(DigestError::Form)),
            ("sha256".to_owned(), Err(DigestError::Form)),
            (hex_256.clone(), Err(DigestError::Form)),
            (format!("md5:{hex_256}"), Err(DigestError::Algorithm)),
            (format!("SHA256:{hex_256}"), Err(DigestError::Algorithm)),
            (format!(" sha256:{hex_256}"), Err(DigestError::Algorithm)),
            (format!(":{hex_256}"), Err(DigestError::Algorithm)),
            ("sha256:".to_owned(), Err(DigestError::Hex)),
            (
                format!("sha256:{}", hex_256.to_uppercase()),
                Err(DigestError::Hex),
            ),
            (format!("sha256:{}", &hex_256[1..]), Err(DigestError::Hex)),
            (format!("sha256:{hex_256}0"), Err(DigestError::Hex)),
            (format!("sha256:{hex_512}"), Err(DigestError::Hex)),
            (format!("sha512:{hex_256}"), Err(DigestError::Hex)),
            (format!("sha256:{}g", &hex_256[1..]), Err(DigestError::Hex)),
            (format!("sha256:{} ", &hex_256[1..]), Err(DigestError::Hex)),
            (format!("sha256:{}", "é".repeat(32)), Err(DigestError::Hex)),
        ];
        for (text, expected) in table {
            assert_eq!(
                text.parse::<Digest>()
                    .map(|digest| assert_eq!(digest.to_string(), text)),
                expected,
                "{text}"
            );
        }
    }

    #[test]
    fn a_value_exists_at_block_boundaries_only() {
        for algorithm in BOTH {
            let mut chain = Chain::new(algorithm);
            for length in 1..=3 * algorithm.block_bytes() {
                chain.update(&[7]);
                assert_eq!(chain.total_bytes(), length as u64);
                assert_eq!(
                    chain.value().is_some(),
                    length % algorithm.block_bytes() == 0,
                    "{algorithm:?} {length}"
                );
            }
        }
    }

    #[test]
    fn the_value_before_any_byte_is_the_initial_one() {
        for algorithm in BOTH {
            assert_eq!(
                Chain::new(algorithm).value(),
                Some(ChainValue::initial(algorithm))
            );
        }
    }

    proptest! {
        #[test]
        fn however_the_bytes_come_the_digest_is_the_same(
            algorithm in algorithm(),
            parts in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..400), 0..8),
        ) {
            let mut chain = Chain::new(algorithm);
            parts.iter().for_each(|part| chain.update(part));
            let whole = parts.concat();
            prop_assert_eq!(chain.total_bytes(), whole.len() as u64);
            let digest = chain.finish();
            prop_assert_eq!(digest.as_bytes(), oracle(algorithm, &whole));
        }

        #[test]
        fn a_hash_goes_on_from_any_value_on_its_way(
            algorithm in algorithm(),
            data in prop::collection::vec(any::<u8>(), 0..1500),
            blocks in 0..12usize,
        ) {
            let cut = (blocks * algorithm.block_bytes()).min(data.len() - data.len() % algorithm.block_bytes());
            let mut before = Chain::new(algorithm);
            before.update(&data[..cut]);
            // The value makes its way through bytes, as it does between peers.
            let mut raw = Vec::new();
            before.value().unwrap().write_to(&mut raw);
            prop_assert_eq!(raw.len(), algorithm.len_bytes());
            let value = ChainValue::from_bytes(algorithm, &raw).unwrap();
            prop_assert_eq!(Some(value), before.value());
            let mut after = Chain::resume(value, cut as u64);
            after.update(&data[cut..]);
            let digest = after.finish();
            prop_assert_eq!(digest.as_bytes(), oracle(algorithm, &data));
        }

        #[test]
        fn digests_survive_text_and_bytes(algorithm in algorithm(), data in any::<[u8; 8]>()) {
            let digest = Digest::of(algorithm, &data);
            prop_assert_eq!(digest.to_string().parse(), Ok(digest));
            prop_assert_eq!(Digest::from_bytes(algorithm, digest.as_bytes()), Some(digest));
        }

        #[test]
        fn raw_bytes_of_another_length_are_neither_digest_nor_value(
            algorithm in algorithm(), raw in prop::collection::vec(any::<u8>(), 0..100),
        ) {
            let right = raw.len() == algorithm.len_bytes();
            prop_assert_eq!(Digest::from_bytes(algorithm, &raw).is_some(), right);
            prop_assert_eq!(ChainValue::from_bytes(algorithm, &raw).is_some(), right);
        }

        #[test]
        fn no_text_makes_it_panic(text in "(sha256:|sha512:)?([0-9a-f]{0,130}|\\PC{0,40})") {
            if let Ok(digest) = text.parse::<Digest>() {
                prop_assert_eq!(digest.to_string(), text);
            }
        }
    }
}
