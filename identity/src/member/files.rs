//! Keys and certificates on disk: PEM, written whole or not at all, keys for the owner's eyes only.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use super::{IdentityError, unusable};

/// No key or certificate is longer.
const FILE_AT_MOST_BYTES: u64 = 1 << 20;

/// A whole file, as far as it can be a key or certificate.
pub fn read(path: &Path) -> Result<Vec<u8>, IdentityError> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(FILE_AT_MOST_BYTES).read_to_end(&mut bytes))
        .map_err(|source| failed(path, source))?;
    Ok(bytes)
}

/// The same; `None` when there is none.
pub fn read_if_there(path: &Path) -> Result<Option<Vec<u8>>, IdentityError> {
    match read(path) {
        Err(IdentityError::File { source, .. }) if source.kind() == ErrorKind::NotFound => Ok(None),
        other => other.map(Some),
    }
}

/// Write, fsync, rename, fsync of the folder. Mode 0600 from the file's first moment; the folder is made, mode 0700.
pub fn write(path: &Path, bytes: &[u8]) -> Result<(), IdentityError> {
    replace(path, bytes).map_err(|source| failed(path, source))
}

fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let dir = path.parent().unwrap_or(Path::new("."));
    if !dir.is_dir() {
        use std::os::unix::fs::DirBuilderExt;
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)?;
    }
    let new = path.with_extension("new");
    // A leftover of a crash may have any mode.
    match fs::remove_file(&new) {
        Err(e) if e.kind() != ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&new)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    File::open(dir)?.sync_all()
}

/// The first certificate of a PEM file.
pub fn certificate(pem: &[u8]) -> Result<CertificateDer<'static>, IdentityError> {
    CertificateDer::from_pem_slice(pem)
        .map_err(|e| unusable(format!("no certificate in PEM form: {e:?}")))
}

/// A certificate as a PEM file.
pub fn certificate_pem(certificate: &CertificateDer<'_>) -> Vec<u8> {
    let pem = pem::Pem::new("CERTIFICATE", certificate.to_vec());
    pem::encode_config(
        &pem,
        pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF),
    )
    .into_bytes()
}

fn failed(path: &Path, source: io::Error) -> IdentityError {
    IdentityError::File {
        path: path.display().to_string(),
        source,
    }
}
