//! Which of a member's advertised addresses are passed on to the others.
//!
//! Members dial what the scheduler names. A member that could advertise any address would point the whole cluster at it. So an
//! address counts if the member's own connection comes from there, or if the scheduler's configuration allows it.

use std::net::{IpAddr, UdpSocket};
use std::time::Duration;

use hawker_core::place::Network;
use hawker_oci::reference::host_matches;
use tokio::time::timeout;

/// For looking up one name.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(2);

/// Addresses that members may advertise besides the one they connect from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AllowedAddresses {
    /// Networks, for members behind NAT or with several interfaces.
    pub networks: Vec<Network>,
    /// Host names, exact or `*.example.com`.
    pub hosts: Vec<String>,
}

impl AllowedAddresses {
    /// Splits `addresses` (`host:port`) of a member that connects from `from` to `local` into those that are passed on and
    /// those that are refused.
    pub(crate) async fn sort(
        &self,
        addresses: Vec<String>,
        from: IpAddr,
        local: IpAddr,
    ) -> (Vec<String>, Vec<String>) {
        let (mut passed_on, mut refused) = (Vec::new(), Vec::new());
        for address in addresses {
            let list = if self.allows(&address, from, local).await {
                &mut passed_on
            } else {
                &mut refused
            };
            list.push(address);
        }
        (passed_on, refused)
    }

    async fn allows(&self, address: &str, from: IpAddr, local: IpAddr) -> bool {
        let Some((host, _)) = address.rsplit_once(':') else {
            return false;
        };
        if let Ok(ip) = host.trim_start_matches('[').trim_end_matches(']').parse() {
            return self.allows_ip(ip, from, local);
        }
        if self
            .hosts
            .iter()
            .any(|pattern| host_matches(pattern, &host.to_ascii_lowercase()))
        {
            return true;
        }
        let resolved = timeout(RESOLVE_TIMEOUT, tokio::net::lookup_host(address)).await;
        let Ok(Ok(resolved)) = resolved else {
            return false;
        };
        let mut resolved = resolved.peekable();
        resolved.peek().is_some() && resolved.all(|one| self.allows_ip(one.ip(), from, local))
    }

    fn allows_ip(&self, ip: IpAddr, from: IpAddr, local: IpAddr) -> bool {
        let (ip, from, local) = (ip.to_canonical(), from.to_canonical(), local.to_canonical());
        // A member on the scheduler's own host may connect by any of that host's addresses.
        let is_same_host = from.is_loopback() || from == local;
        ip == from
            || self.networks.iter().any(|network| network.contains(ip))
            || (is_same_host && is_of_this_host(ip))
    }
}

/// Only addresses of this host can be bound.
fn is_of_this_host(ip: IpAddr) -> bool {
    !ip.is_unspecified() && !ip.is_multicast() && UdpSocket::bind((ip, 0)).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_address_counts_if_the_member_connects_from_there_or_it_is_allowed() {
        let allowed = AllowedAddresses {
            networks: vec![Network::new("203.0.113.0".parse().unwrap(), 24).unwrap()],
            hosts: vec!["*.nodes.example".into()],
        };
        let cases = [
            ("its own address", "10.0.0.7:6501", "10.0.0.7", true),
            (
                "its own, written as IPv6",
                "[::ffff:10.0.0.7]:6501",
                "10.0.0.7",
                true,
            ),
            ("another address", "10.0.0.8:6501", "10.0.0.7", false),
            ("the scheduler's", "10.0.0.1:6501", "10.0.0.7", false),
            ("an allowed network", "203.0.113.9:6501", "10.0.0.7", true),
            ("an allowed name", "a.nodes.example:6501", "10.0.0.7", true),
            (
                "a name that does not resolve",
                "nowhere.invalid:6501",
                "10.0.0.7",
                false,
            ),
            (
                "a name of another address",
                "localhost:6501",
                "10.0.0.7",
                false,
            ),
            (
                "loopback from elsewhere",
                "127.0.0.1:6501",
                "10.0.0.7",
                false,
            ),
            (
                "another address of this host",
                "127.0.0.9:6501",
                "127.0.0.1",
                true,
            ),
            (
                "a foreign address from this host",
                "192.0.2.7:6501",
                "127.0.0.1",
                false,
            ),
            ("no particular address", "0.0.0.0:6501", "127.0.0.1", false),
        ];
        for (name, address, from, expected) in cases {
            let local = "10.0.0.1".parse().unwrap();
            let (passed_on, refused) = allowed
                .sort(vec![address.into()], from.parse().unwrap(), local)
                .await;
            assert_eq!(
                (passed_on.len(), refused.len()),
                if expected { (1, 0) } else { (0, 1) },
                "{name}"
            );
        }
    }
}
