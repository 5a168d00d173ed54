//! Becoming a member: the identity on disk, or a new one for a token.

use std::io::{BufRead, BufReader, IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, bail};
use hawker_core::message::Role;
use hawker_identity::join::{Token, join};
use hawker_identity::member::Identity;
use hawker_identity::member_file;

use crate::resolve::Join;

/// The environment variable for a token. A token never stands on the command line: everyone on the host can read that.
pub(crate) const TOKEN_VARIABLE: &str = "HAWKER_TOKEN";

/// Longest text that is read as a token.
const TOKEN_MAX_BYTES: u64 = 4096;
/// How long a scheduler may take to come up when all nodes start at once.
const JOIN_PATIENCE: Duration = Duration::from_secs(60);
/// Between two tries of a node that serves alone meanwhile.
const REJOIN_PAUSE: Duration = Duration::from_secs(15);

/// A scheduler's identity is apart from that of a proxy with the same data directory.
pub(crate) fn scheduler_identity_dir(data_dir: &Path) -> PathBuf {
    identity_dir(&data_dir.join("scheduler"))
}

/// The folder of a node's identity.
pub(crate) fn identity_dir(data_dir: &Path) -> PathBuf {
    data_dir.join("identity")
}

/// Whether there is an identity, damaged or not: such a node was a member before.
pub(crate) fn has_identity(identity_dir: &Path) -> bool {
    match std::fs::read_dir(identity_dir) {
        Ok(mut entries) => entries.next().is_some(),
        Err(error) => error.kind() != std::io::ErrorKind::NotFound,
    }
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
    /// It was a member, and its identity is of no use any more: it serves alone.
    Impaired(Impaired),
}

/// A node whose identity is damaged, incomplete or expired.
#[derive(Debug)]
pub(crate) struct Impaired {
    /// The expired identity. There is none where it is damaged.
    pub(crate) identity: Option<Identity>,
    /// The problem and its cure, for people.
    pub(crate) problem: String,
    /// The address to join again, and the token.
    pub(crate) rejoin: Option<(String, Token)>,
}

/// How the node with this `data_dir` begins. Reads the token, where one is needed: call it while signals still end the program,
/// for that may be from a terminal.
///
/// A node that was a member serves whatever became of its identity: runtimes depend on it. With a token it joins again meanwhile.
pub(crate) fn beginning(data_dir: &Path, join: Option<&Join>) -> anyhow::Result<Beginning> {
    let dir = identity_dir(data_dir);
    let (identity, fault) = match Identity::load(&dir) {
        Ok(Some(identity)) if !identity.has_expired(SystemTime::now()) => {
            return Ok(Beginning::Member(identity));
        }
        Ok(Some(identity)) => (
            Some(identity),
            "this node's certificate has expired, as after a week without a scheduler".to_owned(),
        ),
        Ok(None) if has_identity(&dir) => (
            None,
            format!(
                "the identity in {} is incomplete: certificate.pem is missing",
                dir.display()
            ),
        ),
        Ok(None) => return join.map_or(Ok(Beginning::Alone), joining),
        Err(error) => (
            None,
            format!("the identity in {} is damaged ({error})", dir.display()),
        ),
    };
    let rejoin = match join.map(joining) {
        Some(Ok(Beginning::Joining(address, token))) => Some((address, token)),
        Some(Err(error)) => {
            tracing::warn!("this node cannot join again: {error:#}");
            None
        }
        _ => None,
    };
    let cure = match &rejoin {
        Some((address, _)) => format!("It joins again at {address} with the token it was given."),
        None => "To take part again, make a token where the authority is (hawker token create) and start this again with \
                 --join and --token-file."
            .to_owned(),
    };
    let problem =
        format!("{fault}: this node goes on alone, as a cache for its own runtimes. {cure}");
    tracing::error!("{problem}");
    Ok(Beginning::Impaired(Impaired {
        identity,
        problem,
        rejoin,
    }))
}

fn joining(how: &Join) -> anyhow::Result<Beginning> {
    Ok(Beginning::Joining(
        how.address.clone(),
        read_token(how.token_file.as_deref())?,
    ))
}

/// The new identity of a node that joins, for the first time or again.
pub(crate) async fn enter(
    address: &str,
    token: &Token,
    data_dir: &Path,
    name: &str,
) -> anyhow::Result<Identity> {
    let joined = join_patiently(address, token, name).await?;
    save(data_dir, joined)
}

/// Saves what a join gave.
fn save(
    data_dir: &Path,
    (identity, members, cluster): (Identity, Vec<hawker_api::convert::Member>, String),
) -> anyhow::Result<Identity> {
    // The members first: once the identity is there, nobody joins again to get them.
    member_file::save(&data_dir.join("members.json"), &members)
        .context("members.json could not be written")?;
    identity.save(&identity_dir(data_dir))?;
    tracing::info!(cluster, peer = %identity.peer_id(), role = %identity.role(), "joined");
    Ok(identity)
}

/// Joins again for as long as it takes. Never returns where the authority refuses: another try would be refused as well.
pub(crate) async fn rejoin(
    address: &str,
    token: &Token,
    seed: bool,
    data_dir: &Path,
    name: &str,
) -> Identity {
    let joined = async {
        // One key for all tries: the authority answers it again, should its first answer have been lost.
        let pending = Identity::request()?;
        loop {
            match join(address, token, name, &pending).await {
                Ok(joined) => return save(data_dir, joined),
                Err(error) if error.is_transient() => {
                    tracing::warn!(%error, "not joined again yet; trying again in {} s", REJOIN_PAUSE.as_secs());
                    tokio::time::sleep(REJOIN_PAUSE).await;
                }
                Err(error) => return Err(error.into()),
            }
        }
    };
    let refused = match joined.await {
        Ok(identity) => match check_role(Some(&identity), seed, data_dir) {
            Ok(()) => return identity,
            Err(error) => error,
        },
        Err(error) => error,
    };
    tracing::error!("this node cannot join again at {address}, and stays alone: {refused:#}");
    std::future::pending().await
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
            Err(error) => {
                return Err(error).with_context(|| format!("could not join at {address} (--join)"));
            }
        }
    }
}

/// Whether what this node was told to be is what its certificate allows.
pub(crate) fn check_role(
    identity: Option<&Identity>,
    seed: bool,
    data_dir: &Path,
) -> anyhow::Result<()> {
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
    use hawker_identity::member::AuthorityKey;

    use super::*;

    #[test]
    fn a_node_without_identity_and_join_runs_alone() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(
            beginning(dir.path(), None).unwrap(),
            Beginning::Alone
        ));
        assert!(!has_identity(&identity_dir(dir.path())));
    }

    #[test]
    fn who_has_an_identity_needs_no_token_until_it_has_expired() {
        let authority = AuthorityKey::generate("test").unwrap();
        let (file, dir) = (
            tempfile::NamedTempFile::new().unwrap(),
            tempfile::tempdir().unwrap(),
        );
        let how = Join {
            address: "a:1".into(),
            token_file: Some(file.path().into()),
        };
        let begin = |age: Duration| {
            let (pending, begun) = (Identity::request().unwrap(), SystemTime::now() - age);
            let life = Duration::from_secs(3600);
            let certificate = authority
                .issue(&pending.certificate_request, Role::Peer, life, begun)
                .unwrap();
            let identity = pending
                .complete(certificate, authority.certificate().clone())
                .unwrap();
            identity.save(&identity_dir(dir.path())).unwrap();
            beginning(dir.path(), Some(&how)).unwrap()
        };
        let (young, old) = (Duration::ZERO, Duration::from_secs(7200));
        assert!(matches!(begin(young), Beginning::Member(_)));
        let rejoins = |beginning: Beginning| match beginning {
            Beginning::Impaired(impaired) => {
                (impaired.identity.is_some(), impaired.rejoin.is_some())
            }
            other => panic!("{other:?}"),
        };
        assert_eq!(
            rejoins(begin(old)),
            (true, false),
            "without a token it goes on as it can"
        );
        std::fs::write(
            file.path(),
            format!(
                "{}\nmore",
                Token::generate(authority.certificate()).unwrap()
            ),
        )
        .unwrap();
        assert!(
            matches!(begin(young), Beginning::Member(_)),
            "a token is not spent without need"
        );
        assert_eq!(rejoins(begin(old)), (true, true));
    }

    #[test]
    fn a_node_with_a_damaged_identity_begins_alone_and_says_what_is_wrong() {
        let authority = AuthorityKey::generate("test").unwrap();
        let other_key = Identity::request().unwrap();
        let life = Duration::from_secs(3600);
        let issued = |request: &[u8]| {
            authority
                .issue(request, Role::Peer, life, SystemTime::now())
                .unwrap()
        };
        type Damage<'a> = (&'a str, &'a dyn Fn(&Path));
        let cut = |file: &'static str| {
            move |dir: &Path| {
                let text = std::fs::read(dir.join(file)).unwrap();
                std::fs::write(dir.join(file), &text[..text.len() / 2]).unwrap();
            }
        };
        let gone =
            |file: &'static str| move |dir: &Path| std::fs::remove_file(dir.join(file)).unwrap();
        let cases: &[Damage<'_>] = &[
            ("the key is cut", &cut("key.pem")),
            ("the certificate is cut", &cut("certificate.pem")),
            ("the authority is cut", &cut("authority.pem")),
            ("no key", &gone("key.pem")),
            ("no certificate", &gone("certificate.pem")),
            ("no authority", &gone("authority.pem")),
            ("a folder in place of a file", &|dir| {
                std::fs::remove_file(dir.join("key.pem")).unwrap();
                std::fs::create_dir(dir.join("key.pem")).unwrap();
            }),
            ("a certificate for another key", &|dir| {
                let certificate = issued(&other_key.certificate_request);
                let pem = hawker_identity::member::files::certificate_pem(&certificate);
                std::fs::write(dir.join("certificate.pem"), pem).unwrap();
            }),
        ];
        for (name, damage) in cases {
            let dir = tempfile::tempdir().unwrap();
            let pending = Identity::request().unwrap();
            let certificate = issued(&pending.certificate_request);
            let identity = pending
                .complete(certificate, authority.certificate().clone())
                .unwrap();
            identity.save(&identity_dir(dir.path())).unwrap();
            damage(&identity_dir(dir.path()));
            match beginning(dir.path(), None).unwrap() {
                Beginning::Impaired(Impaired {
                    identity: None,
                    problem,
                    rejoin: None,
                }) => {
                    assert!(
                        problem.contains("alone") && problem.contains("token create"),
                        "{name}: {problem}"
                    );
                }
                other => panic!("{name}: {other:?}"),
            }
        }
    }

    #[test]
    fn what_is_no_token_is_refused_without_repeating_it() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "hawker1.secret-by-mistake").unwrap();
        let how = Join {
            address: "127.0.0.1:1".into(),
            token_file: Some(file.path().into()),
        };
        let dir = tempfile::tempdir().unwrap();
        let error = format!("{:#}", beginning(dir.path(), Some(&how)).unwrap_err());
        assert!(
            error.contains("no token") && !error.contains("by-mistake"),
            "{error}"
        );
        let how = Join {
            address: "127.0.0.1:1".into(),
            token_file: Some("/nonexistent/token".into()),
        };
        let error = format!("{:#}", beginning(dir.path(), Some(&how)).unwrap_err());
        assert!(
            error.contains("/nonexistent/token (--token-file)"),
            "{error}"
        );
    }
}
