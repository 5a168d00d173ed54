//! The forward proxy with its users: dockerd, curl, lazy loaders; the requests that it lets through and those it
//! refuses; and the mirror by TLS.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use hawker_conformance::lab::{
    Cluster, ClusterPlan, Containerd, DockerRegistry, Dockerd, Hawker, HawkerPlan, Host, Image,
    Lab, Layer, PrivateCa, RegistryPlan, Request, run,
};
use hawker_conformance::origin::{Content, Origin, OriginConfig};
use hawker_conformance::scene::{REPOSITORY, blob_path, join, right, start_origin};

const FORWARD: &str = "127.0.0.1:6505";

fn forward() -> Result<SocketAddr> {
    Ok(FORWARD.parse()?)
}

/// The file of the authority that clients of a node's forward proxy are to trust.
fn authority(node: &Hawker) -> Result<PathBuf> {
    let file = node.host().dir().join("hawker-ca.pem");
    let certificate = run(node.cli()?.arg("ca").arg("--data-dir").arg(node.data_dir()))?;
    std::fs::write(&file, certificate)?;
    Ok(file)
}

#[test]
fn dockerd_pulls_from_any_registry_at_once_on_all_nodes_and_pushes_through() -> Result<()> {
    let lab = Lab::new()?;
    lab.explain((|| {
        let ca = PrivateCa::new(&lab)?;
        let registry = RegistryPlan::on(&lab.host("origin")?).tls(&ca)?.start()?;
        let own_ca = format!("{}={}", registry.authority(), ca.certificate().display());
        let args = ["--registry-ca", &own_ca, "--forward-proxy", FORWARD]
            .map(str::to_owned)
            .to_vec();
        let cluster = Cluster::start(
            &lab,
            &ClusterPlan {
                nodes: 2,
                args,
                ..ClusterPlan::default()
            },
        )?;
        let image = Image::noise(41, &[3 << 20, 400_000, 2000]);
        let reference = registry.push(&image, "team/app", "v1")?;

        let runtime = |node: &Hawker| -> Result<(Containerd, Dockerd)> {
            let containerd = Containerd::start(node.host(), "containerd")?;
            let dockerd = Dockerd::behind(node.host(), &containerd, forward()?, &authority(node)?)?;
            dockerd.pull(&reference).context("docker pull")?;
            Ok((containerd, dockerd))
        };
        let runtimes = std::thread::scope(|scope| -> Result<Vec<_>> {
            let starting: Vec<_> = cluster
                .nodes
                .iter()
                .map(|node| scope.spawn(move || runtime(node)))
                .collect();
            starting
                .into_iter()
                .map(|runtime| join(runtime.join()))
                .collect()
        })?;
        registry.gave_once(&image)?;
        for node in &cluster.nodes {
            let bytes = node.status()?.bytes;
            ensure!(
                bytes.received_peers + bytes.received_seeds >= image.size_bytes(),
                "{bytes:?}"
            );
            ensure!(bytes.served >= image.size_bytes(), "{bytes:?}");
        }

        let archive = lab.dir().join("layer.tar");
        std::fs::write(&archive, &Layer::noise(42, 2 << 20).data)?;
        let pushed = format!("{}/team/pushed:v1", registry.authority());
        runtimes[0]
            .1
            .push(&archive, &pushed)
            .context("docker push")?;
        runtimes[1]
            .1
            .pull(&pushed)
            .context("docker pull of what was pushed")
    })())
}

/// curl's report of a request through the forward proxy: the answer's status, that to CONNECT, and the body's digest.
struct Curled {
    status: String,
    connect: String,
    body: Vec<u8>,
}

fn curl(host: &Host, args: &[&str]) -> Result<Curled> {
    let body = host.dir().join("curled");
    let _ = std::fs::remove_file(&body);
    let mut command = host.command("curl");
    command.args([
        "--silent",
        "--max-time",
        "20",
        "--noproxy",
        "",
        "--proxy",
        &format!("http://{FORWARD}"),
    ]);
    command
        .args(["--write-out", "%{http_code} %{http_connect}", "--output"])
        .arg(&body)
        .args(args);
    // It fails where the proxy refuses, which is looked at here.
    let said = String::from_utf8(command.output()?.stdout)?;
    let (status, connect) = said
        .trim()
        .split_once(' ')
        .with_context(|| format!("{args:?}: {said}"))?;
    let body = std::fs::read(&body).unwrap_or_default();
    Ok(Curled {
        status: status.into(),
        connect: connect.into(),
        body,
    })
}

#[test]
fn curl_gets_blobs_from_peers_tunnels_where_it_may_and_nothing_else() -> Result<()> {
    let lab = Lab::new()?;
    lab.explain((|| {
        let ca = PrivateCa::new(&lab)?;
        let (origin_host, other_host, host) =
            (lab.host("origin")?, lab.host("other")?, lab.host("node")?);
        let origin = start_origin(&origin_host)?;
        let blob = origin.add_blob(REPOSITORY, Content::generated(43, 1_500_000))?;
        let tls = OriginConfig {
            listen: other_host.at(8443),
            control: None,
            tls: Some(ca.issue(&other_host)?.tls()?),
        };
        let other = other_host.enter(|| Origin::start(tls))??;
        let text = other.add_blob(REPOSITORY, Content::bytes(*b"through a tunnel"))?;
        let node = HawkerPlan::proxy(&host)
            .plain_registry(origin.address())
            .flag("--forward-proxy", FORWARD)
            .flag("--intercept", format!("p2p {} ^/v2/", origin.address()))
            .flag("--intercept", format!("direct {}", other.address()))
            .flag("--intercept", "direct 127.0.0.1:6500")
            .flag("--allow-network", "10.77.0.0/16")
            .flag("--allow-network", "127.0.0.0/8")
            .start()?;
        let own = authority(&node)?.display().to_string();
        let company = ca.certificate().display().to_string();

        let path = blob_path(&blob);
        let (plain, opened) = (
            format!("http://{}{path}", origin.address()),
            format!("https://{}{path}", origin.address()),
        );
        for args in [
            &[plain.as_str()][..],
            &["--cacert", &own, &opened],
            &["--cacert", &own, "--no-alpn", &opened],
            &["--cacert", &own, "--tls-max", "1.2", &opened],
        ] {
            let got = curl(&host, args)?;
            let digest =
                hawker_oci::digest::Digest::of(hawker_oci::digest::Algorithm::Sha256, &got.body);
            ensure!(
                got.status == "200" && digest == blob.digest,
                "{args:?}: {}",
                got.status
            );
        }
        let sent: u64 = origin
            .log()
            .iter()
            .filter(|e| e.target.contains("/blobs/"))
            .map(|e| e.body_bytes)
            .sum();
        ensure!(sent == blob.size_bytes, "the origin sent {sent} bytes");

        let there = format!("https://{}{}", other.address(), blob_path(&text));
        let got = curl(&host, &["--cacert", &company, &there])?;
        ensure!(
            got.connect == "200" && got.body == b"through a tunnel",
            "{} {}",
            got.connect,
            got.status
        );
        ensure!(
            curl(&host, &["--cacert", &own, &there])?.status == "000",
            "a tunnel was opened"
        );

        for target in [
            format!("https://{}/", other_host.at(8444)),
            format!("https://{}/", other_host.at(443)),
            "https://127.0.0.1:6503/".into(),
            // Back to the daemon itself, though a rule names it and its network is allowed.
            "https://127.0.0.1:6500/".into(),
        ] {
            let got = curl(&host, &["--insecure", &target])?;
            let refused = got.connect == "403" || target.ends_with(":443/") && got.connect == "502";
            ensure!(refused, "{target}: {} {}", got.connect, got.status);
        }
        let admin = curl(&host, &["http://127.0.0.1:6503/status"])?;
        ensure!(
            admin.status == "403",
            "the admin server was reached: {}",
            admin.status
        );
        ensure!(node.status()?.ready);
        Ok(())
    })())
}

/// nydusd asks through its `proxy` by whole addresses in the clear (`use_http`), with ranges, whatever the registry speaks.
#[test]
fn a_lazy_loaders_ranges_come_by_whole_addresses_from_a_registry_with_tls() -> Result<()> {
    let lab = Lab::new()?;
    lab.explain((|| {
        let ca = PrivateCa::new(&lab)?;
        let registry = RegistryPlan::on(&lab.host("origin")?).tls(&ca)?.start()?;
        let image = Image::noise(44, &[3 << 20]);
        registry.push(&image, "team/lazy", "v1")?;
        let node = HawkerPlan::proxy(&lab.host("node")?)
            .flag(
                "--registry-ca",
                format!("{}={}", registry.authority(), ca.certificate().display()),
            )
            .flag("--forward-proxy", FORWARD)
            .start()?;
        let layer = &image.layers[0];
        let target = format!(
            "http://{}/v2/team/lazy/blobs/{}",
            registry.authority(),
            layer.digest
        );
        let ask = |range: Option<(usize, usize)>| {
            let request = Request::get(forward()?, &target).header("host", registry.authority());
            let request = request
                .header("accept", "*/*")
                .header("content-length", "0");
            let ranged = range.map(|(from, to)| {
                request
                    .clone()
                    .header("range", format!("bytes={from}-{to}"))
            });
            ranged.unwrap_or(request).send(node.host())
        };
        let last = layer.data.len() - 1;
        for (from, to) in [(last - 9_999, last), (0, 99), (1_000_000, 1_999_999)] {
            let answer = ask(Some((from, to)))?;
            let told = format!("bytes {from}-{to}/{}", layer.data.len());
            ensure!(
                answer.status == 206,
                "{from}-{to}: {} {}",
                answer.status,
                answer.text()
            );
            ensure!(
                answer.header("content-range") == Some(&told),
                "{:?}",
                answer.headers
            );
            ensure!(answer.body == layer.data[from..=to], "{from}-{to}");
        }
        let whole = ask(None)?;
        ensure!(
            whole.status == 200 && whole.digest == layer.digest,
            "{}",
            whole.status
        );
        Ok(())
    })())
}

/// The answer to some bytes at the forward proxy until the connection ended; an error if it does not end in time.
fn say(node: &Hawker, bytes: &[u8], within: Duration) -> Result<String> {
    node.host().enter(|| -> Result<String> {
        let mut stream = TcpStream::connect(forward()?)?;
        stream.set_read_timeout(Some(within))?;
        // It may hang up before it has heard all.
        let _ = stream.write_all(bytes);
        let mut heard = Vec::new();
        match stream.read_to_end(&mut heard) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                anyhow::bail!(
                    "still open after {within:?}, said {:?}",
                    String::from_utf8_lossy(&heard)
                )
            }
            _ => Ok(String::from_utf8_lossy(&heard).into_owned()),
        }
    })?
}

fn statuses(heard: &str) -> Vec<u16> {
    heard
        .split("HTTP/1.1 ")
        .skip(1)
        .filter_map(|answer| answer.get(..3)?.parse().ok())
        .collect()
}

#[test]
fn bad_input_at_the_forward_proxy_ends_a_connection_and_no_more() -> Result<()> {
    let lab = Lab::new()?;
    lab.explain((|| {
        let origin = start_origin(&lab.host("origin")?)?;
        let blob = origin.add_blob(REPOSITORY, Content::generated(45, 100_000))?;
        let node = HawkerPlan::proxy(&lab.host("node")?)
            .plain_registry(origin.address())
            .flag("--forward-proxy", FORWARD)
            .start()?;
        let at = origin.address();
        let before = origin.log().len();
        let prompt = Duration::from_secs(5);
        let hidden = format!("GET http://{at}/v2/smuggled/manifests/v1 HTTP/1.1\r\nHost: {at}\r\n\r\n");
        let end = "Connection: close\r\n\r\n";
        for bytes in [
            format!("CONNECT / HTTP/1.1\r\nHost: /\r\n{end}"),
            format!("CONNECT a.example HTTP/1.1\r\nHost: a.example\r\n{end}"),
            format!("CONNECT :443 HTTP/1.1\r\nHost: :443\r\n{end}"),
            format!("CONNECT a.example:99999 HTTP/1.1\r\nHost: a.example:99999\r\n{end}"),
            format!("CONNECT a.example:0 HTTP/1.1\r\nHost: a.example:0\r\n{end}"),
            format!("CONNECT me@{at} HTTP/1.1\r\nHost: {at}\r\n{end}"),
            format!("CONNECT [::1:443 HTTP/1.1\r\nHost: [::1:443\r\n{end}"),
            format!("CONNECT {at} HTTP/1.1\r\nHost: a.example:443\r\n{end}"),
            format!("CONNECT {at} HTTP/1.1\r\n{end}"),
            format!("CONNECT {at} HTTP/1.1\r\nHost: {at}\r\nHost: {at}\r\n{end}"),
            format!("CONNECT 169.254.169.254:80 HTTP/1.1\r\nHost: 169.254.169.254:80\r\n{end}"),
            format!("CONNECT 0.0.0.0:443 HTTP/1.1\r\nHost: 0.0.0.0:443\r\n{end}"),
            format!("CONNECT a.example:22 HTTP/1.1\r\nHost: a.example:22\r\n{end}"),
            format!("GET /v2/ HTTP/1.1\r\nHost: {at}\r\n{end}"),
            format!("GET http:///v2/ HTTP/1.1\r\nHost: {at}\r\n{end}"),
            format!("GET http://me:word@{at}/v2/ HTTP/1.1\r\nHost: {at}\r\n{end}"),
            format!("GET http://{at}/v2/ HTTP/1.1\r\nHost: a.example\r\n{end}"),
            format!("GET http://{at}/v2/ HTTP/1.1\r\n{end}"),
            format!("GET http://{at}/v2/ HTTP/1.1\r\nHost: {at}\r\nHost: a.example\r\n{end}"),
            format!("GET ftp://{at}/v2/ HTTP/1.1\r\nHost: {at}\r\n{end}"),
            format!("GET http://{at}/v2/ HTTP/1.1\r\n Host: {at}\r\n{end}"),
            format!("POST http://{at}/v2/x/ HTTP/1.1\r\nHost: {at}\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello{hidden}"),
            format!("POST http://{at}/v2/x/ HTTP/1.1\r\nHost: {at}\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n{hidden}"),
            format!("POST http://{at}/v2/x/ HTTP/1.1\r\nHost: {at}\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n{hidden}"),
            format!("GET http://{at}/v2/ HTTP/1.1\r\nHost: {at}\r\n{}\r\n", "A: b\r\n".repeat(20_000)),
            format!("GET http://{at}/{} HTTP/1.1\r\nHost: {at}\r\n\r\n", "a".repeat(200_000)),
            "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".into(),
            "\u{16}\u{3}\u{1}\u{2}".into(),
        ] {
            let shown = &bytes[..bytes.len().min(120)];
            let heard = say(&node, bytes.as_bytes(), prompt).with_context(|| shown.to_owned())?;
            let got = statuses(&heard);
            ensure!(got.len() <= 1 && got.iter().all(|s| (400..500).contains(s)), "{shown:?}: {heard}");
        }
        let asked = origin.log().split_off(before);
        ensure!(asked.is_empty(), "the registry was asked: {asked:?}");

        // Both framings at once: the chunks count (RFC 9112, 6.3), one framing goes on, and the connection ends.
        let both = format!("POST http://{at}/v2/x/ HTTP/1.1\r\nHost: {at}\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n");
        let heard = say(&node, format!("{both}0\r\n\r\n{hidden}").as_bytes(), prompt)?;
        ensure!(statuses(&heard).len() <= 1, "{heard}");
        let asked = origin.log().split_off(before);
        ensure!(asked.iter().all(|entry| !entry.target.contains("smuggled")), "{asked:?}");

        // After CONNECT to a host whose connections are opened: no TLS, half of it, or nothing at all.
        let connect = format!("CONNECT {at} HTTP/1.1\r\nHost: {at}\r\n\r\n");
        for (what, more, within) in [
            ("a request in the clear", &b"GET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n"[..], prompt),
            ("a record that is none", &[0x16, 3, 1, 0xff, 0xff, 0, 0, 0], Duration::from_secs(15)),
            ("half of a greeting", &[0x16, 3, 1, 2, 0, 1], Duration::from_secs(15)),
            ("nothing", b"", Duration::from_secs(15)),
        ] {
            let heard = say(&node, &[connect.as_bytes(), more].concat(), within).context(what)?;
            ensure!(statuses(&heard) == [200], "{what}: {heard}");
        }

        let proper = Request::get(forward()?, format!("http://{at}{}", blob_path(&blob)));
        right(proper.header("host", at.to_string()).send(node.host())?, &blob)?;
        ensure!(!node.log().contains("panicked"), "it panicked");
        Ok(())
    })())
}

#[test]
fn runtimes_reach_the_mirror_by_tls() -> Result<()> {
    let lab = Lab::new()?;
    lab.explain((|| {
        let (ca, host) = (PrivateCa::new(&lab)?, lab.host("node")?);
        let registry = DockerRegistry::start(&lab.host("origin")?)?;
        let image = Image::noise(46, &[2 << 20, 5000]);
        registry.push(&image, "team/app", "v1")?;
        // For the address on which it is reached here.
        let server = ca.issue(&host)?;
        let mirror = host.at(6500);
        let node = HawkerPlan::proxy(&host)
            .flag("--mirror", mirror.to_string())
            .flag(
                "--registry",
                format!("origin.test=http://{}", registry.authority()),
            )
            .flag("--tls-cert", server.certificate.display().to_string())
            .flag("--tls-key", server.key.display().to_string())
            .start()?;
        let trusted = ca.certificate().parent().context("a file is in a folder")?;
        for (name, verify) in [("tls", true), ("plain", false)] {
            let target = host.dir().join(name);
            let mut skopeo = host.command("skopeo");
            skopeo.args([
                "--insecure-policy",
                "copy",
                "--quiet",
                &format!("--src-tls-verify={verify}"),
            ]);
            skopeo
                .arg("--src-cert-dir")
                .arg(trusted)
                .arg(format!("docker://{mirror}/origin.test/team/app:v1"));
            run(skopeo.arg(format!("dir:{}", target.display())))?;
            for layer in &image.layers {
                let copied =
                    std::fs::read(target.join(layer.digest.trim_start_matches("sha256:")))?;
                ensure!(copied == layer.data, "{} differs", layer.digest);
            }
        }
        registry.gave_once(&image)?;
        // Without ALPN; and a client that has hung up half of the connection before its greeting.
        let mut curl = host.command("curl");
        curl.args(["--silent", "--fail", "--no-alpn", "--cacert"])
            .arg(ca.certificate());
        ensure!(run(curl.arg(format!("https://{mirror}/v2/")))? == "{}");
        host.enter(|| {
            TcpStream::connect(mirror).and_then(|stream| stream.shutdown(Shutdown::Write))
        })??;
        ensure!(node.status()?.ready);
        Ok(())
    })())
}
