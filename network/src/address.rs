//! How others can reach this host.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

/// How members reach a listener when nobody said: its own address, or this host's first global one.
pub fn advertised(listener: SocketAddr) -> String {
    let ip = if listener.ip().is_unspecified() {
        global_address(listener.is_ipv6())
    } else {
        listener.ip()
    };
    SocketAddr::new(ip, listener.port()).to_string()
}

/// The address that the default route uses, else the first that is neither loopback nor link-local, else loopback.
fn global_address(v6_too: bool) -> IpAddr {
    let v4 = || routed(Ipv4Addr::UNSPECIFIED.into(), "192.0.2.1:9");
    let v6 = || routed(Ipv6Addr::UNSPECIFIED.into(), "[2001:db8::1]:9").filter(|_| v6_too);
    let table_v4 = || {
        std::fs::read_to_string("/proc/net/fib_trie")
            .ok()
            .and_then(|text| first_v4(&text))
    };
    let table_v6 = || {
        std::fs::read_to_string("/proc/net/if_inet6")
            .ok()
            .and_then(|text| first_v6(&text))
            .filter(|_| v6_too)
    };
    v4().or_else(table_v4)
        .or_else(v6)
        .or_else(table_v6)
        .unwrap_or(Ipv4Addr::LOCALHOST.into())
}

/// Which of our addresses a packet to `target` would carry. Connecting a UDP socket sends nothing.
fn routed(bind: IpAddr, target: &str) -> Option<IpAddr> {
    let socket = UdpSocket::bind((bind, 0)).ok()?;
    socket.connect(target).ok()?;
    socket
        .local_addr()
        .map(|address| address.ip())
        .ok()
        .filter(is_global)
}

fn is_global(ip: &IpAddr) -> bool {
    let link_local = match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    !ip.is_loopback() && !ip.is_unspecified() && !link_local
}

/// The kernel's table has each local address on a line of its own, followed by `/32 host LOCAL`.
fn first_v4(fib_trie: &str) -> Option<IpAddr> {
    let lines: Vec<&str> = fib_trie.lines().map(str::trim).collect();
    lines
        .windows(2)
        .filter(|pair| pair[1] == "/32 host LOCAL")
        .find_map(|pair| {
            let ip: IpAddr = pair[0].strip_prefix("|-- ")?.parse().ok()?;
            is_global(&ip).then_some(ip)
        })
}

/// Lines of: 32 hex digits, index, prefix length, scope (00 is global), flags, interface.
fn first_v6(if_inet6: &str) -> Option<IpAddr> {
    if_inet6.lines().find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let bits = u128::from_str_radix(fields.first()?, 16).ok()?;
        let ip = IpAddr::from(Ipv6Addr::from(bits));
        (fields.get(3) == Some(&"00") && is_global(&ip)).then_some(ip)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_global_address_is_taken_from_the_kernels_tables() {
        let trie = "Main:\n  +-- 0.0.0.0/0 3 0 5\n     |-- 127.0.0.1\n        /32 host LOCAL\n     |-- 10.0.0.0\n        \
                    /24 link UNICAST\n     |-- 10.0.0.7\n        /32 host LOCAL\n";
        assert_eq!(first_v4(trie), Some("10.0.0.7".parse().unwrap()));
        let v6 = "00000000000000000000000000000001 01 80 10 80 lo\n\
                  fe800000000000000000000000000001 02 40 20 80 eth0\n\
                  20010db8000000000000000000000007 02 40 00 80 eth0\n";
        assert_eq!(first_v6(v6), Some("2001:db8::7".parse().unwrap()));
        assert_eq!((first_v4(""), first_v6("garbage")), (None, None));
    }

    #[test]
    fn a_listener_on_one_address_is_advertised_as_it_is() {
        assert_eq!(
            advertised("[2001:db8::1]:6502".parse().unwrap()),
            "[2001:db8::1]:6502"
        );
        assert!(!advertised("[::]:6502".parse().unwrap()).starts_with("[::]"));
    }
}
