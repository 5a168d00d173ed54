//! The answers to bad input: a clear 4xx or a closed connection, within a deadline, in bounded memory, and the daemon
//! goes on.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use hawker_conformance::lab::{Hawker, Memory, Request, memory_bytes};
use hawker_conformance::origin::{Blob, Fault, Rule};
use hawker_conformance::scene::{Plan, REPOSITORY, Scene, join, right, until};

/// For an answer or the end of a connection that sends what no client sends.
const PROMPT: Duration = Duration::from_secs(5);

/// The answer to some bytes until the connection ended; an error if it does not end within `deadline`.
fn say(node: &Hawker, bytes: &[u8], hang_up: bool, deadline: Duration) -> Result<String> {
    node.host().enter(|| -> Result<String> {
        let mut stream = TcpStream::connect(node.mirror())?;
        stream.set_read_timeout(Some(deadline))?;
        stream.set_write_timeout(Some(deadline))?;
        // It may hang up before it has heard all.
        let _ = stream.write_all(bytes);
        if hang_up {
            let _ = stream.shutdown(Shutdown::Write);
        }
        let mut heard = Vec::new();
        match stream.read_to_end(&mut heard) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                anyhow::bail!(
                    "still open after {deadline:?}, said {:?}",
                    String::from_utf8_lossy(&heard)
                )
            }
            _ => Ok(String::from_utf8_lossy(&heard).into_owned()),
        }
    })?
}

/// So much of a node's memory.
fn mib(node: &Hawker, what: Memory) -> Result<u64> {
    let bytes = memory_bytes(node.pid().context("it runs")?, what);
    Ok(bytes.context("it runs")? >> 20)
}

/// The anonymous memory of a node's process.
fn memory_mib(node: &Hawker) -> Result<u64> {
    mib(node, Memory::Anonymous)
}

#[test]
fn readers_that_stand_still_hold_no_manifest_in_memory() -> Result<()> {
    Plan::nodes(1).play(|scene| {
        let node = scene.node();
        let manifest = format!(
            "{{\"schemaVersion\":2,\"padding\":\"{}\"}}",
            "x".repeat((4 << 20) - 40)
        );
        let media_type = "application/vnd.oci.image.manifest.v1+json";
        let blob = scene
            .origin
            .add_manifest(REPOSITORY, "long", media_type, manifest.as_bytes());
        let target = format!(
            "/v2/{REPOSITORY}/manifests/{}?ns={}",
            blob.digest,
            scene.registry()
        );
        let request = format!("GET {target} HTTP/1.1\r\nHost: mirror\r\nConnection: close\r\n\r\n");
        let begin = || {
            node.host().enter(|| -> Result<TcpStream> {
                let mut stream = TcpStream::connect(node.mirror())?;
                stream.set_read_timeout(Some(Duration::from_secs(20)))?;
                stream.write_all(request.as_bytes())?;
                let mut head = [0; 12];
                stream.read_exact(&mut head)?;
                ensure!(
                    &head == b"HTTP/1.1 200",
                    "{}",
                    String::from_utf8_lossy(&head)
                );
                Ok(stream)
            })?
        };
        drop(begin()?);
        let before = memory_mib(node)?;
        let mut standing = (0..60).map(|_| begin()).collect::<Result<Vec<_>>>()?;
        let grown = memory_mib(node)?.saturating_sub(before);
        ensure!(grown < 60, "60 readers of 4 MiB hold {grown} MiB");
        // The last of them goes on, and gets all of it.
        let mut rest = Vec::new();
        standing
            .pop()
            .context("60 of them")?
            .read_to_end(&mut rest)?;
        ensure!(
            rest.ends_with(manifest.as_bytes()),
            "it is another one, or a part of it"
        );
        is_well(node)
    })
}

/// Manifests as long as they may be, each another one, in shapes that take far more memory than bytes to whoever believes them.
fn hungry_manifests() -> Vec<String> {
    let (digest, url) = (
        format!("sha256:{}", "a".repeat(64)),
        format!("http://u.example/{}", "u".repeat(900)),
    );
    let layer =
        format!("{{\"digest\":\"{digest}\",\"urls\":[\"{url}\",\"{url}\",\"{url}\",\"{url}\"]}},");
    let shapes = [
        ("\"x\":", "[", ""),
        ("\"x\":", "{\"a\":", ""),
        ("\"layers\":[", "{},", "{}]"),
        ("\"layers\":[", "\"\",", "\"\"]"),
        ("\"layers\":[", &layer, "{}]"),
        ("", "\"a\":0,", "\"a\":0"),
        ("", "\"layers\":[{}],", "\"a\":0"),
        ("", "\"config\":{\"digest\":\"\"},", "\"a\":0"),
        ("\"config\":{", "\"urls\":[\"\"],", "\"a\":0}"),
        ("\"x\":\"", "\\u0000", "\""),
    ];
    let closing = [("[", "]"), ("{\"a\":", "}")];
    let of = |number: usize, (open, unit, end): (&str, &str, &str)| {
        let close = closing
            .iter()
            .find(|(open, _)| *open == unit)
            .map_or("", |(_, close)| close);
        let mut text = format!("{{\"schemaVersion\":2,\"number\":{number},{open}");
        let times = ((4 << 20) - text.len() - end.len() - 2) / (unit.len() + close.len());
        text += &unit.repeat(times);
        text += if close.is_empty() { "" } else { "0" };
        text += &close.repeat(times);
        text + end + "}"
    };
    (0..30)
        .map(|number| of(number, shapes[number % shapes.len()]))
        .collect()
}

#[test]
fn manifests_made_to_fill_memory_do_not() -> Result<()> {
    Plan::nodes(1).play(|scene| {
        let media_type = "application/vnd.oci.image.manifest.v1+json";
        let add = |text: String| {
            scene
                .origin
                .add_manifest(REPOSITORY, "hungry", media_type, text.as_bytes())
        };
        let blobs: Vec<Blob> = hungry_manifests().into_iter().map(add).collect();
        ensure!(
            blobs
                .iter()
                .all(|blob| (4 << 20) - 4096 < blob.size_bytes && blob.size_bytes <= 4 << 20)
        );
        // Their bytes are on their way for a while, to the node and from it.
        scene.origin.add_fault(
            Rule::always(Fault::SlowBody {
                bytes_per_s: 4 << 20,
            })
            .on("/manifests/"),
        );
        let node = scene.node();
        let daemons = [("node", node), ("seed", &scene.cluster.seed)];
        let before = daemons.map(|(_, daemon)| mib(daemon, Memory::Resident));
        let pull = |blob: &Blob| -> Result<()> {
            let path = format!("/v2/{REPOSITORY}/manifests/{}", blob.digest);
            let request = node
                .request(scene.registry(), &path)
                .slowly(1 << 20)
                .discard();
            right(request.send(node.host())?, blob).map(drop)
        };
        std::thread::scope(|scope| {
            let pulls: Vec<_> = blobs
                .iter()
                .chain(&blobs)
                .map(|blob| scope.spawn(|| pull(blob)))
                .collect();
            pulls.into_iter().try_for_each(|pull| join(pull.join()))
        })?;
        for ((name, daemon), before) in daemons.into_iter().zip(before) {
            let (before, peak) = (before?, mib(daemon, Memory::Peak)?);
            ensure!(
                peak < before + 128,
                "the {name} went from {before} to {peak} MiB"
            );
            until(Duration::from_secs(30), "its memory is given back", || {
                let now = mib(daemon, Memory::Resident)?;
                println!("{name}: {before} MiB before, {peak} at most, {now} now");
                Ok(now < before + 24)
            })?;
            is_well(daemon)?;
        }
        Ok(())
    })
}

/// Checks that a node is well afterwards: it answers, its memory is bounded, and nothing in it panicked.
fn is_well(node: &Hawker) -> Result<()> {
    let answer = Request::get(node.mirror(), "/v2/")
        .within(PROMPT)
        .send(node.host())?;
    ensure!(answer.status == 200, "{}", answer.status);
    ensure!(!node.log().contains("panicked"), "it panicked");
    let held = memory_mib(node)?;
    ensure!(held < 96, "it holds {held} MiB");
    Ok(())
}

/// The statuses of the answers in what was heard.
fn statuses(heard: &str) -> Vec<u16> {
    heard
        .split("HTTP/1.1 ")
        .skip(1)
        .filter_map(|answer| answer.get(..3)?.parse().ok())
        .collect()
}

#[test]
fn floods_of_headers_are_refused_in_bounded_memory() -> Result<()> {
    Plan::nodes(1).play(|scene| {
        let node = scene.node();
        let request = |rest: &str| format!("GET /v2/ HTTP/1.1\r\nHost: m\r\n{rest}\r\n");
        let (many, wide) = (
            "A: b\r\n".repeat(20_000),
            format!("A: {}\r\n", "b".repeat(2 << 20)),
        );
        let long = format!(
            "GET /v2/{}/manifests/v1 HTTP/1.1\r\nHost: m\r\n\r\n",
            "a/".repeat(1 << 20)
        );
        for (what, bytes) in [
            ("many headers", request(&many)),
            ("a wide header", request(&wide)),
            ("a long target", long),
            (
                "a header's name without end",
                format!("GET / HTTP/1.1\r\n{}", "a".repeat(2 << 20)),
            ),
            ("line ends without end", "\r\n".repeat(1 << 20)),
        ] {
            std::thread::scope(|scope| -> Result<()> {
                let all: Vec<_> = (0..8)
                    .map(|_| scope.spawn(|| say(node, bytes.as_bytes(), true, PROMPT)))
                    .collect();
                for heard in all {
                    let heard = join(heard.join()).context(what)?;
                    ensure!(
                        statuses(&heard).iter().all(|s| (400..500).contains(s)),
                        "{what}: {heard}"
                    );
                }
                Ok(())
            })?;
        }
        is_well(node)
    })
}

/// Bytes that two readers of HTTP might cut into requests in different ways: after a first answer of 4xx nothing more may be
/// answered, so that nothing can hide in a body.
#[test]
fn shapes_of_request_smuggling_are_refused_and_nothing_after_them_is_answered() -> Result<()> {
    Plan::nodes(1).play(|scene| {
        let node = scene.node();
        let hidden = "GET /v2/smuggled/manifests/v1 HTTP/1.1\r\nHost: m\r\n\r\n";
        for framing in [
            "Content-Length: 5\r\nContent-Length: 6\r\n",
            "Content-Length: 5, 6\r\n",
            "Content-Length: -5\r\n",
            "Content-Length: +5\r\n",
            "Content-Length: 0x5\r\n",
            "Content-Length: 99999999999999999999999\r\n",
            "Content-Length : 5\r\n",
            "Transfer-Encoding: xchunked\r\n",
            "Transfer-Encoding: chunked, identity\r\n",
            "Transfer-Encoding : chunked\r\n",
            "Transfer-Encoding:\u{b}chunked\r\n",
            "X: a\r\n Content-Length: 5\r\n",
            "X: a\0b\r\n",
            "X: a\rb\r\n",
            "X\r\n",
            ": x\r\n",
            "X y: z\r\n",
        ] {
            let bytes = format!("GET /v2/ HTTP/1.1\r\nHost: m\r\n{framing}\r\nhello{hidden}");
            let heard = say(node, bytes.as_bytes(), false, PROMPT).with_context(|| framing.to_owned())?;
            let statuses = statuses(&heard);
            ensure!(statuses.is_empty() || statuses == [400], "{framing:?}: {heard}");
        }
        // Both framings at once: RFC 9112, 6.3 lets the chunks count, but the connection must not live on.
        let both = "GET /v2/ HTTP/1.1\r\nHost: m\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n";
        let heard = say(node, format!("{both}0\r\n\r\n{hidden}").as_bytes(), false, PROMPT)?;
        ensure!(statuses(&heard).len() <= 1, "both framings: {heard}");
        for chunk in ["zz\r\nhello\r\n", "-1\r\nhello\r\n", "fffffffffffffffff\r\nhello\r\n", "5 hello\r\n"] {
            let head = "GET /v2/ HTTP/1.1\r\nHost: m\r\nTransfer-Encoding: chunked\r\n\r\n";
            let heard = say(node, format!("{head}{chunk}{hidden}").as_bytes(), false, PROMPT)?;
            ensure!(!heard.contains("smuggled") && statuses(&heard).len() <= 1, "{chunk:?}: {heard}");
        }
        is_well(node)?;
        let asked = scene.origin.log();
        ensure!(asked.iter().all(|entry| !entry.target.contains("smuggled")), "{asked:?}");
        Ok(())
    })
}

#[test]
fn tricks_with_paths_reach_nothing() -> Result<()> {
    Plan::nodes(1).play(|scene| {
        let node = scene.node();
        let (ns, hex) = (
            format!("ns={}", scene.registry().replace(':', "%3A")),
            "0".repeat(64),
        );
        let long = "a/".repeat(200);
        let deep = "a".repeat(250);
        let before = scene.origin.log().len();
        for path in [
            "/v2/../v2/team/app/manifests/v1".to_owned(),
            "/v2/team/../../admin/manifests/v1".into(),
            "/v2/team/%2e%2e/app/manifests/v1".into(),
            "/v2/team/%2E%2E%2Fapp/manifests/v1".into(),
            "/v2/team/%252e%252e/app/manifests/v1".into(),
            "/v2/./team/app/manifests/v1".into(),
            "/v2//team/app/manifests/v1".into(),
            "/v2/team//app/manifests/v1".into(),
            "//v2/team/app/manifests/v1".into(),
            "/v2/team/app//manifests/v1".into(),
            "/v2/team/app/manifests/".into(),
            "/v2/team/app/manifests/v1/".into(),
            "/v2/team/app/manifests/..".into(),
            "/v2/team/app/manifests/%2e%2e".into(),
            "/v2/team/app/manifests/v1%2f..%2f..".into(),
            "/v2/team/app/manifests/v1%00".into(),
            "/v2/team/app/manifests/v1%0d%0aHost:%20x".into(),
            "/v2/team\\app/manifests/v1".into(),
            "/v2/team%5capp/manifests/v1".into(),
            "/v2/team/app/blobs/../manifests/v1".into(),
            format!("/v2/team/app/blobs/sha256:{hex}/../{hex}"),
            format!("/v2/team/app/blobs/sha256:{hex}0"),
            format!("/v2/team/app/blobs/sha256:{}", hex.replace('0', "A")),
            format!("/v2/team/app/blobs/SHA256:{hex}"),
            format!("/v2/team/app/blobs/sha256%00:{hex}"),
            format!("/v2/team/app/blobs/sha256:sha256:{hex}"),
            format!("/v2/{long}app/manifests/v1"),
            format!("/v2/{deep}{deep}/manifests/v1"),
            format!("/v2/team/app/manifests/{deep}"),
            "/v2/_catalog".into(),
            "/v2/team/app/blobs/uploads/".into(),
            "/etc/passwd".into(),
            "/metrics".into(),
            "/status".into(),
        ] {
            for target in [format!("{path}?{ns}"), path.clone()] {
                let request = Request::get(node.mirror(), &target).within(Duration::from_secs(10));
                let answer = request.send(node.host())?;
                ensure!(
                    (400..500).contains(&answer.status),
                    "{target}: {}",
                    answer.status
                );
            }
        }
        let asked = scene.origin.log().split_off(before);
        ensure!(asked.is_empty(), "the registry was asked: {asked:?}");
        is_well(node)
    })
}

#[test]
fn slow_half_open_and_silent_clients_are_let_go() -> Result<()> {
    Plan::nodes(1).play(|scene| {
        let node = scene.node();
        let blob = scene.blob(1 << 20)?;
        let target = format!(
            "{}?ns={}",
            hawker_conformance::scene::blob_path(&blob),
            scene.registry()
        );
        // A client that hangs up half of a connection counts as gone: runtimes never do. The rest ends as soon as that
        // is seen.
        let request = format!("GET {target} HTTP/1.1\r\nHost: m\r\n\r\n");
        say(node, request.as_bytes(), true, PROMPT)?;
        for (what, bytes) in [
            ("half a request", "GET /v2/ HTTP/1.1\r\nHost: m"),
            ("nothing at all", ""),
            (
                "a body that never comes",
                "GET /v2/ HTTP/1.1\r\nHost: m\r\nContent-Length: 10\r\n\r\nx",
            ),
        ] {
            let heard = say(node, bytes.as_bytes(), true, PROMPT)
                .with_context(|| format!("{what}, hung up"))?;
            ensure!(
                statuses(&heard).iter().all(|status| *status < 500),
                "{what}: {heard}"
            );
        }
        slow_loris(scene)?;
        is_well(node)
    })
}

/// 300 clients that send a byte of a header now and then: within seconds all are gone, and a proper one was never held up.
fn slow_loris(scene: &Scene) -> Result<()> {
    let node = scene.node();
    node.host().enter(|| -> Result<()> {
        let connect = || -> Result<TcpStream> {
            let mut stream = TcpStream::connect(node.mirror())?;
            stream.write_all(b"GET /v2/ HTTP/1.1\r\nHost: m\r\nX: ")?;
            stream.set_nonblocking(true)?;
            Ok(stream)
        };
        let mut slow = (0..300).map(|_| connect()).collect::<Result<Vec<_>>>()?;
        let start = Instant::now();
        while !slow.is_empty() {
            ensure!(
                start.elapsed() < Duration::from_secs(20),
                "{} are still there",
                slow.len()
            );
            let proper = Request::get(node.mirror(), "/v2/")
                .within(PROMPT)
                .send_here()?;
            ensure!(
                proper.status == 200 && proper.total < PROMPT,
                "{}",
                proper.status
            );
            std::thread::sleep(Duration::from_millis(500));
            slow.retain_mut(|stream| {
                let mut byte = [0; 256];
                let open = stream
                    .read(&mut byte)
                    .is_err_and(|error| error.kind() == ErrorKind::WouldBlock);
                open && stream.write_all(b"x").is_ok()
            });
        }
        Ok(())
    })?
}

#[test]
fn conditions_and_ranges_of_any_shape_bring_no_wrong_answer() -> Result<()> {
    Plan::nodes(1).play(|scene| {
        let blob = scene.blob(100_000)?;
        let long = "1".repeat(20_000);
        let commas = format!("bytes={}", ",".repeat(20_000));
        for (name, value) in [
            ("range", "bytes=-0"),
            ("range", "bytes=--5"),
            ("range", "bytes=0-0-0"),
            ("range", "bytes=18446744073709551615-18446744073709551616"),
            ("range", "bytes= 0 - 1 "),
            ("range", "BYTES=0-1"),
            ("range", "bytes=0-1;q=1"),
            ("range", "none"),
            ("range", &commas),
            ("range", &format!("bytes={long}-")),
            ("if-none-match", "*, \"x"),
            ("if-none-match", "W/\"\", ,,"),
            ("if-range", "\"nonsense\""),
            ("accept", ";;;,q="),
            ("accept-encoding", "gzip;q=9,*;q=-1"),
            ("authorization", ""),
            ("authorization", "Nonsense"),
            ("expect", "200-maybe"),
        ] {
            let answer = scene
                .request(scene.node(), &blob)
                .header(name, value)
                .send(scene.node().host())?;
            let shown = &value[..value.len().min(40)];
            match answer.status {
                200 => ensure!(
                    answer.digest == blob.digest.to_string(),
                    "{name}: {shown}: other bytes"
                ),
                206 => ensure!(
                    answer.header("content-range").is_some(),
                    "{name}: {shown}: no Content-Range"
                ),
                304 => ensure!(
                    name == "if-none-match" && value.starts_with('*'),
                    "{name}: {shown}: 304"
                ),
                status => ensure!((400..500).contains(&status), "{name}: {shown}: {status}"),
            }
        }
        let unknown = scene.node().request(
            scene.registry(),
            &format!("/v2/{REPOSITORY}/manifests/none"),
        );
        ensure!(unknown.send(scene.node().host())?.status == 404);
        is_well(scene.node())
    })
}
