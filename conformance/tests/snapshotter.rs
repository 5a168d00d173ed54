//! containerd with `hawker snapshotter` as its proxy plugin: pulls through Hawker, containers, removal, crashes.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use hawker_conformance::lab::{
    Cluster, ClusterPlan, Containerd, DockerRegistry, Host, Lab, Process, SmallDisk, hawker_binary,
    packaged_image, run,
};

const READY: Duration = Duration::from_secs(10);

/// A running `hawker snapshotter`.
struct Snapshotter {
    process: Process,
    host: Host,
    root: PathBuf,
    socket: PathBuf,
}

impl Snapshotter {
    fn start(host: &Host, root: PathBuf) -> Result<Self> {
        let socket = host.dir().join("snapshotter.sock");
        let process = Self::process(host, &root, &socket)?;
        Ok(Self {
            process,
            host: host.clone(),
            root,
            socket,
        })
    }

    fn process(host: &Host, root: &Path, socket: &Path) -> Result<Process> {
        let mut command = host.command(hawker_binary()?);
        command.args(["snapshotter", "--log-level", "debug", "--root"]);
        command.arg(root).arg("--socket").arg(socket);
        let mut process = Process::start(&mut command, host.dir().join("snapshotter.log"))?;
        process
            .wait_ready(READY, || {
                std::os::unix::net::UnixStream::connect(socket).is_ok()
            })
            .context("snapshotter")?;
        Ok(process)
    }

    /// kill -9, then a new process.
    fn crash(&mut self) -> Result<()> {
        self.process.kill()?;
        self.process = Self::process(&self.host, &self.root, &self.socket)?;
        Ok(())
    }

    fn entries(&self, folder: &str) -> Result<usize> {
        Ok(std::fs::read_dir(self.root.join(folder))?.count())
    }
}

/// `ctr snapshots` of this snapshotter.
fn snapshots(containerd: &Containerd, arguments: &[&str]) -> Result<String> {
    let mut command = containerd.ctr();
    command.args(["snapshots", "--snapshotter", "hawker"]);
    run(command.args(arguments))
}

#[test]
fn an_image_pulled_through_hawker_runs_survives_crashes_and_goes_away_whole() -> Result<()> {
    let lab = Lab::new()?;
    lab.explain((|| {
        let registry = DockerRegistry::start(&lab.host("origin")?)?;
        let plan = ClusterPlan {
            nodes: 1,
            plain_registries: vec![registry.authority()],
            ..ClusterPlan::default()
        };
        let cluster = Cluster::start(&lab, &plan)?;
        let node = &cluster.nodes[0];
        let reference = registry.push_layout(&packaged_image(true)?, "debian/small", "latest")?;
        let host = node.host();
        let mut snapshotter = Snapshotter::start(host, host.dir().join("snapshots"))?;
        let containerd =
            Containerd::start_with_snapshotter(host, "containerd", &snapshotter.socket)?;
        containerd.mirrors("_default", &[format!("http://{}", node.mirror())], None)?;
        containerd.pull(&reference)?;
        let layers = snapshotter.entries("records")?;
        ensure!(layers > 0, "the image lies in another snapshotter");

        // Two containers of one image, one of which runs over a crash of the snapshotter.
        let first = std::thread::scope(|scope| {
            let long = scope.spawn(|| {
                let script = "echo mine > /mark; sleep 3; cat /mark; ls / | wc -l";
                containerd.run(&reference, &["/bin/sh", "-c", script])
            });
            std::thread::sleep(Duration::from_secs(1));
            snapshotter.crash()?;
            long.join()
                .map_err(|_| anyhow::anyhow!("the thread of the first container ended"))?
        })?;
        ensure!(first.starts_with("mine"), "{first}");
        let second = containerd.run(
            &reference,
            &["/bin/sh", "-c", "test ! -e /mark && echo fresh"],
        )?;
        ensure!(second.trim() == "fresh", "{second}");

        // A kubelet's pull of the same image uses the same snapshotter.
        containerd.pull_as_kubelet(&reference, None)?;

        // A kubelet's containerd knows an image by three names.
        for namespace in ["default", "k8s.io"] {
            let mut list = containerd.ctr();
            let names = run(list.args(["-n", namespace, "images", "ls", "-q"]))?;
            let mut remove = containerd.ctr();
            remove.args(["-n", namespace, "images", "rm", "--sync"]);
            run(remove.args(names.lines()))?;
        }
        let end = Instant::now() + Duration::from_secs(20);
        while snapshotter.entries("records")? > 0 && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(200));
        }
        for folder in ["records", "snapshots"] {
            let left = snapshotter.entries(folder)?;
            ensure!(left == 0, "{left} {folder} of removed images are left");
        }
        Ok(())
    })())
}

#[test]
fn a_prepare_cut_by_a_kill_is_there_whole_or_not_at_all() -> Result<()> {
    let lab = Lab::new()?;
    lab.explain((|| {
        let host = lab.host("node")?;
        let mut snapshotter = Snapshotter::start(&host, host.dir().join("snapshots"))?;
        let containerd =
            Containerd::start_with_snapshotter(&host, "containerd", &snapshotter.socket)?;
        for round in 0..10_u64 {
            std::thread::scope(|scope| {
                let prepares = scope.spawn(|| {
                    for number in 0..20 {
                        let key = format!("r{round}-{number}");
                        if snapshots(&containerd, &["prepare", &key]).is_err() {
                            break;
                        }
                    }
                });
                std::thread::sleep(Duration::from_millis(60 + 37 * round));
                let crashed = snapshotter.crash();
                let _ = prepares.join();
                crashed
            })?;
            snapshotter.crash()?;
            let (records, folders) = (
                snapshotter.entries("records")?,
                snapshotter.entries("snapshots")?,
            );
            ensure!(
                records == folders,
                "{records} records, {folders} folders in round {round}"
            );
        }
        ensure!(snapshotter.entries("records")? > 0, "nothing was prepared");
        Ok(())
    })())
}

#[test]
fn a_full_disk_refuses_a_snapshot_and_leaves_nothing_of_it() -> Result<()> {
    let lab = Lab::new()?;
    lab.explain((|| {
        let host = lab.host("node")?;
        let root = host.dir().join("small");
        let disk = SmallDisk::mount(&root, 4)?;
        let snapshotter = Snapshotter::start(&host, root)?;
        let containerd =
            Containerd::start_with_snapshotter(&host, "containerd", &snapshotter.socket)?;
        snapshots(&containerd, &["prepare", "before"])?;
        disk.fill()?;
        ensure!(
            snapshots(&containerd, &["prepare", "full"]).is_err(),
            "a full disk took a snapshot"
        );
        ensure!(snapshotter.entries("records")? == 1);
        ensure!(snapshotter.entries("snapshots")? == 1);
        disk.make_room()?;
        snapshots(&containerd, &["prepare", "full"])?;
        Ok(())
    })())
}
