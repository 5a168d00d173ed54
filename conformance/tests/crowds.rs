//! Many clients that hold connections and do nothing with them: others are served all the same.

use std::io::Read as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use hawker_conformance::attacker::invented;
use hawker_conformance::lab::{End, Hawker, HawkerPlan, Host};
use hawker_conformance::origin::Content;
use hawker_conformance::scene::{
    Plan, REPOSITORY, Scene, blob_path, right, until_committed, with_origin,
};
use hawker_oci::digest::Digest;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};

const SIZE_BYTES: u64 = 3 << 20;
/// More than a node serves at once.
const CROWD: usize = 6000;

/// The bytes that a connection sends before it falls silent.
const SAYINGS: [&[u8]; 4] = [
    b"",
    b"GET /v2/ HTTP/1.1\r\nHost: m",
    // The beginning of a TLS handshake.
    b"\x16\x03\x01\x02\x00\x01",
    // A request that is answered; then the connection is kept.
    b"GET /v2/ HTTP/1.1\r\nHost: mirror\r\n\r\n",
];

fn allow_many_files() -> Result<()> {
    let maximum = getrlimit(Resource::Nofile).maximum;
    Ok(setrlimit(
        Resource::Nofile,
        Rlimit {
            current: maximum,
            maximum,
        },
    )?)
}

async fn connect(to: SocketAddr, from: Option<Ipv4Addr>) -> Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    // Some MiB in each of hundreds of sockets would take the machine a while to send.
    socket.set_recv_buffer_size(32 << 10)?;
    if let Some(from) = from {
        socket.bind(SocketAddr::new(IpAddr::V4(from), 0))?;
    }
    Ok(socket.connect(to).await?)
}

/// Connections that say something each and are held open.
fn crowd(
    host: &Host,
    to: SocketAddr,
    from: impl Fn(usize) -> Option<Ipv4Addr> + Send,
) -> Result<Vec<std::net::TcpStream>> {
    host.block_on(async move {
        let mut crowd = Vec::new();
        for one in 0..CROWD {
            let mut connection = connect(to, from(one))
                .await
                .with_context(|| format!("connection {one}"))?;
            // One that is turned away may be gone already.
            let _ = connection.write_all(SAYINGS[one % SAYINGS.len()]).await;
            crowd.push(connection.into_std()?);
        }
        Ok(crowd)
    })?
}

fn pulls_go_on(
    scene: &Scene,
    node: &Hawker,
    cached: &hawker_conformance::origin::Blob,
) -> Result<()> {
    let new = scene.blob(SIZE_BYTES)?;
    for (what, blob) in [("cached", cached), ("new", &new), ("cached again", cached)] {
        let started = Instant::now();
        let answer = scene
            .get(node, blob)
            .with_context(|| format!("a {what} blob"))?;
        right(answer, blob).with_context(|| format!("a {what} blob"))?;
        ensure!(
            started.elapsed() < Duration::from_secs(5),
            "a {what} blob took {:?}",
            started.elapsed()
        );
    }
    Ok(())
}

#[test]
fn thousands_of_connections_without_a_request_keep_nobody_out() -> Result<()> {
    allow_many_files()?;
    Plan::nodes(1).play(|scene| {
        let cached = scene.blob(SIZE_BYTES)?;
        scene.pull(scene.node(), &cached)?;
        until_committed(scene.node(), &cached)?;
        let (node, mirror) = (scene.node(), scene.node().mirror());
        let from_one = crowd(node.host(), mirror, |_| None)?;
        pulls_go_on(scene, node, &cached).context("held from one address")?;
        drop(from_one);
        let many = |one: usize| Some(Ipv4Addr::new(127, 1 + (one >> 8) as u8, one as u8, 1));
        let from_many = crowd(node.host(), mirror, many)?;
        pulls_go_on(scene, node, &cached).context("held from many addresses")?;
        drop(from_many);
        pulls_go_on(scene, node, &cached).context("afterwards")
    })
}

/// Blobs of 2 TB are only passed through. Their clients take the first bytes and then no more.
#[test]
fn hundreds_of_clients_that_do_not_read_huge_blobs_hold_little_memory() -> Result<()> {
    const CLIENTS: u32 = 300;
    const ALLOWED_MIB: u64 = 160;
    allow_many_files()?;
    Plan::nodes(1).play(|scene| {
        let cached = scene.blob(SIZE_BYTES)?;
        scene.pull(scene.node(), &cached)?;
        until_committed(scene.node(), &cached)?;
        let huge: Vec<Digest> = (0..CLIENTS).map(invented).collect();
        for (seed, digest) in huge.iter().enumerate() {
            let content = Content::generated(seed as u64, 2 << 40);
            scene.origin.add_claimed_blob(REPOSITORY, digest, content);
        }
        let (node, registry) = (scene.node(), scene.registry().replace(':', "%3A"));
        let stalled = node.host().block_on(async {
            let mut clients = Vec::new();
            for digest in &huge {
                let mut client = connect(node.mirror(), None).await?;
                let path = format!("/v2/{REPOSITORY}/blobs/{digest}?ns={registry}");
                client
                    .write_all(format!("GET {path} HTTP/1.1\r\nHost: m\r\n\r\n").as_bytes())
                    .await?;
                clients.push(client);
            }
            for client in &mut clients {
                let mut first = [0; 12];
                client.read_exact(&mut first).await?;
                ensure!(
                    first.ends_with(b"200"),
                    "{}",
                    String::from_utf8_lossy(&first)
                );
            }
            clients
                .into_iter()
                .map(|client| Ok(client.into_std()?))
                .collect::<Result<Vec<_>>>()
        })??;
        std::thread::sleep(Duration::from_secs(5));
        let held_mib = node.anonymous_bytes()? >> 20;
        ensure!(held_mib <= ALLOWED_MIB, "the node holds {held_mib} MiB");
        let started = Instant::now();
        scene.pull(node, &cached).context("a cached blob")?;
        ensure!(
            started.elapsed() < Duration::from_secs(5),
            "a cached blob took {:?}",
            started.elapsed()
        );
        let (new, started) = (scene.blob(SIZE_BYTES)?, Instant::now());
        scene.pull(node, &new).context("a new blob")?;
        // If memory is short, the tasks of such blobs look for nothing: neither origin nor scheduler nor seed is kept
        // busy by them.
        ensure!(
            started.elapsed() < Duration::from_secs(20),
            "a new blob took {:?}",
            started.elapsed()
        );
        // A client that comes back gets the bytes that it would have got.
        let mut back = stalled.into_iter().next().context("none")?;
        back.set_nonblocking(false)?;
        back.set_read_timeout(Some(Duration::from_secs(10)))?;
        let mut body = Vec::new();
        std::io::Read::take(&mut back, 8 << 20).read_to_end(&mut body)?;
        let head = body
            .windows(4)
            .position(|end| end == b"\r\n\r\n")
            .context("no head")?
            + 4;
        let mut expected = vec![0; body.len() - head];
        Content::generated(0, 2 << 40).read_at(0, &mut expected)?;
        ensure!(
            expected.len() > 4 << 20 && body[head..] == expected[..],
            "{} other bytes",
            expected.len()
        );
        Ok(())
    })
}

#[test]
fn a_node_with_few_files_serves_beside_silent_and_stalled_connections() -> Result<()> {
    with_origin(|lab, origin| {
        let host = lab.host("node")?;
        let plan = HawkerPlan::proxy(&host).plain_registry(origin.address());
        let node = plan.wrapped_in(&["prlimit", "--nofile=256:256"]).start()?;
        let blob = origin.add_blob(REPOSITORY, Content::generated(5, 24 << 20))?;
        let pull = || {
            let request = node.request(origin.address(), &blob_path(&blob)).discard();
            right(request.within(Duration::from_secs(20)).send(&host)?, &blob)
        };
        pull()?;
        until_committed(&node, &blob)?;
        let silent = host.block_on(async {
            let mut silent = Vec::new();
            for _ in 0..400 {
                silent.push(connect(node.mirror(), None).await?.into_std()?);
            }
            anyhow::Ok(silent)
        })??;
        pull().context("beside silent connections")?;
        drop(silent);

        let (address, path) = (
            node.mirror(),
            format!("{}?ns={}", blob_path(&blob), origin.address()),
        );
        let stalled = host.block_on(async {
            let mut stalled = Vec::new();
            for _ in 0..128 {
                let mut connection = connect(address, None).await?;
                let head = format!("GET {path} HTTP/1.1\r\nHost: mirror\r\n\r\n");
                connection.write_all(head.as_bytes()).await?;
                let mut first = [0; 12];
                // The places are full when one is turned away.
                if connection.read_exact(&mut first).await.is_err() || !first.ends_with(b"200") {
                    break;
                }
                stalled.push(connection.into_std()?);
            }
            anyhow::Ok(stalled)
        })??;
        ensure!(
            (64..128).contains(&stalled.len()),
            "{} connections fill all places",
            stalled.len()
        );
        // They count as stalled after 20 s.
        std::thread::sleep(Duration::from_secs(22));
        let answer = pull().context("beside stalled connections")?;
        ensure!(answer.end == End::Complete);
        drop(stalled);
        pull().map(drop)
    })
}
