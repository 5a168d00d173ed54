//! The report of a bench: JSON for machines, lines for people.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};
use serde_json::{Map, Value, json};

/// The aim of a figure.
#[derive(Clone, Copy)]
pub(crate) enum Target {
    AtLeast(f64),
    AtMost(f64),
}

impl Target {
    fn verdict(self, value: f64) -> String {
        let (word, target, reached) = match self {
            Target::AtLeast(target) => ("at least", target, value >= target),
            Target::AtMost(target) => ("at most", target, value <= target),
        };
        let verdict = if reached { "reached" } else { "MISSED" };
        format!("{word} {target}: {verdict}")
    }
}

/// The fields of a run that tell what was run; people read them first.
const NAMES: [&str; 8] = [
    "attack",
    "clients",
    "during",
    "link_mbit",
    "nodes",
    "round",
    "side",
    "variant",
];

/// The results of one bench.
pub(crate) struct Report {
    bench: &'static str,
    runs: Vec<Value>,
    figures: Map<String, Value>,
    lines: Vec<String>,
}

impl Report {
    pub(crate) fn new(bench: &'static str) -> Self {
        println!("{bench} at {} on {}", commit(), machine());
        Self {
            bench,
            runs: Vec::new(),
            figures: Map::new(),
            lines: Vec::new(),
        }
    }

    /// Notes one measurement (a JSON object), and prints it at once.
    pub(crate) fn run(&mut self, run: Value) {
        let fields: Vec<_> = run.as_object().into_iter().flatten().collect();
        let (names, values): (Vec<_>, Vec<_>) = fields
            .into_iter()
            .partition(|(name, _)| NAMES.contains(&name.as_str()));
        let words: Vec<_> = names
            .into_iter()
            .chain(values)
            .map(|(name, value)| format!("{name}={}", brief(value)))
            .collect();
        println!("  {}", words.join(" "));
        self.runs.push(run);
    }

    /// Notes a figure.
    pub(crate) fn figure(&mut self, name: &'static str, value: f64, target: Option<Target>) {
        let verdict = target.map_or_else(String::new, |target| target.verdict(value));
        self.lines
            .push(format!("{name:<20} {value:>9.3}   {verdict}"));
        self.figures.insert(name.to_owned(), json!(value));
    }

    pub(crate) fn print_figures(&self) {
        println!();
        self.lines.iter().for_each(|line| println!("{line}"));
    }

    /// Writes the JSON, if there is a place for it.
    pub(crate) fn write(&self, file: Option<&Path>) -> Result<()> {
        let Some(file) = file else { return Ok(()) };
        let value = json!({
            "bench": self.bench,
            "commit": commit(),
            "machine": machine(),
            "runs": self.runs,
            "figures": self.figures,
        });
        let text = serde_json::to_string_pretty(&value)? + "\n";
        std::fs::write(file, text).with_context(|| format!("writing {}", file.display()))
    }
}

fn brief(value: &Value) -> String {
    match value {
        Value::Number(number) if number.is_f64() => {
            format!("{:.3}", number.as_f64().unwrap_or(f64::NAN))
        }
        Value::String(text) => text.replace(' ', "-"),
        Value::Array(values) => values.iter().map(brief).collect::<Vec<_>>().join("/"),
        Value::Object(fields) => fields
            .iter()
            .map(|(name, value)| format!("{name}:{}", brief(value)))
            .collect::<Vec<_>>()
            .join(","),
        other => other.to_string(),
    }
}

/// The commit measured, with `+` when files differ from it.
fn commit() -> String {
    let git = |arguments: &[&str]| {
        let output = Command::new("git")
            .args(["-C", env!("CARGO_MANIFEST_DIR")])
            .args(arguments)
            .output()
            .ok()?;
        output
            .status
            .success()
            .then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let Some(commit) = git(&["rev-parse", "--short=12", "HEAD"]) else {
        return "unknown".to_owned();
    };
    let changed = git(&["status", "--porcelain", "--untracked-files=no"])
        .is_some_and(|changes| !changes.is_empty());
    if changed { commit + "+" } else { commit }
}

/// Cores, their model, memory and kernel.
fn machine() -> String {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let field = |text: &str, name: &str| {
        let line = text
            .lines()
            .find(|line| line.starts_with(name))
            .unwrap_or_default();
        line.split(':').nth(1).unwrap_or_default().trim().to_owned()
    };
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let memory = field(&read("/proc/meminfo"), "MemTotal");
    let kernel = read("/proc/sys/kernel/osrelease");
    format!(
        "{cores} x {}, {memory}, Linux {}",
        field(&read("/proc/cpuinfo"), "model name"),
        kernel.trim()
    )
}
