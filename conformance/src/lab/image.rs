//! Images to pull: synthetic ones of exact sizes, and real ones made from Debian's packages.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use bytes::Bytes;
use oci_distribution::client::{
    Certificate, CertificateEncoding, ClientConfig, ClientProtocol, Config, ImageLayer,
};
use oci_distribution::secrets::RegistryAuth;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use sha2::{Digest as _, Sha256};

use super::process::run;

const LAYER_TYPE: &str = "application/vnd.oci.image.layer.v1.tar";
const CONFIG_TYPE: &str = "application/vnd.oci.image.config.v1+json";
const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX_TYPE: &str = "application/vnd.oci.image.index.v1+json";
const TAR_BLOCK: usize = 512;

/// A blob of an image.
#[derive(Clone, Debug)]
pub struct Layer {
    /// Its bytes: a tar archive without compression.
    pub data: Bytes,
    /// `sha256:…`
    pub digest: String,
}

impl Layer {
    /// An archive of `size_bytes` (rounded up to what a tar archive can be) with one file of noise. Equal seeds and sizes
    /// give equal bytes, and different seeds different file names, so that layers of one image do not hide each other.
    #[must_use]
    pub fn noise(seed: u64, size_bytes: usize) -> Self {
        let content = size_bytes.saturating_sub(3 * TAR_BLOCK).div_ceil(TAR_BLOCK) * TAR_BLOCK;
        let mut data = vec![0; content + 3 * TAR_BLOCK];
        data[..TAR_BLOCK].copy_from_slice(&tar_header(&format!("noise-{seed:016x}"), content));
        StdRng::seed_from_u64(seed).fill_bytes(&mut data[TAR_BLOCK..TAR_BLOCK + content]);
        Self {
            digest: digest_of(&data),
            data: data.into(),
        }
    }
}

/// A synthetic image.
#[derive(Clone, Debug)]
pub struct Image {
    /// Its layers, the lowest first.
    pub layers: Vec<Layer>,
}

impl Image {
    /// An image with a layer of each of these sizes, all different; equal seeds give equal images.
    #[must_use]
    pub fn noise(seed: u64, layer_sizes_bytes: &[usize]) -> Self {
        let layers = layer_sizes_bytes
            .iter()
            .zip(0..)
            .map(|(size, i)| Layer::noise(seed << 16 | i, *size));
        Self {
            layers: layers.collect(),
        }
    }

    /// Bytes of all layers.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.layers
            .iter()
            .map(|layer| layer.data.len() as u64)
            .sum()
    }

    /// Pushes it to `reference` (`host:port/repository:tag`), from where this is polled: by HTTPS if a CA (PEM) is given, which
    /// is trusted, and otherwise by plain HTTP.
    ///
    /// # Errors
    /// When the registry refuses.
    pub async fn push(
        &self,
        reference: &str,
        auth: &RegistryAuth,
        ca: Option<&Path>,
    ) -> Result<()> {
        // The client wants a TLS provider even where it speaks plain HTTP; another may be installed already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut config = ClientConfig {
            protocol: ClientProtocol::Http,
            ..ClientConfig::default()
        };
        if let Some(ca) = ca {
            let (encoding, data) = (CertificateEncoding::Pem, std::fs::read(ca)?);
            config.protocol = ClientProtocol::Https;
            config.tls_certs_only = vec![Certificate { encoding, data }];
        }
        let client = oci_distribution::Client::new(config);
        let layers: Vec<ImageLayer> = self
            .layers
            .iter()
            .map(|layer| ImageLayer::new(layer.data.clone(), LAYER_TYPE.into(), None))
            .collect();
        let config = Config::new(self.config().into_bytes(), CONFIG_TYPE.into(), None);
        let target = reference
            .parse()
            .with_context(|| format!("the reference {reference}"))?;
        client
            .push(&target, &layers, config, auth, None)
            .await
            .context("pushing an image")?;
        Ok(())
    }

    /// Writes an OCI layout whose `latest` is an index of these images, for different variants of one platform.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub fn write_index(layout: &Path, images: &[Self]) -> Result<()> {
        let blobs = layout.join("blobs/sha256");
        std::fs::create_dir_all(&blobs)?;
        let write = |bytes: &[u8], media_type: &str| -> Result<serde_json::Value> {
            let digest = digest_of(bytes);
            std::fs::write(blobs.join(digest.trim_start_matches("sha256:")), bytes)?;
            Ok(
                serde_json::json!({ "mediaType": media_type, "digest": digest, "size": bytes.len() }),
            )
        };
        let mut manifests = Vec::new();
        for (image, number) in images.iter().zip(1..) {
            let layers: Vec<_> = image
                .layers
                .iter()
                .map(|layer| write(&layer.data, LAYER_TYPE))
                .collect::<Result<_>>()?;
            let config = write(image.config().as_bytes(), CONFIG_TYPE)?;
            let manifest = serde_json::json!(
                { "schemaVersion": 2, "mediaType": MANIFEST_TYPE, "config": config, "layers": layers });
            let mut entry = write(manifest.to_string().as_bytes(), MANIFEST_TYPE)?;
            entry["platform"] = serde_json::json!({ "architecture": "arm", "os": "linux", "variant": format!("v{number}") });
            manifests.push(entry);
        }
        let index = serde_json::json!({ "schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": manifests });
        let mut root = write(index.to_string().as_bytes(), INDEX_TYPE)?;
        root["annotations"] = serde_json::json!({ "org.opencontainers.image.ref.name": "latest" });
        let top = serde_json::json!({ "schemaVersion": 2, "manifests": [root] });
        std::fs::write(layout.join("index.json"), top.to_string())?;
        std::fs::write(
            layout.join("oci-layout"),
            r#"{"imageLayoutVersion":"1.0.0"}"#,
        )?;
        Ok(())
    }

    fn config(&self) -> String {
        let diff_ids: Vec<&str> = self
            .layers
            .iter()
            .map(|layer| layer.digest.as_str())
            .collect();
        let architecture = if cfg!(target_arch = "aarch64") {
            "arm64"
        } else {
            "amd64"
        };
        let rootfs = serde_json::json!({ "type": "layers", "diff_ids": diff_ids });
        serde_json::json!({ "architecture": architecture, "os": "linux", "config": {}, "rootfs": rootfs })
            .to_string()
    }
}

/// The OCI layout of an image made from Debian's packages (`oci:DIR:latest` for skopeo), made once and kept in the cache
/// folder: `small` is a few MB with busybox in it, otherwise it has several layers and more than 200 MB. Both run.
///
/// # Errors
/// When the packages cannot be had.
pub fn packaged_image(small: bool) -> Result<String> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/image.sh");
    let printed = run(Command::new("bash")
        .arg(script)
        .arg(if small { "small" } else { "large" }))?;
    let dir = PathBuf::from(
        printed
            .lines()
            .last()
            .context("image.sh prints the layout's folder last")?,
    );
    Ok(format!("oci:{}:latest", dir.display()))
}

/// `sha256:…` of some bytes.
fn digest_of(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    format!("sha256:{hex}")
}

/// The header of a regular file in a ustar archive (POSIX.1-1988 fields).
fn tar_header(name: &str, size_bytes: usize) -> [u8; TAR_BLOCK] {
    let mut header = [0; TAR_BLOCK];
    let mut put =
        |at: usize, text: &str| header[at..at + text.len()].copy_from_slice(text.as_bytes());
    put(0, name);
    put(100, "0000644\0");
    put(108, "0000000\0");
    put(116, "0000000\0");
    put(124, &format!("{size_bytes:011o}\0"));
    put(136, "00000000000\0");
    put(148, "        ");
    put(156, "0");
    put(257, "ustar\x0000");
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    header
}
