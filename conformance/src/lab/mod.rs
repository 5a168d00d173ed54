//! Several hosts on one machine: each a network namespace with a link of its own to one bridge.
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! use hawker_conformance::lab::{Lab, Mbit};
//! let lab = Lab::new()?;
//! let origin = lab.host("origin")?;
//! origin.shape(Mbit(100), Mbit(100))?;
//! let listener = origin.enter(|| std::net::TcpListener::bind(origin.at(80)))??;
//! let curl = lab.host("node1")?.command("curl").arg(format!("http://{}/", origin.at(80))).spawn()?;
//! # Ok(()) }
//! ```
//!
//! A lab removes everything when it is dropped: processes, namespaces, mounts, files. The remains of a killed run are
//! removed when the next lab starts.

mod certificates;
mod cluster;
mod containerd;
mod containers_tools;
mod cri;
mod dockerd;
mod hawker;
mod host;
mod http;
mod image;
mod object_store;
mod process;
mod registry;
mod small_disk;
mod sweep;
mod token_server;

use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU16, Ordering};

use anyhow::{Context as _, Result, ensure};

pub use certificates::{PrivateCa, ServerCertificate};
pub use cluster::{Cluster, ClusterPlan};
pub use containerd::Containerd;
pub use containers_tools::ContainersTools;
pub use dockerd::Dockerd;
pub use hawker::{Bytes, Hawker, HawkerPlan, Member, Status, TokenFrom, hawker_binary};
pub use host::{Host, LinkCounters, Mbit};
pub use http::{Answer, End, Request};
pub use image::{Image, Layer, packaged_image};
pub use object_store::{ObjectRead, ObjectStore};
pub use process::{Memory, Process, memory_bytes, run};
pub use registry::{BlobReads, DockerRegistry, RegistryPlan};
pub use small_disk::SmallDisk;
pub use token_server::{TokenAsked, TokenServer};

/// Which addresses the hosts of a lab have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Families {
    /// IPv4 and IPv6; [`Host::ip`] is the IPv4 address.
    Both,
    /// IPv6 only, on the loopback as well.
    Ipv6,
}

/// A bridge in a namespace of its own and the hosts attached to it.
#[derive(Debug)]
pub struct Lab {
    name: String,
    dir: PathBuf,
    families: Families,
    next_host: AtomicU16,
    /// Held while a heavy lab lives; see [`Lab::heavy`].
    turn: Option<fs::File>,
}

impl Lab {
    /// An empty lab whose hosts have IPv4 and IPv6 addresses.
    ///
    /// # Errors
    /// When this is not root, or the kernel refuses network namespaces or bridges.
    pub fn new() -> Result<Self> {
        Self::with_families(Families::Both)
    }

    /// An empty lab of the given families. See [`Lab::new`].
    ///
    /// # Errors
    /// As [`Lab::new`].
    pub fn with_families(families: Families) -> Result<Self> {
        static COUNTER: AtomicU16 = AtomicU16::new(0);
        ensure!(
            rustix::process::geteuid().is_root(),
            "a lab makes network namespaces, which needs root"
        );
        sweep::stale_labs();
        let name = format!(
            "hwk{}-{}",
            std::process::id(),
            COUNTER.fetch_add(1, Ordering::Relaxed)
        );
        let dir = sweep::base_dir().join(&name);
        fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
        let lab = Self {
            name,
            dir,
            families,
            next_host: AtomicU16::new(1),
            turn: None,
        };
        host::add_namespace(&lab.bridge())?;
        host::ip(&format!(
            "-n {} link add br0 type bridge forward_delay 0 mcast_snooping 0",
            lab.bridge()
        ))?;
        host::ip(&format!("-n {} link set br0 up", lab.bridge()))?;
        Ok(lab)
    }

    /// As [`Lab::new`], but one at a time on this machine, for work that would make others miss their deadlines.
    ///
    /// # Errors
    /// As [`Lab::new`].
    pub fn heavy() -> Result<Self> {
        let path = sweep::base_dir().join("hawker-conformance.lock");
        let turn =
            fs::File::create(&path).with_context(|| format!("opening {}", path.display()))?;
        turn.lock().context("waiting for the other heavy lab")?;
        let mut lab = Self::new()?;
        lab.turn = Some(turn);
        Ok(lab)
    }

    /// Adds a host. Its name is for people and for file names; it is at most 15 bytes and unique in the lab.
    ///
    /// # Errors
    /// When the namespace or its link cannot be made.
    pub fn host(&self, name: &str) -> Result<Host> {
        ensure!(
            (1..=15).contains(&name.len()),
            "a host's name is also an interface's: 1 to 15 bytes, not {name:?}"
        );
        let number = self.next_host.fetch_add(1, Ordering::Relaxed);
        let [high, low] = number.to_be_bytes();
        let v4 = (self.families == Families::Both).then(|| Ipv4Addr::new(10, 77, high, low));
        let v6 = Ipv6Addr::new(0xfd68, 0x776b, 0, 0, 0, 0, 0, number);
        let dir = self.dir.join(name);
        fs::create_dir(&dir).with_context(|| format!("making {}", dir.display()))?;
        Host::attach(
            name,
            &format!("{}-{name}", self.name),
            &self.bridge(),
            dir,
            v4,
            v6,
        )
    }

    /// Adds a host behind `router`, which translates addresses: it reaches everybody, and is reached only at the router's
    /// TCP port `outside`, which leads to its port `inside`. It has IPv4 only.
    ///
    /// # Errors
    /// When the namespace or the translation cannot be made.
    pub fn host_behind_nat(
        &self,
        name: &str,
        router: &Host,
        outside: u16,
        inside: u16,
    ) -> Result<Host> {
        let dir = self.dir.join(name);
        fs::create_dir(&dir).with_context(|| format!("making {}", dir.display()))?;
        Host::behind_nat(
            name,
            &format!("{}-{name}", self.name),
            router,
            dir,
            [outside, inside],
        )
    }

    /// The folder for the lab's files, removed with it.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The end of each daemon's log, for the report of a test that failed.
    #[must_use]
    pub fn logs(&self) -> String {
        process::tails(&self.dir)
    }

    /// Copies each daemon's log into a folder, under its host's name: the lab's own are removed with it.
    ///
    /// # Errors
    /// When one cannot be copied.
    pub fn copy_logs(&self, to: &Path) -> Result<()> {
        for log in process::logs(&self.dir) {
            let host = log
                .parent()
                .and_then(Path::file_name)
                .unwrap_or_default()
                .to_string_lossy();
            let name = log.file_name().unwrap_or_default().to_string_lossy();
            fs::copy(&log, to.join(format!("{host}-{name}")))
                .with_context(|| format!("copying {}", log.display()))?;
        }
        Ok(())
    }

    /// Adds the daemons' logs to an error.
    ///
    /// # Errors
    /// The outcome's own.
    pub fn explain<T>(&self, outcome: Result<T>) -> Result<T> {
        // The logs come first, so that what failed is read last, next to the test's name.
        outcome.map_err(|error| {
            anyhow::anyhow!(
                "{}
{error:?}",
                self.logs()
            )
        })
    }

    fn bridge(&self) -> String {
        format!("{}-bridge", self.name)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.logs());
        }
        if std::env::var_os("HAWKER_KEEP_LAB").is_some() {
            eprintln!(
                "HAWKER_KEEP_LAB: files and namespaces of {} stay",
                self.name
            );
            return;
        }
        sweep::remove(&self.name, &self.dir);
        // Only now may the next heavy lab start.
        self.turn = None;
    }
}
