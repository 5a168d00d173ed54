//! `hawker status`: the cluster, this node and its bytes at a glance.

use std::fmt::Write;

use anyhow::{Context, bail};
use hawker_proxy::admin::{ApplicationStatus, BytesStatus, Status, TaskStatus};

use crate::args::StatusArgs;
use crate::{client, print};
use hawker_config::quantity::{human_duration, human_size};

/// Asks the daemon and prints.
pub(crate) async fn run(args: &StatusArgs) -> anyhow::Result<()> {
    let json = ask(&args.admin).await?;
    if args.json {
        return Ok(print::line(json.trim_end())?);
    }
    let status: Status = serde_json::from_str(&json).with_context(|| {
        format!(
            "what answers at {} is no hawker daemon (--admin)",
            args.admin
        )
    })?;
    Ok(print::line(render(&status).trim_end())?)
}

/// The daemon's `/status`.
pub(crate) async fn ask(admin: &str) -> anyhow::Result<String> {
    let answer = match client::get(admin, "/status").await {
        Ok(answer) => answer,
        Err(error) => bail!("no daemon answers at {admin} ({error}); is it running? (--admin)"),
    };
    if answer.status != 200 {
        bail!(
            "{admin} answers {} to /status: is that the admin address of a hawker daemon? (--admin)",
            answer.status
        );
    }
    Ok(answer.body)
}

/// The whole page.
fn render(status: &Status) -> String {
    let mut out = String::new();
    head(&mut out, status);
    members(&mut out, status);
    bytes(&mut out, &status.bytes);
    applications(&mut out, &status.applications);
    tasks(&mut out, &status.tasks);
    out
}

fn head(out: &mut String, status: &Status) {
    let state = if status.ready { "ready" } else { "NOT READY" };
    let up = human_duration(status.uptime_s);
    line(
        out,
        &format!(
            "{}  {}  {state}  up {up}  version {}",
            status.name, status.role, status.version
        ),
    );
    if !status.problem.is_empty() {
        line(out, &format!("PROBLEM    {}", status.problem));
    }
    if !status.cluster.is_empty() {
        line(out, &format!("cluster    {}", status.cluster));
    }
    for scheduler in &status.schedulers {
        let state = if scheduler.connected {
            "connected"
        } else {
            "NOT CONNECTED (pulls go on without it)"
        };
        line(out, &format!("scheduler  {}  {state}", scheduler.address));
        if !scheduler.problem.is_empty() {
            line(out, &format!("           {}", scheduler.problem));
        }
    }
    if !status.mirror.is_empty() {
        line(out, &format!("mirror     {}", status.mirror.join(", ")));
    }
    if !status.forward_proxy.is_empty() {
        line(
            out,
            &format!("forward    {}", status.forward_proxy.join(", ")),
        );
    }
    let store = &status.store;
    let begun = if store.partials > 0 {
        format!(", {} begun", store.partials)
    } else {
        String::new()
    };
    let degraded = if store.degraded {
        "  DEGRADED: the disk refuses writes"
    } else {
        ""
    };
    let blobs = if store.blobs == 1 { "blob" } else { "blobs" };
    line(
        out,
        &format!(
            "store      {} {blobs}{begun}, {}{degraded}",
            store.blobs,
            human_size(store.bytes)
        ),
    );
}

fn members(out: &mut String, status: &Status) {
    if status.members.is_empty() {
        return;
    }
    line(out, &format!("\nMembers ({})", status.members.len()));
    let rows = status.members.iter().map(|member| {
        let this = member.peer_id == status.peer_id && !status.peer_id.is_empty();
        let connection = match (this, member.connected) {
            (true, _) => "this node",
            (_, true) => "connected",
            _ => "-",
        };
        let isolated = match (member.isolated, member.isolated_for.as_str()) {
            (false, _) => String::new(),
            (true, "") => "ISOLATED".to_owned(),
            (true, why) => format!(
                "ISOLATED for {why}, {} more",
                human_duration(member.isolated_for_s)
            ),
        };
        let addresses = member.addresses.join(", ");
        [
            &member.name,
            &member.role,
            &addresses,
            connection,
            &isolated,
        ]
        .map(str::to_owned)
    });
    table(
        out,
        ["NAME", "ROLE", "ADDRESS", "CONNECTION", ""],
        rows.collect(),
        &[],
    );
}

fn bytes(out: &mut String, bytes: &BytesStatus) {
    let received = bytes.received_peers + bytes.received_seeds + bytes.received_origin;
    line(out, "\nBytes");
    let served = bytes.served.max(1);
    let cached = percent(bytes.served_cache, served);
    line(
        out,
        &format!(
            "  served to runtimes  {} ({cached} out of the cache)",
            human_size(bytes.served)
        ),
    );
    line(
        out,
        &format!("  sent to peers       {}", human_size(bytes.uploaded)),
    );
    line(
        out,
        &format!("  received            {}", human_size(received)),
    );
    // The bytes from the cache were not received: all four together are the sources of the node's content.
    let all = (received + bytes.served_cache).max(1);
    let sources = [
        ("cache", bytes.served_cache),
        ("peers", bytes.received_peers),
        ("seeds", bytes.received_seeds),
        ("origin", bytes.received_origin),
    ];
    let rows = sources.map(|(name, n)| [name.to_owned(), human_size(n), percent(n, all)]);
    table(out, ["FROM", "BYTES", "SHARE"], rows.to_vec(), &[1, 2]);
}

fn applications(out: &mut String, applications: &[ApplicationStatus]) {
    if applications.is_empty() {
        return;
    }
    line(out, &format!("\nApplications ({})", applications.len()));
    let rows = applications.iter().map(|one| {
        let [served, received, origin, uploaded] =
            [one.served, one.received, one.origin, one.uploaded].map(human_size);
        [
            one.name.clone(),
            served,
            received,
            origin,
            uploaded,
            one.refused.to_string(),
        ]
    });
    let head = [
        "NAME",
        "SERVED",
        "FROM PEERS",
        "FROM ORIGIN",
        "TO PEERS",
        "REFUSED",
    ];
    table(out, head, rows.collect(), &[1, 2, 3, 4, 5]);
}

fn tasks(out: &mut String, tasks: &[TaskStatus]) {
    if tasks.is_empty() {
        return;
    }
    line(out, &format!("\nDownloads ({})", tasks.len()));
    let rows = tasks.iter().map(|task| {
        let size = if task.size_bytes == 0 {
            "?".to_owned()
        } else {
            human_size(task.size_bytes)
        };
        let done = if task.of == 0 {
            "?".to_owned()
        } else {
            percent(task.pieces, task.of)
        };
        let pieces = format!("{}/{}", task.pieces, task.of);
        [
            short(&task.task),
            size,
            done,
            pieces,
            task.state.clone(),
            task.readers.to_string(),
        ]
    });
    table(
        out,
        ["TASK", "SIZE", "DONE", "PIECES", "STATE", "READERS"],
        rows.collect(),
        &[1, 2, 3, 5],
    );
}

/// A digest's first letters are enough for people.
fn short(digest: &str) -> String {
    let end = digest.find(':').map_or(0, |colon| colon + 1) + 12;
    digest.chars().take(end).collect()
}

fn percent(part: u64, whole: u64) -> String {
    let tenths = u128::from(part) * 1000 / u128::from(whole.max(1));
    if tenths >= 100 {
        format!("{} %", (tenths + 5) / 10)
    } else {
        format!("{}.{} %", tenths / 10, tenths % 10)
    }
}

fn line(out: &mut String, text: &str) {
    out.push_str(text.trim_end());
    out.push('\n');
}

/// Columns as wide as their widest cell; those in `right` are aligned to the right.
pub(crate) fn table<const N: usize>(
    out: &mut String,
    head: [&str; N],
    rows: Vec<[String; N]>,
    right: &[usize],
) {
    let all = || std::iter::once(head.map(str::to_owned)).chain(rows.iter().cloned());
    let widths: [usize; N] = std::array::from_fn(|i| {
        all()
            .map(|row| row[i].chars().count())
            .max()
            .unwrap_or_default()
    });
    for row in all() {
        let mut text = String::from("  ");
        for (i, cell) in row.iter().enumerate() {
            let width = widths[i];
            // Writing to a string does not fail.
            let _ = if right.contains(&i) {
                write!(text, "{cell:>width$}  ")
            } else {
                write!(text, "{cell:<width$}  ")
            };
        }
        line(out, &text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hawker_proxy::admin::{MemberStatus, SchedulerStatus, StoreStatus};

    fn sample() -> Status {
        let member = |name: &str, role: &str, connected, isolated| MemberStatus {
            name: name.into(),
            peer_id: format!("id-{name}"),
            role: role.into(),
            addresses: vec![format!("{name}:6501")],
            connected,
            isolated,
            isolated_for: if isolated {
                "wrong bytes".into()
            } else {
                String::new()
            },
            isolated_for_s: if isolated { 540 } else { 0 },
        };
        Status {
            name: "n1".into(),
            peer_id: "id-n1".into(),
            role: "peer".into(),
            cluster: "lab".into(),
            version: "0.1.0".into(),
            uptime_s: 3_700,
            ready: true,
            mirror: vec!["127.0.0.1:6500".into()],
            forward_proxy: vec!["127.0.0.1:6505".into()],
            schedulers: vec![SchedulerStatus {
                address: "s1:6502".into(),
                connected: false,
                problem: "it refused the certificate".into(),
            }],
            members: vec![
                member("n1", "peer", false, false),
                member("seed", "seed", true, false),
                member("longer-name", "peer", false, true),
            ],
            bytes: BytesStatus {
                received_peers: 600 << 20,
                received_seeds: 100 << 20,
                received_origin: 0,
                served: 1000 << 20,
                served_cache: 300 << 20,
                uploaded: 50 << 20,
            },
            applications: vec![ApplicationStatus {
                name: "shop".into(),
                served: 5 << 20,
                refused: 2,
                ..ApplicationStatus::default()
            }],
            store: StoreStatus {
                blobs: 7,
                partials: 1,
                bytes: 700 << 20,
                ..StoreStatus::default()
            },
            tasks: vec![TaskStatus {
                task: format!("sha256:{}", "ab".repeat(32)),
                size_bytes: 64 << 20,
                pieces: 16,
                of: 64,
                state: "running".into(),
                readers: 2,
            }],
            ..Status::default()
        }
    }

    #[test]
    fn the_page_shows_cluster_bytes_and_downloads_in_aligned_columns() {
        let expected = "\
n1  peer  ready  up 1 h 1 min  version 0.1.0
cluster    lab
scheduler  s1:6502  NOT CONNECTED (pulls go on without it)
           it refused the certificate
mirror     127.0.0.1:6500
forward    127.0.0.1:6505
store      7 blobs, 1 begun, 700 MiB

Members (3)
  NAME         ROLE  ADDRESS           CONNECTION
  n1           peer  n1:6501           this node
  seed         seed  seed:6501         connected
  longer-name  peer  longer-name:6501  -           ISOLATED for wrong bytes, 9 min more

Bytes
  served to runtimes  1.0 GiB (30 % out of the cache)
  sent to peers       50.0 MiB
  received            700 MiB
  FROM      BYTES  SHARE
  cache   300 MiB   30 %
  peers   600 MiB   60 %
  seeds   100 MiB   10 %
  origin      0 B  0.0 %

Applications (1)
  NAME   SERVED  FROM PEERS  FROM ORIGIN  TO PEERS  REFUSED
  shop  5.0 MiB         0 B          0 B       0 B        2

Downloads (1)
  TASK                    SIZE  DONE  PIECES  STATE    READERS
  sha256:abababababab  64.0 MiB  25 %   16/64  running        2
";
        let expected = expected.replace(
            "TASK                    SIZE",
            "TASK                     SIZE",
        );
        assert_eq!(render(&sample()), expected);
    }

    #[test]
    fn what_is_wrong_stands_out() {
        let mut status = sample();
        status.ready = false;
        status.store.degraded = true;
        let page = render(&status);
        assert!(
            page.contains("NOT READY") && page.contains("DEGRADED"),
            "{page}"
        );
    }

    #[test]
    fn a_node_that_has_done_nothing_yet_divides_by_nothing() {
        let page = render(&Status::default());
        assert!(page.contains("(0.0 % out of the cache)"), "{page}");
    }

    #[tokio::test]
    async fn without_a_daemon_the_error_names_the_flag() {
        let closed = std::net::TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .to_string();
        let args = StatusArgs {
            admin: closed,
            json: false,
        };
        let error = run(&args).await.unwrap_err().to_string();
        assert!(error.contains("is it running? (--admin)"), "{error}");
    }
}
