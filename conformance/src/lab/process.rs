//! Processes of a lab: started with a log file, ended by pid.

use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

/// How long a process has to end after SIGTERM before it is killed, where the lab is only being tidied up.
const GRACE: Duration = Duration::from_secs(3);
/// How much of each log a failure shows.
const TAIL_LINES: usize = 60;

/// Runs a command to its end; gives its standard output.
///
/// # Errors
/// When it cannot start or fails; the error names the command and has its standard error.
pub fn run(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("starting {:?}: is it installed?", command.get_program()))?;
    if !output.status.success() {
        bail!(
            "{command:?}: {}\n{}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A running process that writes to a log file, and is ended when dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `command` with both outputs appended to `log` (by convention `*.log` in the host's folder).
    /// Standard input is the command's own setting, or nothing.
    ///
    /// # Errors
    /// When it cannot start.
    pub fn start(command: &mut Command, log: PathBuf) -> Result<Self> {
        Self::start_with(command.stdin(Stdio::null()), log)
    }

    /// As [`Process::start`], leaving standard input as `command` says.
    ///
    /// # Errors
    /// When it cannot start.
    pub fn start_with(command: &mut Command, log: PathBuf) -> Result<Self> {
        let file = File::options().create(true).append(true).open(&log)?;
        let child = command
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("starting {command:?}: is it installed?"))?;
        Ok(Self { child, log })
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its output so far.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Its standard input, if it was piped; at most once.
    pub fn stdin(&mut self) -> Option<std::process::ChildStdin> {
        self.child.stdin.take()
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_raw(self.child.id().cast_signed()).context("no such pid")?;
        kill_process(pid, signal).with_context(|| format!("signalling {pid:?}"))
    }

    /// SIGKILL, and waits for the end.
    ///
    /// # Errors
    /// When it could not be waited for.
    pub fn kill(&mut self) -> Result<()> {
        // Already dead is what was wanted.
        let _ = self.child.kill();
        self.child
            .wait()
            .context("waiting for a killed process")
            .map(drop)
    }

    /// The exit status, if it ended.
    ///
    /// # Errors
    /// When the system cannot tell.
    pub fn try_wait(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When `within` passes first.
    pub fn wait(&mut self, within: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + within;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if Instant::now() > deadline {
                bail!("pid {} still runs after {within:?}", self.pid());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits until `ready` says yes, as long as the process lives.
    ///
    /// # Errors
    /// When the process ends, or `within` passes; the error has the end of its log.
    pub fn wait_ready(&mut self, within: Duration, mut ready: impl FnMut() -> bool) -> Result<()> {
        let deadline = Instant::now() + within;
        while !ready() {
            if let Some(status) = self.child.try_wait()? {
                bail!(
                    "it ended: {} {:?}\n{}",
                    status,
                    status.signal(),
                    tail(&self.log)
                );
            }
            if Instant::now() > deadline {
                bail!("not ready after {within:?}\n{}", tail(&self.log));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(Some(_))) {
            return;
        }
        // A stopped process takes SIGTERM only once it goes on.
        let _ = self.signal(Signal::TERM);
        let _ = self.signal(Signal::CONT);
        if self.wait(GRACE).is_err() {
            let _ = self.kill();
        }
    }
}

/// The last lines of a log, under its name.
fn tail(log: &Path) -> String {
    let text = fs::read(log)
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    let from = lines.len().saturating_sub(TAIL_LINES);
    format!(
        "--- {} (last {} lines)\n{}\n",
        log.display(),
        lines.len() - from,
        lines[from..].join("\n")
    )
}

/// Every `*.log` in the hosts' folders of a lab.
pub(super) fn logs(lab: &Path) -> Vec<PathBuf> {
    let entries = |dir: &Path| {
        fs::read_dir(dir)
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path())
    };
    let mut logs: Vec<PathBuf> = entries(lab)
        .flat_map(|host| entries(&host).collect::<Vec<_>>())
        .filter(|path| path.extension().is_some_and(|extension| extension == "log"))
        .collect();
    logs.sort();
    logs
}

/// The last lines of each of them.
pub(super) fn tails(lab: &Path) -> String {
    logs(lab).iter().map(|log| tail(log)).collect()
}

/// A kind of a process's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    /// Memory without a file behind it.
    Anonymous,
    /// All that is resident, its code included.
    Resident,
    /// The most that was ever resident.
    Peak,
}

/// How much of it a process has now, in bytes (proc_pid_status(5)); `None` when it is gone.
#[must_use]
pub fn memory_bytes(pid: u32, what: Memory) -> Option<u64> {
    let field = match what {
        Memory::Anonymous => "RssAnon:",
        Memory::Resident => "VmRSS:",
        Memory::Peak => "VmHWM:",
    };
    let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(field))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? << 10)
}
