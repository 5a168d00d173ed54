//! The place of a member, and the nearness of two members.

use std::net::IpAddr;
use std::sync::Arc;

/// The place of a member: names, empty if they are not told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// A data centre or the like: between zones links are dear.
    pub zone: Arc<str>,
    /// A part of the zone within which links are shorter.
    pub rack: Arc<str>,
}

/// How near two members are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Nearness {
    /// In different zones.
    Elsewhere,
    /// In the same zone.
    Zone,
    /// In the same rack.
    Rack,
}

impl Place {
    /// Nothing is told of it.
    pub fn is_unknown(&self) -> bool {
        self.zone.is_empty() && self.rack.is_empty()
    }

    /// The nearness of another place. Members without a zone stand together; a member without a rack stands in none.
    pub fn nearness(&self, other: &Self) -> Nearness {
        match (
            self.zone == other.zone,
            !self.rack.is_empty() && self.rack == other.rack,
        ) {
            (false, _) => Nearness::Elsewhere,
            (true, false) => Nearness::Zone,
            (true, true) => Nearness::Rack,
        }
    }
}

/// Addresses that begin alike (CIDR, RFC 4632).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    /// An IPv4 address as such, never written as IPv6.
    address: IpAddr,
    length: u8,
}

impl Network {
    /// The addresses whose first `length` bits are those of `address`; `None` when it has fewer.
    pub fn new(address: IpAddr, length: u8) -> Option<Self> {
        let bits = if address.is_ipv4() { 32 } else { 128 };
        let length = Some(length).filter(|length| *length <= bits)?;
        match address.to_canonical() {
            // Written as IPv6, an IPv4 network is 96 bits longer.
            v4 @ IpAddr::V4(_) if address.is_ipv6() => Some(Self {
                address: v4,
                length: length.checked_sub(96)?,
            }),
            _ => Some(Self { address, length }),
        }
    }

    /// How many bits they share.
    pub const fn length(&self) -> u8 {
        self.length
    }

    /// Whether an address is one of them. An IPv4 address written as IPv6 counts as IPv4.
    pub fn contains(&self, ip: IpAddr) -> bool {
        fn same_prefix(a: u128, b: u128, width: u32, length: u8) -> bool {
            let ignored = width.saturating_sub(u32::from(length));
            a.checked_shr(ignored).unwrap_or(0) == b.checked_shr(ignored).unwrap_or(0)
        }
        match (self.address, ip.to_canonical()) {
            (IpAddr::V4(n), IpAddr::V4(i)) => {
                same_prefix(n.to_bits().into(), i.to_bits().into(), 32, self.length)
            }
            (IpAddr::V6(n), IpAddr::V6(i)) => {
                same_prefix(n.to_bits(), i.to_bits(), 128, self.length)
            }
            _ => false,
        }
    }
}

/// The places of some networks, for members that do not name their own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Networks(Vec<(Network, Place)>);

impl Networks {
    /// Of networks that lie in each other the smallest counts.
    pub fn new(mut places: Vec<(Network, Place)>) -> Self {
        places.sort_by_key(|(network, _)| std::cmp::Reverse(network.length()));
        Self(places)
    }

    /// The place of a member with this address.
    pub fn of(&self, ip: IpAddr) -> Option<&Place> {
        self.0
            .iter()
            .find(|(network, _)| network.contains(ip))
            .map(|(_, place)| place)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(zone: &str, rack: &str) -> Place {
        Place {
            zone: zone.into(),
            rack: rack.into(),
        }
    }

    fn network(text: &str) -> Network {
        let (address, length) = text.split_once('/').unwrap();
        Network::new(address.parse().unwrap(), length.parse().unwrap()).unwrap()
    }

    #[test]
    fn racks_are_within_zones_and_no_rack_is_no_place() {
        let here = place("a", "1");
        for (other, expected) in [
            (place("a", "1"), Nearness::Rack),
            (place("a", "2"), Nearness::Zone),
            (place("a", ""), Nearness::Zone),
            (place("b", "1"), Nearness::Elsewhere),
            (place("", ""), Nearness::Elsewhere),
        ] {
            assert_eq!(here.nearness(&other), expected, "{other:?}");
            assert_eq!(other.nearness(&here), expected, "{other:?}");
        }
        assert_eq!(Place::default().nearness(&Place::default()), Nearness::Zone);
    }

    #[test]
    fn the_smallest_network_says_where_an_address_is() {
        let places = [
            ("10.0.0.0/8", "all"),
            ("10.1.2.0/24", "small"),
            ("10.1.0.0/16", "big"),
            ("fd00::/8", "six"),
        ];
        let places = Networks::new(
            places
                .map(|(text, zone)| (network(text), place(zone, "")))
                .into(),
        );
        for (ip, zone) in [
            ("10.1.2.3", Some("small")),
            ("::ffff:10.1.2.3", Some("small")),
            ("10.1.3.3", Some("big")),
            ("10.2.0.1", Some("all")),
            ("fd12::1", Some("six")),
            ("192.168.0.1", None),
            ("2001:db8::1", None),
        ] {
            assert_eq!(
                places.of(ip.parse().unwrap()).map(|place| &*place.zone),
                zone,
                "{ip}"
            );
        }
        assert!(network("0.0.0.0/0").contains("8.8.8.8".parse().unwrap()));
        assert_eq!(Network::new("10.0.0.0".parse().unwrap(), 33), None);
        assert_eq!(network("::ffff:10.0.0.0/104"), network("10.0.0.0/8"));
    }
}
