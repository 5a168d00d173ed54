//! Several ranges in one request, as clients of zstd:chunked layers send them: one part a range, in request order, whatever the
//! origin can do.

use std::ops::Range;

use anyhow::{Result, ensure};
use hawker_conformance::lab::{Answer, Hawker, HawkerPlan, Lab};
use hawker_conformance::origin::{Blob, Content, Fault, Rule};
use hawker_conformance::scene::{Plan, REPOSITORY, blob_path, start_origin, until_committed};

const SIZE_BYTES: u64 = (8 << 20) + 77;

fn get(node: &Hawker, registry: &str, blob: &Blob, ranges: &[Range<u64>]) -> Result<Answer> {
    let specs: Vec<String> = ranges
        .iter()
        .map(|r| format!("{}-{}", r.start, r.end - 1))
        .collect();
    let range = format!("bytes={}", specs.join(","));
    node.request(registry, &blob_path(blob))
        .header("range", range)
        .send(node.host())
}

/// Checks that the answer has just these parts, in this order.
fn right_parts(answer: &Answer, content: &Content, ranges: &[Range<u64>]) -> Result<()> {
    ensure!(answer.status == 206, "{}: {}", answer.status, answer.text());
    let parts = answer.parts()?;
    ensure!(
        parts.len() == ranges.len(),
        "{} parts for {} ranges",
        parts.len(),
        ranges.len()
    );
    for ((told, bytes), range) in parts.iter().zip(ranges) {
        let expected = format!(
            "bytes {}-{}/{}",
            range.start,
            range.end - 1,
            content.size_bytes()
        );
        ensure!(*told == expected, "{told} in place of {expected}");
        let mut original = vec![0; (range.end - range.start) as usize];
        content.read_at(range.start, &mut original)?;
        ensure!(*bytes == original, "other bytes in {told}");
    }
    Ok(())
}

/// As many as one request may have; the last one ends with the blob.
fn a_thousand() -> Vec<Range<u64>> {
    let mut ranges: Vec<_> = (0..1023).map(|i| i * 8000..i * 8000 + 10).collect();
    ranges.push(SIZE_BYTES - 5..SIZE_BYTES);
    ranges
}

#[test]
fn a_thousand_ranges_are_served_cold_and_cached_and_more_are_refused() -> Result<()> {
    Plan::nodes(1).play(|scene| {
        let content = Content::generated(77, SIZE_BYTES);
        let blob = scene.origin.add_blob(REPOSITORY, content.clone())?;
        let (node, registry, ranges) = (scene.node(), scene.registry(), a_thousand());
        right_parts(&get(node, &registry, &blob, &ranges)?, &content, &ranges)?;
        let copies = scene.origin_copies(&blob);
        ensure!(copies < 1.1, "{copies} copies");
        scene.pull(node, &blob)?;
        until_committed(node, &blob)?;
        let mut ranges = ranges;
        ranges.reverse();
        right_parts(&get(node, &registry, &blob, &ranges)?, &content, &ranges)?;
        ranges.push(0..1);
        for ranges in [&ranges[..], &[0..SIZE_BYTES, 0..1]] {
            let refused = get(node, &registry, &blob, ranges)?;
            ensure!(
                refused.status == 400,
                "{}: {}",
                refused.status,
                refused.text()
            );
        }
        Ok(())
    })
}

#[test]
fn what_lies_between_the_ranges_is_not_fetched_from_peers() -> Result<()> {
    Plan::nodes(1).play(|scene| {
        let content = Content::generated(78, 32 << 20);
        let blob = scene.origin.add_blob(REPOSITORY, content.clone())?;
        scene.pull(&scene.cluster.seed, &blob)?;
        until_committed(&scene.cluster.seed, &blob)?;
        let sent = scene.origin_bytes(&blob);
        let (node, mib) = (scene.node(), 1 << 20);
        let ranges = [
            20 * mib..20 * mib + 9,
            5 * mib - 5..5 * mib + 5,
            30 * mib..30 * mib + 100,
        ];
        right_parts(
            &get(node, &scene.registry(), &blob, &ranges)?,
            &content,
            &ranges,
        )?;
        let bytes = node.status()?.bytes;
        ensure!(
            (1..6 * mib).contains(&bytes.received_seeds),
            "{} bytes from the seed",
            bytes.received_seeds
        );
        ensure!(
            scene.origin_bytes(&blob) == sent,
            "the origin was asked for what the seed has"
        );
        Ok(())
    })
}

/// A node without a cluster, and what it asks the origin.
fn alone(fault: Option<Fault>, ranges: &[Range<u64>], requests: u64, copies: f64) -> Result<()> {
    let lab = Lab::new()?;
    lab.explain((|| {
        let origin = start_origin(&lab.host("origin")?)?;
        let content = Content::generated(79, SIZE_BYTES);
        let blob = origin.add_blob(REPOSITORY, content.clone())?;
        let registry = origin.address().to_string();
        let node = HawkerPlan::proxy(&lab.host("node")?)
            .plain_registry(&registry)
            .start()?;
        if let Some(fault) = fault {
            origin.add_fault(Rule::always(fault).on(blob.digest));
        }
        right_parts(&get(&node, &registry, &blob, ranges)?, &content, ranges)?;
        let totals = origin.totals();
        ensure!(
            totals.blob_gets <= requests,
            "{} requests for blobs",
            totals.blob_gets
        );
        let sent = totals.blob_bytes as f64 / SIZE_BYTES as f64;
        ensure!(sent < copies, "{sent} copies");
        Ok(())
    })())
}

#[test]
fn an_origin_that_knows_single_ranges_only_is_not_asked_once_a_range() -> Result<()> {
    // Up to the last piece by one request; the last request takes the whole.
    alone(None, &a_thousand(), 4, 2.1)
}

#[test]
fn ranges_are_served_when_the_origin_knows_none_and_cost_one_copy() -> Result<()> {
    let ranges: Vec<_> = (0..1000)
        .rev()
        .map(|i| i * 8000 + 1..i * 8000 + 11)
        .collect();
    alone(Some(Fault::IgnoreRange), &ranges, 2, 1.5)
}
