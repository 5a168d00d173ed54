//! Debian's docker-registry as an origin, and what it sent.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};

use super::host::Host;
use super::http::Request;
use super::image::Image;
use super::process::{Process, run};

const READY: Duration = Duration::from_secs(15);
const PORT: u16 = 5000;

/// A running docker-registry, without TLS or authorization.
#[derive(Debug)]
pub struct DockerRegistry {
    host: Host,
    dir: PathBuf,
    process: Process,
}

/// What a registry answered to blob GETs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlobReads {
    /// Requests answered with 200 or 206.
    pub requests: u64,
    /// Bytes of their bodies as sent.
    pub body_bytes: u64,
}

impl DockerRegistry {
    /// Starts one on port 5000 of `host`.
    ///
    /// # Errors
    /// When it does not come up; the error has the end of its log.
    pub fn start(host: &Host) -> Result<Self> {
        let dir = host.dir().join("registry");
        fs::create_dir_all(dir.join("data"))?;
        fs::write(dir.join("config.yml"), config_text(host, &dir.join("data").display().to_string()))?;
        let mut registry = Self { host: host.clone(), process: spawn(host, &dir)?, dir };
        registry.until_ready()?;
        Ok(registry)
    }

    /// `host:port`, as in image references and `ns`.
    #[must_use]
    pub fn authority(&self) -> String {
        self.host.at(PORT).to_string()
    }

    /// The host it runs on.
    #[must_use]
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// kill -9; [`DockerRegistry::restart`] brings it back with its data.
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub fn kill(&mut self) -> Result<()> {
        self.process.kill()
    }

    /// Starts it again after [`DockerRegistry::kill`].
    ///
    /// # Errors
    /// As [`DockerRegistry::start`].
    pub fn restart(&mut self) -> Result<()> {
        self.process = spawn(&self.host, &self.dir)?;
        self.until_ready()
    }

    /// Pushes a synthetic image; gives its reference.
    ///
    /// # Errors
    /// When the registry refuses.
    pub fn push(&self, image: &Image, repository: &str, tag: &str) -> Result<String> {
        let reference = format!("{}/{repository}:{tag}", self.authority());
        self.host.block_on(image.push(&reference))??;
        Ok(reference)
    }

    /// Copies an image from an OCI layout (`oci:DIR:TAG`) by skopeo, digests kept; gives its reference.
    ///
    /// # Errors
    /// When skopeo fails.
    pub fn push_layout(&self, layout: &str, repository: &str, tag: &str) -> Result<String> {
        let reference = format!("{}/{repository}:{tag}", self.authority());
        let mut command: Command = self.host.command("skopeo");
        command.args([
            "--insecure-policy",
            "copy",
            "--quiet",
            "--preserve-digests",
            "--dest-tls-verify=false",
        ]);
        run(command.arg(layout).arg(format!("docker://{reference}")))?;
        Ok(reference)
    }

    /// Its access log so far, a line a request.
    #[must_use]
    pub fn access_log(&self) -> String {
        self.process.log()
    }

    /// What it sent to blob GETs so far: of `digest`, or of all.
    #[must_use]
    pub fn blob_reads(&self, digest: Option<&str>) -> BlobReads {
        let log = self.process.log();
        let reads =
            log.lines().filter_map(blob_read).filter(|(read, _)| digest.is_none_or(|digest| *read == digest));
        reads.fold(BlobReads::default(), |sum, (_, bytes)| BlobReads {
            requests: sum.requests + 1,
            body_bytes: sum.body_bytes + bytes,
        })
    }

    fn until_ready(&mut self) -> Result<()> {
        let (host, request) = (self.host.clone(), Request::get(self.host.at(PORT), "/v2/"));
        let ready = || request.send(&host).is_ok_and(|answer| answer.status == 200);
        self.process.wait_ready(READY, ready).context("docker-registry")
    }
}

fn spawn(host: &Host, dir: &std::path::Path) -> Result<Process> {
    let mut command = host.command("docker-registry");
    Process::start(command.arg("serve").arg(dir.join("config.yml")), host.dir().join("registry.log"))
}

fn config_text(host: &Host, data: &str) -> String {
    format!(
        r#"version: 0.1
log: {{level: error, formatter: text, accesslog: {{disabled: false}}}}
storage: {{filesystem: {{rootdirectory: "{data}"}}, maintenance: {{uploadpurging: {{enabled: false}}}}}}
http: {{addr: "{}", secret: "only for uploads of one process"}}
"#,
        host.at(PORT)
    )
}

/// Digest and bytes of a line of the access log that is a blob GET answered with content:
/// `… "GET /v2/NAME/blobs/DIGEST HTTP/1.1" 200 BYTES …`
fn blob_read(line: &str) -> Option<(&str, u64)> {
    let (_, after_get) = line.split_once("\"GET /v2/")?;
    let (target, after) = after_get.split_once(" HTTP/1.1\" ")?;
    let digest = target.split_once("/blobs/")?.1.split('?').next()?;
    let mut words = after.split(' ');
    let answered = matches!(words.next()?, "200" | "206");
    let bytes = words.next()?.parse().ok()?;
    answered.then_some((digest, bytes))
}

#[cfg(test)]
mod tests {
    use super::blob_read;

    #[test]
    fn only_blob_bodies_count() {
        let line =
            |request: &str| format!("10.77.0.2 - - [23/Nov/2026:06:45:19 +0000] \"{request} \"\" \"curl\"");
        let get = line("GET /v2/a/b/blobs/sha256:ab HTTP/1.1\" 206 95");
        assert_eq!(blob_read(&get), Some(("sha256:ab", 95)));
        for other in [
            "HEAD /v2/a/blobs/sha256:ab HTTP/1.1\" 200 0",
            "GET /v2/a/manifests/latest HTTP/1.1\" 200 95",
            "GET /v2/a/blobs/sha256:ab HTTP/1.1\" 404 95",
            "PUT /v2/a/blobs/uploads/x HTTP/1.1\" 201 0",
        ] {
            assert_eq!(blob_read(&line(other)), None, "{other}");
        }
    }
}
