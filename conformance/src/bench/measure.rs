//! CPU time of processes, load of the machine, anonymous memory, medians.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::process::{Child, Output};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use hawker_conformance::lab::{Memory, memory_bytes};
use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};
use serde_json::{Value, json};

pub(crate) const MIB: u64 = 1 << 20;
pub(crate) const GIB: u64 = 1 << 30;

/// The middle one, or the mean of the two in the middle; NaN of nothing.
pub(crate) fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => values[n / 2],
        n => f64::midpoint(values[n / 2 - 1], values[n / 2]),
    }
}

/// The CPU seconds (user and system) of a process and of everything it started, living or waited for.
pub(crate) fn cpu_seconds(root: u32) -> Result<f64> {
    let stats: BTreeMap<u32, Stat> = pids()
        .filter_map(|pid| Some((pid, Stat::read(pid)?)))
        .collect();
    let mut ticks = stats
        .get(&root)
        .with_context(|| format!("process {root} is gone"))?
        .ticks();
    let mut family = vec![root];
    while let Some(parent) = family.pop() {
        for (pid, stat) in stats.iter().filter(|(_, stat)| stat.parent == parent) {
            ticks += stat.ticks();
            family.push(*pid);
        }
    }
    Ok(seconds(ticks))
}

fn pids() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// The content of /proc/PID/stat (proc_pid_stat(5)).
struct Stat {
    parent: u32,
    /// utime and stime.
    own_ticks: u64,
    /// cutime and cstime: of children that were waited for.
    children_ticks: u64,
}

impl Stat {
    fn read(pid: u32) -> Option<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The command may contain spaces and brackets: fields count from the last bracket.
        let fields: Vec<_> = text.rsplit_once(')')?.1.split_whitespace().collect();
        let ticks = |at: usize| fields.get(at)?.parse::<u64>().ok();
        let (own_ticks, children_ticks) = (ticks(11)? + ticks(12)?, ticks(13)? + ticks(14)?);
        Some(Self {
            parent: fields.get(1)?.parse().ok()?,
            own_ticks,
            children_ticks,
        })
    }

    const fn ticks(&self) -> u64 {
        self.own_ticks + self.children_ticks
    }
}

fn seconds(ticks: u64) -> f64 {
    ticks as f64 / rustix::param::clock_ticks_per_second() as f64
}

/// Waits for a command's end; its output, and the CPU seconds it took.
pub(crate) fn finish_with_cpu(child: Child) -> Result<(Output, f64)> {
    let pid = Pid::from_raw(child.id().cast_signed()).context("no such pid")?;
    // Ended but not yet reaped: its times are still to be read.
    waitid(
        WaitId::Pid(pid),
        WaitIdOptions::EXITED | WaitIdOptions::NOWAIT,
    )?;
    let cpu = cpu_seconds(child.id())?;
    Ok((child.wait_with_output()?, cpu))
}

/// How busy the machine, and this bench itself, was while something was measured.
pub(crate) struct Watch {
    start: Instant,
    machine: Vec<u64>,
    own: f64,
}

impl Watch {
    pub(crate) fn start() -> Result<Self> {
        Ok(Self {
            start: Instant::now(),
            machine: machine_ticks()?,
            own: own_cpu_seconds()?,
        })
    }

    /// `busy` and `steal` as shares of all cores' time, the load average (more than this bench's own says that others were
    /// at work), and this bench's CPU seconds (its origin and clients).
    pub(crate) fn stop(self) -> Result<Value> {
        let now = machine_ticks()?;
        let spent: Vec<u64> = now
            .iter()
            .zip(&self.machine)
            .map(|(now, then)| now.saturating_sub(*then))
            .collect();
        let total = spent.iter().sum::<u64>().max(1) as f64;
        // Columns of proc_stat(5): user nice system idle iowait irq softirq steal.
        let [idle, iowait, steal] =
            [3, 4, 7].map(|column| spent.get(column).copied().unwrap_or(0) as f64);
        Ok(json!({
            "wall_s": self.start.elapsed().as_secs_f64(),
            "busy": 1.0 - (idle + iowait) / total,
            "steal": steal / total,
            "load_average": load_average(),
            "bench_cpu_s": own_cpu_seconds()? - self.own,
        }))
    }
}

/// Over the last minute.
fn load_average() -> Option<f64> {
    fs::read_to_string("/proc/loadavg")
        .ok()?
        .split(' ')
        .next()?
        .parse()
        .ok()
}

fn machine_ticks() -> Result<Vec<u64>> {
    let text = fs::read_to_string("/proc/stat")?;
    let line = text.lines().next().context("/proc/stat is empty")?;
    // Guest time is in user time already.
    Ok(line
        .split_whitespace()
        .skip(1)
        .take(8)
        .filter_map(|word| word.parse().ok())
        .collect())
}

fn own_cpu_seconds() -> Result<f64> {
    Ok(seconds(
        Stat::read(std::process::id())
            .context("/proc is not mounted")?
            .own_ticks,
    ))
}

/// Puts the fields of `more` into `run`.
pub(crate) fn with_load(mut run: Value, more: Value) -> Value {
    if let (Value::Object(run), Value::Object(more)) = (&mut run, more) {
        run.extend(more);
    }
    run
}

/// Samples RssAnon of some processes every 50 ms.
pub(crate) struct MemorySampler {
    stop: Arc<AtomicBool>,
    samples: Arc<Mutex<Samples>>,
    thread: JoinHandle<()>,
}

/// When a process had how much anonymous memory, in MiB.
type Samples = BTreeMap<u32, Vec<(Instant, f64)>>;

impl MemorySampler {
    pub(crate) fn start(pids: Vec<u32>) -> Result<Self> {
        let (stop, samples) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(Mutex::new(Samples::new())),
        );
        let (stopped, taken) = (Arc::clone(&stop), Arc::clone(&samples));
        let thread = std::thread::Builder::new()
            .name("memory".to_owned())
            .spawn(move || {
                while !stopped.load(Ordering::Relaxed) {
                    for &pid in &pids {
                        let mib =
                            memory_bytes(pid, Memory::Anonymous).unwrap_or(0) as f64 / MIB as f64;
                        lock(&taken)
                            .entry(pid)
                            .or_default()
                            .push((Instant::now(), mib));
                    }
                    std::thread::sleep(Duration::from_millis(50));
                }
            })?;
        Ok(Self {
            stop,
            samples,
            thread,
        })
    }

    /// The memory of each process in this time, in MiB, in the order of time.
    pub(crate) fn during(&self, time: Range<Instant>) -> BTreeMap<u32, Vec<f64>> {
        let samples = lock(&self.samples);
        let within = |all: &Vec<(Instant, f64)>| {
            all.iter()
                .filter(|(at, _)| time.contains(at))
                .map(|(_, mib)| *mib)
                .collect()
        };
        samples
            .iter()
            .map(|(pid, all)| (*pid, within(all)))
            .collect()
    }

    /// The peak of each process, in MiB.
    pub(crate) fn stop(self) -> Result<BTreeMap<u32, f64>> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread
            .join()
            .map_err(|_| anyhow!("the memory sampler panicked"))?;
        let peak = |all: &Vec<(Instant, f64)>| all.iter().map(|(_, mib)| *mib).fold(0.0, f64::max);
        Ok(lock(&self.samples)
            .iter()
            .map(|(pid, all)| (*pid, peak(all)))
            .collect())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs all jobs at once, each on a thread of its own; their results in order.
pub(crate) fn together<T: Send>(
    jobs: impl IntoIterator<Item = impl FnOnce() -> Result<T> + Send>,
) -> Result<Vec<T>> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = jobs.into_iter().map(|job| scope.spawn(job)).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().map_err(|_| anyhow!("a client panicked"))?)
            .collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(median([3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median([4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median([]).is_nan());
    }

    #[test]
    fn a_childs_cpu_time_is_read_before_it_is_reaped() {
        let burn = "i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done; echo done";
        let child = std::process::Command::new("sh")
            .args(["-c", burn])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let (output, cpu) = finish_with_cpu(child).unwrap();
        assert_eq!(output.stdout, b"done\n");
        assert!(cpu > 0.02, "{cpu}");
    }
}
