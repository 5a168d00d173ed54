//! `hawker token create`.

use std::os::unix::fs::{MetadataExt, chown};
use std::path::Path;
use std::time::Duration;

use hawker_core::message::Role;
use hawker_identity::authority::create_token;

use crate::args::{TokenArgs, TokenRole};
use hawker_config::problem::{Problem, Problems};

/// Longer-lived tokens would be passwords.
const TTL_MOST: Duration = Duration::from_secs(24 * 3600);

/// Prints a new token, and nothing else.
pub(crate) fn create(args: &TokenArgs) -> anyhow::Result<()> {
    let role = match args.role {
        TokenRole::Peer => Role::Peer,
        TokenRole::Seed => Role::Seed,
        TokenRole::Scheduler => Role::Scheduler,
    };
    let token = create_token(&args.data_dir, role, ttl(&args.ttl)?)?;
    let authority = args.data_dir.join("authority");
    let tokens = authority.join("tokens");
    if let Err(error) = hand_over(&authority, &[&tokens.join(&token.id), &tokens]) {
        anyhow::bail!(
            "the authority can't read the new token: {error}; run this as the user that it runs as"
        );
    }
    Ok(crate::print::line(token)?)
}

/// Root writes files for an authority that runs as another user, which has to read and remove them.
pub(crate) fn hand_over(authority: &Path, paths: &[&Path]) -> std::io::Result<()> {
    let owner = std::fs::metadata(authority)?;
    for path in paths {
        let now = std::fs::metadata(path)?;
        if now.uid() != owner.uid() {
            chown(path, Some(owner.uid()), Some(owner.gid()))?;
        }
    }
    Ok(())
}

fn ttl(text: &str) -> Result<Duration, Problems> {
    let problem = |problem| Problems(vec![problem]);
    let ttl = hawker_config::quantity::duration(text)
        .map_err(|wrong| problem(Problem::of("--ttl", wrong)))?;
    if ttl.is_zero() || ttl > TTL_MOST {
        let what = format!("`{text}` is no life for a token");
        return Err(problem(Problem::new(
            "--ttl",
            what,
            "give more than nothing and at most 24h",
        )));
    }
    Ok(ttl)
}

#[cfg(test)]
mod tests {
    #[test]
    fn tokens_live_a_day_at_most() {
        assert!(super::ttl("1h").is_ok() && super::ttl("24h").is_ok());
        assert!(
            super::ttl("25h").is_err() && super::ttl("0s").is_err() && super::ttl("soon").is_err()
        );
    }
}
