//! dockerd on a host of a lab, with its own root, socket and mirror.

use std::fs;
use std::path::PathBuf;
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
        let dir = host.dir().join("dockerd");
        fs::create_dir_all(&dir)?;
        let mut command = host.command("dockerd");
        command.arg("--config-file").arg(dir.join("none.json")).arg("--data-root").arg(dir.join("root"));
        fs::write(dir.join("none.json"), "{}")?;
        command.arg("--exec-root").arg(dir.join("exec")).arg("--pidfile").arg(dir.join("pid"));
        command.arg("--containerd").arg(containerd.socket());
        command.arg("--host").arg(format!("unix://{}", dir.join("docker.sock").display()));
        command.args([
            "--bridge",
            "none",
            "--iptables=false",
            "--ip6tables=false",
            "--storage-driver",
            "vfs",
        ]);
        command.args(["--registry-mirror", mirror]);
        let mut process = Process::start(&mut command, host.dir().join("dockerd.log"))?;
        let mut probe = docker(host, &dir);
        probe.arg("version");
        process.wait_ready(READY, || run(&mut probe).is_ok()).context("dockerd")?;
        Ok(Self { host: host.clone(), dir, _process: process })
    }

    /// `docker pull`.
    ///
    /// # Errors
    /// When it fails.
    pub fn pull(&self, reference: &str) -> Result<()> {
        run(docker(&self.host, &self.dir).args(["pull", "--quiet", reference])).map(drop)
    }
}

fn docker(host: &Host, dir: &std::path::Path) -> Command {
    let mut command = host.command("docker");
    command
        .arg("--config")
        .arg(dir)
        .arg("--host")
        .arg(format!("unix://{}", dir.join("docker.sock").display()));
    command
}
