//! containerd on a host of a lab, with its own root, state, socket and mirrors.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use super::cri;
use super::host::Host;
use super::process::{Process, run};

const READY: Duration = Duration::from_secs(20);

/// A running containerd.
#[derive(Debug)]
pub struct Containerd {
    host: Host,
    dir: PathBuf,
    snapshotter: &'static str,
    process: Process,
}

impl Containerd {
    /// Starts one. Several may run on a host, under different names.
    ///
    /// # Errors
    /// When it does not come up; the error has the end of its log.
    pub fn start(host: &Host, name: &str) -> Result<Self> {
        Self::start_with(host, name, false, None)
    }

    /// Starts one whose images lie in the proxy plugin that listens at `socket`.
    ///
    /// # Errors
    /// As [`Containerd::start`].
    pub fn start_with_snapshotter(host: &Host, name: &str, socket: &Path) -> Result<Self> {
        Self::start_with(host, name, true, Some(socket))
    }

    /// Starts one that kubelets could talk to; see [`Containerd::pull_as_kubelet`].
    ///
    /// # Errors
    /// As [`Containerd::start`].
    pub fn start_for_kubelet(host: &Host, name: &str) -> Result<Self> {
        Self::start_with(host, name, true, None)
    }

    fn start_with(host: &Host, name: &str, kubelet: bool, plugin: Option<&Path>) -> Result<Self> {
        let dir = host.dir().join(name);
        fs::create_dir_all(dir.join("certs.d"))?;
        let snapshotter = match plugin {
            Some(_) => "hawker",
            None => snapshotter(&dir)?,
        };
        let config = dir.join("config.toml");
        let mut text = config_text(&dir, snapshotter, kubelet);
        if let Some(socket) = plugin {
            text += &format!(
                "[proxy_plugins.hawker]\n  type = \"snapshot\"\n  address = \"{}\"\n",
                socket.display()
            );
        }
        fs::write(&config, text)?;
        let log = host.dir().join(format!("{name}.log"));
        let process = Process::start(host.command("containerd").arg("--config").arg(&config), log)?;
        let mut containerd = Self {
            host: host.clone(),
            dir,
            snapshotter,
            process,
        };
        let mut probe = containerd.ctr();
        probe.arg("version");
        containerd
            .process
            .wait_ready(READY, || run(&mut probe).is_ok())
            .context("containerd")?;
        Ok(containerd)
    }

    /// Sets the mirrors of `registry` (`host:port`, or `_default` for all), tried in order; `server` is where pulls fall
    /// through to. All are URLs. Read again at each pull.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn mirrors(&self, registry: &str, mirrors: &[String], server: Option<&str>) -> Result<()> {
        let mut text = server
            .map(|url| format!("server = \"{url}\"\n"))
            .unwrap_or_default();
        for mirror in mirrors {
            text += &format!("[host.\"{mirror}\"]\n  capabilities = [\"pull\", \"resolve\"]\n");
        }
        let dir = self.hosts_dir().join(registry);
        fs::create_dir_all(&dir)?;
        fs::write(dir.join("hosts.toml"), text)
            .with_context(|| format!("writing to {}", dir.display()))
    }

    /// Its address.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.dir.join("containerd.sock")
    }

    /// `ctr`, talking to this containerd, on its host.
    #[must_use]
    pub fn ctr(&self) -> Command {
        let mut command = self.host.command("ctr");
        command.arg("--address").arg(self.socket());
        command
    }

    /// The command that pulls and unpacks `reference` through the mirrors.
    #[must_use]
    pub fn pull_command(&self, reference: &str) -> Command {
        let mut command = self.ctr();
        command.args(["images", "pull", "--snapshotter", self.snapshotter]);
        command
            .arg("--hosts-dir")
            .arg(self.hosts_dir())
            .arg(reference);
        command
    }

    /// Pulls and unpacks `reference` through the mirrors. containerd checks every digest.
    ///
    /// # Errors
    /// When the pull fails.
    pub fn pull(&self, reference: &str) -> Result<Duration> {
        let start = Instant::now();
        run(&mut self.pull_command(reference))?;
        Ok(start.elapsed())
    }

    /// Pulls and unpacks `reference` through the mirrors as a kubelet has it pulled, with a pull secret (name and password) if
    /// there is one.
    ///
    /// # Errors
    /// When the pull fails, or this containerd is not for kubelets.
    pub fn pull_as_kubelet(&self, reference: &str, secret: Option<(&str, &str)>) -> Result<()> {
        self.host
            .block_on(cri::pull_image(&self.socket(), reference, secret))?
            .map(drop)
    }

    /// Pulls `reference` through the mirrors without unpacking it: layers may be any bytes. containerd checks every digest.
    ///
    /// # Errors
    /// When that fails.
    pub fn fetch(&self, reference: &str) -> Result<()> {
        run(&mut self.fetch_command(reference)).map(drop)
    }

    /// As [`Containerd::fetch`], with credentials (name and password) for whoever asks for them.
    ///
    /// # Errors
    /// When that fails.
    pub fn fetch_as(&self, (name, password): (&str, &str), reference: &str) -> Result<()> {
        run(self
            .fetch_command(reference)
            .arg("--user")
            .arg(format!("{name}:{password}")))
        .map(drop)
    }

    /// The command of [`Containerd::fetch`].
    #[must_use]
    pub fn fetch_command(&self, reference: &str) -> Command {
        let mut command = self.ctr();
        command
            .args(["content", "fetch", "--hosts-dir"])
            .arg(self.hosts_dir())
            .arg(reference);
        command
    }

    /// Runs a container of a pulled image to its end; gives its standard output.
    ///
    /// # Errors
    /// When it fails.
    pub fn run(&self, reference: &str, args: &[&str]) -> Result<String> {
        let mut command = self.ctr();
        command.args([
            "run",
            "--rm",
            "--net-host",
            "--snapshotter",
            self.snapshotter,
        ]);
        run(command
            .arg(reference)
            .arg(format!("hawker-{}", std::process::id()))
            .args(args))
    }

    /// The size of a blob in its content store, if it is there whole.
    #[must_use]
    pub fn content_bytes(&self, digest: &str) -> Option<u64> {
        let path = self
            .dir
            .join("root/io.containerd.content.v1.content/blobs")
            .join(digest.replace(':', "/"));
        fs::metadata(path).ok().map(|file| file.len())
    }

    /// `hawker doctor`'s flags for this containerd, with a configuration that makes the kubelet's pulls use the same mirrors.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn doctor_flags(&self) -> Result<Vec<String>> {
        let config = self.dir.join("doctor.toml");
        let hosts = self.hosts_dir();
        let text = format!(
            "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\nconfig_path = \"{}\"\n",
            hosts.display()
        );
        fs::write(&config, text)?;
        let path = |path: PathBuf| path.display().to_string();
        Ok(vec![
            "--runtime".into(),
            "containerd".into(),
            "--containerd-config".into(),
            path(config),
            "--containerd-address".into(),
            path(self.socket()),
        ])
    }

    fn hosts_dir(&self) -> PathBuf {
        self.dir.join("certs.d")
    }
}

fn config_text(dir: &Path, snapshotter: &str, kubelet: bool) -> String {
    let dir = dir.display();
    // The runtime interface for kubelets and what other file systems need would only slow the start down.
    let kubelets = if kubelet {
        ""
    } else {
        r#"
  "io.containerd.grpc.v1.cri",
  "io.containerd.cri.v1.images",
  "io.containerd.cri.v1.runtime","#
    };
    format!(
        r#"version = 2
root = "{dir}/root"
state = "{dir}/state"
disabled_plugins = [{kubelets}
  "io.containerd.snapshotter.v1.aufs",
  "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.zfs",
]
[grpc]
  address = "{dir}/containerd.sock"
[ttrpc]
  address = "{dir}/containerd.sock.ttrpc"
[plugins."io.containerd.grpc.v1.cri".containerd]
  snapshotter = "{snapshotter}"
[plugins."io.containerd.grpc.v1.cri".registry]
  config_path = "{dir}/certs.d"
[plugins."io.containerd.grpc.v1.cri".cni]
  conf_dir = "{dir}/cni"
"#
    )
}

/// `overlayfs` where the file system of `dir` can carry it, else `native`.
fn snapshotter(dir: &Path) -> Result<&'static str> {
    let probe = dir.join("probe");
    let part = |name: &str| -> Result<String> {
        let path = probe.join(name);
        fs::create_dir_all(&path)?;
        Ok(path.display().to_string())
    };
    let target = part("merged")?;
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        part("lower")?,
        part("upper")?,
        part("work")?
    );
    let options = std::ffi::CString::new(options)?;
    let carries = mount(
        "overlay",
        target.as_str(),
        "overlay",
        MountFlags::empty(),
        Some(options.as_c_str()),
    )
    .is_ok();
    if carries {
        unmount(target.as_str(), UnmountFlags::empty())?;
    }
    fs::remove_dir_all(&probe)?;
    Ok(if carries { "overlayfs" } else { "native" })
}
