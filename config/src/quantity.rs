//! Sizes, durations, percentages, addresses: from what people write, and sizes back again.

use std::fs::File;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use hawker_core::application::{self, Label, Pattern, Priority};
use hawker_core::intercept::{Action, path_pattern};
use hawker_core::place::Network;
use url::Url;

use crate::choice::{AuthorizationMode, CredentialSource, LogFormat};
use crate::problem::{Wrong, wrong};

const SIZE_UNITS: [(&str, u64); 9] = [
    ("B", 1),
    ("KB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
    ("KIB", 1 << 10),
    ("MIB", 1 << 20),
    ("GIB", 1 << 30),
    ("TIB", 1 << 40),
];

const DURATION_UNITS: [(&str, u64); 5] = [
    ("ms", 1),
    ("s", 1_000),
    ("m", 60_000),
    ("h", 3_600_000),
    ("d", 86_400_000),
];

/// Bytes: `100MB` is a hundred million, `12MiB` twelve times 1024².
pub fn size(text: &str) -> Result<u64, Wrong> {
    let cure = "write a number and a unit: 512MB, 12MiB, 1.5GB";
    let (number, unit) = split_number(text);
    let unit = unit.trim().to_ascii_uppercase();
    let Some((_, factor)) = SIZE_UNITS.iter().find(|(name, _)| *name == unit) else {
        return wrong(format!("`{text}` is no size"), cure);
    };
    match scaled(number, *factor) {
        Some(bytes) => Ok(bytes),
        None => wrong(format!("`{text}` is no size"), cure),
    }
}

/// Bytes a second: a size, `/s` at its end or not.
pub fn rate(text: &str) -> Result<u64, Wrong> {
    let bytes = size(text.strip_suffix("/s").unwrap_or(text))?;
    if bytes < 64 << 10 {
        return wrong(
            format!("`{text}` a second is too slow for one frame"),
            "give 64KiB or more, or leave it out for no limit",
        );
    }
    Ok(bytes)
}

/// `60s`, `5m`, `1h30m`, `250ms`.
pub fn duration(text: &str) -> Result<Duration, Wrong> {
    duration_ms(text)
        .map(Duration::from_millis)
        .ok_or_else(|| Wrong {
            what: format!("`{text}` is no duration"),
            cure: "write a number and a unit: 30s, 5m, 1h30m, 250ms".to_owned(),
        })
}

fn duration_ms(text: &str) -> Option<u64> {
    let mut rest = text.trim();
    let mut total_ms = 0_u64;
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let (number, tail) = split_number(rest);
        let end = tail
            .find(|c: char| c.is_ascii_digit())
            .unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(end);
        let (_, factor_ms) = DURATION_UNITS
            .iter()
            .find(|(name, _)| *name == unit.trim())?;
        total_ms = total_ms.checked_add(scaled(number, *factor_ms)?)?;
        rest = tail;
    }
    Some(total_ms)
}

fn split_number(text: &str) -> (&str, &str) {
    let text = text.trim();
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    text.split_at(end)
}

/// `number * factor` in whole numbers, without a float's rounding.
fn scaled(number: &str, factor: u64) -> Option<u64> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || fraction.len() > 6 {
        return None;
    }
    let denominator = 10_u128.pow(u32::try_from(fraction.len()).ok()?);
    let digits: u128 = format!("{whole}{fraction}").parse().ok()?;
    u64::try_from(digits.checked_mul(u128::from(factor))? / denominator).ok()
}

/// 1 to 99, `%` at its end or not.
pub fn percent(text: &str) -> Result<u8, Wrong> {
    match text.trim().trim_end_matches('%').trim_end().parse() {
        Ok(percent @ 1..=99) => Ok(percent),
        _ => wrong(
            format!("`{text}` is no percentage"),
            "give 1 to 99, e.g. 90",
        ),
    }
}

/// `relay`, `token` or `node`.
pub fn authorization(text: &str) -> Result<AuthorizationMode, Wrong> {
    match text.trim() {
        "relay" => Ok(AuthorizationMode::Relay),
        "token" => Ok(AuthorizationMode::Token),
        "node" => Ok(AuthorizationMode::Node),
        _ => wrong(
            format!("`{text}` is no way to authorize"),
            "write relay, token or node",
        ),
    }
}

/// `docker:/root/.docker/config.json`. The place must be there: a mistyped one would show only with the first private pull.
pub fn credentials(text: &str) -> Result<CredentialSource, Wrong> {
    let cure = "write docker:FILE, containerd:FILE, kubernetes:FILE-OR-FOLDER or env:VARIABLE";
    let Some((kind, place)) = text.split_once(':').filter(|(_, place)| !place.is_empty()) else {
        return wrong(
            format!("`{text}` does not say what kind of credentials it is"),
            cure,
        );
    };
    let path = PathBuf::from(place);
    let readable = || {
        let open = if path.is_dir() {
            std::fs::read_dir(&path).map(drop)
        } else {
            File::open(&path).map(drop)
        };
        open.or_else(|error| wrong(format!("{place}: {error}"), "name what this user may read"))
    };
    match kind {
        "docker" => readable().map(|()| CredentialSource::Docker(path.clone())),
        "containerd" => readable().map(|()| CredentialSource::Containerd(path.clone())),
        "kubernetes" => readable().map(|()| CredentialSource::Kubernetes(path.clone())),
        "env" if std::env::var_os(place).is_some() => {
            Ok(CredentialSource::Environment(place.to_owned()))
        }
        "env" => wrong(
            format!("the environment has no {place}"),
            "set it to what would stand in docker's config.json, or take that out",
        ),
        _ => wrong(format!("`{kind}` is no kind of credentials"), cure),
    }
}

/// `true` or `false`.
pub fn yes_or_no(text: &str) -> Result<bool, Wrong> {
    match text.trim() {
        "true" => Ok(true),
        "false" => Ok(false),
        _ => wrong(
            format!("`{text}` is neither true nor false"),
            "write true or false",
        ),
    }
}

/// `address:port` to listen on.
pub fn listen(text: &str) -> Result<SocketAddr, Wrong> {
    text.parse().or_else(|_| {
        wrong(
            format!("`{text}` is no address to listen on"),
            "write IP:PORT, e.g. 127.0.0.1:6500, or [::]:6501 for every address of this host",
        )
    })
}

/// `host:port` as others dial it; the host may be a DNS name.
pub fn host_port(text: &str) -> Result<String, Wrong> {
    let cure =
        "write HOST:PORT, an IPv6 address in brackets: node1.example.com:6501, [2001:db8::1]:6501";
    let Some((host, port)) = text.rsplit_once(':') else {
        return wrong(format!("`{text}` has no port"), cure);
    };
    if port.parse::<u16>().is_ok_and(|port| port > 0) && is_host(host) {
        return Ok(text.to_owned());
    }
    wrong(format!("`{text}` is no HOST:PORT"), cure)
}

/// A registry as references name it: a host, a port if it has one.
pub fn registry_host(text: &str) -> Result<String, Wrong> {
    let host = match text.rsplit_once(':') {
        Some((host, port)) if port.parse::<u16>().is_ok() => host,
        _ => text,
    };
    if is_host(host) {
        return Ok(text.to_ascii_lowercase());
    }
    wrong(
        format!("`{text}` is no registry's host"),
        "write it as in image names: docker.io, 10.0.0.1:5000",
    )
}

/// A registry's host, or `*.example.com` for all below.
pub fn registry_pattern(text: &str) -> Result<String, Wrong> {
    let host = text.strip_prefix("*.").unwrap_or(text);
    match registry_host(host) {
        Ok(_) => Ok(text.to_ascii_lowercase()),
        Err(_) => wrong(
            format!("`{text}` is no pattern for registries"),
            "write docker.io or *.example.com",
        ),
    }
}

/// `text` or `json`.
pub(crate) fn log_format(text: &str) -> Result<LogFormat, Wrong> {
    match text {
        "text" => Ok(LogFormat::Text),
        "json" => Ok(LogFormat::Json),
        _ => wrong(format!("`{text}` is no format"), "write text or json"),
    }
}

/// `p2p` or `direct`.
pub(crate) fn action(text: &str) -> Result<Action, Wrong> {
    match text {
        "p2p" => Ok(Action::P2p),
        "direct" => Ok(Action::Direct),
        _ => wrong(format!("`{text}` names no action"), "write p2p or direct"),
    }
}

/// A regular expression without spaces.
pub(crate) fn path(text: &str) -> Result<String, Wrong> {
    if text.is_empty() || text.contains(char::is_whitespace) {
        return wrong("is no word", "write a text without spaces");
    }
    match path_pattern(text) {
        Ok(_) => Ok(text.to_owned()),
        Err(why) => wrong(
            format!("`{text}` has a pattern that is none: {why}"),
            "mend the pattern",
        ),
    }
}

/// `quay.io/shop/*`.
pub(crate) fn pattern(text: &str) -> Result<Pattern, Wrong> {
    if text.is_empty() || text.contains(char::is_whitespace) {
        return wrong("is no word", "write a text without spaces");
    }
    Pattern::new(text).or_else(|why| {
        let cure = "write HOST/REPOSITORY, with * for any text, like quay.io/shop/*";
        wrong(format!("match `{text}` {why}"), cure)
    })
}

/// 0 to 6.
pub(crate) fn priority(text: &str) -> Result<Priority, Wrong> {
    match text.parse().ok().and_then(Priority::new) {
        Some(priority) => Ok(priority),
        None => wrong(
            format!("priority `{text}` is none"),
            "write 0 (first) to 6 (last); 3 is usual",
        ),
    }
}

/// A name for people, of a member or of where it stands.
pub fn printable(text: &str) -> Result<String, Wrong> {
    if text.is_empty() || text.len() > 128 || text.chars().any(|c| c.is_control()) {
        return wrong(
            "is empty, too long or holds control characters",
            "give 1 to 128 printable characters",
        );
    }
    Ok(text.to_owned())
}

pub(crate) fn label(text: &str) -> Result<Label, Wrong> {
    Label::new(text).ok_or_else(|| Wrong {
        what: format!("`{text}` is no label"),
        cure: format!(
            "write 1 to {} letters, digits or ._-/:@+, without spaces",
            application::MAX_LABEL_BYTES
        ),
    })
}

/// A network: `10.0.0.0/8`, `fd00::/8`, or one address.
pub fn network(text: &str) -> Result<Network, Wrong> {
    let (address, length) = text.split_once('/').unwrap_or((text, ""));
    let parsed = address.parse::<IpAddr>().ok().and_then(|ip| {
        let all = if ip.is_ipv4() { 32 } else { 128 };
        let length = if length.is_empty() && !text.contains('/') {
            all
        } else {
            length.parse().ok()?
        };
        Network::new(ip, length)
    });
    match parsed {
        Some(network) => Ok(network),
        None => wrong(
            format!("`{text}` is no network"),
            "write ADDRESS/LENGTH: 10.0.0.0/8, fd00::/8",
        ),
    }
}

/// Addresses of members.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetworkOrHost {
    /// Addresses that begin alike.
    Network(Network),
    /// A host, or `*.example.com`.
    Host(String),
}

/// A network, or a host as in [`registry_pattern`].
pub fn network_or_host(text: &str) -> Result<NetworkOrHost, Wrong> {
    if let Ok(network) = network(text) {
        return Ok(NetworkOrHost::Network(network));
    }
    match registry_pattern(text) {
        Ok(host) if !text.contains(['/', ':']) => Ok(NetworkOrHost::Host(host)),
        _ => wrong(
            format!("`{text}` is neither a network nor a host"),
            "write ADDRESS/LENGTH such as 203.0.113.0/24, or a host such as *.example.com, without a port",
        ),
    }
}

/// A registry's address: `https://…`, or `http://…` which is insecure by choice.
pub fn endpoint(text: &str) -> Result<Url, Wrong> {
    let cure = "write https://HOST[:PORT][/PATH], or http://… where the registry has no TLS";
    let url = match Url::parse(text) {
        Ok(url) if matches!(url.scheme(), "http" | "https") && url.has_host() => url,
        _ => return wrong(format!("`{text}` is no registry's address"), cure),
    };
    if !url.username().is_empty() || url.password().is_some() {
        return wrong(
            "the address carries credentials".to_owned(),
            "take user and password out of it",
        );
    }
    if url.query().is_some() || url.fragment().is_some() {
        return wrong(format!("`{text}` has a query or a fragment"), cure);
    }
    Ok(url)
}

/// A whole number from `least` to `most`.
pub fn count(text: &str, least: u32, most: u32) -> Result<u32, Wrong> {
    match text.trim().parse() {
        Ok(n) if (least..=most).contains(&n) => Ok(n),
        _ => wrong(
            format!("`{text}` is out of range"),
            format!("give a whole number from {least} to {most}"),
        ),
    }
}

fn is_host(host: &str) -> bool {
    if let Some(v6) = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')) {
        return v6.parse::<std::net::Ipv6Addr>().is_ok();
    }
    !host.is_empty()
        && host.len() <= 253
        && host.split('.').all(|label| {
            !label.is_empty()
                && label.len() <= 63
                && label
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
                && !label.starts_with('-')
                && !label.ends_with('-')
        })
}

/// For people: `1.5 GiB`, three digits or so.
pub fn human_size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    #[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = if value < 99.95 { 1 } else { 0 };
    format!("{value:.digits$} {}", UNITS[unit])
}

/// For people: `3 d 4 h`, `12 min`, `8 s`.
pub fn human_duration(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3_600 => format!("{} min", seconds / 60),
        3_600..86_400 => format!("{} h {} min", seconds / 3_600, seconds % 3_600 / 60),
        _ => format!("{} d {} h", seconds / 86_400, seconds % 86_400 / 3_600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_exact_in_both_families_of_units() {
        for (text, bytes) in [
            ("0B", 0),
            ("100MB", 100_000_000),
            ("12MiB", 12 << 20),
            ("12mib", 12 << 20),
            ("1.5 GB", 1_500_000_000),
            ("0.1KiB", 102),
            ("64 KiB", 65_536),
            ("16TiB", 16 << 40),
        ] {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for text in [
            "",
            "MB",
            "12",
            "12 parsecs",
            "-1MB",
            "1.MB.",
            "99999999999TiB",
            "1e3MB",
            ".5MB",
        ] {
            assert!(size(text).is_err(), "{text}");
        }
        assert_eq!(rate("100MB/s"), Ok(100_000_000));
        assert!(rate("0B").is_err());
    }

    #[test]
    fn durations_need_a_unit() {
        for (text, ms) in [
            ("60s", 60_000),
            ("5m", 300_000),
            ("1h30m", 5_400_000),
            ("250ms", 250),
            ("1.5s", 1_500),
        ] {
            assert_eq!(duration(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for text in [
            "",
            "60",
            "s",
            "5 minutes",
            "-5s",
            "1h30",
            "99999999999999999999d",
        ] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn addresses_and_hosts_are_told_from_garbage() {
        for text in [
            "a.example.com:6501",
            "10.0.0.1:1",
            "[2001:db8::1]:6501",
            "node_1:65535",
        ] {
            assert_eq!(host_port(text).as_deref(), Ok(text));
        }
        for text in [
            "a",
            "a:0",
            "a:65536",
            ":1",
            "2001:db8::1:6501",
            "http://a:1",
            "a b:1",
            "[::1]",
        ] {
            assert!(host_port(text).is_err(), "{text}");
        }
        for text in [
            "docker.io",
            "10.0.0.1:5000",
            "[fd00::1]:5000",
            "localhost:5000",
        ] {
            assert!(registry_host(text).is_ok(), "{text}");
        }
        for text in ["", "http://a", "a/b", "*.a", "a:b"] {
            assert!(registry_host(text).is_err(), "{text}");
        }
        assert!(registry_pattern("*.example.com").is_ok() && registry_pattern("a.*.com").is_err());
        assert_eq!(
            network("10.0.0.0/8"),
            Ok(Network::new("10.0.0.0".parse().unwrap(), 8).unwrap())
        );
        assert_eq!(
            network("fd00::1"),
            Ok(Network::new("fd00::1".parse().unwrap(), 128).unwrap())
        );
        for text in ["10.0.0.0/33", "10.0.0.0/", "x/8", "fd00::/129"] {
            assert!(network(text).is_err(), "{text}");
        }
    }

    #[test]
    fn an_endpoint_with_a_password_is_refused_without_repeating_it() {
        let wrong = endpoint("https://me:hunter2@a.example").unwrap_err();
        assert!(!format!("{wrong:?}").contains("hunter2"));
        assert!(
            endpoint("ftp://a").is_err()
                && endpoint("https://a?b").is_err()
                && endpoint("a").is_err()
        );
        assert!(endpoint("http://10.0.0.1:5000").is_ok());
    }

    #[test]
    fn sizes_for_people_keep_three_digits() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (150 << 20, "150 MiB"),
            (1023 << 20, "1.0 GiB"),
            (3 << 39, "1.5 TiB"),
        ] {
            assert_eq!(human_size(bytes), text);
        }
        assert_eq!(human_duration(3_700), "1 h 1 min");
    }
}
