//! The invariants of every run, checked as it goes.

use hawker_core::message::Offer;
use hawker_core::piece::PieceSet;

/// Violations told at most; one is enough to fail a run.
const TOLD: usize = 20;

/// The checkers, and what they found.
#[derive(Clone, Debug, Default)]
pub struct Checks {
    found: Vec<String>,
    count: u64,
}

impl Checks {
    /// The violations, the first twenty.
    pub fn found(&self) -> &[String] {
        &self.found
    }

    /// How often anything was.
    pub const fn count(&self) -> u64 {
        self.count
    }

    fn expect(&mut self, holds: bool, violation: impl FnOnce() -> String) {
        if !holds {
            self.count += 1;
            if self.found.len() < TOLD {
                self.found.push(violation());
            }
        }
    }

    /// Only verified pieces are announced.
    pub(super) fn announced(&mut self, host: u32, offer: &Offer, verified: &PieceSet) {
        let unverified = match offer {
            Offer::All => !verified.is_full(),
            Offer::Bits(bits) => PieceSet::from_bytes(verified.count(), bits)
                .minus(verified)
                .next()
                .is_some(),
            Offer::Some(pieces) => pieces.iter().any(|piece| !verified.contains(*piece)),
        };
        self.expect(!unverified, || {
            format!("host {host} announced a piece that it has not verified")
        });
    }

    /// Only verified pieces are sent, and only so many at once.
    pub(super) fn uploads(&mut self, host: u32, verified: bool, at_once: usize, slots: usize) {
        self.expect(verified, || {
            format!("host {host} sent a piece that it has not verified")
        });
        self.expect(at_once <= slots, || {
            format!("host {host} sent {at_once} pieces at once, not {slots}")
        });
    }

    /// No wrong piece is kept.
    pub(super) fn kept(&mut self, host: u32, right: bool) {
        self.expect(right, || format!("host {host} kept a wrong piece"));
    }

    /// The origin is spared.
    pub(super) fn origin(&mut self, bytes: u64, size_bytes: u64, copies_max: f64) {
        let copies = bytes as f64 / size_bytes.max(1) as f64;
        self.expect(copies <= copies_max, || {
            format!("{copies:.2} copies came from the origin")
        });
    }

    /// Every fetch ends.
    pub(super) fn ended(&mut self, host: u32, missing: u32) {
        self.expect(missing == 0, || {
            format!("host {host} never got {missing} of its pieces")
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(check: impl FnOnce(&mut Checks)) -> u64 {
        let mut checks = Checks::default();
        check(&mut checks);
        assert_eq!(checks.found().len() as u64, checks.count());
        checks.count()
    }

    #[test]
    fn announcing_what_is_not_verified_is_found() {
        let mut verified = PieceSet::empty(70);
        verified.insert(3);
        verified.insert(66);
        let offers = [
            (Offer::Some(vec![3]), 0),
            (Offer::Bits(verified.to_bytes()), 0),
            (Offer::Some(vec![3, 4]), 1),
            (Offer::Bits(PieceSet::full(70).to_bytes()), 1),
            (Offer::All, 1),
        ];
        for (offer, violations) in offers {
            assert_eq!(
                checked(|checks| checks.announced(1, &offer, &verified)),
                violations,
                "{offer:?}"
            );
        }
        assert_eq!(
            checked(|checks| checks.announced(1, &Offer::All, &PieceSet::full(70))),
            0
        );
    }

    #[test]
    fn each_other_checker_can_fail_and_can_pass() {
        type Check = fn(&mut Checks);
        let cases: [(Check, Check); 5] = [
            (|c| c.uploads(1, true, 4, 4), |c| c.uploads(1, true, 5, 4)),
            (|c| c.uploads(1, true, 1, 4), |c| c.uploads(1, false, 1, 4)),
            (|c| c.kept(1, true), |c| c.kept(1, false)),
            (|c| c.origin(100, 100, 1.0), |c| c.origin(101, 100, 1.0)),
            (|c| c.ended(1, 0), |c| c.ended(1, 1)),
        ];
        for (index, (pass, fail)) in cases.into_iter().enumerate() {
            assert_eq!((checked(pass), checked(fail)), (0, 1), "case {index}");
        }
    }
}
