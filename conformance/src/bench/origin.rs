//! `hawker-bench origin`: the fault-injecting origin as a process of its own, to be told what to hold and what to do wrong
//! through its control port.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use clap::Args;
use hawker_conformance::origin::{Content, Origin, OriginConfig};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

#[derive(Args)]
pub(crate) struct OriginArgs {
    /// The address for registry clients
    #[arg(long, default_value = "127.0.0.1:5000", value_name = "ADDR")]
    listen: SocketAddr,
    /// The address of the control port
    #[arg(long, default_value = "127.0.0.1:5001", value_name = "ADDR")]
    control: SocketAddr,
    /// Serve HTTPS with this certificate chain (PEM)
    #[arg(long, value_name = "FILE", requires = "key")]
    certificate: Option<PathBuf>,
    /// The certificate's key (PEM)
    #[arg(long, value_name = "FILE", requires = "certificate")]
    key: Option<PathBuf>,
    /// The repository of the blobs below
    #[arg(long, default_value = "test/image", value_name = "NAME")]
    repository: String,
    /// Serve a blob of bytes generated from a seed
    #[arg(long, value_name = "SEED:SIZE_BYTES", value_parser = generated)]
    blob: Vec<Content>,
    /// Serve a file as a blob
    #[arg(long, value_name = "FILE")]
    file: Vec<PathBuf>,
}

fn generated(text: &str) -> Result<Content, String> {
    let parse = || {
        let (seed, size) = text.split_once(':')?;
        Some(Content::generated(seed.parse().ok()?, size.parse().ok()?))
    };
    parse().ok_or_else(|| "two numbers: SEED:SIZE_BYTES".to_owned())
}

/// Serves until the process is ended; prints each blob's path.
pub(crate) fn run(args: &OriginArgs) -> Result<()> {
    let tls = match (&args.certificate, &args.key) {
        (Some(certificate), Some(key)) => Some(Arc::new(tls(certificate, key)?)),
        _ => None,
    };
    let origin = Origin::start(OriginConfig {
        control: Some(args.control),
        tls,
        ..OriginConfig::http(args.listen)
    })?;
    let files = args
        .file
        .iter()
        .map(|file| Content::file(file).with_context(|| format!("opening {}", file.display())));
    for content in args.blob.iter().cloned().map(Ok).chain(files) {
        let blob = origin.add_blob(&args.repository, content?)?;
        println!(
            "/v2/{}/blobs/{} {}",
            args.repository, blob.digest, blob.size_bytes
        );
    }
    println!(
        "listening on {}, control port {}",
        origin.address(),
        args.control
    );
    loop {
        std::thread::park();
    }
}

fn tls(certificate: &PathBuf, key: &PathBuf) -> Result<rustls::ServerConfig> {
    let unreadable = |path: &PathBuf| format!("reading {}", path.display());
    let chain = CertificateDer::pem_file_iter(certificate).and_then(Iterator::collect);
    let chain = chain.with_context(|| unreadable(certificate))?;
    let key = PrivateKeyDer::from_pem_file(key).with_context(|| unreadable(key))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?;
    Ok(builder.with_no_client_auth().with_single_cert(chain, key)?)
}
