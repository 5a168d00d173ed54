//! The duties of a daemon: to its clients, its process, its disk, its people's commands.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hawker_conformance::lab::{
    Answer, Containerd, DockerRegistry, End, Hawker, HawkerPlan, Host, Image, Lab, Mbit, Process,
    Request, run,
};
use hawker_conformance::origin::{Blob, Content};
use hawker_conformance::scene::{
    Plan, REPOSITORY, Scene, blob_path, committed_path, join, partial_path, right, rot,
    start_origin, until, until_committed,
};
use rustix::process::Signal;

const SIZE_BYTES: u64 = 24 << 20;
const LINK: Mbit = Mbit(100);

#[test]
fn a_slow_reader_slows_neither_the_task_nor_the_other_readers() -> Result<()> {
    Plan::nodes(1).play(|scene| {
        let blob = scene.blob(SIZE_BYTES)?;
        let slow = scene.request(scene.node(), &blob).slowly(3 << 20);
        let host = scene.node().host().clone();
        let slow = std::thread::spawn(move || right(slow.send(&host)?, &blob));
        let fast = scene.pull(scene.node(), &blob)?;
        until_committed(scene.node(), &blob)?;
        ensure!(
            fast.total < Duration::from_secs(5),
            "the other took {:?}",
            fast.total
        );
        let answer = join(slow.join())?;
        ensure!(
            answer.total > Duration::from_secs(6),
            "it was not slow: {:?}",
            answer.total
        );
        let copies = scene.origin_copies(&blob);
        ensure!(copies < 1.02, "{copies} copies");
        Ok(())
    })
}

#[test]
fn when_the_last_reader_leaves_the_download_goes_on_then_pauses_with_its_pieces_kept() -> Result<()>
{
    Plan::nodes(1)
        .link(Mbit(40))
        .flag("--linger", "2s")
        .play(|scene| {
            // 10 s at this rate; the reader leaves at once.
            let blob = scene.blob(48 << 20)?;
            let left = scene
                .request(scene.node(), &blob)
                .leave_after(1 << 20)
                .send(scene.node().host())?;
            ensure!(left.end == End::Left);
            let received = || -> Result<u64> {
                let bytes = scene.node().status()?.bytes;
                Ok(bytes.received_origin + bytes.received_peers + bytes.received_seeds)
            };
            let at_leaving = received()?;
            std::thread::sleep(Duration::from_millis(1200));
            ensure!(received()? > at_leaving + (2 << 20), "it stopped at once");
            std::thread::sleep(Duration::from_secs(3));
            let paused = received()?;
            std::thread::sleep(Duration::from_secs(1));
            ensure!(received()? < paused + (1 << 20), "it goes on for nobody");
            ensure!(paused < blob.size_bytes, "all of it came in the meantime");
            scene.pull(scene.node(), &blob)?;
            ensure!(
                received()? < blob.size_bytes + (4 << 20),
                "it threw pieces away: {}",
                received()?
            );
            Ok(())
        })
}

#[test]
fn sigterm_lets_bodies_finish() -> Result<()> {
    Plan::nodes(1).link(LINK).play(|scene| {
        let blob = scene.blob(SIZE_BYTES)?;
        let (request, host) = (
            scene.request(scene.node(), &blob),
            scene.node().host().clone(),
        );
        let client = std::thread::spawn(move || right(request.send(&host)?, &blob));
        until_reading(scene.node())?;
        let status = scene.cluster.nodes[0].terminate(Duration::from_secs(20))?;
        join(client.join())?;
        ensure!(status.success(), "{status}");
        Ok(())
    })
}

#[test]
fn after_the_drain_a_body_ends_short_with_fin_never_reset() -> Result<()> {
    Plan::nodes(1)
        .link(Mbit(20))
        .flag("--drain", "1s")
        .play(|scene| {
            let blob = scene.blob(SIZE_BYTES)?;
            let (request, host) = (
                scene.request(scene.node(), &blob),
                scene.node().host().clone(),
            );
            let client = std::thread::spawn(move || request.send(&host));
            until_reading(scene.node())?;
            scene.cluster.nodes[0].process()?.signal(Signal::TERM)?;
            std::thread::sleep(Duration::from_millis(300));
            let refused = scene.get(scene.node(), &blob);
            ensure!(
                refused.is_err() || refused.is_ok_and(|answer| answer.status == 503),
                "it still accepts"
            );
            let answer = join(client.join())?;
            ensure!(
                answer.end == End::Short,
                "{:?} after {} bytes",
                answer.end,
                answer.body_bytes
            );
            scene.cluster.nodes[0]
                .process()?
                .wait(Duration::from_secs(5))?;
            Ok(())
        })
}

fn until_reading(node: &Hawker) -> Result<()> {
    until(Duration::from_secs(10), "the pull to begin", || {
        Ok(node.status()?.bytes.served > 0)
    })
}

#[test]
fn sighup_reloads_rates_and_log_levels() -> Result<()> {
    let lab = Lab::new()?;
    lab.explain((|| {
        let origin_host = lab.host("origin")?;
        let origin = start_origin(&origin_host)?;
        let registry = origin.address();
        let host = lab.host("node")?;
        let config = host.dir().join("hawker.toml");
        let text = |rate: &str| {
            format!("[rates]\norigin = \"{rate}\"\n[registries.\"{registry}\"]\nendpoints = [\"http://{registry}\"]\n")
        };
        std::fs::write(&config, text("1MB"))?;
        let mut node = HawkerPlan::proxy(&host).flag("--config", config.display().to_string()).start()?;
        let pull = |seed: u64| -> Result<Answer> {
            let blob = origin.add_blob(REPOSITORY, Content::generated(seed, 4_000_000))?;
            right(node.request(registry, &blob_path(&blob)).discard().send(&host)?, &blob)
        };
        let slow = pull(1)?.total;
        ensure!(slow > Duration::from_secs(2), "the rate does not hold: {slow:?}");
        std::fs::write(&config, text("100MB"))?;
        node.process()?.signal(Signal::HUP)?;
        std::thread::sleep(Duration::from_millis(500));
        let pull = |seed: u64| -> Result<Answer> {
            let blob = origin.add_blob(REPOSITORY, Content::generated(seed, 4_000_000))?;
            right(node.request(registry, &blob_path(&blob)).discard().send(&host)?, &blob)
        };
        let fast = pull(2)?.total;
        ensure!(fast < Duration::from_secs(1), "still slow: {fast:?}");
        Ok(())
    })())
}

#[test]
fn a_bad_configuration_is_told_whole_with_keys_and_cures() -> Result<()> {
    let lab = Lab::new()?;
    lab.explain((|| {
        let host = lab.host("node")?;
        let config = host.dir().join("hawker.toml");
        std::fs::write(
            &config,
            "mirrors = [\"x\"]\nmemory = \"lots\"\n[cache]\nhigh = 200\n",
        )?;
        let plan = HawkerPlan::proxy(&host).flag("--config", config.display().to_string());
        let (code, said) = plan.refused(Duration::from_secs(10))?;
        ensure!(code == 2, "exit {code}");
        for key in ["mirrors", "memory", "high"] {
            ensure!(said.contains(key), "{key} is not told: {said}");
        }
        Ok(())
    })())
}

/// A disk of its own for a host, that takes so much.
fn small_disk(host: &Host, size: &str) -> Result<PathBuf> {
    let disk = host.dir().join("disk");
    std::fs::create_dir(&disk)?;
    let options = format!("size={size}");
    run(std::process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", &options, "tmpfs"])
        .arg(&disk))?;
    Ok(disk)
}

#[test]
fn a_full_disk_does_not_fail_a_pull() -> Result<()> {
    let lab = Lab::new()?;
    lab.explain((|| {
        let origin_host = lab.host("origin")?;
        let origin = start_origin(&origin_host)?;
        let host = lab.host("node")?;
        let disk = small_disk(&host, "6m")?;
        let node = HawkerPlan::proxy(&host)
            .data_dir(disk.join("hawker"))
            .plain_registry(origin.address())
            .start()?;
        let blob = origin.add_blob(REPOSITORY, Content::generated(1, SIZE_BYTES))?;
        let pull = || -> Result<Answer> {
            right(
                node.request(origin.address(), &blob_path(&blob))
                    .discard()
                    .send(&host)?,
                &blob,
            )
        };
        pull()?;
        pull()?;
        // A blob that fits is still cached.
        let small = origin.add_blob(REPOSITORY, Content::generated(2, 300_000))?;
        right(
            node.request(origin.address(), &blob_path(&small))
                .discard()
                .send(&host)?,
            &small,
        )?;
        Ok(())
    })())
}

#[test]
fn a_disk_that_can_only_be_read_does_not_fail_a_pull() -> Result<()> {
    let lab = Lab::new()?;
    lab.explain((|| {
        let origin_host = lab.host("origin")?;
        let origin = start_origin(&origin_host)?;
        let host = lab.host("node")?;
        let disk = small_disk(&host, "64m")?;
        let mount =
            |options: &[&str]| run(std::process::Command::new("mount").args(options).arg(&disk));
        let plan = HawkerPlan::proxy(&host)
            .data_dir(disk.join("hawker"))
            .plain_registry(origin.address());
        let (cached, new) = (
            origin.add_blob(REPOSITORY, Content::generated(1, 300_000))?,
            origin.add_blob(REPOSITORY, Content::generated(2, SIZE_BYTES))?,
        );
        let pull = |node: &Hawker, blob| -> Result<Answer> {
            right(
                node.request(origin.address(), &blob_path(blob))
                    .discard()
                    .send(&host)?,
                blob,
            )
        };
        // From the start, and where there is a store already.
        mount(&["-o", "remount,ro"])?;
        pull(&plan.clone().start()?, &new)?;
        mount(&["-o", "remount,rw"])?;
        let node = plan.clone().start()?;
        pull(&node, &cached)?;
        until_committed(&node, &cached)?;
        drop(node);
        mount(&["-o", "remount,ro"])?;
        let node = plan.start()?;
        let before = origin.log().len();
        pull(&node, &cached)?;
        let sent: u64 = origin.log()[before..]
            .iter()
            .map(|entry| entry.body_bytes)
            .sum();
        ensure!(
            sent == 0,
            "what is on the disk is read from it, not {sent} bytes from the origin"
        );
        pull(&node, &new).map(drop)
    })())
}

#[test]
fn systemd_is_told_when_the_daemon_is_ready_and_when_it_stops() -> Result<()> {
    let lab = Lab::new()?;
    lab.explain((|| {
        let host = lab.host("node")?;
        let path = host.dir().join("notify");
        let socket = std::os::unix::net::UnixDatagram::bind(&path)?;
        socket.set_read_timeout(Some(Duration::from_secs(10)))?;
        let hears = |word: &str| -> Result<()> {
            let mut bytes = [0; 1024];
            loop {
                let len = socket.recv(&mut bytes)?;
                if String::from_utf8_lossy(&bytes[..len])
                    .lines()
                    .any(|line| line == word)
                {
                    return Ok(());
                }
            }
        };
        let mut node = HawkerPlan::proxy(&host)
            .env("NOTIFY_SOCKET", path.display().to_string())
            .start()?;
        hears("READY=1")?;
        node.process()?.signal(Signal::HUP)?;
        hears("RELOADING=1")?;
        hears("READY=1")?;
        node.process()?.signal(Signal::TERM)?;
        hears("STOPPING=1")
    })())
}

#[test]
fn a_daemon_that_waits_for_its_token_can_be_ended() -> Result<()> {
    let lab = Lab::new()?;
    lab.explain((|| {
        let host = lab.host("node")?;
        let mut waits = host.command(hawker_conformance::lab::hawker_binary()?);
        waits
            .args([
                "proxy",
                "--join",
                "127.0.0.1:1",
                "--token-file",
                "-",
                "--data-dir",
            ])
            .arg(host.dir());
        let log = host.dir().join("waits.log");
        let mut waits = Process::start_with(waits.stdin(std::process::Stdio::piped()), log)?;
        let _open = waits.stdin();
        std::thread::sleep(Duration::from_millis(700));
        ensure!(
            waits.try_wait()?.is_none(),
            "it does not wait: {}",
            waits.log()
        );
        waits.signal(Signal::TERM)?;
        waits.wait(Duration::from_secs(5)).map(drop)
    })())
}

#[test]
fn the_cache_stays_below_its_limit_and_drops_the_oldest() -> Result<()> {
    Plan::nodes(1).flag("--cache-max", "64MiB").play(|scene| {
        let blobs: Vec<_> = (0..6)
            .map(|_| scene.blob(16 << 20))
            .collect::<Result<_>>()?;
        for blob in &blobs {
            scene.pull(scene.node(), blob)?;
        }
        until(Duration::from_secs(30), "the eviction", || {
            Ok(scene.node().status()?.store.bytes <= 64 << 20)
        })?;
        let status = scene.node().status()?;
        ensure!(status.store.blobs >= 2, "{:?}", status.store);
        scene.pull(scene.node(), &blobs[0]).map(drop)
    })
}

#[test]
fn a_rotten_blob_is_found_out_when_the_same_client_asks_again() -> Result<()> {
    Plan::nodes(1).play(|scene| {
        let [whole, in_part] = [scene.blob(SIZE_BYTES)?, scene.blob(SIZE_BYTES)?];
        for blob in [&whole, &in_part] {
            scene.pull(scene.node(), blob)?;
            until_committed(scene.node(), blob)?;
        }
        let right = middle(scene, &in_part)?;
        for blob in [&whole, &in_part] {
            rot(&committed_path(scene.node(), blob))?;
        }
        // The client got wrong bytes or will; asking again makes the node look.
        drop(scene.get(scene.node(), &whole)?);
        scene.pull(scene.node(), &whole)?;
        ensure!(
            middle(scene, &in_part)? == right,
            "the range has wrong bytes still"
        );
        Ok(())
    })
}

#[test]
fn a_rotten_piece_of_a_partial_blob_is_found_out_when_the_same_range_is_asked_for_again()
-> Result<()> {
    let found_out = |after: Duration| {
        Plan::nodes(1).flag("--linger", "1s").play(|scene| {
            let blob = scene.blob(SIZE_BYTES)?;
            let right = middle(scene, &blob)?;
            until(Duration::from_secs(10), "the piece on disk", || {
                Ok(scene.node().status()?.store.bytes > 0)
            })?;
            std::thread::sleep(after);
            rot(&partial_path(scene.node(), &blob))?;
            ensure!(
                middle(scene, &blob)? == right,
                "the range has wrong bytes still"
            );
            ensure!(
                !committed_path(scene.node(), &blob).exists(),
                "only a part was wanted"
            );
            scene.pull(scene.node(), &blob).map(drop)
        })
    };
    found_out(Duration::from_millis(200)).context("in play")?;
    found_out(Duration::from_secs(5)).context("let go")
}

/// The bytes of a blob around the one that [`rot`] turns, by way of the node.
fn middle(scene: &Scene, blob: &Blob) -> Result<Vec<u8>> {
    let node = scene.node();
    let (first, last) = (blob.size_bytes / 2 - 99, blob.size_bytes / 2 + 100);
    let request = node.request(scene.registry(), &blob_path(blob));
    let answer = request
        .header("range", format!("bytes={first}-{last}"))
        .send(node.host())?;
    ensure!(
        answer.status == 206 && answer.body.len() == 200,
        "{} {}",
        answer.status,
        answer.text()
    );
    Ok(answer.body)
}

#[test]
fn a_peer_with_rotten_bytes_on_its_disk_does_not_spoil_a_pull() -> Result<()> {
    Plan::nodes(2).play(|scene| {
        let blob = scene.blob(SIZE_BYTES)?;
        scene.pull(scene.node(), &blob)?;
        for member in [&scene.cluster.seed, scene.node()] {
            until_committed(member, &blob)?;
        }
        rot(&committed_path(scene.node(), &blob))?;
        rot(&committed_path(&scene.cluster.seed, &blob))?;
        scene.pull(&scene.cluster.nodes[1], &blob).map(drop)
    })
}

#[test]
fn status_tells_who_is_there_and_where_the_bytes_came_from() -> Result<()> {
    Plan::nodes(2).play(|scene| {
        let blob = scene.blob(SIZE_BYTES)?;
        scene.pull_on_all(&scene.cluster.nodes, &blob)?;
        let text = run(scene.node().cli()?.arg("status"))?;
        for word in ["node1", "node2", "seed"] {
            ensure!(text.contains(word), "{word} is missing: {text}");
        }
        let json: serde_json::Value =
            serde_json::from_str(&run(scene.node().cli()?.args(["status", "--json"]))?)?;
        ensure!(
            json["name"] == "node1" && json["bytes"]["served"].as_u64() >= Some(SIZE_BYTES),
            "{json}"
        );
        let metric = scene.node().metric("hawker_served_bytes_total", &[])?;
        ensure!(metric >= SIZE_BYTES as f64, "{metric}");
        Ok(())
    })
}

#[test]
fn status_says_what_is_wrong_where_no_daemon_runs() -> Result<()> {
    let lab = Lab::new()?;
    let host = lab.host("empty")?;
    let output = host
        .command(hawker_conformance::lab::hawker_binary()?)
        .arg("status")
        .output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.code() == Some(1) && said.contains("6503"),
        "{said}"
    );
    Ok(())
}

#[test]
fn doctor_tells_a_runtime_that_uses_the_mirror_from_one_that_goes_past_it() -> Result<()> {
    let lab = Lab::new()?;
    lab.explain((|| {
        let registry = DockerRegistry::start(&lab.host("origin")?)?;
        let reference = registry.push(&Image::noise(77, &[100_000]), "team/app", "v1")?;
        let node = HawkerPlan::proxy(&lab.host("node")?)
            .plain_registry(registry.authority())
            .start()?;
        let containerd = Containerd::start(node.host(), "containerd")?;
        let doctor = || -> Result<(Option<i32>, String)> {
            let mut command = node.cli()?;
            command
                .args(["doctor", "--image", &reference])
                .args(containerd.doctor_flags()?);
            let output = command.output()?;
            let said = [output.stdout, output.stderr].concat();
            Ok((
                output.status.code(),
                String::from_utf8_lossy(&said).into_owned(),
            ))
        };
        let origin = format!("http://{}", registry.authority());
        containerd.mirrors("_default", std::slice::from_ref(&origin), None)?;
        let (code, said) = doctor()?;
        ensure!(
            code == Some(1) && said.contains("past Hawker"),
            "exit {code:?}: {said}"
        );
        ensure!(
            said.contains(&format!("[host.\"http://{}\"]", node.mirror())),
            "no cure: {said}"
        );

        containerd.mirrors("_default", &[format!("http://{}", node.mirror())], None)?;
        let (code, said) = doctor()?;
        ensure!(
            code == Some(0) && said.contains("pulls through Hawker"),
            "exit {code:?}: {said}"
        );
        Ok(())
    })())
}

#[test]
fn doctor_passes_only_where_the_mirror_gave_blobs_and_shows_its_words_otherwise() -> Result<()> {
    let lab = Lab::new()?;
    lab.explain((|| {
        let registry = DockerRegistry::start(&lab.host("origin")?)?;
        let authority = registry.authority();
        let reference = registry.push(&Image::noise(78, &[100_000]), "team/app", "v1")?;
        let host = lab.host("node")?;
        let containerd = Containerd::start(&host, "containerd")?;
        let through = |node: &Hawker| {
            // The second host lets the pull succeed where the mirror refuses.
            let hosts = [
                format!("http://{}", node.mirror()),
                format!("http://{authority}"),
            ];
            containerd.mirrors("_default", &hosts, None)
        };
        let doctor = |node: &Hawker, image: &str| -> Result<(Option<i32>, String)> {
            let mut command = node.cli()?;
            command
                .args(["doctor", "--image", image])
                .args(containerd.doctor_flags()?);
            let output = command.output()?;
            let said = [output.stdout, output.stderr].concat();
            Ok((
                output.status.code(),
                String::from_utf8_lossy(&said).into_owned(),
            ))
        };
        let dead = format!("{authority}=http://127.0.0.1:1");
        for (plan, words) in [
            (
                HawkerPlan::proxy(&host),
                ["403 to HEAD manifest v1", "[registries."],
            ),
            (
                HawkerPlan::proxy(&host).flag("--registry", dead),
                ["502 to HEAD manifest v1", "reachable from this host"],
            ),
        ] {
            let node = plan.start()?;
            through(&node)?;
            let (code, said) = doctor(&node, &reference)?;
            ensure!(
                code == Some(1) && said.contains("past Hawker") && !said.contains("All is well"),
                "{said}"
            );
            ensure!(
                words.iter().all(|word| said.contains(word)),
                "exit {code:?}, without {words:?}: {said}"
            );
        }
        let node = HawkerPlan::proxy(&host)
            .plain_registry(&authority)
            .start()?;
        through(&node)?;
        let (code, said) = doctor(&node, &format!("{authority}/team/none:v1"))?;
        ensure!(
            code == Some(1) && said.contains("404 to HEAD manifest v1"),
            "exit {code:?}: {said}"
        );
        let (code, said) = doctor(&node, &reference)?;
        ensure!(
            code == Some(0) && said.contains("the mirror gave manifest and 2 blobs"),
            "exit {code:?}: {said}"
        );
        // The runtime needs nothing but the manifest.
        containerd.fetch(&reference)?;
        let (code, said) = doctor(&node, &reference)?;
        ensure!(
            code == Some(0) && said.contains("held the layers already"),
            "exit {code:?}: {said}"
        );
        ensure!(said.contains("All is well."), "{said}");
        Ok(())
    })())
}

#[test]
fn healthy_readyz_and_metrics_answer() -> Result<()> {
    Plan::nodes(0).play(|scene| {
        for path in ["/healthy", "/readyz", "/metrics", "/status"] {
            let answer = scene.cluster.seed.admin_get(path)?;
            ensure!(answer.status == 200, "{path}: {}", answer.status);
        }
        let metrics = scene.cluster.seed.admin_get("/metrics")?.text();
        ensure!(metrics.contains("hawker_received_bytes_total"), "{metrics}");
        Ok(())
    })
}

#[test]
fn thousands_of_short_connections_are_fine() -> Result<()> {
    Plan::nodes(1).play(|scene| {
        let blob = scene.blob(1000)?;
        scene.pull(scene.node(), &blob)?;
        until_committed(scene.node(), &blob)?;
        let request = scene.request(scene.node(), &blob);
        let start = Instant::now();
        scene.node().host().enter(|| -> Result<()> {
            for _ in 0..3000 {
                right(request.send_here()?, &blob)?;
            }
            Ok(())
        })??;
        ensure!(
            start.elapsed() < Duration::from_secs(20),
            "{:?}",
            start.elapsed()
        );
        let ping = Request::get(scene.node().mirror(), "/v2/").send(scene.node().host())?;
        ensure!(ping.status == 200, "{}", ping.status);
        Ok(())
    })
}
