//! A blob's size (eight bytes, the first the least), then a Range header: the selected bytes lie in the blob, in the
//! order asked for.

#![no_main]

use hawker_oci::range::{MAX_RANGES, Ranges, Resolved, Spec, content_range, parse_content_range};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let Some((size, header)) = input.split_first_chunk() else {
        return;
    };
    let (size, Ok(header)) = (u64::from_le_bytes(*size), std::str::from_utf8(header)) else {
        return;
    };
    if let Some((range, told)) = parse_content_range(header) {
        assert!(
            !range.is_empty() && told.is_none_or(|size| range.end <= size),
            "{range:?} {told:?}"
        );
    }
    let Ok(ranges) = Ranges::parse(header) else {
        return;
    };
    let specs = ranges.specs();
    assert!((1..=MAX_RANGES).contains(&specs.len()));
    let wanted: Vec<_> = specs
        .iter()
        .filter_map(|spec| wanted(*spec, size))
        .collect();
    let resolved = match ranges.resolve(size) {
        Resolved::Whole => return assert_eq!(size, 0, "{specs:?}"),
        Resolved::TooMuch => {
            let all: u128 = wanted
                .iter()
                .map(|range| u128::from(range.end - range.start))
                .sum();
            return assert!(
                wanted.len() > 1 && all > u128::from(size),
                "{specs:?} of {size}"
            );
        }
        Resolved::One(range) => vec![range],
        Resolved::Many(ranges) => ranges,
        Resolved::Unsatisfiable => Vec::new(),
    };
    for range in &resolved {
        let header = content_range(range, size);
        assert_eq!(
            parse_content_range(&header),
            Some((range.clone(), Some(size))),
            "{header}"
        );
    }
    assert_eq!(resolved, wanted, "{specs:?} of {size}");
});

/// RFC 9110, 14.1.2, as plainly as it can be said.
fn wanted(spec: Spec, size: u64) -> Option<std::ops::Range<u64>> {
    let range = match spec {
        Spec::From(first) => first..size,
        Spec::Between(first, last) => first..last.saturating_add(1).min(size),
        Spec::Suffix(length) => size.saturating_sub(length)..size,
    };
    (!range.is_empty()).then_some(range)
}
