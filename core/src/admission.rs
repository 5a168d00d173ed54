//! Admission to the peer port. It bounds three things: handshakes of strangers, members that broke the protocol, and
//! the messages of one member.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

use crate::Time;
use crate::piece::PeerId;

/// Handshakes at once, in all and from one address. Members that are connected do not count.
const HANDSHAKES: usize = 256;
const HANDSHAKES_AN_ADDRESS: usize = 64;

/// A handshake takes milliseconds. One that has taken this long gives way to a new one when there are too many.
const HANDSHAKE_USUALLY: Duration = Duration::from_millis(250);

/// How long a member is refused after it broke the protocol. The time doubles each time, up to the longest.
const FIRST_REFUSAL: Duration = Duration::from_secs(10);
const LONGEST_REFUSAL: Duration = Duration::from_secs(600);

/// A member that has kept the protocol for so long begins anew.
const FORGIVEN_AFTER: Duration = Duration::from_secs(1800);

/// Members remembered at most.
const REMEMBERED: usize = 4096;

/// The handshakes under way with strangers. Each has a number.
#[derive(Clone, Debug, Default)]
pub struct Handshakes {
    open: BTreeMap<u64, (IpAddr, Time)>,
    of_address: HashMap<IpAddr, usize>,
    next: u64,
}

/// A handshake that may begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Begun {
    /// Its number.
    pub handshake: u64,
    /// This one has to end for it.
    pub instead_of: Option<u64>,
}

impl Handshakes {
    /// A stranger at this address connected. `None`: there is no place for it.
    ///
    /// If one address has too many handshakes, or all together are too many, an old handshake gives way. So strangers
    /// that say nothing keep nobody out.
    pub fn begin(&mut self, now: Time, address: IpAddr) -> Option<Begun> {
        let address = network_of(address);
        let own = self.of_address.get(&address).copied().unwrap_or(0);
        let instead_of = if own >= HANDSHAKES_AN_ADDRESS {
            Some(
                self.oldest_of(address)
                    .filter(|oldest| self.is_slow(now, *oldest))?,
            )
        } else if self.open.len() >= HANDSHAKES {
            let (fullest, most) = self
                .of_address
                .iter()
                .max_by_key(|(address, count)| (**count, **address))?;
            let victim = self.oldest_of(*fullest);
            Some(victim.filter(|oldest| *most > own + 1 || self.is_slow(now, *oldest))?)
        } else {
            None
        };
        if let Some(handshake) = instead_of {
            self.over(handshake);
        }
        let handshake = self.next;
        self.next += 1;
        self.open.insert(handshake, (address, now));
        *self.of_address.entry(address).or_default() += 1;
        Some(Begun {
            handshake,
            instead_of,
        })
    }

    /// A handshake has ended, however it did.
    pub fn over(&mut self, handshake: u64) {
        let Some((address, _)) = self.open.remove(&handshake) else {
            return;
        };
        if let Some(count) = self.of_address.get_mut(&address) {
            *count -= 1;
            if *count == 0 {
                self.of_address.remove(&address);
            }
        }
    }

    fn oldest_of(&self, address: IpAddr) -> Option<u64> {
        self.open
            .iter()
            .find(|(_, (theirs, _))| *theirs == address)
            .map(|(handshake, _)| *handshake)
    }

    fn is_slow(&self, now: Time, handshake: u64) -> bool {
        self.open
            .get(&handshake)
            .is_some_and(|(_, at)| now.since(*at) >= HANDSHAKE_USUALLY)
    }
}

/// The network of one host: an IPv4 address, or an IPv6 network of 64 bits.
fn network_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() >> 64 << 64)),
        v4 @ IpAddr::V4(_) => v4,
    }
}

/// Members that broke the protocol and are refused for a while.
#[derive(Clone, Debug, Default)]
pub struct Refusals(HashMap<PeerId, Breach>);

#[derive(Clone, Copy, Debug)]
struct Breach {
    at: Time,
    refused_for: Duration,
}

impl Refusals {
    /// A member broke the protocol; for how long it is refused.
    pub fn broke_protocol(&mut self, now: Time, peer: PeerId) -> Duration {
        self.0
            .retain(|_, breach| now.since(breach.at) < FORGIVEN_AFTER);
        if let Some(breach) = self
            .0
            .get(&peer)
            .filter(|breach| now.since(breach.at) < breach.refused_for)
        {
            // Another of its connections, which stood already.
            return breach.refused_for;
        }
        if self.0.len() >= REMEMBERED
            && let Some(oldest) = self
                .0
                .iter()
                .min_by_key(|(peer, breach)| (breach.at, **peer))
                .map(|(peer, _)| *peer)
        {
            self.0.remove(&oldest);
        }
        let before = self.0.get(&peer).map(|breach| breach.refused_for * 2);
        let refused_for = before.unwrap_or(FIRST_REFUSAL).min(LONGEST_REFUSAL);
        self.0.insert(
            peer,
            Breach {
                at: now,
                refused_for,
            },
        );
        refused_for
    }

    /// How long a member is still refused.
    pub fn refused_for(&self, now: Time, peer: PeerId) -> Option<Duration> {
        let breach = self.0.get(&peer)?;
        breach
            .refused_for
            .checked_sub(now.since(breach.at))
            .filter(|left| !left.is_zero())
    }
}

/// How much of something may be done: so much at once, and so much a second in the long run.
#[derive(Clone, Copy, Debug)]
pub struct Allowance {
    at_once: f64,
    a_second: f64,
    left: f64,
    at: Time,
}

impl Allowance {
    /// Nothing of it has been used.
    pub const fn new(at_once: f64, a_second: f64, now: Time) -> Self {
        Self {
            at_once,
            a_second,
            left: at_once,
            at: now,
        }
    }

    /// How much is left; below zero, so much is owed.
    pub fn left(&self, now: Time) -> f64 {
        (self.left + now.since(self.at).as_secs_f64() * self.a_second).min(self.at_once)
    }

    /// Uses some of it, which may then be owed; how long to wait until nothing is.
    pub fn take(&mut self, now: Time, amount: f64) -> Duration {
        (self.left, self.at) = (self.left(now) - amount, self.at.max(now));
        Duration::try_from_secs_f64(-self.left / self.a_second).unwrap_or(Duration::ZERO)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(millis: u64) -> Time {
        Time(Duration::from_millis(millis))
    }

    fn ip(n: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, n])
    }

    fn peer(n: u16) -> PeerId {
        let mut id = [0; 16];
        id[..2].copy_from_slice(&n.to_be_bytes());
        PeerId(id)
    }

    #[test]
    fn idle_strangers_at_one_address_keep_nobody_out() {
        let mut handshakes = Handshakes::default();
        for _ in 0..HANDSHAKES_AN_ADDRESS {
            assert_eq!(handshakes.begin(at(0), ip(1)).unwrap().instead_of, None);
        }
        assert_eq!(
            handshakes.begin(at(10), ip(2)).unwrap().instead_of,
            None,
            "another address has room"
        );
        assert_eq!(
            handshakes.begin(at(10), ip(1)),
            None,
            "all of them are young"
        );
        assert_eq!(
            handshakes.begin(at(300), ip(1)).unwrap().instead_of,
            Some(0),
            "the oldest gives way"
        );
    }

    #[test]
    fn a_host_with_few_handshakes_gets_the_place_of_one_with_many() {
        let mut handshakes = Handshakes::default();
        for n in 0..HANDSHAKES {
            handshakes
                .begin(at(0), ip((n / HANDSHAKES_AN_ADDRESS) as u8))
                .unwrap();
        }
        assert!(
            handshakes
                .begin(at(1), ip(99))
                .unwrap()
                .instead_of
                .is_some()
        );
        assert_eq!(handshakes.open.len(), HANDSHAKES);
    }

    #[test]
    fn addresses_of_one_ipv6_network_count_as_one_host() {
        let address = |text: &str| network_of(text.parse().unwrap());
        assert_eq!(address("2001:db8::1"), address("2001:db8::ffff:1"));
        assert_ne!(address("2001:db8::1"), address("2001:db8:0:1::1"));
        assert_eq!(address("::ffff:10.0.0.1"), ip(1));
    }

    #[test]
    fn a_member_that_breaks_the_protocol_is_refused_for_longer_each_time() {
        let mut refusals = Refusals::default();
        assert_eq!(refusals.refused_for(at(0), peer(1)), None);
        let mut now = at(0);
        for seconds in [10, 20, 40, 80, 160, 320, 600, 600] {
            let refused_for = refusals.broke_protocol(now, peer(1));
            assert_eq!(refused_for, Duration::from_secs(seconds));
            assert_eq!(
                refusals.broke_protocol(now, peer(1)),
                refused_for,
                "its other connections count once"
            );
            now = now + refused_for;
            assert_eq!(refusals.refused_for(now, peer(1)), None);
        }
        now = now + FORGIVEN_AFTER;
        assert_eq!(refusals.broke_protocol(now, peer(1)), FIRST_REFUSAL);
    }

    #[test]
    fn no_more_members_are_remembered_than_there_is_room_for() {
        let mut refusals = Refusals::default();
        for n in 0..REMEMBERED as u16 + 10 {
            refusals.broke_protocol(at(u64::from(n)), peer(n));
        }
        assert_eq!(refusals.0.len(), REMEMBERED);
        assert_eq!(refusals.refused_for(at(5000), peer(0)), None);
        assert!(
            refusals
                .refused_for(at(5000), peer(REMEMBERED as u16))
                .is_some()
        );
    }

    #[test]
    fn an_allowance_lets_a_burst_through_and_then_its_rate() {
        let mut allowance = Allowance::new(10.0, 5.0, at(0));
        assert_eq!(allowance.take(at(0), 10.0), Duration::ZERO);
        assert_eq!(allowance.take(at(0), 1.0), Duration::from_millis(200));
        assert_eq!(allowance.take(at(200), 1.0), Duration::from_millis(200));
        assert_eq!(allowance.take(at(60_000), 10.0), Duration::ZERO);
    }

    proptest! {
        /// Handshakes of strangers stay few, and a host without any gets in within a moment.
        #[test]
        fn handshakes_stay_bounded_and_a_new_host_gets_in(steps in prop::collection::vec((0..20u8, 0..50u64, any::<bool>()), 1..1500)) {
            let mut handshakes = Handshakes::default();
            let mut now = 0;
            for (n, wait, ends) in steps {
                now += wait / 40;
                if let Some(begun) = handshakes.begin(at(now), ip(n)).filter(|_| ends) {
                    handshakes.over(begun.handshake);
                }
                prop_assert!(handshakes.open.len() <= HANDSHAKES);
                prop_assert!(handshakes.of_address.values().all(|count| *count <= HANDSHAKES_AN_ADDRESS));
                prop_assert_eq!(handshakes.of_address.values().sum::<usize>(), handshakes.open.len());
            }
            prop_assert!(handshakes.begin(at(now), ip(200)).is_some());
        }
    }
}
