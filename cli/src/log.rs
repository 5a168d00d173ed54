//! Logs, structured: text for people or JSON for machines, on standard error. Spans tie the lines of one pull together.

use std::io::IsTerminal;

use anyhow::Context;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry, fmt, reload};

use hawker_config::problem::{Wrong, wrong};
use hawker_config::schema::LogFormat as Format;

use crate::log_limit::LogLimit;

/// The log's level and form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LogSettings {
    /// A level, or directives such as `info,hawker_proxy=debug`; checked by [`level`].
    pub(crate) level: String,
    pub(crate) format: Format,
}

/// Checks a level or directives.
pub(crate) fn level(text: &str) -> Result<String, Wrong> {
    let known = |level: &str| ["off", "error", "warn", "info", "debug", "trace"].contains(&level);
    let plain = text
        .split(',')
        .all(|part| part.contains('=') || part.contains('[') || known(&part.to_ascii_lowercase()));
    if !text.is_empty() && plain && EnvFilter::try_new(text).is_ok() {
        return Ok(text.to_owned());
    }
    wrong(
        format!("`{text}` is no log level"),
        "write error, warn, info, debug or trace, or directives such as info,hawker_proxy=debug",
    )
}

/// Changes the level while the program runs.
#[derive(Clone)]
pub(crate) struct LogHandle(reload::Handle<EnvFilter, Registry>);

impl LogHandle {
    /// The handle of no log.
    #[cfg(test)]
    pub(crate) fn unused() -> Self {
        let (_, handle) = reload::Layer::new(EnvFilter::default());
        Self(handle)
    }

    /// Logs what `level` says from now on.
    pub(crate) fn set(&self, level: &str) -> anyhow::Result<()> {
        let filter = EnvFilter::try_new(level)?;
        self.0
            .reload(filter)
            .context("the log level could not be changed")
    }
}

/// Starts logging, once a process.
pub(crate) fn start(settings: &LogSettings) -> anyhow::Result<LogHandle> {
    let (filter, handle) = reload::Layer::new(EnvFilter::try_new(&settings.level)?);
    let layer = fmt::layer().with_writer(std::io::stderr);
    let layer = match settings.format {
        Format::Text => layer.with_ansi(std::io::stderr().is_terminal()).boxed(),
        Format::Json => layer
            .json()
            .flatten_event(true)
            .with_span_list(false)
            .boxed(),
    };
    let limit = LogLimit::default();
    tracing_subscriber::registry()
        .with(filter)
        .with(limit.clone())
        .with(layer)
        .try_init()?;
    limit
        .tell()
        .context("the thread that counts left-out lines could not be started")?;
    Ok(LogHandle(handle))
}

#[cfg(test)]
mod tests {
    #[test]
    fn levels_and_directives_are_told_from_garbage() {
        for good in [
            "info",
            "TRACE",
            "info,hawker_proxy=debug",
            "warn,hawker_proxy::peer=trace",
        ] {
            assert!(super::level(good).is_ok(), "{good}");
        }
        for bad in ["", "loud", "info,loud", "hawker_proxy=loud"] {
            assert!(super::level(bad).is_err(), "{bad}");
        }
    }
}
