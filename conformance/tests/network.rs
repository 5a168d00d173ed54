//! Networks as they are: IPv6 only, behind NAT, names that move, zones with dear links between them.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use hawker_conformance::lab::{Containerd, Families, Hawker, HawkerPlan, Lab, Mbit, Status};
use hawker_conformance::origin::{Blob, Content};
use hawker_conformance::scene::{self, REPOSITORY, blob_path, right, start_origin};

const SIZE_BYTES: u64 = 6 << 20;

#[test]
fn everything_works_where_there_is_no_ipv4() -> Result<()> {
    let lab = Lab::with_families(Families::Ipv6)?;
    lab.explain((|| {
        let origin_host = lab.host("origin")?;
        let origin = start_origin(&origin_host)?;
        let sizes = [4 << 20, 100_000];
        let layers = sizes.map(|size| Content::generated(size, size));
        origin.add_image(REPOSITORY, "v1", &layers)?;
        // By a name: this containerd takes no reference with an IPv6 address.
        let registry = format!("origin.test=http://{}", origin.address());
        let seed = HawkerPlan::up(&lab.host("seed")?)
            .flag("--registry", &registry)
            .start()?;
        let node = HawkerPlan::proxy(&lab.host("node")?)
            .flag("--registry", &registry)
            .join_to(&seed)?
            .start()?;
        let containerd = Containerd::start(node.host(), "containerd")?;
        // The mirror is where pulls fall through to: in 1.6 an IPv6 address can't be in the name of a table.
        let nowhere = "http://localhost:1".to_owned();
        containerd.mirrors(
            "_default",
            &[nowhere],
            Some(&format!("http://{}", node.mirror())),
        )?;
        containerd.fetch(&format!("origin.test/{REPOSITORY}:v1"))?;
        let bytes = node.status()?.bytes;
        ensure!(
            bytes.received_seeds >= sizes.iter().sum(),
            "it did not come over the seed: {bytes:?}"
        );
        Ok(())
    })())
}

#[test]
fn a_node_behind_nat_serves_peers_at_the_address_it_advertises() -> Result<()> {
    let lab = Lab::new()?;
    lab.explain((|| {
        let origin_host = lab.host("origin")?;
        let origin = start_origin(&origin_host)?;
        let registry = origin.address();
        let scheduler = HawkerPlan::scheduler(&lab.host("scheduler")?).start()?;
        let router = lab.host("router")?;
        let inner = lab.host_behind_nat("inner", &router, 16501, 6501)?;
        let hidden = HawkerPlan::proxy(&inner)
            .plain_registry(registry)
            .flag("--advertise", router.at(16501).to_string())
            .join_to(&scheduler)?
            .start()?;
        let outer = HawkerPlan::proxy(&lab.host("outer")?)
            .plain_registry(registry)
            .join_to(&scheduler)?
            .start()?;
        // A scheduler that has just started waits for those who may be reading already before it elects anybody.
        std::thread::sleep(hawker_core::swarm::WARM_UP + Duration::from_secs(1));
        let blob = origin.add_blob(REPOSITORY, Content::generated(1, SIZE_BYTES))?;
        for node in [&hidden, &outer] {
            right(
                node.request(registry, &blob_path(&blob))
                    .discard()
                    .send(node.host())?,
                &blob,
            )?;
        }
        let bytes = outer.status()?.bytes;
        ensure!(
            bytes.received_peers >= SIZE_BYTES * 9 / 10,
            "nothing came from behind the router: {bytes:?}"
        );
        Ok(())
    })())
}

#[test]
fn a_scheduler_known_by_name_is_found_again_where_the_name_moves() -> Result<()> {
    let lab = Lab::new()?;
    lab.explain((|| {
        let (old, new) = (lab.host("old")?, lab.host("new")?);
        let host = lab.host("node")?;
        let hosts_file = host.dir().join("hosts");
        let point_to = |ip: std::net::IpAddr| {
            std::fs::write(
                &hosts_file,
                format!("127.0.0.1 localhost\n{ip} scheduler.test\n"),
            )
        };
        point_to(old.ip())?;
        // A private /etc/hosts for this daemon alone.
        let bind = format!(
            "mount --bind {} /etc/hosts && exec \"$@\"",
            hosts_file.display()
        );
        let mut scheduler = HawkerPlan::scheduler(&old)
            .flag("--advertise", "scheduler.test:6502")
            .start()?;
        let token = scheduler.token("peer")?;
        let node = HawkerPlan::proxy(&host)
            .wrapped_in(&["unshare", "--mount", "sh", "-c", &bind, "sh"])
            .join("scheduler.test:6502", &token, Default::default())
            .start()?;
        let connected =
            |within| node.wait_status(within, |s| s.schedulers.iter().any(|s| s.connected));
        connected(Duration::from_secs(10))?;

        scheduler.terminate(Duration::from_secs(10))?;
        node.wait_status(Duration::from_secs(15), |s| {
            s.schedulers.iter().all(|s| !s.connected)
        })?;
        // The same authority and scheduler, moved to another machine.
        let moved = HawkerPlan::scheduler(&new)
            .data_dir(scheduler.data_dir())
            .flag("--advertise", "scheduler.test:6502");
        let _moved = moved.start()?;
        point_to(new.ip())?;
        connected(Duration::from_secs(45)).map(drop)
    })())
}

#[test]
fn of_a_blob_that_all_nodes_of_another_zone_pull_at_once_each_piece_comes_there_once() -> Result<()>
{
    scene::with_origin(|lab, origin| {
        let registry = origin.address();
        let slow = |name: &str| {
            let host = lab.host(name)?;
            host.shape(Mbit(100), Mbit(100)).map(|()| host)
        };
        let seed = HawkerPlan::up(&slow("seed")?)
            .plain_registry(registry)
            .flag("--zone", "a")
            .start()?;
        let node = |n| {
            let plan = HawkerPlan::proxy(&slow(&format!("node{n}"))?).plain_registry(registry);
            plan.flag("--zone", "b").join_to(&seed)?.start()
        };
        let nodes: Vec<Hawker> = (1..=4).map(node).collect::<Result<_>>()?;
        for node in &nodes {
            let connected = |status: &Status| status.schedulers.iter().any(|s| s.connected);
            node.wait_status(Duration::from_secs(10), connected)?;
        }
        let pull = |node: &Hawker, blob: &Blob| {
            right(
                node.request(registry, &blob_path(blob))
                    .discard()
                    .send(node.host())?,
                blob,
            )
            .map(drop)
        };
        // While the seed itself still gets it, and when it has all of it.
        let mut first = None;
        for held in [false, true] {
            let before = seed.status()?.bytes.uploaded;
            let blob =
                origin.add_blob(REPOSITORY, Content::generated(u64::from(held), 32 << 20))?;
            if held {
                pull(&seed, &blob)?;
            }
            let start = Instant::now();
            std::thread::scope(|scope| {
                let (pull, blob) = (&pull, &blob);
                let pulls: Vec<_> = nodes
                    .iter()
                    .map(|node| scope.spawn(move || pull(node, blob)))
                    .collect();
                pulls
                    .into_iter()
                    .try_for_each(|pull| scene::join(pull.join()))
            })?;
            let took = start.elapsed();
            let copies = (seed.status()?.bytes.uploaded - before) as f64 / blob.size_bytes as f64;
            ensure!(
                copies <= 1.02,
                "{copies} copies went from one zone to the other (held: {held})"
            );
            // Nobody waits for what nobody offers: not four seconds, after which a node would take all from anywhere.
            let most = *first.get_or_insert(took) + Duration::from_secs(3);
            ensure!(
                took < most,
                "it took {took:.1?}, and {first:.1?} while the seed still got it"
            );
        }
        Ok(())
    })
}
