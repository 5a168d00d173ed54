//! Running other programs, and what they said.

use std::process::Stdio;
use std::time::Duration;

use anyhow::bail;
use tokio::process::Command;

const QUICK: Duration = Duration::from_secs(20);

/// Runs a command without asking anyone anything; its standard output, or the last it said about why it failed.
pub(crate) async fn run(mut command: Command, timeout: Duration) -> anyhow::Result<String> {
    command.stdin(Stdio::null()).kill_on_drop(true);
    let program = command
        .as_std()
        .get_program()
        .to_string_lossy()
        .into_owned();
    let output = match tokio::time::timeout(timeout, command.output()).await {
        Ok(Ok(output)) => output,
        Ok(Err(error)) => bail!("{program} can't be run: {error}"),
        Err(_) => bail!("{program} took longer than {} s", timeout.as_secs()),
    };
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let last = said
            .lines()
            .rfind(|line| !line.trim().is_empty())
            .unwrap_or("it failed without a word");
        bail!("{}", last.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A quick command.
pub(crate) async fn quick(command: Command) -> anyhow::Result<String> {
    run(command, QUICK).await
}

/// `program` with these arguments.
pub(crate) fn command<'a>(program: &str, arguments: impl IntoIterator<Item = &'a str>) -> Command {
    let mut command = Command::new(program);
    command.args(arguments);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_command_that_hangs_or_fails_says_so() {
        let error = run(command("sleep", ["9"]), Duration::from_millis(50))
            .await
            .unwrap_err();
        assert!(error.to_string().contains("longer than"), "{error}");
        let error = quick(command(
            "sh",
            ["-c", "echo first >&2; echo last >&2; exit 3"],
        ))
        .await
        .unwrap_err();
        assert_eq!(error.to_string(), "last");
        assert!(quick(command("/nonexistent/program", [])).await.is_err());
    }
}
