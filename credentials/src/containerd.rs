//! containerd's `config.toml`: the credentials of its CRI plugin under `registry.configs."HOST".auth` and, older,
//! `registry.auths`.

use super::Entries;
use super::docker::{Auth, Auths, listed};

/// The tables of the plugin's settings: in 2.x, in 1.x, in files of version 1.
const PLUGINS: [&str; 3] = [
    "io.containerd.cri.v1.images",
    "io.containerd.grpc.v1.cri",
    "cri",
];

pub(super) fn parse(text: &str) -> Result<Entries, String> {
    let config: toml::Table = text.parse().map_err(|e: toml::de::Error| {
        // The parser's own words quote the line.
        let line = e.span().map_or(0, |span| {
            text[..span.start.min(text.len())].matches('\n').count() + 1
        });
        format!("it is no TOML at line {line}")
    })?;
    let registries = PLUGINS
        .iter()
        .filter_map(|plugin| config.get("plugins")?.get(plugin)?.get("registry"));
    let mut all = Entries::default();
    for registry in registries {
        let configs = registry
            .get("configs")
            .and_then(toml::Value::as_table)
            .into_iter()
            .flatten();
        let configs = configs
            .filter_map(|(host, settings)| Some((host.clone(), auth(settings.get("auth")?)?)));
        all.listed.extend(listed(configs));
        let auths = registry
            .get("auths")
            .and_then(toml::Value::as_table)
            .into_iter()
            .flatten();
        let auths: Auths = auths
            .filter_map(|(url, settings)| Some((url.clone(), auth(settings)?)))
            .collect();
        all.listed.extend(listed(auths));
    }
    Ok(all)
}

fn auth(settings: &toml::Value) -> Option<Auth> {
    settings.clone().try_into().ok()
}
