//! Debian's docker-registry as an origin, with and without TLS, authorization and redirects, and what it sent.

use std::fs;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use oci_distribution::secrets::RegistryAuth;
use serde_json::{Value, json};

use super::certificates::{PrivateCa, ServerCertificate};
use super::host::Host;
use super::image::Image;
use super::object_store;
use super::process::{Process, run};
use super::token_server::{self, TokenServer};

const READY: Duration = Duration::from_secs(15);
const PORT: u16 = 5000;

/// A docker-registry to be started: on port 5000 of its host, if nothing else is said.
#[derive(Clone, Debug)]
pub struct RegistryPlan {
    host: Host,
    auth: Option<Auth>,
    tls: Option<(ServerCertificate, PathBuf)>,
    redirect: Option<String>,
    port: u16,
}

#[derive(Clone, Debug)]
enum Auth {
    Basic(Vec<(String, String)>),
    Tokens { realm: String, bundle: PathBuf },
}

/// A running docker-registry.
#[derive(Debug)]
pub struct DockerRegistry {
    host: Host,
    port: u16,
    dir: PathBuf,
    ca: Option<PathBuf>,
    process: Process,
}

/// The answers of a registry to blob GETs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlobReads {
    /// Requests answered with 200 or 206.
    pub requests: u64,
    /// Bytes of their bodies as sent.
    pub body_bytes: u64,
}

impl RegistryPlan {
    /// By plain HTTP, open to all.
    #[must_use]
    pub fn on(host: &Host) -> Self {
        Self {
            host: host.clone(),
            auth: None,
            tls: None,
            redirect: None,
            port: PORT,
        }
    }

    /// Only these users (names and passwords) may pull and push, by Basic credentials.
    #[must_use]
    pub fn basic(mut self, users: &[(&str, &str)]) -> Self {
        let users = users
            .iter()
            .map(|&(name, password)| (name.to_owned(), password.to_owned()));
        self.auth = Some(Auth::Basic(users.collect()));
        self
    }

    /// Only bearers of this server's tokens may pull and push.
    #[must_use]
    pub fn tokens(mut self, server: &TokenServer) -> Self {
        self.auth = Some(Auth::Tokens {
            realm: server.realm().into(),
            bundle: server.bundle().into(),
        });
        self
    }

    /// By HTTPS, with a certificate of this CA.
    ///
    /// # Errors
    /// When the certificate cannot be written.
    pub fn tls(mut self, ca: &PrivateCa) -> Result<Self> {
        self.tls = Some((ca.issue(&self.host)?, ca.certificate().to_owned()));
        Ok(self)
    }

    /// By HTTPS on port 443, with a certificate of this CA for `name`: as the registry of that name.
    ///
    /// # Errors
    /// When the certificate cannot be written.
    pub fn known_as(mut self, name: &str, ca: &PrivateCa) -> Result<Self> {
        self.tls = Some((
            ca.issue_for(&self.host, &[name])?,
            ca.certificate().to_owned(),
        ));
        self.port = 443;
        Ok(self)
    }

    /// GETs of blobs are sent to the [`ObjectStore`](super::ObjectStore) that serves [`DockerRegistry::storage`] on `host`.
    #[must_use]
    pub fn redirect_to(mut self, host: &Host) -> Self {
        self.redirect = Some(object_store::base(host));
        self
    }

    /// Starts it.
    ///
    /// # Errors
    /// When it does not come up; the error has the end of its log.
    pub fn start(self) -> Result<DockerRegistry> {
        let dir = self.dir();
        fs::create_dir_all(dir.join("data"))?;
        if let Some(Auth::Basic(users)) = &self.auth {
            let entries: Vec<_> = users.iter().map(htpasswd).collect::<Result<_>>()?;
            fs::write(dir.join("htpasswd"), entries.concat())?;
        }
        // JSON is YAML.
        fs::write(dir.join("config.yml"), self.config().to_string())?;
        let ca = self.tls.map(|(_, ca)| ca);
        let process = spawn(&self.host, &dir)?;
        let mut registry = DockerRegistry {
            host: self.host,
            port: self.port,
            process,
            dir,
            ca,
        };
        registry.until_ready()?;
        Ok(registry)
    }

    fn dir(&self) -> PathBuf {
        self.host.dir().join("registry")
    }

    fn config(&self) -> Value {
        let mut config = json!({
            "version": "0.1",
            "log": { "level": "error", "formatter": "text", "accesslog": { "disabled": false } },
            "storage": {
                "filesystem": { "rootdirectory": self.dir().join("data") },
                "maintenance": { "uploadpurging": { "enabled": false } },
            },
            "http": { "addr": self.host.at(self.port), "secret": "only for uploads of one process" },
        });
        match &self.auth {
            None => {}
            Some(Auth::Basic(_)) => {
                config["auth"] = json!({ "htpasswd": { "realm": "the lab", "path": self.dir().join("htpasswd") } });
            }
            Some(Auth::Tokens { realm, bundle }) => {
                config["auth"] = json!({ "token": {
                    "realm": realm, "rootcertbundle": bundle,
                    "service": token_server::SERVICE, "issuer": token_server::ISSUER,
                } });
            }
        }
        if let Some((server, _)) = &self.tls {
            config["http"]["tls"] = json!({ "certificate": server.certificate, "key": server.key });
        }
        if let Some(base) = &self.redirect {
            config["middleware"] =
                json!({ "storage": [{ "name": "redirect", "options": { "baseurl": base } }] });
        }
        config
    }
}

/// A line of an htpasswd file, by bcrypt: docker-registry takes nothing else.
fn htpasswd((name, password): &(String, String)) -> Result<String> {
    run(Command::new("htpasswd").args(["-nbB", "-C", "4", name, password]))
}

impl DockerRegistry {
    /// Starts one on port 5000 of `host`, without TLS or authorization.
    ///
    /// # Errors
    /// As [`RegistryPlan::start`].
    pub fn start(host: &Host) -> Result<Self> {
        RegistryPlan::on(host).start()
    }

    /// `host:port`, as in image references and `ns`.
    #[must_use]
    pub fn authority(&self) -> String {
        self.host.at(self.port).to_string()
    }

    /// The host it runs on.
    #[must_use]
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// The folder that its blobs are in.
    #[must_use]
    pub fn storage(&self) -> PathBuf {
        self.dir.join("data")
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
        self.push_with(image, repository, tag, &RegistryAuth::Anonymous)
    }

    /// Pushes a synthetic image as a user (name and password); gives its reference.
    ///
    /// # Errors
    /// When the registry refuses.
    pub fn push_as(
        &self,
        (name, password): (&str, &str),
        image: &Image,
        repository: &str,
        tag: &str,
    ) -> Result<String> {
        self.push_with(
            image,
            repository,
            tag,
            &RegistryAuth::Basic(name.into(), password.into()),
        )
    }

    fn push_with(
        &self,
        image: &Image,
        repository: &str,
        tag: &str,
        auth: &RegistryAuth,
    ) -> Result<String> {
        let reference = format!("{}/{repository}:{tag}", self.authority());
        self.host
            .block_on(image.push(&reference, auth, self.ca.as_deref()))??;
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

    /// The bytes that it sent to blob GETs so far: of `digest`, or of all.
    #[must_use]
    pub fn blob_reads(&self, digest: Option<&str>) -> BlobReads {
        let log = self.process.log();
        let reads = log
            .lines()
            .filter_map(blob_read)
            .filter(|(read, _)| digest.is_none_or(|digest| *read == digest));
        reads.fold(BlobReads::default(), |sum, (_, bytes)| BlobReads {
            requests: sum.requests + 1,
            body_bytes: sum.body_bytes + bytes,
        })
    }

    /// An error unless it sent each layer of an image once, all of it.
    ///
    /// # Errors
    /// That one came more or less often.
    pub fn gave_once(&self, image: &Image) -> Result<()> {
        for layer in &image.layers {
            let reads = self.blob_reads(Some(&layer.digest));
            ensure!(
                reads.body_bytes == layer.data.len() as u64,
                "{} was sent in {reads:?}",
                layer.digest
            );
        }
        Ok(())
    }

    /// The requests so far, a line of its access log each.
    #[must_use]
    pub fn requests(&self) -> Vec<String> {
        self.process
            .log()
            .lines()
            .filter(|line| line.contains(" HTTP/1.1\" "))
            .map(str::to_owned)
            .collect()
    }

    fn until_ready(&mut self) -> Result<()> {
        let (host, address) = (self.host.clone(), self.host.at(self.port));
        // It listens last of all.
        let ready = || {
            host.enter(|| TcpStream::connect(address))
                .is_ok_and(|stream| stream.is_ok())
        };
        self.process
            .wait_ready(READY, ready)
            .context("docker-registry")
    }
}

fn spawn(host: &Host, dir: &Path) -> Result<Process> {
    let mut command = host.command("docker-registry");
    Process::start(
        command.arg("serve").arg(dir.join("config.yml")),
        host.dir().join("registry.log"),
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
        let line = |request: &str| {
            format!("10.77.0.2 - - [23/Nov/2026:06:45:19 +0000] \"{request} \"\" \"curl\"")
        };
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
