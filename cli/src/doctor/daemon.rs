//! The daemon itself, as its admin server tells.

use std::time::{SystemTime, UNIX_EPOCH};

use hawker_proxy::admin::{CertificateStatus, SchedulerStatus, Status};

use super::Check;
use crate::args::DoctorArgs;
use crate::system::OPEN_FILES_LEAST;
use crate::{client, resolve, status};
use hawker_config::quantity::human_duration;

/// The daemon's own view.
pub(super) async fn check(args: &DoctorArgs) -> (Vec<Check>, Option<Status>) {
    let json = match status::ask(&args.admin).await {
        Ok(json) => json,
        Err(error) => {
            let cure = "start it: systemctl start hawker-proxy (or: hawker proxy); if it runs elsewhere, name it by --admin";
            return (vec![Check::fail("daemon", error.to_string(), cure)], None);
        }
    };
    let Ok(status) = serde_json::from_str::<Status>(&json) else {
        let found = format!("what answers at {} is no hawker daemon", args.admin);
        return (
            vec![Check::fail(
                "daemon",
                found,
                "name the daemon's address by --admin",
            )],
            None,
        );
    };
    let mut checks = vec![ready(&status)];
    checks.extend(cluster(&status));
    checks.extend(store(&status));
    checks.push(open_files(&status));
    checks.extend(
        status
            .certificate
            .map(|certificate| clock(&certificate, now_s())),
    );
    (checks, Some(status))
}

/// The mirror's address: as told, as the daemon says, or where it is by default.
pub(super) fn mirror_address(args: &DoctorArgs, status: Option<&Status>) -> String {
    let said = status.and_then(|status| status.mirror.first().cloned());
    args.mirror
        .as_deref()
        .map(address)
        .or(said)
        .unwrap_or_else(|| resolve::MIRROR.to_owned())
}

/// The address in a URL of the mirror, as `hawker configure` takes it.
fn address(mirror: &str) -> String {
    mirror
        .strip_prefix("http://")
        .unwrap_or(mirror)
        .trim_end_matches('/')
        .to_owned()
}

/// Whether the mirror answers as runtimes ask first.
pub(super) async fn check_mirror(mirror: &str) -> Vec<Check> {
    let cure = "name the mirror's address by --mirror; the daemon's log says where it listens";
    vec![match client::get(mirror, "/v2/").await {
        Ok(answer) if matches!(answer.status, 200 | 401) => Check::pass(
            "mirror",
            format!("{mirror} answers /v2/ with {}", answer.status),
        ),
        Ok(answer) => Check::fail(
            "mirror",
            format!("{mirror} answers /v2/ with {}", answer.status),
            cure,
        ),
        Err(error) => Check::fail("mirror", format!("{mirror} does not answer: {error}"), cure),
    }]
}

fn ready(status: &Status) -> Check {
    let found = format!(
        "{} ({}, {}) up {}",
        status.name,
        status.role,
        status.version,
        human_duration(status.uptime_s)
    );
    if status.ready {
        return Check::pass("daemon", found);
    }
    Check::fail(
        "daemon",
        format!("{found}, but not ready"),
        "it starts or drains; its log says more",
    )
}

fn cluster(status: &Status) -> Vec<Check> {
    let mut checks = Vec::new();
    let name = |scheduler: &SchedulerStatus| match scheduler.problem.as_str() {
        "" => scheduler.address.clone(),
        problem => format!("{} ({problem})", scheduler.address),
    };
    let down: Vec<String> = status
        .schedulers
        .iter()
        .filter(|s| !s.connected)
        .map(name)
        .collect();
    let cure = "pulls go on without it, from seeds and registries. Is it running, its port open, its address still right \
                (--scheduler)?";
    match (status.schedulers.len(), down.len()) {
        (0, _) => {}
        (_, 0) => checks.push(Check::pass("schedulers", "connected")),
        (all, lost) if lost < all => {
            checks.push(Check::warn(
                "schedulers",
                format!("not connected: {}", down.join(", ")),
                cure,
            ));
        }
        _ => checks.push(Check::fail(
            "schedulers",
            format!("none is connected: {}", down.join(", ")),
            cure,
        )),
    }
    let seeds: Vec<_> = status
        .members
        .iter()
        .filter(|m| m.role == "seed" && m.peer_id != status.peer_id)
        .collect();
    if !seeds.is_empty() {
        let isolated: Vec<&str> = seeds
            .iter()
            .filter(|m| m.isolated)
            .map(|m| m.name.as_str())
            .collect();
        let connected = seeds.iter().filter(|m| m.connected).count();
        // Connections to seeds are made when there is something to fetch: none is no fault.
        checks.push(if isolated.is_empty() {
            Check::pass("seeds", format!("{} known, {connected} connected", seeds.len()))
        } else {
            let cure = "members reported wrong bytes from it: check its disk and memory, then start it anew";
            Check::warn("seeds", format!("isolated: {}", isolated.join(", ")), cure)
        });
    } else if status.role == "alone" {
        let cure = "to share with other nodes: hawker proxy --join HOST:PORT --token-file FILE";
        checks.push(Check::skip(
            "cluster",
            "this node runs alone, as a verified cache",
            cure,
        ));
    }
    checks
}

fn store(status: &Status) -> Vec<Check> {
    let store = &status.store;
    if store.degraded {
        let cure = "free space or inodes, or mount it writable; the daemon goes on through memory and tries the disk again";
        return vec![Check::fail("store", "the disk refuses writes", cure)];
    }
    let used = store.disk_used_percent;
    let Some(used) = used.filter(|_| store.high_percent > 0) else {
        return vec![Check::pass(
            "store",
            format!("{} blobs, writable", store.blobs),
        )];
    };
    let found = format!(
        "{} blobs, writable, disk {used} % full (evicts from {} %)",
        store.blobs, store.high_percent
    );
    if used > store.high_percent {
        let cure = "something else fills the disk, or all of it is being read: free space, or give --data-dir a disk of its own";
        return vec![Check::warn("store", found, cure)];
    }
    vec![Check::pass("store", found)]
}

fn open_files(status: &Status) -> Check {
    let process = &status.process;
    let found = format!("{} of {}", process.open_files, process.open_files_limit);
    let cure = "raise the hard limit: LimitNOFILE=1048576 in the systemd unit, or ulimit -Hn";
    let tight = process.open_files > process.open_files_limit / 10 * 8;
    if process.open_files_limit < OPEN_FILES_LEAST || tight {
        return Check::warn("open files", found, cure);
    }
    Check::pass("open files", found)
}

fn clock(certificate: &CertificateStatus, now_s: u64) -> Check {
    let CertificateStatus {
        not_before_s,
        not_after_s,
    } = *certificate;
    if now_s < not_before_s {
        let behind = human_duration(not_before_s - now_s);
        let cure = "certificates begin an hour back, so the clocks differ by more: set this one (timedatectl set-ntp true)";
        return Check::fail(
            "clock",
            format!("this node's certificate begins in {behind}"),
            cure,
        );
    }
    if now_s >= not_after_s {
        let cure = "set the clock if it is wrong; else join again with a new token after removing DATA_DIR/identity";
        return Check::fail("clock", "this node's certificate has expired", cure);
    }
    let left = not_after_s - now_s;
    let found = format!(
        "within the certificate's validity, {} left",
        human_duration(left)
    );
    if left < (not_after_s - not_before_s) / 4 {
        let cure =
            "it should have renewed itself at two thirds of its life: is the scheduler reachable?";
        return Check::warn("clock", found, cure);
    }
    Check::pass("clock", found)
}

fn now_s() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::super::Outcome;
    use super::*;
    use hawker_proxy::admin::{MemberStatus, ProcessStatus, SchedulerStatus, StoreStatus};

    #[test]
    fn the_mirror_may_be_named_by_its_url() {
        for named in [
            "10.0.0.1:6500",
            "http://10.0.0.1:6500",
            "http://10.0.0.1:6500/",
        ] {
            assert_eq!(address(named), "10.0.0.1:6500");
        }
    }

    #[test]
    fn a_clock_outside_the_certificate_is_told() {
        let certificate = CertificateStatus {
            not_before_s: 1_000,
            not_after_s: 2_000,
        };
        for (now_s, outcome) in [
            (999, Outcome::Fail),
            (1_000, Outcome::Pass),
            (1_800, Outcome::Warn),
            (2_000, Outcome::Fail),
        ] {
            assert_eq!(clock(&certificate, now_s).outcome, outcome, "{now_s}");
        }
    }

    #[test]
    fn each_trouble_of_a_daemon_has_its_line() {
        let scheduler = |connected| SchedulerStatus {
            address: "a:1".into(),
            connected,
            ..SchedulerStatus::default()
        };
        let one = |schedulers: Vec<SchedulerStatus>| {
            cluster(&Status {
                schedulers,
                ..Status::default()
            })
            .first()
            .map(|check| check.outcome)
        };
        assert_eq!(one(vec![]), None);
        assert_eq!(one(vec![scheduler(true)]), Some(Outcome::Pass));
        assert_eq!(
            one(vec![scheduler(true), scheduler(false)]),
            Some(Outcome::Warn)
        );
        assert_eq!(one(vec![scheduler(false)]), Some(Outcome::Fail));
        let seed = MemberStatus {
            role: "seed".into(),
            peer_id: "s".into(),
            isolated: true,
            ..MemberStatus::default()
        };
        let members = vec![seed];
        assert_eq!(
            cluster(&Status {
                members,
                ..Status::default()
            })[0]
                .outcome,
            Outcome::Warn
        );
        for (degraded, used, outcome) in [
            (true, 10, Outcome::Fail),
            (false, 95, Outcome::Warn),
            (false, 50, Outcome::Pass),
        ] {
            let disk_used_percent = Some(used);
            let store = StoreStatus {
                degraded,
                disk_used_percent,
                high_percent: 90,
                ..StoreStatus::default()
            };
            assert_eq!(
                super::store(&Status {
                    store,
                    ..Status::default()
                })[0]
                    .outcome,
                outcome
            );
        }
        for (open_files, open_files_limit, outcome) in [
            (10, 1024, Outcome::Warn),
            (9_000, 10_000, Outcome::Warn),
            (10, 65_536, Outcome::Pass),
        ] {
            let process = ProcessStatus {
                pid: 1,
                open_files,
                open_files_limit,
            };
            assert_eq!(
                super::open_files(&Status {
                    process,
                    ..Status::default()
                })
                .outcome,
                outcome
            );
        }
    }
}
