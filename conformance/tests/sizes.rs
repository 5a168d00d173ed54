//! Registries that lie about sizes, and blobs of enormous ones: neither keeps other clients from their blobs.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use hawker_conformance::lab::{Hawker, HawkerPlan, Host, Lab};
use hawker_conformance::origin::{Blob, Content, Fault, Origin, Rule};
use hawker_conformance::scene::{REPOSITORY, blob_path, committed_path, right, until, with_origin};

const SIZE_BYTES: u64 = 5_000_000;
const WRONG_SIZE_BYTES: u64 = 777_777;
const PORT: u16 = 5007;

/// A registry that has every blob: so many bytes, all zero.
#[derive(Clone, Copy)]
struct ZeroRegistry {
    address: SocketAddr,
}

impl ZeroRegistry {
    /// `bytes_per_s`: how fast bodies come, if not at once.
    fn start(host: &Host, size_bytes: u64, bytes_per_s: Option<u64>) -> Result<Self> {
        let address = host.at(PORT);
        let listener = host.enter(|| TcpListener::bind(address))??;
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                std::thread::spawn(move || serve(stream, size_bytes, bytes_per_s));
            }
        });
        Ok(Self { address })
    }

    /// Asks a node's mirror for a blob of this registry, and reads nothing of the answer.
    fn ask_and_read_nothing(self, node: &Hawker, digest: &str) -> Result<TcpStream> {
        let mut stream = node.host().enter(|| TcpStream::connect(node.mirror()))??;
        let path = format!("/v2/{REPOSITORY}/blobs/{digest}?ns={}", self.address);
        write!(
            stream,
            "GET {path} HTTP/1.1\r\nHost: {}\r\n\r\n",
            node.mirror()
        )?;
        Ok(stream)
    }
}

/// One connection: an error ends it, as a client that goes away does.
fn serve(stream: TcpStream, size_bytes: u64, bytes_per_s: Option<u64>) -> Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut writer = stream;
    loop {
        let mut lines = Vec::new();
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line)? == 0 {
                return Ok(());
            }
            if line.trim().is_empty() {
                break;
            }
            lines.push(line);
        }
        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {size_bytes}\r\n\r\n");
        writer.write_all(head.as_bytes())?;
        if lines.first().is_some_and(|line| line.starts_with("HEAD")) {
            continue;
        }
        let mut left_bytes = size_bytes;
        while left_bytes > 0 {
            let chunk_bytes = left_bytes.min(bytes_per_s.unwrap_or(64 << 10));
            writer.write_all(&vec![0; chunk_bytes as usize])?;
            left_bytes -= chunk_bytes;
            if bytes_per_s.is_some() {
                std::thread::sleep(Duration::from_secs(1));
            }
        }
    }
}

fn beside(
    lab: &Lab,
    origin: &Origin,
    size_bytes: u64,
    rate: Option<u64>,
) -> Result<(Hawker, ZeroRegistry)> {
    let other = ZeroRegistry::start(&lab.host("other")?, size_bytes, rate)?;
    let plan = HawkerPlan::proxy(&lab.host("node")?).plain_registry(origin.address());
    Ok((plan.plain_registry(other.address).start()?, other))
}

fn pull(node: &Hawker, origin: &Origin, blob: &Blob) -> Result<Duration> {
    let begun = Instant::now();
    let request = node.request(origin.address(), &blob_path(blob)).discard();
    right(
        request.within(Duration::from_secs(30)).send(node.host())?,
        blob,
    )?;
    Ok(begun.elapsed())
}

fn honest_blob(origin: &Origin, seed: u64) -> Result<Blob> {
    Ok(origin.add_blob(REPOSITORY, Content::generated(seed, SIZE_BYTES))?)
}

#[test]
fn readers_of_enormous_blobs_that_do_not_read_hold_up_nobody() -> Result<()> {
    with_origin(|lab, origin| {
        let (node, huge) = beside(lab, origin, 2_000_000_000_000, None)?;
        let stalled: Vec<TcpStream> = (0..6)
            .map(|n| {
                huge.ask_and_read_nothing(&node, &format!("sha256:{}", format!("a{n}").repeat(32)))
            })
            .collect::<Result<_>>()?;
        std::thread::sleep(Duration::from_secs(4));
        for seed in 1..=3 {
            let took = pull(&node, origin, &honest_blob(origin, 500 + seed)?)?;
            ensure!(
                took < Duration::from_secs(8),
                "an honest pull took {took:?}"
            );
            std::thread::sleep(Duration::from_secs(3));
        }
        drop(stalled);
        Ok(())
    })
}

#[test]
fn a_registry_that_lies_about_a_size_blocks_the_blob_for_nobody_else() -> Result<()> {
    for rate in [None, Some(50_000)] {
        with_origin(|lab, origin| {
            let (node, liar) = beside(lab, origin, WRONG_SIZE_BYTES, rate)?;
            for seed in 1..=3 {
                let blob = honest_blob(origin, 510 + seed)?;
                // The liar comes first, and stays.
                let lie = liar.ask_and_read_nothing(&node, &blob.digest.to_string())?;
                std::thread::sleep(Duration::from_millis(700));
                for _ in 0..3 {
                    pull(&node, origin, &blob)?;
                }
                until(
                    Duration::from_secs(20),
                    "the commit beside the liar",
                    || {
                        pull(&node, origin, &blob)?;
                        Ok(committed_path(&node, &blob).is_file())
                    },
                )?;
                drop(lie);
            }
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn a_registry_that_lies_about_a_size_spoils_no_download_under_way() -> Result<()> {
    with_origin(|lab, origin| {
        let (node, liar) = beside(lab, origin, WRONG_SIZE_BYTES, Some(50_000))?;
        let blob = honest_blob(origin, 520)?;
        let slow = Fault::SlowBody {
            bytes_per_s: 1_500_000,
        };
        origin.add_fault(Rule::always(slow).on(blob.digest).method("GET"));
        std::thread::scope(|scope| {
            let honest = scope.spawn(|| pull(&node, origin, &blob));
            std::thread::sleep(Duration::from_secs(1));
            let lie = liar.ask_and_read_nothing(&node, &blob.digest.to_string());
            hawker_conformance::scene::join(honest.join())?;
            lie.map(drop)
        })?;
        until(Duration::from_secs(10), "the commit", || {
            Ok(committed_path(&node, &blob).is_file())
        })
    })
}
