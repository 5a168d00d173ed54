//! Becoming a member: the identity on disk, or a new one for a token.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use hawker_api::identity::Identity;
use hawker_api::join::{Token, join};
use hawker_api::member_file;
use hawker_core::message::Role;

use crate::resolve::Join;

/// Where a token may be besides a file. Never on the command line: everyone on the host can read that.
pub(crate) const TOKEN_VARIABLE: &str = "HAWKER_TOKEN";

/// Longest text that is read as a token.
const TOKEN_MAX_BYTES: u64 = 4096;
/// How long a scheduler may take to come up when all nodes start at once.
const JOIN_PATIENCE: Duration = Duration::from_secs(60);

/// Where a node's identity is.
pub(crate) fn identity_dir(data_dir: &Path) -> PathBuf {
    data_dir.join("identity")
}

/// Whether there is an identity, damaged or not: who has one does not join.
pub(crate) fn has_identity(identity_dir: &Path) -> bool {
    std::fs::read_dir(identity_dir).is_ok_and(|mut entries| entries.next().is_some())
}

/// The identity that `data_dir` holds, else a new one from the authority, else none: this node runs alone.
pub(crate) async fn load_or_join(
    data_dir: &Path,
    name: &str,
    join: Option<&Join>,
) -> anyhow::Result<Option<Identity>> {
    let dir = identity_dir(data_dir);
    let damaged =
        || format!("{} holds a damaged identity: remove it and join again with a new token", dir.display());
    if let Some(identity) = Identity::load(&dir).with_context(damaged)? {
        return Ok(Some(identity));
    }
    let Some(how) = join else { return Ok(None) };
    let token = read_token(how.token_file.as_deref())?;
    let (identity, members, cluster) = join_patiently(&how.address, &token, name).await?;
    // The members first: once the identity is there, nobody joins again to get them.
    member_file::save(&data_dir.join("members.json"), &members)
        .context("members.json could not be written")?;
    identity.save(&dir)?;
    tracing::info!(cluster, peer = %identity.peer_id(), role = %identity.role(), "joined");
    Ok(Some(identity))
}

async fn join_patiently(
    address: &str,
    token: &Token,
    name: &str,
) -> anyhow::Result<(Identity, Vec<hawker_api::convert::Member>, String)> {
    let begun = Instant::now();
    let mut pause = Duration::from_millis(500);
    loop {
        match join(address, token, name).await {
            Ok(joined) => return Ok(joined),
            Err(error) if error.is_transient() && begun.elapsed() + pause < JOIN_PATIENCE => {
                tracing::warn!(%error, "not joined yet; trying again in {} ms", pause.as_millis());
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(Duration::from_secs(8));
            }
            Err(error) => return Err(error).with_context(|| format!("could not join at {address} (--join)")),
        }
    }
}

/// Whether what this node was told to be is what its certificate allows.
pub(crate) fn check_role(identity: Option<&Identity>, seed: bool, data_dir: &Path) -> anyhow::Result<()> {
    match identity.map(Identity::role) {
        Some(Role::Peer) if seed => bail!(
            "--seed: this node joined as a peer, and others would not believe it. Remove {} and join again with a token \
             made by `hawker token create --role seed`",
            identity_dir(data_dir).display()
        ),
        Some(Role::Scheduler) => bail!(
            "{} is a scheduler's identity, no node's: name another --data-dir, or join with a token of role peer or seed",
            identity_dir(data_dir).display()
        ),
        _ => Ok(()),
    }
}

/// The token, from where the configuration says.
pub(crate) fn read_token(file: Option<&Path>) -> anyhow::Result<Token> {
    let text = match file {
        Some(path) if path == Path::new("-") => {
            text_of(std::io::stdin().lock()).context("standard input (--token-file -)")
        }
        Some(path) => std::fs::File::open(path)
            .map_err(anyhow::Error::from)
            .and_then(text_of)
            .with_context(|| format!("{} (--token-file)", path.display())),
        None => std::env::var(TOKEN_VARIABLE).context("HAWKER_TOKEN"),
    }?;
    Ok(text.parse()?)
}

fn text_of(from: impl Read) -> anyhow::Result<String> {
    let mut text = String::new();
    from.take(TOKEN_MAX_BYTES).read_to_string(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_node_without_identity_and_join_runs_alone() {
        let dir = tempfile::tempdir().unwrap();
        assert!(load_or_join(dir.path(), "n", None).await.unwrap().is_none());
        assert!(!has_identity(&identity_dir(dir.path())));
    }

    #[tokio::test]
    async fn what_is_no_token_is_refused_without_repeating_it() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "hawker1.secret-by-mistake").unwrap();
        let how = Join { address: "127.0.0.1:1".into(), token_file: Some(file.path().into()) };
        let dir = tempfile::tempdir().unwrap();
        let error = format!("{:#}", load_or_join(dir.path(), "n", Some(&how)).await.err().unwrap());
        assert!(error.contains("no token") && !error.contains("by-mistake"), "{error}");
        let how = Join { address: "127.0.0.1:1".into(), token_file: Some("/nonexistent/token".into()) };
        let error = format!("{:#}", load_or_join(dir.path(), "n", Some(&how)).await.err().unwrap());
        assert!(error.contains("/nonexistent/token (--token-file)"), "{error}");
    }
}
