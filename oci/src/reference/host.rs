//! Registry hosts: one spelling for each, which ones a pattern allows, and which addresses are on the public Internet.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Longest host name (RFC 1035, 2.3.4).
const MAX_HOST_BYTES: usize = 253;

/// Docker Hub as references name it.
const HUB: &str = "docker.io";
/// The host of Docker Hub's API.
const HUB_API: &str = "registry-1.docker.io";
/// Names under which Docker Hub is asked for, too.
const HUB_ALIASES: [&str; 2] = ["index.docker.io", HUB_API];

/// The port that needs no mention: registries are spoken to by HTTPS.
const DEFAULT_PORT: u16 = 443;

/// Why a text is no registry host. The caller's fault; a retry does not help.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HostError {
    /// Neither a name, nor an IPv4 address, nor an IPv6 address in brackets.
    #[error(
        "expected a host name or address, with :port where it needs one, like quay.io or [::1]:5000"
    )]
    Form,
    /// The port is none.
    #[error("the port must be a number from 1 to 65535")]
    Port,
}

/// A registry's host in its one spelling: lower case, IPv6 addresses as RFC 5952 writes them, without the port of HTTPS,
/// Docker Hub as `docker.io` whichever of its names was used.
pub fn canonical_host(text: &str) -> Result<String, HostError> {
    let (host, port) = split_port(text)?;
    let host = canonical_name(host)?;
    Ok(match port {
        Some(port) if port != DEFAULT_PORT => format!("{host}:{port}"),
        _ if HUB_ALIASES.contains(&host.as_str()) => HUB.to_owned(),
        _ => host,
    })
}

/// Whether a host, given as [`canonical_host`] writes it, is Docker Hub.
pub(super) fn is_hub(canonical: &str) -> bool {
    canonical == HUB
}

/// The host of a registry's API: the same host, but for Docker Hub.
pub fn api_host(canonical: &str) -> &str {
    if canonical == HUB { HUB_API } else { canonical }
}

/// A host without its port; the brackets of an IPv6 address stay.
pub fn host_name(host: &str) -> &str {
    split_port(host).map_or(host, |(name, _)| name)
}

/// Whether a pattern of the configuration allows a host, given as [`canonical_host`] writes it.
///
/// `quay.io` and `reg:5000` allow exactly that. `*.example.com` allows all names below `example.com`, not itself. Without a
/// port only the default one is allowed, with `:*` any. `*` allows everything. Nothing but `*` and itself matches an address.
pub fn host_matches(pattern: &str, canonical: &str) -> bool {
    if pattern == "*" {
        return true;
    }
    let Ok((host, port)) = split_port(canonical) else {
        return false;
    };
    let (pattern, port_matches) = match pattern.strip_suffix(":*") {
        Some(pattern) => (pattern, true),
        None => match split_port(pattern) {
            Ok((pattern, wanted)) => (pattern, wanted.filter(|port| *port != DEFAULT_PORT) == port),
            Err(_) => return false,
        },
    };
    port_matches && name_matches(pattern, host)
}

fn name_matches(pattern: &str, host: &str) -> bool {
    match pattern.strip_prefix("*.") {
        Some(parent) => {
            let below = host
                .strip_suffix(&parent.to_ascii_lowercase())
                .and_then(|rest| rest.strip_suffix('.'));
            below.is_some_and(|below| !below.is_empty()) && host.parse::<Ipv4Addr>().is_err()
        }
        None => canonical_host(pattern).is_ok_and(|pattern| pattern == host),
    }
}

/// Splits `host`, `host:port`, `[v6]`, `[v6]:port`. The brackets stay.
fn split_port(text: &str) -> Result<(&str, Option<u16>), HostError> {
    let end = if text.starts_with('[') {
        text.find(']').ok_or(HostError::Form)? + 1
    } else {
        text.find(':').unwrap_or(text.len())
    };
    let (host, port) = text.split_at(end);
    if port.is_empty() {
        return Ok((host, None));
    }
    let digits = port.strip_prefix(':').ok_or(HostError::Form)?;
    let digits = Some(digits).filter(|digits| digits.bytes().all(|b| b.is_ascii_digit()));
    let port = digits
        .and_then(|digits| digits.parse().ok())
        .filter(|port| *port > 0)
        .ok_or(HostError::Port)?;
    Ok((host, Some(port)))
}

fn canonical_name(host: &str) -> Result<String, HostError> {
    if let Some(address) = host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'))
    {
        let address: Ipv6Addr = address.parse().map_err(|_| HostError::Form)?;
        return Ok(format!("[{address}]"));
    }
    let label = |label: &str| {
        let legal = |b: u8| b.is_ascii_alphanumeric() || b == b'-';
        (1..=63).contains(&label.len())
            && label.bytes().all(legal)
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    let legal = host.len() <= MAX_HOST_BYTES && host.split('.').all(label);
    if legal {
        Ok(host.to_ascii_lowercase())
    } else {
        Err(HostError::Form)
    }
}

/// Whether an address is on the public Internet, by IANA's special-purpose registries (RFC 6890). Addresses that carry an
/// IPv4 address (mapped, NAT64, 6to4) are what that one is.
///
/// To be asked of every address that a name resolved to, before it is connected to: `ns` must not lead into the network
/// that the node is in.
pub fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => is_public_v4(address),
        IpAddr::V6(address) => is_public_v6(address),
    }
}

fn is_public_v4(address: Ipv4Addr) -> bool {
    const SPECIAL: [(Ipv4Addr, u32); 16] = [
        (Ipv4Addr::new(0, 0, 0, 0), 8),       // this network, unspecified
        (Ipv4Addr::new(10, 0, 0, 0), 8),      // private
        (Ipv4Addr::new(100, 64, 0, 0), 10),   // shared by carriers (RFC 6598)
        (Ipv4Addr::new(127, 0, 0, 0), 8),     // loopback
        (Ipv4Addr::new(169, 254, 0, 0), 16),  // link-local, and clouds' metadata
        (Ipv4Addr::new(172, 16, 0, 0), 12),   // private
        (Ipv4Addr::new(192, 0, 0, 0), 24),    // protocol assignments
        (Ipv4Addr::new(192, 0, 2, 0), 24),    // documentation
        (Ipv4Addr::new(192, 88, 99, 0), 24),  // 6to4 relays (RFC 7526: gone)
        (Ipv4Addr::new(192, 168, 0, 0), 16),  // private
        (Ipv4Addr::new(198, 18, 0, 0), 15),   // benchmarks (RFC 2544)
        (Ipv4Addr::new(198, 51, 100, 0), 24), // documentation
        (Ipv4Addr::new(203, 0, 113, 0), 24),  // documentation
        (Ipv4Addr::new(224, 0, 0, 0), 4),     // multicast
        (Ipv4Addr::new(240, 0, 0, 0), 4),     // reserved
        (Ipv4Addr::BROADCAST, 32),
    ];
    let bits = address.to_bits();
    !SPECIAL
        .iter()
        .any(|(network, length)| (bits ^ network.to_bits()) >> (32 - length) == 0)
}

fn is_public_v6(address: Ipv6Addr) -> bool {
    // Of the space outside 2000::/3 only NAT64 and mapped addresses lead anywhere public.
    const SPECIAL: [(Ipv6Addr, u32); 3] = [
        (Ipv6Addr::new(0x2001, 0, 0, 0, 0, 0, 0, 0), 23), // protocol assignments: Teredo, benchmarks, ORCHID
        (Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0), 32), // documentation
        (Ipv6Addr::new(0x3fff, 0, 0, 0, 0, 0, 0, 0), 20), // documentation (RFC 9637)
    ];
    if let Some(inner) = embedded_v4(address) {
        return is_public_v4(inner);
    }
    let bits = address.to_bits();
    let special = SPECIAL
        .iter()
        .any(|(network, length)| (bits ^ network.to_bits()) >> (128 - length) == 0);
    bits >> 125 == 0b001 && !special
}

/// The IPv4 address inside a mapped (RFC 4291), NAT64 (RFC 6052) or 6to4 (RFC 3056) one.
fn embedded_v4(address: Ipv6Addr) -> Option<Ipv4Addr> {
    let from =
        |high: u16, low: u16| Some(Ipv4Addr::from_bits(u32::from(high) << 16 | u32::from(low)));
    match address.segments() {
        [0, 0, 0, 0, 0, 0xffff, high, low] => from(high, low),
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] => from(high, low),
        [0x2002, high, low, ..] => from(high, low),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_host_has_one_spelling() {
        let table = [
            ("docker.io", Ok("docker.io")),
            ("index.docker.io", Ok("docker.io")),
            ("registry-1.docker.io", Ok("docker.io")),
            ("Registry-1.Docker.IO:443", Ok("docker.io")),
            ("registry-1.docker.io:5000", Ok("registry-1.docker.io:5000")),
            ("QUAY.io", Ok("quay.io")),
            ("quay.io:443", Ok("quay.io")),
            ("quay.io:80", Ok("quay.io:80")),
            ("quay.io:0080", Ok("quay.io:80")),
            ("reg:5000", Ok("reg:5000")),
            ("localhost", Ok("localhost")),
            ("10.0.0.1:5000", Ok("10.0.0.1:5000")),
            ("[::1]:5000", Ok("[::1]:5000")),
            ("[::1]", Ok("[::1]")),
            ("[FD00:0:0:0::1]:443", Ok("[fd00::1]")),
            ("[::1", Err(HostError::Form)),
            ("[::1]5000", Err(HostError::Form)),
            ("[fe80::1%25eth0]", Err(HostError::Form)),
            ("::1", Err(HostError::Port)),
            ("", Err(HostError::Form)),
            (":5000", Err(HostError::Form)),
            ("a..b", Err(HostError::Form)),
            ("quay.io.", Err(HostError::Form)),
            ("-a.b", Err(HostError::Form)),
            ("a_b.c", Err(HostError::Form)),
            ("user@host", Err(HostError::Form)),
            ("a/b", Err(HostError::Form)),
            ("a b", Err(HostError::Form)),
            ("quay.io:", Err(HostError::Port)),
            ("quay.io:0", Err(HostError::Port)),
            ("quay.io:65536", Err(HostError::Port)),
            ("quay.io:+80", Err(HostError::Port)),
            ("quay.io:80:80", Err(HostError::Port)),
        ];
        for (text, expected) in table {
            assert_eq!(canonical_host(text), expected.map(str::to_owned), "{text}");
        }
        assert_eq!(canonical_host(&"a.".repeat(127)), Err(HostError::Form));
        assert_eq!(canonical_host(&"a".repeat(64)), Err(HostError::Form));
    }

    #[test]
    fn docker_hub_has_its_api_elsewhere() {
        assert_eq!(api_host("docker.io"), "registry-1.docker.io");
        assert_eq!(api_host("quay.io"), "quay.io");
        assert_eq!(api_host("reg:5000"), "reg:5000");
    }

    #[test]
    fn patterns_allow_what_they_say() {
        let table = [
            ("*", "quay.io", true),
            ("*", "[::1]:5000", true),
            ("quay.io", "quay.io", true),
            ("Quay.IO:443", "quay.io", true),
            ("quay.io", "quay.io:22", false),
            ("quay.io:*", "quay.io:22", true),
            ("quay.io:*", "quay.io", true),
            ("index.docker.io", "docker.io", true),
            ("quay.io", "evilquay.io", false),
            ("*.example.com", "a.example.com", true),
            ("*.Example.com", "a.b.example.com", true),
            ("*.example.com", "example.com", false),
            ("*.example.com", "evilexample.com", false),
            ("*.example.com", ".example.com", false),
            ("*.example.com", "a.example.com:5000", false),
            ("*.example.com:5000", "a.example.com:5000", true),
            ("*.example.com:*", "a.example.com:5000", true),
            ("*.example.com", "example.com.evil.org", false),
            ("*.0.0.1", "10.0.0.1", false),
            ("10.0.0.1:5000", "10.0.0.1:5000", true),
            ("[::1]:*", "[::1]:5000", true),
            ("[::1]:5000", "[::1]:5000", true),
            ("[0:0::1]:5000", "[::1]:5000", true),
            ("a.*.com", "a.b.com", false),
            ("*.", "a.b", false),
            ("", "quay.io", false),
        ];
        for (pattern, host, expected) in table {
            assert_eq!(host_matches(pattern, host), expected, "{pattern} {host}");
        }
    }

    #[test]
    fn only_the_public_internet_is_public() {
        let public = [
            "1.1.1.1",
            "100.63.255.255",
            "100.128.0.0",
            "172.15.255.255",
            "172.32.0.0",
            "192.0.1.0",
            "198.17.255.255",
            "198.20.0.0",
            "223.255.255.255",
            "2606:4700::1111",
            "2001:4860::8888",
            "::ffff:1.1.1.1",
            "64:ff9b::1.1.1.1",
            "2002:101:101::1",
        ];
        let special = [
            "0.0.0.0",
            "0.1.2.3",
            "10.255.255.255",
            "100.64.0.0",
            "100.127.255.255",
            "127.0.0.1",
            "127.255.255.255",
            "169.254.169.254",
            "172.16.0.0",
            "172.31.255.255",
            "192.0.0.8",
            "192.0.2.1",
            "192.88.99.1",
            "192.168.1.1",
            "198.18.0.0",
            "198.19.255.255",
            "198.51.100.1",
            "203.0.113.1",
            "224.0.0.1",
            "239.255.255.255",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::1.1.1.1",
            "fe80::1",
            "fec0::1",
            "fc00::1",
            "fdff::1",
            "ff02::1",
            "100::1",
            "2001::1",
            "2001:2::1",
            "2001:10::1",
            "2001:db8::1",
            "3fff::1",
            "64:ff9b:1::1.1.1.1",
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.1",
            "64:ff9b::169.254.169.254",
            "2002:7f00:1::1",
            "2002:a00:1::1",
            "5f00::1",
            "4000::1",
        ];
        for (addresses, expected) in [(&public[..], true), (&special[..], false)] {
            for address in addresses {
                assert_eq!(is_public(address.parse().unwrap()), expected, "{address}");
            }
        }
    }

    proptest! {
        #[test]
        fn nothing_that_the_standard_library_calls_special_is_public(bits in any::<u32>(), top in any::<u8>()) {
            // Half of the draws near the special networks.
            for bits in [bits, bits >> 8 | [10u32, 100, 127, 169, 172, 192, 198, 203][usize::from(top % 8)] << 24] {
                let v4 = Ipv4Addr::from_bits(bits);
                let special = v4.is_loopback() || v4.is_private() || v4.is_link_local() || v4.is_multicast()
                    || v4.is_unspecified() || v4.is_documentation() || v4.is_broadcast();
                prop_assert!(!(special && is_public(v4.into())), "{v4}");
                prop_assert_eq!(is_public(v4.to_ipv6_mapped().into()), is_public(v4.into()));
            }
        }

        #[test]
        fn an_ipv6_address_outside_the_global_space_is_not_public(bits in any::<u128>()) {
            let v6 = Ipv6Addr::from_bits(bits);
            let special = v6.is_loopback() || v6.is_unspecified() || v6.is_multicast() || v6.is_unique_local()
                || v6.is_unicast_link_local();
            prop_assert!(!(special && is_public(v6.into())), "{v6}");
        }

        #[test]
        fn canonical_is_a_fixed_point(text in "[a-zA-Z0-9.:\\[\\]-]{0,20}|[a-z]{1,5}[.][a-z]{2,3}(:[0-9]{1,5})?") {
            if let Ok(host) = canonical_host(&text) {
                prop_assert_eq!(canonical_host(&host), Ok(host.clone()));
                prop_assert!(host_matches(&text, &host), "a host allows itself");
            }
        }
    }
}
