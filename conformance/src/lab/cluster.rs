//! A whole cluster in one call: one `hawker up` and nodes that joined it.

use std::time::Duration;

use anyhow::Result;

use super::Lab;
use super::hawker::{Hawker, HawkerPlan};
use super::host::Mbit;

/// What a cluster is to be.
#[derive(Clone, Debug, Default)]
pub struct ClusterPlan {
    /// Nodes besides the seed.
    pub nodes: usize,
    /// The rate of every member's link, in each direction.
    pub link: Option<Mbit>,
    /// Registries (`host:port`) reached by plain HTTP.
    pub plain_registries: Vec<String>,
    /// More arguments for all members.
    pub args: Vec<String>,
}

/// `hawker up` on host `seed`, and `hawker proxy` on `node1`, `node2`, …
#[derive(Debug)]
pub struct Cluster {
    /// Scheduler, authority and seed.
    pub seed: Hawker,
    /// The nodes.
    pub nodes: Vec<Hawker>,
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
            Ok(host)
        };
        let seed = plan.complete(HawkerPlan::up(&host("seed")?)).start()?;
        let start = |number: usize| -> Result<Hawker> {
            plan.complete(HawkerPlan::proxy(&host(&format!("node{number}"))?)).join_to(&seed)?.start_unready()
        };
        let unready: Vec<Hawker> = (1..=plan.nodes).map(start).collect::<Result<_>>()?;
        let nodes = unready.into_iter().map(Hawker::wait_ready).collect::<Result<Vec<_>>>()?;
        for node in &nodes {
            node.wait_status(Duration::from_secs(10), |status| {
                status.schedulers.iter().any(|s| s.connected)
            })?;
        }
        Ok(Self { seed, nodes })
    }
}

impl ClusterPlan {
    fn complete(&self, plan: HawkerPlan) -> HawkerPlan {
        let plan = self.plain_registries.iter().fold(plan, |plan, registry| plan.plain_registry(registry));
        self.args.iter().fold(plan, |plan, arg| plan.arg(arg))
    }
}
