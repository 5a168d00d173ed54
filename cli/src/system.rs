//! A daemon's dealings with the system: the limit on open files, a free port, a writable directory, and word to
//! systemd.

use std::io::{ErrorKind, Write};
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use sd_notify::NotifyState;

use hawker_config::Problem;
use hawker_config::schema::flag_of;

/// Fewer open files than these are soon used up by connections.
pub(crate) const OPEN_FILES_LEAST: u64 = 4096;

/// Raises the limit on open files as far as it may be, and warns when that is not far.
pub(crate) fn raise_open_files() {
    let limit = getrlimit(Resource::Nofile);
    if limit.current == limit.maximum {
        warn_of_few_files(limit.current);
        return;
    }
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    match setrlimit(Resource::Nofile, raised) {
        Ok(()) => warn_of_few_files(limit.maximum),
        Err(error) => {
            tracing::warn!(%error, "the limit on open files could not be raised");
            warn_of_few_files(limit.current);
        }
    }
}

fn warn_of_few_files(limit: Option<u64>) {
    match limit {
        Some(open_files) if open_files < OPEN_FILES_LEAST => tracing::warn!(
            open_files,
            "few files may be open at once: set LimitNOFILE=1048576 in the systemd unit, or raise `ulimit -Hn`"
        ),
        _ => tracing::debug!(?limit, "open files"),
    }
}

/// Addresses that can't be listened on, each with the flag and the cure. `keys` pairs a key with its address.
pub(crate) fn check_listeners(keys: &[(&str, SocketAddr)]) -> Vec<Problem> {
    keys.iter()
        .filter_map(|(key, address)| check_listener(key, *address))
        .collect()
}

fn check_listener(key: &str, address: SocketAddr) -> Option<Problem> {
    let error = TcpListener::bind(address).err()?;
    let (what, cure) = match error.kind() {
        ErrorKind::AddrInUse => (
            format!("{address} is taken by another program"),
            format!(
                "is another hawker running (systemctl status 'hawker*')? Who has it: ss -ltnp 'sport = :{}'; or choose \
                 another port",
                address.port()
            ),
        ),
        ErrorKind::AddrNotAvailable => (
            format!("{address} is no address of this host"),
            "choose one that `ip address` shows".to_owned(),
        ),
        ErrorKind::PermissionDenied => (
            format!("this user may not listen on {address}"),
            "choose a port above 1023".to_owned(),
        ),
        _ => (
            format!("{address} can't be listened on: {error}"),
            "choose another address".to_owned(),
        ),
    };
    Some(Problem::new(format!("--{}", flag_of(key)), what, cure))
}

/// Why this directory can't hold a daemon's data; makes it when it is missing.
pub(crate) fn check_data_dir(dir: &Path) -> Option<Problem> {
    let attempt = std::fs::create_dir_all(dir).and_then(|()| {
        let probe = dir.join(format!(".writable-{}", std::process::id()));
        let written = std::fs::File::create(&probe).and_then(|mut file| file.write_all(b"x"));
        // Removed also when the disk was full half-way.
        let removed = std::fs::remove_file(&probe);
        written.and(removed)
    });
    let error = attempt.err()?;
    // A disk that refuses is no reason not to start: blobs then pass through memory.
    if hawker_proxy::store::disk_refuses(&error) {
        tracing::warn!(dir = %dir.display(), %error, "the data directory can't be written");
        return None;
    }
    let what = format!("{} can't be written: {error}", dir.display());
    let cure = match error.kind() {
        ErrorKind::PermissionDenied => {
            "run as a user that may write there, or choose another directory"
        }
        _ => "choose another directory",
    };
    Some(Problem::new("--data-dir", what, cure))
}

/// Tells systemd, if it started us. Failing to tell is worth a line, no more.
pub(crate) fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!(%error, "systemd could not be told");
    }
}

/// Reloading has to carry the time it began; [`NotifyState::Ready`] ends it.
pub(crate) fn tell_reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => tell(&[NotifyState::Reloading, now]),
        Err(error) => tracing::debug!(%error, "no monotonic clock"),
    }
}

/// Tells systemd's watchdog that the runtime still turns, at half the time it allows; never returns when it watches.
pub(crate) async fn feed_watchdog() {
    let Some(allowed) = sd_notify::watchdog_enabled() else {
        return std::future::pending().await;
    };
    let mut beat = tokio::time::interval((allowed / 2).max(Duration::from_millis(100)));
    loop {
        beat.tick().await;
        tell(&[NotifyState::Watchdog]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_taken_port_names_the_flag_and_the_cure() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = taken.local_addr().unwrap();
        let free: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let problems = check_listeners(&[("mirror", address), ("admin", free)]);
        assert_eq!(problems.len(), 1);
        assert_eq!(problems[0].key, "--mirror");
        assert!(problems[0].what.contains("taken") && problems[0].cure.contains("another port"));
        let strange = check_listener("admin", "203.0.113.1:9".parse().unwrap()).unwrap();
        assert!(
            strange.what.contains("no address of this host"),
            "{strange}"
        );
    }

    #[test]
    fn a_data_directory_is_made_or_said_to_be_impossible() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(check_data_dir(&dir.path().join("a/b")), None);
        assert_eq!(
            std::fs::read_dir(dir.path().join("a/b")).unwrap().count(),
            0
        );
        std::fs::write(dir.path().join("file"), "").unwrap();
        let problem = check_data_dir(&dir.path().join("file/below")).unwrap();
        assert_eq!(problem.key, "--data-dir");
    }
}
