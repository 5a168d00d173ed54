//! The start of most end-to-end tests: an origin that notes its answers, a cluster, and blobs that nobody has seen.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::Signal;

use crate::lab::{Answer, Cluster, ClusterPlan, End, Hawker, HawkerPlan, Host, Lab, Mbit, Request};
use crate::origin::{Blob, Content, Origin, OriginConfig};

/// The repository that a scene's blobs are in.
pub const REPOSITORY: &str = "team/app";

/// How long a commit may take after a client has the last byte.
const COMMIT: Duration = Duration::from_secs(10);

/// The plan of a scene.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    nodes: usize,
    link: Option<Mbit>,
    scheduler_apart: bool,
    args: Vec<String>,
    disk_mib: Option<u64>,
}

/// An origin, `hawker up`, and nodes. The daemons end before the lab does.
pub struct Scene {
    /// The cluster.
    pub cluster: Cluster,
    /// The origin.
    pub origin: Origin,
    /// The host that the origin is on.
    pub origin_host: Host,
    /// The lab that all is in.
    pub lab: Arc<Lab>,
}

impl Plan {
    /// A seed and this many nodes.
    #[must_use]
    pub fn nodes(nodes: usize) -> Self {
        Self {
            nodes,
            ..Self::default()
        }
    }

    /// With links of this rate in each direction, the origin's too.
    #[must_use]
    pub fn link(mut self, rate: Mbit) -> Self {
        self.link = Some(rate);
        self
    }

    /// With a scheduler that is not the seed's process.
    #[must_use]
    pub fn scheduler_apart(mut self) -> Self {
        self.scheduler_apart = true;
        self
    }

    /// With a small disk of its own for each member, to be filled: see [`Hawker::disk`].
    #[must_use]
    pub const fn disks(mut self, size_mib: u64) -> Self {
        self.disk_mib = Some(size_mib);
        self
    }

    /// With a flag and its value for all members.
    #[must_use]
    pub fn flag(mut self, name: &str, value: &str) -> Self {
        self.args.extend([name.to_owned(), value.to_owned()]);
        self
    }

    /// Sets the scene, plays it, and adds the daemons' logs to the error if there is one.
    ///
    /// # Errors
    /// What `play` says, or that the scene could not be set.
    pub fn play(self, play: impl FnOnce(&mut Scene) -> Result<()>) -> Result<()> {
        let lab = Arc::new(Lab::new()?);
        let origin_host = lab.host("origin")?;
        self.link
            .map_or(Ok(()), |rate| origin_host.shape(rate, rate))?;
        let origin = start_origin(&origin_host)?;
        let plan = ClusterPlan {
            nodes: self.nodes,
            scheduler_apart: self.scheduler_apart,
            link: self.link,
            plain_registries: vec![origin.address().to_string()],
            args: self.args,
            disk_mib: self.disk_mib,
            name_server: None,
        };
        let cluster = lab.explain(Cluster::start(&lab, &plan))?;
        let mut scene = Scene {
            cluster,
            origin,
            origin_host,
            lab,
        };
        let outcome = play(&mut scene);
        scene.lab.explain(outcome)
    }
}

/// An origin by plain HTTP on port 5000 of a host.
///
/// # Errors
/// When it cannot listen there.
pub fn start_origin(host: &Host) -> Result<Origin> {
    host.enter(|| Origin::start(OriginConfig::http(host.at(5000))))?
        .context("starting the origin")
}

/// A lab with an origin, in which the caller starts its daemons. The daemons' logs are shown on failure.
///
/// # Errors
/// Whatever `play` says.
pub fn with_origin(play: impl FnOnce(&Lab, &Origin) -> Result<()>) -> Result<()> {
    let lab = Lab::new()?;
    lab.explain((|| {
        let origin_host = lab.host("origin")?;
        let origin = start_origin(&origin_host)?;
        play(&lab, &origin)
    })())
}

/// A daemon whose settings stand in a file of its own, and change while it runs.
pub struct Configured {
    /// The daemon.
    pub node: Hawker,
    config: PathBuf,
}

impl Configured {
    /// Starts what is planned, with these settings (TOML).
    ///
    /// # Errors
    /// When it does not start.
    pub fn start(plan: HawkerPlan, host: &Host, origin: &Origin, settings: &str) -> Result<Self> {
        let config = host.dir().join("settings.toml");
        std::fs::write(&config, settings)?;
        let plan = plan
            .flag("--config", config.display().to_string())
            .plain_registry(origin.address());
        Ok(Self {
            node: plan.start()?,
            config,
        })
    }

    /// A node in the cluster of this one.
    ///
    /// # Errors
    /// When it does not start.
    pub fn join(&self, lab: &Lab, origin: &Origin, name: &str, settings: &str) -> Result<Self> {
        let host = lab.host(name)?;
        Self::start(
            HawkerPlan::proxy(&host).join_to(&self.node)?,
            &host,
            origin,
            settings,
        )
    }

    /// Other settings from now on.
    ///
    /// # Errors
    /// When the daemon is not there any more.
    pub fn set(&mut self, settings: &str) -> Result<()> {
        std::fs::write(&self.config, settings)?;
        self.node.process()?.signal(Signal::HUP)?;
        // It says nothing to the outside when it has read them.
        std::thread::sleep(Duration::from_millis(300));
        Ok(())
    }
}

impl Scene {
    /// A blob that nobody has seen, at the origin.
    ///
    /// # Errors
    /// Never for content made on the fly.
    pub fn blob(&self, size_bytes: u64) -> Result<Blob> {
        static SEED: AtomicU64 = AtomicU64::new(1);
        let seed = SEED.fetch_add(1, Ordering::Relaxed);
        Ok(self
            .origin
            .add_blob(REPOSITORY, Content::generated(seed, size_bytes))?)
    }

    /// The first node.
    #[must_use]
    pub fn node(&self) -> &Hawker {
        &self.cluster.nodes[0]
    }

    /// The origin as references and `ns` name it.
    #[must_use]
    pub fn registry(&self) -> String {
        self.origin.address().to_string()
    }

    /// The GET of a blob at a node's mirror. The body is hashed and not kept.
    #[must_use]
    pub fn request(&self, node: &Hawker, blob: &Blob) -> Request {
        node.request(self.registry(), &blob_path(blob)).discard()
    }

    /// Gets a blob through a node.
    ///
    /// # Errors
    /// When there is no answer within a minute.
    pub fn get(&self, node: &Hawker, blob: &Blob) -> Result<Answer> {
        self.request(node, blob).send(node.host())
    }

    /// Gets a blob through a node, and the right one.
    ///
    /// # Errors
    /// When it is not.
    pub fn pull(&self, node: &Hawker, blob: &Blob) -> Result<Answer> {
        right(self.get(node, blob)?, blob)
    }

    /// Gets a blob through several nodes at once, and the right one each time.
    ///
    /// # Errors
    /// When one is not.
    pub fn pull_on_all(&self, nodes: &[Hawker], blob: &Blob) -> Result<()> {
        std::thread::scope(|scope| {
            let pulls: Vec<_> = nodes
                .iter()
                .map(|node| scope.spawn(|| self.pull(node, blob)))
                .collect();
            pulls
                .into_iter()
                .try_for_each(|pull| join(pull.join()).map(drop))
        })
    }

    /// How many times the origin sent the blob.
    #[must_use]
    pub fn origin_copies(&self, blob: &Blob) -> f64 {
        self.origin_bytes(blob) as f64 / blob.size_bytes as f64
    }

    /// Body bytes of the blob that the origin sent.
    #[must_use]
    pub fn origin_bytes(&self, blob: &Blob) -> u64 {
        let (log, digest) = (self.origin.log(), blob.digest.to_string());
        log.iter()
            .filter(|entry| entry.target.contains(&digest))
            .map(|entry| entry.body_bytes)
            .sum()
    }
}

/// The path of a blob in a scene's repository.
#[must_use]
pub fn blob_path(blob: &Blob) -> String {
    format!("/v2/{REPOSITORY}/blobs/{}", blob.digest)
}

/// Checks that an answer is the whole blob.
///
/// # Errors
/// When it is not.
pub fn right(answer: Answer, blob: &Blob) -> Result<Answer> {
    ensure!(
        answer.status == 200
            && answer.end == End::Complete
            && answer.digest == blob.digest.to_string(),
        "not the blob: {} {:?}, {} of {} bytes after {:?}, {} for {}{}",
        answer.status,
        answer.end,
        answer.body_bytes,
        blob.size_bytes,
        answer.total,
        answer.digest,
        blob.digest,
        if answer.status >= 400 {
            format!(": {}", answer.text())
        } else {
            String::new()
        }
    );
    Ok(answer)
}

/// Checks that an answer is not passed off as the blob: an error status, or a body that ends short with FIN.
///
/// # Errors
/// When it is complete, or reset.
pub fn withheld(answer: Answer) -> Result<Answer> {
    ensure!(
        answer.status >= 400 && answer.end == End::Complete
            || answer.status == 200 && answer.end == End::Short,
        "not withheld: {} {:?}, {} bytes",
        answer.status,
        answer.end,
        answer.body_bytes
    );
    Ok(answer)
}

/// Waits until a node has committed the blob.
///
/// # Errors
/// When it does not in time.
pub fn until_committed(node: &Hawker, blob: &Blob) -> Result<()> {
    until(COMMIT, "the commit", || {
        Ok(committed_path(node, blob).is_file())
    })
}

/// The file of a committed blob on a node.
#[must_use]
pub fn committed_path(node: &Hawker, blob: &Blob) -> PathBuf {
    let hex = blob.digest.hex();
    node.store_dir()
        .join("blobs")
        .join(blob.digest.algorithm().name())
        .join(&hex[..2])
        .join(hex)
}

/// The file of a partial blob on a node.
#[must_use]
pub fn partial_path(node: &Hawker, blob: &Blob) -> PathBuf {
    let name = format!("{}-{}", blob.digest.algorithm().name(), blob.digest.hex());
    node.store_dir().join("partial").join(name)
}

/// Turns a byte in the middle of a file around, as a failing disk does.
///
/// # Errors
/// When it is not there, or empty.
pub fn rot(path: &std::path::Path) -> Result<()> {
    use std::os::unix::fs::FileExt as _;
    let file = std::fs::File::options().read(true).write(true).open(path)?;
    let middle = file.metadata()?.len() / 2;
    let mut byte = [0];
    file.read_exact_at(&mut byte, middle)?;
    Ok(file.write_all_at(&[!byte[0]], middle)?)
}

/// Waits until something is so.
///
/// # Errors
/// When it is not within that time, or asking fails.
pub fn until(within: Duration, what: &str, mut so: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + within;
    while !so()? {
        if Instant::now() > deadline {
            bail!("waited {within:?} in vain for {what}");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// The outcome of a thread.
///
/// # Errors
/// Its own, or that it panicked.
pub fn join<T>(joined: std::thread::Result<Result<T>>) -> Result<T> {
    joined.map_err(|_| anyhow::anyhow!("a thread panicked"))?
}
