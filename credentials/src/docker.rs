//! Docker's `config.json` (docker/cli, `cli/config/configfile`), and podman's `auth.json`, which is the same.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::pattern::Pattern;
use super::{Credential, Entries, Secret, json_error};

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Config {
    auths: Option<Auths>,
    cred_helpers: Option<BTreeMap<String, String>>,
    creds_store: Option<String>,
}

/// By registry.
pub(super) type Auths = BTreeMap<String, Auth>;

/// One registry's entry; containerd's has the same keys.
#[derive(Deserialize)]
pub(super) struct Auth {
    /// `user:password` in base64.
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    identitytoken: Option<String>,
}

impl Auth {
    /// The credential to show; an entry of a registry that a helper serves is empty.
    pub(super) fn credential(self) -> Option<Credential> {
        let some = |text: Option<String>| text.filter(|text| !text.is_empty());
        if let Some(token) = some(self.identitytoken) {
            return Some(Credential::IdentityToken(Secret(token)));
        }
        match some(self.auth) {
            Some(encoded) => Credential::from_encoded(&encoded),
            None => Credential::of(
                self.username.unwrap_or_default(),
                self.password.unwrap_or_default(),
            ),
        }
    }
}

/// Entries by registry, as patterns. Keys that are none are left out.
pub(super) fn listed(
    auths: impl IntoIterator<Item = (String, Auth)>,
) -> Vec<(Pattern, Credential)> {
    auths
        .into_iter()
        .filter_map(|(key, auth)| Some((Pattern::parse(&key)?, auth.credential()?)))
        .collect()
}

pub(super) fn parse(text: &str) -> Result<Entries, String> {
    let config: Config = serde_json::from_str(text).map_err(|e| json_error(&e))?;
    let helpers = config.cred_helpers.unwrap_or_default().into_iter();
    Ok(Entries {
        listed: listed(config.auths.unwrap_or_default()),
        helpers: helpers
            .filter_map(|(key, helper)| Some((Pattern::parse(&key)?, helper)))
            .collect(),
        store: config.creds_store.filter(|store| !store.is_empty()),
    })
}
