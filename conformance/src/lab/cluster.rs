//! A whole cluster in one call: one `hawker up`, or a scheduler and a seed, and nodes that joined it.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::Result;

use super::Lab;
use super::hawker::{Hawker, HawkerPlan};
use super::host::Mbit;
use super::small_disk::SmallDisk;

/// The plan of a cluster.
#[derive(Clone, Debug, Default)]
pub struct ClusterPlan {
    /// Nodes besides the seed.
    pub nodes: usize,
    /// Scheduler and seed are daemons of their own, so that one can be ended without the other.
    pub scheduler_apart: bool,
    /// The rate of every member's link, in each direction.
    pub link: Option<Mbit>,
    /// Registries (`host:port`) reached by plain HTTP.
    pub plain_registries: Vec<String>,
    /// More arguments for all members.
    pub args: Vec<String>,
    /// Every member has its data folder on a [`SmallDisk`] of this size.
    pub disk_mib: Option<u64>,
    /// The name server that the nodes and the seed ask, in place of this machine's.
    pub name_server: Option<IpAddr>,
}

/// `hawker up` on host `seed` (or `hawker proxy --seed` there and the scheduler on `scheduler`), and `hawker proxy` on `node1`,
/// `node2`, …
#[derive(Debug)]
pub struct Cluster {
    /// The seed; scheduler and authority too where these are not apart.
    pub seed: Hawker,
    /// The nodes.
    pub nodes: Vec<Hawker>,
    /// Scheduler and authority, where they are apart.
    pub scheduler: Option<Hawker>,
}

impl Cluster {
    /// Makes the hosts, starts everything, and waits until each node is connected to the scheduler.
    ///
    /// # Errors
    /// When a daemon does not come up.
    pub fn start(lab: &Lab, plan: &ClusterPlan) -> Result<Self> {
        let host = |name: &str| -> Result<_> {
            let host = lab.host(name)?;
            plan.link.map_or(Ok(()), |rate| host.shape(rate, rate))?;
            if let Some(size_mib) = plan.disk_mib {
                SmallDisk::mount(&host.dir().join("hawker"), size_mib)?;
            }
            Ok(host)
        };
        let scheduler = if plan.scheduler_apart {
            Some(HawkerPlan::scheduler(&host("scheduler")?).start()?)
        } else {
            None
        };
        let seed = match &scheduler {
            Some(scheduler) => plan
                .complete(HawkerPlan::seed(&host("seed")?))?
                .join_to(scheduler)?,
            None => plan.complete(HawkerPlan::up(&host("seed")?))?,
        };
        let seed = seed.start()?;
        let authority = scheduler.as_ref().unwrap_or(&seed);
        let start = |number: usize| -> Result<Hawker> {
            plan.complete(HawkerPlan::proxy(&host(&format!("node{number}"))?))?
                .join_to(authority)?
                .start_unready()
        };
        let unready: Vec<Hawker> = (1..=plan.nodes).map(start).collect::<Result<_>>()?;
        let nodes = unready
            .into_iter()
            .map(Hawker::wait_ready)
            .collect::<Result<Vec<_>>>()?;
        for node in &nodes {
            node.wait_status(Duration::from_secs(10), |status| {
                status.schedulers.iter().any(|s| s.connected)
            })?;
        }
        Ok(Self {
            seed,
            nodes,
            scheduler,
        })
    }

    /// The member that signs certificates and makes tokens.
    #[must_use]
    pub fn authority(&self) -> &Hawker {
        self.scheduler.as_ref().unwrap_or(&self.seed)
    }
}

impl ClusterPlan {
    /// The arguments of each member of the cluster beside its own.
    ///
    /// # Errors
    /// When a file of the host cannot be written.
    pub fn complete(&self, plan: HawkerPlan) -> Result<HawkerPlan> {
        let plan = self
            .plain_registries
            .iter()
            .fold(plan, |plan, registry| plan.plain_registry(registry));
        let plan = self.args.iter().fold(plan, |plan, arg| plan.arg(arg));
        self.name_server
            .map_or(Ok(plan.clone()), |server| plan.asks_names_of(server))
    }
}
