use proptest::prelude::*;

use super::*;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 12 * MIB;

fn at(millis: u64) -> Time {
    Time(Duration::from_millis(millis))
}

fn layout() -> PieceLayout {
    PieceLayout::new(SIZE)
}

fn last_start() -> u64 {
    layout().start(layout().last().unwrap())
}

/// A reader of ranges (or of the whole) that came at the beginning of time.
fn reader(ranges: &[Range<u64>], partial: bool) -> Reader {
    Reader::new(Time::default(), ranges.to_vec(), layout(), partial, 0)
}

fn nothing() -> Facts {
    Facts {
        epoch: 0,
        here: Here::Nothing,
        storage: Storage::Disk,
        is_to_come: true,
        is_alone: false,
        is_direct: false,
        has_failed: false,
        origin_failures: 0,
    }
}

/// The moment, in milliseconds, at which a reader that gets nothing no longer waits, and its step then.
fn turns(reader: &mut Reader, facts: &Facts) -> (u64, Step) {
    let mut now = Time::default();
    loop {
        match reader.next(now, facts) {
            Step::Wait(until) => now = until,
            step => return (now.0.as_millis() as u64, step),
        }
    }
}

#[test]
fn each_reader_turns_to_the_origin_after_its_patience() {
    let (range, whole) = (MIB..2 * MIB, 0..SIZE);
    let ask = |range: Range<u64>| Step::AskOrigin(vec![range]);
    let direct = |range: Range<u64>, is_proved| {
        Step::ReadDirect(Stretch {
            until: range.end,
            range,
            is_proved,
            may_skip: true,
        })
    };
    let memory = Facts {
        storage: Storage::Memory,
        ..nothing()
    };
    let passed = Facts {
        is_to_come: false,
        ..memory
    };
    let nowhere = Facts {
        storage: Storage::Nowhere,
        ..nothing()
    };
    let alone = Facts {
        is_alone: true,
        ..nothing()
    };
    let others = Facts {
        here: Here::HiddenLoose,
        ..nothing()
    };
    let cases = [
        (&range, true, nothing(), 1500, ask(range.clone())),
        (&range, true, alone, 0, ask(range.clone())),
        (&whole, false, nothing(), 12_000, ask(0..last_start())),
        (&whole, false, alone, 12_000, ask(0..last_start())),
        (&range, true, memory, 1500, direct(range.clone(), false)),
        (&range, true, passed, 0, direct(range.clone(), false)),
        (&range, true, nowhere, 0, direct(range.clone(), false)),
        (&whole, false, nowhere, 0, direct(whole.clone(), true)),
        (
            &range,
            true,
            others,
            1500,
            Step::ReadDirect(Stretch {
                until: range.end,
                range: range.clone(),
                is_proved: false,
                may_skip: false,
            }),
        ),
        (
            &range,
            true,
            Facts {
                has_failed: true,
                ..nothing()
            },
            0,
            Step::GiveUp(Reason::DownloadFailed),
        ),
        (
            &whole,
            false,
            Facts { epoch: 1, ..alone },
            12_000,
            ask(0..last_start()),
        ),
        (
            &range,
            true,
            Facts {
                here: Here::Unproved,
                ..nothing()
            },
            0,
            Step::Prove,
        ),
        (
            &range,
            true,
            Facts {
                here: Here::Verified,
                ..nothing()
            },
            0,
            Step::Give,
        ),
        (
            &range,
            true,
            Facts {
                here: Here::Loose,
                ..nothing()
            },
            0,
            Step::Give,
        ),
    ];
    for (range, partial, facts, after_ms, step) in cases {
        let mut reader = reader(std::slice::from_ref(range), partial);
        assert_eq!(
            turns(&mut reader, &facts),
            (after_ms, step),
            "{range:?} {facts:?}"
        );
    }
}

#[test]
fn the_origin_is_asked_once_and_its_failure_ends_the_reader() {
    let mut reader = reader(&[MIB + 5..MIB + 9, 5 * MIB..6 * MIB], true);
    let facts = Facts {
        is_alone: true,
        origin_failures: 3,
        ..nothing()
    };
    let grain = LOOSE_GRAIN_BYTES;
    assert_eq!(
        reader.next(at(0), &facts),
        Step::AskOrigin(vec![MIB..MIB + grain, 5 * MIB..6 * MIB])
    );
    assert!(matches!(reader.next(at(1), &facts), Step::Wait(_)));
    reader.advance(at(2), 4, false);
    assert_eq!(reader.next(at(2), &facts), Step::End);
    assert_eq!(reader.next_range(), Some(5 * MIB..6 * MIB));
    assert!(
        matches!(reader.next(at(3), &facts), Step::Wait(_)),
        "it was asked for this range as well"
    );
    let failed = Facts {
        origin_failures: 4,
        ..facts
    };
    assert_eq!(
        reader.next(at(4), &failed),
        Step::GiveUp(Reason::OriginFailed)
    );
}

#[test]
fn only_a_reader_of_parts_sees_the_last_piece_before_the_digest_matches() {
    let alone = Facts {
        is_alone: true,
        ..nothing()
    };
    let end = last_start()..SIZE;
    let mut part = reader(std::slice::from_ref(&end), true);
    assert_eq!(part.loose_end(), SIZE);
    assert_eq!(part.next(at(0), &alone), Step::AskOrigin(vec![end.clone()]));
    let whole = 0..SIZE;
    for ranges in [std::slice::from_ref(&whole), &[end, 0..5]] {
        let mut reader = reader(ranges, true);
        reader.advance(at(0), last_start() - reader.rest().start, false);
        assert_eq!(reader.loose_end(), last_start());
        assert_eq!(reader.next(at(0), &alone), Step::WantWhole);
        assert!(
            matches!(reader.next(at(1), &alone), Step::Wait(_)),
            "it is wanted once"
        );
    }
}

#[test]
fn a_reader_that_gets_nothing_gives_up() {
    let mut reader = reader(std::slice::from_ref(&(0..SIZE)), false);
    reader.leave_to_download();
    assert_eq!(
        turns(&mut reader, &nothing()),
        (45_000, Step::GiveUp(Reason::Stalled))
    );
    reader.advance(at(60_000), 1, false);
    let unproved = Facts {
        here: Here::Unproved,
        ..nothing()
    };
    assert_eq!(reader.next(at(60_001), &unproved), Step::Prove);
    assert_eq!(
        reader.next(at(105_000), &unproved),
        Step::GiveUp(Reason::Unproved)
    );
    let other_bytes = Facts {
        epoch: 1,
        here: Here::Verified,
        ..nothing()
    };
    assert_eq!(
        reader.next(at(60_001), &other_bytes),
        Step::GiveUp(Reason::WrongBytes)
    );
}

fn facts() -> impl Strategy<Value = Facts> {
    let here = prop_oneof![
        4 => Just(Here::Nothing),
        1 => Just(Here::Verified),
        1 => Just(Here::Loose),
        1 => Just(Here::HiddenLoose),
        1 => Just(Here::Unproved),
    ];
    let storage = prop_oneof![4 => Just(Storage::Disk), 1 => Just(Storage::Memory), 1 => Just(Storage::Nowhere)];
    (
        here,
        storage,
        any::<[bool; 3]>(),
        prop::bool::weighted(0.05),
        0..3u32,
    )
        .prop_map(
            |(here, storage, [is_to_come, is_alone, is_direct], has_failed, origin_failures)| {
                Facts {
                    epoch: 0,
                    here,
                    storage,
                    is_to_come,
                    is_alone,
                    is_direct,
                    has_failed,
                    origin_failures,
                }
            },
        )
}

proptest! {
    /// In every case a reader moves on, waits for a bounded time, or ends. It asks the origin once, for bytes of the
    /// blob that it may show, and gives out no loose bytes beyond these.
    #[test]
    fn no_reader_waits_without_a_bound_or_asks_twice(
        start in 0..SIZE, len in 1..SIZE, partial: bool, all in prop::collection::vec((facts(), 0..20_000u64), 1..60),
    ) {
        let range = if partial { start..SIZE.min(start + len) } else { 0..SIZE };
        let mut reader = reader(std::slice::from_ref(&range), partial);
        let readable = if partial && range.start > 0 { SIZE } else { last_start() };
        let (mut now, mut moved, mut asks) = (Time::default(), Time::default(), 0);
        for (facts, passes_ms) in all {
            prop_assert!(reader.loose_end() <= readable.min(range.end).max(reader.rest().start));
            let step = reader.next(now, &facts);
            match &step {
                Step::Wait(until) => {
                    prop_assert!(*until > now && until.since(now) <= LOOK_EVERY);
                    prop_assert!(now.since(moved) < STALLED);
                }
                Step::AskOrigin(ranges) => {
                    asks += 1;
                    prop_assert!(facts.storage == Storage::Disk && !ranges.is_empty());
                    prop_assert!(ranges.iter().all(|range| !range.is_empty() && range.end <= readable));
                }
                Step::ReadDirect(stretch) if !facts.is_direct => {
                    prop_assert!(!stretch.range.is_empty() && stretch.until >= stretch.range.end);
                    prop_assert!(stretch.is_proved || stretch.until <= last_start());
                    prop_assert_eq!(stretch.range.start, reader.rest().start);
                }
                Step::Give => {
                    let bytes = reader.rest().end.min(reader.rest().start + MIB) - reader.rest().start;
                    reader.advance(now, bytes, false);
                    moved = now;
                }
                Step::End => {
                    prop_assert!(reader.rest().is_empty());
                    break;
                }
                Step::GiveUp(Reason::Stalled) => {
                    prop_assert!(now.since(moved) >= STALLED);
                    break;
                }
                Step::GiveUp(_) => break,
                Step::ReadDirect(_) | Step::WantWhole | Step::Prove => {}
            }
            now = now + Duration::from_millis(passes_ms);
        }
        prop_assert!(asks <= 1);
    }
}
