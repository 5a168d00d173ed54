//! Becoming a member: the identity on disk, or a new one for a token.

use std::io::{BufRead, BufReader, IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

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

/// How a node begins.
#[derive(Debug)]
pub(crate) enum Beginning {
    /// By itself.
    Alone,
    /// With what it has from its last time.
    Member(Identity),
    /// By joining at this address.
    Joining(String, Token),
}

/// How the node with this `data_dir` begins. Reads the token, where one is needed: call it while signals still end the program,
/// for that may be from a terminal.
///
/// An identity that has run out is of no use: with a token the node joins again.
pub(crate) fn beginning(data_dir: &Path, join: Option<&Join>) -> anyhow::Result<Beginning> {
    let dir = identity_dir(data_dir);
    let damaged =
        || format!("{} holds a damaged identity: remove it and join again with a new token", dir.display());
    let identity = Identity::load(&dir).with_context(damaged)?;
    let expired = identity.as_ref().is_some_and(|identity| identity.has_expired(SystemTime::now()));
    match (identity, join) {
        (Some(identity), _) if !expired => Ok(Beginning::Member(identity)),
        (None, None) => Ok(Beginning::Alone),
        (None, Some(how)) => joining(how),
        (Some(identity), how) => match how.map(joining) {
            Some(Ok(joining)) => Ok(joining),
            _ => {
                tracing::error!(
                    dir = %dir.display(),
                    "this node's certificate has expired, as after a week without a scheduler: it goes on alone. Make a token \
                     where the authority is (hawker token create) and start this again with --join and --token-file"
                );
                Ok(Beginning::Member(identity))
            }
        },
    }
}

fn joining(how: &Join) -> anyhow::Result<Beginning> {
    Ok(Beginning::Joining(how.address.clone(), read_token(how.token_file.as_deref())?))
}

/// The identity to begin with, from the authority where need be; none: this node runs alone.
pub(crate) async fn enter(
    beginning: Beginning,
    data_dir: &Path,
    name: &str,
) -> anyhow::Result<Option<Identity>> {
    let (address, token) = match beginning {
        Beginning::Alone => return Ok(None),
        Beginning::Member(identity) => return Ok(Some(identity)),
        Beginning::Joining(address, token) => (address, token),
    };
    let dir = identity_dir(data_dir);
    let (identity, members, cluster) = join_patiently(&address, &token, name).await?;
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
    // One key for all tries: the authority answers it again, should its first answer have been lost.
    let pending = Identity::request()?;
    let begun = Instant::now();
    let mut pause = Duration::from_millis(500);
    loop {
        match join(address, token, name, &pending).await {
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
            if std::io::stdin().is_terminal() {
                eprint!("Token: ");
            }
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

/// The first line: nobody has to end what he types otherwise.
fn text_of(from: impl Read) -> anyhow::Result<String> {
    let mut text = String::new();
    BufReader::new(from.take(TOKEN_MAX_BYTES)).read_line(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use hawker_api::identity::AuthorityKey;

    use super::*;

    #[tokio::test]
    async fn a_node_without_identity_and_join_runs_alone() {
        let dir = tempfile::tempdir().unwrap();
        let beginning = beginning(dir.path(), None).unwrap();
        assert!(enter(beginning, dir.path(), "n").await.unwrap().is_none());
        assert!(!has_identity(&identity_dir(dir.path())));
    }

    #[test]
    fn who_has_an_identity_needs_no_token_until_it_has_expired() {
        let authority = AuthorityKey::generate("test").unwrap();
        let (file, dir) = (tempfile::NamedTempFile::new().unwrap(), tempfile::tempdir().unwrap());
        let how = Join { address: "a:1".into(), token_file: Some(file.path().into()) };
        let begin = |age: Duration| {
            let (pending, begun) = (Identity::request().unwrap(), SystemTime::now() - age);
            let life = Duration::from_secs(3600);
            let certificate = authority.issue(&pending.certificate_request, Role::Peer, life, begun).unwrap();
            let identity = pending.complete(certificate, authority.certificate().clone()).unwrap();
            identity.save(&identity_dir(dir.path())).unwrap();
            beginning(dir.path(), Some(&how)).unwrap()
        };
        let (young, old) = (Duration::ZERO, Duration::from_secs(7200));
        assert!(matches!(begin(young), Beginning::Member(_)));
        assert!(matches!(begin(old), Beginning::Member(_)), "without a token it goes on as it can");
        std::fs::write(file.path(), format!("{}\nmore", Token::generate(authority.certificate()).unwrap()))
            .unwrap();
        assert!(matches!(begin(young), Beginning::Member(_)), "a token is not spent without need");
        assert!(matches!(begin(old), Beginning::Joining(..)));
    }

    #[test]
    fn what_is_no_token_is_refused_without_repeating_it() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "hawker1.secret-by-mistake").unwrap();
        let how = Join { address: "127.0.0.1:1".into(), token_file: Some(file.path().into()) };
        let dir = tempfile::tempdir().unwrap();
        let error = format!("{:#}", beginning(dir.path(), Some(&how)).unwrap_err());
        assert!(error.contains("no token") && !error.contains("by-mistake"), "{error}");
        let how = Join { address: "127.0.0.1:1".into(), token_file: Some("/nonexistent/token".into()) };
        let error = format!("{:#}", beginning(dir.path(), Some(&how)).unwrap_err());
        assert!(error.contains("/nonexistent/token (--token-file)"), "{error}");
    }
}
