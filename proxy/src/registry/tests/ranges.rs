//! Several ranges in one request.

use std::ops::Range;

use proptest::prelude::*;

use super::*;

/// A naive reading of a `multipart/byteranges` body: each part's Content-Range, and its bytes.
fn parts(got: &Got) -> Vec<(String, Vec<u8>)> {
    let boundary = got
        .header("content-type")
        .strip_prefix("multipart/byteranges; boundary=")
        .unwrap();
    let line = format!("\r\n--{boundary}");
    let body = [b"\r\n", got.body.as_slice()].concat();
    let at: Vec<usize> = (0..body.len())
        .filter(|at| body[*at..].starts_with(line.as_bytes()))
        .chain([body.len()])
        .collect();
    let mut pieces: Vec<&[u8]> = at
        .windows(2)
        .map(|w| &body[w[0] + line.len()..w[1]])
        .collect();
    assert_eq!(
        (at[0], pieces.pop().unwrap()),
        (0, b"--\r\n".as_slice()),
        "nothing comes before or after"
    );
    pieces
        .into_iter()
        .map(|piece| {
            let end = piece.windows(4).position(|w| w == b"\r\n\r\n").unwrap();
            let head = str::from_utf8(&piece[..end]).unwrap();
            let fields: Vec<&str> = head.strip_prefix("\r\n").unwrap().split("\r\n").collect();
            assert_eq!(fields[0], "Content-Type: application/octet-stream");
            (
                fields[1]
                    .strip_prefix("Content-Range: ")
                    .unwrap()
                    .to_owned(),
                piece[end + 4..].to_vec(),
            )
        })
        .collect()
}

fn expected(blob: &[u8], ranges: &[Range<usize>]) -> Vec<(String, Vec<u8>)> {
    let part = |range: &Range<usize>| {
        let told = format!("bytes {}-{}/{}", range.start, range.end - 1, blob.len());
        (told, blob[range.clone()].to_vec())
    };
    ranges.iter().map(part).collect()
}

#[tokio::test]
async fn several_ranges_come_in_order_unmerged_and_without_those_past_the_end() {
    let (image, registry, node) = image_node(3_000_000).await;
    node.commit(&image.blob);
    let target = format!("/v2/a/b/blobs/{}", image.blob_digest());
    let etag = format!("\"{}\"", image.blob_digest());
    let mut client = Client::to(node.address).await;
    for (range, ranges) in [
        ("bytes=0-1,5-6", vec![0..2, 5..7]),
        ("bytes=5-6,0-1", vec![5..7, 0..2]),
        ("bytes=0-1,2-3,2-3", vec![0..2, 2..4, 2..4]),
        (
            "bytes=10-1999999,2000000-",
            vec![10..2_000_000, 2_000_000..3_000_000],
        ),
        (
            "bytes=7-7,3000000-,-3,4000000-4000001",
            vec![7..8, 2_999_997..3_000_000],
        ),
    ] {
        let got = client
            .ask("GET", &target, &[("Range", range), ("If-Range", &etag)])
            .await;
        assert!(got.status == 206 && got.complete, "{range}: {}", got.status);
        assert!(parts(&got) == expected(&image.blob, &ranges), "{range}");
        assert_eq!(
            (got.header("content-range"), got.header("etag")),
            ("", etag.as_str())
        );
        let head = client.ask("HEAD", &target, &[("Range", range)]).await;
        assert_eq!(
            (head.status, head.header("content-length")),
            (206, got.header("content-length"))
        );
        assert!(
            head.header("content-type")
                .starts_with("multipart/byteranges")
        );
    }
    let one = client
        .ask("GET", &target, &[("Range", "bytes=3000000-,4-5")])
        .await;
    assert_eq!(
        (one.status, one.header("content-range")),
        (206, "bytes 4-5/3000000")
    );
    assert_eq!(
        one.body,
        image.blob[4..6],
        "one that is left is no multipart"
    );
    let none = client
        .ask("GET", &target, &[("Range", "bytes=3000000-,-0")])
        .await;
    assert_eq!(
        (none.status, none.header("content-range")),
        (416, "bytes */3000000")
    );
    assert_eq!(registry.count("GET", "/v2/a/b/blobs/"), 0);
}

#[tokio::test]
async fn more_than_the_blob_in_one_answer_is_refused_so_that_clients_ask_for_less() {
    let (image, _registry, node) = image_node(100_000).await;
    node.commit(&image.blob);
    let target = format!("/v2/a/b/blobs/{}", image.blob_digest());
    let overlapping: Vec<String> = (0..1000).map(|n| format!("{n}-")).collect();
    let many: Vec<String> = (0..1025).map(|n| format!("{n}-{n}")).collect();
    for range in [
        "0-,0-".to_owned(),
        "0-50000,49999-".to_owned(),
        overlapping.join(","),
        many.join(","),
    ] {
        let got = node
            .ask("GET", &target, &[("Range", &format!("bytes={range}"))])
            .await;
        assert_eq!(
            (got.status, got.code().as_str()),
            (400, "UNSUPPORTED"),
            "{range}"
        );
    }
    let got = node
        .ask(
            "GET",
            &target,
            &[("Range", &format!("bytes={}", many[..1024].join(",")))],
        )
        .await;
    assert_eq!((got.status, parts(&got).len()), (206, 1024));
}

#[test]
fn parts_are_slices_of_the_blob_whatever_is_asked_for() {
    const SIZE: usize = 300_000;
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (image, _registry, node) = runtime.block_on(image_node(SIZE));
    node.commit(&image.blob);
    let target = format!("/v2/a/b/blobs/{}", image.blob_digest());
    let specs = prop::collection::vec((0..SIZE + 5_000, 1..30_000usize), 1..20);
    let config = ProptestConfig {
        cases: 64,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    proptest!(config, |(specs in specs)| {
        let asked: Vec<String> = specs.iter().map(|(at, len)| format!("{at}-{}", at + len - 1)).collect();
        let ranges: Vec<_> = specs.iter().filter(|(at, _)| *at < SIZE)
            .map(|(at, len)| *at..(at + len).min(SIZE))
            .collect();
        let range = format!("bytes={}", asked.join(", "));
        let got = runtime.block_on(node.ask("GET", &target, &[("Range", &range)]));
        prop_assert!(got.complete);
        match ranges.len() {
            0 => prop_assert_eq!(got.status, 416),
            1 => prop_assert!(got.status == 206 && got.body == image.blob[ranges[0].clone()]),
            _ if ranges.iter().map(Range::len).sum::<usize>() > SIZE => prop_assert_eq!(got.status, 400),
            _ => prop_assert!(parts(&got) == expected(&image.blob, &ranges)),
        }
    });
}
