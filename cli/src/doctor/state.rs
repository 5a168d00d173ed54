//! Which runtimes this machine has, and whether they run.

use std::env;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use super::{Check, buildkit, containerd};
use crate::args::{DoctorArgs, Runtime};
use crate::configure::name;

/// The folders of services' programs, besides `PATH`.
const PROGRAM_FOLDERS: [&str; 5] = [
    "/usr/local/sbin",
    "/usr/local/bin",
    "/usr/sbin",
    "/usr/bin",
    "/opt/bin",
];

/// The state of a runtime on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// Its socket answers, or it needs none.
    Usable(String),
    /// Its program or its configuration is there, and its socket does not answer.
    Stopped(String),
    NotInstalled,
}

impl State {
    pub(super) fn is_usable(&self) -> bool {
        matches!(self, Self::Usable(_))
    }

    /// The state as a line of the report.
    pub(super) fn check(&self, runtime: Runtime) -> Check {
        let runtime = name(runtime);
        match self {
            Self::Usable(where_to) => Check::pass("runtime", format!("{runtime} {where_to}")),
            Self::Stopped(where_to) => Check::skip(
                "runtime",
                format!("{runtime} is installed, but does not run: {where_to}"),
                format!(
                    "if it should run, start it; `hawker doctor --runtime {runtime}` looks at it all the same"
                ),
            ),
            Self::NotInstalled => Check::skip("runtime", format!("{runtime} is not installed"), ""),
        }
    }
}

/// The state of a runtime.
pub(super) async fn of(runtime: Runtime, args: &DoctorArgs) -> State {
    match runtime {
        Runtime::Containerd => {
            let installs = containerd::installs(args);
            let sockets: Vec<PathBuf> = installs.iter().map(containerd::Install::socket).collect();
            let files: Vec<&Path> = installs
                .iter()
                .map(|install| install.config.as_path())
                .collect();
            by_sockets(&sockets, &["containerd", "k3s", "rke2"], &files)
        }
        Runtime::Docker => {
            let socket = match env::var("DOCKER_HOST") {
                Ok(host) if host.starts_with("unix://") => {
                    PathBuf::from(host.trim_start_matches("unix://"))
                }
                Ok(host) if !host.is_empty() => {
                    return State::Usable(format!("at {host} (DOCKER_HOST)"));
                }
                _ => PathBuf::from("/var/run/docker.sock"),
            };
            by_sockets(&[socket], &["dockerd"], &[])
        }
        Runtime::Crio => by_sockets(
            std::slice::from_ref(&args.crio_address),
            &["crio"],
            &[Path::new("/etc/crio")],
        ),
        Runtime::Podman if is_installed("podman") => {
            State::Usable("is installed, and needs no daemon".to_owned())
        }
        Runtime::Podman => State::NotInstalled,
        Runtime::Buildkit => match buildkit::Address::of_environment() {
            buildkit::Address::Socket(socket) => {
                by_sockets(&[socket], &["buildkitd"], &[Path::new("/etc/buildkit")])
            }
            buildkit::Address::Other(address) => {
                State::Usable(format!("at {address} (BUILDKIT_HOST)"))
            }
        },
    }
}

fn by_sockets(sockets: &[PathBuf], programs: &[&str], files: &[&Path]) -> State {
    let tried: Vec<(String, std::io::Result<UnixStream>)> = sockets
        .iter()
        .map(|socket| (socket.display().to_string(), UnixStream::connect(socket)))
        .collect();
    let running: Vec<&str> = tried
        .iter()
        .filter(|(_, stream)| stream.is_ok())
        .map(|(socket, _)| socket.as_str())
        .collect();
    if !running.is_empty() {
        return State::Usable(format!("runs, at {}", running.join(", ")));
    }
    let is_there = programs.iter().any(|program| is_installed(program))
        || files.iter().any(|file| file.exists())
        || sockets.iter().any(|socket| socket.exists());
    match tried
        .into_iter()
        .find_map(|(socket, stream)| Some(format!("{socket}: {}", stream.err()?)))
    {
        Some(why) if is_there => State::Stopped(why),
        _ => State::NotInstalled,
    }
}

/// Whether a program is in `PATH`, or where services' programs are.
pub(super) fn is_installed(program: &str) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = env::split_paths(&path).chain(PROGRAM_FOLDERS.iter().map(PathBuf::from));
    folders
        .map(|folder| folder.join(program))
        .any(|file| file.is_file())
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_runtime_runs_is_stopped_or_is_not_installed() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("a.sock");
        let state = |files: &[&Path]| {
            by_sockets(std::slice::from_ref(&socket), &["no-such-program"], files)
        };
        assert_eq!(state(&[]), State::NotInstalled);
        assert!(matches!(state(&[dir.path()]), State::Stopped(_)));
        let listener = UnixListener::bind(&socket).unwrap();
        assert!(state(&[]).is_usable());
        drop(listener);
        // The socket's file outlives its daemon.
        let stopped = state(&[]);
        assert!(
            matches!(&stopped, State::Stopped(why) if why.contains("refused")),
            "{stopped:?}"
        );
        let line = stopped.check(Runtime::Crio).render();
        assert!(
            line.contains("crio is installed, but does not run"),
            "{line}"
        );
    }
}
