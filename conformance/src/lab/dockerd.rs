//! dockerd on a host of a lab, with its own root and socket, and a mirror or a proxy.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};

use super::containerd::Containerd;
use super::host::Host;
use super::process::{Process, run};

const READY: Duration = Duration::from_secs(30);

/// A running dockerd, beside a containerd.
#[derive(Debug)]
pub struct Dockerd {
    host: Host,
    dir: PathBuf,
    _process: Process,
}

impl Dockerd {
    /// Starts one that uses this containerd and asks `mirror` (a URL) for what is Docker Hub's.
    ///
    /// # Errors
    /// When it does not come up; the error has the end of its log.
    pub fn start(host: &Host, containerd: &Containerd, mirror: &str) -> Result<Self> {
        Self::start_with(host, containerd, |command| {
            command.args(["--registry-mirror", mirror])
        })
    }

    /// Starts one that uses this containerd, reaches registries through the proxy at `proxy` alone, and trusts the authority of
    /// the PEM file `ca` alone.
    ///
    /// # Errors
    /// As [`Dockerd::start`].
    pub fn behind(
        host: &Host,
        containerd: &Containerd,
        proxy: SocketAddr,
        ca: &Path,
    ) -> Result<Self> {
        let proxy = format!("http://{proxy}");
        Self::start_with(host, containerd, |command| {
            command
                .env("HTTPS_PROXY", &proxy)
                .env("HTTP_PROXY", &proxy)
                .env("SSL_CERT_FILE", ca)
        })
    }

    fn start_with(
        host: &Host,
        containerd: &Containerd,
        say: impl FnOnce(&mut Command) -> &mut Command,
    ) -> Result<Self> {
        let dir = host.dir().join("dockerd");
        fs::create_dir_all(&dir)?;
        let mut command = host.command("dockerd");
        command
            .arg("--config-file")
            .arg(dir.join("none.json"))
            .arg("--data-root")
            .arg(dir.join("root"));
        fs::write(dir.join("none.json"), "{}")?;
        command
            .arg("--exec-root")
            .arg(dir.join("exec"))
            .arg("--pidfile")
            .arg(dir.join("pid"));
        command.arg("--containerd").arg(containerd.socket());
        command
            .arg("--host")
            .arg(format!("unix://{}", dir.join("docker.sock").display()));
        command.args([
            "--bridge",
            "none",
            "--iptables=false",
            "--ip6tables=false",
            "--storage-driver",
            "vfs",
        ]);
        let mut process = Process::start(say(&mut command), host.dir().join("dockerd.log"))?;
        let mut probe = docker(host, &dir);
        probe.arg("version");
        process
            .wait_ready(READY, || run(&mut probe).is_ok())
            .context("dockerd")?;
        Ok(Self {
            host: host.clone(),
            dir,
            _process: process,
        })
    }

    /// Makes an image of one layer of a tar archive, and pushes it.
    ///
    /// # Errors
    /// When that fails.
    pub fn push(&self, archive: &Path, reference: &str) -> Result<()> {
        run(docker(&self.host, &self.dir)
            .arg("import")
            .arg(archive)
            .arg(reference))?;
        run(docker(&self.host, &self.dir).args(["push", "--quiet", reference])).map(drop)
    }

    /// `docker pull`.
    ///
    /// # Errors
    /// When it fails.
    pub fn pull(&self, reference: &str) -> Result<()> {
        run(docker(&self.host, &self.dir).args(["pull", "--quiet", reference])).map(drop)
    }
}

fn docker(host: &Host, dir: &Path) -> Command {
    let mut command = host.command("docker");
    command
        .arg("--config")
        .arg(dir)
        .arg("--host")
        .arg(format!("unix://{}", dir.join("docker.sock").display()));
    command
}
