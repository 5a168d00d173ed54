//! Docker's credential helpers (docker/docker-credential-helpers): `docker-credential-NAME get`, the registry on its standard
//! input, name and secret in JSON on its standard output.

use std::io;
use std::process::Stdio;
use std::time::Duration;

use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;
use tokio::time::timeout;

use super::Credential;

/// For a helper to answer.
const ANSWER: Duration = Duration::from_secs(10);
/// Longest answer. An ECR password has 2 KiB.
const MAX_ANSWER_BYTES: u64 = 64 << 10;
/// Docker Hub, as docker names it to helpers.
const HUB: &str = "https://index.docker.io/v1/";

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    username: String,
    secret: String,
}

/// The credential that `helper` has for `registry`, `None` when it has none. The error names no secret.
pub(super) async fn get(helper: &str, registry: &str) -> Result<Option<Credential>, String> {
    let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if helper.is_empty() || !helper.chars().all(legal) {
        return Err("its name can't be a program's: letters, digits, - _ and .".to_owned());
    }
    let server = if registry == "docker.io" {
        HUB
    } else {
        registry
    };
    ask(&format!("docker-credential-{helper}"), server, ANSWER).await
}

async fn ask(
    program: &str,
    server: &str,
    deadline: Duration,
) -> Result<Option<Credential>, String> {
    let (success, output) = timeout(deadline, run(program, server))
        .await
        .map_err(|_| format!("{program} did not answer within {deadline:?}"))?
        .map_err(|e| format!("{program} can't be run: {e}"))?;
    if output.len() as u64 > MAX_ANSWER_BYTES {
        return Err(format!(
            "{program} answered more than {MAX_ANSWER_BYTES} bytes"
        ));
    }
    if !success {
        // The one failure that is none, in the words that the protocol has for it.
        let nothing = String::from_utf8_lossy(&output).contains("credentials not found");
        return if nothing {
            Ok(None)
        } else {
            Err(format!("{program} failed"))
        };
    }
    let answer: Answer = serde_json::from_slice(&output)
        .map_err(|_| format!("{program} answered something else than name and secret"))?;
    Ok(Credential::of(answer.username, answer.secret))
}

/// Whether it succeeded, and what it wrote: one byte more than the bound at most. It is killed when nobody waits for it.
async fn run(program: &str, server: &str) -> io::Result<(bool, Vec<u8>)> {
    let mut child = Command::new(program)
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    let mut output = Vec::new();
    if let Some(mut stdin) = child.stdin.take() {
        // One that does not listen may know all the same.
        let _ = stdin.write_all(server.as_bytes()).await;
    }
    if let Some(stdout) = child.stdout.take() {
        stdout
            .take(MAX_ANSWER_BYTES + 1)
            .read_to_end(&mut output)
            .await?;
    }
    Ok((child.wait().await?.success(), output))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::Secret;

    async fn answer(script: &str, server: &str) -> Result<Option<Credential>, String> {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("docker-credential-test");
        fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o700)).unwrap();
        ask(program.to_str().unwrap(), server, Duration::from_secs(2)).await
    }

    #[tokio::test]
    async fn a_helper_is_asked_on_its_standard_input() {
        let script =
            r#"[ "$*" = get ] && printf '{"ServerURL":"x","Username":"%s","Secret":"s"}' "$(cat)""#;
        let expected = Credential::Password {
            user: "a.example:5000".into(),
            password: Secret::new("s"),
        };
        assert_eq!(answer(script, "a.example:5000").await, Ok(Some(expected)));
        let script = r#"echo '{"Username":"<token>","Secret":"refresh"}'"#;
        let expected = Credential::IdentityToken(Secret::new("refresh"));
        assert_eq!(answer(script, "a").await, Ok(Some(expected)));
        let script = "echo 'credentials not found in native keychain'; exit 1";
        assert_eq!(answer(script, "a").await, Ok(None));
    }

    #[tokio::test]
    async fn what_a_helper_does_wrong_is_said_without_its_words() {
        for (script, told) in [
            ("echo hunter2; exit 1", "failed"),
            ("echo hunter2", "something else"),
            ("head -c 100000 /dev/zero", "more than 65536 bytes"),
        ] {
            let error = answer(script, "a").await.unwrap_err();
            assert!(
                error.contains(told) && !error.contains("hunter2"),
                "{error}"
            );
        }
        for name in ["", "../evil", "a b", "x;y"] {
            assert!(get(name, "a").await.unwrap_err().contains("name"), "{name}");
        }
        assert!(
            get("that-nobody-has", "a")
                .await
                .unwrap_err()
                .contains("can't be run")
        );
    }

    #[tokio::test]
    async fn a_helper_that_says_nothing_is_given_up() {
        assert!(
            answer("exec sleep 600", "a")
                .await
                .unwrap_err()
                .contains("within 2s")
        );
    }
}
