//! The stage of all benches: a lab, an origin on a host of its own, fresh blobs, and Hawkers around it.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use hawker_conformance::lab::{Cluster, ClusterPlan, Hawker, Host, Lab, Mbit};
use hawker_conformance::origin::{Blob, Content, Origin, OriginConfig};

use crate::measure::GIB;

pub(crate) const REPOSITORY: &str = "bench/image";
const ORIGIN_PORT: u16 = 5000;
/// How long a commit may take after the last byte.
const COMMIT: Duration = Duration::from_secs(30);

pub(crate) struct Stage {
    /// Dropped before the lab that it lives in.
    pub(crate) origin: Origin,
    pub(crate) origin_host: Host,
    link: Option<Mbit>,
    blobs_made: u64,
    pub(crate) lab: Lab,
}

impl Stage {
    /// An origin whose link, and later every member's, has this rate; `disk_gib` is what the bench will write.
    pub(crate) fn new(link: Option<Mbit>, disk_gib: u64) -> Result<Self> {
        let lab = Lab::heavy()?;
        ensure_space(lab.dir(), disk_gib)?;
        let origin_host = lab.host("origin")?;
        if let Some(rate) = link {
            origin_host.shape(rate, rate)?;
        }
        let config = OriginConfig::http(origin_host.at(ORIGIN_PORT));
        let origin = origin_host.enter(|| Origin::start(config))??;
        Ok(Self {
            origin,
            origin_host,
            link,
            blobs_made: 0,
            lab,
        })
    }

    /// Another host of the lab, with the stage's link.
    pub(crate) fn host(&self, name: &str) -> Result<Host> {
        let host = self.lab.host(name)?;
        if let Some(rate) = self.link {
            host.shape(rate, rate)?;
        }
        Ok(host)
    }

    /// `hawker up` and this many nodes, all connected.
    pub(crate) fn cluster(&self, nodes: usize) -> Result<Cluster> {
        self.cluster_of(ClusterPlan {
            nodes,
            ..ClusterPlan::default()
        })
    }

    /// The same with a scheduler that is not the seed's process.
    pub(crate) fn cluster_and_scheduler(&self, nodes: usize) -> Result<Cluster> {
        self.cluster_of(ClusterPlan {
            nodes,
            scheduler_apart: true,
            ..ClusterPlan::default()
        })
    }

    /// A cluster as planned, with the stage's link and origin.
    pub(crate) fn cluster_of(&self, plan: ClusterPlan) -> Result<Cluster> {
        let plain_registries = vec![self.registry()];
        Cluster::start(
            &self.lab,
            &ClusterPlan {
                link: self.link,
                plain_registries,
                ..plan
            },
        )
    }

    /// The origin as members name it: `host:port`.
    pub(crate) fn registry(&self) -> String {
        self.origin.address().to_string()
    }

    /// A blob of content that nobody has seen, at the origin.
    pub(crate) fn fresh_blob(&mut self, size_bytes: u64) -> Result<Blob> {
        let content = self.fresh_content(size_bytes);
        Ok(self.origin.add_blob(REPOSITORY, content)?)
    }

    /// Content that no blob has.
    pub(crate) const fn fresh_content(&mut self, size_bytes: u64) -> Content {
        self.blobs_made += 1;
        Content::generated(self.blobs_made, size_bytes)
    }

    /// The blob straight from the origin.
    pub(crate) fn origin_url(&self, blob: &Blob) -> String {
        format!("http://{}{}", self.registry(), blob_path(blob))
    }

    /// The target that a runtime requests at its node's mirror.
    pub(crate) fn mirror_target(&self, blob: &Blob) -> String {
        format!(
            "{}?ns={}",
            blob_path(blob),
            self.registry().replace(':', "%3A")
        )
    }
}

/// The blob's path at registries.
pub(crate) fn blob_path(blob: &Blob) -> String {
    format!("/v2/{REPOSITORY}/blobs/{}", blob.digest)
}

/// Part of a disk that stays free: stores evict from 90 % by default (`--cache-high`), which here is what the bench just pulled.
const LEFT_FREE_PERCENT: u64 = 15;

fn ensure_space(dir: &Path, needed_gib: u64) -> Result<()> {
    let disk = rustix::fs::statvfs(dir)?;
    let free_gib = disk.f_bavail * disk.f_frsize / GIB;
    let left_gib = disk.f_blocks * disk.f_frsize * LEFT_FREE_PERCENT / 100 / GIB;
    ensure!(
        free_gib > needed_gib + left_gib,
        "{} has {free_gib} GiB free and this bench needs {needed_gib} beside {left_gib} that stay free, as stores evict from 90 %: free some, or \
         set TMPDIR to another disk",
        dir.display()
    );
    Ok(())
}

/// Waits until a daemon has committed a blob; the file it keeps it in.
pub(crate) fn committed(hawker: &Hawker, blob: &Blob) -> Result<PathBuf> {
    let deadline = Instant::now() + COMMIT;
    loop {
        if let Some(file) = find(hawker.data_dir(), &blob.digest.hex()) {
            return Ok(file);
        }
        ensure!(
            Instant::now() < deadline,
            "{} is not in the store after {COMMIT:?}",
            blob.digest
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn find(dir: &Path, name: &str) -> Option<PathBuf> {
    std::fs::read_dir(dir).ok()?.flatten().find_map(|entry| {
        let path = entry.path();
        if path.is_dir() {
            find(&path, name)
        } else {
            (entry.file_name() == name).then_some(path)
        }
    })
}
