//! The content of a blob: bytes made from a seed as they are needed, a file, or bytes in memory.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use hawker_oci::digest::{Algorithm, Chain, Digest};

/// The bytes of a blob or manifest. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Content {
    source: Source,
    size_bytes: u64,
}

#[derive(Clone, Debug)]
enum Source {
    Generated { seed: u64 },
    File(Arc<File>),
    Bytes(Arc<[u8]>),
}

impl Content {
    /// `size_bytes` pseudo-random bytes that follow from `seed` alone: no memory, no disk, the same on every machine.
    pub const fn generated(seed: u64, size_bytes: u64) -> Self {
        Self {
            source: Source::Generated { seed },
            size_bytes,
        }
    }

    /// The bytes of a file, read as they are asked for.
    ///
    /// # Errors
    /// When the file cannot be opened.
    pub fn file(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let size_bytes = file.metadata()?.len();
        Ok(Self {
            source: Source::File(Arc::new(file)),
            size_bytes,
        })
    }

    /// These bytes.
    pub fn bytes(bytes: impl Into<Arc<[u8]>>) -> Self {
        let bytes = bytes.into();
        Self {
            size_bytes: bytes.len() as u64,
            source: Source::Bytes(bytes),
        }
    }

    /// Length in bytes.
    pub const fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Fills `out` with the bytes from `offset` on; how many there were.
    ///
    /// # Errors
    /// When the file behind it cannot be read.
    pub fn read_at(&self, offset: u64, out: &mut [u8]) -> io::Result<usize> {
        let left = self.size_bytes.saturating_sub(offset);
        let length = usize::try_from(left).map_or(out.len(), |left| left.min(out.len()));
        let out = &mut out[..length];
        match &self.source {
            Source::Generated { seed } => generate(*seed, offset, out),
            Source::File(file) => file.read_exact_at(out, offset)?,
            Source::Bytes(bytes) => {
                let start = usize::try_from(offset)
                    .unwrap_or(usize::MAX)
                    .min(bytes.len());
                out.copy_from_slice(&bytes[start..start + length]);
            }
        }
        Ok(length)
    }

    /// The SHA-256 digest, computed by reading everything once (a GiB takes about a second).
    ///
    /// # Errors
    /// When the file behind it cannot be read.
    pub fn digest(&self) -> io::Result<Digest> {
        self.digest_by(Algorithm::Sha256)
    }

    /// The digest by this algorithm.
    ///
    /// # Errors
    /// When the file behind it cannot be read.
    pub fn digest_by(&self, algorithm: Algorithm) -> io::Result<Digest> {
        let mut chain = Chain::new(algorithm);
        self.for_each_chunk(|chunk| {
            chain.update(chunk);
            Ok(())
        })?;
        Ok(chain.finish())
    }

    /// Writes everything to a file, and gives the digest of it.
    ///
    /// # Errors
    /// When a file cannot be read or written.
    pub fn write_to(&self, path: &Path) -> io::Result<Digest> {
        let file = File::create(path)?;
        let mut chain = Chain::new(Algorithm::Sha256);
        self.for_each_chunk(|chunk| {
            chain.update(chunk);
            io::Write::write_all(&mut &file, chunk)
        })?;
        Ok(chain.finish())
    }

    fn for_each_chunk(&self, mut take: impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
        let mut buffer = vec![0; 256 << 10];
        let mut offset = 0;
        while offset < self.size_bytes {
            let length = self.read_at(offset, &mut buffer)?;
            take(&buffer[..length])?;
            offset += length as u64;
        }
        Ok(())
    }
}

/// SplitMix64 (Steele, Lea and Flood 2014) in counter mode: word `i` needs no other word, so any range can be made alone.
fn generate(seed: u64, offset: u64, out: &mut [u8]) {
    let word = |index: u64| {
        let mut z = seed.wrapping_add((index + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)).to_le_bytes()
    };
    let skip = (offset % 8) as usize;
    let (head, rest) = out.split_at_mut(if skip == 0 {
        0
    } else {
        out.len().min(8 - skip)
    });
    head.copy_from_slice(&word(offset / 8)[skip..skip + head.len()]);
    for (index, chunk) in (offset.div_ceil(8)..).zip(rest.chunks_mut(8)) {
        chunk.copy_from_slice(&word(index)[..chunk.len()]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_range_of_generated_content_equals_that_part_of_the_whole() {
        let content = Content::generated(7, 1000);
        let mut whole = vec![0; 1000];
        assert_eq!(content.read_at(0, &mut whole).unwrap(), 1000);
        for (offset, length) in [
            (0, 1),
            (1, 3),
            (5, 20),
            (8, 8),
            (7, 1),
            (993, 7),
            (990, 100),
            (1000, 5),
        ] {
            let mut part = vec![0; length];
            let got = content.read_at(offset, &mut part).unwrap();
            let end = (offset as usize + length).min(1000);
            assert_eq!(
                part[..got],
                whole[offset as usize..end],
                "{offset}+{length}"
            );
        }
    }

    #[test]
    fn seeds_differ_and_a_file_holds_the_same_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("blob");
        let content = Content::generated(1, 600_001);
        let digest = content.write_to(&path).unwrap();
        assert_eq!(Content::file(&path).unwrap().digest().unwrap(), digest);
        assert_eq!(
            Content::bytes(std::fs::read(&path).unwrap())
                .digest()
                .unwrap(),
            digest
        );
        assert_ne!(Content::generated(2, 600_001).digest().unwrap(), digest);
    }
}
