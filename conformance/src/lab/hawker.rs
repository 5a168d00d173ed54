//! Hawker's own daemons on the hosts of a lab.

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde::Deserialize;

use super::host::Host;
use super::http::{Answer, Request};
use super::process::{Memory, Process, memory_bytes, run};
use super::small_disk::SmallDisk;

/// How long a daemon may take until `/readyz` says 200.
const READY: Duration = Duration::from_secs(15);

const MIRROR_PORT: u16 = 6500;
const PEER_PORT: u16 = 6501;
const SCHEDULER_PORT: u16 = 6502;
const ADMIN_PORT: u16 = 6503;
const SCHEDULER_ADMIN_PORT: u16 = 6504;

/// The `hawker` binary under test: `HAWKER_BIN`, or the one that cargo built beside this executable.
///
/// # Errors
/// When there is none; nothing is built here.
pub fn hawker_binary() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("HAWKER_BIN") {
        return Ok(path.into());
    }
    let own = std::env::current_exe().context("where this executable is")?;
    let beside = own
        .ancestors()
        .skip(1)
        .take(2)
        .map(|dir| dir.join("hawker"))
        .find(|path| path.is_file());
    beside.with_context(|| {
        format!(
            "no hawker binary beside {}: `cargo build --release -p hawker` first, or set HAWKER_BIN",
            own.display()
        )
    })
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Up,
    Proxy,
    Scheduler,
}

/// How a token reaches the daemon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TokenFrom {
    /// `--token-file FILE`
    #[default]
    File,
    /// `--token-file -`
    Stdin,
    /// `HAWKER_TOKEN`
    Environment,
}

/// A daemon to be started: which, where, with what flags.
#[derive(Clone, Debug)]
pub struct HawkerPlan {
    host: Host,
    kind: Kind,
    data_dir: PathBuf,
    args: Vec<String>,
    env: Vec<(String, String)>,
    token: Option<(String, TokenFrom)>,
    wrapper: Vec<String>,
}

impl HawkerPlan {
    fn new(host: &Host, kind: Kind, data_dir: &str) -> Self {
        let mut plan = Self {
            host: host.clone(),
            kind,
            data_dir: host.dir().join(data_dir),
            args: Vec::new(),
            env: Vec::new(),
            token: None,
            wrapper: Vec::new(),
        };
        if host.v4().is_none() {
            let admin = plan.admin().to_string();
            plan = plan.flag("--admin", admin);
            if kind != Kind::Scheduler {
                plan = plan.flag(
                    "--mirror",
                    SocketAddr::new(host.loopback(), MIRROR_PORT).to_string(),
                );
            }
        }
        plan
    }

    /// `hawker up`: scheduler, authority and seed.
    #[must_use]
    pub fn up(host: &Host) -> Self {
        Self::new(host, Kind::Up, "hawker")
    }

    /// `hawker proxy`.
    #[must_use]
    pub fn proxy(host: &Host) -> Self {
        Self::new(host, Kind::Proxy, "hawker")
    }

    /// `hawker proxy --seed`.
    #[must_use]
    pub fn seed(host: &Host) -> Self {
        Self::proxy(host).arg("--seed")
    }

    /// `hawker scheduler`.
    #[must_use]
    pub fn scheduler(host: &Host) -> Self {
        Self::new(host, Kind::Scheduler, "hawker-scheduler")
    }

    /// One more argument.
    #[must_use]
    pub fn arg(mut self, arg: impl Into<String>) -> Self {
        self.args.push(arg.into());
        self
    }

    /// A flag and its value.
    #[must_use]
    pub fn flag(self, name: &str, value: impl Into<String>) -> Self {
        self.arg(name).arg(value)
    }

    /// A variable of its environment.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl Into<String>) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }

    /// Another data folder.
    #[must_use]
    pub fn data_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.data_dir = dir.into();
        self
    }

    /// A command that runs the daemon: `prlimit …`, `strace …`. It must `exec`, so that the pid stays.
    #[must_use]
    pub fn wrapped_in(mut self, command: &[&str]) -> Self {
        self.wrapper = command.iter().map(|&word| word.into()).collect();
        self
    }

    /// With a `/etc/hosts` of its own that has these names.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn knows(self, names: &[(&str, std::net::IpAddr)]) -> Result<Self> {
        let lines = names.iter().map(|(name, ip)| format!("{ip} {name}\n"));
        let text = format!("127.0.0.1 localhost\n{}", lines.collect::<String>());
        self.with_own("/etc/hosts", "hosts", &text)
    }

    /// With a `/etc/resolv.conf` of its own that names this name server.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn asks_names_of(self, server: std::net::IpAddr) -> Result<Self> {
        self.with_own(
            "/etc/resolv.conf",
            "resolv.conf",
            &format!("nameserver {server}\n"),
        )
    }

    /// With this text in place of a file of the system; it is kept as `name` in the host's folder.
    fn with_own(self, path: &str, name: &str, text: &str) -> Result<Self> {
        let file = self.host.dir().join(name);
        std::fs::write(&file, text)?;
        let bind = format!("mount --bind {} {path} && exec \"$@\"", file.display());
        Ok(self.wrapped_in(&["unshare", "--mount", "sh", "-c", &bind, "sh"]))
    }

    /// Serves `registry` (`host:port`) by plain HTTP at that address, though it is private.
    #[must_use]
    pub fn plain_registry(self, registry: impl std::fmt::Display) -> Self {
        self.flag("--registry", format!("{registry}=http://{registry}"))
    }

    /// Joins at `scheduler` with `token`.
    #[must_use]
    pub fn join(mut self, scheduler: impl std::fmt::Display, token: &str, from: TokenFrom) -> Self {
        self.token = Some((token.into(), from));
        self.flag("--join", scheduler.to_string())
    }

    /// Joins the cluster of `authority` (started by [`HawkerPlan::up`] or [`HawkerPlan::scheduler`]) with a new token.
    ///
    /// # Errors
    /// When the authority makes no token.
    pub fn join_to(self, authority: &Hawker) -> Result<Self> {
        let role = if self.args.iter().any(|arg| arg == "--seed") {
            "seed"
        } else {
            "peer"
        };
        let token = authority.token(role)?;
        Ok(self.join(authority.scheduler(), &token, TokenFrom::File))
    }

    /// Starts the daemon and waits until it is ready.
    ///
    /// # Errors
    /// When it ends or is not ready in time; the error has the end of its log.
    pub fn start(self) -> Result<Hawker> {
        let hawker = self.start_unready()?;
        hawker.wait_ready()
    }

    /// Starts the daemon without waiting.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_unready(self) -> Result<Hawker> {
        let process = self.spawn()?;
        Ok(Hawker {
            plan: self,
            process: Some(process),
        })
    }

    /// Runs the daemon, expecting it to refuse: gives its exit code and what it said.
    ///
    /// # Errors
    /// When it still runs after `within`.
    pub fn refused(self, within: Duration) -> Result<(i32, String)> {
        let mut process = self.spawn()?;
        let status = process.wait(within)?;
        Ok((status.code().context("ended by a signal")?, process.log()))
    }

    fn admin(&self) -> SocketAddr {
        let port = if self.kind == Kind::Scheduler {
            SCHEDULER_ADMIN_PORT
        } else {
            ADMIN_PORT
        };
        SocketAddr::new(self.host.loopback(), port)
    }

    fn log_path(&self) -> PathBuf {
        let name = if self.kind == Kind::Scheduler {
            "hawker-scheduler.log"
        } else {
            "hawker.log"
        };
        self.host.dir().join(name)
    }

    fn spawn(&self) -> Result<Process> {
        let mut command = self.command()?;
        let Some((token, from)) = &self.token else {
            return Process::start(&mut command, self.log_path());
        };
        match from {
            TokenFrom::Environment => {
                Process::start(command.env("HAWKER_TOKEN", token), self.log_path())
            }
            TokenFrom::File => {
                let file = self.host.dir().join("join-token");
                std::fs::write(&file, token)?;
                Process::start(command.arg("--token-file").arg(file), self.log_path())
            }
            TokenFrom::Stdin => {
                command.args(["--token-file", "-"]).stdin(Stdio::piped());
                let mut process = Process::start_with(&mut command, self.log_path())?;
                process
                    .stdin()
                    .context("it was piped")?
                    .write_all(token.as_bytes())?;
                Ok(process)
            }
        }
    }

    fn command(&self) -> Result<Command> {
        let subcommand = match self.kind {
            Kind::Up => "up",
            Kind::Proxy => "proxy",
            Kind::Scheduler => "scheduler",
        };
        let binary = hawker_binary()?;
        let mut words = self
            .wrapper
            .iter()
            .map(Into::into)
            .chain([binary.into_os_string()]);
        let mut command = self
            .host
            .command(words.next().context("at least the binary")?);
        command
            .args(words)
            .arg(subcommand)
            .arg("--data-dir")
            .arg(&self.data_dir)
            .args(&self.args);
        command
            .args(["--name", self.host.name()])
            .envs(self.env.iter().map(|(name, value)| (name, value)));
        Ok(command)
    }
}

/// A daemon that was started. Dropping it ends it.
#[derive(Debug)]
pub struct Hawker {
    plan: HawkerPlan,
    process: Option<Process>,
}

impl Hawker {
    /// The host it runs on.
    #[must_use]
    pub fn host(&self) -> &Host {
        &self.plan.host
    }

    /// Its data folder.
    #[must_use]
    pub fn data_dir(&self) -> &Path {
        &self.plan.data_dir
    }

    /// The disk that its data folder is on, where the cluster was planned so.
    #[must_use]
    pub fn disk(&self) -> SmallDisk {
        SmallDisk::at(self.data_dir())
    }

    /// The folder of its blobs.
    #[must_use]
    pub fn store_dir(&self) -> PathBuf {
        let own = if self.plan.kind == Kind::Up {
            self.plan.data_dir.join("proxy")
        } else {
            self.plan.data_dir.clone()
        };
        own.join("store")
    }

    /// The address for runtimes on its host.
    #[must_use]
    pub fn mirror(&self) -> SocketAddr {
        SocketAddr::new(self.plan.host.loopback(), MIRROR_PORT)
    }

    /// The address for other peers.
    #[must_use]
    pub fn peer(&self) -> SocketAddr {
        self.plan.host.at(PEER_PORT)
    }

    /// The address of its scheduler for nodes.
    #[must_use]
    pub fn scheduler(&self) -> SocketAddr {
        self.plan.host.at(SCHEDULER_PORT)
    }

    /// The address of its status and metrics, on its host's loopback.
    #[must_use]
    pub fn admin(&self) -> SocketAddr {
        self.plan.admin()
    }

    /// Its process.
    ///
    /// # Errors
    /// When it was killed and not restarted.
    pub fn process(&mut self) -> Result<&mut Process> {
        self.process.as_mut().context("this daemon was ended")
    }

    /// Its pid, while it runs.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(Process::pid)
    }

    /// The anonymous memory that it has now.
    pub fn anonymous_bytes(&self) -> Result<u64> {
        let pid = self.pid().context("it has ended")?;
        memory_bytes(pid, Memory::Anonymous).context("it has ended")
    }

    /// Its log, over all its lives.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.plan.log_path()).unwrap_or_default()
    }

    /// kill -9.
    ///
    /// # Errors
    /// When it does not run.
    pub fn kill(&mut self) -> Result<()> {
        self.process.take().context("this daemon was ended")?.kill()
    }

    /// SIGTERM, and waits for the end of the process.
    ///
    /// # Errors
    /// When it does not run, or still runs after `within`.
    pub fn terminate(&mut self, within: Duration) -> Result<std::process::ExitStatus> {
        let process = self.process()?;
        process.signal(rustix::process::Signal::TERM)?;
        let status = process.wait(within)?;
        self.process = None;
        Ok(status)
    }

    /// Starts it again as it was started first, after [`Hawker::kill`] or [`Hawker::terminate`], and waits until it is
    /// ready.
    ///
    /// # Errors
    /// As [`HawkerPlan::start`].
    pub fn restart(&mut self) -> Result<()> {
        ensure!(self.process.is_none(), "this daemon still runs");
        self.process = Some(self.plan.spawn()?);
        self.until_ready()
    }

    /// Waits until `/readyz` says 200.
    ///
    /// # Errors
    /// When the daemon ends, or is not ready in time.
    pub fn wait_ready(mut self) -> Result<Self> {
        self.until_ready()?;
        Ok(self)
    }

    fn until_ready(&mut self) -> Result<()> {
        let request = Request::get(self.admin(), "/readyz").within(Duration::from_secs(2));
        let host = self.plan.host.clone();
        let name = format!("hawker {:?} on {}", self.plan.kind, host.name());
        self.process()?
            .wait_ready(READY, || {
                request.send(&host).is_ok_and(|answer| answer.status == 200)
            })
            .context(name)
    }

    /// Waits until its status fulfils `done`.
    ///
    /// # Errors
    /// When `within` passes first; the error has the last status.
    pub fn wait_status(&self, within: Duration, done: impl Fn(&Status) -> bool) -> Result<Status> {
        let deadline = Instant::now() + within;
        loop {
            let status = self.status()?;
            if done(&status) {
                return Ok(status);
            }
            if Instant::now() > deadline {
                bail!("not so after {within:?}: {status:#?}");
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// A path of its admin server.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn admin_get(&self, path: &str) -> Result<Answer> {
        Request::get(self.admin(), path)
            .within(Duration::from_secs(10))
            .send(&self.plan.host)
    }

    /// The content of `/status`.
    ///
    /// # Errors
    /// When it does not answer with that JSON.
    pub fn status(&self) -> Result<Status> {
        let text = self.admin_get("/status")?.text();
        serde_json::from_str(&text).with_context(|| format!("/status: {text}"))
    }

    /// The value of a metric, all label sets added up; `labels` must be among the sample's (`source="peers"`).
    ///
    /// # Errors
    /// When the admin server does not answer.
    pub fn metric(&self, name: &str, labels: &[&str]) -> Result<f64> {
        let text = self.admin_get("/metrics")?.text();
        let samples = text
            .lines()
            .filter_map(|line| line.strip_prefix(name)?.rsplit_once(' '));
        let ours = samples.filter(|(set, _)| set.is_empty() || set.starts_with('{'));
        Ok(ours
            .filter(|(set, _)| labels.iter().all(|label| set.contains(label)))
            .filter_map(|(_, value)| value.parse::<f64>().ok())
            .sum())
    }

    /// A GET at its mirror, as containerd sends it: `path` is `/v2/…`, `registry` goes into `ns`.
    #[must_use]
    pub fn request(&self, registry: impl std::fmt::Display, path: &str) -> Request {
        let ns = registry
            .to_string()
            .replace(':', "%3A")
            .replace('[', "%5B")
            .replace(']', "%5D");
        Request::get(self.mirror(), format!("{path}?ns={ns}"))
    }

    /// A new token from this daemon's authority for `role` (`peer`, `seed`, `scheduler`).
    ///
    /// # Errors
    /// When `hawker token create` fails.
    pub fn token(&self, role: &str) -> Result<String> {
        let mut command = self.cli()?;
        let token = run(command
            .args(["token", "create", "--role", role, "--data-dir"])
            .arg(&self.plan.data_dir))?;
        Ok(token.trim().to_owned())
    }

    /// `hawker` on this host, for the people's commands: `status`, `doctor`, `token`.
    ///
    /// # Errors
    /// When there is no binary.
    pub fn cli(&self) -> Result<Command> {
        Ok(self.plan.host.command(hawker_binary()?))
    }
}

/// `/status`, as far as the tests look at it.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Status {
    /// The node's name.
    pub name: String,
    /// Its id.
    pub peer_id: String,
    /// Its role.
    pub role: String,
    /// Whether it serves.
    pub ready: bool,
    /// Why it serves alone though it was a member; empty if it does not.
    pub problem: String,
    /// The schedulers it knows.
    pub schedulers: Vec<Scheduler>,
    /// The members it knows.
    pub members: Vec<Member>,
    /// The bytes that it received and gave.
    pub bytes: Bytes,
    /// The content of its store.
    pub store: Store,
    /// Active downloads.
    pub tasks: Vec<Task>,
}

/// A scheduler in [`Status`].
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Scheduler {
    /// `host:port`
    pub address: String,
    /// Whether the stream to it is up.
    pub connected: bool,
    /// Why it is not; empty if it is, or if nothing is known.
    pub problem: String,
}

/// A member in [`Status`].
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Member {
    /// Its name.
    pub name: String,
    /// Its id.
    pub peer_id: String,
    /// Its role.
    pub role: String,
    /// Its addresses.
    pub addresses: Vec<String>,
    /// Whether this node has a connection to it.
    pub connected: bool,
    /// Whether the scheduler isolated it.
    pub isolated: bool,
    /// Why.
    pub isolated_for: String,
    /// How much longer.
    pub isolated_for_s: u64,
}

/// Bytes in [`Status`], since the start of the daemon.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(default)]
pub struct Bytes {
    /// From peers that are not seeds.
    pub received_peers: u64,
    /// From seeds.
    pub received_seeds: u64,
    /// From the origin.
    pub received_origin: u64,
    /// To clients.
    pub served: u64,
    /// To clients, from committed blobs.
    pub served_cache: u64,
    /// To other peers.
    pub uploaded: u64,
}

/// The store in [`Status`].
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Store {
    /// Committed blobs.
    pub blobs: u64,
    /// Partial ones.
    pub partials: u64,
    /// Bytes on disk.
    pub bytes: u64,
    /// Whether the disk refuses.
    pub degraded: bool,
}

/// An active download in [`Status`].
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Task {
    /// Its digest.
    pub task: String,
    /// The blob's size.
    pub size_bytes: u64,
    /// Verified pieces.
    pub pieces: u32,
    /// All pieces.
    pub of: u32,
    /// Its state, in a word.
    pub state: String,
    /// Clients that read it now.
    pub readers: u32,
}
