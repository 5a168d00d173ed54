//! The removal of a lab: the processes in its namespaces, the mounts in its folder, then both.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, Signal, kill_process};

use super::host::{ip, net_option};
use super::process::run;

/// How long killed processes may take to disappear.
const DEATH: Duration = Duration::from_secs(5);

/// The folder of all labs. Not `/tmp`, which may be memory.
pub(super) fn base_dir() -> PathBuf {
    std::env::var_os("TMPDIR").map_or_else(|| "/var/tmp".into(), PathBuf::from)
}

/// Removes the labs whose process is gone. A lab that cannot be removed stays for the next time.
pub(super) fn stale_labs() {
    let names = names_in(Path::new("/run/netns")).chain(names_in(&base_dir()));
    let mut labs: Vec<String> = names
        .filter_map(|name| lab_of(&name).map(str::to_owned))
        .collect();
    labs.sort();
    labs.dedup();
    for lab in labs.iter().filter(|lab| !owner_lives(lab)) {
        remove(lab, &base_dir().join(lab));
    }
}

/// Removes the lab `name` and its folder, as far as it goes.
pub(super) fn remove(name: &str, dir: &Path) {
    let namespaces: Vec<String> = names_in(Path::new("/run/netns"))
        .filter(|n| lab_of(n) == Some(name))
        .collect();
    kill_all(&namespaces);
    unmount_below(dir);
    for namespace in &namespaces {
        let _ = ip(&format!("netns del {namespace}"));
    }
    let _ = fs::remove_dir_all(dir);
}

/// `hwk<pid>-<n>` of `hwk<pid>-<n>` or `hwk<pid>-<n>-<host>`.
fn lab_of(name: &str) -> Option<&str> {
    let (pid, rest) = name.strip_prefix("hwk")?.split_once('-')?;
    let number = rest.split('-').next()?;
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    (digits(pid) && digits(number)).then(|| &name[.."hwk-".len() + pid.len() + number.len()])
}

fn owner_lives(lab: &str) -> bool {
    let pid = lab
        .trim_start_matches("hwk")
        .split('-')
        .next()
        .unwrap_or_default();
    Path::new("/proc").join(pid).exists()
}

fn names_in(dir: &Path) -> impl Iterator<Item = String> + use<> {
    fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
}

/// Kills what runs in these namespaces, and what is about to enter them. This process may have threads there; they are
/// not processes of the lab.
fn kill_all(namespaces: &[String]) {
    let deadline = Instant::now() + DEATH;
    loop {
        // In this order: a process that is not seen on its way in has arrived before the second look.
        let mut pids = pids_entering(namespaces);
        pids.extend(namespaces.iter().flat_map(|namespace| pids_in(namespace)));
        if pids.is_empty() || Instant::now() > deadline {
            return;
        }
        for pid in pids {
            let _ = kill_process(pid, Signal::KILL);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn pids_in(namespace: &str) -> Vec<Pid> {
    let listed = run(Command::new("ip").args(["netns", "pids", namespace])).unwrap_or_default();
    let own = std::process::id().cast_signed();
    listed
        .lines()
        .filter_map(|line| line.parse().ok())
        .filter(|pid| *pid != own)
        .filter_map(Pid::from_raw)
        .collect()
}

/// The processes that [`super::Host::command`] started and that are still `nsenter`, maybe outside of the namespace.
fn pids_entering(namespaces: &[String]) -> Vec<Pid> {
    let options: Vec<String> = namespaces
        .iter()
        .map(|namespace| net_option(namespace))
        .collect();
    let enters = |pid: &i32| {
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let mut words = command.split(|byte| *byte == 0).skip(1);
        words
            .next()
            .is_some_and(|word| options.iter().any(|option| option.as_bytes() == word))
    };
    let pids = names_in(Path::new("/proc")).filter_map(|name| name.parse().ok());
    pids.filter(enters).filter_map(Pid::from_raw).collect()
}

/// Unmounts everything below `dir`, the newest first.
fn unmount_below(dir: &Path) {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let points = mounts
        .lines()
        .filter_map(|line| line.split(' ').nth(1))
        .map(PathBuf::from);
    let below: Vec<PathBuf> = points.filter(|point| point.starts_with(dir)).collect();
    for point in below.iter().rev() {
        let _ = unmount(point, UnmountFlags::DETACH);
    }
}

#[cfg(test)]
mod tests {
    use super::lab_of;

    #[test]
    fn only_names_of_labs_are_labs() {
        assert_eq!(lab_of("hwk12-3"), Some("hwk12-3"));
        assert_eq!(lab_of("hwk12-3-node-1"), Some("hwk12-3"));
        for other in [
            "hwk", "hwk12", "hwk-3", "hwk12-", "hwk12-x", "hwkx-3", "xhwk12-3", "docker0",
        ] {
            assert_eq!(lab_of(other), None, "{other}");
        }
    }
}
